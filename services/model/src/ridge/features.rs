//! What a prompt looks like: to the frozen base, and by its words.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Result, ensure};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

use crate::llama::{Base, Input};
use crate::tokenizer::Tokenizer;

/// Places of the base that a prompt and the [`END`] after it are looked at: the mean of their states as they enter four blocks, and
/// the last token's state after all.
pub(super) const PARTS: i64 = 5;
/// Numbers that are taken of each.
pub(super) const PART: i64 = 400;
/// Numbers for the tokens of a prompt and its pairs of tokens, hashed. What the base makes of a prompt says what it is about, and
/// is much the same for prompts that differ in a word; with few prompts to go by that word says more. With 500, 1,000, 3,000 and
/// 15,000 of 15,000 requests with 150 labels 0.54, 0.67, 0.83 and 0.88 of others are found, and 0.49, 0.62, 0.79 and 0.86 without;
/// twice as many numbers find no more than one in a hundred more.
pub(super) const WORDS: i64 = 500;
/// Length of what words come to; that of what a part comes to is some 450.
const WORDS_LENGTH: f32 = 128.0;

/// What is put after every prompt. At the last word a base looks for what goes on with it, and at its end for what answers it:
/// with 900 of 15,000 requests 0.57 of others are found without and 0.61 with it, 0.61 with a full stop, 0.60 with a space.
const END: &str = "\n";
/// Tokens of a prompt that are looked at, its last ones, with its end.
const PROMPT_TOKENS_MAX: usize = 256;
/// Prompts that are read side by side.
const PROMPTS_A_PASS: usize = 64;

/// A deviation of a random projection is so many steps; more than [`STEPS_MAX`] are taken as that many.
const STEPS: f64 = 32.0;
/// As many as fit a byte's positive half, so that products of 1,000 prompts add up exactly in f32.
const STEPS_MAX: f64 = 127.0;

/// A row for each prompt: whole numbers from 0 to 127, as f32 [prompts, `FEATURES`] on the CPU.
pub type Rows = Tensor;

/// Describes prompts: random projections of what the base makes of them, of which only the positive ones count, and counts of their
/// tokens and pairs of tokens.
///
/// The signs of the projections are drawn with a fixed seed: what is counted on one machine is understood on any other.
pub struct Features {
    base: Base,
    /// Knows white space, at the end of a prompt, in place of which [`END`] is put: a chat may put a line break there where a
    /// completion has none, and the prompt is the same.
    tokenizer: Option<Arc<Tokenizer>>,
    /// The tokens of [`END`]; none without a tokenizer, or with one that has no line break.
    end: Vec<u32>,
    /// Of each part, [hidden_size, PART], in lengths of a hidden state.
    signs: Vec<Tensor>,
}

impl Features {
    /// Of prompts to `base`.
    ///
    /// # Errors
    /// Those of libtorch and the tokenizer.
    pub fn new(base: &Base, tokenizer: Option<Arc<Tokenizer>>) -> Result<Self> {
        let hidden = base.config().hidden_size;
        let signs = (0..PARTS as u64).map(|part| signs(hidden, part)).collect::<Result<_>>()?;
        let end = tokenizer.as_ref().map(|tokenizer| tokenizer.encode_continuation(END)).transpose()?;
        Ok(Self { base: base.share(), tokenizer, end: end.unwrap_or_default(), signs })
    }

    /// What prompts look like.
    ///
    /// # Errors
    /// When a prompt has no token, or the base's states are not finite.
    pub fn of(&self, prompts: &[&[u32]]) -> Result<Rows> {
        ensure!(
            prompts.iter().all(|prompt| !prompt.is_empty()),
            "a prompt without tokens cannot be described"
        );
        let _guard = tch::no_grad_guard();
        let prompts = prompts.iter().map(|prompt| self.trimmed(prompt)).collect::<Result<Vec<_>>>()?;
        let mut order: Vec<usize> = (0..prompts.len()).collect();
        let most = PROMPT_TOKENS_MAX.saturating_sub(self.end.len()).max(1);
        order.sort_by_key(|&n| prompts[n].len().min(most));
        let mut rows = Vec::new();
        for pass in order.chunks(PROMPTS_A_PASS) {
            let prompts: Vec<&[u32]> = pass.iter().map(|&n| tail(prompts[n], most)).collect();
            let ended: Vec<Vec<u32>> =
                prompts.iter().map(|prompt| [prompt, &self.end[..]].concat()).collect();
            rows.push(Tensor::f_cat(&[self.project(&self.pooled(&ended)?)?, words(&prompts)?], -1)?);
        }
        if rows.is_empty() {
            return Ok(Tensor::f_zeros([0, super::FEATURES], (Kind::Float, tch::Device::Cpu))?);
        }
        let mut place = vec![0_i64; order.len()];
        order.iter().enumerate().for_each(|(row, &n)| place[n] = row as i64);
        Ok(Tensor::f_cat(&rows, 0)?.f_index_select(0, &Tensor::from_slice(&place))?)
    }

    /// A prompt without white space at its end, of which a token is left in any case.
    fn trimmed<'a>(&self, prompt: &'a [u32]) -> Result<&'a [u32]> {
        let Some(tokenizer) = &self.tokenizer else { return Ok(prompt) };
        let mut prompt = prompt;
        while let [rest @ .., last] = prompt
            && !rest.is_empty()
        {
            let text = tokenizer.decode(std::slice::from_ref(last))?;
            // A control token has no text, and is no white space.
            if text.is_empty() || !text.trim().is_empty() {
                break;
            }
            prompt = rest;
        }
        Ok(prompt)
    }

    /// What the base makes of prompts of similar length, in f32 [prompts, hidden_size] a part.
    fn pooled(&self, prompts: &[Vec<u32>]) -> Result<Vec<Tensor>> {
        let (config, device) = (self.base.config(), self.base.device());
        let (count, length) = (prompts.len() as i64, prompts.iter().map(Vec::len).max().unwrap_or(0));
        let mut ids = Vec::with_capacity(prompts.len() * length);
        let (mut shares, mut lasts) = (Vec::with_capacity(prompts.len() * length), Vec::new());
        for (row, prompt) in prompts.iter().enumerate() {
            // What pads a row comes after it, where nothing looks.
            let padding = length - prompt.len();
            ids.extend(prompt.iter().map(|&id| i64::from(id)).chain(std::iter::repeat_n(0, padding)));
            let share = 1.0 / prompt.len() as f32;
            shares.extend(std::iter::repeat_n(share, prompt.len()).chain(std::iter::repeat_n(0.0, padding)));
            lasts.push((row * length + prompt.len() - 1) as i64);
        }
        let ids = Tensor::from_slice(&ids).f_view([count, -1])?.f_to_device(device)?;
        let shares = Tensor::from_slice(&shares).f_view([count, 1, -1])?.f_to_device(device)?;
        let layers = config.layers as usize;
        let depths = [0, layers / 5, layers * 2 / 5, layers * 4 / 5, layers];
        let streams = self.base.streams(&Input::rows(ids, 0), &depths)?;
        let mut pooled = Vec::with_capacity(streams.len());
        for (n, stream) in streams.iter().enumerate() {
            pooled.push(if n + 1 < streams.len() {
                let states = stream.f_to_kind(Kind::Float)?.f_view([count, -1, config.hidden_size])?;
                shares.f_bmm(&states)?.f_squeeze_dim(1)?
            } else {
                let lasts = Tensor::from_slice(&lasts).f_to_device(device)?;
                stream.f_index_select(0, &lasts)?.f_to_kind(Kind::Float)?
            });
        }
        Ok(pooled)
    }

    fn project(&self, pooled: &[Tensor]) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(pooled.len());
        for (states, signs) in pooled.iter().zip(&self.signs) {
            let states = states.f_to_device(tch::Device::Cpu)?;
            ensure!(crate::weights::is_finite(&states)?, "the base's states for a prompt are not finite");
            let length = states.f_norm_scalaropt_dim(2.0, [-1_i64], true)?.f_clamp_min(1e-12)?;
            let steps = states.f_div(&length)?.f_matmul(signs)?.f_mul_scalar(STEPS)?;
            parts.push(steps.f_round()?.f_clamp(0.0, STEPS_MAX)?);
        }
        Ok(Tensor::f_cat(&parts, -1)?)
    }
}

/// Each token and each pair of neighbours counts once, in the place that its hash says: [prompts, WORDS], each of
/// [`WORDS_LENGTH`].
fn words(prompts: &[&[u32]]) -> Result<Tensor> {
    let mut rows = Vec::with_capacity(prompts.len() * WORDS as usize);
    for prompt in prompts {
        let tokens = prompt.iter().map(|&token| u64::from(token));
        let pairs = prompt.windows(2).map(|pair| (u64::from(pair[0]) + 1) << 32 | u64::from(pair[1]));
        let keys: BTreeSet<u64> = tokens.chain(pairs).collect();
        let mut row = [0.0_f32; WORDS as usize];
        keys.into_iter().for_each(|key| row[(mixed(key) % WORDS as u64) as usize] += 1.0);
        let length = row.iter().map(|count| count * count).sum::<f32>().sqrt();
        rows.extend(row.map(|count| (count * WORDS_LENGTH / length).round().min(STEPS_MAX as f32)));
    }
    Ok(Tensor::from_slice(&rows).f_view([-1, WORDS])?)
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), in which every bit of the result depends on every bit of the key.
pub(crate) fn mixed(key: u64) -> u64 {
    let key = (key ^ key >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let key = (key ^ key >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    key ^ key >> 31
}

/// Adds what earlier versions did not count, which is as if nothing had been there: a matrix [n, FEATURES] of one with fewer columns.
pub(super) fn widened(rows: Tensor) -> Result<Tensor> {
    if rows.dim() != 2 || rows.size()[1] != PARTS * PART {
        return Ok(rows);
    }
    Ok(rows.f_constant_pad_nd([0, WORDS])?)
}

/// In what way prompts are described. In way 0 nothing stood after a prompt: the last part was of its own last token, and means were
/// of a token less, which is much the same.
pub(super) const WAY: u32 = 1;

/// Takes out of numbers of an earlier `way`, [.., FEATURES], what was described otherwise: as if nothing had been there.
pub(super) fn as_now(numbers: &Tensor, way: u32) -> Result<()> {
    if way < WAY {
        let _ = numbers.f_narrow(-1, (PARTS - 1) * PART, PART)?.f_zero_()?;
    }
    Ok(())
}

/// The last tokens of a prompt.
fn tail(prompt: &[u32], most: usize) -> &[u32] {
    &prompt[prompt.len().saturating_sub(most)..]
}

/// One or minus one, f32 [hidden, PART].
fn signs(hidden: i64, part: u64) -> Result<Tensor> {
    let mut random = ChaCha8Rng::seed_from_u64(part);
    let mut signs = Vec::with_capacity((hidden * PART) as usize);
    while signs.len() < signs.capacity() {
        let bits = random.next_u64();
        let left = signs.capacity() - signs.len();
        signs.extend((0..left.min(64)).map(|n| if bits >> n & 1 == 1 { 1.0_f32 } else { -1.0 }));
    }
    Ok(Tensor::from_slice(&signs).f_view([hidden, PART])?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    #[test]
    fn a_prompt_is_described_the_same_whatever_lies_beside_it() {
        let features = Features::new(&golden::base("llama"), None).unwrap();
        let prompts: Vec<Vec<u32>> =
            (1..80_u32).map(|n| (0..n % 9 + 1).map(|i| (n * 7 + i * 3) % 128).collect()).collect();
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let all = features.of(&prompts).unwrap();
        assert_eq!(all.size(), [79, super::super::FEATURES]);
        assert!(all.equal(&all.round()) && all.min().double_value(&[]) == 0.0);
        assert!(all.max().double_value(&[]) <= STEPS_MAX);
        for n in [0, 8, 33, 78] {
            let alone = features.of(&prompts[n..=n]).unwrap();
            // Sums in another order may round another way, by a step.
            assert!((all.get(n as i64) - alone.get(0)).abs().max().double_value(&[]) <= 1.0);
        }
        let by_base = all.narrow(1, 0, PARTS * PART);
        let share = by_base.gt(0.0).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
        assert!((0.4..0.6).contains(&share), "about half of the projections are positive: {share}");
    }

    #[test]
    fn the_mean_is_over_the_prompt_and_the_last_state_is_its_own() {
        let base = golden::base("llama");
        let features = Features::new(&base, None).unwrap();
        let pooled = features.pooled(&[vec![5, 9, 2], vec![7]]).unwrap();
        let _guard = tch::no_grad_guard();
        let ids = Tensor::from_slice(&[5_i64, 9, 2]).view([1, 3]);
        let layers = base.config().layers as usize;
        let alone = base.streams(&Input::rows(ids, 0), &[0, layers]).unwrap();
        assert!(golden::distance(&pooled[0].get(0), &alone[0].mean_dim(0, false, Kind::Float)) < 1e-5);
        assert!(golden::distance(&pooled[4].get(0), &alone[1].get(2)) < 1e-5);
    }

    #[test]
    fn words_count_once_and_so_do_neighbours_whatever_else_is_said() {
        let of = |prompt: &[u32]| words(&[prompt]).unwrap().get(0);
        let places = |prompt: &[u32]| of(prompt).gt(0.0).sum(Kind::Int64).int64_value(&[]);
        assert_eq!((places(&[7]), places(&[7, 9]), places(&[7, 7, 7])), (1, 3, 2));
        assert_eq!(places(&[7, 9, 7, 9, 7, 9]), 4, "the same pairs again are no more");
        assert!(!of(&[7, 9]).equal(&of(&[9, 7])), "their order makes other pairs");
        let long: Vec<u32> = (0..200).collect();
        for prompt in [&[7, 9][..], &[1, 2, 3, 4, 5], &long] {
            let length = of(prompt).norm().double_value(&[]);
            assert!((length / f64::from(WORDS_LENGTH) - 1.0).abs() < 0.06, "{length}");
        }
    }

    #[test]
    fn nothing_is_refused_and_of_a_long_prompt_the_end_counts() {
        let features = Features::new(&golden::base("llama"), None).unwrap();
        assert!(features.of(&[&[]]).is_err());
        assert_eq!(features.of(&[]).unwrap().size()[0], 0);
        let long: Vec<u32> = (0..600).map(|n| n % 128).collect();
        let (long, end) =
            (features.of(&[&long]).unwrap(), features.of(&[tail(&long, PROMPT_TOKENS_MAX)]).unwrap());
        assert!(long.equal(&end));
    }
}
