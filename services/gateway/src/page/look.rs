//! How everything stands, read at once for the page to show.

use super::pulse::Beat;
use crate::error::Result;
use crate::state::{State, now_ms, read};
use crate::tally::Tally;
use actix_web::web;
use kit::ledger::{Ledger, LedgerError};
use kit::manifests::Registry;
use kit::status::document_status;
use proto::{Document, DocumentStatus, Domain, Generation, Lineage};
use std::sync::Arc;

/// Documents in the list, the newest first.
const DOCUMENTS_MAX: usize = 50;
/// Characters of a document that are shown.
const EXCERPT_CHARS: usize = 96;
/// Generations of a lineage that are shown, the newest first.
const GENERATIONS_MAX: usize = 24;

/// How everything stands.
pub(super) struct Look {
    pub now_ms: u64,
    pub ready: bool,
    /// Whether documents are learned at all.
    pub learning: bool,
    /// Whether learning waits for room on the disk.
    pub disk_full: bool,
    pub base_name: String,
    pub tally: Tally,
    /// The newest documents.
    pub rows: Vec<Row>,
    pub lineages: Vec<Adapter>,
    /// Generations of a lineage whose weights are still there, from the current one on.
    pub kept: usize,
    pub beats: Vec<Beat>,
}

/// A document of the list.
pub(super) struct Row {
    pub status: DocumentStatus,
    pub excerpt: String,
    pub submitted_ms: u64,
}

/// A lineage with its generations, the current one first.
pub(super) struct Adapter {
    pub domain: Domain,
    pub lineage: Lineage,
    /// Documents that wait to be learned in it.
    pub waiting: u64,
    pub generations: Vec<Arc<Generation>>,
}

impl Look {
    /// Takes a look.
    pub(super) async fn take(state: &web::Data<State>) -> Result<Self> {
        let gateway = &state.gateway;
        let (ledger, registry) = (Arc::clone(&gateway.ledger), Arc::clone(&gateway.registry));
        let (tally, rows, lineages) = read(move || documents_and_lineages(&ledger, &registry)).await?;
        Ok(Self {
            now_ms: now_ms(),
            ready: state.is_ready(),
            learning: (gateway.learning)(),
            disk_full: state.too_full_to_learn(),
            base_name: gateway.info.base_name.clone(),
            tally,
            rows,
            lineages,
            kept: gateway.settings.checkpoint.generations_kept,
            beats: state.pulse.beats(),
        })
    }
}

type Found = (Tally, Vec<Row>, Vec<Adapter>);

fn documents_and_lineages(ledger: &Ledger, registry: &Registry) -> std::result::Result<Found, LedgerError> {
    let manifest = registry.try_manifest();
    let tally = Tally::take(ledger, manifest.as_deref())?;
    let rows = rows(ledger, registry, |_| true)?;
    let adapter = |(domain, lineage): (&Domain, &Lineage)| Adapter {
        domain: domain.clone(),
        lineage: lineage.clone(),
        waiting: tally.domains.get(domain).map_or(0, |of| of.waiting),
        generations: registry.chain(domain).into_iter().take(GENERATIONS_MAX).collect(),
    };
    let lineages = manifest.iter().flat_map(|manifest| &manifest.lineages).map(adapter).collect();
    Ok((tally, rows, lineages))
}

/// The newest documents of those that are wanted.
pub(super) fn rows(
    ledger: &Ledger,
    registry: &Registry,
    wanted: impl Fn(&Document) -> bool,
) -> std::result::Result<Vec<Row>, LedgerError> {
    let mut rows = Vec::new();
    for accepted in ledger.list(None, DOCUMENTS_MAX, None, wanted)? {
        let document = accepted.document;
        // Whoever forgets a document may do so between the two readings.
        if let Some(status) = document_status(ledger, registry, registry.live(), &document.id)? {
            let excerpt = excerpt(&document.content.plain());
            rows.push(Row { status, excerpt, submitted_ms: document.submitted_ms });
        }
    }
    Ok(rows)
}

/// The beginning of a text, on one line.
fn excerpt(text: &str) -> String {
    // A word takes a character at least, and its space another.
    let words: Vec<&str> = text.split_whitespace().take(EXCERPT_CHARS).collect();
    let line = words.join(" ");
    match line.char_indices().nth(EXCERPT_CHARS) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_excerpt_is_one_short_line_cut_between_characters() {
        assert_eq!(excerpt("  one\n two\t"), "one two");
        let long = excerpt(&"ä".repeat(500));
        assert_eq!(long.chars().count(), EXCERPT_CHARS + 1);
        assert!(long.ends_with('…'), "{long}");
    }
}
