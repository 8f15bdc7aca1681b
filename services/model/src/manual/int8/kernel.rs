//! What products in 8 bits spend their time in, for each kind of processor. All of them come to the same numbers.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod plain;

use std::ops::Range;

use super::{Block, GROUP, Line, MIDDLE, Narrow, Rounding, STEPS, TILE, WIDE};
use crate::cpu::vector::Level;

/// What the bits of a number are multiplied by, of which product the upper half stands for chance (Knuth's multiplicative hash), and
/// what that is multiplied by to be 0 to 1.
const CHANCE: u32 = 0x9e37_79b1;
const OF_CHANCE: f32 = 1.0 / 65536.0;

type Round = unsafe fn(&[f32], Rounding, &mut [i8]) -> Block;
type Tiled = unsafe fn(&Narrow, Range<usize>, &[Line], &[f32; WIDE], &mut [[f32; WIDE]; TILE]);
type Turn = unsafe fn(&[Line], usize, usize, &mut [Line]);

/// The loops of one kind of processor.
#[derive(Clone, Copy)]
pub struct Kernel {
    /// Columns of a panel that lie side by side.
    side: usize,
    round: Round,
    tile: Tiled,
    turn: Turn,
}

impl Kernel {
    /// Those for a processor of this level.
    pub fn of(level: Level) -> Self {
        match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni | Level::Avx512Bf16 | Level::Amx => {
                Self { side: WIDE, round: avx512::round, tile: avx512::tile, turn: avx512::turn }
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 => {
                Self { side: avx2::SIDE, round: avx2::round, tile: avx2::tile, turn: avx2::turn }
            }
            _ => Self::plain::<WIDE>(),
        }
    }

    fn plain<const SIDE: usize>() -> Self {
        Self { side: SIDE, round: plain::round, tile: plain::tile::<SIDE>, turn: plain::turn::<SIDE> }
    }

    /// Those for every processor, of panels that lie as they do for these.
    #[cfg(test)]
    pub(super) fn to_check_by(self) -> Self {
        if self.side == WIDE { Self::plain::<WIDE>() } else { Self::plain::<8>() }
    }

    /// Where a column's group lies in a panel that has so many: see [`place`].
    pub(super) fn place(self, groups: usize, group: usize, column: usize) -> (usize, usize) {
        place(self.side, groups, group, column)
    }

    /// The codes of a block of numbers. `x` is longer by less than a vector; what is beyond the block is zero. A block that is
    /// not finite has a step that is not, so that no product with it is.
    pub(super) fn round(self, x: &[f32], rounding: Rounding, codes: &mut [i8]) -> Block {
        // SAFETY: a level is only ever what `Level::best` found, or less, so the processor has these instructions.
        #[allow(unsafe_code)]
        unsafe {
            (self.round)(x, rounding, codes)
        }
    }

    /// Some rows of `x`, [`TILE`] at most, times a panel's columns, and these times `factors`. The panel may have groups that `x` has
    /// no numbers for, at its end.
    pub(super) fn tile(
        self,
        x: &Narrow,
        rows: Range<usize>,
        panel: &[Line],
        factors: &[f32; WIDE],
        out: &mut [[f32; WIDE]; TILE],
    ) {
        // SAFETY: as above.
        #[allow(unsafe_code)]
        unsafe {
            (self.tile)(x, rows, panel, factors, out);
        }
    }

    /// Turns panels of outputs, which have so many `groups` of inputs, into one of the [`WIDE`] inputs from the group `first` on: fours
    /// of inputs of an output become fours of outputs of an input, in whole panels. Inputs that there are not stay as they are.
    pub(super) fn turn(self, panels: &[Line], groups: usize, first: usize, out: &mut [Line]) {
        // SAFETY: as above.
        #[allow(unsafe_code)]
        unsafe {
            (self.turn)(panels, groups, first, out);
        }
    }
}

/// Where a column's group lies in a panel that has so many: a line, and a byte of it. So many columns lie `side` by side, group after
/// group, and then come the next.
fn place(side: usize, groups: usize, group: usize, column: usize) -> (usize, usize) {
    let byte = ((column / side * groups + group) * side + column % side) * GROUP;
    (byte / size_of::<Line>(), byte % size_of::<Line>())
}
