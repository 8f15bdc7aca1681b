//! A base model in memory: its weights, and how they come there.

use anyhow::{Context, Result, ensure};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::Path;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

use crate::active::ActiveAdapters;
use crate::cpu::team::Alone;
use crate::device::Placement;
use crate::hf::ModelConfig;
use crate::lora::Adapter;
use crate::manual::{self, BaseCodes};
use crate::quant::{Matrix, Quantisation};
use crate::weights::{Weights, model_files};

/// The weights of one block. Norms are f32 (on CUDA in the base's precision), matrices [outputs, inputs] in the base's
/// precision or quantised.
pub(crate) struct Layer {
    pub attention_norm: Tensor,
    pub qkv: Matrix,
    /// Qwen 2: [query rows + key rows + value rows], in the base's precision.
    pub qkv_bias: Option<Tensor>,
    /// Qwen 3: weights of the norms over each query head and each key head, [head_dim].
    pub qk_norm: Option<[Tensor; 2]>,
    pub o: Matrix,
    pub mlp_norm: Tensor,
    pub gate_up: Matrix,
    pub down: Matrix,
}

impl Layer {
    fn share(&self) -> Self {
        Self {
            attention_norm: self.attention_norm.shallow_clone(),
            qkv: self.qkv.share(),
            qkv_bias: self.qkv_bias.as_ref().map(Tensor::shallow_clone),
            qk_norm: self.qk_norm.as_ref().map(|norms| norms.each_ref().map(Tensor::shallow_clone)),
            o: self.o.share(),
            mlp_norm: self.mlp_norm.shallow_clone(),
            gate_up: self.gate_up.share(),
            down: self.down.share(),
        }
    }

    /// Its matrices, in the order in which a block applies them.
    pub fn matrices(&self) -> [&Matrix; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }
}

/// A base model: its configuration and its weights, which adapters never change.
pub struct Base {
    pub(crate) config: ModelConfig,
    pub(crate) placement: Placement,
    pub(crate) embedding: Tensor,
    pub(crate) head: Tensor,
    pub(crate) norm: Tensor,
    pub(crate) layers: Vec<Layer>,
    pub(crate) frequencies: Tensor,
    /// For whoever learns.
    pub(crate) codes: Option<Arc<BaseCodes>>,
}

impl Base {
    /// Loads a Hugging Face folder, strictly: every expected tensor with its shape, finite, and no other.
    ///
    /// # Errors
    /// Names the file and the tensor or setting that is wrong.
    pub fn load(dir: &Path, placement: &Placement) -> Result<Self> {
        let config = ModelConfig::load(dir)?;
        let mut weights = Weights::open(&model_files(dir)?)?;
        Self::from_weights(config, &mut weights, placement)
            .and_then(|base| {
                // Old checkpoints store the rotary frequencies, and some a copy of a tied embedding.
                let tied = base.config.tied;
                weights.finish(|name| {
                    name.ends_with("rotary_emb.inv_freq") || (tied && name == "lm_head.weight")
                })?;
                Ok(base)
            })
            .with_context(|| format!("{}", dir.display()))
    }

    fn from_weights(config: ModelConfig, weights: &mut Weights, placement: &Placement) -> Result<Self> {
        Self::build(config, placement, |name, shape, kind| weights.take(name, shape, kind))
    }

    /// Builds a base from whatever gives tensors by their Hugging Face name, shape and kind.
    pub(crate) fn build(
        config: ModelConfig,
        placement: &Placement,
        mut give: impl FnMut(&str, &[i64], Kind) -> Result<Tensor>,
    ) -> Result<Self> {
        config.check()?;
        let (h, f, v) = (config.hidden_size, config.intermediate_size, config.vocab_size);
        let [q, k, _] = config.qkv_rows();
        let (kind, device) = (placement.kind(), placement.device);
        let mut merged = |names: &[(String, i64)], inputs: i64| -> Result<Tensor> {
            let parts = names
                .iter()
                .map(|(name, rows)| give(&format!("{name}.weight"), &[*rows, inputs], kind))
                .collect::<Result<Vec<_>>>()?;
            let merged = if parts.len() == 1 { parts[0].shallow_clone() } else { Tensor::f_cat(&parts, 0)? };
            Ok(merged.f_to_device(device)?)
        };
        let embedding = merged(&[("model.embed_tokens".into(), v)], h)?;
        let mut layers = Vec::with_capacity(config.layers as usize);
        for i in 0..config.layers {
            let mut matrix = |parts: &[(&str, i64)], inputs: i64| {
                let name = |(part, rows): &(&str, i64)| (format!("model.layers.{i}.{part}"), *rows);
                let names: Vec<_> = parts.iter().map(name).collect();
                Matrix::new(merged(&names, inputs)?, placement.quantisation)
            };
            layers.push(Layer {
                attention_norm: Tensor::new(),
                qkv: matrix(&[("self_attn.q_proj", q), ("self_attn.k_proj", k), ("self_attn.v_proj", k)], h)?,
                qkv_bias: None,
                qk_norm: None,
                o: matrix(&[("self_attn.o_proj", h)], q)?,
                mlp_norm: Tensor::new(),
                gate_up: matrix(&[("mlp.gate_proj", f), ("mlp.up_proj", f)], h)?,
                down: matrix(&[("mlp.down_proj", h)], f)?,
            });
        }
        let head = if config.tied { embedding.shallow_clone() } else { merged(&[("lm_head".into(), v)], h)? };
        // One kernel takes a norm where its weights are in the precision of the rest.
        let of_norms = if device.is_cuda() { kind } else { Kind::Float };
        let mut vector = |name: &str, length: i64, kind: Kind| -> Result<Tensor> {
            Ok(give(name, &[length], kind)?.f_to_device(device)?)
        };
        for (i, layer) in layers.iter_mut().enumerate() {
            let name = |part: &str| format!("model.layers.{i}.{part}");
            layer.attention_norm = vector(&name("input_layernorm.weight"), h, of_norms)?;
            layer.mlp_norm = vector(&name("post_attention_layernorm.weight"), h, of_norms)?;
            if config.family.has_qkv_bias() {
                let mut bias =
                    |part: &str, rows| vector(&name(&format!("self_attn.{part}.bias")), rows, kind);
                let parts = [bias("q_proj", q)?, bias("k_proj", k)?, bias("v_proj", k)?];
                layer.qkv_bias = Some(Tensor::f_cat(&parts, 0)?);
            }
            if config.family.has_qk_norm() {
                let mut norm = |part: &str| {
                    vector(&name(&format!("self_attn.{part}.weight")), config.head_dim, of_norms)
                };
                layer.qk_norm = Some([norm("q_norm")?, norm("k_norm")?]);
            }
        }
        let norm = vector("model.norm.weight", h, of_norms)?;
        let frequencies: Vec<f32> = config.rope_frequencies().into_iter().map(|f| f as f32).collect();
        let frequencies = Tensor::from_slice(&frequencies).to_device(device);
        Ok(Self { config, placement: *placement, embedding, head, norm, layers, frequencies, codes: None })
    }

    /// A base with random weights: normal with deviation 0.02, norms of one. For tests and measurements.
    ///
    /// # Errors
    /// When the configuration is impossible.
    pub fn random(config: &ModelConfig, seed: u64, placement: &Placement) -> Result<Self> {
        Self::drawn(config, seed, placement, |weight| weight)
    }

    /// The same with weights that are numbers of 16 bits, as those of most checkpoints are.
    ///
    /// # Errors
    /// As for [`Base::random`].
    pub fn random_in_16_bits(config: &ModelConfig, seed: u64, placement: &Placement) -> Result<Self> {
        Self::drawn(config, seed, placement, |weight| half::bf16::from_f32(weight).to_f32())
    }

    fn drawn(
        config: &ModelConfig,
        seed: u64,
        placement: &Placement,
        stored: impl Fn(f32) -> f32,
    ) -> Result<Self> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        Self::build(config.clone(), placement, |name, shape, kind| {
            if shape.len() == 1 {
                let value = if name.ends_with(".bias") { 0.0 } else { 1.0 };
                return Ok(Tensor::f_full(shape, value, (kind, Device::Cpu))?);
            }
            // Box and Muller's transform, so that the values depend on no library's own generator.
            let values: Vec<f32> = (0..shape.iter().product::<i64>())
                .map(|_| {
                    let (radius, angle) = (1.0 - random.random::<f32>(), random.random::<f32>());
                    stored(0.02 * (-2.0 * radius.ln()).sqrt() * (std::f32::consts::TAU * angle).cos())
                })
                .collect();
            Ok(Tensor::from_slice(&values).f_view(shape)?.f_to_kind(kind)?)
        })
    }

    /// A second handle on the same weights, to hand to another thread that only reads them.
    pub fn share(&self) -> Self {
        Self {
            config: self.config.clone(),
            placement: self.placement,
            embedding: self.embedding.shallow_clone(),
            head: self.head.shallow_clone(),
            norm: self.norm.shallow_clone(),
            layers: self.layers.iter().map(Layer::share).collect(),
            frequencies: self.frequencies.shallow_clone(),
            codes: self.codes.clone(),
        }
    }

    /// Whether learning on a base of this shape in this form is faster with codes: see [`Base::with_codes`]. Not where its weights
    /// have 4 bits, since who asks for these is short of memory.
    pub fn is_faster_with_codes(config: &ModelConfig, placement: &Placement) -> bool {
        manual::int8_pays()
            && placement.quantisation != Quantisation::Nf4
            && manual::applies_in_codes(config, placement)
    }

    /// Where this one has codes, libtorch does next to nothing of a step: the processor is for what we do ourselves.
    pub(crate) fn alone(&self) -> Option<Alone> {
        self.codes.as_ref().and_then(|_| Alone::begin())
    }

    /// Whether this one has codes.
    pub fn has_codes(&self) -> bool {
        self.codes.is_some()
    }

    /// Checks that a base of this shape in this form can have codes.
    ///
    /// # Errors
    /// When the processor has no instruction for them, or bases of this kind are not learned on by hand.
    pub fn check_codes(config: &ModelConfig, placement: &Placement) -> Result<()> {
        ensure!(manual::is_int8_possible(), "this processor has no AVX2, which products in 8 bits need");
        ensure!(
            manual::applies_in_codes(config, placement),
            "products in 8 bits are for bases on the CPU in f32 or bf16 without norms over heads"
        );
        Ok(())
    }

    /// The same with its matrices and its head in 8 bits beside them, a byte a weight, which whoever learns multiplies with: gradients, and
    /// the hidden states of a former self, are then those of the rounded base. Answers and the gate take a base without.
    ///
    /// # Errors
    /// As for [`Base::check_codes`].
    pub fn with_codes(mut self) -> Result<Self> {
        Self::check_codes(&self.config, &self.placement)?;
        self.codes = Some(Arc::new(BaseCodes::new(self.layers.iter().map(Layer::matrices), &self.head)?));
        Ok(self)
    }

    /// The shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Whether its matrices are quantised.
    pub fn is_quantised(&self) -> bool {
        self.layers.iter().flat_map(Layer::matrices).any(Matrix::is_quantised)
    }

    /// Where and in which precision it runs.
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// Where it runs.
    pub fn device(&self) -> Device {
        self.placement.device
    }

    /// Whether the processor computes, and no device.
    pub fn is_on_cpu(&self) -> bool {
        self.device() == Device::Cpu
    }

    /// Number of weights, counting a tied embedding once.
    pub fn parameter_count(&self) -> i64 {
        self.config.parameter_count()
    }

    /// Bytes that its weights take in memory.
    pub fn bytes_len(&self) -> usize {
        let dense = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
        let head = if self.config.tied { 0 } else { dense(&self.head) };
        let matrices = self.layers.iter().flat_map(Layer::matrices).map(Matrix::bytes_len).sum::<usize>();
        dense(&self.embedding) + head + matrices
    }

    /// Makes adapters ready for forward passes on this base.
    ///
    /// # Errors
    /// When an adapter belongs to a model of another shape, or a weight is not finite.
    pub fn activate(&self, adapters: &[(&Adapter, f64)]) -> Result<ActiveAdapters> {
        for (adapter, _) in adapters {
            adapter.check_model(&self.config)?;
        }
        ActiveAdapters::new(adapters, self.placement.kind(), self.placement.device)
    }
}
