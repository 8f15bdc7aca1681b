//! What a batch has cost of rehearsed answers is learned again before it ends.
//!
//! An answer that has to be exact is lost by a few nats, which the mean loss of what is rehearsed does not show. So each
//! rehearsed answer that was said to the letter before the batch is asked for after it, and those that are not said any
//! longer are trained on for some rounds, beside as many that are.

use super::{Halt, Run, Worker};
use crate::course::{Item, MENDING_ROUNDS};
use model::loss::recite;
use model::pack::Sequence;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::time::Instant;

/// Rehearsed answers that are asked for between two looks at waiting requests.
const RECITED: usize = 32;
/// Examples of a round at least, where there are so many: of fewer a step would only move what it was taken from.
const LEAST: usize = 16;

/// What round number `n` trains on: all that was lost, and of the `others` twice as many.
fn round(lost: &[usize], others: &[Item], n: u32, seed: u64) -> Vec<Item> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ (u64::from(n) + 1).rotate_left(32));
    let taken: BTreeSet<Item> = lost.iter().map(|&n| Item::Rehearsed(n)).collect();
    let mut others: Vec<Item> = others.iter().copied().filter(|item| !taken.contains(item)).collect();
    others.shuffle(&mut rng);
    others.truncate((2 * lost.len()).max(LEAST.saturating_sub(lost.len())));
    taken.into_iter().chain(others).collect()
}

impl Worker {
    /// Which rehearsed answers the adapter says to the letter; none where there are texts, of which there is no saying.
    pub(super) fn said(&self, run: &Run<'_>) -> anyhow::Result<Vec<usize>> {
        let mut said = Vec::new();
        if run.batch.parent.is_none() || !run.answers_only() {
            return Ok(said);
        }
        let places: Vec<usize> =
            (0..run.rehearsed.len()).filter(|&n| !run.rehearsed[n].learned.is_empty()).collect();
        let (mut last, mut begun) = (Instant::now(), false);
        for part in places.chunks(RECITED) {
            if self.between(&mut last, &mut begun).is_break() {
                break;
            }
            let sequences: Vec<Sequence> = part.iter().map(|&n| run.rehearsed[n].clone()).collect();
            let row_tokens = self.training.learner.row_tokens;
            let recited = recite(&self.base, &[(run.learner.adapter(), 1.0)], &sequences, row_tokens)?;
            said.extend(part.iter().zip(recited).filter(|(_, (_, said))| *said).map(|(&n, _)| n));
        }
        Ok(said)
    }

    /// Learns again what was `said` before the batch and is not now.
    pub(super) fn mend(
        &self,
        run: &mut Run<'_>,
        said: &[usize],
        rate: f64,
    ) -> anyhow::Result<ControlFlow<Halt>> {
        if said.is_empty() {
            return Ok(ControlFlow::Continue(()));
        }
        for n in 0..MENDING_ROUNDS {
            let now = self.said(run)?;
            let lost: Vec<usize> = said.iter().copied().filter(|n| now.binary_search(n).is_err()).collect();
            if lost.is_empty() {
                break;
            }
            let fresh = (0..run.fresh.len()).filter(|&n| !run.fresh[n].0.out).map(Item::Known);
            let others: Vec<Item> = now.into_iter().map(Item::Rehearsed).chain(fresh).collect();
            let items = round(&lost, &others, n, run.batch.seed);
            let items = items.into_iter().map(|item| (item, run.tokens(item))).collect();
            let steps = self.training.course.mixture(n, items, &[], run.batch.seed);
            for items in &steps {
                let halt = self.step(run, items, rate * self.training.course.mending_rate(n))?;
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
    fn a_round_has_all_that_was_lost_once_and_some_that_was_not() {
        let others: Vec<Item> = (0..40).map(Item::Rehearsed).chain((0..40).map(Item::Known)).collect();
        let items = round(&[3, 5], &others, 0, 7);
        assert!(items.contains(&Item::Rehearsed(3)) && items.contains(&Item::Rehearsed(5)));
        assert_eq!(items.len(), LEAST);
        assert_eq!(items.iter().collect::<BTreeSet<_>>().len(), items.len(), "nothing twice");
        let many: Vec<usize> = (0..20).collect();
        assert_eq!(round(&many, &others, 0, 7).len(), 60);
        assert_ne!(round(&[3], &others, 0, 7), round(&[3], &others, 1, 7), "others each time");
        assert_eq!(round(&[3], &[], 0, 7), [Item::Rehearsed(3)]);
    }
}
