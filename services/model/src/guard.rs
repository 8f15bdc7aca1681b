//! What holds a learner back from undoing what it knew.

use anyhow::{Result, ensure};
use tch::Tensor;

use crate::distillation::{Mix, Teacher};
use crate::ewc::Ewc;
use crate::llama::Base;
use crate::lora::Adapter;

/// A method against forgetting, as far as it has a say in a step. Several may be at work in one. One that freezes weights, as
/// PackNet does (arXiv 1711.05769), takes them out of the gradient in [`Guard::penalise`]; columns that stay as they are, as
/// in progressive networks (arXiv 1606.04671), would be adapters of their own, of which an answer can take a sum.
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

    /// Which tokens, by id, are not made less likely by sequences that have none of them to learn.
    fn spared(&self) -> Option<&[bool]> {
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

/// Shares of the loss that are what the adapter said before, and not what came in the text; 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FormerShares {
    /// Of what is new: learning without forgetting (Li and Hoiem, arXiv 1606.09282).
    pub fresh: f64,
    /// Of what is rehearsed: as dark experience replay (Buzzega et al., arXiv 2004.07211). A text that is rehearsed many
    /// times is then kept as it was known, and not learned by heart at the cost of others like it.
    pub rehearsed: f64,
}

/// What an adapter said before is a share of what it learns now.
pub struct Former {
    teacher: Teacher,
}

impl Former {
    /// Holds to `adapter` as it is now.
    ///
    /// # Errors
    /// When a share is none, or the adapter does not fit.
    pub fn new(base: &Base, adapter: &Adapter, shares: FormerShares) -> Result<Self> {
        /// As in the paper on learning without forgetting.
        const TEMPERATURE: f64 = 2.0;
        let mix = |alpha| Mix { alpha, temperature: TEMPERATURE };
        let teacher =
            Teacher::new(base.share(), mix(shares.fresh))?.rehearsing(mix(shares.rehearsed).alpha)?;
        Ok(Self { teacher: teacher.with_adapter(&adapter.deep_copy())? })
    }
}

impl Guard for Former {
    fn teacher(&self) -> Option<&Teacher> {
        Some(&self.teacher)
    }
}

/// Asymmetric cross-entropy (ER-ACE, Caccia et al., arXiv 2104.05025): new answers are told apart from each other, and
/// leave it to what is rehearsed to tell old ones from them. Else every new answer makes all old ones less likely, and
/// the few that are rehearsed do not make up for it. Here old answers are all that were ever learned, and not only
/// those that are rehearsed.
pub struct Apart {
    spared: Vec<bool>,
}

impl Apart {
    /// Spares the tokens of `known` answers that no `fresh` one has, as ids; none where there are no such tokens.
    pub fn new(
        base: &Base,
        fresh: impl Iterator<Item = u32>,
        known: impl Iterator<Item = u32>,
    ) -> Option<Self> {
        let mut spared = vec![false; base.config().vocab_size as usize];
        let marks = known.map(|token| (token, true)).chain(fresh.map(|token| (token, false)));
        for (token, mark) in marks {
            if let Some(spared) = spared.get_mut(token as usize) {
                *spared = mark;
            }
        }
        spared.contains(&true).then_some(Self { spared })
    }

    /// Spares nothing from here on, whatever a guard before it does.
    pub fn over() -> Self {
        Self { spared: Vec::new() }
    }
}

impl Guard for Apart {
    fn spared(&self) -> Option<&[bool]> {
        Some(&self.spared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    #[test]
    fn what_old_answers_alone_have_is_spared() {
        let base = golden::base("llama");
        let spared = |fresh: &[u32], known: &[u32]| {
            let apart = Apart::new(&base, fresh.iter().copied(), known.iter().copied())?;
            let of = apart.spared().expect("tokens").iter().enumerate();
            Some(of.filter(|(_, spared)| **spared).map(|(token, _)| token).collect::<Vec<_>>())
        };
        assert_eq!(spared(&[1, 2], &[2, 3, 7]), Some(vec![3, 7]));
        assert_eq!(spared(&[1, 2], &[2, 1]), None);
        assert_eq!(spared(&[1], &[]), None);
    }
}
