//! How well a base predicts a text, in a unit that does not depend on its tokenizer.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::corpus;
use crate::llama::Base;
use crate::loss;
use crate::pack::Sequence;
use crate::tokenizer::Tokenizer;

/// Windows that are scored at once.
const WINDOWS_PER_BATCH: usize = 16;

/// What a text scored.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TextScore {
    /// Sum of negative log-likelihoods in nats, those of the ends of documents included.
    pub nll_sum: f64,
    /// Tokens predicted.
    pub tokens: usize,
    /// Bytes of the documents.
    pub bytes: usize,
}

impl TextScore {
    /// Mean negative log-likelihood per token, in nats.
    pub fn nll_per_token(&self) -> f64 {
        self.nll_sum / self.tokens as f64
    }

    /// Bits that this base needs for a byte of the text.
    pub fn bits_per_byte(&self) -> f64 {
        self.nll_sum / std::f64::consts::LN_2 / self.bytes as f64
    }
}

/// Scores the first documents of a text, up to `bytes_max` bytes, in windows of `window` tokens.
///
/// The documents follow one another, each after the end token, as they do in training. Every token is
/// predicted once, from what precedes it in its window.
///
/// # Errors
/// When the text cannot be read or holds nothing, or the tokenizer has no end token.
pub fn text(
    base: &Base,
    tokenizer: &Tokenizer,
    path: &Path,
    window: usize,
    bytes_max: usize,
) -> Result<TextScore> {
    Windows::read(tokenizer, path, window, bytes_max)?.score(base)
}

/// The beginning of a text, cut into windows to be scored.
pub(super) struct Windows {
    windows: Vec<Sequence>,
    bytes: usize,
}

impl Windows {
    /// Reads what [`text`] scores.
    pub fn read(tokenizer: &Tokenizer, path: &Path, window: usize, bytes_max: usize) -> Result<Self> {
        ensure!(window >= 2, "a window has to hold at least 2 tokens");
        let end = *tokenizer.eos_ids().first().context("the tokenizer has no end token")?;
        let mut bytes = 0;
        let mut ids = vec![end];
        for document in corpus::documents(path)? {
            let document = document?;
            if bytes > 0 && bytes + document.len() > bytes_max {
                break;
            }
            bytes += document.len();
            ids.extend(tokenizer.encode(&document)?);
            ids.push(end);
        }
        ensure!(bytes > 0, "{} holds no document", path.display());
        let windows = (0..ids.len() - 1)
            .step_by(window - 1)
            .map(|start| Sequence::whole(ids[start..ids.len().min(start + window)].to_vec()))
            .collect();
        Ok(Self { windows, bytes })
    }

    /// What `base` scores on them.
    pub fn score(&self, base: &Base) -> Result<TextScore> {
        let mut score = TextScore { bytes: self.bytes, ..TextScore::default() };
        for batch in self.windows.chunks(WINDOWS_PER_BATCH) {
            for scored in loss::score(base, &[], batch, 1)? {
                score.nll_sum += scored.nll_sum;
                score.tokens += scored.tokens;
            }
        }
        Ok(score)
    }
}
