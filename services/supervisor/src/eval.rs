//! `engram eval`: how well a base, or a base with an adapter, knows a file. Needs no server.

use crate::logits::ModelArgs;
use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use model::generate;
use model::llama::Base;
use model::lora::Adapter;
use model::loss;
use model::pack::Sequence;
use model::pretrain::corpus;
use model::sampling::Sampling;
use model::tokenizer::Tokenizer;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  engram eval --base ./stories --data medical_qa.val.txt
  engram eval --base ./stories --adapter ./medical --data medical_qa.val.txt --json
  engram eval --base ./stories --adapter ./intents --data test.jsonl
  engram eval --base HuggingFaceTB/SmolLM2-135M --data notes.txt

A text, whose documents end in a line <|endoftext|>, gives nll_per_token (nats), bits_per_byte and
tokens. Lines of {\"text\",\"label\"} give the accuracy with which the label is the likeliest of all
labels in the file; lines of {\"prompt\",\"response\"} the share that is answered exactly, and the
share that begins with the response (begins), since who learned a text goes on with it.";

/// Sequences that are scored between two looks at the progress bar.
const SEQUENCES_PER_ROUND: usize = 64;

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
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
}

/// A line of a task.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Item {
    Labelled { text: String, label: String },
    Answered { prompt: String, response: String },
}

/// Prints what the file scores.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let base_dir = args.model.base_dir()?;
    let (base, adapter) = args.model.load(&base_dir)?;
    let tokenizer = Tokenizer::load(&base_dir)?;
    tokenizer.check_vocabulary(base.config().vocab_size)?;
    let window = args.window.min(usize::try_from(base.config().max_positions)?);
    ensure!(window >= 2, "--window has to be at least 2 tokens");
    let judge = Judge { base, adapter, tokenizer, window };
    let figures = if args.data.extension().is_some_and(|extension| extension == "jsonl") {
        judge.task(&args.data)?
    } else {
        judge.text(&args.data)?
    };
    crate::status::show(&figures, args.json, out)
}

struct Judge {
    base: Base,
    adapter: Option<Adapter>,
    tokenizer: Tokenizer,
    window: usize,
}

impl Judge {
    /// Every token of each document and its end are predicted once, from what precedes them in the
    /// document, in windows that overlap by one token.
    fn text(&self, path: &Path) -> Result<Value> {
        let (mut windows, mut bytes) = (Vec::new(), 0);
        for document in corpus::documents(path)? {
            let document = document?;
            bytes += document.len();
            let ids = self.ended(self.start(&document)?);
            let starts = (0..ids.len().saturating_sub(1)).step_by(self.window - 1);
            windows.extend(
                starts.map(|start| Sequence::whole(ids[start..ids.len().min(start + self.window)].to_vec())),
            );
        }
        ensure!(bytes > 0, "{} holds no document", path.display());
        let scores = self.scores(&windows)?;
        let nll: f64 = scores.iter().map(|score| score.nll_sum).sum();
        let tokens: usize = scores.iter().map(|score| score.tokens).sum();
        Ok(json!({
            "nll_per_token": nll / tokens as f64,
            "bits_per_byte": nll / std::f64::consts::LN_2 / bytes as f64,
            "tokens": tokens,
        }))
    }

    fn task(&self, path: &Path) -> Result<Value> {
        let name = path.display();
        let text = fs::read_to_string(path).with_context(|| format!("{name} cannot be read"))?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let item = |(number, line)| {
            serde_json::from_str::<Item>(line).map_err(|_| {
                anyhow::anyhow!(
                    "{name}:{}: a line is {{\"text\",\"label\"}} or {{\"prompt\",\"response\"}}",
                    number + 1
                )
            })
        };
        let items: Vec<Item> = lines.map(item).collect::<Result<_>>()?;
        let labels: BTreeSet<&str> = items.iter().filter_map(Item::label).collect();
        let bar = bar(items.len());
        let (mut right, mut begins, mut asked) = (0, 0, 0);
        for item in &items {
            match item {
                Item::Labelled { text, label } => {
                    right += usize::from(self.likeliest(text, &labels)? == Some(label));
                }
                Item::Answered { prompt, response } => {
                    let answer = self.answer(prompt, response)?;
                    right += usize::from(answer == response.trim());
                    begins += usize::from(answer.starts_with(response.trim()));
                    asked += 1;
                }
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        ensure!(!items.is_empty(), "{name} holds no line");
        let mut figures = json!({ "accuracy": right as f64 / items.len() as f64, "examples": items.len() });
        if asked > 0 {
            figures["begins"] = json!(begins as f64 / asked as f64);
        }
        Ok(figures)
    }

    /// The label that is most likely to follow a text, as a whole and with its end.
    fn likeliest<'a>(&self, text: &str, labels: &BTreeSet<&'a str>) -> Result<Option<&'a str>> {
        let text = self.start(text)?;
        let sequence = |label: &&str| {
            let answer = self.ended(self.tokenizer.encode_continuation(&format!(" {label}"))?);
            let room =
                self.window.checked_sub(answer.len() + 1).context("a label is longer than --window")?;
            // The end of a long text is what the answer follows.
            let mut tokens = text[text.len().saturating_sub(room.max(1))..].to_vec();
            let from = u32::try_from(tokens.len())?;
            tokens.extend(answer);
            let learned = vec![(from, u32::try_from(tokens.len())?)];
            Ok(Sequence { tokens, learned })
        };
        let sequences: Vec<Sequence> = labels.iter().map(sequence).collect::<Result<_>>()?;
        let scores = loss::score(&self.base, &self.adapters(), &sequences, self.window)?;
        let best = labels.iter().zip(scores).min_by(|(_, a), (_, b)| a.nll_sum.total_cmp(&b.nll_sum));
        Ok(best.map(|(label, _)| *label))
    }

    /// The greedy answer, as long as `response` may be and its end.
    fn answer(&self, prompt: &str, response: &str) -> Result<String> {
        let wanted = response.trim();
        // Room for the answer and its end, in the unlikely case of a token for each byte of it.
        let sampling = Sampling { max_tokens: wanted.len() + 8, ..Sampling::default() };
        let ids = self.start(prompt)?;
        let room = self.window.saturating_sub(sampling.max_tokens).max(1);
        let ids = &ids[ids.len().saturating_sub(room)..];
        let answer = generate::generate(&self.base, &self.adapters(), &self.tokenizer, ids, sampling)?;
        Ok(answer.text.trim().to_owned())
    }

    fn adapters(&self) -> Vec<(&Adapter, f64)> {
        self.adapter.iter().map(|adapter| (adapter, 1.0)).collect()
    }

    fn scores(&self, sequences: &[Sequence]) -> Result<Vec<loss::SequenceScore>> {
        let bar = bar(sequences.len());
        let mut scores = Vec::with_capacity(sequences.len());
        for round in sequences.chunks(SEQUENCES_PER_ROUND) {
            scores.extend(loss::score(&self.base, &self.adapters(), round, self.window)?);
            bar.inc(round.len() as u64);
        }
        bar.finish_and_clear();
        if scores.iter().any(|score| !score.nll_sum.is_finite()) {
            bail!("the model's output is not finite: its weights are damaged");
        }
        Ok(scores)
    }

    /// A text from its start. Where the tokenizer puts nothing before it, the end of an earlier text
    /// stands there, so that the first token is predicted too.
    fn start(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.tokenizer.encode(text)?;
        if self.tokenizer.prefix().is_empty() {
            let before = self.tokenizer.bos().or_else(|| self.tokenizer.eos_ids().first().copied());
            ids.splice(0..0, before);
        }
        Ok(ids)
    }

    fn ended(&self, mut ids: Vec<u32>) -> Vec<u32> {
        ids.extend(self.tokenizer.eos_ids().first());
        ids
    }
}

impl Item {
    fn label(&self) -> Option<&str> {
        match self {
            Self::Labelled { label, .. } => Some(label),
            Self::Answered { .. } => None,
        }
    }
}

fn bar(length: usize) -> ProgressBar {
    let bar = ProgressBar::new(length as u64);
    match ProgressStyle::with_template("scoring {wide_bar} {pos}/{len} {eta}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
