//! `engram bench retention`: tasks one after another, and what is left of each.

use super::method::Method;
use super::panel::{Panel, Pick};
use super::report::{self, Run};
use super::scores::{Matrix, Measure};
use super::system::{self, System, Taught};
use super::tasks::{self, Limits, Line, Task, Test};
use crate::base;
use crate::judge::LabelBy;
use anyhow::{Context, Result, bail, ensure};
use clap::{ValueEnum, value_parser};
use kit::settings::{AdapterScope, Settings};
use model::tokenizer::Tokenizer;
use model::{anchor, pretrain::corpus};
use proto::{Content, Domain};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const EXAMPLES: &str = "\
Examples:
  engram bench retention --tasks ./clinc150 --seeds 3 --json result.json
  engram bench retention --tasks ./clinc150 --method replay --mode shared --capacity 2%
  engram bench retention --tasks ./stream --order medical,code --limit 50 --drift ./pretrain
  engram bench retention --tasks ./clinc150 --method joint --set train.passes=6

Tasks are folders with train.jsonl and test.jsonl, whose lines are {\"text\",\"label\"} or \
{\"prompt\",\"response\"}, or pairs X.txt and X.val.txt, whose documents end in a line \
<|endoftext|>. They are learned by the services themselves, one task after another. A label stands \
on a line of its own after its text, and is chosen among all labels seen so far, without being told the \
task; a text is scored in nats a token. \
With an adapter for each domain, the content decides which one answers, as for the model 'auto'.";

/// Bytes of each held-out text that the drift of the base is measured on.
const DRIFT_BYTES: usize = 100_000;
/// What the base says of its own accord: sequences, their length in tokens, and the seed they are drawn with.
const ANCHORS: (usize, usize, u64) = (64, 64, 3);

/// Which documents share an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// One adapter, and no domain given.
    Shared,
    /// An adapter for each task.
    PerDomain,
}

/// What `engram bench retention` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The frozen base: `nano`, a folder in the Hugging Face form, or org/name on the Hugging Face hub.
    #[arg(long, value_name = "NAME|DIR|ORG/NAME", default_value = base::BUILT_IN)]
    base: String,
    /// The folder of the tasks.
    #[arg(long, value_name = "DIR")]
    tasks: PathBuf,
    /// Tasks by name, in the order in which they are learned; all, by name, if not given.
    #[arg(long, value_name = "A,B,C", value_delimiter = ',')]
    order: Vec<String>,
    /// How forgetting is met.
    #[arg(long, default_value = "default")]
    method: Method,
    /// One adapter for all tasks, or one for each; what the settings say, if not given.
    #[arg(long)]
    mode: Option<Mode>,
    /// Examples that the replay buffer holds, or a share of all that are learned, such as 2%.
    #[arg(long, value_name = "N|N%")]
    capacity: Option<String>,
    /// Documents to learn, and to measure on, of each task at most, evenly over its files.
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Documents to measure on of each task at most, where that is another number.
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    test_limit: Option<u64>,
    /// What makes a label the likeliest: its log-likelihood as a whole, or the mean of its tokens.
    #[arg(long, value_name = "RULE", default_value = "mean")]
    label_by: LabelBy,
    /// Runs with different seeds.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u64).range(1..=100))]
    seeds: u64,
    /// A folder of texts X.val.txt that have nothing to do with the tasks: what the base must still know.
    #[arg(long, value_name = "DIR")]
    drift: Option<PathBuf>,
    /// Write all figures, of each seed too, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the matrix as an SVG heat map.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Settings that differ from the built-in ones, in TOML.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A setting, as section.key=value; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// Learns, measures and reports.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let number = |limit: Option<u64>| limit.map(usize::try_from).transpose();
    let limits = Limits { learned: number(args.limit)?, measured: number(args.test_limit.or(args.limit))? };
    let tasks = tasks::load(&args.tasks, &args.order, limits)?;
    let of_lines = tasks.iter().filter(|task| matches!(task.test, Test::Lines(_))).count();
    ensure!(
        of_lines == 0 || of_lines == tasks.len(),
        "{} holds texts and lines, whose scores have no mean: name those of one kind with --order",
        args.tasks.display()
    );
    ensure!(
        !args.method.is_joint() || args.mode != Some(Mode::PerDomain),
        "a joint --method learns all tasks in one adapter: leave --mode per-domain out"
    );
    ensure!(
        args.capacity.is_none() || args.method.rehearses(),
        "--capacity is the replay buffer's, and this --method rehearses nothing: use one that does, such as replay or ace+ewc"
    );
    let base_dir = base::resolve(&args.base, &base::data_dir()?)?;
    let mut settings = Settings::load(args.config.as_deref(), &args.set)?;
    match args.mode {
        Some(Mode::Shared) => settings.train.adapters = AdapterScope::Shared,
        Some(Mode::PerDomain) => settings.train.adapters = AdapterScope::PerDomain,
        None => {}
    }
    if let Some(capacity) = &args.capacity {
        settings.replay.capacity = capacity_of(capacity, &tasks, &settings, &base_dir)?;
    }
    let settings = args.method.apply(&settings);
    let drift = args.drift.as_deref().map(drift_texts).transpose()?.unwrap_or_default();
    let course =
        Course { tasks: &tasks, base_dir: &base_dir, drift: &drift, method: args.method, by: args.label_by };
    let mut runs = Vec::new();
    for seed in 0..args.seeds {
        let mut settings = settings.clone();
        settings.replay.seed = settings.replay.seed.wrapping_add(seed);
        let run = course.run(&settings, &mut |line| {
            eprintln!("seed {} of {}: {line}", seed + 1, args.seeds);
        })?;
        runs.push(run);
    }
    let report = report::Report {
        method: args.method,
        options: options(args),
        settings: &settings,
        tasks: &tasks,
        runs: &runs,
    };
    report.print(out)?;
    report::store(args.json.as_deref(), &report.json()?)?;
    args.svg.as_deref().map_or(Ok(()), |path| report.draw(path))
}

/// What was asked for beside the method, the tasks and the settings, as JSON.
fn options(args: &Args) -> Value {
    json!({
        "base": args.base,
        "capacity": args.capacity,
        "drift": args.drift,
        "label_by": args.label_by.to_possible_value().map(|rule| rule.get_name().to_owned()),
        "limit": args.limit,
        "test_limit": args.test_limit.or(args.limit),
    })
}

/// A number of examples, or a share of all that the tasks are cut into.
fn capacity_of(text: &str, tasks: &[Task], settings: &Settings, base_dir: &Path) -> Result<usize> {
    let wrong = || format!("--capacity {text}: give a number of examples such as 300, or a share such as 2%");
    let capacity = match text.strip_suffix('%') {
        None => text.parse().with_context(wrong)?,
        Some(share) => {
            let share: f64 = share.parse().with_context(wrong)?;
            ensure!((0.0..=100.0).contains(&share), "{}", wrong());
            let cutter = crate::topology::cutter(settings, &Arc::new(crate::text::Text::load(base_dir)?));
            let mut examples = 0;
            for content in tasks.iter().flat_map(|task| &task.documents) {
                examples += cutter.pieces(content, None)?.len();
            }
            (examples as f64 * share / 100.0).round() as usize
        }
    };
    ensure!(capacity > 0, "--capacity has to leave room for an example; for none, use --method naive");
    Ok(capacity)
}

/// The beginnings of the held-out texts in a folder.
fn drift_texts(folder: &Path) -> Result<Vec<(String, Vec<String>)>> {
    let entries = fs::read_dir(folder).with_context(|| format!("{} cannot be read", folder.display()))?;
    let mut held_out = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    held_out.retain(|path| path.to_string_lossy().ends_with(".val.txt"));
    held_out.sort();
    ensure!(!held_out.is_empty(), "{} holds no text X.val.txt", folder.display());
    let read = |path: &PathBuf| {
        let mut documents = Vec::new();
        let mut bytes = 0;
        for document in corpus::documents(path)? {
            let document = document?;
            // Long documents are seen from their beginning.
            let document = crate::corpus::split(&document, DRIFT_BYTES).first().unwrap_or(&"").to_string();
            bytes += document.len();
            documents.push(document);
            if bytes >= DRIFT_BYTES {
                break;
            }
        }
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        Ok((name, documents))
    };
    held_out.iter().map(read).collect()
}

/// What is learned, in which way.
struct Course<'a> {
    tasks: &'a [Task],
    base_dir: &'a Path,
    drift: &'a [(String, Vec<String>)],
    method: Method,
    by: LabelBy,
}

impl Course<'_> {
    fn run(&self, settings: &Settings, tell: &mut dyn FnMut(String)) -> Result<Run> {
        match self.method {
            Method::Single => self.single(settings, tell),
            method if method.is_joint() => system::with(settings.clone(), self.base_dir, async |system| {
                let mut lessons: Vec<(Domain, Content)> = Vec::new();
                for task in self.tasks {
                    lessons.extend(task.documents.iter().map(|d| (Domain::general(), d.clone())));
                }
                lessons.shuffle(&mut rand_chacha::ChaCha8Rng::seed_from_u64(settings.replay.seed));
                let mut exam = Exam::new(self, system, settings)?;
                let taught = system.teach(&lessons).await?;
                tell(format!("all tasks at once: {}", report::told(&taught)));
                let row = exam.row(&(0..self.tasks.len()).collect::<Vec<_>>())?;
                exam.finish(vec![row], taught)
            }),
            _ => system::with(settings.clone(), self.base_dir, async |system| {
                let mut exam = Exam::new(self, system, settings)?;
                let (mut rows, mut all) = (Vec::new(), Taught::default());
                for (i, task) in self.tasks.iter().enumerate() {
                    let domain = exam.domain(task)?;
                    let lessons: Vec<_> =
                        task.documents.iter().map(|d| (domain.clone(), d.clone())).collect();
                    let taught = system.teach(&lessons).await?;
                    let row = exam.row(&(0..=i).collect::<Vec<_>>())?;
                    let scores: Vec<String> = row[0].iter().flatten().map(|s| format!("{s:.3}")).collect();
                    tell(format!("{}: {}; {}", task.name, report::told(&taught), scores.join(" ")));
                    all.add(&taught);
                    rows.push(row);
                }
                exam.finish(rows, all)
            }),
        }
    }

    /// Each task in a system of its own.
    fn single(&self, settings: &Settings, tell: &mut dyn FnMut(String)) -> Result<Run> {
        let mut whole: Option<Run> = None;
        for (i, task) in self.tasks.iter().enumerate() {
            let run = system::with(settings.clone(), self.base_dir, async |system| {
                let mut exam = Exam::new(self, system, settings)?;
                let domain = exam.domain(task)?;
                let lessons: Vec<_> = task.documents.iter().map(|d| (domain.clone(), d.clone())).collect();
                let taught = system.teach(&lessons).await?;
                tell(format!("{}: {}", task.name, report::told(&taught)));
                let row = exam.row(&[i])?;
                exam.finish(vec![row], taught)
            })?;
            whole = Some(match whole {
                None => run,
                Some(whole) => whole.beside(run),
            });
        }
        whole.context("there is no task")
    }
}

/// Measures a system.
struct Exam<'a> {
    course: &'a Course<'a>,
    system: &'a System,
    panel: Panel,
    shared: bool,
    /// Of the base alone: by view and task, and on the texts of the drift.
    base: Vec<Vec<f64>>,
    anchors: Vec<String>,
    base_drift: Vec<f64>,
}

/// What lines ask.
fn asked<'a>(lines: &[&'a Line]) -> Vec<&'a str> {
    lines.iter().map(|line| line.asked()).collect()
}

/// Ways to look at the same answers, in the order of a row.
pub const VIEWS: [&str; 4] = ["all_labels", "own_labels", "oracle_all_labels", "oracle_own_labels"];

/// The scores after a task: by view, then by task.
type Row = Vec<Vec<Option<f64>>>;

impl<'a> Exam<'a> {
    fn new(course: &'a Course<'a>, system: &'a System, settings: &Settings) -> Result<Self> {
        let tokenizer = Tokenizer::load(course.base_dir)?;
        let (count, length, seed) = ANCHORS;
        let anchors = anchor::sample(&system.plant().base(), count, length, seed)?;
        let anchors = anchors.iter().map(|a| tokenizer.decode(&a.tokens)).collect::<Result<_>>()?;
        let mut exam = Self {
            panel: Panel::new(system, settings, course.base_dir)?,
            shared: settings.train.adapters == AdapterScope::Shared,
            base: Vec::new(),
            base_drift: Vec::new(),
            course,
            system,
            anchors,
        };
        let everything: Vec<usize> = (0..course.tasks.len()).collect();
        let scores = everything.iter().map(|&j| exam.score(&everything, j, Pick::Base));
        let scores: Vec<[f64; 2]> = scores.collect::<Result<_>>()?;
        exam.base = (0..2).map(|view| scores.iter().map(|s| s[view]).collect()).collect();
        exam.base_drift = exam.drifts(Pick::Base)?;
        Ok(exam)
    }

    /// The domain whose documents a task's are.
    fn domain(&self, task: &Task) -> Result<Domain> {
        if self.shared {
            return Ok(Domain::general());
        }
        Domain::new(&task.name).with_context(|| format!("{} cannot be the name of a domain", task.name))
    }

    /// Scores the tasks `seen`, whose labels are those to choose from.
    fn row(&mut self, seen: &[usize]) -> Result<Row> {
        self.panel.follow(self.system)?;
        let views = if self.shared { 2 } else { 4 };
        let mut row = vec![vec![None; self.course.tasks.len()]; views];
        for &j in seen {
            let own = self.domain(&self.course.tasks[j])?;
            let fixed = Pick::Fixed(&own);
            let picks = if self.shared { vec![fixed] } else { vec![Pick::Auto, fixed] };
            for (n, pick) in picks.into_iter().enumerate() {
                let [all, of_own] = self.score(seen, j, pick)?;
                (row[2 * n][j], row[2 * n + 1][j]) = (Some(all), Some(of_own));
            }
        }
        Ok(row)
    }

    /// The score of task `j` among the labels of all tasks `seen`, and among its own.
    fn score(&self, seen: &[usize], j: usize, pick: Pick<'_>) -> Result<[f64; 2]> {
        match &self.course.tasks[j].test {
            Test::Text(documents) => {
                let mut sum = crate::judge::Likelihood::default();
                for (answering, places) in self.panel.picked(documents, pick)? {
                    let texts: Vec<String> = places.iter().map(|&n| documents[n].clone()).collect();
                    sum.add(self.panel.judge.text(&self.panel.respondent(&answering).adapters, &texts)?);
                }
                Ok([sum.nll_per_token(); 2])
            }
            Test::Lines(lines) => self.right(seen, j, lines, pick),
        }
    }

    fn right(&self, seen: &[usize], j: usize, lines: &[Line], pick: Pick<'_>) -> Result<[f64; 2]> {
        let tasks = self.course.tasks;
        let labels: BTreeSet<&str> =
            seen.iter().flat_map(|&n| &tasks[n].labels).map(String::as_str).collect();
        let labels: Vec<&str> = labels.into_iter().collect();
        let own: Vec<usize> = (0..labels.len()).filter(|&n| tasks[j].labels.contains(labels[n])).collect();
        let groups = [(0..labels.len()).collect(), own];
        let mut right = [0_usize; 2];
        let (labelled, answered): (Vec<&Line>, Vec<&Line>) =
            lines.iter().partition(|line| line.label().is_some());
        if !labelled.is_empty() {
            let chosen = self.panel.label(&asked(&labelled), &labels, &groups, pick, self.course.by)?;
            for (line, chosen) in labelled.iter().zip(chosen) {
                for (count, place) in right.iter_mut().zip(chosen) {
                    *count += usize::from(Some(labels[place]) == line.label());
                }
            }
        }
        for (answering, places) in self.panel.picked(&asked(&answered), pick)? {
            let respondent = self.panel.respondent(&answering);
            for n in places {
                if let Line::Answered { prompt, response } = answered[n] {
                    let answer = self.panel.judge.answer(&respondent, prompt, response)?;
                    right.iter_mut().for_each(|count| *count += usize::from(answer == response.trim()));
                }
            }
        }
        Ok(right.map(|count| count as f64 / lines.len() as f64))
    }

    /// The loss on what the base says of its own accord, and on each text that no task is about.
    fn drifts(&self, pick: Pick<'_>) -> Result<Vec<f64>> {
        let mut losses = Vec::new();
        for documents in std::iter::once(&self.anchors).chain(self.course.drift.iter().map(|(_, d)| d)) {
            let mut sum = crate::judge::Likelihood::default();
            for (answering, places) in self.panel.picked(documents, pick)? {
                let texts: Vec<String> = places.iter().map(|&n| documents[n].clone()).collect();
                sum.add(self.panel.judge.text(&self.panel.respondent(&answering).adapters, &texts)?);
            }
            losses.push(sum.nll_per_token());
        }
        Ok(losses)
    }

    /// How often `auto` gives a task's held-out texts to its own adapter, to the base, and to another.
    fn routes(&self) -> Result<Option<[f64; 3]>> {
        if self.shared {
            return Ok(None);
        }
        let mut counts = [0_usize; 3];
        for task in self.course.tasks {
            let own = self.domain(task)?;
            let texts: Vec<&str> = match &task.test {
                Test::Text(documents) => documents.iter().map(String::as_str).collect(),
                Test::Lines(lines) => lines.iter().map(Line::asked).collect(),
            };
            for (answering, places) in self.panel.picked(&texts, Pick::Auto)? {
                let place = answering.first().map_or(1, |(domain, _)| if *domain == own { 0 } else { 2 });
                counts[place] += places.len();
            }
        }
        let all: usize = counts.iter().sum();
        Ok(Some(counts.map(|count| count as f64 / all.max(1) as f64)))
    }

    fn finish(self, rows: Vec<Row>, taught: Taught) -> Result<Run> {
        let general = Domain::general();
        let drifted = self.drifts(if self.shared { Pick::Fixed(&general) } else { Pick::Auto })?;
        let names = std::iter::once("anchor").chain(self.course.drift.iter().map(|(name, _)| name.as_str()));
        let rises = drifted.iter().zip(&self.base_drift).map(|(after, before)| after / before - 1.0);
        let measure = match self.course.tasks.first().map(|task| &task.test) {
            Some(Test::Lines(_)) => Measure::Accuracy,
            Some(Test::Text(_)) => Measure::Nll,
            None => bail!("there is no task"),
        };
        let views = rows.first().map_or(0, Vec::len);
        let matrix = |view: usize| Matrix {
            measure,
            base: self.base[view % 2].clone(),
            rows: rows.iter().map(|row| row[view].clone()).collect(),
        };
        Ok(Run {
            views: (0..views).map(|view| (VIEWS[view], matrix(view))).collect(),
            drift: names.map(str::to_owned).zip(rises).collect(),
            routes: self.routes()?,
            taught,
            adapter_bytes: self.system.adapter_bytes(),
            replay_bytes: self.system.replay_bytes()?,
        })
    }
}
