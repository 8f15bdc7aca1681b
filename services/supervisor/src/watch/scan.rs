//! What lies in the folder, and what that means beside what is known.

use super::state::{Known, State};
use crate::corpus::{self, SourceFile};
use anyhow::{Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::path::Path;
use std::time::UNIX_EPOCH;

/// A file that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Where.
    pub file: SourceFile,
    /// Hash of its content.
    pub hash: String,
    /// Size in bytes and time of the last change.
    pub stamp: (u64, u128),
}

/// What was found, by the names that documents carry.
#[derive(Debug, Default)]
pub struct Found {
    /// All files.
    pub files: BTreeMap<String, Seen>,
}

/// What has to be done.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// It has another name, and says the same.
    Rename {
        /// The old name.
        from: String,
        /// The new one.
        to: String,
    },
    /// It is new, or says something else.
    Learn(String),
    /// It is gone.
    Forget(String),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rename { from, to } => write!(f, "rename  {from} -> {to}"),
            Self::Learn(name) => write!(f, "learn   {name}"),
            Self::Forget(name) => write!(f, "forget  {name}"),
        }
    }
}

/// Looks at every file of the folder. A content is read again where size or time have changed, and in a `full` scan.
///
/// # Errors
/// When the folder cannot be walked to its end: half of it must not be taken for all.
pub fn scan(dir: &Path, state: &State, full: bool) -> Result<Found> {
    let mut found = Found::default();
    for file in corpus::files(&[dir.to_owned()])?.files {
        let Some(stamp) = stamp(&file.path)? else { continue };
        let known = state.files.get(file.name()).filter(|known| !full && known.stamp == stamp);
        let hash = match known.and_then(|known| known.hash.clone()) {
            Some(hash) => hash,
            None => match hash(&file.path)? {
                Some(hash) => hash,
                None => continue,
            },
        };
        found.files.insert(file.name().to_owned(), Seen { file, hash, stamp });
    }
    Ok(found)
}

/// Size and time of the last change; none when the file is gone meanwhile.
fn stamp(path: &Path) -> Result<Option<(u64, u128)>> {
    let Some(told) = there(fs::metadata(path), path)? else { return Ok(None) };
    let changed = told.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    Ok(Some((told.len(), changed.unwrap_or_default().as_nanos())))
}

/// Hash of a file's content; none when the file is gone meanwhile.
pub fn hash(path: &Path) -> Result<Option<String>> {
    let Some(file) = there(File::open(path), path)? else { return Ok(None) };
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file).with_context(|| format!("{} cannot be read", path.display()))?;
    Ok(Some(hasher.finalize().to_hex().to_string()))
}

fn there<T>(got: std::io::Result<T>, path: &Path) -> Result<Option<T>> {
    match got {
        Ok(got) => Ok(Some(got)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("{} cannot be read", path.display())),
    }
}

/// What has to be done for the server to know what was found: renaming first, which costs nothing, and forgetting
/// last, so that what moves from one file into another is not forgotten between the two.
pub fn changes(state: &State, found: &Found) -> Vec<Change> {
    let mut changes = Vec::new();
    let gone = |name: &&String| !found.files.contains_key(*name);
    let mut gone: BTreeSet<&String> = state.files.keys().filter(gone).collect();
    for (name, seen) in &found.files {
        let known = state.files.get(name);
        if known.is_some_and(|known| known.hash.as_ref() == Some(&seen.hash)) {
            continue;
        }
        let same = |old: &&&String| state.files[**old].hash.as_ref() == Some(&seen.hash);
        let from = if known.is_none() { gone.iter().find(same).copied() } else { None };
        match from {
            Some(from) => {
                gone.remove(from);
                changes.push(Change::Rename { from: from.clone(), to: name.clone() });
            }
            None => changes.push(Change::Learn(name.clone())),
        }
    }
    changes.extend(gone.into_iter().map(|name| Change::Forget(name.clone())));
    changes.sort();
    changes
}

impl Seen {
    /// The file as it is known once it is learned.
    pub fn known(&self, documents: BTreeSet<String>) -> Known {
        Known { hash: Some(self.hash.clone()), stamp: self.stamp, documents }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn state(files: &[(&str, Option<&str>)]) -> State {
        let mut state = State::default();
        for (name, hash) in files {
            let known = Known { hash: hash.map(str::to_owned), ..Known::default() };
            state.files.insert((*name).to_owned(), known);
        }
        state
    }

    fn found(files: &[(&str, &str)]) -> Found {
        let mut found = Found::default();
        for (name, hash) in files {
            let file = SourceFile::new(Path::new("/d"), PathBuf::from("/d").join(name));
            let seen = Seen { file, hash: (*hash).to_owned(), stamp: (0, 0) };
            found.files.insert((*name).to_owned(), seen);
        }
        found
    }

    fn told(state: &State, found: &Found) -> Vec<String> {
        changes(state, found).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_new_changed_moved_or_gone_is_told_apart() {
        let before = state(&[
            ("same", Some("1")),
            ("changed", Some("2")),
            ("moved", Some("3")),
            ("gone", Some("4")),
            ("begun", None),
        ]);
        let now = found(&[("same", "1"), ("changed", "9"), ("elsewhere", "3"), ("new", "5"), ("begun", "6")]);
        let expected =
            ["rename  moved -> elsewhere", "learn   begun", "learn   changed", "learn   new", "forget  gone"];
        assert_eq!(told(&before, &now), expected);
        assert!(told(&state(&[("a", Some("1"))]), &found(&[("a", "1")])).is_empty());
    }

    #[test]
    fn a_copy_is_learned_and_each_rename_has_a_file_of_its_own() {
        let before = state(&[("a", Some("1")), ("b", Some("1"))]);
        assert_eq!(told(&before, &found(&[("a", "1"), ("b", "1"), ("c", "1")])), ["learn   c"]);
        let expected = ["rename  a -> x", "rename  b -> y", "learn   z"];
        assert_eq!(told(&before, &found(&[("x", "1"), ("y", "1"), ("z", "1")])), expected);
    }

    #[test]
    fn a_content_that_changed_behind_its_stamp_is_found_by_a_full_scan() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().join("notes");
        fs::create_dir(&dir).expect("made");
        fs::write(dir.join("a.md"), "one").expect("written");
        let first = scan(&dir, &State::default(), false).expect("scanned");
        let mut state = State::default();
        let lie = Known { hash: Some("old".into()), ..first.files["notes/a.md"].known(BTreeSet::new()) };
        state.files.insert("notes/a.md".into(), lie);
        let told = |full| changes(&state, &scan(&dir, &state, full).expect("scanned")).len();
        assert_eq!((told(false), told(true)), (0, 1));
    }
}
