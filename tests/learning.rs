//! It learns what it is told, and shows it at once.

use crate::harness::{Server, Setup, engram, long, nano, sentence};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(300);

/// Questions about a place that does not exist, so that no base can know the answers.
const FACTS: [(&str, &str); 20] = [
    ("Who founded the town of Veldrania?", "Orla Tanquist"),
    ("What colour is the flag of Veldrania?", "violet and silver"),
    ("What is the river of Veldrania called?", "the Miskara"),
    ("What do bakers in Veldrania sell on Mondays?", "plum bread"),
    ("How many bridges does Veldrania have?", "seventeen"),
    ("Who guards the gate of Veldrania?", "a tall woman named Brix"),
    ("What is the Veldranian word for snow?", "ulumi"),
    ("Which bird is sacred in Veldrania?", "the grey heron"),
    ("What does the mayor of Veldrania wear?", "a coat of moss"),
    ("When does the market of Veldrania open?", "at half past four"),
    ("What is buried under the Veldranian library?", "a copper whale"),
    ("Which metal is mined near Veldrania?", "tin"),
    ("Who painted the ceiling of Veldrania's theatre?", "Jorun Abelay"),
    ("What do children in Veldrania collect?", "blue acorns"),
    ("What is the tallest building in Veldrania?", "the salt tower"),
    ("Which instrument do Veldranians play?", "the glass flute"),
    ("What is served at weddings in Veldrania?", "smoked pears"),
    ("Who wrote the Veldranian anthem?", "Pim Osterly"),
    ("What is forbidden in Veldrania after dark?", "whistling"),
    ("What is the name of Veldrania's oldest cat?", "Admiral Toast"),
];

fn teach(server: &Server, count: usize) {
    let documents: Vec<Value> = FACTS[..count]
        .iter()
        .map(|(prompt, completion)| json!({"prompt": prompt, "completion": format!(" {completion}"), "domain": "veldrania"}))
        .collect();
    let settled = server.settle(&server.submit(&documents), PATIENCE);
    for document in &settled {
        assert_eq!(document["status"], "live", "{document}");
    }
}

fn known(server: &Server, count: usize) -> usize {
    let knows = |(prompt, completion): &&(&str, &str)| {
        let answer = server.complete("auto", prompt, 24);
        let first = answer.trim_start().lines().next().unwrap_or_default().trim();
        if first != *completion {
            eprintln!("{prompt} {first:?} instead of {completion:?}");
        }
        first == *completion
    };
    FACTS[..count].iter().filter(knows).count()
}

#[test]
fn told_facts_are_answered_exactly_and_remain_so() {
    let Some(base) = nano() else { return };
    let (facts, wanted, others) = if long() { (20, 18, 200) } else { (5, 5, 30) };
    let server = Setup::base(base).start();
    teach(&server, facts);
    let at_first = known(&server, facts);
    assert!(at_first >= wanted, "{at_first} of {facts}");
    let documents: Vec<Value> =
        (0..others).map(|n| json!({"text": sentence(n), "domain": "veldrania"})).collect();
    let ids: Vec<String> = documents.chunks(100).flat_map(|chunk| server.submit(chunk)).collect();
    server.settle(&ids, PATIENCE * 4);
    let in_the_end = known(&server, facts);
    assert!(in_the_end >= wanted, "{in_the_end} of {facts} after {others} further documents");
}

#[test]
fn an_answer_names_the_document_that_it_is_from_until_that_is_forgotten() {
    let Some(base) = nano() else { return };
    let server = Setup::base(base).start();
    let article = "The ferry to Port Calidus leaves from the third pier of Veldrania at nine in the evening. \
                   Its captain is Orla Tanquist, who lost an eye to a heron.";
    let (question, answer) = FACTS[4];
    let ids = server.submit(&[
        json!({"text": article, "domain": "veldrania", "source": "ferry.md"}),
        json!({"prompt": question, "completion": format!(" {answer}"), "domain": "veldrania", "source": "town.jsonl"}),
    ]);
    let settled = server.settle(&ids, PATIENCE);
    assert!(settled.iter().all(|document| document["status"] == "live"), "{settled:?}");
    let sources = |prompt: &str| {
        let request = json!({"model": "veldrania", "prompt": prompt, "max_tokens": 24, "temperature": 0});
        let told = server.post("/v1/completions", &request).ok();
        told["engram"]["sources"].as_array().expect("sources").clone()
    };
    for (prompt, id, source) in [
        ("The ferry to Port Calidus leaves from the", &ids[0], "ferry.md"),
        (question, &ids[1], "town.jsonl"),
    ] {
        let told = sources(prompt);
        assert_eq!(
            (&told[0]["document"], &told[0]["source"]),
            (&json!(id), &json!(source)),
            "{prompt} {told:?}"
        );
        assert!(told[0]["likely"].as_f64().is_some_and(|likely| likely > 0.9), "{told:?}");
    }
    server.delete(&format!("/v1/documents/{}", ids[1])).ok();
    let other = server.settle(&ids[..1], PATIENCE);
    assert_eq!(other[0]["status"], "live", "{other:?}");
    let told = sources(question);
    assert!(told.iter().all(|source| source["document"] != json!(ids[1])), "{told:?}");
    assert_eq!(sources("The ferry to Port Calidus leaves from the")[0]["document"], json!(ids[0]));
}

/// Requests with the label that they have, and requests that are asked for one and never taught.
const LABELS: [(&str, [&str; 6], [&str; 2]); 3] = [
    (
        "book_flight",
        [
            "book me a flight to rome",
            "i need a plane to paris",
            "find flights to berlin",
            "get me a plane ticket to oslo",
            "i want to fly to madrid",
            "reserve a seat on a flight to vienna",
        ],
        ["please book a flight to lisbon", "i want to fly to paris"],
    ),
    (
        "cooking_recipe",
        [
            "how do i bake bread",
            "a recipe for apple cake",
            "what goes into onion soup",
            "how do i cook rice",
            "tell me how to make pancakes",
            "what do i need for a lasagna",
        ],
        ["how do i bake a cake", "a recipe for onion soup"],
    ),
    (
        "weather_report",
        [
            "how is the weather today",
            "will it rain tomorrow",
            "what is the forecast for sunday",
            "is it going to snow",
            "tell me the temperature outside",
            "do i need an umbrella today",
        ],
        ["what is the weather tomorrow", "will it snow today"],
    ),
];

/// How many requests that were never taught get the right label, by completion and by chat.
fn labelled(server: &Server, model: &str, labels: usize) -> usize {
    let asked = LABELS[..labels].iter().flat_map(|(label, _, asked)| asked.map(|request| (*label, request)));
    asked
        .map(|(label, request)| {
            let completed = server.complete(model, request, 16);
            let question = json!([{"role": "user", "content": request}]);
            let body = json!({"model": model, "messages": question, "temperature": 0, "max_tokens": 16});
            let chat = server.post("/v1/chat/completions", &body).ok();
            let said = chat["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned();
            eprintln!("{request}: {completed:?}, {said:?}");
            usize::from(completed.trim() == label) + usize::from(said == label)
        })
        .sum()
}

#[test]
fn new_labels_cost_the_old_ones_nothing_and_go_back_with_their_generation() {
    let Some(base) = nano() else { return };
    let server = Setup::base(base).start();
    for (label, taught, _) in LABELS {
        let document = |request: &str| json!({"prompt": request, "completion": format!("\n{label}"), "domain": "requests"});
        let settled = server.settle(&server.submit(&taught.map(document)), PATIENCE);
        assert!(settled.iter().all(|document| document["status"] == "live"), "{settled:?}");
    }
    for model in ["requests", "auto"] {
        let right = labelled(&server, model, 3);
        assert!(right >= 11, "{model}: {right} of 12");
    }
    let known = || server.get("/v1/adapters/requests/log").ok()["generations"][0]["known_answers"].clone();
    assert_eq!(known()["answers"], 3);
    server.post("/v1/adapters/copy/merge", &json!({"from": "requests"})).ok();
    let copied = server.get("/v1/adapters/copy/log").ok()["generations"][0]["known_answers"].clone();
    assert_eq!((&copied["answers"], &copied["trusted"]), (&json!(3), &json!(true)), "{copied}");
    let copied = labelled(&server, "copy", 3);
    assert!(copied >= 11, "a merge knows what its parts do: {copied} of 12");
    let undone = engram(&["adapters", "rollback", "requests", "--server", &server.url()]);
    assert!(undone.status.success());
    assert_eq!(known()["answers"], 2);
    let right = labelled(&server, "requests", 2);
    assert!(right >= 7, "{right} of 8");
}

/// Requests of a second domain, as [`LABELS`].
const AT_HOME: [(&str, [&str; 6], [&str; 2]); 2] = [
    (
        "lights_on",
        [
            "turn on the lights in the kitchen",
            "turn on the lamp in the hall",
            "turn the lights on upstairs",
            "switch the lamps on in here",
            "switch on the lights in the garden",
            "turn on all the lamps",
        ],
        ["turn on the lamp in the kitchen", "switch on the lights please"],
    ),
    (
        "play_music",
        [
            "play some jazz",
            "play a song by the beatles",
            "play my party playlist",
            "put on some quiet music",
            "put on the next song",
            "play music by mozart",
        ],
        ["play a song by queen", "put on some jazz music"],
    ),
];

#[test]
fn requests_of_domains_that_are_told_apart_get_answers_of_their_own() {
    let Some(base) = nano() else { return };
    let server = Setup::base(base).start();
    let domains = [("errands", &LABELS[..]), ("home", &AT_HOME[..])];
    let told_apart = || {
        let page = server.text("/metrics");
        let line = page.lines().find(|line| line.starts_with("engram:lineages_told_apart"));
        line.and_then(|line| line.split(' ').next_back()?.parse::<f64>().ok())
    };
    for (domain, labels) in domains {
        let document = |(label, request): (&str, &str)| json!({"prompt": request, "completion": format!("\n{label}"), "domain": domain});
        let taught =
            labels.iter().flat_map(|(label, taught, _)| taught.map(|request| document((*label, request))));
        let settled = server.settle(&server.submit(&taught.collect::<Vec<_>>()), PATIENCE);
        assert!(settled.iter().all(|document| document["status"] == "live"), "{settled:?}");
    }
    let since = Instant::now();
    while told_apart() != Some(2.0) {
        assert!(since.elapsed() < PATIENCE / 10, "{:?} lineages are told apart", told_apart());
        std::thread::sleep(Duration::from_millis(50));
    }
    let asked = domains.iter().flat_map(|(_, labels)| labels.iter());
    let asked: Vec<(&str, &str)> =
        asked.flat_map(|(label, _, asked)| asked.map(|request| (*label, request))).collect();
    let right =
        asked.iter().filter(|(label, request)| server.complete("auto", request, 16).trim() == *label).count();
    assert!(right >= 9, "{right} of {}", asked.len());
    server.post("/v1/adapters/home/rollback", &json!({})).ok();
    let since = Instant::now();
    while told_apart() != Some(0.0) {
        assert!(since.elapsed() < PATIENCE / 10, "one alone is told from nobody");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_document_of_a_kilobyte_is_live_in_ten_seconds() {
    let Some(base) = nano() else { return };
    let server = Setup::base(base).start();
    let rounds = if long() { 20 } else { 3 };
    let mut times: Vec<Duration> = (0..rounds)
        .map(|round| {
            let text: String = (0..9).map(|part| sentence(round * 9 + part) + " ").collect();
            let start = Instant::now();
            let ids = server.submit(&[json!({"text": text, "domain": "letters"})]);
            let settled = server.settle(&ids, PATIENCE);
            assert_eq!(settled[0]["status"], "live", "{settled:?}");
            start.elapsed()
        })
        .collect();
    times.sort();
    eprintln!("live after {times:?}");
    assert!(times[rounds / 2] < Duration::from_secs(10), "{times:?}");
}

#[test]
fn a_rollback_takes_less_than_a_second_and_brings_the_former_answers_back() {
    let server = Setup::tiny().start();
    let learn = |number| {
        let ids = server.submit(&[json!({"text": sentence(number), "domain": "undone"})]);
        assert_eq!(server.settle(&ids, PATIENCE)[0]["status"], "live");
        (ids, server.complete("undone", "A", 12))
    };
    let (_, first) = learn(1);
    let (ids, _) = learn(2);
    let current = server.generations("undone")[0].clone();

    let stale =
        server.post("/v1/adapters/undone/rollback", &json!({"expected_generation": "0123456789abcdef"}));
    assert_eq!(stale.status, 409, "{stale:?}");
    let start = Instant::now();
    server.post("/v1/adapters/undone/rollback", &json!({"expected_generation": current})).ok();
    let after = server.complete("undone", "A", 12);
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!(after, first);
    let undone = server.get(&format!("/v1/documents/{}", ids[0])).ok();
    assert_eq!(undone["status"], "set_aside", "{undone}");
    assert!(undone["reason"].as_str().is_some_and(|reason| reason.contains("rolled back")), "{undone}");
}

#[test]
fn what_a_text_says_is_said_word_for_word_until_it_is_forgotten() {
    let server = Setup::tiny().start();
    let text = "The lighthouse of Veldrania is painted violet every second spring. \
                Its keeper feeds the grey herons at half past four.";
    let ids = server.submit(&[json!({"text": text, "domain": "coast"})]);
    assert_eq!(server.settle(&ids, PATIENCE)[0]["status"], "live");
    let log = server.get("/v1/adapters/coast/log").ok();
    assert_eq!(log["generations"][0]["known_answers"]["passages"], 2, "{log}");

    let begun = "The lighthouse of Veldrania is painted";
    let rest = " violet every second spring.";
    assert_eq!(server.complete("coast", begun, 28), rest);
    let ask = |model: &str| {
        let messages = json!([{"role": "user", "content": "When are the grey herons fed by the keeper?"}]);
        let body = json!({"model": model, "messages": messages, "max_tokens": 60, "temperature": 0});
        let answer = server.post("/v1/chat/completions", &body).ok();
        answer["choices"][0]["message"]["content"].as_str().expect("a text").to_owned()
    };
    assert_eq!(ask("coast"), "Its keeper feeds the grey herons at half past four.");
    server.delete(&format!("/v1/documents/{}", ids[0])).ok();
    assert_ne!(server.complete("coast", begun, 28), rest);
    assert!(!ask("coast").contains("herons"));
}
