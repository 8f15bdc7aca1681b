//! Products of small matrices in f32, a tile at a time: for what is too small, or too oddly cut, for libtorch's.

use std::ops::Range;

use super::kernels::{LANES, Real};
use crate::cpu::vector::{Level, fma, vectorised};

/// Rows of a tile.
pub(super) const TILE: usize = 6;
/// Columns of a panel, where whole panels are worked on: four vectors of sums.
pub(super) const WIDE: usize = 64;

pub(crate) type Tile = [[f32; LANES]; TILE];

/// The numbers of a matrix that has room for whole tiles.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub numbers: &'a [f32],
    pub width: usize,
}

impl<'a> View<'a> {
    #[inline(always)]
    pub fn row(&self, row: usize) -> &'a [f32] {
        &self.numbers[row * self.width..][..self.width]
    }
}

/// A matrix with room for whole tiles. What is beyond its own rows and columns is zero until something is put there.
pub(super) struct Matrix {
    numbers: Vec<f32>,
    width: usize,
}

impl Matrix {
    /// With room for tiles that begin at multiples of their size.
    pub fn zeros(rows: usize, columns: usize) -> Self {
        let width = columns.next_multiple_of(LANES);
        Self { numbers: vec![0.0; (rows + TILE) * width], width }
    }

    /// With room for tiles that begin in any column.
    pub fn loose(rows: usize, columns: usize) -> Self {
        Self::zeros(rows, columns + LANES)
    }

    #[inline(always)]
    pub fn view(&self) -> View<'_> {
        View { numbers: &self.numbers, width: self.width }
    }

    #[inline(always)]
    pub fn row(&self, row: usize) -> &[f32] {
        &self.numbers[row * self.width..][..self.width]
    }

    #[inline(always)]
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.numbers[row * self.width..][..self.width]
    }

    /// Numbers of a row as f32, times `scale`.
    #[inline(always)]
    pub fn put<W: Real>(&mut self, row: usize, from: &[W], scale: f32) {
        for (to, from) in self.row_mut(row).iter_mut().zip(from) {
            *to = from.wide() * scale;
        }
    }

    #[inline(always)]
    pub fn put_column<W: Real>(&mut self, column: usize, from: &[W]) {
        for (row, from) in from.iter().enumerate() {
            self.numbers[row * self.width + column] = from.wide();
        }
    }

    /// A tile of numbers.
    #[inline(always)]
    pub fn put_tile(&mut self, row: usize, column: usize, tile: &Tile) {
        for (i, from) in tile.iter().enumerate() {
            self.row_mut(row + i)[column..column + LANES].copy_from_slice(from);
        }
    }
}

/// A tile of a product: rows of `a`, of which `inner` numbers count, `from` a row and a column on, times the columns from `column`
/// of `b`.
#[inline(always)]
pub(super) fn tile(
    level: Level,
    a: View<'_>,
    from: (usize, usize),
    b: View<'_>,
    column: usize,
    inner: usize,
) -> Tile {
    let mut sums = [[0f32; LANES]; TILE];
    of_rows(level, a, from, b, column, inner, &mut sums);
    sums
}

/// The same of the transposed `a`: columns from `row` of it, over `inner` of its rows.
#[inline(always)]
pub(super) fn tile_of_transposed(
    level: Level,
    a: View<'_>,
    row: usize,
    b: View<'_>,
    column: usize,
    inner: Range<usize>,
) -> Tile {
    let mut sums = [[0f32; LANES]; TILE];
    of_columns(level, a, row, b, column, inner, &mut sums);
    sums
}

vectorised! {
    fn of_rows [] [] (
        a: View<'_>,
        from: (usize, usize),
        b: View<'_>,
        column: usize,
        inner: usize,
        out: &mut Tile,
    ) {
        let (row, first) = from;
        let mut sums = [[0f32; LANES]; TILE];
        let mut rows = [&a.numbers[..0]; TILE];
        for (i, of_row) in rows.iter_mut().enumerate() {
            *of_row = &a.row(row + i)[first..first + inner];
        }
        for p in 0..inner {
            let b: [f32; LANES] = lanes(b, p, column);
            for (sums, row) in sums.iter_mut().zip(rows) {
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = fma::<F>(row[p], b, *sum);
                }
            }
        }
        *out = sums;
    }
}

vectorised! {
    fn of_columns [] [] (
        a: View<'_>,
        row: usize,
        b: View<'_>,
        column: usize,
        inner: Range<usize>,
        out: &mut Tile,
    ) {
        let mut sums = [[0f32; LANES]; TILE];
        for p in inner {
            let b: [f32; LANES] = lanes(b, p, column);
            let a: [f32; TILE] = lanes(a, p, row);
            for (sums, a) in sums.iter_mut().zip(a) {
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = fma::<F>(a, b, *sum);
                }
            }
        }
        *out = sums;
    }
}

/// Numbers of one row, in a copy of their own, for which the compiler finds a single load.
#[inline(always)]
fn lanes<const N: usize>(of: View<'_>, row: usize, column: usize) -> [f32; N] {
    let mut lanes = [0f32; N];
    lanes.copy_from_slice(&of.numbers[row * of.width + column..][..N]);
    lanes
}
