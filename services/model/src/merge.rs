//! Several adapters made into one.
//!
//! Everything happens on the deltas `scale * B A`. Adding up the A and the B of two adapters by themselves is
//! another thing: their products cross.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use anyhow::{Context, Result, ensure};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use crate::hf::ModelConfig;
use crate::lora::{Adapter, LoraConfig, Module, RANK_MAX, Target};

/// How deltas become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// Their weighted sum, exactly: A and B are laid side by side, so that ranks add up. PEFT's `cat`.
    #[default]
    Linear,
    /// Their weighted sum, at a lower rank: the nearest matrix of that rank. PEFT's `svd`.
    Svd,
    /// TIES (arXiv 2306.01708): each delta keeps its largest entries; where signs differ the heavier side wins;
    /// what agrees is averaged. PEFT's `ties_svd`.
    Ties,
    /// DARE (arXiv 2311.03099): each delta loses entries at random, and the rest is scaled up so that the
    /// expectation stays; then their weighted sum.
    Dare,
}

/// A merge with its parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Merge {
    /// How.
    pub method: Method,
    /// Rank of the result; none is the largest of the parts. `Linear` has the sum of their ranks and takes none.
    pub rank: Option<i64>,
    /// Share of a delta's entries that `Ties` and `Dare` keep, above 0 to 1. The others take none.
    pub density: Option<f64>,
    /// Of what `Dare` drops.
    pub seed: u64,
}

/// The share that `Ties` and `Dare` keep when none is given.
const DENSITY: f64 = 0.5;

impl Merge {
    /// Refuses parameters without an effect, and impossible ones.
    ///
    /// # Errors
    /// The message begins with the parameter.
    pub fn check(&self) -> Result<()> {
        let exact = self.method == Method::Linear;
        ensure!(!exact || self.rank.is_none(), "rank: linear keeps all ranks; use svd for a lower one");
        if let Some(rank) = self.rank {
            ensure!((1..=RANK_MAX).contains(&rank), "rank: it has to be from 1 to {RANK_MAX}");
        }
        if let Some(density) = self.density {
            let sparse = matches!(self.method, Method::Ties | Method::Dare);
            ensure!(sparse, "density: only ties and dare drop entries");
            ensure!(density > 0.0 && density <= 1.0, "density: it has to be above 0 and at most 1");
        }
        Ok(())
    }
}

/// Merges `parts`, each with its weight, for a model of shape `model`.
///
/// # Errors
/// When there is no part, one does not fit the model, or a parameter makes no sense.
pub fn merge(parts: &[(&Adapter, f64)], how: &Merge, model: &ModelConfig) -> Result<Adapter> {
    let _guard = tch::no_grad_guard();
    how.check()?;
    ensure!(!parts.is_empty(), "a merge needs at least one adapter");
    for (adapter, weight) in parts {
        adapter.check_model(model)?;
        ensure!(weight.is_finite(), "an adapter's weight has to be a finite number, not {weight}");
    }
    let mut merged: BTreeMap<(i64, Target), (Tensor, Tensor)> = BTreeMap::new();
    let mut random = ChaCha8Rng::seed_from_u64(how.seed);
    for layer in 0..model.layers {
        for target in Target::ALL {
            let factors = factors(parts, layer, target)?;
            if !factors.is_empty() {
                merged.insert((layer, target), module(&factors, how, &mut random)?);
            }
        }
    }
    assemble(merged, model)
}

/// One module's part of one adapter.
struct Factor {
    /// [rank, inputs].
    a: Tensor,
    /// [outputs, rank], the adapter's own scale included.
    b: Tensor,
    weight: f64,
}

impl Factor {
    fn delta(&self) -> Result<Tensor> {
        Ok(self.b.f_matmul(&self.a)?)
    }
}

fn factors(parts: &[(&Adapter, f64)], layer: i64, target: Target) -> Result<Vec<Factor>> {
    let is_it = |module: &&Module| module.layer == layer && module.target == target;
    let mut factors = Vec::new();
    for (adapter, weight) in parts {
        if let Some(module) = adapter.modules.iter().find(is_it) {
            let (a, b) = adapter.factors(module);
            let b = b.f_mul_scalar(module.scale)?.f_to_device(Device::Cpu)?;
            factors.push(Factor { a: a.f_to_device(Device::Cpu)?, b, weight: *weight });
        }
    }
    Ok(factors)
}

/// A and B of the merged module, at scale 1.
fn module(factors: &[Factor], how: &Merge, random: &mut ChaCha8Rng) -> Result<(Tensor, Tensor)> {
    let density = how.density.unwrap_or(DENSITY);
    let delta = match how.method {
        Method::Linear => return side_by_side(factors),
        Method::Svd => {
            let (a, b) = side_by_side(factors)?;
            b.f_matmul(&a)?
        }
        Method::Ties => ties(factors, density)?,
        Method::Dare => dare(factors, density, random)?,
    };
    let widest = factors.iter().map(|factor| factor.a.size()[0]).max().context("no factor")?;
    nearest(&delta, how.rank.unwrap_or(widest))
}

fn side_by_side(factors: &[Factor]) -> Result<(Tensor, Tensor)> {
    let a: Vec<&Tensor> = factors.iter().map(|factor| &factor.a).collect();
    let b: Vec<Tensor> =
        factors.iter().map(|factor| factor.b.f_mul_scalar(factor.weight)).collect::<Result<_, _>>()?;
    Ok((Tensor::f_cat(&a, 0)?, Tensor::f_cat(&b, 1)?))
}

fn ties(factors: &[Factor], density: f64) -> Result<Tensor> {
    let kept: Vec<Tensor> =
        factors.iter().map(|factor| largest(&factor.delta()?, density)).collect::<Result<_>>()?;
    let stacked = Tensor::f_stack(&kept, 0)?;
    let ones = Tensor::f_ones([1], (Kind::Float, Device::Cpu))?;
    let elected = stacked.f_sum_dim_intlist(&[0i64][..], false, Kind::Float)?.f_ge(0.0)?;
    let elected = ones.f_where_self(&elected, &ones.f_neg()?)?;
    let agrees = stacked.f_sign()?.f_eq_tensor(&elected)?.f_to_kind(Kind::Float)?;
    let weights: Vec<f32> = factors.iter().map(|factor| factor.weight as f32).collect();
    let weights = Tensor::from_slice(&weights).f_view([-1, 1, 1])?;
    let sum = stacked.f_mul(&weights)?.f_mul(&agrees)?.f_sum_dim_intlist(&[0i64][..], false, Kind::Float)?;
    let count = agrees.f_sum_dim_intlist(&[0i64][..], false, Kind::Float)?.f_clamp_min(1.0)?;
    Ok(sum.f_div(&count)?)
}

/// The share `density` of entries with the largest magnitudes; zero elsewhere.
fn largest(delta: &Tensor, density: f64) -> Result<Tensor> {
    let flat = delta.f_flatten(0, -1)?;
    let count = ((density * flat.numel() as f64) as i64).max(1);
    let (_, indices) = flat.f_abs()?.f_topk(count, 0, true, false)?;
    let mask = flat.f_zeros_like()?.f_index_fill(0, &indices, 1.0)?;
    Ok(flat.f_mul(&mask)?.f_view_as(delta)?)
}

fn dare(factors: &[Factor], density: f64, random: &mut ChaCha8Rng) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for factor in factors {
        let delta = factor.delta()?;
        let keep = |_| if random.random::<f64>() < density { 1.0 / density as f32 } else { 0.0 };
        let mask: Vec<f32> = (0..delta.numel()).map(keep).collect();
        let part = delta.f_mul(&Tensor::from_slice(&mask).f_view_as(&delta)?)?.f_mul_scalar(factor.weight)?;
        sum = Some(match sum {
            Some(sum) => sum.f_add(&part)?,
            None => part,
        });
    }
    sum.context("no factor")
}

/// The nearest matrix of rank `rank` (Eckart and Young), its singular values shared evenly between A and B.
fn nearest(delta: &Tensor, rank: i64) -> Result<(Tensor, Tensor)> {
    let (u, s, v) = delta.f_svd(true, true)?;
    let rank = rank.min(s.size()[0]);
    let root = s.f_narrow(0, 0, rank)?.f_sqrt()?;
    let a = v.f_tr()?.f_narrow(0, 0, rank)?.f_mul(&root.f_unsqueeze(1)?)?;
    Ok((a, u.f_narrow(1, 0, rank)?.f_mul(&root)?))
}

/// An adapter of these A and B, whose ranks may differ between modules.
fn assemble(mut merged: BTreeMap<(i64, Target), (Tensor, Tensor)>, model: &ModelConfig) -> Result<Adapter> {
    let ranks = || merged.values().map(|(a, _)| a.size()[0]);
    let rank = ranks().max().context("the adapters change nothing")?;
    ensure!(rank <= RANK_MAX, "rank: the ranks add up to {rank}, over {RANK_MAX}; merge with svd");
    let mut targets: Vec<Target> = merged.keys().map(|(_, target)| *target).collect();
    targets.sort();
    targets.dedup();
    let mut layers: Vec<i64> = merged.keys().map(|(layer, _)| *layer).collect();
    layers.dedup();
    let mut config = LoraConfig { rank, alpha: rank as f64, targets, layers, ..LoraConfig::default() };
    if config.layers.len() as i64 == model.layers {
        config.layers.clear();
    }
    // Where one adapter changes a projection in fewer layers than another, the rest of them are left as they are.
    for (layer, target) in config.places(model) {
        if let Entry::Vacant(nothing) = merged.entry((layer, target)) {
            let (inputs, outputs) = target.shape(model);
            let zeros = |rows, columns| Tensor::f_zeros([rows, columns], (Kind::Float, Device::Cpu));
            nothing.insert((zeros(1, inputs)?, zeros(outputs, 1)?));
        }
    }
    for ((layer, target), (a, _)) in merged.iter().filter(|(_, (a, _))| a.size()[0] != rank) {
        config.rank_pattern.insert(target.module(*layer), a.size()[0]);
        config.alpha_pattern.insert(target.module(*layer), a.size()[0] as f64);
    }
    let mut by_name = BTreeMap::new();
    while let Some(((layer, target), (a, b))) = merged.pop_first() {
        let name = format!("base_model.model.{}", target.module(layer));
        by_name.insert(format!("{name}.lora_A.weight"), a);
        by_name.insert(format!("{name}.lora_B.weight"), b);
    }
    let adapter = Adapter::from_parts(config, model, |name, shape| {
        let tensor = by_name.remove(name).with_context(|| format!("{name} is missing"))?;
        ensure!(tensor.size() == shape, "{name} has shape {:?}, expected {shape:?}", tensor.size());
        Ok(tensor)
    })?;
    adapter.check_finite()?;
    Ok(adapter)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    const PLAIN: Merge = Merge { method: Method::Linear, rank: None, density: None, seed: 0 };

    fn two() -> (Adapter, Adapter) {
        (golden::adapter("peft-r8"), golden::adapter("merge-second"))
    }

    fn merged(weights: [f64; 2], how: Merge) -> Adapter {
        let (one, two) = two();
        merge(&[(&one, weights[0]), (&two, weights[1])], &how, &golden::config("llama")).unwrap()
    }

    fn delta(adapter: &Adapter, n: usize) -> Tensor {
        let (a, b) = adapter.factors(&adapter.modules[n]);
        b.matmul(&a) * adapter.modules[n].scale
    }

    fn assert_golden(adapter: &Adapter, file: &str) {
        let (base, golden) = (golden::base("llama"), golden::tensors(file));
        let active = base.activate(&[(adapter, 1.0)]).unwrap();
        let distance =
            golden::distance(&golden::logits(&base, &active, &golden["input_ids"]), &golden["logits"]);
        assert!(distance < 1e-4, "{file}: {distance}");
    }

    #[test]
    fn merges_equal_pefts() {
        assert_golden(&merged([0.7, 0.3], PLAIN), "merge-cat.safetensors");
        let rank = Some(8);
        assert_golden(
            &merged([0.7, 0.3], Merge { method: Method::Svd, rank, ..PLAIN }),
            "merge-svd.safetensors",
        );
        let ties = Merge { method: Method::Ties, rank, density: Some(0.5), ..PLAIN };
        assert_golden(&merged([0.7, 0.3], ties), "merge-ties-svd.safetensors");
    }

    #[test]
    fn one_adapter_at_weight_one_is_the_identity() {
        for name in ["peft-r8", "peft-qv", "peft-rslora", "peft-rank-pattern"] {
            let adapter = golden::adapter(name);
            for method in [Method::Linear, Method::Svd, Method::Ties, Method::Dare] {
                let density = matches!(method, Method::Ties | Method::Dare).then_some(1.0);
                let how = Merge { method, density, ..PLAIN };
                let same = merge(&[(&adapter, 1.0)], &how, &golden::config("llama")).unwrap();
                for n in 0..adapter.modules.len() {
                    assert_eq!(same.modules[n].rank, adapter.modules[n].rank, "{name} {method:?}");
                    assert!(
                        golden::distance(&delta(&same, n), &delta(&adapter, n)) < 1e-5,
                        "{name} {method:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn adapters_of_other_layers_and_projections_merge_to_their_sum() {
        let (base, model) = (golden::base("llama"), golden::config("llama"));
        let ids = &golden::tensors("peft-r8/golden.safetensors")["input_ids"];
        let some = |targets: Vec<Target>, layers: Vec<i64>| {
            let adapter =
                Adapter::new(LoraConfig { rank: 4, targets, layers, ..LoraConfig::default() }, &model, 1);
            let adapter = adapter.unwrap();
            adapter.with_flat(adapter.flat() + 0.01).unwrap()
        };
        let last = model.layers - 1;
        let (all, upper) = (some(vec![Target::V], vec![]), some(vec![Target::Q, Target::Up], vec![last]));
        let (lower, again) = (some(vec![Target::O], vec![0]), some(vec![Target::Q], vec![last]));
        for (one, two, layers) in
            [(&all, &upper, vec![]), (&lower, &upper, vec![]), (&upper, &again, vec![last])]
        {
            let merged = merge(&[(one, 0.7), (two, 0.3)], &PLAIN, &model).unwrap();
            let logits =
                |adapters: &[(&Adapter, f64)]| golden::logits(&base, &base.activate(adapters).unwrap(), ids);
            let distance = golden::distance(&logits(&[(&merged, 1.0)]), &logits(&[(one, 0.7), (two, 0.3)]));
            assert!(distance < 1e-4 && merged.config().layers == layers, "{distance} {:?}", merged.config());
        }
    }

    #[test]
    fn dare_is_the_weighted_sum_in_expectation_and_follows_its_seed() {
        let exact = delta(&merged([0.7, 0.3], PLAIN), 0);
        let width = exact.size()[0].min(exact.size()[1]);
        let at = |seed| {
            let dare = Merge { method: Method::Dare, rank: Some(width), density: Some(0.25), seed };
            delta(&merged([0.7, 0.3], dare), 0)
        };
        assert!(at(1).equal(&at(1)) && !at(1).equal(&at(2)));
        let off = |runs: u64| {
            let sum = (0..runs).map(at).reduce(|sum, one| sum + one).unwrap();
            (sum / runs as f64 - &exact).square().mean(Kind::Float).double_value(&[]).sqrt()
        };
        // The error of a mean falls with the root of how many there are.
        let (few, many) = (off(4), off(64));
        assert!(many < few / 3.0, "{few} {many}");
    }

    #[test]
    fn adapters_of_other_targets_and_ranks_are_merged() {
        let (one, two) = (golden::adapter("peft-qv"), golden::adapter("peft-rslora"));
        let base = golden::base("llama");
        let both = merge(&[(&one, 0.5), (&two, 2.0)], &PLAIN, base.config()).unwrap();
        let ids = &golden::tensors("peft-qv/golden.safetensors")["input_ids"];
        let sum = base.activate(&[(&one, 0.5), (&two, 2.0)]).unwrap();
        let merged = base.activate(&[(&both, 1.0)]).unwrap();
        let distance =
            golden::distance(&golden::logits(&base, &sum, ids), &golden::logits(&base, &merged, ids));
        assert!(distance < 1e-4, "{distance}");
        let read = Adapter::from_bytes(&both.to_bytes().unwrap(), base.config()).unwrap();
        assert!(read.flat().equal(both.flat()));
    }

    #[test]
    fn parameters_without_an_effect_are_refused() {
        let (one, _) = two();
        for (how, name) in [
            (Merge { rank: Some(4), ..PLAIN }, "rank"),
            (Merge { method: Method::Svd, rank: Some(0), ..PLAIN }, "rank"),
            (Merge { method: Method::Svd, density: Some(0.5), ..PLAIN }, "density"),
            (Merge { method: Method::Ties, density: Some(0.0), ..PLAIN }, "density"),
            (Merge { method: Method::Dare, density: Some(f64::NAN), ..PLAIN }, "density"),
        ] {
            let error = merge(&[(&one, 1.0)], &how, &golden::config("llama")).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
        assert!(merge(&[], &PLAIN, &golden::config("llama")).is_err());
    }
}
