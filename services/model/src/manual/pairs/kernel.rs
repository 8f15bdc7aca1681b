//! What products of pairs spend their time in, and the same for every processor, to check it by.

use std::ops::Range;

use half::bf16;

use crate::manual::tiles::{TILE, Tile, WIDE};

/// Sums are made for 16, 8 or so many columns at a time.
pub const FEWEST: usize = 4;

/// Rows that lie one after the other.
#[derive(Clone, Copy)]
pub struct Strip<'a> {
    pub numbers: &'a [bf16],
    pub width: usize,
}

/// Rows times sixteen columns; a row of pairs in `panel` has so many columns.
pub fn tile(rows: [&[bf16]; TILE], panel: &[bf16], width: usize) -> Tile {
    #[cfg(target_arch = "x86_64")]
    if super::there(super::Level::best()) {
        // SAFETY: the processor has these instructions.
        #[allow(unsafe_code)]
        return unsafe { avx512::tile(rows, panel, width) };
    }
    plain::tile(rows, panel, width)
}

/// Adds to `sums` rows times the columns of a panel.
pub fn add(rows: [&[bf16]; TILE], panel: &[bf16], sums: &mut [[f32; WIDE]; TILE]) {
    #[cfg(target_arch = "x86_64")]
    if super::there(super::Level::best()) {
        // SAFETY: the processor has these instructions.
        #[allow(unsafe_code)]
        return unsafe { avx512::add(rows, panel, sums) };
    }
    plain::add(rows, panel, sums);
}

/// Adds to `sums` [those of a pair, columns] each number of the `pairs` of rows, `of_pair` a row, times those of the same row of
/// `rows`.
pub fn gather(pairs: &[bf16], of_pair: usize, rows: Strip<'_>, columns: Range<usize>, sums: &mut [f32]) {
    assert_eq!((of_pair % FEWEST, sums.len()), (0, of_pair * columns.len()));
    #[cfg(target_arch = "x86_64")]
    if super::there(super::Level::best()) {
        // SAFETY: the processor has these instructions.
        #[allow(unsafe_code)]
        return unsafe { avx512::gather(pairs, of_pair, rows, columns, sums) };
    }
    plain::gather(pairs, of_pair, rows, columns, sums);
}

pub(super) mod plain {
    use super::{Range, Strip, TILE, Tile, WIDE, bf16};
    use crate::cpu::vector::Number;
    use crate::manual::kernels::LANES;

    pub fn tile(rows: [&[bf16]; TILE], panel: &[bf16], width: usize) -> Tile {
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

    pub fn add(rows: [&[bf16]; TILE], panel: &[bf16], sums: &mut [[f32; WIDE]; TILE]) {
        for (sums, row) in sums.iter_mut().zip(rows) {
            for (p, x) in row.iter().enumerate() {
                for (column, sum) in sums.iter_mut().enumerate() {
                    *sum += x.wide() * panel[(p / 2 * WIDE + column) * 2 + p % 2].wide();
                }
            }
        }
    }

    pub fn gather(pairs: &[bf16], of_pair: usize, rows: Strip<'_>, columns: Range<usize>, sums: &mut [f32]) {
        for (i, row) in rows.numbers.chunks(rows.width).enumerate() {
            let pair = &pairs[i / 2 * 2 * of_pair..][..2 * of_pair];
            for (pair, sums) in pair.chunks(2).zip(sums.chunks_mut(columns.len())) {
                for (sum, x) in sums.iter_mut().zip(&row[columns.clone()]) {
                    *sum += pair[i % 2].wide() * x.wide();
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm256_maskz_loadu_epi16, _mm256_setzero_si256, _mm512_castsi256_si512,
        _mm512_dpbf16_ps, _mm512_inserti64x4, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_storeu_ps,
        _mm512_maskz_loadu_ps, _mm512_permutexvar_epi16, _mm512_set1_epi32, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };
    use std::mem::transmute;

    use super::{FEWEST, Range, Strip, TILE, Tile, WIDE, bf16};
    use crate::manual::kernels::LANES;

    /// Where each of the numbers of two rows goes, so that they lie in pairs.
    const IN_PAIRS: [u16; 2 * LANES] = {
        let (mut order, mut i) = ([0; 2 * LANES], 0);
        while i < 2 * LANES {
            order[i] = (i / 2 + i % 2 * LANES) as u16;
            i += 1;
        }
        order
    };

    /// Where rows begin that have so many numbers.
    fn starts(rows: [&[bf16]; TILE], numbers: usize) -> [*const bf16; TILE] {
        assert!(numbers.is_multiple_of(2));
        let mut starts = [std::ptr::null(); TILE];
        for (start, row) in starts.iter_mut().zip(rows) {
            assert!(row.len() == numbers);
            *start = row.as_ptr();
        }
        starts
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub fn tile(rows: [&[bf16]; TILE], panel: &[bf16], width: usize) -> Tile {
        let pairs = rows[0].len() / 2;
        assert!(pairs == 0 || panel.len() >= 2 * ((pairs - 1) * width + LANES));
        let starts = starts(rows, 2 * pairs);
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

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub fn add(rows: [&[bf16]; TILE], panel: &[bf16], sums: &mut [[f32; WIDE]; TILE]) {
        const VECTORS: usize = WIDE / LANES;
        let starts = starts(rows, panel.len() / WIDE);
        let mut with = [[_mm512_setzero_ps(); VECTORS]; TILE];
        for (with, sums) in with.iter_mut().zip(&*sums) {
            for (with, sums) in with.iter_mut().zip(sums.as_chunks::<LANES>().0) {
                // SAFETY: sixteen numbers.
                #[allow(unsafe_code)]
                unsafe {
                    *with = _mm512_loadu_ps(sums.as_ptr());
                }
            }
        }
        for (pair, of_panel) in panel.as_chunks::<{ 2 * WIDE }>().0.iter().enumerate() {
            // SAFETY: so many vectors are a row of pairs, of which each row has one.
            #[allow(unsafe_code)]
            unsafe {
                let mut vectors = [transmute::<__m512i, __m512bh>(_mm512_set1_epi32(0)); VECTORS];
                for (vector, from) in vectors.iter_mut().zip(of_panel.as_chunks::<{ 2 * LANES }>().0) {
                    *vector = transmute::<__m512i, __m512bh>(_mm512_loadu_si512(from.as_ptr().cast()));
                }
                for i in 0..TILE {
                    let x = _mm512_set1_epi32(starts[i].add(2 * pair).cast::<i32>().read_unaligned());
                    for j in 0..VECTORS {
                        let x = transmute::<__m512i, __m512bh>(x);
                        with[i][j] = _mm512_dpbf16_ps(with[i][j], x, vectors[j]);
                    }
                }
            }
        }
        for (with, sums) in with.iter().zip(sums) {
            for (with, sums) in with.iter().zip(sums.as_chunks_mut::<LANES>().0) {
                // SAFETY: sixteen numbers.
                #[allow(unsafe_code)]
                unsafe {
                    _mm512_storeu_ps(sums.as_mut_ptr(), *with);
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub fn gather(pairs: &[bf16], of_pair: usize, rows: Strip<'_>, columns: Range<usize>, sums: &mut [f32]) {
        let count = rows.numbers.len() / rows.width;
        assert!(pairs.len() == count.next_multiple_of(2) * of_pair && columns.end <= rows.width);
        assert!(sums.len() == of_pair * columns.len());
        for column in columns.clone().step_by(LANES) {
            let within = (0xffff_u32 >> LANES.saturating_sub(columns.end - column)) as u16;
            let mut first = 0;
            while first < of_pair {
                let place = Place {
                    pairs: pairs.as_ptr().wrapping_add(2 * first),
                    of_pair,
                    rows: rows.numbers.as_ptr().wrapping_add(column),
                    width: rows.width,
                    count,
                    within,
                    sums: sums.as_mut_ptr().wrapping_add(first * columns.len() + column - columns.start),
                    of_sums: columns.len(),
                };
                // SAFETY: of each pair of rows there are so many numbers from the first on, of each row as many columns as the
                // mask says, and as many sums for each number: see above.
                #[allow(unsafe_code)]
                unsafe {
                    first += match of_pair - first {
                        16.. => place.take::<16>(),
                        8.. => place.take::<8>(),
                        _ => place.take::<FEWEST>(),
                    };
                }
            }
        }
    }

    /// Some numbers of pairs of rows, and sixteen columns at most.
    struct Place {
        pairs: *const bf16,
        of_pair: usize,
        rows: *const bf16,
        width: usize,
        /// Rows.
        count: usize,
        within: u16,
        sums: *mut f32,
        of_sums: usize,
    }

    impl Place {
        /// # Safety
        /// From each pointer on there is what the other fields say, and sums for `R` numbers.
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
        #[allow(unsafe_code)]
        unsafe fn take<const R: usize>(&self) -> usize {
            // SAFETY: what the caller promises.
            unsafe {
                let order = _mm512_loadu_si512(IN_PAIRS.as_ptr().cast());
                let mut with = [_mm512_setzero_ps(); R];
                for (i, with) in with.iter_mut().enumerate() {
                    *with = _mm512_maskz_loadu_ps(self.within, self.sums.add(i * self.of_sums));
                }
                for pair in 0..self.count.div_ceil(2) {
                    let row = self.rows.add(2 * pair * self.width);
                    let one = _mm256_maskz_loadu_epi16(self.within, row.cast());
                    let two = if 2 * pair + 1 < self.count {
                        _mm256_maskz_loadu_epi16(self.within, row.add(self.width).cast())
                    } else {
                        _mm256_setzero_si256()
                    };
                    let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(one), two);
                    let both = transmute::<__m512i, __m512bh>(_mm512_permutexvar_epi16(order, both));
                    let numbers = self.pairs.add(2 * pair * self.of_pair).cast::<i32>();
                    for (i, with) in with.iter_mut().enumerate() {
                        let number = _mm512_set1_epi32(numbers.add(i).read_unaligned());
                        *with = _mm512_dpbf16_ps(*with, both, transmute::<__m512i, __m512bh>(number));
                    }
                }
                for (i, with) in with.iter().enumerate() {
                    _mm512_mask_storeu_ps(self.sums.add(i * self.of_sums), self.within, *with);
                }
            }
            R
        }
    }
}
