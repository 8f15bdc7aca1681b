//! Which passages a prompt is like, and how they go on where it ends.

use anyhow::Result;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use super::spelling::{Spelling, keys};
use super::{Passages, TOKENS_MIN, TOKENS_SHORT, cut};
use crate::ridge::mixed;
use crate::tokenizer::Tokenizer;

/// Passages that are looked at closely.
const PASSAGES_MAX: usize = 8;
/// What so many of the passages have, one in that many, does not bring one of them up.
const COMMON: usize = 10;
/// A prompt of which a passage has so much more than passages have of prompts about anything else is as likely as not asking for it.
/// Among 320 and 2,500 sentences the same in other words comes to 0.44 in the mean, a tenth to less than 0.26; 19 of 20 prompts about
/// anything else to at most 0.22 and 0.26, and among 40,000 of a kind to 0.33.
const UNLIKE: f64 = 0.05;
/// The least that it has to have.
const LIKE_MIN: f64 = 0.25;
/// How sure that is: the odds are `exp(SURENESS * (share - like))`.
const SURENESS: f64 = 15.0;
/// The same where a prompt is a whole sentence, and what follows is another one.
const LIKE_WHOLE: f64 = 0.7;
/// What is less sure is not said: beside the many tokens that a model may go on with, the one of a sentence would be the likeliest of all,
/// however unlikely the sentence is. Of beginnings of sentences from novels, asked of a domain of a few documents, 13 and 17 of 100 went
/// on with one of theirs without it, and none does with it; of 75 sentences in other words one is no longer ended as it was.
const SURE_MIN: f64 = 0.3;
/// How much more is said of a passage that has more of the prompt: by `exp(SHARPNESS * share)`.
const SHARPNESS: f64 = 60.0;
/// What it is worth that the prompt ends with the tokens before a place, each of three, in units of information.
const ENDS_ALIKE: f64 = 12.0;
/// What is said and what is not, before and after a place, weighs `exp(PLACE * information)`.
const PLACE: f64 = 0.3;
/// Tokens with which a question has to end to be the beginning of a passage, and not about one.
const BEGINS: usize = 3;
/// Continuations that are given at most, and the least share of the likeliest's.
const FOUND_MAX: usize = 32;
const FOUND_MIN: f64 = 0.01;
/// Tokens of a text that are said at most, in whole sentences.
const SAID_MAX: usize = 512;

/// What is looked for.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Tokens of what is asked, without what a chat puts around it.
    pub tokens: &'a [u32],
    /// It may be about what a passage says, which is then said from its beginning, and not only the beginning of one.
    pub is_question: bool,
    /// Space stands before what is said already.
    pub is_apart: bool,
    /// What ends the answer; none where the model may go on.
    pub end: Option<u32>,
}

/// How a text goes on.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// What is said next.
    pub tokens: Vec<u32>,
    /// How likely it is that.
    pub likely: f64,
    /// The document that says so, where that is known.
    pub document: Option<u64>,
}

/// Passages, and which of them have what words.
pub struct Index {
    passages: Passages,
    tokenizer: Arc<Tokenizer>,
    /// A key of each token: see [`Spelling`].
    keys: Vec<u32>,
    /// Words and pairs of neighbours, hashed, each with a passage that has it; sorted.
    entries: Vec<(u32, u32)>,
}

impl Index {
    /// Of `passages` in tokens of `tokenizer`.
    ///
    /// # Errors
    /// When the tokenizer fails on them.
    pub fn new(passages: Passages, tokenizer: Arc<Tokenizer>) -> Result<Self> {
        let mut spelling = Spelling::new(&tokenizer);
        let key = |&token| Ok(spelling.of(token)?.map_or(0, |spelled| spelled.key));
        let keys = passages.tokens.iter().map(key).collect::<Result<Vec<u32>>>()?;
        let mut entries = Vec::with_capacity(2 * keys.len());
        for n in 0..passages.len() {
            entries.extend(words(&keys[passages.range(n)]).into_iter().map(|word| (word, n as u32)));
        }
        entries.sort_unstable();
        Ok(Self { passages, tokenizer, keys, entries })
    }

    /// Passages that are known.
    pub fn len(&self) -> usize {
        self.passages.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.passages.is_empty()
    }

    /// The share of a prompt that the passage has that has most of it.
    ///
    /// # Errors
    /// When the tokenizer fails on it.
    pub fn share(&self, prompt: &[u32]) -> Result<f64> {
        let (_, spelled) = Spelling::new(&self.tokenizer).of_text(prompt)?;
        let keys = keys(&spelled);
        Ok(self.alike(&keys).first().map_or(0.0, |&(share, _)| share))
    }

    /// The share of which on a prompt of so many tokens is as likely as not asking for a passage. What is alike by chance is less so
    /// the longer the prompt.
    fn like(&self, tokens: usize) -> f64 {
        let [short, long] = self.passages.foreign.map(f64::from);
        let by_chance = (short - long).max(0.0) * (TOKENS_SHORT as f64 / tokens.max(1) as f64).min(1.0);
        (long + by_chance + UNLIKE).max(LIKE_MIN)
    }

    /// How what is asked goes on, or is answered; what is left to 1 is the model's.
    ///
    /// # Errors
    /// When the tokenizer fails on it.
    pub fn find(&self, asked: Asked<'_>) -> Result<Vec<Found>> {
        let (_, spelled) = Spelling::new(&self.tokenizer).of_text(asked.tokens)?;
        let cuts = cut(&spelled);
        let (Some(last), false) = (cuts.last().cloned(), self.is_empty()) else { return Ok(Vec::new()) };
        let keys = keys(&spelled);
        let before = cuts.len().checked_sub(2).map(|n| cuts[n].clone());
        if !asked.is_question {
            let whole = spelled[last.end - 1].ends_before(None);
            let (sentence, begun) = match before.clone() {
                _ if whole => (Some(last.clone()), last.end..last.end),
                before => (before.filter(|_| last.len() < TOKENS_MIN), last.clone()),
            };
            let next = sentence.map(|sentence| self.next(&keys, sentence, begun)).unwrap_or_default();
            if whole || !next.is_empty() {
                return self.said(next, asked);
            }
        }
        let start = before.filter(|_| last.len() < TOKENS_MIN).map_or(last.start, |before| before.start);
        let places = self.places(&keys[start..last.end], asked.is_question);
        self.said(places, asked)
    }

    /// What follows sentences like `sentence`, where it begins as what was `begun` of it; both are ranges of `keys`.
    fn next(&self, keys: &[u32], sentence: Range<usize>, begun: Range<usize>) -> Vec<(Range<usize>, f64)> {
        let alike = self.alike(&keys[sentence]);
        let begun = &keys[begun];
        let goes_on = |&(share, n): &(f64, usize)| {
            let range = self.passages.range(n + usize::from(self.passages.goes_on[n]));
            let follows = self.passages.goes_on[n] && self.keys[range.clone()].starts_with(begun);
            let rest = range.start + begun.len()..range.end;
            (follows && !rest.is_empty()).then_some((rest, share))
        };
        let following: Vec<(Range<usize>, f64)> = alike.iter().filter_map(goes_on).collect();
        let sure = following.first().map_or(0.0, |&(_, share)| sureness(share, LIKE_WHOLE));
        weighed(following, sure)
    }

    /// Where in passages like it a prompt ends.
    fn places(&self, keys: &[u32], is_question: bool) -> Vec<(Range<usize>, f64)> {
        let alike = self.alike(keys);
        let sure = alike.first().map_or(0.0, |&(share, _)| sureness(share, self.like(keys.len())));
        let passages =
            weighed(alike.iter().map(|&(share, n)| (self.passages.range(n), share)).collect(), sure);
        let mut places = Vec::new();
        for (range, likely) in passages {
            let of = self.place(keys, range.clone(), is_question);
            let most = of.iter().map(|&(_, worth)| worth).fold(f64::NEG_INFINITY, f64::max);
            let odds = of.into_iter().map(|(at, worth)| (at, (PLACE * (worth - most)).exp()));
            let odds: Vec<(usize, f64)> = odds.collect();
            let whole: f64 = odds.iter().map(|(_, odds)| odds).sum();
            places.extend(odds.into_iter().map(|(at, odds)| (at..range.end, likely * odds / whole)));
        }
        places
    }

    /// What it is worth, in units of information, to go on from each place of a passage: what was said is before it and in the prompt,
    /// what is to be said is after it and is not, and what is just before it ends the prompt.
    fn place(&self, prompt: &[u32], range: Range<usize>, is_question: bool) -> Vec<(usize, f64)> {
        let keys = &self.keys[range.clone()];
        let said: BTreeSet<u32> = prompt.iter().copied().collect();
        let count = keys.len();
        let value: Vec<f64> =
            keys.iter().map(|&key| if key == 0 { 0.0 } else { self.rarity(word(key)) }).collect();
        let is_said: Vec<bool> = keys.iter().map(|key| said.contains(key)).collect();
        let is_first = |n: usize| !keys[..n].contains(&keys[n]);
        let is_last = |n: usize| !keys[n + 1..].contains(&keys[n]);
        let mut after: f64 = (0..count).filter(|&n| is_said[n] && is_last(n)).map(|n| value[n]).sum();
        let (mut before, mut unsaid) = (0.0, 0.0);
        let mut places = Vec::with_capacity(count);
        if is_question {
            places.push((range.start, ENDS_ALIKE * 2.0));
        }
        for n in 1..count {
            if is_first(n - 1) {
                *(if is_said[n - 1] { &mut before } else { &mut unsaid }) += value[n - 1];
            }
            if is_said[n - 1] && is_last(n - 1) {
                after -= value[n - 1];
            }
            let pairs = keys[..n].iter().rev().zip(prompt.iter().rev());
            let alike = pairs.take_while(|(a, b)| a == b).take(BEGINS).count();
            if is_question && alike < BEGINS {
                continue;
            }
            let repeats = if alike == 0 && is_said[n] { value[n] } else { 0.0 };
            let worth = ENDS_ALIKE * alike as f64 + before - after - PLACE * unsaid - repeats;
            places.push((range.start + n, worth));
        }
        places
    }

    /// Passages that have most of a prompt, by the share of its information that each has, most first.
    fn alike(&self, keys: &[u32]) -> Vec<(f64, usize)> {
        let mut shares = vec![0.0_f32; self.len()];
        let (mut whole, mut common) = (0.0, Vec::new());
        for word in words(keys) {
            let having = self.having(word);
            let rarity = self.rarity(word);
            whole += rarity;
            if having.len() * COMMON > self.len().max(COMMON * COMMON) {
                common.push((word, rarity));
                continue;
            }
            having.iter().for_each(|&(_, n)| shares[n as usize] += rarity as f32);
        }
        let mut best: Vec<(f64, usize)> = Vec::new();
        let least = |best: &Vec<(f64, usize)>| {
            if best.len() < 4 * PASSAGES_MAX { 0.0 } else { best[best.len() - 1].0 }
        };
        for (n, &share) in shares.iter().enumerate() {
            if f64::from(share) > least(&best) {
                let place = best.partition_point(|&(other, _)| other >= f64::from(share));
                best.insert(place, (f64::from(share), n));
                best.truncate(4 * PASSAGES_MAX);
            }
        }
        for (share, n) in &mut best {
            let has = |word: u32| self.entries.binary_search(&(word, *n as u32)).is_ok();
            *share += common.iter().filter(|(word, _)| has(*word)).map(|(_, rarity)| rarity).sum::<f64>();
            *share /= whole;
        }
        best.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        best.truncate(PASSAGES_MAX);
        best
    }

    /// Passages that have a word.
    fn having(&self, word: u32) -> &[(u32, u32)] {
        let start = self.entries.partition_point(|entry| entry.0 < word);
        let count = self.entries[start..].partition_point(|entry| entry.0 == word);
        &self.entries[start..start + count]
    }

    /// The information of a word, as in Okapi BM25 (Robertson et al., 1994): `ln(1 + (N - n + 0.5) / (n + 0.5))` where `n` of `N`
    /// passages and prompts about anything else have it.
    fn rarity(&self, word: u32) -> f64 {
        let others = &self.passages.others;
        let all = self.len() as f64 + f64::from(others.prompts);
        let having = self.having(word).len() as f64 + f64::from(others.having(word));
        (1.0 + (all - having + 0.5) / (having + 0.5)).ln()
    }

    /// Where what is said ends that goes on with the text after a passage.
    fn text_end(&self, range: &Range<usize>) -> usize {
        let Passages { ends, goes_on, .. } = &self.passages;
        let first = ends.partition_point(|&end| (end as usize) < range.end);
        let text = (first..ends.len()).take_while(|&n| n == first || goes_on[n - 1]);
        let fits = |end: &usize| *end <= range.start + SAID_MAX;
        text.map(|n| ends[n] as usize).take_while(fits).last().unwrap_or(range.end)
    }

    /// What is said from each place on, the likeliest of them.
    fn said(&self, mut places: Vec<(Range<usize>, f64)>, asked: Asked<'_>) -> Result<Vec<Found>> {
        places.sort_by(|a, b| b.1.total_cmp(&a.1));
        let least = places.first().map_or(0.0, |(_, likely)| likely * FOUND_MIN);
        places.retain(|(_, likely)| *likely >= least && *likely > 0.0);
        places.truncate(FOUND_MAX);
        let of_place = |(range, likely): (Range<usize>, f64)| {
            let document = self.passages.document(range.start);
            let goes_on = !asked.is_question && asked.end.is_none();
            let end = if goes_on { self.text_end(&range) } else { range.end };
            let mut tokens = self.passages.tokens[range.start..end].to_vec();
            if asked.is_question || asked.is_apart {
                // An answer does not begin with the space that was between it and what stood before.
                let text = self.tokenizer.decode(&tokens)?;
                tokens = self.tokenizer.encode_continuation(text.trim_start())?;
            }
            tokens.extend(asked.end);
            Ok(Found { tokens, likely, document })
        };
        places.into_iter().map(of_place).collect()
    }
}

/// How likely a prompt asks for passages of which the best has such a share of it; 0 where it hardly does.
pub(super) fn sureness(share: f64, like: f64) -> f64 {
    let sure = 1.0 / (1.0 + (SURENESS * (like - share)).exp());
    if sure < SURE_MIN { 0.0 } else { sure }
}

/// Ranges with the shares of the prompt that they have, as how likely each is, where one of them is so `sure`.
fn weighed(shares: Vec<(Range<usize>, f64)>, sure: f64) -> Vec<(Range<usize>, f64)> {
    let most = shares.iter().map(|&(_, share)| share).fold(f64::NEG_INFINITY, f64::max);
    let odds = |share: f64| (SHARPNESS * (share - most)).exp();
    let whole: f64 = shares.iter().map(|&(_, share)| odds(share)).sum();
    shares.into_iter().map(|(range, share)| (range, sure * odds(share) / whole)).collect()
}

fn word(key: u32) -> u32 {
    (mixed(u64::from(key)) >> 32) as u32
}

/// Each word and each pair of neighbours once, hashed.
pub(super) fn words(keys: &[u32]) -> Vec<u32> {
    let single = keys.iter().filter(|&&key| key != 0).map(|&key| word(key));
    let pairs = keys.windows(2).filter(|pair| pair[0] != 0 && pair[1] != 0);
    let pairs = pairs.map(|pair| (mixed(u64::from(pair[0]) << 32 | u64::from(pair[1])) >> 32) as u32);
    let mut words: Vec<u32> = single.chain(pairs).collect();
    words.sort_unstable();
    words.dedup();
    words
}
