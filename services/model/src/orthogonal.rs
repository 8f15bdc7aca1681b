//! Learning in directions that were not learned in before (O-LoRA, Wang et al., arXiv 2310.14152).
//!
//! The ranks of one adapter are cut into parts. A batch trains one part, the next batch the next; the others stay as
//! they are. A penalty `lambda * ||A_part A_earlier^T||^2` keeps the inputs that a part reads apart from those that
//! earlier parts read. In the paper each task has an adapter of its own, and their number grows; here the ranks are
//! given beforehand, and when each part has had its batch the first one is trained again.

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use crate::guard::Guard;
use crate::lora::Adapter;

/// The part of an adapter that a batch trains.
pub struct Orthogonal {
    adapter: Adapter,
    part: i64,
    parts: i64,
    /// Parts that were trained before, counted from the first.
    trained: i64,
    lambda: f64,
}

impl Orthogonal {
    /// For batch number `batch`, from 0, of an adapter whose ranks are cut into `parts`, at strength `lambda`.
    ///
    /// The optimiser's state has to begin anew with it: moments that are left over would go on moving the other parts.
    ///
    /// # Errors
    /// When a rank cannot be cut into so many parts, or lambda is negative.
    pub fn new(adapter: &Adapter, batch: u64, parts: i64, lambda: f64) -> Result<Self> {
        ensure!(lambda >= 0.0 && lambda.is_finite(), "O-LoRA's lambda has to be a number from 0 up");
        let least = adapter.modules.iter().map(|module| module.rank).min().unwrap_or(0);
        ensure!(
            (1..=least).contains(&parts),
            "an adapter of rank {least} cannot be cut into {parts} parts: raise the rank or take fewer"
        );
        let (batch, trained) = (i64::try_from(batch)?, i64::try_from(batch)?.min(parts));
        Ok(Self { adapter: adapter.share(), part: batch % parts, parts, trained, lambda })
    }

    /// Where part `n` of `rank` rows begins.
    fn begin(&self, n: i64, rank: i64) -> i64 {
        n * rank / self.parts
    }

    /// Begin and length of the part that is trained.
    fn own(&self, rank: i64) -> (i64, i64) {
        let begin = self.begin(self.part, rank);
        (begin, self.begin(self.part + 1, rank) - begin)
    }

    /// The rows of `a` that earlier batches trained, but for the part's own.
    fn earlier(&self, a: &Tensor) -> Result<Option<Tensor>> {
        let rank = a.size()[0];
        let rows = |n: i64| a.f_narrow(0, self.begin(n, rank), self.begin(n + 1, rank) - self.begin(n, rank));
        let parts = (0..self.trained).filter(|n| *n != self.part).map(rows).collect::<Result<Vec<_>, _>>()?;
        if parts.is_empty() { Ok(None) } else { Ok(Some(Tensor::f_cat(&parts, 0)?)) }
    }
}

/// Zeroes all but `length` entries of dimension `dim` from `begin` on.
fn keep_only(of: &Tensor, dim: i64, (begin, length): (i64, i64)) -> Result<()> {
    for (from, count) in [(0, begin), (begin + length, of.size()[dim as usize] - begin - length)] {
        let _ = of.f_narrow(dim, from, count)?.f_zero_()?;
    }
    Ok(())
}

impl Guard for Orthogonal {
    fn penalise(&self, weights: &Tensor, gradient: &mut Tensor) -> Result<f64> {
        let weights = self.adapter.with_flat(weights.shallow_clone())?;
        let gradient = self.adapter.with_flat(gradient.shallow_clone())?;
        let mut penalty = Tensor::f_zeros([], (Kind::Float, weights.flat().device()))?;
        for module in &weights.modules {
            let own = self.own(module.rank);
            let (a, _) = weights.factors(module);
            let (of_a, of_b) = gradient.factors(module);
            keep_only(&of_a, 0, own)?;
            keep_only(&of_b, 1, own)?;
            let Some(earlier) = self.earlier(&a)? else { continue };
            let overlap = a.f_narrow(0, own.0, own.1)?.f_matmul(&earlier.f_tr()?)?;
            penalty = penalty.f_add(&overlap.f_square()?.f_sum(Kind::Float)?)?;
            let mut rows = of_a.f_narrow(0, own.0, own.1)?;
            let _ = rows.f_add_(&overlap.f_matmul(&earlier)?.f_mul_scalar(2.0 * self.lambda)?)?;
        }
        Ok(self.lambda * penalty.f_double_value(&[])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use crate::learner::{Learner, LearnerConfig};
    use crate::lora::LoraConfig;
    use crate::optim::AdamWConfig;
    use crate::pack::Sequence;
    use std::ops::ControlFlow;

    fn fresh(rank: i64) -> Adapter {
        Adapter::new(LoraConfig { rank, ..LoraConfig::default() }, &golden::config("llama"), 1).unwrap()
    }

    fn learn(adapter: &Adapter, guard: Orthogonal, seed: u32) -> (Adapter, f64) {
        // Weight decay would shrink every part.
        let adamw = AdamWConfig { weight_decay: 0.0, ..AdamWConfig::default() };
        let config = LearnerConfig { adamw, ..LearnerConfig::default() };
        let mut learner = Learner::new(golden::base("llama"), adapter, None, config).unwrap();
        learner.hold_to(guard);
        let sequence = |n: u32| Sequence::whole((0..20).map(|t| (t * t * 3 + n * 7 + seed) % 128).collect());
        let batch = vec![(0..6).map(sequence).collect::<Vec<_>>()];
        let mut penalty = 0.0;
        for _ in 0..12 {
            penalty = learner.step(&batch, 1e-2, &mut || ControlFlow::Continue(())).unwrap().penalty;
        }
        (learner.adapter().deep_copy(), penalty)
    }

    #[test]
    fn a_batch_changes_its_part_and_leaves_the_others() {
        let before = fresh(6);
        let (first, penalty) = learn(&before, Orthogonal::new(&before, 0, 3, 0.5).unwrap(), 0);
        assert_eq!(penalty, 0.0, "nothing was learned before");
        let (second, _) = learn(&first, Orthogonal::new(&first, 1, 3, 0.5).unwrap(), 50);
        for module in &second.modules {
            let ((a, b), (was_a, was_b)) = (second.factors(module), first.factors(module));
            for part in 0..3 {
                let same = a.narrow(0, 2 * part, 2).equal(&was_a.narrow(0, 2 * part, 2))
                    && b.narrow(1, 2 * part, 2).equal(&was_b.narrow(1, 2 * part, 2));
                assert_eq!(same, part != 1, "part {part} of {module:?}");
            }
        }
    }

    #[test]
    fn the_penalty_is_its_formula_and_its_gradient_that_of_autograd() {
        let adapter = fresh(4);
        let guard = Orthogonal::new(&adapter, 1, 2, 0.7).unwrap();
        let leaf = adapter.flat().detach().copy().set_requires_grad(true);
        let mut sum = Tensor::zeros([], (Kind::Float, tch::Device::Cpu));
        let mut offset = 0;
        for chunk in
            adapter.modules.chunk_by(|x, y| x.layer == y.layer && x.target.place().0 == y.target.place().0)
        {
            for module in chunk {
                let a =
                    leaf.narrow(0, offset, module.rank * module.inputs).view([module.rank, module.inputs]);
                sum += a.narrow(0, 2, 2).matmul(&a.narrow(0, 0, 2).detach().tr()).square().sum(Kind::Float)
                    * 0.7;
                offset += module.rank * module.inputs;
            }
            offset += chunk.iter().map(|module| module.rank * module.outputs).sum::<i64>();
        }
        let expected = Tensor::run_backward(&[&sum], &[&leaf], false, false).pop().unwrap();
        let mut gradient = adapter.flat().zeros_like();
        let penalty = guard.penalise(adapter.flat(), &mut gradient).unwrap();
        assert!((penalty / sum.double_value(&[]) - 1.0).abs() < 1e-5);
        assert!(golden::distance(&gradient, &expected) < 1e-6);
    }

    #[test]
    fn a_strong_penalty_turns_a_part_away_from_what_earlier_ones_read() {
        let (first, _) = learn(&fresh(4), Orthogonal::new(&fresh(4), 0, 2, 0.0).unwrap(), 0);
        let overlap = |lambda: f64| {
            let guard = Orthogonal::new(&first, 1, 2, lambda).unwrap();
            let (second, _) = learn(&first, guard, 50);
            let measure = Orthogonal::new(&second, 1, 2, 1.0).unwrap();
            measure.penalise(second.flat(), &mut second.flat().zeros_like()).unwrap()
        };
        assert!(overlap(10.0) < 0.5 * overlap(0.0), "{} of {}", overlap(10.0), overlap(0.0));
    }

    #[test]
    fn parts_take_turns_and_more_of_them_than_ranks_are_refused() {
        let adapter = fresh(4);
        let part = |batch| Orthogonal::new(&adapter, batch, 3, 0.5).unwrap();
        assert_eq!([0, 1, 2, 3, 7].map(|batch| part(batch).own(4)), [(0, 1), (1, 1), (2, 2), (0, 1), (1, 1)]);
        assert!(Orthogonal::new(&adapter, 0, 5, 0.5).is_err());
        assert!(Orthogonal::new(&adapter, 0, 2, -1.0).is_err());
    }
}
