//! Files and folders as documents: what `engram learn` sends.

pub use ingest::read::{Draft, Reader, STDIN, split, tail as source};

use anyhow::{Context, Result, bail};
use ignore::WalkBuilder;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Seek};
use std::path::{Path, PathBuf};

/// The server takes documents up to this size, bytes; longer text is sent in parts.
pub const DOCUMENT_BYTES_MAX: usize = 64 * 1024;

/// Beside a file of examples to learn, these are examples to measure with.
const MEASURED: [&str; 2] = ["valid.jsonl", "test.jsonl"];
const LEARNED: &str = "train.jsonl";

/// A file to read, and the name that its documents carry as their source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// Where it is; `-` is standard input.
    pub path: PathBuf,
    name: String,
}

/// Files that were found.
#[derive(Debug, Default)]
pub struct Found {
    /// To read, in a stable order.
    pub files: Vec<SourceFile>,
    /// Left out: `valid.jsonl` and `test.jsonl` beside a `train.jsonl`.
    pub measured: Vec<PathBuf>,
}

/// A reader of files for this machine's user.
///
/// # Errors
/// When this program cannot find itself.
pub fn reader() -> Result<Reader> {
    Ok(Reader {
        program: std::env::current_exe().context("this program cannot find itself")?,
        scratch: std::env::temp_dir(),
        document_bytes_max: DOCUMENT_BYTES_MAX,
    })
}

/// The files under `paths`, in a stable order. What git ignores and what is hidden is left out,
/// unless it is named itself.
///
/// # Errors
/// When a path cannot be read.
pub fn files(paths: &[PathBuf]) -> Result<Found> {
    let mut found = Found::default();
    for root in paths {
        if root.as_os_str() == "-" {
            found.files.push(SourceFile { path: root.clone(), name: STDIN.into() });
            continue;
        }
        if !root.exists() {
            bail!("there is no file or folder {}", root.display());
        }
        let walk = WalkBuilder::new(root).require_git(false).sort_by_file_path(Ord::cmp).build();
        for entry in walk {
            let entry = entry.with_context(|| format!("{} cannot be read", root.display()))?;
            if entry.file_type().is_some_and(|kind| kind.is_file()) {
                let name = source_name(root, entry.path());
                let (named, path) = (entry.depth() == 0, entry.into_path());
                if named || !is_measured(&path) {
                    found.files.push(SourceFile { name, path });
                } else {
                    found.measured.push(path);
                }
            }
        }
    }
    let mut seen = BTreeSet::new();
    found.files.retain(|file| seen.insert(file.path.clone()));
    Ok(found)
}

/// Whether this is one of the files that a data set is measured with: learning them would make it
/// look better than it is.
fn is_measured(path: &Path) -> bool {
    path.file_name().is_some_and(|name| MEASURED.iter().any(|measured| name == *measured))
        && path.with_file_name(LEARNED).exists()
}

/// A file of a folder is named from the folder on; one that was named itself, by its file name.
fn source_name(root: &Path, path: &Path) -> String {
    // The name of `.` and of `../..` is that of the folder they stand for.
    let whole = if root.file_name().is_some() { None } else { root.canonicalize().ok() };
    let inside = path.strip_prefix(root).unwrap_or(path);
    let name = whole.as_deref().unwrap_or(root).file_name().map(PathBuf::from).unwrap_or_default();
    let name = if inside.as_os_str().is_empty() { name } else { name.join(inside) };
    name.to_string_lossy().into_owned()
}

impl SourceFile {
    /// A file under its own name.
    #[cfg(test)]
    pub fn new(root: &Path, path: PathBuf) -> Self {
        Self { name: source_name(root, &path), path }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its documents; a part that cannot be one is an error of its own. A binary file has none.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn documents(&self, reader: &Reader) -> Result<Vec<Result<Draft>>> {
        let file = if self.name == STDIN {
            // Kept, so that it can be looked at before it is read.
            let mut kept = tempfile::tempfile().context("there is no room for what comes in")?;
            io::copy(&mut io::stdin().lock(), &mut kept).context("standard input cannot be read")?;
            kept.rewind()?;
            kept
        } else {
            File::open(&self.path).with_context(|| format!("{} cannot be read", self.path.display()))?
        };
        reader.documents(file, &self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn folder_of(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, text) in files {
            let at = folder.path().join(name);
            fs::create_dir_all(at.parent().expect("a parent")).expect("made");
            fs::write(at, text).expect("written");
        }
        folder
    }

    fn names(paths: &[PathBuf]) -> Vec<String> {
        files(paths).expect("found").files.iter().map(|file| file.name.clone()).collect()
    }

    #[test]
    fn folders_are_read_without_what_is_hidden_or_ignored() {
        let folder = folder_of(&[
            ("notes/b.md", "b"),
            ("notes/a.txt", "a"),
            ("notes/.secret", "s"),
            ("notes/out/x.o", "x"),
            ("notes/.gitignore", "out/"),
        ]);
        let notes = folder.path().join("notes");
        assert_eq!(names(std::slice::from_ref(&notes)), ["notes/a.txt", "notes/b.md"]);
        assert_eq!(names(&[notes.join("a.txt"), notes.clone()]), ["a.txt", "notes/b.md"], "each once");
        assert_eq!(names(&[notes.join("../notes")]), ["notes/a.txt", "notes/b.md"]);
        assert!(files(&[folder.path().join("nothing")]).is_err());
    }

    #[test]
    fn what_a_data_set_is_measured_with_is_not_learned_unless_it_is_named() {
        let folder = folder_of(&[
            ("set/train.jsonl", "{}"),
            ("set/valid.jsonl", "{}"),
            ("set/test.jsonl", "{}"),
            ("other/test.jsonl", "{}"),
        ]);
        let set = folder.path().join("set");
        assert_eq!(
            names(&[set.clone(), folder.path().join("other")]),
            ["set/train.jsonl", "other/test.jsonl"]
        );
        let found = files(&[set.clone(), set.join("test.jsonl")]).expect("found");
        assert_eq!(found.measured, [set.join("test.jsonl"), set.join("valid.jsonl")]);
        assert!(found.files.iter().any(|file| file.name == "test.jsonl"));
    }
}
