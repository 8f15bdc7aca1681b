//! Where a document stands, derived from what is durable: no stage is stored, so none can be wrong.

use crate::ledger::{Ledger, LedgerError, Settled};
use crate::manifests::Registry;
use proto::{DocumentId, DocumentStatus, Domain, GenerationId, Lineage, Stage, VerdictKind};

/// The status of a document; none when there is no such document. `live_number` is the number of the
/// manifest that is served.
///
/// # Errors
/// When the ledger cannot be read.
pub fn document_status(
    ledger: &Ledger,
    registry: &Registry,
    live_number: u64,
    id: &DocumentId,
) -> Result<Option<DocumentStatus>, LedgerError> {
    let Some((ordinal, document)) = ledger.document(id)? else { return Ok(None) };
    let settled = ledger.settled(ordinal)?;
    let held_out = settled.as_ref().map_or(0, |settled| settled.held_out);
    let place = match settled {
        None => Place::at(Stage::Accepted),
        Some(settled) => place(registry, live_number, &document.domain, ordinal, &settled),
    };
    Ok(Some(DocumentStatus {
        id: document.id,
        status: place.stage,
        domain: document.domain,
        reason: place.reason,
        generation: place.generation,
        held_out,
        trail: ledger.trail(ordinal)?.entries,
    }))
}

/// A stage with what belongs to it.
struct Place {
    stage: Stage,
    reason: Option<String>,
    generation: Option<GenerationId>,
}

impl Place {
    fn at(stage: Stage) -> Self {
        Self { stage, reason: None, generation: None }
    }

    fn because(stage: Stage, reason: impl Into<String>) -> Self {
        Self { reason: Some(reason.into()), ..Self::at(stage) }
    }
}

fn place(registry: &Registry, live_number: u64, domain: &Domain, ordinal: u64, settled: &Settled) -> Place {
    if settled.verdict.kind == VerdictKind::Refused {
        return Place::because(Stage::Refused, settled.verdict.reason.clone());
    }
    let manifest = registry.manifest();
    let name = if manifest.shared { Domain::general() } else { domain.clone() };
    let lineage = manifest.lineages.get(&name);
    // A document within a published range may have been put aside on its own: it broke the learner.
    let aside = lineage.and_then(|lineage| set_aside(lineage, ordinal));
    if let Some(reason) = aside {
        return Place::because(Stage::SetAside, reason);
    }
    if settled.withdrawn {
        return Place::because(Stage::SetAside, "rolled back");
    }
    if settled.examples > 0 && settled.examples == settled.held_out {
        return Place::at(Stage::Probe);
    }
    if let Some(generation) = registry.learned_in(&name, ordinal) {
        let stage = if generation.manifest <= live_number { Stage::Live } else { Stage::Learned };
        return Place { stage, reason: None, generation: Some(generation.id.clone()) };
    }
    if lineage.is_none_or(|lineage| ordinal > lineage.cursor) {
        return Place::at(Stage::Waiting);
    }
    Place::because(Stage::SetAside, "it is in no generation that is still kept")
}

/// Why a document was put aside; the newest reason, when there are several.
fn set_aside(lineage: &Lineage, ordinal: u64) -> Option<String> {
    let covers = |range: &&proto::SetAside| range.after < ordinal && ordinal <= range.through;
    lineage.set_aside.iter().rev().find(covers).map(|range| range.reason.clone())
}
