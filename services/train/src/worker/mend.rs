//! What a batch has cost of rehearsed answers is learned again before it ends, with what it has not learned yet.
//!
//! An answer that has to be exact is lost by a few nats, which the mean loss of what is rehearsed does not show. So each
//! rehearsed answer that was said to the letter before the batch is asked for after it, and each new one: those that are
//! not said are trained on for some rounds, beside others that are.

use super::{Halt, Run, Worker};
use crate::course::{Item, MENDING_ROUNDS};
use model::loss::recite;
use model::pack::Sequence;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;
use std::ops::ControlFlow;

/// Rehearsed answers that are asked for between two looks at waiting requests.
const RECITED: usize = 32;
/// Examples of an answer from which on answers are taken to repeat.
const REPEATED: usize = 3;
/// Examples of a round at least, where there are so many: of fewer a step would only move what it was taken from.
const LEAST: usize = 16;

/// What round number `n` trains on: all that is lost, and of the `others` twice as many.
fn round(lost: &[Item], others: &[Item], n: u32, seed: u64) -> Vec<Item> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ (u64::from(n) + 1).rotate_left(32));
    let mut others = others.to_vec();
    others.shuffle(&mut rng);
    others.truncate((2 * lost.len()).max(LEAST.saturating_sub(lost.len())));
    lost.iter().copied().chain(others).collect()
}

impl Worker {
    /// The rehearsed answers that the adapter says to the letter, and nothing else does. None where there are texts, which would be unlearned
    /// meanwhile, or where answers repeat: labels are not told from each other by heart, and have reviews.
    pub(super) fn said(&self, run: &Run<'_>) -> anyhow::Result<Vec<Item>> {
        let (fresh, rehearsed) = run.told();
        let answers = fresh.iter().map(|told| &told.answer).collect::<BTreeSet<_>>().len();
        if run.batch.parent.is_none() || !run.answers_only() || fresh.len() > REPEATED * answers {
            return Ok(Vec::new());
        }
        let rehearsed = self.undecided(run, rehearsed.iter().map(|told| told.item).collect())?;
        self.recited(run, &rehearsed)
    }

    /// Those of the items that the adapter says to the letter, in the order given.
    fn recited(&self, run: &Run<'_>, items: &[Item]) -> anyhow::Result<Vec<Item>> {
        let mut said = Vec::new();
        let mut last = None;
        for part in items.chunks(RECITED) {
            if self.between(&mut last).is_break() {
                break;
            }
            let sequences: Vec<Sequence> =
                part.iter().map(|&item| self.sequence(run, item).clone()).collect();
            let row_tokens = self.training.learner.row_tokens;
            let recited = recite(&self.base, &[(run.learner.adapter(), 1.0)], &sequences, row_tokens)?;
            said.extend(part.iter().zip(recited).filter(|(_, (_, said))| *said).map(|(&item, _)| item));
        }
        Ok(said)
    }

    /// Learns again what was `said` before the batch and is not now, and what is new and not said yet.
    pub(super) fn mend(
        &self,
        run: &mut Run<'_>,
        said: Vec<Item>,
        rate: f64,
    ) -> anyhow::Result<ControlFlow<Halt>> {
        if said.is_empty() {
            return Ok(ControlFlow::Continue(()));
        }
        let by_heart = |n: &usize| !run.fresh[*n].0.out && !run.fresh[*n].0.counted;
        let fresh = (0..run.fresh.len()).filter(by_heart).map(Item::Known);
        let wanted: Vec<Item> = said.into_iter().chain(fresh).collect();
        for n in 0..MENDING_ROUNDS {
            let now = self.recited(run, &wanted)?;
            let known: BTreeSet<Item> = now.iter().copied().collect();
            let lost: Vec<Item> = wanted.iter().copied().filter(|item| !known.contains(item)).collect();
            if lost.is_empty() {
                break;
            }
            let items = round(&lost, &now, n, run.batch.seed);
            let items = items.into_iter().map(|item| (item, run.tokens(item))).collect();
            let course = &self.training.course;
            for items in course.mixture(n, items, &[], run.batch.seed) {
                let halt = self.step(run, &items, rate * course.mending_rate(n))?;
                if halt.is_break() {
                    return Ok(halt);
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_has_all_that_was_lost_and_some_that_was_not() {
        let others: Vec<Item> = (0..40).map(Item::Known).collect();
        let lost: Vec<Item> = [3, 5].map(Item::Rehearsed).to_vec();
        let items = round(&lost, &others, 0, 7);
        assert!(items.starts_with(&lost));
        assert_eq!(items.len(), LEAST);
        assert_eq!(items.iter().collect::<BTreeSet<_>>().len(), items.len(), "nothing twice");
        let many: Vec<Item> = (0..10).map(Item::Rehearsed).collect();
        assert_eq!(round(&many, &others, 0, 7).len(), 30);
        assert_ne!(round(&lost, &others, 0, 7), round(&lost, &others, 1, 7), "others each time");
        assert_eq!(round(&lost, &[], 0, 7), lost);
    }
}
