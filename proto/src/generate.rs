//! A request for text, and the events it is answered with.

use crate::document::Message;
use crate::id::{Domain, GenerationId};
use serde::{Deserialize, Serialize};

/// An adapter with its weight in the sum.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Weighted {
    /// The lineage.
    pub domain: Domain,
    /// A fixed generation of it, or the current one.
    pub generation: Option<GenerationId>,
    /// Its weight.
    pub weight: f32,
}

/// Which adapters answer: what `model` in a request says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Adapters {
    /// None: the frozen base.
    Base,
    /// Chosen from the prompt.
    Auto,
    /// These, summed.
    Fixed(Vec<Weighted>),
}

/// What to continue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Prompt {
    /// This text, as it stands.
    Text(String),
    /// This conversation, through the chat template.
    Messages(Vec<Message>),
}

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the most likely tokens whose probabilities sum to this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many of the most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Equal seeds give equal text.
    pub seed: u64,
    /// Tokens to generate at most.
    pub max_tokens: u32,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
}

/// A request for text: `gateway` to `infer`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Generate {
    /// Which adapters answer.
    pub adapters: Adapters,
    /// What to continue.
    pub prompt: Prompt,
    /// How.
    pub sampling: Sampling,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// End of sequence, or a stop text.
    Stop,
    /// `max_tokens`, or the context was full.
    Length,
}

/// Which adapter answered, at which generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// What was active; empty for the base.
    pub adapters: Vec<Weighted>,
    /// For `auto`: how well the prompt fits, 0 to 1.
    pub confidence: Option<f32>,
}

/// Tokens counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// In the prompt.
    pub prompt_tokens: u32,
    /// In the answer.
    pub completion_tokens: u32,
}

/// What `infer` answers a [`Generate`] with: `Started`, any number of `Text`, then `Finished` or
/// `Refused`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum GenerateEvent {
    /// The adapters are chosen; they stay the same to the end.
    Started(Choice),
    /// The next piece of text.
    Text(String),
    /// The end.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Tokens counted.
        usage: Usage,
    },
    /// The request cannot be answered as it stands: the user's to mend.
    Refused {
        /// The parameter at fault.
        param: String,
        /// What to do about it.
        message: String,
    },
}
