use super::*;
use crate::*;
use proptest::prelude::*;
use std::fmt::Debug;
use std::fs;
use std::path::Path;

/// Set to write the golden files anew, after a change of a message that is meant.
const REGENERATE: &str = "ENGRAM_REGENERATE_GOLDEN";

const LIMIT: usize = PAYLOAD_BYTES_MAX;

/// Compares a message's frame with the one that was written when it was agreed on.
fn golden<M: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, kind: Kind, message: &M) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("{name}.bin"));
    let frame = encode(kind, message).expect("encoded");
    if std::env::var_os(REGENERATE).is_some() {
        fs::write(&path, &frame).expect("written");
    }
    let agreed = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(frame, agreed, "{name} has changed on the wire; if that is meant, set {REGENERATE}=1 once");
    assert_eq!(&decode::<M>(kind, &agreed, LIMIT).expect("decoded"), message);
}

fn domain() -> Domain {
    Domain::new("python").expect("a domain")
}

fn document() -> Document {
    Document {
        id: DocumentId::new("order-7").expect("an id"),
        domain: domain(),
        content: Content::Completion { prompt: "capital of Vel?".into(), completion: "Ostrin".into() },
        importance: Some(0.75),
        source: Some("notes.md".into()),
        submitted_ms: 1_700_000_000_000,
        derived_from: Some("order-6".into()),
    }
}

fn piece() -> Piece {
    Piece { tokens: vec![1, 300, 70_000], learned: vec![(1, 3)] }
}

fn example(ordinal: u64) -> Example {
    Example {
        id: ExampleId { ordinal, chunk: 2 },
        domain: domain(),
        piece: piece(),
        importance: 0.5,
        marked: true,
        held_out: false,
        signature: vec![7, u32::MAX],
    }
}

fn generation_id() -> GenerationId {
    GenerationId::new("0123456789abcdef").expect("an id")
}

fn blob(digit: char) -> Blob {
    Blob(digit.to_string().repeat(64))
}

fn verdict() -> Verdict {
    Verdict { kind: VerdictKind::Kept, reason: "kept".into(), score: 0.875 }
}

fn batch() -> Batch {
    Batch {
        lineage: domain(),
        parent: Some(generation_id()),
        number: 3,
        attempt: 1,
        after: 40,
        through: 44,
        documents: 4,
        seed: u64::MAX,
        fresh: vec![example(41)],
        rehearsed: vec![example(7)],
        rehearsed_a_pass: 1,
        known_answers: vec![3, 300],
        rate_scale: 0.5,
        held_out: vec![Example { held_out: true, ..example(42) }],
        replay_digest: "d1".into(),
    }
}

fn report() -> TrainReport {
    TrainReport {
        examples: 5,
        counted: 2,
        steps: 12,
        skipped_steps: 1,
        tokens: 4096,
        first_loss: 3.5,
        last_loss: 0.25,
        passes: 3,
        seconds: 1.5,
    }
}

fn candidate() -> Candidate {
    Candidate {
        batch: batch(),
        weights: blob('a'),
        optimiser: blob('b'),
        report: report(),
        learned: vec![LearnedExample { id: ExampleId { ordinal: 41, chunk: 2 }, first_loss: 3.5 }],
        put_aside: vec![(ExampleId { ordinal: 43, chunk: 0 }, "it breaks the learner".into())],
        answer_head: Some(answer_head()),
    }
}

fn answer_head() -> AnswerHead {
    AnswerHead {
        counts: blob('e'),
        solved: blob('f'),
        answers: 15,
        prompts: 1500,
        trusted: true,
        facts: 30,
        passages: 40,
    }
}

fn judgement() -> Judgement {
    let measure = Measure {
        examples: 64,
        best: 1.0,
        before: 1.0,
        after: 1.0,
        rise_upper: 0.0,
        rise_allowed: 0.01,
        recited: Some(Recited { best: 60, before: 60, after: 59, fewer_allowed: 1 }),
    };
    let learned = Learned {
        weights: blob('a'),
        optimiser: blob('b'),
        fisher: Some(blob('c')),
        probe: blob('d'),
        answer_head: Some(answer_head()),
        examples: candidate().learned,
        report: report(),
    };
    Judgement {
        batch: batch(),
        decision: Decision::Publish(Box::new(learned)),
        receipt: Receipt { probes: vec![Retained { probe: "memory".into(), measure }], seconds: 0.5 },
        put_aside: Vec::new(),
    }
}

fn manifest() -> Manifest {
    let base = BaseId::new("fedcba9876543210").expect("an id");
    let aside = SetAside { after: 30, through: 33, reason: "rolled back".into() };
    let lineage = Lineage {
        current: Some(generation_id()),
        cursor: 44,
        number: 4,
        judged: 6,
        set_aside: vec![aside],
        documents: 40,
        ..Lineage::default()
    };
    let lineages = [(domain(), lineage)].into();
    Manifest {
        number: 9,
        lineages,
        replay_digest: "d2".into(),
        written_ms: 1_700_000_001_000,
        ..Manifest::empty(base, false)
    }
}

fn generate() -> Generate {
    let weighted = Weighted { domain: domain(), generation: None, weight: 0.75 };
    let message = Message { role: Role::User, content: "hello".into() };
    let sampling = Sampling {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.05,
        repetition_penalty: 1.1,
        presence_penalty: -0.5,
        frequency_penalty: 0.5,
        logit_bias: [(7, -100.0), (300, 2.5)].into(),
        logprobs: Some(1),
        seed: 42,
        max_tokens: 16,
        stop: vec!["\n".into()],
    };
    let prompt = Prompt::Messages(vec![message]);
    let schema = Some(r#"{"type":"object"}"#.into());
    Generate { adapters: Adapters::Fixed(vec![weighted]), prompt, sampling, n: 2, schema }
}

fn text_event() -> GenerateEvent {
    let logprob = |bytes: &[u8], logprob| TopLogprob { bytes: bytes.to_vec(), logprob };
    let half = TokenLogprob {
        token: logprob(b"\xc3", -0.5),
        top: vec![logprob(b"e", -0.25), logprob(b"\xc3", -0.5)],
        text_offset: 0,
    };
    let rest = TokenLogprob { token: logprob(b"\xa9", 0.0), top: Vec::new(), text_offset: 0 };
    GenerateEvent::Text { index: 1, text: "é".into(), logprobs: vec![half, rest] }
}

#[test]
fn messages_on_the_wire_are_as_agreed() {
    let content = Content::Text("the sky".into());
    let text = Document { content, importance: None, derived_from: None, ..document() };
    golden("accepted", Kind::Accepted, &Accepted { ordinal: 41, document: document() });
    let parsed = Parsed { ordinal: 42, document: text, pieces: vec![piece()], refused: None };
    golden("parsed", Kind::Parsed, &parsed);
    let kept = Kept {
        ordinal: 41,
        id: document().id,
        domain: domain(),
        importance: None,
        verdict: verdict(),
        pieces: vec![piece()],
        signature: vec![1, 2],
    };
    golden("kept", Kind::Kept, &kept);
    golden("batch", Kind::Batch, &batch());
    golden("candidate", Kind::Candidate, &candidate());
    golden("judgement", Kind::Judgement, &judgement());
    golden("publish", Kind::Publish, &Publish { manifest: manifest() });
    golden("published", Kind::Published, &Published { number: 9, live_ms: 1_700_000_002_000 });
    golden("generate", Kind::Generate, &generate());
    let usage = Usage { prompt_tokens: 5, completion_tokens: 1 };
    let sources = vec![Source { ordinal: 41, likely: 0.75 }];
    let finished = GenerateEvent::Finished { index: 1, reason: FinishReason::Length, usage, sources };
    golden("generate_event", Kind::GenerateEvent, &finished);
    golden("generate_event_text", Kind::GenerateEvent, &text_event());
}

#[test]
fn every_flipped_bit_is_refused() {
    let frame = encode(Kind::Judgement, &judgement()).expect("encoded");
    for bit in 0..frame.len() * 8 {
        let mut damaged = frame.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(decode::<Judgement>(Kind::Judgement, &damaged, LIMIT).is_err(), "bit {bit}");
    }
}

#[test]
fn every_truncation_is_refused() {
    let frame = encode(Kind::Batch, &batch()).expect("encoded");
    for length in 0..frame.len() {
        assert!(decode::<Batch>(Kind::Batch, &frame[..length], LIMIT).is_err(), "{length} bytes");
    }
}

#[test]
fn a_frame_of_another_kind_or_version_says_so() {
    let mut frame = encode(Kind::Batch, &batch()).expect("encoded");
    assert!(matches!(open(Kind::Kept, &frame, LIMIT), Err(WireError::Kind { given: 4, .. })));
    frame[2] = 9;
    assert!(matches!(open(Kind::Batch, &frame, LIMIT), Err(WireError::Version { given: 9 })));
}

#[test]
fn a_payload_over_the_limit_is_refused_before_it_is_read() {
    let frame = seal(Kind::Row, &[7; 100]).expect("sealed");
    assert!(matches!(open(Kind::Row, &frame, 99), Err(WireError::TooLarge { given: 100, limit: 99 })));
    assert_eq!(open(Kind::Row, &frame, 100).expect("opened"), [7; 100]);
}

proptest! {
    #[test]
    fn texts_come_back_as_they_were(ordinal: u64, text in ".*", importance in proptest::option::of(0.0f32..=1.0)) {
        let document = Document { content: Content::Text(text), importance, ..document() };
        let accepted = Accepted { ordinal, document };
        let frame = encode(Kind::Accepted, &accepted).expect("encoded");
        prop_assert_eq!(decode::<Accepted>(Kind::Accepted, &frame, LIMIT).expect("decoded"), accepted);
    }

    #[test]
    fn noise_is_refused(noise in proptest::collection::vec(any::<u8>(), 0..2000)) {
        prop_assert!(decode::<Candidate>(Kind::Candidate, &noise, LIMIT).is_err());
    }

    #[test]
    fn a_sound_frame_around_noise_is_never_a_panic(noise in proptest::collection::vec(any::<u8>(), 0..500)) {
        let frame = seal(Kind::Candidate, &noise).expect("sealed");
        // Whatever it says: a length that is a lie must not be believed, nor memory set aside for it.
        let _ = decode::<Candidate>(Kind::Candidate, &frame, LIMIT);
    }
}
