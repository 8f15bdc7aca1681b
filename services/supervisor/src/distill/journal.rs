//! What was asked and answered already, so that a run that was ended goes on where it was.
//!
//! One JSON object a line, on disk before anything is done on the strength of it. Answers are in it
//! until they are submitted and the run ends: then only what was asked is left, since a document that
//! is forgotten must not live on here.

use super::cost::Usage;
use super::filter::Rejected;
use super::pairs::Pair;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// What became of a unit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Accepted pairs; none once they are submitted and the run has ended.
    pub pairs: Vec<Pair>,
    /// The questions of all accepted pairs, by their fingerprints.
    pub questions: Vec<String>,
    /// What was not accepted.
    pub rejected: Rejected,
    /// What it took.
    pub usage: Usage,
    /// Whether the server has the pairs.
    #[serde(default)]
    pub submitted: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Record {
    /// The first line: a hash of what is the same for all units.
    Settings(String),
    Answered {
        unit: String,
        outcome: Outcome,
    },
    Submitted {
        unit: String,
        rejected: Rejected,
    },
}

/// An open journal; no other process has it meanwhile.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    settings: String,
    units: BTreeMap<String, Outcome>,
}

impl Journal {
    /// Opens or begins a journal. A last line that was not written whole counts as not written.
    ///
    /// # Errors
    /// When it is in use, is of a run with other settings, or is damaged.
    pub fn open(path: &Path, settings: &str) -> Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.read(true).append(true).create(true).mode(0o600).open(path);
        let file = file.with_context(|| format!("the journal {} cannot be opened", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                bail!("another engram distill is at work with {}; wait for its end", path.display())
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).context(format!("{} cannot be locked", path.display()));
            }
        }
        let (settings, units) = (settings.to_owned(), BTreeMap::new());
        let mut journal = Self { path: path.to_owned(), file, settings, units };
        journal.load()?;
        Ok(journal)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What became of a unit, if it was asked.
    pub fn outcome(&self, unit: &str) -> Option<&Outcome> {
        self.units.get(unit)
    }

    /// The questions of all pairs that were accepted.
    pub fn questions(&self) -> BTreeSet<String> {
        self.units.values().flat_map(|outcome| outcome.questions.iter().cloned()).collect()
    }

    /// Writes down an answer.
    ///
    /// # Errors
    /// When it cannot be brought to disk.
    pub fn answered(&mut self, unit: &str, outcome: Outcome) -> Result<()> {
        self.write(&Record::Answered { unit: unit.to_owned(), outcome: outcome.clone() })?;
        self.units.insert(unit.to_owned(), outcome);
        Ok(())
    }

    /// Writes down that the server has the pairs of a unit, or why it is not to have them after all.
    ///
    /// # Errors
    /// When it cannot be brought to disk.
    pub fn submitted(&mut self, unit: &str, rejected: Rejected) -> Result<()> {
        let record = Record::Submitted { unit: unit.to_owned(), rejected };
        self.write(&record)?;
        self.apply(record)
    }

    /// Writes it anew without the texts that the server has.
    ///
    /// # Errors
    /// When it cannot be brought to disk.
    pub fn close(mut self) -> Result<()> {
        let written = [Record::Settings(self.settings.clone())].into_iter();
        let records = std::mem::take(&mut self.units).into_iter().map(|(unit, mut outcome)| {
            if outcome.submitted {
                outcome.pairs.clear();
            }
            Record::Answered { unit, outcome }
        });
        let mut text = Vec::new();
        for record in written.chain(records) {
            text.extend(line(&record)?);
        }
        replace(&self.path, &text)
    }

    fn load(&mut self) -> Result<()> {
        let shown = self.path.display().to_string();
        let mut bytes = Vec::new();
        self.file.read_to_end(&mut bytes).with_context(|| format!("{shown} cannot be read"))?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        if whole < bytes.len() {
            self.file.set_len(whole as u64).with_context(|| format!("{shown} cannot be repaired"))?;
        }
        let lines = bytes[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let mut has_settings = false;
        for (number, line) in lines.enumerate() {
            let record: Record = serde_json::from_slice(line).with_context(|| {
                format!("the journal {shown} is damaged in line {}; --again begins a new one", number + 1)
            })?;
            if number == 0 {
                ensure!(
                    matches!(&record, Record::Settings(settings) if *settings == self.settings),
                    "{shown} is of a run with another teacher, model or flags; --again begins a new one"
                );
                has_settings = true;
            } else {
                self.apply(record)?;
            }
        }
        if !has_settings {
            self.write(&Record::Settings(self.settings.clone()))?;
            sync_folder(&self.path)?;
        }
        Ok(())
    }

    fn apply(&mut self, record: Record) -> Result<()> {
        match record {
            Record::Settings(_) => bail!("{} begins twice; --again begins a new one", self.path.display()),
            Record::Answered { unit, outcome } => drop(self.units.insert(unit, outcome)),
            Record::Submitted { unit, rejected } => {
                let outcome = self.units.entry(unit).or_default();
                outcome.submitted = true;
                if !rejected.is_empty() {
                    outcome.questions.clear();
                }
                for (reason, count) in rejected {
                    *outcome.rejected.entry(reason).or_default() += count;
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, record: &Record) -> Result<()> {
        let line = line(record)?;
        let written = self.file.write_all(&line).and_then(|()| self.file.sync_data());
        written.with_context(|| format!("{} cannot be written; make room on its disk", self.path.display()))
    }
}

fn line(record: &Record) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(record)?;
    line.push(b'\n');
    Ok(line)
}

/// Puts a whole file into the place of another, or of none; never a part of it.
///
/// # Errors
/// When it cannot be brought to disk.
pub fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let part = beside(path, "part");
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&part)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&part, path)
    };
    write().with_context(|| format!("{} cannot be written", path.display()))?;
    sync_folder(path)
}

/// The same path with an extension more.
pub fn beside(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    name.into()
}

/// A file is only as durable as its name.
fn sync_folder(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.with_context(|| format!("the folder {} cannot be written", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::super::filter::Rejection;
    use super::*;

    fn outcome(prompt: &str) -> Outcome {
        let pair = Pair { prompt: prompt.into(), completion: "SECRET".into() };
        Outcome { pairs: vec![pair], questions: vec![prompt.to_lowercase()], ..Outcome::default() }
    }

    fn place() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("journal.jsonl");
        (folder, path)
    }

    fn open(path: &Path) -> Journal {
        Journal::open(path, "s1").expect("opened")
    }

    #[test]
    fn what_was_written_is_there_after_a_kill_and_a_torn_line_is_not() {
        let (_folder, path) = place();
        let mut journal = open(&path);
        journal.answered("u1", outcome("A")).expect("written");
        journal.answered("u2", outcome("B")).expect("written");
        journal.submitted("u1", Rejected::new()).expect("written");
        drop(journal);
        let whole = fs::read(&path).expect("read");
        for torn in [&b"{"[..], b"{\"answered\":{\"unit\":\"u3\",\"outcome\"", b"\xff\xff"] {
            fs::write(&path, [&whole, torn].concat()).expect("written");
            let mut journal = open(&path);
            assert!(journal.outcome("u1").expect("there").submitted);
            assert!(!journal.outcome("u2").expect("there").submitted);
            assert_eq!(journal.questions(), BTreeSet::from(["a".to_owned(), "b".to_owned()]));
            // What comes next is a line of its own.
            journal.answered("u3", outcome("C")).expect("written");
            drop(journal);
            assert_eq!(open(&path).units.len(), 3);
        }
    }

    #[test]
    fn what_the_server_has_leaves_the_journal_when_the_run_ends() {
        let (_folder, path) = place();
        let mut journal = open(&path);
        journal.answered("u1", outcome("A")).expect("written");
        journal.submitted("u1", Rejected::new()).expect("written");
        journal.answered("u2", outcome("B")).expect("written");
        journal.submitted("u2", Rejected::from([(Rejection::Forgotten, 1)])).expect("written");
        journal.close().expect("closed");
        assert!(!fs::read_to_string(&path).expect("text").contains("SECRET"));
        let mut journal = open(&path);
        let kept = journal.outcome("u1").expect("there");
        assert!(kept.submitted && kept.pairs.is_empty());
        let forgotten = journal.outcome("u2").expect("there");
        assert_eq!(
            (forgotten.questions.len(), &forgotten.rejected),
            (0, &[(Rejection::Forgotten, 1)].into())
        );
        assert_eq!(journal.questions(), BTreeSet::from(["a".to_owned()]));
        journal.answered("u3", outcome("C")).expect("written");
        journal.close().expect("closed");
        assert_eq!(open(&path).outcome("u3").expect("there").pairs.len(), 1, "nobody has it yet");
    }

    #[test]
    fn a_journal_of_another_run_in_use_or_damaged_is_refused() {
        let (_folder, path) = place();
        let refusal = |path: &Path, settings: &str| {
            let error = Journal::open(path, settings).expect_err("must be refused");
            format!("{error:#}")
        };
        let mut journal = open(&path);
        assert!(refusal(&path, "s1").contains("another engram distill"));
        journal.answered("u1", outcome("A")).expect("written");
        drop(journal);
        assert!(refusal(&path, "s2").contains("--again"));
        let text = fs::read_to_string(&path).expect("text").replace("\"u1\"", "u1");
        fs::write(&path, text).expect("written");
        assert!(refusal(&path, "s1").contains("line 2"));
    }
}
