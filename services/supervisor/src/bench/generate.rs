//! `engram bench generate`: how fast one answer is.

use super::report;
use super::subject::{Subject, SubjectArgs, median};
use super::together::ensure_fits;
use anyhow::{Context, Result};
use clap::value_parser;
use model::batch::{Adapted, Batch, NotBegun};
use model::sampling::Sampling;
use serde_json::json;
use std::io::Write;
use std::rc::Rc;
use std::time::Instant;

const EXAMPLES: &str = "\
Examples:
  engram bench generate
  engram bench generate --base reference --set base.threads=2 --json result.json
  engram bench generate --base reference --set base.quantisation=int8

One answer, the likeliest token each time, by the same passes that serve. prompt_tokens_per_s is the \
prompt over the time to the first token; decode_tokens_per_s the tokens after the first over theirs. \
Each is the median of the repeats, after one that does not count.";

/// What `engram bench generate` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    subject: SubjectArgs,
    /// Tokens of the prompt.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = value_parser!(u64).range(1..))]
    prompt_tokens: u64,
    /// Tokens to generate.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = value_parser!(u64).range(2..))]
    tokens: u64,
    /// Measurements, of which the median is told.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = value_parser!(u64).range(1..=1000))]
    repeats: u64,
}

/// Measures and reports.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let subject = Subject::load(&args.subject)?;
    let (prompt, tokens) = (usize::try_from(args.prompt_tokens)?, usize::try_from(args.tokens)?);
    ensure_fits(&subject, args.prompt_tokens.saturating_add(args.tokens))?;
    let mut batch = subject.batch(subject.settings.infer.cache_mb_max << 20)?;
    let (mut reading, mut decoding) = (Vec::new(), Vec::new());
    for seed in 0..=args.repeats {
        // Adapters anew each time, so that no prompt was read before.
        let adapted = batch.adapt(&[])?;
        let (read, decoded) = once(&mut batch, &adapted, &subject, &subject.prompt(prompt, seed), tokens)?;
        batch.forget(&adapted);
        if seed > 0 {
            reading.push(prompt as f64 / read);
            decoding.push((tokens - 1) as f64 / decoded);
        }
    }
    let figures = json!({
        "model": subject.json(),
        "prompt_tokens": prompt,
        "tokens": tokens,
        "repeats": args.repeats,
        "prompt_tokens_per_s": median(&reading),
        "decode_tokens_per_s": median(&decoding),
        "all": { "prompt_tokens_per_s": reading, "decode_tokens_per_s": decoding },
    });
    writeln!(out, "{}", subject.describe())?;
    writeln!(out, "prompt_tokens_per_s  {:.0}", median(&reading))?;
    writeln!(out, "decode_tokens_per_s  {:.1}", median(&decoding))?;
    report::store(args.subject.json.as_deref(), &figures)
}

/// Seconds to the first token, and from there to the last.
fn once(
    batch: &mut Batch,
    adapted: &Rc<Adapted>,
    subject: &Subject,
    prompt: &[u32],
    tokens: usize,
) -> Result<(f64, f64)> {
    let logit_bias = subject.endless().into_iter().map(|(id, bias)| (id, f64::from(bias))).collect();
    let sampling = Sampling { max_tokens: tokens, logit_bias, ..Sampling::default() };
    let started = Instant::now();
    let mut speaker = match batch.begin(adapted, &subject.language.tokenizer, prompt, sampling) {
        Ok(speaker) => speaker,
        Err(NotBegun::Refused(error)) => return Err(error),
        Err(NotBegun::TooLong(message)) => anyhow::bail!("{message}"),
        Err(NotBegun::Later) => anyhow::bail!("another answer is under way"),
    };
    let (mut first, mut made) = (None, 0);
    while made < tokens {
        let step = batch.step(&mut [&mut speaker]).pop().context("one step for one answer")??;
        if step.is_some() {
            made += 1;
            first.get_or_insert_with(|| started.elapsed().as_secs_f64());
        }
    }
    let first = first.context("no token was generated")?;
    let rest = started.elapsed().as_secs_f64() - first;
    batch.end(speaker);
    Ok((first, rest))
}
