//! What the ledger is asked.

use super::tables::{DOCUMENTS, DOMAINS, EXAMPLES, IDS, Named, PLACES, SETTLED, Settled, TRAILS};
use super::tables::{document, document_at, examples_of, get, trail, unframe};
use super::{Ledger, Result};
use proto::{Accepted, Document, DocumentId, Domain, Example, ExampleId, Trail, Verdict, VerdictKind};
use redb::{ReadTransaction, ReadableTable};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How much there is of a domain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainCounts {
    /// Documents, judged or not.
    pub documents: u64,
    /// Documents that were kept.
    pub kept: u64,
    /// Documents that were refused.
    pub refused: u64,
    /// Examples, held-out ones among them.
    pub examples: u64,
    /// Examples that are held out.
    pub held_out: u64,
}

/// Whole documents that wait to be learned, in the order of the ledger.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FreshWindow {
    /// What is to be learned of them.
    pub examples: Vec<Example>,
    /// What is only measured.
    pub held_out: Vec<Example>,
    /// The last of them; where the window started when there is none.
    pub through: u64,
    /// How many they are.
    pub documents: u64,
    /// No document that comes later would be in it.
    pub full: bool,
}

/// How much a window holds.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Documents at most.
    pub documents: usize,
    /// Examples at most.
    pub examples: usize,
    /// Examples at most, where each answers one prompt: such answers are counted, and read once.
    pub counted: usize,
    /// Tokens of such an answer at most.
    pub answer_tokens: usize,
    /// Tokens of all these examples at most, where they are more than `examples`.
    pub counted_tokens: usize,
}

/// What is in a window so far.
#[derive(Default)]
struct Filled {
    documents: usize,
    examples: usize,
    tokens: usize,
    /// Examples that do not answer one prompt.
    others: usize,
    /// Tokens of the longest answer.
    longest: usize,
}

impl Filled {
    fn add(&mut self, examples: &[Example]) {
        self.documents += 1;
        for Example { piece, .. } in examples {
            self.examples += 1;
            self.tokens += piece.tokens.len();
            let mut answers = piece.answers();
            match (answers.next(), answers.next()) {
                (Some(answer), None) => self.longest = self.longest.max(answer.len()),
                _ => self.others += 1,
            }
        }
    }

    fn fits(&self, room: &Room) -> bool {
        let counted = self.others == 0
            && self.longest <= room.answer_tokens
            && self.examples <= room.counted
            && self.tokens <= room.counted_tokens;
        self.documents == 1 || self.examples <= room.examples || counted
    }
}

type Examples = redb::ReadOnlyTable<(&'static str, u64, u32), &'static [u8]>;

impl Ledger {
    /// The documents after an ordinal, in order, at most `limit` of them.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn next_accepted(&self, after: u64, limit: usize) -> Result<Vec<Accepted>> {
        self.shared.read(|read| {
            let documents = read.open_table(DOCUMENTS)?;
            let rows = documents.range(after + 1..)?.take(limit);
            rows.map(|row| accepted(&row?)).collect()
        })
    }

    /// A document by its id, with its place.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn document(&self, id: &DocumentId) -> Result<Option<(u64, Document)>> {
        self.shared.read(|read| {
            let Some(named) = get::<_, Named>(&read.open_table(IDS)?, id.as_str())? else { return Ok(None) };
            let document = document_at(&read.open_table(DOCUMENTS)?, named.ordinal)?;
            Ok(document.map(|document| (named.ordinal, document)))
        })
    }

    /// What intake decided about a document; none while it has not.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn verdict(&self, ordinal: u64) -> Result<Option<Verdict>> {
        Ok(self.settled(ordinal)?.map(|settled| settled.verdict))
    }

    /// The verdict, with what came of it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn settled(&self, ordinal: u64) -> Result<Option<Settled>> {
        self.shared.read(|read| get(&read.open_table(SETTLED)?, ordinal))
    }

    /// All that happened to a document; empty when there is none.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn trail(&self, ordinal: u64) -> Result<Trail> {
        self.shared.read(|read| trail(&read.open_table(TRAILS)?, ordinal))
    }

    /// Documents that are `wanted`, newest first, at most `limit`; only those of a domain, and only those before an
    /// ordinal, if given.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn list(
        &self,
        domain: Option<&Domain>,
        limit: usize,
        before: Option<u64>,
        wanted: impl Fn(&Document) -> bool,
    ) -> Result<Vec<Accepted>> {
        let before = before.unwrap_or(u64::MAX);
        self.shared.read(|read| {
            let documents = read.open_table(DOCUMENTS)?;
            let mut found = Vec::new();
            let mut take = |one: Accepted| {
                found.extend((found.len() < limit && wanted(&one.document)).then_some(one));
                found.len() < limit
            };
            if let Some(domain) = domain.map(Domain::as_str) {
                let places = read.open_table(PLACES)?;
                for place in places.range((domain, 0)..(domain, before))?.rev() {
                    let ordinal = place?.0.value().1;
                    let document = document_at(&documents, ordinal)?;
                    if !document.is_none_or(|document| take(Accepted { ordinal, document })) {
                        break;
                    }
                }
            } else {
                for row in documents.range(..before)?.rev() {
                    if !take(accepted(&row?)?) {
                        break;
                    }
                }
            }
            Ok(found)
        })
    }

    /// The documents with `after < ordinal <= through`, in order; only those of a domain, if given.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn documents_between(
        &self,
        domain: Option<&Domain>,
        after: u64,
        through: u64,
    ) -> Result<Vec<(u64, Document)>> {
        self.shared.read(|read| {
            let documents = read.open_table(DOCUMENTS)?;
            let mut found = Vec::new();
            for ordinal in ordinals(read, domain, after, through)? {
                found.extend(document_at(&documents, ordinal)?.map(|document| (ordinal, document)));
            }
            Ok(found)
        })
    }

    /// Whole documents that come after `after`, in order, as many as there is room for, but at least
    /// one: of a domain, or of all. Only what is before the intake cursor is looked at, so that the
    /// window does not depend on the order in which documents happened to be judged.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn fresh(&self, domain: Option<&Domain>, after: u64, room: Room) -> Result<FreshWindow> {
        let domains = domain.map_or_else(|| self.domains(), |domain| Ok(vec![domain.clone()]))?;
        let cursor = self.intake_cursor();
        self.shared.read(|read| {
            let table = read.open_table(EXAMPLES)?;
            let mut window = FreshWindow { through: after, ..FreshWindow::default() };
            let mut filled = Filled::default();
            while (window.documents as usize) < room.documents {
                let first = |domain: &Domain| first_example(&table, domain, window.through, cursor);
                let Some((domain, ordinal)) = oldest(domains.iter(), first)? else { break };
                let (held_out, examples): (Vec<Example>, Vec<Example>) =
                    examples_of::<Example>(&table, &domain, ordinal)?.into_iter().partition(|e| e.held_out);
                filled.add(&examples);
                if !filled.fits(&room) {
                    window.full = true;
                    break;
                }
                window.examples.extend(examples);
                window.held_out.extend(held_out);
                window.through = ordinal;
                window.documents += 1;
            }
            Ok(window)
        })
    }

    /// The domain whose first document after its cursor is the oldest, with that document's ordinal.
    /// A domain without a cursor starts from the beginning.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn oldest_waiting(&self, after: &BTreeMap<Domain, u64>) -> Result<Option<(Domain, u64)>> {
        let domains = self.domains()?;
        let cursor = self.intake_cursor();
        self.shared.read(|read| {
            let table = read.open_table(EXAMPLES)?;
            let first = |domain: &Domain| {
                first_example(&table, domain, after.get(domain).copied().unwrap_or(0), cursor)
            };
            oldest(domains.iter(), first)
        })
    }

    /// How many documents of a domain come after an ordinal and have something to learn, of those that
    /// intake has judged.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn waiting(&self, domain: &Domain, after: u64) -> Result<u64> {
        let (name, cursor) = (domain.as_str(), self.intake_cursor());
        if after >= cursor {
            return Ok(0);
        }
        self.shared.read(|read| {
            let (mut count, mut last) = (0, after);
            let table = read.open_table(EXAMPLES)?;
            for row in table.range((name, after + 1, 0)..=(name, cursor, u32::MAX))? {
                let ordinal = row?.0.value().1;
                count += u64::from(ordinal != last);
                last = ordinal;
            }
            Ok(count)
        })
    }

    /// Examples by name, in the order asked for. Those that are not there any more are left out.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn examples_of(&self, ids: &[ExampleId]) -> Result<Vec<Example>> {
        self.shared.read(|read| {
            let (examples, settled) = (read.open_table(EXAMPLES)?, read.open_table(SETTLED)?);
            let mut found = Vec::with_capacity(ids.len());
            // Examples of one document come together, so its domain is looked up once.
            let mut document: Option<(u64, Option<Domain>)> = None;
            for id in ids {
                if document.as_ref().is_none_or(|(ordinal, _)| *ordinal != id.ordinal) {
                    let row: Option<Settled> = get(&settled, id.ordinal)?;
                    document = Some((id.ordinal, row.map(|row| row.domain)));
                }
                if let Some((_, Some(domain))) = &document {
                    found.extend(get::<_, Example>(&examples, (domain.as_str(), id.ordinal, id.chunk))?);
                }
            }
            Ok(found)
        })
    }

    /// Ordinal, domain and MinHash signature of every document that was kept and not withdrawn.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn signatures(&self) -> Result<Vec<(u64, Domain, Vec<u32>)>> {
        self.shared.read(|read| {
            let mut found = Vec::new();
            for row in read.open_table(SETTLED)?.iter()? {
                let (ordinal, row) = row?;
                let settled: Settled = unframe(row.value())?;
                if settled.verdict.kind == VerdictKind::Kept && !settled.withdrawn {
                    found.push((ordinal.value(), settled.domain, settled.signature));
                }
            }
            Ok(found)
        })
    }

    /// All domains that have documents.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn domains(&self) -> Result<Vec<Domain>> {
        Ok(self.counts()?.into_keys().collect())
    }

    /// How much there is of each domain.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn counts(&self) -> Result<BTreeMap<Domain, DomainCounts>> {
        self.shared.read(|read| {
            let mut counts = BTreeMap::new();
            for row in read.open_table(DOMAINS)?.iter()? {
                let (domain, row) = row?;
                let domain = Domain::new(domain.value())
                    .map_err(|error| super::LedgerError::Damaged(error.to_string()))?;
                counts.insert(domain, unframe(row.value())?);
            }
            Ok(counts)
        })
    }

    /// Examples of a domain, held-out ones among them.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn examples_in(&self, domain: &Domain) -> Result<u64> {
        self.shared.read(|read| {
            let counts: Option<DomainCounts> = get(&read.open_table(DOMAINS)?, domain.as_str())?;
            Ok(counts.unwrap_or_default().examples)
        })
    }

    /// Documents in the ledger.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn documents(&self) -> Result<u64> {
        Ok(self.counts()?.values().map(|counts| counts.documents).sum())
    }
}

fn accepted(row: &(redb::AccessGuard<'_, u64>, redb::AccessGuard<'_, &'static [u8]>)) -> Result<Accepted> {
    Ok(Accepted { ordinal: row.0.value(), document: document(row.1.value())? })
}

/// Ordinals of the documents with `after < ordinal <= through`.
pub(super) fn ordinals(
    read: &ReadTransaction,
    domain: Option<&Domain>,
    after: u64,
    through: u64,
) -> Result<Vec<u64>> {
    if after >= through {
        return Ok(Vec::new());
    }
    if let Some(domain) = domain.map(Domain::as_str) {
        let rows = read.open_table(PLACES)?.range((domain, after + 1)..=(domain, through))?;
        return rows.map(|row| Ok(row?.0.value().1)).collect();
    }
    let rows = read.open_table(DOCUMENTS)?.range(after + 1..=through)?;
    rows.map(|row| Ok(row?.0.value())).collect()
}

/// The first document of a domain with `after < ordinal <= through` that has examples.
fn first_example(table: &Examples, domain: &Domain, after: u64, through: u64) -> Result<Option<u64>> {
    if after >= through {
        return Ok(None);
    }
    let name = domain.as_str();
    let first = table.range((name, after + 1, 0)..=(name, through, u32::MAX))?.next().transpose()?;
    Ok(first.map(|(key, _)| key.value().1))
}

/// The domain with the lowest ordinal, of those that have one.
fn oldest<'d>(
    domains: impl Iterator<Item = &'d Domain>,
    first: impl Fn(&Domain) -> Result<Option<u64>>,
) -> Result<Option<(Domain, u64)>> {
    let mut oldest: Option<(&Domain, u64)> = None;
    for domain in domains {
        if let Some(ordinal) = first(domain)?
            && oldest.is_none_or(|(_, least)| ordinal < least)
        {
            oldest = Some((domain, ordinal));
        }
    }
    Ok(oldest.map(|(domain, ordinal)| (domain.clone(), ordinal)))
}
