//! What becomes of a judged batch.

use crate::{Checkpoint, now_ms};
use proto::wire::{self, Kind};
use proto::{Batch, ExampleId, Generation, GenerationId, Judgement, Learned, SetAside, TrailEntry};
use std::collections::BTreeSet;

/// Steps of more rehearsal at half the learning rate that a batch starts with at most.
const CAUTION_MAX: u32 = 3;
/// Every so many batches of a lineage, one step less is tried next.
const LOWERED_EVERY: u64 = 4;

impl Checkpoint {
    /// Why a judgement no longer applies: while its batch was learned, the lineage was rolled back,
    /// or something that the batch holds was forgotten.
    pub(crate) fn stale(&self, judgement: &Judgement) -> anyhow::Result<Option<&'static str>> {
        let batch = &judgement.batch;
        if self.registry.has_passed(batch) {
            return Ok(Some("the lineage has moved"));
        }
        let all = batch.fresh.iter().chain(&batch.rehearsed).chain(&batch.held_out);
        let ids: BTreeSet<ExampleId> = all.map(|e| e.id).collect();
        let ids: Vec<ExampleId> = ids.into_iter().collect();
        let there = self.ledger.examples_of(&ids)?.len();
        Ok((there < ids.len()).then_some("something in it was forgotten"))
    }

    pub(crate) async fn publish_generation(
        &self,
        judgement: &Judgement,
        learned: &Learned,
    ) -> anyhow::Result<()> {
        let batch = &judgement.batch;
        let mut manifest = self.next_manifest();
        let generation = Generation {
            id: self.generation_id(judgement, learned)?,
            lineage: batch.lineage.clone(),
            base: self.base.clone(),
            parent: batch.parent.clone(),
            merged_from: Vec::new(),
            number: batch.number,
            manifest: manifest.number,
            after: batch.after,
            through: batch.through,
            documents: batch.documents,
            weights: learned.weights.clone(),
            optimiser: Some(learned.optimiser.clone()),
            fisher: learned.fisher.clone(),
            probe: Some(learned.probe.clone()),
            answer_head: learned.answer_head.clone(),
            learned: self.blobs.put(&wire::encode(Kind::Row, &learned.examples)?)?,
            report: learned.report.clone(),
            receipt: judgement.receipt.clone(),
            published_ms: now_ms(),
        };
        manifest.replay_digest = batch.replay_digest.clone();
        let lineage = manifest.lineages.entry(batch.lineage.clone()).or_default();
        lineage.current = Some(generation.id.clone());
        lineage.cursor = batch.through;
        lineage.number += 1;
        lineage.judged += 1;
        lineage.caution = caution(lineage.caution, batch);
        lineage.attempt = 0;
        lineage.documents += batch.documents;
        for (ordinal, reason) in broken_documents(judgement) {
            lineage.set_aside.push(SetAside { after: ordinal - 1, through: ordinal, reason });
            lineage.documents = lineage.documents.saturating_sub(1);
        }
        tracing::info!(
            lineage = %batch.lineage, generation = %generation.id, documents = batch.documents,
            learned = generation.report.in_words(), seconds = generation.report.seconds, "published a generation"
        );
        metrics::counter!("engram:documents_learned_total").increment(batch.documents);
        metrics::counter!("engram:generations_published_total").increment(1);
        self.registry.commit(manifest, Some(generation.clone()))?;
        fail::fail_point!("checkpoint::committed");
        let live = self.serve().await;
        self.write_trail(judgement, &generation, live.map(|p| p.live_ms)).await?;
        self.prune(&batch.lineage)
    }

    pub(crate) async fn set_aside(&self, judgement: &Judgement, reason: &str) -> anyhow::Result<()> {
        let batch = &judgement.batch;
        tracing::warn!(lineage = %batch.lineage, documents = batch.documents, reason, "put a batch aside");
        metrics::counter!("engram:gate_refusals_total", "outcome" => "set_aside").increment(1);
        self.edit(&batch.lineage, |lineage| {
            let reason = reason.to_owned();
            lineage.set_aside.push(SetAside { after: batch.after, through: batch.through, reason });
            lineage.cursor = batch.through;
            lineage.number += 1;
            lineage.attempt = 0;
        })?;
        let entry = |ordinal| (ordinal, entry("set_aside", Some(reason.to_owned()), now_ms()));
        Ok(self.ledger.record(documents(judgement).into_iter().map(entry).collect()).await?)
    }

    /// A name that says all that makes this version what it is.
    fn generation_id(&self, judgement: &Judgement, learned: &Learned) -> anyhow::Result<GenerationId> {
        let batch = &judgement.batch;
        let parent = batch.parent.as_ref().map_or("base", GenerationId::as_str);
        let text =
            format!("{} {} {parent} {} {}", self.base, batch.lineage, batch.through, learned.weights.0);
        Ok(GenerationId::new(&blake3::hash(text.as_bytes()).to_hex()[..16])?)
    }

    async fn write_trail(
        &self,
        judgement: &Judgement,
        generation: &Generation,
        live_ms: Option<u64>,
    ) -> anyhow::Result<()> {
        let broken: Vec<(u64, String)> = broken_documents(judgement);
        let mut entries = Vec::new();
        for ordinal in documents(judgement) {
            if let Some((_, reason)) = broken.iter().find(|(o, _)| *o == ordinal) {
                entries.push((ordinal, entry("set_aside", Some(reason.clone()), now_ms())));
                continue;
            }
            let id = Some(generation.id.to_string());
            entries.push((ordinal, entry("learned", id.clone(), generation.published_ms)));
            if let Some(at_ms) = live_ms {
                entries.push((ordinal, entry("live", id, at_ms)));
            }
        }
        Ok(self.ledger.record(entries).await?)
    }
}

/// How carefully the next batch starts. What this one needed is kept, and from time to time less is tried.
fn caution(before: u32, batch: &Batch) -> u32 {
    let lowered = batch.attempt == 0 && batch.number % LOWERED_EVERY == LOWERED_EVERY - 1;
    (before + batch.attempt).saturating_sub(u32::from(lowered)).min(CAUTION_MAX)
}

/// The documents of a batch, each once.
fn documents(judgement: &Judgement) -> BTreeSet<u64> {
    judgement.batch.fresh.iter().map(|e| e.id.ordinal).collect()
}

/// Documents of which nothing could be learned, with the reason.
fn broken_documents(judgement: &Judgement) -> Vec<(u64, String)> {
    let out: BTreeSet<ExampleId> = judgement.put_aside.iter().map(|(id, _)| *id).collect();
    let left: BTreeSet<u64> =
        judgement.batch.fresh.iter().filter(|e| !out.contains(&e.id)).map(|e| e.id.ordinal).collect();
    let mut broken = Vec::new();
    for (id, reason) in &judgement.put_aside {
        if !left.contains(&id.ordinal) && broken.iter().all(|(o, _)| *o != id.ordinal) {
            broken.push((id.ordinal, reason.clone()));
        }
    }
    broken
}

fn entry(event: &str, detail: Option<String>, at_ms: u64) -> TrailEntry {
    TrailEntry { event: event.to_owned(), at_ms, detail }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::Domain;

    #[test]
    fn what_a_batch_needed_is_kept_and_from_time_to_time_less_is_tried() {
        let batch = |number, attempt| Batch {
            lineage: Domain::general(),
            parent: None,
            number,
            attempt,
            after: 0,
            through: 1,
            documents: 1,
            seed: 0,
            fresh: Vec::new(),
            rehearsed: Vec::new(),
            rehearsed_a_pass: 0,
            known_answers: Vec::new(),
            rate_scale: 1.0,
            held_out: Vec::new(),
            replay_digest: String::new(),
        };
        let attempts = [0, 2, 0, 0, 0, 0, 0, 0, 2, 2];
        let mut at = 0;
        let care: Vec<u32> = (0..)
            .zip(attempts)
            .map(|(number, attempt)| {
                at = caution(at, &batch(number, attempt));
                at
            })
            .collect();
        assert_eq!(care, [0, 2, 2, 1, 1, 1, 1, 0, 2, 3]);
    }
}
