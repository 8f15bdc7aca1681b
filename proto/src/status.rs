//! Where a document is on its way, as its owner sees it.

use crate::id::{DocumentId, Domain, GenerationId};
use serde::{Deserialize, Serialize};

/// A document's stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// On disk, not yet judged.
    Accepted,
    /// Will not be learned; the reason says why.
    Refused,
    /// Judged, with every part of it that is left held out for the gate.
    Probe,
    /// Judged and kept; waits for its turn.
    Waiting,
    /// In a published generation that is not served yet.
    Learned,
    /// Served.
    Live,
    /// Kept, but in no served generation; the reason says why.
    SetAside,
}

/// Something that happened to a document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrailEntry {
    /// What happened: `accepted`, `kept`, `refused`, `learned`, `live`, `set_aside`.
    pub event: String,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// The reason or the generation, where there is one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub detail: Option<String>,
}

/// All that happened to a document, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trail {
    /// The entries.
    pub entries: Vec<TrailEntry>,
}

/// What `GET /v1/documents/{id}` answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DocumentStatus {
    /// The document.
    pub id: DocumentId,
    /// Its stage.
    pub status: Stage,
    /// Its domain.
    pub domain: Domain,
    /// Where it came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// What it was made from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub derived_from: Option<String>,
    /// Why it was refused or set aside.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The generation that learned it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<GenerationId>,
    /// Pieces of it that are held out for the gate.
    pub held_out: u32,
    /// All that happened to it.
    pub trail: Vec<TrailEntry>,
}
