//! `engram bench serve`: how fast many answers are.

use super::meanwhile::Meanwhile;
use super::report;
use super::subject::{Subject, SubjectArgs, median, quantile};
use super::together::{adapter, ensure_fits};
use anyhow::{Context, Result, bail, ensure};
use clap::value_parser;
use infer::{Engine, Request};
use kit::compute::{Compute, Turn};
use kit::link;
use model::device::set_threads;
use model::pretrain::curve;
use proto::{Domain, GenerateEvent, GenerationId, Sampling, Weighted};
use serde_json::{Value, json};
use std::cell::OnceCell;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

const EXAMPLES: &str = "\
Examples:
  engram bench serve
  engram bench serve --base reference --set base.threads=2 --json result.json
  engram bench serve --streams 16 --adapters 0,8
  engram bench serve --streams 1 --adapters 1 --learning 0.2,0.5,0.8 --svg both.svg

All streams are asked at once, each with a prompt of its own, and answered by the engine that \
serves. Stream i gets adapter i modulo their number (rank 16, random); with 0 adapters it is the \
base alone. tokens_per_s is all tokens over the whole time, prompts included; decode_tokens_per_s \
counts from the last stream's first token to the first stream's last. infer.max_running and \
infer.cache_mb_max are as large as it takes. Each figure is the median of the repeats, after one \
that does not count. With --learning all of it is measured again while the services' learner learns \
new random tokens, without rehearsal and its former self, with each of these values of \
train.share_while_serving; of_idle is its speed as a share of what it has where nobody asks.";

/// Time for which the learner alone is measured.
const IDLE_TIME: Duration = Duration::from_secs(3);

/// What `engram bench serve` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    subject: SubjectArgs,
    /// Streams at the same time, several numbers with commas.
    #[arg(long, value_name = "N,..", default_value = "1,4,16,64", value_delimiter = ',', value_parser = value_parser!(u64).range(1..=1024))]
    streams: Vec<u64>,
    /// Adapters that the streams are spread over, several numbers with commas; 0 for the base alone.
    #[arg(long, value_name = "N,..", default_value = "1,8", value_delimiter = ',', value_parser = value_parser!(u64).range(0..=256))]
    adapters: Vec<u64>,
    /// Tokens of each prompt.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = value_parser!(u64).range(1..))]
    prompt_tokens: u64,
    /// Tokens of each answer.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = value_parser!(u64).range(2..))]
    tokens: u64,
    /// Measurements of each, of which the median is told.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = value_parser!(u64).range(1..=1000))]
    repeats: u64,
    /// Learn meanwhile, with this share of the speed at most (train.share_while_serving); several numbers with commas.
    #[arg(long, value_name = "SHARE,..", value_delimiter = ',', value_parser = share)]
    learning: Vec<f64>,
    /// Draw the time between tokens over the speed of learning, both as multiples of idle ones, as SVG.
    #[arg(long, value_name = "FILE", requires = "learning")]
    svg: Option<PathBuf>,
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse::<f64>().ok().filter(|share| (0.01..=1.0).contains(share));
    share.ok_or_else(|| "a share of the speed is a number from 0.01 to 1, such as 0.5".to_owned())
}

/// Measures and reports.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let subject = Subject::load(&args.subject)?;
    ensure_fits(&subject, args.prompt_tokens.saturating_add(args.tokens))?;
    writeln!(out, "{}", subject.describe())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let rows = runtime.block_on(async {
        let bench = Bench::start(args, &subject).await?;
        let mut rows = bench.rows().await?;
        if !args.learning.is_empty() {
            let idle = Meanwhile::idle_speed(&subject, IDLE_TIME)?;
            writeln!(out, "{idle:.0} tokens/s are learned where nobody asks")?;
            for &share in &args.learning {
                rows.extend(bench.rows_while_learning(share, idle).await?);
            }
        }
        anyhow::Ok(rows)
    })?;
    let mut columns = vec!["adapters", "streams", "tokens_per_s", "decode_tokens_per_s"];
    columns.extend(["first_ms_p50", "first_ms_p99", "between_ms_p50", "between_ms_p99"]);
    if !args.learning.is_empty() {
        columns.extend(["learning", "of_idle"]);
    }
    crate::status::table(&columns, &rows, out)?;
    if let Some(path) = &args.svg {
        curve::lines(
            "speed of learning, idle is 1",
            "time between tokens, idle is 1",
            &trade_off(&rows),
            path,
        )?;
    }
    let figures = json!({
        "model": subject.json(),
        "prompt_tokens": args.prompt_tokens,
        "tokens": args.tokens,
        "repeats": args.repeats,
        "rows": rows,
    });
    report::store(args.subject.json.as_deref(), &figures)
}

/// The time between tokens over the speed of learning, for each number of adapters and streams.
fn trade_off(rows: &[Value]) -> Vec<curve::Line> {
    let key = |row: &Value| (row["adapters"].as_u64(), row["streams"].as_u64());
    let mut lines = Vec::new();
    for idle in rows.iter().filter(|row| row["learning"].is_null()) {
        for (name, figure) in [("p50", "between_ms_p50"), ("p99", "between_ms_p99")] {
            let of_idle = |row: &Value| Some(row[figure].as_f64()? / idle[figure].as_f64()?);
            let while_learning =
                rows.iter().filter(|row| !row["learning"].is_null() && key(row) == key(idle));
            let mut line: Vec<(f64, f64)> =
                while_learning.filter_map(|row| Some((row["of_idle"].as_f64()?, of_idle(row)?))).collect();
            line.push((0.0, 1.0));
            line.sort_by(|a, b| a.0.total_cmp(&b.0));
            lines.push((format!("{name}, {} streams, {} adapters", idle["streams"], idle["adapters"]), line));
        }
    }
    lines
}

struct Bench<'a> {
    args: &'a Args,
    subject: &'a Subject,
    engine: Compute<Engine>,
    streams_max: usize,
    turn: Arc<Turn>,
}

/// One run: when each stream's tokens came, in seconds from the start.
type Arrivals = Vec<Vec<f64>>;

impl<'a> Bench<'a> {
    /// Starts the engine, as serving does.
    async fn start(args: &'a Args, subject: &'a Subject) -> Result<Self> {
        let streams_max = args.streams.iter().copied().max().context("no number of streams")? as usize;
        let (base, language, threads) =
            (subject.base.share(), subject.language.clone(), subject.settings.base.threads);
        let c = subject.base.config();
        // f32 at most, in pages that may not be full.
        let bytes_a_token = 2 * 4 * (c.layers * c.kv_heads * c.head_dim) as usize;
        let length = (args.prompt_tokens + args.tokens) as usize + 256;
        let cache_bytes =
            (subject.settings.infer.cache_mb_max << 20).max(streams_max * length * bytes_a_token);
        let narrow_copy = subject.settings.infer.narrow_copy;
        let engine = Compute::start_engine("infer", 1 + streams_max, move || {
            if threads > 0 {
                set_threads(threads);
            }
            Engine::new(base, language, streams_max, cache_bytes, narrow_copy)
        })
        .await?;
        let bench = Self { args, subject, engine, streams_max, turn: Turn::new() };
        for number in 0..args.adapters.iter().copied().max().unwrap_or(0) {
            let bytes = adapter(subject, number)?.to_bytes()?;
            let id = generation(number)?;
            bench.engine.run(move |engine| engine.load(id, &bytes, None)).await??;
        }
        Ok(bench)
    }

    /// A row for each number of adapters and of streams.
    async fn rows(&self) -> Result<Vec<Value>> {
        let mut rows = Vec::new();
        for &adapters in &self.args.adapters {
            for &streams in &self.args.streams {
                rows.push(self.measure(streams as usize, adapters as usize).await?);
                eprintln!("{adapters} adapters, {streams} streams: measured");
            }
        }
        Ok(rows)
    }

    /// The same while something is learned.
    async fn rows_while_learning(&self, share: f64, idle: f64) -> Result<Vec<Value>> {
        let mut rows = Vec::new();
        for &adapters in &self.args.adapters {
            for &streams in &self.args.streams {
                let learning = Meanwhile::start(self.subject, &self.turn, share as f32)?;
                let (before, started) = (learning.tokens(), Instant::now());
                let mut row = self.measure(streams as usize, adapters as usize).await?;
                let speed = (learning.tokens() - before) as f64 / started.elapsed().as_secs_f64();
                learning.finish()?;
                row["learning"] = json!(share);
                row["learned_tokens_per_s"] = json!(speed);
                row["of_idle"] = json!(speed / idle);
                rows.push(row);
                eprintln!("{adapters} adapters, {streams} streams, learning {share}: measured");
            }
        }
        Ok(rows)
    }

    async fn measure(&self, streams: usize, adapters: usize) -> Result<Value> {
        let mut runs = Vec::new();
        for repeat in 0..=self.args.repeats {
            let seed = repeat << 32 | (streams as u64) << 16 | (adapters as u64) << 8;
            let arrivals = self.once(streams, adapters, seed).await?;
            if repeat > 0 {
                runs.push(arrivals);
            }
        }
        let of_runs =
            |figure: &dyn Fn(&Arrivals) -> f64| median(&runs.iter().map(figure).collect::<Vec<_>>());
        let first = |run: &Arrivals| run.iter().map(|at| 1000.0 * at[0]).collect::<Vec<_>>();
        let between = |run: &Arrivals| {
            let gaps = run.iter().flat_map(|at| at.windows(2).map(|two| 1000.0 * (two[1] - two[0])));
            gaps.collect::<Vec<_>>()
        };
        Ok(json!({
            "adapters": adapters,
            "streams": streams,
            "tokens_per_s": of_runs(&overall),
            "decode_tokens_per_s": of_runs(&decoding),
            "first_ms_p50": of_runs(&|run| quantile(&first(run), 0.5)),
            "first_ms_p99": of_runs(&|run| quantile(&first(run), 0.99)),
            "between_ms_p50": of_runs(&|run| quantile(&between(run), 0.5)),
            "between_ms_p99": of_runs(&|run| quantile(&between(run), 0.99)),
        }))
    }

    /// Asks all streams at once, and reads them to their ends.
    async fn once(&self, streams: usize, adapters: usize, seed: u64) -> Result<Arrivals> {
        let (mut requests, mut readers) = (Vec::new(), Vec::new());
        for stream in 0..streams {
            let (reply, events) = link::events(2 + self.args.tokens as usize);
            let number = stream.checked_rem(adapters).map(|number| number as u64);
            requests.push(Request {
                tokens: self.subject.prompt(self.args.prompt_tokens as usize, seed + stream as u64),
                adapters: number.map(weighted).transpose()?.into_iter().collect(),
                sampling: self.sampling(seed),
                n: 1,
                stop_ids: Vec::new(),
                guide: None,
                reply,
                turn: self.turn.enter(),
                features: None,
                question: infer::Question::default(),
                prior: OnceCell::new(),
            });
            readers.push(events);
        }
        let (started, open_max) = (Instant::now(), self.streams_max);
        self.engine
            .run(move |engine| requests.into_iter().try_for_each(|request| engine.take(request, open_max)))
            .await??;
        let readers = readers.into_iter().map(|mut events| async move {
            let mut arrivals = Vec::new();
            while let Some(event) = events.next().await {
                match event {
                    GenerateEvent::Text { logprobs, .. } => {
                        let now = started.elapsed().as_secs_f64();
                        arrivals.extend(logprobs.iter().map(|_| now));
                    }
                    GenerateEvent::Refused { message, .. } => bail!("{message}"),
                    _ => {}
                }
            }
            ensure!(arrivals.len() as u64 == self.args.tokens, "an answer was cut off");
            Ok(arrivals)
        });
        futures_util::future::try_join_all(readers).await
    }

    /// The likeliest token each time, to the full length; told one by one.
    fn sampling(&self, seed: u64) -> Sampling {
        Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: self.subject.endless(),
            logprobs: Some(0),
            seed,
            max_tokens: self.args.tokens as u32,
            stop: Vec::new(),
        }
    }
}

/// All tokens over the whole time.
fn overall(run: &Arrivals) -> f64 {
    let end = run.iter().filter_map(|at| at.last()).copied().fold(0.0, f64::max);
    run.iter().map(Vec::len).sum::<usize>() as f64 / end
}

/// The tokens while all streams decode, over the time they do; not a number where they never all do.
fn decoding(run: &Arrivals) -> f64 {
    let from = run.iter().filter_map(|at| at.first()).copied().fold(0.0, f64::max);
    let to = run.iter().filter_map(|at| at.last()).copied().fold(f64::INFINITY, f64::min);
    let tokens = run.iter().flatten().filter(|at| from < **at && **at <= to).count();
    if from < to { tokens as f64 / (to - from) } else { f64::NAN }
}

fn generation(number: u64) -> Result<GenerationId> {
    Ok(GenerationId::new(format!("{number:016x}"))?)
}

fn weighted(number: u64) -> Result<Weighted> {
    let domain = Domain::new(format!("bench{number}"))?;
    Ok(Weighted { domain, generation: Some(generation(number)?), weight: 1.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trade_off_is_told_in_multiples_of_idle_ones() {
        let row = |p50: f64, more: Value| {
            let mut row =
                json!({ "adapters": 1, "streams": 4, "between_ms_p50": p50, "between_ms_p99": 10.0 });
            if let (Some(row), Some(more)) = (row.as_object_mut(), more.as_object()) {
                row.extend(more.clone());
            }
            row
        };
        let rows = [
            row(2.0, json!({})),
            row(5.0, json!({ "learning": 0.9, "of_idle": 0.8 })),
            row(3.0, json!({ "learning": 0.3, "of_idle": 0.2 })),
        ];
        let lines = trade_off(&rows);
        assert_eq!(lines[0], ("p50, 4 streams, 1 adapters".into(), vec![(0.0, 1.0), (0.2, 1.5), (0.8, 2.5)]));
        assert_eq!(lines[1].1, vec![(0.0, 1.0), (0.2, 1.0), (0.8, 1.0)]);
        assert!(share("0.5").is_ok() && share("0").is_err() && share("2").is_err());
    }

    #[test]
    fn speeds_are_those_of_the_arrivals() {
        let run = vec![vec![1.0, 2.0, 3.0, 4.0], vec![2.0, 2.5, 3.0, 5.0]];
        assert!((overall(&run) - 8.0 / 5.0).abs() < 1e-9);
        // Between 2 and 4 seconds both decode: at 3 and 4, and at 2.5 and 3.
        assert!((decoding(&run) - 4.0 / 2.0).abs() < 1e-9);
        assert!(decoding(&vec![vec![1.0, 2.0], vec![2.0, 3.0]]).is_nan(), "one ended before the other began");
    }
}
