//! The gate: a candidate is measured on what its lineage knew, and goes on only when that is intact.
//!
//! Then what it learned is consolidated: Fisher information for the EWC penalty of later batches, and the probe by which later
//! candidates are measured.

mod gate;
mod probe;
mod worker;

pub use worker::{Gating, Worker};

use kit::blobs::Blobs;
use kit::compute::Compute;
use kit::link::Link;
use kit::manifests::Registry;
use kit::service::{Fault, Handle, Service};
use proto::{AnswerHead, Blob, Candidate, Decision, Generation, Judgement, Learned, Receipt};
use std::collections::BTreeSet;
use std::sync::Arc;
use worker::{Answers, Held, Verdict};

/// Batches into which one is split that was refused as a whole, so that one document does not take all others with it.
/// Each is tried as often as the whole was and not split again: where an adapter is full, all of them are refused.
const PARTS: u64 = 8;

/// The consolidation service.
pub struct Consolidate {
    /// The thread that holds the base.
    pub compute: Compute<Worker>,
    /// Weights, Fisher information and probes.
    pub blobs: Arc<Blobs>,
    /// Published generations.
    pub registry: Arc<Registry>,
    /// Times a batch is tried.
    pub attempts_max: u32,
    /// To `checkpoint`.
    pub next: Link<Judgement>,
}

impl Service for Consolidate {
    const NAME: &'static str = "consolidate";
}

impl Handle<Candidate> for Consolidate {
    async fn handle(&mut self, candidate: &Candidate) -> Result<(), Fault> {
        fail::fail_point!("consolidate::handle");
        let weights = self.blobs.get(&candidate.weights)?;
        let solved = candidate.answer_head.as_ref().map(|head| self.blobs.get(&head.solved)).transpose()?;
        let held = match self.held(candidate) {
            Err(_) if self.registry.has_passed(&candidate.batch) => {
                return self.put_aside(candidate, "history has passed by").await;
            }
            held => held?,
        };
        let job = candidate.clone();
        let judged =
            self.compute.run(move |worker| worker.judge(&job, &weights, solved.as_deref(), &held)).await;
        let (verdict, receipt) = judged.map_err(anyhow::Error::from)??;
        let decision = match verdict {
            Verdict::Intact { fisher, probe, answers } => Decision::Publish(Box::new(Learned {
                weights: candidate.weights.clone(),
                optimiser: candidate.optimiser.clone(),
                fisher: fisher.map(|bytes| self.blobs.put(&bytes)).transpose()?,
                probe: self.blobs.put(&probe)?,
                answer_head: match answers {
                    Answers::Off => None,
                    Answers::Counted => candidate.answer_head.clone(),
                    Answers::AsBefore => self.parent(candidate).and_then(|parent| parent.answer_head.clone()),
                },
                examples: candidate.learned.clone(),
                report: candidate.report.clone(),
            })),
            Verdict::Harmed(reason) if candidate.batch.attempt + 1 < self.attempts_max => {
                Decision::Retry(reason)
            }
            Verdict::Harmed(reason) if self.is_whole(candidate) => {
                Decision::Split { reason, documents: candidate.batch.documents.div_ceil(PARTS) }
            }
            Verdict::Harmed(reason) | Verdict::Useless(reason) => Decision::SetAside(reason),
        };
        match &decision {
            Decision::Publish(learned) if learned.answer_head == candidate.answer_head => {}
            Decision::Publish(_) => self.remove(candidate.answer_head.iter().flat_map(AnswerHead::files))?,
            _ => self.remove(candidate.files())?,
        }
        self.send(candidate, decision, receipt).await
    }

    async fn put_aside(&mut self, candidate: &Candidate, reason: &str) -> Result<(), Fault> {
        self.remove(candidate.files())?;
        let reason = format!("what was learned from it could not be measured: {reason}");
        self.send(candidate, Decision::SetAside(reason), Receipt::default()).await
    }
}

impl Consolidate {
    /// Whether a batch of several documents has not been split yet.
    fn is_whole(&self, candidate: &Candidate) -> bool {
        let lineage = self.registry.lineage(&candidate.batch.lineage);
        candidate.batch.documents > 1 && lineage.documents_max().is_none()
    }

    /// Nothing stays of a candidate that is not published: it may hold what is forgotten meanwhile. Equal content has one
    /// file, and what was counted may be equal to what a generation counted.
    fn remove<'b>(&self, files: impl IntoIterator<Item = &'b Blob>) -> anyhow::Result<()> {
        let generations = self.registry.generations();
        let needed: BTreeSet<Blob> = generations.iter().flat_map(|g| g.files()).collect();
        files.into_iter().filter(|file| !needed.contains(file)).try_for_each(|file| self.blobs.remove(file))
    }

    async fn send(&self, candidate: &Candidate, decision: Decision, receipt: Receipt) -> Result<(), Fault> {
        let judgement = Judgement {
            batch: candidate.batch.clone(),
            decision,
            receipt,
            put_aside: candidate.put_aside.clone(),
        };
        Ok(self.next.send(judgement).await?)
    }

    fn parent(&self, candidate: &Candidate) -> Option<Arc<Generation>> {
        candidate.batch.parent.as_ref().and_then(|id| self.registry.generation(id))
    }

    /// What the parent generation holds against forgetting.
    fn held(&self, candidate: &Candidate) -> anyhow::Result<Held> {
        let read = |blob: Option<&Blob>| blob.map(|b| self.blobs.get(b)).transpose();
        let Some(parent) = self.parent(candidate) else { return Ok(Held::default()) };
        let head = parent.answer_head.as_ref();
        Ok(Held {
            probe: read(parent.probe.as_ref())?,
            fisher: read(parent.fisher.as_ref())?,
            head: read(head.map(|head| &head.solved))?,
        })
    }
}
