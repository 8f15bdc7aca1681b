//! One update of an adapter: accumulate gradients over micro-batches, hold, clip, step.

use std::ops::ControlFlow;

use anyhow::{Result, ensure};
use tch::Tensor;

use crate::device::Precision;
use crate::distillation::Teacher;
use crate::guard::Guard;
use crate::latent::{self, Latents};
use crate::llama::Base;
use crate::lora::Adapter;
use crate::loss::{self, SequenceScore};
use crate::optim::{AdamW, AdamWConfig, clip};
use crate::pack::{Sequence, pack};

/// How a learner steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearnerConfig {
    /// The norm that gradients are clipped to.
    pub clip: f64,
    /// AdamW's settings.
    pub adamw: AdamWConfig,
    /// Length of packed rows in tokens.
    pub row_tokens: usize,
}

impl Default for LearnerConfig {
    fn default() -> Self {
        Self { clip: 1.0, adamw: AdamWConfig::default(), row_tokens: 256 }
    }
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The weights moved.
    Applied,
    /// An f16 gradient overflowed; the loss scale was lowered and nothing else changed. Step again.
    Overflow,
    /// The loss or the gradient was not finite; nothing changed. See [`Learner::find_offenders`].
    NonFinite,
    /// The caller stopped it between micro-batches; nothing changed.
    Stopped,
}

/// What a step did.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// How it ended.
    pub outcome: Outcome,
    /// Mean NLL over the learned tokens of the step, in nats, without the penalty.
    pub loss: f64,
    /// The penalties of all guards.
    pub penalty: f64,
    /// Norm of the gradient, penalty included, before clipping.
    pub grad_norm: f64,
    /// By micro-batch and sequence, as given.
    pub scores: Vec<Vec<SequenceScore>>,
    /// Learned tokens.
    pub tokens: usize,
}

/// f16 steps without overflow after which the loss scale doubles, and its bounds, as torch's GradScaler.
const SCALE_GROWTH_STEPS: u64 = 2000;
const SCALE_MAX: f64 = 16_777_216.0;

/// An adapter that is being trained on a frozen base.
pub struct Learner {
    base: Base,
    adapter: Adapter,
    optimiser: AdamW,
    /// See [`Learner::decay_squares`].
    beta2: f64,
    guards: Vec<Box<dyn Guard>>,
    latents: Option<Box<dyn Latents>>,
    config: LearnerConfig,
}

impl Learner {
    /// Takes up training of `adapter` (a copy of it), with `optimiser` as [`Learner::optimiser_bytes`] gave it.
    ///
    /// # Errors
    /// When adapter or optimiser state do not fit.
    pub fn new(
        base: Base,
        adapter: &Adapter,
        optimiser: Option<&[u8]>,
        config: LearnerConfig,
    ) -> Result<Self> {
        adapter.check_model(base.config())?;
        adapter.check_finite()?;
        ensure!(config.clip > 0.0, "the gradient clip has to be positive");
        let adapter = adapter.deep_copy().to_device(base.device());
        let count = adapter.parameter_count();
        let optimiser = match optimiser {
            Some(bytes) => AdamW::from_bytes(bytes, count, base.device())?,
            None => AdamW::new(count, base.device()),
        };
        Ok(Self {
            base,
            adapter,
            optimiser,
            guards: Vec::new(),
            latents: None,
            beta2: config.adamw.beta2,
            config,
        })
    }

    /// Has a method against forgetting take part in every step. Of several teachers the last is heard,
    /// and of several that spare tokens.
    pub fn hold_to(&mut self, guard: impl Guard + 'static) {
        self.guards.push(Box::new(guard));
    }

    /// Has what the base makes of a sequence below the adapter's lowest layer computed once and kept: see
    /// [`crate::latent`]. Without an effect where the adapter begins in the first layer.
    pub fn remember_in(&mut self, latents: impl Latents + 'static) {
        self.latents = Some(Box::new(latents));
    }

    /// The base.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// The adapter as it is now. It shares the learner's weights: take a `deep_copy` to keep it.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// Lets the second moment of the gradients decay by `beta2` from here on; none is what the learner was made with.
    pub fn decay_squares(&mut self, beta2: Option<f64>) {
        self.optimiser.weigh_square(self.config.adamw.beta2);
        self.beta2 = beta2.unwrap_or(self.config.adamw.beta2);
    }

    /// The optimiser's state, exact.
    ///
    /// # Errors
    /// Only those of copying to the CPU.
    pub fn optimiser_bytes(&self) -> Result<Vec<u8>> {
        self.optimiser.to_bytes()
    }

    /// Steps taken so far.
    pub fn steps(&self) -> u64 {
        self.optimiser.steps()
    }

    /// One update from all of `micro_batches`, at learning rate `rate`. The loss is the mean over all learned
    /// tokens of the step, however they are spread. `between` is asked before each micro-batch: the place to
    /// yield to others, and to stop.
    ///
    /// Unless the outcome is [`Outcome::Applied`], weights and moments are untouched.
    ///
    /// # Errors
    /// When a sequence does not fit the model or nothing is to be learned. Nothing has changed then either.
    pub fn step(
        &mut self,
        micro_batches: &[Vec<Sequence>],
        rate: f64,
        between: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<StepReport> {
        let tokens: usize = micro_batches.iter().flatten().map(Sequence::learned_tokens).sum();
        ensure!(tokens > 0, "nothing to learn: no sequence has a learned token");
        let (_alone, scale) = (self.base.alone(), self.loss_scale());
        let mut report = StepReport {
            outcome: Outcome::Stopped,
            loss: 0.0,
            penalty: 0.0,
            grad_norm: 0.0,
            scores: Vec::new(),
            tokens,
        };
        let mut sum: Option<Tensor> = None;
        for batch in micro_batches {
            if between().is_break() {
                return Ok(report);
            }
            let (scores, gradient) = self.micro_batch(batch, scale / tokens as f64)?;
            report.scores.push(scores);
            sum = match (sum, gradient) {
                (Some(mut sum), Some(gradient)) => Some(sum.f_add_(&gradient)?),
                (sum, gradient) => sum.or(gradient),
            };
        }
        report.loss = report.scores.iter().flatten().map(|score| score.nll_sum).sum::<f64>() / tokens as f64;
        if let Some(gradient) = sum {
            self.apply(gradient.f_div_scalar(scale)?, rate, &mut report)?;
        }
        Ok(report)
    }

    /// Scores and gradient of one micro-batch; no gradient where nothing is learned.
    fn micro_batch(&self, batch: &[Sequence], weight: f64) -> Result<(Vec<SequenceScore>, Option<Tensor>)> {
        let mut packed = pack(&self.base, batch, self.config.row_tokens)?;
        if packed.learned_tokens() == 0 {
            return Ok((vec![SequenceScore::default(); batch.len()], None));
        }
        let spared = self.guards.iter().rev().find_map(|guard| guard.spared());
        if let Some(tokens) = spared.filter(|tokens| !tokens.is_empty()) {
            packed = packed.sparing(tokens, self.base.device());
        }
        let teacher = self.guards.iter().rev().find_map(|guard| guard.teacher());
        // The teacher reads the same packed rows, so that they may enter no higher than where it begins.
        let layer = teacher.map_or(usize::MAX, Teacher::lowest_layer).min(self.adapter.lowest_layer());
        if let Some(latents) = self.latents.as_deref().filter(|_| layer > 0) {
            packed = latent::enter(&self.base, layer, batch, packed, latents, self.config.row_tokens)?;
        }
        let (scores, gradient) = loss::adapter_gradient(&self.base, &self.adapter, &packed, weight, teacher)?;
        Ok((scores, Some(gradient)))
    }

    fn apply(&mut self, mut gradient: Tensor, rate: f64, report: &mut StepReport) -> Result<()> {
        let _guard = tch::no_grad_guard();
        for guard in &self.guards {
            report.penalty += guard.penalise(self.adapter.flat(), &mut gradient)?;
        }
        report.grad_norm = clip(&mut gradient, self.config.clip)?;
        let finite = report.grad_norm.is_finite() && report.loss.is_finite();
        report.outcome = self.judge(finite, report.loss.is_finite());
        if report.outcome == Outcome::Applied {
            let mut weights = self.adapter.flat().shallow_clone();
            let adamw = AdamWConfig { beta2: self.beta2, ..self.config.adamw };
            self.optimiser.step(&mut weights, &gradient, rate, &adamw)?;
        }
        Ok(())
    }

    /// Decides on a step, and moves the loss scale as torch's GradScaler does.
    fn judge(&mut self, finite: bool, loss_finite: bool) -> Outcome {
        let scaled = self.base.placement().precision == Precision::F16;
        let counters = self.optimiser.counters_mut();
        if finite {
            counters.scale_age += 1;
            if scaled && counters.scale_age >= SCALE_GROWTH_STEPS {
                counters.loss_scale = (counters.loss_scale * 2.0).min(SCALE_MAX);
                counters.scale_age = 0;
            }
            return Outcome::Applied;
        }
        if scaled && loss_finite && counters.loss_scale > 1.0 {
            counters.loss_scale /= 2.0;
            counters.scale_age = 0;
            return Outcome::Overflow;
        }
        Outcome::NonFinite
    }

    fn loss_scale(&mut self) -> f64 {
        match self.base.placement().precision {
            Precision::F16 => self.optimiser.counters().loss_scale,
            Precision::F32 | Precision::Bf16 => 1.0,
        }
    }

    /// The indices of sequences that, learned from, give a loss or gradient that is not finite: by bisection,
    /// so that one offender among n costs about `2 log2 n` passes.
    ///
    /// # Errors
    /// When a sequence does not fit the model.
    pub fn find_offenders(&self, sequences: &[Sequence]) -> Result<Vec<usize>> {
        let mut offenders = Vec::new();
        let mut open = vec![(0, sequences.len())];
        while let Some((start, end)) = open.pop() {
            if start == end || self.is_finite(&sequences[start..end])? {
                continue;
            }
            if end - start == 1 {
                offenders.push(start);
                continue;
            }
            let middle = start.midpoint(end);
            // The later half first onto the stack, so that offenders come out in order.
            open.extend([(middle, end), (start, middle)]);
        }
        Ok(offenders)
    }

    fn is_finite(&self, sequences: &[Sequence]) -> Result<bool> {
        let tokens = sequences.iter().map(Sequence::learned_tokens).sum::<usize>().max(1);
        let (scores, gradient) = self.micro_batch(sequences, 1.0 / tokens as f64)?;
        let finite = scores.iter().all(|score| score.nll_sum.is_finite());
        Ok(finite && gradient.map_or(Ok(true), |gradient| crate::weights::is_finite(&gradient))?)
    }
}

#[cfg(test)]
mod tests;
