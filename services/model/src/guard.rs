//! What holds a learner back from undoing what it knew.

use anyhow::{Result, ensure};
use tch::Tensor;

use crate::distillation::{Mix, Teacher};
use crate::ewc::Ewc;
use crate::llama::Base;
use crate::lora::Adapter;

/// A method against forgetting, as far as it has a say in a step. Several may be at work in one.
pub trait Guard {
    /// Adds its gradient with respect to the adapter's flat vector to `gradient`; returns its penalty.
    ///
    /// # Errors
    /// Only those of libtorch.
    fn penalise(&self, _weights: &Tensor, _gradient: &mut Tensor) -> Result<f64> {
        Ok(0.0)
    }

    /// Whom to learn from beside the text.
    fn teacher(&self) -> Option<&Teacher> {
        None
    }
}

/// Elastic weight consolidation: see [`crate::ewc`].
pub struct Elastic {
    ewc: Ewc,
    lambda: f64,
}

impl Elastic {
    /// The penalty for an adapter of `weights` weights, at strength `lambda`.
    ///
    /// # Errors
    /// When it belongs to another number of weights, or lambda is negative.
    pub fn new(ewc: Ewc, lambda: f64, adapter: &Adapter) -> Result<Self> {
        ensure!(ewc.fisher().size() == adapter.flat().size(), "EWC state and adapter differ in length");
        ensure!(lambda >= 0.0 && lambda.is_finite(), "EWC lambda has to be a number from 0 up");
        Ok(Self { ewc: ewc.to_device(adapter.flat().device()), lambda })
    }
}

impl Guard for Elastic {
    fn penalise(&self, weights: &Tensor, gradient: &mut Tensor) -> Result<f64> {
        self.ewc.add_gradient(weights, self.lambda, gradient)
    }
}

/// Learning without forgetting (Li and Hoiem, arXiv 1606.09282): of all that is learned, a share of the loss is what
/// the adapter said of it before.
pub struct Former {
    teacher: Teacher,
}

impl Former {
    /// Holds to `adapter` as it is now, with a share `alpha` of the loss.
    ///
    /// # Errors
    /// When alpha is no share, or the adapter does not fit.
    pub fn new(base: &Base, adapter: &Adapter, alpha: f64) -> Result<Self> {
        /// As in the paper.
        const TEMPERATURE: f64 = 2.0;
        let mix = Mix { alpha, temperature: TEMPERATURE };
        Ok(Self { teacher: Teacher::new(base.share(), mix)?.with_adapter(&adapter.deep_copy())? })
    }
}

impl Guard for Former {
    fn teacher(&self) -> Option<&Teacher> {
        Some(&self.teacher)
    }
}
