use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::*;
use crate::golden;
use crate::sampling::{Sampler, Sampling};

/// Vocabularies of bytes, of pieces with single bytes beside them, and with text that was added later.
fn tokenizers() -> Vec<(String, Tokenizer)> {
    let nano = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/models/nano")).to_owned();
    let shared = ["tokenizers/phi-3", "tokenizers/gpt2", "tokenizers/gpt-neox", "models/stories260K"];
    let folders: Vec<PathBuf> = shared.into_iter().filter_map(golden::shared).chain([nano]).collect();
    folders.into_iter().map(|dir| (dir.display().to_string(), Tokenizer::load(&dir).unwrap())).collect()
}

/// The grammars of a tokenizer, with logits beyond its tokens, as padded models have them.
fn grammars(tokenizer: &Tokenizer) -> Grammars {
    Grammars::new(tokenizer, tokenizer.largest_id() as usize + 40, tokenizer.eos_ids().to_vec())
}

fn nano() -> (Tokenizer, Grammars) {
    let (_, tokenizer) = tokenizers().pop().unwrap();
    let grammars = grammars(&tokenizer);
    (tokenizer, grammars)
}

/// What a model says that has no opinion but for these biases, and whether the grammar ended it.
fn said(tokenizer: &Tokenizer, grammars: &Grammars, schema: &Value, sampling: Sampling) -> (String, bool) {
    let grammar = Some(grammars.compile(&schema.to_string()).unwrap());
    let mut sampler = Sampler::new(Sampling { grammar, ..sampling }, &[]);
    let mut bytes = Vec::new();
    for _ in 0..2000 {
        let chosen = sampler.choose(vec![0.0; grammars.vocabulary]).unwrap();
        if tokenizer.eos_ids().contains(&chosen.id) {
            return (String::from_utf8(bytes).unwrap(), false);
        }
        bytes.extend(tokenizer.bytes(chosen.id));
        if chosen.last {
            return (String::from_utf8(bytes).unwrap(), true);
        }
    }
    panic!("no end: {}", String::from_utf8_lossy(&bytes));
}

fn warm(seed: u64) -> Sampling {
    Sampling { temperature: 1.0, seed, ..Sampling::default() }
}

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "home": {"$ref": "#/$defs/home"},
            "pets": {"type": "array", "items": {"enum": ["猫", "🦙", "naïve dog"]}, "maxItems": 3},
            "note": {"anyOf": [{"type": "string", "pattern": "^[a-z]{2,5}$"}, {"type": "null"}]},
        },
        "required": ["name", "age", "home", "pets", "note"],
        "additionalProperties": false,
        "$defs": {"home": {"type": "object", "properties": {"street": {"const": "Höhenweg 7"}},
            "required": ["street"], "additionalProperties": false}},
    })
}

/// Whether it is what `person` describes.
fn fits(value: &Value) -> bool {
    let pets = value["pets"].as_array().unwrap();
    let note = value["note"].as_str().is_none_or(|note| {
        (2..=5).contains(&note.len()) && note.bytes().all(|byte| byte.is_ascii_lowercase())
    });
    value.as_object().unwrap().keys().eq(["name", "age", "home", "pets", "note"])
        && value["name"].as_str().unwrap().chars().count() <= 12
        && value["age"].as_u64().unwrap() <= 130
        && value["home"] == json!({"street": "Höhenweg 7"})
        && pets.len() <= 3
        && pets.iter().all(|pet| ["猫", "🦙", "naïve dog"].contains(&pet.as_str().unwrap()))
        && note
}

#[test]
fn whatever_is_said_fits_the_schema_with_every_kind_of_vocabulary() {
    for (name, tokenizer) in tokenizers() {
        let grammars = grammars(&tokenizer);
        let texts: Vec<String> =
            (0..20).map(|seed| said(&tokenizer, &grammars, &person(), warm(seed)).0).collect();
        for text in &texts {
            let value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{name}: {error}: {text}"));
            assert!(fits(&value), "{name}: {text}");
        }
        assert!(texts.iter().any(|text| *text != texts[0]), "{name}: {}", texts[0]);
    }
}

#[test]
fn an_answer_ends_where_nothing_can_follow_or_with_an_end_token_where_it_may() {
    let (tokenizer, grammars) = nano();
    let (text, last) = said(&tokenizer, &grammars, &json!({"const": {"a": [1]}}), Sampling::default());
    assert_eq!((serde_json::from_str::<Value>(&text).unwrap(), last), (json!({"a": [1]}), true));
    let number = json!({"type": "integer", "minimum": 1, "maximum": 10_000_000});
    let end = tokenizer.eos_ids()[0];
    let ends = Sampling { logit_bias: [(end, 100.0)].into(), ..warm(1) };
    let (text, last) = said(&tokenizer, &grammars, &number, ends);
    assert!(!text.is_empty() && !last, "an empty answer is no number: {text}");
    // A model without an end token goes on to where nothing can follow.
    let endless = Grammars::new(&tokenizer, grammars.vocabulary, Vec::new());
    let grammar = Some(endless.compile(&number.to_string()).unwrap());
    let mut sampler = Sampler::new(Sampling { grammar, ..warm(1) }, &[]);
    let last = (0..9).any(|_| sampler.choose(vec![0.0; endless.vocabulary]).unwrap().last);
    assert!(last);
}

#[test]
fn no_bias_leads_out_of_the_grammar_nor_into_endless_space() {
    let (tokenizer, grammars) = nano();
    let of = |text: &str| tokenizer.encode_continuation(text).unwrap();
    let mut logit_bias: std::collections::BTreeMap<u32, f64> =
        of(" \n\t\r  Hello }}]],").into_iter().map(|id| (id, 100.0)).collect();
    logit_bias.extend(of("\"name").into_iter().map(|id| (id, -100.0)));
    for temperature in [0.0, 1.0] {
        let sampling = Sampling { logit_bias: logit_bias.clone(), temperature, ..Sampling::default() };
        let (text, _) = said(&tokenizer, &grammars, &person(), sampling);
        assert!(fits(&serde_json::from_str(&text).unwrap()), "{text}");
        assert!(text.len() < 1000, "{text}");
    }
}

#[test]
fn only_what_may_follow_has_a_logprob() {
    let (tokenizer, grammars) = nano();
    let grammar = Some(grammars.compile(r#"{"type":"boolean"}"#).unwrap());
    let sampling = Sampling { logprobs: Some(20), grammar, ..Sampling::default() };
    let chosen = Sampler::new(sampling, &[]).choose(vec![0.0; grammars.vocabulary]).unwrap();
    let (logprob, top) = chosen.logprobs.unwrap();
    // "t", "f", and what begins like "true" and "false".
    assert!((2..12).contains(&top.len()), "{top:?}");
    for token in &top {
        let bytes = tokenizer.bytes(token.id);
        assert!(b"true".starts_with(&bytes) || b"false".starts_with(&bytes), "{bytes:?}");
        assert_eq!(token.logprob, logprob);
    }
    let sum: f32 = top.iter().map(|token| token.logprob.exp()).sum();
    assert!((sum - 1.0).abs() < 1e-5, "{sum}");
}

#[test]
fn what_cannot_be_held_to_is_refused_in_a_line() {
    let (_, grammars) = nano();
    let one_of = json!({"oneOf": [{"type": "integer"}, {"type": "number"}]});
    for (schema, word) in [
        (json!([]), "an object"),
        (json!({"type": "thing"}), "thing"),
        (json!({"type": 1}), "type must be"),
        (json!({"type": "array", "uniqueItems": true}), "uniqueItems"),
        (json!({"type": "object", "if": {}, "then": {}}), "if"),
        (json!({"type": "string", "format": "haiku"}), "haiku"),
        (json!({"type": "string", "pattern": "("}), ""),
        (json!({"type": "integer", "minimum": 2, "maximum": 1}), ""),
        (json!({"enum": []}), ""),
        (json!({"$ref": "https://example.com/schema"}), "$ref"),
        (json!({"$ref": "#/$defs/none"}), "none"),
        (json!({"x-guidance": {"lenient": true}}), "x-guidance"),
        (one_of, "use anyOf"),
    ] {
        let error = grammars.compile(&schema.to_string()).expect_err("must be refused").to_string();
        assert!(error.contains(word) && !error.contains(['\n', '\x1b']), "{schema}: {error}");
        assert!(!error.is_empty() && error.len() < 400, "{schema}: {error}");
    }
}

#[test]
fn a_schema_that_is_too_much_costs_little() {
    let (_, grammars) = nano();
    let mut nested = json!({"type": "null"});
    for _ in 0..40 {
        nested = json!({"anyOf": [{"type": "array", "items": nested, "maxItems": 9}, {"const": "x"}]});
    }
    let many: Vec<Value> = (0..3000).map(|n| json!(format!("name {n}"))).collect();
    for schema in [
        json!({"type": "string", "pattern": "^((a|b|cc){1,900}){1,900}$"}),
        json!({"type": "string", "minLength": 1_000_000_000}),
        json!({"type": "array", "items": {"type": "null"}, "minItems": 1_000_000_000}),
        json!({"enum": many}),
        nested,
    ] {
        let start = Instant::now();
        let _ = grammars.compile(&schema.to_string());
        let took = start.elapsed();
        assert!(took < Duration::from_secs(10), "{took:?}: {}", &schema.to_string()[..60]);
    }
}
