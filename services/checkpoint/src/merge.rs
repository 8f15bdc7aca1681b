//! Adapters that come in whole: a merge of published ones, or one that was made elsewhere.

use crate::administer::expect;
use crate::{Checkpoint, now_ms};
use kit::service::{Answer, Fault};
use proto::wire::{self, Kind};
use proto::{
    AnswerHead, Blob, Domain, Generation, GenerationId, LearnedExample, Merge, Receipt, Refusal, TrainReport,
    Weighted,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

impl Answer<Merge> for Checkpoint {
    type Reply = Result<GenerationId, Refusal>;

    async fn answer(&mut self, ask: Merge) -> Result<Self::Reply, Fault> {
        let current = self.registry.lineage(&ask.lineage).current;
        if let Err(refusal) = expect(ask.expected.as_ref(), current.as_ref()) {
            return Ok(Err(refusal));
        }
        let (mut parts, mut from, mut heads) = (Vec::new(), Vec::new(), BTreeMap::new());
        for weighted in &ask.from {
            match self.part(weighted) {
                Ok((generation, weights)) => {
                    from.push(generation.id.clone());
                    // What a later generation of a lineage counted holds what an earlier one did.
                    let said = |head: &AnswerHead| head.speaks() && weighted.weight > 0.0;
                    if let Some(head) = generation.answer_head.clone().filter(said) {
                        let latest = heads.entry(&weighted.domain).or_insert_with(|| head.clone());
                        if (latest.prompts, latest.passages) < (head.prompts, head.passages) {
                            *latest = head;
                        }
                    }
                    parts.push((weights, f64::from(weighted.weight)));
                }
                Err(refusal) => return Ok(Err(refusal)),
            }
        }
        // A copy of a lineage has its very counts.
        let counts: BTreeSet<Blob> = heads.into_values().map(|head| head.counts).collect();
        let counts: Result<Vec<Vec<u8>>, _> = counts.iter().map(|counts| self.blobs.get(counts)).collect();
        // Singular values of many large matrices take long enough to keep others waiting.
        let (peft, how, lineage) = (Arc::clone(&self.peft), ask.clone(), ask.lineage.clone());
        let merged = tokio::task::spawn_blocking(move || {
            let merged = peft.merge(&parts, &how);
            let counts = counts.ok().filter(|counts| merged.is_ok() && !counts.is_empty());
            let counted = counts.map(|counts| peft.add_up(&counts)).transpose();
            // What the adapters learned is worth having without.
            let lost = |error: &anyhow::Error| tracing::warn!("a merge without counts: {error:#}");
            (merged, counted.inspect_err(lost).unwrap_or(None).flatten())
        });
        let (merged, counted) = merged.await?;
        let weights = match merged {
            Ok(weights) => self.blobs.put(&weights)?,
            Err(error) => {
                let message = format!("{error:#}");
                let known = ["rank", "density"].into_iter().find(|name| message.starts_with(name));
                let param = known.unwrap_or("from").to_owned();
                return Ok(Err(Refusal::Invalid { param, message }));
            }
        };
        let head = counted.map(|counted| counted.keep(&self.blobs)).transpose()?;
        Ok(Ok(self.take_over(&lineage, weights, from, head).await?))
    }
}

impl Checkpoint {
    /// One adapter of a merge, with its bytes.
    fn part(&self, weighted: &Weighted) -> Result<(Arc<Generation>, Vec<u8>), Refusal> {
        let domain = &weighted.domain;
        let id = weighted.generation.clone().or_else(|| self.registry.lineage(domain).current);
        let Some(id) = id else {
            return Err(Refusal::NotFound(format!("'{domain}' has no adapter yet")));
        };
        let generation = self.registry.generation(&id).filter(|g| g.lineage == *domain);
        let Some(generation) = generation else {
            return Err(Refusal::NotFound(format!("'{domain}' has no generation {id}")));
        };
        match self.blobs.get(&generation.weights) {
            Ok(weights) => Ok((generation, weights)),
            Err(_) => Err(Refusal::NotFound(format!("the weights of generation {id} are no longer kept"))),
        }
    }

    /// Publishes weights that no batch of this lineage made, on top of what is current.
    pub(crate) async fn take_over(
        &self,
        domain: &Domain,
        weights: Blob,
        merged_from: Vec<GenerationId>,
        answer_head: Option<AnswerHead>,
    ) -> anyhow::Result<GenerationId> {
        let mut manifest = self.next_manifest();
        let lineage = manifest.lineages.entry(domain.clone()).or_default();
        let text = format!("import {} {domain} {} {}", self.base, lineage.number, weights.0);
        let generation = Generation {
            id: GenerationId::new(&blake3::hash(text.as_bytes()).to_hex()[..16])?,
            lineage: domain.clone(),
            base: self.base.clone(),
            parent: lineage.current.clone(),
            merged_from,
            number: lineage.number,
            manifest: manifest.number,
            after: lineage.cursor,
            through: lineage.cursor,
            documents: 0,
            weights,
            optimiser: None,
            // Taken at other weights, it says nothing of these.
            fisher: None,
            // What the owner brings is the new measure: it starts without old scores to be held to.
            probe: None,
            answer_head,
            learned: self.blobs.put(&wire::encode(Kind::Row, &Vec::<LearnedExample>::new())?)?,
            report: TrainReport::default(),
            receipt: Receipt::default(),
            published_ms: now_ms(),
        };
        let id = generation.id.clone();
        lineage.current = Some(id.clone());
        lineage.number += 1;
        lineage.judged += 1;
        self.registry.commit(manifest, Some(generation))?;
        let _ = self.serve().await;
        Ok(id)
    }
}
