//! Measures a learner's step and greedy decoding on a shape of about five million weights, or of 213 million.
//!
//!     cargo run --release -p model --example speed -- [threads] [small|200m] [f32|bf16|f16] [none|int8|nf4]

use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::Result;
use model::device::{DeviceChoice, Placement};
use model::hf::ModelConfig;
use model::learner::{Learner, LearnerConfig};
use model::llama::{Base, Input, KvCache};
use model::lora::{ActiveAdapters, Adapter, LoraConfig};
use model::pack::Sequence;
use tch::Tensor;

const SHAPE: &str = r#"{"model_type": "llama", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 1024,
    "tie_word_embeddings": true}"#;

const SHAPE_200M: &str = r#"{"model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000,
    "max_position_embeddings": 1024, "tie_word_embeddings": true}"#;

/// Tokens that are decoded.
const DECODED: u32 = 64;

fn main() -> Result<()> {
    let argument = |n: usize, or: &str| std::env::args().nth(n).unwrap_or_else(|| or.to_owned());
    tch::set_num_threads(argument(1, "2").parse()?);
    let shape = if argument(2, "small") == "200m" { SHAPE_200M } else { SHAPE };
    let placement =
        Placement::resolve(DeviceChoice::Cpu, argument(3, "f32").parse()?, argument(4, "none").parse()?)?;
    let base = Base::random(&ModelConfig::from_json(shape)?, 1, &placement)?;
    let adapter = Adapter::new(LoraConfig::default(), base.config(), 1)?;
    println!(
        "{} weights in {:.0} MB, {} in the adapter, {}",
        base.parameter_count(),
        base.bytes_len() as f64 / 1e6,
        adapter.parameter_count(),
        base.placement()
    );

    for (name, length) in [("sequences of 256", 256), ("sequences of 60, packed in rows of 240", 60)] {
        let sequence = |i: u32| Sequence::whole((0..length).map(|t| (t * 37 + i * 101) % 4096).collect());
        let micro_batches: Vec<Vec<Sequence>> =
            (0..4).map(|m| (0..1024 / length).map(|i| sequence(m * 50 + i)).collect()).collect();
        let mut learner = Learner::new(base.share(), &adapter, None, LearnerConfig::default())?;
        let mut speeds = Vec::new();
        for _ in 0..4 {
            let start = Instant::now();
            let report = learner.step(&micro_batches, 1e-4, &mut || ControlFlow::Continue(()))?;
            speeds.push(report.tokens as f64 / start.elapsed().as_secs_f64());
        }
        println!(
            "learning, {name}: {:.0} tokens/s at best, {:.0} at first",
            speeds.iter().copied().fold(0.0, f64::max),
            speeds[0]
        );
    }

    let _guard = tch::no_grad_guard();
    for (name, active) in
        [("base", ActiveAdapters::none()), ("one adapter", base.activate(&[(&adapter, 1.0)])?)]
    {
        let mut cache = KvCache::new(&base, 1);
        let prompt = Tensor::from_slice(&[5i64; 512]).unsqueeze(0);
        let start = Instant::now();
        let _ = base.forward(&Input::rows(prompt, 0), &active, Some(&mut cache))?;
        let prefill = 512.0 / start.elapsed().as_secs_f64();
        let start = Instant::now();
        let mut id = 5;
        for _ in 0..DECODED {
            let input = Input::rows(Tensor::from_slice(&[id]).unsqueeze(0), cache.len());
            let hidden = base.forward(&input, &active, Some(&mut cache))?;
            id = base.logits(&hidden)?.argmax(None, false).int64_value(&[]);
        }
        println!(
            "{name}: prompt {prefill:.0} tokens/s, decoding {:.0} tokens/s",
            f64::from(DECODED) / start.elapsed().as_secs_f64()
        );
    }
    Ok(())
}
