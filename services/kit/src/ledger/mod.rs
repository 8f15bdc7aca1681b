//! The ledger: the durable record of every accepted document, and the only thing that is ever
//! acknowledged on. This is the one place that knows redb.
//!
//! Every row is a checked frame. Appends, verdicts and trail entries of concurrent callers share a
//! commit, on a thread of their own. When a commit fails, nobody can say what is on the disk: the
//! ledger then refuses everything, and the process has to end and start again from what is there.

mod forget;
mod query;
mod tables;
mod write;

pub use query::{DomainCounts, FreshWindow, Room};
pub use tables::Settled;
pub use write::{Appended, Settlement, Settling};

use crossbeam_channel::Sender;
use proto::{Document, DocumentId, TrailEntry};
use redb::{Database, DatabaseError, ReadTransaction, ReadableDatabase, WriteTransaction};
use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;
use tables::{State, Tables};
use tokio::sync::{oneshot, watch};
use write::Write;

/// Memory for pages that were read or are to be written, bytes.
const CACHE_BYTES: usize = 64 * 1024 * 1024;
/// Calls that wait for the writer; the next ones wait for room.
const WAITING_MAX: usize = 1024;

/// What can go wrong with the ledger.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// Another process has it open.
    #[error("the ledger {0} is in use by another process")]
    Held(PathBuf),
    /// It is not as it was written.
    #[error("the ledger is damaged: {0}")]
    Damaged(String),
    /// A commit failed before; see the module's description.
    #[error("the ledger refuses to go on, because an earlier write failed")]
    Failed,
    /// A row cannot be put into bytes.
    #[error("the ledger cannot hold this: {0}")]
    Row(String),
    /// The disk, or the file system, or something else that is not the content's fault.
    #[error("the ledger could not be read or written: {0}")]
    Storage(String),
}

/// Any of redb's errors.
impl<E: Into<redb::Error>> From<E> for LedgerError {
    fn from(error: E) -> Self {
        match error.into() {
            redb::Error::Corrupted(what) => Self::Damaged(what),
            other => Self::Storage(other.to_string()),
        }
    }
}

type Result<T> = std::result::Result<T, LedgerError>;

/// The ledger of a data folder. Shared by threads; each answer comes after the commit it speaks of.
pub struct Ledger {
    shared: Arc<Shared>,
    writes: Option<Sender<Write>>,
    writer: Option<JoinHandle<()>>,
}

/// What the writer thread and everybody else work with.
struct Shared {
    path: PathBuf,
    /// Locked for writing only while the whole file is replaced.
    database: RwLock<Database>,
    head: watch::Sender<u64>,
    cursor: watch::Sender<u64>,
    /// Counts settled documents; wakes whoever waits for some.
    settled: watch::Sender<u64>,
    taken_out: AtomicU64,
    failed: watch::Sender<bool>,
}

impl Ledger {
    /// Opens the ledger in a folder, or starts one.
    ///
    /// # Errors
    /// When another process holds it, when it is damaged, or when the disk fails.
    pub fn open(dir: &Path) -> Result<Self> {
        let io = |error: std::io::Error| LedgerError::Storage(format!("{}: {error}", dir.display()));
        fs::create_dir_all(dir).map_err(io)?;
        let path = dir.join("ledger.redb");
        forget::remove_leftovers(&path).map_err(io)?;
        let database = open_database(&path)?;
        let write = database.begin_write()?;
        let state = Tables::open(&write)?.state()?;
        write.commit()?;
        sync_names(dir).map_err(io)?;
        let shared = Arc::new(Shared::new(path, database, &state));
        let (writes, inbox) = crossbeam_channel::bounded(WAITING_MAX);
        let own = Arc::clone(&shared);
        let writer = std::thread::Builder::new().name("ledger".into());
        let run = move || {
            if catch_unwind(AssertUnwindSafe(|| write::run(&own, &inbox))).is_err() {
                own.fail("its writer panicked");
            }
        };
        let writer = writer.spawn(run).map_err(io)?;
        Ok(Self { shared, writes: Some(writes), writer: Some(writer) })
    }

    /// Appends documents: all that are new, or none when one of them conflicts with what is there.
    /// A document that was withdrawn may come again; it gets a new ordinal.
    ///
    /// # Errors
    /// When they cannot be brought to disk; then none was accepted.
    pub async fn append(&self, documents: Vec<Document>) -> Result<Vec<Appended>> {
        self.append_again(documents, BTreeSet::new()).await
    }

    /// As [`Ledger::append`], but the documents named in `again` get a new ordinal, if their content
    /// is what it was: they were put aside, and their owner wants them learned after all.
    ///
    /// # Errors
    /// As for [`Ledger::append`].
    pub async fn append_again(
        &self,
        documents: Vec<Document>,
        again: BTreeSet<DocumentId>,
    ) -> Result<Vec<Appended>> {
        self.write(|reply| Write::Append { documents, again, reply }).await
    }

    /// Hands over what became of a document at intake, with its examples, to be written down together with others that come
    /// meanwhile, in order. What is settled already, or is not there any more, is left as it is.
    ///
    /// # Errors
    /// When the ledger has failed.
    pub async fn settle_intake(&self, kept: &proto::Kept, examples: Vec<proto::Example>) -> Result<Settling> {
        let settlements = vec![Settlement { kept: kept.clone(), examples }];
        Ok(Settling(self.hand_over(|reply| Write::Settle { settlements, reply }).await?))
    }

    /// [`Ledger::settle_intake`] for several documents, in one transaction, and on disk when this returns.
    ///
    /// # Errors
    /// When they cannot be brought to disk.
    pub async fn settle_intake_many(&self, settlements: Vec<Settlement>) -> Result<()> {
        self.write(|reply| Write::Settle { settlements, reply }).await
    }

    /// Adds to the trails of documents. What a trail says already is not said again, and documents
    /// that are not there any more are passed over.
    ///
    /// # Errors
    /// When it cannot be brought to disk.
    pub async fn record(&self, entries: Vec<(u64, TrailEntry)>) -> Result<()> {
        self.write(|reply| Write::Record { entries, reply }).await
    }

    async fn write<T>(&self, write: impl FnOnce(oneshot::Sender<Result<T>>) -> Write) -> Result<T> {
        self.hand_over(write).await?.await.unwrap_or(Err(LedgerError::Failed))
    }

    async fn hand_over<T>(
        &self,
        write: impl FnOnce(oneshot::Sender<Result<T>>) -> Write,
    ) -> Result<oneshot::Receiver<Result<T>>> {
        self.shared.check()?;
        let (reply, answer) = oneshot::channel();
        let mut write = write(reply);
        let writes = self.writes.as_ref().ok_or(LedgerError::Failed)?;
        // Async code must not block, so a full queue is asked again a moment later.
        while let Err(error) = writes.try_send(write) {
            match error {
                crossbeam_channel::TrySendError::Full(back) => write = back,
                crossbeam_channel::TrySendError::Disconnected(_) => return Err(LedgerError::Failed),
            }
            tokio::time::sleep(write::GROUP_TIME).await;
        }
        Ok(answer)
    }

    /// The last ordinal that was given out; 0 before the first.
    pub fn head(&self) -> u64 {
        *self.shared.head.borrow()
    }

    /// Every document up to this ordinal is judged.
    pub fn intake_cursor(&self) -> u64 {
        *self.shared.cursor.borrow()
    }

    /// Counts documents that were taken out: forgotten, withdrawn, or moved to a new ordinal. Whoever
    /// keeps something derived from documents builds it anew when this changes.
    pub fn forgotten(&self) -> u64 {
        self.shared.taken_out.load(Ordering::Acquire)
    }

    /// Waits until there is a document beyond this ordinal.
    pub async fn wait_for_append(&self, after: u64) {
        // The sender lives as long as the ledger, so there is always a next value to wait for.
        let _ = self.shared.head.subscribe().wait_for(|head| *head > after).await;
    }

    /// Waits until the next document is settled.
    pub async fn wait_for_settled(&self) {
        let _ = self.shared.settled.subscribe().changed().await;
    }

    /// Resolves when a commit has failed: the process then has to end.
    pub async fn failed(&self) {
        let _ = self.shared.failed.subscribe().wait_for(|failed| *failed).await;
    }
}

/// What was handed over is still written.
impl Drop for Ledger {
    fn drop(&mut self) {
        drop(self.writes.take());
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

impl Shared {
    fn new(path: PathBuf, database: Database, state: &State) -> Self {
        Self {
            path,
            database: RwLock::new(database),
            head: watch::Sender::new(state.head),
            cursor: watch::Sender::new(state.cursor),
            settled: watch::Sender::new(0),
            taken_out: AtomicU64::new(state.taken_out),
            failed: watch::Sender::new(false),
        }
    }

    fn check(&self) -> Result<()> {
        if *self.failed.borrow() { Err(LedgerError::Failed) } else { Ok(()) }
    }

    /// From here on nothing is written any more.
    fn fail(&self, why: &str) {
        tracing::error!(why, "a write to the ledger failed; it takes nothing more");
        self.failed.send_replace(true);
    }

    /// Does some work in one durable transaction, then tells everybody how things stand. An error of
    /// the work leaves everything as it was; an error of the disk ends the ledger.
    fn transact<T>(&self, work: impl FnOnce(&mut Tables<'_>) -> Result<T>) -> Result<T> {
        self.check()?;
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        let whole = catch_unwind(AssertUnwindSafe(|| {
            let write = database.begin_write()?;
            let mut tables = Tables::open(&write)?;
            let before = tables.state()?;
            let value = work(&mut tables)?;
            let state = tables.state()?;
            drop(tables);
            commit(write)?;
            Ok((value, before, state))
        }));
        match whole {
            Ok(Ok((value, before, state))) => {
                self.announce(&before, &state);
                Ok(value)
            }
            Ok(Err(error)) => {
                if matches!(error, LedgerError::Storage(_)) {
                    self.fail(&error.to_string());
                }
                Err(error)
            }
            Err(_) => {
                self.fail("it panicked");
                Err(LedgerError::Failed)
            }
        }
    }

    fn announce(&self, before: &State, now: &State) {
        self.head.send_if_modified(|head| std::mem::replace(head, now.head) != now.head);
        self.cursor.send_if_modified(|cursor| std::mem::replace(cursor, now.cursor) != now.cursor);
        self.taken_out.store(now.taken_out, Ordering::Release);
        if before.cursor != now.cursor {
            self.settled.send_modify(|count| *count += 1);
        }
    }

    fn read<T>(&self, work: impl FnOnce(&ReadTransaction) -> Result<T>) -> Result<T> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        work(&database.begin_read()?)
    }
}

fn commit(write: WriteTransaction) -> Result<()> {
    fail::fail_point!("ledger::after_write", |_| Err(LedgerError::Storage("injected".into())));
    // Durable when it returns: redb's default is an fsync with every commit.
    Ok(write.commit()?)
}

/// A file is only as durable as its name, and that of the folder it is in.
fn sync_names(dir: &Path) -> std::io::Result<()> {
    fs::File::open(dir)?.sync_all()?;
    match dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) => fs::File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// Opens the file after checking every page of it, since redb may panic on one that was altered.
fn open_database(path: &Path) -> Result<Database> {
    let opened = catch_unwind(AssertUnwindSafe(|| {
        Database::builder().set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true).create(path)
    }));
    match opened {
        Ok(Ok(database)) => Ok(database),
        Ok(Err(DatabaseError::DatabaseAlreadyOpen)) => Err(LedgerError::Held(path.to_owned())),
        Ok(Err(DatabaseError::Storage(redb::StorageError::Io(error))))
            if error.kind() == std::io::ErrorKind::InvalidData =>
        {
            Err(LedgerError::Damaged(format!("{}: {error}", path.display())))
        }
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(LedgerError::Damaged(format!("{} cannot be opened", path.display()))),
    }
}

#[cfg(test)]
mod tests;
