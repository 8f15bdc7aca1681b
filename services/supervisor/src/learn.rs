//! `engram learn`: files and folders to a running server.

use crate::client::{Client, Refused, ServerArgs, segment};
use crate::corpus::{self, Draft, SourceFile};
use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  engram learn facts.jsonl --wait               lines of one document a line
  engram learn docs/ src/ --domain project      text and source code, as deep as it goes
  engram learn key.txt --importance 1.0         the last to be forgotten, should room run out
  echo 'The key is under the pot.' | engram learn -";

/// Documents a request may hold.
const BATCH_DOCUMENTS_MAX: usize = 100;
/// A request may hold 1 MiB; the rest is room for its frame, bytes.
const BATCH_BYTES_MAX: usize = (1 << 20) - 4096;
/// How long a full or restarting server is waited for.
const PATIENCE: Duration = Duration::from_secs(600);
const POLL_PAUSE: Duration = Duration::from_millis(250);

/// What `engram learn` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Files and folders; `-` is standard input.
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// The body of knowledge they belong to; each domain has its own adapter.
    #[arg(long)]
    domain: Option<String>,
    /// How much it matters that this stays, 0 to 1.
    #[arg(long, value_name = "X")]
    importance: Option<f32>,
    /// Return only when everything is learned and served.
    #[arg(long)]
    wait: bool,
    /// Print one JSON object for each document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// A document that the server has taken.
struct Sent {
    place: String,
    answer: Value,
}

/// Sends the documents, and with `--wait` follows each until it is settled.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    if args.importance.is_some_and(|importance| !(0.0..=1.0).contains(&importance)) {
        bail!("--importance is a number from 0 to 1");
    }
    let files = corpus::files(&args.paths)?;
    let client = Client::new(&args.server)?.patient(PATIENCE);
    // Asked first, so that a server that is not there is told before the files are read.
    client.get("/v1/status")?;
    let mut sending =
        Sending { client: &client, batch: Vec::new(), bytes: 0, sent: Vec::new(), unusable: Vec::new() };
    sending.files(args, &files)?;
    let Sending { mut sent, unusable, .. } = sending;
    if args.wait {
        follow(&client, &mut sent)?;
    }
    report(args, &sent, out)?;
    for error in &unusable {
        eprintln!("engram: skipped: {error:#}");
    }
    if sent.is_empty() && unusable.is_empty() {
        bail!("there was nothing to learn in what was named");
    }
    if !unusable.is_empty() {
        bail!("{} of {} could not be used, as told above", unusable.len(), unusable.len() + sent.len());
    }
    if args.wait && !sent.iter().any(|sent| ["live", "probe"].contains(&status_of(&sent.answer))) {
        bail!("nothing of it was learned, for the reasons above");
    }
    Ok(())
}

fn with_flags(args: &Args, mut draft: Draft) -> Draft {
    if let Some(domain) = &args.domain {
        draft.body.insert("domain".into(), json!(domain));
    }
    if let Some(importance) = args.importance {
        draft.body.insert("importance".into(), json!(importance));
    }
    draft
}

/// Documents on their way, in batches.
struct Sending<'a> {
    client: &'a Client,
    batch: Vec<Draft>,
    bytes: usize,
    sent: Vec<Sent>,
    unusable: Vec<anyhow::Error>,
}

impl Sending<'_> {
    fn files(&mut self, args: &Args, files: &[SourceFile]) -> Result<()> {
        let bar = bar(files.len(), "sending");
        for file in files {
            bar.set_message(file.name().to_owned());
            for draft in file.documents().unwrap_or_else(|error| vec![Err(error)]) {
                match draft {
                    Ok(draft) => self.push(with_flags(args, draft))?,
                    Err(error) => self.unusable.push(error),
                }
            }
            bar.inc(1);
        }
        self.post()?;
        bar.finish_and_clear();
        Ok(())
    }

    fn push(&mut self, draft: Draft) -> Result<()> {
        let size = size_of(&draft);
        if self.batch.len() == BATCH_DOCUMENTS_MAX || self.bytes + size > BATCH_BYTES_MAX {
            self.post()?;
        }
        self.bytes += size;
        self.batch.push(draft);
        Ok(())
    }

    /// Sends the batch. The server takes it whole or not at all: a document that it names as the
    /// reason is left out, and the rest goes again. That is harmless even when the answer was lost,
    /// because a document's id is the hash of what it says.
    fn post(&mut self) -> Result<()> {
        self.bytes = 0;
        let mut batch = std::mem::take(&mut self.batch);
        while !batch.is_empty() {
            let bodies: Vec<&Map<String, Value>> = batch.iter().map(|draft| &draft.body).collect();
            match self.client.post("/v1/documents", &json!({ "documents": bodies })) {
                Ok(answer) => return self.taken(batch, &answer),
                Err(error) => match offender(&error).filter(|place| *place < batch.len()) {
                    Some(place) => self.unusable.push(error.context(batch.remove(place).place)),
                    None => return Err(error),
                },
            }
        }
        Ok(())
    }

    fn taken(&mut self, batch: Vec<Draft>, answer: &Value) -> Result<()> {
        let answers = answer["documents"].as_array().cloned().unwrap_or_default();
        if answers.len() != batch.len() {
            bail!("the server took {} documents of {}; is --server an Engram?", answers.len(), batch.len());
        }
        let pairs = batch.into_iter().zip(answers);
        self.sent.extend(pairs.map(|(draft, answer)| Sent { place: draft.place, answer }));
        Ok(())
    }
}

/// The document that a refusal is about: its `param` is `documents[3]`, or a field of that.
fn offender(error: &anyhow::Error) -> Option<usize> {
    let param = error.downcast_ref::<Refused>()?.param.as_deref()?;
    let (place, _) = param.strip_prefix("documents[")?.split_once(']')?;
    place.parse().ok()
}

fn size_of(draft: &Draft) -> usize {
    serde_json::to_vec(&draft.body).map_or(0, |bytes| bytes.len() + 1)
}

/// Asks for each document in turn until it is settled. They are learned in order, so that by the
/// time the first is live most of the others need one question only.
fn follow(client: &Client, sent: &mut [Sent]) -> Result<()> {
    let bar = bar(sent.len(), "learning");
    for sent in sent.iter_mut() {
        let path = format!("/v1/documents/{}", segment(sent.answer["id"].as_str().unwrap_or_default()));
        while !is_settled(&sent.answer) {
            sent.answer = client.get(&path)?;
            if !is_settled(&sent.answer) {
                bar.set_message(format!("{} is {}", sent.place, status_of(&sent.answer)));
                bar.tick();
                thread::sleep(POLL_PAUSE);
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

fn status_of(answer: &Value) -> &str {
    answer["status"].as_str().unwrap_or("unknown")
}

fn is_settled(answer: &Value) -> bool {
    !["accepted", "waiting", "learned"].contains(&status_of(answer))
}

fn report(args: &Args, sent: &[Sent], out: &mut dyn Write) -> Result<()> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for sent in sent {
        let status = status_of(&sent.answer);
        *counts.entry(status).or_default() += 1;
        if args.json {
            let mut answer = sent.answer.clone();
            answer["place"] = json!(sent.place);
            writeln!(out, "{answer}")?;
        } else if let Some(reason) = sent.answer["reason"].as_str() {
            writeln!(out, "{}: {status}: {reason}", sent.place)?;
        }
    }
    if !args.json && !sent.is_empty() {
        let counts: Vec<String> = counts.iter().map(|(status, count)| format!("{count} {status}")).collect();
        writeln!(out, "{}", counts.join(", "))?;
    }
    Ok(())
}

fn bar(length: usize, verb: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {eta} {msg}");
    let bar = ProgressBar::new(length as u64).with_prefix(verb);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
