//! `engram bench growth`: how fast what is waited for grows with what there is.

mod curve;
mod measure;
mod words;

use super::report;
use super::subject::{Subject, SubjectArgs};
use anyhow::{Context, Result};
use clap::{ValueEnum, value_parser};
use curve::Curve;
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  engram bench growth
  engram bench growth --svg ./curves --json result.json
  engram bench growth --curves examples --examples 256,1024,4096 --tokens 64 --repeats 3
  engram bench growth --curves models --models nano,reference,base-100m,base-200m
  TMPDIR=/disk engram bench growth --curves intake --documents 1000,10000,100000

Each curve is a cost at several sizes; its exponent is the slope of the logarithm of the cost over \
that of the size, and what is expected at most stands beside it. Above that, something grows \
faster than it should; a fixed part makes it smaller.
  examples   a pass over new examples and as many rehearsed ones, as in bench update
  rehearsal  the replay buffer: to draw 64 examples, take in 64 where it is full, and its digest
  adapters   to choose adapters for a prompt, and to decode a token of 16 answers over them
  updates    from a document to its update, by the domains that have an adapter
  models     1,000 tokens learned on bases of other sizes, random ones but for nano
  intake     100 documents into the ledger, in the folder for temporary files";

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    Examples,
    Rehearsal,
    Adapters,
    Updates,
    Models,
    Intake,
}

/// What `engram bench growth` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    subject: SubjectArgs,
    /// What to measure, several with commas.
    #[arg(
        long,
        value_enum,
        value_name = "CURVE,..",
        default_value = "examples,rehearsal,adapters,updates,models,intake",
        value_delimiter = ','
    )]
    curves: Vec<Part>,
    /// New examples in an update.
    #[arg(long, value_name = "N,..", default_value = "64,128,256,512,1024", value_delimiter = ',', value_parser = value_parser!(u64).range(1..))]
    examples: Vec<u64>,
    /// Examples that are kept for rehearsal.
    #[arg(long, value_name = "N,..", default_value = "100,1000,10000", value_delimiter = ',', value_parser = value_parser!(u64).range(1..=1_000_000))]
    kept: Vec<u64>,
    /// Domains that `auto` chooses from, and that have an adapter beside the one that learns.
    #[arg(long, value_name = "N,..", default_value = "1,4,16,64", value_delimiter = ',', value_parser = value_parser!(u64).range(1..=10_000))]
    domains: Vec<u64>,
    /// Adapters that 16 answers are spread over.
    #[arg(long, value_name = "N,..", default_value = "1,2,4,8,16", value_delimiter = ',', value_parser = value_parser!(u64).range(1..=16))]
    adapters: Vec<u64>,
    /// Bases, as --base takes them.
    #[arg(long, value_name = "NAME,..", default_value = "nano,reference,base-100m", value_delimiter = ',')]
    models: Vec<String>,
    /// Documents in the ledger.
    #[arg(long, value_name = "N,..", default_value = "500,1000,2000,5000,10000", value_delimiter = ',', value_parser = value_parser!(u64).range(1..))]
    documents: Vec<u64>,
    /// Random tokens in an example.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = value_parser!(u64).range(2..=65536))]
    tokens: u64,
    /// Times that each update is measured; the median counts.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u64).range(1..=100))]
    repeats: u64,
    /// Draw each curve as an SVG in this folder.
    #[arg(long, value_name = "FOLDER")]
    svg: Option<PathBuf>,
}

/// Measures and reports.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    if let Some(folder) = &args.svg {
        fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    }
    let subject = Subject::load(&args.subject)?;
    let mut curves = Vec::new();
    for part in Part::value_variants().iter().filter(|part| args.curves.contains(part)) {
        curves.extend(measured(*part, args, &subject)?);
    }
    if let Some(folder) = &args.svg {
        curves.iter().try_for_each(|curve| curve.draw(folder))?;
    }
    let rows: Vec<Value> = curves.iter().map(Curve::json).collect();
    writeln!(out, "{}", subject.describe())?;
    let columns =
        ["curve", "grows", "from", "to", "takes", "took_first", "took_last", "exponent", "expected"];
    crate::status::table(&columns, &rows, out)?;
    let figures = json!({
        "model": subject.json(),
        "tokens": args.tokens,
        "repeats": args.repeats,
        "curves": rows,
        "settings": subject.settings,
    });
    report::store(args.subject.json.as_deref(), &figures)
}

fn measured(part: Part, args: &Args, subject: &Subject) -> Result<Vec<Curve>> {
    let tokens = usize::try_from(args.tokens)?;
    Ok(match part {
        Part::Examples => {
            vec![measure::examples(subject, &ascending(&args.examples), tokens, args.repeats)?]
        }
        Part::Rehearsal => measure::rehearsal(subject, &ascending(&args.kept), tokens)?,
        Part::Adapters => vec![
            measure::routing(subject, &ascending(&args.domains))?,
            measure::adapters(subject, &ascending(&args.adapters))?,
        ],
        Part::Updates => measure::updates(subject, &ascending(&args.domains))?.into_iter().collect(),
        Part::Models => vec![measure::models(&args.subject, &args.models, tokens, args.repeats)?],
        Part::Intake => vec![measure::intake(&ascending(&args.documents))?],
    })
}

/// From the smallest, each once: what is measured last has what came before in it.
fn ascending(sizes: &[u64]) -> Vec<u64> {
    let mut sizes = sizes.to_vec();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_measured_from_the_smallest_and_once() {
        assert_eq!(ascending(&[100, 10, 100, 1]), [1, 10, 100]);
    }
}
