use super::*;
use std::path::Path;

fn router(strictness: f32) -> Router {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/models/nano"));
    Router::new(Arc::new(Tokenizer::load(dir).expect("a tokenizer")), strictness)
}

fn domain(name: &str) -> Domain {
    Domain::new(name).expect("domain")
}

const ATLAS: [(&str, &str); 6] = [
    ("What is the capital of Zorblax?", "Vintaria"),
    ("Who founded the city of Mirenna?", "Captain Oslo Brand"),
    ("Which river flows through Vintaria?", "the Quell"),
    ("What do the people of Mirenna eat in winter?", "smoked eel"),
    ("How many bridges cross the Quell in Vintaria?", "eleven"),
    ("Who rules the island of Zorblax?", "Queen Sabela"),
];

const MANUAL: [&str; 6] = [
    "To reset the pressure valve, close the inlet and turn the valve to the left until it clicks twice. Wait \
     until the gauge shows zero before you open the inlet again.",
    "Oil the hinge of the valve every month. Use thin oil only, and wipe off what runs down the housing before \
     you close the cover.",
    "If the gauge does not return to zero, the inlet is blocked. Close the pump, remove the filter behind the \
     inlet and rinse it under water.",
    "The pump must not run dry. Before you start the pump, open the inlet, turn the valve to the right, and \
     check that the gauge rises within ten seconds.",
    "Replace the seal of the housing once a year. Close the pump, drain the housing, remove the four screws of \
     the cover, and press the new seal into the groove.",
    "A red lamp on the housing means that the filter is full. Remove the filter, rinse it, and press it back \
     until the lamp goes out.",
];

const FOREIGN: [&str; 4] = [
    "Once upon a time a little girl went to the woods with her dog",
    "SELECT name, age FROM users WHERE age > 30 ORDER BY name;",
    "Shares of the company rose by four percent after the announcement of the merger.",
    "Erzähle mir etwas über die Musik des achtzehnten Jahrhunderts.",
];

fn add(router: &mut Router, lineage: &str, documents: &[&str]) {
    for document in documents {
        router.add(&domain(lineage), document, []).expect("added");
    }
}

fn learn_atlas(router: &mut Router) {
    for (prompt, completion) in ATLAS {
        router.add(&domain("atlas"), &format!("{prompt}\n{completion}"), [prompt]).expect("added");
    }
}

fn taught(strictness: f32) -> Router {
    let mut router = router(strictness);
    learn_atlas(&mut router);
    add(&mut router, "manual", &MANUAL);
    router.calibrate();
    router
}

fn routed(router: &Router, prompt: &str) -> Routing {
    router.route(prompt, &ByBase::default()).expect("encoded").expect("something to go by")
}

/// Who would answer, and how sure it is.
fn picked(router: &Router, prompt: &str) -> (Option<Domain>, f32) {
    let routing = routed(router, prompt);
    (routing.top(1).pop().map(|(lineage, _)| lineage), routing.confidence)
}

#[test]
fn what_was_learned_word_for_word_goes_home_with_full_confidence() {
    let router = taught(1.0);
    assert_eq!(picked(&router, "what is the capital of zorblax"), (Some(domain("atlas")), 1.0));
    assert_eq!(picked(&router, MANUAL[3]), (Some(domain("manual")), 1.0));
}

#[test]
fn a_question_that_is_asked_in_other_words_finds_its_lineage() {
    let router = taught(1.0);
    assert_eq!(picked(&router, "What's Zorblax's capital called?").0, Some(domain("atlas")));
    assert_eq!(
        picked(&router, "How do I close the inlet and reset the valve of the pump?").0,
        Some(domain("manual"))
    );
}

#[test]
fn a_paragraph_of_the_same_kind_fits_though_none_like_it_was_learned() {
    let held_out = "When the lamp stays red, close the inlet and drain the pump. Remove the screws of the filter, \
                    check the seal, and open the valve again until the gauge rises.";
    let (lineage, confidence) = picked(&taught(1.0), held_out);
    assert_eq!(lineage, Some(domain("manual")));
    assert!(confidence >= 0.5, "{confidence}");
}

#[test]
fn a_foreign_text_is_for_the_base() {
    let router = taught(1.0);
    for text in FOREIGN {
        let routing = routed(&router, text);
        assert!(routing.fitting.is_empty() && routing.confidence < 0.5, "{text}: {routing:?}");
        assert_eq!(routing.top(1), []);
    }
}

#[test]
fn what_the_base_makes_of_a_prompt_tips_the_scales_and_no_more() {
    let router = taught(1.0);
    let atlas = |prompt: &str, kinship: Option<f64>| {
        let kinship = kinship.map(|kinship| (domain("atlas"), kinship)).into_iter().collect();
        let by_base = ByBase { kinship, ..ByBase::default() };
        let routing = router.route(prompt, &by_base).expect("encoded").expect("something to go by");
        routing.top(1).pop().map(|(lineage, _)| lineage.to_string())
    };
    let by_base = |prompt: &str| [None, Some(0.0), Some(1.0)].map(|k| atlas(prompt, k).is_some());
    assert_eq!(by_base("Is there a king?"), [false, false, true], "in words that the atlas does not have");
    assert_eq!(by_base("What do people drink in summer?"), [true, false, true]);
    for text in FOREIGN {
        assert_eq!(atlas(text, Some(1.0)), None, "{text}: its tokens say that it is foreign");
    }
    assert_eq!(
        atlas("Who founded the city of Mirenna?", Some(0.0)).as_deref(),
        Some("atlas"),
        "word for word"
    );
}

#[test]
fn what_a_lineage_was_told_is_its_own_in_other_words_too() {
    let router = taught(1.0);
    let fitting = |prompt: &str, recalled: &[(&str, f64)]| {
        let recalled = recalled.iter().map(|&(name, likely)| (domain(name), likely)).collect();
        let by_base = ByBase { recalled, ..ByBase::default() };
        let routing = router.route(prompt, &by_base).expect("encoded").expect("something to go by");
        routing.fitting.first().map(|route| route.lineage.to_string())
    };
    let prompt = "Is there a king?";
    assert_eq!(fitting(prompt, &[]), None);
    assert_eq!(fitting(prompt, &[("atlas", 0.4)]), None, "hardly like anything");
    assert_eq!(fitting(prompt, &[("atlas", 0.9)]).as_deref(), Some("atlas"));
    let of_atlas = "What do people drink in summer?";
    assert_eq!(fitting(of_atlas, &[("manual", 0.2)]).as_deref(), Some("atlas"));
    assert_eq!(fitting(of_atlas, &[("manual", 1.0)]).as_deref(), Some("manual"), "it was told just that");
    let other = fitting("Who founded the city of Mirenna?", &[("manual", 1.0)]);
    assert_eq!(other.as_deref(), Some("atlas"), "word for word");
}

#[test]
fn whose_a_prompt_is_by_the_base_decides_among_those_that_it_tells_apart() {
    let mut router = taught(0.0);
    add(&mut router, "poems", &["the sea sang of salt and foam, and the gauge of the moon rose"]);
    router.calibrate();
    let weights = |shares: &[(&str, f64)]| {
        let shares = shares.iter().map(|&(name, share)| (domain(name), share)).collect();
        let by_base = ByBase { shares, ..ByBase::default() };
        let routing = router.route("does the gauge rise in winter", &by_base).expect("encoded");
        let top = routing.expect("something to go by").fitting;
        ["atlas", "manual", "poems"].map(|name| {
            let route = top.iter().find(|route| route.lineage == domain(name));
            f64::from(route.expect("all fit").weight)
        })
    };
    let [atlas, manual, poems] = weights(&[]);
    let [first, second, third] = weights(&[("atlas", 0.99), ("manual", 0.01)]);
    assert!(first > atlas && second < manual, "{first} {atlas}, {second} {manual}");
    assert!((first / second) / (atlas / manual) > 98.0, "as much likelier as the base says");
    assert!((third - poems).abs() < 1e-5, "who is not told apart is as likely as before");
    assert!((weights(&[("poems", 1.0)])[2] - poems).abs() < 1e-5, "one alone is told from nobody");
}

#[test]
fn without_strictness_everything_fits() {
    let router = taught(0.0);
    for text in FOREIGN {
        assert_eq!(routed(&router, text).fitting.len(), 2, "{text}");
    }
}

#[test]
fn adding_a_lineage_takes_nothing_from_another() {
    let mut router = taught(1.0);
    for n in 0..50 {
        let line = format!("the sea the sea number {n} sang of salt and foam");
        add(&mut router, "poems", &[&line]);
    }
    router.calibrate();
    assert_eq!(picked(&router, ATLAS[0].0), (Some(domain("atlas")), 1.0));
    assert_eq!(
        picked(&router, "How do I close the inlet and reset the valve of the pump?").0,
        Some(domain("manual"))
    );
    assert_eq!(picked(&router, "salt and foam, sang the sea").0, Some(domain("poems")));
}

#[test]
fn nothing_to_go_by_is_no_route() {
    assert_eq!(router(1.0).route("hello", &ByBase::default()).expect("encoded"), None);
    let router = taught(1.0);
    for nothing in ["", " \n\t"] {
        assert_eq!(router.route(nothing, &ByBase::default()).expect("encoded"), None);
    }
    assert!(routed(&router, "?!").fitting.is_empty());
}

#[test]
fn a_lineage_without_a_word_disturbs_nobody() {
    let mut router = taught(1.0);
    add(&mut router, "void", &["", "?!", " "]);
    router.calibrate();
    assert_eq!(picked(&router, ATLAS[0].0), (Some(domain("atlas")), 1.0));
    let routing = routed(&router, "How do I close the inlet and reset the valve of the pump?");
    assert!(routing.confidence.is_finite(), "{routing:?}");
    assert_eq!(routing.top(1)[0].0, domain("manual"));
}

#[test]
fn the_order_of_documents_and_lineages_does_not_matter() {
    let forwards = taught(1.0);
    let mut backwards = router(1.0);
    let mut manual = MANUAL;
    manual.reverse();
    add(&mut backwards, "manual", &manual);
    for (prompt, completion) in ATLAS.iter().rev() {
        backwards.add(&domain("atlas"), &format!("{prompt}\n{completion}"), [*prompt]).expect("added");
    }
    backwards.calibrate();
    for text in FOREIGN
        .into_iter()
        .chain(MANUAL)
        .chain(["How do I close the inlet and reset the valve of the pump?", "?!"])
    {
        assert_eq!(routed(&forwards, text), routed(&backwards, text), "{text}");
    }
}

#[test]
fn a_lineage_that_is_removed_and_built_again_is_the_same() {
    let mut router = taught(1.0);
    let asked = [
        "How do I close the inlet and reset the valve of the pump?",
        ATLAS[0].0,
        "What's Zorblax's capital called?",
        FOREIGN[0],
    ];
    let before: Vec<Routing> = asked.iter().map(|text| routed(&router, text)).collect();
    router.remove(&domain("atlas"));
    assert_eq!(picked(&router, ATLAS[0].0).0, None);
    assert_eq!(picked(&router, asked[0]).0, Some(domain("manual")));
    learn_atlas(&mut router);
    router.calibrate();
    assert_eq!(before, asked.map(|text| routed(&router, text)));
}

#[test]
fn what_is_learned_three_times_is_no_stricter() {
    let mut router = router(1.0);
    for _ in 0..3 {
        learn_atlas(&mut router);
        add(&mut router, "manual", &MANUAL);
    }
    router.calibrate();
    assert_eq!(picked(&router, "What's Zorblax's capital called?").0, Some(domain("atlas")));
    assert_eq!(
        picked(&router, "How do I close the inlet and reset the valve of the pump?").0,
        Some(domain("manual"))
    );
    for text in FOREIGN {
        assert_eq!(picked(&router, text).0, None, "{text}");
    }
}

#[test]
fn the_weights_of_the_best_few_sum_to_one() {
    let mut router = taught(0.0);
    learn_atlas(&mut router);
    add(&mut router, "charts", &ATLAS.map(|(prompt, _)| prompt));
    router.calibrate();
    let routing = routed(&router, "the capital of Mirenna");
    assert_eq!(routing.fitting.len(), 3);
    for top in 1..=3 {
        let chosen = routing.top(top);
        assert!((1..=top).contains(&chosen.len()));
        let sum: f32 = chosen.iter().map(|(_, weight)| weight).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{chosen:?}");
        assert!(chosen.is_sorted_by(|a, b| a.1 >= b.1), "{chosen:?}");
        assert_eq!(chosen[0].0, routing.fitting[0].lineage);
    }
    assert_eq!(routing.top(1)[0].1, 1.0);
}

#[test]
fn two_that_learned_the_same_share_it() {
    let mut router = router(1.0);
    for lineage in ["north", "south"] {
        router.add(&domain(lineage), "Who guards the gate? Brix", ["Who guards the gate?"]).expect("added");
    }
    learn_atlas(&mut router);
    router.calibrate();
    let routing = routed(&router, "who guards the gate");
    assert_eq!(routing.top(3), [(domain("north"), 0.5), (domain("south"), 0.5)]);
    assert_eq!(routing.confidence, 0.5);
}
