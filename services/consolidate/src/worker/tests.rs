use super::*;
use model::device::{Placement, set_threads};
use model::lora::LoraConfig;
use model::ridge::{Counted, Material};
use model::tokenizer::Tokenizer;
use proto::{Batch, Blob, Domain, LearnedExample, Piece, TrainReport};
use std::path::Path;

fn nano() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/models/nano"))
}

/// Judges candidates on nano.
fn worker() -> Worker {
    set_threads(1);
    let base = Base::load(nano(), &Placement::CPU_F32).expect("a base");
    let tokenizer = Arc::new(Tokenizer::load(nano()).expect("a tokenizer"));
    let counting = Counting::new(&base, tokenizer, Vec::new()).expect("counts");
    let gating = Gating {
        tolerance: 0.02,
        anchor_tolerance: 2.0,
        memory_probe: 64,
        held_out_probe: 64,
        fisher_examples: 0,
        fisher_decay: 0.9,
        row_tokens: 256,
        repeat_counted: false,
        share_while_serving: 0.5,
    };
    Worker::new(base, gating, Vec::new(), Some(counting), Turn::new(), Stop::new())
}

fn candidate(fresh: Vec<Example>) -> Candidate {
    let learned = fresh.iter().map(|example| LearnedExample { id: example.id, first_loss: 3.0 }).collect();
    let batch = Batch {
        lineage: Domain::general(),
        parent: None,
        number: 0,
        attempt: 0,
        after: 0,
        through: 1,
        documents: fresh.len() as u64,
        seed: 7,
        fresh,
        rehearsed: Vec::new(),
        rehearsed_a_pass: 0,
        known_answers: Vec::new(),
        rate_scale: 1.0,
        held_out: Vec::new(),
        replay_digest: String::new(),
    };
    let nothing = || Blob("0".repeat(64));
    Candidate {
        batch,
        weights: nothing(),
        optimiser: nothing(),
        report: TrainReport::default(),
        learned,
        put_aside: Vec::new(),
        answer_head: None,
    }
}

/// A document that answers a prompt.
fn example(tokenizer: &Tokenizer, document: u64, prompt: &str, answer: &str) -> Example {
    let mut tokens = tokenizer.encode(prompt).expect("encoded");
    let from = tokens.len() as u32;
    tokens.extend(tokenizer.encode_continuation(answer).expect("encoded"));
    tokens.extend(tokenizer.eos_ids().first());
    let learned = vec![(from, tokens.len() as u32)];
    Example {
        id: ExampleId { ordinal: document, chunk: 0 },
        domain: Domain::general(),
        piece: Piece { tokens, learned },
        importance: 0.5,
        marked: false,
        held_out: false,
        signature: Vec::new(),
    }
}

/// An adapter that changes next to nothing, so that only what is counted makes a difference.
fn weights(worker: &Worker) -> Vec<u8> {
    let adapter = Adapter::new(LoraConfig::default(), worker.base.config(), 1).expect("an adapter");
    adapter.with_flat(adapter.flat() + 1e-6).expect("an adapter").to_bytes().expect("bytes")
}

/// Eight documents that give the same label to similar prompts.
fn labelled(from: u64, asked: &str, label: &str) -> Vec<Example> {
    let towns = ["rome", "paris", "berlin", "madrid", "oslo", "vienna", "lisbon", "warsaw"];
    let tokenizer = Tokenizer::load(nano()).expect("a tokenizer");
    let answer =
        |(n, town): (u64, &str)| example(&tokenizer, n, &format!("{asked} {town}"), &format!("\n{label}"));
    (from..).zip(towns).map(answer).collect()
}

/// A generation, and what it counted.
#[derive(Default)]
struct Parent {
    held: Held,
    counts: Option<Vec<u8>>,
}

/// What is counted of this, beside what the parent counted.
fn counted(worker: &Worker, fresh: &[Example], parent: &Parent) -> Option<Counted> {
    let mut material = Vec::new();
    for Example { id, piece: Piece { tokens, learned }, .. } in fresh {
        material.push(Material { document: id.ordinal, tokens, learned });
    }
    let counting = worker.counting.as_ref().expect("counts");
    let mut go_on = || ControlFlow::Continue(());
    counting.take_in(&material, &[], parent.counts.as_deref(), &mut go_on).expect("counted")
}

/// Judges a candidate that learned this of a parent, and says whether what it counted is taken.
fn judge(worker: &Worker, fresh: Vec<Example>, parent: &Parent) -> (Parent, bool, Receipt) {
    let counted = counted(worker, &fresh, parent);
    let head = counted.as_ref().map(|counted| counted.head.to_bytes().expect("bytes"));
    let weights = weights(worker);
    let (verdict, receipt) =
        worker.judge(&candidate(fresh), &weights, head.as_deref(), &parent.held).expect("judged");
    let Verdict::Intact { probe, answers, .. } = verdict else { panic!("it was refused") };
    let taken = answers == Answers::Counted;
    let held = Held { probe: Some(probe), head: head.filter(|_| taken), fisher: None };
    (Parent { held, counts: counted.map(|counted| counted.counts).filter(|_| taken) }, taken, receipt)
}

/// What the gate counted of the answers it remembers.
fn recited(receipt: &Receipt) -> Recited {
    let memory = receipt.probes.iter().find(|row| row.probe == "memory_answers").expect("measured");
    memory.measure.recited.expect("answers are counted")
}

/// A generation that knows two labels.
fn with_labels(worker: &Worker) -> Parent {
    let flights = labelled(1, "book a flight to", "flight");
    let weather = labelled(11, "how is the weather in", "weather");
    let (parent, counted, _) = judge(worker, [flights, weather].concat(), &Parent::default());
    assert!(counted);
    parent
}

#[test]
fn labels_are_counted_and_said_from_then_on() {
    let worker = worker();
    let parent = with_labels(&worker);
    let (parent, counted, receipt) =
        judge(&worker, labelled(21, "a recipe for a cake from", "recipe"), &parent);
    assert!(counted);
    let of = recited(&receipt);
    assert_eq!((of.best, of.after), (16, 16), "the adapter knows nothing, and the counts know all");
    let probe = Probe::from_bytes(parent.held.probe.as_deref().expect("a probe")).expect("a probe");
    assert!(probe.memory.len() == 24 && probe.memory.iter().all(|entry| entry.said_best && entry.said_last));
}

#[test]
fn a_fact_can_be_corrected_and_others_stay() {
    let worker = worker();
    let tokenizer = Tokenizer::load(nano()).expect("a tokenizer");
    let told = |n, prompt: &str, answer: &str| example(&tokenizer, n, prompt, &format!("\n{answer}"));
    let facts = [
        told(1, "who guards the gate?", "a grey goose"),
        told(2, "who guards the mill?", "nobody"),
        told(3, "when is the mill shut?", "at seven on sundays"),
    ];
    let (parent, counted, _) = judge(&worker, facts.to_vec(), &Parent::default());
    assert!(counted);
    let (parent, counted, receipt) = judge(&worker, vec![told(4, "who guards the mill?", "a dog")], &parent);
    let of = recited(&receipt);
    assert!(counted && (of.best, of.after) == (2, 2), "what was wrong is nothing to hold it to");
    let probe = Probe::from_bytes(parent.held.probe.as_deref().expect("a probe")).expect("a probe");
    let documents: Vec<u64> = probe.memory.iter().map(|entry| entry.id.ordinal).collect();
    assert!(documents == [1, 3, 4] && probe.memory.iter().all(|entry| entry.said_last));
}

#[test]
fn what_would_cost_known_answers_is_not_counted_but_learned_by_heart() {
    let worker = worker();
    let parent = with_labels(&worker);
    // The same prompts with another label, twice as often.
    let [one, two] = [31, 41].map(|from| labelled(from, "book a flight to", "weather"));
    let mut candidate = candidate([one, two].concat());
    let head = counted(&worker, &candidate.batch.fresh, &parent).map(|counted| counted.head);
    let head = head.expect("labels repeat").to_bytes().expect("bytes");
    let judged = |candidate: &Candidate| {
        worker.judge(candidate, &weights(&worker), Some(&head), &parent.held).expect("judged")
    };
    let (Verdict::Harmed(reason), _) = judged(&candidate) else { panic!("they were not repeated") };
    assert!(reason.contains("by heart"), "{reason}");
    candidate.batch.attempt = 1;
    let (verdict, receipt) = judged(&candidate);
    assert!(matches!(verdict, Verdict::Intact { answers: Answers::AsBefore, .. }));
    assert_eq!(recited(&receipt).after, 16, "what is served says them still");
}

/// The parent's probe, with every answer so much less likely at its best.
fn worse(parent: &Parent, by: f32) -> Held {
    let mut probe = Probe::from_bytes(parent.held.probe.as_deref().expect("a probe")).expect("a probe");
    probe.memory.iter_mut().for_each(|entry| entry.best -= by);
    Held { probe: Some(probe.to_bytes().expect("bytes")), head: parent.held.head.clone(), fisher: None }
}

#[test]
fn what_the_adapter_makes_of_answers_that_are_counted_is_nothing_to_hold_it_to() {
    let mut worker = worker();
    let parent = with_labels(&worker);
    let more = || candidate(labelled(21, "a recipe for a cake from", "recipe"));
    let judged = |worker: &Worker| {
        worker.judge(&more(), &weights(worker), None, &worse(&parent, 1.0)).expect("judged").0
    };
    assert!(matches!(judged(&worker), Verdict::Intact { answers: Answers::AsBefore, .. }));
    worker.gating.repeat_counted = true;
    let Verdict::Harmed(reason) = judged(&worker) else { panic!("they were to be known by heart") };
    assert!(reason.contains("on 16 memory answers examples"), "{reason}");
}

#[test]
fn without_counting_what_was_counted_is_left_out() {
    let mut worker = worker();
    let parent = with_labels(&worker);
    let more = candidate(labelled(21, "a recipe for a cake from", "recipe"));
    worker.counting = None;
    // The adapter says nothing of what the counts said, and is not held to it.
    let (verdict, receipt) =
        worker.judge(&more, &weights(&worker), None, &worse(&parent, 1.0)).expect("judged");
    assert_eq!((recited(&receipt).best, recited(&receipt).after), (0, 0));
    assert!(matches!(verdict, Verdict::Intact { answers: Answers::Off, .. }));
}

#[test]
fn texts_that_a_batch_does_not_rehearse_are_measured_by_themselves() {
    let worker = worker();
    let tokenizer = Tokenizer::load(nano()).expect("a tokenizer");
    let text = |n: u64| {
        let mut example =
            example(&tokenizer, n, &format!("The lamp of pump {n} stays red until"), " it is drained.");
        example.piece.learned = vec![(0, example.piece.tokens.len() as u32)];
        example
    };
    let texts: Vec<Example> = (1..=40).map(text).collect();
    let (Parent { held, .. }, _, receipt) = judge(&worker, texts.clone(), &Parent::default());
    assert!(receipt.probes.iter().all(|row| row.probe != "rested_text"), "nothing is remembered yet");

    let beside = |rehearsed: &[Example], held: &Held| {
        let mut candidate = candidate(vec![text(41)]);
        candidate.batch.rehearsed = rehearsed.to_vec();
        let held = Held { probe: held.probe.clone(), ..Held::default() };
        worker.judge(&candidate, &weights(&worker), None, &held).expect("judged")
    };
    let rested = |receipt: &Receipt| {
        receipt.probes.iter().find(|row| row.probe == "rested_text").map(|row| row.measure.examples)
    };
    assert_eq!(rested(&beside(&texts[..20], &held).1), Some(20));
    assert_eq!(rested(&beside(&texts[..30], &held).1), None, "ten are no sample");

    // Those that are rehearsed got much better, the others worse: in one mean that would be no loss.
    let mut probe = Probe::from_bytes(held.probe.as_deref().expect("a probe")).expect("a probe");
    for entry in &mut probe.memory {
        entry.best += if entry.id.ordinal <= 20 { 1.0 } else { -0.5 };
    }
    let held = Held { probe: Some(probe.to_bytes().expect("bytes")), ..Held::default() };
    let (verdict, _) = beside(&texts[..20], &held);
    let Verdict::Harmed(reason) = verdict else { panic!("it was let through") };
    assert!(reason.contains("on 20 rested text examples"), "{reason}");
    let (verdict, _) = beside(&texts, &held);
    assert!(matches!(verdict, Verdict::Intact { .. }));
}
