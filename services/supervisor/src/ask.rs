//! `engram generate`: a running server continues a prompt.

use crate::client::{Client, ServerArgs};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::io::{Read, Write};

const EXAMPLES: &str = "\
Examples:
  engram generate 'Where is the spare key?'
  engram generate 'def add(a, b):' --model python --max-tokens 64 --temperature 0
  engram generate --model 'python:0.7+medical:0.3' --seed 7 'Once'
  engram generate - < prompt.txt";

/// What shapes an answer.
#[derive(Debug, Clone, clap::Args)]
pub struct SamplingArgs {
    /// Who answers: `auto` (chosen from the prompt), `base`, a domain, or domains joined by `+`.
    #[arg(long, default_value = "auto")]
    pub model: String,
    /// Tokens to answer with at most.
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: u32,
    /// 0 takes the most likely token each time.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,
    /// Equal seeds give equal answers.
    #[arg(long)]
    seed: Option<u64>,
    /// Text that ends the answer; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

impl SamplingArgs {
    /// The request, but for its prompt.
    pub fn request(&self, stream: bool) -> Value {
        let mut request = json!({
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": stream,
        });
        if let Some(seed) = self.seed {
            request["seed"] = json!(seed);
        }
        if !self.stop.is_empty() {
            request["stop"] = json!(self.stop);
        }
        request
    }
}

/// What `engram generate` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The text to continue; `-` reads it from standard input.
    #[arg(allow_hyphen_values = true)]
    prompt: String,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Print the whole answer as JSON instead of streaming its text.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// Prints the continuation while it comes.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let client = Client::new(&args.server)?;
    let mut prompt = args.prompt.clone();
    if prompt == "-" {
        prompt.clear();
        std::io::stdin().read_to_string(&mut prompt).context("standard input is not UTF-8 text")?;
    }
    let mut request = args.sampling.request(!args.json);
    request["prompt"] = json!(prompt);
    if args.json {
        writeln!(out, "{:#}", client.post("/v1/completions", &request)?)?;
        return Ok(());
    }
    client.stream("/v1/completions", &request, |event| {
        out.write_all(event["choices"][0]["text"].as_str().unwrap_or_default().as_bytes())?;
        Ok(out.flush()?)
    })?;
    Ok(writeln!(out)?)
}
