//! Answers from what is current: leases adapters to requests, decodes them together, streams text.
//!
//! A request keeps the adapters it started with to its end; a new generation is for the requests
//! that come after it.

mod apart;
mod embed;
mod engine;
mod guide;
mod profiles;
mod router;

pub use apart::{Apart, counted};
pub use engine::{Engine, Looks, Question, Request};
pub use guide::Guide;
pub use profiles::Profiles;
pub use router::{ByBase, Route, Router, Routing};

use anyhow::Context;
use guide::Compilation;
use kit::blobs::Blobs;
use kit::compute::{Compute, Turn};
use kit::ledger::Ledger;
use kit::link::{self, Events, ReplyTo};
use kit::manifests::Registry;
use kit::service::{Answer, Fault, Service};
use model::chat::ChatTemplate;
use model::grammar::Grammars;
use model::hf::ModelConfig;
use model::tokenizer::Tokenizer;
use proto::{
    Adapters, Choice, Domain, Generate, GenerateEvent, Generation, GenerationId, Manifest, Prompt, Publish,
    Published, Role, Weighted,
};
use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Events that wait for a slow reader before its request pauses.
const EVENTS_MAX: usize = 64;

/// Characters at the end of what is asked that are looked for in texts: some sentences.
const ASKED_CHARS_MAX: usize = 1000;

/// Settings of inference.
#[derive(Debug, Clone)]
pub struct Serving {
    /// Answers that are decoded at the same time.
    pub running_max: usize,
    /// Answers that wait for a place beyond those.
    pub queue_max: usize,
    /// Multiplies what a prompt has to reach before `auto` picks a lineage; 0 lets everything fit.
    pub route_strictness: f32,
    /// Lineages that `auto` picks at most.
    pub route_top: usize,
}

/// As many requests run and wait as are allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("as many requests run and wait as are allowed")]
pub struct Full;

/// The text side of a base.
pub struct Language {
    /// Its shape.
    pub config: ModelConfig,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat template, or the default one.
    pub template: ChatTemplate,
}

impl Language {
    fn grammars(&self) -> Grammars {
        // Where the template refuses the simplest conversation, no turn will end.
        let end_of_turn = self.template.end_of_turn(&self.tokenizer).unwrap_or_default();
        let ends = [self.tokenizer.eos_ids(), &end_of_turn[..]].concat();
        Grammars::new(&self.tokenizer, self.config.vocab_size as usize, ends)
    }
}

/// The inference service.
pub struct Infer {
    serving: Serving,
    language: Arc<Language>,
    grammars: Arc<Grammars>,
    engine: Compute<Engine>,
    turn: Arc<Turn>,
    blobs: Arc<Blobs>,
    registry: Arc<Registry>,
    ledger: Arc<Ledger>,
    /// What is served: the generation of each lineage.
    current: BTreeMap<Domain, GenerationId>,
    profiles: Profiles,
    apart: Arc<Apart>,
    /// Whether any of these counts prompts.
    counting: bool,
    /// Generations that the engine has loaded.
    loaded: BTreeSet<GenerationId>,
}

impl Service for Infer {
    const NAME: &'static str = "infer";
}

impl Infer {
    /// The service, serving what the registry says is current.
    ///
    /// # Errors
    /// When a current generation cannot be loaded.
    pub async fn new(
        serving: Serving,
        language: Arc<Language>,
        engine: Compute<Engine>,
        turn: Arc<Turn>,
        blobs: Arc<Blobs>,
        registry: Arc<Registry>,
        ledger: Arc<Ledger>,
    ) -> anyhow::Result<Self> {
        let profiles = Profiles::new(Arc::clone(&language.tokenizer), serving.route_strictness);
        let grammars = Arc::new(language.grammars());
        let mut infer = Self {
            serving,
            language,
            grammars,
            engine,
            turn,
            blobs,
            registry: Arc::clone(&registry),
            ledger,
            current: BTreeMap::new(),
            profiles,
            apart: Arc::default(),
            counting: false,
            loaded: BTreeSet::new(),
        };
        let manifest = registry.manifest();
        infer.take_up(&manifest).await?;
        registry.set_live(manifest.number);
        Ok(infer)
    }

    /// Loads what a manifest makes current, all of it, and then serves it.
    async fn take_up(&mut self, manifest: &Manifest) -> anyhow::Result<()> {
        let (mut current, mut counting) = (BTreeMap::new(), false);
        for (domain, lineage) in &manifest.lineages {
            if let Some(id) = &lineage.current {
                self.load(id).await.with_context(|| format!("generation {id} of '{domain}'"))?;
                let counts = |generation: &Generation| {
                    generation.answer_head.as_ref().is_some_and(|head| head.prompts > 0)
                };
                counting |= self.registry.generation(id).is_some_and(|generation| counts(&generation));
                current.insert(domain.clone(), id.clone());
            }
        }
        self.profiles.follow(&self.registry, &self.ledger, &current)?;
        // Adapters that nothing serves any more go with their last request.
        let keep: BTreeSet<GenerationId> = current.values().cloned().collect();
        self.loaded.retain(|id| keep.contains(id));
        self.engine.run(move |engine| engine.keep(&keep)).await?;
        self.apart.follow(counted(&self.registry, &current), self.ledger.forgotten());
        self.apart.catch_up(&self.blobs);
        self.current = current;
        self.counting = counting;
        Ok(())
    }

    /// Has the engine load a generation: verified by hash, of this base, finite, with an effect.
    async fn load(&mut self, id: &GenerationId) -> anyhow::Result<()> {
        if self.loaded.contains(id) {
            return Ok(());
        }
        let generation = self.registry.generation(id).context("it is not in the registry")?;
        let bytes = self.blobs.get(&generation.weights)?;
        let head = generation.answer_head.as_ref().map(|head| self.blobs.get(&head.solved)).transpose()?;
        let name = id.clone();
        self.engine.run(move |engine| engine.load(name, &bytes, head.as_deref())).await??;
        self.loaded.insert(id.clone());
        Ok(())
    }

    /// The adapters that answer a request; or, for its user, the parameter at fault and what to do.
    fn choose(&self, ask: &Generate, looks: Option<&Looks>) -> Result<Choice, (String, String)> {
        let fixed = match &ask.adapters {
            Adapters::Base => return Ok(Choice { adapters: Vec::new(), confidence: None }),
            Adapters::Auto => return self.route(&ask.prompt, looks),
            Adapters::Fixed(fixed) => fixed,
        };
        let mut adapters = Vec::new();
        for weighted in fixed {
            if let Some(id) = self.resolve(weighted)? {
                adapters.push(Weighted { generation: Some(id), ..weighted.clone() });
            }
        }
        Ok(Choice { adapters, confidence: None })
    }

    /// What a prompt looks like that `auto` has to find the lineage of; none where no lineage counts prompts.
    async fn look(&self, ask: &Generate, tokens: &[u32], open_max: usize) -> Result<Option<Looks>, Fault> {
        if !matches!(ask.adapters, Adapters::Auto) || !self.counting {
            return Ok(None);
        }
        let (tokens, n, apart) = (tokens.to_vec(), ask.n, Arc::clone(&self.apart));
        let look = move |engine: &mut Engine| {
            // Who will be turned away costs the others nothing.
            if engine.has_room(n, open_max) { engine.looks(&tokens, &apart) } else { Ok(None) }
        };
        let looks = self.engine.run(look).await?;
        // Whoever answers it will say what is wrong with it.
        Ok(looks
            .inspect_err(|error| tracing::warn!("a prompt cannot be described: {error:#}"))
            .unwrap_or(None))
    }

    /// What `auto` picks: the likeliest of the lineages that the prompt fits, or the base when it fits none.
    fn route(&self, prompt: &Prompt, looks: Option<&Looks>) -> Result<Choice, (String, String)> {
        let by_base = looks.map(|looks| self.by_base(looks)).unwrap_or_default();
        let routing = self
            .profiles
            .route(&question(prompt), &by_base)
            .map_err(|e| (at_prompt(prompt), format!("{e:#}")))?;
        let confidence = routing.as_ref().map(|r| r.confidence);
        metrics::histogram!("engram:route_confidence").record(f64::from(confidence.unwrap_or(0.0)));
        let chosen = routing.map(|r| r.top(self.serving.route_top)).unwrap_or_default();
        let serve = |(domain, weight)| {
            let generation = Some(self.current.get(&domain)?.clone());
            Some(Weighted { domain, generation, weight })
        };
        let adapters: Vec<Weighted> = chosen.into_iter().filter_map(serve).collect();
        let first = adapters.first().map_or("base", |first| first.domain.as_str());
        metrics::counter!("engram:requests_routed_total", "model" => first.to_owned()).increment(1);
        Ok(Choice { adapters, confidence })
    }

    /// What the base makes of a prompt, by lineage.
    fn by_base(&self, looks: &Looks) -> ByBase {
        let of = |told: &BTreeMap<GenerationId, f64>| {
            let of = |(domain, id): (&Domain, &GenerationId)| Some((domain.clone(), *told.get(id)?));
            self.current.iter().filter_map(of).collect()
        };
        ByBase { kinship: of(&looks.kinship), recalled: of(&looks.recalled), shares: looks.shares.clone() }
    }

    /// The generation that a part of `model` names; none for a lineage that only has the base yet.
    fn resolve(&self, weighted: &Weighted) -> Result<Option<GenerationId>, (String, String)> {
        let domain = &weighted.domain;
        let manifest = self.registry.manifest();
        let lineage = if manifest.shared { &Domain::general() } else { domain };
        let Some(wanted) = &weighted.generation else {
            if !manifest.lineages.contains_key(lineage) {
                return Err(at_model(&format!("there is no model '{domain}'; GET /v1/models lists them")));
            }
            return Ok(self.current.get(lineage).cloned());
        };
        match self.registry.generation(wanted) {
            Some(generation) if generation.lineage == *lineage => Ok(Some(wanted.clone())),
            _ => Err(at_model(&format!("'{domain}' has no generation {wanted}"))),
        }
    }

    /// The tokens of a request's prompt; or, for its user, the parameter at fault and what to do.
    fn prepare(&self, ask: &Generate, open_max: usize) -> Result<Vec<u32>, (String, String)> {
        if !(1..=open_max).contains(&(ask.n as usize)) {
            let message = format!("{} answers are more than this server ever has open: {open_max}", ask.n);
            return Err(("n".to_owned(), message));
        }
        let vocabulary = self.language.config.vocab_size;
        if let Some(id) = ask.sampling.logit_bias.keys().find(|&&id| i64::from(id) >= vocabulary) {
            let message = format!("this model has no token {id}; its vocabulary has {vocabulary}");
            return Err(("logit_bias".to_owned(), message));
        }
        self.encode(&ask.prompt)
    }

    fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>, (String, String)> {
        let param = at_prompt(prompt);
        let tokens = match prompt {
            Prompt::Text(text) => self.language.tokenizer.encode(text),
            Prompt::Messages(messages) => {
                let turns: Vec<(&str, &str)> =
                    messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
                self.language.template.encode_chat(&self.language.tokenizer, &turns, true)
            }
        };
        let tokens = tokens.map_err(|e| (param.clone(), format!("{e:#}")))?;
        let context = self.language.config.max_positions as usize;
        if tokens.is_empty() {
            return Err((param, "it is empty, and this model needs something to start from".into()));
        }
        if tokens.len() >= context {
            let message = format!(
                "it is {} tokens long; this model's context holds {context}, the answer included",
                tokens.len()
            );
            return Err((param, message));
        }
        Ok(tokens)
    }
}

impl Answer<Publish> for Infer {
    type Reply = Published;

    async fn answer(&mut self, publish: Publish) -> Result<Published, Fault> {
        self.take_up(&publish.manifest).await?;
        let live_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        Ok(Published { number: publish.manifest.number, live_ms })
    }
}

impl Answer<Generate> for Infer {
    type Reply = Result<Events<GenerateEvent>, Full>;

    async fn answer(&mut self, ask: Generate) -> Result<Self::Reply, Fault> {
        let (reply, events) = link::events(EVENTS_MAX);
        let open_max = self.serving.running_max + self.serving.queue_max;
        let tokens = match self.prepare(&ask, open_max) {
            Ok(tokens) => tokens,
            Err((param, message)) => return Ok(Ok(refuse(events, &reply, param, message))),
        };
        let turn = self.turn.enter();
        let looks = self.look(&ask, &tokens, open_max).await?;
        let choice = match self.choose(&ask, looks.as_ref()) {
            Ok(choice) => choice,
            Err((param, message)) => return Ok(Ok(refuse(events, &reply, param, message))),
        };
        for weighted in &choice.adapters {
            // A fixed generation may be an old one, whose files are no longer there.
            if let Some(id) = &weighted.generation
                && let Err(error) = self.load(id).await
            {
                let (param, message) = at_model(&format!("generation {id} cannot be served: {error:#}"));
                return Ok(Ok(refuse(events, &reply, param, message)));
            }
        }
        let started = GenerateEvent::Started(choice.clone());
        let compilation = match ask.schema {
            Some(schema) => Some(Compilation::new(&self.grammars, schema, started, reply.clone())),
            None => {
                let _ = reply.try_send(started);
                None
            }
        };
        let guide = compilation.as_ref().map(Compilation::guide);
        let stop_ids = match ask.prompt {
            Prompt::Text(_) => Vec::new(),
            Prompt::Messages(_) => self.language.template.end_of_turn(&self.language.tokenizer)?,
        };
        let asked = asked(&self.language, &ask.prompt, &stop_ids)?;
        let (adapters, sampling, n) = (choice.adapters, ask.sampling, ask.n);
        let (features, prior) = (looks.map(|looks| looks.features), OnceCell::new());
        let request = Request {
            tokens,
            adapters,
            sampling,
            n,
            stop_ids,
            guide,
            reply,
            turn,
            features,
            question: asked,
            prior,
        };
        if let Err(full) = self.engine.run(move |engine| engine.take(request, open_max)).await? {
            return Ok(Err(full));
        }
        if let Some(compilation) = compilation {
            tokio::task::spawn_blocking(move || compilation.run());
        }
        Ok(Ok(events))
    }
}

fn refuse(
    events: Events<GenerateEvent>,
    reply: &ReplyTo<GenerateEvent>,
    param: String,
    message: String,
) -> Events<GenerateEvent> {
    // The stream is new and empty: there is room.
    let _ = reply.try_send(GenerateEvent::Refused { param, message });
    events
}

fn at_model(message: &str) -> (String, String) {
    ("model".to_owned(), message.to_owned())
}

/// The parameter that holds the prompt.
fn at_prompt(prompt: &Prompt) -> String {
    match prompt {
        Prompt::Text(_) => "prompt".to_owned(),
        Prompt::Messages(_) => "messages".to_owned(),
    }
}

/// What is asked, as it is looked for in texts: its end.
fn asked(language: &Language, prompt: &Prompt, stop_ids: &[u32]) -> anyhow::Result<Question> {
    let text = question(prompt);
    let start = text.char_indices().rev().nth(ASKED_CHARS_MAX).map_or(0, |(at, _)| at);
    let (text, tokenizer) = (&text[start..], &language.tokenizer);
    let is_chat = matches!(prompt, Prompt::Messages(_));
    let is_question = is_chat || text.trim_end().ends_with(['?', '？']);
    let end = stop_ids.first().or(tokenizer.eos_ids().first()).copied().filter(|_| is_question);
    let tokens = tokenizer.encode_continuation(&format!(" {}", text.trim()))?;
    Ok(Question { tokens, is_question, is_apart: text.ends_with(char::is_whitespace), end })
}

/// The text that a request is routed by: what was asked last.
fn question(prompt: &Prompt) -> String {
    match prompt {
        Prompt::Text(text) => text.clone(),
        Prompt::Messages(messages) => {
            let asked = messages.iter().rev().find(|m| m.role == Role::User);
            asked.or(messages.last()).map(|m| m.content.clone()).unwrap_or_default()
        }
    }
}
