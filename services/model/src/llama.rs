//! The forward pass of Llama and its relatives: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.
//!
//! Projections that read the same input are one matrix (q, k, v and gate, up). The same code serves training,
//! scoring and decoding; they differ in the mask, the cache and whether gradients are recorded.

use anyhow::{Context, Result, ensure};
use tch::{Kind, Tensor};

use crate::active::{ActiveAdapters, Delta, Joined};
pub use crate::base::Base;
pub use crate::cache::KvCache;
use crate::lora::Group;
use crate::quant::Matrix;

/// Which earlier tokens a token sees.
pub enum Mask {
    /// All of its row.
    Causal,
    /// Those marked true, [batch, 1, length, held + length], where a cache holds so many before: rows that hold several
    /// sequences, or several ways to go on.
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
    /// Where the tokens enter the blocks; without it by their embeddings.
    pub entry: Option<Entry>,
}

/// The residual stream as it enters a block, computed before.
#[derive(Debug)]
pub struct Entry {
    /// The block it enters.
    pub layer: usize,
    /// [batch * length, hidden_size], in the base's precision.
    pub x: Tensor,
}

impl Entry {
    /// The same, in the same memory.
    pub(crate) fn share(&self) -> Self {
        Self { layer: self.layer, x: self.x.shallow_clone() }
    }
}

impl Input {
    /// Rows of one sequence each, [batch, length], that begin at position `start`.
    pub fn rows(ids: Tensor, start: i64) -> Self {
        let length = ids.size().last().copied().unwrap_or(0);
        let positions =
            Tensor::arange_start(start, start + length, (Kind::Int64, ids.device())).expand_as(&ids);
        Self { ids, positions, mask: Mask::Causal, entry: None }
    }
}

/// What all layers of one forward pass share.
pub(crate) struct Pass {
    pub batch: i64,
    pub length: i64,
    cos: Tensor,
    sin: Tensor,
    /// Zero or minus infinity, [batch, 1, length, held + length]; none where rows see what comes before in them.
    pub mask: Option<Tensor>,
}

impl Base {
    /// The final hidden states, normed, [batch * length, hidden_size] in the base's precision.
    ///
    /// With a cache, `input` is what follows what the cache holds.
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
        let (from, mut x) = self.enter(input)?;
        for i in from..self.layers.len() {
            x = self.block(i, &x, &pass, adapters, cache.as_deref_mut())?;
        }
        if let Some(cache) = cache {
            cache.advance(pass.length);
        }
        self.rms_norm(&x, &self.norm)
    }

    /// The first block that has to be computed, and what enters it, [batch * length, hidden_size].
    pub(crate) fn enter(&self, input: &Input) -> Result<(usize, Tensor)> {
        if let Some(Entry { layer, x }) = &input.entry {
            return Ok((*layer, x.shallow_clone()));
        }
        let rows = Tensor::f_embedding(&self.embedding, &input.ids, -1, false, false)?;
        // In pre-training the embedding is f32 whatever the precision.
        Ok((0, rows.f_view([-1, self.config.hidden_size])?.f_to_kind(self.placement.kind())?))
    }

    /// What enters the blocks `depths`, in ascending order, as the base alone makes it; the number of blocks stands for what
    /// leaves the last one. [batch * length, hidden_size] each.
    pub(crate) fn streams(&self, input: &Input, depths: &[usize]) -> Result<Vec<Tensor>> {
        let pass = self.prepare(input, None)?;
        let (mut at, mut x) = self.enter(input)?;
        let mut streams = Vec::with_capacity(depths.len());
        for &depth in depths {
            while at < depth {
                x = self.block(at, &x, &pass, &ActiveAdapters::none(), None)?;
                at += 1;
            }
            streams.push(x.shallow_clone());
        }
        Ok(streams)
    }

    /// What block `i` makes of the residual stream `x`, [batch * length, hidden_size].
    pub(crate) fn block(
        &self,
        i: usize,
        x: &Tensor,
        pass: &Pass,
        adapters: &ActiveAdapters,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let layer = &self.layers[i];
        let normed = self.rms_norm(x, &layer.attention_norm)?;
        let x = x.f_add(&self.attention(i, &normed, pass, adapters, cache)?)?;
        let normed = self.rms_norm(&x, &layer.mlp_norm)?;
        let widths = [self.config.intermediate_size; 2];
        let gate_up = project(&normed, &layer.gate_up, None, &widths, Added::of(adapters, i, Group::GateUp))?;
        let inner = gate_up[0].f_silu()?.f_mul(&gate_up[1])?;
        Ok(x.f_add(&project_one(&inner, &layer.down, Added::of(adapters, i, Group::Down))?)?)
    }

    /// The logits of hidden states [n, hidden_size], as f32 [n, vocab_size].
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(hidden.f_linear(&self.head, None::<&Tensor>)?.f_to_kind(Kind::Float)?)
    }

    pub(crate) fn prepare(&self, input: &Input, cache: Option<&KvCache>) -> Result<Pass> {
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
                let shape = [batch, 1, length, held + length];
                ensure!(seen.size() == shape, "a mask has to be {shape:?}, and is {:?}", seen.size());
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
        x: &Tensor,
        pass: &Pass,
        adapters: &ActiveAdapters,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let (c, layer) = (&self.config, &self.layers[i]);
        let (query, mut key, value) = self.query_key_value(i, x, pass, adapters)?;
        let mut value = value.f_transpose(1, 2)?;
        if let Some(cache) = cache {
            (key, value) = cache.append(i, &key, &value)?;
        }
        let causal = pass.mask.is_none() && pass.length > 1;
        let mask = pass.mask.as_ref();
        let attend = |query: &Tensor, grouped: bool| {
            Tensor::f_scaled_dot_product_attention(query, &key, &value, mask, 0.0, causal, None, grouped)
        };
        let mixed = if pass.length == 1 {
            // The heads of a group see the same keys, and one token each: they are as good as tokens of one head.
            attend(&query.f_reshape([pass.batch, c.kv_heads, -1, c.head_dim])?, false)?
        } else {
            attend(&query, c.heads != c.kv_heads)?.f_transpose(1, 2)?
        };
        let mixed = mixed.f_reshape([-1, c.heads * c.head_dim])?;
        project_one(&mixed, &layer.o, Added::of(adapters, i, Group::O))
    }

    /// Queries and keys, turned to their positions, [batch, heads, length, head_dim] and [batch, kv_heads, length, head_dim],
    /// and values, [batch, length, kv_heads, head_dim].
    fn query_key_value(
        &self,
        i: usize,
        x: &Tensor,
        pass: &Pass,
        adapters: &ActiveAdapters,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let (c, layer) = (&self.config, &self.layers[i]);
        let (bias, added) = (layer.qkv_bias.as_ref(), Added::of(adapters, i, Group::Qkv));
        let heads = |x: &Tensor, count: i64| x.f_view([pass.batch, pass.length, count, c.head_dim]);
        let [q, k, v] = c.qkv_rows();
        if added.deltas.is_empty() && layer.qk_norm.is_none() {
            // Queries and keys still lie side by side, and are turned together.
            let slices = project(x, &layer.qkv, bias, &[q + k, v], added)?;
            let both = rotate(&heads(&slices[0], c.heads + c.kv_heads)?, pass)?.f_transpose(1, 2)?;
            let (query, key) = (both.f_narrow(1, 0, c.heads)?, both.f_narrow(1, c.heads, c.kv_heads)?);
            return Ok((query, key, heads(&slices[1], c.kv_heads)?));
        }
        let slices = project(x, &layer.qkv, bias, &[q, k, v], added)?;
        let (mut query, mut key) = (heads(&slices[0], c.heads)?, heads(&slices[1], c.kv_heads)?);
        if let Some([query_norm, key_norm]) = &layer.qk_norm {
            (query, key) = (self.rms_norm(&query, query_norm)?, self.rms_norm(&key, key_norm)?);
        }
        let (query, key) = (rotate(&query, pass)?.f_transpose(1, 2)?, rotate(&key, pass)?.f_transpose(1, 2)?);
        Ok((query, key, heads(&slices[2], c.kv_heads)?))
    }

    /// `x / rms(x) * weight`, in f32 whatever the precision of the base (arXiv 1910.07467). A frozen base on CUDA has its
    /// norms in its own precision, as transformers has them, and they are one kernel.
    pub(crate) fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        if weight.device().is_cuda() && weight.f_kind()? == x.f_kind()? {
            let eps = self.config.rms_norm_eps;
            return Ok(x.f_internal_fused_rms_norm(&weight.size()[..], Some(weight), eps)?.0);
        }
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

/// What is added to the product of one merged matrix.
struct Added<'a> {
    deltas: &'a [Delta],
    joined: Option<&'a Joined>,
}

impl<'a> Added<'a> {
    fn of(adapters: &'a ActiveAdapters, layer: usize, group: Group) -> Self {
        Self { deltas: adapters.deltas(layer, group), joined: adapters.of_rows(layer, group) }
    }
}

/// The merged product `x W^T + bias`, cut into slices, with what the adapters add to each.
fn project(
    x: &Tensor,
    weight: &Matrix,
    bias: Option<&Tensor>,
    widths: &[i64],
    added: Added<'_>,
) -> Result<Vec<Tensor>> {
    let mut product = weight.product(x, bias)?;
    if let Some(joined) = added.joined {
        joined.add_to(&mut product, x)?;
    }
    let mut slices = product.f_split_with_sizes(widths, -1)?;
    for delta in added.deltas {
        let low = x.f_linear(&delta.a, None::<&Tensor>)?.f_split_with_sizes(&delta.ranks, -1)?;
        for (low, (slice, b)) in low.iter().zip(&delta.parts) {
            slices[*slice] = slices[*slice].f_addmm(low, &b.f_tr()?)?;
        }
    }
    Ok(slices)
}

fn project_one(x: &Tensor, weight: &Matrix, added: Added<'_>) -> Result<Tensor> {
    let mut product = weight.product(x, None)?;
    if let Some(joined) = added.joined {
        joined.add_to(&mut product, x)?;
    }
    for delta in added.deltas {
        let low = x.f_linear(&delta.a, None::<&Tensor>)?;
        product = product.f_addmm(&low, &delta.parts[0].1.f_tr()?)?;
    }
    Ok(product)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Placement;
    use crate::golden;
    use crate::lora::Adapter;

    fn assert_logits(base: &Base, adapters: &[(&Adapter, f64)], file: &str) {
        let golden = golden::tensors(file);
        let logits = golden::logits(base, &base.activate(adapters).unwrap(), &golden["input_ids"]);
        let distance = golden::distance(&logits, &golden["logits"]);
        assert!(distance < 1e-4, "{file}: {distance}");
    }

    #[test]
    fn logits_equal_transformers() {
        for name in ["llama", "llama3-rope", "mistral", "qwen2", "qwen3"] {
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
