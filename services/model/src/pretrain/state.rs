//! The state of a run on disk, from which it goes on exactly where it was.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Budget;
use super::trainer::Trainer;
use crate::optim::Counters;
use crate::weights;

/// The folder of a run's state, beside the model that it writes.
pub const FOLDER: &str = "training";

/// The state after the last step that was saved.
pub(super) const LAST: &str = "last.safetensors";

/// The state before the rates began to fall, from which a longer run goes on.
pub(super) const STABLE: &str = "stable.safetensors";

const METADATA: &str = "pretrain";

/// A point of the loss curve.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Tokens learned from so far.
    pub tokens: u64,
    /// Mean NLL in nats a token: of the training steps since the last point.
    pub training: f64,
    /// Of the beginning of each held-out text, by name.
    pub held_out: BTreeMap<String, f64>,
}

/// What decides how a run goes: runs of equal settings on equal texts are one run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub preset: Value,
    pub seed: u64,
    /// Shape of the teacher and its share, where there is one.
    pub teacher: Option<Value>,
    /// Name and number of tokens of each training text.
    pub texts: Vec<(String, u64)>,
}

/// How far a run is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    pub identity: Identity,
    pub budget: Budget,
    /// Whether the rates have begun to fall.
    pub falling: bool,
    pub step: u64,
    pub tokens: u64,
    pub elapsed: Duration,
    pub curve: Vec<Point>,
    pub counters: Counters,
}

/// Writes the state of `trainer`, whole or not at all.
pub(super) fn save(folder: &Path, name: &str, trainer: &Trainer, record: &Record) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("{}: cannot create", folder.display()))?;
    let (tensors, counters) = trainer.state();
    let record = Record { counters, ..record.clone() };
    let bytes = weights::to_bytes(&tensors, METADATA, &serde_json::to_string(&record)?)?;
    let (part, path) = (folder.join(format!("{name}.part")), folder.join(name));
    File::create(&part)
        .and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&part, &path))
        .with_context(|| format!("{}: cannot write", path.display()))
}

/// The record of a state.
pub(super) fn record(path: &Path) -> Result<Record> {
    let data = weights::map(path)?;
    let record = weights::metadata(&data, METADATA).with_context(|| path.display().to_string())?;
    serde_json::from_str(&record).with_context(|| format!("{}: no state of a run", path.display()))
}

/// Brings `trainer` to the state at `path`; its record says how far that is.
pub(super) fn restore(path: &Path, trainer: &mut Trainer) -> Result<Record> {
    let record = record(path)?;
    let data = weights::map(path)?;
    let (mut tensors, _) = weights::from_bytes(&data, METADATA)?;
    trainer.restore(&mut tensors, record.counters).with_context(|| format!("{}: damaged", path.display()))?;
    Ok(record)
}

/// Which state a run of `budget` goes on from.
///
/// A run that is to last longer than it was planned for must not go on from falling rates: what they settled
/// would be stirred up again.
pub(super) fn choose(folder: &Path, identity: &Identity, budget: Budget) -> Result<&'static str> {
    let last = record(&folder.join(LAST))?;
    ensure!(
        last.identity == *identity,
        "the run in {} had other settings, another seed or other texts: give those, or another --out",
        folder.display()
    );
    if last.budget == budget || !last.falling {
        return Ok(LAST);
    }
    let stable = folder.join(STABLE);
    ensure!(stable.is_file(), "{}: missing, and the rates of this run have begun to fall", stable.display());
    Ok(STABLE)
}
