//! `engram bench update`: how fast the learner learns.

use super::subject::{Subject, SubjectArgs};
use super::tasks::Line;
use super::{report, resident};
use crate::topology;
use anyhow::{Context, Result, anyhow, ensure};
use clap::value_parser;
use kit::latents::Latents;
use model::guard::Former;
use model::latent;
use model::learner::{Learner, Outcome};
use model::llama::Base;
use model::lora::Adapter;
use model::pack::Sequence;
use model::pretrain::corpus;
use model::selftest;
use proto::{Content, ExampleId};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use train::{Known, Recall, Training};

const EXAMPLES: &str = "\
Examples:
  engram bench update
  engram bench update --base reference --examples 256 --replay 0
  engram bench update --data ./clinc150/banking/train.jsonl --json result.json
  engram bench update --base base-200m --examples 64 --set base.quantisation=nf4

One pass over the new examples and those rehearsed beside them, with the services' own learner: \
pack, forward, the former self's forward pass of rehearsed texts, backward, clip, AdamW; without \
anchors, further passes and the gate. A first step that sets things up is not counted. Texts are \
cut as the services cut them; without --data the tokens are random. With adapters in some layers \
only (--set train.top_layers=2), what is rehearsed enters above those below, as it was kept when \
it was new. The ceiling is a product of two square matrices, in the same run.";

/// Time that the ceiling is sought for.
const PEAK_TIME: Duration = Duration::from_millis(500);
/// The learning rate of what is measured: small enough to learn nothing of note, and not 0, so that every step does all of
/// its work.
pub const RATE: f64 = 1e-4;

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

/// What is learned.
pub(super) struct Work {
    /// New and rehearsed examples as they come, not sorted by length.
    steps: Vec<Vec<Sequence>>,
    /// Those of them that were learned before.
    rehearsed: Vec<Sequence>,
    /// Examples in a step.
    batch: usize,
}

impl Work {
    /// Examples in steps of `batch`. Those after the first `new` ones are rehearsed among them.
    pub fn new(mut sequences: Vec<Sequence>, new: usize, batch: usize) -> Self {
        rehearsed(&mut sequences[new..]);
        let rehearsed = sequences[new..].to_vec();
        sequences.shuffle(&mut ChaCha8Rng::seed_from_u64(1));
        Self { steps: sequences.chunks(batch).map(<[Sequence]>::to_vec).collect(), rehearsed, batch }
    }
}

/// One measurement.
pub(super) struct Run {
    /// Of one pass.
    pub seconds: f64,
    /// Tokens of all examples.
    pub tokens: usize,
    /// Those of them that counted.
    pub learned_tokens: usize,
}

/// Measures and reports.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    ensure!((0.0..1.0).contains(&args.replay), "--replay has to be from 0 to below 1");
    let subject = Subject::load(&args.subject)?;
    let new = usize::try_from(args.examples)?;
    let rehearsed = (new as f64 * args.replay / (1.0 - args.replay)).round() as usize;
    let sequences = match &args.data {
        Some(path) => of_text(path, &subject, new + rehearsed)?,
        None => random(&subject, new + rehearsed, usize::try_from(args.tokens)?)?,
    };
    let work = Work::new(sequences, new, usize::try_from(args.batch)?);
    let in_8_bits = subject.to_learn()?.has_codes();
    let peak = selftest::products(&subject.base.placement(), PEAK_TIME)?;
    let runs = (0..args.repeats).map(|_| measure(&subject, &work)).collect::<Result<Vec<Run>>>()?;
    let run = median(runs).context("nothing was measured")?;
    let adapter = adapter(&subject)?;
    let operations = operations(&subject, &adapter, &run, &work);
    let peak_rss = resident::peak()?;
    let gflops = operations / run.seconds / 1e9;
    let per_1000 = run.seconds * 1000.0 / new as f64;
    let figures = json!({
        "model": subject.json(), "products_in_8_bits": in_8_bits, "adapter_parameters": adapter.parameter_count(),
        "examples": new, "rehearsed": rehearsed, "batch": args.batch, "repeats": args.repeats,
        "data": args.data, "tokens": run.tokens, "learned_tokens": run.learned_tokens,
        "seconds": run.seconds, "seconds_per_1000_examples": per_1000,
        "tokens_per_s": run.tokens as f64 / run.seconds, "gflops": gflops,
        "matrix_peak_gflops": peak, "peak_rss_bytes": peak_rss, "settings": subject.settings,
    });
    report::store(args.subject.json.as_deref(), &figures)?;
    let products = if in_8_bits { ", learned on with products in 8 bits" } else { "" };
    writeln!(out, "{}{products}", subject.describe())?;
    writeln!(
        out,
        "{new} new examples and {rehearsed} rehearsed, {} tokens, {} of them learned, {} in a step",
        run.tokens, run.learned_tokens, args.batch
    )?;
    writeln!(out, "  {per_1000:8.2} s for 1,000 new examples")?;
    writeln!(out, "  {:8.0} tokens/s", run.tokens as f64 / run.seconds)?;
    let of_peak = if in_8_bits { " of the base's own precision" } else { "" };
    writeln!(out, "  {gflops:8.0} GFLOP/s of {peak:.0} in square products{of_peak}")?;
    writeln!(out, "  {:8.0} MB at the peak", peak_rss as f64 / 1e6)?;
    Ok(())
}

pub(super) fn adapter(subject: &Subject) -> Result<Adapter> {
    Adapter::new(topology::training(&subject.settings, subject.base.config())?.lora, subject.base.config(), 1)
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

/// As in the services: a rehearsed text is held to the former self, which costs a forward pass; an answer is not.
pub(super) fn rehearsed(sequences: &mut [Sequence]) {
    for sequence in sequences {
        sequence.rehearsed = sequence.learned.first().is_none_or(|&(from, _)| from == 0);
    }
}

/// What the services keep of hidden states below the adapter, on disk. That of what is rehearsed is there already: it
/// was new once.
fn known(subject: &Subject, folder: &Path, work: &Work, lowest: usize) -> Result<Known> {
    let latents = Latents::open(folder, subject.settings.train.latents_mb_max << 20)?;
    let recall = Recall::new(Arc::new(latents), "bench".into(), &[]);
    let ids = (0..).map(|ordinal| ExampleId { ordinal, chunk: 0 });
    let known = recall.of(work.steps.iter().flatten().map(|sequence| sequence.tokens.clone()).zip(ids));
    if lowest > 0 {
        for rehearsed in work.rehearsed.chunks(work.batch) {
            latent::fill(&subject.base, lowest, rehearsed, &known, subject.settings.train.row_tokens)?;
        }
    }
    Ok(known)
}

/// Times one pass, after a first step that does not count.
pub(super) fn measure(subject: &Subject, work: &Work) -> Result<Run> {
    let training = topology::training(&subject.settings, subject.base.config())?;
    let adapter = adapter(subject)?;
    let mut learner = learner(subject.to_learn()?, &adapter, &training)?;
    let folder = tempfile::tempdir().context("no folder for hidden states")?;
    let known = known(subject, folder.path(), work, adapter.lowest_layer())?;
    let step = |learner: &mut Learner, sequences: &[Sequence]| -> Result<usize> {
        let micro_batches = micro_batches(sequences, training.micro_tokens);
        let report = learner.step(&micro_batches, RATE, &mut || ControlFlow::Continue(()))?;
        ensure!(report.outcome == Outcome::Applied, "a step did not stay finite");
        Ok(report.tokens)
    };
    step(&mut learner, &work.steps[0])?;
    learner.remember_in(known);
    let started = Instant::now();
    let mut learned_tokens = 0;
    for sequences in &work.steps {
        learned_tokens += step(&mut learner, sequences)?;
    }
    let tokens = work.steps.iter().flatten().map(|sequence| sequence.tokens.len()).sum();
    Ok(Run { seconds: started.elapsed().as_secs_f64(), tokens, learned_tokens })
}

/// A learner that is held to its former self as the services' is from a lineage's second generation on.
pub(super) fn learner(base: Base, adapter: &Adapter, training: &Training) -> Result<Learner> {
    let mut learner = Learner::new(base, adapter, None, training.learner)?;
    if training.former.fresh > 0.0 || training.former.rehearsed > 0.0 {
        let former = Former::new(learner.base(), adapter, training.former)?;
        learner.hold_to(former);
    }
    Ok(learner)
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

/// Floating-point operations that the update needs: for each token 4 for a weight of the blocks that the adapter changes
/// (forward, and backward to what enters them), 2 for one below where that is not known, and 6 for one of the adapter;
/// for each learned token 4 for a weight of the head. What attention takes beside its projections and what a former self
/// takes is left out, so that the share of the ceiling is no exaggeration.
fn operations(subject: &Subject, adapter: &Adapter, run: &Run, work: &Work) -> f64 {
    let config = subject.base.config();
    let head = (config.vocab_size * config.hidden_size) as f64;
    let embeddings = if config.tied { head } else { 2.0 * head };
    let blocks = config.parameter_count() as f64 - embeddings;
    let below = blocks * adapter.lowest_layer() as f64 / config.layers as f64;
    let kept = subject.settings.train.latents_mb_max > 0;
    let known: usize = if kept { work.rehearsed.iter().map(|s| s.tokens.len()).sum() } else { 0 };
    let every = 4.0 * (blocks - below) + 6.0 * adapter.parameter_count() as f64;
    let tokens = run.tokens as f64;
    tokens * every + (tokens - known as f64) * 2.0 * below + run.learned_tokens as f64 * 4.0 * head
}

/// The middle one by seconds.
pub(super) fn median(mut runs: Vec<Run>) -> Option<Run> {
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
