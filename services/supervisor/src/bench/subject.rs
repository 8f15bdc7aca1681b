//! The base that a speed is measured on: a real one, or one of random weights in a given shape.

use crate::text::Text;
use crate::{base, topology, up};
use anyhow::{Context, Result};
use infer::Language;
use kit::settings::Settings;
use model::batch::Batch;
use model::chat::ChatTemplate;
use model::llama::Base;
use model::pretrain::preset::Preset;
use model::tokenizer::Tokenizer;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What every measurement of speed takes.
#[derive(Clone, Debug, clap::Args)]
pub struct SubjectArgs {
    /// The base: `nano`, a folder in the Hugging Face form, or org/name on the hub; or a shape with random weights:
    /// `reference`, `base-100m`, `base-200m`, or a preset's file.
    #[arg(long, visible_alias = "model", value_name = "NAME|FILE.toml|DIR", default_value = base::BUILT_IN)]
    base: String,
    /// Write all figures as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Settings that differ from the built-in ones, in TOML.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A setting, as section.key=value; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl SubjectArgs {
    /// The same of another base.
    pub fn of(&self, base: &str) -> Self {
        Self { base: base.to_owned(), ..self.clone() }
    }
}

/// A base with its text side.
pub struct Subject {
    pub base: Base,
    pub language: Arc<Language>,
    pub settings: Settings,
    /// The folder whose tokenizer reads real text: nano's where the weights are random.
    dir: PathBuf,
    /// Whether they are.
    random: bool,
}

impl Subject {
    /// Loads or makes it.
    ///
    /// # Errors
    /// When there is neither such a base nor such a shape, or a setting makes no sense.
    pub fn load(args: &SubjectArgs) -> Result<Self> {
        let settings = Settings::load(args.config.as_deref(), &args.set)?;
        let placement = up::placement(&settings)?;
        let name = args.base.as_str();
        let shape = name != base::BUILT_IN && (name.ends_with(".toml") || Preset::names().any(|n| n == name));
        let dir = base::resolve(if shape { base::BUILT_IN } else { name }, &base::data_dir()?)?;
        let (base, language) = if shape {
            let config = Preset::find(name)?.model()?;
            let base = Base::random_in_16_bits(&config, 1, &placement)?;
            (base, language_of_numbers(config.vocab_size)?)
        } else {
            (Base::load(&dir, &placement)?, language(&dir)?)
        };
        let language = Language { config: base.config().clone(), ..language };
        Ok(Self { base, language: Arc::new(language), settings, dir, random: shape })
    }

    /// The folder that services load it from; none where its weights are random.
    pub fn folder(&self) -> Option<&Path> {
        (!self.random).then_some(&*self.dir)
    }

    /// The base as the services learn on it.
    ///
    /// # Errors
    /// When it cannot have what `train.products` asks for.
    pub fn to_learn(&self) -> Result<Base> {
        topology::to_learn(self.base.share(), self.settings.train.products)
    }

    /// Answers as the server gives them, whose keys and values take `cache_bytes` at most.
    ///
    /// # Errors
    /// When the base cannot be prepared for answers.
    pub fn batch(&self, cache_bytes: usize) -> Result<Batch> {
        let batch = if self.settings.infer.narrow_copy { Batch::narrow } else { Batch::new };
        batch(self.base.share(), cache_bytes)
    }

    /// Its way from text to tokens.
    ///
    /// # Errors
    /// When the tokenizer cannot be read.
    pub fn text(&self) -> Result<Arc<Text>> {
        Ok(Arc::new(Text::load(&self.dir)?))
    }

    /// What is measured, in words.
    pub fn describe(&self) -> String {
        let (weights, placement) = (self.base.parameter_count(), self.base.placement());
        format!("{:.1} million weights on {placement}", weights as f64 / 1e6)
    }

    /// What is measured, in figures.
    pub fn json(&self) -> Value {
        json!({
            "parameters": self.base.parameter_count(),
            "base_bytes": self.base.bytes_len(),
            "placement": self.base.placement().to_string(),
        })
    }

    /// A prompt of `length` tokens, another one for each `seed`.
    pub fn prompt(&self, length: usize, seed: u64) -> Vec<u32> {
        let vocabulary = self.base.config().vocab_size as u64;
        // A multiplicative generator: any sequence without a pattern does.
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state = state.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
            ((state >> 33) % vocabulary) as u32
        };
        (0..length).map(|_| next()).collect()
    }

    /// Biases under which no answer ends before it is as long as it may be.
    pub fn endless(&self) -> BTreeMap<u32, f32> {
        self.language.tokenizer.eos_ids().iter().map(|&id| (id, -100.0)).collect()
    }
}

fn language(dir: &Path) -> Result<Language> {
    let (config, tokenizer) = (model::hf::ModelConfig::load(dir)?, Arc::new(Tokenizer::load(dir)?));
    Ok(Language { config, tokenizer, template: ChatTemplate::load(dir)? })
}

/// A tokenizer whose tokens are words with a number, for random weights.
fn language_of_numbers(vocabulary: i64) -> Result<Language> {
    let words =
        (0..vocabulary).map(|id| (if id == 0 { "a".to_owned() } else { format!("w{id}") }, json!(id)));
    let words: serde_json::Map<String, Value> = words.collect();
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [],
        "model": { "type": "WordLevel", "vocab": words, "unk_token": "a" },
    });
    let dir = tempfile::tempdir().context("no folder for a tokenizer")?;
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string())?;
    let config = Preset::find("nano")?.model()?;
    let tokenizer = Arc::new(Tokenizer::load(dir.path())?);
    Ok(Language { config, tokenizer, template: ChatTemplate::load(dir.path())? })
}

/// The middle one of some figures.
pub fn median(figures: &[f64]) -> f64 {
    quantile(figures, 0.5)
}

/// The figure that this share of them does not exceed.
pub fn quantile(figures: &[f64], share: f64) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let place = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(place.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_figures_that_were_measured() {
        let figures = [5.0, 1.0, 4.0, 2.0, 3.0];
        assert_eq!(
            [0.0, 0.5, 0.8, 0.99, 1.0].map(|share| quantile(&figures, share)),
            [1.0, 3.0, 4.0, 5.0, 5.0]
        );
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn every_token_of_a_made_up_language_has_text() {
        let language = language_of_numbers(300).expect("a tokenizer");
        assert_eq!(language.tokenizer.decode(&[7, 299, 0]).expect("decoded"), "w7 w299 a");
        assert!(language.tokenizer.eos_ids().is_empty());
    }
}
