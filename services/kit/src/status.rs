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
        source: document.source,
        derived_from: document.derived_from,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Settlement;
    use proto::{
        BaseId, Blob, Content, Document, Example, ExampleId, Generation, Kept, Manifest, Piece, Receipt,
        SetAside, TrainReport, Verdict,
    };

    const DOCUMENTS: u64 = 7;

    fn id(n: u64) -> DocumentId {
        DocumentId::new(format!("d{n}")).expect("an id")
    }

    fn kept(ordinal: u64, examples: u32, held_out: u32) -> Settlement {
        let kind = if examples > 0 { VerdictKind::Kept } else { VerdictKind::Refused };
        let example = |chunk| Example {
            id: ExampleId { ordinal, chunk },
            domain: Domain::general(),
            piece: Piece { tokens: vec![1, 2], learned: vec![(1, 2)] },
            importance: 0.5,
            marked: false,
            held_out: chunk < held_out,
            signature: Vec::new(),
        };
        let kept = Kept {
            ordinal,
            id: id(ordinal),
            domain: Domain::general(),
            importance: None,
            verdict: Verdict { kind, reason: "too short".into(), score: 0.0 },
            pieces: Vec::new(),
            signature: Vec::new(),
        };
        Settlement { kept, examples: (0..examples).map(example).collect() }
    }

    fn generation(manifest: u64, after: u64, through: u64) -> Generation {
        let blob = Blob("0".repeat(64));
        Generation {
            id: GenerationId::new(format!("{manifest:016}")).expect("an id"),
            lineage: Domain::general(),
            base: BaseId::new("0123456789abcdef").expect("an id"),
            parent: (manifest > 1)
                .then(|| GenerationId::new(format!("{:016}", manifest - 1)).expect("an id")),
            merged_from: Vec::new(),
            number: manifest,
            manifest,
            after,
            through,
            documents: 1,
            weights: blob.clone(),
            optimiser: None,
            fisher: None,
            answer_head: None,
            probe: None,
            learned: blob,
            report: TrainReport::default(),
            receipt: Receipt::default(),
            published_ms: 0,
        }
    }

    fn publish(registry: &Registry, generation: Generation, set_aside: Vec<SetAside>) {
        let lineage = Lineage {
            current: Some(generation.id.clone()),
            cursor: generation.through,
            set_aside,
            ..Lineage::default()
        };
        let empty = Manifest::empty(generation.base.clone(), false);
        let lineages = [(Domain::general(), lineage)].into();
        let manifest = Manifest { number: generation.manifest, lineages, ..empty };
        registry.commit(manifest, Some(generation)).expect("committed");
    }

    #[tokio::test]
    async fn every_stage_is_told_from_what_is_durable() {
        let folder = tempfile::tempdir().expect("a folder");
        let ledger = Ledger::open(&folder.path().join("ledger")).expect("a ledger");
        let registry = Registry::open(&folder.path().join("lineages")).expect("a registry");
        let document = |n: u64| Document {
            id: id(n),
            domain: Domain::general(),
            content: Content::Text(format!("text {n}")),
            importance: None,
            source: None,
            submitted_ms: 0,
            derived_from: None,
        };
        ledger.append((1..=DOCUMENTS).map(document).collect()).await.expect("appended");
        let judged = [(1, 2, 1), (2, 0, 0), (3, 2, 0), (4, 2, 0), (5, 2, 2), (6, 2, 0)];
        let judged = judged.map(|(ordinal, examples, held_out)| kept(ordinal, examples, held_out));
        ledger.settle_intake_many(judged.into()).await.expect("settled");
        publish(&registry, generation(1, 0, 2), Vec::new());
        let broken = SetAside { after: 3, through: 4, reason: "it breaks the learner".into() };
        publish(&registry, generation(2, 2, 4), vec![broken]);

        let status = |n| document_status(&ledger, &registry, 1, &id(n)).expect("read").expect("there");
        let stages: Vec<Stage> = (1..=DOCUMENTS).map(|n| status(n).status).collect();
        let expected = [
            Stage::Live,
            Stage::Refused,
            Stage::Learned,
            Stage::SetAside,
            Stage::Probe,
            Stage::Waiting,
            Stage::Accepted,
        ];
        assert_eq!(stages, expected);
        assert_eq!(status(1).generation, Some(generation(1, 0, 2).id));
        assert_eq!((status(1).held_out, status(5).held_out), (1, 2));
        assert_eq!(status(2).reason.as_deref(), Some("too short"));
        assert_eq!(status(4).reason.as_deref(), Some("it breaks the learner"));
        ledger.withdraw(None, 2, 3).expect("withdrawn");
        assert_eq!(status(3).reason.as_deref(), Some("rolled back"));
        assert_eq!(document_status(&ledger, &registry, 1, &id(99)), Ok(None));
    }
}
