//! What a run will take, said before it starts.

use crate::device::{Placement, Precision};
use crate::footprint::{RUNTIME_BYTES, block_bytes_a_token, head_bytes};
use crate::hf::ModelConfig;

use super::preset::{Matrices, Preset};

/// What a preset amounts to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// Number of weights, a tied embedding counted once.
    pub parameters: i64,
    /// Memory of the process at its peak, in bytes: an estimate.
    pub memory_bytes: f64,
    /// Floating-point operations in products, for each token learned.
    pub operations_per_token: f64,
}

impl Plan {
    /// What training `config` as `preset` says takes at `placement`.
    pub fn new(config: &ModelConfig, preset: &Preset, placement: &Placement) -> Self {
        let parameters = config.parameter_count() as f64;
        let embeddings = (config.vocab_size * config.hidden_size) as f64;
        let matrices = parameters - embeddings * if config.tied { 1.0 } else { 2.0 };
        let width = placement.kind().elt_size_in_bytes() as f64;
        let casts = if placement.precision == Precision::F32 { 0.0 } else { width };
        let moments = match preset.optimiser.matrices {
            Matrices::Adamw => 8.0 * parameters,
            Matrices::Muon => 8.0 * (parameters - matrices) + 4.0 * matrices,
        };
        let windows = preset.optimiser.batch_windows * preset.data.window_tokens;
        let tokens = windows.min(preset.optimiser.micro_tokens.max(preset.data.window_tokens)) as f64;
        // Weights, their gradients in f32 and in the precision, the optimiser, the activations.
        let memory_bytes = RUNTIME_BYTES
            + parameters * (8.0 + 2.0 * casts)
            + moments
            + tokens * block_bytes_a_token(config, placement) * config.layers as f64
            + head_bytes(config);
        Self {
            parameters: config.parameter_count(),
            memory_bytes,
            operations_per_token: operations(config, matrices + embeddings, preset.data.window_tokens),
        }
    }
}

/// Two operations for each weight in a product, and as many again for each of the two gradients; in attention
/// each query meets, on average, half of its window, once for the scores and once for the values.
fn operations(config: &ModelConfig, weights: f64, window: usize) -> f64 {
    let [queries, ..] = config.qkv_rows();
    let attention = 2.0 * window as f64 * (queries * config.layers) as f64;
    6.0 * weights + 3.0 * attention
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_have_the_sizes_they_are_named_for() {
        let parameters = |name: &str| {
            let preset = Preset::find(name).unwrap();
            Plan::new(&preset.model().unwrap(), &preset, &Placement::CPU_F32).parameters as f64 / 1e6
        };
        assert!((parameters("reference") - 63.6).abs() < 0.05);
        assert!((parameters("base-100m") - 100.0).abs() < 1.0);
        assert!((parameters("base-200m") - 213.2).abs() < 0.05);
        // In bf16, with its tokenizer, at most 10 MB.
        assert!(parameters("nano") < 4.9);
    }
}
