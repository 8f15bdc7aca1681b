//! Muon: momentum whose matrices are made orthogonal before the step.
//!
//! After Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks". A step then moves
//! every direction of a matrix alike, where AdamW follows the few strongest.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

/// Coefficients of the quintic iteration, from the same source: five rounds take the singular values to
/// between 0.7 and 1.2, which is near enough to one.
const QUINTIC: (f64, f64, f64) = (3.4445, -4.7750, 2.0315);
const ROUNDS: usize = 5;

/// A weight matrix [outputs, inputs] that may be several, one above the other.
struct Matrix {
    weight: Tensor,
    /// Its part of the flat momentum.
    momentum: Tensor,
    /// The rows of each.
    rows: Vec<i64>,
}

/// The optimiser of the matrices of the blocks. Embeddings and norms are AdamW's.
pub(super) struct Muon {
    keep: f64,
    /// What orthogonal directions are computed in; weights and momentum are f32.
    kind: Kind,
    momentum: Tensor,
    matrices: Vec<Matrix>,
}

impl Muon {
    /// An optimiser of `weights`, each with the rows of the matrices that it is made of. The momentum keeps the
    /// share `keep` of itself in each step.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn new<'a>(
        keep: f64,
        kind: Kind,
        weights: impl Iterator<Item = (&'a Tensor, Vec<i64>)>,
    ) -> Result<Self> {
        let weights: Vec<_> = weights.collect();
        let device = weights.first().map_or(Device::Cpu, |(weight, _)| weight.device());
        let length: i64 = weights.iter().map(|(weight, _)| weight.numel() as i64).sum();
        let momentum = Tensor::f_zeros([length], (Kind::Float, device))?;
        let mut start = 0;
        let matrices = weights
            .into_iter()
            .map(|(weight, rows)| {
                let length = weight.numel() as i64;
                let own = momentum.f_narrow(0, start, length)?.f_view(weight.size().as_slice())?;
                start += length;
                Ok(Matrix { weight: weight.shallow_clone(), momentum: own, rows })
            })
            .collect::<Result<_>>()?;
        Ok(Self { keep, kind, momentum, matrices })
    }

    /// The momentum of all weights, one after the other.
    pub fn momentum(&self) -> &Tensor {
        &self.momentum
    }

    /// The same, to restore it in place.
    pub fn momentum_mut(&mut self) -> &mut Tensor {
        &mut self.momentum
    }

    /// Moves the weights against `gradients`, given in their order.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn step(&mut self, gradients: &[Tensor], rate: f64) -> Result<()> {
        let _guard = tch::no_grad_guard();
        for (matrix, gradient) in self.matrices.iter_mut().zip(gradients) {
            let _ = matrix.momentum.f_lerp_(gradient, 1.0 - self.keep)?;
            let ahead = gradient.f_lerp(&matrix.momentum, self.keep)?.f_to_kind(self.kind)?;
            let mut start = 0;
            for &rows in &matrix.rows {
                let direction = orthogonal(&ahead.f_narrow(0, start, rows)?)?;
                // A tall matrix needs the longer step for the same change of its outputs.
                let tallness = rows as f64 / direction.size()[1] as f64;
                let step = direction.f_mul_scalar(-rate * tallness.max(1.0).sqrt())?;
                let _ = matrix.weight.f_narrow(0, start, rows)?.f_add_(&step)?;
                start += rows;
            }
        }
        Ok(())
    }
}

/// The nearest orthogonal matrix, roughly: U V^T of the singular value decomposition U S V^T.
fn orthogonal(matrix: &Tensor) -> Result<Tensor> {
    let (a, b, c) = QUINTIC;
    let tall = matrix.size()[0] > matrix.size()[1];
    let mut x = if tall { matrix.f_tr()? } else { matrix.shallow_clone() };
    x = x.f_div(&x.f_norm()?.f_add_scalar(1e-7)?)?;
    for _ in 0..ROUNDS {
        let gram = x.f_matmul(&x.f_tr()?)?;
        let even = gram.f_mul_scalar(b)?.f_add(&gram.f_matmul(&gram)?.f_mul_scalar(c)?)?;
        x = x.f_mul_scalar(a)?.f_add(&even.f_matmul(&x)?)?;
    }
    Ok(if tall { x.f_tr()? } else { x })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn singular_values_come_near_one() {
        tch::manual_seed(1);
        for shape in [[24, 64], [64, 24], [32, 32]] {
            let x = orthogonal(&Tensor::randn(shape, (Kind::Float, Device::Cpu))).unwrap();
            assert_eq!(x.size(), shape);
            let (_, values, _) = x.svd(true, false);
            assert!(values.median().double_value(&[]) > 0.6);
            assert!(values.max().double_value(&[]) < 1.3);
        }
    }

    #[test]
    fn parts_of_a_weight_step_as_if_they_were_apart() {
        tch::manual_seed(2);
        let gradient = Tensor::randn([12, 8], (Kind::Float, Device::Cpu));
        let moved = |parts: &[i64], gradient: &Tensor| {
            let weight = gradient.zeros_like();
            let mut muon = Muon::new(0.9, Kind::Float, [(&weight, parts.to_vec())].into_iter()).unwrap();
            muon.step(std::slice::from_ref(gradient), 0.1).unwrap();
            weight
        };
        let together = moved(&[8, 4], &gradient);
        let apart =
            Tensor::cat(&[moved(&[8], &gradient.narrow(0, 0, 8)), moved(&[4], &gradient.narrow(0, 8, 4))], 0);
        assert!((together - apart).abs().max().double_value(&[]) < 1e-6);
    }
}
