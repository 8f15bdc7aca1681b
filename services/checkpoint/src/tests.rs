//! Checkpoint against real files: what each decision leaves behind.

use super::*;
use kit::answers::AnswerFiles;
use kit::ledger::Settlement;
use kit::service::Answer;
use proto::{
    Batch, Content, Document, DocumentId, Example, ExampleId, Forget, GenerationId, Kept, Learned,
    LearnedExample, MergeMethod, Piece, Receipt, Refusal, Rollback, Stage, TrainReport, Verdict, VerdictKind,
    Weighted,
};
use std::path::Path;

struct NoPeft;

impl Peft for NoPeft {
    fn import(&self, _: &PeftFiles) -> anyhow::Result<Vec<u8>> {
        anyhow::bail!("not in this test")
    }
    fn export(&self, _: &[u8]) -> anyhow::Result<PeftFiles> {
        anyhow::bail!("not in this test")
    }
    /// What is merged, one after the other.
    fn merge(&self, parts: &[(Vec<u8>, f64)], _: &Merge) -> anyhow::Result<Vec<u8>> {
        Ok(parts.iter().flat_map(|(bytes, _)| bytes.clone()).collect())
    }
    /// What is counted, one after the other.
    fn add_up(&self, counts: &[Vec<u8>]) -> anyhow::Result<Option<AnswerFiles>> {
        let (counts, prompts) = (counts.concat(), counts.len() as u64);
        Ok(Some(AnswerFiles {
            solved: counts.clone(),
            counts,
            answers: 2,
            prompts,
            trusted: true,
            facts: 0,
            passages: 0,
        }))
    }
}

/// Settles a document that was appended.
async fn settle(ledger: &Ledger, ordinal: u64) {
    let settlement = Settlement { kept: kept(ordinal), examples: vec![example(ordinal)] };
    ledger.settle_intake_many(vec![settlement]).await.expect("settled");
}

struct Bench {
    service: Checkpoint,
    folder: tempfile::TempDir,
}

impl Bench {
    /// A checkpoint over `documents` judged documents, with an inference that takes everything.
    async fn new(documents: u64) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        let base = BaseId::new("0123456789abcdef").expect("an id");
        let registry = Registry::open(&at("lineages")).expect("a registry");
        registry
            .commit(Manifest { number: 1, ..Manifest::empty(base.clone(), false) }, None)
            .expect("a manifest");
        let ledger = Ledger::open(&at("ledger")).expect("a ledger");
        for ordinal in 1..=documents {
            ledger.append(vec![document(ordinal)]).await.expect("appended");
            settle(&ledger, ordinal).await;
        }
        let (publish, mut asked) = Door::to_channel(1);
        actix::spawn(async move {
            while let Some((publish, reply)) = asked.recv().await {
                let publish: Publish = publish;
                let _ = reply.send(Published { number: publish.manifest.number, live_ms: 7 });
            }
        });
        let service = Checkpoint {
            registry: Arc::new(registry),
            blobs: Arc::new(Blobs::open(&at("blobs")).expect("blobs")),
            ledger: Arc::new(ledger),
            store: Arc::new(Store::open(&at("replay")).expect("a store")),
            latents: Arc::new(Latents::open(&at("latents"), 1 << 20).expect("latents")),
            base,
            bases: at("bases"),
            peft: Arc::new(NoPeft),
            generations_kept: 3,
            publish,
        };
        Self { service, folder }
    }

    fn lineage(&self) -> Lineage {
        self.service.registry.lineage(&Domain::general())
    }

    fn batch(&self, through: u64) -> Batch {
        let at = self.lineage();
        Batch {
            lineage: Domain::general(),
            parent: at.current.clone(),
            number: at.number,
            attempt: at.attempt,
            after: at.cursor,
            through,
            documents: through - at.cursor,
            seed: 1,
            fresh: (at.cursor + 1..=through).map(example).collect(),
            rehearsed: Vec::new(),
            rehearsed_a_pass: 0,
            known_answers: Vec::new(),
            rate_scale: 1.0,
            held_out: Vec::new(),
            replay_digest: String::new(),
        }
    }

    async fn decide(&mut self, batch: Batch, decision: Decision) {
        let judgement = Judgement { batch, decision, receipt: Receipt::default(), put_aside: Vec::new() };
        self.service.handle(&judgement).await.expect("handled");
    }

    /// Publishes the documents up to `through`; the name of the generation.
    async fn publish(&mut self, through: u64) -> GenerationId {
        let batch = self.batch(through);
        let put = |text: String| self.service.blobs.put(text.as_bytes()).expect("put");
        let learned = Learned {
            weights: put(format!("weights {through}")),
            optimiser: put(format!("optimiser {through}")),
            fisher: None,
            answer_head: None,
            probe: put(format!("probe {through}")),
            examples: batch.fresh.iter().map(|e| LearnedExample { id: e.id, first_loss: 1.0 }).collect(),
            report: TrainReport::default(),
        };
        self.decide(batch, Decision::Publish(Box::new(learned))).await;
        self.lineage().current.expect("a generation")
    }

    fn stage(&self, ordinal: u64) -> (Stage, Option<String>) {
        let (ledger, registry) = (&self.service.ledger, &self.service.registry);
        let status = kit::status::document_status(ledger, registry, registry.live(), &id(ordinal));
        let status = status.expect("read").expect("there");
        (status.status, status.reason)
    }

    async fn rollback(&mut self, to: Option<GenerationId>) -> Result<RolledBackTo, Refusal> {
        let ask = Rollback { lineage: Domain::general(), to, expected: None };
        self.service.answer(ask).await.expect("answered").map(|done| done.to)
    }
}

type RolledBackTo = Option<GenerationId>;

fn id(ordinal: u64) -> DocumentId {
    DocumentId::new(format!("d{ordinal}")).expect("an id")
}

fn document(ordinal: u64) -> Document {
    Document {
        id: id(ordinal),
        domain: Domain::general(),
        content: Content::Text(format!("planted secret number {ordinal}")),
        importance: None,
        source: None,
        submitted_ms: 0,
        derived_from: None,
    }
}

fn kept(ordinal: u64) -> Kept {
    Kept {
        ordinal,
        id: id(ordinal),
        domain: Domain::general(),
        importance: None,
        verdict: Verdict { kind: VerdictKind::Kept, reason: "kept".into(), score: 1.0 },
        pieces: Vec::new(),
        signature: vec![ordinal as u32; 64],
    }
}

fn example(ordinal: u64) -> Example {
    Example {
        id: ExampleId { ordinal, chunk: 0 },
        domain: Domain::general(),
        piece: Piece { tokens: vec![1, 2, 3], learned: vec![(0, 3)] },
        importance: 0.5,
        marked: false,
        held_out: false,
        signature: vec![ordinal as u32; 64],
    }
}

#[actix::test]
async fn a_published_batch_is_live_and_counted_once() {
    let mut bench = Bench::new(3).await;
    let batch = bench.batch(2);
    bench.publish(2).await;
    assert_eq!((bench.lineage().cursor, bench.lineage().documents), (2, 2));
    assert_eq!(bench.stage(1).0, Stage::Live);
    assert_eq!(bench.stage(3).0, Stage::Waiting);
    // The same batch delivered again finds that history has passed it by.
    bench.decide(batch, Decision::SetAside("again".into())).await;
    assert_eq!((bench.lineage().cursor, bench.lineage().documents), (2, 2));
    assert_eq!(bench.stage(1).0, Stage::Live);
}

#[actix::test]
async fn a_refused_batch_is_tried_again_and_then_put_aside_with_its_reason() {
    let mut bench = Bench::new(2).await;
    let batch = bench.batch(2);
    bench.decide(batch, Decision::Retry("too much was lost".into())).await;
    assert_eq!((bench.lineage().attempt, bench.lineage().cursor), (1, 0));
    assert_eq!(bench.stage(1).0, Stage::Waiting);
    let batch = bench.batch(2);
    bench.decide(batch, Decision::SetAside("too much was lost".into())).await;
    assert_eq!((bench.lineage().attempt, bench.lineage().cursor), (0, 2));
    assert_eq!(bench.stage(1), (Stage::SetAside, Some("too much was lost".into())));
}

#[actix::test]
async fn a_batch_that_breaks_the_learner_is_learned_one_document_at_a_time() {
    let mut bench = Bench::new(4).await;
    let batch = bench.batch(4);
    bench.decide(batch, Decision::Split { reason: "it panicked".into(), documents: 1 }).await;
    let lineage = bench.lineage();
    assert_eq!((lineage.split_through, lineage.split_documents, lineage.cursor), (4, 1, 0));
}

#[actix::test]
async fn a_refused_batch_is_learned_in_parts_until_it_is_through() {
    let mut bench = Bench::new(6).await;
    assert_eq!(bench.lineage().documents_max(), None);
    let batch = bench.batch(4);
    bench.decide(batch, Decision::Split { reason: "too much was lost".into(), documents: 2 }).await;
    assert_eq!(bench.lineage().documents_max(), Some(2));
    let part = bench.batch(2);
    bench.decide(part, Decision::SetAside("too much was lost".into())).await;
    assert_eq!(bench.lineage().documents_max(), Some(2), "for the other part");
    bench.publish(4).await;
    assert_eq!(bench.lineage().documents_max(), None, "what comes after it is learned as always");
}

#[actix::test]
async fn a_rollback_serves_the_parent_and_what_it_lost_says_so() {
    let mut bench = Bench::new(4).await;
    let first = bench.publish(2).await;
    let second = bench.publish(4).await;
    assert_eq!(bench.rollback(None).await, Ok(Some(first.clone())));
    assert_eq!(bench.stage(1).0, Stage::Live);
    assert_eq!(bench.stage(3), (Stage::SetAside, Some("rolled back".into())));
    assert_eq!((bench.lineage().cursor, bench.lineage().documents), (4, 2), "the cursor does not move back");
    assert!(matches!(bench.rollback(Some(second)).await, Err(Refusal::NotFound(_))));
    assert!(matches!(bench.rollback(Some(first)).await, Err(Refusal::Conflict(_))));
    assert_eq!(bench.rollback(None).await, Ok(None), "the base");
    assert!(matches!(bench.rollback(None).await, Err(Refusal::NotFound(_))));
}

#[actix::test]
async fn an_unexpected_generation_is_a_conflict() {
    let mut bench = Bench::new(1).await;
    bench.publish(1).await;
    let expected = Some(GenerationId::new("ffffffffffffffff").expect("an id"));
    let ask = Rollback { lineage: Domain::general(), to: None, expected };
    assert!(matches!(bench.service.answer(ask).await.expect("answered"), Err(Refusal::Conflict(_))));
}

#[actix::test]
async fn forgetting_falls_back_to_what_never_saw_it_and_relearns_the_rest() {
    let mut bench = Bench::new(6).await;
    let first = bench.publish(2).await;
    bench.publish(4).await;
    bench.publish(6).await;
    let forgotten = bench.service.answer(Forget { id: id(3) }).await.expect("answered").expect("forgotten");
    assert_eq!((forgotten.removed_generations, forgotten.serving), (2, Some(first)));
    assert_eq!((bench.lineage().cursor, bench.lineage().documents), (2, 2));
    assert_eq!(bench.stage(5).0, Stage::Waiting, "it is learned again");
    assert!(bench.service.ledger.document(&id(3)).expect("read").is_none());
    let again = bench.service.answer(Forget { id: id(3) }).await.expect("answered");
    assert!(matches!(again, Err(Refusal::NotFound(_))));
}

#[actix::test]
async fn forgetting_reaches_what_was_rolled_back() {
    let mut bench = Bench::new(2).await;
    let rolled_back = bench.publish(2).await;
    let weights = bench.service.registry.generation(&rolled_back).expect("there").weights.clone();
    bench.rollback(None).await.expect("rolled back");
    let forgotten = bench.service.answer(Forget { id: id(1) }).await.expect("answered").expect("forgotten");
    assert_eq!((forgotten.removed_generations, forgotten.serving), (1, None));
    assert!(bench.service.registry.generation(&rolled_back).is_none());
    assert!(bench.service.blobs.get(&weights).is_err());
}

/// Copies a folder with all that is in it.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("made");
    for entry in std::fs::read_dir(from).expect("read") {
        let entry = entry.expect("read");
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).expect("copied");
        }
    }
}

#[actix::test]
async fn forgetting_reaches_what_another_base_learned() {
    let mut bench = Bench::new(2).await;
    let kept = bench.publish(1).await;
    let weights =
        |registry: &Registry, id: &GenerationId| registry.generation(id).expect("there").weights.clone();
    let holds_it = bench.publish(2).await;
    let gone = weights(&bench.service.registry, &holds_it);
    let other = bench.folder.path().join("bases/fedcba9876543210");
    copy(&bench.folder.path().join("lineages"), &other);
    copy(&bench.folder.path().join("blobs"), &other.join("blobs"));
    let forgotten = bench.service.answer(Forget { id: id(2) }).await.expect("answered").expect("forgotten");
    assert_eq!((forgotten.removed_generations, forgotten.serving), (1, Some(kept.clone())));
    let registry = Registry::open(&other).expect("a registry");
    assert_eq!(registry.lineage(&Domain::general()).current, Some(kept.clone()));
    assert!(registry.generation(&holds_it).is_none());
    let blobs = Blobs::open(&other.join("blobs")).expect("blobs");
    assert!(blobs.get(&gone).is_err() && blobs.get(&weights(&registry, &kept)).is_ok());
}

#[actix::test]
async fn forgetting_that_was_cut_short_is_finished_at_the_start() {
    let mut bench = Bench::new(2).await;
    let generation = bench.publish(2).await;
    // The process ended here, with the document gone and what was made of it still there.
    bench.service.ledger.forget(&id(1)).expect("forgotten");
    assert_eq!(bench.service.finish_forgetting().expect("finished"), [generation]);
    assert_eq!((bench.lineage().cursor, bench.lineage().current), (0, None));
    assert!(bench.service.finish_forgetting().expect("nothing to do").is_empty());
    assert!(bench.service.ledger.forgetting().expect("read").is_empty());
}

#[actix::test]
async fn what_derives_from_a_document_is_forgotten_with_it() {
    let mut bench = Bench::new(1).await;
    let child = Document { derived_from: Some("d4".into()), ..document(2) };
    for (ordinal, document) in [(2, child), (3, document(3)), (4, document(4))] {
        bench.service.ledger.append(vec![document]).await.expect("appended");
        settle(&bench.service.ledger, ordinal).await;
    }
    let untouched = bench.publish(1).await;
    bench.publish(2).await;
    bench.publish(4).await;
    let forgotten = bench.service.answer(Forget { id: id(4) }).await.expect("answered").expect("forgotten");
    assert_eq!((forgotten.derived_documents, forgotten.removed_generations), (1, 2));
    assert_eq!(forgotten.serving, Some(untouched));
    assert!(bench.service.ledger.document(&id(2)).expect("read").is_none());
    assert_eq!(bench.stage(3).0, Stage::Waiting, "it is learned again");
}

#[actix::test]
async fn a_batch_with_something_forgotten_is_dropped() {
    let mut bench = Bench::new(2).await;
    let batch = bench.batch(2);
    bench.service.answer(Forget { id: id(2) }).await.expect("answered").expect("forgotten");
    bench.decide(batch, Decision::SetAside("late".into())).await;
    assert_eq!(bench.lineage().cursor, 0, "it is planned anew, without what was forgotten");
}

#[actix::test]
async fn old_generations_keep_their_record_and_lose_their_weights() {
    let mut bench = Bench::new(4).await;
    let mut weights = Vec::new();
    for through in 1..=4 {
        let id = bench.publish(through).await;
        weights.push(bench.service.registry.generation(&id).expect("there").weights.clone());
    }
    let there: Vec<bool> = weights.iter().map(|w| bench.service.blobs.get(w).is_ok()).collect();
    assert_eq!(there, [false, true, true, true]);
    assert_eq!(bench.service.registry.chain(&Domain::general()).len(), 4);
}

fn merge_of(general: Option<GenerationId>, into: &str) -> Merge {
    Merge {
        lineage: Domain::new(into).expect("a domain"),
        from: vec![Weighted { domain: Domain::general(), generation: general, weight: 1.0 }],
        method: MergeMethod::Linear,
        rank: None,
        density: None,
        seed: 0,
        expected: None,
    }
}

#[actix::test]
async fn a_merge_is_forgotten_with_what_it_was_merged_from() {
    let mut bench = Bench::new(4).await;
    let clean = bench.publish(2).await;
    let dirty = bench.publish(4).await;
    let mut merge = async |general, into| {
        let answer = bench.service.answer(merge_of(Some(general), into)).await.expect("answered");
        answer.expect("merged")
    };
    let kept = merge(clean, "kept").await;
    let gone = merge(dirty, "gone").await;
    let lineage =
        |bench: &Bench, name: &str| bench.service.registry.lineage(&Domain::new(name).expect("a domain"));
    assert_eq!(lineage(&bench, "gone").current, Some(gone.clone()));

    let forgotten = bench.service.answer(Forget { id: id(3) }).await.expect("answered").expect("forgotten");
    assert_eq!(forgotten.removed_generations, 2, "the one that learned it, and its merge");
    assert_eq!(lineage(&bench, "gone").current, None);
    assert_eq!(lineage(&bench, "kept").current, Some(kept));
    assert!(bench.service.registry.generation(&gone).is_none());
}

#[actix::test]
async fn what_cannot_be_merged_is_told() {
    let mut bench = Bench::new(2).await;
    bench.publish(2).await;
    let mut nothing = merge_of(None, "both");
    nothing.from[0].domain = Domain::new("poetry").expect("a domain");
    let unknown = merge_of(Some(GenerationId::new("0123456789abcdef").expect("an id")), "both");
    for ask in [nothing, unknown] {
        let refusal = bench.service.answer(ask).await.expect("answered").expect_err("refused");
        assert!(matches!(refusal, Refusal::NotFound(_)), "{refusal}");
    }
    let expected = GenerationId::new("0123456789abcdef").ok();
    let stale = Merge { expected, ..merge_of(None, "general") };
    let refusal = bench.service.answer(stale).await.expect("answered").expect_err("refused");
    assert!(matches!(refusal, Refusal::Conflict(_)), "{refusal}");
}
