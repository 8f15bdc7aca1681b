//! The Llama forward pass: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.
//!
//! Projections that read the same input are one matrix (q, k, v and gate, up). The same code serves training,
//! scoring and decoding; they differ in the mask, the cache and whether gradients are recorded.

use anyhow::{Context, Result, ensure};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::Path;
use tch::{Device, Kind, Tensor};

use crate::active::{ActiveAdapters, Delta};
use crate::device::Placement;
use crate::hf::ModelConfig;
use crate::lora::{Adapter, Group};
use crate::weights::{Weights, model_files};

/// The weights of one block. Norms are f32, matrices in the base's precision, [outputs, inputs].
pub(crate) struct Layer {
    pub attention_norm: Tensor,
    pub qkv: Tensor,
    pub o: Tensor,
    pub mlp_norm: Tensor,
    pub gate_up: Tensor,
    pub down: Tensor,
}

/// A base model: its configuration and its weights, which adapters never change.
pub struct Base {
    pub(crate) config: ModelConfig,
    pub(crate) placement: Placement,
    pub(crate) embedding: Tensor,
    pub(crate) head: Tensor,
    pub(crate) norm: Tensor,
    pub(crate) layers: Vec<Layer>,
    frequencies: Tensor,
}

/// Which earlier tokens a token sees.
pub enum Mask {
    /// All of its row.
    Causal,
    /// Those marked true, [batch, 1, length, length]: rows that hold several sequences.
    Block(Tensor),
}

/// The input of a forward pass.
pub struct Input {
    /// Token ids, i64 [batch, length], each below the vocabulary size.
    pub ids: Tensor,
    /// The position of each token in its sequence, i64 [batch, length].
    pub positions: Tensor,
    /// Which tokens see which.
    pub mask: Mask,
}

impl Input {
    /// Rows of one sequence each, [batch, length], that begin at position `start`.
    pub fn rows(ids: Tensor, start: i64) -> Self {
        let length = ids.size().last().copied().unwrap_or(0);
        let positions =
            Tensor::arange_start(start, start + length, (Kind::Int64, ids.device())).expand_as(&ids);
        Self { ids, positions, mask: Mask::Causal }
    }
}

/// Keys and values of the tokens seen so far, per layer [batch, kv_heads, capacity, head_dim].
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    length: i64,
}

/// The cache grows by this many positions at a time, so that decoding copies it rarely.
const CACHE_BLOCK: i64 = 256;

impl KvCache {
    /// An empty cache for `batch` rows of `base`.
    pub fn new(base: &Base, batch: i64) -> Self {
        let shape = [batch, base.config.kv_heads, 0, base.config.head_dim];
        let empty = || Tensor::empty(shape, (base.placement.kind(), base.placement.device));
        Self { layers: base.layers.iter().map(|_| (empty(), empty())).collect(), length: 0 }
    }

    /// Number of positions held.
    pub fn len(&self) -> i64 {
        self.length
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Appends keys and values [batch, kv_heads, n, head_dim] of one layer; returns all of them.
    fn append(&mut self, layer: usize, key: &Tensor, value: &Tensor) -> (Tensor, Tensor) {
        let (added, held) = (key.size()[2], self.length);
        let (keys, values) = &mut self.layers[layer];
        for (store, new) in [(&mut *keys, key), (&mut *values, value)] {
            if store.size()[2] < held + added {
                let mut shape = store.size();
                shape[2] = (held + added + CACHE_BLOCK - 1) / CACHE_BLOCK * CACHE_BLOCK;
                let larger = Tensor::empty(&shape, (store.kind(), store.device()));
                larger.narrow(2, 0, held).copy_(&store.narrow(2, 0, held));
                *store = larger;
            }
            store.narrow(2, held, added).copy_(new);
        }
        (keys.narrow(2, 0, held + added), values.narrow(2, 0, held + added))
    }
}

/// What all layers of one forward pass share.
struct Pass {
    batch: i64,
    length: i64,
    cos: Tensor,
    sin: Tensor,
    mask: Option<Tensor>,
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
        let mut matrix = |names: &[(String, i64)], inputs: i64, kind: Kind| -> Result<Tensor> {
            let parts = names
                .iter()
                .map(|(name, rows)| give(name, &[*rows, inputs], kind))
                .collect::<Result<Vec<_>>>()?;
            let merged = if parts.len() == 1 { parts[0].shallow_clone() } else { Tensor::f_cat(&parts, 0)? };
            Ok(merged.f_to_device(device)?)
        };
        let embedding = matrix(&[("model.embed_tokens.weight".into(), v)], h, kind)?;
        let mut layers = Vec::with_capacity(config.layers as usize);
        for i in 0..config.layers {
            let name = |part: &str, rows: i64| (format!("model.layers.{i}.{part}.weight"), rows);
            let qkv = [name("self_attn.q_proj", q), name("self_attn.k_proj", k), name("self_attn.v_proj", k)];
            layers.push(Layer {
                attention_norm: Tensor::new(),
                qkv: matrix(&qkv, h, kind)?,
                o: matrix(&[name("self_attn.o_proj", h)], q, kind)?,
                mlp_norm: Tensor::new(),
                gate_up: matrix(&[name("mlp.gate_proj", f), name("mlp.up_proj", f)], h, kind)?,
                down: matrix(&[name("mlp.down_proj", h)], f, kind)?,
            });
        }
        let head = if config.tied {
            embedding.shallow_clone()
        } else {
            matrix(&[("lm_head.weight".into(), v)], h, kind)?
        };
        let mut norm =
            |name: &str| -> Result<Tensor> { Ok(give(name, &[h], Kind::Float)?.f_to_device(device)?) };
        for (i, layer) in layers.iter_mut().enumerate() {
            layer.attention_norm = norm(&format!("model.layers.{i}.input_layernorm.weight"))?;
            layer.mlp_norm = norm(&format!("model.layers.{i}.post_attention_layernorm.weight"))?;
        }
        let norm = norm("model.norm.weight")?;
        let frequencies: Vec<f32> = config.rope_frequencies().into_iter().map(|f| f as f32).collect();
        let frequencies = Tensor::from_slice(&frequencies).to_device(device);
        Ok(Self { config, placement: *placement, embedding, head, norm, layers, frequencies })
    }

    /// A base with random weights: normal with deviation 0.02, norms of one. For tests and measurements.
    ///
    /// # Errors
    /// When the configuration is impossible.
    pub fn random(config: &ModelConfig, seed: u64, placement: &Placement) -> Result<Self> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        Self::build(config.clone(), placement, |_, shape, kind| {
            if shape.len() == 1 {
                return Ok(Tensor::f_ones(shape, (kind, Device::Cpu))?);
            }
            // Box and Muller's transform, so that the values depend on no library's own generator.
            let values: Vec<f32> = (0..shape.iter().product::<i64>())
                .map(|_| {
                    let (radius, angle) = (1.0 - random.random::<f32>(), random.random::<f32>());
                    0.02 * (-2.0 * radius.ln()).sqrt() * (std::f32::consts::TAU * angle).cos()
                })
                .collect();
            Ok(Tensor::from_slice(&values).f_view(shape)?.f_to_kind(kind)?)
        })
    }

    /// A second handle on the same weights, to hand to another thread that only reads them.
    pub fn share(&self) -> Self {
        let layers = self.layers.iter().map(|layer| Layer {
            attention_norm: layer.attention_norm.shallow_clone(),
            qkv: layer.qkv.shallow_clone(),
            o: layer.o.shallow_clone(),
            mlp_norm: layer.mlp_norm.shallow_clone(),
            gate_up: layer.gate_up.shallow_clone(),
            down: layer.down.shallow_clone(),
        });
        Self {
            config: self.config.clone(),
            placement: self.placement,
            embedding: self.embedding.shallow_clone(),
            head: self.head.shallow_clone(),
            norm: self.norm.shallow_clone(),
            layers: layers.collect(),
            frequencies: self.frequencies.shallow_clone(),
        }
    }

    /// The shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where and in which precision it runs.
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// Where it runs.
    pub fn device(&self) -> Device {
        self.placement.device
    }

    /// Number of weights, counting a tied embedding once.
    pub fn parameter_count(&self) -> i64 {
        self.config.parameter_count()
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

    /// The final hidden states, normed, [batch * length, hidden_size] in the base's precision.
    ///
    /// With a cache, `input` is what follows what the cache holds; it has to be causal.
    ///
    /// # Errors
    /// When ids or positions do not fit together. Ids beyond the vocabulary are an error of libtorch.
    pub fn forward(
        &self,
        input: &Input,
        adapters: &ActiveAdapters,
        mut cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let pass = self.prepare(input, cache.as_deref())?;
        let mut x = Tensor::f_embedding(&self.embedding, &input.ids, -1, false, false)?
            .f_view([-1, self.config.hidden_size])?;
        for (i, layer) in self.layers.iter().enumerate() {
            let normed = self.rms_norm(&x, &layer.attention_norm)?;
            x = x.f_add(&self.attention(i, layer, &normed, &pass, adapters, cache.as_deref_mut())?)?;
            let normed = self.rms_norm(&x, &layer.mlp_norm)?;
            let gate_up = project(
                &normed,
                &layer.gate_up,
                &[self.config.intermediate_size; 2],
                adapters.deltas(i, Group::GateUp),
            )?;
            let inner = gate_up[0].f_silu()?.f_mul(&gate_up[1])?;
            x = x.f_add(&project_one(&inner, &layer.down, adapters.deltas(i, Group::Down))?)?;
        }
        if let Some(cache) = cache {
            cache.length += pass.length;
        }
        self.rms_norm(&x, &self.norm)
    }

    /// The logits of hidden states [n, hidden_size], as f32 [n, vocab_size].
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(hidden.f_linear(&self.head, None::<&Tensor>)?.f_to_kind(Kind::Float)?)
    }

    fn prepare(&self, input: &Input, cache: Option<&KvCache>) -> Result<Pass> {
        let (batch, length) = input.ids.size2().context("token ids have to be [batch, length]")?;
        ensure!(input.positions.size() == [batch, length], "positions and ids differ in shape");
        let held = cache.map_or(0, KvCache::len);
        let kind = self.placement.kind();
        let angles = input.positions.f_to_kind(Kind::Float)?.f_unsqueeze(-1)?.f_mul(&self.frequencies)?;
        let (cos, sin) = (angles.f_cos()?, angles.f_sin()?);
        let cos = Tensor::f_cat(&[&cos, &cos], -1)?.f_unsqueeze(2)?.f_to_kind(kind)?;
        let sin = Tensor::f_cat(&[&sin.f_neg()?, &sin], -1)?.f_unsqueeze(2)?.f_to_kind(kind)?;
        let mask = match &input.mask {
            Mask::Block(seen) => {
                ensure!(held == 0, "a cache takes rows of one sequence each");
                Some(additive(seen, kind)?)
            }
            Mask::Causal if held > 0 && length > 1 => {
                let seen =
                    Tensor::f_ones([length, held + length], (Kind::Bool, self.device()))?.f_tril(held)?;
                Some(additive(&seen, kind)?)
            }
            Mask::Causal => None,
        };
        Ok(Pass { batch, length, cos, sin, mask })
    }

    fn attention(
        &self,
        i: usize,
        layer: &Layer,
        x: &Tensor,
        pass: &Pass,
        adapters: &ActiveAdapters,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let c = &self.config;
        let qkv = project(x, &layer.qkv, &c.qkv_rows(), adapters.deltas(i, Group::Qkv))?;
        let heads = |x: &Tensor, count: i64| x.f_view([pass.batch, pass.length, count, c.head_dim]);
        let query = rotate(&heads(&qkv[0], c.heads)?, pass)?.f_transpose(1, 2)?;
        let mut key = rotate(&heads(&qkv[1], c.kv_heads)?, pass)?.f_transpose(1, 2)?;
        let mut value = heads(&qkv[2], c.kv_heads)?.f_transpose(1, 2)?;
        if let Some(cache) = cache {
            (key, value) = cache.append(i, &key, &value);
        }
        let causal = pass.mask.is_none() && pass.length > 1;
        let grouped = c.heads != c.kv_heads;
        let mask = pass.mask.as_ref();
        let mixed =
            Tensor::f_scaled_dot_product_attention(&query, &key, &value, mask, 0.0, causal, None, grouped)?;
        let mixed = mixed.f_transpose(1, 2)?.f_reshape([-1, c.heads * c.head_dim])?;
        project_one(&mixed, &layer.o, adapters.deltas(i, Group::O))
    }

    /// `x / rms(x) * weight`, in f32 whatever the precision of the base (arXiv 1910.07467).
    fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let wide = x.f_to_kind(Kind::Float)?;
        let mean = wide.f_square()?.f_mean_dim(-1i64, true, None::<Kind>)?;
        let inverse = mean.f_add_scalar(self.config.rms_norm_eps)?.f_rsqrt()?;
        Ok(wide.f_mul(&inverse)?.f_mul(weight)?.f_to_kind(self.placement.kind())?)
    }
}

/// A mask of zeros and minus infinity, made once so that no layer converts booleans again.
fn additive(seen: &Tensor, kind: Kind) -> Result<Tensor> {
    let zeros = Tensor::f_zeros(seen.size(), (kind, seen.device()))?;
    Ok(zeros.f_masked_fill(&seen.f_logical_not()?, f64::NEG_INFINITY)?)
}

/// Rotary embedding (arXiv 2104.09864) in Hugging Face's layout, where coordinate i turns with i + head_dim / 2.
///
/// Rolling by half a head brings each coordinate's partner to its place; the sine carries the partner's sign.
fn rotate(x: &Tensor, pass: &Pass) -> Result<Tensor> {
    let half = x.size()[3] / 2;
    Ok(x.f_mul(&pass.cos)?.f_addcmul(&x.f_roll([half], [-1])?, &pass.sin)?)
}

/// The merged product `x W^T`, cut into slices, with what the adapters add to each.
fn project(x: &Tensor, weight: &Tensor, widths: &[i64], deltas: &[Delta]) -> Result<Vec<Tensor>> {
    let mut slices = x.f_linear(weight, None::<&Tensor>)?.f_split_with_sizes(widths, -1)?;
    for delta in deltas {
        let low = x.f_linear(&delta.a, None::<&Tensor>)?.f_split_with_sizes(&delta.ranks, -1)?;
        for (low, (slice, b)) in low.iter().zip(&delta.parts) {
            slices[*slice] = slices[*slice].f_addmm(low, &b.f_tr()?)?;
        }
    }
    Ok(slices)
}

fn project_one(x: &Tensor, weight: &Tensor, deltas: &[Delta]) -> Result<Tensor> {
    let mut product = x.f_linear(weight, None::<&Tensor>)?;
    for delta in deltas {
        let low = x.f_linear(&delta.a, None::<&Tensor>)?;
        product = product.f_addmm(&low, &delta.parts[0].1.f_tr()?)?;
    }
    Ok(product)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    fn assert_logits(base: &Base, adapters: &[(&Adapter, f64)], file: &str) {
        let golden = golden::tensors(file);
        let logits = golden::logits(base, &base.activate(adapters).unwrap(), &golden["input_ids"]);
        let distance = golden::distance(&logits, &golden["logits"]);
        assert!(distance < 1e-4, "{file}: {distance}");
    }

    #[test]
    fn logits_equal_transformers() {
        for name in ["llama", "llama3-rope"] {
            assert_logits(&golden::base(name), &[], &format!("{name}/golden.safetensors"));
        }
    }

    #[test]
    fn logits_of_the_trained_checkpoint_equal_transformers() {
        let Some(dir) = golden::shared("models/stories260K") else { return };
        let base = Base::load(&dir, &Placement::CPU_F32).unwrap();
        assert_eq!(base.parameter_count(), 260_032);
        assert_logits(&base, &[], "stories260K.safetensors");
    }

    #[test]
    fn logits_with_adapters_equal_peft() {
        let base = golden::base("llama");
        for name in ["peft-r8", "peft-qv", "peft-rslora", "peft-rank-pattern"] {
            assert_logits(&base, &[(&golden::adapter(name), 1.0)], &format!("{name}/golden.safetensors"));
        }
    }

    #[test]
    fn two_weighted_adapters_equal_their_merge() {
        let (one, two) = (golden::adapter("peft-r8"), golden::adapter("merge-second"));
        assert_logits(&golden::base("llama"), &[(&one, 0.7), (&two, 0.3)], "merge-cat.safetensors");
    }

    #[test]
    fn a_cache_gives_what_recomputing_gives() {
        let base = golden::base("llama");
        let adapter = golden::adapter("peft-r8");
        let active = base.activate(&[(&adapter, 1.0)]).unwrap();
        let ids = &golden::tensors("peft-r8/golden.safetensors")["input_ids"];
        let whole = golden::logits(&base, &active, ids);
        let _guard = tch::no_grad_guard();
        let mut cache = KvCache::new(&base, 2);
        let mut parts = Vec::new();
        for (start, count) in [(0, 9), (9, 1), (10, 15), (25, 1), (26, 6)] {
            let input = Input::rows(ids.narrow(1, start, count), start);
            let hidden = base.forward(&input, &active, Some(&mut cache)).unwrap();
            parts.push(base.logits(&hidden).unwrap().view([2, count, -1]));
        }
        assert_eq!(cache.len(), 32);
        assert!(golden::distance(&Tensor::cat(&parts, 1), &whole) < 1e-4);
    }

    #[test]
    fn an_adapter_of_another_model_is_refused() {
        let base = golden::base("llama3-rope");
        let error = base.activate(&[(&golden::adapter("peft-r8"), 1.0)]).unwrap_err();
        assert!(error.to_string().contains("does not fit"), "{error}");
    }

    #[test]
    fn half_precisions_stay_near() {
        let golden = golden::tensors("llama/golden.safetensors");
        for precision in [crate::device::Precision::Bf16, crate::device::Precision::F16] {
            let base =
                Base::load(&golden::dir("llama"), &Placement { precision, ..Placement::CPU_F32 }).unwrap();
            let logits = golden::logits(&base, &ActiveAdapters::none(), &golden["input_ids"]);
            let relative =
                golden::distance(&logits, &golden["logits"]) / golden["logits"].abs().max().double_value(&[]);
            assert!(relative < 0.05, "{precision:?}: {relative}");
        }
    }
}
