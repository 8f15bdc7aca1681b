//! For every processor.

use std::ops::Range;

use super::{Block, CHANCE, GROUP, Line, MIDDLE, Narrow, OF_CHANCE, Rounding, STEPS, TILE, WIDE, place};

pub fn round(x: &[f32], rounding: Rounding, codes: &mut [i8]) -> Block {
    // As whole numbers, of which those that are no number are the largest: they must not be lost.
    let largest = x.iter().map(|x| x.abs().to_bits()).max().map_or(0.0, f32::from_bits);
    let inverse = if largest > 0.0 { STEPS / largest } else { 0.0 };
    for (code, x) in codes.iter_mut().zip(x) {
        let chance = match rounding {
            Rounding::Nearest => 0.0,
            Rounding::OnAverage => ((x.to_bits().wrapping_mul(CHANCE) >> 16) as f32).mul_add(OF_CHANCE, -0.5),
        };
        *code = x.mul_add(inverse, chance).round_ties_even().min(STEPS) as i8;
    }
    Block { step: largest / STEPS, sum: codes.iter().map(|&code| i32::from(code)).sum() }
}

pub fn tile<const SIDE: usize>(
    x: &Narrow,
    rows: Range<usize>,
    panel: &[Line],
    factors: &[f32; WIDE],
    out: &mut [[f32; WIDE]; TILE],
) {
    for (row, out) in rows.zip(out) {
        *out = [0.0; WIDE];
        for (n, (block, codes)) in x.blocks(row).iter().zip(x.row(row).chunks(x.block)).enumerate() {
            for (column, (out, factor)) in out.iter_mut().zip(factors).enumerate() {
                let mut sum = -i32::from(MIDDLE) * block.sum;
                for (i, codes) in codes.as_chunks::<GROUP>().0.iter().enumerate() {
                    let (line, byte) = place(SIDE, panel.len(), n * x.block / GROUP + i, column);
                    for (weight, code) in panel[line].0[byte..].iter().zip(codes) {
                        sum += i32::from(*weight) * i32::from(*code);
                    }
                }
                *out = (block.step * factor).mul_add(sum as f32, *out);
            }
        }
    }
}

pub fn turn<const SIDE: usize>(panels: &[Line], groups: usize, first: usize, out: &mut [Line]) {
    let of_outputs = out.len();
    for input in 0..WIDE.min((groups - first) * GROUP) {
        for output in 0..of_outputs * GROUP {
            let (line, byte) = place(SIDE, groups, first + input / GROUP, output % WIDE);
            let code = panels[output / WIDE * groups + line].0[byte + input % GROUP];
            let (line, byte) = place(SIDE, of_outputs, output / GROUP, input);
            out[line].0[byte + output % GROUP] = code;
        }
    }
}
