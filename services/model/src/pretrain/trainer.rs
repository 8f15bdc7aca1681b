//! A base whose every weight is trained: who moves which, and one step.
//!
//! Weights and optimiser state are f32, since sums of many small steps do not survive in less. Forward and
//! backward passes run in the placement's precision, on casts that are made anew for each step.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use super::muon::Muon;
use super::preset::{Matrices, OptimiserSettings};
use crate::device::{Placement, Precision};
use crate::distillation::Teacher;
use crate::hf::ModelConfig;
use crate::llama::Base;
use crate::lora::ActiveAdapters;
use crate::loss;
use crate::optim::{AdamW, AdamWConfig, Counters, clip};
use crate::pack::{Packed, Sequence, pack};
use crate::weights;

/// The spread of a fresh embedding.
const EMBEDDING_STD: f64 = 0.02;

/// The spread of a fresh projection, times the root of its inputs.
const PROJECTION_GAIN: f64 = 0.6;

/// AdamW as it is used here: a short memory, since runs are short, and no decay.
const ADAMW: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0 };

/// A base in training.
pub(super) struct Trainer {
    /// Computes with the weights as they were at the last [`Trainer::refresh`].
    pub base: Base,
    settings: OptimiserSettings,
    /// Every weight, f32, in the order of [`slots`].
    flat: Tensor,
    /// The same, as leaves that require gradients: views of `flat`.
    weights: Vec<Tensor>,
    /// How many of `weights`, from the first on, AdamW moves; the others are Muon's.
    by_adamw: usize,
    adamw: AdamW,
    muon: Muon,
}

impl Trainer {
    pub fn new(
        config: ModelConfig,
        placement: &Placement,
        settings: &OptimiserSettings,
        seed: u64,
    ) -> Result<Self> {
        tch::manual_seed(seed as i64);
        let wide = Placement { precision: Precision::F32, ..*placement };
        Self::of(Base::build(config, &wide, initial)?, placement, settings)
    }

    /// Trains `base`, whose weights are f32, in the precision of `placement`.
    fn of(mut base: Base, placement: &Placement, settings: &OptimiserSettings) -> Result<Self> {
        let (slots, others) = slots(&mut base)?;
        let parts: Vec<Tensor> = slots.iter().map(|slot| slot.f_flatten(0, -1)).collect::<Result<_, _>>()?;
        let flat = Tensor::f_cat(&parts, 0)?;
        let mut weights = Vec::with_capacity(parts.len());
        let mut start = 0;
        for slot in slots {
            let length = slot.numel() as i64;
            let view = flat.f_narrow(0, start, length)?.f_view(slot.size().as_slice())?.f_detach()?;
            weights.push(view.f_set_requires_grad(true)?);
            start += length;
        }
        base.placement = *placement;
        let by_adamw = match settings.matrices {
            Matrices::Adamw => weights.len(),
            Matrices::Muon => others,
        };
        let muon = Muon::new(
            settings.muon_momentum,
            placement.kind(),
            weights[by_adamw..].iter().zip(matrix_rows(&base.config)),
        )?;
        let by_adamw_len = weights[..by_adamw].iter().map(Tensor::numel).sum::<usize>();
        let adamw = AdamW::new(by_adamw_len as i64, placement.device);
        let mut trainer = Self { base, settings: settings.clone(), flat, weights, by_adamw, adamw, muon };
        trainer.refresh()?;
        Ok(trainer)
    }

    /// Brings what the base computes with up to date, as functions of the trained weights.
    pub fn refresh(&mut self) -> Result<()> {
        let kind = self.base.placement.kind();
        let bias = self.base.config.family.has_qkv_bias();
        let (slots, others) = slots(&mut self.base)?;
        for (i, (slot, weight)) in slots.into_iter().zip(&self.weights).enumerate() {
            // The embedding and the norms stay f32: a frequent token's gradient is a sum of many, and a norm is
            // computed in f32 anyway.
            *slot = if i < others { weight.shallow_clone() } else { weight.f_to_kind(kind)? };
        }
        if bias {
            for layer in &mut self.base.layers {
                layer.qkv_bias = layer.qkv_bias.as_ref().map(|bias| bias.f_to_kind(kind)).transpose()?;
            }
        }
        let head = if self.base.config.tied { &self.base.embedding } else { &self.base.head };
        self.base.head = head.f_to_kind(kind)?;
        Ok(())
    }

    /// One step over windows of equal length, at `scale` (0 to 1) of the full rates; the mean NLL in nats.
    ///
    /// The windows go through the model in groups of at most `micro_tokens` tokens, whose gradients add up.
    pub fn step(&mut self, windows: &[Sequence], scale: f64, teacher: Option<&Teacher>) -> Result<f64> {
        let tokens: usize = windows.iter().map(Sequence::learned_tokens).sum();
        let group = (self.settings.micro_tokens / windows[0].tokens.len().max(1)).max(1);
        let mut gradient: Option<Vec<Tensor>> = None;
        let mut nll = 0.0;
        for windows in windows.chunks(group) {
            let packed = pack(&self.base, windows, 1)?;
            let (sum, part) = self.gradient(&packed, 1.0 / tokens as f64, teacher)?;
            nll += sum;
            gradient = Some(match gradient {
                None => part,
                Some(sum) => sum.iter().zip(&part).map(|(a, b)| a.f_add(b)).collect::<Result<_, _>>()?,
            });
        }
        ensure!(nll.is_finite(), "the loss is no longer finite: lower the rates");
        self.apply(&gradient.unwrap_or_default(), scale)?;
        Ok(nll / tokens as f64)
    }

    /// The sum of the NLL, and the gradient of `weight` times it for every weight.
    fn gradient(
        &mut self,
        packed: &Packed,
        weight: f64,
        teacher: Option<&Teacher>,
    ) -> Result<(f64, Vec<Tensor>)> {
        self.refresh()?;
        let weights: Vec<&Tensor> = self.weights.iter().collect();
        let found =
            loss::taught_gradient(&self.base, &ActiveAdapters::none(), packed, weight, &weights, teacher)?;
        Ok((found.scores.iter().map(|score| score.nll_sum).sum(), found.gradients))
    }

    fn apply(&mut self, gradients: &[Tensor], scale: f64) -> Result<()> {
        let (others, matrices) = gradients.split_at(self.by_adamw);
        let others: Vec<Tensor> =
            others.iter().map(|gradient| gradient.f_flatten(0, -1)).collect::<Result<_, _>>()?;
        let mut others = Tensor::f_cat(&others, 0)?;
        let norm = clip(&mut others, self.settings.clip)?;
        ensure!(norm.is_finite(), "the gradient is no longer finite: lower the rates");
        let mut moved = self.flat.f_narrow(0, 0, others.numel() as i64)?;
        self.adamw.step(&mut moved, &others, self.settings.adamw_rate * scale, &ADAMW)?;
        self.muon.step(matrices, self.settings.muon_rate * scale)
    }

    /// Weights and optimiser state by name, and what is counted.
    pub fn state(&self) -> (Vec<(String, Tensor)>, Counters) {
        let mut tensors = vec![
            ("weights".to_string(), self.flat.shallow_clone()),
            ("momentum".to_string(), self.muon.momentum().shallow_clone()),
        ];
        tensors.extend(self.adamw.moments());
        (tensors, self.adamw.counters())
    }

    /// Goes on from what [`Trainer::state`] gave.
    ///
    /// # Errors
    /// When a tensor is missing, damaged, or of another shape.
    pub fn restore(&mut self, tensors: &mut BTreeMap<String, Tensor>, counters: Counters) -> Result<()> {
        let device = self.base.device();
        let _guard = tch::no_grad_guard();
        for (name, own) in [("weights", &mut self.flat), ("momentum", self.muon.momentum_mut())] {
            own.f_copy_(&weights::take_flat(tensors, name, own.numel() as i64)?)?;
        }
        let length = self.weights[..self.by_adamw].iter().map(Tensor::numel).sum::<usize>();
        self.adamw = AdamW::from_parts(tensors, counters, length as i64, device)?;
        Ok(())
    }
}

/// Fresh weights. What a block adds to the residual stream begins at zero, so that training starts from the
/// embedding alone and every block earns its share.
fn initial(name: &str, shape: &[i64], kind: Kind) -> Result<Tensor> {
    if shape.len() == 1 {
        let value = if name.ends_with(".bias") { 0.0 } else { 1.0 };
        return Ok(Tensor::f_full(shape, value, (kind, tch::Device::Cpu))?);
    }
    let spread = match name {
        _ if name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight") => 0.0,
        "model.embed_tokens.weight" => EMBEDDING_STD,
        _ => PROJECTION_GAIN / (shape[1] as f64).sqrt(),
    };
    Ok(Tensor::f_randn(shape, (Kind::Float, tch::Device::Cpu))?.f_mul_scalar(spread)?.f_to_kind(kind)?)
}

/// Every weight of a base, and how many of them, from the first on, are no matrices of its blocks.
fn slots(base: &mut Base) -> Result<(Vec<&mut Tensor>, usize)> {
    let mut matrices = Vec::new();
    let mut others = vec![&mut base.embedding];
    if !base.config.tied {
        others.push(&mut base.head);
    }
    for layer in &mut base.layers {
        others.extend([&mut layer.attention_norm, &mut layer.mlp_norm]);
        others.extend(&mut layer.qkv_bias);
        others.extend(layer.qk_norm.iter_mut().flatten());
        for matrix in [&mut layer.qkv, &mut layer.o, &mut layer.gate_up, &mut layer.down] {
            matrices.push(matrix.dense_mut()?);
        }
    }
    others.push(&mut base.norm);
    let count = others.len();
    others.extend(matrices);
    Ok((others, count))
}

/// The rows of the matrices that each weight of a block is made of, in the order of [`slots`].
fn matrix_rows(config: &ModelConfig) -> impl Iterator<Item = Vec<i64>> {
    let (hidden, ff) = (config.hidden_size, config.intermediate_size);
    let block = [config.qkv_rows().to_vec(), vec![hidden], vec![ff, ff], vec![hidden]];
    std::iter::repeat_n(block, config.layers as usize).flatten()
}
