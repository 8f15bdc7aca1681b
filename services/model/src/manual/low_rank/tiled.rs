//! An adapter's part in f32, in tiles.

use std::marker::PhantomData;
use std::ops::Range;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use super::{Given, LowRank, ROWS, Source, check, gradients, rows};
use crate::cpu::vector::{Level, vectorised};
use crate::manual::Way;
use crate::manual::kernels::LANES;
use crate::manual::pairs::Panels;
use crate::manual::rows::{Element, Rows, each_alone};
use crate::manual::tiles::{Matrix, TILE, View, tile, tile_of_transposed};

/// Columns of one task of the gradient of weights.
const STRIP: usize = 8 * TILE;

/// An adapter's part in one merged matrix, in f32 as it is read. Rows are in the format `W`.
pub(super) struct Tiled<W> {
    level: Level,
    inputs: usize,
    ranks: usize,
    /// A of all parts, [ranks, inputs], and transposed.
    a: Matrix,
    a_transposed: Matrix,
    parts: Vec<Part>,
    format: PhantomData<W>,
}

/// One B, and where it applies.
struct Part {
    /// Its ranks among all.
    rank: usize,
    ranks: usize,
    /// Its columns of the product.
    column: usize,
    columns: usize,
    /// [columns, ranks], and transposed.
    b: Matrix,
    b_transposed: Matrix,
}

impl<W: Element> Tiled<W> {
    pub fn read(source: &Source<W>, level: Level) -> Self {
        let (a, a_transposed) = both(&source.a);
        let mut rank = 0;
        let part = |(column, b): &(usize, Rows<W>)| {
            let (ranks, columns, first) = (b.width(), b.len(), rank);
            let (b, b_transposed) = both(b);
            rank += ranks;
            Part { rank: first, ranks, column: *column, columns, b, b_transposed }
        };
        let parts = source.parts.iter().map(part).collect();
        let (inputs, ranks) = (source.a.width(), source.a.len());
        Self { level, inputs, ranks, a, a_transposed, parts, format: PhantomData }
    }
}

impl<W: Element> LowRank for Tiled<W> {
    /// f32, with more rows and columns, so that there are whole tiles.
    fn down(&self, way: Way, x: &Tensor) -> Result<Tensor> {
        let x = rows::<W>(x)?;
        let outputs = || self.parts.iter().map(|part| part.column + part.columns).max().unwrap_or(0);
        check(&x, if matches!(way, Way::Forward) { self.inputs } else { outputs() })?;
        let size = [x.len() + TILE, (self.ranks + LANES).next_multiple_of(LANES)].map(|n| n as i64);
        let low = Tensor::f_zeros(size, (Kind::Float, Device::Cpu))?;
        let out = rows::<f32>(&low)?;
        let level = self.level;
        each_alone(x.len().div_ceil(ROWS), |task| {
            let place = task * ROWS..x.len().min((task + 1) * ROWS);
            match way {
                Way::Forward => {
                    let x = (&x, 0..self.inputs);
                    down(level, level, self.ranks, place, x, &self.a_transposed, (&out, 0));
                }
                Way::Backward => {
                    for part in &self.parts {
                        let x = (&x, part.column..part.column + part.columns);
                        down(level, level, part.ranks, place.clone(), x, &part.b, (&out, part.rank));
                    }
                }
            }
        });
        Ok(low)
    }

    fn up(&self, way: Way, low: &Tensor, product: &Tensor) -> Result<()> {
        let (low, product) = (rows::<f32>(low)?, rows::<W>(product)?);
        ensure!(low.len() == product.len() + TILE, "rows and ranks differ");
        let level = self.level;
        each_alone(product.len().div_ceil(ROWS), |task| {
            let place = task * ROWS..product.len().min((task + 1) * ROWS);
            let low = low.view();
            match way {
                Way::Forward => {
                    for part in &self.parts {
                        let to = (&product, part.column..part.column + part.columns);
                        let low = (low, part.rank..part.rank + part.ranks);
                        up(level, level, place.clone(), low, &part.b_transposed, to);
                    }
                }
                Way::Backward => {
                    up(level, level, place, (low, 0..self.ranks), &self.a, (&product, 0..self.inputs));
                }
            }
        });
        Ok(())
    }

    fn panels(&self, _: Way) -> Option<&Panels> {
        None
    }

    fn gradient(&self, given: Given<'_>, of_a: &[Tensor], of_b: &[(Tensor, f32)]) -> Result<()> {
        let (of_a, of_b) = gradients(self.parts.len(), of_a, of_b)?;
        let (x, low) = (rows::<W>(given.x)?, rows::<f32>(given.low)?);
        let (above, of_low) = (rows::<W>(given.above)?, rows::<f32>(given.of_low)?);
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

vectorised! {
    /// Some rows of `x`, of which these columns count, times a matrix of so many `ranks`: in columns of `out`, from one on.
    fn down [W: Element] [W] (
        of_tiles: Level,
        ranks: usize,
        place: Range<usize>,
        x: (&Rows<W>, Range<usize>),
        matrix: &Matrix,
        out: (&Rows<f32>, usize),
    ) {
        let (x, columns) = x;
        let mut of_x = Matrix::zeros(TILE, columns.len());
        for first in place.clone().step_by(TILE) {
            let count = TILE.min(place.end - first);
            for i in 0..count {
                of_x.put(i, &x.get(first + i)[columns.clone()], 1.0);
            }
            for rank in (0..ranks).step_by(LANES) {
                let sums = tile(of_tiles, of_x.view(), (0, 0), matrix.view(), rank, columns.len());
                for (i, sums) in sums.iter().enumerate().take(count) {
                    // SAFETY: these rows are those of this task alone.
                    #[allow(unsafe_code)]
                    let to = unsafe { out.0.columns_mut(first + i, out.1 + rank, LANES.min(ranks - rank)) };
                    to.copy_from_slice(&sums[..to.len()]);
                }
            }
        }
    }
}

vectorised! {
    /// Adds to columns of some rows of a product those ranks of `low` times a matrix.
    fn up [W: Element] [W] (
        of_tiles: Level,
        place: Range<usize>,
        low: (View<'_>, Range<usize>),
        matrix: &Matrix,
        product: (&Rows<W>, Range<usize>),
    ) {
        let ((low, ranks), (product, columns)) = (low, product);
        for first in place.clone().step_by(TILE) {
            for column in columns.clone().step_by(LANES) {
                let from = (first, ranks.start);
                let sums = tile(of_tiles, low, from, matrix.view(), column - columns.start, ranks.len());
                for (i, sums) in sums.iter().enumerate().take(place.end - first) {
                    // SAFETY: these rows are those of this task alone.
                    #[allow(unsafe_code)]
                    let to = unsafe { product.columns_mut(first + i, column, LANES.min(columns.end - column)) };
                    for (to, sum) in to.iter_mut().zip(sums) {
                        *to = W::of(to.wide() + sum);
                    }
                }
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
        of: &Tiled<W>,
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
        of: &Tiled<W>,
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
