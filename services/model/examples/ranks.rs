//! Does it pay to give each projection its own rank, by importance, as AdaLoRA does (arXiv 2303.10512)?
//!
//!     cargo run --release -p model --example ranks -- BASE_FOLDER TEXT VALIDATION_TEXT [seeds] [rank]
//!
//! Trains adapters of equal size on the head of TEXT: uniform ranks, and ranks that were cut to size by importance
//! after a third of the steps. Prints the loss on VALIDATION_TEXT, in nats a token.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context, Result};
use model::device::{DeviceChoice, Placement, PrecisionChoice};
use model::learner::{Learner, LearnerConfig};
use model::llama::Base;
use model::lora::{Adapter, LoraConfig};
use model::loss;
use model::pack::{Sequence, pack};
use model::quant::Quantisation;
use model::tokenizer::Tokenizer;
use model::weights;
use tch::Tensor;

const WINDOW: usize = 128;
const TRAIN_WINDOWS: usize = 256;
const VALIDATION_WINDOWS: usize = 128;
const STEP_WINDOWS: usize = 8;
const PASSES: usize = 2;
const RATE: f64 = 0.0025;
/// Gradients that importance is averaged over.
const SAMPLES: usize = 12;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [base, text, validation] =
        arguments.first_chunk::<3>().context("BASE TEXT VALIDATION [seeds] [rank]")?;
    let number = |n: usize, or: u64| arguments.get(n).and_then(|text| text.parse().ok()).unwrap_or(or);
    let (seeds, rank) = (number(3, 3), number(4, 16) as i64);
    tch::set_num_threads(1);
    let placement = Placement::resolve(DeviceChoice::Cpu, PrecisionChoice::F32, Quantisation::None)?;
    let (base, tokenizer) = (Base::load(Path::new(base), &placement)?, Tokenizer::load(Path::new(base))?);
    let train = windows(&tokenizer, text, TRAIN_WINDOWS)?;
    let held = windows(&tokenizer, validation, VALIDATION_WINDOWS)?;
    println!("base alone: {:.4}", mean(&base, None, &held)?);
    for seed in 0..seeds {
        let uniform = config(rank);
        let size = Adapter::new(uniform.clone(), base.config(), seed)?.parameter_count();
        let plain = run(&base, Adapter::new(uniform, base.config(), seed)?, &train, seed, None)?;
        let small = run(&base, Adapter::new(config(rank / 2), base.config(), seed)?, &train, seed, None)?;
        let wide = Adapter::new(config(rank * 3 / 2), base.config(), seed)?;
        let cut = run(&base, wide, &train, seed, Some(size))?;
        println!(
            "seed {seed}: uniform {rank} {:.4} ({size} weights), by importance {:.4} ({} weights, ranks {}), uniform {} {:.4}",
            mean(&base, Some(&plain), &held)?,
            mean(&base, Some(&cut), &held)?,
            cut.parameter_count(),
            spread(&cut),
            rank / 2,
            mean(&base, Some(&small), &held)?,
        );
    }
    Ok(())
}

/// Every scale is 2, whatever the rank.
fn config(rank: i64) -> LoraConfig {
    LoraConfig { rank, alpha: 2.0 * rank as f64, ..LoraConfig::default() }
}

fn windows(tokenizer: &Tokenizer, path: &str, count: usize) -> Result<Vec<Sequence>> {
    let text = std::fs::read_to_string(path).with_context(|| path.to_owned())?;
    let head: String = text.chars().take(count * WINDOW * 6).collect();
    let ids = tokenizer.encode(&head)?;
    Ok(ids.chunks(WINDOW).take(count).map(|ids| Sequence::whole(ids.to_vec())).collect())
}

fn mean(base: &Base, adapter: Option<&Adapter>, held: &[Sequence]) -> Result<f64> {
    let active: Vec<(&Adapter, f64)> = adapter.into_iter().map(|adapter| (adapter, 1.0)).collect();
    let scores = loss::score(base, &active, held, WINDOW)?;
    let (nll, tokens) = scores.iter().fold((0.0, 0), |(n, t), s| (n + s.nll_sum, t + s.tokens));
    Ok(nll / tokens as f64)
}

/// Trains over all windows; with `cut`, to so many weights by importance after a third of the steps.
fn run(base: &Base, adapter: Adapter, train: &[Sequence], seed: u64, cut: Option<i64>) -> Result<Adapter> {
    let steps: Vec<&[Sequence]> = (0..PASSES).flat_map(|_| train.chunks(STEP_WINDOWS)).collect();
    let mut learner = Learner::new(base.share(), &adapter, None, LearnerConfig::default())?;
    for (n, step) in steps.iter().enumerate() {
        if let Some(size) = cut.filter(|_| n == steps.len() / 3) {
            let smaller = by_importance(base, learner.adapter(), &train[seed as usize..], size)?;
            learner = Learner::new(base.share(), &smaller, None, LearnerConfig::default())?;
        }
        let rate = RATE * (1.0 - n as f64 / steps.len() as f64).max(0.02);
        learner.step(&[step.to_vec()], rate, &mut || ControlFlow::Continue(()))?;
    }
    Ok(learner.adapter().deep_copy())
}

/// Keeps the components with the most importance a weight, at least one a module. A component's importance is
/// the mean over its row of A and column of B of |weight x gradient|, the loss it would cost to lose it.
fn by_importance(base: &Base, adapter: &Adapter, sample: &[Sequence], size: i64) -> Result<Adapter> {
    let mut scores: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for part in sample.chunks(STEP_WINDOWS).take(SAMPLES) {
        let packed = pack(base, part, WINDOW)?;
        let (_, gradient) =
            loss::adapter_gradient(base, adapter, &packed, 1.0 / packed.learned_tokens() as f64, None)?;
        let gradient = adapter.with_flat(gradient)?;
        for ((name, weight), (_, gradient)) in adapter.tensors().iter().zip(gradient.tensors()) {
            let along = if name.contains("lora_A") { 1i64 } else { 0 };
            let product = (weight * gradient).abs().mean_dim(&[along][..], false, tch::Kind::Float);
            let values: Vec<f32> = (&product).try_into()?;
            let module = name.split(".lora_").next().unwrap_or_default().to_owned();
            let sums = scores.entry(module).or_insert_with(|| vec![0.0; values.len()]);
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += f64::from(value));
        }
    }
    let tensors: BTreeMap<String, Tensor> = adapter.tensors().into_iter().collect();
    let cost = |module: &str| {
        let width = |part: &str, n: usize| tensors[&format!("{module}.{part}.weight")].size()[n];
        width("lora_A", 1) + width("lora_B", 0)
    };
    let mut all: Vec<(f64, &String, usize)> = Vec::new();
    for (module, values) in &scores {
        all.extend(values.iter().enumerate().map(|(i, score)| (score / cost(module) as f64, module, i)));
    }
    all.sort_by(|x, y| y.0.total_cmp(&x.0));
    let mut kept: BTreeMap<&String, Vec<i64>> = BTreeMap::new();
    let mut left = size;
    for first in [true, false] {
        for &(_, module, i) in &all {
            let of_module = kept.entry(module).or_default();
            let wanted = if first { of_module.is_empty() } else { !of_module.contains(&(i as i64)) };
            if wanted && left >= cost(module) {
                of_module.push(i as i64);
                left -= cost(module);
            }
        }
    }
    rebuild(base, &tensors, kept)
}

fn rebuild(
    base: &Base,
    tensors: &BTreeMap<String, Tensor>,
    kept: BTreeMap<&String, Vec<i64>>,
) -> Result<Adapter> {
    let mut config = config(1);
    let mut parts = Vec::new();
    for (module, mut components) in kept {
        components.sort_unstable();
        let name = module.trim_start_matches("base_model.model.").to_owned();
        config.rank_pattern.insert(name.clone(), components.len() as i64);
        config.alpha_pattern.insert(name, 2.0 * components.len() as f64);
        let index = Tensor::from_slice(&components);
        for (part, along) in [("lora_A", 0), ("lora_B", 1)] {
            let name = format!("{module}.{part}.weight");
            parts.push((name.clone(), tensors[&name].index_select(along, &index)));
        }
    }
    let config = serde_json::to_string(&config)?;
    Adapter::from_bytes(&weights::to_bytes(&parts, "lora_config", &config)?, base.config())
}

/// The least, middle and largest rank.
fn spread(adapter: &Adapter) -> String {
    let mut ranks: Vec<i64> = adapter.config().rank_pattern.values().copied().collect();
    ranks.sort_unstable();
    format!("{}..{}..{}", ranks[0], ranks[ranks.len() / 2], ranks[ranks.len() - 1])
}
