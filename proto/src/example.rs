//! Trainable units, on their way from `ingest` through `filter` to `replay`.

use crate::document::Document;
use crate::id::{DocumentId, Domain};
use serde::{Deserialize, Serialize};

/// One chunk of a document as token ids.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Piece {
    /// Token ids, at most `max_seq_len` of them.
    pub tokens: Vec<u32>,
    /// Which tokens are learned: half-open ranges over `tokens`, ascending, none empty. The token at
    /// position 0 has nothing before it to be predicted from, so a range that holds it learns from 1.
    pub learned: Vec<(u32, u32)>,
}

impl Piece {
    /// What it answers to its prompt, range by range; nothing where it is text, which is learned from its start.
    pub fn answers(&self) -> impl Iterator<Item = &[u32]> {
        let answers = self.learned.first().is_some_and(|&(from, _)| from > 0);
        let ranges = self.learned.iter().filter(move |_| answers);
        ranges.filter_map(|&(from, to)| self.tokens.get(from as usize..to as usize))
    }
}

/// A document in pieces: `ingest` to `filter`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Parsed {
    /// Place in the ledger.
    pub ordinal: u64,
    /// The document.
    pub document: Document,
    /// Its pieces, in reading order.
    pub pieces: Vec<Piece>,
    /// Why it could not be cut into pieces. It still travels on, so that documents are settled in
    /// the order of the ledger.
    pub refused: Option<String>,
}

/// What `filter` decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VerdictKind {
    /// It will be learned.
    Kept,
    /// It will not be learned, for a reason that the user can read.
    Refused,
}

/// A verdict with its reason.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Kept or refused.
    pub kind: VerdictKind,
    /// Why: one sentence for the user. Never quotes the document.
    pub reason: String,
    /// Quality, 0 to 1.
    pub score: f32,
}

/// A judged document with its trainable pieces (none when refused): `filter` to `replay`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    /// Place in the ledger.
    pub ordinal: u64,
    /// The document's name.
    pub id: DocumentId,
    /// Its domain.
    pub domain: Domain,
    /// What the user said of its importance.
    pub importance: Option<f32>,
    /// The verdict.
    pub verdict: Verdict,
    /// What is left to learn.
    pub pieces: Vec<Piece>,
    /// MinHash signature of the text, by which near-duplicates and diversity are judged.
    pub signature: Vec<u32>,
}

/// An example's name: its document's place in the ledger, and its place in the document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExampleId {
    /// The document's place in the ledger.
    pub ordinal: u64,
    /// The chunk's place in the document, from 0.
    pub chunk: u32,
}

/// One trainable unit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Example {
    /// Its name.
    pub id: ExampleId,
    /// The domain it teaches.
    pub domain: Domain,
    /// Token ids and which of them are learned.
    pub piece: Piece,
    /// Importance, 0 to 1.
    pub importance: f32,
    /// The importance is the user's word, and not a default.
    pub marked: bool,
    /// Held out for the gate: measured, never trained on.
    pub held_out: bool,
    /// MinHash signature of its document.
    pub signature: Vec<u32>,
}

/// Estimated Jaccard similarity of the texts behind two MinHash signatures, 0 to 1.
pub fn similarity(a: &[u32], b: &[u32]) -> f32 {
    if a.is_empty() || a.len() != b.len() {
        return 0.0;
    }
    a.iter().zip(b).filter(|(x, y)| x == y).count() as f32 / a.len() as f32
}
