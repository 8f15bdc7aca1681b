//! A base whose every weight is trained: who moves which, and one step.

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use super::muon::Muon;
use super::preset::OptimiserSettings;
use crate::device::Placement;
use crate::hf::ModelConfig;
use crate::llama::Base;
use crate::lora::ActiveAdapters;
use crate::loss;
use crate::optim::{AdamW, AdamWConfig, clip};
use crate::pack::{Sequence, pack};
use crate::quant::Matrix;

/// The spread of a fresh embedding.
const EMBEDDING_STD: f64 = 0.02;

/// The spread of a fresh projection, times the root of its inputs.
const PROJECTION_GAIN: f64 = 0.6;

/// AdamW as it is used on embeddings and norms: a short memory, since the run is short, and no decay.
const ADAMW: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0 };

/// A base in training.
pub(super) struct Trainer {
    pub base: Base,
    settings: OptimiserSettings,
    /// The matrices of the blocks in Muon's order, then the others in the order of `flat`.
    parameters: Vec<Tensor>,
    muon: Muon,
    adamw: AdamW,
    /// Embeddings and norms in one vector, of which the parameters are views.
    flat: Tensor,
}

impl Trainer {
    pub fn new(
        config: ModelConfig,
        placement: &Placement,
        settings: &OptimiserSettings,
        seed: u64,
    ) -> Result<Self> {
        tch::manual_seed(seed as i64);
        let mut base = Base::build(config, placement, initial)?;
        let mut muon = Muon::new(settings.muon_momentum);
        let mut parameters = Vec::new();
        let (qkv, ff) = (base.config.qkv_rows(), base.config.intermediate_size);
        for layer in &mut base.layers {
            let hidden = base.config.hidden_size;
            let matrices: [(&mut Matrix, &[i64]); 4] = [
                (&mut layer.qkv, &qkv),
                (&mut layer.o, &[hidden]),
                (&mut layer.gate_up, &[ff, ff]),
                (&mut layer.down, &[hidden]),
            ];
            for (matrix, parts) in matrices {
                let weight = matrix.dense_mut()?;
                *weight = weight.f_set_requires_grad(true)?;
                muon.add(weight, parts);
                parameters.push(weight.shallow_clone());
            }
        }
        let flat = flatten_others(&mut base, &mut parameters)?;
        let adamw = AdamW::new(flat.numel() as i64, placement.device);
        Ok(Self { base, settings: settings.clone(), parameters, muon, adamw, flat })
    }

    /// One step over windows of equal length, at `scale` (0 to 1) of the full rates; the mean NLL in nats.
    pub fn step(&mut self, windows: &[Sequence], scale: f64) -> Result<f64> {
        let packed = pack(&self.base, windows, 1)?;
        let tokens = packed.learned_tokens() as f64;
        let parameters: Vec<&Tensor> = self.parameters.iter().collect();
        let found = loss::gradient(&self.base, &ActiveAdapters::none(), &packed, 1.0 / tokens, &parameters)?;
        let loss = found.scores.iter().map(|score| score.nll_sum).sum::<f64>() / tokens;
        let (matrices, others) = found.gradients.split_at(self.muon.count());
        let others: Vec<Tensor> =
            others.iter().map(|gradient| gradient.f_flatten(0, -1)).collect::<Result<_, _>>()?;
        let mut others = Tensor::f_cat(&others, 0)?;
        let norm = clip(&mut others, self.settings.clip)?;
        ensure!(loss.is_finite() && norm.is_finite(), "the loss is no longer finite: lower the rates");
        self.adamw.step(&mut self.flat, &others, self.settings.adamw_rate * scale, &ADAMW)?;
        self.muon.step(matrices, self.settings.muon_rate * scale)?;
        Ok(loss)
    }
}

/// Fresh weights. What a block adds to the residual stream begins at zero, so that training starts from the
/// embedding alone and every block earns its share.
fn initial(name: &str, shape: &[i64], kind: Kind) -> Result<Tensor> {
    if shape.len() == 1 {
        return Ok(Tensor::f_ones(shape, (kind, tch::Device::Cpu))?);
    }
    let spread = match name {
        _ if name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight") => 0.0,
        "model.embed_tokens.weight" => EMBEDDING_STD,
        _ => PROJECTION_GAIN / (shape[1] as f64).sqrt(),
    };
    Ok(Tensor::f_randn(shape, (Kind::Float, tch::Device::Cpu))?.f_mul_scalar(spread)?.f_to_kind(kind)?)
}

/// Lays embeddings and norms into one vector and makes them views of it, since AdamW moves one vector.
fn flatten_others(base: &mut Base, parameters: &mut Vec<Tensor>) -> Result<Tensor> {
    let mut others = vec![&mut base.embedding];
    if !base.config.tied {
        others.push(&mut base.head);
    }
    for layer in &mut base.layers {
        others.extend([&mut layer.attention_norm, &mut layer.mlp_norm]);
    }
    others.push(&mut base.norm);
    let parts: Vec<Tensor> = others.iter().map(|tensor| tensor.f_flatten(0, -1)).collect::<Result<_, _>>()?;
    let flat = Tensor::f_cat(&parts, 0)?;
    let mut start = 0;
    for tensor in others {
        let length = tensor.numel() as i64;
        let view = flat.f_narrow(0, start, length)?.f_view(tensor.size().as_slice())?.f_detach()?;
        *tensor = view.f_set_requires_grad(true)?;
        parameters.push(tensor.shallow_clone());
        start += length;
    }
    if base.config.tied {
        base.head = base.embedding.shallow_clone();
    }
    Ok(flat)
}
