//! What happens on the compute thread: every running request gets one token in turn.

mod embed;

use crate::{Full, Language};
use anyhow::Context;
use kit::compute::{Engine as Steps, Running as Turned};
use kit::link::{NotTaken, ReplyTo};
use model::generate::{Decoder, Finish, TokenLogprob};
use model::llama::Base;
use model::lora::Adapter;
use model::sampling::{Sampling, TopLogprob};
use model::tokenizer::Tokenizer;
use proto::{FinishReason, GenerateEvent, GenerationId, Usage, Weighted};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// How long the engine rests when every running request waits for its reader.
const READERS_WAIT: Duration = Duration::from_millis(2);

/// A request on its way to the engine.
pub struct Request {
    /// The prompt.
    pub tokens: Vec<u32>,
    /// What answers; every generation is loaded.
    pub adapters: Vec<Weighted>,
    /// How tokens are chosen.
    pub sampling: proto::Sampling,
    /// Answers wanted.
    pub n: u32,
    /// Ids that end the answer beside the tokenizer's own.
    pub stop_ids: Vec<u32>,
    /// Where the answer goes.
    pub reply: ReplyTo<GenerateEvent>,
    /// Held as long as the request is, so that learning makes room.
    pub turn: Turned,
}

/// One of a request's answers, before it is begun.
struct Waiting {
    request: Arc<Request>,
    index: u32,
}

/// One of a request's answers.
struct Running {
    request: Arc<Request>,
    index: u32,
    decoder: Decoder,
    /// Events that the reader had no room for yet.
    pending: VecDeque<GenerateEvent>,
    done: bool,
}

/// Owned by the compute thread: the base, the adapters in use, and the requests.
pub struct Engine {
    base: Base,
    language: Arc<Language>,
    running_max: usize,
    adapters: HashMap<GenerationId, Adapter>,
    waiting: VecDeque<Waiting>,
    running: Vec<Running>,
}

impl Engine {
    /// An engine that decodes at most `running_max` answers at the same time.
    pub fn new(base: Base, language: Arc<Language>, running_max: usize) -> Self {
        let (adapters, waiting, running) = (HashMap::new(), VecDeque::new(), Vec::new());
        Self { base, language, running_max, adapters, waiting, running }
    }

    /// Loads a generation: of this base, finite, with an effect, or refused before anything changes.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn load(&mut self, id: GenerationId, bytes: &[u8]) -> anyhow::Result<()> {
        let adapter = Adapter::from_bytes(bytes, self.base.config())?;
        adapter.check_finite()?;
        anyhow::ensure!(adapter.has_effect(), "it has no effect");
        self.adapters.insert(id, adapter.to_device(self.base.device()));
        Ok(())
    }

    /// Drops all other generations. Running requests keep what they started with.
    pub fn keep(&mut self, keep: &BTreeSet<GenerationId>) {
        let adapters = self.waiting.iter().flat_map(|waiting| &waiting.request.adapters);
        let waiting: BTreeSet<&GenerationId> = adapters.filter_map(|w| w.generation.as_ref()).collect();
        self.adapters.retain(|id, _| keep.contains(id) || waiting.contains(id));
    }

    /// Takes up all answers of a request, unless more than `open_max` would be running and waiting then.
    ///
    /// # Errors
    /// When there is no room.
    pub fn take(&mut self, request: Request, open_max: usize) -> Result<(), Full> {
        self.drop_unwanted();
        if self.running.len() + self.waiting.len() + request.n as usize > open_max {
            return Err(Full);
        }
        let request = Arc::new(request);
        self.waiting.extend((0..request.n).map(|index| Waiting { request: Arc::clone(&request), index }));
        self.gauge();
        Ok(())
    }

    /// Forgets the answers that were not begun before nobody waited for them any more.
    fn drop_unwanted(&mut self) {
        self.waiting.retain(|waiting| !waiting.request.reply.is_gone());
    }

    fn admit(&mut self) {
        self.drop_unwanted();
        while self.running.len() < self.running_max {
            let Some(waiting) = self.waiting.pop_front() else { break };
            let request = Arc::clone(&waiting.request);
            match self.start(waiting) {
                Ok(running) => self.running.push(running),
                Err(error) => {
                    let refused =
                        GenerateEvent::Refused { param: "prompt".into(), message: format!("{error:#}") };
                    // Whoever asked may have gone away.
                    let _ = request.reply.try_send(refused);
                }
            }
        }
    }

    fn start(&self, waiting: Waiting) -> anyhow::Result<Running> {
        let Waiting { request, index } = waiting;
        let mut adapters = Vec::new();
        for weighted in &request.adapters {
            if let Some(id) = &weighted.generation {
                let adapter =
                    self.adapters.get(id).context("its generation is no longer loaded; ask again")?;
                adapters.push((adapter, f64::from(weighted.weight)));
            }
        }
        let (sampling, tokenizer) = (request.sampling(index), &self.language.tokenizer);
        let decoder = Decoder::new(&self.base, &adapters, tokenizer, &request.tokens, sampling)?;
        Ok(Running { request, index, decoder, pending: VecDeque::new(), done: false })
    }

    fn gauge(&self) {
        metrics::gauge!("engram:num_requests_waiting").set(self.waiting.len() as f64);
    }
}

impl Request {
    /// How the tokens of an answer are chosen: each answer has random numbers of its own.
    fn sampling(&self, index: u32) -> Sampling {
        let asked = &self.sampling;
        Sampling {
            temperature: f64::from(asked.temperature),
            top_k: asked.top_k as usize,
            top_p: f64::from(asked.top_p),
            min_p: f64::from(asked.min_p),
            repetition_penalty: f64::from(asked.repetition_penalty),
            presence_penalty: f64::from(asked.presence_penalty),
            frequency_penalty: f64::from(asked.frequency_penalty),
            logit_bias: asked.logit_bias.iter().map(|(&id, &bias)| (id, f64::from(bias))).collect(),
            logprobs: asked.logprobs.map(|top| top as usize),
            seed: asked.seed.wrapping_add(u64::from(index)),
            max_tokens: asked.max_tokens as usize,
            stop: asked.stop.clone(),
            stop_ids: self.stop_ids.clone(),
        }
    }
}

impl Steps for Engine {
    fn step(&mut self) -> bool {
        let before = self.waiting.len();
        self.admit();
        let (mut moved, tokenizer) = (false, &self.language.tokenizer);
        self.running.retain_mut(|running| {
            // A slow reader pauses its own request and nobody else's.
            if running.pending.is_empty() {
                running.advance(tokenizer);
                moved = true;
            }
            running.flush()
        });
        if before != self.waiting.len() {
            self.gauge();
        }
        if !moved && !self.running.is_empty() {
            std::thread::sleep(READERS_WAIT);
        }
        !self.running.is_empty() || !self.waiting.is_empty()
    }
}

impl Running {
    /// Sends what is pending, as far as there is room. False once the request is over: everything is
    /// sent, or nobody waits for it any more.
    fn flush(&mut self) -> bool {
        while let Some(event) = self.pending.front() {
            match self.request.reply.try_send(event.clone()) {
                Ok(()) => drop(self.pending.pop_front()),
                Err(NotTaken::Full) => return true,
                Err(NotTaken::Gone) => return false,
            }
        }
        !self.done && !self.request.reply.is_gone()
    }

    /// The next token.
    fn advance(&mut self, tokenizer: &Tokenizer) {
        let step = match self.decoder.step() {
            Ok(Some(step)) => step,
            Ok(None) => {
                self.done = true;
                return;
            }
            Err(error) => {
                tracing::error!(%error, "a request cannot be answered");
                let message = format!("the model cannot answer this: {error:#}");
                self.pending.push_back(GenerateEvent::Refused { param: "model".into(), message });
                self.done = true;
                return;
            }
        };
        let index = self.index;
        if !step.text.is_empty() || !step.logprobs.is_empty() {
            let logprobs = step.logprobs.into_iter().map(|token| spelled(token, tokenizer)).collect();
            self.pending.push_back(GenerateEvent::Text { index, text: step.text, logprobs });
        }
        if let Some(finish) = step.finish {
            let completion_tokens = self.decoder.generated() as u32;
            let usage = Usage { prompt_tokens: self.request.tokens.len() as u32, completion_tokens };
            let reason = match finish {
                Finish::Stop => FinishReason::Stop,
                Finish::Length => FinishReason::Length,
            };
            self.pending.push_back(GenerateEvent::Finished { index, reason, usage });
            self.done = true;
        }
    }
}

/// A token with what it stands for in place of its id.
fn spelled(token: TokenLogprob, tokenizer: &Tokenizer) -> proto::TokenLogprob {
    let spell = |id, logprob| proto::TopLogprob { bytes: tokenizer.bytes(id), logprob };
    proto::TokenLogprob {
        token: spell(token.id, token.logprob),
        top: token.top.into_iter().map(|TopLogprob { id, logprob }| spell(id, logprob)).collect(),
        text_offset: token.text_offset as u32,
    }
}

#[cfg(test)]
mod tests;
