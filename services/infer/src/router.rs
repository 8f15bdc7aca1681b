//! Chooses adapters from the content of a prompt.
//!
//! Two questions, because the best of several may still be wrong. Is the prompt of the kind that a lineage
//! learned? A model of its tokens says (`bigrams`), against what its own documents say of each other (`fit`).
//! And of those it fits, whose is it? Its words say. What was learned word for word goes home without either.
//!
//! All that is kept of a lineage are counts and a sample by hash: they add up in any order, so routing itself
//! cannot forget, and they are a pure function of ledger and manifest, so they are rebuilt rather than stored.
//! Where lineages' prompts are counted by what the base makes of them, that says too whether one fits
//! ([`model::ridge::Head::kinship`]) and whose it is ([`model::ridge::Whose`]): words that were never seen tell a prompt from a
//! foreign one no more.

mod bigrams;
mod fit;

use bigrams::{Bigrams, Prior};
use fit::{Fit, Sample};
use model::tokenizer::Tokenizer;
use proto::Domain;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

/// What is taken from the count of every feature, for those that were not seen.
const DISCOUNT: f64 = 0.75;
/// How much the model of tokens has to say about whose a prompt is, beside the words.
const MODEL_PART: f64 = 1.0 / 8.0;
/// The degree from which a prompt fits.
const FITS: f64 = 0.5;
/// The least that a lineage's share of a prompt is taken for.
const SHARE_MIN: f64 = 1e-9;
/// The least weight in a sum, as a share of the largest.
const WEIGHT_MIN: f32 = 0.01;

/// Knows what each lineage's documents are made of.
pub struct Router {
    tokenizer: Arc<Tokenizer>,
    prior: Prior,
    strictness: f64,
    profiles: BTreeMap<Domain, Profile>,
}

/// How unlikely it is at least that a prompt which is just like a fact's is of another lineage.
const RECALL_DOUBT: f64 = 1e-3;

/// What the frozen base makes of a prompt, for the lineages that count prompts.
#[derive(Debug, Clone, Default)]
pub struct ByBase {
    /// How much it is of the kind of a lineage's: see [`model::ridge::Head::kinship`].
    pub kinship: BTreeMap<Domain, f64>,
    /// How likely it is that of a fact of theirs: see [`model::ridge::Head::recalls`].
    pub recalled: BTreeMap<Domain, f64>,
    /// How likely it is of each of those that are told apart: see [`model::ridge::Whose::shares`].
    pub shares: BTreeMap<Domain, f64>,
}

/// Where a prompt belongs.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    /// The lineages that it fits, the likeliest first; none is for the base to answer.
    pub fitting: Vec<Route>,
    /// How sure the first of them is, 0 to 1: how well the prompt fits it, times how much likelier it is than
    /// the others. Of a prompt that fits none: of the likeliest one, and less than a half.
    pub confidence: f32,
}

/// A lineage that a prompt fits.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// The lineage.
    pub lineage: Domain,
    /// How likely the prompt is of this one of those that it fits; they sum to 1.
    pub weight: f32,
}

impl Routing {
    /// The first `top` of the fitting lineages, with weights that sum to 1. Those that would hardly be heard
    /// are left out, for an adapter costs the same with any weight.
    pub fn top(&self, top: usize) -> Vec<(Domain, f32)> {
        let least = self.fitting.first().map_or(0.0, |first| WEIGHT_MIN * first.weight);
        let chosen = self.fitting.iter().take(top).filter(|route| route.weight >= least);
        let total: f32 = chosen.clone().map(|route| route.weight).sum();
        chosen.map(|route| (route.lineage.clone(), route.weight / total)).collect()
    }
}

/// What a lineage's documents are made of.
#[derive(Default)]
struct Profile {
    words: HashMap<u64, u32>,
    words_total: u64,
    /// Whole documents and prompts, by their words.
    seen: HashSet<u64>,
    model: Bigrams,
    sample: Sample,
    fit: Option<Fit>,
}

impl Profile {
    /// The share of a feature in the lineage's text, which was seen `count` times here and has the share
    /// `everywhere` in that of all: absolute discounting, as in H. Ney, U. Essen and R. Kneser, "On structuring
    /// probabilistic dependences in stochastic language modelling" (Computer Speech and Language 8, 1994).
    fn share(&self, count: u32, everywhere: f64) -> f64 {
        if self.words_total == 0 {
            return everywhere;
        }
        let left = DISCOUNT * self.words.len() as f64 * everywhere;
        ((f64::from(count) - DISCOUNT).max(0.0) + left) / self.words_total as f64
    }
}

/// What is looked at of one lineage for one prompt.
struct Candidate<'a> {
    lineage: &'a Domain,
    /// Logarithm of how likely the prompt is of this lineage, up to a summand that all have in common.
    score: f64,
    degree: f64,
    fits: bool,
}

impl Router {
    /// A router that knows no lineage yet. `strictness` multiplies the thresholds that prompts have to reach;
    /// with 0 everything fits.
    pub fn new(tokenizer: Arc<Tokenizer>, strictness: f32) -> Self {
        let prior = Prior::new(tokenizer.largest_id());
        Self { tokenizer, prior, strictness: f64::from(strictness), profiles: BTreeMap::new() }
    }

    /// Adds a document to a lineage's profile, with the prompts in it that may be asked again by themselves.
    ///
    /// # Errors
    /// When it cannot be encoded; nothing is added then.
    pub fn add<'a>(
        &mut self,
        lineage: &Domain,
        text: &str,
        prompts: impl IntoIterator<Item = &'a str>,
    ) -> anyhow::Result<()> {
        let tokens = self.tokens(text)?;
        let profile = self.profiles.entry(lineage.clone()).or_default();
        let words = words(text);
        profile.seen.extend(key(&words));
        profile.seen.extend(prompts.into_iter().filter_map(|prompt| key(&self::words(prompt))));
        for feature in features(&words) {
            *profile.words.entry(feature).or_default() += 1;
            profile.words_total += 1;
        }
        profile.model.add(&tokens, 1);
        profile.sample.add(&tokens);
        profile.fit = None;
        Ok(())
    }

    /// Forgets a lineage's profile.
    pub fn remove(&mut self, lineage: &Domain) {
        self.profiles.remove(lineage);
    }

    /// Forgets all profiles.
    pub fn clear(&mut self) {
        self.profiles.clear();
    }

    /// Measures what lineages that learned something expect of a prompt, so that no prompt has to wait for
    /// it. To be called before the next `route`: a lineage that was not measured expects the least there is.
    pub fn calibrate(&mut self) {
        for profile in self.profiles.values_mut().filter(|profile| profile.fit.is_none()) {
            profile.fit = Some(Fit::measure(&mut profile.model, &profile.sample, &self.prior));
        }
    }

    /// Where a prompt belongs; none without any lineage, or for nothing but white space.
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn route(&self, prompt: &str, by_base: &ByBase) -> anyhow::Result<Option<Routing>> {
        if self.profiles.is_empty() || prompt.trim().is_empty() {
            return Ok(None);
        }
        let (tokens, words) = (self.tokens(prompt)?, words(prompt));
        let key = key(&words);
        let ratio = |profile: &Profile| profile.model.log_ratios(&tokens, &self.prior).sum::<f64>();
        let ratios: Vec<f64> = self.profiles.values().map(ratio).collect();
        let mut scores = self.scores(&words, &ratios);
        self.tell_apart(&mut scores, &by_base.shares);
        // Once one has learned it word for word, only such come into question.
        let at_home = |profile: &Profile| key.is_some_and(|key| profile.seen.contains(&key));
        let known = self.profiles.values().any(at_home);
        let mut candidates = Vec::new();
        for (((lineage, profile), ratio), score) in self.profiles.iter().zip(ratios).zip(scores) {
            if known && !at_home(profile) {
                continue;
            }
            let mean = ratio / tokens.len().max(1) as f64;
            let (fit, kinship) = (profile.fit.unwrap_or_default(), by_base.kinship.get(lineage).copied());
            let degree = fit.degree(mean, tokens.len(), self.strictness, kinship);
            // What it was told is its own, in whatever words it is asked.
            let recalled = by_base.recalled.get(lineage).copied().unwrap_or(0.0);
            let degree = if known { 1.0 } else { degree.max(recalled) };
            let score = score - (1.0 - recalled).max(RECALL_DOUBT).ln();
            let fits = degree >= FITS || self.strictness == 0.0;
            candidates.push(Candidate { lineage, score, degree, fits });
        }
        Ok(Some(routing(candidates)))
    }

    /// How likely the prompt is of each lineage: the logarithm, up to a summand that all have in common.
    ///
    /// Each feature says whose it is likely to be, and counts by how much it says: words that all lineages
    /// share, and those that none has, count nothing.
    fn scores(&self, words: &[u64], ratios: &[f64]) -> Vec<f64> {
        let mut scores: Vec<f64> = ratios.iter().map(|ratio| MODEL_PART * ratio).collect();
        if self.profiles.len() < 2 {
            return scores;
        }
        let total: u64 = self.profiles.values().map(|profile| profile.words_total).sum();
        let entropy_max = (self.profiles.len() as f64).ln();
        // In one order, so that sums are the same each time.
        let mut features: Vec<u64> = features(words).collect();
        features.sort_unstable();
        features.dedup();
        let (mut counts, mut shares) = (Vec::new(), Vec::new());
        for feature in features {
            counts.clear();
            counts.extend(self.profiles.values().map(|p| p.words.get(&feature).copied().unwrap_or(0)));
            let everywhere: u64 = counts.iter().map(|&count| u64::from(count)).sum();
            if everywhere == 0 {
                continue;
            }
            let everywhere = everywhere as f64 / total as f64;
            shares.clear();
            shares.extend(self.profiles.values().zip(&counts).map(|(p, &count)| p.share(count, everywhere)));
            let sum: f64 = shares.iter().sum();
            shares.iter_mut().for_each(|share| *share /= sum);
            let entropy: f64 = shares.iter().map(|share| -share * share.ln()).sum();
            let information = 1.0 - entropy / entropy_max;
            for (score, share) in scores.iter_mut().zip(&shares) {
                *score += information * share.ln();
            }
        }
        scores
    }

    /// Adds to the scores of those that are told apart how likely the prompt is of each. Together they remain as likely, beside the
    /// others, as their words say.
    fn tell_apart(&self, scores: &mut [f64], shares: &BTreeMap<Domain, f64>) {
        let of = |lineage: &Domain| shares.get(lineage).map(|share| share.max(SHARE_MIN).ln());
        let told: Vec<Option<f64>> = self.profiles.keys().map(of).collect();
        let sum = |scores: &[f64]| {
            let own = || scores.iter().zip(&told).filter(|(_, told)| told.is_some()).map(|(score, _)| *score);
            let most = own().fold(f64::NEG_INFINITY, f64::max);
            most + own().map(|score| (score - most).exp()).sum::<f64>().ln()
        };
        let before = sum(scores);
        scores.iter_mut().zip(&told).for_each(|(score, told)| *score += told.unwrap_or(0.0));
        let risen = sum(scores) - before;
        scores
            .iter_mut()
            .zip(&told)
            .filter(|(_, told)| told.is_some())
            .for_each(|(score, _)| *score -= risen);
    }

    /// The tokens of a text without regard to case, as if it followed a word.
    fn tokens(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        self.tokenizer.encode_continuation(&format!(" {}", text.to_lowercase()))
    }
}

/// Sorts out those that fit, and says how sure that is.
fn routing(mut candidates: Vec<Candidate<'_>>) -> Routing {
    candidates.sort_by(|a, b| b.score.total_cmp(&a.score));
    let sum = |of: &[&Candidate<'_>], best: f64| of.iter().map(|c| (c.score - best).exp()).sum::<f64>();
    let all: Vec<_> = candidates.iter().collect();
    let fitting: Vec<_> = candidates.iter().filter(|candidate| candidate.fits).collect();
    let Some((first, likeliest)) = fitting.first().or(all.first()).zip(all.first()) else {
        return Routing { fitting: Vec::new(), confidence: 0.0 };
    };
    let share = (first.score - likeliest.score).exp() / sum(&all, likeliest.score);
    let total = sum(&fitting, first.score);
    let route = |candidate: &&Candidate<'_>| Route {
        lineage: candidate.lineage.clone(),
        weight: ((candidate.score - first.score).exp() / total) as f32,
    };
    Routing { fitting: fitting.iter().map(route).collect(), confidence: (first.degree * share) as f32 }
}

/// The words of a text in lower case, hashed.
fn words(text: &str) -> Vec<u64> {
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.map(|word| hash(&word.to_lowercase())).collect()
}

/// What a text is recognised by: its words in their order; none without any.
fn key(words: &[u64]) -> Option<u64> {
    (!words.is_empty()).then(|| hash(words))
}

/// Each word, and each pair of neighbours.
fn features(words: &[u64]) -> impl Iterator<Item = u64> + '_ {
    words.iter().copied().chain(words.windows(2).map(hash))
}

fn hash<T: Hash + ?Sized>(value: &T) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests;
