//! Whom a benchmark of speed times: a model that is there, or a shape with random weights.

use crate::base;
use crate::text::Text;
use crate::up;
use anyhow::{Context, Result};
use kit::settings::Settings;
use model::hf::ModelConfig;
use model::llama::Base;
use model::pretrain::preset::Preset;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The options that name it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The built-in `nano`; a preset (`reference`, `base-100m`, `base-200m`) or a preset's FILE.toml, with random
    /// weights and nano's tokenizer; a folder in the Hugging Face form; or org/name on the Hugging Face hub.
    #[arg(long, value_name = "NAME|FILE.toml|DIR", default_value = base::BUILT_IN)]
    model: String,
    /// Settings that differ from the built-in ones, in TOML.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A setting, as section.key=value; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// A base that is ready to compute, with the settings it is used under.
pub struct Subject {
    /// What it is called.
    pub name: String,
    /// The base.
    pub base: Base,
    /// Its text side: nano's where its weights are random.
    pub text: Arc<Text>,
    /// The settings.
    pub settings: Settings,
}

impl Args {
    /// Loads it, or draws it from a fixed seed.
    ///
    /// # Errors
    /// When a setting is unknown, or there is no such model.
    pub fn load(&self) -> Result<Subject> {
        let settings = Settings::load(self.config.as_deref(), &self.set)?;
        let placement = up::placement(&settings)?;
        let data = base::data_dir()?;
        let (base, text) = match self.random()? {
            Some(shape) => {
                let text = Text::load(&base::resolve(base::BUILT_IN, &data)?)?;
                (Base::random(&shape, 1, &placement)?, text)
            }
            None => {
                let dir = base::resolve(&self.model, &data)?;
                (Base::load(&dir, &placement)?, Text::load(&dir)?)
            }
        };
        Ok(Subject { name: self.model.clone(), base, text: Arc::new(text), settings })
    }

    /// The shape of a preset; none where the model has weights of its own.
    fn random(&self) -> Result<Option<ModelConfig>> {
        let preset = Preset::names().any(|name| name == self.model) && self.model != base::BUILT_IN;
        let file = Path::new(&self.model).extension().is_some_and(|extension| extension == "toml");
        if !preset && !file {
            return Ok(None);
        }
        let preset = Preset::find(&self.model).with_context(|| format!("--model {}", self.model))?;
        Ok(Some(preset.model()?))
    }
}
