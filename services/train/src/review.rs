//! A review at the end of a batch: old answers and new ones, each as often as the others.
//!
//! Where few examples are kept of each old answer, a pass has many of each new one beside them, and the batch ends with
//! an adapter that says new answers where old ones belong. A few passes over an even mixture at a low rate set that
//! right, as the balanced fine-tuning of Castro et al. (arXiv 1807.09536) does for classifiers.

use std::collections::{BTreeMap, BTreeSet};

/// What an example answers, as tokens; empty where it is text.
pub type Answer = Vec<u32>;

/// Fresh examples to one of an even mixture from which on the mixture is worth passes of its own.
const UNEVEN: usize = 2;

/// The fresh examples of review number `n`, ascending: of each answer as many as are rehearsed of an answer in the mean,
/// others each time. None where a pass was even enough without: nothing is rehearsed, or about as many of an answer as are new.
///
/// Texts have no part in it: they are not told from each other.
pub fn even(fresh: &[Answer], rehearsed: &[Answer], n: u32) -> Option<Vec<usize>> {
    let kept = || rehearsed.iter().filter(|answer| !answer.is_empty());
    let each = kept().count().div_ceil(kept().collect::<BTreeSet<_>>().len().max(1));
    let mut by_answer: BTreeMap<&Answer, Vec<usize>> = BTreeMap::new();
    for (place, answer) in fresh.iter().enumerate().filter(|(_, answer)| !answer.is_empty()) {
        by_answer.entry(answer).or_default().push(place);
    }
    let of_one = |places: &Vec<usize>| {
        let from = n as usize * each;
        let count = each.min(places.len());
        (from..from + count).map(|at| places[at % places.len()]).collect::<Vec<_>>()
    };
    let mut chosen: Vec<usize> = by_answer.values().flat_map(of_one).collect();
    let answers: usize = by_answer.values().map(Vec::len).sum();
    chosen.sort_unstable();
    (!chosen.is_empty() && answers >= UNEVEN * chosen.len()).then_some(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(of: &[(u32, usize)]) -> Vec<Answer> {
        of.iter().flat_map(|&(answer, count)| vec![vec![answer]; count]).collect()
    }

    #[test]
    fn as_many_of_a_new_answer_as_of_an_old_one_and_others_each_time() {
        // Three old answers, two of each in the mean; two new ones, and one of which there is a single example.
        let (fresh, rehearsed) = (answers(&[(1, 5), (2, 4), (3, 1)]), answers(&[(7, 1), (8, 3), (9, 2)]));
        assert_eq!(even(&fresh, &rehearsed, 0), Some(vec![0, 1, 5, 6, 9]));
        assert_eq!(even(&fresh, &rehearsed, 1), Some(vec![2, 3, 7, 8, 9]));
        assert_eq!(even(&fresh, &rehearsed, 2), Some(vec![0, 4, 5, 6, 9]));
    }

    #[test]
    fn what_is_even_already_is_not_reviewed() {
        let fresh = answers(&[(1, 4), (2, 4)]);
        assert_eq!(even(&fresh, &answers(&[(7, 4), (8, 3)]), 0), None, "as many old as new");
        assert_eq!(even(&fresh, &[], 0), None, "nothing old");
        assert!(even(&fresh, &answers(&[(7, 2), (8, 2)]), 0).is_some());
        let facts: Vec<Answer> = (0..20).map(|n| vec![n]).collect();
        assert_eq!(even(&facts[..10], &facts[10..], 0), None, "every answer is its own");
    }

    #[test]
    fn texts_have_no_part_in_it() {
        let text = Answer::new();
        let fresh = [answers(&[(1, 4)]), vec![text.clone(); 9]].concat();
        assert_eq!(even(&fresh, &vec![text.clone(); 9], 0), None);
        let rehearsed = [vec![text; 9], answers(&[(7, 1)])].concat();
        assert_eq!(even(&fresh, &rehearsed, 0), Some(vec![0]));
    }
}
