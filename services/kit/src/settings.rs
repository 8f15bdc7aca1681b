//! Settings: what is compiled in, then a TOML file, then the environment, then flags; checked as a
//! whole before anything starts.

use anyhow::{Context, bail, ensure};
use config::{Config, Environment, File, FileFormat, Value, ValueKind};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::Path;

const DEFAULT: &str = include_str!("../../../configs/default.toml");

/// Where flags and environment variables end up: `section.key` with its value.
type Flat = BTreeMap<String, Value>;

/// Defines a section: a struct whose fields are those of `configs/default.toml`, where each is
/// explained with its unit.
macro_rules! section {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        #[allow(missing_docs, reason = "configs/default.toml explains each")]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }
    };
}

section!(
    /// All settings.
    Settings {
        base: Base,
        gateway: Gateway,
        ingest: Ingest,
        filter: Filter,
        replay: Replay,
        train: Train,
        consolidate: Consolidate,
        checkpoint: Checkpoint,
        infer: Infer,
        telemetry: Telemetry,
        supervisor: Supervisor,
        limits: Limits,
    }
);

section!(
    /// The frozen base.
    Base {
        device: String,
        precision: String,
        quantisation: String,
        threads: usize,
    }
);

section!(
    /// The HTTP door.
    Gateway {
        listen: String,
        api_keys: Vec<String>,
        body_bytes_max: usize,
        import_bytes_max: usize,
        upload_bytes_max: usize,
        document_bytes_max: usize,
        documents_per_request_max: usize,
        intake_documents_max: u64,
        prompt_bytes_max: usize,
        requests_per_s: u32,
        burst: u32,
        header_seconds_max: u64,
        body_seconds_max: u64,
        generation_seconds_max: u64,
    }
);

/// In which renderings a prompt with its answer is learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Views {
    /// As it stands.
    Verbatim,
    /// As one exchange of a chat.
    Chat,
    /// Both.
    Both,
}

section!(
    /// Cutting documents into examples.
    Ingest {
        max_seq_len: usize,
        views: Views,
        questions: usize,
    }
);

section!(
    /// What is worth learning.
    Filter {
        chars_min: usize,
        repetition_max: f32,
        near_duplicate: f32,
        secrets: bool,
        languages: Vec<String>,
    }
);

/// What the replay buffer keeps when it is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// A uniform sample.
    Reservoir,
    /// The most important.
    Importance,
    /// Those least alike.
    Diversity,
    /// All of these, fair between domains.
    Hybrid,
}

section!(
    /// Rehearsal.
    Replay {
        capacity: usize,
        strategy: Strategy,
        new_data_ratio: f32,
        rehearse_min: usize,
        batch_examples: usize,
        batch_labelled: usize,
        held_out_share: f32,
        held_out_after: u64,
        anchors: usize,
        anchor_tokens: usize,
        seed: u64,
    }
);

/// Which documents share an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdapterScope {
    /// Those of a domain.
    PerDomain,
    /// All.
    Shared,
}

/// What learning multiplies with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Products {
    /// What is fastest on this machine.
    Auto,
    /// The base's weights as they are.
    Own,
    /// The same rounded to 8 bits.
    Int8,
}

impl Products {
    /// Whether it is with 8 bits, where `faster` says whether that is faster.
    pub fn are_int8(self, faster: impl FnOnce() -> bool) -> bool {
        self == Self::Int8 || self == Self::Auto && faster()
    }
}

section!(
    /// Learning.
    Train {
        enabled: bool,
        products: Products,
        adapters: AdapterScope,
        rank: i64,
        alpha: f64,
        rslora: bool,
        down: bool,
        top_layers: i64,
        latents_mb_max: u64,
        rate: f64,
        answer_rate: f64,
        passes: u32,
        answer_passes_max: u32,
        loss_target: f32,
        repeat_counted: bool,
        steps_min: u32,
        review_passes: u32,
        step_tokens: usize,
        micro_tokens: usize,
        row_tokens: usize,
        anchor_share: f32,
        clip: f64,
        weight_decay: f64,
        ewc_lambda: f64,
        olora_lambda: f64,
        olora_parts: i64,
        former_share: f64,
        former_share_rehearsed: f64,
        answers_apart: bool,
        poll_ms: u64,
        share_while_serving: f32,
    }
);

section!(
    /// The gate.
    Consolidate {
        tolerance: f32,
        anchor_tolerance: f32,
        memory_probe: usize,
        held_out_probe: usize,
        anchor_probe: usize,
        attempts_max: u32,
        fisher_examples: usize,
        fisher_decay: f64,
        answer_head: bool,
    }
);

section!(
    /// Generations.
    Checkpoint {
        generations_kept: usize,
    }
);

section!(
    /// Answering.
    Infer {
        max_running: usize,
        queue_max: usize,
        cache_mb_max: usize,
        narrow_copy: bool,
        max_tokens_default: u32,
        route_strictness: f32,
        route_top: usize,
    }
);

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

section!(
    /// Logs.
    Telemetry {
        format: LogFormat,
        level: String,
    }
);

section!(
    /// Restarts.
    Supervisor {
        restart_delay_ms_min: u64,
        restart_delay_ms_max: u64,
        restarts_max: usize,
        restarts_window_s: u64,
        stop_seconds_max: u64,
    }
);

section!(
    /// Limits of the machine.
    Limits {
        disk_free_learn_percent: u8,
        disk_free_intake_percent: u8,
        memory_mb_max: usize,
    }
);

impl Settings {
    /// Puts settings together from what is compiled in, a file, the environment, and flags of the form
    /// `section.key=value`.
    ///
    /// # Errors
    /// When a key is unknown (the nearest known one is named), or a value is of the wrong type or out
    /// of its range.
    pub fn load(file: Option<&Path>, flags: &[String]) -> anyhow::Result<Self> {
        let defaults = Config::builder().add_source(File::from_str(DEFAULT, FileFormat::Toml)).build()?;
        let known = flatten(&defaults)?;
        let mut builder = Config::builder().add_source(defaults);
        if let Some(path) = file {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("{} cannot be read", path.display()))?;
            let read = Config::builder().add_source(File::from_str(&text, FileFormat::Toml)).build();
            let read = read.with_context(|| format!("{} is not TOML", path.display()))?;
            refuse_unknown(&known, flatten(&read)?.keys(), &path.display().to_string())?;
            builder = builder.add_source(read);
        }
        let environment = Environment::with_prefix("ENGRAM").prefix_separator("__").separator("__");
        let environment = Config::builder().add_source(environment).build()?;
        let mut given: Vec<(String, String, &str)> = Vec::new();
        for (key, value) in flatten(&environment)? {
            given.push((key, value.into_string()?, "the environment"));
        }
        for flag in flags {
            let (key, value) = flag
                .split_once('=')
                .with_context(|| format!("--set {flag}: give it as section.key=value"))?;
            given.push((key.trim().to_owned(), value.trim().to_owned(), "--set"));
        }
        for (key, value, from) in given {
            refuse_unknown(&known, [&key], from)?;
            builder = builder.set_override(&key, parsed(&known[&key], &value))?;
        }
        let settings: Self =
            builder.build()?.try_deserialize().context("a setting has a value of the wrong type")?;
        settings.validate()?;
        Ok(settings)
    }

    /// The learning rate, by its own word or from the width of the base.
    pub fn rate(&self, width: i64) -> f64 {
        if self.train.rate > 0.0 { self.train.rate } else { 5e-4 * (2000.0 / width as f64).powf(0.781) }
    }

    fn validate(&self) -> anyhow::Result<()> {
        let (r, t, c) = (&self.replay, &self.train, &self.consolidate);
        // More threads than a few for each core only wait for each other, and are a slip of the finger.
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        within("base.threads", self.base.threads, 0..=4 * cores)?;
        within("replay.new_data_ratio", r.new_data_ratio, 0.05..=1.0)?;
        within("replay.held_out_share", r.held_out_share, 0.0..=0.5)?;
        within("replay.capacity", r.capacity, 1..=10_000_000)?;
        within("replay.batch_examples", r.batch_examples, 1..=100_000)?;
        within("replay.batch_labelled", r.batch_labelled, 1..=100_000)?;
        within("replay.anchors", r.anchors, 0..=10_000)?;
        within("replay.anchor_tokens", r.anchor_tokens, 2..=4096)?;
        within("train.rank", t.rank, 1..=1024)?;
        within("train.alpha", t.alpha, 1e-3..=1e5)?;
        within("train.top_layers", t.top_layers, 0..=1024)?;
        within("train.latents_mb_max", t.latents_mb_max, 0..=1 << 20)?;
        within("train.rate", t.rate, 0.0..=1.0)?;
        within("train.answer_rate", t.answer_rate, 0.01..=100.0)?;
        within("train.passes", t.passes, 1..=1000)?;
        within("train.answer_passes_max", t.answer_passes_max, 1..=10_000)?;
        within("train.loss_target", t.loss_target, 0.0..=10.0)?;
        within("train.steps_min", t.steps_min, 1..=10_000)?;
        within("train.review_passes", t.review_passes, 0..=1000)?;
        within("train.step_tokens", t.step_tokens, 16..=1_000_000)?;
        within("train.micro_tokens", t.micro_tokens, 16..=1_000_000)?;
        within("train.row_tokens", t.row_tokens, 16..=65_536)?;
        within("train.anchor_share", t.anchor_share, 0.0..=10.0)?;
        within("train.clip", t.clip, 1e-6..=1e6)?;
        within("train.weight_decay", t.weight_decay, 0.0..=10.0)?;
        // Strengths from 3 up were fair while they were of absolute information, and would let nothing be learned now.
        within("train.ewc_lambda", t.ewc_lambda, 0.0..=1.0)?;
        within("train.olora_lambda", t.olora_lambda, 0.0..=1e6)?;
        within("train.olora_parts", t.olora_parts, 1..=512)?;
        ensure!(
            t.olora_lambda == 0.0 || t.olora_parts <= t.rank,
            "train.olora_parts is {}, and train.rank of {} cannot be cut into so many",
            t.olora_parts,
            t.rank
        );
        ensure!(
            t.olora_lambda == 0.0 || t.weight_decay == 0.0,
            "train.weight_decay shrinks what train.olora_lambda has left as it is: set one of them to 0"
        );
        within("train.former_share", t.former_share, 0.0..=0.9)?;
        within("train.former_share_rehearsed", t.former_share_rehearsed, 0.0..=1.0)?;
        within("train.poll_ms", t.poll_ms, 10..=1000)?;
        within("train.share_while_serving", t.share_while_serving, 0.01..=1.0)?;
        within("consolidate.tolerance", c.tolerance, 0.0..=10.0)?;
        within("consolidate.anchor_tolerance", c.anchor_tolerance, 0.0..=10.0)?;
        within("consolidate.attempts_max", c.attempts_max, 1..=10)?;
        within("consolidate.fisher_examples", c.fisher_examples, 1..=10_000)?;
        within("consolidate.fisher_decay", c.fisher_decay, 0.0..=1.0)?;
        self.validate_doors()
    }

    fn validate_doors(&self) -> anyhow::Result<()> {
        let (g, f, s) = (&self.gateway, &self.filter, &self.supervisor);
        within("base.threads", self.base.threads, 0..=1024)?;
        within("gateway.body_bytes_max", g.body_bytes_max, 1024..=1 << 30)?;
        within("gateway.import_bytes_max", g.import_bytes_max, 1024..=1 << 31)?;
        within("gateway.upload_bytes_max", g.upload_bytes_max, 1024..=1 << 31)?;
        within("gateway.document_bytes_max", g.document_bytes_max, 64..=1 << 26)?;
        within("gateway.documents_per_request_max", g.documents_per_request_max, 1..=100_000)?;
        within("gateway.intake_documents_max", g.intake_documents_max, 1..=100_000_000)?;
        within("gateway.prompt_bytes_max", g.prompt_bytes_max, 64..=1 << 28)?;
        within("gateway.requests_per_s", g.requests_per_s, 1..=1_000_000)?;
        within("gateway.burst", g.burst, 1..=1_000_000)?;
        within("gateway.header_seconds_max", g.header_seconds_max, 1..=600)?;
        within("gateway.body_seconds_max", g.body_seconds_max, 1..=600)?;
        within("gateway.generation_seconds_max", g.generation_seconds_max, 1..=86_400)?;
        for key in &g.api_keys {
            let fits = (16..=256).contains(&key.len()) && key.bytes().all(|b| b.is_ascii_graphic());
            ensure!(fits, "gateway.api_keys: each is 16 to 256 visible ASCII characters");
        }
        within("ingest.max_seq_len", self.ingest.max_seq_len, 16..=65_536)?;
        within("ingest.questions", self.ingest.questions, 0..=1000)?;
        within("filter.repetition_max", f.repetition_max, 0.0..=1.0)?;
        within("filter.near_duplicate", f.near_duplicate, 0.1..=1.0)?;
        within("checkpoint.generations_kept", self.checkpoint.generations_kept, 1..=10_000)?;
        within("infer.max_running", self.infer.max_running, 1..=1024)?;
        within("infer.queue_max", self.infer.queue_max, 0..=65_536)?;
        within("infer.cache_mb_max", self.infer.cache_mb_max, 1..=1 << 20)?;
        within("infer.max_tokens_default", self.infer.max_tokens_default, 1..=1 << 20)?;
        within("infer.route_strictness", self.infer.route_strictness, 0.0..=2.0)?;
        within("infer.route_top", self.infer.route_top, 1..=8)?;
        within("supervisor.restart_delay_ms_min", s.restart_delay_ms_min, 1..=60_000)?;
        within("supervisor.restart_delay_ms_max", s.restart_delay_ms_max, s.restart_delay_ms_min..=600_000)?;
        within("supervisor.restarts_max", s.restarts_max, 1..=1000)?;
        within("supervisor.restarts_window_s", s.restarts_window_s, 1..=86_400)?;
        within("supervisor.stop_seconds_max", s.stop_seconds_max, 1..=600)?;
        within("limits.memory_mb_max", self.limits.memory_mb_max, 0..=1 << 24)?;
        within("limits.disk_free_learn_percent", self.limits.disk_free_learn_percent, 0..=90)?;
        within("limits.disk_free_intake_percent", self.limits.disk_free_intake_percent, 0..=90)
    }
}

fn within<T: PartialOrd + std::fmt::Display>(
    key: &str,
    value: T,
    range: RangeInclusive<T>,
) -> anyhow::Result<()> {
    // A value that is not a number is in no range.
    ensure!(range.contains(&value), "{key} is {value}; it takes {} to {}", range.start(), range.end());
    Ok(())
}

/// All keys of a configuration as `section.key`.
fn flatten(config: &Config) -> anyhow::Result<Flat> {
    fn walk(prefix: &str, value: Value, out: &mut Flat) {
        match value.kind {
            ValueKind::Table(table) => {
                for (key, value) in table {
                    let name = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
                    walk(&name, value, out);
                }
            }
            _ => drop(out.insert(prefix.to_owned(), value)),
        }
    }
    let mut out = Flat::new();
    for (key, value) in config.cache.clone().into_table()? {
        walk(&key, value, &mut out);
    }
    Ok(out)
}

fn refuse_unknown<'a>(
    known: &Flat,
    keys: impl IntoIterator<Item = &'a String>,
    from: &str,
) -> anyhow::Result<()> {
    for key in keys {
        if !known.contains_key(key) {
            let nearest = known.keys().min_by_key(|k| strsim::damerau_levenshtein(k, key));
            let nearest = nearest.map_or(String::new(), |k| format!("; did you mean {k}?"));
            bail!("{from}: there is no setting {key}{nearest}");
        }
    }
    Ok(())
}

/// A value that came as text, in the type of the default: a list is separated by commas.
fn parsed(default: &Value, text: &str) -> Value {
    let kind = match &default.kind {
        ValueKind::Array(_) => {
            let items = text.trim_matches(['[', ']']).split(',').map(|item| item.trim().trim_matches('"'));
            let items = items.filter(|item| !item.is_empty()).map(|item| Value::from(item.to_owned()));
            ValueKind::Array(items.collect())
        }
        ValueKind::Boolean(_) => text.parse().map_or_else(|_| text.into(), ValueKind::Boolean),
        ValueKind::String(_) => text.into(),
        _ => text
            .parse::<i64>()
            .map(ValueKind::I64)
            .or_else(|_| text.parse().map(ValueKind::Float))
            .unwrap_or_else(|_| text.into()),
    };
    Value::new(None, kind)
}

#[cfg(test)]
mod tests;
