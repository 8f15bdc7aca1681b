use super::*;
use crate::counting::tests::counting;
use model::lora::LoraConfig;
use proto::{Batch, Blob, Domain, LearnedExample, TrainReport};

/// Judges candidates on nano.
fn worker() -> Worker {
    let (base, counting) = counting();
    let gating = Gating {
        tolerance: 0.02,
        anchor_tolerance: 2.0,
        memory_probe: 64,
        held_out_probe: 64,
        fisher_examples: 0,
        fisher_decay: 0.9,
        row_tokens: 256,
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
    }
}

/// An adapter that changes next to nothing, so that only what is counted makes a difference.
fn weights(worker: &Worker) -> Vec<u8> {
    let adapter = Adapter::new(LoraConfig::default(), worker.base.config(), 1).expect("an adapter");
    adapter.with_flat(adapter.flat() + 1e-6).expect("an adapter").to_bytes().expect("bytes")
}

/// Eight documents that give the same label to similar prompts.
fn labelled(worker: &Worker, from: u64, asked: &str, label: &str) -> Vec<Example> {
    let towns = ["rome", "paris", "berlin", "madrid", "oslo", "vienna", "lisbon", "warsaw"];
    let counting = worker.counting.as_ref().expect("counts");
    let example =
        |(n, town): (u64, &str)| counting.example(n, &format!("{asked} {town}"), &format!("\n{label}"));
    (from..).zip(towns).map(example).collect()
}

fn judge(worker: &Worker, fresh: Vec<Example>, held: Held) -> (Held, bool, Receipt) {
    let weights = weights(worker);
    let (verdict, receipt) = worker.judge(&candidate(fresh), &weights, held).expect("judged");
    match verdict {
        Verdict::Intact { probe, counting: Answers::Counted(counted), .. } => {
            let head = Some(counted.head.to_bytes().expect("bytes"));
            (Held { probe: Some(probe), counts: Some(counted.counts), head, fisher: None }, true, receipt)
        }
        Verdict::Intact { probe, counting: Answers::AsBefore | Answers::Off, .. } => {
            (Held { probe: Some(probe), ..Held::default() }, false, receipt)
        }
        Verdict::Harmed(reason) | Verdict::Useless(reason) => panic!("{reason}"),
    }
}

/// What the gate counted of the answers it remembers.
fn recited(receipt: &Receipt) -> Recited {
    let memory = receipt.probes.iter().find(|row| row.probe == "memory_answers").expect("measured");
    memory.measure.recited.expect("answers are counted")
}

/// A generation that knows two labels.
fn with_labels(worker: &Worker) -> Held {
    let flights = labelled(worker, 1, "book a flight to", "flight");
    let weather = labelled(worker, 11, "how is the weather in", "weather");
    let (held, counted, _) = judge(worker, [flights, weather].concat(), Held::default());
    assert!(counted);
    held
}

#[test]
fn labels_are_counted_and_said_from_then_on() {
    let worker = worker();
    let held = with_labels(&worker);
    let (held, counted, receipt) =
        judge(&worker, labelled(&worker, 21, "a recipe for a cake from", "recipe"), held);
    assert!(counted);
    let of = recited(&receipt);
    assert_eq!((of.best, of.after), (16, 16), "the adapter knows nothing, and the counts know all");
    let probe = Probe::from_bytes(held.probe.as_deref().expect("a probe")).expect("a probe");
    assert!(probe.memory.len() == 24 && probe.memory.iter().all(|entry| entry.said_best && entry.said_last));
}

#[test]
fn what_would_cost_known_answers_is_not_counted() {
    let worker = worker();
    let held = with_labels(&worker);
    // The same prompts with another label, twice as often.
    let [one, two] = [31, 41].map(|from| labelled(&worker, from, "book a flight to", "weather"));
    let (_, counted, receipt) = judge(&worker, [one, two].concat(), held);
    assert!(!counted);
    assert_eq!(recited(&receipt).after, 16, "what is served says them still");
}

#[test]
fn without_counting_what_was_counted_is_left_out() {
    let mut worker = worker();
    let held = with_labels(&worker);
    let more = labelled(&worker, 21, "a recipe for a cake from", "recipe");
    worker.counting = None;
    // The adapter says nothing of what the counts said, and is not held to it.
    let (verdict, receipt) = worker.judge(&candidate(more), &weights(&worker), held).expect("judged");
    assert_eq!((recited(&receipt).best, recited(&receipt).after), (0, 0));
    assert!(matches!(verdict, Verdict::Intact { counting: Answers::Off, .. }));
}

#[test]
fn texts_that_a_batch_does_not_rehearse_are_measured_by_themselves() {
    let worker = worker();
    let text = |n: u64| {
        let counting = worker.counting.as_ref().expect("counts");
        let mut example =
            counting.example(n, &format!("The lamp of pump {n} stays red until"), " it is drained.");
        example.piece.learned = vec![(0, example.piece.tokens.len() as u32)];
        example
    };
    let texts: Vec<Example> = (1..=40).map(text).collect();
    let (held, _, receipt) = judge(&worker, texts.clone(), Held::default());
    assert!(receipt.probes.iter().all(|row| row.probe != "rested_text"), "nothing is remembered yet");

    let beside = |rehearsed: &[Example], held: &Held| {
        let mut candidate = candidate(vec![text(41)]);
        candidate.batch.rehearsed = rehearsed.to_vec();
        let held = Held { probe: held.probe.clone(), ..Held::default() };
        worker.judge(&candidate, &weights(&worker), held).expect("judged")
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
