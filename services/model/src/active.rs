//! Adapters made ready for forward passes.

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

use crate::lora::{Adapter, Group, Module};
use crate::weights;

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

/// What sets of adapters add to one merged matrix, in two products whatever their number: those of a GPU cost more to order
/// than to do.
#[derive(Debug)]
pub(crate) struct Joined {
    /// A of all sets, [sum of ranks, inputs].
    a: Tensor,
    /// Each B of them in the columns of its slice, [sum of ranks, outputs].
    b: Tensor,
    /// Where a row does not have the set of that rank, bool [rows, sum of ranks]; none where all rows have all of them.
    foreign: Option<Tensor>,
}

impl Joined {
    /// Adds to `product` [rows, outputs], in place, what belongs to `x` [rows, inputs].
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn add_to(&self, product: &mut Tensor, x: &Tensor) -> Result<()> {
        let mut low = x.f_linear(&self.a, None::<&Tensor>)?;
        if let Some(foreign) = &self.foreign {
            // Not by a product with zero: what overflows by another's adapter would be no number. All B are finite.
            low = low.f_masked_fill_(foreign, 0.0)?;
        }
        let _ = product.f_addmm_(&low, &self.b)?;
        Ok(())
    }
}

/// Adapters that are cast, scaled and cut once.
///
/// Gradients flow through it to the flat vector of each adapter that requires them; such an instance serves
/// one backward pass. Without gradients it can be kept for as long as the weights do not change.
#[derive(Debug, Default)]
pub struct ActiveAdapters {
    /// By layer, then by group.
    layers: Vec<[Vec<Delta>; 4]>,
    /// The same for sets of them, each for rows of its own.
    joined: Vec<[Option<Joined>; 4]>,
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
        let mut active =
            Self { layers: (0..layers).map(|_| Default::default()).collect(), ..Self::default() };
        for (adapter, weight) in adapters {
            ensure!(weight.is_finite(), "an adapter's weight has to be a finite number, not {weight}");
            active.add(&adapter.modules, adapter.flat(), *weight, kind, device)?;
        }
        Ok(active)
    }

    /// One layer of `adapter` alone, with `flat` as its weights, for a base in `kind`.
    pub(crate) fn of_layer(adapter: &Adapter, layer: i64, flat: &Tensor, kind: Kind) -> Result<Self> {
        let mut active =
            Self { layers: (0..=layer).map(|_| Default::default()).collect(), ..Self::default() };
        let modules: Vec<Module> = adapter.modules.iter().filter(|m| m.layer == layer).cloned().collect();
        active.add(&modules, flat, 1.0, kind, flat.device())?;
        Ok(active)
    }

    /// Sets of adapters for the rows of one pass: row i has set `owners[i]`, or none. `widths` are those of the slices of
    /// each group's merged product. For passes without gradients.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub(crate) fn joined(sets: &[&Self], owners: &[Option<usize>], widths: [&[i64]; 4]) -> Result<Self> {
        let layers = sets.iter().map(|set| set.layers.len()).max().unwrap_or(0);
        let of_layer = |layer: usize| -> Result<[Option<Joined>; 4]> {
            let mut groups = [const { None }; 4];
            for (group, (joined, widths)) in groups.iter_mut().zip(widths).enumerate() {
                let mut all = Vec::new();
                for (i, set) in sets.iter().enumerate() {
                    let deltas = set.layers.get(layer).map_or(&[][..], |groups| &groups[group][..]);
                    all.extend(deltas.iter().map(|delta| (i, delta)));
                }
                *joined = join(&all, owners, widths)?;
            }
            Ok(groups)
        };
        Ok(Self { layers: Vec::new(), joined: (0..layers).map(of_layer).collect::<Result<_>>()? })
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

    /// Refuses what became infinite when it was scaled and cast.
    ///
    /// # Errors
    /// Says so.
    pub(crate) fn check_finite(&self) -> Result<()> {
        for delta in self.layers.iter().flatten().flatten() {
            for tensor in delta.parts.iter().map(|(_, b)| b).chain([&delta.a]) {
                let finite = weights::is_finite(tensor)?;
                ensure!(
                    finite,
                    "an adapter's numbers, times its alpha and weight, are beyond the base's precision"
                );
            }
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

    /// What is added to the product of `group` in `layer` by rows' own sets.
    pub(crate) fn of_rows(&self, layer: usize, group: Group) -> Option<&Joined> {
        self.joined.get(layer)?[group as usize].as_ref()
    }

    /// What is added to the product of `group` in `layer`.
    pub(crate) fn deltas(&self, layer: usize, group: Group) -> &[Delta] {
        self.layers.get(layer).map_or(&[], |groups| &groups[group as usize])
    }
}

/// The changes of one merged matrix, each with the number of its set.
fn join(all: &[(usize, &Delta)], owners: &[Option<usize>], widths: &[i64]) -> Result<Option<Joined>> {
    let Some((_, first)) = all.first() else { return Ok(None) };
    let (kind, device) = (first.a.f_kind()?, first.a.device());
    let a = Tensor::f_cat(&all.iter().map(|(_, delta)| &delta.a).collect::<Vec<_>>(), 0)?;
    let b = Tensor::f_zeros([a.size()[0], widths.iter().sum()], (kind, device))?;
    let (mut rank, mut sets) = (0, Vec::new());
    for (set, delta) in all {
        for (ranks, (slice, of_slice)) in delta.ranks.iter().zip(&delta.parts) {
            let column = widths[..*slice].iter().sum();
            b.f_narrow(0, rank, *ranks)?.f_narrow(1, column, widths[*slice])?.f_copy_(&of_slice.f_tr()?)?;
            rank += ranks;
            sets.extend(std::iter::repeat_n(*set as i64, *ranks as usize));
        }
    }
    let everybodys =
        owners.iter().all(|owner| owner.is_some_and(|own| sets.iter().all(|&set| set == own as i64)));
    let foreign = if everybodys {
        None
    } else {
        let owners: Vec<i64> = owners.iter().map(|owner| owner.map_or(-1, |own| own as i64)).collect();
        let owners = Tensor::from_slice(&owners).f_unsqueeze(1)?;
        Some(owners.f_ne_tensor(&Tensor::from_slice(&sets))?.f_to_device(device)?)
    };
    Ok(Some(Joined { a, b, foreign }))
}
