//! Frozen matrices in 8 and 4 bits (QLoRA, arXiv 2305.14314), so that a larger base fits.
//!
//! The weights of a matrix, row after row, form blocks of 64 that share a scale: the largest magnitude among
//! them. Each weight is stored as the nearest of 255 steps (`int8`) or of the 16 quantiles of a normal
//! distribution (`nf4`). With 255 steps all blocks of a row have the largest of their scales, so that whole numbers
//! are added up over all of it (see `cpu::dot`); that costs next to nothing, where 4 bits would lose much. With its
//! scale that is 8.5 or 4.5 bits a weight. Embedding, head, norms and biases stay as they are, and adapters are f32.
//!
//! A product with many rows makes the dense matrix anew, uses it and drops it; one with few rows, as in
//! decoding on a CPU, reads the blocks directly (see `kernel`).

mod kernel;

pub(crate) use kernel::{Codes, slice_mut};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use tch::{Device, Kind, Tensor};

/// Weights that share a scale.
pub(crate) const BLOCK: i64 = 64;

/// Weights that are taken in at a time, so that quantising a large matrix needs little memory beside it.
const CHUNK_BLOCKS: i64 = 1 << 14;

/// The quantiles of a normal distribution that four bits stand for, scaled to ±1 (arXiv 2305.14314, appendix E).
pub(crate) const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// How the matrices of a frozen base are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantisation {
    /// In the base's own precision.
    #[default]
    None,
    /// 8 bits a weight, evenly spaced.
    Int8,
    /// 4 bits a weight, spaced as a normal distribution is.
    Nf4,
}

impl Quantisation {
    const ALL: [Self; 3] = [Self::None, Self::Int8, Self::Nf4];

    /// Its name in settings.
    pub fn name(self) -> &'static str {
        ["none", "int8", "nf4"][self as usize]
    }
}

impl fmt::Display for Quantisation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Quantisation {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|quantisation| quantisation.name() == text);
        known.with_context(|| format!("unknown quantisation {text:?}: use none, int8 or nf4"))
    }
}

/// A frozen projection, [outputs, inputs].
#[derive(Debug)]
pub(crate) enum Matrix {
    /// As it is.
    Dense(Tensor),
    /// In blocks.
    Quantised(Quantised),
}

/// A matrix in blocks of [`BLOCK`] weights, row after row; the last block may be padded.
#[derive(Debug)]
pub(crate) struct Quantised {
    /// `int8`: i8 [blocks, 64]. `nf4`: u8 [blocks, 32], the earlier weight of a pair in the high half.
    pub codes: Tensor,
    /// f32 [blocks].
    pub scales: Tensor,
    pub shape: [i64; 2],
    /// What products are computed in.
    kind: Kind,
}

impl Matrix {
    /// Stores `weight` [outputs, inputs] as asked for. Products are in its kind.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn new(weight: Tensor, quantisation: Quantisation) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        Ok(match quantisation {
            Quantisation::None => Self::Dense(weight),
            Quantisation::Int8 => Self::Quantised(Quantised::new(&weight, int8_codes, true)?),
            Quantisation::Nf4 => Self::Quantised(Quantised::new(&weight, nf4_codes, false)?),
        })
    }

    /// `x W^T + bias` for x [rows, inputs] in the matrix's kind.
    ///
    /// # Errors
    /// When shapes or kinds do not agree.
    pub fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => Ok(x.f_linear(weight, bias)?),
            Self::Quantised(weight) => weight.product(x, bias),
        }
    }

    /// The weights as one tensor: the stored one, or made anew.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn dense(&self) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => Ok(weight.shallow_clone()),
            Self::Quantised(weight) => weight.dense(),
        }
    }

    /// The stored tensor, to train it.
    ///
    /// # Errors
    /// When it is quantised.
    pub fn dense_mut(&mut self) -> Result<&mut Tensor> {
        match self {
            Self::Dense(weight) => Ok(weight),
            Self::Quantised(_) => anyhow::bail!("quantised weights cannot be trained themselves"),
        }
    }

    /// Whether it is quantised.
    pub fn is_quantised(&self) -> bool {
        matches!(self, Self::Quantised(_))
    }

    /// A second handle on the same weights.
    pub fn share(&self) -> Self {
        match self {
            Self::Dense(weight) => Self::Dense(weight.shallow_clone()),
            Self::Quantised(weight) => Self::Quantised(Quantised {
                codes: weight.codes.shallow_clone(),
                scales: weight.scales.shallow_clone(),
                ..*weight
            }),
        }
    }

    /// Bytes that the weights take in memory.
    pub fn bytes_len(&self) -> usize {
        let bytes = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
        match self {
            Self::Dense(weight) => bytes(weight),
            Self::Quantised(weight) => bytes(&weight.codes) + bytes(&weight.scales),
        }
    }
}

impl Quantised {
    /// `whole_rows`: all blocks of a row have the largest of their scales, where rows are whole blocks.
    fn new(weight: &Tensor, encode: fn(&Tensor) -> Result<Tensor>, whole_rows: bool) -> Result<Self> {
        let (rows, columns) = weight.size2().context("a matrix has rows and columns")?;
        let flat = weight.f_flatten(0, -1)?;
        let padding = (BLOCK - rows * columns % BLOCK) % BLOCK;
        let flat = if padding > 0 { flat.f_constant_pad_nd([0, padding])? } else { flat };
        let blocks = flat.f_view([-1, BLOCK])?;
        let count = blocks.size()[0];
        let alike = if whole_rows && columns % BLOCK == 0 { (columns / BLOCK).max(1) } else { 1 };
        let most = (CHUNK_BLOCKS / alike).max(1) * alike;
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for start in (0..count).step_by(most as usize) {
            let chunk = blocks.f_narrow(0, start, most.min(count - start))?.f_to_kind(Kind::Float)?;
            let scale = chunk.f_abs()?.f_amax([-1i64], true)?;
            let scale = scale.f_view([-1, alike])?.f_amax([-1i64], true)?;
            let scale = scale.f_expand([-1, alike], false)?.f_reshape([-1, 1])?;
            // A block of zeros has any scale; one keeps the division finite.
            let scale = scale.f_where_self(&scale.f_gt(0.0)?, &scale.f_ones_like()?)?;
            codes.push(encode(&chunk.f_div(&scale)?)?);
            scales.push(scale.f_squeeze_dim(1)?);
        }
        Ok(Self {
            codes: Tensor::f_cat(&codes, 0)?,
            scales: Tensor::f_cat(&scales, 0)?,
            shape: [rows, columns],
            kind: weight.f_kind()?,
        })
    }

    fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        if kernel::applies(self, x) {
            let product = kernel::product(self, x)?;
            return Ok(match bias {
                Some(bias) => product.f_add(bias)?,
                None => product,
            });
        }
        let weight = self.dense()?;
        Ok(x.f_linear(&weight, bias)?)
    }

    fn dense(&self) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let [rows, columns] = self.shape;
        let dense = if self.codes.device() == Device::Cpu {
            kernel::dense(self)?
        } else {
            let values = match self.codes.f_kind()? {
                Kind::Int8 => self.codes.f_to_kind(Kind::Float)?.f_div_scalar(127.0)?,
                _ => nf4_values(&self.codes)?,
            };
            values.f_mul(&self.scales.f_unsqueeze(1)?)?.f_to_kind(self.kind)?
        };
        Ok(dense.f_flatten(0, -1)?.f_narrow(0, 0, rows * columns)?.f_view([rows, columns])?)
    }
}

/// Codes of values within ±1: `round(127 x)`.
fn int8_codes(values: &Tensor) -> Result<Tensor> {
    Ok(values.f_mul_scalar(127.0)?.f_round()?.f_to_kind(Kind::Int8)?)
}

/// Codes of values within ±1: the index of the nearest quantile, two to a byte.
fn nf4_codes(values: &Tensor) -> Result<Tensor> {
    let middles: Vec<f32> = NF4.windows(2).map(|pair| f32::midpoint(pair[0], pair[1])).collect();
    let middles = Tensor::from_slice(&middles).to_device(values.device());
    let codes = values.f_contiguous()?.f_bucketize(&middles, true, false)?.f_to_kind(Kind::Uint8)?;
    let pairs = codes.f_view([-1, BLOCK / 2, 2])?;
    let (early, late) = (pairs.f_select(-1, 0)?, pairs.f_select(-1, 1)?);
    Ok(early.f_mul_scalar(16)?.f_add(&late)?)
}

/// The quantiles that packed codes stand for, f32 [blocks, 64].
fn nf4_values(codes: &Tensor) -> Result<Tensor> {
    let early = codes.f_floor_divide_scalar(16)?;
    let late = codes.f_remainder(16)?;
    let both = Tensor::f_stack(&[early, late], -1)?.f_flatten(0, -1)?.f_to_kind(Kind::Int)?;
    let table = Tensor::from_slice(&NF4).to_device(codes.device());
    Ok(table.f_index_select(0, &both)?.f_view([-1, BLOCK])?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::distance;

    fn weight(rows: i64, columns: i64, kind: Kind) -> Tensor {
        let numbers = Tensor::arange(rows * columns, (Kind::Float, Device::Cpu));
        ((numbers * 12.9898).sin() * 43_758.547).frac().view([rows, columns]).to_kind(kind) * 0.3
    }

    fn quantised(weight: &Tensor, quantisation: Quantisation) -> Quantised {
        match Matrix::new(weight.shallow_clone(), quantisation).unwrap() {
            Matrix::Quantised(quantised) => quantised,
            Matrix::Dense(_) => panic!("not quantised"),
        }
    }

    #[test]
    fn no_weight_is_further_off_than_half_a_step() {
        let weight = weight(48, 100, Kind::Float);
        // The widest gap between quantiles is 0.304, between -1 and -0.696.
        for (quantisation, step) in [(Quantisation::Int8, 1.0 / 127.0), (Quantisation::Nf4, 0.304)] {
            let dense = quantised(&weight, quantisation).dense().unwrap();
            let largest = weight.abs().max().double_value(&[]);
            assert!(distance(&dense, &weight) <= step / 2.0 * largest + 1e-6, "{quantisation}");
        }
    }

    #[test]
    fn what_the_format_can_say_is_said_exactly() {
        let values: Vec<f32> = NF4.iter().cycle().take(64).map(|value| value * 0.25).collect();
        let weight = Tensor::from_slice(&values).view([1, 64]);
        assert!(distance(&quantised(&weight, Quantisation::Nf4).dense().unwrap(), &weight) < 1e-7);
        let steps: Vec<f32> = (0..64).map(|i| (i * 4 - 127) as f32 / 127.0).collect();
        let weight = Tensor::from_slice(&steps).view([2, 32]);
        assert!(distance(&quantised(&weight, Quantisation::Int8).dense().unwrap(), &weight) < 1e-6);
        let zeros = weight.zeros_like();
        for quantisation in [Quantisation::Int8, Quantisation::Nf4] {
            assert!(distance(&quantised(&zeros, quantisation).dense().unwrap(), &zeros) == 0.0);
        }
    }

    #[test]
    fn four_bits_take_four_and_a_half_and_eight_eight_and_a_half() {
        let weight = weight(64, 128, Kind::BFloat16);
        let bits = |q| 8 * Matrix::new(weight.shallow_clone(), q).unwrap().bytes_len() as i64;
        assert_eq!(bits(Quantisation::None), 16 * 64 * 128);
        assert_eq!(bits(Quantisation::Int8) * 2, 17 * 64 * 128);
        assert_eq!(bits(Quantisation::Nf4) * 2, 9 * 64 * 128);
    }

    #[test]
    fn eight_bits_have_a_scale_a_row_and_four_a_scale_a_block() {
        let weight =
            Tensor::from_slice(&[[0.5f32; 64], [0.25; 64], [0.1; 64], [-0.2; 64]].concat()).view([2, 128]);
        let scales = |q| Vec::<f32>::try_from(&quantised(&weight, q).scales).unwrap();
        assert_eq!(scales(Quantisation::Int8), [0.5, 0.5, 0.2, 0.2]);
        assert_eq!(scales(Quantisation::Nf4), [0.5, 0.25, 0.1, 0.2]);
        // Of rows that are no whole blocks, a block has its own.
        let odd = quantised(&weight.view([8, 32]), Quantisation::Int8);
        assert_eq!(Vec::<f32>::try_from(&odd.scales).unwrap(), [0.5, 0.25, 0.1, 0.2]);
        // Many rows are taken in parts.
        let rows = Tensor::arange(12_000, (Kind::Float, Device::Cpu)).view([-1, 1]) + 1.0;
        let tall = quantised(&rows.expand([-1, 192], false), Quantisation::Int8);
        assert!(distance(&tall.scales.view([-1, 3]), &rows.expand([-1, 3], false)) == 0.0);
    }

    /// The kernel against libtorch's own operations, which other devices use.
    #[test]
    fn the_kernel_reads_what_libtorch_reads() {
        for quantisation in [Quantisation::Int8, Quantisation::Nf4] {
            let quantised = quantised(&weight(40, 96, Kind::Float), quantisation);
            let values = match quantisation {
                Quantisation::Int8 => quantised.codes.to_kind(Kind::Float) / 127.0,
                _ => nf4_values(&quantised.codes).unwrap(),
            };
            let plain = values * quantised.scales.unsqueeze(1);
            assert!(distance(&kernel::dense(&quantised).unwrap(), &plain) < 1e-6, "{quantisation}");
        }
    }

    #[test]
    fn few_rows_give_what_many_give() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for quantisation in [Quantisation::Int8, Quantisation::Nf4] {
                // Large enough for several threads.
                let matrix = quantised(&weight(1200, 192, kind), quantisation);
                let (x, bias) = (weight(9, 192, kind), weight(1, 1200, kind).view([1200]));
                let many = matrix.product(&x, Some(&bias)).unwrap();
                for rows in [1, 3, 4] {
                    let few = x.narrow(0, 0, rows);
                    assert!(kernel::applies(&matrix, &few) && !kernel::applies(&matrix, &x));
                    let few = matrix.product(&few, Some(&bias)).unwrap();
                    let apart = distance(&few, &many.narrow(0, 0, rows));
                    assert!(apart < if kind == Kind::Float { 1e-4 } else { 0.06 }, "{kind:?} {apart}");
                }
            }
        }
    }

    #[test]
    fn names_are_read_and_others_refused() {
        for quantisation in Quantisation::ALL {
            assert_eq!(quantisation.name().parse::<Quantisation>().unwrap(), quantisation);
        }
        assert!("int4".parse::<Quantisation>().unwrap_err().to_string().contains("nf4"));
    }
}
