//! What a Hugging Face model folder says about its model: `config.json`, and the identity of its files.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{limits, weights};

/// The longest context in tokens that is accepted.
const POSITIONS_MAX: i64 = 1 << 26;

/// How the angles of the rotary position embedding are stretched for contexts beyond the trained one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by a factor (position interpolation, arXiv 2306.15595).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low` are divided.
        low: f64,
        /// Wavelengths below `original / high` are kept.
        high: f64,
        /// The context length that the model was first trained on, in tokens.
        original: f64,
    },
}

/// A family of models. All are Llama's blocks; they differ in details of the attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Llama 2 and 3, and whatever else is built like them.
    #[default]
    Llama,
    /// Mistral 7B and its successors: Llama with other defaults.
    Mistral,
    /// Qwen 2 and 2.5: query, key and value projections have biases.
    Qwen2,
    /// Qwen 3: queries and keys are normed, head by head.
    Qwen3,
}

impl Family {
    /// Every family that runs.
    pub const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// Its `model_type` in `config.json`.
    pub fn name(self) -> &'static str {
        ["llama", "mistral", "qwen2", "qwen3"][self as usize]
    }

    /// The class that transformers loads it with.
    fn architecture(self) -> &'static str {
        ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"][self as usize]
    }

    /// Whether query, key and value projections have biases.
    pub fn has_qkv_bias(self) -> bool {
        self == Self::Qwen2
    }

    /// Whether queries and keys go through an RMSNorm of their own, one over each head.
    pub fn has_qk_norm(self) -> bool {
        self == Self::Qwen3
    }

    /// The context limit that transformers takes where `config.json` names none.
    fn default_positions(self) -> i64 {
        [2048, 131_072, 32_768, 32_768][self as usize]
    }

    /// The head width that transformers takes where `config.json` names none.
    fn default_head_dim(self, hidden_size: i64, heads: i64) -> i64 {
        if self == Self::Qwen3 { 128 } else { hidden_size / heads }
    }
}

/// The shape of a model, read from `config.json` and checked.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// How its attention is built.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width of the feed-forward network.
    pub intermediate_size: i64,
    /// Number of transformer blocks.
    pub layers: i64,
    /// Number of query heads.
    pub heads: i64,
    /// Number of key and value heads; divides `heads`.
    pub kv_heads: i64,
    /// Width of one head; even.
    pub head_dim: i64,
    /// Number of token ids.
    pub vocab_size: i64,
    /// The context limit in tokens.
    pub max_positions: i64,
    /// The epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// The base of the rotary frequencies.
    pub rope_theta: f64,
    /// How rotary frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// Whether the output projection is the embedding matrix.
    pub tied: bool,
    /// The id that begins a sequence, where the model has one.
    pub bos: Option<u32>,
    /// The ids that end a sequence.
    pub eos: Vec<u32>,
}

/// `config.json` as written, of which we read what changes the arithmetic.
#[derive(Deserialize)]
struct RawConfig {
    model_type: String,
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    vocab_size: i64,
    max_position_embeddings: Option<i64>,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    #[serde(default = "default_activation")]
    hidden_act: String,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    sliding_window: Option<i64>,
    /// Qwen names a window without using it.
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    partial_rotary_factor: Option<f64>,
    quantization_config: Option<Value>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    #[serde(default)]
    tie_word_embeddings: bool,
    bos_token_id: Option<Value>,
    eos_token_id: Option<Value>,
}

/// Both `rope_scaling` (older transformers) and `rope_parameters` (from 5.0 on, with theta inside).
#[derive(Deserialize)]
struct RawRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

fn default_eps() -> f64 {
    1e-6
}

fn default_activation() -> String {
    "silu".into()
}

impl ModelConfig {
    /// Reads and checks `config.json` of a model folder.
    ///
    /// # Errors
    /// When the file is missing or malformed, or asks for something that is not supported; the message names it.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = limits::read_text(&path).context("is this a Hugging Face model folder?")?;
        Self::from_json(&text).with_context(|| format!("{}", path.display()))
    }

    /// Reads and checks the text of a `config.json`.
    ///
    /// # Errors
    /// As [`ModelConfig::load`].
    pub fn from_json(text: &str) -> Result<Self> {
        let raw: RawConfig = serde_json::from_str(text).context("not a model configuration")?;
        let family = family(&raw)?;
        let max_positions = raw.max_position_embeddings.unwrap_or(family.default_positions());
        refuse_unsupported(&raw, family, max_positions)?;
        let (rope_theta, rope_scaling) = rope(&raw)?;
        ensure!(raw.num_attention_heads > 0, "num_attention_heads has to be at least 1");
        let default_head_dim = family.default_head_dim(raw.hidden_size, raw.num_attention_heads);
        let config = Self {
            family,
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            layers: raw.num_hidden_layers,
            heads: raw.num_attention_heads,
            kv_heads: raw.num_key_value_heads.unwrap_or(raw.num_attention_heads),
            head_dim: raw.head_dim.unwrap_or(default_head_dim),
            vocab_size: raw.vocab_size,
            max_positions,
            rms_norm_eps: raw.rms_norm_eps,
            rope_theta,
            rope_scaling,
            tied: raw.tie_word_embeddings,
            bos: token_ids(raw.bos_token_id.as_ref()).first().copied(),
            eos: token_ids(raw.eos_token_id.as_ref()),
        };
        config.check()?;
        Ok(config)
    }

    /// Refuses shapes that no forward pass could have.
    ///
    /// # Errors
    /// The message names the number that is wrong.
    pub fn check(&self) -> Result<()> {
        for (name, value, most) in [
            ("hidden_size", self.hidden_size, 1 << 16),
            ("intermediate_size", self.intermediate_size, 1 << 18),
            ("num_hidden_layers", self.layers, 1 << 10),
            ("num_attention_heads", self.heads, 1 << 12),
            ("num_key_value_heads", self.kv_heads, 1 << 12),
            ("head_dim", self.head_dim, 1 << 12),
            ("vocab_size", self.vocab_size, 1 << 24),
            ("max_position_embeddings", self.max_positions, POSITIONS_MAX),
        ] {
            ensure!((1..=most).contains(&value), "{name} is {value}: it has to be from 1 to {most}");
        }
        ensure!(self.head_dim % 2 == 0, "head_dim is {}: rotary embedding needs an even one", self.head_dim);
        ensure!(
            self.heads % self.kv_heads == 0,
            "num_attention_heads ({}) is not a multiple of num_key_value_heads ({})",
            self.heads,
            self.kv_heads
        );
        ensure!(self.rms_norm_eps > 0.0 && self.rms_norm_eps.is_finite(), "rms_norm_eps has to be positive");
        ensure!(self.rope_theta > 1.0 && self.rope_theta.is_finite(), "rope_theta has to be above 1");
        let finite = self.rope_frequencies().iter().all(|frequency| (*frequency as f32).is_finite());
        ensure!(finite, "the RoPE scaling gives frequencies that are not finite");
        Ok(())
    }

    /// Rows of the merged query, key and value projection: `[queries, keys, values]`.
    pub fn qkv_rows(&self) -> [i64; 3] {
        [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
    }

    /// Number of weights, counting a tied embedding once.
    pub fn parameter_count(&self) -> i64 {
        let [q, k, v] = self.qkv_rows();
        let attention = (q + k + v) * self.hidden_size + q * self.hidden_size;
        let biases = if self.family.has_qkv_bias() { q + k + v } else { 0 };
        let head_norms = if self.family.has_qk_norm() { 2 * self.head_dim } else { 0 };
        let feed_forward = 3 * self.hidden_size * self.intermediate_size;
        let block = attention + biases + head_norms + feed_forward + 2 * self.hidden_size;
        let embeddings = if self.tied { 1 } else { 2 } * self.vocab_size * self.hidden_size;
        embeddings + self.layers * block + self.hidden_size
    }

    /// Inverse wavelengths of the rotary embedding, `head_dim / 2` of them, in radians per position.
    ///
    /// The formulas are those of transformers' `modeling_rope_utils` (default, linear and llama3).
    pub fn rope_frequencies(&self) -> Vec<f64> {
        let plain =
            (0..self.head_dim / 2).map(|i| self.rope_theta.powf(-2.0 * i as f64 / self.head_dim as f64));
        match self.rope_scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
            RopeScaling::Llama3 { factor, low, high, original } => plain
                .map(|f| {
                    let turns = original * f / std::f64::consts::TAU;
                    let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    (1.0 - keep) * f / factor + keep * f
                })
                .collect(),
        }
    }

    /// `config.json` of a folder that holds this model, its weights in `dtype` (`float32` or `bfloat16`).
    pub fn to_json(&self, dtype: &str) -> Value {
        let rope = match self.rope_scaling {
            RopeScaling::None => Value::Null,
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Llama3 { factor, low, high, original } => json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original as i64}),
        };
        json!({
            "architectures": [self.family.architecture()], "model_type": self.family.name(), "hidden_act": "silu",
            "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions, "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta, "rope_scaling": rope, "attention_bias": false, "mlp_bias": false,
            "sliding_window": null, "use_sliding_window": false,
            "tie_word_embeddings": self.tied, "bos_token_id": self.bos, "eos_token_id": self.eos,
            "torch_dtype": dtype,
        })
    }
}

fn family(raw: &RawConfig) -> Result<Family> {
    let known = Family::ALL.into_iter().find(|family| family.name() == raw.model_type);
    known.with_context(|| {
        let experts = raw.model_type.contains("moe") || raw.model_type == "mixtral";
        let what = if experts { " (a mixture of experts)" } else { "" };
        let names = Family::ALL.map(Family::name).join(", ");
        format!("model_type {:?}{what} is not supported: these are: {names}", raw.model_type)
    })
}

fn refuse_unsupported(raw: &RawConfig, family: Family, max_positions: i64) -> Result<()> {
    ensure!(
        matches!(raw.hidden_act.as_str(), "silu" | "swish"),
        "hidden_act {:?} is not supported: only silu is",
        raw.hidden_act
    );
    ensure!(!raw.attention_bias, "attention_bias is not supported");
    ensure!(!raw.mlp_bias, "mlp_bias is not supported");
    // A window as wide as the context hides nothing.
    let window = raw.sliding_window.filter(|window| *window < max_positions);
    let unused = matches!(family, Family::Qwen2 | Family::Qwen3) && raw.use_sliding_window != Some(true);
    ensure!(
        window.is_none() || unused,
        "sliding_window is not supported: this model sees only part of its context"
    );
    let layer_types = raw.layer_types.as_deref().unwrap_or_default();
    if let Some(other) = layer_types.iter().find(|name| *name != "full_attention") {
        bail!("layer_types {other:?} is not supported: only full_attention is");
    }
    ensure!(
        raw.quantization_config.is_none(),
        "quantization_config is not supported: use the model's f32, f16 or bf16 weights"
    );
    let rope = raw.rope_parameters.as_ref().and_then(|rope| rope.partial_rotary_factor);
    let partial = raw.partial_rotary_factor.or(rope).unwrap_or(1.0);
    ensure!(partial == 1.0, "partial_rotary_factor {partial} is not supported");
    Ok(())
}

fn rope(raw: &RawConfig) -> Result<(f64, RopeScaling)> {
    let rope = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
    let theta = rope.and_then(|rope| rope.rope_theta).or(raw.rope_theta).unwrap_or(10_000.0);
    let Some(rope) = rope else { return Ok((theta, RopeScaling::None)) };
    let need = |value: Option<f64>, name: &str| match value {
        Some(value) if value > 0.0 && value.is_finite() => Ok(value),
        _ => bail!("the RoPE scaling needs a positive {name}"),
    };
    let scaling = match rope.rope_type.as_deref().unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: need(rope.factor, "factor")? },
        "llama3" => {
            let low = need(rope.low_freq_factor, "low_freq_factor")?;
            let high = need(rope.high_freq_factor, "high_freq_factor")?;
            ensure!(high > low, "high_freq_factor has to be above low_freq_factor");
            let original = need(rope.original_max_position_embeddings, "original_max_position_embeddings")?;
            ensure!(
                original.fract() == 0.0 && original <= POSITIONS_MAX as f64,
                "original_max_position_embeddings is {original}: it has to be a whole number up to {POSITIONS_MAX}"
            );
            RopeScaling::Llama3 { factor: need(rope.factor, "factor")?, low, high, original }
        }
        other => bail!("rope_type {other:?} is not supported: only default, linear and llama3 are"),
    };
    Ok((theta, scaling))
}

/// Token ids of a field that may be absent, null, a number or a list of numbers.
pub(crate) fn token_ids(value: Option<&Value>) -> Vec<u32> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(one).collect(),
        Some(value) => one(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The identity of a base: the first 16 hexadecimal digits of BLAKE3 over `config.json`, every weight file and
/// `tokenizer.json`. Lineages of adapters belong to a base by this id.
///
/// # Errors
/// When the folder has no configuration or no weights. A missing tokenizer counts as an empty file.
pub fn base_id(dir: &Path) -> Result<String> {
    let mut files = vec![dir.join("config.json")];
    files.extend(weights::model_files(dir)?);
    let tokenizer = dir.join("tokenizer.json");
    if tokenizer.exists() {
        files.push(tokenizer);
    }
    let mut hasher = blake3::Hasher::new();
    for path in &files {
        hash_file(&mut hasher, path)?;
    }
    Ok(hasher.finalize().to_hex()[..16].to_string())
}

/// Name and length go in first, so that no two folders with their bytes cut differently can agree.
fn hash_file(hasher: &mut blake3::Hasher, path: &Path) -> Result<()> {
    let data = weights::map(path)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
    hasher.update(&(data.len() as u64).to_le_bytes()).update(&data);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(change: Value) -> Result<ModelConfig> {
        let mut all = json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 8, "vocab_size": 100});
        all.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        ModelConfig::from_json(&all.to_string())
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let c = config(json!({"eos_token_id": [2, 7]})).unwrap();
        assert_eq!((c.head_dim, c.kv_heads, c.max_positions, c.rope_theta), (8, 8, 2048, 10_000.0));
        assert_eq!((c.bos, c.eos), (None, vec![2, 7]));
    }

    #[test]
    fn a_window_that_hides_nothing_is_no_window() {
        for change in [
            json!({"model_type": "mistral", "sliding_window": null}),
            json!({"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 4096}),
            json!({"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": false,
                "layer_types": ["full_attention", "full_attention"]}),
        ] {
            assert!(config(change.clone()).is_ok(), "{change}");
        }
    }

    #[test]
    fn both_forms_of_rope_settings_agree() {
        let scaled = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_type": "llama3"});
        let mut inside = scaled.clone();
        inside["rope_theta"] = json!(500_000.0);
        let old = config(json!({"rope_theta": 500_000.0, "rope_scaling": scaled})).unwrap();
        let new = config(json!({"rope_parameters": inside})).unwrap();
        assert_eq!(old, new);
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (change, name) in [
            (json!({"model_type": "gemma3"}), "gemma3"),
            (json!({"model_type": "mixtral"}), "mixture of experts"),
            (json!({"model_type": "qwen3_moe"}), "mixture of experts"),
            (
                json!({"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": true}),
                "sliding_window",
            ),
            (
                json!({"model_type": "qwen3", "head_dim": 8, "layer_types": ["sliding_attention"]}),
                "layer_types",
            ),
            (json!({"hidden_act": "gelu"}), "gelu"),
            (json!({"attention_bias": true}), "attention_bias"),
            (json!({"model_type": "mistral", "sliding_window": 4096}), "sliding_window"),
            (json!({"quantization_config": {"bits": 4}}), "quantization_config"),
            (json!({"rope_scaling": {"type": "yarn", "factor": 2.0}}), "yarn"),
            (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
            (json!({"hidden_size": -1}), "hidden_size"),
            (json!({"num_attention_heads": 0}), "num_attention_heads"),
            (json!({"head_dim": 7}), "head_dim"),
            (json!({"rope_scaling": {"type": "linear", "factor": 1e-320}}), "not finite"),
        ] {
            let error = format!("{:#}", config(change).unwrap_err());
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn a_written_configuration_reads_back_the_same() {
        let c = config(json!({"tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
            "rope_scaling": {"type": "linear", "factor": 4.0}}))
        .unwrap();
        assert_eq!(ModelConfig::from_json(&c.to_json("float32").to_string()).unwrap(), c);
    }
}
