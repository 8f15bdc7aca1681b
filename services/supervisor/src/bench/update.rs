//! `engram bench update`: how fast the learner learns.

use super::report;
use super::subject::{Subject, SubjectArgs};
use super::tasks::Line;
use crate::topology;
use anyhow::{Context, Result, anyhow, ensure};
use clap::value_parser;
use model::guard::Former;
use model::learner::{Learner, LearnerConfig, Outcome};
use model::lora::Adapter;
use model::pack::Sequence;
use model::pretrain::corpus;
use model::selftest;
use nix::sys::resource::{UsageWho, getrusage};
use proto::Content;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const EXAMPLES: &str = "\
Examples:
  engram bench update
  engram bench update --base reference --examples 256 --replay 0
  engram bench update --data ./clinc150/banking/train.jsonl --json result.json
  engram bench update --base base-200m --examples 64 --set base.quantisation=nf4

One pass over the new examples and those rehearsed beside them, with the services' own learner: \
pack, forward, the former self's forward pass of rehearsed texts, backward, clip, AdamW; without \
anchors, further passes and the gate. A first step that sets things up is not counted. Texts are cut \
as the services cut them; without --data the tokens are random. The ceiling is a product of two \
square matrices, in the same run.";

/// Time that the ceiling is sought for.
const PEAK_TIME: Duration = Duration::from_millis(500);
/// Small enough to learn nothing of note, and not 0, so that every step does all of its work.
const RATE: f64 = 1e-4;

/// What `engram bench update` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    subject: SubjectArgs,
    /// New examples.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = value_parser!(u64).range(1..))]
    examples: u64,
    /// Random tokens in an example.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = value_parser!(u64).range(2..), conflicts_with = "data")]
    tokens: u64,
    /// Real text to learn: lines of {"text","label"} or {"prompt","response"}, or a .txt whose documents end in a
    /// line <|endoftext|>.
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Share of what is rehearsed in all that is trained on.
    #[arg(long, value_name = "SHARE", default_value_t = 0.5)]
    replay: f64,
    /// Examples in an optimiser step, new and rehearsed.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = value_parser!(u64).range(1..))]
    batch: u64,
    /// Times the whole is measured; the median counts.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = value_parser!(u64).range(1..=100))]
    repeats: u64,
}

/// One measurement.
struct Run {
    seconds: f64,
    tokens: usize,
    learned_tokens: usize,
}

/// Measures and reports.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    ensure!((0.0..1.0).contains(&args.replay), "--replay has to be from 0 to below 1");
    let subject = Subject::load(&args.subject)?;
    let new = usize::try_from(args.examples)?;
    let rehearsed = (new as f64 * args.replay / (1.0 - args.replay)).round() as usize;
    let mut sequences = match &args.data {
        Some(path) => of_text(path, &subject, new + rehearsed)?,
        None => random(&subject, new + rehearsed, usize::try_from(args.tokens)?)?,
    };
    // As in the services: a rehearsed text is held to the former self, which costs a forward pass; an answer is not.
    for sequence in &mut sequences[new..] {
        sequence.rehearsed = sequence.learned.first().is_none_or(|&(from, _)| from == 0);
    }
    sequences.shuffle(&mut ChaCha8Rng::seed_from_u64(1));
    let steps = steps(sequences, usize::try_from(args.batch)?);
    let peak = selftest::products(&subject.base.placement(), PEAK_TIME)?;
    let runs = (0..args.repeats).map(|_| measure(&subject, &steps)).collect::<Result<Vec<Run>>>()?;
    let run = median(runs).context("nothing was measured")?;
    let adapter = adapter(&subject)?;
    let work = work(&subject, &adapter, &run);
    let peak_rss = peak_rss_bytes()?;
    let gflops = work / run.seconds / 1e9;
    let per_1000 = run.seconds * 1000.0 / new as f64;
    let figures = json!({
        "model": subject.json(), "adapter_parameters": adapter.parameter_count(),
        "examples": new, "rehearsed": rehearsed, "batch": args.batch, "repeats": args.repeats,
        "data": args.data, "tokens": run.tokens, "learned_tokens": run.learned_tokens,
        "seconds": run.seconds, "seconds_per_1000_examples": per_1000,
        "tokens_per_s": run.tokens as f64 / run.seconds, "gflops": gflops,
        "matrix_peak_gflops": peak, "peak_rss_bytes": peak_rss, "settings": subject.settings,
    });
    report::store(args.subject.json.as_deref(), &figures)?;
    writeln!(out, "{}", subject.describe())?;
    writeln!(
        out,
        "{new} new examples and {rehearsed} rehearsed, {} tokens, {} of them learned, {} in a step",
        run.tokens, run.learned_tokens, args.batch
    )?;
    writeln!(out, "  {per_1000:8.2} s for 1,000 new examples")?;
    writeln!(out, "  {:8.0} tokens/s", run.tokens as f64 / run.seconds)?;
    writeln!(out, "  {gflops:8.0} GFLOP/s of {peak:.0} in square products")?;
    writeln!(out, "  {:8.0} MB at the peak", peak_rss as f64 / 1e6)?;
    Ok(())
}

pub(super) fn adapter(subject: &Subject) -> Result<Adapter> {
    Adapter::new(
        topology::training(&subject.settings, subject.base.config().hidden_size)?.lora,
        subject.base.config(),
        1,
    )
}

/// Sequences of random tokens, all of which count.
pub(super) fn random(subject: &Subject, count: usize, tokens: usize) -> Result<Vec<Sequence>> {
    let config = subject.base.config();
    ensure!(
        tokens as i64 <= config.max_positions,
        "--tokens is beyond the context of {}",
        config.max_positions
    );
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let vocabulary = u32::try_from(config.vocab_size)?;
    let mut sequence = || Sequence::whole((0..tokens).map(|_| rng.random_range(0..vocabulary)).collect());
    Ok((0..count).map(|_| sequence()).collect())
}

/// Examples as the services cut them from a file; again from the first where it holds fewer.
fn of_text(path: &Path, subject: &Subject, count: usize) -> Result<Vec<Sequence>> {
    let cutter = topology::cutter(&subject.settings, &subject.text()?);
    let mut sequences = Vec::new();
    for content in contents(path)? {
        let pieces = cutter.pieces(&content, None)?;
        ensure!(
            pieces
                .iter()
                .flat_map(|piece| &piece.tokens)
                .all(|&id| i64::from(id) < subject.base.config().vocab_size),
            "the base has fewer tokens than the tokenizer that reads {}: use random ones",
            path.display()
        );
        sequences.extend(pieces.into_iter().map(|piece| Sequence {
            tokens: piece.tokens,
            learned: piece.learned,
            rehearsed: false,
        }));
        if sequences.len() >= count {
            break;
        }
    }
    ensure!(!sequences.is_empty(), "{} holds nothing to learn", path.display());
    Ok(sequences.iter().cycle().take(count).cloned().collect())
}

fn contents(path: &Path) -> Result<Vec<Content>> {
    if path.extension().is_some_and(|extension| extension == "txt") {
        return corpus::documents(path)?.map(|document| Ok(Content::Text(document?))).collect();
    }
    let lines = super::tasks::lines(path).map_err(|error| anyhow!("--data: {error:#}"))?;
    Ok(lines.iter().map(Line::content).collect())
}

/// Steps of `batch` examples as they come, not sorted by length.
fn steps(sequences: Vec<Sequence>, batch: usize) -> Vec<Vec<Sequence>> {
    sequences.chunks(batch).map(<[Sequence]>::to_vec).collect()
}

fn measure(subject: &Subject, steps: &[Vec<Sequence>]) -> Result<Run> {
    let training = topology::training(&subject.settings, subject.base.config().hidden_size)?;
    let config: LearnerConfig = training.learner;
    let adapter = adapter(subject)?;
    let mut learner = Learner::new(subject.base.share(), &adapter, None, config)?;
    if training.former.fresh > 0.0 || training.former.rehearsed > 0.0 {
        learner.hold_to(Former::new(&subject.base, &adapter, training.former)?);
    }
    let mut step = |sequences: &[Sequence]| -> Result<usize> {
        let micro_batches = micro_batches(sequences, training.micro_tokens);
        let report = learner.step(&micro_batches, RATE, &mut || ControlFlow::Continue(()))?;
        ensure!(report.outcome == Outcome::Applied, "a step did not stay finite");
        Ok(report.tokens)
    };
    step(&steps[0])?;
    let started = Instant::now();
    let mut learned_tokens = 0;
    for sequences in steps {
        learned_tokens += step(sequences)?;
    }
    let tokens = steps.iter().flatten().map(|sequence| sequence.tokens.len()).sum();
    Ok(Run { seconds: started.elapsed().as_secs_f64(), tokens, learned_tokens })
}

/// A step in parts of about `tokens` tokens, as the services take it.
pub(super) fn micro_batches(sequences: &[Sequence], tokens: usize) -> Vec<Vec<Sequence>> {
    let mut batches: Vec<Vec<Sequence>> = Vec::new();
    let mut filled = usize::MAX;
    for sequence in sequences {
        if filled.saturating_add(sequence.tokens.len()) > tokens {
            batches.push(Vec::new());
            filled = 0;
        }
        filled += sequence.tokens.len();
        if let Some(batch) = batches.last_mut() {
            batch.push(sequence.clone());
        }
    }
    batches
}

/// Floating-point operations that the update needs: for each token 4 for a weight of the base's blocks (forward, and
/// backward to what enters them) and 6 for one of the adapter; for each learned token 4 for a weight of the head. What
/// attention takes beside its projections is left out, so that the share of the ceiling is no exaggeration.
fn work(subject: &Subject, adapter: &Adapter, run: &Run) -> f64 {
    let config = subject.base.config();
    let head = (config.vocab_size * config.hidden_size) as f64;
    let embeddings = if config.tied { head } else { 2.0 * head };
    let blocks = config.parameter_count() as f64 - embeddings;
    let every = 4.0 * blocks + 6.0 * adapter.parameter_count() as f64;
    run.tokens as f64 * every + run.learned_tokens as f64 * 4.0 * head
}

/// The most memory that this process had at once, in bytes.
fn peak_rss_bytes() -> Result<u64> {
    // The system counts in bytes on a Mac, and in KiB elsewhere.
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    Ok(u64::try_from(getrusage(UsageWho::RUSAGE_SELF)?.max_rss())? * unit)
}

fn median(mut runs: Vec<Run>) -> Option<Run> {
    runs.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let middle = runs.len() / 2;
    (middle < runs.len()).then(|| runs.swap_remove(middle))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_cut_into_parts_that_hold_every_example_once() {
        let sequences: Vec<Sequence> = (0..10).map(|n| Sequence::whole(vec![n; 30])).collect();
        let parts = micro_batches(&sequences, 100);
        assert_eq!(parts.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 3, 1]);
        assert_eq!(parts.concat(), sequences);
    }

    #[test]
    fn the_median_is_the_middle_by_seconds() {
        let run = |seconds| Run { seconds, tokens: 1, learned_tokens: 1 };
        assert_eq!(median(vec![run(3.0), run(1.0), run(2.0)]).map(|run| run.seconds), Some(2.0));
        assert!(median(Vec::new()).is_none());
    }
}
