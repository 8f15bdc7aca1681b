//! What is written together: appends, verdicts and trail entries share a commit.

use super::tables::{Named, Settled, State, Tables, frame};
use super::{Result, Shared};
use crossbeam_channel::{Receiver, RecvTimeoutError};
use proto::{Document, DocumentId, Example, Kept, Trail, TrailEntry, VerdictKind};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::oneshot;

/// How long a commit waits for company.
pub(super) const GROUP_TIME: Duration = Duration::from_millis(2);
/// A group of this many documents waits no longer.
const GROUP_DOCUMENTS: usize = 256;

/// What became of a document that was to be appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Appended {
    /// It is in the ledger now.
    New {
        /// Its place.
        ordinal: u64,
    },
    /// It was there already, with this very content.
    Same {
        /// Its place.
        ordinal: u64,
    },
    /// Its id stands for other content.
    Conflict,
    /// It was not written, because another document of the same call conflicts.
    NotWritten,
}

/// A judged document with its examples.
#[derive(Debug, Clone)]
pub struct Settlement {
    /// The verdict, and what it is about.
    pub kept: Kept,
    /// What is to be learned of it, and what is held out.
    pub examples: Vec<Example>,
}

/// A document on its way to being settled.
#[must_use = "it is not settled before it is on disk"]
pub struct Settling(pub(super) oneshot::Receiver<Result<()>>);

impl Settling {
    /// Waits until it is.
    ///
    /// # Errors
    /// When it cannot be brought to disk.
    pub async fn on_disk(self) -> Result<()> {
        self.0.await.unwrap_or(Err(super::LedgerError::Failed))
    }
}

type Reply<T> = oneshot::Sender<Result<T>>;

/// A call that waits for the writer.
pub(super) enum Write {
    Append { documents: Vec<Document>, again: BTreeSet<DocumentId>, reply: Reply<Vec<Appended>> },
    Settle { settlements: Vec<Settlement>, reply: Reply<()> },
    Record { entries: Vec<(u64, TrailEntry)>, reply: Reply<()> },
}

/// The answer to a call, for when it is on disk.
type Answer = Box<dyn FnOnce(Result<()>)>;

/// The writer thread: one commit a group, until the ledger is dropped.
pub(super) fn run(shared: &Shared, inbox: &Receiver<Write>) {
    while let Ok(first) = inbox.recv() {
        let group = collect(first, inbox);
        fail::fail_point!("ledger::before_write");
        let mut answers: Vec<Answer> = Vec::with_capacity(group.len());
        let written = shared.transact(|tables| {
            for write in group {
                // An error here leaves the calls that are not reached yet unanswered: they end with
                // `Failed`, and their documents are not in the ledger, which is what matters.
                answers.push(apply(tables, write)?);
            }
            tables.advance_cursor()
        });
        fail::fail_point!("ledger::after_commit");
        for answer in answers {
            answer(written.clone());
        }
    }
}

fn collect(first: Write, inbox: &Receiver<Write>) -> Vec<Write> {
    let deadline = Instant::now() + GROUP_TIME;
    let mut documents = first.documents();
    let mut group = vec![first];
    while documents < GROUP_DOCUMENTS {
        match inbox.recv_deadline(deadline) {
            Ok(write) => {
                documents += write.documents();
                group.push(write);
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
        }
    }
    group
}

impl Write {
    fn documents(&self) -> usize {
        match self {
            Self::Append { documents, .. } => documents.len(),
            Self::Settle { settlements, .. } => settlements.len(),
            Self::Record { entries, .. } => entries.len(),
        }
    }
}

fn apply(tables: &mut Tables<'_>, write: Write) -> Result<Answer> {
    Ok(match write {
        Write::Append { documents, again, reply } => {
            let outcome = append(tables, &documents, &again)?;
            answer(reply, outcome)
        }
        Write::Settle { settlements, reply } => {
            fail::fail_point!("ledger::before_settle", |_| Err(super::LedgerError::Storage(
                "injected".into()
            )));
            settlements.iter().try_for_each(|settlement| settle(tables, settlement))?;
            answer(reply, ())
        }
        Write::Record { entries, reply } => {
            for (ordinal, entry) in &entries {
                if tables.documents_has(*ordinal)? {
                    tables.add_to_trail(*ordinal, entry)?;
                }
            }
            answer(reply, ())
        }
    })
}

fn answer<T: 'static>(reply: Reply<T>, value: T) -> Answer {
    // Whoever asked may have gone away; what was asked for is done all the same.
    Box::new(move |written| drop(reply.send(written.map(|()| value))))
}

/// What is to be done with one document of a call.
enum Plan {
    New,
    /// It stands in the ledger under this ordinal.
    Same(u64),
    /// It moves from this ordinal to a new one.
    Again(u64),
    /// It is the same as an earlier one of this call.
    Twin(usize),
    Conflict,
}

fn append(
    tables: &mut Tables<'_>,
    documents: &[Document],
    again: &BTreeSet<DocumentId>,
) -> Result<Vec<Appended>> {
    let plans = plan(tables, documents, again)?;
    if plans.iter().any(|plan| matches!(plan, Plan::Conflict)) {
        let outcome = |plan: &Plan| match plan {
            Plan::Conflict => Appended::Conflict,
            Plan::Same(ordinal) => Appended::Same { ordinal: *ordinal },
            _ => Appended::NotWritten,
        };
        return Ok(plans.iter().map(outcome).collect());
    }
    let mut state = tables.state()?;
    let mut outcomes: Vec<Appended> = Vec::with_capacity(documents.len());
    for (document, plan) in documents.iter().zip(plans) {
        let outcome = match plan {
            Plan::New => insert(tables, &mut state, document, Trail::default())?,
            Plan::Again(old) => {
                let trail = tables.remove_document(old)?.map(|(_, trail)| trail).unwrap_or_default();
                state = State { head: state.head, ..tables.state()? };
                insert(tables, &mut state, document, trail)?
            }
            Plan::Same(ordinal) => Appended::Same { ordinal },
            Plan::Twin(of) => match outcomes[of] {
                Appended::New { ordinal } => Appended::Same { ordinal },
                other => other,
            },
            Plan::Conflict => Appended::Conflict,
        };
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

/// Looks before anything is written, so that a call with a conflict changes nothing.
fn plan(tables: &Tables<'_>, documents: &[Document], again: &BTreeSet<DocumentId>) -> Result<Vec<Plan>> {
    let mut seen: BTreeMap<&DocumentId, (usize, [u8; 32])> = BTreeMap::new();
    let mut plans = Vec::with_capacity(documents.len());
    for (n, document) in documents.iter().enumerate() {
        let hash = document.content_hash();
        let plan = match (seen.get(&document.id), tables.named(&document.id)?) {
            (Some((of, twin)), _) if *twin == hash => Plan::Twin(*of),
            (Some(_), _) => Plan::Conflict,
            (None, None) => Plan::New,
            (None, Some(named)) if named.content_hash != hash => Plan::Conflict,
            (None, Some(named)) => {
                let withdrawn = tables.settled(named.ordinal)?.is_some_and(|settled| settled.withdrawn);
                let moves = withdrawn || again.contains(&document.id);
                if moves { Plan::Again(named.ordinal) } else { Plan::Same(named.ordinal) }
            }
        };
        seen.entry(&document.id).or_insert((n, hash));
        plans.push(plan);
    }
    Ok(plans)
}

fn insert(
    tables: &mut Tables<'_>,
    state: &mut State,
    document: &Document,
    mut trail: Trail,
) -> Result<Appended> {
    state.head += 1;
    tables.set_state(state)?;
    let ordinal = state.head;
    tables.documents.insert(ordinal, frame(document)?.as_slice())?;
    let named = Named { ordinal, content_hash: document.content_hash() };
    tables.ids.insert(document.id.as_str(), frame(&named)?.as_slice())?;
    tables.places.insert((document.domain.as_str(), ordinal), ())?;
    if let Some(parent) = &document.derived_from {
        tables.derived.insert((parent.as_str(), ordinal), ())?;
    }
    trail.entries.push(TrailEntry { event: "accepted".into(), at_ms: document.submitted_ms, detail: None });
    tables.set_trail(ordinal, trail)?;
    tables.count(&document.domain, |counts| counts.documents += 1)?;
    Ok(Appended::New { ordinal })
}

/// Delivered twice it changes nothing the second time; and a document that was forgotten while it
/// was on its way stays forgotten.
fn settle(tables: &mut Tables<'_>, settlement: &Settlement) -> Result<()> {
    let Settlement { kept, examples } = settlement;
    if !tables.documents_has(kept.ordinal)? || tables.settled(kept.ordinal)?.is_some() {
        return Ok(());
    }
    let held_out = examples.iter().filter(|example| example.held_out).count() as u64;
    let settled = Settled {
        verdict: kept.verdict.clone(),
        domain: kept.domain.clone(),
        examples: examples.len() as u32,
        held_out: held_out as u32,
        signature: kept.signature.clone(),
        withdrawn: false,
    };
    tables.set_settled(kept.ordinal, &settled)?;
    for example in examples {
        let key = (kept.domain.as_str(), kept.ordinal, example.id.chunk);
        tables.examples.insert(key, frame(example)?.as_slice())?;
    }
    let (event, detail) = match kept.verdict.kind {
        VerdictKind::Kept => ("kept", None),
        VerdictKind::Refused => ("refused", Some(kept.verdict.reason.clone())),
    };
    tables.add_to_trail(kept.ordinal, &TrailEntry { event: event.into(), at_ms: now_ms(), detail })?;
    tables.count(&kept.domain, |counts| {
        match kept.verdict.kind {
            VerdictKind::Kept => counts.kept += 1,
            VerdictKind::Refused => counts.refused += 1,
        }
        counts.examples += examples.len() as u64;
        counts.held_out += held_out;
    })
}

impl Tables<'_> {
    fn documents_has(&self, ordinal: u64) -> Result<bool> {
        use redb::ReadableTable;
        Ok(self.documents.get(ordinal)?.is_some())
    }
}

/// Milliseconds since 1970; a clock before that counts as 1970.
fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}
