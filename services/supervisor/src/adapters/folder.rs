//! Adapters as folders: in the PEFT format, and in a whole model together with their base.

use crate::base;
use crate::client::{Client, segment};
use anyhow::{Context, Result, anyhow, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use model::device::Precision;
use model::fuse;
use model::hf::{ModelConfig, base_id};
use model::lora::Adapter;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// Whether and how base and adapter become one model.
#[derive(Debug, clap::Args)]
pub struct Merged {
    /// Add it to the weights of its base, and write a whole model that transformers, vLLM, llama.cpp's converter and
    /// others load.
    #[arg(long)]
    pub merged: bool,
    /// The base: the one that the server runs, found on this machine.
    #[arg(long, requires = "merged", value_name = "NAME|DIR|ORG/NAME", default_value = base::BUILT_IN)]
    base: String,
    /// f32, bf16 or f16. f32 keeps all that was learned; the others halve the size, and round it.
    #[arg(long, requires = "merged", default_value = "f32", value_parser = precision)]
    precision: Precision,
}

fn precision(name: &str) -> Result<Precision, String> {
    match name {
        "f32" => Ok(Precision::F32),
        "bf16" => Ok(Precision::Bf16),
        "f16" => Ok(Precision::F16),
        _ => Err("it is f32, bf16 or f16".into()),
    }
}

impl Merged {
    /// Writes the whole model.
    pub fn write(&self, client: &Client, adapter: &Value, dir: &Path) -> Result<()> {
        let base = base_of(client, &self.base)?;
        fuse::write(&base, &loaded(adapter, &base)?, self.precision, dir)
    }
}

/// The folder of the base that the server runs.
///
/// # Errors
/// When `name` is another one.
pub fn base_of(client: &Client, name: &str) -> Result<PathBuf> {
    let theirs = client.get("/v1/status")?["base"].clone();
    let folder = base::find(name, &base::data_dir()?)?;
    ensure!(
        theirs["id"].as_str() == Some(&*base_id(&folder)?),
        "the server runs another base than {name}: it calls it {}; give that one with --base",
        theirs["name"].as_str().unwrap_or("nameless")
    );
    Ok(folder)
}

/// An exported adapter, for the base in this folder.
pub fn loaded(adapter: &Value, base: &Path) -> Result<Adapter> {
    let folder = tempfile::tempdir().context("there is no room for the adapter")?;
    save(adapter, folder.path())?;
    Adapter::read_peft(folder.path(), &ModelConfig::load(base)?)
}

/// An adapter as the server gives it out.
pub fn fetch(client: &Client, domain: &str, generation: Option<&str>) -> Result<Value> {
    let query = generation.map(|id| format!("?generation={}", segment(id))).unwrap_or_default();
    client.get(&format!("/v1/adapters/{}/export{query}", segment(domain)))
}

/// Writes an exported adapter as a folder in the PEFT format.
pub fn save(answer: &Value, dir: &Path) -> Result<()> {
    let weights = answer["adapter_model"].as_str().unwrap_or_default();
    let weights =
        STANDARD.decode(weights).map_err(|error| anyhow!("the server's export is damaged: {error}"))?;
    let write = |name: &str, bytes: &[u8]| {
        let file = dir.join(name);
        fs::write(&file, bytes).with_context(|| format!("{} cannot be written", file.display()))
    };
    fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
    write(CONFIG_FILE, format!("{:#}\n", answer["adapter_config"]).as_bytes())?;
    write(WEIGHTS_FILE, &weights)
}

/// Reads a folder in the PEFT format for an import.
pub fn load(dir: &Path) -> Result<Value> {
    let read = |name: &str| {
        let file = dir.join(name);
        fs::read(&file).with_context(|| {
            format!(
                "{} cannot be read; an adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}",
                file.display()
            )
        })
    };
    let config: Value = serde_json::from_slice(&read(CONFIG_FILE)?)
        .with_context(|| format!("{} is not JSON", dir.join(CONFIG_FILE).display()))?;
    Ok(json!({ "adapter_config": config, "adapter_model": STANDARD.encode(read(WEIGHTS_FILE)?) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_what_is_loaded() {
        let folder = tempfile::tempdir().expect("a folder");
        let adapter = json!({"adapter_config": {"r": 16}, "adapter_model": STANDARD.encode([0, 159, 255])});
        let dir = folder.path().join("deep/adapter");
        save(&adapter, &dir).expect("saved");
        assert_eq!(load(&dir).expect("loaded"), adapter);
    }

    #[test]
    fn a_folder_without_an_adapter_is_told_what_it_lacks() {
        let folder = tempfile::tempdir().expect("a folder");
        let error = format!("{:#}", load(folder.path()).expect_err("empty"));
        assert!(error.contains(CONFIG_FILE) && error.contains(WEIGHTS_FILE), "{error}");
    }
}
