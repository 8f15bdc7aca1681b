//! Answers of a batch that repeat are counted before it is learned: what is said because of that need not be repeated until
//! the adapter knows it by heart.

use super::{Run, Start, Worker};
use crate::course::Item;
use kit::answers::AnswerFiles;
use model::pack::Sequence;
use model::ridge::{Counted, Material};
use proto::{Batch, Example, ExampleId};
use std::collections::BTreeSet;

/// Prompts that are described between two looks at waiting requests.
const LOOKED_AT: usize = 64;

impl Worker {
    /// Counts what the batch answers, beside what its parent counted, but for what was `put_aside`. None where nothing
    /// repeats, or nothing is to be counted.
    pub(super) fn count(
        &self,
        batch: &Batch,
        start: Option<&Start>,
        put_aside: &BTreeSet<ExampleId>,
    ) -> anyhow::Result<Option<Counted>> {
        let Some(counting) = &self.counting else { return Ok(None) };
        let fresh: Vec<Material<'_>> =
            batch.fresh.iter().filter(|example| !put_aside.contains(&example.id)).map(material).collect();
        let beside: Vec<Material<'_>> = batch.rehearsed.iter().map(material).collect();
        let older = start.and_then(|start| start.counts.as_deref());
        let mut last = None;
        let counted = counting.take_in(&fresh, &beside, older, &mut || self.between(&mut last))?;
        if counted.as_ref().is_some_and(|counted| counted.full) {
            tracing::warn!(
                "answers that repeat were counted millions of times, and are not counted any more"
            );
        }
        if counted.as_ref().is_some_and(|counted| counted.unkept) {
            tracing::warn!(
                "texts of this domain are no longer remembered word for word: train.passage_tokens_max is reached"
            );
        }
        Ok(counted)
    }

    /// What a batch may rely on of what was counted. Once it was refused, the gate may not take that, and it is learned by heart.
    pub(super) fn relied_on<'c>(&self, batch: &Batch, counted: Option<&'c Counted>) -> Option<&'c Counted> {
        counted.filter(|_| !self.training.repeat_counted && batch.attempt == 0)
    }

    /// Those of the items that are the adapter's to say.
    pub(super) fn undecided(&self, run: &Run<'_>, items: Vec<Item>) -> anyhow::Result<Vec<Item>> {
        let (Some(counting), Some(head)) = (&self.counting, run.head) else { return Ok(items) };
        let (mut own, mut last) = (Vec::new(), None);
        for part in items.chunks(LOOKED_AT) {
            if self.between(&mut last).is_break() {
                break;
            }
            let sequences: Vec<Sequence> =
                part.iter().map(|&item| self.sequence(run, item).clone()).collect();
            let decided = counting.look_at(&sequences)?.decided(head)?;
            own.extend(part.iter().zip(decided).filter(|(_, decided)| !decided).map(|(&item, _)| item));
        }
        Ok(own)
    }
}

/// What was counted, as files.
pub(super) fn files(Counted { counts, head, prompts, .. }: &Counted) -> anyhow::Result<AnswerFiles> {
    Ok(AnswerFiles {
        counts: counts.clone(),
        solved: head.to_bytes()?,
        answers: head.answers().len() as u64,
        prompts: *prompts,
        trusted: head.is_trusted(),
        facts: head.facts() as u64,
        passages: head.passages().len() as u64,
    })
}

fn material(example: &Example) -> Material<'_> {
    let (tokens, learned) = (example.piece.tokens.as_slice(), example.piece.learned.as_slice());
    Material { document: example.id.ordinal, tokens, learned }
}
