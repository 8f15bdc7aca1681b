//! Stand-in for `engram pretrain` until the command line has it.
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use model::device::Placement;
use model::pretrain::preset::Preset;
use model::pretrain::{Budget, PretrainOptions, Progress, run};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    if args[1] == "eval" {
        return evaluate(&args[2], &args[3], &args[4..]);
    }
    let (preset, out, minutes) = (&args[1], &args[2], args[3].parse::<f64>()?);
    tch::set_num_threads(2);
    let options = PretrainOptions {
        preset: Preset::find(preset)?,
        data: args[4..].iter().map(PathBuf::from).collect(),
        out: out.into(),
        budget: if minutes > 0.0 {
            Budget::Time(Duration::from_secs_f64(minutes * 60.0))
        } else {
            Budget::Steps(-minutes as u64)
        },
        seed: 1,
        placement: Placement::CPU_F32,
        stop: Arc::new(AtomicBool::new(false)),
    };
    let mut mean = 0.0;
    let mut bits = Vec::new();
    run(&options, &mut |progress| match progress {
        Progress::Step(step) => {
            mean = if step.step == 1 { step.loss } else { 0.95 * mean + 0.05 * step.loss };
            if step.step % 25 == 0 {
                println!(
                    "step {} tokens {} loss {mean:.3} done {:.3} tok/s {:.0}",
                    step.step,
                    step.tokens,
                    step.done,
                    step.tokens as f64 / step.elapsed.as_secs_f64()
                );
                let _ = std::io::stdout().flush();
            }
        }
        Progress::Validation { name, score } => {
            println!(
                "{name} {:.3} bits a byte, {} bytes {} tokens",
                score.bits_per_byte(),
                score.bytes,
                score.tokens
            );
            bits.push(score.bits_per_byte());
        }
        other => println!("{other:?}"),
    })?;
    println!("mean {:.4}", bits.iter().sum::<f64>() / bits.len() as f64);
    Ok(())
}

fn evaluate(folder: &str, prompt: &str, texts: &[String]) -> anyhow::Result<()> {
    use model::{generate, llama::Base, pretrain::evaluate, tokenizer::Tokenizer};
    tch::set_num_threads(2);
    let folder = std::path::Path::new(folder);
    let (base, tokenizer) = (Base::load(folder, &Placement::CPU_F32)?, Tokenizer::load(folder)?);
    let ids = tokenizer.encode(prompt)?;
    for temperature in [0.0, 0.7] {
        let sampling = generate::Sampling { temperature, max_tokens: 60, ..Default::default() };
        println!("{prompt}|{}", generate::generate(&base, &[], &tokenizer, &ids, sampling)?.text);
    }
    for text in texts {
        let score = evaluate::text(&base, &tokenizer, text.as_ref(), 512, 200_000)?;
        println!(
            "{text} {:.3} bits a byte, {} bytes {} tokens",
            score.bits_per_byte(),
            score.bytes,
            score.tokens
        );
    }
    Ok(())
}
