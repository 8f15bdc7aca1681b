//! How much memory serving and learning take, said before they start.

use crate::device::{Placement, Precision};
use crate::hf::ModelConfig;
use crate::lora::LoraConfig;
use crate::loss::chunk_rows;
use crate::manual;
use crate::quant::{BLOCK, Quantisation};
use tch::Device;

/// Bytes that libtorch and its kernels take before any weight, as measured on a CPU.
pub const RUNTIME_BYTES: f64 = 350e6;

/// Copies of the residual stream that autograd keeps for each block, in the precision and in f32, and copies of the
/// feed-forward's width. Counted by hand; what they add up to was within a fifth of what was measured, on a CPU.
const STREAM_COPIES: (f64, f64) = (8.0, 6.0);
const FEED_FORWARD_COPIES: f64 = 5.0;

/// The same where the backward pass is written by hand (`manual`): what enters the block and its middle, both normed, queries,
/// keys and values, and what attention mixes, all in the precision; and gate and up.
const STREAM_COPIES_BY_HAND: f64 = 7.0;
const FEED_FORWARD_COPIES_BY_HAND: f64 = 2.0;

/// Bytes of an adapter's weight while it is learned: itself, its gradient, two moments, the former self, and a copy to
/// answer from.
const ADAPTER_WEIGHT_BYTES: f64 = 24.0;

/// More bytes of it where the backward pass is written by hand: in f32 as it is read and transposed, with room for whole tiles, also of
/// the former self.
const FACTOR_BYTES: f64 = 20.0;

/// Bytes that a block's activations take for each token, until its backward pass.
pub(crate) fn block_bytes_a_token(config: &ModelConfig, placement: &Placement) -> f64 {
    let width = placement.kind().elt_size_in_bytes() as f64;
    let stream = STREAM_COPIES.0 * width + STREAM_COPIES.1 * 4.0;
    stream * config.hidden_size as f64 + FEED_FORWARD_COPIES * width * config.intermediate_size as f64
}

/// Bytes of the logits of as many tokens as there are at once, of the former self's, of their gradient and of what lies
/// between, where memory is estimated: not on CUDA.
pub(crate) fn head_bytes(config: &ModelConfig) -> f64 {
    (chunk_rows(config.vocab_size, Device::Cpu) * config.vocab_size) as f64 * 24.0
}

/// Bytes of the copy of a base's weights in 16 bits that a CPU answers from where they are such numbers in f32, at most.
pub fn narrow_copy_bytes(config: &ModelConfig, placement: &Placement) -> f64 {
    let wide = placement.precision == Precision::F32 && placement.quantisation == Quantisation::None;
    if wide && placement.device == Device::Cpu { 2.0 * config.parameter_count() as f64 } else { 0.0 }
}

/// What serving and learning with a base take at their peak, in bytes: an estimate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Footprint {
    /// The base's weights, and libtorch itself.
    pub base: f64,
    /// Keys and values of answers under way.
    pub answering: f64,
    /// A micro-batch on its way through the base and back, and an adapter with its optimiser.
    pub learning: f64,
}

impl Footprint {
    /// Of a base in the form that `placement` says, with room of `cache_bytes` for answers, learned on with adapters of
    /// the shape `lora` in micro-batches of `micro_tokens`, with the base's matrices and head in 8 bits beside them where
    /// there are `codes`.
    pub fn new(
        config: &ModelConfig,
        placement: &Placement,
        lora: &LoraConfig,
        cache_bytes: usize,
        micro_tokens: usize,
        codes: bool,
    ) -> Self {
        let width = placement.kind().elt_size_in_bytes() as f64;
        let embeddings =
            (config.vocab_size * config.hidden_size) as f64 * if config.tied { 1.0 } else { 2.0 };
        let matrices = config.parameter_count() as f64 - embeddings;
        let scales = 4.0 / BLOCK as f64;
        let matrix_bytes = matrices
            * match placement.quantisation {
                Quantisation::None => width,
                Quantisation::Int8 => 1.0 + scales,
                Quantisation::Nf4 => 0.5 + scales,
            };
        // Answers are decoded with a head of their own in 8 bits.
        let head = match placement.quantisation {
            Quantisation::None => 0.0,
            Quantisation::Int8 | Quantisation::Nf4 => {
                (config.vocab_size * config.hidden_size) as f64 * (1.0 + scales)
            }
        };
        let (layers, tokens) = (config.layers as f64, micro_tokens as f64);
        let block = tokens * block_bytes_a_token(config, placement);
        let activations = if codes || manual::applies_to(config, placement) {
            // Beside what is kept of every block, what the one that is computed takes: about twice as much.
            let stream = STREAM_COPIES_BY_HAND * config.hidden_size as f64;
            let kept = stream + FEED_FORWARD_COPIES_BY_HAND * config.intermediate_size as f64;
            tokens * kept * width * (layers + 2.0) + lora.parameter_count(config) as f64 * FACTOR_BYTES
        } else if placement.quantisation == Quantisation::None {
            block * layers
        } else {
            // One block at a time, with what enters each, and with its matrices as they were; see `recompute`.
            block + tokens * config.hidden_size as f64 * width * layers + matrices / layers * width
        };
        let adapter = lora.parameter_count(config) as f64 * ADAPTER_WEIGHT_BYTES;
        let codes = if codes { matrices + (config.vocab_size * config.hidden_size) as f64 } else { 0.0 };
        Self {
            base: RUNTIME_BYTES + embeddings * width + matrix_bytes + head,
            answering: cache_bytes as f64,
            learning: activations + head_bytes(config) + adapter + codes,
        }
    }

    /// All of it.
    pub fn total(&self) -> f64 {
        self.base + self.answering + self.learning
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pretrain::preset::Preset;

    fn megabytes(shape: &str, quantisation: Quantisation, micro_tokens: usize) -> f64 {
        let config = Preset::find(shape).unwrap().model().unwrap();
        let placement = Placement { quantisation, precision: Precision::F32, ..Placement::CPU_F32 };
        Footprint::new(&config, &placement, &LoraConfig::default(), 0, micro_tokens, false).total() / 1e6
    }

    #[test]
    fn what_learning_takes_is_what_was_measured() {
        // Peaks of `engram bench update --examples 32 --batch 32 --replay 0` on a CPU in f32, in MB. The runtime is
        // counted as large as it is in a server.
        for (shape, quantisation, micro_tokens, measured) in [
            ("nano", Quantisation::None, 2048, 385.0),
            ("base-100m", Quantisation::None, 2048, 2013.0),
            ("base-100m", Quantisation::None, 512, 986.0),
            ("base-100m", Quantisation::Int8, 2048, 941.0),
        ] {
            let estimate = megabytes(shape, quantisation, micro_tokens);
            assert!(
                (measured * 0.95..measured + 250.0).contains(&estimate),
                "{shape} {micro_tokens}: {estimate:.0} MB"
            );
        }
    }

    #[test]
    fn half_the_precision_takes_less_and_answers_take_what_they_may() {
        let config = Preset::find("base-200m").unwrap().model().unwrap();
        let of = |precision, cache| {
            let placement = Placement { precision, ..Placement::CPU_F32 };
            Footprint::new(&config, &placement, &LoraConfig::default(), cache, 1024, false)
        };
        let (full, half) = (of(Precision::F32, 0), of(Precision::Bf16, 1 << 20));
        assert!((full.base - half.base - 213.2e6 * 2.0).abs() < 1e6);
        assert!(half.learning < full.learning * 0.7);
        assert_eq!(half.answering, 1048576.0);
    }
}
