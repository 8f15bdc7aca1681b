//! Published adapter versions, and the manifest that says which of them are current.

use crate::id::{BaseId, Domain, GenerationId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The name of an immutable file: 64 hexadecimal digits of its BLAKE3 hash.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Blob(pub String);

/// What training a batch took.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainReport {
    /// Fresh examples that were learned.
    pub examples: u64,
    /// Those of them that were read once, since what is counted decides what is answered there.
    pub counted: u64,
    /// Optimiser steps taken.
    pub steps: u64,
    /// Steps skipped because loss or gradient was not finite.
    pub skipped_steps: u64,
    /// Tokens that went through forward and backward.
    pub tokens: u64,
    /// Mean loss of the other ones in the first pass, nats a token; 0 of none.
    pub first_loss: f32,
    /// Mean loss of the other ones in the last pass, before any review, nats a token; 0 of none.
    pub last_loss: f32,
    /// Passes over the batch.
    pub passes: u32,
    /// Wall time, seconds.
    pub seconds: f32,
}

impl TrainReport {
    /// What became of the fresh examples, in words.
    pub fn in_words(&self) -> String {
        let Self { examples, counted, first_loss, last_loss, .. } = self;
        let loss = format!("{first_loss:.3} to {last_loss:.3} nats a token");
        match counted {
            0 => loss,
            counted if counted < examples => format!("{counted} of {examples} counted, the others {loss}"),
            counted => format!("{counted} counted"),
        }
    }
}

/// The mean loss on one probe, in nats a token, at three moments.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measure {
    /// Examples measured.
    pub examples: u32,
    /// With the generation that was best on the whole probe.
    pub best: f32,
    /// With the parent generation (the base, for the first).
    pub before: f32,
    /// With the candidate.
    pub after: f32,
    /// Upper 95 % bound of `after - best`, paired by example.
    pub rise_upper: f32,
    /// The rise that would have been let through.
    pub rise_allowed: f32,
    /// Of answers, how many were said to the letter; none for texts.
    #[serde(default)]
    pub recited: Option<Recited>,
}

/// How many of a probe's answers are said to the letter, at the three moments of a [`Measure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recited {
    /// With the generation that said most of them.
    pub best: u32,
    /// With the parent generation.
    pub before: u32,
    /// With the candidate.
    pub after: u32,
    /// How many fewer than `best` would have been let through.
    pub fewer_allowed: u32,
}

/// A probe's name with what was measured on it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Retained {
    /// `memory`, `held_out` or `anchor`.
    pub probe: String,
    /// What was measured.
    pub measure: Measure,
}

/// The retention receipt: what the gate measured when it let a generation through or refused it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Receipt {
    /// One row a probe.
    pub probes: Vec<Retained>,
    /// What the measuring took, seconds.
    pub seconds: f32,
}

/// One immutable, published adapter version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Generation {
    /// Its name, from the hash of its weights, its parent and its place in the lineage.
    pub id: GenerationId,
    /// The lineage it belongs to.
    pub lineage: Domain,
    /// The base it was trained on.
    pub base: BaseId,
    /// What it started from.
    pub parent: Option<GenerationId>,
    /// Generations of any lineage that it was merged from; none for one that was trained or imported.
    #[serde(default)]
    pub merged_from: Vec<GenerationId>,
    /// Its batch's place in the lineage.
    pub number: u64,
    /// The manifest that published it: the order of generations across lineages.
    pub manifest: u64,
    /// It learned the lineage's documents with `after < ordinal <= through`.
    pub after: u64,
    /// See `after`.
    pub through: u64,
    /// Documents learned in it.
    pub documents: u64,
    /// Adapter weights.
    pub weights: Blob,
    /// Optimiser state; none in an imported one.
    pub optimiser: Option<Blob>,
    /// Fisher information with the weights it was taken at.
    pub fisher: Option<Blob>,
    /// Probe with best published scores.
    pub probe: Option<Blob>,
    /// What is known of answers that repeat; none where none do.
    #[serde(default)]
    pub answer_head: Option<AnswerHead>,
    /// Learned examples with their first loss and importance, from which the replay buffer is rebuilt.
    pub learned: Blob,
    /// What training took.
    pub report: TrainReport,
    /// What the gate measured.
    pub receipt: Receipt,
    /// When it was published, in milliseconds since 1970.
    pub published_ms: u64,
}

impl Generation {
    /// Every file it names.
    pub fn files(&self) -> Vec<Blob> {
        let mut files = self.state_files();
        files.push(self.learned.clone());
        files
    }

    /// The files that are needed to serve it, and to learn on from it.
    pub fn state_files(&self) -> Vec<Blob> {
        let optional = [&self.optimiser, &self.fisher, &self.probe].into_iter().flatten();
        let head = self.answer_head.iter().flat_map(AnswerHead::files);
        std::iter::once(&self.weights).chain(optional).chain(head).cloned().collect()
    }
}

/// What a lineage knows of answers beside its adapter: of those that repeat, such as labels, sums that every batch adds to, and
/// what they come to; and those that come once, each with its prompt. And what its texts say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswerHead {
    /// The sums (safetensors), from which learning goes on.
    pub counts: Blob,
    /// The regression solved of them (safetensors), which is served.
    pub solved: Blob,
    /// Answers that are known.
    pub answers: u64,
    /// Prompts that were counted.
    pub prompts: u64,
    /// Answers that repeat have a say: enough are found to prompts that were not counted.
    pub trusted: bool,
    /// Answers that come once, and are remembered with their prompts.
    #[serde(default)]
    pub facts: u64,
    /// Sentences and lines of texts that are remembered word for word.
    #[serde(default)]
    pub passages: u64,
}

impl AnswerHead {
    /// It has a say.
    pub fn speaks(&self) -> bool {
        self.trusted || self.facts > 0 || self.passages > 0
    }

    /// Both of its files.
    pub fn files(&self) -> [&Blob; 2] {
        [&self.counts, &self.solved]
    }
}

/// Documents of a lineage that were not learned, or no longer are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SetAside {
    /// Documents with `after < ordinal <= through`.
    pub after: u64,
    /// See `after`.
    pub through: u64,
    /// Why: one sentence for the user.
    pub reason: String,
}

/// Where one lineage stands.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Lineage {
    /// The generation that is served; none while only the base is.
    pub current: Option<GenerationId>,
    /// Every document of the lineage up to this ordinal is settled: learned, or set aside.
    pub cursor: u64,
    /// Batches settled.
    pub number: u64,
    /// Batches that came to any decision; by it the mixer knows that its last batch did.
    pub judged: u64,
    /// Times the batch after the cursor was refused by the gate.
    pub attempt: u32,
    /// What was put aside.
    pub set_aside: Vec<SetAside>,
    /// Documents learned, each counted once.
    pub documents: u64,
    /// Up to this ordinal a batch has at most `split_documents`, because one of them broke the learner or was refused
    /// by the gate, and is not to take the others with it.
    #[serde(alias = "solo_through")]
    pub split_through: u64,
    /// See `split_through`; at least one, whatever it says.
    #[serde(default)]
    pub split_documents: u64,
    /// Refusals that recent batches took before they passed the gate: the next one starts as carefully.
    #[serde(default)]
    pub caution: u32,
}

impl Lineage {
    /// Documents that the next batch may have at most; none where it may have any number.
    pub fn documents_max(&self) -> Option<u64> {
        (self.split_through > self.cursor).then_some(self.split_documents.max(1))
    }
}

/// What is current, everywhere: written whole, by rename, so that it is never half true.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Counts up by one with each manifest.
    pub number: u64,
    /// The base that all of it belongs to.
    pub base: BaseId,
    /// One lineage learns every domain, instead of one each.
    pub shared: bool,
    /// Each lineage.
    pub lineages: BTreeMap<Domain, Lineage>,
    /// Digest of the replay buffer that the newest generation rehearsed from, hexadecimal.
    pub replay_digest: String,
    /// When it was written, in milliseconds since 1970.
    pub written_ms: u64,
}

impl Manifest {
    /// The manifest of a data folder in which nothing has been learned yet.
    pub fn empty(base: BaseId, shared: bool) -> Self {
        Self {
            number: 0,
            base,
            shared,
            lineages: BTreeMap::new(),
            replay_digest: String::new(),
            written_ms: 0,
        }
    }
}

/// `checkpoint` to `infer`: serve this from now on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Publish {
    /// What is current.
    pub manifest: Manifest,
}

/// The answer to [`Publish`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Published {
    /// The manifest that is served now.
    pub number: u64,
    /// Since when, in milliseconds since 1970.
    pub live_ms: u64,
}
