//! The description of the API, held against what is routed and read.

use crate::harness::Server;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Set to write the snapshot anew, after a change of the API that is meant.
const REGENERATE: &str = "ENGRAM_REGENERATE_GOLDEN";

fn described(server: &Server) -> Value {
    server.get("/openapi.json").json()
}

#[test]
fn the_description_is_what_was_agreed_on() {
    let server = Server::start(&[]);
    let mut told = described(&server);
    told["info"]["version"] = json!("");
    told.sort_all_objects();
    let told = format!("{}\n", serde_json::to_string_pretty(&told).expect("JSON"));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/openapi.json");
    if std::env::var_os(REGENERATE).is_some() {
        fs::write(&path, &told).expect("written");
    }
    let agreed = fs::read_to_string(&path).expect("the snapshot");
    assert!(told == agreed, "the API's description has changed; if that is meant, set {REGENERATE}=1 once");
}

/// A value that the schema of a field allows.
fn example(api: &Value, schema: &Value) -> Value {
    if let Some(path) = schema["$ref"].as_str() {
        let name = path.rsplit('/').next().unwrap_or_default();
        return example(api, &api["components"]["schemas"][name]);
    }
    if let Some(first) = ["oneOf", "anyOf"].iter().find_map(|key| schema[key].as_array()) {
        let real = first.iter().find(|of| of["type"] != "null").unwrap_or(&Value::Null);
        return example(api, real);
    }
    if let Some(values) = schema["enum"].as_array() {
        return values[values.len() - 1].clone();
    }
    let kind = schema["type"].as_array().map_or(&schema["type"], |kinds| &kinds[0]);
    match kind.as_str() {
        Some("boolean") => json!(true),
        Some("integer" | "number") => json!(1),
        Some("array") => json!([example(api, &schema["items"])]),
        Some("object") => {
            let required = schema["required"].as_array().cloned().unwrap_or_default();
            let properties = schema["properties"].as_object().cloned().unwrap_or_default();
            let wanted = properties.into_iter().filter(|(name, _)| required.contains(&json!(name)));
            wanted.map(|(name, of)| (name, example(api, &of))).collect()
        }
        _ if schema["pattern"] == "^text$" => json!("text"),
        _ if schema["pattern"] == "^[0-9a-f]{16}$" => json!("00000000000000bb"),
        _ => json!("a"),
    }
}

#[test]
fn each_field_that_is_described_is_read_and_no_other() {
    let server = Server::start(&[]);
    let api = described(&server);
    let mut fields = 0;
    for (path, item) in api["paths"].as_object().expect("paths") {
        let schema = &item["post"]["requestBody"]["content"]["application/json"]["schema"];
        let Some(name) = schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()) else { continue };
        // A submission is a document, or a list of them.
        let name = if name == "Submission" { "Document" } else { name };
        let schema = &api["components"]["schemas"][name];
        assert_eq!(schema["additionalProperties"], false, "{name}");
        let path = path.replace("{domain}", "medical");
        let mut whole = example(&api, schema);
        match name {
            "Document" => whole["text"] = json!("a"),
            "Tokenize" => whole["prompt"] = json!("a"),
            "ImportRequest" => whole["adapter_model"] = json!("AJ//"),
            "MergeRequest" => whole["from"] = json!("a+b"),
            "FeedbackRequest" => (whole["prompt"], whole["completion"]) = (json!("a"), json!("b")),
            _ => {}
        }
        for (field, of) in schema["properties"].as_object().expect("properties") {
            // Beside all that has to be there, so that reading comes as far as this field.
            let mut body = whole.clone();
            // What a document holds excludes what it could have held in its place.
            match (name, field.as_str()) {
                (_, "add_generation_prompt") => {
                    body = json!({"messages": [{"role": "user", "content": "a"}]});
                }
                ("Document", "messages") => body = json!({}),
                ("Document", "prompt" | "completion") => body = json!({"prompt": "a", "completion": "a"}),
                ("FeedbackRequest", "messages") => body = json!({"rating": "good"}),
                _ => {}
            }
            body[field] = match field.as_str() {
                "adapter_model" | "from" => whole[field].clone(),
                _ => example(&api, of),
            };
            let answer = server.post(&path, &body);
            assert!(!answer.body.contains("unknown field"), "{path} {field}: {answer:?}");
            assert!(!answer.body.contains("not supported"), "{path} {field}: {answer:?}");
            fields += 1;
        }
        let mut body = whole;
        body["not_a_field"] = json!(1);
        assert_eq!(server.post(&path, &body).param(), "not_a_field", "{path} {body}");
    }
    assert!(fields > 50, "{fields} fields were looked at");
}

#[test]
fn every_route_is_described_and_every_description_routed() {
    let server = Server::start(&[]);
    let api = described(&server);
    let mut told = BTreeSet::new();
    for (path, item) in api["paths"].as_object().expect("paths") {
        let methods: BTreeSet<String> =
            item.as_object().expect("methods").keys().map(|m| m.to_uppercase()).collect();
        let real = path.replace("{domain}", "medical").replace("{id}", "some");
        // The wrong method tells which are right.
        let allow = server.send("PATCH", &real, &[], b"");
        assert_eq!(allow.status, 405, "{path}");
        let routed = allow.header("allow").expect("methods").split(", ").map(str::to_owned).collect();
        assert_eq!(methods, routed, "{path}");
        told.insert(path.clone());
    }
    let source = include_str!("../../src/routes.rs");
    let routed = source.split("at(\"").skip(1).filter_map(|rest| rest.split('"').next());
    let of_the_page = ["/", "/events", "/found", "/assets/{name}", "/openapi.json", "/docs"];
    let routed: BTreeSet<String> =
        routed.filter(|path| !of_the_page.contains(path)).map(str::to_owned).collect();
    assert_eq!(told, routed);
}

#[test]
fn the_description_can_be_read_by_people() {
    let server = Server::start(&[]);
    let page = server.get("/docs");
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    for shown in [
        "/v1/chat/completions",
        "Forgets a document",
        "repetition_penalty",
        "number, 0.1 to 10",
        "openapi.json",
    ] {
        assert!(page.body.contains(shown), "{shown} is not in {}", page.body);
    }
    assert!(!page.body.contains("<script"), "it needs none");
}
