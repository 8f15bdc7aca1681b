//! Measures what quantisation costs answers: bits a byte of a text, read token by token as a CPU decodes.
//!
//!     cargo run --release --workspace --example bits -- BASE TEXT [tokens] [f32|bf16]

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use model::cpu::{Cpu, CpuAdapters, Span};
use model::device::{DeviceChoice, Placement};
use model::llama::Base;
use model::quant::Quantisation;
use model::tokenizer::Tokenizer;

/// Tokens that are read in a row, each with those before it.
const WINDOW: usize = 256;

fn main() -> Result<()> {
    let argument = |n: usize| std::env::args().nth(n);
    let base = argument(1).context("the folder of a base")?;
    let text = std::fs::read_to_string(argument(2).context("a text")?)?;
    let tokens: usize = argument(3).map_or(Ok(4096), |tokens| tokens.parse())?;
    let precision = argument(4).unwrap_or_else(|| "f32".to_owned()).parse()?;
    let (base, tokenizer) = (Path::new(&base), Tokenizer::load(Path::new(&base))?);
    let ids: Vec<u32> = tokenizer.encode(&text)?.into_iter().take(tokens).collect();
    let bytes = tokenizer.decode(&ids)?.len();
    for quantisation in [Quantisation::None, Quantisation::Int8, Quantisation::Nf4] {
        let base = Base::load(base, &Placement::resolve(DeviceChoice::Cpu, precision, quantisation)?)?;
        let nats = nats(&mut Cpu::new(&base)?.context("a CPU")?, &ids)?;
        println!("{quantisation}: {:.4} bits a byte", nats / std::f64::consts::LN_2 / bytes as f64);
    }
    Ok(())
}

fn nats(cpu: &mut Cpu, ids: &[u32]) -> Result<f64> {
    let (none, mut sum) = (Arc::new(CpuAdapters::default()), 0.0);
    for window in ids.chunks(WINDOW) {
        let mut pages = cpu.begin(Vec::new());
        for pair in window.windows(2) {
            let span = Span { ids: &pair[..1], adapters: &none, pages: &mut pages, speaks: true };
            let logits = cpu.forward(&mut [span])?.pop().flatten().context("logits")?;
            let most = logits.iter().copied().fold(f32::MIN, f32::max);
            let total: f64 = logits.iter().map(|x| f64::from(x - most).exp()).sum();
            sum += total.ln() - f64::from(logits[pair[1] as usize] - most);
        }
    }
    Ok(sum)
}
