//! What a retention benchmark prints and stores.

use super::heatmap;
use super::method::Method;
use super::scores::{Matrix, Measure, Spread, Summary};
use super::system::{GenerationSeconds, Taught};
use super::tasks::Task;
use anyhow::{Context, Result};
use clap::ValueEnum;
use kit::settings::Settings;
use serde_json::{Map, Value, json};
use std::fs;
use std::io::Write;
use std::path::Path;

/// What one seed gave.
pub struct Run {
    /// Matrices, the main one first: see [`super::retention::VIEWS`].
    pub views: Vec<(&'static str, Matrix)>,
    /// Rise of the loss on texts that no task is about, as a share of the base's.
    pub drift: Vec<(String, f64)>,
    /// Shares of texts that `auto` gave to the right adapter, to the base and to a wrong one.
    pub routes: Option<[f64; 3]>,
    /// What became of the documents.
    pub taught: Taught,
    /// Bytes of the adapters.
    pub adapter_bytes: u64,
    /// Bytes of the replay buffer.
    pub replay_bytes: u64,
}

impl Run {
    /// This run with another of the same seed, that learned the next task by itself.
    pub fn beside(mut self, other: Self) -> Self {
        for ((_, matrix), (_, next)) in self.views.iter_mut().zip(other.views) {
            matrix.rows.extend(next.rows);
        }
        self.taught.add(&other.taught);
        self.adapter_bytes += other.adapter_bytes;
        self.replay_bytes += other.replay_bytes;
        self
    }

    fn drift_mean(&self) -> f64 {
        self.drift.iter().map(|(_, rise)| rise).sum::<f64>() / self.drift.len().max(1) as f64
    }
}

/// The figures of a summary by name.
type Figure = (&'static str, fn(&Summary) -> Option<f64>);

const FIGURES: [Figure; 6] = [
    ("final_average", |s| s.final_average),
    ("just_learned_average", |s| s.just_learned_average),
    ("backward_transfer", |s| s.backward_transfer),
    ("forgetting", |s| s.forgetting),
    ("forgetting_rate", |s| s.forgetting_rate),
    ("loss_of_gain", |s| s.loss_of_gain),
];

/// All runs of a benchmark.
pub struct Report<'a> {
    /// How forgetting was met.
    pub method: Method,
    /// What else was asked for, by name.
    pub options: Value,
    /// Under which settings, of the first seed.
    pub settings: &'a Settings,
    /// What was learned, in this order.
    pub tasks: &'a [Task],
    /// One for each seed, at least one.
    pub runs: &'a [Run],
}

impl Report<'_> {
    /// The table that people read.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn print(&self, out: &mut dyn Write) -> Result<()> {
        let Some(first) = self.runs.first() else { return Ok(()) };
        for (view, name) in first.views.iter().map(|(name, _)| *name).enumerate() {
            writeln!(out, "{}", self.title(view, name))?;
            let rows = self.rows(view);
            let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
            let columns: Vec<usize> = self.tasks.iter().map(|task| task.name.len().max(5)).collect();
            write!(out, "{:width$}", "")?;
            for (task, column) in self.tasks.iter().zip(&columns) {
                write!(out, "  {:>column$}", task.name)?;
            }
            writeln!(out)?;
            for (name, scores) in &rows {
                write!(out, "{name:width$}")?;
                for (score, column) in scores.iter().zip(&columns) {
                    let score = score.map_or_else(String::new, |score| format!("{score:.3}"));
                    write!(out, "  {score:>column$}")?;
                }
                writeln!(out)?;
            }
            for (name, spread) in self.figures(view) {
                if let Some(mean) = spread.mean {
                    let deviation = spread.deviation.map_or_else(String::new, |d| format!(" ± {d:.4}"));
                    writeln!(out, "  {name:22} {mean:.4}{deviation}")?;
                }
            }
            writeln!(out)?;
        }
        for (name, value) in self.costs() {
            if let Some(mean) = value.mean {
                let deviation = value.deviation.map_or_else(String::new, |d| format!(" ± {d:.4}"));
                writeln!(out, "{name:24} {mean:.4}{deviation}")?;
            }
        }
        let taught = self.runs.iter().map(|run| told(&run.taught)).collect::<Vec<_>>().join("; ");
        writeln!(out, "documents                {taught}")?;
        Ok(())
    }

    /// Everything, with the figures of each seed.
    ///
    /// # Errors
    /// When the settings cannot be written as JSON.
    pub fn json(&self) -> Result<Value> {
        let mut whole = Map::new();
        let names: Vec<&str> = self.tasks.iter().map(|task| task.name.as_str()).collect();
        whole.insert("tasks".into(), json!(names));
        whole.insert(
            "method".into(),
            json!(self.method.to_possible_value().map(|name| name.get_name().to_owned())),
        );
        whole.insert("options".into(), self.options.clone());
        whole.insert("seeds".into(), json!(self.runs.len()));
        whole.insert("settings".into(), serde_json::to_value(self.settings)?);
        let Some(first) = self.runs.first() else { return Ok(Value::Object(whole)) };
        for (view, (name, matrix)) in first.views.iter().enumerate() {
            let mut figures = Map::new();
            figures.insert("measure".into(), serde_json::to_value(matrix.measure)?);
            figures.insert("base".into(), json!(matrix.base));
            figures.insert("matrix".into(), self.matrix(view));
            for (name, spread) in self.figures(view) {
                figures.insert(name.into(), serde_json::to_value(spread)?);
            }
            if view == 0 {
                whole.append(&mut figures);
            } else {
                whole.insert((*name).into(), Value::Object(figures));
            }
        }
        for (name, spread) in self.costs() {
            whole.insert(name.into(), serde_json::to_value(spread)?);
        }
        let drift =
            |run: &Run| run.drift.iter().map(|(n, rise)| (n.clone(), json!(rise))).collect::<Map<_, _>>();
        let each = |run: &Run| json!({ "documents": run.taught, "drift": drift(run) });
        whole.insert("runs".into(), self.runs.iter().map(each).collect());
        Ok(Value::Object(whole))
    }

    /// The main matrix as a heat map.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn draw(&self, path: &Path) -> Result<()> {
        let names: Vec<String> = self.tasks.iter().map(|task| task.name.clone()).collect();
        let higher = self.runs.first().is_some_and(|run| run.views[0].1.measure == Measure::Accuracy);
        heatmap::write(&names, &self.rows(0), higher, path)
    }

    fn title(&self, view: usize, name: &str) -> String {
        let measure = match self.runs[0].views[view].1.measure {
            Measure::Accuracy => "share of right answers",
            Measure::Nll => "nats a token",
        };
        let shared = self.settings.train.adapters == kit::settings::AdapterScope::Shared;
        let who = match (shared, view >= 2) {
            (true, _) => "one shared adapter",
            (false, false) => "adapters chosen by content",
            (false, true) => "each task's own adapter (an oracle's choice)",
        };
        let labels = if self.runs[0].views[view].1.measure == Measure::Accuracy {
            if name.ends_with("own_labels") {
                ", among a task's own labels"
            } else {
                ", among all labels seen"
            }
        } else {
            ""
        };
        format!("{measure}, {who}{labels}:")
    }

    /// The rows of a view with their names, as means over seeds.
    fn rows(&self, view: usize) -> Vec<(String, Vec<Option<f64>>)> {
        let of = |run: &Run| run.views[view].1.clone();
        let first = of(&self.runs[0]);
        let mut rows = vec![("base".to_owned(), first.base.iter().copied().map(Some).collect())];
        for i in 0..first.rows.len() {
            let name = match self.method {
                method if method.is_joint() => "all at once".to_owned(),
                Method::Single => format!("only {}", self.tasks[i].name),
                _ => format!("after {}", self.tasks[i].name),
            };
            let cell = |j: usize| Spread::of(self.runs.iter().map(|run| of(run).rows[i][j])).mean;
            rows.push((name, (0..self.tasks.len()).map(cell).collect()));
        }
        rows
    }

    fn matrix(&self, view: usize) -> Value {
        let first = &self.runs[0].views[view].1;
        let cell = |i: usize, j: usize| Spread::of(self.runs.iter().map(|run| run.views[view].1.rows[i][j]));
        let part = |take: fn(Spread) -> Option<f64>| -> Vec<Vec<Option<f64>>> {
            let row = |i: usize| (0..self.tasks.len()).map(|j| take(cell(i, j))).collect();
            (0..first.rows.len()).map(row).collect()
        };
        json!({ "mean": part(|s| s.mean), "deviation": part(|s| s.deviation) })
    }

    fn figures(&self, view: usize) -> Vec<(&'static str, Spread)> {
        let summaries: Vec<Summary> = self.runs.iter().map(|run| run.views[view].1.summary()).collect();
        FIGURES.iter().map(|(name, take)| (*name, Spread::of(summaries.iter().map(take)))).collect()
    }

    fn costs(&self) -> Vec<(&'static str, Spread)> {
        let over = |figure: &dyn Fn(&Run) -> Option<f64>| Spread::of(self.runs.iter().map(figure));
        let anchor = |run: &Run| run.drift.first().map(|(_, rise)| *rise);
        let route = |place: usize| over(&|run: &Run| run.routes.map(|routes| routes[place]));
        // Tasks on their own leave no system that has learned them all.
        let whole = |spread: Spread| if self.method == Method::Single { Spread::of([None]) } else { spread };
        vec![
            ("base_drift", whole(over(&|run| Some(run.drift_mean())))),
            ("base_drift_anchor", whole(over(&anchor))),
            ("routed_right", whole(route(0))),
            ("routed_base", whole(route(1))),
            ("routed_wrong", whole(route(2))),
            ("seconds", over(&|run| Some(run.taught.seconds))),
            ("training_seconds", over(&|run| Some(run.taught.generation_seconds.training))),
            ("measuring_seconds", over(&|run| Some(run.taught.generation_seconds.measuring))),
            ("adapter_bytes", over(&|run| Some(run.adapter_bytes as f64))),
            ("replay_bytes", over(&|run| Some(run.replay_bytes as f64))),
        ]
    }
}

/// Writes all figures to the file that is asked for, if one is.
///
/// # Errors
/// When it cannot be written.
pub fn store(path: Option<&Path>, figures: &Value) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let text = serde_json::to_string_pretty(figures)?;
    fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))
}

/// What became of documents, in words.
pub fn told(taught: &Taught) -> String {
    let Taught { live, refused, set_aside, generations, seconds, generation_seconds, last_batch } = taught;
    let GenerationSeconds { training, measuring } = generation_seconds;
    format!(
        "{live} learned, {refused} refused, {set_aside} set aside, {generations} generations, {seconds:.0} s ({training:.0} of \
         training and {measuring:.0} of the gate's measuring), last batch: {}",
        last_batch.in_words()
    )
}
