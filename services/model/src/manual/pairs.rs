//! Rows of bf16 times a narrow matrix, with AVX-512's products of pairs: twice as many numbers at a time as in f32, and read as they
//! lie there.

use half::bf16;

use super::kernels::LANES;
use super::tiles::{TILE, Tile};
use crate::cpu::vector::Level;

/// A matrix [inner, columns] whose rows lie in pairs: [inner / 2, columns, 2]. There are whole vectors of columns, of which the last
/// may be zero.
pub(crate) struct Pairs {
    numbers: Vec<bf16>,
    width: usize,
}

impl Pairs {
    /// With these numbers, by row and column; none where the processor has no such products, or there is no whole number of pairs.
    pub fn new(
        level: Level,
        inner: usize,
        columns: usize,
        number: impl Fn(usize, usize) -> bf16,
    ) -> Option<Self> {
        if level < Level::Avx512Dot || inner % 2 == 1 {
            return None;
        }
        let width = columns.next_multiple_of(LANES);
        let mut numbers = vec![bf16::ZERO; inner * width];
        for row in 0..inner {
            for column in 0..columns {
                numbers[(row / 2 * width + column) * 2 + row % 2] = number(row, column);
            }
        }
        Some(Self { numbers, width })
    }

    /// Some rows, [`TILE`] at most, times the [`LANES`] columns from `column` on. What is beyond the rows has no meaning.
    pub fn tile(&self, rows: &[&[bf16]], column: usize) -> Tile {
        let inner = self.numbers.len() / self.width;
        let mut of_tile = [&rows[0][..inner]; TILE];
        for (to, row) in of_tile.iter_mut().zip(rows) {
            *to = &row[..inner];
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: there is none of these without a processor that has the instructions.
        #[allow(unsafe_code)]
        return unsafe { dots(of_tile, &self.numbers[2 * column..], self.width) };
        #[cfg(not(target_arch = "x86_64"))]
        plain(of_tile, &self.numbers[2 * column..], self.width)
    }
}

/// The same on every processor, to check it by.
#[cfg(any(test, not(target_arch = "x86_64")))]
fn plain(rows: [&[bf16]; TILE], panel: &[bf16], width: usize) -> Tile {
    use crate::cpu::vector::Number;

    let mut sums = [[0f32; LANES]; TILE];
    for (sums, row) in sums.iter_mut().zip(rows) {
        for (p, x) in row.iter().enumerate() {
            for (column, sum) in sums.iter_mut().enumerate() {
                *sum += x.wide() * panel[(p / 2 * width + column) * 2 + p % 2].wide();
            }
        }
    }
    sums
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn dots(rows: [&[bf16]; TILE], panel: &[bf16], width: usize) -> Tile {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };
    use std::mem::transmute;

    let pairs = rows[0].len() / 2;
    assert!(pairs == 0 || panel.len() >= 2 * ((pairs - 1) * width + LANES));
    let mut starts = [std::ptr::null::<bf16>(); TILE];
    for (start, row) in starts.iter_mut().zip(rows) {
        assert!(row.len() == 2 * pairs);
        *start = row.as_ptr();
    }
    let mut sums = [_mm512_setzero_ps(); TILE];
    for pair in 0..pairs {
        // SAFETY: the panel has a vector of pairs here, and each row has a pair: see above.
        #[allow(unsafe_code)]
        unsafe {
            let of_panel = _mm512_loadu_si512(panel.as_ptr().add(2 * pair * width).cast());
            let of_panel = transmute::<__m512i, __m512bh>(of_panel);
            for i in 0..TILE {
                let x = _mm512_set1_epi32(starts[i].add(2 * pair).cast::<i32>().read_unaligned());
                sums[i] = _mm512_dpbf16_ps(sums[i], transmute::<__m512i, __m512bh>(x), of_panel);
            }
        }
    }
    let mut out = [[0f32; LANES]; TILE];
    for (out, sum) in out.iter_mut().zip(sums) {
        // SAFETY: sixteen numbers.
        #[allow(unsafe_code)]
        unsafe {
            _mm512_storeu_ps(out.as_mut_ptr(), sum);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_the_products() {
        let number = |i: usize| bf16::from_f32((i as f32 * 0.37).sin());
        let (inner, columns) = (70, 23);
        let Some(pairs) =
            Pairs::new(Level::best(), inner, columns, |row, column| number(row * columns + column))
        else {
            return;
        };
        assert!(Pairs::new(Level::best(), 71, columns, |_, _| bf16::ZERO).is_none());
        let rows: Vec<Vec<bf16>> =
            (0..TILE).map(|i| (0..inner).map(|p| number(7 * i + 3 * p)).collect()).collect();
        let all: Vec<&[bf16]> = rows.iter().map(Vec::as_slice).collect();
        for column in [0, LANES] {
            let expected = plain(std::array::from_fn(|i| all[i]), &pairs.numbers[2 * column..], pairs.width);
            for count in 1..=TILE {
                for (found, expected) in pairs.tile(&all[..count], column).iter().zip(expected).take(count) {
                    assert!(found.iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-4));
                }
            }
            let beyond = expected[0][columns.saturating_sub(column).min(LANES)..].iter();
            assert!(beyond.clone().all(|x| *x == 0.0), "{column}");
        }
    }
}
