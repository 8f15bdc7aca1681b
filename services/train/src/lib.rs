//! The learner: a batch in, a candidate out.
//!
//! It always starts from published bytes and never from what is left in memory, so that a batch
//! that was interrupted is learned again exactly.

mod course;
mod recall;
mod review;
mod worker;

pub use course::Course;
pub use recall::{Known, Recall};
pub use worker::{Training, Worker};

use kit::blobs::Blobs;
use kit::compute::Compute;
use kit::link::Link;
use kit::manifests::Registry;
use kit::service::{Fault, Handle, Service};
use proto::{Batch, Candidate, Decision, Judgement, Receipt};
use std::sync::Arc;
use worker::{End, Start};

/// The training service.
pub struct Train {
    /// The thread that holds the base.
    pub compute: Compute<Worker>,
    /// Weights and optimiser states.
    pub blobs: Arc<Blobs>,
    /// Published generations.
    pub registry: Arc<Registry>,
    /// To `consolidate`.
    pub next: Link<Candidate>,
    /// To `checkpoint`, for a batch that never comes to a candidate.
    pub aside: Link<Judgement>,
}

impl Service for Train {
    const NAME: &'static str = "train";
}

impl Handle<Batch> for Train {
    async fn handle(&mut self, batch: &Batch) -> Result<(), Fault> {
        fail::fail_point!("train::handle");
        let start = match self.start(batch) {
            // Its parent was forgotten on the way; `checkpoint` drops the batch, and it is planned anew.
            Err(_) if self.registry.has_passed(batch) => {
                return self.put_aside(batch, "history has passed by").await;
            }
            start => start?,
        };
        let job = batch.clone();
        let end = self
            .compute
            .run(move |worker| worker.learn(&job, start))
            .await
            .map_err(anyhow::Error::from)??;
        fail::fail_point!("train::learned");
        match end {
            End::Learned(learned) => {
                let candidate = Candidate {
                    weights: self.blobs.put(&learned.weights)?,
                    optimiser: self.blobs.put(&learned.optimiser)?,
                    report: learned.report,
                    learned: learned.examples,
                    put_aside: learned.put_aside,
                    answer_head: learned.answers.map(|answers| answers.keep(&self.blobs)).transpose()?,
                    batch: batch.clone(),
                };
                Ok(self.next.send(candidate).await?)
            }
            End::Diverged(reason) => Err(Fault::Poison(reason)),
            // The lane is being taken down; the batch is planned again when it is back.
            End::Stopped => Ok(()),
        }
    }

    async fn put_aside(&mut self, batch: &Batch, reason: &str) -> Result<(), Fault> {
        let decision = if batch.documents > 1 {
            Decision::Split { reason: reason.to_owned(), documents: 1 }
        } else {
            Decision::SetAside(format!("the learner could not take it: {reason}"))
        };
        let receipt = Receipt::default();
        let judgement = Judgement { batch: batch.clone(), decision, receipt, put_aside: Vec::new() };
        Ok(self.aside.send(judgement).await?)
    }
}

impl Train {
    /// What the batch's parent left behind, each file verified by its hash.
    fn start(&self, batch: &Batch) -> anyhow::Result<Option<Start>> {
        let Some(parent) = &batch.parent else { return Ok(None) };
        let generation = self
            .registry
            .generation(parent)
            .ok_or_else(|| anyhow::anyhow!("generation {parent} is not there to start from"))?;
        let read = |blob: &proto::Blob| self.blobs.get(blob);
        Ok(Some(Start {
            weights: read(&generation.weights)?,
            optimiser: generation.optimiser.as_ref().map(read).transpose()?,
            fisher: generation.fisher.as_ref().map(read).transpose()?,
            counts: generation.answer_head.as_ref().map(|head| read(&head.counts)).transpose()?,
        }))
    }
}
