//! Gradients of an adapter on the CPU with a backward pass written by hand.
//!
//! Autograd spends on what lies between the products of a block about half as long as on the products, and several times
//! as long where the processor multiplies bf16 itself: dozens of passes over activations, each with its own copy. Here
//! each part between two products is one pass, slices of merged products are changed in place, the residual is added by
//! the product itself, and nothing is computed below the lowest adapted layer's own gradient.

mod kernels;
mod rows;

use anyhow::{Result, ensure};
use half::bf16;
use tch::{Device, Kind, Tensor};

use crate::active::{ActiveAdapters, Delta};
use crate::cpu::vector::Level;
use crate::device::{Placement, Precision};
use crate::distillation::Teacher;
use crate::hf::ModelConfig;
use crate::llama::{Base, Pass};
use crate::lora::{Adapter, Group, Module};
use crate::loss::{self, SequenceScore};
use crate::pack::Packed;
use crate::quant::Quantisation;
use rows::{Element, Rows, each};

/// Whether the backward pass by hand knows this base.
pub(crate) fn applies(base: &Base) -> bool {
    applies_to(base.config(), &base.placement())
}

/// Whether it knows bases of this shape in this form: dense, on the CPU, in f32 or bf16, without norms over heads.
pub(crate) fn applies_to(config: &ModelConfig, placement: &Placement) -> bool {
    placement.device == Device::Cpu
        && placement.precision != Precision::F16
        && placement.quantisation == Quantisation::None
        && !config.family.has_qk_norm()
}

/// Scores, and the gradient of the adapter's flat vector, of `weight * sum of NLL`, or of a student's loss.
///
/// # Errors
/// As [`loss::gradient`].
pub(crate) fn adapter_gradient(
    base: &Base,
    adapter: &Adapter,
    packed: &Packed,
    weight: f64,
    teacher: Option<&Teacher>,
) -> Result<(Vec<SequenceScore>, Tensor)> {
    ensure!(packed.learned_tokens() > 0, "nothing to learn: no sequence has a learned token");
    let _guard = tch::no_grad_guard();
    match base.placement().kind() {
        Kind::BFloat16 => Work::<bf16>::new(base, adapter, packed)?.run(packed, weight, teacher),
        _ => Work::<f32>::new(base, adapter, packed)?.run(packed, weight, teacher),
    }
}

/// Puts in the place of logits [rows, vocabulary] the gradient of `weight * sum of NLL`; returns the NLL of each row.
pub(crate) fn cross_entropy(logits: &Tensor, targets: &Tensor, weight: f64) -> Result<Tensor> {
    match logits.f_kind()? {
        Kind::BFloat16 => cross_entropy_in::<bf16>(logits, targets, weight),
        _ => cross_entropy_in::<f32>(logits, targets, weight),
    }
}

fn cross_entropy_in<W: Element>(logits: &Tensor, targets: &Tensor, weight: f64) -> Result<Tensor> {
    let (level, vocabulary) = (Level::best(), logits.size()[1]);
    let targets: Vec<i64> = targets.f_flatten(0, -1)?.try_into()?;
    let nll = Tensor::f_zeros([targets.len() as i64], (Kind::Float, Device::Cpu))?;
    let (rows, out) = (Rows::<W>::of(logits, vocabulary)?, Rows::<f32>::of(&nll, 1)?);
    ensure!(
        rows.len() == targets.len() && targets.iter().all(|&target| (0..vocabulary).contains(&target)),
        "targets do not fit the logits"
    );
    each(targets.len(), |i| {
        let mut room = vec![0f32; vocabulary as usize];
        // SAFETY: row i is that of this call alone.
        #[allow(unsafe_code)]
        let (row, nll) = unsafe { (rows.get_mut(i), out.get_mut(i)) };
        kernels::cross_entropy(level, row, targets[i] as usize, weight as f32, &mut room, &mut nll[0]);
    });
    Ok(nll)
}

/// A norm's output, and what its gradient needs.
struct Normed {
    x: Tensor,
    out: Tensor,
    /// f32 [rows].
    inverse: Tensor,
}

/// What the forward pass of one block leaves for its backward pass. Rows are tokens.
struct Kept {
    attention_norm: Normed,
    /// Queries and keys turned, [rows, query rows + key rows + value rows].
    qkv: Tensor,
    low_qkv: Option<Tensor>,
    attended: Attended,
    low_o: Option<Tensor>,
    mlp_norm: Normed,
    gate_up: Tensor,
    low_gate_up: Option<Tensor>,
}

struct Attended {
    /// [batch, heads, length, head_dim].
    out: Tensor,
    log_sums: Tensor,
    /// The same as rows.
    mixed: Tensor,
}

/// One micro-batch.
struct Work<'a, W> {
    base: &'a Base,
    adapter: &'a Adapter,
    active: ActiveAdapters,
    pass: Pass,
    /// Where the blocks are entered, and with what.
    entry: (usize, Tensor),
    /// Cosines, then sines of each token's angles, f32 [rows, head_dim].
    turns: Tensor,
    /// An adapter whose weights are the gradient.
    gradient: Adapter,
    level: Level,
    format: std::marker::PhantomData<W>,
}

impl<'a, W: Element> Work<'a, W> {
    fn new(base: &'a Base, adapter: &'a Adapter, packed: &Packed) -> Result<Self> {
        let input = packed.input(Device::Cpu);
        let angles = input.positions.f_to_kind(Kind::Float)?.f_view([-1, 1])?.f_mul(&base.frequencies)?;
        Ok(Self {
            base,
            adapter,
            active: base.activate(&[(adapter, 1.0)])?,
            pass: base.prepare(&input, None)?,
            entry: base.enter(&input)?,
            turns: Tensor::f_cat(&[angles.f_cos()?, angles.f_sin()?], 1)?,
            gradient: adapter.with_flat(adapter.flat().f_zeros_like()?)?,
            level: Level::best(),
            format: std::marker::PhantomData,
        })
    }

    fn run(
        self,
        packed: &Packed,
        weight: f64,
        teacher: Option<&Teacher>,
    ) -> Result<(Vec<SequenceScore>, Tensor)> {
        let (from, mut x) = (self.entry.0, self.entry.1.f_contiguous()?);
        let lowest = self.adapter.lowest_layer();
        ensure!(from <= lowest, "a parameter takes no part in the loss");
        for i in from..lowest {
            x = self.base.block(i, &x, &self.pass, &ActiveAdapters::none(), None)?;
        }
        let mut kept = Vec::new();
        for i in from.max(lowest)..self.base.layers.len() {
            let (next, of_block) = self.forward(i, x)?;
            kept.push((i, of_block));
            x = next;
        }
        let places = packed.targets(Device::Cpu).0;
        let top = self.norm(x.f_index_select(0, &places)?, &self.base.norm)?;
        let opinion = teacher.map(|teacher| teacher.opinion(packed)).transpose()?.flatten();
        let above = loss::above(self.base, &top.out, packed, weight, opinion.as_ref())?;
        let of_rows = top.x.f_zeros_like()?;
        self.norm_backward(&top, &self.base.norm, &above.hidden, &of_rows)?;
        // Each place predicts one token.
        let mut gradient = x.f_zeros_like()?.f_index_copy_(0, &places, &of_rows)?;
        drop((x, top));
        while let Some((i, of_block)) = kept.pop() {
            gradient = self.backward(i, of_block, gradient, i > lowest)?;
        }
        Ok((above.scores, self.gradient.flat().shallow_clone()))
    }

    /// What block `i` makes of `x`, and what has to be kept of it.
    fn forward(&self, i: usize, x: Tensor) -> Result<(Tensor, Kept)> {
        let (c, layer) = (&self.base.config, &self.base.layers[i]);
        let attention_norm = self.norm(x, &layer.attention_norm)?;
        let mut qkv = layer.qkv.product(&attention_norm.out, layer.qkv_bias.as_ref())?;
        let low_qkv = self.add_low_rank(i, Group::Qkv, &attention_norm.out, &mut qkv, &c.qkv_rows())?;
        self.turn(&qkv, 1.0)?;
        let attended = self.attend(&qkv)?;
        let mut middle = attention_norm.x.f_addmm(&attended.mixed, &layer.o.dense()?.f_tr()?)?;
        let low_o = self.add_low_rank(i, Group::O, &attended.mixed, &mut middle, &[c.hidden_size])?;
        let mlp_norm = self.norm(middle, &layer.mlp_norm)?;
        let mut gate_up = layer.gate_up.product(&mlp_norm.out, None)?;
        let widths = [c.intermediate_size; 2];
        let low_gate_up = self.add_low_rank(i, Group::GateUp, &mlp_norm.out, &mut gate_up, &widths)?;
        let inner = self.gate(&gate_up)?;
        let mut out = mlp_norm.x.f_addmm(&inner, &layer.down.dense()?.f_tr()?)?;
        self.add_low_rank(i, Group::Down, &inner, &mut out, &[c.hidden_size])?;
        let kept = Kept { attention_norm, qkv, low_qkv, attended, low_o, mlp_norm, gate_up, low_gate_up };
        Ok((out, kept))
    }

    /// The gradient of block `i`'s input, where `above` is that of its output; of the residual alone where the rest is not
    /// `wanted`. Those of the adapter go where they belong.
    fn backward(&self, i: usize, kept: Kept, above: Tensor, wanted: bool) -> Result<Tensor> {
        let (c, layer) = (&self.base.config, &self.base.layers[i]);
        let hidden = [c.hidden_size];
        let mut of_inner = above.f_mm(&layer.down.dense()?)?;
        if self.delta(i, Group::Down).is_some() {
            let inner = self.gate(&kept.gate_up)?;
            self.low_rank_backward(i, Group::Down, &inner, None, &above, &hidden, Some(&mut of_inner))?;
        }
        let of_gate_up = kept.gate_up;
        self.gate_backward(&of_gate_up, &of_inner)?;
        let mut of_normed = of_gate_up.f_mm(&layer.gate_up.dense()?)?;
        let (widths, low) = ([c.intermediate_size; 2], kept.low_gate_up.as_ref());
        let normed = &kept.mlp_norm.out;
        self.low_rank_backward(i, Group::GateUp, normed, low, &of_gate_up, &widths, Some(&mut of_normed))?;
        self.norm_backward(&kept.mlp_norm, &layer.mlp_norm, &of_normed, &above)?;

        let mut of_mixed = above.f_mm(&layer.o.dense()?)?;
        let (mixed, low) = (&kept.attended.mixed, kept.low_o.as_ref());
        self.low_rank_backward(i, Group::O, mixed, low, &above, &hidden, Some(&mut of_mixed))?;
        let of_qkv = self.attend_backward(&kept.qkv, &kept.attended, &of_mixed)?;
        self.turn(&of_qkv, -1.0)?;
        let (normed, low) = (&kept.attention_norm.out, kept.low_qkv.as_ref());
        let mut of_normed = if wanted { Some(of_qkv.f_mm(&layer.qkv.dense()?)?) } else { None };
        self.low_rank_backward(i, Group::Qkv, normed, low, &of_qkv, &c.qkv_rows(), of_normed.as_mut())?;
        if let Some(of_normed) = of_normed {
            self.norm_backward(&kept.attention_norm, &layer.attention_norm, &of_normed, &above)?;
        }
        Ok(above)
    }

    /// What the adapter adds to one matrix.
    fn delta(&self, layer: usize, group: Group) -> Option<&Delta> {
        self.active.deltas(layer, group).first()
    }

    /// Adds to `product`, in place, what the adapter adds to it; returns `x A^T`.
    fn add_low_rank(
        &self,
        layer: usize,
        group: Group,
        x: &Tensor,
        product: &mut Tensor,
        widths: &[i64],
    ) -> Result<Option<Tensor>> {
        let Some(delta) = self.delta(layer, group) else { return Ok(None) };
        let low = x.f_linear(&delta.a, None::<&Tensor>)?;
        for part in parts(delta, widths) {
            let of_part = low.f_narrow(1, part.rank, part.ranks)?;
            let _ = product.f_narrow(1, part.column, part.columns)?.f_addmm_(&of_part, &part.b.f_tr()?)?;
        }
        Ok(Some(low))
    }

    /// Writes the gradients of one matrix's A and B, and adds to `of_x` what goes through them to the input `x`. `low` is
    /// `x A^T`, where it was kept; `above` the gradient of the product.
    #[allow(clippy::too_many_arguments)]
    fn low_rank_backward(
        &self,
        layer: usize,
        group: Group,
        x: &Tensor,
        low: Option<&Tensor>,
        above: &Tensor,
        widths: &[i64],
        of_x: Option<&mut Tensor>,
    ) -> Result<()> {
        let Some(delta) = self.delta(layer, group) else { return Ok(()) };
        let low = match low {
            Some(low) => low.shallow_clone(),
            None => x.f_linear(&delta.a, None::<&Tensor>)?,
        };
        let of_low = low.f_empty_like()?;
        let modules: Vec<&Module> = self.modules(layer, group).collect();
        for (part, module) in parts(delta, widths).zip(&modules) {
            let above = above.f_narrow(1, part.column, part.columns)?;
            of_low.f_narrow(1, part.rank, part.ranks)?.f_copy_(&above.f_mm(part.b)?)?;
            let of_b = above.f_tr()?.f_mm(&low.f_narrow(1, part.rank, part.ranks)?)?;
            // B was scaled before it was used.
            self.gradient.factors(module).1.f_copy_(&of_b.f_mul_scalar(module.scale)?)?;
        }
        let of_a = of_low.f_tr()?.f_mm(x)?;
        let mut rank = 0;
        for module in modules {
            self.gradient.factors(module).0.f_copy_(&of_a.f_narrow(0, rank, module.rank)?)?;
            rank += module.rank;
        }
        if let Some(of_x) = of_x {
            let _ = of_x.f_addmm_(&of_low, &delta.a)?;
        }
        Ok(())
    }

    fn modules(&self, layer: usize, group: Group) -> impl Iterator<Item = &Module> {
        let of = move |module: &&Module| module.layer == layer as i64 && module.target.place().0 == group;
        self.adapter.modules.iter().filter(of)
    }

    /// Queries, keys and values, [batch, heads, length, head_dim]; a group's heads share one of `kv_heads`.
    fn heads(&self, qkv: &Tensor) -> Result<[Tensor; 3]> {
        let c = &self.base.config;
        let [q, k, v] = c.qkv_rows();
        let part = |start, rows: i64| -> Result<Tensor> {
            let heads = [self.pass.batch, self.pass.length, rows / c.head_dim, c.head_dim];
            let heads = qkv.f_narrow(1, start, rows)?.f_view(heads)?.f_transpose(1, 2)?;
            if rows == q {
                return Ok(heads);
            }
            let all = [self.pass.batch, c.kv_heads, c.heads / c.kv_heads, self.pass.length, c.head_dim];
            let each = heads.f_unsqueeze(2)?.f_expand(all, false)?;
            Ok(each.f_reshape([self.pass.batch, c.heads, self.pass.length, c.head_dim])?)
        };
        Ok([part(0, q)?, part(q, k)?, part(q + k, v)?])
    }

    fn is_causal(&self) -> bool {
        self.pass.mask.is_none() && self.pass.length > 1
    }

    fn attend(&self, qkv: &Tensor) -> Result<Attended> {
        let [query, key, value] = self.heads(qkv)?;
        let (out, log_sums) = Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu(
            &query,
            &key,
            &value,
            0.0,
            self.is_causal(),
            self.pass.mask.as_ref(),
            None,
        )?;
        let rows = [-1, query.size()[1] * query.size()[3]];
        let mixed = out.f_transpose(1, 2)?.f_reshape(rows)?;
        Ok(Attended { out, log_sums, mixed })
    }

    /// The gradient of turned queries and keys, and of values, as rows.
    fn attend_backward(&self, qkv: &Tensor, attended: &Attended, of_mixed: &Tensor) -> Result<Tensor> {
        let c = &self.base.config;
        let [query, key, value] = self.heads(qkv)?;
        let (batch, length) = (self.pass.batch, self.pass.length);
        let above = of_mixed.f_view([batch, length, c.heads, c.head_dim])?.f_transpose(1, 2)?;
        let (of_query, of_key, of_value) =
            Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu_backward(
                &above,
                &query,
                &key,
                &value,
                &attended.out,
                &attended.log_sums,
                0.0,
                self.is_causal(),
                self.pass.mask.as_ref(),
                None,
            )?;
        let out = qkv.f_empty_like()?;
        let mut start = 0;
        for (gradient, rows) in [of_query, of_key, of_value].iter().zip(c.qkv_rows()) {
            let heads = rows / c.head_dim;
            let shared = gradient.f_view([batch, heads, -1, length, c.head_dim])?;
            let gradient = match shared.size()[2] {
                1 => shared.f_squeeze_dim(2)?,
                _ => shared.f_sum_dim_intlist(2i64, false, None)?,
            };
            let place = out.f_narrow(1, start, rows)?.f_view([batch, length, heads, c.head_dim])?;
            place.f_transpose(1, 2)?.f_copy_(&gradient)?;
            start += rows;
        }
        Ok(out)
    }

    fn norm(&self, x: Tensor, weight: &Tensor) -> Result<Normed> {
        let (width, epsilon) = (x.size()[1], self.base.config.rms_norm_eps as f32);
        let (x, out) = (x.f_contiguous()?, x.f_empty_like()?);
        let inverse = Tensor::f_empty([x.size()[0]], (Kind::Float, Device::Cpu))?;
        let (rows, outs) = (Rows::<W>::of(&x, width)?, Rows::<W>::of(&out, width)?);
        let (inverses, weights) = (Rows::<f32>::of(&inverse, 1)?, Rows::<f32>::of(weight, width)?);
        let level = self.level;
        each(rows.len(), |i| {
            // SAFETY: row i is that of this call alone.
            #[allow(unsafe_code)]
            let (out, inverse) = unsafe { (outs.get_mut(i), inverses.get_mut(i)) };
            kernels::norm(level, rows.get(i), weights.get(0), epsilon, out, &mut inverse[0]);
        });
        Ok(Normed { x, out, inverse })
    }

    /// Adds to `into` the gradient of a norm's input, where `above` is that of its output.
    fn norm_backward(&self, normed: &Normed, weight: &Tensor, above: &Tensor, into: &Tensor) -> Result<()> {
        let width = normed.x.size()[1];
        let (rows, above) = (Rows::<W>::of(&normed.x, width)?, Rows::<W>::of(&above.f_contiguous()?, width)?);
        let (inverses, weights) = (Rows::<f32>::of(&normed.inverse, 1)?, Rows::<f32>::of(weight, width)?);
        let into = Rows::<W>::of(into, width)?;
        let level = self.level;
        each(rows.len(), |i| {
            // SAFETY: row i is that of this call alone.
            #[allow(unsafe_code)]
            let into = unsafe { into.get_mut(i) };
            let inverse = inverses.get(i)[0];
            kernels::norm_backward(level, rows.get(i), weights.get(0), inverse, above.get(i), into);
        });
        Ok(())
    }

    /// Turns queries and keys in place to their positions, or with a negative `sign` back.
    fn turn(&self, qkv: &Tensor, sign: f32) -> Result<()> {
        let (c, [q, k, v]) = (&self.base.config, self.base.config.qkv_rows());
        let width = c.head_dim as usize;
        let (rows, turns) = (Rows::<W>::of(qkv, q + k + v)?, Rows::<f32>::of(&self.turns, c.head_dim)?);
        let level = self.level;
        each(rows.len(), |i| {
            // SAFETY: row i is that of this call alone.
            #[allow(unsafe_code)]
            let row = unsafe { rows.get_mut(i) };
            let (cos, sin) = turns.get(i).split_at(width / 2);
            for head in row[..(q + k) as usize].chunks_exact_mut(width) {
                kernels::turn(level, head, cos, sin, sign);
            }
        });
        Ok(())
    }

    fn gate(&self, gate_up: &Tensor) -> Result<Tensor> {
        let (rows, width) = (gate_up.size()[0], self.base.config.intermediate_size);
        let out = Tensor::f_empty([rows, width], (W::KIND, Device::Cpu))?;
        let (rows, outs) = (Rows::<W>::of(gate_up, 2 * width)?, Rows::<W>::of(&out, width)?);
        let level = self.level;
        each(rows.len(), |i| {
            // SAFETY: row i is that of this call alone.
            #[allow(unsafe_code)]
            let out = unsafe { outs.get_mut(i) };
            kernels::gate(level, rows.get(i), out);
        });
        Ok(out)
    }

    /// Puts the gradients of gate and up in their place.
    fn gate_backward(&self, gate_up: &Tensor, above: &Tensor) -> Result<()> {
        let width = self.base.config.intermediate_size;
        let (rows, above) = (Rows::<W>::of(gate_up, 2 * width)?, Rows::<W>::of(above, width)?);
        let level = self.level;
        each(rows.len(), |i| {
            // SAFETY: row i is that of this call alone.
            #[allow(unsafe_code)]
            let row = unsafe { rows.get_mut(i) };
            kernels::gate_backward(level, row, above.get(i));
        });
        Ok(())
    }
}

/// One B of a merged matrix, and where it applies.
struct Part<'a> {
    rank: i64,
    ranks: i64,
    column: i64,
    columns: i64,
    b: &'a Tensor,
}

fn parts<'a>(delta: &'a Delta, widths: &'a [i64]) -> impl Iterator<Item = Part<'a>> {
    let mut rank = 0;
    delta.ranks.iter().zip(&delta.parts).map(move |(&ranks, (slice, b))| {
        let column = widths[..*slice].iter().sum();
        let part = Part { rank, ranks, column, columns: widths[*slice], b };
        rank += ranks;
        part
    })
}

#[cfg(test)]
mod tests;
