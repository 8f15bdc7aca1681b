//! Does a device compute what it should, and how fast? What `engram doctor --full` reports, and the check that
//! a 16-bit format has to pass before a base runs in it.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use tch::{Device, Kind, Tensor};

use crate::active::ActiveAdapters;
use crate::batch;
use crate::device::{Placement, Precision};
use crate::hf::ModelConfig;
use crate::learner::{Learner, LearnerConfig, Outcome};
use crate::llama::{Base, Input, KvCache};
use crate::lora::{Adapter, LoraConfig};
use crate::pack::Sequence;
use crate::quant::Quantisation;

/// A small Llama with random weights, and what transformers and PEFT made of it in f32.
const CONFIG: &str = include_str!("../../../tests/golden/llama/config.json");
const WEIGHTS: &[u8] = include_bytes!("../../../tests/golden/llama/model.safetensors");
const LOGITS: &[u8] = include_bytes!("../../../tests/golden/llama/golden.safetensors");
const RUN: &[u8] = include_bytes!("../../../tests/golden/train.safetensors");
const INITIAL: &[u8] = include_bytes!("../../../tests/golden/train-initial/adapter_model.safetensors");
/// The learning rate of the golden run, and the shape of its adapter.
const RUN_RATE: f64 = 1e-2;
const RUN_RANK: (i64, f64) = (8, 16.0);

/// The shape that speed is measured on: large enough that products take most of the time.
const SPEED_SHAPE: &str = r#"{"model_type": "llama", "hidden_size": 256, "intermediate_size": 768,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096,
    "max_position_embeddings": 1024, "tie_word_embeddings": true}"#;
const STEP_SEQUENCES: u32 = 16;
const STEP_SEQUENCE_TOKENS: u32 = 64;
const PREFILL_TOKENS: i64 = 512;
/// Decoded from a prompt, before the cache is made anew.
const DECODE_TOKENS: i64 = 64;

/// The largest relative error that a format's sums may have, against f32 on the CPU: some tens of its rounding
/// steps (2^-8 and 2^-11), which a kernel that sums in the format itself, or drops terms, passes at once.
const fn tolerance(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 1e-4,
        Precision::Bf16 => 0.05,
        Precision::F16 => 0.01,
    }
}

/// Checks that `device` computes in `precision`: products, a softmax, a norm, and attention forward and
/// backward against f32 on the CPU. Takes some milliseconds, once for each pair in a process.
///
/// # Errors
/// When the device cannot do one of them, or its values are off or not finite; the message names it.
pub fn check(device: Device, precision: Precision) -> Result<()> {
    static KNOWN: Mutex<Vec<(Device, Precision, Option<String>)>> = Mutex::new(Vec::new());
    let mut known = KNOWN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let found =
        known.iter().find(|(d, p, _)| (*d, *p) == (device, precision)).map(|(_, _, found)| found.clone());
    let found = found.unwrap_or_else(|| {
        let found = compare(device, precision.kind(), tolerance(precision)).err().map(|e| format!("{e:#}"));
        known.push((device, precision, found.clone()));
        found
    });
    match found {
        None => Ok(()),
        Some(reason) => Err(anyhow::anyhow!(reason)),
    }
}

fn compare(device: Device, kind: Kind, tolerance: f64) -> Result<()> {
    let got = operations(device, kind)?;
    let expected = operations(Device::Cpu, Kind::Float)?;
    for ((name, got), (_, expected)) in got.iter().zip(&expected) {
        let error = relative(got, expected)?;
        // A comparison that NaN fails.
        ensure!(
            error <= tolerance,
            "{name} is off by {error:.1e} of its size; at most {tolerance:.0e} is rounding"
        );
    }
    Ok(())
}

/// Waves that repeat in no row, so that no error cancels, and the same on every machine.
fn wave(shape: &[i64], pitch: f64, device: Device, kind: Kind) -> Result<Tensor> {
    let count = shape.iter().product::<i64>();
    let wave = (Tensor::f_arange(count, (Kind::Float, Device::Cpu))? * pitch).f_sin()?;
    // Both sides start from the same rounded numbers; only their sums are compared.
    Ok(wave.f_view(shape)?.f_to_kind(Kind::BFloat16)?.f_to_kind(kind)?.f_to_device(device)?)
}

fn operations(device: Device, kind: Kind) -> Result<Vec<(&'static str, Tensor)>> {
    let make = |shape: &[i64], pitch| wave(shape, pitch, device, kind);
    let (x, w) = (make(&[48, 128], 0.731)?, make(&[64, 128], 1.173)?);
    let product = x.f_matmul(&w.f_tr()?)?;
    let single = x.f_narrow(0, 0, 1)?.f_matmul(&w.f_tr()?)?;
    let softmax = x.f_softmax(-1, Kind::Float)?;
    let squares = x.f_to_kind(Kind::Float)?.f_square()?.f_mean_dim(-1, true, Kind::Float)?;
    let norm = x.f_mul(&squares.f_add_scalar(1e-6)?.f_rsqrt()?.f_to_kind(kind)?)?;
    let heads = |pitch| -> Result<Tensor> { Ok(make(&[1, 2, 24, 32], pitch)?.f_set_requires_grad(true)?) };
    let (q, k, v) = (heads(0.377)?, heads(0.911)?, heads(1.531)?);
    let attention =
        Tensor::f_scaled_dot_product_attention(&q, &k, &v, None::<Tensor>, 0.0, true, None, false)?;
    let loss = attention.f_mul(&make(&[1, 2, 24, 32], 0.613)?)?.f_sum(Kind::Float)?;
    let gradients = Tensor::f_run_backward(&[loss], &[&q, &k, &v], false, false)?;
    let mut all = vec![
        ("a product", product),
        ("a product with one row", single),
        ("a softmax", softmax),
        ("a norm", norm),
        ("attention", attention.f_detach()?),
    ];
    all.extend(gradients.into_iter().map(|gradient| ("the gradient of attention", gradient)));
    Ok(all)
}

/// The largest difference over the largest value; NaN where `got` has any.
fn relative(got: &Tensor, expected: &Tensor) -> Result<f64> {
    let plain = |t: &Tensor| -> Result<Tensor> { Ok(t.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?) };
    let (got, expected) = (plain(got)?, plain(expected)?);
    let most = |t: Tensor| -> Result<f64> { Ok(t.f_abs()?.f_max()?.f_double_value(&[])?) };
    Ok(most(got.f_sub(&expected)?)? / most(expected)?)
}

/// A figure beside its limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// What was found.
    pub value: f64,
    /// What it may be at most.
    pub limit: f64,
}

impl Measured {
    /// Whether it keeps the limit; NaN does not.
    pub fn is_ok(&self) -> bool {
        self.value <= self.limit
    }
}

fn tensors(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>> {
    let mut out = BTreeMap::new();
    for (name, view) in SafeTensors::deserialize(bytes)?.iter() {
        let kind = if view.dtype() == Dtype::I64 { Kind::Int64 } else { Kind::Float };
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        out.insert(name.to_owned(), Tensor::f_from_data_size(view.data(), &shape, kind)?);
    }
    Ok(out)
}

fn take(tensors: &mut BTreeMap<String, Tensor>, name: &str) -> Result<Tensor> {
    tensors.remove(name).with_context(|| format!("the built-in {name} is missing"))
}

fn golden_base(placement: &Placement) -> Result<Base> {
    let mut weights = tensors(WEIGHTS)?;
    Base::build(ModelConfig::from_json(CONFIG)?, placement, |name, _, kind| {
        Ok(take(&mut weights, name)?.f_to_kind(kind)?)
    })
}

/// The largest difference of logits to those of transformers in f32, as a share of the largest logit.
///
/// # Errors
/// When the device fails.
pub fn logits(placement: &Placement) -> Result<Measured> {
    let _guard = tch::no_grad_guard();
    let base = golden_base(placement)?;
    let mut golden = tensors(LOGITS)?;
    let (ids, expected) = (take(&mut golden, "input_ids")?, take(&mut golden, "logits")?);
    let hidden = base.forward(&Input::rows(ids.f_to(base.device())?, 0), &ActiveAdapters::none(), None)?;
    let logits = base.logits(&hidden)?.f_view(&expected.size()[..])?;
    Ok(Measured { value: relative(&logits, &expected)?, limit: tolerance(placement.precision) })
}

/// The same of answers that are decoded side by side by libtorch, with an adapter and without: a token at a time behind
/// a part of the prompt, against all at once in f32 on the CPU.
///
/// # Errors
/// When the device fails.
pub fn side_by_side(placement: &Placement) -> Result<Measured> {
    let (base, reference) = (golden_base(placement)?, golden_base(&REFERENCE)?);
    let (rank, alpha) = RUN_RANK;
    let adapter = Adapter::new(LoraConfig { rank, alpha, ..LoraConfig::default() }, base.config(), 1)?;
    let adapter =
        adapter.with_flat(wave(&[adapter.parameter_count()], 0.731, Device::Cpu, Kind::Float)? * 0.05)?;
    let sets: [&[(&Adapter, f64)]; 3] = [&[], &[(&adapter, 1.0)], &[(&adapter, 0.5)]];
    let prompts: Vec<Vec<u32>> =
        (0..3).map(|i| (0..20 + i).map(|t| (t * 37 + i * 11) % 128).collect()).collect();
    let got = batch::forced(&base, &sets, &prompts)?;
    let mut worst = 0f64;
    for ((prompt, adapters), got) in prompts.iter().zip(sets).zip(got) {
        let ids: Vec<i64> = prompt.iter().map(|&id| i64::from(id)).collect();
        let input = Input::rows(Tensor::from_slice(&ids).unsqueeze(0), 0);
        let hidden = reference.forward(&input, &reference.activate(adapters)?, None)?;
        let expected = reference.logits(&hidden.f_narrow(0, ids.len() as i64 - 1, 1)?)?.f_flatten(0, -1)?;
        let off = relative(&Tensor::from_slice(&got), &expected)?;
        worst = if off.is_nan() { off } else { worst.max(off) };
    }
    Ok(Measured { value: worst, limit: tolerance(placement.precision) })
}

/// The ten training steps of the golden run: the largest relative differences of losses and of gradient norms
/// to PEFT's in f32, and how many steps an f16 overflow made it repeat.
///
/// # Errors
/// When the device fails, or training does not stay finite on it.
pub fn training(placement: &Placement) -> Result<(Measured, Measured, usize)> {
    let base = golden_base(placement)?;
    let mut initial = tensors(INITIAL)?;
    let (rank, alpha) = RUN_RANK;
    let config = LoraConfig { rank, alpha, ..LoraConfig::default() };
    let adapter = Adapter::from_parts(config, base.config(), |name, _| take(&mut initial, name))?;
    let mut learner = Learner::new(base, &adapter, None, LearnerConfig::default())?;
    let golden = tensors(RUN)?;
    let (mut loss, mut norm, mut repeated) = (0f64, 0f64, 0);
    for step in 0..golden["batches"].size()[0] {
        let rows: Vec<Vec<i64>> = (&golden["batches"].f_get(step)?).try_into()?;
        let batch: Vec<Sequence> = rows
            .into_iter()
            .map(|row| Sequence::whole(row.into_iter().map(|id| id as u32).collect()))
            .collect();
        let report = loop {
            let report =
                learner.step(std::slice::from_ref(&batch), RUN_RATE, &mut || ControlFlow::Continue(()))?;
            match report.outcome {
                Outcome::Overflow => repeated += 1,
                Outcome::Applied => break report,
                Outcome::NonFinite | Outcome::Stopped => anyhow::bail!("step {step} is not finite"),
            }
        };
        let off = |got: f64, name: &str| -> Result<f64> {
            Ok((got / golden[name].f_double_value(&[step])? - 1.0).abs())
        };
        loss = loss.max(off(report.loss, "losses")?);
        norm = norm.max(off(report.grad_norm, "grad_norms")?);
    }
    // Ten steps at a high rate multiply what a 16-bit base rounds away; f32 differs by its order of sums.
    let [loss_limit, norm_limit] =
        if placement.precision == Precision::F32 { [1e-3; 2] } else { [0.01, 0.05] };
    Ok((Measured { value: loss, limit: loss_limit }, Measured { value: norm, limit: norm_limit }, repeated))
}

/// How fast a device is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Square products, GFLOP/s.
    pub products: f64,
    /// LoRA updates, tokens/s; with products in 8 bits where these are faster.
    pub learning: f64,
    /// Reading a prompt, tokens/s.
    pub prefill: f64,
    /// One answer, tokens/s.
    pub decode: f64,
}

/// Measures speed on a random base of about five million weights, for about `time` in all: the best of each.
///
/// # Errors
/// When the device fails.
pub fn speed(placement: &Placement, time: Duration) -> Result<Speed> {
    let base = Base::random(&ModelConfig::from_json(SPEED_SHAPE)?, 1, placement)?;
    let adapter = Adapter::new(LoraConfig::default(), base.config(), 1)?;
    let share = time / 4;
    let products = products(placement, share)?;
    let learned_on = if Base::is_faster_with_codes(base.config(), placement) {
        base.share().with_codes()?
    } else {
        base.share()
    };
    let mut learner = Learner::new(learned_on, &adapter, None, LearnerConfig::default())?;
    let sequence =
        |i| Sequence::whole((0..STEP_SEQUENCE_TOKENS).map(|t| (t * 37 + i * 101) % 4096).collect());
    let batch: Vec<Sequence> = (0..STEP_SEQUENCES).map(sequence).collect();
    let tokens = f64::from(STEP_SEQUENCES * STEP_SEQUENCE_TOKENS);
    let learning = best(share, || {
        learner.step(std::slice::from_ref(&batch), 1e-4, &mut || ControlFlow::Continue(()))?;
        Ok(())
    })?;
    let _guard = tch::no_grad_guard();
    let prompt = Tensor::f_full([1, PREFILL_TOKENS], 5, (Kind::Int64, placement.device))?;
    let none = ActiveAdapters::none();
    let prefill = best(share, || {
        let mut cache = KvCache::new(&base, 1);
        wait(&base.forward(&Input::rows(prompt.shallow_clone(), 0), &none, Some(&mut cache))?)
    })?;
    let one = prompt.f_narrow(1, 0, 1)?;
    let decode = best(share, || {
        let mut cache = KvCache::new(&base, 1);
        for _ in 0..DECODE_TOKENS {
            let input = Input::rows(one.shallow_clone(), cache.len());
            let hidden = base.forward(&input, &none, Some(&mut cache))?;
            // The next token is chosen on the CPU, so that a device is waited for at each.
            wait(&base.logits(&hidden)?)?;
        }
        Ok(())
    })?;
    Ok(Speed {
        products,
        learning: tokens / learning,
        prefill: PREFILL_TOKENS as f64 / prefill,
        decode: DECODE_TOKENS as f64 / decode,
    })
}

/// Rows and columns of the matrices whose product is the ceiling: large enough that a device is busy with one for longer
/// than it takes to order it.
pub fn product_side(device: Device) -> i64 {
    match device {
        Device::Cpu | Device::Vulkan => 1024,
        Device::Mps => 2048,
        Device::Cuda(_) => 8192,
    }
}

/// GFLOP/s of square products: the ceiling of what a training step can reach. The best within `time`.
///
/// # Errors
/// When the device fails.
pub fn products(placement: &Placement, time: Duration) -> Result<f64> {
    let side = product_side(placement.device);
    // Ones or zeros would take a GPU less power than numbers do, and so less time.
    let matrix = Tensor::f_randn([side; 2], (placement.kind(), placement.device))?;
    let seconds = best(time, || wait(&matrix.f_matmul(&matrix)?))?;
    Ok(2.0 * (side as f64).powi(3) / seconds / 1e9)
}

/// Seconds of the fastest run within `time`; the first, which sets things up, does not count.
fn best(time: Duration, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    run()?;
    let (all, mut best) = (Instant::now(), f64::INFINITY);
    while best.is_infinite() || all.elapsed() < time {
        let start = Instant::now();
        run()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Reading one number waits for a device that computes on its own.
fn wait(tensor: &Tensor) -> Result<()> {
    let last = tensor.f_flatten(0, -1)?.f_narrow(0, 0, 1)?;
    last.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?.f_double_value(&[0])?;
    Ok(())
}

/// The processor in f32, beside which every other placement is reported.
pub const REFERENCE: Placement =
    Placement { device: Device::Cpu, precision: Precision::F32, quantisation: Quantisation::None };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_of_the_cpu_passes_and_is_quick() {
        for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
            check(Device::Cpu, precision).unwrap();
            let start = Instant::now();
            compare(Device::Cpu, precision.kind(), tolerance(precision)).unwrap();
            println!("{precision:?}: {:?}", start.elapsed());
        }
    }

    #[test]
    fn a_format_that_is_too_coarse_or_not_finite_fails_by_name() {
        let error = compare(Device::Cpu, Kind::BFloat16, tolerance(Precision::F32)).unwrap_err().to_string();
        assert!(error.contains("is off by"), "{error}");
        let nan = Tensor::from_slice(&[f32::NAN, 1.0]);
        assert!(relative(&nan, &Tensor::from_slice(&[1f32, 1.0])).unwrap().is_nan());
        assert!(!Measured { value: f64::NAN, limit: 1.0 }.is_ok());
    }

    #[test]
    fn the_goldens_hold_in_every_format() {
        for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
            let placement = Placement { precision, ..REFERENCE };
            let (found, decoded) = (logits(&placement).unwrap(), side_by_side(&placement).unwrap());
            let (loss, norm, repeated) = training(&placement).unwrap();
            println!("{precision:?}: {found:?} {decoded:?} {loss:?} {norm:?} {repeated}");
            assert!(found.is_ok() && decoded.is_ok() && loss.is_ok() && norm.is_ok(), "{precision:?}");
        }
    }
}
