//! The description of the API, to be read by people.

use maud::{DOCTYPE, Markup, html};
use serde_json::Value;
use std::collections::BTreeSet;
use utoipa::openapi::OpenApi;

/// Deeper nesting than any schema here has.
const DEPTH_MAX: usize = 6;

/// The page of a description.
pub(super) fn of(api: &OpenApi) -> Markup {
    // As JSON it can be walked without a case for each of its forms.
    let api = serde_json::to_value(api).unwrap_or_default();
    let tags = api["tags"].as_array().cloned().unwrap_or_default();
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { "Engram: the API" }
                link rel="icon" href="/assets/icon.svg" type="image/svg+xml";
                link rel="stylesheet" href="/assets/page.css";
                link rel="stylesheet" href="/assets/docs.css";
            }
            body {
                header.top {
                    img src="/assets/icon.svg" alt="" width="36" height="36";
                    div {
                        h1 { "Engram: the API" }
                        p { (text(&api["info"]["description"])) " For programs: " a href="/openapi.json" { "openapi.json" }
                            ". To look: " a href="/" { "the page" } "." }
                    }
                }
                main.docs {
                    @for tag in &tags { (section(&api, tag)) }
                }
            }
        }
    }
}

fn section(api: &Value, tag: &Value) -> Markup {
    let tagged =
        |operation: &Value| operation["tags"].as_array().is_some_and(|tags| tags.contains(&tag["name"]));
    let paths = api["paths"].as_object().into_iter().flatten();
    html! {
        h2 { (text(&tag["name"])) }
        p.note { (text(&tag["description"])) }
        @for (path, item) in paths {
            @for (verb, operation) in item.as_object().into_iter().flatten().filter(|(_, operation)| tagged(operation)) {
                article { details {
                    summary {
                        span.verb { (verb.to_uppercase()) } code { (path) }
                        span.note { (text(&operation["summary"])) }
                    }
                    (operation_of(api, operation))
                } }
            }
        }
    }
}

fn operation_of(api: &Value, operation: &Value) -> Markup {
    let parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
    let body = &operation["requestBody"]["content"]["application/json"]["schema"];
    html! {
        @if !parameters.is_empty() {
            h3 { "Parameters" }
            table { tbody {
                @for parameter in &parameters {
                    tr {
                        td { code { (text(&parameter["name"])) } " in the " (text(&parameter["in"])) }
                        td { (kind(api, &parameter["schema"], 0)) }
                        td { (text(&parameter["description"])) }
                    }
                }
            } }
        }
        @if !body.is_null() { h3 { "Body" } (fields(api, body, &mut BTreeSet::new())) }
        @for (status, response) in operation["responses"].as_object().into_iter().flatten() {
            h3 { (status) ": " (text(&response["description"])) }
            @if status.starts_with('2') {
                (fields(api, &response["content"]["application/json"]["schema"], &mut BTreeSet::new()))
            }
        }
    }
}

/// The fields of an object, and those of the objects in it that were not told yet.
fn fields(api: &Value, schema: &Value, told: &mut BTreeSet<String>) -> Markup {
    let mut inner = Vec::new();
    objects(api, schema, &mut inner, 0);
    inner.retain(|name| told.insert(name.clone()));
    html! {
        @for name in inner {
            @let schema = &api["components"]["schemas"][&name];
            @if let Some(properties) = schema["properties"].as_object() {
                table {
                    caption { code { (name) } " " (text(&schema["description"])) }
                    tbody { @for (field, of) in properties { tr {
                        td { code { (field) } }
                        td { (kind(api, of, 0)) @if required(schema, field) { ", required" } }
                        td { (text(&of["description"])) }
                    } } }
                }
            }
        }
    }
}

fn required(schema: &Value, field: &str) -> bool {
    schema["required"].as_array().is_some_and(|fields| fields.iter().any(|name| name == field))
}

/// The names of all objects that a schema leads to, itself first.
fn objects(api: &Value, schema: &Value, found: &mut Vec<String>, depth: usize) {
    if depth > DEPTH_MAX {
        return;
    }
    if let Some(name) = reference(schema) {
        if !found.iter().any(|known| known == name) {
            found.push(name.to_owned());
            objects(api, &api["components"]["schemas"][name], found, depth + 1);
        }
        return;
    }
    let properties = schema["properties"].as_object().into_iter().flatten().map(|(_, of)| of);
    let choices = ["oneOf", "anyOf", "allOf"].iter().filter_map(|key| schema[key].as_array()).flatten();
    for part in properties.chain(choices).chain([&schema["items"]]) {
        objects(api, part, found, depth + 1);
    }
}

fn reference(schema: &Value) -> Option<&str> {
    schema["$ref"].as_str().and_then(|path| path.rsplit('/').next())
}

/// What a value may be, in words.
fn kind(api: &Value, schema: &Value, depth: usize) -> String {
    if depth > DEPTH_MAX {
        return "…".to_owned();
    }
    if let Some(name) = reference(schema) {
        let named = &api["components"]["schemas"][name];
        return if named["properties"].is_object() { name.to_owned() } else { kind(api, named, depth + 1) };
    }
    let any = ["oneOf", "anyOf"].iter().find_map(|key| schema[key].as_array());
    if let Some(any) = any {
        let any: Vec<String> = any.iter().map(|of| kind(api, of, depth + 1)).collect();
        return any.join(" or ");
    }
    if let Some(values) = schema["enum"].as_array() {
        return values.iter().map(|value| text(value).to_owned()).collect::<Vec<_>>().join(", ");
    }
    let types = match &schema["type"] {
        Value::String(one) => vec![one.as_str()],
        Value::Array(several) => {
            several.iter().filter_map(Value::as_str).filter(|of| *of != "null").collect()
        }
        _ => vec!["anything"],
    };
    let mut told = types.join(" or ");
    if told == "array" {
        told = format!("array of {}", kind(api, &schema["items"], depth + 1));
    }
    match (schema["minimum"].as_f64(), schema["maximum"].as_f64()) {
        (Some(from), Some(to)) => format!("{told}, {from} to {to}"),
        (Some(from), None) if from != 0.0 => format!("{told}, from {from}"),
        _ => told,
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
