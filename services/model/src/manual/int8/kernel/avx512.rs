//! With AVX-512's instruction that multiplies and adds up fours of bytes.

use std::arch::x86_64::{
    _mm_setr_epi8, _mm_storeu_si128, _mm512_add_epi32, _mm512_and_si512, _mm512_broadcast_i32x4,
    _mm512_cvtepi32_ps, _mm512_cvtps_epi32, _mm512_dpbusd_epi32, _mm512_extracti32x4_epi32, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_cvtepi32_storeu_epi8, _mm512_max_epi32,
    _mm512_min_epi32, _mm512_mul_ps, _mm512_mullo_epi32, _mm512_reduce_add_epi32, _mm512_reduce_max_epi32,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_si512, _mm512_shuffle_epi8, _mm512_srli_epi32,
    _mm512_storeu_ps,
};
use std::ops::Range;

use super::{Block, CHANCE, GROUP, Line, MIDDLE, Narrow, OF_CHANCE, Rounding, STEPS, TILE, WIDE};
use crate::manual::kernels::LANES;

/// Vectors of a panel's columns.
const VECTORS: usize = WIDE / LANES;

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub fn round(x: &[f32], rounding: Rounding, codes: &mut [i8]) -> Block {
    let x = x.as_chunks::<LANES>().0;
    let (mut most, magnitude) = (_mm512_setzero_si512(), _mm512_set1_epi32(i32::MAX));
    for x in x {
        // SAFETY: sixteen numbers.
        #[allow(unsafe_code)]
        let bits = unsafe { _mm512_loadu_si512(x.as_ptr().cast()) };
        most = _mm512_max_epi32(most, _mm512_and_si512(bits, magnitude));
    }
    let largest = f32::from_bits(_mm512_reduce_max_epi32(most).cast_unsigned());
    let inverse = _mm512_set1_ps(if largest > 0.0 { STEPS / largest } else { 0.0 });
    let mut sums = _mm512_setzero_si512();
    let (bits, lowest) = match rounding {
        Rounding::Nearest => (0, 0.0),
        Rounding::OnAverage => (CHANCE, -0.5),
    };
    let (bits, of_chance) = (_mm512_set1_epi32(bits.cast_signed()), _mm512_set1_ps(OF_CHANCE));
    let (lowest, highest) = (_mm512_set1_ps(lowest), _mm512_set1_epi32(STEPS as i32));
    for (x, codes) in x.iter().zip(codes.chunks_mut(LANES)) {
        let within = (0xffff_u32 >> (LANES - codes.len())) as u16;
        // SAFETY: sixteen numbers, and as many codes as the mask says.
        #[allow(unsafe_code)]
        unsafe {
            let own =
                _mm512_srli_epi32::<16>(_mm512_mullo_epi32(_mm512_loadu_si512(x.as_ptr().cast()), bits));
            let chance = _mm512_fmadd_ps(_mm512_cvtepi32_ps(own), of_chance, lowest);
            let code = _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_loadu_ps(x.as_ptr()), inverse, chance));
            // A step is itself rounded, so that chance could make one too many of the largest number.
            let code = _mm512_min_epi32(code, highest);
            sums = _mm512_add_epi32(sums, code);
            _mm512_mask_cvtepi32_storeu_epi8(codes.as_mut_ptr(), within, code);
        }
    }
    Block { step: largest / STEPS, sum: _mm512_reduce_add_epi32(sums) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub fn tile(
    x: &Narrow,
    rows: Range<usize>,
    panel: &[Line],
    factors: &[f32; WIDE],
    out: &mut [[f32; WIDE]; TILE],
) {
    let panel = &panel[..x.width / GROUP];
    match rows.len() {
        1 => of_rows::<1>(x, rows.start, panel, factors, out),
        2 => of_rows::<2>(x, rows.start, panel, factors, out),
        3 => of_rows::<3>(x, rows.start, panel, factors, out),
        4 => of_rows::<4>(x, rows.start, panel, factors, out),
        5 => of_rows::<5>(x, rows.start, panel, factors, out),
        _ => of_rows::<TILE>(x, rows.start, panel, factors, out),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn of_rows<const R: usize>(
    x: &Narrow,
    first: usize,
    panel: &[Line],
    factors: &[f32; WIDE],
    out: &mut [[f32; WIDE]; TILE],
) {
    let none: &[Block] = &[];
    let mut blocks = [none; R];
    for i in 0..R {
        blocks[i] = x.blocks(first + i);
        out[i] = [0.0; WIDE];
    }
    for (block, panel) in panel.chunks(x.block / GROUP).enumerate() {
        let mut rows = [std::ptr::null::<i8>(); R];
        let mut sums = [[_mm512_setzero_si512(); VECTORS]; R];
        for i in 0..R {
            rows[i] = x.row(first + i)[block * x.block..][..panel.len() * GROUP].as_ptr();
            // A block that is not finite has no sum that means anything.
            let start = blocks[i][block].sum.wrapping_mul(-i32::from(MIDDLE));
            sums[i] = [_mm512_set1_epi32(start); VECTORS];
        }
        for (group, line) in panel.iter().enumerate() {
            let mut weights = [_mm512_setzero_si512(); VECTORS];
            for (weights, from) in weights.iter_mut().zip(line.0.as_chunks::<{ LANES * GROUP }>().0) {
                // SAFETY: 64 bytes.
                #[allow(unsafe_code)]
                unsafe {
                    *weights = _mm512_loadu_si512(from.as_ptr().cast());
                }
            }
            for i in 0..R {
                // SAFETY: of the row there is a group of codes for each line of the panel.
                #[allow(unsafe_code)]
                let codes = unsafe { rows[i].add(group * GROUP).cast::<i32>().read_unaligned() };
                let codes = _mm512_set1_epi32(codes);
                for j in 0..VECTORS {
                    sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], weights[j], codes);
                }
            }
        }
        for i in 0..R {
            let step = _mm512_set1_ps(blocks[i][block].step);
            for j in 0..VECTORS {
                let out = out[i][j * LANES..][..LANES].as_mut_ptr();
                // SAFETY: sixteen numbers.
                #[allow(unsafe_code)]
                unsafe {
                    let factor = _mm512_mul_ps(step, _mm512_loadu_ps(factors.as_ptr().add(j * LANES)));
                    let sum = _mm512_cvtepi32_ps(sums[i][j]);
                    _mm512_storeu_ps(out, _mm512_fmadd_ps(factor, sum, _mm512_loadu_ps(out)));
                }
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub fn turn(panels: &[Line], groups: usize, first: usize, out: &mut [Line]) {
    /// Bytes of an output's group, or an input's: four by four codes.
    const SQUARE: usize = GROUP * GROUP;
    let order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let order = _mm512_broadcast_i32x4(order);
    let count = (WIDE / GROUP).min(groups - first);
    for (panel, out) in out.chunks_exact_mut(WIDE / GROUP).enumerate() {
        for group in 0..count {
            let from = &panels[panel * groups + first + group].0;
            // Four squares at a time, each of which goes to a line of its own.
            for (squares, to) in from.as_chunks::<{ 4 * SQUARE }>().0.iter().zip(out.as_chunks_mut::<4>().0) {
                let at = group * SQUARE;
                let [a, b, c, d] = to.each_mut().map(|line| line.0[at..at + SQUARE].as_mut_ptr().cast());
                // SAFETY: 64 bytes, and 16 in each of four places.
                #[allow(unsafe_code)]
                unsafe {
                    let codes = _mm512_shuffle_epi8(_mm512_loadu_si512(squares.as_ptr().cast()), order);
                    _mm_storeu_si128(a, _mm512_extracti32x4_epi32::<0>(codes));
                    _mm_storeu_si128(b, _mm512_extracti32x4_epi32::<1>(codes));
                    _mm_storeu_si128(c, _mm512_extracti32x4_epi32::<2>(codes));
                    _mm_storeu_si128(d, _mm512_extracti32x4_epi32::<3>(codes));
                }
            }
        }
    }
}
