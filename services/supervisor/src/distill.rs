//! `engram distill`: a larger model teaches this one.
//!
//! A teacher is asked over the API of OpenAI; what it answers is filtered, and submitted to a running
//! server or written to a file. [`asking`] sends requests and tries again, on a thread of its own;
//! here answers are judged, written into the journal, and handed on, one after the other.

mod asking;
mod cost;
mod filter;
mod inputs;
mod journal;
mod pairs;
mod report;
mod run;
mod submit;
mod teacher;
mod transport;

use crate::base;
use crate::client::{Client, ServerArgs};
use anyhow::{Context, Result, bail, ensure};
use asking::{Asking, Order};
use clap::value_parser;
use cost::{Budget, Prices, Usage};
use inputs::{Form, InputArgs, Unit};
use journal::Journal;
use proto::Domain;
use std::env;
use std::fs::{self, DirBuilder};
use std::io::{self, IsTerminal, Write};
use std::num::NonZeroU32;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use teacher::Teacher;
use tokio::sync::watch;
use tokio::time::Instant;

const EXAMPLES: &str = "\
Examples:
  engram distill --teacher https://api.openai.com/v1 --model gpt-4.1-mini --domain law \\
      --topics topics.txt --price-in 0.4 --price-out 1.6 --max-cost 2
  engram distill --teacher http://127.0.0.1:8000/v1 --model qwen --domain notes \\
      --about notes/ --questions 8         questions and answers about files of your own
  engram distill --teacher http://127.0.0.1:8000/v1 --model qwen --domain notes \\
      --about-documents                    the same about what the server has learned
  engram distill --teacher http://127.0.0.1:8000/v1 --model qwen --domain help \\
      --prompts p.txt --out pairs.jsonl    to look at first; 'engram learn pairs.jsonl' follows

The teacher is any server that streams chat completions as OpenAI's does. What the inputs say goes \
to it: files and documents too. Its key is taken from the variable that --key-env names, and is kept \
nowhere. A run that was ended goes on when the same command is given again: a journal, in the data \
folder or beside --out, knows what was asked. Answers leave the one in the data folder when a run \
ends and the server has them. Without prices, tokens are counted, and money is not.";

/// Documents of one request to the server, and pairs of one answer, at most.
const QUESTIONS_MAX: i64 = 100;
/// An answer to a prompt, and one pair, have about so many tokens.
const ANSWER_TOKENS: u64 = 200;
const PAIR_TOKENS: u64 = 80;
/// How long a full or restarting server is waited for.
const PATIENCE: Duration = Duration::from_secs(600);

/// What `engram distill` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Address of the teacher's API, as https://api.openai.com/v1.
    #[arg(long, value_name = "URL")]
    teacher: String,
    /// Which of the teacher's models answers.
    #[arg(long, value_name = "M")]
    model: String,
    /// The variable that holds the teacher's key; unset for a teacher that asks for none.
    #[arg(long, value_name = "NAME", default_value = "OPENAI_API_KEY")]
    key_env: String,
    /// The body of knowledge that the answers belong to.
    #[arg(long, value_name = "D")]
    domain: String,
    #[command(flatten)]
    inputs: InputArgs,
    /// Questions for each topic, and for each document or part of a long one.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = value_parser!(u32).range(1..=QUESTIONS_MAX))]
    questions: u32,
    /// Write the accepted pairs into this file instead of submitting them.
    #[arg(long, value_name = "FILE.jsonl")]
    out: Option<PathBuf>,
    /// The longest answer that the teacher may give, tokens.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// A longer question or answer is not learned, bytes.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = value_parser!(u32).range(1..=16384))]
    max_bytes: u32,
    /// How the teacher's answers vary; left out, it decides.
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Requests to the teacher in a minute at most.
    #[arg(long, value_name = "N")]
    requests_per_minute: Option<NonZeroU32>,
    /// Requests to the teacher at a time.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = value_parser!(u32).range(1..=256))]
    parallel: u32,
    /// How often a request that brought no answer is repeated.
    #[arg(long, value_name = "N", default_value_t = 5)]
    retries: u32,
    /// Seconds for which the teacher may be silent.
    #[arg(long, value_name = "S", default_value_t = 120, value_parser = value_parser!(u64).range(1..=3600))]
    timeout: u64,
    /// What a million tokens cost that the teacher reads.
    #[arg(long, value_name = "X")]
    price_in: Option<f64>,
    /// What a million tokens cost that the teacher writes.
    #[arg(long, value_name = "X")]
    price_out: Option<f64>,
    /// Stop before this run costs more.
    #[arg(long, value_name = "X", requires = "price_in", requires = "price_out")]
    max_cost: Option<f64>,
    /// Ask again what an earlier run has asked.
    #[arg(long)]
    again: bool,
    /// Do not ask whether to begin.
    #[arg(long)]
    yes: bool,
    /// Print one JSON object at the end.
    #[arg(long)]
    json: bool,
    /// Where the journal is kept, unless it is beside --out.
    #[arg(long, value_name = "DIR", env = "ENGRAM_DATA")]
    data: Option<PathBuf>,
    #[command(flatten)]
    server: ServerArgs,
}

/// Asks, filters, and submits or writes.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let prices = args.prices()?;
    let teacher = Teacher::new(args.teacher())?;
    Domain::new(args.domain.as_str()).context("--domain")?;
    if let Some(file) = &args.out {
        check_out(file)?;
    }
    let client = match args.out.is_none() || args.inputs.about_documents {
        true => Some(Client::new(&args.server)?.patient(PATIENCE)),
        false => None,
    };
    if let Some(client) = &client {
        // Asked first, so that a server that is not there is told before the teacher is paid.
        client.get("/v1/status")?;
    }
    let units = inputs::read(&args.inputs, client.as_ref(), &args.domain, args.questions)?;
    let journal = args.journal()?;
    let twice = units.twice;
    let units: Arc<[Unit]> = units.list.into();
    let wanted: Vec<usize> =
        (0..units.len()).filter(|index| journal.outcome(&units[*index].key).is_none()).collect();
    let asking = Arc::new(args.asking(teacher, prices, Arc::clone(&units)));
    args.announce(&asking, &wanted, prices)?;
    let server = client.filter(|_| args.out.is_none());
    run::Run::new(args, units, journal, prices, twice)?.all(&asking, wanted, server, out)
}

impl Args {
    fn prices(&self) -> Result<Option<Prices>> {
        let amounts = [self.price_in, self.price_out, self.max_cost];
        let usable = amounts.iter().flatten().all(|amount| amount.is_finite() && *amount >= 0.0);
        ensure!(usable, "--price-in, --price-out and --max-cost are numbers from 0 on");
        ensure!(
            self.temperature.is_none_or(|temperature| (0.0..=2.0).contains(&temperature)),
            "--temperature is a number from 0 to 2"
        );
        let either = self.price_in.is_some() || self.price_out.is_some();
        let price = |price: Option<f64>| price.unwrap_or(0.0);
        Ok(either.then(|| Prices { tokens_in: price(self.price_in), tokens_out: price(self.price_out) }))
    }

    fn teacher(&self) -> teacher::Settings {
        teacher::Settings {
            url: self.teacher.clone(),
            model: self.model.clone(),
            key: env::var(&self.key_env).ok().filter(|key| !key.is_empty()),
            key_env: self.key_env.clone(),
            tokens_max: self.max_tokens,
            temperature: self.temperature,
            silence_max: Duration::from_secs(self.timeout),
        }
    }

    fn asking(&self, teacher: Teacher, prices: Option<Prices>, units: Arc<[Unit]>) -> Asking {
        Asking {
            teacher,
            budget: Budget::new(self.max_cost.zip(prices)),
            parallel: self.parallel as usize,
            retries: self.retries,
            pace: self.requests_per_minute.map(asking::pace),
            quiet_until: Mutex::new(Instant::now()),
            given_up: AtomicU32::new(0),
            order: watch::Sender::new(Order::GoOn),
            units,
        }
    }

    /// The journal of runs with these settings: whatever decides an answer, and where it goes.
    fn journal(&self) -> Result<Journal> {
        let where_to = match &self.out {
            Some(_) => String::new(),
            None => self.server.server.clone(),
        };
        let temperature = self.temperature.map(|temperature| temperature.to_string());
        let (teacher, model, domain) = (&self.teacher, &self.model, &self.domain);
        let settings =
            format!("{:?}", (teacher, model, domain, self.max_tokens, self.max_bytes, temperature, where_to));
        let settings = blake3::hash(settings.as_bytes()).to_hex()[..32].to_owned();
        let path = match &self.out {
            Some(file) => journal::beside(file, "journal"),
            None => {
                let data = self.data.clone().map_or_else(base::data_dir, Ok)?;
                let folder = data.join("distill");
                let made = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
                made.with_context(|| format!("{} cannot be made; give another --data", folder.display()))?;
                folder.join(format!("{settings}.jsonl"))
            }
        };
        if self.again && path.exists() {
            fs::remove_file(&path).with_context(|| format!("{} cannot be removed", path.display()))?;
        }
        Journal::open(&path, &settings)
    }

    /// Says what is about to be asked and paid, and asks whether to begin.
    fn announce(&self, asking: &Asking, wanted: &[usize], prices: Option<Prices>) -> Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        let (mut likely, mut most) = (Usage::default(), Usage::default());
        for unit in wanted.iter().map(|index| &asking.units[*index]) {
            let tokens_out = match unit.form {
                Form::Answer => ANSWER_TOKENS,
                Form::Pairs => PAIR_TOKENS * u64::from(self.questions),
            };
            likely += Usage::likely(&unit.request, tokens_out.min(self.max_tokens.into()));
            most += asking.teacher.most(&unit.request);
        }
        let cost =
            |usage| prices.map_or_else(String::new, |prices| format!(", cost {:.4}", prices.of(usage)));
        eprintln!(
            "engram: {} requests to {}: about {} tokens to read and {} to write{}; at most {} and {}{}, without \
             repetitions",
            wanted.len(),
            self.teacher,
            likely.tokens_in,
            likely.tokens_out,
            cost(likely),
            most.tokens_in,
            most.tokens_out,
            cost(most)
        );
        if self.yes || !io::stdin().is_terminal() || !io::stderr().is_terminal() {
            return Ok(());
        }
        eprint!("engram: begin? [y/N] ");
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        if !["y", "yes"].contains(&answer.trim().to_lowercase().as_str()) {
            bail!("nothing was asked; --yes begins without this question");
        }
        Ok(())
    }
}

/// What somebody else has written there is not overwritten.
fn check_out(file: &Path) -> Result<()> {
    let is_own = journal::beside(file, "journal").exists();
    ensure!(is_own || !file.exists(), "{} is there already; remove it, or name another file", file.display());
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    ensure!(folder.is_dir(), "there is no folder {}", folder.display());
    Ok(())
}
