//! Sums of the products of prompts with themselves, and the equations that are solved with them.
//!
//! Both are symmetric, and what is above the diagonal is left out: it is half of the work, and of the memory, which is most of what a
//! batch of a few documents takes.

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use super::{FEATURES, Rows};
use crate::quant::slice_mut;

/// Prompts whose products are added up in f32, where whole numbers are exact to 2^24.
const PROMPTS_A_SUM: i64 = 1000;
/// Rows of the products that are made at once.
const ROWS_AT_ONCE: i64 = 250;

const SIZE: usize = FEATURES as usize;

/// `sum of x x^T` over prompts.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Products {
    /// The lower half, row after row.
    half: Vec<i32>,
}

impl Default for Products {
    fn default() -> Self {
        Self { half: vec![0; start(SIZE)] }
    }
}

impl Products {
    /// As they were written: i32, of so many `features` as there were then. Of those that there were not, it is as if none had been there.
    ///
    /// # Errors
    /// When they are not the half of such a matrix.
    pub fn read(half: &Tensor, features: i64) -> Result<Self> {
        let features = features as usize;
        ensure!(
            half.size() == [start(features) as i64] && features <= SIZE,
            "products of what was counted are not the half of a matrix"
        );
        let mut half = Vec::<i32>::try_from(half)?;
        half.resize(start(SIZE), 0);
        Ok(Self { half })
    }

    /// The lower half, i32 [FEATURES (FEATURES + 1) / 2].
    pub fn tensor(&self) -> Tensor {
        Tensor::from_slice(&self.half)
    }

    /// Takes out what some of the features say, `from` on to `to`: as if nothing had been there.
    pub fn blank(&mut self, from: usize, to: usize) {
        for row in from..SIZE {
            let end = if row < to { row + 1 } else { to };
            let begin = if row < to { 0 } else { from };
            self.half[start(row)..][begin..end].fill(0);
        }
    }

    /// Adds the products of prompts, which `rows` describe. False where the sums would no longer fit, and nothing is added.
    ///
    /// # Errors
    /// When rows are not what describes prompts.
    pub fn add(&mut self, rows: &Rows) -> Result<bool> {
        ensure!(rows.size().last() == Some(&FEATURES), "rows are not what describes prompts");
        let squares = rows.f_mul(rows)?.f_sum_dim_intlist(&[0_i64][..], false, Kind::Double)?;
        if !self.has_room(Vec::<f64>::try_from(squares)?.into_iter()) {
            return Ok(false);
        }
        for first in (0..rows.size()[0]).step_by(PROMPTS_A_SUM as usize) {
            let part = rows.f_narrow(0, first, PROMPTS_A_SUM.min(rows.size()[0] - first))?;
            for row in (0..FEATURES).step_by(ROWS_AT_ONCE as usize) {
                let end = FEATURES.min(row + ROWS_AT_ONCE);
                let of_rows =
                    part.f_narrow(1, row, end - row)?.f_tr()?.f_matmul(&part.f_narrow(1, 0, end)?)?;
                let of_rows = Vec::<f32>::try_from(of_rows.f_reshape([-1])?)?;
                for (row, sums) in (row as usize..).zip(of_rows.chunks_exact(end as usize)) {
                    let into = &mut self.half[start(row)..start(row + 1)];
                    into.iter_mut().zip(sums).for_each(|(into, sum)| *into += *sum as i32);
                }
            }
        }
        Ok(true)
    }

    /// Adds other sums. False where they would no longer fit, and nothing is added.
    pub fn join(&mut self, other: &Self) -> bool {
        let has_room = self.has_room(other.diagonal().map(f64::from));
        if has_room {
            self.half.iter_mut().zip(&other.half).for_each(|(into, sum)| *into += sum);
        }
        has_room
    }

    /// Whether there is room for more on the diagonal, and so everywhere: no product of two numbers adds up to more than those with
    /// themselves.
    fn has_room(&self, more: impl Iterator<Item = f64>) -> bool {
        self.diagonal().zip(more).all(|(sum, more)| f64::from(sum) + more <= f64::from(i32::MAX))
    }

    fn diagonal(&self) -> impl Iterator<Item = i32> {
        (0..SIZE).map(|row| self.half[start(row) + row])
    }

    /// All of them, f64 [FEATURES, FEATURES].
    #[cfg(test)]
    pub fn whole(&self) -> Tensor {
        let mut system = System::new().unwrap();
        system.add(self).unwrap();
        let lower = system.matrix;
        &lower + lower.tril(-1).tr()
    }
}

/// Where a row of the lower half begins.
const fn start(row: usize) -> usize {
    row * (row + 1) / 2
}

/// Equations `(P + r I) w = x`, with `P` the sum of some [`Products`].
pub(super) struct System {
    /// f64 [FEATURES, FEATURES], of which the lower half counts.
    matrix: Tensor,
}

impl System {
    /// Of nothing.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn new() -> Result<Self> {
        Ok(Self { matrix: Tensor::f_zeros([FEATURES, FEATURES], (Kind::Double, Device::Cpu))? })
    }

    /// Adds products.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn add(&mut self, products: &Products) -> Result<()> {
        let rows = slice_mut::<f64>(&mut self.matrix)?.chunks_exact_mut(SIZE);
        for (row, into) in rows.enumerate() {
            let sums = &products.half[start(row)..start(row + 1)];
            into.iter_mut().zip(sums).for_each(|(into, sum)| *into += f64::from(*sum));
        }
        Ok(())
    }

    /// The mean of the diagonal.
    ///
    /// # Errors
    /// When it is zero: no prompt has any feature.
    pub fn mean(&self) -> Result<f64> {
        let mean = self.matrix.f_trace()?.f_double_value(&[])? / FEATURES as f64;
        ensure!(mean > 0.0, "no prompt has any feature");
        Ok(mean)
    }

    /// The Cholesky factor of the system with such a ridge, in its place: each copy of such a matrix takes 50 MB.
    ///
    /// # Errors
    /// When there is none.
    pub fn factor(self, ridge: f64) -> Result<Factor> {
        let _ = self.matrix.f_diagonal(0, 0, 1)?.f_add_scalar_(ridge)?;
        // LAPACK goes down columns, which are the rows here, so that its upper half is the lower one.
        let columns = self.matrix.f_tr()?;
        let info = Tensor::f_zeros([], (Kind::Int, Device::Cpu))?;
        let (factor, _) = columns.f_linalg_cholesky_ex_l(&columns, &info, true, true)?;
        Ok(Factor { lower: factor.f_tr()?, ridge })
    }
}

/// What a [`System`] is solved with.
pub(super) struct Factor {
    /// `L` of `P + r I = L L^T`, f64 [FEATURES, FEATURES].
    lower: Tensor,
    /// `r`.
    ridge: f64,
}

impl Factor {
    /// `(P + r I)^-1 x` for each row `x` of f64 [n, FEATURES], again as rows.
    ///
    /// # Errors
    /// When they are not such rows.
    pub fn solve(&self, rows: &Tensor) -> Result<Tensor> {
        let half = self.lower.f_tr()?.f_linalg_solve_triangular(rows, true, false, false)?;
        Ok(self.lower.f_linalg_solve_triangular(&half, false, false, false)?)
    }

    /// `r (P + r I)^-1`, f64 [FEATURES, FEATURES]: no number of it is more than 1.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn inverse(&self) -> Result<Tensor> {
        Ok(self.lower.f_cholesky_inverse(false)?.f_mul_scalar(self.ridge)?)
    }

    /// `r x^T (P + r I)^-1 x` for each row `x` of some f32 [n, FEATURES], from the square of `L^-1 x`, for which f32 is enough.
    ///
    /// # Errors
    /// When they are not such rows.
    pub fn lengths(&self, rows: impl Iterator<Item = Result<Tensor>>) -> Result<Vec<f32>> {
        let lower = self.lower.f_to_kind(Kind::Float)?;
        let mut lengths = Vec::new();
        for rows in rows {
            let half = lower.f_tr()?.f_linalg_solve_triangular(&rows?, true, false, false)?;
            let squares = half.f_mul(&half)?.f_sum_dim_intlist(&[1_i64][..], false, Kind::Float)?;
            lengths.extend(Vec::<f32>::try_from(squares.f_mul_scalar(self.ridge)?)?);
        }
        Ok(lengths)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of small numbers, as features are.
    fn rows(count: i64, seed: i64) -> Rows {
        let numbers = Tensor::arange(count * FEATURES, (Kind::Int64, Device::Cpu)) * 2_654_435_761_i64 + seed;
        (numbers.bitwise_right_shift_tensor_scalar(7).remainder(128))
            .to_kind(Kind::Float)
            .view([count, FEATURES])
    }

    #[test]
    fn sums_are_those_of_the_whole_matrix_to_the_last_bit() {
        let rows = rows(1203, 5);
        let mut products = Products::default();
        assert!(products.add(&rows).unwrap());
        let x = rows.to_kind(Kind::Double);
        assert!(products.whole().equal(&x.tr().matmul(&x)));
        let mut parts = Products::default();
        assert!(parts.add(&rows.narrow(0, 0, 3)).unwrap());
        let mut rest = Products::default();
        assert!(rest.add(&rows.narrow(0, 3, 1200)).unwrap() && parts.join(&rest));
        assert!(parts == products && Products::read(&products.tensor(), FEATURES).unwrap() == products);
        assert!(Products::read(&products.tensor(), FEATURES - 1).is_err());
    }

    #[test]
    fn what_would_not_fit_is_not_added() {
        let mut products = Products::default();
        assert!(products.add(&rows(2, 1)).unwrap());
        products.half[start(7) + 7] = i32::MAX - 1;
        let before = products.clone();
        let big = Tensor::full([1, FEATURES], 2.0, (Kind::Float, Device::Cpu));
        assert!(!products.add(&big).unwrap() && products == before);
        assert!(!products.clone().join(&before) && products == before);
    }

    #[test]
    fn what_is_blanked_is_neither_in_rows_nor_in_columns() {
        let mut products = Products::default();
        let rows = rows(3, 9);
        assert!(products.add(&rows).unwrap());
        products.blank(1600, 2000);
        let _ = rows.narrow(1, 1600, 400).zero_();
        let mut without = Products::default();
        assert!(without.add(&rows).unwrap());
        assert!(products == without);
    }

    #[test]
    fn a_system_is_solved() {
        let (rows, asked) = (rows(60, 3), rows(4, 11).to_kind(Kind::Double));
        let mut products = Products::default();
        assert!(products.add(&rows).unwrap());
        let mut system = System::new().unwrap();
        assert!(system.mean().is_err(), "nothing is known yet");
        system.add(&products).unwrap();
        let ridge = 0.01 * system.mean().unwrap();
        let solved = system.factor(ridge).unwrap().solve(&asked).unwrap();
        let left = solved.matmul(&products.whole()) + &solved * ridge - &asked;
        assert!(left.abs().max().double_value(&[]) < 1e-8 * asked.max().double_value(&[]));
    }
}
