//! Makes what was learned durable and current: generations, manifests, rollback, forgetting.
//!
//! The only writer of manifests. Every decision about a batch ends here, in one manifest that is
//! there whole or not at all; every counter lives in it, so that each document counts once.

mod administer;
mod commit;
mod keep;
mod merge;
#[cfg(test)]
mod tests;

use kit::answers::AnswerFiles;
use kit::blobs::Blobs;
use kit::latents::Latents;
use kit::ledger::Ledger;
use kit::link::Door;
use kit::manifests::Registry;
use kit::service::{Fault, Handle, Service};
use kit::store::Store;
use proto::{BaseId, Decision, Domain, Judgement, Lineage, Manifest, Merge, PeftFiles, Publish, Published};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Adapters in the PEFT format, in and out, and merged. The supervisor hands in the one
/// implementation; this service knows files and manifests, not models.
pub trait Peft: Send + Sync + 'static {
    /// The weights of an adapter folder as a lineage keeps them.
    ///
    /// # Errors
    /// What is wrong with it, for the user.
    fn import(&self, files: &PeftFiles) -> anyhow::Result<Vec<u8>>;

    /// The folder of a lineage's weights.
    ///
    /// # Errors
    /// When they are not what [`Peft::import`] or the learner made.
    fn export(&self, weights: &[u8]) -> anyhow::Result<PeftFiles>;

    /// One adapter made of several, each with its weight; of `how` the method and its parameters count.
    ///
    /// # Errors
    /// What is wrong, for the user; the message begins with the parameter at fault, if it is one.
    fn merge(&self, parts: &[(Vec<u8>, f64)], how: &Merge) -> anyhow::Result<Vec<u8>>;

    /// What several generations counted of answers that repeat, added up; none where that is too much for one.
    ///
    /// # Errors
    /// When counts cannot be read.
    fn add_up(&self, counts: &[Vec<u8>]) -> anyhow::Result<Option<AnswerFiles>>;
}

/// The checkpoint service.
pub struct Checkpoint {
    /// Generations and manifests.
    pub registry: Arc<Registry>,
    /// The files they name.
    pub blobs: Arc<Blobs>,
    /// Documents and their trails.
    pub ledger: Arc<Ledger>,
    /// The rows of the replay buffer, of which forgetting removes some.
    pub store: Arc<Store>,
    /// What the base makes of examples, which forgetting removes.
    pub latents: Arc<Latents>,
    /// The base everything belongs to.
    pub base: BaseId,
    /// Where every base that learned in this data folder has a folder of its name.
    pub bases: PathBuf,
    /// PEFT in and out.
    pub peft: Arc<dyn Peft>,
    /// Generations of a lineage whose files are kept.
    pub generations_kept: usize,
    /// To `infer`.
    pub publish: Door<Publish, Published>,
}

impl Service for Checkpoint {
    const NAME: &'static str = "checkpoint";
}

impl Handle<Judgement> for Checkpoint {
    async fn handle(&mut self, judgement: &Judgement) -> Result<(), Fault> {
        fail::fail_point!("checkpoint::handle");
        if let Some(why) = self.stale(judgement)? {
            tracing::info!(lineage = %judgement.batch.lineage, why, "dropping a batch that history has passed by");
            self.edit(&judgement.batch.lineage, |_| {})?;
            // What it left behind may hold what was forgotten meanwhile.
            if let Decision::Publish(learned) = &judgement.decision {
                self.remove_files(keep::left_behind(learned))?;
            }
            return Ok(());
        }
        match &judgement.decision {
            Decision::Publish(learned) => self.publish_generation(judgement, learned).await?,
            Decision::Retry(reason) => {
                tracing::info!(lineage = %judgement.batch.lineage, reason, "the gate refused a candidate; trying again");
                metrics::counter!("engram:gate_refusals_total", "outcome" => "retry").increment(1);
                self.edit(&judgement.batch.lineage, |lineage| lineage.attempt += 1)?;
            }
            Decision::Split { reason, documents } => {
                tracing::warn!(lineage = %judgement.batch.lineage, reason, documents, "learning a batch in parts");
                // A batch that broke the learner was never measured.
                if !judgement.receipt.probes.is_empty() {
                    metrics::counter!("engram:gate_refusals_total", "outcome" => "split").increment(1);
                }
                self.edit(&judgement.batch.lineage, |lineage| {
                    (lineage.split_through, lineage.split_documents) = (judgement.batch.through, *documents);
                    lineage.attempt = 0;
                })?;
            }
            Decision::SetAside(reason) => self.set_aside(judgement, reason).await?,
        }
        Ok(())
    }

    async fn put_aside(&mut self, judgement: &Judgement, reason: &str) -> Result<(), Fault> {
        Ok(self.set_aside(judgement, reason).await?)
    }
}

impl Checkpoint {
    /// Changes one lineage in a new manifest, and counts a judged batch.
    fn edit(&self, lineage: &Domain, change: impl FnOnce(&mut Lineage)) -> anyhow::Result<()> {
        let mut manifest = self.next_manifest();
        let entry = manifest.lineages.entry(lineage.clone()).or_default();
        entry.judged += 1;
        change(entry);
        self.registry.commit(manifest, None)
    }

    fn next_manifest(&self) -> Manifest {
        let mut manifest = (*self.registry.manifest()).clone();
        manifest.number += 1;
        manifest.written_ms = now_ms();
        manifest
    }

    /// Has what is current served, and waits until it is. The serve lane may be on its way back: it
    /// takes up the newest manifest by itself when it is, so that waiting has an end.
    async fn serve(&self) -> Option<Published> {
        for _ in 0..150 {
            let manifest = (*self.registry.manifest()).clone();
            match self.publish.ask(Publish { manifest }).await {
                Ok(published) => {
                    self.registry.set_live(published.number);
                    return Some(published);
                }
                Err(error) => tracing::debug!(%error, "inference does not take the new generation yet"),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        tracing::warn!("inference did not take the new generation; it is served when inference is back");
        None
    }
}

/// Milliseconds since 1970.
fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}
