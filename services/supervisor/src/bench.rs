//! `engram bench`: what the program is worth, measured on its own services.

mod bag_of_words;
mod full_buffer;
mod generate;
mod growth;
mod heatmap;
mod meanwhile;
mod memory;
mod method;
mod panel;
mod quality;
mod report;
mod resident;
mod retention;
mod scores;
mod serve;
mod subject;
mod system;
pub mod tasks;
mod together;
mod update;

use crate::child::become_like_a_worker;
use anyhow::Result;
use clap::Subcommand;
use std::io::Write;

const EXAMPLES: &str = "\
Examples:
  engram bench retention --tasks ./clinc150 --seeds 3 --json result.json
  engram bench quality --data ./clinc150 --json result.json
  engram bench update --base reference --examples 256
  engram bench generate --base reference
  engram bench serve --base reference --streams 16 --adapters 8
  engram bench memory --base reference
  engram bench growth --svg ./curves";

/// What `engram bench` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Learn tasks one after another, and measure what is learned and what is forgotten.
    Retention(retention::Args),
    /// Learn labelled examples, and measure how often the right label is given, beside a bag of words.
    Quality(quality::Args),
    /// Time the learner: seconds for 1,000 new examples, tokens a second, share of the ceiling, memory.
    Update(update::Args),
    /// Measure how fast a prompt is read and one answer decoded.
    Generate(generate::Args),
    /// Measure how fast many answers are decoded at once, over several adapters, and while something is learned.
    Serve(serve::Args),
    /// Measure the memory of serving and learning with one copy of the base, beside what is estimated.
    Memory(memory::Args),
    /// Time what grows with examples, memory, adapters, the base and documents, and tell how fast it grows.
    Growth(growth::Args),
}

/// Runs the benchmark that is asked for.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    become_like_a_worker()?;
    match &args.bench {
        Bench::Retention(args) => retention::run(args, out),
        Bench::Quality(args) => quality::run(args, out),
        Bench::Update(args) => update::run(args, out),
        Bench::Generate(args) => generate::run(args, out),
        Bench::Serve(args) => serve::run(args, out),
        Bench::Memory(args) => memory::run(args, out),
        Bench::Growth(args) => growth::run(args, out),
    }
}
