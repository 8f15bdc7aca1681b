//! How alike a lineage's documents are to each other, and so how alike a prompt has to be to them.
//!
//! Each of a few documents is measured against all the others. A lineage of one kind of text expects much of
//! a prompt, a mixed one little, and nobody has to say which it is.

use super::bigrams::{Bigrams, Prior};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Documents that are measured, and tokens of each at most: more change little.
const DOCUMENTS_MAX: usize = 64;
const TOKENS_MAX: usize = 4096;
/// Pieces of a document, in tokens: for what is usual, and for the least that still belongs.
const WINDOW: usize = 32;
const WIDE_WINDOW: usize = 64;
/// Pieces of each length from a document at most, so that none speaks for all.
const WINDOWS_MAX: usize = 8;
/// Wide pieces without which nothing is said of the least, and which share of them may be under it.
const WIDE_WINDOWS_MIN: usize = 20;
const LEAST_QUANTILE: f64 = 0.05;
/// What is usual, at most: documents that nearly repeat each other do not ask the same of prompts.
const USUAL_MAX: f64 = 5.0;
/// Of what is usual, the part that a long prompt has to reach, and the part of that which is let off to one
/// of `SHORT` tokens; it falls with the root of the length, as the spread of a mean does.
const PART: f64 = 0.55;
const PART_LET_OFF: f64 = 0.25;
const SHORT: f64 = 8.0;
/// How much more a prompt as long as a wide piece may be asked for when all of those reach it.
const PART_MORE: f64 = 0.2;
/// What every prompt has to reach: common words alone give a little to every lineage.
const FLOOR: f64 = 0.8;
/// By how much a text that the base takes for one of the lineage's fits better than one that it might have said itself.
const KINSHIP_PART: f64 = 0.5;
/// The least distance from the threshold to what is usual.
const SPAN_MIN: f64 = 0.5;

/// Some of a lineage's documents: those with the smallest hashes, which are a sample that depends on no order.
#[derive(Debug, Default)]
pub struct Sample {
    documents: BTreeMap<u64, Sampled>,
}

#[derive(Debug)]
struct Sampled {
    tokens: Vec<u32>,
    /// Times that it was learned: all of them are left out when it is measured.
    times: u32,
}

impl Sample {
    /// Offers a document.
    pub fn add(&mut self, tokens: &[u32]) {
        let mut hasher = DefaultHasher::new();
        tokens.hash(&mut hasher);
        let hash = hasher.finish();
        if let Some(sampled) = self.documents.get_mut(&hash) {
            sampled.times += 1;
            return;
        }
        let full = self.documents.len() >= DOCUMENTS_MAX;
        if full && self.documents.last_key_value().is_some_and(|(&largest, _)| hash > largest) {
            return;
        }
        // What was in and is pushed out never comes back, so every count is whole.
        self.documents.insert(hash, Sampled { tokens: tokens.to_vec(), times: 1 });
        if full {
            self.documents.pop_last();
        }
    }
}

/// What the documents of a lineage score, in nats a token over the prior, when the others are known.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Fit {
    usual: f64,
    least: Option<f64>,
}

impl Fit {
    /// Measures each document of a sample with the model of all, itself left out.
    pub fn measure(model: &mut Bigrams, sample: &Sample, prior: &Prior) -> Self {
        let (mut pieces, mut wide) = (Vec::new(), Vec::new());
        for Sampled { tokens, times } in sample.documents.values() {
            let text = &tokens[..tokens.len().min(TOKENS_MAX)];
            let ratios: Vec<f64> =
                model.without(tokens, *times, |others| others.log_ratios(text, prior).collect());
            if ratios.len() < WINDOW && !ratios.is_empty() {
                pieces.push(mean(&ratios));
            }
            pieces.extend(windows(&ratios, WINDOW));
            wide.extend(windows(&ratios, WIDE_WINDOW));
        }
        let least = (wide.len() >= WIDE_WINDOWS_MIN).then(|| quantile(&mut wide, LEAST_QUANTILE)).flatten();
        Self { usual: quantile(&mut pieces, 0.5).unwrap_or(0.0).min(USUAL_MAX), least }
    }

    /// What the mean score of a text with this many tokens has to be.
    fn threshold(&self, tokens: usize) -> f64 {
        let part = PART - PART_LET_OFF * (SHORT / (tokens as f64).max(SHORT)).sqrt();
        let asked = part * self.usual;
        let least = self.least.filter(|_| tokens >= WIDE_WINDOW);
        let asked = least.map_or(asked, |least| least.min(asked + PART_MORE * self.usual).max(asked));
        asked.max(FLOOR)
    }

    /// How well a text fits that scores `mean`: 1 for what is usual and beyond, a half for what just fits, and
    /// down to 0. `strictness` multiplies the threshold. What the frozen base makes of the text, its `kinship` where that is known, adds to
    /// it or takes from it.
    pub fn degree(&self, mean: f64, tokens: usize, strictness: f64, kinship: Option<f64>) -> f64 {
        let threshold = strictness * self.threshold(tokens);
        let span = (self.usual - threshold).max(SPAN_MIN);
        let by_base = kinship.map_or(0.0, |kinship| KINSHIP_PART * (kinship.clamp(0.0, 1.0) - 0.5));
        (0.5 + 0.5 * (mean - threshold) / span + by_base).clamp(0.0, 1.0)
    }
}

/// The means of pieces of this length, spread evenly from the beginning to the end.
fn windows(ratios: &[f64], length: usize) -> impl Iterator<Item = f64> + '_ {
    let count = (ratios.len() / length).min(WINDOWS_MAX);
    (0..count).map(move |n| {
        let start = (ratios.len() - length) * n / (count - 1).max(1);
        mean(&ratios[start..start + length])
    })
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn quantile(values: &mut [f64], share: f64) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let place = (share * values.len() as f64) as usize;
    values.get(place.min(values.len().saturating_sub(1))).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fit(documents: &[Vec<u32>], times: usize) -> Fit {
        let (mut model, mut sample) = (Bigrams::default(), Sample::default());
        for document in documents.iter().cycle().take(documents.len() * times) {
            model.add(document, 1);
            sample.add(document);
        }
        Fit::measure(&mut model, &sample, &Prior::new(1000))
    }

    /// Documents that share the ids from 300 on, and each have an id of their own.
    fn alike(count: u32) -> Vec<Vec<u32>> {
        (0..count).map(|n| (300..340).chain([500 + n]).collect()).collect()
    }

    #[test]
    fn documents_that_are_alike_ask_more_than_documents_that_are_not() {
        let apart: Vec<Vec<u32>> = (0..8).map(|n| (300 + 40 * n..340 + 40 * n).collect()).collect();
        let (alike, apart) = (fit(&alike(8), 1), fit(&apart, 1));
        assert!(alike.threshold(32) > FLOOR, "{alike:?}");
        assert_eq!(apart.threshold(32), FLOOR, "{apart:?}");
    }

    #[test]
    fn what_is_learned_again_says_nothing_about_how_alike_documents_are() {
        let document: Vec<Vec<u32>> = vec![(300..340).collect()];
        assert!(fit(&document, 5).usual <= 0.0);
        let (once, thrice) = (fit(&alike(8), 1), fit(&alike(8), 3));
        assert!((once.usual - thrice.usual).abs() < 0.5, "{once:?} {thrice:?}");
    }

    #[test]
    fn a_sample_does_not_depend_on_the_order() {
        let mut documents = alike(200);
        documents.extend_from_within(..50);
        let of = |documents: &[Vec<u32>]| {
            let mut sample = Sample::default();
            documents.iter().for_each(|document| sample.add(document));
            sample.documents.iter().map(|(&hash, sampled)| (hash, sampled.times)).collect::<Vec<_>>()
        };
        let forwards = of(&documents);
        documents.reverse();
        assert_eq!(forwards, of(&documents));
        assert_eq!(forwards.len(), DOCUMENTS_MAX);
        assert!(forwards.iter().any(|&(_, times)| times == 2));
    }

    #[test]
    fn a_short_text_is_asked_less_and_strictness_asks_more() {
        let fit = Fit { usual: 4.0, least: Some(3.0) };
        assert!(fit.threshold(8) < fit.threshold(32) && fit.threshold(32) < fit.threshold(64));
        let at = |strictness| fit.degree(2.0, 32, strictness, None);
        assert!(at(0.5) > at(1.0) && at(1.0) > at(1.5));
        assert_eq!((fit.degree(9.0, 32, 1.0, None), fit.degree(-9.0, 32, 1.0, None)), (1.0, 0.0));
    }

    #[test]
    fn an_empty_lineage_has_a_threshold_too() {
        assert_eq!(fit(&[], 1), Fit::default());
        assert_eq!(Fit::default().threshold(100), FLOOR);
        assert_eq!(fit(&[Vec::new()], 1), Fit::default());
    }
}
