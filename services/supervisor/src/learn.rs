//! `engram learn`: files and folders to a running server.

use crate::cli::Partly;
use crate::client::{Client, ServerArgs, segment};
use crate::corpus::{self, Draft, Found, SourceFile};
use crate::sending::{Sending, Sent};
use crate::status::not_learning;
use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  engram learn facts.jsonl --wait               lines of one document a line
  engram learn docs/ src/ --domain project      text and source code, but for what git ignores
  engram learn report.pdf page.html notes.md    PDF, HTML, Markdown
  engram learn key.txt --importance 1.0         the last to be forgotten, should room run out
  echo 'The key is under the pot.' | engram learn -";

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

/// Sends the documents, and with `--wait` follows each until it is settled.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    if args.importance.is_some_and(|importance| !(0.0..=1.0).contains(&importance)) {
        bail!("--importance is a number from 0 to 1");
    }
    let Found { files, measured } = corpus::files(&args.paths)?;
    let client = Client::new(&args.server)?.patient(PATIENCE);
    // Asked first, so that a server that is not there is told before the files are read.
    client.get("/v1/status")?;
    for path in measured {
        eprintln!("engram: left out: {}, which is to measure with; name it to learn it", path.display());
    }
    let (mut sent, unusable) = send(&client, args, &files)?;
    let followed = if args.wait { follow(&client, &mut sent) } else { Ok(()) };
    // What became of each is told also where following it came to an end.
    report(args, &sent, out)?;
    for error in &unusable {
        eprintln!("engram: skipped: {error:#}");
    }
    followed?;
    if sent.is_empty() && unusable.is_empty() {
        bail!("there was nothing to learn in what was named");
    }
    if !unusable.is_empty() {
        let (lost, all) = (unusable.len(), unusable.len() + sent.len());
        let told = format!("{lost} of {all} could not be used, as told above");
        if sent.is_empty() {
            bail!(told);
        }
        return Err(Partly(told).into());
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

fn send(client: &Client, args: &Args, files: &[SourceFile]) -> Result<(Vec<Sent>, Vec<anyhow::Error>)> {
    let mut sending = Sending::to(client);
    let (reader, bar) = (corpus::reader()?, bar(files.len(), "sending"));
    for file in files {
        bar.set_message(file.name().to_owned());
        for draft in file.documents(&reader).unwrap_or_else(|error| vec![Err(error)]) {
            match draft {
                Ok(draft) => sending.push(with_flags(args, draft))?,
                Err(error) => sending.leave_out(error),
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    sending.finish()
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
                if status_of(&sent.answer) == "waiting" {
                    check_learning(client)?;
                }
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

/// Whether waiting has an end.
fn check_learning(client: &Client) -> Result<()> {
    match not_learning(&client.get("/v1/status")?) {
        Some(why) => {
            bail!("what waits is kept, and learned once the server learns: learning {why}")
        }
        None => Ok(()),
    }
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
