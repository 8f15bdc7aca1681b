//! Which of the processor's instructions are used: those whose products are right.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::product::{Operand, Weight};
use super::team::Team;
use super::vector::Level;
use crate::quant::{Matrix, Quantisation};

/// The best level of this processor that gives what the plain one gives, on a few small products.
///
/// # Errors
/// Only those of libtorch.
pub(super) fn level() -> Result<Level> {
    for level in [Level::Amx, Level::Avx512Bf16, Level::Avx512Vnni, Level::Avx512, Level::Avx2] {
        if level <= Level::best() && agrees(level)? {
            return Ok(level);
        }
    }
    Ok(Level::Plain)
}

/// Whether the products of a level are near the plain ones, whatever the number of rows.
pub(super) fn agrees(level: Level) -> Result<bool> {
    let waves = |rows: i64, columns: i64| -> Result<Tensor> {
        let numbers = Tensor::f_arange(rows * columns, (Kind::Float, Device::Cpu))?;
        // Rows of four sizes, so that the scale of another one is seen.
        let sizes = Tensor::f_arange(rows, (Kind::Float, Device::Cpu))?.f_remainder(4.0)?;
        let waves = (numbers.f_mul_scalar(0.37)?.f_square()?).f_sin()?.f_view([rows, columns])?;
        Ok(waves.f_mul(&sizes.f_add_scalar(1.0)?.f_div_scalar(4.0)?.f_unsqueeze(1)?)?)
    };
    // Rows that no tile covers evenly, and of columns an odd number of tiles or more; blocks of 64 for those that need them, and an
    // end for the others.
    for (kind, quantisation, width) in [
        (Kind::Float, Quantisation::None, 131),
        (Kind::BFloat16, Quantisation::None, 131),
        (Kind::BFloat16, Quantisation::None, 128),
        (Kind::Half, Quantisation::None, 131),
        (Kind::BFloat16, Quantisation::Int8, 128),
        (Kind::BFloat16, Quantisation::Nf4, 128),
    ] {
        let columns = if width == 128 { 5 * 16 } else { 11 };
        let matrix = Matrix::new(waves(columns, width)?.f_to_kind(kind)?, quantisation)?;
        let weight = Weight::of_matrix(&matrix)?;
        for rows in [1, 2, 3, 7, 37] {
            let x = crate::generate::to_vec(&waves(rows, width)?)?;
            let [plain, ours] = [Level::Plain, level].map(|level| product(&weight, &x, level));
            let far = |(x, y): (&f32, &f32)| (x - y).is_nan() || (x - y).abs() > 0.1;
            if plain.iter().zip(&ours).any(far) {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

fn product(weight: &Weight, x: &[f32], level: Level) -> Vec<f32> {
    let (mut team, mut operand, rows) = (Team::new(1), Operand::default(), x.len() / weight.inputs);
    operand.make_room(rows, weight.inputs);
    operand.values.copy_from_slice(x);
    operand.convert(&mut team, level, weight.formats(level));
    let mut out = vec![0.0; rows * weight.outputs];
    team.bands(&mut out, weight.outputs, weight.outputs, |band| weight.product(level, &operand, 0, band));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is wrong here would be hidden by taking a lesser level.
    #[test]
    fn every_level_of_this_processor_is_trusted() {
        assert_eq!(level().unwrap(), Level::best());
    }

    /// Sums of whole numbers that would leave 32 bits are taken out before.
    #[test]
    fn long_rows_of_the_largest_numbers_are_added_up_in_parts() {
        let width = 4 * 4096 + 64;
        let ones = |rows: i64| Tensor::ones([rows, width], (Kind::BFloat16, Device::Cpu));
        let matrix = Matrix::new(ones(5), Quantisation::Int8).unwrap();
        let weight = Weight::of_matrix(&matrix).unwrap();
        for level in [Level::Avx2, Level::Avx512Vnni].into_iter().filter(|level| *level <= Level::best()) {
            for rows in [1, 5] {
                let x = crate::generate::to_vec(&ones(rows).to_kind(Kind::Float)).unwrap();
                for sum in product(&weight, &x, level) {
                    assert!((sum - width as f32).abs() < 0.1, "{level:?}, {rows} rows: {sum}");
                }
            }
        }
    }
}
