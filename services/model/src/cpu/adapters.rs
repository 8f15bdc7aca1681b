//! Adapters as the forward pass on a CPU reads them.

use anyhow::Result;
use tch::Tensor;

use super::product::{Formats, Weight};
use super::vector::Level;
use crate::active::{ActiveAdapters, Delta};
use crate::lora::Group;

/// What some adapters add to one merged matrix: `x A^T` for the A of all of them at once, then for each part its
/// own B.
pub(super) struct LowRank {
    /// [sum of ranks, inputs].
    pub a: Weight,
    pub parts: Vec<Part>,
}

/// One projection of one adapter.
pub(super) struct Part {
    /// The column of the merged product that it begins at.
    pub first: usize,
    /// Where its share of `x A^T` begins.
    pub low: usize,
    /// `weight * scale * B^T`, [rank, outputs].
    pub b: Weight,
}

/// Adapters that are cast, scaled, and turned once. Several answers share them.
#[derive(Default)]
pub struct CpuAdapters {
    /// By layer, then by group; none where nothing is added.
    layers: Vec<[Option<LowRank>; 4]>,
}

impl CpuAdapters {
    /// Takes up `adapters`; `widths` are those of the merged products' slices, by group.
    ///
    /// # Errors
    /// When they are not on the CPU.
    pub fn new(adapters: &ActiveAdapters, widths: &[&[i64]; 4]) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let groups = [Group::Qkv, Group::O, Group::GateUp, Group::Down];
        let layer = |layer: usize| -> Result<[Option<LowRank>; 4]> {
            let mut all = [const { None }; 4];
            for group in groups {
                all[group as usize] = low_rank(adapters.deltas(layer, group), widths[group as usize])?;
            }
            Ok(all)
        };
        Ok(Self { layers: (0..adapters.layers()).map(layer).collect::<Result<_>>()? })
    }

    /// What is added to the product of `group` in `layer`.
    pub(super) fn get(&self, layer: usize, group: Group) -> Option<&LowRank> {
        self.layers.get(layer).and_then(|groups| groups[group as usize].as_ref())
    }

    /// What the products with all A need of their rows.
    pub(super) fn formats(&self, level: Level) -> Formats {
        let all = self.layers.iter().flatten().flatten();
        all.map(|low| low.a.formats(level)).fold(Formats::default(), Formats::and)
    }
}

fn low_rank(deltas: &[Delta], widths: &[i64]) -> Result<Option<LowRank>> {
    if deltas.is_empty() {
        return Ok(None);
    }
    let a: Vec<&Tensor> = deltas.iter().map(|delta| &delta.a).collect();
    let (mut parts, mut low) = (Vec::new(), 0);
    for delta in deltas {
        for (rank, (slice, b)) in delta.ranks.iter().zip(&delta.parts) {
            let first = widths[..*slice].iter().sum::<i64>() as usize;
            parts.push(Part { first, low, b: Weight::of(&b.f_tr()?.f_contiguous()?)? });
            low += *rank as usize;
        }
    }
    Ok(Some(LowRank { a: Weight::of(&Tensor::f_cat(&a, 0)?)?, parts }))
}
