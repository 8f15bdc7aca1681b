//! Products of bf16 with a narrow matrix, with AVX-512's products of pairs: twice as many numbers at a time as in f32, and read as
//! they lie there. An adapter goes down to its ranks by them, up again, and to its gradient.

mod kernel;

use std::ops::Range;

use half::bf16;

use super::kernels::LANES;
use super::rows::Rows;
use super::tiles::{TILE, Tile, WIDE};
use crate::cpu::vector::Level;

/// Whether this level multiplies pairs.
pub(super) fn there(level: Level) -> bool {
    level >= Level::Avx512Bf16
}

/// A matrix [inner, columns] of few columns, whose rows lie in pairs: [inner / 2, columns, 2]. There are whole vectors of columns, of
/// which the last may be zero.
pub(crate) struct Pairs {
    numbers: Vec<bf16>,
    width: usize,
}

impl Pairs {
    /// With these numbers, by row and column. `inner` is even.
    pub fn new(inner: usize, columns: usize, number: impl Fn(usize, usize) -> bf16) -> Self {
        let width = columns.next_multiple_of(LANES);
        let mut numbers = vec![bf16::ZERO; inner * width];
        for row in 0..inner {
            for column in 0..columns {
                numbers[(row / 2 * width + column) * 2 + row % 2] = number(row, column);
            }
        }
        Self { numbers, width }
    }

    /// Some rows, [`TILE`] at most, times the [`LANES`] columns from `column` on. What is beyond the rows has no meaning.
    pub fn tile(&self, rows: &[&[bf16]], column: usize) -> Tile {
        let inner = self.numbers.len() / self.width;
        let mut of_tile = [&rows[0][..inner]; TILE];
        for (to, row) in of_tile.iter_mut().zip(rows) {
            *to = &row[..inner];
        }
        kernel::tile(of_tile, &self.numbers[2 * column..], self.width)
    }
}

/// A part of a matrix that is not zero.
pub(super) struct Block {
    /// Its rows, an even one first.
    pub rows: Range<usize>,
    pub columns: Range<usize>,
}

/// A matrix [inner, columns] of few rows, in panels of [`WIDE`] columns: of each only the rows that are not zero there, in pairs.
pub(crate) struct Panels {
    numbers: Vec<bf16>,
    /// Where each panel begins, and its pairs of rows.
    places: Vec<(usize, Range<usize>)>,
}

impl Panels {
    /// With these numbers, by block, and row and column within it.
    pub fn new(blocks: &[Block], number: impl Fn(usize, usize, usize) -> bf16) -> Self {
        let columns = blocks.iter().map(|block| block.columns.end).max().unwrap_or(0);
        let (mut numbers, mut places) = (Vec::new(), Vec::new());
        for first in (0..columns).step_by(WIDE) {
            let of_panel =
                |block: &Block| block.columns.start.max(first)..block.columns.end.min(first + WIDE);
            let here = || blocks.iter().enumerate().filter(|(_, block)| !of_panel(block).is_empty());
            let pairs = here().map(|(_, block)| block.rows.start / 2).min().unwrap_or(0)
                ..here().map(|(_, block)| block.rows.end.div_ceil(2)).max().unwrap_or(0);
            let start = numbers.len();
            numbers.resize(start + pairs.len() * WIDE * 2, bf16::ZERO);
            for (i, block) in here() {
                for row in block.rows.clone() {
                    for column in of_panel(block) {
                        let at = (row / 2 - pairs.start) * WIDE + column - first;
                        numbers[start + 2 * at + row % 2] =
                            number(i, row - block.rows.start, column - block.columns.start);
                    }
                }
            }
            places.push((start, pairs));
        }
        Self { numbers, places }
    }

    /// Adds to `sums` rows from `first` on, so many of them, times the columns of a panel.
    pub fn add(
        &self,
        panel: usize,
        rows: &Rows<bf16>,
        (first, count): (usize, usize),
        sums: &mut [[f32; WIDE]; TILE],
    ) {
        let Some((start, pairs)) = self.places.get(panel) else { return };
        let numbers = 2 * pairs.start..2 * pairs.end;
        let mut of_tile = [&rows.get(first)[numbers.clone()]; TILE];
        for (i, row) in of_tile.iter_mut().enumerate().take(count) {
            *row = &rows.get(first + i)[numbers.clone()];
        }
        kernel::add(of_tile, &self.numbers[*start..][..numbers.len() * WIDE], sums);
    }
}

/// Columns of some rows, the rows in pairs: [rows / 2, columns, 2]; what is added up over rows.
pub(super) struct Upright {
    numbers: Vec<bf16>,
    /// With columns of zeros up to a whole number of [`kernel::FEWEST`].
    columns: usize,
}

impl Upright {
    pub fn new(of: &Rows<bf16>, columns: Range<usize>) -> Self {
        let width = columns.len().next_multiple_of(kernel::FEWEST);
        let mut numbers = vec![bf16::ZERO; of.len().next_multiple_of(2) * width];
        for i in 0..of.len() {
            let pair = &mut numbers[i / 2 * 2 * width..][..2 * width];
            for (pair, number) in pair.as_chunks_mut::<2>().0.iter_mut().zip(&of.get(i)[columns.clone()]) {
                pair[i % 2] = *number;
            }
        }
        Self { numbers, columns: width }
    }

    /// With columns of zeros at the end.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Adds to `sums`, [columns of these, `columns`], the product of these transposed and `columns` of `other`.
    pub fn product(&self, other: &Rows<bf16>, columns: Range<usize>, sums: &mut [f32]) {
        /// Rows at a time, which stay near the processor while all sums take theirs.
        const ROWS: usize = 64;
        assert_eq!(sums.len(), self.columns * columns.len());
        for first in (0..other.len()).step_by(ROWS) {
            let count = ROWS.min(other.len() - first);
            let rows = kernel::Strip { numbers: other.some(first, count), width: other.width() };
            let pairs = &self.numbers[first * self.columns..][..count.next_multiple_of(2) * self.columns];
            kernel::gather(pairs, self.columns, rows, columns.clone(), sums);
        }
    }
}

#[cfg(test)]
mod tests;
