//! `engram adapters`: what was learned, as versions that can be inspected, undone and exchanged.

use crate::client::{Client, ServerArgs, segment};
use crate::status::{plain, show, table};
use anyhow::{Context, Result, anyhow};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";

const EXAMPLES: &str = "\
Examples:
  engram adapters list
  engram adapters log medical                    each generation, with its retention receipt
  engram adapters rollback medical               serve the generation before the current one
  engram adapters export medical --out medical/  a folder that PEFT, vLLM and others load
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
    },
    /// Serve an older generation of a domain.
    Rollback {
        /// The domain.
        domain: String,
        /// The generation; the parent of the current one, if none is given.
        #[arg(long, value_name = "GENERATION")]
        to: Option<String>,
    },
    /// Write a generation to a folder, in the PEFT format.
    Export {
        /// The domain.
        domain: String,
        /// The folder; it is made if it is not there.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// The generation; the current one, if none is given.
        #[arg(long)]
        generation: Option<String>,
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
        Command::Log { domain } => log(&client.get(&path(domain, "log"))?, args.json, out),
        Command::Rollback { domain, to } => {
            let body = to.as_ref().map_or_else(|| json!({}), |to| json!({ "to": to }));
            show(&client.post(&path(domain, "rollback"), &body)?, args.json, out)
        }
        Command::Export { domain, out: dir, generation } => {
            let query = generation.as_ref().map(|id| format!("?generation={}", segment(id)));
            let answer = client.get(&(path(domain, "export") + &query.unwrap_or_default()))?;
            save(&answer, dir)?;
            writeln!(out, "{}", dir.display())?;
            Ok(())
        }
        Command::Import { dir, domain } => {
            show(&client.post(&path(domain, "import"), &load(dir)?)?, args.json, out)
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

/// Each generation with what it learned, and with its retention receipt: by how much the loss on what
/// was known before has risen.
fn log(answer: &Value, json: bool, out: &mut dyn Write) -> Result<()> {
    let generations = match answer["generations"].as_array() {
        Some(generations) if !json => generations,
        _ => return show(answer, json, out),
    };
    for generation in generations {
        let (report, of) = (&generation["report"], |name: &str| plain(&generation[name]));
        let live = if generation["live"] == true { "  live" } else { "" };
        writeln!(out, "{}  {} documents{live}", of("generation"), of("documents"))?;
        let [first, last, steps, seconds] =
            ["first_loss", "last_loss", "steps", "seconds"].map(|name| plain(&report[name]));
        writeln!(out, "  learning   {first} to {last} nats a token, {steps} steps, {seconds} s")?;
        let probes = generation["receipt"]["probes"].as_array().map(Vec::as_slice).unwrap_or_default();
        for probe in probes.iter().filter(|probe| probe["measure"]["examples"] != 0) {
            let [best, after, examples] =
                ["best", "after", "examples"].map(|name| plain(&probe["measure"][name]));
            writeln!(
                out,
                "  {:9}  {best} to {after} nats a token, {examples} examples",
                plain(&probe["probe"])
            )?;
        }
    }
    Ok(())
}

fn save(answer: &Value, dir: &Path) -> Result<()> {
    let weights = answer["adapter_model"].as_str().unwrap_or_default();
    let weights =
        STANDARD.decode(weights).map_err(|error| anyhow!("the server's export is damaged: {error}"))?;
    let write = |name: &str, bytes: &[u8]| {
        let file = dir.join(name);
        fs::write(&file, bytes).with_context(|| format!("{} cannot be written", file.display()))
    };
    fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
    write(CONFIG_FILE, format!("{:#}\n", answer["adapter_config"]).as_bytes())?;
    write(WEIGHTS_FILE, &weights)
}

fn load(dir: &Path) -> Result<Value> {
    let read = |name: &str| {
        let file = dir.join(name);
        fs::read(&file).with_context(|| {
            format!(
                "{} cannot be read; an adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}",
                file.display()
            )
        })
    };
    let config: Value = serde_json::from_slice(&read(CONFIG_FILE)?)
        .with_context(|| format!("{} is not JSON", dir.join(CONFIG_FILE).display()))?;
    Ok(json!({ "adapter_config": config, "adapter_model": STANDARD.encode(read(WEIGHTS_FILE)?) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_what_is_loaded() {
        let folder = tempfile::tempdir().expect("a folder");
        let adapter = json!({"adapter_config": {"r": 16}, "adapter_model": STANDARD.encode([0, 159, 255])});
        let dir = folder.path().join("deep/adapter");
        save(&adapter, &dir).expect("saved");
        assert_eq!(load(&dir).expect("loaded"), adapter);
    }

    #[test]
    fn a_folder_without_an_adapter_is_told_what_it_lacks() {
        let folder = tempfile::tempdir().expect("a folder");
        let error = format!("{:#}", load(folder.path()).expect_err("empty"));
        assert!(error.contains(CONFIG_FILE) && error.contains(WEIGHTS_FILE), "{error}");
    }
}
