//! `engram adapters`: what was learned, as versions that can be inspected, undone and exchanged.

mod folder;
mod history;

use crate::client::{Client, ServerArgs, segment};
use crate::status::{show, table};
use anyhow::Result;
use folder::Merged;
use serde_json::{Value, json};
use std::io::Write;
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  engram adapters list
  engram adapters log medical                    each generation, with its retention receipt
  engram adapters log medical --oneline
  engram adapters diff medical@3d63e485a58f8654 medical    what was learned between the two
  engram adapters rollback medical               serve the generation before the current one
  engram adapters export medical --out medical/  a folder that PEFT, vLLM and others load
  engram adapters export medical --merged --out whole/     base and adapter in one, for any program
  engram adapters import medical/ --domain medical
  engram adapters merge medical:0.7 law:0.3 --into forensics --method ties";

/// What `engram adapters` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    /// Print the answer as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List the domains with what each of them serves.
    List,
    /// Show the generations of a domain.
    Log {
        /// The domain.
        domain: String,
        /// A line each.
        #[arg(long)]
        oneline: bool,
    },
    /// Show what one generation has learned that another has not, and how far apart their weights are.
    Diff {
        /// The one: a domain for its current generation, or DOMAIN@GENERATION.
        #[arg(value_name = "DOMAIN[@GENERATION]")]
        a: String,
        /// The other.
        #[arg(value_name = "DOMAIN[@GENERATION]")]
        b: String,
        /// The base they belong to, by whose shape their weights are compared.
        #[arg(long, value_name = "NAME|DIR|ORG/NAME", default_value = crate::base::BUILT_IN)]
        base: String,
    },
    /// Serve an older generation of a domain.
    Rollback {
        /// The domain.
        domain: String,
        /// The generation; the parent of the current one, if none is given.
        #[arg(long, value_name = "GENERATION")]
        to: Option<String>,
    },
    /// Write a generation to a folder, in the PEFT format; or with its base, as a whole model.
    ///
    /// Short answers are counted and remembered beside the adapter, and do not go along; with train.repeat_counted the adapter
    /// learns them by itself too.
    Export {
        /// The domain.
        domain: String,
        /// The folder; it is made if it is not there.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// The generation; the current one, if none is given.
        #[arg(long)]
        generation: Option<String>,
        #[command(flatten)]
        merged: Merged,
    },
    /// Serve an adapter that was made elsewhere, from a folder in the PEFT format.
    Import {
        /// The folder.
        dir: PathBuf,
        /// The domain.
        #[arg(long)]
        domain: String,
    },
    /// Make one adapter of several, and serve it.
    Merge {
        /// What is merged: domains with weights, such as medical:0.7 or law@GENERATION:0.3.
        #[arg(required = true, value_name = "DOMAIN[:WEIGHT]")]
        from: Vec<String>,
        /// The domain that gets it.
        #[arg(long, value_name = "DOMAIN")]
        into: String,
        /// linear (the sum, exactly; ranks add up), svd (the sum at a lower rank), ties or dare.
        #[arg(long, default_value = "linear")]
        method: String,
        /// Rank of the result, for svd, ties and dare; the largest among what is merged, if none is given.
        #[arg(long)]
        rank: Option<u32>,
        /// Share of the changes that ties and dare keep; 0.5, if none is given.
        #[arg(long)]
        density: Option<f32>,
        /// Seed of what dare drops.
        #[arg(long, default_value_t = 0)]
        seed: u32,
    },
}

/// Lists, inspects, rolls back, exports, imports or merges.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let client = Client::new(&args.server)?;
    let path = |domain: &str, action: &str| format!("/v1/adapters/{}/{action}", segment(domain));
    match &args.command {
        Command::List => list(&client.get("/v1/adapters")?, args.json, out),
        Command::Log { domain, oneline } => {
            history::log(&client.get(&path(domain, "log"))?, *oneline, args.json, out)
        }
        Command::Diff { a, b, base } => {
            history::diff(&client, (a.as_str(), b.as_str()), base, args.json, out)
        }
        Command::Rollback { domain, to } => {
            let body = to.as_ref().map_or_else(|| json!({}), |to| json!({ "to": to }));
            show(&client.post(&path(domain, "rollback"), &body)?, args.json, out)
        }
        Command::Export { domain, out: dir, generation, merged } => {
            let adapter = folder::fetch(&client, domain, generation.as_deref())?;
            if merged.merged {
                merged.write(&client, &adapter, dir)?
            } else {
                folder::save(&adapter, dir)?
            }
            writeln!(out, "{}", dir.display())?;
            // It is written, whether this can be told or not.
            let log = client.get(&path(domain, "log")).ok();
            if let Some(beside) = log.and_then(|log| history::left_behind(&log, generation.as_deref())) {
                eprintln!("engram: {beside}");
            }
            Ok(())
        }
        Command::Import { dir, domain } => {
            show(&client.post(&path(domain, "import"), &folder::load(dir)?)?, args.json, out)
        }
        Command::Merge { from, into, method, rank, density, seed } => {
            let mut body = json!({"from": from.join("+"), "method": method, "seed": seed});
            if let Some(rank) = rank {
                body["rank"] = json!(rank);
            }
            if let Some(density) = density {
                body["density"] = json!(density);
            }
            show(&client.post(&path(into, "merge"), &body)?, args.json, out)
        }
    }
}

fn list(answer: &Value, json: bool, out: &mut dyn Write) -> Result<()> {
    match answer["adapters"].as_array() {
        Some(rows) if !json => table(&["domain", "generation", "documents"], rows, out),
        _ => show(answer, json, out),
    }
}
