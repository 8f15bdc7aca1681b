//! `engram documents`: what became of what was submitted.

use crate::client::{Client, ServerArgs, segment};
use crate::status::{plain, show, table};
use anyhow::Result;
use serde_json::Value;
use std::io::Write;

const EXAMPLES: &str = "\
Examples:
  engram documents list --domain python --limit 20
  engram documents list --says 'under the third flower pot'     where an answer comes from
  engram documents show 5e3f5a0c62d1b3a9 --content
  engram documents forget 5e3f5a0c62d1b3a9     out of the ledger, the model, everything";

/// What `engram documents` takes.
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
    /// List documents, the newest first.
    List {
        /// Only those of this domain.
        #[arg(long)]
        domain: Option<String>,
        /// Only those that say this, whatever its case and white space.
        #[arg(long, value_name = "TEXT")]
        says: Option<String>,
        /// So many at most.
        #[arg(long, default_value_t = 50)]
        limit: u32,
        /// Only those older than this one.
        #[arg(long, value_name = "ID")]
        before: Option<String>,
    },
    /// Show all that happened to a document.
    Show {
        /// Its id.
        id: String,
        /// Also print what it says.
        #[arg(long)]
        content: bool,
    },
    /// Remove a document and all that was derived from it.
    Forget {
        /// Its id.
        id: String,
    },
}

/// Lists, shows or forgets.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let client = Client::new(&args.server)?;
    match &args.command {
        Command::List { domain, says, limit, before } => {
            let mut path = format!("/v1/documents?limit={limit}");
            for (name, value) in [("domain", domain), ("says", says), ("before", before)] {
                if let Some(value) = value {
                    path.push_str(&format!("&{name}={}", segment(value)));
                }
            }
            let answer = client.get(&path)?;
            if args.json {
                return show(&answer, true, out);
            }
            let rows = answer["documents"].as_array().cloned().unwrap_or_default();
            table(&["id", "status", "domain", "generation", "reason"], &rows, out)
        }
        Command::Show { id, content } => {
            let answer = client.get(&format!("/v1/documents/{}?content={content}", segment(id)))?;
            if args.json {
                return show(&answer, true, out);
            }
            trail(&answer, out)?;
            said(&answer["content"], out)
        }
        Command::Forget { id } => {
            show(&client.delete(&format!("/v1/documents/{}", segment(id)))?, args.json, out)
        }
    }
}

fn trail(document: &Value, out: &mut dyn Write) -> Result<()> {
    for name in ["id", "status", "domain", "source", "derived_from", "generation", "reason", "held_out"] {
        if let Some(value) = document.get(name) {
            writeln!(out, "{name:12}  {}", plain(value))?;
        }
    }
    let entries = document["trail"].as_array().map(Vec::as_slice).unwrap_or_default();
    let start = entries.first().and_then(|entry| entry["at_ms"].as_u64()).unwrap_or(0);
    for entry in entries {
        let after_ms = entry["at_ms"].as_u64().unwrap_or(start).saturating_sub(start);
        let detail = entry["detail"].as_str().unwrap_or_default();
        let event = plain(&entry["event"]);
        writeln!(out, "  +{:>9.3} s  {event:10}  {detail}", after_ms as f64 / 1000.0)?;
    }
    Ok(())
}

/// What a document says: a text, a prompt with its completion, or messages.
fn said(content: &Value, out: &mut dyn Write) -> Result<()> {
    if let Some(text) = content["text"].as_str() {
        writeln!(out, "\n{text}")?;
    }
    for name in ["prompt", "completion"] {
        if let Some(text) = content[name].as_str() {
            writeln!(out, "{name:12}  {text}")?;
        }
    }
    for message in content["messages"].as_array().into_iter().flatten() {
        writeln!(out, "{:12}  {}", plain(&message["role"]), plain(&message["content"]))?;
    }
    Ok(())
}
