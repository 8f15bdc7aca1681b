//! `engram pretrain`: a base from scratch. Needs no server.

use crate::interrupt::at_interrupt;
use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use model::device::{DeviceChoice, Placement, PrecisionChoice};
use model::pretrain::preset::Preset;
use model::pretrain::{self, Budget, PretrainOptions, Progress};
use model::quant::Quantisation;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  engram pretrain --data ./texts --out ./mybase --minutes 30
  engram pretrain --preset my.toml --data ./texts --data ./more --out ./mybase --steps 2000 --seed 7

Reads each *.txt of the folders, whose documents end in a line <|endoftext|>; *.val.txt is held out
and scored at the end. Ctrl-C ends the training early, and keeps what was learned.";

/// The bar's resolution.
const BAR_LENGTH: u64 = 1000;

/// What `engram pretrain` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A built-in preset, or the file of your own.
    #[arg(long, value_name = "NAME|FILE", default_value = "nano")]
    preset: String,
    /// A folder of texts; may be given several times.
    #[arg(long, value_name = "DIR", required = true)]
    data: Vec<PathBuf>,
    /// The folder that is written.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How long to train.
    #[arg(long, value_name = "N", default_value_t = 15.0, conflicts_with = "steps")]
    minutes: f64,
    /// How many steps to train, whatever they take: equal runs give equal weights.
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Decides the first weights and the order of the texts.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// auto, cpu, cuda or mps.
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Print one JSON object for each event.
    #[arg(long)]
    json: bool,
}

/// Trains, and writes the base.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let budget = match args.steps {
        Some(steps) => Budget::Steps(steps),
        None => {
            let limit = Duration::try_from_secs_f64(args.minutes * 60.0);
            Budget::Time(limit.context("--minutes is a number above 0")?)
        }
    };
    let options = PretrainOptions {
        preset: Preset::find(&args.preset)?,
        data: args.data.clone(),
        out: args.out.clone(),
        budget,
        seed: args.seed,
        placement: Placement::resolve(args.device, PrecisionChoice::F32, Quantisation::None)?,
        stop: stop_at_interrupt()?,
    };
    let bar = ProgressBar::new(BAR_LENGTH);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {percent} % {msg}")?);
    let mut told = Ok(());
    pretrain::run(&options, &mut |progress| {
        if told.is_ok() {
            told = tell(&progress, args.json, &bar, out);
        }
    })?;
    bar.finish_and_clear();
    told?;
    if !args.json {
        writeln!(out, "{}: try 'engram up --base {0}'", args.out.display())?;
    }
    Ok(())
}

fn tell(progress: &Progress, json: bool, bar: &ProgressBar, out: &mut dyn Write) -> Result<()> {
    let (event, line) = match progress {
        Progress::Tokenizer => (json!({"event": "tokenizer"}), "the tokenizer is trained".to_owned()),
        Progress::Corpus { texts } => {
            let tokens: u64 = texts.iter().map(|(_, tokens)| tokens).sum();
            (json!({"event": "corpus", "texts": texts}), format!("{tokens} tokens in {} texts", texts.len()))
        }
        Progress::Step(step) => {
            bar.set_position((step.done.clamp(0.0, 1.0) * BAR_LENGTH as f64) as u64);
            bar.set_message(format!("step {}, loss {:.3}", step.step, step.loss));
            let seconds = step.elapsed.as_secs_f64();
            let event = json!({"event": "step", "step": step.step, "tokens": step.tokens, "loss": step.loss, "seconds": seconds});
            (event, String::new())
        }
        Progress::Validation { name, score } => {
            let (nll, bits) = (score.nll_per_token(), score.bits_per_byte());
            let event =
                json!({"event": "validation", "text": name, "nll_per_token": nll, "bits_per_byte": bits});
            (event, format!("{name}: {nll:.3} nats a token, {bits:.3} bits a byte"))
        }
    };
    if json {
        writeln!(out, "{event}")?;
    } else if !line.is_empty() {
        bar.suspend(|| writeln!(out, "{line}"))?;
    }
    Ok(())
}

/// Set by the first Ctrl-C.
fn stop_at_interrupt() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    at_interrupt(move || told.store(true, Ordering::Relaxed))?;
    Ok(stop)
}
