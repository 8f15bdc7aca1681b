//! Products of bf16 with AMX, Intel's instructions that multiply whole tiles: 16 rows of weights with 16 rows of `x`, 32 numbers
//! at a time. The rows of weights are read as they lie; those of `x` are laid out once for all of a product's bands.
//!
//! Rust has no stable functions for these instructions, so the inner loops are written in assembler.

use std::arch::asm;
use std::arch::x86_64::{
    __m512, _mm512_castpd_ps, _mm512_castps_pd, _mm512_loadu_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4,
    _mm512_storeu_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};
use std::sync::OnceLock;

use half::bf16;

use super::team::{Band, Team};

/// Rows of weights, and rows of `x`, in a tile.
pub(super) const SIDE: usize = 16;
/// Numbers of a row in a tile.
pub(super) const DEPTH: usize = 32;
/// A tile of `x`: pairs of numbers, each with one of every row.
const TILE: usize = SIDE * DEPTH;

/// Whether the processor has tiles of bf16, and the system lets this process use them.
pub(super) fn is_there() -> bool {
    static THERE: OnceLock<bool> = OnceLock::new();
    *THERE.get_or_init(|| has_tiles() && is_permitted())
}

fn has_tiles() -> bool {
    let Ok(info) = std::fs::read_to_string("/proc/cpuinfo") else { return false };
    let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    ["amx_tile", "amx_bf16"].iter().all(|needed| flags.split_whitespace().any(|flag| flag == *needed))
}

/// Linux keeps the tiles of a process across switches only where it asked for that.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const REQUEST_PERMISSION: i64 = 0x1023;
    const TILE_DATA: i64 = 18;
    let result: i64;
    // SAFETY: the system call arch_prctl with two numbers; it changes no memory.
    #[allow(unsafe_code)]
    unsafe {
        asm!("syscall", inlateout("rax") ARCH_PRCTL => result, in("rdi") REQUEST_PERMISSION, in("rsi") TILE_DATA,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// Lays out rows of `k` as tiles: for each 16 rows, and of them for each 32 numbers, 16 pairs of every row. What is missing of
/// the last rows is zero.
pub(super) fn lay_out(team: &mut Team, x: &[bf16], k: usize, tiles: &mut Vec<bf16>) {
    let rows = x.len() / k;
    tiles.resize(rows.div_ceil(SIDE) * SIDE * k, bf16::ZERO);
    team.parts(tiles, TILE, |i, tile| {
        let (block, step) = (i / (k / DEPTH), i % (k / DEPTH));
        let first = block * SIDE;
        if rows - first < SIDE {
            tile.fill(bf16::ZERO);
        }
        for row in first..rows.min(first + SIDE) {
            let numbers = &x[row * k + step * DEPTH..][..DEPTH];
            for (pair, numbers) in numbers.as_chunks::<2>().0.iter().enumerate() {
                tile[pair * DEPTH + 2 * (row - first)..][..2].copy_from_slice(numbers);
            }
        }
    });
}

/// The product of rows laid out as `tiles` with those of `w`, bf16 with rows of `k`, a multiple of 32. The band has a multiple
/// of 16 columns.
pub(super) fn product(tiles: &[bf16], w: &[bf16], k: usize, band: &mut Band<'_>) {
    let (columns, blocks, steps) = (band.count / SIDE, band.rows().div_ceil(SIDE), k / DEPTH);
    assert!(band.count.is_multiple_of(SIDE) && k.is_multiple_of(DEPTH) && steps > 0);
    assert!(w.len() == band.count * k && tiles.len() == blocks * SIDE * k);
    let of_column = |column: usize| w[column * SIDE * k..].as_ptr();
    let of_block = |block: usize| tiles[block * SIDE * k..].as_ptr();
    let mut sums = [[[0f32; SIDE]; SIDE]; 4];
    configure();
    for block in (0..blocks).step_by(2) {
        let two = block + 1 < blocks;
        let mut column = 0;
        while column < columns {
            let places: &[(usize, usize)] = if two && column + 1 < columns {
                // SAFETY: both columns and both blocks lie within their slices, whose lengths were compared above.
                #[allow(unsafe_code)]
                unsafe {
                    let x = [of_block(block), of_block(block + 1)];
                    two_by_two([of_column(column), of_column(column + 1)], x, k, steps, &mut sums);
                }
                &[(0, 0), (0, 1), (1, 0), (1, 1)]
            } else if two {
                // SAFETY: as above.
                #[allow(unsafe_code)]
                unsafe {
                    one_by_one(of_column(column), of_block(block), k, steps, &mut sums[0]);
                    one_by_one(of_column(column), of_block(block + 1), k, steps, &mut sums[1]);
                }
                &[(0, 0), (0, 1)]
            } else if column + 3 < columns {
                let columns = [0, 1, 2, 3].map(|i| of_column(column + i));
                // SAFETY: as above.
                #[allow(unsafe_code)]
                unsafe {
                    four_by_one(columns, of_block(block), k, steps, &mut sums);
                }
                &[(0, 0), (1, 0), (2, 0), (3, 0)]
            } else {
                // SAFETY: as above.
                #[allow(unsafe_code)]
                unsafe {
                    one_by_one(of_column(column), of_block(block), k, steps, &mut sums[0]);
                }
                &[(0, 0)]
            };
            for (sums, (i, j)) in sums.iter().zip(places) {
                put(band, sums, (block + j) * SIDE, (column + i) * SIDE);
            }
            column += places.last().map_or(1, |(i, _)| i + 1);
        }
    }
    release();
}

/// Writes a tile, whose rows are columns of the band, from a row and a column on.
fn put(band: &mut Band<'_>, sums: &[[f32; SIDE]; SIDE], row: usize, column: usize) {
    let mut turned = [[0f32; SIDE]; SIDE];
    // SAFETY: tiles of bf16 are only on processors with AVX-512.
    #[allow(unsafe_code)]
    unsafe {
        transpose(sums, &mut turned);
    }
    for (i, turned) in turned.iter().enumerate().take(band.rows() - row) {
        band.row(row + i)[column..column + SIDE].copy_from_slice(turned);
    }
}

/// Rows for columns.
#[target_feature(enable = "avx512f")]
fn transpose(from: &[[f32; SIDE]; SIDE], to: &mut [[f32; SIDE]; SIDE]) {
    // SAFETY: each row is sixteen numbers.
    #[allow(unsafe_code)]
    let rows = from.each_ref().map(|row| unsafe { _mm512_loadu_ps(row.as_ptr()) });
    let mut pairs = rows;
    for i in (0..SIDE).step_by(2) {
        pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    // Number j of a group of four rows: in each quarter, a column of these rows.
    let mut fours = rows;
    for group in (0..SIDE).step_by(4) {
        for half in 0..2 {
            let (x, y) = (_mm512_castps_pd(pairs[group + half]), _mm512_castps_pd(pairs[group + half + 2]));
            fours[group + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
            fours[group + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
        }
    }
    let mut columns: [__m512; SIDE] = [_mm512_setzero_ps(); SIDE];
    for j in 0..4 {
        let even = _mm512_shuffle_f32x4::<0x88>(fours[j], fours[4 + j]);
        let odd = _mm512_shuffle_f32x4::<0xdd>(fours[j], fours[4 + j]);
        let even_below = _mm512_shuffle_f32x4::<0x88>(fours[8 + j], fours[12 + j]);
        let odd_below = _mm512_shuffle_f32x4::<0xdd>(fours[8 + j], fours[12 + j]);
        columns[j] = _mm512_shuffle_f32x4::<0x88>(even, even_below);
        columns[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd, odd_below);
        columns[8 + j] = _mm512_shuffle_f32x4::<0xdd>(even, even_below);
        columns[12 + j] = _mm512_shuffle_f32x4::<0xdd>(odd, odd_below);
    }
    for (to, column) in to.iter_mut().zip(columns) {
        // SAFETY: as above.
        #[allow(unsafe_code)]
        unsafe {
            _mm512_storeu_ps(to.as_mut_ptr(), column);
        }
    }
}

/// The shape of all eight tiles: 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Shape([u8; 64]);

static SHAPE: Shape = {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        bytes[16 + 2 * tile] = 64;
        bytes[48 + tile] = SIDE as u8;
        tile += 1;
    }
    Shape(bytes)
};

fn configure() {
    // SAFETY: only called where `is_there`; the shape is a valid one.
    #[allow(unsafe_code)]
    unsafe {
        asm!("ldtilecfg [{shape}]", shape = in(reg) &raw const SHAPE, options(nostack, readonly));
    }
}

/// A thread without tiles is switched faster.
fn release() {
    // SAFETY: as for `configure`.
    #[allow(unsafe_code)]
    unsafe {
        asm!("tilerelease", options(nostack, nomem));
    }
}

/// Sums of two times 16 rows of weights and two tiles' rows of `x`.
///
/// # Safety
/// Tiles are configured; each pointer of `w` has 16 rows of `k` behind it, each of `x` `steps` tiles.
#[allow(unsafe_code)]
unsafe fn two_by_two(
    w: [*const bf16; 2],
    x: [*const bf16; 2],
    k: usize,
    steps: usize,
    sums: &mut [[[f32; SIDE]; SIDE]; 4],
) {
    // SAFETY: as the caller promises; four tiles of sums are 4 KB.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{w0} + {width}*1]",
            "tileloadd tmm6, [{x0} + {line}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{x1} + {line}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{w1} + {width}*1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {w0}, 64", "add {w1}, 64", "add {x0}, 1024", "add {x1}, 1024",
            "dec {steps}", "jnz 2b",
            "tilestored [{out} + {line}*1], tmm0",
            "tilestored [{out} + {line}*1 + 1024], tmm1",
            "tilestored [{out} + {line}*1 + 2048], tmm2",
            "tilestored [{out} + {line}*1 + 3072], tmm3",
            w0 = inout(reg) w[0] => _, w1 = inout(reg) w[1] => _,
            x0 = inout(reg) x[0] => _, x1 = inout(reg) x[1] => _,
            width = in(reg) 2 * k, line = in(reg) 64usize,
            steps = inout(reg) steps => _, out = in(reg) sums.as_mut_ptr(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Sums of four times 16 rows of weights and one tile's rows of `x`.
///
/// # Safety
/// As for [`two_by_two`].
#[allow(unsafe_code)]
unsafe fn four_by_one(
    w: [*const bf16; 4],
    x: *const bf16,
    k: usize,
    steps: usize,
    sums: &mut [[[f32; SIDE]; SIDE]; 4],
) {
    // SAFETY: as above.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "2:",
            "tileloadd tmm6, [{x} + {line}*1]",
            "tileloadd tmm4, [{w0} + {width}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{w1} + {width}*1]",
            "tdpbf16ps tmm1, tmm5, tmm6",
            "tileloadd tmm4, [{w2} + {width}*1]",
            "tdpbf16ps tmm2, tmm4, tmm6",
            "tileloadd tmm5, [{w3} + {width}*1]",
            "tdpbf16ps tmm3, tmm5, tmm6",
            "add {w0}, 64", "add {w1}, 64", "add {w2}, 64", "add {w3}, 64", "add {x}, 1024",
            "dec {steps}", "jnz 2b",
            "tilestored [{out} + {line}*1], tmm0",
            "tilestored [{out} + {line}*1 + 1024], tmm1",
            "tilestored [{out} + {line}*1 + 2048], tmm2",
            "tilestored [{out} + {line}*1 + 3072], tmm3",
            w0 = inout(reg) w[0] => _, w1 = inout(reg) w[1] => _,
            w2 = inout(reg) w[2] => _, w3 = inout(reg) w[3] => _,
            x = inout(reg) x => _,
            width = in(reg) 2 * k, line = in(reg) 64usize,
            steps = inout(reg) steps => _, out = in(reg) sums.as_mut_ptr(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _,
            options(nostack),
        );
    }
}

/// Sums of 16 rows of weights and one tile's rows of `x`.
///
/// # Safety
/// As for [`two_by_two`].
#[allow(unsafe_code)]
unsafe fn one_by_one(w: *const bf16, x: *const bf16, k: usize, steps: usize, sums: &mut [[f32; SIDE]; SIDE]) {
    // SAFETY: as above.
    unsafe {
        asm!(
            "tilezero tmm0",
            "2:",
            "tileloadd tmm4, [{w} + {width}*1]",
            "tileloadd tmm6, [{x} + {line}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "add {w}, 64", "add {x}, 1024",
            "dec {steps}", "jnz 2b",
            "tilestored [{out} + {line}*1], tmm0",
            w = inout(reg) w => _, x = inout(reg) x => _,
            width = in(reg) 2 * k, line = in(reg) 64usize,
            steps = inout(reg) steps => _, out = in(reg) sums.as_mut_ptr(),
            out("tmm0") _, out("tmm4") _, out("tmm6") _,
            options(nostack),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_laid_out_as_pairs_of_every_row() {
        let k = 2 * DEPTH;
        let x: Vec<bf16> = (0..18 * k).map(|i| bf16::from_bits(i as u16)).collect();
        let mut tiles = vec![bf16::ONE; 3];
        lay_out(&mut Team::new(2), &x, k, &mut tiles);
        assert_eq!(tiles.len(), 2 * SIDE * k);
        for row in 0..32 {
            for i in 0..k {
                let tile = row / SIDE * 2 + i / DEPTH;
                let found = tiles[tile * TILE + i % DEPTH / 2 * DEPTH + row % SIDE * 2 + i % 2];
                assert_eq!(found, if row < 18 { x[row * k + i] } else { bf16::ZERO });
            }
        }
    }

    #[test]
    fn rows_become_columns() {
        if !is_x86_feature_detected!("avx512f") {
            return;
        }
        let from: [[f32; SIDE]; SIDE] = std::array::from_fn(|i| std::array::from_fn(|j| (16 * i + j) as f32));
        let mut to = [[0.0; SIDE]; SIDE];
        // SAFETY: the processor has these instructions.
        #[allow(unsafe_code)]
        unsafe {
            transpose(&from, &mut to);
        }
        assert!((0..SIDE).all(|i| (0..SIDE).all(|j| to[j][i] == from[i][j])));
    }
}
