use super::*;
use kit::answers::AnswerFiles;
use kit::compute::time_on_processor;
use kit::latents::Latents;
use model::device::{Placement, Precision};
use model::hf::ModelConfig;
use model::tokenizer::Tokenizer;
use proto::{Domain, Example};
use std::path::Path;

const SHAPE: &str = r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 64,
    "tie_word_embeddings": true}"#;

fn example(ordinal: u64) -> Example {
    Example {
        id: ExampleId { ordinal, chunk: 0 },
        domain: Domain::general(),
        piece: proto::Piece {
            tokens: (0..16).map(|t| (t * 7 + ordinal as u32 * 3) % 64).collect(),
            learned: vec![(0, 16)],
        },
        importance: 0.5,
        marked: false,
        held_out: false,
        signature: Vec::new(),
    }
}

/// An example whose last token answers what is before it.
fn told(ordinal: u64, answer: u32) -> Example {
    let mut example = example(ordinal);
    (example.piece.tokens[15], example.piece.learned) = (answer, vec![(15, 16)]);
    example
}

fn worker(precision: Precision, alpha: f64) -> Worker {
    let placement = Placement { precision, ..Placement::CPU_F32 };
    let shape = ModelConfig::from_json(SHAPE).expect("a shape");
    let course = Course {
        passes: 1,
        answer_passes_max: 1,
        loss_target: 0.05,
        steps_min: 1,
        step_tokens: 4096,
        anchor_share: 0.0,
        answer_rate: 1.0,
        review_passes: 0,
    };
    let training = Training {
        lora: LoraConfig { alpha, ..LoraConfig::default() },
        learner: LearnerConfig::default(),
        rate: 1e-9,
        course,
        micro_tokens: 64,
        ewc_lambda: 0.0,
        olora: None,
        former: FormerShares::default(),
        repeat_counted: false,
        share_while_serving: 1.0,
    };
    let base = Base::random(&shape, 1, &placement).expect("a base");
    let folder = tempfile::tempdir().expect("a folder");
    let latents = Arc::new(Latents::open(folder.path(), 0).expect("latents"));
    let recall = Recall::new(latents, "base".into(), &[]);
    Worker::new(base, training, Vec::new(), recall, None, Turn::new(), Stop::new())
}

fn batch() -> Batch {
    Batch {
        lineage: Domain::general(),
        parent: None,
        number: 0,
        attempt: 0,
        after: 0,
        through: 8,
        documents: 8,
        seed: 1,
        fresh: (1..=8).map(example).collect(),
        rehearsed: Vec::new(),
        rehearsed_a_pass: 0,
        known_answers: Vec::new(),
        rate_scale: 1.0,
        held_out: Vec::new(),
        replay_digest: String::new(),
    }
}

fn learned(worker: &mut Worker) -> Outgoing {
    match worker.learn(&batch(), None).expect("learned") {
        End::Learned(learned) => *learned,
        End::Diverged(_) | End::Stopped => panic!("not learned"),
    }
}

#[test]
fn steps_that_overflow_in_f16_are_counted_and_taken_again() {
    // B is zero at first, so that only the gradient is large.
    let report = learned(&mut worker(Precision::F16, 4e6)).report;
    assert!(report.skipped_steps > 0 && report.steps == 1, "{report:?}");
    assert_eq!(learned(&mut worker(Precision::F32, 4e6)).report.skipped_steps, 0);
}

#[test]
fn learning_rests_between_steps_of_one_micro_batch_too_while_requests_run() {
    let mut worker = worker(Precision::F32, 32.0);
    (worker.training.share_while_serving, worker.training.course.step_tokens) = (0.02, 16);
    let _running = worker.turn.enter();
    let (started, had) = (Instant::now(), time_on_processor());
    let steps = learned(&mut worker).report.steps;
    assert!(steps >= 8, "each example is a step: {steps}");
    // It works a fiftieth of the time, but for the last step and for what is no step: some 4 were found where it never rests,
    // since others work for the thread meanwhile. That it may be kept from the processor only adds to it.
    let times = started.elapsed().as_secs_f64() / (time_on_processor() - had).as_secs_f64();
    assert!(times > 10.0, "{times}");
}

#[test]
fn a_text_that_was_read_is_not_learned_by_heart_while_answers_are_learned() {
    let answer = |ordinal| {
        let mut example = example(ordinal);
        example.piece.learned = vec![(12, 16)];
        example
    };
    let fresh: Vec<Example> = (1..=4).map(example).chain((5..=8).map(answer)).collect();
    let loss_of_texts = |rehearsed: f64| {
        let mut worker = worker(Precision::F32, 32.0);
        let course = &mut worker.training.course;
        (course.passes, course.answer_passes_max, course.loss_target) = (4, 30, 0.0);
        (worker.training.rate, worker.training.former.rehearsed) = (1e-2, rehearsed);
        let batch = Batch { fresh: fresh.clone(), rehearsed_a_pass: 8, ..batch() };
        let End::Learned(learned) = worker.learn(&batch, None).expect("learned") else { panic!("no") };
        let adapter = Adapter::from_bytes(&learned.weights, worker.base.config()).expect("weights");
        let texts: Vec<Sequence> = fresh[..4].iter().map(sequence).collect();
        let scores = model::loss::score(&worker.base, &[(&adapter, 1.0)], &texts, 64).expect("scores");
        scores.iter().map(|score| score.mean()).sum::<f64>() / 4.0
    };
    let (by_heart, kept) = (loss_of_texts(0.0), loss_of_texts(1.0));
    assert!(kept > by_heart + 0.2, "{kept} and {by_heart}");
}

#[test]
fn new_answers_do_not_make_those_less_likely_that_are_known() {
    let new = |ordinal| {
        let mut example = example(ordinal);
        example.piece.learned = vec![(15, 16)];
        example
    };
    let fresh: Vec<Example> = (1..=8).map(new).collect();
    let taken: BTreeSet<u32> = fresh.iter().map(|example| example.piece.tokens[15]).collect();
    let known = (0..).find(|token| !taken.contains(token)).expect("a token");
    let loss_of_known = |known_answers: Vec<u32>| {
        let mut worker = worker(Precision::F32, 32.0);
        (worker.training.course.passes, worker.training.rate) = (50, 2e-2);
        let batch = Batch { fresh: fresh.clone(), known_answers, ..batch() };
        let End::Learned(learned) = worker.learn(&batch, None).expect("learned") else { panic!("no") };
        let adapter = Adapter::from_bytes(&learned.weights, worker.base.config()).expect("weights");
        let mut asked = sequence(&fresh[0]);
        asked.tokens[15] = known;
        model::loss::score(&worker.base, &[(&adapter, 1.0)], &[asked], 64).expect("scores")[0].mean()
    };
    let (pushed, spared) = (loss_of_known(Vec::new()), loss_of_known(vec![known]));
    // The random base's head is so flat that no token can be far from likely or unlikely.
    assert!(spared + 0.005 < pushed, "{spared} and {pushed}");
}

#[test]
fn a_batch_ends_with_reviews_where_passes_have_few_of_each_old_answer() {
    let taken = |rehearsed: Vec<Example>| {
        let mut worker = worker(Precision::F32, 32.0);
        worker.training.course.review_passes = 3;
        let fresh = (1..=8).map(|n| told(n, 60)).collect();
        let rehearsed_a_pass = rehearsed.len() as u32;
        let batch = Batch { fresh, rehearsed, rehearsed_a_pass, ..batch() };
        let End::Learned(learned) = worker.learn(&batch, None).expect("learned") else { panic!("no") };
        (learned.report.steps, learned.report.tokens)
    };
    let old = |count: u64| (21..21 + count).map(|n| told(n, 61)).collect::<Vec<_>>();
    // Sequences of 16 tokens: a pass by heart has four in a step, a review all.
    assert_eq!(taken(old(2)), (3 + 3, 16 * (10 + 3 * 4)), "two old and two new ones, three times");
    assert_eq!(taken(old(8)), (4, 16 * 16), "as many old ones as new ones");
    assert_eq!(taken(Vec::new()), (2, 16 * 8));
    assert_eq!(taken([old(2), vec![example(31)]].concat()), (3, 16 * 11), "with a text there is no review");
}

#[test]
fn a_review_spares_old_answers_that_nothing_rehearses() {
    let loss_of = |asked: u32, known_answers: Vec<u32>| {
        let mut worker = worker(Precision::F32, 32.0);
        let course = &mut worker.training.course;
        (course.passes, course.review_passes, worker.training.rate) = (1, 60, 2e-2);
        let fresh = (1..=8).map(|n| told(n, 60)).collect();
        let rehearsed = vec![told(21, 61)];
        let batch = Batch { fresh, rehearsed, rehearsed_a_pass: 1, known_answers, ..batch() };
        let End::Learned(learned) = worker.learn(&batch, None).expect("learned") else { panic!("no") };
        let adapter = Adapter::from_bytes(&learned.weights, worker.base.config()).expect("weights");
        let asked = sequence(&told(1, asked));
        model::loss::score(&worker.base, &[(&adapter, 1.0)], &[asked], 64).expect("scores")[0].mean()
    };
    // 62 is told by no example; 61 by one that is rehearsed.
    let (pushed, spared) = (loss_of(62, vec![61]), loss_of(62, vec![61, 62]));
    assert!(spared + 0.003 < pushed, "{spared} and {pushed}");
}

#[test]
fn answers_that_a_batch_has_cost_are_learned_again() {
    let answers = |ordinals: std::ops::RangeInclusive<u64>| -> Vec<Example> {
        ordinals.map(|n| told(n, (n * 11 % 60) as u32)).collect()
    };
    let (old, new) = (answers(1..=8), answers(21..=22));
    let learned = |fresh: &[Example], parent: Option<Vec<u8>>, rehearsed: &[Example]| {
        let mut worker = worker(Precision::F32, 32.0);
        let (passes, rate) = if parent.is_none() { (60, 2e-2) } else { (4, 7.5e-3) };
        (worker.training.course.passes, worker.training.rate) = (passes, rate);
        worker.training.course.answer_rate = if parent.is_none() { 1.0 } else { 3.0 };
        let (fresh, rehearsed) = (fresh.to_vec(), rehearsed.to_vec());
        let start = parent.map(|weights| Start { weights, optimiser: None, fisher: None, counts: None });
        let parent = start.as_ref().map(|_| proto::GenerationId::new("0123456789abcdef").expect("an id"));
        let batch = Batch { parent, fresh, rehearsed, ..batch() };
        let End::Learned(learned) = worker.learn(&batch, start).expect("learned") else { panic!("no") };
        let adapter = Adapter::from_bytes(&learned.weights, worker.base.config()).expect("weights");
        let asked: Vec<Sequence> = old.iter().map(sequence).collect();
        let recited = model::loss::recite(&worker.base, &[(&adapter, 1.0)], &asked, 64).expect("recited");
        (learned.weights, recited.iter().filter(|(_, said)| *said).count())
    };
    let (parent, said) = learned(&old, None, &[]);
    let (_, lost) = learned(&new, Some(parent.clone()), &[]);
    // No pass rehearses them: only what was lost is learned again.
    let (_, mended) = learned(&new, Some(parent), &old);
    assert!(said == 8 && lost < 7 && mended == 8, "{said}, {lost} and {mended}");
}

#[test]
fn what_the_base_makes_of_examples_is_kept_from_batch_to_batch() {
    let folder = tempfile::tempdir().expect("a folder");
    let latents = Arc::new(Latents::open(folder.path(), 1 << 20).expect("latents"));
    let anchor = Sequence::whole((20..40).collect());
    let mut weights = Vec::new();
    for keeps in [false, true, true] {
        let mut worker = worker(Precision::F32, 32.0);
        worker.training.rate = 1e-2;
        worker.training.course.anchor_share = 1.0;
        worker.training.lora = LoraConfig::default().in_top_layers(1, worker.base.config()).expect("layers");
        worker.anchors = vec![anchor.clone()];
        if keeps {
            worker.recall = Recall::new(Arc::clone(&latents), "base".into(), &worker.anchors);
        }
        weights.push(learned(&mut worker).weights);
        let kept = |n: u64| latents.get(ExampleId { ordinal: n, chunk: 0 }, &hash(n));
        assert_eq!((0..10).filter(|&n| kept(n).is_some()).count(), if keeps { 8 } else { 0 });
    }
    let shape = worker(Precision::F32, 32.0).base.config().clone();
    let flat = |n: usize| Adapter::from_bytes(&weights[n], &shape).expect("weights").flat().shallow_clone();
    for n in [1, 2] {
        let distance = (flat(0) - flat(n)).abs().max().double_value(&[]);
        assert!(distance < 1e-4, "{distance}");
    }

    fn hash(n: u64) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"base").update(&1u64.to_le_bytes());
        for token in example(n).piece.tokens {
            hasher.update(&token.to_le_bytes());
        }
        hasher.finalize().into()
    }
}

#[test]
fn a_batch_in_smaller_micro_batches_is_learned_whole_and_once() {
    let mut worker = worker(Precision::F32, 32.0);
    let whole = learned(&mut worker);
    worker.micro_tokens.set(16);
    let split = learned(&mut worker);
    assert_eq!((whole.report.steps, whole.report.tokens), (split.report.steps, split.report.tokens));
    assert_eq!(split.examples.len(), 8);
    assert!((whole.report.first_loss - split.report.first_loss).abs() < 1e-4);
}

/// Learns on nano what is told it, with answers that repeat counted.
fn on_nano(told: &[(&str, &str)]) -> (Worker, Vec<Example>) {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/models/nano"));
    let tokenizer = Arc::new(Tokenizer::load(dir).expect("a tokenizer"));
    let told_to = |(n, (prompt, answer)): (u64, &(&str, &str))| {
        let mut tokens = tokenizer.encode(prompt).expect("encoded");
        let from = tokens.len() as u32;
        tokens.extend(tokenizer.encode_continuation(&format!("\n{answer}")).expect("encoded"));
        tokens.extend(tokenizer.eos_ids().first());
        let learned = vec![(from, tokens.len() as u32)];
        Example { piece: proto::Piece { tokens, learned }, ..example(n) }
    };
    let examples = (1..).zip(told).map(told_to).collect();
    let mut worker = worker(Precision::F32, 32.0);
    worker.base = Base::load(dir, &Placement::CPU_F32).expect("a base");
    worker.counting = Some(Counting::new(&worker.base, tokenizer, Vec::new()).expect("counts"));
    (worker, examples)
}

const LABELLED: [(&str, &str); 12] = [
    ("book me a flight to rome", "flight"),
    ("i need a plane to paris", "flight"),
    ("find flights to berlin", "flight"),
    ("get me a plane ticket to oslo", "flight"),
    ("i want to fly to madrid", "flight"),
    ("reserve a seat on a flight to vienna", "flight"),
    ("how do i bake bread", "recipe"),
    ("a recipe for apple cake", "recipe"),
    ("what goes into onion soup", "recipe"),
    ("how do i cook rice", "recipe"),
    ("tell me how to make pancakes", "recipe"),
    ("what do i need for a lasagna", "recipe"),
];

fn passes(worker: &mut Worker, fresh: &[Example]) -> (u32, Option<AnswerFiles>) {
    let batch = Batch { fresh: fresh.to_vec(), ..batch() };
    let End::Learned(learned) = worker.learn(&batch, None).expect("learned") else { panic!("no") };
    assert_eq!(learned.examples.len(), fresh.len(), "all of it is learned");
    (learned.report.passes, learned.answers)
}

#[test]
fn what_is_counted_is_not_repeated_until_it_is_known_by_heart() {
    let facts = [("who guards the gate?", "a grey goose"), ("when is the mill shut?", "at seven on sundays")];
    let (mut worker, all) = on_nano(&[&LABELLED[..], &facts].concat());
    let labels = &all[..LABELLED.len()];
    (worker.training.course.passes, worker.training.course.answer_passes_max) = (2, 4);
    let (counted, answers) = passes(&mut worker, labels);
    let answers = answers.expect("labels repeat");
    assert_eq!((counted, answers.answers, answers.prompts, answers.trusted), (1, 2, 12, true));
    let (remembered, answers_of_all) = passes(&mut worker, &all);
    assert_eq!((remembered, answers_of_all.map(|answers| answers.facts)), (1, Some(2)));
    let again = Batch { fresh: labels.to_vec(), attempt: 1, ..batch() };
    let End::Learned(again) = worker.learn(&again, None).expect("learned") else { panic!("no") };
    assert_eq!(again.report.passes, 4, "once it was refused, what it counted may not be taken");
    worker.training.repeat_counted = true;
    let (by_heart, same) = passes(&mut worker, labels);
    assert_eq!((by_heart, same.map(|same| same.counts == answers.counts)), (4, Some(true)));
    (worker.training.repeat_counted, worker.counting) = (false, None);
    let (without, answers) = passes(&mut worker, labels);
    assert!(without == 4 && answers.is_none());
}

#[test]
fn what_breaks_training_is_not_counted() {
    let (worker, all) = on_nano(&LABELLED);
    let batch = Batch { fresh: all.clone(), ..batch() };
    let prompts = |gone: &[Example]| {
        let gone = gone.iter().map(|example| example.id).collect();
        worker.count(&batch, None, &gone).expect("counted").map(|counted| counted.prompts)
    };
    assert_eq!((prompts(&[]), prompts(&all[..2]), prompts(&all)), (Some(12), Some(10), None));
}

#[test]
fn of_many_that_are_counted_some_are_read_and_all_are_learned() {
    let words =
        ["grey", "tall", "quiet", "lost", "early", "iron", "north", "old", "red", "small", "warm", "wide"];
    let told: Vec<(String, String)> = (0..144)
        .map(|n| (words[n / 12], words[n % 12], n))
        .map(|(a, b, n)| (format!("what is kept in the {a} {b} house?"), format!("barrel number {n}")))
        .collect();
    let told: Vec<(&str, &str)> = told.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    let (mut worker, all) = on_nano(&told);
    (worker.training.course.passes, worker.training.course.answer_passes_max) = (1, 4);
    let (rehearsed, fresh) = all.split_at(8);
    let batch =
        Batch { fresh: fresh.to_vec(), rehearsed: rehearsed.to_vec(), rehearsed_a_pass: 8, ..batch() };
    let End::Learned(learned) = worker.learn(&batch, None).expect("learned") else { panic!("no") };
    let Outgoing { report, examples, answers, .. } = *learned;
    assert_eq!((report.passes, report.counted, examples.len()), (1, 136, 136));
    assert_eq!(answers.expect("remembered").facts, 144, "those that were learned before are counted, too");
    let unread = examples.iter().filter(|example| example.first_loss == 0.0).count();
    assert_eq!(unread, 136 - run::COUNTED_READ);
    let tokens = |examples: &[Example]| examples.iter().map(|e| e.piece.tokens.len() as u64).sum::<u64>();
    assert!(report.tokens < tokens(fresh) + tokens(rehearsed), "{}", report.tokens);
}
