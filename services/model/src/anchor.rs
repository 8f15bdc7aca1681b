//! What the base knew: sequences sampled from the base itself.
//!
//! Works for any base, needs none of its training data, and the rise of their mean NLL under an adapter
//! estimates the divergence from the base, since they are draws from its own distribution.

use anyhow::{Result, ensure};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

use crate::active::ActiveAdapters;
use crate::generate::to_vec;
use crate::llama::{Base, Input, KvCache};
use crate::pack::Sequence;
use crate::sampling::draw;

/// Sequences that are sampled side by side.
const BATCH: usize = 32;

/// Samples `count` sequences of `length` tokens at temperature 1. They begin with the model's begin token, or
/// with a random one where it has none; every token but the first counts.
///
/// # Errors
/// When `length` is no sequence of this model, or its output is not finite.
pub fn sample(base: &Base, count: usize, length: usize, seed: u64) -> Result<Vec<Sequence>> {
    let _guard = tch::no_grad_guard();
    let config = base.config();
    ensure!(
        (2..=config.max_positions as usize).contains(&length),
        "an anchor has 2 to {} tokens",
        config.max_positions
    );
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut sequences = Vec::with_capacity(count);
    for start in (0..count).step_by(BATCH) {
        let rows = BATCH.min(count - start);
        let first = (0..rows).map(|_| {
            i64::from(config.bos.unwrap_or_else(|| random.random_range(0..config.vocab_size as u32)))
        });
        let mut last: Vec<i64> = first.collect();
        let mut tokens: Vec<Vec<u32>> = last.iter().map(|&id| vec![id as u32]).collect();
        let mut cache = KvCache::new(base, rows as i64);
        for _ in 1..length {
            let ids = Tensor::from_slice(&last).view([-1, 1]).to_device(base.device());
            let hidden =
                base.forward(&Input::rows(ids, cache.len()), &ActiveAdapters::none(), Some(&mut cache))?;
            let probabilities = to_vec(&base.logits(&hidden)?.f_softmax(-1, Kind::Float)?)?;
            for (row, masses) in probabilities.chunks(config.vocab_size as usize).enumerate() {
                let masses: Vec<f64> = masses.iter().map(|&p| f64::from(p)).collect();
                ensure!(
                    masses.iter().all(|p| p.is_finite()),
                    "the model's output is not finite: its weights are damaged"
                );
                let id = draw(&masses, &mut random);
                tokens[row].push(id as u32);
                last[row] = id as i64;
            }
        }
        sequences.extend(tokens.into_iter().map(Sequence::whole));
    }
    Ok(sequences)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use crate::loss::score;

    #[test]
    fn samples_follow_the_seed_and_the_base() {
        let base = golden::base("llama");
        let one = sample(&base, 40, 24, 9).unwrap();
        assert_eq!(one, sample(&base, 40, 24, 9).unwrap());
        assert_ne!(one, sample(&base, 40, 24, 10).unwrap());
        assert!(one.iter().all(|s| s.tokens.len() == 24 && s.tokens[0] == 1));
        // An adapter moves the model away from what it sampled: its NLL on that rises.
        let mean = |adapters: &[_]| {
            let scores = score(&base, adapters, &one, 256).unwrap();
            scores.iter().map(|s| s.nll_sum).sum::<f64>()
                / scores.iter().map(|s| s.tokens as f64).sum::<f64>()
        };
        let adapter = golden::adapter("peft-r8");
        assert!(mean(&[(&adapter, 1.0)]) > mean(&[]) + 0.1);
    }
}
