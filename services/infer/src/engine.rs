//! What happens on the compute thread: every running request gets one token in turn.

use crate::{Full, Language};
use anyhow::Context;
use kit::compute::{Engine as Steps, Running as Turned};
use kit::link::{NotTaken, ReplyTo};
use model::generate::{Decoder, Finish};
use model::llama::Base;
use model::lora::Adapter;
use model::sampling::Sampling;
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
    /// Ids that end the answer beside the tokenizer's own.
    pub stop_ids: Vec<u32>,
    /// Where the answer goes.
    pub reply: ReplyTo<GenerateEvent>,
    /// Held as long as the request is, so that learning makes room.
    pub turn: Turned,
}

struct Running {
    decoder: Decoder,
    prompt_tokens: u32,
    reply: ReplyTo<GenerateEvent>,
    /// Events that the reader had no room for yet.
    pending: VecDeque<GenerateEvent>,
    done: bool,
    _turn: Turned,
}

/// Owned by the compute thread: the base, the adapters in use, and the requests.
pub struct Engine {
    base: Base,
    language: Arc<Language>,
    running_max: usize,
    adapters: HashMap<GenerationId, Adapter>,
    waiting: VecDeque<Request>,
    running: Vec<Running>,
}

impl Engine {
    /// An engine that decodes at most `running_max` requests at the same time.
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
        let waiting: BTreeSet<&GenerationId> =
            self.waiting.iter().flat_map(|r| &r.adapters).filter_map(|w| w.generation.as_ref()).collect();
        self.adapters.retain(|id, _| keep.contains(id) || waiting.contains(id));
    }

    /// Takes up a request, unless `open_max` of them are running and waiting already.
    ///
    /// # Errors
    /// When there is no room.
    pub fn take(&mut self, request: Request, open_max: usize) -> Result<(), Full> {
        if self.running.len() + self.waiting.len() >= open_max {
            return Err(Full);
        }
        self.waiting.push_back(request);
        self.gauge();
        Ok(())
    }

    fn admit(&mut self) {
        while self.running.len() < self.running_max {
            let Some(request) = self.waiting.pop_front() else { break };
            let reply = request.reply.clone();
            match self.start(request) {
                Ok(running) => self.running.push(running),
                Err(error) => {
                    let refused =
                        GenerateEvent::Refused { param: "prompt".into(), message: format!("{error:#}") };
                    // Whoever asked may have gone away.
                    let _ = reply.try_send(refused);
                }
            }
        }
    }

    fn start(&self, request: Request) -> anyhow::Result<Running> {
        let mut adapters = Vec::new();
        for weighted in &request.adapters {
            if let Some(id) = &weighted.generation {
                let adapter =
                    self.adapters.get(id).context("its generation is no longer loaded; ask again")?;
                adapters.push((adapter, f64::from(weighted.weight)));
            }
        }
        let asked = request.sampling;
        let sampling = Sampling {
            temperature: f64::from(asked.temperature),
            top_k: asked.top_k as usize,
            top_p: f64::from(asked.top_p),
            seed: asked.seed,
            max_tokens: asked.max_tokens as usize,
            stop: asked.stop,
            stop_ids: request.stop_ids,
            ..Sampling::default()
        };
        let decoder =
            Decoder::new(&self.base, &adapters, &self.language.tokenizer, &request.tokens, sampling)?;
        Ok(Running {
            decoder,
            prompt_tokens: request.tokens.len() as u32,
            reply: request.reply,
            pending: VecDeque::new(),
            done: false,
            _turn: request.turn,
        })
    }

    fn gauge(&self) {
        metrics::gauge!("engram:num_requests_waiting").set(self.waiting.len() as f64);
    }
}

impl Steps for Engine {
    fn step(&mut self) -> bool {
        let before = self.running.len();
        self.admit();
        let mut moved = false;
        self.running.retain_mut(|running| {
            // A slow reader pauses its own request and nobody else's.
            if running.pending.is_empty() {
                running.advance();
                moved = true;
            }
            running.flush()
        });
        if before != self.running.len() {
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
            match self.reply.try_send(event.clone()) {
                Ok(()) => drop(self.pending.pop_front()),
                Err(NotTaken::Full) => return true,
                Err(NotTaken::Gone) => return false,
            }
        }
        !self.done && !self.reply.is_gone()
    }

    /// The next token.
    fn advance(&mut self) {
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
        if !step.text.is_empty() {
            self.pending.push_back(GenerateEvent::Text(step.text));
        }
        if let Some(finish) = step.finish {
            let completion_tokens = self.decoder.generated() as u32;
            let usage = Usage { prompt_tokens: self.prompt_tokens, completion_tokens };
            let reason = match finish {
                Finish::Stop => FinishReason::Stop,
                Finish::Length => FinishReason::Length,
            };
            self.pending.push_back(GenerateEvent::Finished { reason, usage });
            self.done = true;
        }
    }
}
