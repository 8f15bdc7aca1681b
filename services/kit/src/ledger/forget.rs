//! What is taken out again: forgotten, withdrawn from learning, or cut anew.

use super::query::ordinals;
use super::tables::{
    DERIVED, DOCUMENTS, DOMAINS, EXAMPLES, IDS, PLACES, SETTLED, STATE, Settled, TRAILS, forgetting, names,
    unframe,
};
use super::{Ledger, LedgerError, Result, open_database};
use proto::{Document, DocumentId, Domain, VerdictKind};
use redb::{
    Database, Key, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, TableHandle, Value,
    WriteTransaction,
};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

impl Ledger {
    /// Removes a document, all that derive from it, and all that is known of them. Gives back what
    /// was removed, the document itself first; nothing when there is no such document. Their text
    /// stays in unused pages of the file until [`Ledger::rewrite`], and they are among those of
    /// [`Ledger::forgetting`] until [`Ledger::nothing_left`].
    ///
    /// # Errors
    /// When it cannot be brought to disk.
    pub fn forget(&self, id: &DocumentId) -> Result<Vec<(u64, Document)>> {
        self.shared.transact(|tables| {
            let mut removed = Vec::new();
            for ordinal in tables.family(id)? {
                if let Some((document, _)) = tables.remove_document(ordinal)? {
                    tables.ids.remove(document.id.as_str())?;
                    removed.push((ordinal, document));
                }
            }
            tables.advance_cursor()?;
            let mut forgetting = tables.forgetting()?;
            forgetting.extend(removed.iter().map(|(ordinal, document)| (document.domain.clone(), *ordinal)));
            tables.set_forgetting(&forgetting)?;
            Ok(removed)
        })
    }

    /// Documents that were removed, and that may still be in what was made of them: by domain and ordinal.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn forgetting(&self) -> Result<Vec<(Domain, u64)>> {
        self.shared.read(|read| forgetting(&read.open_table(STATE)?))
    }

    /// Says that nothing that was made of those documents is left.
    ///
    /// # Errors
    /// When it cannot be brought to disk.
    pub fn nothing_left(&self) -> Result<()> {
        self.shared.transact(|tables| tables.set_forgetting(&[]))
    }

    /// Takes the kept documents with `after < ordinal <= through` out of what is to be learned, those
    /// of a domain or of all, and gives back which they are. They may be submitted again.
    ///
    /// # Errors
    /// When it cannot be brought to disk.
    pub fn withdraw(&self, domain: Option<&Domain>, after: u64, through: u64) -> Result<Vec<u64>> {
        let candidates = self.shared.read(|read| ordinals(read, domain, after, through))?;
        self.shared.transact(|tables| {
            let mut withdrawn = Vec::new();
            for ordinal in candidates {
                let Some(mut settled) = tables.settled(ordinal)? else { continue };
                if settled.verdict.kind == VerdictKind::Refused || settled.withdrawn {
                    continue;
                }
                tables.remove_examples(&settled, ordinal)?;
                (settled.examples, settled.held_out, settled.withdrawn) = (0, 0, true);
                tables.set_settled(ordinal, &settled)?;
                withdrawn.push(ordinal);
            }
            let mut state = tables.state()?;
            state.taken_out += withdrawn.len() as u64;
            tables.set_state(&state)?;
            Ok(withdrawn)
        })
    }

    /// Says how documents are made into examples, in any words that change when the way does. When
    /// it differs from what was said before, all documents are to be judged and cut anew, but for
    /// those that were withdrawn; true is returned.
    ///
    /// # Errors
    /// When it cannot be brought to disk.
    pub fn encode_as(&self, encoding: &str) -> Result<bool> {
        self.shared.transact(|tables| {
            if tables.encoding()?.as_deref() == Some(encoding) {
                return Ok(false);
            }
            tables.set_encoding(encoding)?;
            let mut judged = Vec::new();
            for row in tables.settled.iter()? {
                let (ordinal, row) = row?;
                if !unframe::<Settled>(row.value())?.withdrawn {
                    judged.push(ordinal.value());
                }
            }
            for ordinal in &judged {
                tables.unsettle(*ordinal)?;
            }
            let mut state = tables.state()?;
            state.cursor = 0;
            tables.set_state(&state)?;
            tables.advance_cursor()?;
            Ok(!judged.is_empty())
        })
    }

    /// Writes the whole file anew, so that no page of it keeps what was forgotten. Nobody reads or
    /// writes meanwhile.
    ///
    /// # Errors
    /// When the disk fails. The old file stays in place until the new one is whole and on disk.
    pub fn rewrite(&self) -> Result<()> {
        self.shared.check()?;
        let mut database = self.shared.database.write().unwrap_or_else(PoisonError::into_inner);
        let path = &self.shared.path;
        let io = |error: std::io::Error| LedgerError::Storage(format!("{}: {error}", path.display()));
        remove_leftovers(path).map_err(io)?;
        let fresh = fresh_path(path);
        let copy = open_database(&fresh)?;
        copy_all(&database, &copy)?;
        drop(copy);
        let replaced = replace(&fresh, path).map_err(io).and_then(|()| open_database(path));
        match replaced {
            Ok(opened) => {
                *database = opened;
                Ok(())
            }
            Err(error) => {
                // Memory and disk may speak of different files now.
                self.shared.fail(&error.to_string());
                Err(error)
            }
        }
    }
}

fn fresh_path(path: &Path) -> PathBuf {
    path.with_extension("new")
}

/// Removes a copy that was not finished.
pub(super) fn remove_leftovers(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(fresh_path(path)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn replace(fresh: &Path, path: &Path) -> std::io::Result<()> {
    File::open(fresh)?.sync_all()?;
    fs::rename(fresh, path)?;
    let folder = path.parent().ok_or_else(|| std::io::Error::other("the file is in no folder"))?;
    File::open(folder)?.sync_all()
}

fn copy_all(from: &Database, to: &Database) -> Result<()> {
    let (read, write) = (from.begin_read()?, to.begin_write()?);
    let mut found: Vec<String> = read.list_tables()?.map(|table| table.name().to_owned()).collect();
    found.sort();
    if found != names() {
        return Err(LedgerError::Storage(format!("the tables {found:?} are not all known")));
    }
    copy(&read, &write, DOCUMENTS)?;
    copy(&read, &write, IDS)?;
    copy(&read, &write, PLACES)?;
    copy(&read, &write, DERIVED)?;
    copy(&read, &write, SETTLED)?;
    copy(&read, &write, EXAMPLES)?;
    copy(&read, &write, TRAILS)?;
    copy(&read, &write, DOMAINS)?;
    copy(&read, &write, STATE)?;
    Ok(write.commit()?)
}

fn copy<K: Key + 'static, V: Value + 'static>(
    read: &ReadTransaction,
    write: &WriteTransaction,
    table: TableDefinition<'_, K, V>,
) -> Result<()> {
    let mut to = write.open_table(table)?;
    for row in read.open_table(table)?.iter()? {
        let (key, value) = row?;
        to.insert(key.value(), value.value())?;
    }
    Ok(())
}
