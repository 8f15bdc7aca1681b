//! Products with AVX-512 of f32 with any format of weights, and how the sums of its kernels are added up.

use std::any::TypeId;
use std::arch::x86_64::{
    __m512, _mm_loadu_ps, _mm256_maskz_loadu_epi16, _mm512_add_ps, _mm512_broadcast_f32x4,
    _mm512_castps128_ps512, _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_fmadd_ps,
    _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_permutexvar_ps, _mm512_setr_epi32, _mm512_setzero_ps,
    _mm512_shuffle_f32x4, _mm512_shuffle_ps, _mm512_slli_epi32, _mm512_storeu_ps, _mm512_unpackhi_ps,
    _mm512_unpacklo_ps,
};
use std::ops::Range;

use half::bf16;

use super::team::Band;
use super::tiles::{ahead, cover, row};
use super::vector::Number;

/// Rows of `x`, and of `W`, that are taken at a time.
pub(super) const ROWS: usize = 4;
pub(super) const COLUMNS: usize = 4;

/// Parts of a row that are added up by themselves: a row alone needs several sums that go on side by side, since an addition takes
/// several times as long as the processor needs to begin the next. Of several rows one part comes after the other, so that the
/// sums are the same.
const PARTS: usize = 2;
/// Numbers of a vector.
const LANES: usize = 16;

/// The product of the rows of `x` with those of `w`, which is f32, bf16 or f16, with rows of `k`.
pub(super) fn dense<W: Number>(x: &[f32], w: &[W], k: usize, band: &mut Band<'_>) {
    // As many sums as leave room for what they are made of; more rows than columns, since weights have to be made f32 first.
    const ROWS: usize = 8;
    const COLUMNS: usize = 3;
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn all<W: Number>(x: &[f32], w: &[W], k: usize, band: &mut Band<'_>) {
        cover!(band, tile::<W>, x, w, k);
    }
    // SAFETY: only called on a processor with these instructions.
    #[allow(unsafe_code)]
    unsafe {
        all(x, w, k, band);
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn tile<const R: usize, const C: usize, W: Number>(
    first_row: usize,
    first_column: usize,
    x: &[f32],
    w: &[W],
    k: usize,
) -> [[f32; C]; R] {
    let x: [*const f32; R] = std::array::from_fn(|i| row(x, first_row + i, k));
    let w: [*const W; C] = std::array::from_fn(|j| row(w, first_column + j, k));
    let part = k / LANES / PARTS * LANES;
    let mut totals = [[_mm512_setzero_ps(); C]; R];
    // A single row waits for memory alone, which is fastest read as it lies there: one row of weights after the other.
    let (turns, columns, abreast) = if R == 1 { (C, 1, PARTS) } else { (1, C, 1) };
    for turn in 0..turns {
        for first in (0..PARTS).step_by(abreast) {
            let mut sums = [[[_mm512_setzero_ps(); C]; R]; PARTS];
            for at in (0..part).step_by(LANES) {
                for p in first..first + abreast {
                    add(&mut sums[p - first], x, w, turn..turn + columns, p * part + at..k);
                }
            }
            if first + abreast == PARTS {
                for at in (PARTS * part..k).step_by(LANES) {
                    add(&mut sums[abreast - 1], x, w, turn..turn + columns, at..k);
                }
            }
            for sums in &sums[..abreast] {
                for i in 0..R {
                    for j in turn..turn + columns {
                        totals[i][j] = _mm512_add_ps(totals[i][j], sums[i][j]);
                    }
                }
            }
        }
    }
    let mut out = [[0.0; C]; R];
    for first in (0..R).step_by(ROWS) {
        let mut some = [[_mm512_setzero_ps(); C]; ROWS];
        let count = ROWS.min(R - first);
        some[..count].copy_from_slice(&totals[first..first + count]);
        let sums: [[f32; C]; ROWS] = apart(add_up(&some));
        out[first..first + count].copy_from_slice(&sums[..count]);
    }
    out
}

/// Adds to some columns of `sums` the products of the first sixteen of the numbers at `places`, or of as many as there are.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn add<const R: usize, const C: usize, W: Number>(
    sums: &mut [[__m512; C]; R],
    x: [*const f32; R],
    w: [*const W; C],
    columns: Range<usize>,
    places: Range<usize>,
) {
    let (at, k) = (places.start, places.end);
    let there = if k - at < LANES { (1u16 << (k - at)) - 1 } else { u16::MAX };
    let mut wide = [_mm512_setzero_ps(); R];
    for i in 0..R {
        // SAFETY: a row has `k` numbers; the mask leaves out what is beyond.
        #[allow(unsafe_code)]
        unsafe {
            wide[i] = _mm512_maskz_loadu_ps(there, x[i].add(at));
        }
    }
    for j in columns {
        ahead(w[j].wrapping_add(at + C * k));
        // SAFETY: as above.
        #[allow(unsafe_code)]
        let w = unsafe { load(there, w[j].add(at)) };
        for i in 0..R {
            sums[i][j] = _mm512_fmadd_ps(wide[i], w, sums[i][j]);
        }
    }
}

/// Weights as f32, where there are some.
///
/// # Safety
/// `from` has sixteen weights behind it, or those of the mask.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[allow(unsafe_code)]
unsafe fn load<W: Number>(there: u16, from: *const W) -> __m512 {
    // SAFETY: as the caller promises; the compiler knows which of these it is.
    unsafe {
        if size_of::<W>() == 4 {
            _mm512_maskz_loadu_ps(there, from.cast())
        } else if TypeId::of::<W>() == TypeId::of::<bf16>() {
            let bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        } else {
            _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, from.cast()))
        }
    }
}

/// The sum of the sixteen numbers of each, four of a row side by side: those that are eight places apart, of these sums those that
/// are four apart, and so on. All at once, since a sum at a time is as much work as the products of a short row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn add_up<const R: usize, const C: usize>(sums: &[[__m512; C]; R]) -> __m512 {
    let mut columns = [_mm512_setzero_ps(); COLUMNS];
    for j in 0..C {
        let mut rows = [_mm512_setzero_ps(); ROWS];
        for i in 0..R {
            rows[i] = sums[i][j];
        }
        // A quarter of a vector is a row's from here on.
        let (first, second) = (halves(rows[0], rows[1]), halves(rows[2], rows[3]));
        columns[j] = _mm512_add_ps(
            _mm512_shuffle_f32x4::<0b10_00_10_00>(first, second),
            _mm512_shuffle_f32x4::<0b11_01_11_01>(first, second),
        );
    }
    let (left, right) = (pairwise(columns[0], columns[1]), pairwise(columns[2], columns[3]));
    _mm512_add_ps(
        _mm512_shuffle_ps::<0b01_00_01_00>(left, right),
        _mm512_shuffle_ps::<0b11_10_11_10>(left, right),
    )
}

/// What [`add_up`] gives, times a number for each row and one for each column.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn scaled<const R: usize, const C: usize>(
    whole: __m512,
    of_rows: [f32; R],
    of_columns: [f32; C],
) -> [[f32; C]; R] {
    let (mut rows, mut columns) = ([0f32; ROWS], [0f32; COLUMNS]);
    rows[..R].copy_from_slice(&of_rows);
    columns[..C].copy_from_slice(&of_columns);
    let quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    // SAFETY: both have four numbers.
    #[allow(unsafe_code)]
    let (rows, columns) = unsafe { (_mm_loadu_ps(rows.as_ptr()), _mm_loadu_ps(columns.as_ptr())) };
    let rows = _mm512_permutexvar_ps(quarters, _mm512_castps128_ps512(rows));
    apart(_mm512_mul_ps(whole, _mm512_mul_ps(rows, _mm512_broadcast_f32x4(columns))))
}

/// What [`add_up`] gives, by row and column.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn apart<const R: usize, const C: usize>(whole: __m512) -> [[f32; C]; R] {
    let mut flat = [0f32; ROWS * COLUMNS];
    // SAFETY: it has room for sixteen numbers.
    #[allow(unsafe_code)]
    unsafe {
        _mm512_storeu_ps(flat.as_mut_ptr(), whole);
    }
    let mut out = [[0.0; C]; R];
    for i in 0..R {
        out[i].copy_from_slice(&flat[COLUMNS * i..COLUMNS * i + C]);
    }
    out
}

/// Both halves of each added up, side by side.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn halves(a: __m512, b: __m512) -> __m512 {
    _mm512_add_ps(_mm512_shuffle_f32x4::<0b01_00_01_00>(a, b), _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b))
}

/// Within each quarter, numbers two places apart added up, of one vector and then of the other, in turns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn pairwise(a: __m512, b: __m512) -> __m512 {
    _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b))
}
