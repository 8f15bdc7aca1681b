//! `engram bench memory`: what serving and learning take with one copy of the base.

use super::full_buffer::FullBuffer;
use super::meanwhile::Meanwhile;
use super::subject::{Subject, SubjectArgs};
use super::together::{Together, ensure_fits};
use super::{report, resident, update};
use crate::memory;
use anyhow::{Context, Result};
use clap::value_parser;
use kit::compute::Turn;
use kit::settings::Settings;
use model::cpu::PAGE_TOKENS;
use model::footprint::Footprint;
use serde_json::{Value, json};
use std::io::Write;
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  engram bench memory
  engram bench memory --base base-200m --set limits.memory_mb_max=2000 --json result.json
  engram bench memory --base base-100m --set base.quantisation=int8 --steps 1

Loads the base once, fills a replay buffer (replay.capacity examples, on disk in a temporary \
folder), takes learning steps with the services' micro-batches while half is rehearsed and held to \
the former self, answers until the cache of keys and values is full (infer.cache_mb_max), and does \
both at once. For each of these, the most that was resident meanwhile; what one leaves behind is \
still there in the next. On systems other than Linux the peak is that of all before, too. The \
estimate is what limits.memory_mb_max is compared with. Left out are the HTTP server, the ledger, \
the gate and the anchors.";

/// How often it is asked how far the learner is.
const GLANCE: Duration = Duration::from_millis(5);

/// What `engram bench memory` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    subject: SubjectArgs,
    /// Tokens of an example in the replay buffer.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = value_parser!(u64).range(2..=65536))]
    tokens: u64,
    /// Optimiser steps (of train.step_tokens tokens), alone and again beside answers.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = value_parser!(u64).range(1..=1000))]
    steps: u64,
    /// Answers at the same time, as far as the cache has room for them.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = value_parser!(u64).range(1..=1024))]
    streams: u64,
    /// Tokens of each prompt.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = value_parser!(u64).range(1..))]
    prompt_tokens: u64,
    /// Tokens of each answer.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = value_parser!(u64).range(2..))]
    answer_tokens: u64,
}

/// Measures and reports.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let mut phases = Phases::default();
    let mut subject = phases.measure("loading", || {
        let subject = Subject::load(&args.subject)?;
        ensure_fits(&subject, args.prompt_tokens.saturating_add(args.answer_tokens))?;
        Ok(subject)
    })?;
    let (config, placement) = (subject.base.config().clone(), subject.base.placement());
    // As the worker does: where memory is short, learning takes smaller micro-batches.
    let footprint = memory::settle(&mut subject.settings, &config, &placement)?;
    let (capacity, tokens) = (subject.settings.replay.capacity, usize::try_from(args.tokens)?);
    let vocabulary = u32::try_from(config.vocab_size)?;
    let buffer = phases
        .measure("replay buffer", || FullBuffer::new(&subject.settings, capacity, tokens, vocabulary))?;
    let learned = args.steps * subject.settings.train.step_tokens as u64;
    phases.measure("learning", || learn(&subject, learned))?;
    let answers = Answers::new(&subject, args)?;
    let mut together = phases.measure("answering", || answers.fill(&subject))?;
    let turn = Turn::new();
    phases.measure("both", || {
        let share = subject.settings.train.share_while_serving;
        let learning = Meanwhile::rehearsing(&subject, &turn, share)?;
        while learning.tokens() < learned && !learning.has_ended() {
            let _running = turn.enter();
            answers.round(&mut together)?;
        }
        learning.finish()
    })?;
    let adapter = update::adapter(&subject)?;
    let peak = phases.0.iter().map(|phase| phase.resident.peak).max().context("nothing was measured")?;
    let estimate = footprint.map(|footprint| footprint.total());
    let figures = json!({
        "model": subject.json(),
        "base_bytes": subject.base.bytes_len(),
        "adapter_parameters": adapter.parameter_count(),
        "adapter_bytes": adapter.to_bytes()?.len(),
        "replay_examples": buffer.len(),
        "replay_buffer_bytes": buffer.disk_bytes()?,
        "cache_bytes": answers.cache_bytes,
        "cached_tokens": together.kept_tokens(),
        "streams": answers.streams,
        "micro_tokens": subject.settings.train.micro_tokens,
        "estimate_bytes": estimate,
        "estimate": footprint.map(parts),
        "peak_rss_bytes": peak,
        "of_estimate": estimate.map(|estimate| peak as f64 / estimate),
        "phases": phases.json(),
        "settings": subject.settings,
    });
    report::store(args.subject.json.as_deref(), &figures)?;
    writeln!(out, "{}", subject.describe())?;
    tell(&figures, &phases, &subject.settings, out)
}

/// What the estimate is made of, in bytes.
fn parts(footprint: Footprint) -> Value {
    json!({ "base": footprint.base, "answering": footprint.answering, "learning": footprint.learning })
}

fn tell(figures: &Value, phases: &Phases, settings: &Settings, out: &mut dyn Write) -> Result<()> {
    let mb = |figure: &str| figures[figure].as_f64().unwrap_or(f64::NAN) / 1e6;
    writeln!(out, "  {:8.1} MB of base", mb("base_bytes"))?;
    writeln!(out, "  {:8.1} MB of adapter of rank {} on disk", mb("adapter_bytes"), settings.train.rank)?;
    let examples = &figures["replay_examples"];
    writeln!(out, "  {:8.1} MB of replay buffer on disk, {examples} examples", mb("replay_buffer_bytes"))?;
    for Phase { name, resident } in &phases.0 {
        writeln!(out, "  {:8.1} MB at the peak of {name}", resident.peak as f64 / 1e6)?;
    }
    writeln!(out, "  {:8.1} MB at the peak", mb("peak_rss_bytes"))?;
    match figures["of_estimate"].as_f64() {
        Some(share) => writeln!(out, "  {:8.1} MB estimated: {share:.2} of it taken", mb("estimate_bytes"))?,
        None => writeln!(out, "  not estimated for this device")?,
    }
    Ok(())
}

/// Learns so many tokens where nobody asks.
fn learn(subject: &Subject, tokens: u64) -> Result<()> {
    let learning = Meanwhile::rehearsing(subject, &Turn::new(), 1.0)?;
    while learning.tokens() < tokens && !learning.has_ended() {
        std::thread::sleep(GLANCE);
    }
    learning.finish()
}

/// What is asked.
struct Answers {
    cache_bytes: usize,
    streams: usize,
    prompt: usize,
    tokens: usize,
}

impl Answers {
    fn new(subject: &Subject, args: &Args) -> Result<Self> {
        let c = subject.base.config();
        let width = subject.base.placement().kind().elt_size_in_bytes();
        let bytes_a_token = usize::try_from(2 * c.layers * c.kv_heads * c.head_dim)? * width;
        let cache_bytes = subject.settings.infer.cache_mb_max << 20;
        let cache_tokens = cache_bytes / bytes_a_token;
        let (prompt, tokens) = (usize::try_from(args.prompt_tokens)?, usize::try_from(args.answer_tokens)?);
        Ok(Self {
            cache_bytes,
            streams: at_once(usize::try_from(args.streams)?, prompt + tokens, cache_tokens),
            prompt,
            tokens,
        })
    }

    /// Answers until no more is kept of what is answered: the cache is full, or the device keeps nothing.
    fn fill<'a>(&self, subject: &'a Subject) -> Result<Together<'a>> {
        let mut together = Together::new(subject, self.cache_bytes, 1)?;
        loop {
            let before = together.kept_tokens();
            self.round(&mut together)?;
            if together.kept_tokens() <= before {
                return Ok(together);
            }
        }
    }

    fn round(&self, together: &mut Together<'_>) -> Result<()> {
        together.answer(self.streams, self.prompt, self.tokens).map(drop)
    }
}

/// How many answers of so many tokens a cache has room for at once, at most `streams` and at least one. Each may leave a
/// part of its last page empty.
fn at_once(streams: usize, length: usize, cache_tokens: usize) -> usize {
    streams.min(cache_tokens / length.next_multiple_of(PAGE_TOKENS)).max(1)
}

/// What was resident while something was done.
struct Phase {
    name: &'static str,
    resident: resident::Resident,
}

#[derive(Default)]
struct Phases(Vec<Phase>);

impl Phases {
    fn measure<T>(&mut self, name: &'static str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        resident::restart();
        let done = work()?;
        self.0.push(Phase { name, resident: resident::resident()? });
        eprintln!("{name}: measured");
        Ok(done)
    }

    fn json(&self) -> Value {
        let phase = |phase: &Phase| {
            let resident = phase.resident;
            json!({ "name": phase.name, "peak_rss_bytes": resident.peak, "rss_bytes": resident.now })
        };
        self.0.iter().map(phase).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_are_asked_at_once_than_the_cache_has_room_for() {
        assert_eq!(at_once(16, 264, 100_000), 16);
        assert_eq!(at_once(16, 264, 1000), 3, "each takes 288");
        assert_eq!(at_once(16, 264, 100), 1, "whether it fits is for the cache to say");
    }

    #[test]
    fn a_phase_is_kept_with_what_was_resident_in_it() {
        let mut phases = Phases::default();
        let kept = phases.measure("filling", || Ok(vec![1_u8; 32 << 20])).expect("measured");
        assert!(phases.measure("failing", || anyhow::bail!("no")).map(|()| kept).is_err());
        let json = phases.json();
        assert_eq!(json.as_array().map(Vec::len), Some(1));
        assert!(json[0]["peak_rss_bytes"].as_u64().expect("a figure") > 32 << 20, "{json}");
    }
}
