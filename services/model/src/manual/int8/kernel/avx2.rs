//! With AVX2: bytes are widened to 16 bits, of which sixteen are multiplied and added up in pairs at a time, twice as many as of
//! f32. The instruction that multiplies bytes themselves would lose what sums of two products have beyond 16 bits.

use std::arch::x86_64::{
    __m256, __m256i, _mm_loadu_si128, _mm_setr_epi8, _mm_shuffle_epi8, _mm_storeu_si128, _mm256_add_epi32,
    _mm256_and_si256, _mm256_castps_si256, _mm256_castsi256_si128, _mm256_cvtepi8_epi16, _mm256_cvtepi32_ps,
    _mm256_cvtepu8_epi16, _mm256_cvtps_epi32, _mm256_fmadd_ps, _mm256_hadd_epi32, _mm256_loadu_ps,
    _mm256_madd_epi16, _mm256_max_epi32, _mm256_min_epi32, _mm256_mul_ps, _mm256_mullo_epi32,
    _mm256_packs_epi16, _mm256_packs_epi32, _mm256_permute4x64_epi64, _mm256_set1_epi32, _mm256_set1_epi64x,
    _mm256_set1_ps, _mm256_setzero_si256, _mm256_srli_epi32, _mm256_storeu_ps, _mm256_storeu_si256,
};
use std::ops::Range;

use super::{Block, CHANCE, GROUP, Line, MIDDLE, Narrow, OF_CHANCE, Rounding, STEPS, TILE, WIDE, place};
use crate::manual::int8::BLOCK;

/// Numbers of a vector of 32 bits each.
const LANES: usize = 8;
/// Columns whose group of weights fills a vector of 16 bits each.
const COLUMNS: usize = 4;
/// Vectors of weights that are multiplied at a time: with six rows all registers are taken.
const VECTORS: usize = 2;
/// Columns that lie side by side, so that what is read at a time of a panel lies together.
pub const SIDE: usize = COLUMNS * VECTORS;
/// A row's codes of a block in 16 bits, a group in each.
type Wide = [i64; BLOCK / GROUP];

#[target_feature(enable = "avx2,fma")]
pub fn round(x: &[f32], rounding: Rounding, codes: &mut [i8]) -> Block {
    let (mut most, magnitude) = (_mm256_setzero_si256(), _mm256_set1_epi32(i32::MAX));
    for x in x.as_chunks::<LANES>().0 {
        most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(eight(x)), magnitude));
    }
    let largest = f32::from_bits(each(most).into_iter().max().unwrap_or(0).cast_unsigned());
    let inverse = _mm256_set1_ps(if largest > 0.0 { STEPS / largest } else { 0.0 });
    let (bits, lowest) = match rounding {
        Rounding::Nearest => (0, 0.0),
        Rounding::OnAverage => (CHANCE, -0.5),
    };
    let (bits, of_chance) = (_mm256_set1_epi32(bits.cast_signed()), _mm256_set1_ps(OF_CHANCE));
    let (lowest, highest) = (_mm256_set1_ps(lowest), _mm256_set1_epi32(STEPS as i32));
    let mut sums = _mm256_setzero_si256();
    for (x, codes) in x.as_chunks::<{ 2 * LANES }>().0.iter().zip(codes.chunks_mut(2 * LANES)) {
        let [low, high] = [0, LANES].map(|from| {
            let x = eight(x[from..].first_chunk().unwrap_or(&[0.0; LANES]));
            let own = _mm256_srli_epi32::<16>(_mm256_mullo_epi32(_mm256_castps_si256(x), bits));
            let chance = _mm256_fmadd_ps(_mm256_cvtepi32_ps(own), of_chance, lowest);
            let code = _mm256_cvtps_epi32(_mm256_fmadd_ps(x, inverse, chance));
            // A step is itself rounded, so that chance could make one too many of the largest number.
            _mm256_min_epi32(code, highest)
        });
        sums = _mm256_add_epi32(sums, _mm256_add_epi32(low, high));
        let narrow = _mm256_packs_epi32(low, high);
        let narrow = _mm256_permute4x64_epi64::<0b11_01_10_00>(narrow);
        let narrow = _mm256_packs_epi16(narrow, narrow);
        let narrow = _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b11_01_10_00>(narrow));
        let mut found = [0i8; 2 * LANES];
        // SAFETY: sixteen bytes.
        #[allow(unsafe_code)]
        unsafe {
            _mm_storeu_si128(found.as_mut_ptr().cast(), narrow);
        }
        codes.copy_from_slice(&found[..codes.len()]);
    }
    // Codes of what is no number add up to nothing that means anything.
    let sum = each(sums).into_iter().fold(0, i32::wrapping_add);
    Block { step: largest / STEPS, sum }
}

#[target_feature(enable = "avx2,fma")]
pub fn tile(
    x: &Narrow,
    rows: Range<usize>,
    panel: &[Line],
    factors: &[f32; WIDE],
    out: &mut [[f32; WIDE]; TILE],
) {
    match rows.len() {
        1 => of_rows::<1>(x, rows.start, panel, factors, out),
        2 => of_rows::<2>(x, rows.start, panel, factors, out),
        3 => of_rows::<3>(x, rows.start, panel, factors, out),
        4 => of_rows::<4>(x, rows.start, panel, factors, out),
        5 => of_rows::<5>(x, rows.start, panel, factors, out),
        _ => of_rows::<TILE>(x, rows.start, panel, factors, out),
    }
}

#[target_feature(enable = "avx2,fma")]
fn of_rows<const R: usize>(
    x: &Narrow,
    first: usize,
    panel: &[Line],
    factors: &[f32; WIDE],
    out: &mut [[f32; WIDE]; TILE],
) {
    out[..R].fill([0.0; WIDE]);
    let mut codes = [[0i64; BLOCK / GROUP]; R];
    for (block, start) in (0..x.width).step_by(x.block).enumerate() {
        let count = x.block.min(x.width - start);
        for (i, codes) in codes.iter_mut().enumerate() {
            widen(&x.row(first + i)[start..][..count], codes);
        }
        for column in (0..WIDE).step_by(SIDE) {
            let sums = sums(weights(panel, start / GROUP, count / GROUP, column), &codes);
            for (i, [low, high]) in sums.into_iter().enumerate() {
                let Block { step, sum } = x.blocks(first + i)[block];
                // A block that is not finite has no sum that means anything.
                let start = _mm256_set1_epi32(sum.wrapping_mul(-i32::from(MIDDLE)));
                // Of each column two neighbours are to be added up, which leaves columns in the order 0, 1, 4, 5, 2, 3, 6, 7.
                let sums = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_hadd_epi32(low, high));
                let sums = _mm256_cvtepi32_ps(_mm256_add_epi32(sums, start));
                let (factors, out) = (&factors[column..][..LANES], &mut out[i][column..][..LANES]);
                // SAFETY: eight numbers each.
                #[allow(unsafe_code)]
                unsafe {
                    let factor = _mm256_mul_ps(_mm256_set1_ps(step), _mm256_loadu_ps(factors.as_ptr()));
                    let sum = _mm256_fmadd_ps(factor, sums, _mm256_loadu_ps(out.as_ptr()));
                    _mm256_storeu_ps(out.as_mut_ptr(), sum);
                }
            }
        }
    }
}

/// What lies together of a panel: of [`SIDE`] columns from `column` on so many groups, one after the other.
fn weights(panel: &[Line], group: usize, groups: usize, column: usize) -> &[[u8; SIDE * GROUP]] {
    let (first, byte) = place(SIDE, panel.len(), group, column);
    let room = size_of_val(&panel[first..]) - byte;
    assert!(groups * SIDE * GROUP <= room, "a panel has fewer groups");
    // SAFETY: that many bytes are there, and bytes lie anywhere.
    #[allow(unsafe_code)]
    unsafe {
        std::slice::from_raw_parts(panel[first..].as_ptr().cast::<u8>().add(byte).cast(), groups)
    }
}

/// Products of rows of codes with columns of weights, two sums of each.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn sums<const R: usize>(weights: &[[u8; SIDE * GROUP]], codes: &[Wide; R]) -> [[__m256i; VECTORS]; R] {
    assert!(weights.len() <= BLOCK / GROUP, "a block has more groups");
    let mut sums = [[_mm256_setzero_si256(); VECTORS]; R];
    for (group, weights) in weights.iter().enumerate() {
        let mut wide = [_mm256_setzero_si256(); VECTORS];
        for (wide, weights) in wide.iter_mut().zip(weights.as_chunks::<{ COLUMNS * GROUP }>().0) {
            // SAFETY: sixteen bytes.
            #[allow(unsafe_code)]
            let weights = unsafe { _mm_loadu_si128(weights.as_ptr().cast()) };
            *wide = _mm256_cvtepu8_epi16(weights);
        }
        for i in 0..R {
            let codes = _mm256_set1_epi64x(codes[i][group]);
            for j in 0..VECTORS {
                sums[i][j] = _mm256_add_epi32(sums[i][j], _mm256_madd_epi16(wide[j], codes));
            }
        }
    }
    sums
}

/// Groups of codes in 16 bits.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn widen(codes: &[i8], out: &mut Wide) {
    let (whole, rest) = codes.as_chunks::<{ 4 * GROUP }>();
    let mut last = [0; 4 * GROUP];
    last[..rest.len()].copy_from_slice(rest);
    let all = whole.iter().chain((!rest.is_empty()).then_some(&last));
    for (codes, out) in all.zip(out.as_chunks_mut::<4>().0) {
        // SAFETY: sixteen bytes, and as many numbers of 16 bits.
        #[allow(unsafe_code)]
        unsafe {
            let codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(codes.as_ptr().cast()));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), codes);
        }
    }
}

#[target_feature(enable = "avx2,fma")]
pub fn turn(panels: &[Line], groups: usize, first: usize, out: &mut [Line]) {
    /// Bytes of an output's group, or an input's: four by four codes.
    const SQUARE: usize = GROUP * GROUP;
    let order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let count = (WIDE / GROUP).min(groups - first);
    let of_outputs = out.len();
    for (panel, from) in panels.chunks_exact(groups).take(of_outputs.div_ceil(WIDE / GROUP)).enumerate() {
        for group in 0..count {
            for square in 0..WIDE / GROUP {
                let (line, byte) = place(SIDE, groups, first + group, square * GROUP);
                let found = &from[line].0[byte..][..SQUARE];
                let (line, byte) = place(SIDE, of_outputs, panel * (WIDE / GROUP) + square, group * GROUP);
                let to = &mut out[line].0[byte..][..SQUARE];
                // SAFETY: sixteen bytes each.
                #[allow(unsafe_code)]
                unsafe {
                    let codes = _mm_loadu_si128(found.as_ptr().cast());
                    _mm_storeu_si128(to.as_mut_ptr().cast(), _mm_shuffle_epi8(codes, order));
                }
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn eight(x: &[f32; LANES]) -> __m256 {
    // SAFETY: eight numbers.
    #[allow(unsafe_code)]
    unsafe {
        _mm256_loadu_ps(x.as_ptr())
    }
}

/// The eight numbers of a vector.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn each(vector: __m256i) -> [i32; LANES] {
    let mut each = [0; LANES];
    // SAFETY: eight numbers.
    #[allow(unsafe_code)]
    unsafe {
        _mm256_storeu_si256(each.as_mut_ptr().cast(), vector);
    }
    each
}
