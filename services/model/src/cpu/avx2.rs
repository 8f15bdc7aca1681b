//! Products with AVX2: of f32 with any format of weights, and of 16-bit integers with 8-bit codes.

use std::any::TypeId;
use std::arch::x86_64::{
    __m256, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadu_si128, _mm_movehl_ps, _mm_shuffle_ps,
    _mm256_add_epi32, _mm256_add_ps, _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_cvtepi8_epi16,
    _mm256_cvtepi32_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_extractf128_ps, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_setzero_ps, _mm256_setzero_si256,
    _mm256_slli_epi32,
};
use std::ops::Range;

use half::bf16;

use super::product::Int16;
use super::team::Band;
use super::tiles::{ahead, cover, row};
use super::vector::Number;

/// Weights that a scale is kept for.
const BLOCK: usize = 64;
/// Numbers of 16 bits times codes of 8 whose sums, eight side by side, stay within 32 bits.
const EXACT: usize = 4096;

/// Parts of a row that are added up by themselves: a row alone needs several sums that go on side by side, since an addition takes
/// several times as long as the processor needs to begin the next. Of several rows one part comes after the other, so that the
/// sums are the same.
const PARTS: usize = 4;
/// Numbers of a vector.
const LANES: usize = 8;

/// The product of the rows of `x` with those of `w`, which is f32, bf16 or f16, with rows of `k`.
pub(super) fn dense<W: Number>(x: &[f32], w: &[W], k: usize, band: &mut Band<'_>) {
    // Twelve sums and what they are made of are as much as fits into the registers.
    const ROWS: usize = 3;
    const COLUMNS: usize = 4;
    #[target_feature(enable = "avx2,fma,f16c")]
    fn all<W: Number>(x: &[f32], w: &[W], k: usize, band: &mut Band<'_>) {
        if band.rows() == 1 {
            for column in 0..band.count {
                band.row(0)[column] = dense_alone(x, w, column, k);
            }
            return;
        }
        cover!(band, dense_tile::<W>, x, w, k);
    }
    // SAFETY: only called on a processor with these instructions.
    #[allow(unsafe_code)]
    unsafe {
        all(x, w, k, band);
    }
}

/// One row with one row of weights, which is read in one go.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dense_alone<W: Number>(x: &[f32], w: &[W], column: usize, k: usize) -> f32 {
    let (x, w) = (row(x, 0, k), row(w, column, k));
    let (part, whole) = (k / LANES / PARTS * LANES, k / LANES * LANES);
    let mut sums = [_mm256_setzero_ps(); PARTS];
    for at in (0..part).step_by(LANES) {
        for (i, sum) in sums.iter_mut().enumerate() {
            ahead(w.wrapping_add(k + i * part + at));
            // SAFETY: within the part, of which there are so many in `k` numbers.
            #[allow(unsafe_code)]
            let (x, w) = unsafe { (_mm256_loadu_ps(x.add(i * part + at)), load(w.add(i * part + at))) };
            *sum = _mm256_fmadd_ps(x, w, *sum);
        }
    }
    for at in (PARTS * part..whole).step_by(LANES) {
        // SAFETY: `at + LANES` is at most `k`.
        #[allow(unsafe_code)]
        let (x, w) = unsafe { (_mm256_loadu_ps(x.add(at)), load(w.add(at))) };
        sums[PARTS - 1] = _mm256_fmadd_ps(x, w, sums[PARTS - 1]);
    }
    let mut total = sums[0];
    for sum in &sums[1..] {
        total = _mm256_add_ps(total, *sum);
    }
    rest(add_up(total), x, w, whole..k)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dense_tile<const R: usize, const C: usize, W: Number>(
    first_row: usize,
    first_column: usize,
    x: &[f32],
    w: &[W],
    k: usize,
) -> [[f32; C]; R] {
    let x: [*const f32; R] = std::array::from_fn(|i| row(x, first_row + i, k));
    let w: [*const W; C] = std::array::from_fn(|j| row(w, first_column + j, k));
    let (part, whole) = (k / LANES / PARTS * LANES, k / LANES * LANES);
    let mut totals = [[_mm256_setzero_ps(); C]; R];
    for p in 0..PARTS {
        let mut sums = [[_mm256_setzero_ps(); C]; R];
        let end = if p + 1 < PARTS { (p + 1) * part } else { whole };
        let mut at = p * part;
        while at < end {
            let mut wide = [_mm256_setzero_ps(); R];
            for i in 0..R {
                // SAFETY: `at + LANES` is at most `k`, and each pointer has `k` numbers behind it.
                #[allow(unsafe_code)]
                unsafe {
                    wide[i] = _mm256_loadu_ps(x[i].add(at));
                }
            }
            for j in 0..C {
                ahead(w[j].wrapping_add(at + C * k));
                // SAFETY: as above.
                #[allow(unsafe_code)]
                let w = unsafe { load(w[j].add(at)) };
                for i in 0..R {
                    sums[i][j] = _mm256_fmadd_ps(wide[i], w, sums[i][j]);
                }
            }
            at += LANES;
        }
        for i in 0..R {
            for j in 0..C {
                totals[i][j] = if p == 0 { sums[i][j] } else { _mm256_add_ps(totals[i][j], sums[i][j]) };
            }
        }
    }
    let mut out = [[0.0; C]; R];
    for i in 0..R {
        for j in 0..C {
            out[i][j] = rest(add_up(totals[i][j]), x[i], w[j], whole..k);
        }
    }
    out
}

/// Adds what is beyond whole vectors to a sum.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn rest<W: Number>(sum: f32, x: *const f32, w: *const W, places: Range<usize>) -> f32 {
    let mut sum = sum;
    for at in places {
        // SAFETY: the callers' rows have these places.
        #[allow(unsafe_code)]
        let (x, w) = unsafe { (*x.add(at), *w.add(at)) };
        sum = x.mul_add(w.wide(), sum);
    }
    sum
}

/// Eight weights as f32.
///
/// # Safety
/// `from` has eight weights behind it.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
#[allow(unsafe_code)]
unsafe fn load<W: Number>(from: *const W) -> __m256 {
    // SAFETY: as the caller promises; the compiler knows which of these it is.
    unsafe {
        if size_of::<W>() == 4 {
            _mm256_loadu_ps(from.cast())
        } else if TypeId::of::<W>() == TypeId::of::<bf16>() {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        } else {
            _mm256_cvtph_ps(_mm_loadu_si128(from.cast()))
        }
    }
}

/// The sum of eight numbers, in an order of its own.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_up(x: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
}

/// The product of `x` with rows of 8-bit codes, all blocks of each of which have one scale.
pub(super) fn int8(x: Int16<'_>, codes: &[i8], scales: &[f32], k: usize, band: &mut Band<'_>) {
    const ROWS: usize = 4;
    const COLUMNS: usize = 2;
    #[target_feature(enable = "avx2,fma,f16c")]
    fn all(x: Int16<'_>, codes: &[i8], scales: &[f32], k: usize, band: &mut Band<'_>) {
        cover!(band, int8_tile, x, codes, scales, k);
    }
    // SAFETY: only called on a processor with these instructions.
    #[allow(unsafe_code)]
    unsafe {
        all(x, codes, scales, k, band);
    }
}

/// Sums are exact over as many numbers as cannot leave 32 bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn int8_tile<const R: usize, const C: usize>(
    first_row: usize,
    first_column: usize,
    x: Int16<'_>,
    codes: &[i8],
    scales: &[f32],
    k: usize,
) -> [[f32; C]; R] {
    let rows: [*const i16; R] = std::array::from_fn(|i| row(x.values, first_row + i, k));
    let codes: [*const i8; C] = std::array::from_fn(|j| row(codes, first_column + j, k));
    let mut sums = [[_mm256_setzero_ps(); C]; R];
    for from in (0..k).step_by(EXACT) {
        let mut exact = [[_mm256_setzero_si256(); C]; R];
        // A single row waits for memory alone, which is fastest read as it lies there: one row of codes after the other.
        let (turns, columns) = if R == 1 { (C, 1) } else { (1, C) };
        for turn in 0..turns {
            let mut at = from;
            while at < k.min(from + EXACT) {
                for j in turn..turn + columns {
                    // SAFETY: a row of codes has `k`, which are whole blocks of 64.
                    #[allow(unsafe_code)]
                    let w = unsafe { _mm256_cvtepi8_epi16(_mm_loadu_si128(codes[j].add(at).cast())) };
                    if R > 1 && at % BLOCK == 0 {
                        ahead(codes[j].wrapping_add(at + C * k));
                    }
                    for i in 0..R {
                        // SAFETY: so has a row of `x`.
                        #[allow(unsafe_code)]
                        let x = unsafe { _mm256_loadu_si256(rows[i].add(at).cast()) };
                        exact[i][j] = _mm256_add_epi32(exact[i][j], _mm256_madd_epi16(w, x));
                    }
                }
                at += 16;
            }
        }
        for i in 0..R {
            for j in 0..C {
                sums[i][j] = _mm256_add_ps(sums[i][j], _mm256_cvtepi32_ps(exact[i][j]));
            }
        }
    }
    let mut out = [[0.0; C]; R];
    for i in 0..R {
        for j in 0..C {
            let scale = scales[(first_column + j) * (k / BLOCK)];
            out[i][j] = add_up(sums[i][j]) * (scale * x.steps[first_row + i] * (1.0 / 127.0));
        }
    }
    out
}
