//! Knowledge distillation on logits (Hinton et al., arXiv 1503.02531): a student learns what a teacher thinks of
//! every token, and not only which one came.
//!
//! The loss of a position is `alpha * T^2 * KL(q || p) + (1 - alpha) * cross-entropy`, where p and q are the
//! softmax of the student's and of the teacher's logits divided by the temperature T. The factor T^2 keeps the
//! size of the gradient independent of T.

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use crate::active::ActiveAdapters;
use crate::llama::Base;
use crate::lora::Adapter;
use crate::loss;
use crate::pack::Packed;

/// How much a student learns from its teacher.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mix {
    /// The teacher's share of the loss, 0 to 1; the rest is cross-entropy with the text.
    pub alpha: f64,
    /// What logits are divided by: above 1, what the teacher thinks improbable counts for more.
    pub temperature: f64,
}

impl Mix {
    /// # Errors
    /// Names the number that is out of range.
    pub fn check(&self) -> Result<()> {
        ensure!((0.0..=1.0).contains(&self.alpha), "alpha is {}: it has to be from 0 to 1", self.alpha);
        let range = 0.1..=100.0;
        ensure!(
            range.contains(&self.temperature),
            "the temperature is {}: it has to be from 0.1 to 100",
            self.temperature
        );
        Ok(())
    }
}

/// A model that another one learns from.
pub struct Teacher {
    base: Base,
    adapters: ActiveAdapters,
    mix: Mix,
    /// Its share of the loss of sequences that are rehearsed.
    rehearsed_alpha: f64,
}

impl Teacher {
    /// # Errors
    /// When a number of the mix is out of range.
    pub fn new(base: Base, mix: Mix) -> Result<Self> {
        mix.check()?;
        Ok(Self { base, adapters: ActiveAdapters::none(), mix, rehearsed_alpha: mix.alpha })
    }

    /// The same with another share of the loss of sequences that are rehearsed.
    ///
    /// # Errors
    /// When it is no share.
    pub fn rehearsing(self, alpha: f64) -> Result<Self> {
        Mix { alpha, ..self.mix }.check()?;
        Ok(Self { rehearsed_alpha: alpha, ..self })
    }

    /// The same with an adapter on its base.
    ///
    /// # Errors
    /// When the adapter does not fit.
    pub fn with_adapter(mut self, adapter: &Adapter) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        self.adapters = self.base.activate(&[(adapter, 1.0)])?;
        Ok(self)
    }

    /// The teacher itself.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// The lowest layer in which it differs from its base.
    pub(crate) fn lowest_layer(&self) -> usize {
        self.adapters.lowest_layer()
    }

    /// How much is learned from it.
    pub fn mix(&self) -> Mix {
        self.mix
    }

    /// What it makes of packed sequences; none where it has no say in any of them.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub(crate) fn opinion(&self, packed: &Packed) -> Result<Option<Opinion<'_>>> {
        let _guard = tch::no_grad_guard();
        let share = |rehearsed| if rehearsed { self.rehearsed_alpha } else { self.mix.alpha };
        let shares: Vec<f32> = packed.rehearsed().map(|rehearsed| share(rehearsed) as f32).collect();
        if shares.iter().all(|&share| share == 0.0) {
            return Ok(None);
        }
        // What it has no say in it need not read.
        let hidden = match shares.contains(&0.0) {
            true => loss::learned_hidden(&self.base, &self.adapters, &packed.only(|of| share(of) != 0.0))?,
            false => loss::learned_hidden(&self.base, &self.adapters, packed)?,
        };
        Ok(Some(Opinion { teacher: self, hidden, shares }))
    }
}

/// What a teacher makes of one micro-batch. Its logits are made in chunks.
pub(crate) struct Opinion<'a> {
    teacher: &'a Teacher,
    /// Hidden states of those learned tokens that it has a say in.
    hidden: Tensor,
    /// The teacher's share of the loss of each learned token; 0 where it has no say.
    shares: Vec<f32>,
}

impl Opinion<'_> {
    /// The teacher's base.
    pub fn base(&self) -> &Base {
        &self.teacher.base
    }

    /// What logits are divided by.
    pub fn temperature(&self) -> f64 {
        self.teacher.mix.temperature
    }

    /// The teacher's share of the loss of each learned token; 0 where it has no say.
    pub fn shares(&self) -> &[f32] {
        &self.shares
    }

    /// The teacher's hidden states of those learned tokens that it has a say in, one after the other.
    pub fn hidden(&self) -> &Tensor {
        &self.hidden
    }

    /// The gradient of the loss of some rows from `start` on with respect to the student's logits, f32 [rows, vocab_size].
    pub fn gradient(&self, start: i64, log_probs: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let device = log_probs.device();
        let said = |shares: &[f32]| -> Vec<i64> {
            (0..).zip(shares).filter(|(_, share)| **share != 0.0).map(|(i, _)| i).collect()
        };
        let (before, rest) = self.shares.split_at(start as usize);
        let shares = &rest[..log_probs.size()[0] as usize];
        let (first, rows) = (said(before).len() as i64, said(shares));
        let count = rows.len();
        let taught = |at: &dyn Fn(&Tensor) -> Result<Tensor>| {
            let logits = self.base().logits(&self.hidden.f_narrow(0, first, count as i64)?)?;
            let shares = at(&Tensor::from_slice(shares).f_unsqueeze(1)?.f_to_device(device)?)?;
            gradient(&at(log_probs)?, &logits, &at(targets)?, &shares, self.temperature())
        };
        if count == shares.len() {
            return taught(&|all| Ok(all.shallow_clone()));
        }
        let ones = Tensor::f_full(targets.size(), -1.0, (Kind::Float, device))?;
        let of_text = log_probs.f_exp()?.f_scatter_add_(1, targets, &ones)?;
        if count == 0 {
            return Ok(of_text);
        }
        let at = Tensor::from_slice(&rows).f_to_device(device)?;
        Ok(of_text.f_index_copy(0, &at, &taught(&|all| Ok(all.f_index_select(0, &at)?))?)?)
    }
}

/// `(1 - alpha) * (softmax(z) - onehot) + alpha * T * (softmax(z / T) - softmax(t / T))`, from the student's
/// log-probabilities [n, v] (whose differences are those of its logits z), the teacher's logits t [n, v], the
/// tokens that came [n, 1] and the teacher's shares alpha [n, 1].
fn gradient(
    log_probs: &Tensor,
    teacher: &Tensor,
    targets: &Tensor,
    alphas: &Tensor,
    temperature: f64,
) -> Result<Tensor> {
    let soft = |logits: &Tensor| logits.f_div_scalar(temperature)?.f_softmax(-1, Kind::Float);
    let apart = soft(log_probs)?.f_sub(&soft(teacher)?)?.f_mul(&alphas.f_mul_scalar(temperature)?)?;
    let text_shares = alphas.f_neg()?.f_add_scalar(1.0)?;
    let of_text = log_probs.f_exp()?.f_mul(&text_shares)?.f_scatter_add(1, targets, &text_shares.f_neg()?)?;
    Ok(of_text.f_add(&apart)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use serde_json::Value;

    /// Both terms as written in the module's head, for autograd to derive.
    fn loss(student: &Tensor, teacher: &Tensor, labels: &Tensor, mix: Mix) -> (Tensor, Tensor) {
        let t = mix.temperature;
        let (log_p, q) = ((student / t).log_softmax(-1, Kind::Float), (teacher / t).softmax(-1, Kind::Float));
        let divergence = (&q * (q.log() - log_p)).sum(Kind::Float) / student.size()[0] as f64 * t * t;
        let came = student.cross_entropy_loss(labels, None::<Tensor>, tch::Reduction::Mean, -100, 0.0);
        let all = &divergence * mix.alpha + came * (1.0 - mix.alpha);
        (divergence, all)
    }

    #[test]
    fn the_loss_equals_the_golden_and_its_gradient_equals_autograd() {
        let golden = golden::tensors("distill.safetensors");
        let values: Value =
            serde_json::from_str(&std::fs::read_to_string(golden::dir("values.json")).unwrap()).unwrap();
        let mix = Mix { alpha: 0.5, temperature: 2.0 };
        let student = golden["student"].set_requires_grad(true);
        let (divergence, all) = loss(&student, &golden["teacher"], &golden["labels"], mix);
        for (ours, name) in [(&divergence, "distill_kl"), (&all, "distill_alpha_0.5")] {
            let theirs = values[name].as_f64().unwrap();
            assert!((ours.double_value(&[]) - theirs).abs() < 1e-4 * theirs, "{name}");
        }
        for mix in [mix, Mix { alpha: 0.0, temperature: 2.0 }, Mix { alpha: 1.0, temperature: 4.0 }] {
            let (_, all) = loss(&student, &golden["teacher"], &golden["labels"], mix);
            let theirs = Tensor::run_backward(&[&all], &[&student], false, false);
            let log_probs = student.detach().log_softmax(-1, Kind::Float);
            let labels = golden["labels"].unsqueeze(1);
            let alphas = Tensor::full(labels.size(), mix.alpha, (Kind::Float, labels.device()));
            let ours = gradient(&log_probs, &golden["teacher"], &labels, &alphas, mix.temperature).unwrap();
            assert!(golden::distance(&(ours / 6.0), &theirs[0]) < 1e-6, "{mix:?}");
        }
    }

    #[test]
    fn a_mix_that_means_nothing_is_refused() {
        for (alpha, temperature) in
            [(1.5, 2.0), (-0.1, 2.0), (0.5, 0.0), (f64::NAN, 2.0), (0.5, f64::INFINITY)]
        {
            assert!(Mix { alpha, temperature }.check().is_err(), "{alpha} {temperature}");
        }
    }
}
