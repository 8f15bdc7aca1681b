//! How kernels go over a band of a product.

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

/// Up to so many rows of `x`, each row of `W` is read once for all of them; more would not stay near the processor.
pub(super) const FEW_ROWS: usize = 32;

/// Covers a band with tiles, each computed by `$tile::<rows, columns>(first row, first column, ..)`, of `ROWS` by
/// `COLUMNS` at most, which the caller has as constants.
macro_rules! cover {
    ($band:ident, $tile:ident $(::<$given:tt>)?, $($arg:expr),*) => {{
        macro_rules! put {
            ($rows:expr, $columns:expr, $row:ident, $column:ident) => {{
                let sums = $tile::<$rows, $columns $(, $given)?>($row, $column, $($arg),*);
                for (i, sums) in sums.iter().enumerate() {
                    $band.row($row + i)[$column..$column + $columns].copy_from_slice(sums);
                }
            }};
        }
        // As many rows as are left and tiles are made for; gives how many those are.
        macro_rules! some_rows {
            ($columns:expr, $row:ident, $column:ident) => {{
                let left = ROWS.min($band.rows() - $row);
                match left {
                    left if left == ROWS => put!(ROWS, $columns, $row, $column),
                    1 => put!(1, $columns, $row, $column),
                    2 => put!(2, $columns, $row, $column),
                    3 => put!(3, $columns, $row, $column),
                    _ => put!(4, $columns, $row, $column),
                }
                if left == ROWS { ROWS } else { left.min(4) }
            }};
        }
        let (rows, whole) = ($band.rows(), $band.count / COLUMNS * COLUMNS);
        if rows <= $crate::cpu::tiles::FEW_ROWS {
            for column in (0..whole).step_by(COLUMNS) {
                let mut row = 0;
                while row < rows {
                    row += some_rows!(COLUMNS, row, column);
                }
            }
        } else {
            let mut row = 0;
            while whole > 0 && row < rows {
                let mut done = 0;
                for column in (0..whole).step_by(COLUMNS) {
                    done = some_rows!(COLUMNS, row, column);
                }
                row += done;
            }
        }
        for column in whole..$band.count {
            let mut row = 0;
            while row < rows {
                row += some_rows!(1, row, column);
            }
        }
    }};
}

pub(super) use cover;

/// Row `i` of a matrix with rows of `k`, as where it begins. Reading `k` numbers from there is within `matrix`.
#[inline]
pub(super) fn row<T>(matrix: &[T], i: usize, k: usize) -> *const T {
    matrix[i * k..(i + 1) * k].as_ptr()
}

/// Has the rows that come next read from memory meanwhile: each is too short for the processor to see where it goes.
/// Any address will do, there or not.
#[inline]
pub(super) fn ahead<T>(from: *const T) {
    // SAFETY: nothing is read, and an address that is nowhere is passed over.
    #[allow(unsafe_code)]
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(from.cast());
    }
}
