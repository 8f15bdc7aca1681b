//! A request for text, and the events it is answered with.

use crate::document::Message;
use crate::id::{Domain, GenerationId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

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
    /// Keep tokens with at least this share of the most likely one's probability; 0 keeps all.
    pub min_p: f32,
    /// Divides the logits of tokens in prompt and answer, or multiplies those below 0; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Taken from the logits of tokens in the answer; 0 changes nothing.
    pub presence_penalty: f32,
    /// Taken from the logits of tokens in the answer as often as they occur; 0 changes nothing.
    pub frequency_penalty: f32,
    /// Added to the logits of these token ids, -100 to 100.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Tell each token's log-probability, and those of this many of the most likely ones.
    pub logprobs: Option<u32>,
    /// Equal seeds give equal text. Answer `index` of a request has the seed `seed + index`, so it is the same
    /// as the only answer of a request with that seed.
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
    /// Answers wanted, at least 1. They are taken up together, or not at all.
    pub n: u32,
    /// The JSON Schema that answers follow, as JSON.
    pub schema: Option<String>,
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

/// A document that an answer is from: it said so, and the answer was said because of that.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Source {
    /// Its place in the ledger.
    pub ordinal: u64,
    /// How likely the answer is from there, and not what the model says by itself or another document did, 0 to 1.
    pub likely: f32,
}

/// A token that could have been chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TopLogprob {
    /// The text it stands for; alone it need not be UTF-8.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability, after bias and penalties, before temperature and truncation.
    pub logprob: f32,
}

/// A token of an answer's text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// The token.
    pub token: TopLogprob,
    /// The most likely tokens at its place, the likeliest first.
    pub top: Vec<TopLogprob>,
    /// Where its text begins in the answer, in characters.
    pub text_offset: u32,
}

/// What `infer` answers a [`Generate`] with: `Started`, then any number of `Text` and one `Finished` for
/// each of its answers, told apart by `index` from 0; or `Refused`, which ends them all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum GenerateEvent {
    /// The adapters are chosen; they stay the same to the end.
    Started(Choice),
    /// The next piece of an answer.
    Text {
        /// Of which.
        index: u32,
        /// Its text.
        text: String,
        /// Where asked for: the tokens it comes from.
        logprobs: Vec<TokenLogprob>,
    },
    /// The end of an answer.
    Finished {
        /// Of which.
        index: u32,
        /// Why.
        reason: FinishReason,
        /// Tokens counted: those of the prompt, which all answers share, and of this answer.
        usage: Usage,
        /// Documents that it is from, the likeliest first.
        sources: Vec<Source>,
    },
    /// The request cannot be answered as it stands: the user's to mend.
    Refused {
        /// The parameter at fault.
        param: String,
        /// What to do about it.
        message: String,
    },
}
