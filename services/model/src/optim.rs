//! AdamW on one flat vector, with a state that is saved and restored exactly. (tch's own cannot be saved.)

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::manual;
use crate::weights;

/// AdamW's settings; the rate is passed with each step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

/// Decoupled weight decay regularisation (arXiv 1711.05101), step for step as `torch.optim.AdamW`.
#[derive(Debug)]
pub struct AdamW {
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    counters: Counters,
}

/// What is counted beside the moments.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Counters {
    /// Steps taken.
    pub step: u64,
    /// What f16 losses are multiplied by; 1 in other precisions.
    pub loss_scale: f64,
    /// Steps since the loss scale last changed.
    pub scale_age: u64,
    /// How much of the second moment is of gradients; the rest is still of the zero that it began with. `1 - beta2^step`, where
    /// its decay was always the same; 0 in states of earlier versions, where it was.
    #[serde(default)]
    pub square_weight: f64,
}

impl Default for Counters {
    fn default() -> Self {
        Self { step: 0, loss_scale: 65536.0, scale_age: 0, square_weight: 0.0 }
    }
}

const METADATA: &str = "adamw";

impl AdamW {
    /// A fresh optimiser for `len` weights on `device`.
    pub fn new(len: i64, device: Device) -> Self {
        let zeros = || Tensor::zeros([len], (Kind::Float, device));
        Self { exp_avg: zeros(), exp_avg_sq: zeros(), counters: Counters::default() }
    }

    /// Takes the second moment for one that decayed by `beta2` until now, where nothing else is known of it.
    pub(crate) fn weigh_square(&mut self, beta2: f64) {
        let Counters { step, square_weight, .. } = &mut self.counters;
        if *square_weight == 0.0 {
            *square_weight = 1.0 - beta2.powf(*step as f64);
        }
    }

    /// Steps taken so far.
    pub fn steps(&self) -> u64 {
        self.counters.step
    }

    pub(crate) fn counters(&self) -> Counters {
        self.counters
    }

    pub(crate) fn counters_mut(&mut self) -> &mut Counters {
        &mut self.counters
    }

    /// Its two vectors, by name.
    pub(crate) fn moments(&self) -> [(String, Tensor); 2] {
        [
            ("exp_avg".to_string(), self.exp_avg.shallow_clone()),
            ("exp_avg_sq".to_string(), self.exp_avg_sq.shallow_clone()),
        ]
    }

    /// An optimiser of `len` weights on `device` that goes on from its [`AdamW::moments`] and counters.
    pub(crate) fn from_parts(
        tensors: &mut BTreeMap<String, Tensor>,
        counters: Counters,
        len: i64,
        device: Device,
    ) -> Result<Self> {
        let mut flat = |name| -> Result<Tensor> {
            let tensor = weights::take_flat(tensors, name, len).context("optimiser state")?;
            Ok(tensor.f_to_device(device)?)
        };
        let (exp_avg, exp_avg_sq) = (flat("exp_avg")?, flat("exp_avg_sq")?);
        ensure!(counters.loss_scale > 0.0, "optimiser state: the loss scale has to be positive");
        Ok(Self { exp_avg, exp_avg_sq, counters })
    }

    /// Moves `weights` against `gradient`; both are flat f32 vectors of this optimiser's length.
    ///
    /// # Errors
    /// When they are not, and those of libtorch.
    pub fn step(
        &mut self,
        weights: &mut Tensor,
        gradient: &Tensor,
        rate: f64,
        config: &AdamWConfig,
    ) -> Result<()> {
        let _guard = tch::no_grad_guard();
        self.weigh_square(config.beta2);
        self.counters.step += 1;
        self.counters.square_weight = config.beta2 * self.counters.square_weight + (1.0 - config.beta2);
        if weights.device() == Device::Cpu {
            let moments = [&self.exp_avg, &self.exp_avg_sq];
            return manual::adamw(weights, gradient, moments, rate, self.counters, config);
        }
        self.step_by_tensors(weights, gradient, rate, config)
    }

    /// The step for any device, an operation after the other.
    fn step_by_tensors(
        &mut self,
        weights: &mut Tensor,
        gradient: &Tensor,
        rate: f64,
        config: &AdamWConfig,
    ) -> Result<()> {
        let step = self.counters.step as f64;
        let AdamWConfig { beta1, beta2, eps, weight_decay } = *config;
        let _ = weights.f_mul_scalar_(1.0 - rate * weight_decay)?;
        let _ = self.exp_avg.f_lerp_(gradient, 1.0 - beta1)?;
        let _ = self
            .exp_avg_sq
            .f_mul_scalar_(beta2)?
            .f_add_(&gradient.f_square()?.f_mul_scalar_(1.0 - beta2)?)?;
        let root = self.counters.square_weight.sqrt();
        let scale = -rate / (1.0 - beta1.powf(step));
        let denominator = self.exp_avg_sq.f_sqrt()?.f_div_scalar_(root)?.f_add_scalar_(eps)?;
        let _ = weights.f_add_(&self.exp_avg.f_div(&denominator)?.f_mul_scalar_(scale)?)?;
        Ok(())
    }

    /// The whole state as safetensors; equal states give equal bytes.
    ///
    /// # Errors
    /// Only those of copying the moments to the CPU.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        weights::to_bytes(&self.moments(), METADATA, &serde_json::to_string(&self.counters)?)
    }

    /// Restores what [`AdamW::to_bytes`] gave, for `len` weights on `device`.
    ///
    /// # Errors
    /// When the bytes are damaged or belong to another number of weights.
    pub fn from_bytes(bytes: &[u8], len: i64, device: Device) -> Result<Self> {
        let (mut tensors, counters) = weights::from_bytes(bytes, METADATA).context("optimiser state")?;
        let counters: Counters = serde_json::from_str(&counters).context("optimiser state")?;
        Self::from_parts(&mut tensors, counters, len, device)
    }
}

/// Scales `gradient` in place so that its Euclidean norm is at most `most`, as `torch.nn.utils.clip_grad_norm_`
/// does; returns the norm before.
///
/// # Errors
/// Only those of libtorch.
pub fn clip(gradient: &mut Tensor, most: f64) -> Result<f64> {
    let norm = gradient.f_norm()?.f_double_value(&[])?;
    let factor = most / (norm + 1e-6);
    if factor < 1.0 {
        let _ = gradient.f_mul_scalar_(factor)?;
    }
    Ok(norm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restored_optimiser_goes_on_exactly() {
        let config = AdamWConfig::default();
        let gradient = |i: i64| (Tensor::arange(7, (Kind::Float, Device::Cpu)) * (i + 1)).sin();
        let mut weights = Tensor::ones([7], (Kind::Float, Device::Cpu));
        let mut adam = AdamW::new(7, Device::Cpu);
        for i in 0..3 {
            adam.step(&mut weights, &gradient(i), 0.1, &config).unwrap();
        }
        let bytes = adam.to_bytes().unwrap();
        let mut other = AdamW::from_bytes(&bytes, 7, Device::Cpu).unwrap();
        assert_eq!(bytes, other.to_bytes().unwrap());
        let mut copy = weights.copy();
        adam.step(&mut weights, &gradient(3), 0.1, &config).unwrap();
        other.step(&mut copy, &gradient(3), 0.1, &config).unwrap();
        assert!(weights.equal(&copy) && other.steps() == 4);
        assert!(AdamW::from_bytes(&bytes, 8, Device::Cpu).is_err());
        assert!(AdamW::from_bytes(&bytes[..40], 7, Device::Cpu).is_err());
    }

    #[test]
    fn a_step_in_one_pass_is_that_of_the_operations() {
        let config = AdamWConfig { weight_decay: 0.1, ..AdamWConfig::default() };
        let numbers = |pitch: f64| (Tensor::arange(40_000, (Kind::Float, Device::Cpu)) * pitch).sin();
        let (mut ours, mut theirs) = (numbers(0.3), numbers(0.3));
        let (mut one, mut other) = (AdamW::new(40_000, Device::Cpu), AdamW::new(40_000, Device::Cpu));
        for i in 1..20 {
            let gradient = numbers(0.01 * f64::from(i));
            one.step(&mut ours, &gradient, 0.01, &config).unwrap();
            other.counters = one.counters;
            other.step_by_tensors(&mut theirs, &gradient, 0.01, &config).unwrap();
        }
        assert!((&ours - &theirs).abs().max().double_value(&[]) < 1e-5);
        assert!((&ours - numbers(0.3)).abs().mean(Kind::Float).double_value(&[]) > 0.01);
    }

    #[test]
    fn a_second_moment_is_weighed_by_what_is_in_it_whatever_its_decay_was() {
        let mut weights = Tensor::zeros([1], (Kind::Float, Device::Cpu));
        let gradient = Tensor::from_slice(&[4f32]);
        let mut adam = AdamW::new(1, Device::Cpu);
        let config = AdamWConfig { weight_decay: 0.0, ..AdamWConfig::default() };
        let mut moved = |adam: &mut AdamW, beta2| {
            let before = weights.double_value(&[0]);
            adam.step(&mut weights, &gradient, 0.1, &AdamWConfig { beta2, ..config }).unwrap();
            before - weights.double_value(&[0])
        };
        // The same gradient each time moves a weight by the rate each time.
        for beta2 in [0.999, 0.999, 0.9, 0.95, 0.999] {
            assert!((moved(&mut adam, beta2) - 0.1).abs() < 1e-4);
        }
        // A state of an earlier version does not say.
        let mut older = AdamW::new(1, Device::Cpu);
        (0..3).for_each(|_| assert!((moved(&mut older, 0.999) - 0.1).abs() < 1e-4));
        older.counters.square_weight = 0.0;
        older.weigh_square(0.999);
        assert!((moved(&mut older, 0.9) - 0.1).abs() < 1e-4);
    }

    #[test]
    fn clipping_keeps_the_direction_and_reports_the_norm_before() {
        let mut gradient = Tensor::from_slice(&[3f32, 4.0]);
        assert!((clip(&mut gradient, 1.0).unwrap() - 5.0).abs() < 1e-6);
        assert!((gradient.norm().double_value(&[]) - 1.0).abs() < 1e-5);
        assert!((clip(&mut gradient, 2.0).unwrap() - 1.0).abs() < 1e-5);
    }
}
