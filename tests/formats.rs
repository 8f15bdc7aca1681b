//! `response_format`: what is answered is JSON of the form that was asked for, whatever the model would rather say.

use crate::harness::{Answer, Server, Setup};
use serde_json::{Value, json};

/// Of so few letters that an answer fits into the tiny base's context.
fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "kind": {"enum": ["cat", "owl"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
            "note": {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}]},
        },
        "required": ["kind", "age", "tags", "note"],
        "additionalProperties": false,
        "$defs": {"tag": {"type": "boolean"}},
    })
}

fn fits(text: &str) -> bool {
    let Ok(value) = serde_json::from_str::<Value>(text) else { return false };
    let tags = value["tags"].as_array();
    value.as_object().is_some_and(|fields| fields.keys().eq(["kind", "age", "tags", "note"]))
        && (value["kind"] == "cat" || value["kind"] == "owl")
        && value["age"].as_u64().is_some_and(|age| age <= 99)
        && tags.is_some_and(|tags| tags.len() <= 2 && tags.iter().all(Value::is_boolean))
        && (value["note"].is_null() || value["note"].as_str().is_some_and(|note| note.chars().count() <= 4))
}

fn named(schema: &Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": true}})
}

fn ask(server: &Server, format: &Value, more: Value) -> Answer {
    let mut body = json!({
        "model": "base", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 240,
        "response_format": format,
    });
    body.as_object_mut().expect("fields").extend(more.as_object().expect("fields").clone());
    server.post("/v1/chat/completions", &body)
}

#[test]
fn every_answer_is_json_that_fits_its_schema() {
    let server = Setup::tiny().set("base.threads=1").start();
    let format = named(&schema());
    let mut texts = Vec::new();
    // Not at temperature 0: a model that has learned nothing indents as far as it may, beyond so small a context.
    for (temperature, seed) in (0..6).map(|seed| (1.0, seed)).chain([(2.0, 6)]) {
        let more =
            json!({"temperature": temperature, "seed": seed, "n": 2, "logprobs": true, "top_logprobs": 5});
        let answer = ask(&server, &format, more).ok();
        for choice in answer["choices"].as_array().expect("choices") {
            let text = choice["message"]["content"].as_str().expect("a text");
            assert!(fits(text), "{text}");
            assert_eq!(choice["finish_reason"], "stop", "{text}");
            let tokens = choice["logprobs"]["content"].as_array().expect("tokens");
            let spelled: String = tokens.iter().filter_map(|token| token["token"].as_str()).collect();
            assert!(text.is_ascii() <= (spelled == text), "{spelled} is not {text}");
            let told =
                tokens.iter().flat_map(|token| token["top_logprobs"].as_array().expect("alternatives"));
            assert!(
                told.clone().all(|told| told["logprob"].as_f64().is_some_and(|x| x <= 0.0)),
                "{tokens:?}"
            );
            texts.push(text.to_owned());
        }
    }
    assert!(texts.iter().any(|text| *text != texts[0]), "{texts:?}");
}

#[test]
fn a_stream_is_the_same_answer_and_too_few_tokens_cut_it() {
    let server = Setup::tiny().set("base.threads=1").start();
    let format = named(&schema());
    let whole = ask(&server, &format, json!({"seed": 3})).ok()["choices"][0]["message"]["content"].clone();
    let whole = whole.as_str().expect("a text");
    let body = json!({
        "model": "base", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 240, "seed": 3,
        "response_format": format, "stream": true,
    });
    let request = ureq::post(format!("{}/v1/chat/completions", server.url()));
    let mut answer = request.content_type("application/json").send(body.to_string()).expect("an answer");
    let events = answer.body_mut().read_to_string().expect("events");
    let chunks = events
        .split("\n\n")
        .filter_map(|event| serde_json::from_str::<Value>(event.strip_prefix("data: ")?).ok());
    let (mut told, mut reason) = (String::new(), Value::Null);
    for chunk in chunks {
        told += chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
        reason = chunk["choices"][0]["finish_reason"].clone();
    }
    assert_eq!((told.as_str(), reason), (whole, json!("stop")));
    let cut = ask(&server, &format, json!({"seed": 3, "max_tokens": 5})).ok();
    assert_eq!(cut["choices"][0]["finish_reason"], "length");
    let text = cut["choices"][0]["message"]["content"].as_str().expect("a text");
    assert!(whole.starts_with(text) && text.len() == 5, "{text}");

    let object = ask(&server, &json!({"type": "json_object"}), json!({"seed": 1, "temperature": 0})).ok();
    assert!(object["choices"][0]["message"]["content"].as_str().is_some_and(|text| text.starts_with('{')));
    let text = ask(&server, &json!({"type": "text"}), json!({"seed": 1, "max_tokens": 4})).ok();
    assert!(!fits(text["choices"][0]["message"]["content"].as_str().expect("a text")));
}

#[test]
fn what_no_answer_can_be_held_to_is_refused_streamed_or_not() {
    let server = Setup::tiny().set("base.threads=1").start();
    let before = ask(&server, &named(&schema()), json!({"seed": 1})).ok()["choices"].clone();
    for schema in [
        json!({"type": "wizard"}),
        json!({"type": "array", "uniqueItems": true}),
        json!({"type": "string", "pattern": "("}),
        json!({"type": "integer", "minimum": 2, "maximum": 1}),
        json!({"$ref": "https://example.com/schema"}),
        json!({"oneOf": [{"type": "integer"}, {"type": "number"}]}),
    ] {
        for stream in [false, true] {
            let answer = ask(&server, &named(&schema), json!({"stream": stream}));
            assert_eq!(answer.status, 400, "{schema}: {answer:?}");
            let error = &answer.body["error"];
            assert_eq!(error["param"], "response_format", "{answer:?}");
            assert!(error["message"].as_str().is_some_and(|message| message.len() > 20), "{answer:?}");
        }
    }
    for (format, param) in [
        (json!({"type": "yaml"}), "response_format.type"),
        (json!({"type": "json_schema"}), "response_format.json_schema"),
        (json!({"type": "json_object", "schema": {}}), "response_format.schema"),
    ] {
        let answer = ask(&server, &format, json!({}));
        assert_eq!((answer.status, &answer.body["error"]["param"]), (400, &json!(param)), "{answer:?}");
    }
    // They leave nothing behind.
    assert_eq!(ask(&server, &named(&schema()), json!({"seed": 1})).ok()["choices"], before);
    let metrics = server.text("/metrics");
    assert!(metrics.contains("engram:num_requests_waiting 0"), "{metrics}");
}
