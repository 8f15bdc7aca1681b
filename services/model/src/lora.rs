//! LoRA adapters (arXiv 2106.09685): a low-rank change `scale * B A` of chosen projections.
//!
//! All weights of an adapter lie in one flat f32 vector, and every A and B is a view of it. Clipping, AdamW and
//! EWC are then single operations on one tensor, and autograd returns one gradient.

use std::collections::BTreeMap;

use anyhow::{Result, bail, ensure};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

pub use crate::active::ActiveAdapters;
use crate::hf::ModelConfig;
use crate::weights;

/// The largest rank that is accepted.
pub const RANK_MAX: i64 = 512;

/// A projection that an adapter can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Target {
    /// Query projection.
    #[serde(rename = "q_proj", alias = "q")]
    Q,
    /// Key projection.
    #[serde(rename = "k_proj", alias = "k")]
    K,
    /// Value projection.
    #[serde(rename = "v_proj", alias = "v")]
    V,
    /// Output projection of the attention.
    #[serde(rename = "o_proj", alias = "o")]
    O,
    /// Gate projection of the feed-forward network.
    #[serde(rename = "gate_proj", alias = "gate")]
    Gate,
    /// Up projection of the feed-forward network.
    #[serde(rename = "up_proj", alias = "up")]
    Up,
    /// Down projection of the feed-forward network.
    #[serde(rename = "down_proj", alias = "down")]
    Down,
}

impl Target {
    /// Every target, in the order in which a block applies them.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Its name in model files and PEFT configurations.
    pub fn name(self) -> &'static str {
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"][self as usize]
    }

    /// The merged matrix it is part of, and its place in there.
    pub(crate) fn place(self) -> (Group, usize) {
        match self {
            Self::Q => (Group::Qkv, 0),
            Self::K => (Group::Qkv, 1),
            Self::V => (Group::Qkv, 2),
            Self::O => (Group::O, 0),
            Self::Gate => (Group::GateUp, 0),
            Self::Up => (Group::GateUp, 1),
            Self::Down => (Group::Down, 0),
        }
    }

    /// Its full module name in layer `layer` of a Hugging Face model.
    pub fn module(self, layer: i64) -> String {
        let part = if self <= Self::O { "self_attn" } else { "mlp" };
        format!("model.layers.{layer}.{part}.{}", self.name())
    }

    /// Input and output width.
    pub(crate) fn shape(self, model: &ModelConfig) -> (i64, i64) {
        let [q, k, v] = model.qkv_rows();
        match self {
            Self::Q => (model.hidden_size, q),
            Self::K => (model.hidden_size, k),
            Self::V => (model.hidden_size, v),
            Self::O => (q, model.hidden_size),
            Self::Gate | Self::Up => (model.hidden_size, model.intermediate_size),
            Self::Down => (model.intermediate_size, model.hidden_size),
        }
    }
}

/// A matrix of the base: projections that read the same input are one product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    Qkv,
    O,
    GateUp,
    Down,
}

/// The hyper-parameters of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank r of `B A`.
    pub rank: i64,
    /// The change is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Scale by `alpha / sqrt(rank)` instead (arXiv 2312.03732).
    pub rslora: bool,
    /// The projections that are changed.
    pub targets: Vec<Target>,
    /// The layers that are changed, ascending; empty for all. PEFT's `layers_to_transform`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<i64>,
    /// Ranks of modules that differ, by the end of the module's name, as PEFT has them.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, i64>,
    /// Alphas of modules that differ, by the end of the module's name, as PEFT has them.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f64>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            rslora: false,
            targets: vec![Target::Q, Target::K, Target::V, Target::O, Target::Gate, Target::Up],
            layers: Vec::new(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

impl LoraConfig {
    /// Refuses what no adapter could have.
    ///
    /// # Errors
    /// The message names the setting.
    pub fn check(&self) -> Result<()> {
        for rank in self.rank_pattern.values().chain([&self.rank]) {
            ensure!((1..=RANK_MAX).contains(rank), "LoRA rank {rank}: it has to be from 1 to {RANK_MAX}");
        }
        for alpha in self.alpha_pattern.values().chain([&self.alpha]) {
            ensure!(*alpha > 0.0 && alpha.is_finite(), "LoRA alpha {alpha}: it has to be positive");
        }
        ensure!(!self.targets.is_empty(), "LoRA targets: at least one projection is needed");
        let mut targets = self.targets.clone();
        targets.sort();
        targets.dedup();
        ensure!(targets.len() == self.targets.len(), "LoRA targets: a projection is listed twice");
        let ascending = self.layers.is_sorted_by(|a, b| a < b) && self.layers.first().is_none_or(|&i| i >= 0);
        ensure!(ascending, "LoRA layers: they have to be listed from 0 up, each once");
        Ok(())
    }

    /// Refuses what no adapter of `model` could have.
    fn check_for(&self, model: &ModelConfig) -> Result<()> {
        self.check()?;
        let beyond = self.layers.iter().find(|&&layer| layer >= model.layers);
        ensure!(beyond.is_none(), "LoRA layers: the model has {} of them, counted from 0", model.layers);
        Ok(())
    }

    /// The same for the uppermost `count` layers of `model` alone; 0 is for all.
    ///
    /// # Errors
    /// When the model has fewer.
    pub fn in_top_layers(self, count: i64, model: &ModelConfig) -> Result<Self> {
        ensure!((0..=model.layers).contains(&count), "the base has {} layers, not {count}", model.layers);
        let layers = if count == 0 || count == model.layers {
            Vec::new()
        } else {
            (model.layers - count..model.layers).collect()
        };
        Ok(Self { layers, ..self })
    }

    /// Number of weights of such an adapter for `model`.
    pub fn parameter_count(&self, model: &ModelConfig) -> i64 {
        layout(self, model).1
    }

    /// The projections that such an adapter of `model` changes.
    pub(crate) fn places(&self, model: &ModelConfig) -> Vec<(i64, Target)> {
        layout(self, model).0.iter().map(|module| (module.layer, module.target)).collect()
    }

    fn rank_and_scale(&self, module: &str) -> (i64, f64) {
        let rank = matching(&self.rank_pattern, module).unwrap_or(self.rank);
        let alpha = matching(&self.alpha_pattern, module).unwrap_or(self.alpha);
        let divisor = if self.rslora { (rank as f64).sqrt() } else { rank as f64 };
        (rank, alpha / divisor)
    }
}

/// PEFT applies a pattern to the modules whose name is it, or ends in a dot and it.
fn matching<T: Copy>(patterns: &BTreeMap<String, T>, module: &str) -> Option<T> {
    let applies = |pattern: &str| {
        module.strip_suffix(pattern).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    patterns.iter().find(|(pattern, _)| applies(pattern)).map(|(_, value)| *value)
}

/// Where one module's A and B lie in the flat vector.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Module {
    pub layer: i64,
    pub target: Target,
    pub rank: i64,
    pub scale: f64,
    pub inputs: i64,
    pub outputs: i64,
    a: i64,
    b: i64,
}

/// The modules of an adapter in the order of the flat vector: layer by layer, group by group; in a group first
/// all A, so that they form one matrix, then all B.
fn layout(config: &LoraConfig, model: &ModelConfig) -> (Vec<Module>, i64) {
    let (mut modules, mut offset) = (Vec::new(), 0);
    for layer in (0..model.layers).filter(|i| config.layers.is_empty() || config.layers.contains(i)) {
        for group in [Group::Qkv, Group::O, Group::GateUp, Group::Down] {
            let first = modules.len();
            for target in
                Target::ALL.into_iter().filter(|t| t.place().0 == group && config.targets.contains(t))
            {
                let (rank, scale) = config.rank_and_scale(&target.module(layer));
                let (inputs, outputs) = target.shape(model);
                modules.push(Module { layer, target, rank, scale, inputs, outputs, a: offset, b: 0 });
                offset += rank * inputs;
            }
            for module in &mut modules[first..] {
                module.b = offset;
                offset += module.outputs * module.rank;
            }
        }
    }
    (modules, offset)
}

/// An adapter's weights. They are f32 on any device and in any precision of the base.
#[derive(Debug)]
pub struct Adapter {
    config: LoraConfig,
    pub(crate) modules: Vec<Module>,
    flat: Tensor,
}

const METADATA: &str = "lora_config";

impl Adapter {
    /// A fresh adapter for `model`, which changes nothing yet: A is uniform in `±1/sqrt(inputs)` (PEFT's
    /// Kaiming initialisation), B is zero. Equal seeds give equal weights on every machine.
    ///
    /// # Errors
    /// When the configuration is impossible.
    pub fn new(config: LoraConfig, model: &ModelConfig, seed: u64) -> Result<Self> {
        config.check_for(model)?;
        let (modules, len) = layout(&config, model);
        let mut values = vec![0f32; len as usize];
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        for module in &modules {
            let bound = 1.0 / (module.inputs as f32).sqrt();
            for value in &mut values[module.a as usize..(module.a + module.rank * module.inputs) as usize] {
                *value = (random.random::<f32>() * 2.0 - 1.0) * bound;
            }
        }
        Ok(Self { config, modules, flat: Tensor::from_slice(&values) })
    }

    /// Builds an adapter from named tensors: `read(name, shape)` gives each A and B by its PEFT name.
    pub(crate) fn from_parts(
        config: LoraConfig,
        model: &ModelConfig,
        mut read: impl FnMut(&str, &[i64]) -> Result<Tensor>,
    ) -> Result<Self> {
        config.check_for(model)?;
        let (modules, len) = layout(&config, model);
        let flat = Tensor::f_zeros([len], (Kind::Float, Device::Cpu))?;
        let adapter = Self { config, modules, flat };
        for (name, mut view) in adapter.tensors() {
            view.f_copy_(&read(&name, &view.size())?)?;
        }
        Ok(adapter)
    }

    /// Refuses a model whose projections have other shapes than this adapter's.
    ///
    /// # Errors
    /// Names the first module that differs.
    pub fn check_model(&self, model: &ModelConfig) -> Result<()> {
        let (modules, _) = layout(&self.config, model);
        ensure!(
            modules.len() == self.modules.len(),
            "the adapter was made for a model with another number of layers"
        );
        for (theirs, ours) in modules.iter().zip(&self.modules) {
            ensure!(
                theirs == ours,
                "the adapter does not fit the model at {}",
                ours.target.module(ours.layer)
            );
        }
        Ok(())
    }

    /// The hyper-parameters.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// All weights as one f32 vector. The order is private to this version; files carry names.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// The same adapter with other weights, which are not copied.
    ///
    /// # Errors
    /// When `flat` is not an f32 vector of this adapter's length.
    pub fn with_flat(&self, flat: Tensor) -> Result<Self> {
        ensure!(
            flat.size() == self.flat.size() && flat.f_kind()? == Kind::Float,
            "an adapter of {} weights cannot hold {:?} of {:?}",
            self.flat.numel(),
            flat.size(),
            flat.f_kind()?
        );
        Ok(Self { config: self.config.clone(), modules: self.modules.clone(), flat })
    }

    /// The lowest layer that is changed: below it the base is all there is.
    pub fn lowest_layer(&self) -> usize {
        self.modules.first().map_or(0, |module| module.layer as usize)
    }

    /// Where the weights of one layer begin in the flat vector, and how many they are.
    pub(crate) fn range_of_layer(&self, layer: i64) -> (i64, i64) {
        let of_layer = || self.modules.iter().filter(|module| module.layer == layer);
        let start = of_layer().map(|module| module.a).min().unwrap_or(0);
        (start, of_layer().map(|module| module.rank * (module.inputs + module.outputs)).sum())
    }

    /// A second handle on the same weights, to hand to another thread.
    pub fn share(&self) -> Self {
        Self { config: self.config.clone(), modules: self.modules.clone(), flat: self.flat.shallow_clone() }
    }

    /// A copy with its own weights.
    pub fn deep_copy(&self) -> Self {
        Self { config: self.config.clone(), modules: self.modules.clone(), flat: self.flat.detach().copy() }
    }

    /// The adapter with its weights on `device`.
    pub fn to_device(&self, device: Device) -> Self {
        Self { flat: self.flat.to_device(device), ..self.share() }
    }

    /// Number of weights.
    pub fn parameter_count(&self) -> i64 {
        self.flat.numel() as i64
    }

    /// Bytes that the weights take in memory.
    pub fn bytes_len(&self) -> usize {
        self.flat.numel() * 4
    }

    /// Refuses an adapter with NaN or infinity in it.
    ///
    /// # Errors
    /// Says so.
    pub fn check_finite(&self) -> Result<()> {
        ensure!(weights::is_finite(&self.flat)?, "the adapter holds NaN or infinity");
        Ok(())
    }

    /// Whether it changes the model at all: some B is not zero.
    pub fn has_effect(&self) -> bool {
        self.tensors()
            .iter()
            .any(|(name, tensor)| name.contains("lora_B") && tensor.count_nonzero(None).int64_value(&[]) > 0)
    }

    /// Every A [rank, inputs] and B [outputs, rank] as a view of the flat vector, under its PEFT name.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = Vec::with_capacity(2 * self.modules.len());
        for module in &self.modules {
            let name = format!("base_model.model.{}", module.target.module(module.layer));
            let (a, b) = self.factors(module);
            tensors.push((format!("{name}.lora_A.weight"), a));
            tensors.push((format!("{name}.lora_B.weight"), b));
        }
        tensors
    }

    /// A [rank, inputs] and B [outputs, rank] of one module, as views.
    pub(crate) fn factors(&self, module: &Module) -> (Tensor, Tensor) {
        let flat = self.flat.detach();
        let view = |offset, rows, columns| flat.narrow(0, offset, rows * columns).view([rows, columns]);
        (view(module.a, module.rank, module.inputs), view(module.b, module.outputs, module.rank))
    }

    /// A safetensors file with PEFT's names, and the configuration in its metadata. Equal adapters give equal
    /// bytes, so that a generation can be named by their hash.
    ///
    /// # Errors
    /// Only those of copying the weights to the CPU.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        weights::to_bytes(&self.tensors(), METADATA, &serde_json::to_string(&self.config)?)
    }

    /// Reads what [`Adapter::to_bytes`] wrote.
    ///
    /// # Errors
    /// When the bytes are damaged, belong to a model of another shape, or hold NaN or infinity.
    pub fn from_bytes(bytes: &[u8], model: &ModelConfig) -> Result<Self> {
        let (mut tensors, config) = weights::from_bytes(bytes, METADATA)?;
        let adapter = Self::from_parts(serde_json::from_str(&config)?, model, |name, shape| {
            let Some(tensor) = tensors.remove(name) else { bail!("tensor {name} is missing") };
            ensure!(
                tensor.size() == shape,
                "tensor {name} has shape {:?}, expected {shape:?}",
                tensor.size()
            );
            ensure!(tensor.f_kind()? == Kind::Float, "tensor {name} is not f32");
            Ok(tensor)
        })?;
        if let Some(name) = tensors.keys().next() {
            bail!("tensor {name} belongs to no module of this adapter");
        }
        adapter.check_finite()?;
        Ok(adapter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    #[test]
    fn equal_seeds_give_equal_bytes_and_others_do_not() {
        let model = golden::config("llama");
        let bytes = |seed| Adapter::new(LoraConfig::default(), &model, seed).unwrap().to_bytes().unwrap();
        assert_eq!(bytes(1), bytes(1));
        assert_ne!(bytes(1), bytes(2));
    }

    #[test]
    fn bytes_read_back_and_damage_is_refused() {
        let model = golden::config("llama");
        let config =
            LoraConfig { rank: 3, rank_pattern: [("q_proj".into(), 2)].into(), ..LoraConfig::default() };
        let adapter = Adapter::new(config, &model, 7).unwrap();
        let mut bytes = adapter.to_bytes().unwrap();
        let read = Adapter::from_bytes(&bytes, &model).unwrap();
        assert!(read.flat().equal(adapter.flat()) && read.config() == adapter.config());
        assert!(!read.has_effect(), "a fresh adapter changes nothing");

        let other = ModelConfig { layers: 1, ..model.clone() };
        assert!(Adapter::from_bytes(&bytes, &other).is_err());
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        assert!(Adapter::from_bytes(&bytes, &model).unwrap_err().to_string().contains("NaN"));
        for cut in [0, 7, 8, 100, end - 1] {
            assert!(Adapter::from_bytes(&bytes[..cut], &model).is_err());
        }
    }

    #[test]
    fn impossible_configurations_are_refused() {
        let model = golden::config("llama");
        for config in [
            LoraConfig { rank: 0, ..LoraConfig::default() },
            LoraConfig { rank: 1 << 40, ..LoraConfig::default() },
            LoraConfig { alpha: f64::NAN, ..LoraConfig::default() },
            LoraConfig { targets: vec![], ..LoraConfig::default() },
            LoraConfig { targets: vec![Target::Q, Target::Q], ..LoraConfig::default() },
            LoraConfig { layers: vec![-1], ..LoraConfig::default() },
            LoraConfig { layers: vec![1, 0], ..LoraConfig::default() },
            LoraConfig { layers: vec![model.layers], ..LoraConfig::default() },
        ] {
            assert!(Adapter::new(config, &model, 0).is_err());
        }
    }
}
