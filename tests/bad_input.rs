//! Bad requests get a clear 4xx in OpenAI's form, and harm nobody else.

use crate::harness::{Server, Setup, sentence};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);
const JSON: (&str, &str) = ("content-type", "application/json");

/// Sends raw bytes and checks the form of the refusal.
fn refused(server: &Server, method: &str, path: &str, body: &[u8], headers: &[(&str, &str)], expected: u16) {
    let told = || format!("{method} {path} {:?}", String::from_utf8_lossy(&body[..body.len().min(120)]));
    let body = (method != "GET" && method != "DELETE").then(|| body.to_vec());
    let answer =
        server.try_request(method, path, body, headers).unwrap_or_else(|error| panic!("{}: {error}", told()));
    assert_eq!(answer.status, expected, "{}: {answer:?}", told());
    let error = &answer.body["error"];
    assert!(error["message"].as_str().is_some_and(|message| message.len() > 5), "{}: {answer:?}", told());
    for field in ["type", "param", "code"] {
        assert!(error.get(field).is_some(), "{}: no {field} in {answer:?}", told());
    }
}

#[test]
fn bad_bodies_ids_and_parameters_are_refused_with_a_reason() {
    let server = Setup::tiny().start();
    let deep = format!("{}1{}", "[".repeat(10_000), "]".repeat(10_000));
    let documents: [(&[u8], u16); 14] = [
        (b"", 400),
        (b"{", 400),
        (b"null", 400),
        (b"{\"text\":\"caf\xe9\"}", 400),
        (deep.as_bytes(), 400),
        (b"{\"text\":\"a\",\"text\":\"b\"}", 400),
        (b"{\"text\":\"\"}", 400),
        (b"{\"text\":7}", 400),
        (b"{\"documents\":[]}", 400),
        (b"{\"documents\":[{\"text\":\"fine\"},{\"text\":null}]}", 400),
        (b"{\"text\":\"a\",\"domain\":\"../etc\"}", 400),
        (b"{\"text\":\"a\",\"importance\":1e999}", 400),
        (b"{\"text\":\"a\",\"colour\":\"red\"}", 400),
        (b"{\"prompt\":\"only\"}", 400),
    ];
    for (body, status) in documents {
        refused(&server, "POST", "/v1/documents", body, &[JSON], status);
    }
    let large = json!({"text": "long ".repeat(20_000)}).to_string();
    refused(&server, "POST", "/v1/documents", large.as_bytes(), &[JSON], 413);
    let huge = json!({"text": "x".repeat(3 << 20)}).to_string();
    refused(&server, "POST", "/v1/documents", huge.as_bytes(), &[JSON], 413);
    let many = json!({"documents": vec![json!({"text": "a"}); 101]}).to_string();
    refused(&server, "POST", "/v1/documents", many.as_bytes(), &[JSON], 400);
    refused(&server, "POST", "/v1/documents", b"{\"text\":\"a\"}", &[JSON, ("idempotency-key", "a b")], 400);
    refused(&server, "POST", "/v1/documents", b"text", &[("content-type", "text/html")], 415);
    refused(&server, "GET", "/v1/documents/nowhere", b"", &[], 404);
    refused(&server, "GET", "/v1/documents/a%20b", b"", &[], 400);
    refused(&server, "GET", "/v1/documents?limit=-1", b"", &[], 400);
    refused(&server, "GET", "/v1/documents?says=%20", b"", &[], 400);
    refused(&server, "DELETE", "/v1/documents/nowhere", b"", &[], 404);
    refused(&server, "GET", "/v1/nothing", b"", &[], 404);
    refused(&server, "PUT", "/v1/documents", b"{}", &[JSON], 405);

    let ids = server.submit(&[json!({"text": sentence(1)})]);
    assert_eq!(server.settle(&ids, PATIENCE)[0]["status"], "live", "the neighbours go on");
}

#[test]
fn parameters_out_of_range_are_refused_before_any_work() {
    let server = Setup::tiny().start();
    let bad: [(&str, Value); 22] = [
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(9_223_372_036_854_775_807_i64)),
        ("max_tokens", json!(1.5)),
        ("n", json!(1_000_000_000)),
        ("n", json!(0)),
        ("n", json!(17)),
        ("logit_bias", json!({"257": 1})),
        ("presence_penalty", json!(2.1)),
        ("logprobs", json!(21)),
        ("temperature", json!(-0.1)),
        ("temperature", json!("NaN")),
        ("temperature", json!(1e30)),
        ("top_p", json!(0)),
        ("top_p", json!(1.1)),
        ("stop", json!(["a", "b", "c", "d", "e"])),
        ("stop", json!([1])),
        ("seed", json!("x")),
        ("stream", json!("yes")),
        ("model", json!(7)),
        ("model", json!("base:nan")),
        ("prompt", json!({})),
        ("prompt", Value::Null),
    ];
    for (name, value) in bad {
        let mut body = json!({"model": "base", "prompt": "A miller", "max_tokens": 1});
        body[name] = value;
        refused(&server, "POST", "/v1/completions", body.to_string().as_bytes(), &[JSON], 400);
    }
    for model in ["nobody", "../base", "nobody@0123456789abcdef"] {
        let body = json!({"model": model, "prompt": "a"}).to_string();
        refused(&server, "POST", "/v1/completions", body.as_bytes(), &[JSON], 404);
    }
    for messages in
        [json!([]), json!([{"role": "wizard", "content": "a"}]), json!("hi"), json!([{"role": "user"}])]
    {
        let body = json!({"model": "base", "messages": messages}).to_string();
        refused(&server, "POST", "/v1/chat/completions", body.as_bytes(), &[JSON], 400);
    }
    let control = server.complete("base", "<|endoftext|> as plain text", 1);
    assert!(control.len() <= 8, "{control}");
    let long = json!({"model": "base", "prompt": "y ".repeat(100_000)}).to_string();
    refused(&server, "POST", "/v1/completions", long.as_bytes(), &[JSON], 400);
}

#[test]
fn more_answers_than_can_ever_run_are_refused() {
    let server = Setup::tiny().set("infer.max_running=1").set("infer.queue_max=1").start();
    let ask = |n| json!({"model": "base", "prompt": "A miller", "max_tokens": 2, "n": n});
    refused(&server, "POST", "/v1/completions", ask(3).to_string().as_bytes(), &[JSON], 400);
    let choices = server.post("/v1/completions", &ask(2)).ok()["choices"].clone();
    assert_eq!(choices.as_array().map(Vec::len), Some(2));
}

#[test]
fn bad_adapters_are_refused_and_nothing_is_served_of_them() {
    let server = Setup::tiny().start();
    let path = "/v1/adapters/guest/import";
    for body in [
        json!({}),
        json!({"adapter_config": {}, "adapter_model": "!!!"}),
        json!({"adapter_config": {}, "adapter_model": ""}),
        json!({"adapter_config": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}, "adapter_model": "AAAA"}),
    ] {
        refused(&server, "POST", path, body.to_string().as_bytes(), &[JSON], 400);
    }
    let told = server.post(path, &json!({"adapter_config": {}, "adapter_model": "AAAA"})).body.to_string();
    assert!(told.contains("adapter_config.json: ") && !told.contains("/adapter_config.json"), "{told}");
    refused(&server, "POST", "/v1/adapters/Guest/import", b"{}", &[JSON], 400);
    refused(&server, "POST", "/v1/adapters/guest/rollback", b"{}", &[JSON], 404);
    refused(&server, "GET", "/v1/adapters/guest/export", b"", &[], 404);
    refused(&server, "GET", "/v1/adapters/guest/export?generation=zz", b"", &[], 404);
    refused(&server, "GET", "/v1/adapters/guest/log", b"", &[], 404);
    let models = server.get("/v1/models").ok();
    assert!(!models.to_string().contains("guest"), "{models}");
}

#[test]
fn what_is_not_http_is_hung_up_on_and_the_rest_served() {
    let server = Setup::tiny().start();
    for bytes in [
        &b"\0\0\0\0\0\0"[..],
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/documents HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
    ] {
        let mut stream = TcpStream::connect(server.address()).expect("connected");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        stream.write_all(bytes).expect("sent");
        let mut answer = Vec::new();
        // Hung up on or refused: either is fine, as long as it ends.
        let _ = stream.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP/1.1 2") && !answer.starts_with(b"HTTP/1.1 5"), "{answer:?}");
    }
    assert_eq!(server.get("/livez").status, 200);
}
