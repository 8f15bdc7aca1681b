//! What an adapter adds to the products of a block, and its gradient, each in one pass over the rows.
//!
//! For libtorch these are some thirty products a block, so small that it takes longer to set most of them up than to do
//! them.

use std::ops::Range;

use anyhow::{Result, ensure};
use half::bf16;
use tch::{Device, Kind, Tensor};

use super::kernels::LANES;
use super::pairs::Pairs;
use super::rows::{Element, Rows, each_alone};
use super::tiles::{Matrix, TILE, View, tile, tile_of_transposed};
use crate::active::Delta;
use crate::cpu::vector::{Level, vectorised};

/// Rows of one task.
const ROWS: usize = 8 * TILE;
/// Columns of one task of the gradient of weights.
const STRIP: usize = 8 * TILE;

/// An adapter's part in one merged matrix, in f32 as it is read.
pub(crate) struct Factors {
    level: Level,
    inputs: usize,
    ranks: usize,
    /// A of all parts, [ranks, inputs], and transposed.
    a: Matrix,
    a_transposed: Matrix,
    /// A transposed in pairs, where rows are bf16 and the processor multiplies these itself.
    a_pairs: Option<Pairs>,
    parts: Vec<Part>,
}

/// One B, and where it applies.
pub(crate) struct Part {
    /// Its ranks among all.
    rank: usize,
    ranks: usize,
    /// Its columns of the product.
    column: usize,
    columns: usize,
    /// [columns, ranks], and transposed.
    b: Matrix,
    b_transposed: Matrix,
    b_pairs: Option<Pairs>,
}

/// The same as it lies in the tensors of an adapter that was made ready.
pub(super) struct Source<W> {
    a: Rows<W>,
    /// The first column of each part, and its B.
    parts: Vec<(usize, Rows<W>)>,
}

impl<W: Element> Source<W> {
    /// `widths` are those of the slices of the merged product.
    pub fn of(delta: &Delta, widths: &[i64]) -> Result<Self> {
        let part = |(&ranks, (slice, b)): (&i64, &(usize, Tensor))| {
            let column = widths[..*slice].iter().sum::<i64>() as usize;
            Ok((column, Rows::of(&b.f_contiguous()?, ranks)?))
        };
        let parts = delta.ranks.iter().zip(&delta.parts).map(part).collect::<Result<_>>()?;
        Ok(Self { a: Rows::of(&delta.a, delta.a.size()[1])?, parts })
    }

    /// In f32, and transposed, and in pairs.
    pub fn read(&self, level: Level) -> Factors {
        let (a, a_transposed) = both(&self.a);
        let a_pairs = pairs(level, (self.a.width(), self.a.len()), |input, rank| self.a.get(rank)[input]);
        let mut rank = 0;
        let part = |(column, b): &(usize, Rows<W>)| {
            let (ranks, columns, first) = (b.width(), b.len(), rank);
            let b_pairs = pairs(level, (columns, ranks), |column, rank| b.get(column)[rank]);
            let (b, b_transposed) = both(b);
            rank += ranks;
            Part { rank: first, ranks, column: *column, columns, b, b_transposed, b_pairs }
        };
        let parts = self.parts.iter().map(part).collect();
        Factors { level, inputs: self.a.width(), ranks: self.a.len(), a, a_transposed, a_pairs, parts }
    }
}

impl Factors {
    /// Room for `x A^T` of so many rows, f32.
    fn low(&self, rows: usize) -> Result<Tensor> {
        let (rows, width) = (rows + TILE, (self.ranks + LANES).next_multiple_of(LANES));
        Ok(Tensor::f_zeros([rows as i64, width as i64], (Kind::Float, Device::Cpu))?)
    }

    /// Adds `(x A^T) B^T` to the product of `x`, in place; returns `x A^T`.
    pub fn add_to<W: Element>(&self, x: &Tensor, product: &Tensor) -> Result<Tensor> {
        let (x, product) = (Rows::<W>::of(x, x.size()[1])?, Rows::<W>::of(product, product.size()[1])?);
        let low = self.low(x.len())?;
        let of_low = Rows::<f32>::of(&low, low.size()[1])?;
        each_alone(x.len().div_ceil(ROWS), |task| {
            let rows = task * ROWS..x.len().min((task + 1) * ROWS);
            add(self.level, self, rows, &x, &product, &of_low);
        });
        Ok(low)
    }

    /// Adds to `of_x` what comes down to `x` from the gradient `above` of the product, and writes the gradients of A, one of
    /// each part, and of B, scaled. `low` is what [`Factors::add_to`] returned.
    #[allow(clippy::too_many_arguments)]
    pub fn gradient<W: Element>(
        &self,
        x: &Tensor,
        low: &Tensor,
        above: &Tensor,
        of_x: Option<&Tensor>,
        of_a: &[Tensor],
        of_b: &[(Tensor, f32)],
    ) -> Result<()> {
        let parts = self.parts.len();
        ensure!(of_a.len() == parts && of_b.len() == parts, "an adapter's gradient has other parts than it");
        let (x, above) = (Rows::<W>::of(x, x.size()[1])?, Rows::<W>::of(above, above.size()[1])?);
        let of_x = of_x.map(|of_x| Rows::<W>::of(of_x, of_x.size()[1])).transpose()?;
        let below = self.low(x.len())?;
        let of_low = Rows::<f32>::of(&below, below.size()[1])?;
        each_alone(x.len().div_ceil(ROWS), |task| {
            let rows = task * ROWS..x.len().min((task + 1) * ROWS);
            lower(self.level, self, rows, &above, &of_low, of_x.as_ref());
        });
        let low = Rows::<f32>::of(low, low.size()[1])?;
        let of_a: Vec<Rows<f32>> = of_a.iter().map(|a| Rows::of(a, a.size()[1])).collect::<Result<_>>()?;
        let of_b: Vec<(Rows<f32>, f32)> =
            of_b.iter().map(|(b, scale)| Ok((Rows::of(b, b.size()[1])?, *scale))).collect::<Result<_>>()?;
        // Strips of each B, then those of A.
        let mut strips: Vec<(Option<usize>, usize)> = Vec::new();
        for (part, of) in self.parts.iter().enumerate() {
            strips.extend((0..of.columns).step_by(STRIP).map(|column| (Some(part), column)));
        }
        strips.extend((0..self.inputs).step_by(STRIP).map(|column| (None, column)));
        each_alone(strips.len(), |i| match strips[i] {
            (Some(part), column) => {
                let (out, scale) = &of_b[part];
                strip_of_b(self.level, self, (part, column), &above, low.view(), out, *scale);
            }
            (None, column) => strip_of_a(self.level, self, column, &x, of_low.view(), &of_a),
        });
        Ok(())
    }
}

/// A matrix of so many rows and columns in pairs, where that is of use.
fn pairs<W: Element>(
    level: Level,
    (inner, columns): (usize, usize),
    number: impl Fn(usize, usize) -> W,
) -> Option<Pairs> {
    W::as_bf16(&[])
        .and_then(|_| Pairs::new(level, inner, columns, |i, j| bf16::from_f32(number(i, j).wide())))
}

/// Columns of rows from `first` on as bf16, for [`Pairs`].
#[inline(always)]
fn as_bf16<W: Element>(rows: &Rows<W>, first: usize, count: usize, columns: Range<usize>) -> [&[bf16]; TILE] {
    let mut of_tile = [&[][..]; TILE];
    for (i, to) in of_tile.iter_mut().enumerate().take(count) {
        *to = W::as_bf16(&rows.get(first + i)[columns.clone()]).unwrap_or_default();
    }
    of_tile
}

/// Rows as f32, and transposed.
fn both<W: Element>(rows: &Rows<W>) -> (Matrix, Matrix) {
    let (count, width) = (rows.len(), rows.width());
    let (mut plain, mut transposed) = (Matrix::zeros(count, width), Matrix::zeros(width, count));
    for i in 0..count {
        plain.put(i, rows.get(i), 1.0);
    }
    for column in 0..width {
        for (i, to) in transposed.row_mut(column).iter_mut().enumerate().take(count) {
            *to = plain.row(i)[column];
        }
    }
    (plain, transposed)
}

/// Adds a tile's rows to those of a tensor, which nobody else may have: `count` of them, of so many `columns`.
#[inline(always)]
fn add_tile<W: Element>(
    to: &Rows<W>,
    row: usize,
    count: usize,
    columns: Range<usize>,
    sums: &[[f32; LANES]; TILE],
) {
    for (i, sums) in sums.iter().enumerate().take(count) {
        // SAFETY: the callers' tasks have rows of their own.
        #[allow(unsafe_code)]
        let to = unsafe { to.columns_mut(row + i, columns.start, columns.len()) };
        for (to, sum) in to.iter_mut().zip(sums) {
            *to = W::of(to.wide() + sum);
        }
    }
}

vectorised! {
    fn add [W: Element] [W] (
        of: &Factors,
        rows: Range<usize>,
        x: &Rows<W>,
        product: &Rows<W>,
        low: &Rows<f32>,
    ) {
        let (mut tile_of_x, mut lower) = (Matrix::zeros(TILE, of.inputs), Matrix::loose(TILE, of.ranks));
        for first in rows.clone().step_by(TILE) {
            let count = TILE.min(rows.end - first);
            if let Some(pairs) = &of.a_pairs {
                let rows = as_bf16(x, first, count, 0..of.inputs);
                for rank in (0..of.ranks).step_by(LANES) {
                    lower.put_tile(0, rank, &pairs.tile(&rows[..count], rank));
                }
            } else {
                for i in 0..count {
                    tile_of_x.put(i, x.get(first + i), 1.0);
                }
                for rank in (0..of.ranks).step_by(LANES) {
                    let sums = tile(of.level, tile_of_x.view(), (0, 0), of.a_transposed.view(), rank, of.inputs);
                    lower.put_tile(0, rank, &sums);
                }
            }
            for i in 0..count {
                // SAFETY: these rows are those of this task alone.
                #[allow(unsafe_code)]
                let to = unsafe { low.columns_mut(first + i, 0, of.ranks) };
                to.copy_from_slice(&lower.row(i)[..of.ranks]);
            }
            for part in &of.parts {
                for column in (0..part.columns).step_by(LANES) {
                    let from = (0, part.rank);
                    let sums = tile(of.level, lower.view(), from, part.b_transposed.view(), column, part.ranks);
                    let end = part.columns.min(column + LANES);
                    add_tile(product, first, count, part.column + column..part.column + end, &sums);
                }
            }
        }
    }
}

vectorised! {
    fn lower [W: Element] [W] (
        of: &Factors,
        rows: Range<usize>,
        above: &Rows<W>,
        of_low: &Rows<f32>,
        of_x: Option<&Rows<W>>,
    ) {
        let widest = of.parts.iter().map(|part| part.columns).max().unwrap_or(0);
        let (mut tile_above, mut lower) = (Matrix::zeros(TILE, widest), Matrix::loose(TILE, of.ranks));
        for first in rows.clone().step_by(TILE) {
            let count = TILE.min(rows.end - first);
            for part in &of.parts {
                let columns = part.column..part.column + part.columns;
                if let Some(pairs) = &part.b_pairs {
                    let rows = as_bf16(above, first, count, columns);
                    for rank in (0..part.ranks).step_by(LANES) {
                        lower.put_tile(0, part.rank + rank, &pairs.tile(&rows[..count], rank));
                    }
                    continue;
                }
                for i in 0..count {
                    tile_above.put(i, &above.get(first + i)[columns.clone()], 1.0);
                }
                for rank in (0..part.ranks).step_by(LANES) {
                    // What is beyond the part's ranks is zero here, and the next part's turn comes later.
                    let sums = tile(of.level, tile_above.view(), (0, 0), part.b.view(), rank, part.columns);
                    lower.put_tile(0, part.rank + rank, &sums);
                }
            }
            for i in 0..count {
                // SAFETY: these rows are those of this task alone.
                #[allow(unsafe_code)]
                let to = unsafe { of_low.columns_mut(first + i, 0, of.ranks) };
                to.copy_from_slice(&lower.row(i)[..of.ranks]);
            }
            let Some(of_x) = of_x else { continue };
            for column in (0..of.inputs).step_by(LANES) {
                let sums = tile(of.level, lower.view(), (0, 0), of.a.view(), column, of.ranks);
                add_tile(of_x, first, count, column..of.inputs.min(column + LANES), &sums);
            }
        }
    }
}

/// Columns from `column` on as f32, at most a strip of them.
#[inline(always)]
fn strip<W: Element>(rows: &Rows<W>, columns: Range<usize>) -> Matrix {
    let mut strip = Matrix::zeros(rows.len(), STRIP);
    for i in 0..rows.len() {
        strip.put(i, &rows.get(i)[columns.clone()], 1.0);
    }
    strip
}

vectorised! {
    /// `scale * above^T low`, rows of one B's gradient, `from` a part and a row on.
    fn strip_of_b [W: Element] [W] (
        of: &Factors,
        from: (usize, usize),
        above: &Rows<W>,
        low: View<'_>,
        out: &Rows<f32>,
        scale: f32,
    ) {
        let (part, column) = (&of.parts[from.0], from.1);
        let end = part.columns.min(column + STRIP);
        let strip = strip(above, part.column + column..part.column + end);
        for first in (column..end).step_by(TILE) {
            for rank in (0..part.ranks).step_by(LANES) {
                let from = part.rank + rank;
                let sums = tile_of_transposed(of.level, strip.view(), first - column, low, from, 0..above.len());
                for (i, sums) in sums.iter().enumerate().take(end - first) {
                    // SAFETY: these rows are those of this task alone.
                    #[allow(unsafe_code)]
                    let out = unsafe { out.columns_mut(first + i, rank, LANES.min(part.ranks - rank)) };
                    for (out, sum) in out.iter_mut().zip(sums) {
                        *out = sum * scale;
                    }
                }
            }
        }
    }
}

vectorised! {
    /// `of_low^T x`, columns from `column` on of the gradients of all A.
    fn strip_of_a [W: Element] [W] (
        of: &Factors,
        column: usize,
        x: &Rows<W>,
        of_low: View<'_>,
        out: &[Rows<f32>],
    ) {
        let end = x.width().min(column + STRIP);
        let strip = strip(x, column..end);
        for (part, out) in of.parts.iter().zip(out) {
            for rank in (0..part.ranks).step_by(TILE) {
                for first in (column..end).step_by(LANES) {
                    let from = part.rank + rank;
                    let sums = tile_of_transposed(of.level, of_low, from, strip.view(), first - column, 0..x.len());
                    for (i, sums) in sums.iter().enumerate().take(part.ranks - rank) {
                        // SAFETY: these columns are those of this task alone.
                        #[allow(unsafe_code)]
                        let out = unsafe { out.columns_mut(rank + i, first, LANES.min(end - first)) };
                        out.copy_from_slice(&sums[..out.len()]);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::vector::LEVELS;
    use crate::golden;

    fn numbers(rows: i64, columns: i64, pitch: f64) -> Tensor {
        let numbers = Tensor::arange(rows * columns, (Kind::Float, Device::Cpu)).view([rows, columns]);
        (numbers * pitch).sin()
    }

    /// Two parts of uneven rank, with a slice between them that has none; nothing is a whole number of tiles.
    #[test]
    fn it_is_what_the_products_are_one_after_the_other() {
        let (rows, inputs, widths) = (61, 57, [9, 5, 51]);
        let (x, above) = (numbers(rows, inputs, 0.3), numbers(rows, 65, 0.9));
        let (a, b) = (numbers(24, inputs, 0.7), [numbers(9, 7, 1.1), numbers(51, 17, 1.3)]);
        let low = x.matmul(&a.tr());
        let added = [low.narrow(1, 0, 7).matmul(&b[0].tr()), low.narrow(1, 7, 17).matmul(&b[1].tr())];
        let of_low =
            Tensor::cat(&[above.narrow(1, 0, 9).matmul(&b[0]), above.narrow(1, 14, 51).matmul(&b[1])], 1);
        let parts = vec![(0, b[0].shallow_clone()), (2, b[1].shallow_clone())];
        let delta = Delta { a: a.shallow_clone(), ranks: vec![7, 17], parts };
        for level in LEVELS.into_iter().filter(|&level| level <= Level::best()) {
            let factors = Source::<f32>::of(&delta, &widths).unwrap().read(level);
            let product = Tensor::ones([rows, 65], (Kind::Float, Device::Cpu));
            let found = factors.add_to::<f32>(&x, &product).unwrap();
            assert!(golden::distance(&(product.narrow(1, 0, 9) - 1), &added[0]) < 1e-4);
            assert!(golden::distance(&(product.narrow(1, 14, 51) - 1), &added[1]) < 1e-4);
            assert!(product.narrow(1, 9, 5).eq(1).all().int64_value(&[]) == 1);

            let of_x = Tensor::ones([rows, inputs], (Kind::Float, Device::Cpu));
            let of_a = [7, 17].map(|ranks| Tensor::zeros([ranks, inputs], (Kind::Float, Device::Cpu)));
            let of_b = [(9, 7, 0.5), (51, 17, 2.0)].map(|(rows, ranks, scale)| {
                (Tensor::zeros([rows, ranks], (Kind::Float, Device::Cpu)), scale)
            });
            factors.gradient::<f32>(&x, &found, &above, Some(&of_x), &of_a, &of_b).unwrap();
            assert!(golden::distance(&(of_x - 1), &of_low.matmul(&a)) < 1e-3);
            let expected = of_low.tr().matmul(&x);
            assert!(golden::distance(&of_a[0], &expected.narrow(0, 0, 7)) < 1e-3);
            assert!(golden::distance(&of_a[1], &expected.narrow(0, 7, 17)) < 1e-3);
            for (i, (column, columns, rank, ranks)) in [(0, 9, 0, 7), (14, 51, 7, 17)].into_iter().enumerate()
            {
                let part = above.narrow(1, column, columns).tr().matmul(&low.narrow(1, rank, ranks));
                let (found, scale) = &of_b[i];
                assert!(golden::distance(found, &(part * f64::from(*scale))) < 1e-3);
            }
        }
    }

    /// Where the processor multiplies pairs of bf16, what is in f32 elsewhere.
    #[test]
    fn in_bf16_it_is_nearly_the_same() {
        let (rows, inputs, widths) = (61, 58, [10, 51]);
        let half = |of: &Tensor| of.to_kind(Kind::BFloat16);
        let wide = |of: &Tensor| of.to_kind(Kind::Float);
        let (x, above) = (half(&numbers(rows, inputs, 0.3)), half(&numbers(rows, 61, 0.9)));
        let (a, b) = (half(&numbers(24, inputs, 0.7)), [(10, 7, 1.1), (51, 17, 1.3)]);
        let b = b.map(|(columns, ranks, pitch)| half(&numbers(columns, ranks, pitch)));
        let run = |level| {
            let parts = b.iter().map(Tensor::shallow_clone).enumerate().collect();
            let delta = Delta { a: a.shallow_clone(), ranks: vec![7, 17], parts };
            let factors = Source::<bf16>::of(&delta, &widths).unwrap().read(level);
            let product = half(&Tensor::zeros([rows, 61], (Kind::Float, Device::Cpu)));
            let low = factors.add_to::<bf16>(&x, &product).unwrap();
            let of_x = half(&Tensor::zeros([rows, inputs], (Kind::Float, Device::Cpu)));
            let of_a = [7, 17].map(|ranks| Tensor::zeros([ranks, inputs], (Kind::Float, Device::Cpu)));
            let of_b = [(10, 7), (51, 17)]
                .map(|(rows, ranks)| (Tensor::zeros([rows, ranks], (Kind::Float, Device::Cpu)), 1.0));
            factors.gradient::<bf16>(&x, &low, &above, Some(&of_x), &of_a, &of_b).unwrap();
            [wide(&product), wide(&of_x), Tensor::cat(&of_a, 0)]
        };
        let low = wide(&x).matmul(&wide(&a).tr()).split_with_sizes([7, 17], 1);
        let of_low = wide(&above).split_with_sizes(widths, 1);
        let of_low = Tensor::cat(&[of_low[0].matmul(&wide(&b[0])), of_low[1].matmul(&wide(&b[1]))], 1);
        let expected = [
            Tensor::cat(&[low[0].matmul(&wide(&b[0]).tr()), low[1].matmul(&wide(&b[1]).tr())], 1),
            of_low.matmul(&wide(&a)),
            of_low.tr().matmul(&wide(&x)),
        ];
        for level in LEVELS.into_iter().filter(|&level| level <= Level::best()) {
            for (found, expected) in run(level).iter().zip(&expected) {
                let size = expected.abs().max().double_value(&[]);
                assert!(golden::distance(found, expected) < 0.005 * size, "{level:?}");
            }
        }
    }
}
