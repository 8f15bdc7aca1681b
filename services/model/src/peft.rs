//! PEFT adapter folders (`adapter_config.json` and `adapter_model.safetensors`), in and out, strictly.
//!
//! An option that would change the arithmetic and is not supported is refused by name, and so is an adapter
//! that would silently do nothing.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};
use tch::Kind;

use crate::hf::ModelConfig;
use crate::limits;
use crate::lora::{Adapter, LoraConfig, Target};
use crate::weights::{self, Weights};

impl Adapter {
    /// Reads a PEFT folder for a model of shape `model`.
    ///
    /// # Errors
    /// When an option is not supported, a tensor is missing, unexpected, of the wrong shape or not finite, or
    /// the adapter has no effect. Nothing is half loaded.
    pub fn read_peft(dir: &Path, model: &ModelConfig) -> Result<Self> {
        let path = dir.join("adapter_config.json");
        let text = limits::read_text(&path)?;
        let config = lora_config(&text).with_context(|| format!("{}", path.display()))?;
        let path = dir.join("adapter_model.safetensors");
        let mut tensors = Weights::open(std::slice::from_ref(&path))?;
        let read = || {
            let adapter =
                Self::from_parts(config, model, |name, shape| tensors.take(name, shape, Kind::Float))?;
            tensors.finish(|_| false)?;
            ensure!(adapter.has_effect(), "the adapter has no effect: every lora_B is zero");
            Ok(adapter)
        };
        read().with_context(|| format!("{}", path.display()))
    }

    /// Writes a PEFT folder that PEFT, vLLM, mistral.rs and llama.cpp's converter read.
    ///
    /// `base_name` goes to `base_model_name_or_path`. The folder is created where needed.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn write_peft(&self, dir: &Path, base_name: &str) -> Result<()> {
        std::fs::create_dir_all(dir).with_context(|| format!("{}: cannot create", dir.display()))?;
        let config = serde_json::to_string_pretty(&peft_config(self.config(), base_name))?;
        std::fs::write(dir.join("adapter_config.json"), config + "\n")
            .with_context(|| format!("{}: cannot write", dir.display()))?;
        let bytes = weights::to_bytes(&self.tensors(), "format", "pt")?;
        std::fs::write(dir.join("adapter_model.safetensors"), bytes)
            .with_context(|| format!("{}: cannot write", dir.display()))
    }
}

fn peft_config(config: &LoraConfig, base_name: &str) -> Value {
    // An integer where it can be one: some readers take no other.
    let number = |x: f64| if x.fract() == 0.0 { json!(x as i64) } else { json!(x) };
    let layers = if config.layers.is_empty() { Value::Null } else { json!(config.layers) };
    let alphas: BTreeMap<&String, Value> =
        config.alpha_pattern.iter().map(|(k, v)| (k, number(*v))).collect();
    json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name,
        "inference_mode": true, "r": config.rank, "lora_alpha": number(config.alpha), "lora_dropout": 0.0,
        "use_rslora": config.rslora, "use_dora": false, "bias": "none", "fan_in_fan_out": false,
        "init_lora_weights": true, "modules_to_save": null, "layers_to_transform": layers, "layers_pattern": null,
        "rank_pattern": config.rank_pattern, "alpha_pattern": alphas,
        "target_modules": config.targets.iter().map(|target| target.name()).collect::<Vec<_>>(),
    })
}

/// Options that are fine when absent, null, false, zero or empty, and change the arithmetic otherwise.
const UNSUPPORTED: [&str; 19] = [
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
    "layers_pattern",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "exclude_modules",
    "arrow_config",
    "corda_config",
    "eva_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "lora_ga_config",
];

fn lora_config(text: &str) -> Result<LoraConfig> {
    let value: Value = serde_json::from_str(text).context("not JSON")?;
    let options = value.as_object().context("not a JSON object")?;
    ensure!(options.get("peft_type").and_then(Value::as_str) == Some("LORA"), "peft_type has to be LORA");
    for name in UNSUPPORTED {
        let unset = match options.get(name) {
            None | Some(Value::Null | Value::Bool(false)) => true,
            Some(Value::Array(items)) => items.is_empty(),
            Some(Value::Object(items)) => items.is_empty(),
            Some(_) => false,
        };
        ensure!(unset, "{name} is not supported");
    }
    let bias = options.get("bias").and_then(Value::as_str).unwrap_or("none");
    ensure!(bias == "none", "bias {bias:?} is not supported: only \"none\" is");
    let config = LoraConfig {
        rank: options.get("r").and_then(Value::as_i64).context("r is missing or not an integer")?,
        alpha: options.get("lora_alpha").and_then(Value::as_f64).context("lora_alpha is missing")?,
        rslora: options.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
        targets: targets(options.get("target_modules"))?,
        layers: layers(options.get("layers_to_transform"))?,
        rank_pattern: pattern(options, "rank_pattern", Value::as_i64)?,
        alpha_pattern: pattern(options, "alpha_pattern", Value::as_f64)?,
    };
    config.check()?;
    Ok(config)
}

fn targets(value: Option<&Value>) -> Result<Vec<Target>> {
    let names = match value {
        Some(Value::Array(names)) => names,
        Some(Value::String(text)) => {
            bail!("target_modules {text:?} is a pattern: write the list of projections it stands for")
        }
        _ => bail!("target_modules has to be a list of projections"),
    };
    let mut targets = Vec::with_capacity(names.len());
    for name in names {
        let known = Target::ALL.into_iter().find(|target| Some(target.name()) == name.as_str());
        targets.push(known.with_context(|| {
            format!("target module {name} is not supported: only {:?} are", Target::ALL.map(Target::name))
        })?);
    }
    targets.sort();
    Ok(targets)
}

/// One layer, or a list of them.
fn layers(value: Option<&Value>) -> Result<Vec<i64>> {
    let mut layers = match value {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(layers)) => layers
            .iter()
            .map(Value::as_i64)
            .collect::<Option<_>>()
            .context("layers_to_transform: not integers")?,
        Some(layer) => vec![layer.as_i64().context("layers_to_transform has to be a list of layers")?],
    };
    layers.sort_unstable();
    Ok(layers)
}

fn pattern<T>(
    options: &Map<String, Value>,
    name: &str,
    read: fn(&Value) -> Option<T>,
) -> Result<BTreeMap<String, T>> {
    let Some(Value::Object(entries)) = options.get(name) else { return Ok(BTreeMap::new()) };
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
    let mut patterns = BTreeMap::new();
    for (key, value) in entries {
        ensure!(
            key.chars().all(plain),
            "{name}: {key:?} is a regular expression: write the names it stands for"
        );
        let value = read(value).with_context(|| format!("{name}: the value of {key:?} is not a number"))?;
        patterns.insert(key.clone(), value);
    }
    Ok(patterns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use tch::Tensor;

    fn scratch(name: &str) -> std::path::PathBuf {
        let dir = std::env::temp_dir().join(format!("engram-peft-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// A copy of the golden peft-r8 with its configuration changed.
    fn changed(name: &str, change: Value) -> Result<Adapter> {
        let dir = scratch(name);
        let source = golden::dir("peft-r8");
        let mut config: Value =
            serde_json::from_str(&std::fs::read_to_string(source.join("adapter_config.json")).unwrap())
                .unwrap();
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
        std::fs::copy(source.join("adapter_model.safetensors"), dir.join("adapter_model.safetensors"))
            .unwrap();
        let result = Adapter::read_peft(&dir, &golden::config("llama"));
        std::fs::remove_dir_all(&dir).unwrap();
        result
    }

    #[test]
    fn a_written_folder_reads_back_the_same() {
        for name in ["peft-r8", "peft-rslora", "peft-rank-pattern"] {
            let model = golden::config("llama");
            let adapter = Adapter::read_peft(&golden::dir(name), &model).unwrap();
            let dir = scratch(&format!("out-{name}"));
            adapter.write_peft(&dir, "llama").unwrap();
            let again = Adapter::read_peft(&dir, &model).unwrap();
            std::fs::remove_dir_all(&dir).unwrap();
            assert!(again.flat().equal(adapter.flat()) && again.config() == adapter.config());
        }
    }

    #[test]
    fn an_adapter_of_some_layers_says_which() {
        let model = golden::config("llama");
        let config = LoraConfig::default().in_top_layers(1, &model).unwrap();
        let adapter = Adapter::new(config, &model, 1).unwrap();
        let _ = adapter.flat().shallow_clone().fill_(0.01);
        let dir = scratch("layers");
        adapter.write_peft(&dir, "llama").unwrap();
        let written = std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
        let again = Adapter::read_peft(&dir, &model).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        let written: Value = serde_json::from_str(&written).unwrap();
        assert_eq!(written["layers_to_transform"], json!([model.layers - 1]));
        assert_eq!((again.config(), again.lowest_layer()), (adapter.config(), model.layers as usize - 1));
        assert!(again.flat().equal(adapter.flat()));
    }

    #[test]
    fn unsupported_options_are_refused_by_name() {
        for (i, (change, name)) in [
            (json!({"use_dora": true}), "use_dora"),
            (json!({"bias": "all"}), "bias"),
            (json!({"modules_to_save": ["lm_head"]}), "modules_to_save"),
            (json!({"target_modules": ["q_proj", "lm_head"]}), "lm_head"),
            (json!({"target_modules": "all-linear"}), "all-linear"),
            (json!({"target_modules": []}), "targets"),
            (json!({"layers_to_transform": ["0"]}), "layers_to_transform"),
            (json!({"layers_to_transform": [0]}), "unexpected"),
            (json!({"layers_to_transform": [0, 9]}), "layers"),
            (json!({"layers_pattern": ["h"]}), "layers_pattern"),
            (json!({"rank_pattern": {"^q.*": 4}}), "rank_pattern"),
            (json!({"peft_type": "IA3"}), "peft_type"),
            (json!({"r": "8"}), "r is missing"),
            (json!({"r": 1_000_000_000_000i64}), "rank"),
            (json!({"r": 4}), "shape"),
            (json!({"target_modules": ["q_proj"]}), "unexpected"),
            (json!({"target_modules": ["q_proj", "down_proj"]}), "missing"),
        ]
        .into_iter()
        .enumerate()
        {
            let error = format!("{:#}", changed(&format!("refuse-{i}"), change).unwrap_err());
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn adapters_without_effect_or_with_nan_are_refused() {
        let model = golden::config("llama");
        for (value, what) in [(0.0, "no effect"), (f64::NAN, "NaN")] {
            let adapter = Adapter::read_peft(&golden::dir("peft-qv"), &model).unwrap();
            for (name, mut tensor) in adapter.tensors() {
                if name.contains("lora_B") {
                    let _: Tensor = tensor.fill_(value);
                }
            }
            let dir = scratch(what);
            adapter.write_peft(&dir, "llama").unwrap();
            let error = format!("{:#}", Adapter::read_peft(&dir, &model).unwrap_err());
            std::fs::remove_dir_all(&dir).unwrap();
            assert!(error.contains(what), "{error}");
        }
    }
}
