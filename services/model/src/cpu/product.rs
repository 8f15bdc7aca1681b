//! Products of some rows with a frozen matrix, `x W^T`, whose sums are the same however many rows there are.
//!
//! An element is the product of one row of `x` with one of `W`, and is added up in the same order whether the row
//! stands alone, in a batch, or in a prompt. So an answer does not depend on what is beside it, and what was
//! computed for one prompt can be used for another.

use anyhow::{Context, Result};
use half::{bf16, f16};
use std::ops::Range;
use tch::{Kind, Tensor};

use super::frozen::Frozen;
use super::team::{Band, Team};
use super::vector::{FUSED, Level, Number, fma, sum, to_bf16, vectorised};
use crate::quant::{BLOCK, Codes, Matrix};

#[cfg(target_arch = "x86_64")]
use super::{amx, avx2, avx512, dot};

/// Rows of a product, in the formats that its matrices need.
#[derive(Default)]
pub(super) struct Operand {
    /// f32 [rows, width].
    pub values: Vec<f32>,
    width: usize,
    bf16: Vec<bf16>,
    /// The same as [`amx`] reads it.
    tiles: Vec<bf16>,
    /// Each row in steps of its own.
    int16: Vec<i16>,
    /// The step of each row.
    steps: Vec<f32>,
}

/// What an [`Operand`] is needed in beside f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Formats {
    pub bf16: bool,
    /// bf16 laid out as tiles.
    pub tiles: bool,
    pub int16: bool,
    /// Of each 64 integers, first those at even places, then those at odd ones, as pairs of 4-bit codes have them.
    pub apart: bool,
}

impl Formats {
    /// What both need.
    ///
    /// # Panics
    /// When integers are needed in both orders: a base is quantised in one way.
    pub fn and(self, other: Self) -> Self {
        assert!(
            !(self.int16 && other.int16) || self.apart == other.apart,
            "one base has two formats of blocks"
        );
        Self {
            bf16: self.bf16 || other.bf16,
            tiles: self.tiles || other.tiles,
            int16: self.int16 || other.int16,
            apart: self.apart || other.apart,
        }
    }
}

impl Operand {
    /// Room for `rows` of `width`; what is in there is to be overwritten.
    pub fn make_room(&mut self, rows: usize, width: usize) {
        self.width = width;
        self.values.resize(rows * width, 0.0);
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.values.len() / self.width.max(1)
    }

    /// Makes the other formats of what is in `values`.
    pub fn convert(&mut self, team: &mut Team, level: Level, formats: Formats) {
        let (width, values) = (self.width, &self.values);
        let rows_at_a_time = (4096 / width).max(1) * width;
        if formats.bf16 || formats.tiles {
            self.bf16.resize(values.len(), bf16::ZERO);
            team.parts(&mut self.bf16, rows_at_a_time, |i, out| {
                to_bf16(level, &values[i * rows_at_a_time..][..out.len()], out);
            });
        }
        #[cfg(target_arch = "x86_64")]
        if formats.tiles && width.is_multiple_of(amx::DEPTH) {
            amx::lay_out(team, &self.bf16, width, &mut self.tiles);
        }
        if formats.int16 {
            self.int16.resize(values.len(), 0);
            self.steps.resize(values.len() / width, 0.0);
            for (i, step) in self.steps.iter_mut().enumerate() {
                let row = &values[i * width..][..width];
                to_int16(level, row, &mut self.int16[i * width..][..width], step, formats.apart);
            }
        }
    }
}

/// The largest magnitude of a row is this many steps.
const STEPS: f32 = 32_767.0;

vectorised! {
    /// The nearest of 65,535 even steps.
    fn to_int16 [] [] (x: &[f32], out: &mut [i16], step: &mut f32, apart: bool) {
        let mut largest = [0f32; 16];
        for chunk in x.as_chunks::<16>().0 {
            for (largest, x) in largest.iter_mut().zip(chunk) {
                *largest = largest.max(x.abs());
            }
        }
        let largest = largest.iter().copied().fold(0f32, f32::max);
        *step = largest / STEPS;
        let inverse = if largest > 0.0 { STEPS / largest } else { 0.0 };
        // Adding and subtracting this rounds to the nearest whole number.
        let nearest = |x: f32| (x * inverse + 12_582_912.0) - 12_582_912.0;
        if apart {
            for (out, x) in out.as_chunks_mut::<64>().0.iter_mut().zip(x.as_chunks::<64>().0) {
                for i in 0..32 {
                    out[i] = nearest(x[2 * i]) as i16;
                    out[32 + i] = nearest(x[2 * i + 1]) as i16;
                }
            }
        } else {
            for (out, x) in out.iter_mut().zip(x) {
                *out = nearest(*x) as i16;
            }
        }
    }
}

/// Rows of `x` as whole numbers of steps.
#[derive(Clone, Copy)]
pub(super) struct Int16<'a> {
    /// [rows, k].
    pub values: &'a [i16],
    /// The step of each row.
    pub steps: &'a [f32],
}

/// The numbers of a frozen matrix.
pub(super) enum Numbers {
    F32(Frozen<f32>),
    Bf16(Frozen<bf16>),
    F16(Frozen<f16>),
    Int8 { codes: Frozen<i8>, scales: Frozen<f32> },
    Nf4 { codes: Frozen<u8>, scales: Frozen<f32> },
}

impl Numbers {
    /// Those of a tensor.
    ///
    /// # Errors
    /// When it is not contiguous, on the CPU, and of a format that there is.
    pub fn of(tensor: &Tensor) -> Result<Self> {
        Ok(match tensor.f_kind()? {
            Kind::Float => Self::F32(Frozen::new(tensor)?),
            Kind::BFloat16 => Self::Bf16(Frozen::new(tensor)?),
            Kind::Half => Self::F16(Frozen::new(tensor)?),
            kind => anyhow::bail!("no products with {kind:?}"),
        })
    }

    /// Where in memory they lie.
    fn memory(&self) -> [Range<usize>; 2] {
        match self {
            Self::F32(x) => [x.memory(), 0..0],
            Self::Bf16(x) => [x.memory(), 0..0],
            Self::F16(x) => [x.memory(), 0..0],
            Self::Int8 { codes, scales } => [codes.memory(), scales.memory()],
            Self::Nf4 { codes, scales } => [codes.memory(), scales.memory()],
        }
    }

    /// Numbers `start` to `start + out.len()` as f32.
    pub fn read(&self, start: usize, out: &mut [f32]) {
        fn copy<W: Number>(from: &[W], out: &mut [f32]) {
            for (out, x) in out.iter_mut().zip(from) {
                *out = x.wide();
            }
        }
        match self {
            Self::F32(x) => copy(&x[start..], out),
            Self::Bf16(x) => copy(&x[start..], out),
            Self::F16(x) => copy(&x[start..], out),
            Self::Int8 { codes, scales } => Codes::Int8(codes).read_from(start, scales, out),
            Self::Nf4 { codes, scales } => Codes::Nf4(codes).read_from(start, scales, out),
        }
    }
}

/// A frozen matrix, [outputs, inputs].
pub(super) struct Weight {
    numbers: Numbers,
    /// Its products go by tiles where there are some. Those of adapters never do: their rows begin anywhere in a batch, and a
    /// product must not depend on where.
    tiled: bool,
    pub outputs: usize,
    pub inputs: usize,
}

impl Weight {
    /// A view of a tensor of two dimensions.
    ///
    /// # Errors
    /// As for [`Numbers::of`].
    pub fn of(tensor: &Tensor) -> Result<Self> {
        let (outputs, inputs) = tensor.size2().context("a matrix has rows and columns")?;
        let numbers = Numbers::of(tensor)?;
        Ok(Self { numbers, tiled: false, outputs: outputs as usize, inputs: inputs as usize })
    }

    /// A view of a base's matrix.
    ///
    /// # Errors
    /// As for [`Numbers::of`].
    pub fn of_matrix(matrix: &Matrix) -> Result<Self> {
        let quantised = match matrix {
            Matrix::Dense(tensor) => return Ok(Self::of(tensor)?.by_tiles()),
            Matrix::Quantised(quantised) => quantised,
        };
        let [outputs, inputs] = quantised.shape.map(|n| n as usize);
        let scales = Frozen::new(&quantised.scales)?;
        let numbers = match quantised.codes.f_kind()? {
            Kind::Int8 => Numbers::Int8 { codes: Frozen::new(&quantised.codes)?, scales },
            _ => Numbers::Nf4 { codes: Frozen::new(&quantised.codes)?, scales },
        };
        Ok(Self { numbers, tiled: false, outputs, inputs })
    }

    /// The same with products by tiles, if its sides are a whole number of them.
    fn by_tiles(self) -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let whole = self.inputs.is_multiple_of(amx::DEPTH) && self.outputs.is_multiple_of(amx::SIDE);
            Self { tiled: whole && matches!(self.numbers, Numbers::Bf16(_)), ..self }
        }
        #[cfg(not(target_arch = "x86_64"))]
        self
    }

    /// Where in memory its numbers lie.
    pub fn memory(&self) -> impl Iterator<Item = Range<usize>> {
        self.numbers.memory().into_iter().filter(|range| !range.is_empty())
    }

    /// Whether its numbers are bf16.
    #[cfg(test)]
    pub fn is_bf16(&self) -> bool {
        matches!(self.numbers, Numbers::Bf16(_))
    }

    /// What products with this need of their rows.
    pub fn formats(&self, level: Level) -> Formats {
        let whole = self.inputs.is_multiple_of(BLOCK as usize);
        let narrow = whole && level >= Level::Avx2;
        let pairs = whole && level >= Level::Avx512Vnni;
        match &self.numbers {
            Numbers::Bf16(_) if self.tiled && level == Level::Amx => {
                Formats { tiles: true, ..Formats::default() }
            }
            Numbers::Bf16(_) => Formats { bf16: level >= Level::Avx512Bf16, ..Formats::default() },
            Numbers::Int8 { .. } => Formats { int16: narrow, ..Formats::default() },
            Numbers::Nf4 { .. } => Formats { int16: pairs, apart: pairs, ..Formats::default() },
            Numbers::F32(_) | Numbers::F16(_) => Formats::default(),
        }
    }

    /// Writes the product's columns of a band: its first row is row `first_row` of `x`.
    pub fn product(&self, level: Level, x: &Operand, first_row: usize, band: &mut Band<'_>) {
        let rows = first_row..first_row + band.rows();
        assert!(rows.end <= x.rows() && self.inputs == x.width && band.first + band.count <= self.outputs);
        let k = self.inputs;
        let (wide, of_band) =
            (&x.values[rows.start * k..rows.end * k], band.first * k..(band.first + band.count) * k);
        #[cfg(target_arch = "x86_64")]
        let (formats, blocks) =
            (self.formats(level), of_band.start / BLOCK as usize..of_band.end / BLOCK as usize);
        #[cfg(target_arch = "x86_64")]
        let int16 =
            || Int16 { values: &x.int16[rows.start * k..rows.end * k], steps: &x.steps[rows.clone()] };
        match &self.numbers {
            #[cfg(target_arch = "x86_64")]
            Numbers::Bf16(w) if formats.tiles => {
                assert!(rows == (0..x.rows()), "tiles are of all rows");
                amx::product(&x.tiles, &w[of_band], k, band);
            }
            #[cfg(target_arch = "x86_64")]
            Numbers::Bf16(w) if formats.bf16 => {
                dot::bf16(&x.bf16[rows.start * k..rows.end * k], &w[of_band], k, band);
            }
            #[cfg(target_arch = "x86_64")]
            Numbers::Int8 { codes, scales } if formats.int16 => {
                let kernel = if level >= Level::Avx512Vnni { dot::int8 } else { avx2::int8 };
                kernel(int16(), &codes[of_band], &scales[blocks], k, band);
            }
            #[cfg(target_arch = "x86_64")]
            Numbers::Nf4 { codes, scales } if formats.int16 => {
                dot::nf4(int16(), &codes[of_band.start / 2..of_band.end / 2], &scales[blocks], k, band);
            }
            Numbers::F32(w) => dense(level, wide, &w[of_band], k, band),
            Numbers::Bf16(w) => dense(level, wide, &w[of_band], k, band),
            Numbers::F16(w) => dense(level, wide, &w[of_band], k, band),
            Numbers::Int8 { .. } | Numbers::Nf4 { .. } => {
                // Made anew as f32, a few rows at a time.
                let mut made = vec![0.0; of_band.len()];
                self.numbers.read(of_band.start, &mut made);
                dense(level, wide, &made, k, band);
            }
        }
    }

    /// One of its rows as f32.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        self.numbers.read(row * self.inputs, out);
    }

    /// `out += low B^T` for one row, with this as B^T, [rank, outputs], from column `first` on.
    pub fn add_low_rank(&self, level: Level, low: &[f32], first: usize, out: &mut [f32]) {
        match &self.numbers {
            Numbers::F32(b) => add_low_rank(level, low, b, self.inputs, first, out),
            Numbers::Bf16(b) => add_low_rank(level, low, b, self.inputs, first, out),
            Numbers::F16(b) => add_low_rank(level, low, b, self.inputs, first, out),
            Numbers::Int8 { .. } | Numbers::Nf4 { .. } => unreachable!("adapters are not quantised"),
        }
    }
}

vectorised! {
    fn add_low_rank [W: Number] [W] (low: &[f32], b: &[W], width: usize, first: usize, out: &mut [f32]) {
        let (chunks, rest) = out.as_chunks_mut::<32>();
        let done = 32 * chunks.len();
        for (i, chunk) in chunks.iter_mut().enumerate() {
            let mut sums = *chunk;
            for (r, low) in low.iter().enumerate() {
                let b = &b[r * width + first + 32 * i..][..32];
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = fma::<F>(*low, b.wide(), *sum);
                }
            }
            *chunk = sums;
        }
        for (r, low) in low.iter().enumerate() {
            let b = &b[r * width + first + done..][..rest.len()];
            for (sum, b) in rest.iter_mut().zip(b) {
                *sum = fma::<F>(*low, b.wide(), *sum);
            }
        }
    }
}

/// The product of the rows of `x` with those of `w`, of any format, with rows of `k`.
fn dense<W: Number>(level: Level, x: &[f32], w: &[W], k: usize, band: &mut Band<'_>) {
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => avx2::dense(x, w, k, band),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Vnni | Level::Avx512Bf16 | Level::Amx => avx512::dense(x, w, k, band),
        _ => dense_plain(x, w, k, band),
    }
}

/// The same without instructions of its own, a row at a time.
fn dense_plain<W: Number>(x: &[f32], w: &[W], k: usize, band: &mut Band<'_>) {
    for column in 0..band.count {
        let (w, w_rest) = w[column * k..(column + 1) * k].as_chunks::<32>();
        for row in 0..band.rows() {
            let (x, x_rest) = x[row * k..(row + 1) * k].as_chunks::<32>();
            let mut sums = [0f32; 32];
            for (x, w) in x.iter().zip(w) {
                for ((sum, x), w) in sums.iter_mut().zip(x).zip(w) {
                    *sum = fma::<FUSED>(*x, w.wide(), *sum);
                }
            }
            for ((sum, x), w) in sums.iter_mut().zip(x_rest).zip(w_rest) {
                *sum = fma::<FUSED>(*x, w.wide(), *sum);
            }
            let halves: [f32; 16] = std::array::from_fn(|i| sums[i] + sums[i + 16]);
            band.row(row)[column] = sum(halves);
        }
    }
}
