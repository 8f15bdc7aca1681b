//! How services live and talk, and where they keep what must last.
//!
//! A [`service`] is a plain struct. A [`host`] runs it, [`link`]s connect it, a [`lane`] restarts it
//! together with its neighbours, and a [`compute`] thread does its long work. The [`ledger`] holds
//! what was accepted, the [`store`] what is rehearsed, [`latents`] what the base makes of it, [`blobs`] the weights,
//! [`manifests`] what is current.

pub mod answers;
pub mod blobs;
pub mod compute;
pub mod disk;
pub mod host;
pub mod lane;
pub mod latents;
pub mod ledger;
pub mod link;
pub mod manifests;
pub mod service;
pub mod settings;
pub mod status;
pub mod store;
pub mod telemetry;
