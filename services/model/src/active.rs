//! Adapters made ready for forward passes.

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

use crate::lora::{Adapter, Group, Module};

/// What some adapters add to one merged matrix: `low = x A^T`, cut into `parts`, each times its own `B^T`.
#[derive(Debug)]
pub(crate) struct Delta {
    /// A of all parts, [sum of ranks, inputs].
    pub a: Tensor,
    /// Rank of each part.
    pub ranks: Vec<i64>,
    /// For each part the slice of the merged product it is added to, and `weight * scale * B`, [outputs, rank].
    pub parts: Vec<(usize, Tensor)>,
}

/// Adapters that are cast, scaled and cut once.
///
/// Gradients flow through it to the flat vector of each adapter that requires them; such an instance serves
/// one backward pass. Without gradients it can be kept for as long as the weights do not change.
#[derive(Debug, Default)]
pub struct ActiveAdapters {
    /// By layer, then by group.
    layers: Vec<[Vec<Delta>; 4]>,
}

impl ActiveAdapters {
    /// No adapter: the base alone.
    pub fn none() -> Self {
        Self::default()
    }

    /// Prepares `adapters` for a base in `kind` on `device`. Each weight scales its adapter's change.
    ///
    /// # Errors
    /// When a weight is not finite.
    pub fn new(adapters: &[(&Adapter, f64)], kind: Kind, device: Device) -> Result<Self> {
        let layers =
            adapters.iter().flat_map(|(adapter, _)| &adapter.modules).map(|m| m.layer + 1).max().unwrap_or(0);
        let mut active = Self { layers: (0..layers).map(|_| Default::default()).collect() };
        for (adapter, weight) in adapters {
            ensure!(weight.is_finite(), "an adapter's weight has to be a finite number, not {weight}");
            active.add(&adapter.modules, adapter.flat(), *weight, kind, device)?;
        }
        Ok(active)
    }

    /// One layer of `adapter` alone, with `flat` as its weights, for a base in `kind`.
    pub(crate) fn of_layer(adapter: &Adapter, layer: i64, flat: &Tensor, kind: Kind) -> Result<Self> {
        let mut active = Self { layers: (0..=layer).map(|_| Default::default()).collect() };
        let modules: Vec<Module> = adapter.modules.iter().filter(|m| m.layer == layer).cloned().collect();
        active.add(&modules, flat, 1.0, kind, flat.device())?;
        Ok(active)
    }

    /// Adds `modules`, whose weights lie one after the other in `flat`.
    fn add(
        &mut self,
        modules: &[Module],
        flat: &Tensor,
        weight: f64,
        kind: Kind,
        device: Device,
    ) -> Result<()> {
        let groups: Vec<&[Module]> =
            modules.chunk_by(|x, y| x.layer == y.layer && x.target.place().0 == y.target.place().0).collect();
        let mut sizes = Vec::new();
        for group in &groups {
            sizes.push(group.iter().map(|m| m.rank * m.inputs).sum::<i64>());
            sizes.extend(group.iter().map(|m| m.outputs * m.rank));
        }
        // One split, because its backward pass is a single concatenation, where each narrow's would be a
        // vector of the full length.
        let flat = flat.f_to_device(device)?.f_to_kind(kind)?;
        let mut pieces = flat.f_split_with_sizes(&sizes, 0)?.into_iter();
        let mut piece = || pieces.next().context("the split gave too few pieces");
        for group in groups {
            let a = piece()?.f_view([-1, group[0].inputs])?;
            let ranks = group.iter().map(|m| m.rank).collect();
            let mut parts = Vec::with_capacity(group.len());
            for module in group {
                let b =
                    piece()?.f_view([module.outputs, module.rank])?.f_mul_scalar(module.scale * weight)?;
                parts.push((module.target.place().1, b));
            }
            let (kind_of_group, _) = group[0].target.place();
            self.layers[group[0].layer as usize][kind_of_group as usize].push(Delta { a, ranks, parts });
        }
        Ok(())
    }

    /// Layers up to the last one that anything is added to.
    pub(crate) fn layers(&self) -> usize {
        self.layers.len()
    }

    /// The first layer that anything is added to.
    pub(crate) fn lowest_layer(&self) -> usize {
        self.layers.iter().position(|groups| groups.iter().any(|deltas| !deltas.is_empty())).unwrap_or(0)
    }

    /// What is added to the product of `group` in `layer`.
    pub(crate) fn deltas(&self, layer: usize, group: Group) -> &[Delta] {
        self.layers.get(layer).map_or(&[], |groups| &groups[group as usize])
    }
}
