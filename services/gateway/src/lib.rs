//! The HTTP door.
#![allow(dead_code)]
mod answer;
mod body;
mod error;
mod fields;
mod guard;
mod json;
mod messages;
mod question;
mod selector;
mod submission;
