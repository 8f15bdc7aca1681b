//! What an adapter adds to the products of a block, and its gradient: rows go down to its ranks and up again, where they can
//! within the base's own product.
//!
//! For libtorch these are some thirty products a block, so small that it takes longer to set most of them up than to do
//! them.

mod paired;
mod tiled;

use anyhow::{Result, ensure};
use tch::Tensor;

use super::Way;
use super::pairs;
use super::rows::{Element, Rows};
use super::tiles::TILE;
use crate::active::Delta;
use crate::cpu::vector::Level;

/// Rows of one task.
const ROWS: usize = 8 * TILE;

/// An adapter's part in one merged matrix. Rows go down to its ranks and up again: forward by A and B, where `x` is what the matrix
/// multiplies, and back by B and A, where it is the gradient of the product.
pub(crate) trait LowRank: Send + Sync {
    /// `x A^T`, or `x B`, as [`LowRank::up`] and [`LowRank::gradient`] take it.
    ///
    /// # Errors
    /// Where `x` has another shape or format than its matrix.
    fn down(&self, way: Way, x: &Tensor) -> Result<Tensor>;

    /// Adds `low B^T`, or `low A`, to `product`, in place.
    ///
    /// # Errors
    /// As [`LowRank::down`].
    fn up(&self, way: Way, low: &Tensor, product: &Tensor) -> Result<()>;

    /// The same for a product that adds it to its own sums, where this form lies so.
    fn panels(&self, way: Way) -> Option<&pairs::Panels>;

    /// Writes the gradients of A, one of each part, and of B, times a number.
    ///
    /// # Errors
    /// As [`LowRank::down`].
    fn gradient(&self, given: Given<'_>, of_a: &[Tensor], of_b: &[(Tensor, f32)]) -> Result<()>;
}

/// What the gradient of an adapter's part needs.
#[derive(Clone, Copy)]
pub(crate) struct Given<'a> {
    /// What went down forward.
    pub x: &'a Tensor,
    /// What it came down to.
    pub low: &'a Tensor,
    /// The gradient of the product.
    pub above: &'a Tensor,
    /// What that came down to.
    pub of_low: &'a Tensor,
}

/// An adapter's part as it lies in the tensors of an adapter that was made ready.
pub(super) struct Source<W> {
    a: Rows<W>,
    /// The first column of each part, and its B.
    parts: Vec<(usize, Rows<W>)>,
}

impl<W: Element> Source<W> {
    /// `widths` are those of the slices of the merged product.
    pub fn of(delta: &Delta, widths: &[i64]) -> Result<Self> {
        let part = |(&ranks, (slice, b)): (&i64, &(usize, Tensor))| {
            let column = widths[..*slice].iter().sum::<i64>() as usize;
            Ok((column, Rows::of(&b.f_contiguous()?, ranks)?))
        };
        let parts = delta.ranks.iter().zip(&delta.parts).map(part).collect::<Result<_>>()?;
        Ok(Self { a: Rows::of(&delta.a, delta.a.size()[1])?, parts })
    }

    /// In pairs where the processor multiplies these and the rows are bf16, else in tiles of f32.
    pub fn read(&self, level: Level) -> Box<dyn LowRank> {
        match paired::Paired::read(self, level) {
            Some(paired) => Box::new(paired),
            None => Box::new(tiled::Tiled::read(self, level)),
        }
    }
}

/// The rows of the gradients of A, and of B with a number each, of so many parts.
type Gradients = (Vec<Rows<f32>>, Vec<(Rows<f32>, f32)>);

fn gradients(parts: usize, of_a: &[Tensor], of_b: &[(Tensor, f32)]) -> Result<Gradients> {
    ensure!(of_a.len() == parts && of_b.len() == parts, "an adapter's gradient has other parts than it");
    let of_a = of_a.iter().map(|a| Rows::of(a, a.size()[1])).collect::<Result<_>>()?;
    let of_b =
        of_b.iter().map(|(b, scale)| Ok((Rows::of(b, b.size()[1])?, *scale))).collect::<Result<_>>()?;
    Ok((of_a, of_b))
}

/// That rows have as many numbers as an adapter's part reads of them, or writes.
fn check<W: Element>(rows: &Rows<W>, wanted: usize) -> Result<()> {
    ensure!(rows.width() >= wanted, "rows of {} numbers are too short for an adapter", rows.width());
    Ok(())
}

/// All rows of a tensor.
fn rows<W: Element>(of: &Tensor) -> Result<Rows<W>> {
    Rows::of(of, of.size()[1])
}

#[cfg(test)]
mod tests;
