//! A review at the end of a batch: old answers and new ones, each as often as the others.
//!
//! Where few examples are kept of each old answer, a pass has many of each new one beside them, and the batch ends with
//! an adapter that says new answers where old ones belong. A few passes over an even mixture at a low rate set that
//! right, as the balanced fine-tuning of Castro et al. (arXiv 1807.09536) does for classifiers.

use crate::course::Item;
use std::collections::{BTreeMap, BTreeSet};

/// An example that answers a prompt.
#[derive(Debug, Clone)]
pub struct Told {
    /// Where it lies in the batch.
    pub item: Item,
    /// What it answers, as tokens.
    pub answer: Vec<u32>,
}

/// How many times as often as an old answer a new one has to come in a pass to be worth a review.
const UNEVEN: f64 = 2.0;

/// What review number `n` takes: of every answer, old or new, equally many examples, others each time. None where new
/// answers do not repeat, as facts, or passes of `a_pass` rehearsed examples had about as many of an old one as of a new one.
///
/// It is no longer than such a pass, and leaves out old answers that are longer than all new ones, which no new one can
/// be taken for.
pub fn mixture(fresh: &[Told], rehearsed: &[Told], a_pass: usize, n: u32) -> Option<Vec<Item>> {
    let longest = fresh.iter().map(|told| told.answer.len()).max()?;
    let old = || rehearsed.iter().filter(|told| told.answer.len() <= longest);
    let kept = old().count();
    let old_answers = old().map(|told| &told.answer).collect::<BTreeSet<_>>().len();
    let new_answers = fresh.iter().map(|told| &told.answer).collect::<BTreeSet<_>>().len();
    let of_new = fresh.len() as f64 / new_answers as f64;
    let of_old = a_pass.min(kept) as f64 / old_answers.max(1) as f64;
    if kept == 0 || of_new < UNEVEN * of_old.max(1.0) {
        return None;
    }
    let mut by_answer: BTreeMap<&[u32], Vec<Item>> = BTreeMap::new();
    for told in old().chain(fresh) {
        by_answer.entry(&told.answer).or_default().push(told.item);
    }
    let most = fresh.len() + a_pass;
    let each = kept.div_ceil(old_answers).min(most / by_answer.len()).max(1);
    let answers: Vec<&Vec<Item>> = by_answer.values().collect();
    let chosen = in_turn(&answers, most / each, n);
    Some(chosen.flat_map(|examples| in_turn(examples, each, n)).copied().collect())
}

/// At most `count` of a list, going on in turn number `n` where the one before stopped.
fn in_turn<T>(of: &[T], count: usize, n: u32) -> impl Iterator<Item = &T> {
    let count = count.min(of.len());
    (0..count).map(move |at| &of[(n as usize * count + at) % of.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many examples of each answer, which is a token and its repetition.
    fn told(of: &[(&[u32], usize)], item: impl Fn(usize) -> Item) -> Vec<Told> {
        let answers = of.iter().flat_map(|&(answer, count)| vec![answer.to_vec(); count]);
        answers.enumerate().map(|(place, answer)| Told { item: item(place), answer }).collect()
    }

    fn new(of: &[(&[u32], usize)]) -> Vec<Told> {
        told(of, Item::Fresh)
    }

    fn old(of: &[(&[u32], usize)]) -> Vec<Told> {
        told(of, Item::Rehearsed)
    }

    use Item::{Fresh as F, Rehearsed as R};

    #[test]
    fn of_every_answer_equally_many_and_others_each_time() {
        // Two of each old answer in the mean.
        let (fresh, rehearsed) =
            (new(&[(&[1], 5), (&[2], 4), (&[3], 1)]), old(&[(&[7], 1), (&[8], 3), (&[9], 2)]));
        let of = |n| mixture(&fresh, &rehearsed, 3, n).expect("a review");
        assert_eq!(of(0), [F(0), F(1), F(5), F(6), F(9), R(0), R(1), R(2), R(4), R(5)]);
        assert_eq!(of(1), [F(2), F(3), F(7), F(8), F(9), R(0), R(3), R(1), R(4), R(5)]);
    }

    #[test]
    fn what_passes_have_evenly_is_not_reviewed() {
        let fresh = new(&[(&[1], 4), (&[2], 4)]);
        assert!(mixture(&fresh, &old(&[(&[7], 4), (&[8], 3)]), 8, 0).is_none(), "as many old as new");
        assert!(mixture(&fresh, &[], 8, 0).is_none(), "nothing old");
        assert!(mixture(&[], &old(&[(&[7], 4)]), 8, 0).is_none(), "nothing new");
        let facts: Vec<[u32; 1]> = (0..20).map(|n| [n]).collect();
        let facts: Vec<(&[u32], usize)> = facts.iter().map(|fact| (&fact[..], 1)).collect();
        assert!(mixture(&new(&facts[..10]), &old(&facts[10..]), 2, 0).is_none(), "every answer is its own");
    }

    #[test]
    fn what_counts_is_how_much_of_the_rehearsed_a_pass_takes() {
        let (fresh, rehearsed) = (new(&[(&[1], 4), (&[2], 4)]), old(&[(&[7], 8), (&[8], 8), (&[9], 8)]));
        assert!(mixture(&fresh, &rehearsed, 24, 0).is_none());
        // Eight at a time are less than three of each, and a review has room for three of each answer.
        let review = mixture(&fresh, &rehearsed, 6, 0).expect("a review");
        assert_eq!(review, [F(0), F(1), F(4), F(5), R(0), R(1), R(8), R(9), R(16), R(17)]);
    }

    #[test]
    fn a_review_is_no_longer_than_a_pass_and_takes_turns_through_the_answers() {
        let labels: Vec<[u32; 1]> = (10..30).map(|n| [n]).collect();
        let labels: Vec<(&[u32], usize)> = labels.iter().map(|label| (&label[..], 1)).collect();
        let (fresh, rehearsed) = (new(&[(&[1], 4)]), old(&labels));
        let of = |n| mixture(&fresh, &rehearsed, 3, n).expect("a review");
        assert_eq!(of(0), [F(0), R(0), R(1), R(2), R(3), R(4), R(5)]);
        assert_eq!(of(1), [R(6), R(7), R(8), R(9), R(10), R(11), R(12)]);
    }

    #[test]
    fn long_old_answers_are_not_taken_for_short_new_ones() {
        let (fresh, rehearsed) = (new(&[(&[1], 4)]), old(&[(&[7, 7, 7], 9), (&[8], 1)]));
        assert_eq!(mixture(&fresh, &rehearsed, 9, 0), Some(vec![F(0), R(9)]));
        assert!(mixture(&fresh, &rehearsed[..9], 9, 0).is_none());
    }
}
