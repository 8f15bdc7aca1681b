//! The rows of the replay buffer. This is the one place that knows sled.
//!
//! sled is quick, but its flush is no fsync and it loses rows to flipped bits without a word. So
//! nothing is ever acknowledged on it: every row is a checked frame, the whole has a digest, and a
//! store that does not open, or not in time, is replaced by an empty one for its owner to fill again.

use crate::host::panic_message;
use anyhow::{Context, anyhow};
use proto::ExampleId;
use proto::wire::{self, Kind};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, mpsc};
use std::time::Duration;

/// Opening and checking takes this long at most; sled has been seen to hang on a damaged folder.
const OPEN_TIME_MAX: Duration = Duration::from_secs(30);
/// Five seconds for another owner to let go.
const LOCK_TRIES: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(50);
/// Memory for pages, bytes.
const CACHE_BYTES: u64 = 64 * 1024 * 1024;
/// The largest row, bytes.
const ROW_BYTES_MAX: usize = wire::PAYLOAD_BYTES_MAX;

/// How a store was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// As it was left, as far as each row can tell; its digest tells the rest.
    Intact,
    /// Not usable, or not there: it is empty now.
    Rebuilt,
}

/// Rows by example. Shared by threads.
pub struct Store {
    dir: PathBuf,
    opened: Opened,
    /// Locked for writing only while the whole folder is replaced; empty only if that failed.
    database: RwLock<Option<sled::Db>>,
}

impl Store {
    /// Opens the store in a folder; an unusable one is replaced by an empty one.
    ///
    /// # Errors
    /// When not even an empty one can be made.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        Self::open_within(dir, OPEN_TIME_MAX)
    }

    fn open_within(dir: &Path, limit: Duration) -> anyhow::Result<Self> {
        remove_folder(&beside(dir, "damaged"))?;
        remove_folder(&beside(dir, "new"))?;
        let there = dir.exists();
        let (database, opened) = match open_checked(dir, limit) {
            Ok(database) if there => (database, Opened::Intact),
            Ok(database) => (database, Opened::Rebuilt),
            Err(error) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "the replay store is not usable and starts empty"
                );
                // Moved away before it is removed: a thread that hangs may still be writing to it.
                fs::rename(dir, beside(dir, "damaged"))
                    .with_context(|| format!("{} cannot be moved away", dir.display()))?;
                remove_folder(&beside(dir, "damaged"))?;
                (open_checked(dir, limit)?, Opened::Rebuilt)
            }
        };
        Ok(Self { dir: dir.to_owned(), opened, database: RwLock::new(Some(database)) })
    }

    /// How it was found.
    pub fn opened(&self) -> Opened {
        self.opened
    }

    /// Writes a row.
    ///
    /// # Errors
    /// When the store fails.
    pub fn put(&self, id: ExampleId, row: &[u8]) -> anyhow::Result<()> {
        let frame = wire::seal(Kind::Row, row)?;
        self.with(|database| Ok(database.insert(key(id), frame).map(drop)?))
    }

    /// A row; none when there is none.
    ///
    /// # Errors
    /// When it is damaged, or the store fails.
    pub fn get(&self, id: ExampleId) -> anyhow::Result<Option<Vec<u8>>> {
        self.with(|database| {
            let Some(frame) = database.get(key(id))? else { return Ok(None) };
            Ok(Some(wire::open(Kind::Row, &frame, ROW_BYTES_MAX)?.to_vec()))
        })
    }

    /// Removes a row, if it is there.
    ///
    /// # Errors
    /// When the store fails.
    pub fn remove(&self, id: ExampleId) -> anyhow::Result<()> {
        self.with(|database| Ok(database.remove(key(id)).map(drop)?))
    }

    /// The names of all rows, in order.
    ///
    /// # Errors
    /// When the store fails.
    pub fn ids(&self) -> anyhow::Result<Vec<ExampleId>> {
        self.with(|database| database.iter().keys().map(|bytes| id(&bytes?)).collect())
    }

    /// All rows, in order of their names.
    ///
    /// # Errors
    /// When one is damaged, or the store fails.
    pub fn rows(&self) -> anyhow::Result<Vec<(ExampleId, Vec<u8>)>> {
        self.with(rows)
    }

    /// BLAKE3 over all rows with their names, hexadecimal: equal for equal content, however it came
    /// about.
    ///
    /// # Errors
    /// When a row is damaged, or the store fails.
    pub fn digest(&self) -> anyhow::Result<String> {
        self.with(digest)
    }

    /// Removes all rows.
    ///
    /// # Errors
    /// When the store fails.
    pub fn clear(&self) -> anyhow::Result<()> {
        self.with(|database| Ok(database.clear()?))
    }

    /// Hands everything to the operating system.
    ///
    /// # Errors
    /// When the store fails.
    pub fn flush(&self) -> anyhow::Result<()> {
        self.with(|database| Ok(database.flush().map(drop)?))
    }

    /// Writes all rows to a new folder, so that no page keeps what was removed.
    ///
    /// # Errors
    /// When the disk fails; if it does so half-way, the store is empty when it is opened again.
    pub fn rewrite(&self) -> anyhow::Result<()> {
        let mut slot = self.database.write().unwrap_or_else(PoisonError::into_inner);
        let old = slot.as_ref().context("the replay store is closed")?;
        let (kept, fresh) = (rows(old)?, beside(&self.dir, "new"));
        remove_folder(&fresh)?;
        let copy = settings(&fresh).open()?;
        for (id, row) in kept {
            copy.insert(key(id), wire::seal(Kind::Row, &row)?)?;
        }
        copy.flush()?;
        drop(copy);
        // Both must be closed before the folders change places.
        slot.take();
        remove_folder(&self.dir)?;
        fs::rename(&fresh, &self.dir)?;
        *slot = Some(open_when_free(&settings(&self.dir))?);
        Ok(())
    }

    fn with<T>(&self, work: impl FnOnce(&sled::Db) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let slot: RwLockReadGuard<'_, _> = self.database.read().unwrap_or_else(PoisonError::into_inner);
        work(slot.as_ref().context("the replay store is closed")?)
    }
}

fn settings(dir: &Path) -> sled::Config {
    sled::Config::new().path(dir).cache_capacity(CACHE_BYTES)
}

/// sled gives up its lock a moment after it was dropped, on threads of its own.
fn open_when_free(settings: &sled::Config) -> sled::Result<sled::Db> {
    for _ in 0..LOCK_TRIES {
        match settings.open() {
            Err(sled::Error::Io(error)) if error.to_string().contains("could not acquire lock") => {
                std::thread::sleep(LOCK_PAUSE);
            }
            opened => return opened,
        }
    }
    settings.open()
}

/// Opens a folder and reads every row, on a thread that may be left behind.
fn open_checked(dir: &Path, limit: Duration) -> anyhow::Result<sled::Db> {
    let (ready, is_ready) = mpsc::channel();
    let settings = settings(dir);
    std::thread::Builder::new().name("open-store".into()).spawn(move || {
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let database = open_when_free(&settings)?;
            digest(&database)?;
            anyhow::Ok(database)
        }));
        let opened = opened.unwrap_or_else(|panic| Err(anyhow!("panicked: {}", panic_message(&*panic))));
        // Nobody listens any more once the time is up.
        let _ = ready.send(opened);
    })?;
    is_ready.recv_timeout(limit).map_err(|_| anyhow!("it did not open within {limit:?}"))?
}

fn rows(database: &sled::Db) -> anyhow::Result<Vec<(ExampleId, Vec<u8>)>> {
    let row = |row: sled::Result<(sled::IVec, sled::IVec)>| {
        let (key, frame) = row?;
        Ok((id(&key)?, wire::open(Kind::Row, &frame, ROW_BYTES_MAX)?.to_vec()))
    };
    database.iter().map(row).collect()
}

fn digest(database: &sled::Db) -> anyhow::Result<String> {
    let mut hasher = blake3::Hasher::new();
    for row in database.iter() {
        let (key, frame) = row?;
        let row = wire::open(Kind::Row, &frame, ROW_BYTES_MAX)?;
        hasher.update(&key).update(&(row.len() as u64).to_le_bytes()).update(row);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Big-endian, so that rows are in the order of the ledger.
fn key(id: ExampleId) -> [u8; 12] {
    let mut key = [0; 12];
    key[..8].copy_from_slice(&id.ordinal.to_be_bytes());
    key[8..].copy_from_slice(&id.chunk.to_be_bytes());
    key
}

fn id(key: &[u8]) -> anyhow::Result<ExampleId> {
    let (ordinal, chunk) = key.split_at_checked(8).context("a row's name is too short")?;
    Ok(ExampleId {
        ordinal: u64::from_be_bytes(ordinal.try_into()?),
        chunk: u32::from_be_bytes(chunk.try_into()?),
    })
}

/// A folder beside this one, with an ending to its name.
fn beside(dir: &Path, ending: &str) -> PathBuf {
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(".");
    name.push(ending);
    dir.with_file_name(name)
}

fn remove_folder(dir: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{} cannot be removed", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn id(ordinal: u64) -> ExampleId {
        ExampleId { ordinal, chunk: 1 }
    }

    fn fill(store: &Store, count: u64) {
        for n in 0..count {
            store.put(id(n), format!("row {n} {}", "x".repeat(300)).as_bytes()).expect("put");
        }
        store.flush().expect("flushed");
    }

    fn all_bytes(dir: &Path) -> Vec<u8> {
        let mut bytes = Vec::new();
        for entry in fs::read_dir(dir).expect("read") {
            let path = entry.expect("an entry").path();
            bytes.extend(if path.is_dir() { all_bytes(&path) } else { fs::read(path).expect("read") });
        }
        bytes
    }

    #[test]
    fn rows_come_back_in_order_and_the_digest_says_what_there_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().join("replay");
        let store = Store::open(&dir).expect("opened");
        assert_eq!(store.opened(), Opened::Rebuilt);
        fill(&store, 300);
        let digest = store.digest().expect("a digest");
        store.put(id(7), b"other").expect("put");
        assert_ne!(store.digest().expect("a digest"), digest);
        fill(&store, 300);
        assert_eq!(store.digest().expect("a digest"), digest);
        assert_eq!(store.ids().expect("ids"), (0..300).map(id).collect::<Vec<_>>());
        drop(store);
        let store = Store::open(&dir).expect("opened");
        assert_eq!((store.opened(), store.digest().expect("a digest")), (Opened::Intact, digest));
        store.remove(id(0)).expect("removed");
        assert_eq!(store.get(id(0)).expect("read"), None);
        assert!(store.get(id(1)).expect("read").is_some());
        store.clear().expect("cleared");
        assert!(store.ids().expect("ids").is_empty());
    }

    #[test]
    fn a_damaged_store_is_rebuilt_with_an_equal_digest() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().join("replay");
        let store = Store::open(&dir).expect("opened");
        fill(&store, 300);
        let digest = store.digest().expect("a digest");
        drop(store);
        let mut rebuilt = 0;
        for flip in 0..20_usize {
            let path = dir.join("db");
            let mut bytes = fs::read(&path).expect("read");
            let at = (flip * 7919 * 131) % bytes.len();
            bytes[at] ^= 0x10;
            fs::write(&path, bytes).expect("written");
            let store = Store::open(&dir).expect("opened");
            // What the rows themselves cannot tell, the digest does.
            if store.opened() == Opened::Rebuilt || store.digest().expect("a digest") != digest {
                rebuilt += 1;
                store.clear().expect("cleared");
                fill(&store, 300);
            }
            assert_eq!(store.digest().expect("a digest"), digest, "flip at {at}");
        }
        assert!(rebuilt > 0, "none of the flips hit a row");
    }

    #[test]
    fn a_folder_that_is_no_store_is_an_empty_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().join("replay");
        fs::create_dir_all(&dir).expect("made");
        fs::write(dir.join("conf"), b"nonsense").expect("written");
        fs::write(dir.join("db"), b"nonsense").expect("written");
        let store = Store::open(&dir).expect("opened");
        assert!(store.ids().expect("ids").is_empty());
        fill(&store, 3);
        assert_eq!(store.ids().expect("ids").len(), 3);
    }

    #[test]
    fn a_store_that_takes_too_long_gives_way() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().join("replay");
        fs::create_dir_all(&dir).expect("made");
        assert!(open_checked(&dir, Duration::ZERO).is_err());
    }

    #[test]
    fn what_was_removed_is_in_no_page_after_a_rewrite() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().join("replay");
        let store = Store::open(&dir).expect("opened");
        fill(&store, 50);
        store.put(id(99), b"PLANTED-5b1e").expect("put");
        store.flush().expect("flushed");
        let there = |planted: &[u8]| all_bytes(folder.path()).windows(planted.len()).any(|w| w == planted);
        assert!(there(b"PLANTED-5b1e"));
        store.remove(id(99)).expect("removed");
        let digest = store.digest().expect("a digest");
        store.rewrite().expect("rewritten");
        assert!(!there(b"PLANTED-5b1e"));
        assert_eq!(store.digest().expect("a digest"), digest);
        store.put(id(100), b"more").expect("put");
        drop(store);
        assert_eq!(Store::open(&dir).expect("opened").ids().expect("ids").len(), 51);
    }
}
