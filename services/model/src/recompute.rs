//! Gradients of an adapter with one block in memory at a time (arXiv 1604.06174).
//!
//! The forward pass keeps only what enters each block; the backward pass computes each block once more, from the
//! last to the first. It costs one more forward pass, and bounds what a quantised base needs: the dense copy of
//! one block, in place of all of them.

use anyhow::{Context, Result};
use tch::{Kind, Tensor};

use crate::distillation::Teacher;
use crate::llama::Base;
use crate::lora::{ActiveAdapters, Adapter};
use crate::loss::{self, SequenceScore};
use crate::pack::Packed;

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
    let input = packed.input(base.device());
    let pass = base.prepare(&input, None)?;
    let (from, mut x) = base.enter(&input)?;
    let lowest = adapter.lowest_layer();
    let mut entering = Vec::with_capacity(base.layers.len());
    {
        let _guard = tch::no_grad_guard();
        let active = base.activate(&[(adapter, 1.0)])?;
        for i in from..base.layers.len() {
            let after = base.block(i, &x, &pass, &active, None)?;
            let before = std::mem::replace(&mut x, after);
            if i >= lowest {
                entering.push((i, before));
            }
        }
    }
    let top = x.f_detach()?.f_set_requires_grad(true)?;
    let hidden = base.rms_norm(&top, &base.norm)?.f_index_select(0, &packed.targets(base.device()).0)?;
    let opinion = teacher.map(|teacher| teacher.opinion(packed)).transpose()?.flatten();
    let above = loss::above(base, &hidden.detach(), packed, weight, opinion.as_ref())?;
    let mut gradient = backward(&hidden, &above.hidden, &[&top])?.pop().context("no gradient")?;

    let mut parts = Vec::with_capacity(entering.len());
    for (i, x) in entering.into_iter().rev() {
        let x = x.f_detach()?.f_set_requires_grad(i > lowest)?;
        let (start, length) = adapter.range_of_layer(i as i64);
        let leaf = adapter.flat().f_narrow(0, start, length)?.f_detach()?.f_set_requires_grad(true)?;
        let active = ActiveAdapters::of_layer(adapter, i as i64, &leaf, base.placement().kind())?;
        let after = base.block(i, &x, &pass, &active, None)?;
        let mut parameters: Vec<&Tensor> = Vec::with_capacity(2);
        parameters.extend((i > lowest).then_some(&x));
        parameters.extend((length > 0).then_some(&leaf));
        let mut found = backward(&after, &gradient, &parameters)?.into_iter();
        if i > lowest {
            gradient = found.next().context("no gradient")?;
        }
        parts.extend(found);
    }
    parts.reverse();
    Ok((above.scores, Tensor::f_cat(&parts, 0)?))
}

/// Carries the gradient of `output` on to `parameters`.
fn backward(output: &Tensor, gradient: &Tensor, parameters: &[&Tensor]) -> Result<Vec<Tensor>> {
    let carrier = output.f_mul(gradient)?.f_sum(Kind::Float)?;
    Ok(Tensor::f_run_backward(&[carrier], parameters, false, false)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::distillation::Mix;
    use crate::golden;
    use crate::lora::LoraConfig;
    use crate::pack::{Sequence, pack};

    #[test]
    fn block_by_block_gives_what_the_whole_gives() {
        let base = golden::base("llama");
        let sequences: Vec<Sequence> = (0..7)
            .map(|n| Sequence::whole((0..9 + 3 * n).map(|i| (i * i * 7 + n * 31) % 128).collect()))
            .collect();
        let packed = pack(&base, &sequences, 64).unwrap();
        let mix = Mix { alpha: 0.3, temperature: 2.0 };
        let former =
            Teacher::new(base.share(), mix).unwrap().with_adapter(&golden::adapter("peft-qv")).unwrap();
        let upper = LoraConfig::default().in_top_layers(1, base.config()).unwrap();
        let upper = Adapter::new(upper, base.config(), 1).unwrap();
        let cases = [
            ("r8", golden::adapter("peft-r8"), None),
            ("qv", golden::adapter("peft-qv"), None),
            ("rank-pattern", golden::adapter("peft-rank-pattern"), None),
            ("r8, taught", golden::adapter("peft-r8"), Some(&former)),
            ("the upper layer alone", upper, None),
        ];
        for (name, adapter, teacher) in cases {
            let (scores, whole) = loss::adapter_gradient(&base, &adapter, &packed, 0.01, teacher).unwrap();
            let (again, parts) = adapter_gradient(&base, &adapter, &packed, 0.01, teacher).unwrap();
            let size = whole.abs().max().double_value(&[]);
            assert!(golden::distance(&whole, &parts) < 1e-5 * size, "{name}");
            for (one, two) in scores.iter().zip(again) {
                assert!((one.nll_sum - two.nll_sum).abs() < 1e-3 && one.tokens == two.tokens);
            }
        }
    }
}
