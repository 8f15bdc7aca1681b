//! What is known of answers beside an adapter, on its way to disk.

use crate::blobs::Blobs;
use proto::AnswerHead;

/// The files of an [`AnswerHead`].
pub struct AnswerFiles {
    /// The sums.
    pub counts: Vec<u8>,
    /// What is solved of them.
    pub solved: Vec<u8>,
    /// Answers that repeat.
    pub answers: u64,
    /// Prompts that were counted.
    pub prompts: u64,
    /// Answers that repeat have a say.
    pub trusted: bool,
    /// Answers that come once.
    pub facts: u64,
    /// Sentences and lines of texts.
    pub passages: u64,
}

impl AnswerFiles {
    /// Writes them, durable when this returns.
    ///
    /// # Errors
    /// When the disk does not take them.
    pub fn keep(&self, blobs: &Blobs) -> anyhow::Result<AnswerHead> {
        Ok(AnswerHead {
            counts: blobs.put(&self.counts)?,
            solved: blobs.put(&self.solved)?,
            answers: self.answers,
            prompts: self.prompts,
            trusted: self.trusted,
            facts: self.facts,
            passages: self.passages,
        })
    }
}
