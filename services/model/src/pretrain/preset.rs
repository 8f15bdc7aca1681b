//! What is pre-trained and how: a TOML file, of which some come with the program.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::hf::ModelConfig;

/// The presets in `configs/models/`, by name.
const BUILT_IN: [(&str, &str); 4] = [
    ("nano", include_str!("../../../../configs/models/nano.toml")),
    ("reference", include_str!("../../../../configs/models/reference.toml")),
    ("base-100m", include_str!("../../../../configs/models/base-100m.toml")),
    ("base-200m", include_str!("../../../../configs/models/base-200m.toml")),
];

/// A shape with the settings it is trained with.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preset {
    /// The model's `config.json`, written as TOML.
    model: Value,
    /// How text becomes windows.
    pub data: DataSettings,
    /// How weights move.
    pub optimiser: OptimiserSettings,
}

/// How text becomes windows.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSettings {
    /// The tokenizer is trained on the beginning of each text, up to this many bytes.
    pub tokenizer_bytes_max: usize,
    /// Tokens of a training window.
    pub window_tokens: usize,
    /// A text of n tokens is drawn in proportion to n to this power.
    pub mix_exponent: f64,
    /// Validation reads the beginning of each held-out text, up to this many bytes.
    pub validation_bytes_max: usize,
}

/// The optimiser of the matrices of the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Matrices {
    /// Momentum made orthogonal.
    Muon,
    /// As for embeddings and norms, at the same rate.
    Adamw,
}

/// How weights move: Muon for the matrices of the blocks, AdamW for embeddings and norms.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimiserSettings {
    /// Who moves the matrices of the blocks; embeddings and norms are always AdamW's.
    pub matrices: Matrices,
    /// Windows in a step.
    pub batch_windows: usize,
    /// Tokens that go through the model at once; a step of more adds up gradients.
    pub micro_tokens: usize,
    /// Muon's rate, for spectral norm 1.
    pub muon_rate: f64,
    /// How much of the last momentum the next one keeps.
    pub muon_momentum: f64,
    /// AdamW's rate.
    pub adamw_rate: f64,
    /// The norm that the gradients of embeddings and norms are clipped to.
    pub clip: f64,
    /// Steps in which the rates rise from zero.
    pub warmup_steps: u64,
    /// The last share of the run, in which the rates fall to zero.
    pub decay_share: f64,
}

impl Preset {
    /// A preset by name, or one of your own by the path of its file.
    ///
    /// # Errors
    /// When there is neither, or the file does not say what a preset says.
    pub fn find(name: &str) -> Result<Self> {
        if let Some((_, text)) = BUILT_IN.iter().find(|(known, _)| *known == name) {
            return Self::parse(text).with_context(|| format!("preset {name}"));
        }
        let known = BUILT_IN.map(|(known, _)| known).join(", ");
        let text = std::fs::read_to_string(Path::new(name))
            .with_context(|| format!("{name:?} is no preset ({known}) and no file that can be read"))?;
        Self::parse(&text).with_context(|| name.to_string())
    }

    pub(super) fn parse(text: &str) -> Result<Self> {
        let preset: Self = toml::from_str(text)?;
        let config = preset.model()?;
        let (data, optimiser) = (&preset.data, &preset.optimiser);
        ensure!(
            (2..=config.max_positions).contains(&(data.window_tokens as i64)),
            "window_tokens has to be from 2 to the model's context of {}",
            config.max_positions
        );
        ensure!((0.0..=1.0).contains(&data.mix_exponent), "mix_exponent has to be from 0 to 1");
        for (name, value) in
            [("batch_windows", optimiser.batch_windows), ("micro_tokens", optimiser.micro_tokens)]
        {
            ensure!(value > 0, "{name} has to be at least 1");
        }
        ensure!((0.0..=1.0).contains(&optimiser.decay_share), "decay_share has to be from 0 to 1");
        for (name, value) in [
            ("muon_rate", optimiser.muon_rate),
            ("adamw_rate", optimiser.adamw_rate),
            ("clip", optimiser.clip),
        ] {
            ensure!(value.is_finite() && value > 0.0, "{name} has to be positive");
        }
        ensure!((0.0..1.0).contains(&optimiser.muon_momentum), "muon_momentum has to be from 0 to below 1");
        Ok(preset)
    }

    /// The names of those that come with the program.
    pub fn names() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, _)| *name)
    }

    /// The shape of the model.
    ///
    /// # Errors
    /// When it is not one that a forward pass could have.
    pub fn model(&self) -> Result<ModelConfig> {
        ModelConfig::from_json(&self.model.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_that_comes_with_the_program_is_valid() {
        for (name, _) in BUILT_IN {
            Preset::find(name).unwrap();
        }
    }

    #[test]
    fn a_wrong_preset_is_refused_by_the_name_of_what_is_wrong() {
        let (_, nano) = BUILT_IN[0];
        for (from, to, wrong) in [
            ("window_tokens", "windows_token", "windows_token"),
            ("mix_exponent = ", "mix_exponent = 1", "mix_exponent"),
            ("num_attention_heads = ", "num_attention_heads = -", "num_attention_heads"),
        ] {
            let error = format!("{:#}", Preset::parse(&nano.replace(from, to)).unwrap_err());
            assert!(error.contains(wrong), "{error}");
        }
        assert!(Preset::find("no such preset").is_err());
    }
}
