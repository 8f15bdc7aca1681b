//! Reading quantised blocks on a CPU: back into a dense matrix, or straight into a product with few rows.
//!
//! libtorch has no operation for these formats. Its general ones need an index of four or eight bytes for each
//! weight of four bits, so that making the dense matrix takes longer than using it; and with one row to
//! multiply, reading the blocks is all there is to do.

use anyhow::{Context, Result};
use half::{bf16, f16};
use std::sync::OnceLock;
use std::thread;
use tch::{Device, Kind, Tensor};

use super::{BLOCK, NF4, Quantised};

/// Rows up to which the blocks are read directly; more are worth a dense matrix.
const ROWS_MAX: i64 = 4;

const WEIGHTS: usize = BLOCK as usize;

/// Whether [`product`] takes this: few rows on a CPU, without gradients, and blocks that end where rows do.
pub(super) fn applies(weight: &Quantised, x: &Tensor) -> bool {
    weight.shape[1] % BLOCK == 0 && x.device() == Device::Cpu && x.size()[0] <= ROWS_MAX && !x.requires_grad()
}

/// The numbers of one block, without its scale.
#[derive(Clone, Copy)]
pub(crate) enum Codes<'a> {
    Int8(&'a [i8]),
    Nf4(&'a [u8]),
}

impl<'a> Codes<'a> {
    fn of(weight: &'a Quantised) -> Result<Self> {
        Ok(match weight.codes.f_kind()? {
            Kind::Int8 => Self::Int8(slice(&weight.codes)?),
            _ => Self::Nf4(slice(&weight.codes)?),
        })
    }

    /// The weights from number `start` on, wherever their blocks begin and end.
    pub fn read_from(self, start: usize, scales: &[f32], out: &mut [f32]) {
        let (mut block, mut done) = ([0.0; WEIGHTS], 0);
        while done < out.len() {
            let (i, from) = ((start + done) / WEIGHTS, (start + done) % WEIGHTS);
            let count = (WEIGHTS - from).min(out.len() - done);
            self.read(i, scales[i], &mut block);
            out[done..done + count].copy_from_slice(&block[from..from + count]);
            done += count;
        }
    }

    /// Block `i`, times `scale`.
    #[inline]
    fn read(self, i: usize, scale: f32, block: &mut [f32; WEIGHTS]) {
        match self {
            Self::Int8(codes) => {
                let step = scale / 127.0;
                for (value, code) in block.iter_mut().zip(&codes[i * WEIGHTS..(i + 1) * WEIGHTS]) {
                    *value = f32::from(*code) * step;
                }
            }
            Self::Nf4(codes) => {
                let pairs = pairs();
                let codes = &codes[i * WEIGHTS / 2..(i + 1) * WEIGHTS / 2];
                for (value, code) in block.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
                    *value = pairs[usize::from(*code)];
                }
                block.iter_mut().for_each(|value| *value *= scale);
            }
        }
    }
}

/// Both quantiles of every packed byte.
fn pairs() -> &'static [[f32; 2]; 256] {
    static PAIRS: OnceLock<[[f32; 2]; 256]> = OnceLock::new();
    PAIRS.get_or_init(|| std::array::from_fn(|byte| [NF4[byte >> 4], NF4[byte & 15]]))
}

/// The dense matrix in its kind, [blocks, 64].
pub(super) fn dense(weight: &Quantised) -> Result<Tensor> {
    let (codes, scales) = (Codes::of(weight)?, slice::<f32>(&weight.scales)?);
    let shape = [scales.len() as i64, BLOCK];
    let mut out = Tensor::f_empty(shape, (weight.kind, Device::Cpu))?;
    match weight.kind {
        Kind::BFloat16 => fill(codes, scales, slice_mut::<bf16>(&mut out)?, bf16::from_f32),
        Kind::Half => fill(codes, scales, slice_mut::<f16>(&mut out)?, f16::from_f32),
        _ => fill(codes, scales, slice_mut::<f32>(&mut out)?, |value| value),
    }
    Ok(out)
}

fn fill<T: Send>(codes: Codes<'_>, scales: &[f32], out: &mut [T], convert: fn(f32) -> T) {
    in_parts(out, WEIGHTS, |first, part| {
        let mut block = [0.0; WEIGHTS];
        for (i, out) in part.chunks_mut(WEIGHTS).enumerate() {
            codes.read(first + i, scales[first + i], &mut block);
            for (out, value) in out.iter_mut().zip(&block) {
                *out = convert(*value);
            }
        }
    });
}

/// `x W^T` for x [rows, inputs], in x's kind.
pub(super) fn product(weight: &Quantised, x: &Tensor) -> Result<Tensor> {
    let [outputs, inputs] = weight.shape.map(|n| n as usize);
    let (codes, scales) = (Codes::of(weight)?, slice::<f32>(&weight.scales)?);
    let (rows, wide) = (x.size()[0] as usize, x.f_to_kind(Kind::Float)?.f_contiguous()?);
    let (x_values, blocks) = (slice::<f32>(&wide)?, inputs / WEIGHTS);
    // By output first, so that each thread writes its own part.
    let mut out = vec![0f32; outputs * rows];
    in_parts(&mut out, rows, |first, part| {
        let mut block = [0.0; WEIGHTS];
        for (i, out) in part.chunks_mut(rows).enumerate() {
            for b in 0..blocks {
                let at = (first + i) * blocks + b;
                codes.read(at, scales[at], &mut block);
                for (row, out) in out.iter_mut().enumerate() {
                    let x = &x_values[row * inputs + b * WEIGHTS..][..WEIGHTS];
                    *out += dot(&block, x);
                }
            }
        }
    });
    let out = Tensor::from_slice(&out).f_view([outputs as i64, rows as i64])?;
    Ok(out.f_tr()?.f_to_kind(x.f_kind()?)?.f_contiguous()?)
}

/// Sixteen sums side by side, since floating-point sums are not reordered by the compiler.
#[inline]
fn dot(one: &[f32; WEIGHTS], two: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    for (x, y) in one.as_chunks::<16>().0.iter().zip(two.as_chunks::<16>().0) {
        for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
            *sum += x * y;
        }
    }
    sums.iter().sum()
}

/// Work that is worth a second thread, in numbers to read.
const NUMBERS_A_THREAD: usize = 1 << 16;

/// Cuts `out` into parts of whole `unit`s, one for each of libtorch's threads, and fills them side by side.
/// `work` gets the number of its first unit and its part.
fn in_parts<T: Send>(out: &mut [T], unit: usize, work: impl Fn(usize, &mut [T]) + Sync) {
    let units = out.len() / unit;
    let threads = (tch::get_num_threads().max(1) as usize).min(units * WEIGHTS / NUMBERS_A_THREAD + 1);
    let each = units.div_ceil(threads).max(1);
    thread::scope(|scope| {
        let mut parts = out.chunks_mut(each * unit).enumerate();
        let own = parts.next();
        for (n, part) in parts {
            let work = &work;
            scope.spawn(move || work(n * each, part));
        }
        if let Some((_, part)) = own {
            work(0, part);
        }
    });
}

/// The numbers of a contiguous CPU tensor.
fn slice<T: Copy>(tensor: &Tensor) -> Result<&[T]> {
    check::<T>(tensor)?;
    // SAFETY: the tensor is contiguous, on the CPU, and its elements have the size of `T`, a plain number; the
    // borrow keeps it alive, and quantised weights are never written to.
    #[allow(unsafe_code)]
    Ok(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), tensor.numel()) })
}

/// As [`slice`], to write to a tensor that nobody else holds yet.
pub fn slice_mut<T: Copy>(tensor: &mut Tensor) -> Result<&mut [T]> {
    check::<T>(tensor)?;
    // SAFETY: as above; and the tensor was made by the caller, so that there is no other handle on it.
    #[allow(unsafe_code)]
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), tensor.numel()) })
}

fn check<T>(tensor: &Tensor) -> Result<()> {
    let fits = tensor.device() == Device::Cpu
        && tensor.is_contiguous()
        && tensor.f_kind()?.elt_size_in_bytes() == size_of::<T>();
    fits.then_some(()).context("a quantised matrix has to be contiguous, on the CPU and of the expected type")
}
