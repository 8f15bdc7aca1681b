//! The wiring: every service and every edge, in one place, checked by the compiler.
//!
//! ```text
//! gateway ─append─> ledger
//!    intake:  ledger ─Accepted─> ingest ─Parsed─> filter ─Kept─> replay ─settle─> ledger
//!    learn:   ledger ─> replay ─Batch─> train ─Candidate─> consolidate ─Judgement─> checkpoint ─> manifest
//!    serve:   manifest ─Publish─> infer ─GenerateEvent─> gateway
//! ```
//!
//! Each lane goes from a durable thing to a durable thing, and is restarted as a whole.

use crate::text::Text;
use crate::worker;
use anyhow::Context;
use checkpoint::Checkpoint;
use consolidate::{Consolidate, Gating};
use filter::{Filter, Rules};
use infer::{Engine, Full, Infer, Language, Serving};
use ingest::{Cutter, Feeder, Ingest, Views};
use kit::blobs::Blobs;
use kit::compute::{Compute, Turn};
use kit::lane::{Crew, Stop};
use kit::latents::Latents;
use kit::ledger::Ledger;
use kit::link::{Door, Events};
use kit::manifests::Registry;
use kit::settings::{Products, Settings};
use kit::store::Store;
use model::anchor;
use model::device::{Helpers, helpers};
use model::hf::ModelConfig;
use model::llama::Base;
use model::pack::Sequence;
use model::ridge::{ANSWER_TOKENS_MAX, Counting, FACTS_MAX};
use proto::{
    BaseId, Embed, Embedded, Export, Forget, Forgotten, Generate, GenerateEvent, GenerationId, Import, Merge,
    PeftFiles, Publish, Published, Refusal, Rollback, RolledBack,
};
use replay::{HoldOut, Mixer, Mixing, Settle};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use train::{Recall, Train, Training};

/// Documents under way between two services of the intake lane.
const INTAKE_CREDIT: usize = 16;
/// Batches under way between two services of the learn lane.
const LEARN_CREDIT: usize = 1;
/// Questions that wait at an administration door.
const DOOR_CREDIT: usize = 16;

/// What a refusal of it is told with.
pub const INT8: &str = "train.products=int8";

/// Which part of the seed is whose.
const REHEARSED_ANCHORS: u64 = 1;
const GATE_ANCHORS: u64 = 2;

/// Where services of one lane are reached from another, and from the gateway. Doors outlive the
/// services behind them.
#[derive(Clone)]
pub struct Doors {
    pub publish: Door<Publish, Published>,
    pub generate: Door<Generate, Result<Events<GenerateEvent>, Full>>,
    pub embed: Door<Embed, Result<Embedded, Refusal>>,
    pub rollback: Door<Rollback, Result<RolledBack, Refusal>>,
    pub forget: Door<Forget, Result<Forgotten, Refusal>>,
    pub import: Door<Import, Result<GenerationId, Refusal>>,
    pub merge: Door<Merge, Result<GenerationId, Refusal>>,
    pub export: Door<Export, Result<PeftFiles, Refusal>>,
}

impl Doors {
    pub fn new(generate_credit: usize) -> Self {
        Self {
            publish: Door::new(1),
            generate: Door::new(generate_credit),
            embed: Door::new(DOOR_CREDIT),
            rollback: Door::new(DOOR_CREDIT),
            forget: Door::new(DOOR_CREDIT),
            import: Door::new(DOOR_CREDIT),
            merge: Door::new(DOOR_CREDIT),
            export: Door::new(DOOR_CREDIT),
        }
    }
}

/// What all services are built from.
pub struct Plant {
    pub settings: Settings,
    pub ledger: Arc<Ledger>,
    pub registry: Arc<Registry>,
    pub blobs: Arc<Blobs>,
    pub store: Arc<Store>,
    pub latents: Arc<Latents>,
    pub text: Arc<Text>,
    pub base_id: BaseId,
    pub data_dir: PathBuf,
    pub turn: Arc<Turn>,
    pub doors: Doors,
    /// What learning was given up for, once it is.
    pub given_up: Arc<OnceLock<String>>,
    /// The base as it was loaded; each compute thread takes a handle of its own on the same memory.
    pub base: Mutex<Base>,
}

impl Plant {
    /// Another handle on the base, to move to a compute thread.
    pub fn base(&self) -> Base {
        self.base.lock().unwrap_or_else(std::sync::PoisonError::into_inner).share()
    }

    /// Documents that the ledger holds, to examples that it holds.
    pub async fn intake(&self, crew: &mut Crew) -> anyhow::Result<()> {
        let s = &self.settings;
        // What the crew before has handed over is on disk before anything is read that it may change.
        self.ledger.settle_intake_many(Vec::new()).await?;
        let hold_out = HoldOut { share: s.replay.held_out_share, after: s.replay.held_out_after };
        let (settle, settled) = Settle::new(Arc::clone(&self.ledger), hold_out);
        crew.source("settled", move || settled.run());
        let settle = crew.host(settle);
        let rules = Rules {
            chars_min: s.filter.chars_min,
            repetition_max: s.filter.repetition_max,
            languages: s.filter.languages.clone(),
            near_duplicate: s.filter.near_duplicate,
            secrets: s.filter.secrets,
        };
        let filter = crew.host(Filter::new(rules, Arc::clone(&self.ledger), settle.link(INTAKE_CREDIT))?);
        let ingest = crew.host(Ingest { cutter: cutter(s, &self.text), next: filter.link(INTAKE_CREDIT) });
        let feeder = Feeder { ledger: Arc::clone(&self.ledger), next: ingest.link(INTAKE_CREDIT) };
        let stop = crew.stop().clone();
        crew.source("feeder", move || feeder.run(stop));
        Ok(())
    }

    /// What publishes, rolls back and forgets.
    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint {
            registry: Arc::clone(&self.registry),
            blobs: Arc::clone(&self.blobs),
            ledger: Arc::clone(&self.ledger),
            store: Arc::clone(&self.store),
            latents: Arc::clone(&self.latents),
            base: self.base_id.clone(),
            bases: worker::bases(&self.data_dir),
            peft: Arc::clone(&self.text) as Arc<dyn checkpoint::Peft>,
            generations_kept: self.settings.checkpoint.generations_kept,
            publish: self.doors.publish.clone(),
        }
    }

    /// Examples that the ledger holds, to published generations. Without `learning`, what is
    /// published stays in its owner's hands: rollback, forgetting, import, export and merging go on.
    pub async fn learn(&self, crew: &mut Crew, learning: bool) -> anyhow::Result<()> {
        let s = &self.settings;
        let checkpoint = crew.host(self.checkpoint());
        checkpoint.answer_at(&self.doors.rollback);
        checkpoint.answer_at(&self.doors.forget);
        checkpoint.answer_at(&self.doors.import);
        checkpoint.answer_at(&self.doors.merge);
        checkpoint.answer_at(&self.doors.export);
        if !learning {
            return Ok(());
        }
        let consolidate = crew.host(Consolidate {
            compute: self.gate_thread(crew.stop().clone()).await?,
            blobs: Arc::clone(&self.blobs),
            registry: Arc::clone(&self.registry),
            attempts_max: s.consolidate.attempts_max,
            next: checkpoint.link(LEARN_CREDIT),
        });
        let train = crew.host(Train {
            compute: self.train_thread(crew.stop().clone()).await?,
            blobs: Arc::clone(&self.blobs),
            registry: Arc::clone(&self.registry),
            next: consolidate.link(LEARN_CREDIT),
            aside: checkpoint.link(LEARN_CREDIT),
        });
        let mixer = Mixer::new(
            mixing(s, self.data_dir.clone()),
            Arc::clone(&self.ledger),
            Arc::clone(&self.registry),
            Arc::clone(&self.blobs),
            Arc::clone(&self.store),
            train.link(LEARN_CREDIT),
        )?;
        let stop = crew.stop().clone();
        crew.source("mixer", move || mixer.run(stop));
        Ok(())
    }

    /// Published generations, to answers.
    pub async fn serve(&self, crew: &mut Crew) -> anyhow::Result<()> {
        let s = &self.settings;
        let (base, language, threads) = (self.base(), self.text.language(), s.base.threads);
        let running_max = s.infer.max_running;
        let (speaks, cache_bytes_max) = (Arc::clone(&language), s.infer.cache_mb_max << 20);
        let narrow_copy = s.infer.narrow_copy;
        let engine = Compute::start_engine("infer", 1 + running_max, move || {
            let _helpers = compute_with(threads);
            Engine::new(base, speaks, running_max, cache_bytes_max, narrow_copy)
        })
        .await?;
        let death = engine.death();
        crew.source("infer engine", move || async move { Err(death.await.into()) });
        let serving = Serving {
            running_max,
            queue_max: s.infer.queue_max,
            route_strictness: s.infer.route_strictness,
            route_top: s.infer.route_top,
        };
        let infer = Infer::new(
            serving,
            language,
            engine,
            Arc::clone(&self.turn),
            Arc::clone(&self.blobs),
            Arc::clone(&self.registry),
            Arc::clone(&self.ledger),
        );
        let infer = crew.host(infer.await?);
        infer.answer_at(&self.doors.publish);
        infer.answer_at(&self.doors.generate);
        infer.answer_at(&self.doors.embed);
        Ok(())
    }

    async fn train_thread(&self, stop: Stop) -> anyhow::Result<Compute<train::Worker>> {
        let s = &self.settings;
        let base = self.base();
        let training = training(s, base.config())?;
        let (turn, threads) = (Arc::clone(&self.turn), s.base.threads);
        let (count, length) = (s.replay.anchors, s.replay.anchor_tokens);
        let (latents, form) = (Arc::clone(&self.latents), format!("{} {}", self.base_id, base.placement()));
        let (products, passage_tokens_max) = (s.train.products, s.train.passage_tokens_max);
        let language = s.consolidate.answer_head.then(|| self.text.language());
        Compute::start("train", move || {
            let _helpers = compute_with(threads);
            // What is counted is what the base that answers makes of prompts.
            let answering = base.share();
            let base = to_learn(base, products)?;
            if base.has_codes() {
                tracing::info!("learning multiplies in 8 bits");
            }
            let anchors = anchors(&base, count, length, REHEARSED_ANCHORS)?;
            let counting = language.map(|language| counting(&answering, &language, &anchors)).transpose()?;
            let counting = counting.map(|counting| counting.keeping(passage_tokens_max));
            let recall = Recall::new(latents, form, &anchors);
            Ok(train::Worker::new(base, training, anchors, recall, counting, turn, stop))
        })
        .await
    }

    async fn gate_thread(&self, stop: Stop) -> anyhow::Result<Compute<consolidate::Worker>> {
        let s = &self.settings;
        let (base, turn, threads) = (self.base(), Arc::clone(&self.turn), s.base.threads);
        let (count, length) = (s.consolidate.anchor_probe, s.replay.anchor_tokens);
        let gating = Gating {
            tolerance: s.consolidate.tolerance,
            anchor_tolerance: s.consolidate.anchor_tolerance,
            memory_probe: s.consolidate.memory_probe,
            held_out_probe: s.consolidate.held_out_probe,
            fisher_examples: if s.train.ewc_lambda > 0.0 { s.consolidate.fisher_examples } else { 0 },
            fisher_decay: s.consolidate.fisher_decay,
            row_tokens: s.train.row_tokens,
            repeat_counted: s.train.repeat_counted,
            share_while_serving: s.train.share_while_serving,
        };
        let language = s.consolidate.answer_head.then(|| self.text.language());
        Compute::start("consolidate", move || {
            let _helpers = compute_with(threads);
            let anchors = anchors(&base, count, length, GATE_ANCHORS)?;
            // It only asks what is known, and counts nothing.
            let counting = language.map(|language| counting(&base, &language, &[])).transpose()?;
            Ok(consolidate::Worker::new(base, gating, anchors, counting, turn, stop))
        })
        .await
    }
}

/// What counts answers that repeat.
fn counting(base: &Base, language: &Language, anchors: &[Sequence]) -> anyhow::Result<Counting> {
    let chat = |text: &str| language.template.encode_chat(&language.tokenizer, &[("user", text)], true);
    let foreign = model::ridge::foreign(anchors, &language.tokenizer, &chat)?;
    Counting::new(base, Arc::clone(&language.tokenizer), foreign)
}

/// How documents are cut.
pub fn cutter(s: &Settings, text: &Arc<Text>) -> Cutter {
    Cutter {
        encode: Arc::clone(text) as Arc<dyn ingest::Encode>,
        max_seq_len: s.ingest.max_seq_len,
        questions: s.ingest.questions,
        views: match s.ingest.views {
            kit::settings::Views::Verbatim => Views::Verbatim,
            kit::settings::Views::Chat => Views::Chat,
            kit::settings::Views::Both => Views::Both,
        },
    }
}

/// How batches are mixed, where so much of the disk that holds `disk` is free.
pub fn mixing(s: &Settings, disk: PathBuf) -> Mixing {
    use kit::settings::Strategy as Named;
    Mixing {
        capacity: s.replay.capacity,
        strategy: match s.replay.strategy {
            Named::Reservoir => replay::Strategy::Reservoir,
            Named::Importance => replay::Strategy::Importance,
            Named::Diversity => replay::Strategy::Diversity,
            Named::Hybrid => replay::Strategy::Hybrid,
        },
        new_data_ratio: s.replay.new_data_ratio,
        rehearse_min: s.replay.rehearse_min,
        batch_examples: s.replay.batch_examples,
        batch_counted: if s.consolidate.answer_head && !s.train.repeat_counted {
            s.replay.batch_counted
        } else {
            0
        },
        answer_tokens: ANSWER_TOKENS_MAX,
        facts_max: FACTS_MAX,
        known_answers: s.train.answers_apart,
        poll: std::time::Duration::from_millis(s.train.poll_ms),
        seed: s.replay.seed,
        disk,
        disk_free_percent: f64::from(s.limits.disk_free_learn_percent),
    }
}

/// How batches are learned on a base `width` wide.
///
/// # Errors
/// When the shape of adapters is none.
pub fn training(s: &Settings, model: &ModelConfig) -> anyhow::Result<Training> {
    use model::lora::{LoraConfig, Target};
    let mut targets = LoraConfig::default().targets;
    if s.train.down {
        targets.push(Target::Down);
    }
    let lora = LoraConfig {
        rank: s.train.rank,
        alpha: s.train.alpha,
        rslora: s.train.rslora,
        targets,
        ..LoraConfig::default()
    };
    lora.check()?;
    let lora = lora.in_top_layers(s.train.top_layers, model).context("train.top_layers")?;
    Ok(Training {
        lora,
        learner: model::learner::LearnerConfig {
            clip: s.train.clip,
            adamw: model::optim::AdamWConfig { weight_decay: s.train.weight_decay, ..Default::default() },
            row_tokens: s.train.row_tokens,
        },
        rate: s.rate(model.hidden_size),
        course: train::Course {
            passes: s.train.passes,
            answer_passes_max: s.train.answer_passes_max,
            loss_target: s.train.loss_target,
            steps_min: s.train.steps_min,
            step_tokens: s.train.step_tokens,
            anchor_share: s.train.anchor_share,
            answer_rate: s.train.answer_rate,
            review_passes: s.train.review_passes,
        },
        micro_tokens: s.train.micro_tokens,
        ewc_lambda: s.train.ewc_lambda,
        olora: (s.train.olora_lambda > 0.0).then_some((s.train.olora_parts, s.train.olora_lambda)),
        former: model::guard::FormerShares {
            fresh: s.train.former_share,
            rehearsed: s.train.former_share_rehearsed,
        },
        repeat_counted: s.train.repeat_counted,
        share_while_serving: s.train.share_while_serving,
    })
}

/// The base as learning multiplies with it.
///
/// # Errors
/// When it cannot have what is asked for on this machine.
pub fn to_learn(base: Base, products: Products) -> anyhow::Result<Base> {
    if products.are_int8(|| Base::is_faster_with_codes(base.config(), &base.placement())) {
        return base.with_codes().context(INT8);
    }
    Ok(base)
}

/// Anchor sequences: what the base says of its own accord. Sampled once a start, from a fixed seed.
fn anchors(base: &Base, count: usize, length: usize, seed: u64) -> anyhow::Result<Vec<Sequence>> {
    anchor::sample(base, count, length, seed)
}

/// libtorch's thread count is the calling thread's own; 0 leaves it to libtorch. Those that help until this is dropped end then.
fn compute_with(threads: usize) -> Helpers {
    if threads > 0 {
        model::device::set_threads(threads);
    }
    helpers()
}
