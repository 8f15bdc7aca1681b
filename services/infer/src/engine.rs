//! What happens on the compute thread: every running request gets one token in turn.

use kit::compute::{self, Running as Turned};
use kit::link::{NotTaken, ReplyTo};
use model::generate::{Decoder, Finish, Step};
use model::llama::Base;
use model::lora::Adapter;
use model::tokenizer::StreamDecoder;
use proto::{FinishReason, GenerateEvent, GenerationId, Sampling, Usage, Weighted};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use crate::{Full, Language};

/// A request on its way to the engine.
pub struct Request {
    /// The prompt.
    pub tokens: Vec<u32>,
    /// What answers; every generation is loaded.
    pub adapters: Vec<Weighted>,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Where the answer goes.
    pub reply: ReplyTo<GenerateEvent>,
    /// Held as long as the request is, so that learning makes room.
    pub turn: Turned,
}
