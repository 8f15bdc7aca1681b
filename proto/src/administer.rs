//! What an owner asks of published adapters and of documents: answered by `checkpoint`, the only
//! writer of manifests.

use crate::generate::Weighted;
use crate::id::{DocumentId, Domain, GenerationId};
use serde::{Deserialize, Serialize};

/// Why a request was refused, by whose move it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// It is not what the caller expected it to be.
    #[error("{0}")]
    Conflict(String),
    /// The request itself is at fault.
    #[error("{message}")]
    Invalid {
        /// The parameter at fault.
        param: String,
        /// What to do about it.
        message: String,
    },
    /// It cannot be done just now.
    #[error("{0}")]
    Unavailable(String),
}

/// Serve an older generation of a lineage again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollback {
    /// The lineage.
    pub lineage: Domain,
    /// The generation to serve; none is the parent of the current one (the base, for the first).
    pub to: Option<GenerationId>,
    /// When given, refuse unless this is the current generation.
    pub expected: Option<GenerationId>,
}

/// The answer to [`Rollback`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolledBack {
    /// What was served until now.
    pub from: GenerationId,
    /// What is served now; none is the base.
    pub to: Option<GenerationId>,
}

/// Forget a document and all that was derived from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forget {
    /// The document.
    pub id: DocumentId,
}

/// The answer to [`Forget`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forgotten {
    /// The document.
    pub id: DocumentId,
    /// Documents that were derived from it, and from those, which are gone with it.
    pub derived_documents: u32,
    /// Generations that had seen any of them, which are gone.
    pub removed_generations: u32,
    /// What its own lineage serves now, until it has relearned the rest; none is the base.
    pub serving: Option<GenerationId>,
}

/// The two files of an adapter folder in the PEFT format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeftFiles {
    /// `adapter_config.json`.
    pub config: String,
    /// `adapter_model.safetensors`.
    pub weights: Vec<u8>,
}

/// Publish an adapter made elsewhere as the current generation of a lineage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Import {
    /// The lineage.
    pub lineage: Domain,
    /// The adapter.
    pub files: PeftFiles,
    /// When given, refuse unless this is the current generation.
    pub expected: Option<GenerationId>,
}

/// How adapters become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MergeMethod {
    /// The weighted sum, exactly; ranks add up.
    Linear,
    /// The weighted sum at a lower rank.
    Svd,
    /// The largest entries of each, where their signs agree (arXiv 2306.01708).
    Ties,
    /// Entries of each dropped at random, the rest scaled up, and summed (arXiv 2311.03099).
    Dare,
}

/// Publish a merge of adapters as the current generation of a lineage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Merge {
    /// The lineage that gets it.
    pub lineage: Domain,
    /// What is merged, with weights; without a generation, the current one.
    pub from: Vec<Weighted>,
    /// How.
    pub method: MergeMethod,
    /// Rank of the result; none is the largest among what is merged. Linear takes none.
    pub rank: Option<u32>,
    /// Share of entries that ties and dare keep; the others take none.
    pub density: Option<f32>,
    /// Of what dare drops.
    pub seed: u64,
    /// When given, refuse unless this is the lineage's current generation.
    pub expected: Option<GenerationId>,
}

/// Give out a published adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// The lineage.
    pub lineage: Domain,
    /// The generation; none is the current one.
    pub generation: Option<GenerationId>,
}
