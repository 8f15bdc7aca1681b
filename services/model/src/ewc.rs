//! Elastic weight consolidation (arXiv 1612.00796): weights that mattered are held near where they were.

use anyhow::{Context, Result, ensure};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::ops::ControlFlow;
use tch::{Device, Kind, Tensor};

use crate::llama::Base;
use crate::lora::Adapter;
use crate::loss;
use crate::pack::{Packed, Sequence, pack};
use crate::weights;

/// The diagonal of the Fisher information, and the weights it was taken at.
#[derive(Debug)]
pub struct Ewc {
    fisher: Tensor,
    anchor: Tensor,
}

const METADATA: &str = "ewc";

/// Fisher information in shares of its mean: of the squared gradients of each sequence's mean NLL, with tokens that the
/// model would have said in place of those that it learned, drawn by `seed`. A flat f32 vector in the adapter's order.
/// Sequences without learned tokens are left out.
///
/// With the tokens that were learned it would be the empirical one, which is next to nothing for what is known by heart, and
/// all of it from the few examples that are not (Kunstner et al., arXiv 1905.12558). In shares of its mean that of every
/// batch counts as much, however well it is known (Schwarz et al., arXiv 1805.06370), and a strength means the same for all.
///
/// `between` is asked before each sequence; on `Break` the result is `None`.
///
/// # Errors
/// When a sequence does not fit the model, there is none, or a gradient is not finite.
pub fn fisher(
    base: &Base,
    adapter: &Adapter,
    sequences: &[Sequence],
    seed: u64,
    between: &mut dyn FnMut() -> ControlFlow<()>,
) -> Result<Option<Tensor>> {
    let Some(information) = of_what_is_said(base, adapter, sequences, seed, between)? else {
        return Ok(None);
    };
    let mean = information.f_mean(Kind::Float)?.f_double_value(&[])?;
    // Nothing of it where each token is certain.
    Ok(Some(if mean > 0.0 { information.f_div_scalar(mean)? } else { information }))
}

/// The mean over sequences of their squared gradients, with tokens that the model would have said.
fn of_what_is_said(
    base: &Base,
    adapter: &Adapter,
    sequences: &[Sequence],
    seed: u64,
    between: &mut dyn FnMut() -> ControlFlow<()>,
) -> Result<Option<Tensor>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    mean_square(base, adapter, sequences, between, &mut |packed| {
        let drawn = loss::drawn(base, adapter, &packed, &mut rng)?;
        Ok(packed.predicting(&drawn))
    })
}

/// The mean over sequences of their squared gradients, one sequence at a time, with what `target` has them predict.
fn mean_square(
    base: &Base,
    adapter: &Adapter,
    sequences: &[Sequence],
    between: &mut dyn FnMut() -> ControlFlow<()>,
    target: &mut dyn FnMut(Packed) -> Result<Packed>,
) -> Result<Option<Tensor>> {
    let adapter = adapter.to_device(base.device());
    let mut sum = adapter.flat().detach().f_zeros_like()?;
    let mut count = 0;
    for sequence in sequences.iter().filter(|sequence| sequence.learned_tokens() > 0) {
        if between().is_break() {
            return Ok(None);
        }
        let packed = target(pack(base, std::slice::from_ref(sequence), 1)?)?;
        let weight = 1.0 / sequence.learned_tokens() as f64;
        let (_, gradient) = loss::adapter_gradient(base, &adapter, &packed, weight, None)?;
        let _ = sum.f_add_(&gradient.f_square()?)?;
        count += 1;
    }
    ensure!(count > 0, "Fisher information needs at least one sequence with learned tokens");
    let fisher = sum.f_div_scalar_(f64::from(count))?;
    ensure!(weights::is_finite(&fisher)?, "Fisher information is not finite: a gradient overflowed");
    Ok(Some(fisher))
}

impl Ewc {
    /// Holds `adapter`'s weights where they are now, each as hard as `fisher` says.
    ///
    /// # Errors
    /// When `fisher` is not an f32 vector of the adapter's length.
    pub fn new(fisher: Tensor, adapter: &Adapter) -> Result<Self> {
        let anchor = adapter.flat().f_to_device(fisher.device())?.f_detach()?.copy();
        ensure!(
            fisher.size() == anchor.size() && fisher.f_kind()? == Kind::Float,
            "Fisher and adapter differ in length"
        );
        Ok(Self { fisher, anchor })
    }

    /// The online form (arXiv 1805.06370): `F = decay * F_old + F_new`, held at the adapter's weights of now.
    ///
    /// # Errors
    /// As [`Ewc::new`].
    pub fn update(&self, decay: f64, fisher: &Tensor, adapter: &Adapter) -> Result<Self> {
        let fisher = fisher.f_to_device(self.fisher.device())?;
        Self::new(self.fisher.f_mul_scalar(decay)?.f_add(&fisher)?, adapter)
    }

    /// Adds the penalty's gradient `lambda * F (p - p*)` to `gradient` in place; returns the penalty
    /// `lambda/2 * sum F (p - p*)^2`.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn add_gradient(&self, weights: &Tensor, lambda: f64, gradient: &mut Tensor) -> Result<f64> {
        let _guard = tch::no_grad_guard();
        let moved = weights.f_sub(&self.anchor)?;
        let pull = self.fisher.f_mul(&moved)?.f_mul_scalar_(lambda)?;
        let _ = gradient.f_add_(&pull)?;
        Ok(0.5 * pull.f_dot(&moved)?.f_double_value(&[])?)
    }

    /// The Fisher information, flat f32.
    pub fn fisher(&self) -> &Tensor {
        &self.fisher
    }

    /// A copy on `device`.
    pub fn to_device(&self, device: Device) -> Self {
        Self { fisher: self.fisher.to_device(device), anchor: self.anchor.to_device(device) }
    }

    /// Both vectors as safetensors; equal values give equal bytes.
    ///
    /// # Errors
    /// Only those of copying to the CPU.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let tensors = [
            ("fisher".to_string(), self.fisher.shallow_clone()),
            ("anchor".to_string(), self.anchor.shallow_clone()),
        ];
        weights::to_bytes(&tensors, METADATA, "1")
    }

    /// Restores what [`Ewc::to_bytes`] gave, for an adapter of `len` weights, on the CPU.
    ///
    /// # Errors
    /// When the bytes are damaged or belong to another number of weights.
    pub fn from_bytes(bytes: &[u8], len: i64) -> Result<Self> {
        let (mut tensors, _) = weights::from_bytes(bytes, METADATA).context("EWC state")?;
        let fisher = weights::take_flat(&mut tensors, "fisher", len).context("EWC state")?;
        let anchor = weights::take_flat(&mut tensors, "anchor", len).context("EWC state")?;
        Ok(Self { fisher, anchor })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    /// The golden Fisher information, and the final adapter it was taken at.
    fn golden_fisher() -> (Adapter, Tensor, Vec<Sequence>) {
        let mut tensors = golden::tensors("fisher.safetensors");
        let model = golden::config("llama");
        let last = golden::adapter("train-final");
        let fisher = Adapter::from_parts(last.config().clone(), &model, |name, _| {
            Ok(tensors.remove(&format!("fisher.{name}")).unwrap())
        });
        let rows: Vec<Vec<i64>> = (&tensors["samples"]).try_into().unwrap();
        let samples =
            rows.iter().map(|row| Sequence::whole(row.iter().map(|&id| id as u32).collect())).collect();
        (last, fisher.unwrap().flat().shallow_clone(), samples)
    }

    #[test]
    fn fisher_is_that_of_what_the_model_would_say() {
        let base = golden::base("llama");
        let adapter = golden::adapter("train-final");
        let mut go = || ControlFlow::Continue(());
        let sequence = Sequence { learned: vec![(3, 4)], ..Sequence::whole(vec![1, 2, 3, 4]) };
        let sum = |information: Tensor| information.sum(Kind::Double).double_value(&[]);
        let one = std::slice::from_ref(&sequence);
        let mut said =
            |token| mean_square(&base, &adapter, one, &mut go, &mut |p| Ok(p.predicting(&[token])));
        let ids = Tensor::from_slice(&[1i64, 2, 3]).view([1, 3]);
        let logits = golden::logits(&base, &base.activate(&[(&adapter, 1.0)]).unwrap(), &ids);
        let likely = Vec::<f64>::try_from(logits.select(1, 2).softmax(-1, Kind::Double).view([-1])).unwrap();
        let exact: f64 = (0..).zip(&likely).map(|(token, p)| p * sum(said(token).unwrap().unwrap())).sum();

        let many = vec![sequence.clone(); 400];
        let drawn = of_what_is_said(&base, &adapter, &many, 1, &mut go).unwrap().unwrap();
        assert!((sum(drawn.copy()) / exact - 1.0).abs() < 0.2, "{drawn:?} and {exact}");
        let shares = |seed| fisher(&base, &adapter, &many[..20], seed, &mut || ControlFlow::Continue(()));
        let [one, again, other] = [1, 1, 2].map(|seed| shares(seed).unwrap().unwrap());
        assert!((sum(one.copy()) / one.numel() as f64 - 1.0).abs() < 1e-4);
        assert!(one.equal(&again) && !one.equal(&other));
    }

    #[test]
    fn fisher_and_penalty_equal_the_goldens() {
        let base = golden::base("llama");
        let (last, expected, samples) = golden_fisher();
        let fisher =
            mean_square(&base, &last, &samples, &mut || ControlFlow::Continue(()), &mut Ok).unwrap().unwrap();
        let size = expected.abs().max().double_value(&[]);
        assert!(golden::distance(&fisher, &expected) < 1e-4 * size);

        let start = golden::initial();
        let ewc = Ewc::new(fisher, &last).unwrap();
        let mut gradient = start.flat().zeros_like();
        let penalty = ewc.add_gradient(start.flat(), 1000.0, &mut gradient).unwrap();
        assert!((penalty / 0.9708454599604011 - 1.0).abs() < 1e-4, "{penalty}");
    }

    #[test]
    fn penalty_gradient_equals_autograd_and_vanishes_at_the_anchor() {
        let (last, expected, _) = golden_fisher();
        let ewc = Ewc::new(expected.shallow_clone(), &last).unwrap();
        let point = (last.flat() + 0.1f64).set_requires_grad(true);
        let by_hand = (&expected * (&point - last.flat()).square()).sum(Kind::Float) * 2.5;
        let theirs = Tensor::run_backward(&[&by_hand], &[&point], false, false);
        let mut ours = expected.zeros_like();
        let penalty = ewc.add_gradient(&point, 5.0, &mut ours).unwrap();
        assert!(golden::distance(&ours, &theirs[0]) < 1e-7);
        assert!((penalty - by_hand.double_value(&[])).abs() < 1e-6);
        let mut none = expected.zeros_like();
        assert_eq!(ewc.add_gradient(last.flat(), 5.0, &mut none).unwrap(), 0.0);
    }

    #[test]
    fn online_form_decays_and_bytes_read_back() {
        let (last, fisher, _) = golden_fisher();
        let ewc = Ewc::new(fisher.copy(), &last).unwrap().update(0.9, &fisher, &last).unwrap();
        assert!(golden::distance(ewc.fisher(), &(&fisher * 1.9)) < 1e-6);
        let bytes = ewc.to_bytes().unwrap();
        let read = Ewc::from_bytes(&bytes, last.parameter_count()).unwrap();
        assert_eq!(bytes, read.to_bytes().unwrap());
        assert!(Ewc::from_bytes(&bytes, 5).is_err());
    }
}
