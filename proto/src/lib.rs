//! The messages that travel between services, one file each, and their wire format.
//!
//! Everything here is plain data that serde can carry: no runtime, no tensor, no channel. A change
//! of a message changes its golden file in `golden/`, and that is the point of the golden files.

mod adapter;
mod administer;
mod batch;
mod document;
mod embed;
mod example;
mod generate;
mod id;
mod status;
pub mod wire;

pub use adapter::{
    AnswerHead, Blob, Generation, Lineage, Manifest, Measure, Publish, Published, Receipt, Recited, Retained,
    SetAside, TrainReport,
};
pub use administer::{
    Export, Forget, Forgotten, Import, Merge, MergeMethod, PeftFiles, Refusal, Rollback, RolledBack,
};
pub use batch::{Batch, Candidate, Decision, Judgement, Learned, LearnedExample};
pub use document::{Accepted, Content, Document, Message, Role};
pub use embed::{Embed, Embedded};
pub use example::{Example, ExampleId, Kept, Parsed, Piece, Verdict, VerdictKind, similarity};
pub use generate::{
    Adapters, Choice, FinishReason, Generate, GenerateEvent, Prompt, Sampling, Source, TokenLogprob,
    TopLogprob, Usage, Weighted,
};
pub use id::{BaseId, DocumentId, Domain, GenerationId, IdError};
pub use status::{DocumentStatus, Stage, Trail, TrailEntry};
