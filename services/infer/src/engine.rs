//! What happens on the compute thread: all running answers go through the model together, a token each; between two
//! steps answers come and go.

mod embed;

use crate::apart::Apart;
use crate::guide::Guide;
use crate::{Full, Language};
use anyhow::Context;
use kit::compute::{Engine as Steps, Running as Turned};
use kit::link::{NotTaken, ReplyTo};
use model::batch::{Adapted, Batch, NotBegun, Speaker};
use model::generate::{Finish, Step, TokenLogprob};
use model::grammar::Stuck;
use model::llama::Base;
use model::lora::Adapter;
use model::passages::{Asked, Index};
use model::ridge::{Features, Head, Prior, Rows, TRUST};
use model::sampling::{Sampling, TopLogprob};
use model::tokenizer::Tokenizer;
use proto::{Domain, FinishReason, GenerateEvent, GenerationId, Source, Usage, Weighted};
use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// How long the engine rests when every request waits, for its reader or for what its answer follows.
const REST: Duration = Duration::from_millis(2);

/// Combinations of adapters that are kept ready while nobody uses them.
const ADAPTED_MAX: usize = 64;

/// Generations, each with the bits of its weight.
type Combination = Vec<(GenerationId, u32)>;

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
    /// What its answers follow. They are not begun before it is there.
    pub guide: Option<Guide>,
    /// Where the answer goes.
    pub reply: ReplyTo<GenerateEvent>,
    /// Held as long as the request is, so that learning makes room.
    pub turn: Turned,
    /// What it looks like to the base, where that was looked at.
    pub features: Option<Rows>,
    /// What is asked, as it is looked for in texts.
    pub question: Question,
    /// What is expected of its answers, once the first of them is begun.
    pub prior: OnceCell<Prior>,
}

/// What is asked, without what a chat puts around it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Question {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// See [`Asked::is_question`].
    pub is_question: bool,
    /// See [`Asked::is_apart`].
    pub is_apart: bool,
    /// See [`Asked::end`].
    pub end: Option<u32>,
}

/// What a prompt looks like to the base.
pub struct Looks {
    /// See [`Features::of`].
    pub features: Rows,
    /// How much it is of the kind of each generation's prompts: see [`Head::kinship`].
    pub kinship: BTreeMap<GenerationId, f64>,
    /// How likely it is that of a fact of each: see [`Head::recalls`].
    pub recalled: BTreeMap<GenerationId, f64>,
    /// How likely it is of each lineage of those that are told apart: see [`Apart::shares`].
    pub shares: BTreeMap<Domain, f64>,
}

/// One of a request's answers, before it is begun.
struct Waiting {
    request: Rc<Request>,
    index: u32,
}

/// One of a request's answers.
struct Running {
    request: Rc<Request>,
    index: u32,
    speaker: Speaker,
    /// Events that the reader had no room for yet.
    pending: VecDeque<GenerateEvent>,
    done: bool,
}

/// Owned by the compute thread: the base, the adapters in use, and the requests.
pub struct Engine {
    batch: Batch,
    language: Arc<Language>,
    running_max: usize,
    adapters: HashMap<GenerationId, Adapter>,
    /// What generations know of short answers.
    heads: HashMap<GenerationId, Head>,
    /// What generations remember of texts.
    indexes: HashMap<GenerationId, Index>,
    /// What describes prompts to heads; none before there is a head.
    features: Option<Features>,
    /// Generations that are served from here on; others only to the end of what they began.
    lasting: BTreeSet<GenerationId>,
    adapted: HashMap<Combination, Rc<Adapted>>,
    waiting: VecDeque<Waiting>,
    running: Vec<Running>,
}

impl Engine {
    /// An engine that decodes at most `running_max` answers at the same time, whose keys and values take at most
    /// `cache_bytes_max`, and with `narrow_copy` from a copy of the weights as [`Batch::narrow`] makes it.
    ///
    /// # Errors
    /// When the base's weights are not as a base has them.
    pub fn new(
        base: Base,
        language: Arc<Language>,
        running_max: usize,
        cache_bytes_max: usize,
        narrow_copy: bool,
    ) -> anyhow::Result<Self> {
        let batch = if narrow_copy { Batch::narrow } else { Batch::new };
        Ok(Self {
            batch: batch(base, cache_bytes_max)?,
            language,
            running_max,
            adapters: HashMap::new(),
            heads: HashMap::new(),
            indexes: HashMap::new(),
            features: None,
            lasting: BTreeSet::new(),
            adapted: HashMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
        })
    }

    /// Loads a generation, with what it knows of answers that repeat: of this base, finite, with an effect, or refused before
    /// anything changes.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn load(&mut self, id: GenerationId, bytes: &[u8], head: Option<&[u8]>) -> anyhow::Result<()> {
        let base = self.batch.base();
        let adapter = Adapter::from_bytes(bytes, base.config())?;
        adapter.check_finite()?;
        anyhow::ensure!(adapter.has_effect(), "it has no effect");
        let mut head =
            head.map(Head::from_bytes).transpose().context("what it knows of answers that repeat")?;
        let tokenizer = &self.language.tokenizer;
        let passages = head.as_mut().map(Head::take_passages).filter(|passages| !passages.is_empty());
        if let Some(passages) = passages {
            self.indexes.insert(id.clone(), Index::new(passages, Arc::clone(tokenizer))?);
        }
        let head = head.filter(Head::describes);
        if head.is_some() && self.features.is_none() {
            self.features = Some(Features::new(base, Some(Arc::clone(tokenizer)))?);
        }
        self.heads.extend(head.map(|head| (id.clone(), head)));
        self.adapters.insert(id.clone(), adapter.to_device(base.device()));
        self.lasting.insert(id);
        Ok(())
    }

    /// What a prompt looks like to the base, to generations that count prompts, and to what tells lineages apart; none where nobody
    /// counts.
    ///
    /// # Errors
    /// When the base's states are not finite.
    pub fn looks(&self, prompt: &[u32], apart: &Apart) -> anyhow::Result<Option<Looks>> {
        let Some(describe) = self.features.as_ref().filter(|_| !self.heads.is_empty()) else {
            return Ok(None);
        };
        let features = describe.of(&[prompt])?;
        let (mut kinship, mut recalled) = (BTreeMap::new(), BTreeMap::new());
        for (id, head) in &self.heads {
            let of_head = head.kinship(&features)?.and_then(|mut row| row.pop());
            kinship.extend(of_head.map(|kinship| (id.clone(), kinship)));
            recalled.extend(head.recalls(&features)?.pop().map(|likely| (id.clone(), likely)));
        }
        let shares = apart.shares(&features)?.pop().unwrap_or_default();
        Ok(Some(Looks { features, kinship, recalled, shares }))
    }

    /// Drops all other generations, with all that was read with them. Running requests keep what they started with,
    /// and leave nothing behind.
    pub fn keep(&mut self, keep: &BTreeSet<GenerationId>) {
        let adapters = self.waiting.iter().flat_map(|waiting| &waiting.request.adapters);
        let waiting: BTreeSet<&GenerationId> = adapters.filter_map(|w| w.generation.as_ref()).collect();
        self.adapters.retain(|id, _| keep.contains(id) || waiting.contains(id));
        self.heads.retain(|id, _| keep.contains(id) || waiting.contains(id));
        self.indexes.retain(|id, _| keep.contains(id) || waiting.contains(id));
        self.lasting.retain(|id| keep.contains(id));
        let (lasting, batch) = (&self.lasting, &mut self.batch);
        self.adapted.retain(|combination, adapted| {
            let stays = combination.iter().all(|(id, _)| lasting.contains(id));
            if !stays {
                batch.forget(adapted);
            }
            stays
        });
    }

    /// The adapters of a request, made ready once for all that ask for the same.
    fn adapted(&mut self, asked: &[Weighted]) -> anyhow::Result<Rc<Adapted>> {
        let named = asked.iter().filter_map(|w| Some((w.generation.clone()?, w.weight.to_bits())));
        let combination: Combination = named.collect();
        if let Some(adapted) = self.adapted.get(&combination) {
            return Ok(Rc::clone(adapted));
        }
        let mut adapters = Vec::new();
        for (id, weight) in &combination {
            let adapter = self.adapters.get(id).context("its generation is no longer loaded; ask again")?;
            adapters.push((adapter, f64::from(f32::from_bits(*weight))));
        }
        let adapted = self.batch.adapt(&adapters)?;
        if combination.iter().all(|(id, _)| self.lasting.contains(id)) {
            self.drop_idle();
            self.adapted.insert(combination, Rc::clone(&adapted));
        } else {
            // It was replaced or forgotten while the request waited: nothing of it is kept.
            self.batch.forget(&adapted);
        }
        Ok(adapted)
    }

    /// Makes room for another combination of adapters: weights can be combined without end.
    fn drop_idle(&mut self) {
        if self.adapted.len() < ADAPTED_MAX {
            return;
        }
        let batch = &mut self.batch;
        self.adapted.retain(|_, adapted| {
            let used = Rc::strong_count(adapted) > 1;
            if !used {
                batch.forget(adapted);
            }
            used
        });
    }

    /// Takes up all answers of a request, unless more than `open_max` would be running and waiting then.
    ///
    /// # Errors
    /// When there is no room.
    pub fn take(&mut self, request: Request, open_max: usize) -> Result<(), Full> {
        if !self.has_room(request.n, open_max) {
            return Err(Full);
        }
        let request = Rc::new(request);
        self.waiting.extend((0..request.n).map(|index| Waiting { request: Rc::clone(&request), index }));
        self.gauge();
        Ok(())
    }

    /// Whether so many more answers may run and wait.
    pub fn has_room(&mut self, n: u32, open_max: usize) -> bool {
        self.drop_unwanted();
        self.running.len() + self.waiting.len() + n as usize <= open_max
    }

    /// Forgets the answers that were not begun before nobody waited for them any more.
    fn drop_unwanted(&mut self) {
        self.waiting.retain(|waiting| !waiting.request.reply.is_gone());
    }

    /// Begins what waits and can begin, in order, as far as there is room.
    fn admit(&mut self) {
        self.drop_unwanted();
        while self.running.len() < self.running_max {
            let mut waiting = self.waiting.iter().enumerate();
            let Some((place, next)) = waiting.find(|(_, next)| next.request.can_begin()) else { break };
            let (request, index) = (Rc::clone(&next.request), next.index);
            let refused = match self.start(&request, index) {
                Ok(speaker) => {
                    let pending = VecDeque::new();
                    self.running.push(Running { request, index, speaker, pending, done: false });
                    None
                }
                Err(NotBegun::Later) => break,
                Err(NotBegun::TooLong(message)) => Some(("max_tokens", message)),
                Err(NotBegun::Refused(error)) => Some(("prompt", format!("{error:#}"))),
            };
            let Some(Waiting { request, .. }) = self.waiting.remove(place) else { break };
            if let Some((param, message)) = refused {
                // Whoever asked may have gone away.
                let _ = request.reply.try_send(GenerateEvent::Refused { param: param.into(), message });
            }
        }
    }

    fn start(&mut self, request: &Request, index: u32) -> Result<Speaker, NotBegun> {
        let adapted = self.adapted(&request.adapters).map_err(NotBegun::Refused)?;
        let prior = match request.prior.get() {
            Some(prior) => prior.clone(),
            None => self.expects(request).map_err(NotBegun::Refused)?,
        };
        let sampling = request.sampling(index, request.prior.get_or_init(|| prior).clone());
        self.batch.begin(&adapted, &self.language.tokenizer, &request.tokens, sampling)
    }

    /// What is expected of the answers to a request: short ones that are known, and else what texts say.
    fn expects(&self, request: &Request) -> anyhow::Result<Prior> {
        let whole = request.adapters.iter().map(|w| f64::from(w.weight).max(0.0)).sum::<f64>().max(1.0);
        let mut all = Vec::new();
        for Weighted { generation, weight, .. } in &request.adapters {
            let Some(index) = generation.as_ref().and_then(|id| self.indexes.get(id)) else { continue };
            let mut found = index.find(request.question.asked())?;
            let share = TRUST * f64::from(*weight).max(0.0) / whole;
            found.iter_mut().for_each(|found| found.likely *= share);
            all.extend(found);
        }
        Ok(self.known(request)?.beside(all))
    }

    /// What is known of the answers to a request by the generations that answer it.
    fn known(&self, request: &Request) -> anyhow::Result<Prior> {
        let head = |w: &Weighted| {
            (w.generation.as_ref().and_then(|id| self.heads.get(id)), f64::from(w.weight).max(0.0))
        };
        let heads: Vec<_> = request.adapters.iter().map(head).collect();
        let Some(describe) = self.features.as_ref().filter(|_| !request.tokens.is_empty()) else {
            return Ok(Prior::default());
        };
        if heads.iter().all(|(head, weight)| head.is_none() || *weight == 0.0) {
            return Ok(Prior::default());
        }
        let prompt: &[&[u32]] = &[&request.tokens];
        let described = if request.features.is_none() { Some(describe.of(prompt)?) } else { None };
        let Some(features) = request.features.as_ref().or(described.as_ref()) else {
            return Ok(Prior::default());
        };
        Ok(Head::prior(&heads, features, prompt)?.pop().unwrap_or_default())
    }

    fn gauge(&self) {
        metrics::gauge!("engram:num_requests_waiting").set(self.waiting.len() as f64);
    }
}

impl Question {
    fn asked(&self) -> Asked<'_> {
        let Self { tokens, is_question, is_apart, end } = self;
        Asked { tokens, is_question: *is_question, is_apart: *is_apart, end: *end }
    }
}

impl Request {
    fn can_begin(&self) -> bool {
        self.guide.as_ref().is_none_or(Guide::is_there)
    }

    /// How the tokens of an answer are chosen: each answer has random numbers of its own.
    fn sampling(&self, index: u32, prior: Prior) -> Sampling {
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
            grammar: self.guide.as_ref().and_then(Guide::grammar),
            prior,
        }
    }
}

impl Steps for Engine {
    fn step(&mut self) -> bool {
        let before = self.waiting.len();
        self.admit();
        // A slow reader pauses its own request and nobody else's.
        let ready = self.running.iter_mut().filter(|running| running.pending.is_empty() && !running.done);
        let mut ready: Vec<&mut Running> = ready.collect();
        let moved = !ready.is_empty();
        let mut speakers: Vec<&mut Speaker> = ready.iter_mut().map(|running| &mut running.speaker).collect();
        let steps = self.batch.step(&mut speakers);
        for (running, step) in ready.into_iter().zip(steps) {
            running.take(step, &self.language.tokenizer);
        }
        for ended in self.running.extract_if(.., |running| !running.flush()) {
            self.batch.end(ended.speaker);
        }
        if before != self.waiting.len() {
            self.gauge();
        }
        let open = !self.running.is_empty() || !self.waiting.is_empty();
        if open && !moved {
            std::thread::sleep(REST);
        }
        open
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

    /// Takes what came of a step: the next token, or nothing while the prompt is being read.
    fn take(&mut self, step: anyhow::Result<Option<Step>>, tokenizer: &Tokenizer) {
        let step = match step {
            Ok(Some(step)) => step,
            Ok(None) => return,
            Err(error) => {
                tracing::error!(%error, "a request cannot be answered");
                let param = if error.is::<Stuck>() { "response_format" } else { "model" }.to_owned();
                let message = format!("the model cannot answer this: {error:#}");
                self.pending.push_back(GenerateEvent::Refused { param, message });
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
            let completion_tokens = self.speaker.generated() as u32;
            let source = |source: model::ridge::Source| Source {
                ordinal: source.document,
                likely: source.likely as f32,
            };
            let sources = self.speaker.sources().into_iter().map(source).collect();
            let usage = Usage { prompt_tokens: self.request.tokens.len() as u32, completion_tokens };
            let reason = match finish {
                Finish::Stop => FinishReason::Stop,
                Finish::Length => FinishReason::Length,
            };
            self.pending.push_back(GenerateEvent::Finished { index, reason, usage, sources });
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
