//! A request for what a text means, as a vector.

use crate::generate::{Adapters, Choice};
use serde::{Deserialize, Serialize};

/// What a text means to the model: `gateway` to `infer`, which answers with [`Embedded`], or a refusal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Embed {
    /// Through which adapters it is read; `auto` is refused, since vectors of different ones do not compare.
    pub adapters: Adapters,
    /// The text.
    pub text: String,
}

/// The answer to [`Embed`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Embedded {
    /// The mean of the final hidden states over the tokens, of length 1.
    pub vector: Vec<f32>,
    /// The adapters that read it, at their generations.
    pub choice: Choice,
    /// Tokens in the text.
    pub tokens: u32,
}
