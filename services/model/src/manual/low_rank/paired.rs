//! An adapter's part in bf16, by products of pairs.

use std::ops::Range;
use std::sync::OnceLock;

use anyhow::{Result, ensure};
use half::bf16;
use tch::{Device, Kind, Tensor};

use super::{Given, LowRank, ROWS, Source, check, gradients, rows};
use crate::cpu::vector::{Level, Number, narrow, vectorised};
use crate::manual::Way;
use crate::manual::kernels::LANES;
use crate::manual::pairs::{self, Block, Pairs, Panels, Upright};
use crate::manual::rows::{Element, Rows, each_alone};
use crate::manual::tiles::{TILE, WIDE};

/// Columns of one task of the gradient of weights.
const STRIP: usize = 128;

/// An adapter's part in one merged matrix.
pub(super) struct Paired {
    level: Level,
    inputs: usize,
    /// Numbers of a row that has gone down: of each part its ranks, and where these are odd a zero.
    width: usize,
    a_down: Pairs,
    a_up: Panels,
    b_up: Panels,
    parts: Vec<Part>,
}

/// One B.
struct Part {
    down: Pairs,
    /// Its ranks in a row that has gone down.
    ranks: Range<usize>,
    /// Its columns of the product.
    columns: Range<usize>,
}

impl Paired {
    /// None where the processor has no such products, or rows are not bf16 or have no whole number of pairs.
    pub fn read<W: Element>(source: &Source<W>, level: Level) -> Option<Self> {
        let Source { a, parts } = source;
        let even = parts.iter().all(|(_, b)| b.len().is_multiple_of(2)) && a.width().is_multiple_of(2);
        if W::KIND != Kind::BFloat16 || !pairs::there(level) || !even {
            return None;
        }
        let number = |of: &Rows<W>, row: usize, column: usize| bf16::from_f32(of.get(row)[column].wide());
        let (mut width, mut of_width, mut made) = (0, Vec::new(), Vec::new());
        for (first, b) in parts {
            let ranks = width..width + b.width();
            width = ranks.end.next_multiple_of(2);
            // The row of A that a number of such a row belongs to.
            of_width.extend((of_width.iter().flatten().count()..).take(b.width()).map(Some));
            of_width.resize(width, None);
            let down = Pairs::new(b.len(), b.width(), |column, rank| number(b, column, rank));
            made.push(Part { down, ranks, columns: *first..first + b.len() });
        }
        let of_a =
            |rank: usize, input: usize| of_width[rank].map_or(bf16::ZERO, |rank| number(a, rank, input));
        let blocks: Vec<Block> = made
            .iter()
            .map(|part| Block { rows: part.ranks.clone(), columns: part.columns.clone() })
            .collect();
        Some(Self {
            level,
            inputs: a.width(),
            width,
            a_down: Pairs::new(a.width(), width, |input, rank| of_a(rank, input)),
            a_up: Panels::new(&[Block { rows: 0..width, columns: 0..a.width() }], |_, rank, input| {
                of_a(rank, input)
            }),
            b_up: Panels::new(&blocks, |part, rank, column| number(&parts[part].1, column, rank)),
            parts: made,
        })
    }

    fn up_panels(&self, way: Way) -> &Panels {
        match way {
            Way::Forward => &self.b_up,
            Way::Backward => &self.a_up,
        }
    }
}

impl LowRank for Paired {
    fn down(&self, way: Way, x: &Tensor) -> Result<Tensor> {
        let x = rows::<bf16>(x)?;
        let wanted = match way {
            Way::Forward => self.inputs,
            Way::Backward => self.parts.iter().map(|part| part.columns.end).max().unwrap_or(0),
        };
        check(&x, wanted)?;
        let low = Tensor::f_zeros([x.len() as i64, self.width as i64], (Kind::BFloat16, Device::Cpu))?;
        let out = rows::<bf16>(&low)?;
        each_alone(x.len().div_ceil(ROWS), |task| {
            for first in (task * ROWS..x.len().min((task + 1) * ROWS)).step_by(TILE) {
                let place = first..x.len().min(first + TILE);
                match way {
                    Way::Forward => down(&self.a_down, &x, 0..self.inputs, place, &out, 0..self.width),
                    Way::Backward => {
                        for Part { down: pairs, ranks, columns } in &self.parts {
                            down(pairs, &x, columns.clone(), place.clone(), &out, ranks.clone());
                        }
                    }
                }
            }
        });
        Ok(low)
    }

    fn up(&self, way: Way, low: &Tensor, product: &Tensor) -> Result<()> {
        let (low, product) = (rows::<bf16>(low)?, rows::<bf16>(product)?);
        ensure!(low.len() == product.len() && low.width() == self.width, "rows and ranks differ");
        let panels = self.up_panels(way);
        each_alone(product.len().div_ceil(ROWS), |task| {
            for first in (task * ROWS..product.len().min((task + 1) * ROWS)).step_by(TILE) {
                let count = TILE.min(product.len() - first);
                for (panel, column) in (0..product.width()).step_by(WIDE).enumerate() {
                    let mut sums = [[0f32; WIDE]; TILE];
                    panels.add(panel, &low, (first, count), &mut sums);
                    for (i, sums) in sums.iter().enumerate().take(count) {
                        let count = WIDE.min(product.width() - column);
                        // SAFETY: these rows are those of this task alone.
                        #[allow(unsafe_code)]
                        let to = unsafe { product.columns_mut(first + i, column, count) };
                        add(self.level, sums, to);
                    }
                }
            }
        });
        Ok(())
    }

    fn panels(&self, way: Way) -> Option<&Panels> {
        Some(self.up_panels(way))
    }

    fn gradient(&self, given: Given<'_>, of_a: &[Tensor], of_b: &[(Tensor, f32)]) -> Result<()> {
        let (of_a, of_b) = gradients(self.parts.len(), of_a, of_b)?;
        let (x, low) = (rows::<bf16>(given.x)?, rows::<bf16>(given.low)?);
        let (above, of_low) = (rows::<bf16>(given.above)?, rows::<bf16>(given.of_low)?);
        ensure!(
            [&low, &above, &of_low].iter().all(|of| of.len() == x.len()),
            "an adapter's gradient is of rows of several numbers"
        );
        let parts = self.parts.len();
        let made: Vec<OnceLock<Upright>> = (0..2 * parts).map(|_| OnceLock::new()).collect();
        each_alone(made.len(), |i| {
            let (rows, part) = (if i < parts { &low } else { &of_low }, &self.parts[i % parts]);
            drop(made[i].set(Upright::new(rows, part.ranks.clone())));
        });
        let made: Vec<Upright> = made.into_iter().filter_map(OnceLock::into_inner).collect();
        let (low, of_low) = made.split_at(parts);
        // Strips of each B, then those of A.
        let mut strips: Vec<(Option<usize>, Range<usize>)> = Vec::new();
        for (i, part) in self.parts.iter().enumerate() {
            strips.extend(
                part.columns
                    .clone()
                    .step_by(STRIP)
                    .map(|first| (Some(i), first..part.columns.end.min(first + STRIP))),
            );
        }
        let inputs = self.inputs;
        strips.extend((0..inputs).step_by(STRIP).map(|first| (None, first..inputs.min(first + STRIP))));
        each_alone(strips.len(), |i| {
            let (part, columns) = &strips[i];
            match part {
                Some(part) => {
                    let mut sums = vec![0f32; low[*part].columns() * columns.len()];
                    low[*part].product(&above, columns.clone(), &mut sums);
                    let (out, scale) = &of_b[*part];
                    for (j, column) in columns.clone().enumerate() {
                        let row = column - self.parts[*part].columns.start;
                        // SAFETY: these rows are those of this task alone.
                        #[allow(unsafe_code)]
                        let out = unsafe { out.get_mut(row) };
                        for (rank, out) in out.iter_mut().enumerate() {
                            *out = sums[rank * columns.len() + j] * scale;
                        }
                    }
                }
                None => {
                    for (low, out) in of_low.iter().zip(&of_a) {
                        let mut sums = vec![0f32; low.columns() * columns.len()];
                        low.product(&x, columns.clone(), &mut sums);
                        for (rank, sums) in sums.chunks(columns.len()).enumerate().take(out.len()) {
                            // SAFETY: these columns are those of this task alone.
                            #[allow(unsafe_code)]
                            let out = unsafe { out.columns_mut(rank, columns.start, columns.len()) };
                            out.copy_from_slice(sums);
                        }
                    }
                }
            }
        });
        Ok(())
    }
}

/// Columns of some rows, a tile of them, times a matrix: in columns of `out`, which is nobody else's.
fn down(
    pairs: &Pairs,
    x: &Rows<bf16>,
    columns: Range<usize>,
    place: Range<usize>,
    out: &Rows<bf16>,
    ranks: Range<usize>,
) {
    let mut of_tile = [&[][..]; TILE];
    for (i, row) in place.clone().enumerate() {
        of_tile[i] = &x.get(row)[columns.clone()];
    }
    for first in ranks.clone().step_by(LANES) {
        let tile = pairs.tile(&of_tile[..place.len()], first - ranks.start);
        for (row, sums) in place.clone().zip(tile) {
            // SAFETY: these rows are those of the caller's task alone.
            #[allow(unsafe_code)]
            let out = unsafe { out.columns_mut(row, first, LANES.min(ranks.end - first)) };
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = narrow(sum);
            }
        }
    }
}

vectorised! {
    fn add [] [] (from: &[f32; WIDE], to: &mut [bf16]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = narrow(to.wide() + from);
        }
    }
}
