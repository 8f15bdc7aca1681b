//! The one program, `engram`: its command line, the process that keeps the worker alive, and the
//! worker in which all services run.
//!
//! `engram up` is two processes. The supervisor holds the lock on the data folder and a pipe to
//! its worker, and nothing that could crash; the worker holds everything else. The other commands
//! either talk to a running server over HTTP, or work on files without one.

mod adapters;
mod ask;
mod base;
mod bench;
mod chat;
mod child;
mod cli;
mod client;
mod corpus;
mod distill;
mod doctor;
mod documents;
mod eval;
mod hub;
mod interrupt;
mod judge;
mod learn;
mod lifeline;
mod logits;
mod memory;
mod pretrain;
mod report;
mod sending;
mod status;
mod text;
mod topology;
mod up;
mod waiting;
mod watch;
mod worker;

pub use cli::main;
