//! The worker: opens what is durable, builds all services, and runs them until it is told to finish.

use crate::lifeline;
use crate::text::Text;
use crate::topology::{Doors, Plant};
use anyhow::{Context, bail, ensure};
use gateway::{Gateway, Recorder, ServerInfo};
use kit::blobs::Blobs;
use kit::compute::Turn;
use kit::lane::{Lane, LaneOutcome, Policy, Stop};
use kit::latents::Latents;
use kit::ledger::Ledger;
use kit::manifests::Registry;
use kit::settings::Settings;
use kit::store::Store;
use model::device::helpers;
use model::hf::{ModelConfig, base_id};
use model::llama::Base;
use proto::{BaseId, Blob, Manifest};
use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Runs all services until [`lifeline::finish`] says so. `degraded` leaves learning off.
///
/// # Errors
/// When something durable cannot be opened, or a lane that serving needs died too often: the
/// supervisor then starts a new worker.
pub fn run(mut settings: Settings, data_dir: &Path, base_dir: &Path, degraded: bool) -> anyhow::Result<()> {
    // The gateway says of learning what the settings say.
    settings.train.enabled &= !degraded;
    let finish = lifeline::finish(Duration::from_secs(settings.supervisor.stop_seconds_max))?;
    let plant = plant(settings, data_dir, base_dir)?;
    let gateway = gateway(&plant, data_dir, base_dir)?;
    let learning = plant.settings.train.enabled;
    actix::System::new().block_on(async move {
        let stop = Stop::new();
        let told = stop.clone();
        actix::spawn(async move {
            // An error means that the pipe's thread is gone, which says the same.
            let _ = finish.await;
            told.set();
        });
        live(Rc::new(plant), gateway, learning, stop).await
    })
}

/// Opens everything durable, and loads the base.
///
/// # Errors
/// When something cannot be opened, or does not belong together.
pub fn plant(mut settings: Settings, data_dir: &Path, base_dir: &Path) -> anyhow::Result<Plant> {
    let placement = crate::up::placement(&settings)?;
    let id = BaseId::new(base_id(base_dir)?)?;
    let text = Text::load(base_dir)?;
    let ledger = Ledger::open(&data_dir.join("ledger"))?;
    // Examples are token ids, so they belong to the tokenizer and to how documents are cut.
    let cut = &settings.ingest;
    let encoding = format!("{} {} {:?} {}", text.fingerprint(), cut.max_seq_len, cut.views, cut.questions);
    if ledger.encode_as(&encoding)? {
        tracing::info!("documents are cut anew: the tokenizer, or how documents are cut, has changed");
    }
    // Lineages belong to a base. Another base finds its own, or starts at generation zero.
    let lineages = bases(data_dir).join(id.as_str());
    let registry = Registry::open(&lineages)?;
    let shared = settings.train.adapters == kit::settings::AdapterScope::Shared;
    match registry.try_manifest() {
        None => {
            let documents = ledger.head();
            if documents > 0 {
                tracing::info!(base = %id, documents, "nothing was learned on this base yet; learning all documents");
            }
            registry.commit(Manifest { number: 1, ..Manifest::empty(id.clone(), shared) }, None)?;
        }
        Some(manifest) => ensure!(
            manifest.shared == shared,
            "this data folder was used with train.adapters = \"{}\"; set that again, or give another folder with --data",
            if manifest.shared { "shared" } else { "per-domain" }
        ),
    }
    let blobs = Blobs::open(&lineages.join("blobs"))?;
    let named: BTreeSet<Blob> = registry.generations().iter().flat_map(|g| g.files()).collect();
    // What a crash left between the writing of a file and the manifest that names it.
    blobs.retain(|blob| named.contains(blob))?;
    let asked = settings.train.micro_tokens;
    let footprint = crate::memory::settle(&mut settings, &ModelConfig::load(base_dir)?, &placement)?;
    if settings.train.micro_tokens < asked {
        let micro_tokens = settings.train.micro_tokens;
        let mib = footprint.map_or(0.0, |footprint| (footprint.total() / f64::from(1 << 20)).ceil());
        tracing::info!(micro_tokens, mib, "memory is short: learning takes smaller micro-batches");
    }
    let base = {
        let _helpers = helpers();
        Base::load(base_dir, &placement)?
    };
    tracing::info!(base = %base_dir.display(), id = %id, parameters = base.parameter_count(), bytes = base.bytes_len(), %placement, "loaded the base");
    let plant = Plant {
        doors: Doors::new(settings.infer.max_running + settings.infer.queue_max),
        store: Arc::new(Store::open(&lineages.join("replay"))?),
        latents: Arc::new(Latents::open(&lineages.join("latents"), settings.train.latents_mb_max << 20)?),
        blobs: Arc::new(blobs),
        registry: Arc::new(registry),
        ledger: Arc::new(ledger),
        text: Arc::new(text),
        turn: Turn::new(),
        given_up: Arc::default(),
        base_id: id,
        data_dir: data_dir.to_owned(),
        base: Mutex::new(base),
        settings,
    };
    let gone = plant.checkpoint().finish_forgetting()?;
    if !gone.is_empty() {
        tracing::warn!(
            generations = gone.len(),
            "finished forgetting what was being forgotten when this ended"
        );
    }
    Ok(plant)
}

/// Where each base that learned in a data folder has a folder of its own.
pub fn bases(data_dir: &Path) -> PathBuf {
    data_dir.join("lineages")
}

/// Runs lanes and gateway; returns when all of them have ended.
async fn live(plant: Rc<Plant>, gateway: Gateway, learning: bool, stop: Stop) -> anyhow::Result<()> {
    let door = async {
        let served = gateway.serve(stop.clone()).await.context("the HTTP door");
        stop.set();
        served
    };
    let (lanes, door) = tokio::join!(lanes(&plant, learning, &stop), door);
    lanes.and(door)
}

/// Runs all lanes until `stop` is set; it is set too when a lane that is needed dies too often.
///
/// # Errors
/// What they died of.
pub async fn lanes(plant: &Plant, learning: bool, stop: &Stop) -> anyhow::Result<()> {
    let policy = policy(&plant.settings);
    let intake = async {
        let outcome = Lane::run("intake", policy, async |crew| plant.intake(crew).await, stop.clone()).await;
        vital("intake", outcome, stop)
    };
    let serve = async {
        let outcome = Lane::run("serve", policy, async |crew| plant.serve(crew).await, stop.clone()).await;
        vital("serve", outcome, stop)
    };
    let learn = async {
        let outcome =
            Lane::run("learn", policy, async |crew| plant.learn(crew, learning).await, stop.clone()).await;
        if let LaneOutcome::Degraded { reason } = outcome {
            tracing::error!(
                reason,
                "learning is off; answers go on with what is published. Restart to learn again"
            );
            let _ = plant.given_up.set(reason);
            let outcome =
                Lane::run("learn", policy, async |crew| plant.learn(crew, false).await, stop.clone()).await;
            return vital("learn", outcome, stop);
        }
        Ok(())
    };
    let disk = async {
        tokio::select! {
            () = plant.ledger.failed() => {
                stop.set();
                bail!("the ledger could not be written to disk; starting again from what is there")
            }
            () = stop.wait() => Ok(()),
        }
    };
    let (intake, serve, learn, disk) = tokio::join!(intake, serve, learn, disk);
    disk.and(intake).and(serve).and(learn)
}

fn gateway(plant: &Plant, data_dir: &Path, base_dir: &Path) -> anyhow::Result<Gateway> {
    let doors = &plant.doors;
    let (registry, base) = (Arc::clone(&plant.registry), plant.base());
    let (enabled, given_up) = (plant.settings.train.enabled, Arc::clone(&plant.given_up));
    let (placement, answers) = (base.placement(), doors.generate.clone());
    Ok(Gateway {
        settings: plant.settings.clone(),
        ledger: Arc::clone(&plant.ledger),
        registry: Arc::clone(&plant.registry),
        doors: gateway::Doors {
            generate: Arc::new(doors.generate.clone()),
            embed: doors.embed.clone(),
            rollback: doors.rollback.clone(),
            forget: doors.forget.clone(),
            import: doors.import.clone(),
            merge: doors.merge.clone(),
            export: doors.export.clone(),
        },
        words: Arc::clone(&plant.text) as Arc<dyn gateway::Words>,
        reader: Arc::new(Files(ingest::read::Reader {
            program: std::env::current_exe().context("this program cannot find itself")?,
            scratch: data_dir.join(gateway::UPLOADS),
            document_bytes_max: plant.settings.gateway.document_bytes_max,
        })),
        // Inference notes what it serves before the first request can reach it.
        ready: Box::new(move || registry.live() > 0 && answers.is_open()),
        learning: Box::new(move || enabled && given_up.get().is_none()),
        info: ServerInfo {
            base_name: base_dir
                .file_name()
                .map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
            base_id: plant.base_id.clone(),
            parameters: base.parameter_count() as u64,
            context_length: base.config().max_positions as u32,
            device: format!("{:?}", placement.device).to_lowercase(),
            precision: format!("{:?}", placement.precision).to_lowercase(),
            data_dir: data_dir.to_owned(),
        },
        metrics: Recorder::install()?,
    })
}

/// How an upload is read: as `engram learn` reads files, but whole or not at all.
struct Files(ingest::read::Reader);

impl gateway::Reader for Files {
    fn documents(&self, file: File, name: &str) -> Result<Vec<gateway::Found>, String> {
        let found = self.0.documents(file, name).map_err(|error| format!("{error:#}"))?;
        let one = |draft: anyhow::Result<ingest::read::Draft>| match draft {
            Ok(draft) => Ok(gateway::Found { place: draft.place, body: draft.body }),
            Err(error) => Err(format!("{error:#}")),
        };
        found.into_iter().map(one).collect()
    }
}

/// Without these lanes there is no service: the process ends, and a new one has a fresh start.
fn vital(name: &str, outcome: LaneOutcome, stop: &Stop) -> anyhow::Result<()> {
    match outcome {
        LaneOutcome::Stopped => Ok(()),
        LaneOutcome::Degraded { reason } => {
            stop.set();
            bail!("the {name} lane died too often, the last time of this: {reason}")
        }
    }
}

fn policy(settings: &Settings) -> Policy {
    let s = &settings.supervisor;
    Policy {
        delay_min: Duration::from_millis(s.restart_delay_ms_min),
        delay_max: Duration::from_millis(s.restart_delay_ms_max),
        restarts_max: s.restarts_max,
        window: Duration::from_secs(s.restarts_window_s),
        tear_down_max: Duration::from_secs(s.stop_seconds_max),
    }
}
