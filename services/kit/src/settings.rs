//! Settings: what is compiled in, then a TOML file, then the environment, then flags; checked as a
//! whole before anything starts.

mod limits;

use anyhow::{Context, bail};
use config::{Config, Environment, File, FileFormat, Value, ValueKind};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
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
        batch_counted: usize,
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
        passage_tokens_max: usize,
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
        let config = builder.build()?;
        limits::words(&config)?;
        let settings: Self = config.try_deserialize().context("a setting has a value of the wrong type")?;
        settings.validate()?;
        Ok(settings)
    }

    /// The learning rate, by its own word or from the width of the base.
    pub fn rate(&self, width: i64) -> f64 {
        if self.train.rate > 0.0 { self.train.rate } else { 1e-3 * (2000.0 / width as f64).powf(0.781) }
    }
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
