//! The tables, and the frames that their rows are.

use super::{DomainCounts, LedgerError, Result};
use proto::wire::{self, Kind};
use proto::{Content, Document, DocumentId, Domain, Trail, TrailEntry, Verdict, VerdictKind};
use redb::{ReadableTable, Table, TableDefinition, TableHandle, WriteTransaction};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

type Frame = &'static [u8];

/// Ordinal to document.
pub(super) const DOCUMENTS: TableDefinition<u64, Frame> = TableDefinition::new("documents");
/// Document id to [`Named`].
pub(super) const IDS: TableDefinition<&str, Frame> = TableDefinition::new("ids");
/// Domain and ordinal of every document, so that a domain's documents are found without the others.
pub(super) const PLACES: TableDefinition<(&str, u64), ()> = TableDefinition::new("places");
/// What documents say they derive from, and their ordinals.
pub(super) const DERIVED: TableDefinition<(&str, u64), ()> = TableDefinition::new("derived");
/// Ordinal to [`Settled`].
pub(super) const SETTLED: TableDefinition<u64, Frame> = TableDefinition::new("settled");
/// Domain, ordinal and chunk to example. In this order the oldest waiting document of a domain is
/// one look-up away.
pub(super) const EXAMPLES: TableDefinition<(&str, u64, u32), Frame> = TableDefinition::new("examples");
/// Ordinal to trail.
pub(super) const TRAILS: TableDefinition<u64, Frame> = TableDefinition::new("trails");
/// Domain to [`DomainCounts`].
pub(super) const DOMAINS: TableDefinition<&str, Frame> = TableDefinition::new("domains");
/// What there is only one of, by name.
pub(super) const STATE: TableDefinition<&str, Frame> = TableDefinition::new("state");

const COUNTERS: &str = "counters";
const ENCODING: &str = "encoding";
const FORGETTING: &str = "forgetting";

/// The largest row that is read, bytes: a document of the largest body with room to spare.
const ROW_BYTES_MAX: usize = wire::PAYLOAD_BYTES_MAX;
/// Entries a trail holds; a document that is rolled back and forth keeps its newest ones.
const TRAIL_ENTRIES_MAX: usize = 64;

/// What an id stands for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Named {
    pub ordinal: u64,
    pub content_hash: [u8; 32],
}

/// What became of a document at intake.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settled {
    /// The verdict.
    pub verdict: Verdict,
    /// Where its examples are.
    pub domain: Domain,
    /// Its examples, held-out ones among them.
    pub examples: u32,
    /// Those that are held out.
    pub held_out: u32,
    /// MinHash signature of its text.
    pub signature: Vec<u32>,
    /// Taken out of what is to be learned, by a rollback.
    pub withdrawn: bool,
}

/// Where the ledger as a whole stands.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct State {
    /// The last ordinal given out.
    pub head: u64,
    /// Every document up to it is settled.
    pub cursor: u64,
    /// Documents taken out, ever.
    pub taken_out: u64,
}

pub(super) fn frame<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    wire::encode(Kind::Row, value).map_err(|error| LedgerError::Row(error.to_string()))
}

pub(super) fn unframe<T: DeserializeOwned>(frame: &[u8]) -> Result<T> {
    wire::decode(Kind::Row, frame, ROW_BYTES_MAX).map_err(|error| LedgerError::Damaged(error.to_string()))
}

/// A row of a table, unframed.
pub(super) fn get<'k, K, T>(table: &impl ReadableTable<K, Frame>, key: K::SelfType<'k>) -> Result<Option<T>>
where
    K: redb::Key + 'static,
    T: DeserializeOwned,
{
    let row = table.get(key)?;
    row.map(|row| unframe(row.value())).transpose()
}

/// A document as it was written before documents said what they derive from.
#[derive(Deserialize)]
struct Underived {
    id: DocumentId,
    domain: Domain,
    content: Content,
    importance: Option<f32>,
    source: Option<String>,
    submitted_ms: u64,
}

/// A document's row. Of the two forms the newer one is longer, so that neither is taken for the other.
pub(super) fn document(frame: &[u8]) -> Result<Document> {
    unframe(frame).or_else(|error| {
        let old: Underived = unframe(frame).map_err(|_| error)?;
        let Underived { id, domain, content, importance, source, submitted_ms } = old;
        Ok(Document { id, domain, content, importance, source, submitted_ms, derived_from: None })
    })
}

/// The document with an ordinal.
pub(super) fn document_at(table: &impl ReadableTable<u64, Frame>, ordinal: u64) -> Result<Option<Document>> {
    table.get(ordinal)?.map(|row| document(row.value())).transpose()
}

/// All examples of one document.
pub(super) fn examples_of<T: DeserializeOwned>(
    table: &impl ReadableTable<(&'static str, u64, u32), Frame>,
    domain: &Domain,
    ordinal: u64,
) -> Result<Vec<T>> {
    let domain = domain.as_str();
    let rows = table.range((domain, ordinal, 0)..=(domain, ordinal, u32::MAX))?;
    rows.map(|row| unframe(row?.1.value())).collect()
}

/// Trail entries leave fields out when they have nothing to say, which a format without field names
/// cannot carry; as tuples they can.
type TrailRow = Vec<(String, u64, Option<String>)>;

pub(super) fn trail(table: &impl ReadableTable<u64, Frame>, ordinal: u64) -> Result<Trail> {
    let row: TrailRow = get(table, ordinal)?.unwrap_or_default();
    let entry = |(event, at_ms, detail)| TrailEntry { event, at_ms, detail };
    Ok(Trail { entries: row.into_iter().map(entry).collect() })
}

/// See [`Tables::forgetting`].
pub(super) fn forgetting(state: &impl ReadableTable<&'static str, Frame>) -> Result<Vec<(Domain, u64)>> {
    Ok(get(state, FORGETTING)?.unwrap_or_default())
}

/// All tables, open for writing.
pub(super) struct Tables<'t> {
    pub documents: Table<'t, u64, Frame>,
    pub ids: Table<'t, &'static str, Frame>,
    pub places: Table<'t, (&'static str, u64), ()>,
    pub derived: Table<'t, (&'static str, u64), ()>,
    pub settled: Table<'t, u64, Frame>,
    pub examples: Table<'t, (&'static str, u64, u32), Frame>,
    pub trails: Table<'t, u64, Frame>,
    pub domains: Table<'t, &'static str, Frame>,
    state: Table<'t, &'static str, Frame>,
}

impl<'t> Tables<'t> {
    pub fn open(write: &'t WriteTransaction) -> Result<Self> {
        Ok(Self {
            documents: write.open_table(DOCUMENTS)?,
            ids: write.open_table(IDS)?,
            places: write.open_table(PLACES)?,
            derived: write.open_table(DERIVED)?,
            settled: write.open_table(SETTLED)?,
            examples: write.open_table(EXAMPLES)?,
            trails: write.open_table(TRAILS)?,
            domains: write.open_table(DOMAINS)?,
            state: write.open_table(STATE)?,
        })
    }

    pub fn state(&self) -> Result<State> {
        Ok(get(&self.state, COUNTERS)?.unwrap_or_default())
    }

    pub fn set_state(&mut self, state: &State) -> Result<()> {
        self.state.insert(COUNTERS, frame(state)?.as_slice())?;
        Ok(())
    }

    pub fn encoding(&self) -> Result<Option<String>> {
        get(&self.state, ENCODING)
    }

    pub fn set_encoding(&mut self, encoding: &str) -> Result<()> {
        self.state.insert(ENCODING, frame(&encoding)?.as_slice())?;
        Ok(())
    }

    /// Documents that are gone from here, and may still be in what was made of them.
    pub fn forgetting(&self) -> Result<Vec<(Domain, u64)>> {
        forgetting(&self.state)
    }

    pub fn set_forgetting(&mut self, documents: &[(Domain, u64)]) -> Result<()> {
        if documents.is_empty() {
            self.state.remove(FORGETTING)?;
        } else {
            self.state.insert(FORGETTING, frame(&documents)?.as_slice())?;
        }
        Ok(())
    }

    pub fn named(&self, id: &DocumentId) -> Result<Option<Named>> {
        get(&self.ids, id.as_str())
    }

    pub fn settled(&self, ordinal: u64) -> Result<Option<Settled>> {
        get(&self.settled, ordinal)
    }

    pub fn set_settled(&mut self, ordinal: u64, settled: &Settled) -> Result<()> {
        self.settled.insert(ordinal, frame(settled)?.as_slice())?;
        Ok(())
    }

    pub fn trail(&self, ordinal: u64) -> Result<Trail> {
        trail(&self.trails, ordinal)
    }

    pub fn add_to_trail(&mut self, ordinal: u64, entry: &TrailEntry) -> Result<()> {
        let mut trail = self.trail(ordinal)?;
        if trail.entries.iter().any(|old| old.event == entry.event && old.detail == entry.detail) {
            return Ok(());
        }
        trail.entries.push(entry.clone());
        self.set_trail(ordinal, trail)
    }

    pub fn set_trail(&mut self, ordinal: u64, trail: Trail) -> Result<()> {
        let surplus = trail.entries.len().saturating_sub(TRAIL_ENTRIES_MAX);
        let newest = trail.entries.into_iter().skip(surplus);
        let row: TrailRow = newest.map(|entry| (entry.event, entry.at_ms, entry.detail)).collect();
        self.trails.insert(ordinal, frame(&row)?.as_slice())?;
        Ok(())
    }

    /// Changes a domain's counts.
    pub fn count(&mut self, domain: &Domain, change: impl FnOnce(&mut DomainCounts)) -> Result<()> {
        let mut counts: DomainCounts = get(&self.domains, domain.as_str())?.unwrap_or_default();
        change(&mut counts);
        if counts == DomainCounts::default() {
            self.domains.remove(domain.as_str())?;
        } else {
            self.domains.insert(domain.as_str(), frame(&counts)?.as_slice())?;
        }
        Ok(())
    }

    /// Takes a document's verdict and examples away, as if it had not been judged yet.
    pub fn unsettle(&mut self, ordinal: u64) -> Result<()> {
        let Some(settled) = self.settled(ordinal)? else { return Ok(()) };
        self.settled.remove(ordinal)?;
        self.remove_examples(&settled, ordinal)?;
        self.count(&settled.domain, |counts| {
            let judged = match settled.verdict.kind {
                VerdictKind::Kept => &mut counts.kept,
                VerdictKind::Refused => &mut counts.refused,
            };
            *judged = judged.saturating_sub(1);
        })
    }

    /// Takes a document's examples away, so that nobody learns them.
    pub fn remove_examples(&mut self, settled: &Settled, ordinal: u64) -> Result<()> {
        let domain = settled.domain.as_str();
        let range = (domain, ordinal, 0)..=(domain, ordinal, u32::MAX);
        let mut removed = 0;
        self.examples.retain_in(range, |_, _| {
            removed += 1;
            false
        })?;
        if removed > 0 {
            self.count(&settled.domain, |counts| {
                counts.examples = counts.examples.saturating_sub(settled.examples.into());
                counts.held_out = counts.held_out.saturating_sub(settled.held_out.into());
            })?;
        }
        Ok(())
    }

    /// Removes a document and all that is known of it, but for its id. Gives back what it was.
    pub fn remove_document(&mut self, ordinal: u64) -> Result<Option<(Document, Trail)>> {
        let Some(document) = document_at(&self.documents, ordinal)? else { return Ok(None) };
        let trail = self.trail(ordinal)?;
        self.unsettle(ordinal)?;
        self.documents.remove(ordinal)?;
        self.trails.remove(ordinal)?;
        self.places.remove((document.domain.as_str(), ordinal))?;
        if let Some(parent) = &document.derived_from {
            self.derived.remove((parent.as_str(), ordinal))?;
        }
        self.count(&document.domain, |counts| counts.documents = counts.documents.saturating_sub(1))?;
        let mut state = self.state()?;
        state.taken_out += 1;
        self.set_state(&state)?;
        Ok(Some((document, trail)))
    }

    /// A document and all that derive from it, directly or through others, in no order but that it is
    /// the first. Empty when there is no such document.
    pub fn family(&self, id: &DocumentId) -> Result<Vec<u64>> {
        let mut family: Vec<u64> = self.named(id)?.into_iter().map(|named| named.ordinal).collect();
        let mut next = 0;
        while let Some(ordinal) = family.get(next).copied() {
            next += 1;
            let Some(parent) = document_at(&self.documents, ordinal)? else { continue };
            let id = parent.id.as_str();
            for row in self.derived.range((id, 0)..=(id, u64::MAX))? {
                let child = row?.0.value().1;
                // Documents may say that they derive from each other.
                if !family.contains(&child) {
                    family.push(child);
                }
            }
        }
        Ok(family)
    }

    /// Moves the cursor past every document that is settled, and past those that are gone.
    pub fn advance_cursor(&mut self) -> Result<()> {
        let mut state = self.state()?;
        let start = state.cursor;
        loop {
            let next = self.documents.range(state.cursor + 1..)?.next().transpose()?;
            let Some(next) = next.map(|row| row.0.value()) else {
                state.cursor = state.head;
                break;
            };
            if self.settled.get(next)?.is_none() {
                break;
            }
            state.cursor = next;
        }
        if state.cursor != start {
            self.set_state(&state)?;
        }
        Ok(())
    }
}

/// Names of all tables. Writing the file anew refuses to leave out a table that is not among them.
pub(super) fn names() -> Vec<String> {
    let mut names: Vec<String> = [
        DOCUMENTS.name(),
        IDS.name(),
        PLACES.name(),
        DERIVED.name(),
        SETTLED.name(),
        EXAMPLES.name(),
        TRAILS.name(),
        DOMAINS.name(),
        STATE.name(),
    ]
    .map(str::to_owned)
    .into();
    names.sort();
    names
}
