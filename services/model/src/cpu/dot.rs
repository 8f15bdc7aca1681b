//! Products with the AVX-512 instructions that multiply and add pairs: of bf16, and of 16-bit integers.
//!
//! Weights in blocks are whole numbers times a scale, so they are multiplied as whole numbers: 16 bits for a row of
//! `x` lose less than bf16 does, and the sums within a block are exact.

use std::arch::x86_64::{
    __m512bh, __m512i, _mm256_loadu_si256, _mm512_and_si512, _mm512_cvtepi8_epi16, _mm512_cvtepi32_ps,
    _mm512_cvtepu8_epi16, _mm512_dpbf16_ps, _mm512_dpwssd_epi32, _mm512_fmadd_ps, _mm512_loadu_si512,
    _mm512_maskz_loadu_epi16, _mm512_permutexvar_epi16, _mm512_reduce_add_ps, _mm512_set1_epi16,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_srli_epi16,
};

use std::mem::transmute;

use half::bf16 as Bf16;

use super::product::Int16;
use super::team::Band;
use super::tiles::{ahead, cover, row};
use crate::quant::NF4;

/// Rows of `x`, and of `W`, that are taken at a time.
const ROWS: usize = 4;
const COLUMNS: usize = 4;
/// Weights that share a scale.
const BLOCK: usize = 64;
/// The largest magnitude of a 4-bit code as a whole number: sums of four products with 16 bits stay within 32.
const NF4_STEPS: f32 = 8191.0;

/// The product of the rows of `x` with those of `w`, both bf16 with rows of `k`.
pub(super) fn bf16(x: &[Bf16], w: &[Bf16], k: usize, band: &mut Band<'_>) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn all(x: &[Bf16], w: &[Bf16], k: usize, band: &mut Band<'_>) {
        cover!(band, bf16_tile, x, w, k);
    }
    // SAFETY: only called on a processor with these instructions.
    #[allow(unsafe_code)]
    unsafe {
        all(x, w, k, band);
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn bf16_tile<const R: usize, const C: usize>(
    first_row: usize,
    first_column: usize,
    x: &[Bf16],
    w: &[Bf16],
    k: usize,
) -> [[f32; C]; R] {
    let x: [*const Bf16; R] = std::array::from_fn(|i| row(x, first_row + i, k));
    let w: [*const Bf16; C] = std::array::from_fn(|j| row(w, first_column + j, k));
    let mut sums = [[_mm512_setzero_ps(); C]; R];
    let (whole, rest) = (k / 32 * 32, (1u32 << (k % 32)) - 1);
    let mut add = |x: [__m512i; R], w: [__m512i; C]| {
        for i in 0..R {
            for j in 0..C {
                // SAFETY: both types are 512 bits without meaning of their own.
                #[allow(unsafe_code)]
                let (x, w) =
                    unsafe { (transmute::<__m512i, __m512bh>(x[i]), transmute::<__m512i, __m512bh>(w[j])) };
                sums[i][j] = _mm512_dpbf16_ps(sums[i][j], x, w);
            }
        }
    };
    for at in (0..whole).step_by(32) {
        for from in w {
            ahead(from.wrapping_add(at + C * k));
        }
        // SAFETY: `at + 32` is at most `k`, and each pointer has `k` numbers behind it.
        #[allow(unsafe_code)]
        let load = |from: *const Bf16| unsafe { _mm512_loadu_si512(from.wrapping_add(at).cast()) };
        add(x.map(load), w.map(load));
    }
    if rest > 0 {
        // SAFETY: as above; the mask leaves out what is beyond `k`.
        #[allow(unsafe_code)]
        let load =
            |from: *const Bf16| unsafe { _mm512_maskz_loadu_epi16(rest, from.wrapping_add(whole).cast()) };
        add(x.map(load), w.map(load));
    }
    sums.map(|sums| sums.map(|sum| _mm512_reduce_add_ps(sum)))
}

/// The product of `x` with rows of 8-bit codes, each block of which has a scale.
pub(super) fn int8(x: Int16<'_>, codes: &[i8], scales: &[f32], k: usize, band: &mut Band<'_>) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn all(x: Int16<'_>, codes: &[u8], scales: &[f32], k: usize, band: &mut Band<'_>) {
        cover!(band, blocks_tile::<false>, x, codes, scales, k);
    }
    // SAFETY: bytes are bytes, with a sign or without.
    #[allow(unsafe_code)]
    let codes = unsafe { std::slice::from_raw_parts(codes.as_ptr().cast(), codes.len()) };
    // SAFETY: only called on a processor with these instructions.
    #[allow(unsafe_code)]
    unsafe {
        all(x, codes, scales, k, band);
    }
}

/// The product of `x`, whose blocks have their even places first, with rows of 4-bit codes.
pub(super) fn nf4(x: Int16<'_>, codes: &[u8], scales: &[f32], k: usize, band: &mut Band<'_>) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn all(x: Int16<'_>, codes: &[u8], scales: &[f32], k: usize, band: &mut Band<'_>) {
        cover!(band, blocks_tile::<true>, x, codes, scales, k);
    }
    // SAFETY: only called on a processor with these instructions.
    #[allow(unsafe_code)]
    unsafe {
        all(x, codes, scales, k, band);
    }
}

/// `FOUR`: 4 bits a code, else 8.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn blocks_tile<const R: usize, const C: usize, const FOUR: bool>(
    first_row: usize,
    first_column: usize,
    x: Int16<'_>,
    codes: &[u8],
    scales: &[f32],
    k: usize,
) -> [[f32; C]; R] {
    let (blocks, bytes) = (k / BLOCK, if FOUR { BLOCK / 2 } else { BLOCK });
    let rows: [*const i16; R] = std::array::from_fn(|i| row(x.values, first_row + i, k));
    let codes: [*const u8; C] = std::array::from_fn(|j| row(codes, first_column + j, blocks * bytes));
    let scale_of = |j: usize, block: usize| scales[(first_column + j) * blocks + block];
    let table = if FOUR { nf4_table() } else { _mm512_setzero_si512() };
    let mut sums = [[_mm512_setzero_ps(); C]; R];
    for block in 0..blocks {
        // SAFETY: a row has `blocks` blocks of 64 numbers.
        #[allow(unsafe_code)]
        let x = rows.map(|from| unsafe {
            let from = from.wrapping_add(block * BLOCK);
            [_mm512_loadu_si512(from.cast()), _mm512_loadu_si512(from.wrapping_add(32).cast())]
        });
        for j in 0..C {
            // SAFETY: a row has `blocks` blocks of `bytes` codes.
            #[allow(unsafe_code)]
            let w = unsafe { unpack::<FOUR>(codes[j].wrapping_add(block * bytes), table) };
            ahead(codes[j].wrapping_add((block + C * blocks) * bytes));
            let scale = _mm512_set1_ps(scale_of(j, block));
            for i in 0..R {
                let exact = _mm512_dpwssd_epi32(_mm512_setzero_si512(), x[i][0], w[0]);
                let exact = _mm512_dpwssd_epi32(exact, x[i][1], w[1]);
                sums[i][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scale, sums[i][j]);
            }
        }
    }
    let one = if FOUR { 1.0 / NF4_STEPS } else { 1.0 / 127.0 };
    std::array::from_fn(|i| {
        let step = x.steps[first_row + i] * one;
        std::array::from_fn(|j| _mm512_reduce_add_ps(sums[i][j]) * step)
    })
}

/// The 64 codes of a block as whole numbers of 16 bits: in order, or those of 4 bits with the even places first.
///
/// # Safety
/// `codes` has 64 bytes behind it, or with `FOUR` 32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
#[allow(unsafe_code)]
unsafe fn unpack<const FOUR: bool>(codes: *const u8, table: __m512i) -> [__m512i; 2] {
    // SAFETY: as the caller promises.
    let (first, second) = unsafe {
        let first = _mm256_loadu_si256(codes.cast());
        (first, if FOUR { first } else { _mm256_loadu_si256(codes.wrapping_add(32).cast()) })
    };
    if FOUR {
        let pairs = _mm512_cvtepu8_epi16(first);
        let (even, odd) = (_mm512_srli_epi16::<4>(pairs), _mm512_and_si512(pairs, _mm512_set1_epi16(15)));
        [_mm512_permutexvar_epi16(even, table), _mm512_permutexvar_epi16(odd, table)]
    } else {
        [_mm512_cvtepi8_epi16(first), _mm512_cvtepi8_epi16(second)]
    }
}

/// The quantiles as whole numbers, twice.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn nf4_table() -> __m512i {
    let steps: [i16; 32] = std::array::from_fn(|i| (NF4[i % 16] * NF4_STEPS).round() as i16);
    // SAFETY: the array is 512 bits.
    #[allow(unsafe_code)]
    unsafe {
        _mm512_loadu_si512(steps.as_ptr().cast())
    }
}
