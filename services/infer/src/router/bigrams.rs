//! How much likelier a text is among a lineage's documents than anywhere.

use std::collections::HashMap;

/// Ids before a byte-level vocabulary's first merge: a control token, and every byte.
const UNMERGED: usize = 257;
/// How common those are, where the token of rank `r` is as common as `1 / (RANK_OFFSET + r)`: as those of
/// rank 780, for most bytes are rare where words have tokens of their own.
const UNMERGED_FREQUENCY: f64 = 1.0 / 800.0;
/// Makes the most common tokens less so than Zipf's law has them (Mandelbrot 1953).
const RANK_OFFSET: f64 = 20.0;

/// How likely each token is in text of any kind. The merges of a BPE are numbered in the order of their
/// frequency, so that an id is the rank that Zipf's law asks for: it needs no text to be counted in.
pub struct Prior {
    probabilities: Vec<f64>,
}

impl Prior {
    /// That of a vocabulary.
    pub fn new(largest_id: u32) -> Self {
        let frequency = |id: usize| {
            if id < UNMERGED { UNMERGED_FREQUENCY } else { 1.0 / (RANK_OFFSET + id as f64) }
        };
        let mut probabilities: Vec<f64> = (0..=largest_id as usize).map(frequency).collect();
        let total: f64 = probabilities.iter().sum();
        probabilities.iter_mut().for_each(|p| *p /= total);
        Self { probabilities }
    }

    fn of(&self, id: u32) -> f64 {
        self.probabilities.get(id as usize).copied().unwrap_or(f64::MIN_POSITIVE)
    }
}

/// What is counted of a token.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Token {
    count: u64,
    /// Times that another follows it, and how many kinds of others do.
    followed: u64,
    followers: u64,
}

/// A model of the tokens of documents, each from the one before it.
#[derive(Debug, Default)]
pub struct Bigrams {
    tokens: Vec<Token>,
    pairs: HashMap<(u32, u32), u32>,
    total: u64,
    /// Kinds of tokens.
    kinds: u64,
}

impl Bigrams {
    /// Counts a document.
    pub fn add(&mut self, document: &[u32], times: u32) {
        if let Some(&largest) = document.iter().max() {
            let length = self.tokens.len().max(largest as usize + 1);
            self.tokens.resize(length, Token::default());
        }
        for &id in document {
            let token = &mut self.tokens[id as usize];
            self.kinds += u64::from(token.count == 0);
            token.count += u64::from(times);
        }
        self.total += document.len() as u64 * u64::from(times);
        for pair in document.windows(2) {
            let count = self.pairs.entry((pair[0], pair[1])).or_default();
            let token = &mut self.tokens[pair[0] as usize];
            token.followers += u64::from(*count == 0);
            token.followed += u64::from(times);
            *count += times;
        }
    }

    /// What `measure` makes of the model without a document that was added `times` times.
    pub fn without<R>(&mut self, document: &[u32], times: u32, measure: impl FnOnce(&Self) -> R) -> R {
        self.take(document, times);
        let measured = measure(self);
        self.add(document, times);
        measured
    }

    /// Undoes `add`. Pairs that are gone stay with a count of 0, for they are about to come back.
    fn take(&mut self, document: &[u32], times: u32) {
        for &id in document {
            let token = &mut self.tokens[id as usize];
            token.count -= u64::from(times);
            self.kinds -= u64::from(token.count == 0);
        }
        self.total -= document.len() as u64 * u64::from(times);
        for pair in document.windows(2) {
            let count = self.pairs.entry((pair[0], pair[1])).or_default();
            *count -= times;
            let token = &mut self.tokens[pair[0] as usize];
            token.followers -= u64::from(*count == 0);
            token.followed -= u64::from(times);
        }
    }

    /// For each token of a text, the logarithm of its probability here over that in any text.
    ///
    /// What was never seen takes its part as method C of Witten and Bell has it ("The zero-frequency
    /// problem", IEEE Transactions on Information Theory 37, 1991): after a token that `n` others of `k`
    /// kinds followed, `k / (n + k)` is left to the probability without regard to that token, and of all
    /// tokens alike to the prior.
    pub fn log_ratios<'a>(&'a self, text: &'a [u32], prior: &'a Prior) -> impl Iterator<Item = f64> + 'a {
        let mut before = None;
        text.iter().map(move |&id| {
            let usual = prior.of(id);
            let count = self.tokens.get(id as usize).map_or(0, |token| token.count);
            // Nothing learned is the prior.
            let kinds = self.kinds.max(1);
            let mut probability = mixed(count, self.total, kinds, usual);
            if let Some(last) = before.replace(id)
                && let Some(token) = self.tokens.get(last as usize).filter(|token| token.followed > 0)
            {
                let count = self.pairs.get(&(last, id)).copied().unwrap_or(0);
                probability = mixed(u64::from(count), token.followed, token.followers, probability);
            }
            (probability / usual).ln()
        })
    }
}

/// The share of a count in a total, with what `kinds` leave to a simpler estimate.
fn mixed(count: u64, total: u64, kinds: u64, simpler: f64) -> f64 {
    (count as f64 + kinds as f64 * simpler) / (total + kinds) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mean(model: &Bigrams, text: &[u32]) -> f64 {
        model.log_ratios(text, &Prior::new(400)).sum::<f64>() / text.len() as f64
    }

    #[test]
    fn probabilities_sum_to_one_whatever_came_before() {
        let prior = Prior::new(400);
        let mut model = Bigrams::default();
        model.add(&[300, 301, 300, 302], 2);
        for before in [300, 302, 17] {
            let ratio = |id: u32| model.log_ratios(&[before, id], &prior).nth(1).expect("two").exp();
            let total: f64 = (0..=400).map(|id| ratio(id) * prior.of(id)).sum();
            assert!((total - 1.0).abs() < 1e-9, "{before}: {total}");
        }
    }

    #[test]
    fn what_was_learned_is_likelier_and_nothing_learned_says_nothing() {
        let mut model = Bigrams::default();
        assert_eq!(mean(&model, &[300, 301]), 0.0);
        model.add(&[300, 301, 302], 1);
        assert!(mean(&model, &[300, 301]) > 1.0);
        assert!(mean(&model, &[310, 311]) < 0.0);
    }

    #[test]
    fn a_document_left_out_is_as_if_it_was_never_there_and_comes_back() {
        let (one, other) = ([300, 301, 302, 300], [300, 303, 301, 301]);
        let (mut alone, mut both) = (Bigrams::default(), Bigrams::default());
        alone.add(&one, 1);
        both.add(&one, 1);
        both.add(&other, 3);
        let before = mean(&both, &other);
        assert_eq!(both.without(&other, 3, |model| mean(model, &other)), mean(&alone, &other));
        assert_eq!(mean(&both, &other), before);
    }
}
