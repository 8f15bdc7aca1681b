//! Products with the AVX-512 instructions that multiply and add pairs: of bf16, and of 16-bit integers.
//!
//! Weights in blocks are whole numbers times a scale, so they are multiplied as whole numbers: 16 bits for a row of
//! `x` lose less than bf16 does, and sums are exact within a block of 4-bit codes, and over a row of 8-bit ones.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm256_loadu_si256, _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512,
    _mm512_cvtepi8_epi16, _mm512_cvtepi32_ps, _mm512_cvtepu8_epi16, _mm512_dpbf16_ps, _mm512_dpwssd_epi32,
    _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_maskz_loadu_epi16, _mm512_permutexvar_epi16,
    _mm512_set1_epi16, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_srli_epi16,
};

use std::arch::asm;
use std::mem::transmute;

use half::bf16 as Bf16;

use super::avx512::{COLUMNS, ROWS, add_up, apart, scaled};
use super::product::Int16;
use super::team::Band;
use super::tiles::{ahead, cover, row};
use crate::quant::NF4;

/// Weights that a scale is kept for.
const BLOCK: usize = 64;
/// Numbers of 16 bits times codes of 8 whose sums, sixteen side by side, stay within 32 bits.
const EXACT: usize = 8192;
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
    // A single row waits for memory alone, which is fastest read as it lies there: one row of weights after the other.
    let (turns, columns) = if R == 1 { (C, 1) } else { (1, C) };
    // Loops in place of `map` and closures, which would be compiled without these instructions, and called for each load.
    for turn in 0..turns {
        let mut at = 0;
        while at < whole {
            let mut of_x = [_mm512_setzero_si512(); R];
            for i in 0..R {
                // SAFETY: `at + 32` is at most `k`, and each pointer has `k` numbers behind it.
                #[allow(unsafe_code)]
                unsafe {
                    of_x[i] = _mm512_loadu_si512(x[i].add(at).cast());
                }
            }
            for j in turn..turn + columns {
                if R > 1 {
                    ahead(w[j].wrapping_add(at + C * k));
                }
                // SAFETY: as above.
                #[allow(unsafe_code)]
                let of_w = unsafe { _mm512_loadu_si512(w[j].add(at).cast()) };
                for i in 0..R {
                    sums[i][j] = _mm512_dpbf16_ps(sums[i][j], pairs(of_x[i]), pairs(of_w));
                }
            }
            at += 32;
        }
    }
    if rest > 0 {
        for i in 0..R {
            for j in 0..C {
                // SAFETY: as above; the mask leaves out what is beyond `k`.
                #[allow(unsafe_code)]
                let (of_x, of_w) = unsafe {
                    (
                        _mm512_maskz_loadu_epi16(rest, x[i].add(whole).cast()),
                        _mm512_maskz_loadu_epi16(rest, w[j].add(whole).cast()),
                    )
                };
                sums[i][j] = _mm512_dpbf16_ps(sums[i][j], pairs(of_x), pairs(of_w));
            }
        }
    }
    apart(add_up(&sums))
}

/// 32 numbers of bf16, of what has no meaning of its own.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits.
    #[allow(unsafe_code)]
    unsafe {
        transmute(bits)
    }
}

/// The product of `x` with rows of 8-bit codes, all blocks of each of which have one scale.
pub(super) fn int8(x: Int16<'_>, codes: &[i8], scales: &[f32], k: usize, band: &mut Band<'_>) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn all(x: Int16<'_>, codes: &[i8], scales: &[f32], k: usize, band: &mut Band<'_>) {
        cover!(band, int8_tile, x, codes, scales, k);
    }
    // SAFETY: only called on a processor with these instructions.
    #[allow(unsafe_code)]
    unsafe {
        all(x, codes, scales, k, band);
    }
}

/// `sum` with the products of pairs of 16-bit integers. As the instruction itself: the compiler makes two of every other one,
/// which is worth it on processors where it takes long.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_pairs(mut sum: __m512i, x: __m512i, w: __m512i) -> __m512i {
    // SAFETY: an instruction between registers that this function is compiled for.
    #[allow(unsafe_code)]
    unsafe {
        asm!("vpdpwssd {}, {}, {}", inout(zmm_reg) sum, in(zmm_reg) x, in(zmm_reg) w,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn int8_tile<const R: usize, const C: usize>(
    first_row: usize,
    first_column: usize,
    x: Int16<'_>,
    codes: &[i8],
    scales: &[f32],
    k: usize,
) -> [[f32; C]; R] {
    let rows: [*const i16; R] = std::array::from_fn(|i| row(x.values, first_row + i, k));
    let of_rows: [f32; R] = std::array::from_fn(|i| x.steps[first_row + i] * (1.0 / 127.0));
    let codes: [*const i8; C] = std::array::from_fn(|j| row(codes, first_column + j, k));
    let of_columns: [f32; C] = std::array::from_fn(|j| scales[(first_column + j) * (k / BLOCK)]);
    let mut sums = exact(rows, codes, 0, k.min(EXACT), k);
    for from in (EXACT..k).step_by(EXACT) {
        let more = exact(rows, codes, from, k.min(from + EXACT), k);
        for i in 0..R {
            for j in 0..C {
                sums[i][j] = _mm512_add_ps(sums[i][j], more[i][j]);
            }
        }
    }
    scaled(add_up(&sums), of_rows, of_columns)
}

/// Sums over the numbers from `from` to `to` of rows of `k`, sixteen side by side; exact, since there are no more than [`EXACT`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn exact<const R: usize, const C: usize>(
    rows: [*const i16; R],
    codes: [*const i8; C],
    from: usize,
    to: usize,
    k: usize,
) -> [[__m512; C]; R] {
    let mut sums = [[_mm512_setzero_si512(); C]; R];
    // As above: a single row reads one row of codes after the other.
    let (turns, columns) = if R == 1 { (C, 1) } else { (1, C) };
    for turn in 0..turns {
        // A second sum for a single row, which would wait for the one before it.
        let mut other = _mm512_setzero_si512();
        let mut at = from;
        while at < to {
            for half in 0..2 {
                let at = at + 32 * half;
                let mut of_x = [_mm512_setzero_si512(); R];
                for i in 0..R {
                    // SAFETY: a row has `k` numbers, which are whole blocks of 64.
                    #[allow(unsafe_code)]
                    unsafe {
                        of_x[i] = _mm512_loadu_si512(rows[i].add(at).cast());
                    }
                }
                for j in turn..turn + columns {
                    // SAFETY: so has a row of codes.
                    #[allow(unsafe_code)]
                    let of_w = unsafe { _mm512_cvtepi8_epi16(_mm256_loadu_si256(codes[j].add(at).cast())) };
                    if R > 1 && half == 0 {
                        ahead(codes[j].wrapping_add(at + C * k));
                    }
                    for i in 0..R {
                        let sum = if R == 1 && half == 1 { &mut other } else { &mut sums[i][j] };
                        *sum = add_pairs(*sum, of_x[i], of_w);
                    }
                }
            }
            at += BLOCK;
        }
        if R == 1 {
            sums[0][turn] = _mm512_add_epi32(sums[0][turn], other);
        }
    }
    let mut wide = [[_mm512_setzero_ps(); C]; R];
    for i in 0..R {
        for j in 0..C {
            wide[i][j] = _mm512_cvtepi32_ps(sums[i][j]);
        }
    }
    wide
}

/// The product of `x`, whose blocks have their even places first, with rows of 4-bit codes.
pub(super) fn nf4(x: Int16<'_>, codes: &[u8], scales: &[f32], k: usize, band: &mut Band<'_>) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn all(x: Int16<'_>, codes: &[u8], scales: &[f32], k: usize, band: &mut Band<'_>) {
        cover!(band, nf4_tile, x, codes, scales, k);
    }
    // SAFETY: only called on a processor with these instructions.
    #[allow(unsafe_code)]
    unsafe {
        all(x, codes, scales, k, band);
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn nf4_tile<const R: usize, const C: usize>(
    first_row: usize,
    first_column: usize,
    x: Int16<'_>,
    codes: &[u8],
    scales: &[f32],
    k: usize,
) -> [[f32; C]; R] {
    let (blocks, bytes) = (k / BLOCK, BLOCK / 2);
    let rows: [*const i16; R] = std::array::from_fn(|i| row(x.values, first_row + i, k));
    let codes: [*const u8; C] = std::array::from_fn(|j| row(codes, first_column + j, blocks * bytes));
    let scale_of = |j: usize, block: usize| scales[(first_column + j) * blocks + block];
    let table = nf4_table();
    let mut sums = [[_mm512_setzero_ps(); C]; R];
    // As above: a single row reads one row of codes after the other.
    let (turns, columns) = if R == 1 { (C, 1) } else { (1, C) };
    for turn in 0..turns {
        for block in 0..blocks {
            let mut x = [[_mm512_setzero_si512(); 2]; R];
            for i in 0..R {
                // SAFETY: a row has `blocks` blocks of 64 numbers.
                #[allow(unsafe_code)]
                unsafe {
                    let from = rows[i].add(block * BLOCK);
                    x[i] = [_mm512_loadu_si512(from.cast()), _mm512_loadu_si512(from.add(32).cast())];
                }
            }
            for j in turn..turn + columns {
                // SAFETY: a row has `blocks` blocks of `bytes` codes.
                #[allow(unsafe_code)]
                let w = unsafe { unpack(codes[j].add(block * bytes), table) };
                if R > 1 {
                    ahead(codes[j].wrapping_add((block + C * blocks) * bytes));
                }
                let scale = _mm512_set1_ps(scale_of(j, block));
                for i in 0..R {
                    let exact = _mm512_dpwssd_epi32(_mm512_setzero_si512(), x[i][0], w[0]);
                    let exact = _mm512_dpwssd_epi32(exact, x[i][1], w[1]);
                    sums[i][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scale, sums[i][j]);
                }
            }
        }
    }
    let of_rows = std::array::from_fn(|i| x.steps[first_row + i] * (1.0 / NF4_STEPS));
    scaled(add_up(&sums), of_rows, [1.0; C])
}

/// The 64 codes of a block as whole numbers of 16 bits, with the even places first.
///
/// # Safety
/// `codes` has 32 bytes behind it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
#[allow(unsafe_code)]
unsafe fn unpack(codes: *const u8, table: __m512i) -> [__m512i; 2] {
    // SAFETY: as the caller promises.
    let pairs = _mm512_cvtepu8_epi16(unsafe { _mm256_loadu_si256(codes.cast()) });
    let (even, odd) = (_mm512_srli_epi16::<4>(pairs), _mm512_and_si512(pairs, _mm512_set1_epi16(15)));
    [_mm512_permutexvar_epi16(even, table), _mm512_permutexvar_epi16(odd, table)]
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
