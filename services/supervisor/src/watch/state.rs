//! What was learned from which file, on disk.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What a watcher knows.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// By the names of the files, as their documents carry them.
    pub files: BTreeMap<String, Known>,
    /// Documents that no file says any more, and that the server may still know.
    pub stale: BTreeSet<String>,
    #[serde(skip)]
    path: PathBuf,
}

/// A file that was seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Known {
    /// Hash of its content; none while its learning has begun and not ended.
    pub hash: Option<String>,
    /// Its size in bytes and when it was changed, nanoseconds since 1970: while both are the same, so is it.
    pub stamp: (u64, u128),
    /// What the server was told, or may have been told, by their ids.
    pub documents: BTreeSet<String>,
}

/// The state is not on disk: to go on would lose track of what was learned.
#[derive(Debug, thiserror::Error)]
#[error("{} cannot be written: {error}; what was learned from which file has to be kept there", .path.display())]
pub struct NotKept {
    path: PathBuf,
    error: std::io::Error,
}

impl State {
    /// Reads the state, or begins one. The lock is held as long as the file that is given back.
    ///
    /// # Errors
    /// When it is damaged, or another watcher has it.
    pub fn open(path: &Path) -> Result<(Self, File)> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
        let lock = File::create(path.with_extension("lock"))
            .with_context(|| format!("{} cannot be locked", path.display()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!("this folder is watched already: stop that watcher first"),
            Err(TryLockError::Error(error)) => return Err(error).context("the state cannot be locked"),
        }
        let mut state = match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| {
                format!("{} is damaged; without it all files are learned anew", path.display())
            })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Self::default(),
            Err(error) => return Err(error).with_context(|| format!("{} cannot be read", path.display())),
        };
        path.clone_into(&mut state.path);
        Ok((state, lock))
    }

    /// Writes the state, all of it or nothing.
    ///
    /// # Errors
    /// [`NotKept`].
    pub fn save(&self) -> Result<()> {
        let part = self.path.with_extension("part");
        let write = || {
            let mut file = File::create(&part)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            file.sync_all()?;
            fs::rename(&part, &self.path)?;
            let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
            File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
        };
        write().map_err(|error| NotKept { path: self.path.clone(), error }.into())
    }

    /// Whether a file says this document.
    pub fn is_said(&self, document: &str) -> bool {
        self.files.values().any(|known| known.documents.contains(document))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_what_is_opened_and_one_at_a_time_has_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("deep/state.json");
        let (mut state, lock) = State::open(&path).expect("a new one");
        let known = Known { hash: Some("h".into()), stamp: (3, 1 << 70), documents: ["d".into()].into() };
        state.files.insert("a.md".into(), known.clone());
        state.save().expect("saved");
        let error = State::open(&path).expect_err("it is held").to_string();
        assert!(error.contains("watched already"), "{error}");
        drop(lock);
        let (again, _lock) = State::open(&path).expect("opened");
        assert_eq!(again.files["a.md"], known);
        assert!(again.is_said("d") && !again.is_said("e"));
    }

    #[test]
    fn a_damaged_state_is_told_and_not_taken_for_none() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("state.json");
        fs::write(&path, "{").expect("written");
        let error = format!("{:#}", State::open(&path).expect_err("damaged"));
        assert!(error.contains("state.json") && error.contains("damaged"), "{error}");
    }
}
