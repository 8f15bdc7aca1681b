//! What learning computes on a CPU, written by hand: an adapter's gradient, the hidden states that scores are made of, and the
//! optimiser's step.
//!
//! Autograd spends on what lies between the products of a block about half as long as on the products, and several times
//! as long where the processor multiplies bf16 itself: dozens of passes over activations, each with its own copy. Here
//! each part between two products of the base is one pass, slices of merged products are changed in place, the residual is added
//! by the product itself, a sequence is not multiplied with its neighbours, and nothing is computed below the lowest adapted
//! layer's own gradient.

mod attention;
mod forward;
mod head;
mod int8;
mod kernels;
mod low_rank;
mod pairs;
mod rows;
mod tiles;

use anyhow::{Result, ensure};
use half::bf16;
use tch::{Device, Kind, Tensor};

use crate::active::ActiveAdapters;
use crate::cpu::vector::Level;
use crate::device::{Placement, Precision};
use crate::distillation::Teacher;
use crate::hf::ModelConfig;
use crate::llama::Base;
use crate::lora::{Adapter, Group, Module};
use crate::loss::{self, SequenceScore};
use crate::optim::{AdamWConfig, Counters};
use crate::pack::Packed;
use crate::quant::Quantisation;
pub(crate) use head::above_in_place;
pub(crate) use int8::{BaseCodes, is_possible as is_int8_possible, pays as int8_pays};

use attention::attend_backward;
use forward::{Forward, Kept, Normed};
use low_rank::Given;
use rows::{Element, Rows, each, each_alone};

/// Which way a product goes.
#[derive(Clone, Copy)]
pub(crate) enum Way {
    /// From inputs to outputs: it adds up over inputs.
    Forward,
    /// From the gradient of outputs to that of inputs: it adds up over outputs.
    Backward,
}

/// Whether the backward pass by hand knows this base.
pub(crate) fn applies(base: &Base) -> bool {
    base.codes.is_some() || applies_to(base.config(), &base.placement())
}

/// Whether it knows bases of this shape in this form as they are: dense, on the CPU, in f32 or bf16, without norms over heads.
pub(crate) fn applies_to(config: &ModelConfig, placement: &Placement) -> bool {
    placement.quantisation == Quantisation::None && applies_in_codes(config, placement)
}

/// Whether it knows them with codes beside their matrices: also those that are quantised.
pub(crate) fn applies_in_codes(config: &ModelConfig, placement: &Placement) -> bool {
    placement.device == Device::Cpu && placement.precision != Precision::F16 && !config.family.has_qk_norm()
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
    let (_guard, _alone) = (tch::no_grad_guard(), base.alone());
    match base.placement().kind() {
        Kind::BFloat16 => gradient_in::<bf16>(base, adapter, packed, weight, teacher),
        _ => gradient_in::<f32>(base, adapter, packed, weight, teacher),
    }
}

fn gradient_in<W: Element>(
    base: &Base,
    adapter: &Adapter,
    packed: &Packed,
    weight: f64,
    teacher: Option<&Teacher>,
) -> Result<(Vec<SequenceScore>, Tensor)> {
    let active = base.activate(&[(adapter, 1.0)])?;
    let (forward, x) = Forward::<W>::new(base, &active, packed)?;
    let gradient = adapter.with_flat(adapter.flat().f_zeros_like()?)?;
    Work { forward, adapter, gradient }.run(x, packed, weight, teacher)
}

/// The final hidden states that predict learned tokens, normed, [learned tokens, hidden_size], without gradients.
pub(crate) fn learned_hidden(base: &Base, adapters: &ActiveAdapters, packed: &Packed) -> Result<Tensor> {
    let (_guard, _alone) = (tch::no_grad_guard(), base.alone());
    match base.placement().kind() {
        Kind::BFloat16 => learned_hidden_in::<bf16>(base, adapters, packed),
        _ => learned_hidden_in::<f32>(base, adapters, packed),
    }
}

fn learned_hidden_in<W: Element>(base: &Base, adapters: &ActiveAdapters, packed: &Packed) -> Result<Tensor> {
    let (forward, mut x) = Forward::<W>::new(base, adapters, packed)?;
    for i in forward.from..base.layers.len() {
        x = forward.block(i, x)?.0;
    }
    Ok(forward.top(&x)?.out)
}

/// One step of AdamW, the one that `counters` are at, over flat f32 vectors on the CPU, as [`crate::optim::AdamW::step`] describes it: one pass in
/// place of a dozen.
pub(crate) fn adamw(
    weights: &Tensor,
    gradient: &Tensor,
    moments: [&Tensor; 2],
    rate: f64,
    counters: Counters,
    config: &AdamWConfig,
) -> Result<()> {
    /// Numbers of a task.
    const PIECE: usize = 1 << 14;
    let (step, AdamWConfig { beta1, beta2, eps, weight_decay }) = (counters.step as f64, *config);
    let taken = kernels::Taken {
        keep: (1.0 - rate * weight_decay) as f32,
        first: (1.0 - beta1) as f32,
        second: (1.0 - beta2) as f32,
        scale: (-rate / (1.0 - beta1.powf(step))) as f32,
        root: counters.square_weight.sqrt() as f32,
        eps: eps as f32,
    };
    let (level, len) = (Level::best(), weights.size()[0]);
    let alike = [gradient, moments[0], moments[1]].iter().all(|of| of.size() == [len]);
    ensure!(alike, "the gradient or the moments are not as many as the {len} weights");
    let row = |of: &Tensor| Rows::<f32>::of(of, len.max(1));
    let [weights, gradient, mean, square] =
        [row(weights)?, row(&gradient.f_contiguous()?)?, row(moments[0])?, row(moments[1])?];
    let len = weights.len() * weights.width();
    each_alone(len.div_ceil(PIECE), |i| {
        let (first, count) = (i * PIECE, PIECE.min(len - i * PIECE));
        // SAFETY: these numbers are those of this task alone.
        #[allow(unsafe_code)]
        let [weights, mean, square] =
            unsafe { [&weights, &mean, &square].map(|rows| rows.columns_mut(0, first, count)) };
        kernels::adamw(level, weights, &gradient.get(0)[first..first + count], mean, square, taken);
    });
    Ok(())
}

/// One micro-batch, and the gradient of one adapter.
struct Work<'a, W> {
    forward: Forward<'a, W>,
    adapter: &'a Adapter,
    /// An adapter whose weights are the gradient.
    gradient: Adapter,
}

impl<W: Element> Work<'_, W> {
    fn run(
        self,
        mut x: Tensor,
        packed: &Packed,
        weight: f64,
        teacher: Option<&Teacher>,
    ) -> Result<(Vec<SequenceScore>, Tensor)> {
        let (forward, base) = (&self.forward, self.forward.base);
        let (from, lowest) = (forward.from, self.adapter.lowest_layer());
        ensure!(from <= lowest, "a parameter takes no part in the loss");
        let mut kept = Vec::new();
        for i in from..base.layers.len() {
            let (next, of_block) = forward.block(i, x)?;
            if i >= lowest {
                kept.push((i, of_block));
            }
            x = next;
        }
        let top = forward.top(&x)?;
        let opinion = teacher.map(|teacher| teacher.opinion(packed)).transpose()?.flatten();
        let above = loss::above(base, &top.out, packed, weight, opinion.as_ref())?;
        let of_rows = top.x.f_zeros_like()?;
        self.norm_backward(&top, &base.norm, &above.hidden, &of_rows)?;
        // Each place predicts one token.
        let mut gradient = x.f_zeros_like()?.f_index_copy_(0, &forward.places, &of_rows)?;
        drop((x, top));
        while let Some((i, of_block)) = kept.pop() {
            gradient = self.backward(i, of_block, gradient, i > lowest)?;
        }
        Ok((above.scores, self.gradient.flat().shallow_clone()))
    }

    /// The gradient of block `i`'s input, where `above` is that of its output; of the residual alone where the rest is not
    /// `wanted`. Those of the adapter go where they belong.
    fn backward(&self, i: usize, kept: Kept, above: Tensor, wanted: bool) -> Result<Tensor> {
        let (forward, base) = (&self.forward, self.forward.base);
        let (c, layer) = (&base.config, &base.layers[i]);
        let back = |group: Group, above: &Tensor| forward.times(Way::Backward, (i, group), above, None);
        let (of_inner, of_low) = back(Group::Down, &above)?;
        if let Some(low) = &kept.low_down {
            let inner = forward.gate(&kept.gate_up)?;
            self.low_rank_gradient((i, Group::Down), &inner, Some(low), &above, of_low.as_ref())?;
        }
        let of_gate_up = kept.gate_up;
        self.gate_backward(&of_gate_up, &of_inner)?;
        let (of_normed, of_low) = back(Group::GateUp, &of_gate_up)?;
        let (normed, low) = (&kept.mlp_norm.out, kept.low_gate_up.as_ref());
        self.low_rank_gradient((i, Group::GateUp), normed, low, &of_gate_up, of_low.as_ref())?;
        self.norm_backward(&kept.mlp_norm, &layer.mlp_norm, &of_normed, &above)?;

        let (of_mixed, of_low) = back(Group::O, &above)?;
        let (mixed, low) = (&kept.attended.mixed, kept.low_o.as_ref());
        self.low_rank_gradient((i, Group::O), mixed, low, &above, of_low.as_ref())?;
        let (level, spans) = (forward.level, &forward.spans);
        let of_qkv = attend_backward::<W>(level, c, spans, &kept.qkv, &kept.attended, &of_mixed)?;
        forward.turn(&of_qkv, -1.0)?;
        let (normed, low) = (&kept.attention_norm.out, kept.low_qkv.as_ref());
        if wanted {
            let (of_normed, of_low) = back(Group::Qkv, &of_qkv)?;
            self.low_rank_gradient((i, Group::Qkv), normed, low, &of_qkv, of_low.as_ref())?;
            self.norm_backward(&kept.attention_norm, &layer.attention_norm, &of_normed, &above)?;
        } else {
            let factors = forward.factors(i, Group::Qkv).first();
            let of_low = factors.map(|of| of.down(Way::Backward, &of_qkv)).transpose()?;
            self.low_rank_gradient((i, Group::Qkv), normed, low, &of_qkv, of_low.as_ref())?;
        }
        Ok(above)
    }

    /// Writes the gradients of one matrix's A and B. `low` is what the input `x` came down to, `of_low` what the gradient of the
    /// product did, `above`.
    fn low_rank_gradient(
        &self,
        (layer, group): (usize, Group),
        x: &Tensor,
        low: Option<&Tensor>,
        above: &Tensor,
        of_low: Option<&Tensor>,
    ) -> Result<()> {
        let (Some(factors), Some(low), Some(of_low)) =
            (self.forward.factors(layer, group).first(), low, of_low)
        else {
            return Ok(());
        };
        let (mut of_a, mut of_b) = (Vec::new(), Vec::new());
        for module in self.modules(layer, group) {
            let (a, b) = self.gradient.factors(module);
            of_a.push(a);
            // B was scaled before it was used.
            of_b.push((b, module.scale as f32));
        }
        factors.gradient(Given { x, low, above, of_low }, &of_a, &of_b)
    }

    fn modules(&self, layer: usize, group: Group) -> impl Iterator<Item = &Module> {
        let of = move |module: &&Module| module.layer == layer as i64 && module.target.place().0 == group;
        self.adapter.modules.iter().filter(of)
    }

    /// Adds to `into` the gradient of a norm's input, where `above` is that of its output.
    fn norm_backward(&self, normed: &Normed, weight: &Tensor, above: &Tensor, into: &Tensor) -> Result<()> {
        let width = normed.x.size()[1];
        let (rows, above) = (Rows::<W>::of(&normed.x, width)?, Rows::<W>::of(&above.f_contiguous()?, width)?);
        let (inverses, weights) = (Rows::<f32>::of(&normed.inverse, 1)?, Rows::<f32>::of(weight, width)?);
        let into = Rows::<W>::of(into, width)?;
        let level = self.forward.level;
        each(rows.len(), |i| {
            // SAFETY: row i is that of this call alone.
            #[allow(unsafe_code)]
            let into = unsafe { into.get_mut(i) };
            let inverse = inverses.get(i)[0];
            kernels::norm_backward(level, rows.get(i), weights.get(0), inverse, above.get(i), into);
        });
        Ok(())
    }

    /// Puts the gradients of gate and up in their place.
    fn gate_backward(&self, gate_up: &Tensor, above: &Tensor) -> Result<()> {
        let width = self.forward.base.config.intermediate_size;
        let (rows, above) = (Rows::<W>::of(gate_up, 2 * width)?, Rows::<W>::of(above, width)?);
        let level = self.forward.level;
        each(rows.len(), |i| {
            // SAFETY: row i is that of this call alone.
            #[allow(unsafe_code)]
            let row = unsafe { rows.get_mut(i) };
            kernels::gate_backward(level, row, above.get(i));
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests;
