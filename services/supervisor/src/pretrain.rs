//! `engram pretrain`: a base from scratch. Needs no server.

use crate::interrupt::at_interrupt;
use anyhow::{Context, Result, ensure};
use clap::value_parser;
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use model::device::{DeviceChoice, Placement, Precision, PrecisionChoice};
use model::distillation::Mix;
use model::pretrain::plan::Plan;
use model::pretrain::preset::Preset;
use model::pretrain::{self, Budget, PretrainOptions, Progress};
use model::quant::Quantisation;
use model::selftest;
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
  engram pretrain --data ./texts --out ./mybase --minutes 60 --resume
  engram pretrain --preset base-200m --dry-run
  engram pretrain --data ./texts --out ./small --teacher ./large --alpha 0.5   from its logits

Reads each *.txt of the folders, whose documents end in a line <|endoftext|>; *.val.txt is held out \
and scored. Ctrl-C stops after the step that runs and writes what was learned. OUT/training holds \
the loss curve and the state from which --resume goes on exactly; delete it when you are done.

Built-in presets: nano (4.9 million weights, about the size of the base that comes with the \
program), reference (63.6), base-100m, base-200m.";

/// How long the ceiling of the device is measured, before the run.
const PRODUCTS_TIME: Duration = Duration::from_millis(500);

/// How much longer a run that was stopped should go on for its rates to fall, as a share of what it has had.
const SETTLE: f64 = 0.2;

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
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    data: Vec<PathBuf>,
    /// The folder that is written.
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    out: Option<PathBuf>,
    /// How long to train, in all sittings.
    #[arg(long, value_name = "N", default_value_t = 15.0, conflicts_with = "steps")]
    minutes: f64,
    /// How many steps to train, whatever they take: equal runs give equal weights.
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// Learn from the logits of the base in this folder too; its tokenizer is taken over.
    #[arg(long, value_name = "DIR")]
    teacher: Option<PathBuf>,
    /// The teacher's share of the loss; the rest is the text's.
    #[arg(long, value_name = "X", default_value_t = 0.5, requires = "teacher")]
    alpha: f64,
    /// What logits are divided by before student and teacher are compared.
    #[arg(long, value_name = "T", default_value_t = 2.0, requires = "teacher")]
    temperature: f64,
    /// Go on with the run in --out. With a longer budget than it had, from before its rates began to fall.
    #[arg(long)]
    resume: bool,
    /// How often the state is saved.
    #[arg(long, value_name = "N", default_value_t = 5.0)]
    save_minutes: f64,
    /// Say what would be trained and what it takes, and stop.
    #[arg(long)]
    dry_run: bool,
    /// Decides the first weights and the order of the texts.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// auto, cpu, cuda or mps.
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// auto, f32 or bf16: what is computed in. Weights and optimiser state are f32.
    #[arg(long, default_value = "auto")]
    precision: PrecisionChoice,
    /// Print one JSON object for each event.
    #[arg(long)]
    json: bool,
}

/// Trains, and writes the base.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let budget = match args.steps {
        Some(steps) => Budget::Steps(steps),
        None => Budget::Time(minutes(args.minutes, "--minutes")?),
    };
    let preset = Preset::find(&args.preset)?;
    let placement = Placement::resolve(args.device, args.precision, Quantisation::None)?;
    ensure!(
        placement.precision != Precision::F16,
        "--precision f16 cannot train every weight: use bf16 or f32"
    );
    let plan = Plan::new(&preset.model()?, &preset, &placement);
    let products = selftest::products(&placement, PRODUCTS_TIME)?;
    announce(args, &plan, &placement, products, out)?;
    let Some(folder) = args.out.as_ref().filter(|_| !args.dry_run) else { return Ok(()) };
    let options = PretrainOptions {
        preset,
        data: args.data.clone(),
        out: folder.clone(),
        budget,
        seed: args.seed,
        placement,
        teacher: args
            .teacher
            .clone()
            .map(|teacher| (teacher, Mix { alpha: args.alpha, temperature: args.temperature })),
        resume: args.resume,
        save_every: minutes(args.save_minutes, "--save-minutes")?,
        stop: stop_at_interrupt()?,
    };
    let bar = ProgressBar::new(BAR_LENGTH);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {percent} % {msg}")?);
    let mut told = Ok(());
    pretrain::run(&options, &mut |progress| {
        if let Progress::Step(step) = &progress {
            bar.set_position((step.done.clamp(0.0, 1.0) * BAR_LENGTH as f64) as u64);
            let share = step.tokens_per_s * plan.operations_per_token / (products * 1e9);
            bar.set_message(format!(
                "loss {:.3}, {:.0} tokens/s ({:.0} % of peak), {} left",
                step.loss,
                step.tokens_per_s,
                100.0 * share,
                HumanDuration(step.left)
            ));
        }
        if told.is_ok() {
            told = tell(&progress, args, &bar, out);
        }
    })?;
    bar.finish_and_clear();
    told?;
    if !args.json {
        writeln!(out, "{}: try 'engram up --base {0}'", folder.display())?;
    }
    Ok(())
}

fn minutes(number: f64, flag: &str) -> Result<Duration> {
    let wrong = || format!("{flag} has to be a number above 0");
    let time = Duration::try_from_secs_f64(number * 60.0).with_context(wrong)?;
    ensure!(!time.is_zero(), wrong());
    Ok(time)
}

/// Says what the run will take, before it takes it.
fn announce(
    args: &Args,
    plan: &Plan,
    placement: &Placement,
    products: f64,
    out: &mut dyn Write,
) -> Result<()> {
    if args.json {
        let event = json!({"event": "plan", "preset": args.preset, "parameters": plan.parameters,
            "memory_bytes": plan.memory_bytes.round(), "operations_per_token": plan.operations_per_token,
            "matrix_peak_gflops": products, "placement": placement.to_string()});
        writeln!(out, "{event}")?;
    } else {
        writeln!(
            out,
            "{}: {} weights ({:.1} million), about {:.1} GB of memory; on {placement}, {products:.0} GFLOP/s",
            args.preset,
            plan.parameters,
            plan.parameters as f64 / 1e6,
            plan.memory_bytes / 1e9,
        )?;
    }
    Ok(())
}

fn tell(progress: &Progress, args: &Args, bar: &ProgressBar, out: &mut dyn Write) -> Result<()> {
    let (event, line) = match progress {
        Progress::Tokenizer => (json!({"event": "tokenizer"}), "the tokenizer is trained".to_owned()),
        Progress::Corpus { texts } => {
            let tokens: u64 = texts.iter().map(|(_, tokens)| tokens).sum();
            (json!({"event": "corpus", "texts": texts}), format!("{tokens} tokens in {} texts", texts.len()))
        }
        Progress::Resumed { step, elapsed } => (
            json!({"event": "resumed", "step": step, "seconds": elapsed.as_secs_f64()}),
            format!("going on after step {step} and {}", HumanDuration(*elapsed)),
        ),
        Progress::Step(step) => {
            let event = json!({"event": "step", "step": step.step, "tokens": step.tokens, "loss": step.loss,
                "seconds": step.elapsed.as_secs_f64(), "tokens_per_s": step.tokens_per_s,
                "seconds_left": step.left.as_secs_f64()});
            (event, String::new())
        }
        Progress::Point(point) => (
            json!({"event": "point", "tokens": point.tokens, "training": point.training, "held_out": point.held_out}),
            String::new(),
        ),
        Progress::Stopped { elapsed, step, falling } => (
            json!({"event": "stopped", "step": step, "seconds": elapsed.as_secs_f64(), "falling": falling}),
            stopped(*elapsed, *step, *falling, args),
        ),
        Progress::Validation { name, score } => {
            let (nll, bits) = (score.nll_per_token(), score.bits_per_byte());
            let event =
                json!({"event": "validation", "text": name, "nll_per_token": nll, "bits_per_byte": bits});
            (event, format!("{name}: {nll:.3} nats a token, {bits:.3} bits a byte"))
        }
    };
    if args.json {
        writeln!(out, "{event}")?;
    } else if !line.is_empty() {
        bar.suspend(|| writeln!(out, "{line}"))?;
    }
    Ok(())
}

/// How a run that was stopped is ended well: its rates have yet to fall, or to reach zero.
fn stopped(elapsed: Duration, step: u64, falling: bool, args: &Args) -> String {
    let goes_on = "stopped early: the same command with --resume goes on";
    if falling {
        return goes_on.to_owned();
    }
    let budget = match args.steps {
        Some(_) => format!("--steps {}", (step as f64 * (1.0 + SETTLE)).ceil()),
        None => format!("--minutes {:.1}", elapsed.as_secs_f64() / 60.0 * (1.0 + SETTLE)),
    };
    format!("{goes_on}; with --resume {budget} it settles soon")
}

/// Set by the first Ctrl-C.
fn stop_at_interrupt() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    at_interrupt(move || told.store(true, Ordering::Relaxed))?;
    Ok(stop)
}
