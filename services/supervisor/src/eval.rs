//! `engram eval`: how well a base, or a base with an adapter, knows a file. Needs no server.

use crate::bench::tasks::{self, Line};
use crate::judge::{Judge, LabelBy, Respondent};
use crate::logits::ModelArgs;
use anyhow::{Result, ensure};
use model::lora::Adapter;
use model::pretrain::corpus;
use model::tokenizer::Tokenizer;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  engram eval --base ./stories --data medical_qa.val.txt
  engram eval --base ./stories --adapter ./medical --data medical_qa.val.txt --json
  engram eval --base ./stories --adapter ./intents --data test.jsonl
  engram eval --base HuggingFaceTB/SmolLM2-135M --data notes.txt

A text, whose documents end in a line <|endoftext|>, gives nll_per_token (nats), bits_per_byte and \
tokens. Lines of {\"text\",\"label\"} give the accuracy with which the label, on a line of its own \
after the text, is the likeliest of all labels in the file; lines of {\"prompt\",\"response\"} the \
share that is answered exactly, and the share that begins with the response (begins), since who learned a text goes on with it.";

/// What `engram eval` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// A text, or a file of JSON lines (.jsonl).
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Tokens that are seen together; as many as learning sees, unless the base takes fewer.
    #[arg(long, value_name = "TOKENS", default_value_t = 256)]
    window: usize,
    /// What makes a label the likeliest: its log-likelihood as a whole, or the mean of its tokens.
    #[arg(long, value_name = "RULE", default_value = "sum")]
    label_by: LabelBy,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
}

/// Prints what the file scores.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let base_dir = args.model.base_dir()?;
    let (base, adapter) = args.model.load(&base_dir)?;
    let judge = Judge::new(base, Tokenizer::load(&base_dir)?, args.window)?;
    let adapters: Vec<(&Adapter, f64)> = adapter.iter().map(|adapter| (adapter, 1.0)).collect();
    let figures = if args.data.extension().is_some_and(|extension| extension == "jsonl") {
        task(&judge, &Respondent { adapters, heads: Vec::new() }, &args.data, args.label_by)?
    } else {
        text(&judge, &adapters, &args.data)?
    };
    crate::status::show(&figures, args.json, out)
}

fn text(judge: &Judge, adapters: &[(&Adapter, f64)], path: &Path) -> Result<Value> {
    let documents: Vec<String> = corpus::documents(path)?.collect::<Result<_>>()?;
    ensure!(documents.iter().any(|d| !d.is_empty()), "{} holds no document", path.display());
    let likelihood = judge.text(adapters, &documents)?;
    Ok(json!({
        "nll_per_token": likelihood.nll_per_token(),
        "bits_per_byte": likelihood.bits_per_byte(),
        "tokens": likelihood.tokens,
    }))
}

fn task(judge: &Judge, respondent: &Respondent<'_>, path: &Path, by: LabelBy) -> Result<Value> {
    let lines = tasks::lines(path)?;
    let labels: BTreeSet<&str> = lines.iter().filter_map(Line::label).collect();
    let labels: Vec<&str> = labels.into_iter().collect();
    let (mut texts, mut truths) = (Vec::new(), Vec::new());
    let (mut right, mut begins, mut asked) = (0, 0, 0);
    for line in &lines {
        match line {
            Line::Labelled { text, label } => {
                texts.push(text);
                truths.push(label);
            }
            Line::Answered { prompt, response } => {
                let answer = judge.answer(respondent, prompt, response)?;
                right += usize::from(answer == response.trim());
                begins += usize::from(answer.starts_with(response.trim()));
                asked += 1;
            }
        }
    }
    if !texts.is_empty() {
        let all = [(0..labels.len()).collect()];
        let chosen = judge.likeliest(respondent, &texts, &labels, &all, by)?;
        right +=
            chosen.iter().zip(truths).filter(|(chosen, truth)| labels[chosen[0]] == truth.as_str()).count();
    }
    let mut figures = json!({ "accuracy": right as f64 / lines.len() as f64, "examples": lines.len() });
    if asked > 0 {
        figures["begins"] = json!(begins as f64 / asked as f64);
    }
    Ok(figures)
}
