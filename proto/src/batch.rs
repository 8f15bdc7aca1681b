//! One increment of learning, on its way from `replay` through `train` and `consolidate` to
//! `checkpoint`.

use crate::adapter::{AnswerHead, Blob, Receipt, TrainReport};
use crate::example::{Example, ExampleId};
use crate::id::{Domain, GenerationId};
use serde::{Deserialize, Serialize};

/// Fresh examples mixed with rehearsed ones: a pure function of ledger order, cursor and seed, so
/// that a run that was killed and resumed learns the same thing again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    /// The lineage that learns.
    pub lineage: Domain,
    /// The generation it starts from; none for the first.
    pub parent: Option<GenerationId>,
    /// How many batches of this lineage were settled before this one.
    pub number: u64,
    /// How many times this batch was tried and refused by the gate.
    pub attempt: u32,
    /// The batch holds the lineage's documents with `after < ordinal <= through`.
    pub after: u64,
    /// See `after`; the lineage's cursor once this batch is settled.
    pub through: u64,
    /// Documents among those, counted once each.
    pub documents: u64,
    /// Seed of everything random in this batch.
    pub seed: u64,
    /// Examples seen for the first time.
    pub fresh: Vec<Example>,
    /// Learned examples that are rehearsed beside them, in the order drawn.
    pub rehearsed: Vec<Example>,
    /// How many of those a pass over all fresh examples takes; the passes take turns through them.
    pub rehearsed_a_pass: u32,
    /// Tokens of all answers that the lineage has learned, ascending; empty where learning does not ask for them.
    pub known_answers: Vec<u32>,
    /// Factor on the learning rate: 1 at first, lower after a refusal.
    pub rate_scale: f32,
    /// Examples that are only measured: the held-out part that this batch adds to the probe.
    pub held_out: Vec<Example>,
    /// Digest of the replay buffer that `rehearsed` was drawn from, hexadecimal.
    pub replay_digest: String,
}

/// What training made of a batch: `train` to `consolidate`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// The batch.
    pub batch: Batch,
    /// Adapter weights (safetensors).
    pub weights: Blob,
    /// Optimiser moments and step (safetensors).
    pub optimiser: Blob,
    /// What it took.
    pub report: TrainReport,
    /// Loss of each fresh example before it was trained on, in nats a token.
    pub learned: Vec<LearnedExample>,
    /// Examples that were put aside because they break training, with the reason.
    pub put_aside: Vec<(ExampleId, String)>,
    /// What is known of answers that repeat, with those of the batch; none where none do, or they are not counted.
    pub answer_head: Option<AnswerHead>,
}

impl Candidate {
    /// Every file it names.
    pub fn files(&self) -> Vec<&Blob> {
        let head = self.answer_head.iter().flat_map(AnswerHead::files);
        [&self.weights, &self.optimiser].into_iter().chain(head).collect()
    }
}

/// A fresh example that was trained on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LearnedExample {
    /// Which.
    pub id: ExampleId,
    /// Mean loss over its learned tokens when it was first seen, in nats.
    pub first_loss: f32,
}

/// What becomes of a batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Decision {
    /// Old knowledge is intact: publish.
    Publish(Box<Learned>),
    /// It is not: try again, with more rehearsal and a lower rate.
    Retry(String),
    /// One of its documents is likely to blame: try them in smaller batches.
    Split {
        /// What was wrong with the whole.
        reason: String,
        /// Documents of such a batch.
        documents: u64,
    },
    /// It was tried often enough: put the batch aside, with the reason.
    SetAside(String),
}

/// What a batch that passed the gate leaves behind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Learned {
    /// Adapter weights (safetensors).
    pub weights: Blob,
    /// Optimiser moments and step (safetensors).
    pub optimiser: Blob,
    /// Fisher information and the weights it was taken at (safetensors); none without EWC.
    pub fisher: Option<Blob>,
    /// The lineage's probe with the best published score of each example.
    pub probe: Blob,
    /// What the lineage knows of answers that repeat; none where none do.
    pub answer_head: Option<AnswerHead>,
    /// The fresh examples it learned.
    pub examples: Vec<LearnedExample>,
    /// What training took.
    pub report: TrainReport,
}

/// A judged batch: `consolidate` to `checkpoint` (or `train` to `checkpoint`, when it never came to
/// a candidate).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// The batch.
    pub batch: Batch,
    /// The decision.
    pub decision: Decision,
    /// What was measured.
    pub receipt: Receipt,
    /// Examples that were put aside because they break training, with the reason.
    pub put_aside: Vec<(ExampleId, String)>,
}
