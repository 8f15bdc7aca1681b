//! Which token comes next: what a request asks of the choice, and the choice.
//!
//! First what is expected of the answer joins what the model says. Then the steps, in vLLM's order: logit bias, repetition penalty, frequency and presence penalty, all on the
//! model's logits; tokens that a grammar does not allow are ruled out. Here log-probabilities are taken. Then temperature, top-k and min-p, top-p over what these
//! two left, and a draw. A request draws from a stream of random numbers that is its own, so its text depends
//! on nothing that runs beside it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, ensure};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::cpu::vector::{self, Level};
use crate::grammar::Grammar;
use crate::ridge::{Prior, Source};

/// Stop texts that one request may have.
const STOPS_MAX: usize = 16;

/// Alternatives that are told for a token at most, as at OpenAI.
const TOP_LOGPROBS_MAX: usize = 20;

/// Tokens with no more mass than this are not drawn: what is ruled out has the least that the exponential gives, not 0.
const MASS_MIN: f32 = 2e-38;

/// How tokens are chosen, and when to end.
#[derive(Clone, Debug)]
pub struct Sampling {
    /// T: the probabilities are `softmax(logits / T)`. 0 takes the most likely token; 1 samples from the model's
    /// own distribution.
    pub temperature: f64,
    /// Only the k most likely tokens; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability; 1 for all.
    pub top_p: f64,
    /// Only tokens with a probability of at least `min_p * max(p)`; 0 for all. Nguyen et al. 2024,
    /// arXiv:2407.01082.
    pub min_p: f64,
    /// r, once for every token that occurs in prompt or answer: `logit / r` where the logit is above 0, else
    /// `logit * r`; 1 for none. Keskar et al. 2019 (CTRL), arXiv:1909.05858, in the form of transformers.
    pub repetition_penalty: f64,
    /// `logit - presence_penalty` for every token that occurs in the answer; 0 for none. As at OpenAI.
    pub presence_penalty: f64,
    /// `logit - frequency_penalty * count`, with how often the token occurs in the answer; 0 for none. As at
    /// OpenAI.
    pub frequency_penalty: f64,
    /// `logit + bias` by token id, from -100 (which bans it, for all purposes) to 100 (which forces it). As at
    /// OpenAI.
    pub logit_bias: BTreeMap<u32, f64>,
    /// Tell each token's log-probability, and that of this many of the most likely ones: natural logarithms of
    /// `softmax(logits)` with bias and penalties over what the grammar allows, before temperature and truncation.
    pub logprobs: Option<usize>,
    /// Equal seeds give equal texts, on one machine and thread count.
    pub seed: u64,
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Ids that end the answer beside the tokenizer's own, such as a chat template's end of turn.
    pub stop_ids: Vec<u32>,
    /// What the answer follows; it ends where the grammar does.
    pub grammar: Option<Grammar>,
    /// What is expected of the answer beside what the model says.
    pub prior: Prior,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            logprobs: None,
            seed: 0,
            max_tokens: 256,
            stop: Vec::new(),
            stop_ids: Vec::new(),
            grammar: None,
            prior: Prior::default(),
        }
    }
}

impl Sampling {
    /// Refuses what no request could mean.
    ///
    /// # Errors
    /// The message names the parameter.
    pub fn check(&self) -> Result<()> {
        let penalty = |x: f64| (-2.0..=2.0).contains(&x);
        ensure!((0.0..=100.0).contains(&self.temperature), "temperature has to be from 0 to 100");
        ensure!(self.top_p > 0.0 && self.top_p <= 1.0, "top_p has to be above 0 and at most 1");
        ensure!((0.0..=1.0).contains(&self.min_p), "min_p has to be from 0 to 1");
        // Far beyond these bounds logits would no longer be finite.
        ensure!(
            (0.1..=10.0).contains(&self.repetition_penalty),
            "repetition_penalty has to be from 0.1 to 10"
        );
        ensure!(penalty(self.presence_penalty), "presence_penalty has to be from -2 to 2");
        ensure!(penalty(self.frequency_penalty), "frequency_penalty has to be from -2 to 2");
        ensure!(
            self.logit_bias.values().all(|bias| (-100.0..=100.0).contains(bias)),
            "logit_bias has to be from -100 to 100"
        );
        ensure!(
            self.logprobs.is_none_or(|top| top <= TOP_LOGPROBS_MAX),
            "logprobs: at most {TOP_LOGPROBS_MAX} alternatives"
        );
        ensure!(self.max_tokens > 0, "max_tokens has to be at least 1");
        ensure!(self.stop.len() <= STOPS_MAX, "stop: at most {STOPS_MAX} texts");
        ensure!(self.stop.iter().all(|stop| !stop.is_empty()), "stop: an empty text would stop at once");
        Ok(())
    }
}

/// A token that could have been chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TopLogprob {
    /// Its id.
    pub id: u32,
    /// Its log-probability, as [`Sampling::logprobs`] says.
    pub logprob: f32,
}

/// The token that was chosen.
pub(crate) struct Chosen {
    pub id: u32,
    /// Where asked for: its log-probability, and the most likely tokens, the likeliest first.
    pub logprobs: Option<(f32, Vec<TopLogprob>)>,
    /// Whether the grammar has nothing after it.
    pub last: bool,
}

/// Chooses the tokens of one answer, and remembers what they need to be chosen by.
pub(crate) struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
    /// Ids in prompt and answer.
    seen: BTreeSet<u32>,
    /// Ids in the answer, with how often.
    counts: BTreeMap<u32, u32>,
}

impl Sampler {
    /// A sampler for the answer to `prompt`.
    pub fn new(sampling: Sampling, prompt: &[u32]) -> Self {
        let random = ChaCha8Rng::seed_from_u64(sampling.seed);
        Self { sampling, random, seen: prompt.iter().copied().collect(), counts: BTreeMap::new() }
    }

    /// Documents that the answer is from, so far.
    pub fn sources(&self) -> Vec<Source> {
        self.sampling.prior.sources()
    }

    /// Chooses the next token by the model's logits, [vocab_size], which have to hold every id in prompt and
    /// logit bias.
    ///
    /// # Errors
    /// When the logits are not finite, or the grammar cannot go on.
    pub fn choose(&mut self, mut logits: Vec<f32>) -> Result<Chosen> {
        let expects = self.sampling.prior.speaks();
        if expects {
            self.sampling.prior.mix(&mut logits);
        }
        self.adjust(&mut logits);
        if let Some(grammar) = &mut self.sampling.grammar {
            grammar.narrow(&mut logits)?;
        }
        let best = largest(&logits)?;
        let id = if self.sampling.temperature == 0.0 {
            logits.iter().position(|&x| x == best).unwrap_or(0) as u32
        } else {
            self.sample(&logits, best)
        };
        if expects {
            self.sampling.prior.accept(id);
        }
        self.seen.insert(id);
        *self.counts.entry(id).or_default() += 1;
        let logprobs = self.sampling.logprobs.map(|top| logprobs(&logits, best, id, top));
        let last = match &mut self.sampling.grammar {
            Some(grammar) => grammar.accept(id)?,
            None => false,
        };
        Ok(Chosen { id, logprobs, last })
    }

    /// Adds bias and penalties to logits.
    fn adjust(&self, logits: &mut [f32]) {
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.sampling;
        for (&id, &bias) in &self.sampling.logit_bias {
            logits[id as usize] += bias as f32;
        }
        if repetition_penalty != 1.0 {
            let penalty = repetition_penalty as f32;
            for &id in &self.seen {
                let logit = &mut logits[id as usize];
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
        for (&id, &count) in &self.counts {
            logits[id as usize] -= (frequency_penalty * f64::from(count) + presence_penalty) as f32;
        }
    }

    /// Draws from what temperature and truncation make of logits whose largest is `best`.
    fn sample(&mut self, logits: &[f32], best: f32) -> u32 {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        // Those with as much as this are looked at; the most likely token's mass is 1.
        let (mut masses, mut least) = (vec![0.0; logits.len()], MASS_MIN.max(min_p as f32));
        // Beyond that a colder draw is no other draw, and its numbers would leave f32.
        vector::masses(Level::best(), logits, best, temperature.max(1e-6) as f32, &mut masses);
        if top_k == 0 && top_p < 1.0 {
            // All that have less are together less than what top-p leaves out.
            let all = masses.iter().filter(|&&mass| mass >= least).map(|&mass| f64::from(mass)).sum::<f64>();
            let few = ((1.0 - top_p) * all / masses.len() as f64) as f32;
            if few > least {
                least = few;
            }
            return self.draw_from(tokens(&masses, least), Some(top_p * all));
        }
        let mut tokens = tokens(&masses, least);
        if top_k > 0 && top_k < tokens.len() {
            tokens.select_nth_unstable_by(top_k - 1, by_likelihood);
            tokens.truncate(top_k);
            tokens.sort_unstable_by(by_likelihood);
        }
        let enough = (top_p < 1.0).then(|| top_p * tokens.iter().map(|t| f64::from(t.0)).sum::<f64>());
        self.draw_from(tokens, enough)
    }

    /// Draws from the most likely tokens that together have `enough` mass, or from all.
    fn draw_from(&mut self, mut tokens: Vec<(f32, u32)>, enough: Option<f64>) -> u32 {
        if let Some(enough) = enough {
            keep_nucleus(&mut tokens, enough);
        }
        let masses: Vec<f64> = tokens.iter().map(|t| f64::from(t.0)).collect();
        tokens[draw(&masses, &mut self.random)].1
    }
}

/// Tokens of at least this mass.
fn tokens(masses: &[f32], least: f32) -> Vec<(f32, u32)> {
    masses.iter().copied().zip(0..).filter(|token| token.0 >= least).collect()
}

/// The largest logit.
///
/// # Errors
/// When one is not a number, or none is finite.
fn largest(logits: &[f32]) -> Result<f32> {
    // Side by side, since the compiler does not reorder comparisons; and marks as wide as numbers, which go with them.
    let (mut largest, mut odd) = ([f32::NEG_INFINITY; 16], [0u32; 16]);
    let (chunks, rest) = logits.as_chunks::<16>();
    let mut see = |numbers: &[f32]| {
        for ((largest, odd), x) in largest.iter_mut().zip(&mut odd).zip(numbers) {
            *largest = if *x > *largest { *x } else { *largest };
            *odd |= u32::from(x.is_nan());
        }
    };
    chunks.iter().for_each(|chunk| see(chunk));
    see(rest);
    ensure!(odd == [0; 16], "the model's output is not a number: its weights are damaged");
    let largest = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    ensure!(largest.is_finite(), "the model's output is not finite: its weights are damaged");
    Ok(largest)
}

/// The most likely first. Equal ones are ordered by id, so that equal seeds give equal texts.
fn by_likelihood(x: &(f32, u32), y: &(f32, u32)) -> std::cmp::Ordering {
    y.0.total_cmp(&x.0).then(x.1.cmp(&y.1))
}

/// Sorting a whole vocabulary for top-p is slow, and its mass is nearly always in this many tokens.
const LIKELY: usize = 1024;

/// Keeps the most likely tokens that together have `enough` mass, one at least.
fn keep_nucleus(tokens: &mut Vec<(f32, u32)>, enough: f64) {
    let sorted = LIKELY.min(tokens.len());
    if sorted < tokens.len() {
        tokens.select_nth_unstable_by(sorted, by_likelihood);
    }
    tokens[..sorted].sort_unstable_by(by_likelihood);
    if tokens[..sorted].iter().map(|t| f64::from(t.0)).sum::<f64>() < enough {
        tokens.sort_unstable_by(by_likelihood);
    }
    let mut sum = 0.0;
    let kept = tokens.iter().take_while(|t| {
        let before = sum;
        sum += f64::from(t.0);
        before < enough
    });
    let kept = kept.count().max(1);
    tokens.truncate(kept);
}

/// The log-probability of `id`, and the `top` most likely ones, by logits whose largest is `best`.
fn logprobs(logits: &[f32], best: f32, id: u32, top: usize) -> (f32, Vec<TopLogprob>) {
    let mut masses = vec![0.0; logits.len()];
    vector::masses(Level::best(), logits, best, 1.0, &mut masses);
    let (chunks, rest) = masses.as_chunks::<8>();
    let mut sums = [0f64; 8];
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, mass)| *sum += f64::from(*mass));
    }
    let sum = sums.iter().sum::<f64>() + rest.iter().map(|&mass| f64::from(mass)).sum::<f64>();
    let logprob = |x: f32| (f64::from(x - best) - sum.ln()) as f32;
    if top == 0 {
        return (logprob(logits[id as usize]), Vec::new());
    }
    let allowed = logits.iter().copied().zip(0..).filter(|token| token.0 > f32::NEG_INFINITY);
    let mut tokens: Vec<(f32, u32)> = allowed.collect();
    if top < tokens.len() {
        tokens.select_nth_unstable_by(top - 1, by_likelihood);
    }
    tokens.truncate(top);
    tokens.sort_unstable_by(by_likelihood);
    let top = tokens.into_iter().map(|(x, id)| TopLogprob { id, logprob: logprob(x) });
    (logprob(logits[id as usize]), top.collect())
}

/// Draws an index with probability in proportion to its mass.
pub(crate) fn draw(masses: &[f64], random: &mut ChaCha8Rng) -> usize {
    let mut left = random.random::<f64>() * masses.iter().sum::<f64>();
    for (i, mass) in masses.iter().enumerate() {
        left -= mass;
        if left < 0.0 {
            return i;
        }
    }
    // Rounding can leave a trace at the end: take the last that has any mass.
    masses.iter().rposition(|&mass| mass > 0.0).unwrap_or(0)
}

#[cfg(test)]
mod tests;
