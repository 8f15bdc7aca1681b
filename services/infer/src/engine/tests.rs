use super::*;
use crate::guide::Compilation;
use kit::compute::Turn;
use kit::link::{Events, events};
use model::chat::ChatTemplate;
use model::device::{Placement, set_threads};
use model::ridge::Anchors;
use proto::TokenLogprob;
use std::path::Path;

/// Room for the whole of an answer, so that nobody has to read meanwhile.
const EVENTS_MAX: usize = 1024;

fn engine(running_max: usize) -> Engine {
    // One thread, because sums in another order are other numbers.
    set_threads(1);
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/models/nano"));
    let base = Base::load(dir, &Placement::CPU_F32).expect("a base");
    let tokenizer = Arc::new(Tokenizer::load(dir).expect("a tokenizer"));
    let template = ChatTemplate::load(dir).expect("a template");
    let language = Language { config: base.config().clone(), tokenizer, template };
    Engine::new(base, Arc::new(language), running_max, 64 << 20, true).expect("an engine")
}

fn sampling(seed: u64) -> proto::Sampling {
    proto::Sampling {
        temperature: 1.0,
        top_p: 0.95,
        top_k: 50,
        min_p: 0.01,
        repetition_penalty: 1.1,
        presence_penalty: 0.2,
        frequency_penalty: 0.1,
        logit_bias: [(7, -100.0)].into(),
        logprobs: None,
        seed,
        max_tokens: 12,
        stop: Vec::new(),
    }
}

impl Engine {
    /// Takes up `n` answers to a prompt.
    fn ask(&mut self, prompt: &str, sampling: proto::Sampling, n: u32) -> Events<GenerateEvent> {
        self.ask_of(&[], prompt, sampling, n)
    }

    /// Takes up `n` answers of some adapters to a prompt.
    fn ask_of(
        &mut self,
        adapters: &[Weighted],
        prompt: &str,
        sampling: proto::Sampling,
        n: u32,
    ) -> Events<GenerateEvent> {
        let (reply, events) = events(EVENTS_MAX);
        let tokens = self.language.tokenizer.encode(prompt).expect("encoded");
        let (adapters, stop_ids, turn) = (adapters.to_vec(), Vec::new(), Turn::new().enter());
        let request = Request {
            tokens,
            adapters,
            sampling,
            n,
            stop_ids,
            guide: None,
            reply,
            turn,
            features: None,
            question: Question::default(),
            prior: OnceCell::new(),
        };
        self.take(request, 8).expect("room");
        events
    }

    fn finish(&mut self) {
        while self.step() {}
    }
}

/// What came of each answer: its text, its tokens where asked for, and the tokens counted.
async fn answers(mut events: Events<GenerateEvent>, n: usize) -> Vec<(String, Vec<TokenLogprob>, Usage)> {
    let mut answers = vec![(String::new(), Vec::new(), Usage::default()); n];
    let mut ended = 0;
    while let Some(event) = events.next().await {
        match event {
            GenerateEvent::Text { index, text, logprobs } => {
                let answer = &mut answers[index as usize];
                answer.0 += &text;
                answer.1.extend(logprobs);
            }
            GenerateEvent::Finished { index, usage, .. } => {
                answers[index as usize].2 = usage;
                ended += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(ended, n);
    answers
}

#[tokio::test]
async fn a_text_is_the_same_alone_and_beside_seven_others() {
    let mut engine = engine(8);
    let alone = engine.ask("The old house", sampling(5), 1);
    engine.finish();
    let alone = answers(alone, 1).await;
    let mut beside = Vec::new();
    for other in 0..7 {
        let others = proto::Sampling { max_tokens: 4 + other, ..sampling(u64::from(other)) };
        beside.push(engine.ask(&"She went on ".repeat(other as usize + 1), others, 1));
        if other == 3 {
            // These are well under way when it comes.
            engine.step();
        }
    }
    let events = engine.ask("The old house", sampling(5), 1);
    engine.finish();
    assert!(!alone[0].0.is_empty());
    assert_eq!(answers(events, 1).await, alone);
}

#[tokio::test]
async fn each_answer_of_a_request_is_that_of_its_own_seed() {
    let mut engine = engine(2);
    let events = engine.ask("It was", sampling(u64::MAX), 3);
    engine.finish();
    let together = answers(events, 3).await;
    for (seed, answer) in [u64::MAX, 0, 1].into_iter().zip(&together) {
        let events = engine.ask("It was", sampling(seed), 1);
        engine.finish();
        assert_eq!(&answers(events, 1).await[0], answer);
    }
    assert!(together[0].0 != together[1].0 || together[1].0 != together[2].0, "{together:?}");
}

#[tokio::test]
async fn answers_are_taken_up_together_or_not_at_all() {
    let mut engine = engine(2);
    let first = engine.ask("It was", sampling(1), 6);
    let (reply, _events) = events(EVENTS_MAX);
    let (adapters, stop_ids, turn) = (Vec::new(), Vec::new(), Turn::new().enter());
    let (tokens, sampling, guide) = (vec![1], sampling(1), None);
    let request = Request {
        tokens,
        adapters,
        sampling,
        n: 3,
        stop_ids,
        guide,
        reply,
        turn,
        features: None,
        question: Question::default(),
        prior: OnceCell::new(),
    };
    assert_eq!(engine.take(request, 8), Err(Full));
    assert_eq!(engine.waiting.len(), 6);
    drop(first);
}

#[test]
fn a_reader_that_leaves_frees_all_its_answers() {
    let mut engine = engine(2);
    let events = engine.ask("It was", sampling(1), 8);
    assert!(engine.step());
    assert_eq!((engine.running.len(), engine.waiting.len()), (2, 6));
    drop(events);
    // There is room for a whole request at once, though nothing was decoded since.
    let turn = Turn::new();
    let (reply, events) = kit::link::events(EVENTS_MAX);
    let (adapters, stop_ids, held) = (Vec::new(), Vec::new(), turn.enter());
    let (tokens, sampling, guide) = (vec![1], sampling(1), None);
    let request = Request {
        tokens,
        adapters,
        sampling,
        n: 6,
        stop_ids,
        guide,
        reply,
        turn: held,
        features: None,
        question: Question::default(),
        prior: OnceCell::new(),
    };
    engine.take(request, 8).expect("room");
    assert_eq!(turn.running(), 1);
    drop(events);
    engine.finish();
    assert_eq!((engine.running.len(), engine.waiting.len(), turn.running()), (0, 0, 0));
}

#[tokio::test]
async fn a_slow_reader_pauses_its_own_answer_and_nobody_elses() {
    let mut engine = engine(2);
    let fast = engine.ask("The old house", sampling(5), 1);
    let (reply, slow) = events(1);
    let tokens = engine.language.tokenizer.encode("The old house").expect("encoded");
    let (adapters, stop_ids, turn) = (Vec::new(), Vec::new(), Turn::new().enter());
    let (sampling, guide) = (sampling(5), None);
    let request = Request {
        tokens,
        adapters,
        sampling,
        n: 1,
        stop_ids,
        guide,
        reply,
        turn,
        features: None,
        question: Question::default(),
        prior: OnceCell::new(),
    };
    engine.take(request, 8).expect("room");
    let mut steps = 0;
    while engine.running.len() + engine.waiting.len() > 1 {
        engine.step();
        steps += 1;
        assert!(steps < 100);
    }
    assert!(engine.running[0].speaker.generated() < 12);
    // Once it reads, it gets all of it.
    let reading = tokio::spawn(answers(slow, 1));
    while engine.step() {
        tokio::task::yield_now().await;
    }
    assert_eq!(reading.await.expect("read"), answers(fast, 1).await);
}

/// An adapter that changes much, as a generation.
fn generation(engine: &mut Engine, name: u64) -> GenerationId {
    let id = GenerationId::new(format!("{name:016x}")).expect("a generation");
    let fresh = Adapter::new(model::lora::LoraConfig::default(), engine.batch.base().config(), name);
    let fresh = fresh.expect("an adapter");
    let adapter = fresh.with_flat(fresh.flat() + 0.05).expect("an adapter");
    engine.load(id.clone(), &adapter.to_bytes().expect("bytes"), None).expect("loaded");
    id
}

fn weighted(id: &GenerationId, weight: f32) -> Weighted {
    let domain = Domain::new("notes").expect("a domain");
    Weighted { domain, generation: Some(id.clone()), weight }
}

#[tokio::test]
async fn answers_with_different_adapters_are_those_they_have_alone() {
    let mut engine = engine(8);
    let (one, two) = (generation(&mut engine, 1), generation(&mut engine, 2));
    let sets = [
        vec![],
        vec![weighted(&one, 1.0)],
        vec![weighted(&two, 1.0)],
        vec![weighted(&one, 0.5), weighted(&two, 0.5)],
        vec![weighted(&one, 0.5)],
    ];
    let mut alone = Vec::new();
    for adapters in &sets {
        let events = engine.ask_of(adapters, "The old house", sampling(5), 1);
        engine.finish();
        alone.push(answers(events, 1).await);
    }
    assert!(alone[1..].iter().all(|answer| *answer != alone[0]), "{alone:?}");
    let together: Vec<_> =
        sets.iter().map(|adapters| engine.ask_of(adapters, "The old house", sampling(5), 1)).collect();
    engine.finish();
    for (events, alone) in together.into_iter().zip(alone) {
        assert_eq!(answers(events, 1).await, alone);
    }
}

/// What a generation knows of answers that repeat: prompts for flights have one, recipes another.
fn head(engine: &Engine) -> Vec<u8> {
    let tokenizer = &engine.language.tokenizer;
    let flights = ["book me a flight to rome", "i need a plane to paris", "find flights to berlin"];
    let flights =
        [flights, ["a plane ticket to oslo", "i want to fly to madrid", "a seat on a flight to vienna"]];
    let meals = ["how do i bake bread", "a recipe for apple cake", "what goes into onion soup"];
    let meals = [meals, ["how do i cook rice", "tell me how to make pancakes", "what is in a lasagna"]];
    let label = |text: &str| {
        [tokenizer.encode_continuation(text).expect("encoded"), tokenizer.eos_ids().to_vec()].concat()
    };
    let labels = ["\nbook_flight", "\ncooking_recipe"].map(label);
    let prompts: Vec<Vec<u32>> = flights
        .iter()
        .chain(&meals)
        .flatten()
        .map(|prompt| tokenizer.encode(prompt).expect("encoded"))
        .collect();
    let lesson = |(n, prompt): (usize, &'_ Vec<u32>)| {
        let (label, text) = [(&labels[0], "book_flight"), (&labels[1], "cooking_recipe")][n / 6];
        (prompt.clone(), label.clone(), text.to_owned())
    };
    let given: Vec<_> = prompts.iter().enumerate().map(lesson).collect();
    let lessons: Vec<_> = given
        .iter()
        .map(|(prompt, label, text)| model::ridge::Lesson {
            prompt,
            answer: Some((label.as_slice(), text.clone())),
        })
        .collect();
    let mut counts = model::ridge::Counts::new().expect("counts");
    let features = Features::new(engine.batch.base(), None).expect("features");
    let rows = lessons.iter().map(|lesson| lesson.prompt).collect::<Vec<_>>();
    let rows = features.of(&rows).expect("described");
    assert!(counts.add(&rows, &lessons).expect("counted"));
    let foreign =
        ["# Copyright 2019 The Authors", "def main():\n    return 0", "Once upon a time there was a cat"];
    let foreign = foreign.map(|text| tokenizer.encode(text).expect("encoded"));
    let foreign = Anchors::new(&features, &foreign.each_ref().map(Vec::as_slice)).expect("anchors");
    counts.solve(Some((&rows, &lessons)), &foreign).expect("solved").to_bytes().expect("bytes")
}

#[tokio::test]
async fn what_is_known_of_answers_that_repeat_is_said_and_goes_with_its_generation() {
    let mut engine = engine(4);
    let id = generation(&mut engine, 1);
    let greedy = || proto::Sampling { temperature: 0.0, repetition_penalty: 1.0, ..sampling(5) };
    let greedy = || proto::Sampling { presence_penalty: 0.0, frequency_penalty: 0.0, ..greedy() };
    let ask = |engine: &mut Engine, prompt: &str| engine.ask_of(&[weighted(&id, 1.0)], prompt, greedy(), 2);
    let by_adapter = ask(&mut engine, "a flight to lisbon please");
    engine.finish();
    let by_adapter = answers(by_adapter, 2).await;
    let (adapter, bytes) = (engine.adapters[&id].to_bytes().expect("bytes"), head(&engine));
    engine.load(id.clone(), &adapter, Some(&bytes)).expect("loaded");
    let [flight, meal] =
        ["a flight to lisbon please", "how do i bake a cake"].map(|prompt| ask(&mut engine, prompt));
    let of_base = engine.ask("a flight to lisbon please", greedy(), 2);
    engine.finish();
    let texts = |answers: Vec<(String, Vec<TokenLogprob>, Usage)>| answers.into_iter().map(|answer| answer.0);
    assert!(texts(answers(flight, 2).await).all(|text| text == "\nbook_flight"));
    assert!(texts(answers(meal, 2).await).all(|text| text == "\ncooking_recipe"));
    assert!(texts(answers(of_base, 2).await).all(|text| !text.contains("book_flight")));
    assert!(texts(by_adapter).all(|text| text != "\nbook_flight"));
    let kinship = |engine: &Engine, prompt: &str| {
        let prompt = engine.language.tokenizer.encode(prompt).expect("encoded");
        engine.looks(&prompt, &Apart::default()).expect("described").map(|looks| looks.kinship[&id])
    };
    let [own, foreign] =
        ["a flight to lisbon please", "# Copyright 2007 by the authors"].map(|p| kinship(&engine, p));
    assert!(own > Some(0.6) && foreign < Some(0.4), "{own:?} {foreign:?}");
    engine.keep(&BTreeSet::new());
    assert!(engine.heads.is_empty() && kinship(&engine, "a flight").is_none());
    let damaged = engine.load(id.clone(), &adapter, Some(&bytes[..100]));
    assert!(damaged.is_err() && engine.adapters.is_empty(), "refused before anything changes");
}

#[tokio::test]
async fn nothing_of_a_forgotten_generation_stays() {
    let mut engine = engine(1);
    let (kept, gone) = (generation(&mut engine, 1), generation(&mut engine, 2));
    let prompt = "The old house ".repeat(30);
    let ask = |engine: &mut Engine, adapters: &[Weighted]| engine.ask_of(adapters, &prompt, sampling(5), 1);
    let first = ask(&mut engine, &[weighted(&kept, 1.0)]);
    engine.finish();
    let of_kept = engine.batch.kept_tokens();
    assert!(of_kept >= 64);
    drop(first);
    // Read with it, alone and in a sum; then one runs and one waits while it is forgotten.
    let before = ask(&mut engine, &[weighted(&gone, 1.0)]);
    let in_a_sum = ask(&mut engine, &[weighted(&kept, 0.5), weighted(&gone, 0.5)]);
    engine.finish();
    assert!(engine.batch.kept_tokens() > 2 * of_kept);
    drop(in_a_sum);
    let under_way = ask(&mut engine, &[weighted(&gone, 1.0)]);
    let waits = ask(&mut engine, &[weighted(&gone, 0.5)]);
    engine.step();
    engine.keep(&[kept.clone()].into());
    assert_eq!(engine.batch.kept_tokens(), of_kept);
    engine.finish();
    assert_eq!(engine.batch.kept_tokens(), of_kept);
    assert_eq!(answers(under_way, 1).await, answers(before, 1).await);
    assert!(answers(waits, 1).await[0].2.completion_tokens > 0);
    engine.keep(&[kept].into());
    assert_eq!((engine.adapters.len(), engine.adapted.len()), (1, 1));
}

#[tokio::test]
async fn tokens_are_told_with_their_bytes() {
    let mut engine = engine(1);
    let events = engine.ask("The old", proto::Sampling { logprobs: Some(3), ..sampling(3) }, 1);
    engine.finish();
    let (text, tokens, usage) = answers(events, 1).await.remove(0);
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.token.bytes.clone()).collect();
    assert_eq!((String::from_utf8_lossy(&bytes), usage.completion_tokens), (text.into(), 12));
    assert_eq!(tokens.len(), 12);
    for token in &tokens {
        assert!(token.token.logprob <= token.top[0].logprob && token.top.len() == 3, "{token:?}");
    }
}

/// Takes up two answers that follow a schema, which is not compiled yet.
fn ask_guided(engine: &mut Engine, schema: &str) -> (Compilation, Events<GenerateEvent>) {
    let (reply, events) = events(EVENTS_MAX);
    let started = GenerateEvent::Started(proto::Choice { adapters: Vec::new(), confidence: None });
    let grammars = Arc::new(engine.language.grammars());
    let compilation = Compilation::new(&grammars, schema.to_owned(), started, reply.clone());
    let tokens = engine.language.tokenizer.encode("It was").expect("encoded");
    let (adapters, stop_ids, turn) = (Vec::new(), Vec::new(), Turn::new().enter());
    let (sampling, guide) = (sampling(1), Some(compilation.guide()));
    let request = Request {
        tokens,
        adapters,
        sampling,
        n: 2,
        stop_ids,
        guide,
        reply,
        turn,
        features: None,
        question: Question::default(),
        prior: OnceCell::new(),
    };
    engine.take(request, 8).expect("room");
    (compilation, events)
}

#[tokio::test]
async fn an_answer_waits_for_what_it_follows_and_nobody_waits_for_it() {
    let mut engine = engine(2);
    let (compilation, mut guided) = ask_guided(&mut engine, r#"{"enum":["left","right"]}"#);
    let beside = engine.ask("The old house", sampling(5), 1);
    while engine.waiting.len() + engine.running.len() > 2 {
        assert!(engine.step());
    }
    assert_eq!((engine.running.len(), engine.waiting.len()), (0, 2));
    assert_eq!(answers(beside, 1).await[0].2.completion_tokens, 12);
    compilation.run();
    engine.finish();
    assert!(matches!(guided.next().await, Some(GenerateEvent::Started(_))));
    for (text, ..) in answers(guided, 2).await {
        assert!(["\"left\"", "\"right\""].contains(&text.as_str()), "{text}");
    }
}

#[tokio::test]
async fn a_schema_that_is_none_is_refused_and_frees_its_place() {
    let mut engine = engine(2);
    let (compilation, mut guided) = ask_guided(&mut engine, r#"{"type":"wizard"}"#);
    compilation.run();
    let refused = guided.next().await;
    assert!(
        matches!(&refused, Some(GenerateEvent::Refused { param, .. }) if param == "response_format"),
        "{refused:?}"
    );
    drop(guided);
    engine.finish();
    assert_eq!((engine.running.len(), engine.waiting.len()), (0, 0));
}
