//! The HTTP door: submissions, OpenAI's API, administration, probes and metrics.
//!
//! A request passes `guard` (keys, rates, other people's web pages), then `routes`, then one handler:
//! `documents`, `completions`, `embeddings`, `words`, `models`, `adapters`, `lora`, `probes` or `page`. A handler reads its input with
//! `body`, `json`, `fields` and `query`, which refuse what is wrong by name, before it asks anyone
//! for anything. What goes wrong is an `error::ApiError`, in OpenAI's form.
//!
//! Invariants: nothing is acknowledged before the ledger has it on disk; bad input is a 4xx and
//! never a 5xx; everything that a client can make us hold is bounded; user text and keys are in no
//! log line.

mod adapters;
mod answer;
mod backlog;
mod body;
mod completions;
mod disk;
mod documents;
mod doors;
mod embeddings;
mod error;
mod events;
mod feedback;
mod fields;
mod format;
mod guard;
mod json;
mod lesson;
mod logprobs;
mod lora;
mod messages;
mod metrics;
mod models;
mod page;
mod probes;
mod query;
mod question;
mod routes;
mod sampling;
mod selector;
mod server;
mod sources;
mod spec;
mod state;
mod submission;
mod tally;
mod upload;
mod words;

pub use doors::{Doors, Generator};
pub use metrics::Recorder;
pub use server::{Bound, allowed};
pub use upload::{FOLDER as UPLOADS, Found, Reader};
pub use words::Words;

use kit::ledger::Ledger;
use kit::manifests::Registry;
use kit::settings::Settings;
use proto::BaseId;
use std::path::PathBuf;
use std::sync::Arc;

/// The HTTP door, before it is opened with [`Gateway::serve`].
pub struct Gateway {
    /// All settings; the section `gateway` is its own.
    pub settings: Settings,
    /// Where documents are written.
    pub ledger: Arc<Ledger>,
    /// What is current.
    pub registry: Arc<Registry>,
    /// The services behind it.
    pub doors: Doors,
    /// The text side of the base.
    pub words: Arc<dyn Words>,
    /// Finds the documents in files.
    pub reader: Arc<dyn Reader>,
    /// Whether requests for text can be answered now.
    pub ready: Box<dyn Fn() -> bool + Send + Sync>,
    /// Whether anything is learned: it may be switched off, or have been given up.
    pub learning: Box<dyn Fn() -> bool + Send + Sync>,
    /// What it says of the server.
    pub info: ServerInfo,
    /// What `/metrics` shows.
    pub metrics: Recorder,
}

/// What the gateway says of the server it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerInfo {
    /// The base, as its user named it.
    pub base_name: String,
    /// The base, by its files.
    pub base_id: BaseId,
    /// Parameters of the base.
    pub parameters: u64,
    /// Tokens that a prompt and its answer have room in.
    pub context_length: u32,
    /// What it computes on, such as `cpu`.
    pub device: String,
    /// What it computes in, such as `bf16`.
    pub precision: String,
    /// Where everything is kept.
    pub data_dir: PathBuf,
}
