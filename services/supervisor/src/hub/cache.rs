//! The cache on disk, laid out as `huggingface_hub` lays it out:
//!
//! ```text
//! models--org--name/blobs/ETAG                     a file, named by its hash
//! models--org--name/refs/main                      the commit that a revision was at
//! models--org--name/snapshots/COMMIT/config.json   a link to ../../blobs/ETAG
//! .locks/models--org--name/ETAG.lock               held by whoever brings that file
//! ```

use super::Name;
use anyhow::{Context, Result, anyhow};
use model::weights;
use std::fs::{self, File, TryLockError};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// The part of the cache that belongs to one model.
pub(super) struct Cache {
    repo: PathBuf,
    locks: PathBuf,
}

impl Cache {
    pub(super) fn new(root: &Path, name: &Name) -> Self {
        let folder = format!("models--{}--{}", name.org, name.name);
        Self { repo: root.join(&folder), locks: root.join(".locks").join(folder) }
    }

    /// Makes the folder that everything lies in, and names it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(super) fn folder(&self) -> Result<&Path> {
        make(&self.repo)?;
        Ok(&self.repo)
    }

    /// The folder of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.repo.join("snapshots").join(commit)
    }

    /// A file, by its hash.
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.repo.join("blobs").join(etag)
    }

    /// What has arrived of a file so far.
    pub(super) fn incomplete(&self, etag: &str) -> PathBuf {
        self.repo.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// The folder of a revision, when all that a base needs is in it.
    pub(super) fn whole(&self, revision: &str) -> Option<PathBuf> {
        let kept = fs::read_to_string(self.repo.join("refs").join(revision)).ok();
        let commit = kept.as_deref().map_or(revision, str::trim);
        let folder = self.snapshot(commit);
        let has = |name: &str| folder.join(name).is_file();
        let weights = weights::model_files(&folder).ok()?;
        let whole = is_commit(commit)
            && has("config.json")
            && has("tokenizer.json")
            && weights.iter().all(|shard| shard.is_file());
        whole.then_some(folder)
    }

    /// Waits until nobody else brings this file; it is this process's turn for as long as the result
    /// lives. `huggingface_hub` takes the same lock.
    ///
    /// # Errors
    /// When the lock cannot be made.
    pub(super) fn lock(&self, etag: &str, file: &str) -> Result<File> {
        make(&self.locks)?;
        let path = self.locks.join(format!("{etag}.lock"));
        let lock = File::options().write(true).create(true).truncate(false).open(&path);
        let lock = lock.with_context(|| format!("{} cannot be made", path.display()))?;
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(TryLockError::WouldBlock) => {
                eprintln!("engram: another program downloads {file}; waiting for it");
            }
            Err(TryLockError::Error(error)) => {
                return Err(anyhow!(error).context(format!("{} cannot be locked", path.display())));
            }
        }
        lock.lock().with_context(|| format!("{} cannot be locked", path.display()))?;
        Ok(lock)
    }

    /// Lets a file of a commit be the one with this hash.
    ///
    /// # Errors
    /// When the link cannot be made.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<()> {
        let folder = self.snapshot(commit);
        make(&folder)?;
        let (link, fresh) = (folder.join(file), folder.join(format!(".{file}.{}", std::process::id())));
        // Relative, so that the cache can be moved. By a rename, so that a reader sees the old file or
        // the new one.
        symlink(Path::new("../../blobs").join(etag), &fresh)
            .and_then(|()| fs::rename(&fresh, &link))
            .with_context(|| format!("{} cannot be linked", link.display()))
    }

    /// Notes which commit a revision is at.
    ///
    /// # Errors
    /// When that cannot be written.
    pub(super) fn remember(&self, revision: &str, commit: &str) -> Result<()> {
        let path = self.repo.join("refs").join(revision);
        if revision == commit || fs::read_to_string(&path).is_ok_and(|known| known == commit) {
            return Ok(());
        }
        make(path.parent().unwrap_or(&self.repo))?;
        let fresh = self.repo.join(format!(".ref.{}", std::process::id()));
        fs::write(&fresh, commit)
            .and_then(|()| fs::rename(&fresh, &path))
            .with_context(|| format!("{} cannot be written", path.display()))
    }
}

/// Whether a text is the full name of a commit.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && is_hex(text)
}

/// Whether a text is a hash as it is written here.
pub(super) fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn make(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| {
        format!("{} cannot be made; set HF_HUB_CACHE to a folder that can be written to", folder.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789012345678901234567890123456789";

    #[test]
    fn a_copy_is_whole_when_each_file_is_there() {
        let root = tempfile::tempdir().expect("a folder");
        let cache = Cache::new(root.path(), &Name::parse("org/name").expect("a name"));
        assert!(cache.whole("main").is_none());
        make(&cache.repo.join("blobs")).expect("made");
        fs::write(cache.blob("aa"), "{\"weight_map\":{\"x\":\"one\",\"y\":\"two\"}}").expect("written");
        for file in ["config.json", "tokenizer.json", "model.safetensors.index.json", "one"] {
            cache.link(COMMIT, file, "aa").expect("linked");
        }
        cache.remember("v1", COMMIT).expect("noted");
        assert!(cache.whole("v1").is_none(), "a shard is missing");
        cache.link(COMMIT, "two", "gone").expect("linked");
        assert!(cache.whole("v1").is_none(), "a link leads nowhere");
        cache.link(COMMIT, "two", "aa").expect("linked anew");
        assert_eq!(cache.whole("v1"), Some(cache.snapshot(COMMIT)));
        assert_eq!(cache.whole(COMMIT), Some(cache.snapshot(COMMIT)));
        cache.remember("v2", "../../../elsewhere").expect("noted");
        assert!(cache.whole("v2").is_none());
    }
}
