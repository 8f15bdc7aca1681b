//! Products with frozen matrices in whole numbers of 8 bits, of which a processor multiplies twice as many at a time as of bf16:
//! forward, and backward to the input (SwitchBack, arXiv 2304.13013). What an adapter adds is not, though it
//! may join the sums of the same product; nor are the gradients of its weights.
//!
//! Each row of weights has a step of its own, and of activations and gradients each block of a row. A product adds up over inputs,
//! so there the steps of the weights can wait. What goes back adds up over outputs, so there they go into the gradient before that
//! is rounded. Both take the same codes: what goes back is the gradient of what went forward.

mod kernel;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, ensure};
use half::bf16;
use tch::{Device, Kind, Tensor};

use super::Way;
use super::kernels::{LANES, Real};
use super::pairs::Panels;
use super::rows::{Element, Rows, each_alone, with_room};
use super::tiles::{TILE, WIDE};
use crate::cpu::team;
use crate::cpu::vector::{Level, vectorised};
use crate::quant::Matrix;
use kernel::Kernel;

/// Numbers that are added up at once.
const GROUP: usize = 4;
/// Bytes of a panel's columns for one group.
const LINE: usize = WIDE * GROUP;
/// Rows of one task at least, as far as there are any, and at most: a panel is turned for them, and they stay near the processor.
const ROWS: [usize; 2] = [8 * TILE, 64 * TILE];
/// Numbers of a row of activations or gradients that share a step: of a vocabulary's gradient the likeliest tokens should not
/// round all others away.
const BLOCK: usize = 512;
/// Rows that one task rounds.
const ROUNDED: usize = 16;
/// What is added to codes of weights: one side of a product has no sign.
const MIDDLE: u8 = 128;
/// The largest code.
const STEPS: f32 = 127.0;

/// Whether this processor has loops for them by hand.
pub(crate) fn is_possible() -> bool {
    Level::best() >= Level::Avx2
}

/// Whether products in 8 bits are faster here than those of bf16 and f32: twice as many numbers at a time with AVX2, and with AVX-512
/// where it has the instruction for them. Tiles of bf16 are faster yet.
pub(crate) fn pays() -> bool {
    matches!(Level::best(), Level::Avx2 | Level::Avx512Vnni | Level::Avx512Bf16)
}

/// Codes of a panel's columns for one group: so many of each column. In lines of the processor's cache, of which half of the loads
/// would otherwise need two.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(align(64))]
pub(super) struct Line([u8; LINE]);

impl Line {
    /// What zeros are.
    const NOTHING: Self = Self([MIDDLE; LINE]);
}

/// A frozen matrix, [outputs, inputs].
pub(crate) struct Codes {
    /// For each [`WIDE`] outputs, for each [`GROUP`] of inputs, in the order that the processor's [`Kernel`] reads them in.
    panels: Vec<Line>,
    /// What a code is worth, by output.
    steps: Vec<f32>,
    inputs: usize,
}

/// Those of a base.
pub(crate) struct BaseCodes {
    /// Of each layer's matrices, in the order in which it applies them.
    pub(super) layers: Vec<[Codes; 4]>,
    /// Of what makes logits.
    pub(super) head: Codes,
}

impl BaseCodes {
    /// The matrices of layers, and the head, in 8 bits.
    pub fn new<'a>(layers: impl Iterator<Item = [&'a Matrix; 4]>, head: &Tensor) -> Result<Self> {
        let kernel = Kernel::of(Level::best());
        let of = |weight: Tensor| match weight.f_kind()? {
            Kind::BFloat16 => Codes::new::<bf16>(&weight, kernel),
            _ => Codes::new::<f32>(&weight, kernel),
        };
        let of_layer = |[qkv, o, gate_up, down]: [&Matrix; 4]| {
            Ok([of(qkv.dense()?)?, of(o.dense()?)?, of(gate_up.dense()?)?, of(down.dense()?)?])
        };
        Ok(Self { layers: layers.map(of_layer).collect::<Result<_>>()?, head: of(head.shallow_clone())? })
    }
}

impl Codes {
    /// The nearest ones to `weight`.
    fn new<W: Element>(weight: &Tensor, kernel: Kernel) -> Result<Self> {
        let weight = Rows::<W>::of(weight, weight.size()[1])?;
        let narrow = Narrow::new(&weight, None, Rounding::Nearest, usize::MAX);
        let (groups, outputs) = (narrow.width / GROUP, weight.len());
        let mut panels = vec![Line::NOTHING; outputs.div_ceil(WIDE) * groups];
        for output in 0..outputs {
            let panel = &mut panels[output / WIDE * groups..][..groups];
            for (group, codes) in narrow.row(output).as_chunks::<GROUP>().0.iter().enumerate() {
                let (line, byte) = kernel.place(groups, group, output % WIDE);
                for (to, code) in panel[line].0[byte..].iter_mut().zip(codes) {
                    *to = code.cast_unsigned().wrapping_add(MIDDLE);
                }
            }
        }
        let steps = narrow.blocks.iter().map(|block| block.step).collect();
        Ok(Self { panels, steps, inputs: weight.width() })
    }

    /// Forward `x W^T` for x [rows, inputs]; back `x W` for x [rows, outputs], the gradient of the former's input where `x` is that of
    /// its output. `more` is added to it.
    pub(super) fn product<W: Element>(
        &self,
        way: Way,
        x: &Tensor,
        rounding: Rounding,
        more: More<'_, W>,
    ) -> Result<Tensor> {
        let (x, columns) = match way {
            Way::Forward => {
                let x = Rows::<W>::of(x, self.inputs as i64)?;
                (Narrow::new(&x, None, rounding, BLOCK), self.steps.len())
            }
            Way::Backward => {
                let x = Rows::<W>::of(x, self.steps.len() as i64)?;
                (Narrow::new(&x, Some(&self.steps), rounding, BLOCK), self.inputs)
            }
        };
        let (rows, panels) = (x.len(), columns.div_ceil(WIDE));
        let product = Tensor::f_empty([rows as i64, columns as i64], (W::KIND, Device::Cpu))?;
        let out = Rows::<W>::of(&product, columns as i64)?;
        let fits = more.rows.as_ref().is_none_or(|more| (more.len(), more.width()) == (rows, columns))
            && more.low.iter().all(|(_, low)| low.len() == rows);
        ensure!(fits, "a product and what is added differ");
        let (lines, of_task) = (x.width / GROUP, rows_of_task(rows, panels));
        let level = Level::best();
        let kernel = Kernel::of(level);
        each_alone(panels * rows.div_ceil(of_task), |task| {
            let (panel, first) = (task % panels, task / panels * of_task);
            let place = Place {
                rows: first..rows.min(first + of_task),
                columns: panel * WIDE..columns.min((panel + 1) * WIDE),
            };
            let mut factors = [1f32; WIDE];
            match way {
                Way::Forward => {
                    factors[..place.columns.len()].copy_from_slice(&self.steps[place.columns.clone()]);
                    let panel = &self.panels[panel * lines..][..lines];
                    block(level, &x, &Weights { kernel, panel, factors }, place, &out, &more);
                }
                Way::Backward => PANEL.with_borrow_mut(|turned| {
                    turned.resize(self.steps.len().div_ceil(WIDE) * (WIDE / GROUP), Line::NOTHING);
                    let groups = self.inputs.div_ceil(GROUP);
                    kernel.turn(&self.panels, groups, panel * (WIDE / GROUP), turned);
                    block(level, &x, &Weights { kernel, panel: turned, factors }, place, &out, &more);
                }),
            }
        });
        Ok(product)
    }
}

/// Which of the two codes beside it a number gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rounding {
    /// The nearer one.
    Nearest,
    /// The one above as often as the number is nearer to it (stochastic rounding, arXiv 1502.02551): numbers far below a step would
    /// all be nothing else, and thousands of them are not. A hash of its bits stands for chance, so that the same number has the same
    /// code again.
    OnAverage,
}

/// What is added to a product.
pub(super) struct More<'a, W> {
    /// As many rows and columns as it has.
    pub rows: Option<Rows<W>>,
    /// Products of rows with panels of as many columns.
    pub low: Vec<(&'a Panels, Rows<bf16>)>,
}

impl<W> Default for More<'_, W> {
    fn default() -> Self {
        Self { rows: None, low: Vec::new() }
    }
}

/// As many as leave each thread some tasks, so that none waits long for the others.
fn rows_of_task(rows: usize, panels: usize) -> usize {
    let wanted = (4 * team::threads()).div_ceil(panels);
    let parts = wanted.min(rows / ROWS[0]).max(rows.div_ceil(ROWS[1])).max(1);
    rows.div_ceil(parts).next_multiple_of(TILE).max(TILE)
}

thread_local! {
    /// Room for the panel that a thread has turned, since the next is as large as often as not.
    static PANEL: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// A part of a product.
pub(super) struct Place {
    rows: Range<usize>,
    /// Those of one panel.
    columns: Range<usize>,
}

/// What rows are multiplied with.
pub(super) struct Weights<'a> {
    kernel: Kernel,
    panel: &'a [Line],
    /// What the columns of the product are multiplied by.
    factors: [f32; WIDE],
}

/// Rows of activations or gradients in 8 bits.
pub(super) struct Narrow {
    /// [rows, width], with zeros at the end up to a whole group.
    codes: Vec<i8>,
    width: usize,
    /// Row after row.
    blocks: Vec<Block>,
    /// Numbers in each, but for a row's last.
    block: usize,
}

/// What belongs to some codes of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Block {
    /// What a code is worth.
    step: f32,
    /// All codes added up.
    sum: i32,
}

impl Narrow {
    /// Those of `x`, whose columns are first multiplied by `times`, with a step for so many numbers of a row.
    fn new<W: Element>(x: &Rows<W>, times: Option<&[f32]>, rounding: Rounding, block: usize) -> Self {
        let (level, width) = (Level::best(), x.width().next_multiple_of(GROUP));
        let kernel = Kernel::of(level);
        let block = block.min(width);
        let of_row = width.div_ceil(block);
        let (codes, blocks) = (vec![0; x.len() * width], vec![Block::default(); x.len() * of_row]);
        let mut narrow = Self { codes, width, blocks, block };
        let tasks: Vec<_> = narrow
            .codes
            .chunks_mut(ROUNDED * width)
            .zip(narrow.blocks.chunks_mut(ROUNDED * of_row))
            .map(Mutex::new)
            .collect();
        each_alone(tasks.len(), |task| {
            let mut taken = tasks[task].lock().unwrap_or_else(PoisonError::into_inner);
            let (codes, blocks) = &mut *taken;
            let rows = codes.chunks_exact_mut(width).zip(blocks.chunks_exact_mut(of_row));
            with_room(width.next_multiple_of(LANES), |room| {
                room[x.width()..].fill(0.0);
                for (i, (codes, blocks)) in rows.enumerate() {
                    widen(level, x.get(task * ROUNDED + i), times.unwrap_or(&[]), room);
                    let parts = codes.chunks_mut(block).zip(room.chunks(block.next_multiple_of(LANES)));
                    for (of_block, (codes, x)) in blocks.iter_mut().zip(parts) {
                        *of_block = kernel.round(x, rounding, codes);
                    }
                }
            });
        });
        narrow
    }

    fn len(&self) -> usize {
        self.codes.len() / self.width
    }

    fn row(&self, i: usize) -> &[i8] {
        &self.codes[i * self.width..][..self.width]
    }

    fn blocks(&self, i: usize) -> &[Block] {
        let of_row = self.width.div_ceil(self.block);
        &self.blocks[i * of_row..][..of_row]
    }
}

vectorised! {
    /// A row as f32, times `times` where there is any. What is beyond it in `room` stays.
    fn widen [W: Real] [W] (x: &[W], times: &[f32], room: &mut [f32]) {
        if times.is_empty() {
            for (room, x) in room.iter_mut().zip(x) {
                *room = x.wide();
            }
        } else {
            for ((room, x), times) in room.iter_mut().zip(x).zip(times) {
                *room = x.wide() * times;
            }
        }
    }
}

vectorised! {
    /// A part of a product, and `more` is added to it.
    fn block [W: Element] [W] (
        x: &Narrow,
        weights: &Weights<'_>,
        place: Place,
        out: &Rows<W>,
        more: &More<'_, W>,
    ) {
        let Place { rows, columns } = place;
        let mut sums = [[0f32; WIDE]; TILE];
        for first in rows.clone().step_by(TILE) {
            let count = TILE.min(rows.end - first);
            weights.kernel.tile(x, first..first + count, weights.panel, &weights.factors, &mut sums);
            for (panels, low) in &more.low {
                panels.add(columns.start / WIDE, low, (first, count), &mut sums);
            }
            for (i, sums) in sums.iter().enumerate().take(count) {
                // SAFETY: these columns of these rows are those of one task alone.
                #[allow(unsafe_code)]
                let to = unsafe { out.columns_mut(first + i, columns.start, columns.len()) };
                if let Some(more) = &more.rows {
                    let more = &more.get(first + i)[columns.clone()];
                    for ((to, sum), more) in to.iter_mut().zip(sums).zip(more) {
                        *to = W::of(sum + more.wide());
                    }
                } else {
                    for (to, sum) in to.iter_mut().zip(sums) {
                        *to = W::of(*sum);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
