//! The program's own services, on a data folder of their own, without the HTTP door.

use crate::topology::Plant;
use crate::worker;
use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use kit::lane::Stop;
use kit::settings::Settings;
use kit::status::document_status;
use model::lora::Adapter;
use model::ridge::Head;
use proto::{Content, Document, Domain, GenerationId, Stage, TrainReport};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How often it is looked whether everything is learned.
const POLL: Duration = Duration::from_millis(20);

/// A running system.
pub struct System {
    plant: Plant,
    stop: Stop,
}

/// A generation as it is served.
pub struct Served {
    /// Its adapter.
    pub adapter: Adapter,
    /// What it knows of answers that repeat.
    pub head: Option<Head>,
}

/// What became of the documents that were given to learn.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Taught {
    /// Learned and served.
    pub live: usize,
    /// Refused by the filter: duplicates, as a rule.
    pub refused: usize,
    /// Put aside by the gate.
    pub set_aside: usize,
    /// Generations that were published.
    pub generations: usize,
    /// From the first document to the last decision.
    pub seconds: f64,
    /// What training took of them, and what measuring them for the gate did.
    pub generation_seconds: GenerationSeconds,
    /// What training took for the last batch.
    pub last_batch: TrainReport,
}

/// What the parts of generations took that were published.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct GenerationSeconds {
    /// Training, with what it gathers for the next one.
    pub training: f64,
    /// Measuring the candidate, for the gate.
    pub measuring: f64,
}

/// Starts the services on an empty folder, lets `drive` use them, and ends them.
///
/// # Errors
/// What `drive` or the services failed of.
pub fn with<R>(
    settings: Settings,
    base_dir: &Path,
    drive: impl AsyncFnOnce(&System) -> Result<R>,
) -> Result<R> {
    let folder = tempfile::tempdir().context("no folder to learn in")?;
    let plant = worker::plant(settings, folder.path(), base_dir)?;
    let system = System { plant, stop: Stop::new() };
    actix::System::new().block_on(async {
        let driven = async {
            let result = drive(&system).await;
            system.stop.set();
            result
        };
        let (lanes, driven) = tokio::join!(worker::lanes(&system.plant, true, &system.stop), driven);
        lanes.and(driven)
    })
}

impl System {
    /// What everything is built from.
    pub fn plant(&self) -> &Plant {
        &self.plant
    }

    /// Has documents learned, and waits until each is decided upon.
    ///
    /// # Errors
    /// When the ledger fails, or the services died.
    pub async fn teach(&self, documents: &[(Domain, Content)]) -> Result<Taught> {
        let (started, before) = (Instant::now(), self.plant.registry.generations());
        let newest_before = before.iter().map(|g| g.manifest).max();
        let ledger = &self.plant.ledger;
        let submitted_ms =
            SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let document = |(domain, content): &(Domain, Content)| Document {
            id: Document::content_id(domain, content),
            domain: domain.clone(),
            content: content.clone(),
            importance: None,
            source: None,
            submitted_ms,
            derived_from: None,
        };
        let documents: Vec<Document> = documents.iter().map(document).collect();
        let ids: Vec<_> = documents.iter().map(|d| d.id.clone()).collect();
        // All at once: what a batch holds must not depend on how fast they come.
        ledger.append(documents).await?;
        let bar = ProgressBar::new_spinner();
        while self.has_work()? {
            if self.stop.is_set() {
                bail!("the services ended before everything was learned");
            }
            if let Some(reason) = self.plant.given_up.get() {
                bail!("learning died too often, the last time of this: {reason}");
            }
            let published = self.plant.registry.generations().len().saturating_sub(before.len());
            bar.set_message(format!("learning {} documents: {published} generations published", ids.len()));
            tokio::time::sleep(POLL).await;
        }
        bar.finish_and_clear();
        let mut taught = Taught {
            seconds: started.elapsed().as_secs_f64(),
            generations: self.plant.registry.generations().len().saturating_sub(before.len()),
            ..Taught::default()
        };
        let published = self.plant.registry.generations();
        if let Some(newest) = published.iter().max_by_key(|g| g.manifest) {
            taught.last_batch = newest.report.clone();
        }
        for generation in published.iter().filter(|g| Some(g.manifest) > newest_before) {
            taught.generation_seconds.training += f64::from(generation.report.seconds);
            taught.generation_seconds.measuring += f64::from(generation.receipt.seconds);
        }
        for id in &ids {
            let registry = &self.plant.registry;
            match document_status(ledger, registry, registry.live(), id)?.map(|status| status.status) {
                Some(Stage::Refused) => taught.refused += 1,
                Some(Stage::SetAside) => taught.set_aside += 1,
                _ => taught.live += 1,
            }
        }
        Ok(taught)
    }

    /// Whether a document waits to be judged or to be learned.
    fn has_work(&self) -> Result<bool> {
        let (ledger, manifest) = (&self.plant.ledger, self.plant.registry.manifest());
        if ledger.intake_cursor() < ledger.head() {
            return Ok(true);
        }
        let cursors: BTreeMap<Domain, u64> = if manifest.shared {
            let cursor = manifest.lineages.get(&Domain::general()).map_or(0, |l| l.cursor);
            ledger.domains()?.into_iter().map(|domain| (domain, cursor)).collect()
        } else {
            manifest.lineages.iter().map(|(domain, l)| (domain.clone(), l.cursor)).collect()
        };
        Ok(ledger.oldest_waiting(&cursors)?.is_some())
    }

    /// The current generation of each lineage.
    pub fn current(&self) -> BTreeMap<Domain, GenerationId> {
        let manifest = self.plant.registry.manifest();
        let current =
            |(domain, lineage): (&Domain, &proto::Lineage)| Some((domain.clone(), lineage.current.clone()?));
        manifest.lineages.iter().filter_map(current).collect()
    }

    /// What of each lineage is served.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn served(&self) -> Result<BTreeMap<Domain, Served>> {
        let base = self.plant.base();
        let load = |(domain, id): (Domain, GenerationId)| {
            let generation = self.plant.registry.generation(&id).context("a generation is gone")?;
            let bytes = self.plant.blobs.get(&generation.weights)?;
            let adapter = Adapter::from_bytes(&bytes, base.config())?.to_device(base.device());
            let head = generation.answer_head.as_ref().map(|head| self.plant.blobs.get(&head.solved));
            let head = head.transpose()?.map(|bytes| Head::from_bytes(&bytes)).transpose()?;
            Ok((domain, Served { adapter, head }))
        };
        self.current().into_iter().map(load).collect()
    }

    /// Bytes of all that is served beside the base, and of what heads are counted from.
    pub fn adapter_bytes(&self) -> u64 {
        let size = |id: &GenerationId| {
            let generation = self.plant.registry.generation(id)?;
            let head = generation.answer_head.iter().flat_map(proto::AnswerHead::files);
            let files = std::iter::once(&generation.weights).chain(head);
            Some(files.filter_map(|file| self.plant.blobs.size(file)).sum::<u64>())
        };
        self.current().values().filter_map(size).sum()
    }

    /// Bytes of all rows in the replay buffer.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn replay_bytes(&self) -> Result<u64> {
        Ok(self.plant.store.rows()?.iter().map(|(_, row)| row.len() as u64).sum())
    }
}

impl Taught {
    /// Adds what became of further documents.
    pub fn add(&mut self, other: &Self) {
        self.live += other.live;
        self.refused += other.refused;
        self.set_aside += other.set_aside;
        self.generations += other.generations;
        self.seconds += other.seconds;
        self.generation_seconds.training += other.generation_seconds.training;
        self.generation_seconds.measuring += other.generation_seconds.measuring;
        self.last_batch = other.last_batch.clone();
    }
}
