use crate::harness::{Answer, Server};
use serde_json::json;
use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

const DOCUMENTS: &str = "/v1/documents";
const TEXT: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// Route, body, expected status, and the parameter that the error names.
const BAD: &[(&str, &str, u16, Option<&str>)] = &[
    (DOCUMENTS, "", 400, None),
    (DOCUMENTS, "not json", 400, None),
    (DOCUMENTS, "{", 400, None),
    (DOCUMENTS, "[]", 400, None),
    (DOCUMENTS, "7", 400, None),
    (DOCUMENTS, r#"{"text":"a"}{"text":"b"}"#, 400, None),
    (DOCUMENTS, r#"{"text":"a","text":"b"}"#, 400, Some("text")),
    (DOCUMENTS, r#"{"text":"a\u0000b"}"#, 400, Some("text")),
    (DOCUMENTS, r#"{"text":"a","importence":1}"#, 400, Some("importence")),
    (DOCUMENTS, r#"{"text":"a","importance":1e400}"#, 400, Some("importance")),
    (DOCUMENTS, r#"{"text":"a","importance":NaN}"#, 400, Some("importance")),
    (DOCUMENTS, r#"{"text":"a","domain":"../../etc"}"#, 400, Some("domain")),
    (DOCUMENTS, r#"{"text":""}"#, 400, Some("text")),
    (
        DOCUMENTS,
        r#"{"documents":[{"text":"a"},{"text":"b","importance":-1}]}"#,
        400,
        Some("documents[1].importance"),
    ),
    (DOCUMENTS, r#"{"documents":[{"text":"a"},{"text":"b","text":"c"}]}"#, 400, Some("documents[1].text")),
    (DOCUMENTS, r#"{"messages":[{"role":"wizard","content":"a"}]}"#, 400, Some("messages[0].role")),
    (TEXT, "{}", 400, Some("prompt")),
    (TEXT, r#"{"prompt":"a","n":1e9}"#, 400, Some("n")),
    (TEXT, r#"{"prompt":"a","n":1000000000}"#, 400, Some("n")),
    (TEXT, r#"{"prompt":"a","max_tokens":-1}"#, 400, Some("max_tokens")),
    (TEXT, r#"{"prompt":"a","max_tokens":9223372036854775808}"#, 400, Some("max_tokens")),
    (TEXT, r#"{"prompt":"a","max_tokens":1e400}"#, 400, Some("max_tokens")),
    (TEXT, r#"{"prompt":"a","temperature":NaN}"#, 400, Some("temperature")),
    (TEXT, r#"{"prompt":"a","temperature":"NaN"}"#, 400, Some("temperature")),
    (TEXT, r#"{"prompt":"a","temperature":1e400}"#, 400, Some("temperature")),
    (TEXT, r#"{"prompt":"a","n":17}"#, 400, Some("n")),
    (TEXT, r#"{"prompt":"a","n":2,"best_of":3}"#, 400, Some("best_of")),
    (TEXT, r#"{"prompt":"a","min_p":-1}"#, 400, Some("min_p")),
    (TEXT, r#"{"prompt":"a","repetition_penalty":0}"#, 400, Some("repetition_penalty")),
    (TEXT, r#"{"prompt":"a","presence_penalty":2.5}"#, 400, Some("presence_penalty")),
    (TEXT, r#"{"prompt":"a","frequency_penalty":"much"}"#, 400, Some("frequency_penalty")),
    (TEXT, r#"{"prompt":"a","logit_bias":{"1":100.5}}"#, 400, Some("logit_bias")),
    (TEXT, r#"{"prompt":"a","logit_bias":{"one":1}}"#, 400, Some("logit_bias")),
    (TEXT, r#"{"prompt":"a","logprobs":21}"#, 400, Some("logprobs")),
    (TEXT, r#"{"prompt":"a","top_logprobs":1}"#, 400, Some("top_logprobs")),
    (CHAT, r#"{"messages":[{"role":"user","content":"a"}],"logprobs":5}"#, 400, Some("logprobs")),
    (CHAT, r#"{"messages":[{"role":"user","content":"a"}],"top_logprobs":5}"#, 400, Some("top_logprobs")),
    (TEXT, r#"{"prompt":"a","model":"a:heavy"}"#, 400, Some("model")),
    (TEXT, r#"{"prompt":"a","model":"gpt-4.1"}"#, 404, Some("model")),
    (CHAT, r#"{"messages":[]}"#, 400, Some("messages")),
    (
        CHAT,
        r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#,
        400,
        Some("messages[0].content[0].type"),
    ),
    (CHAT, r#"{"messages":[{"role":"user","content":"a"}],"tools":[{}]}"#, 400, Some("tools")),
    ("/v1/adapters/medical/rollback", r#"{"to":"../x"}"#, 400, Some("to")),
    ("/v1/adapters/medical/rollback", r#"{"when":"now"}"#, 400, Some("when")),
    ("/v1/adapters/none/rollback", "{}", 404, None),
    ("/v1/adapters/Medical/rollback", "{}", 400, Some("domain")),
    ("/v1/adapters/medical/import", "{}", 400, Some("adapter_config")),
    (
        "/v1/adapters/medical/import",
        r#"{"adapter_config":{},"adapter_model":"*"}"#,
        400,
        Some("adapter_model"),
    ),
    ("/v1/adapters/medical/merge", "{}", 400, Some("from")),
    ("/v1/adapters/medical/merge", r#"{"from":"auto"}"#, 400, Some("from")),
    ("/v1/adapters/medical/merge", r#"{"from":"a:-1"}"#, 400, Some("from")),
    ("/v1/adapters/medical/merge", r#"{"from":"a","method":"cat"}"#, 400, Some("method")),
    ("/v1/adapters/medical/merge", r#"{"from":"a","method":"svd","rank":-1}"#, 400, Some("rank")),
    ("/v1/adapters/medical/merge", r#"{"from":"a","method":"ties","density":2}"#, 400, Some("density")),
    ("/v1/adapters/medical/merge", r#"{"from":"a","weights":[1]}"#, 400, Some("weights")),
    ("/v1/adapters/Medical/merge", r#"{"from":"a"}"#, 400, Some("domain")),
];

#[test]
fn each_bad_body_is_refused_by_name_and_harms_nobody() {
    let server = Server::start(&[]);
    for (path, body, status, param) in BAD {
        let refused = server.send("POST", path, &[], body.as_bytes());
        assert_eq!((refused.status, refused.param()), (*status, json!(param)), "{path} {body}: {refused:?}");
        refused.assert_error_form();
        server.assert_unharmed(body);
    }
    assert_eq!(server.ledger.head(), 0, "nothing of it was written");
}

#[test]
fn bodies_that_are_not_json_text_are_refused() {
    let server = Server::start(&[]);
    let post = |headers: &[(&str, &str)], body: &[u8]| server.send("POST", DOCUMENTS, headers, body);
    let invalid = post(&[], b"{\"text\":\"\xff\"}");
    assert_eq!(invalid.status, 400);
    invalid.assert_error_form();
    assert_eq!(post(&[], "[".repeat(10_000).as_bytes()).status, 400);
    assert_eq!(post(&[("content-encoding", "gzip")], b"\x1f\x8b").status, 415);
    assert_eq!(post(&[("content-type", "text/plain")], br#"{"text":"a"}"#).status, 415);
    assert_eq!(post(&[("idempotency-key", "a b")], br#"{"text":"a"}"#).param(), json!("Idempotency-Key"));
    assert_eq!(server.ledger.head(), 0);
    let charset = post(&[("content-type", "application/json; charset=utf-8")], br#"{"text":"a"}"#);
    assert_eq!(charset.status, 202);
    let none = "POST /v1/documents HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 12\r\n\r\n{\"text\":\"b\"}";
    assert_eq!(server.raw(none.as_bytes()).status, 202);
}

fn head(path: &str, more: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{more}\r\n\r\n")
}

#[test]
fn too_much_is_413_whether_announced_or_not() {
    let server = Server::start(&[]);
    let long = "a".repeat(10 << 20);
    for (path, field) in [(DOCUMENTS, "text"), (TEXT, "prompt")] {
        let announced = server.post(path, &json!({ field: long }));
        assert_eq!(announced.status, 413, "{announced:?}");
        announced.assert_error_form();
    }
    let chunk = format!("{:x}\r\n{}\r\n", 1 << 20, "a".repeat(1 << 20));
    let chunked = format!("{}{chunk}{chunk}0\r\n\r\n", head(DOCUMENTS, "transfer-encoding: chunked"));
    assert_eq!(server.raw(chunked.as_bytes()).status, 413);
    // A gigabyte that is announced is refused before any of it is sent.
    let announced = server.raw(head(DOCUMENTS, "content-length: 1073741824").as_bytes());
    assert_eq!(announced.status, 413);
    let document = server.post(DOCUMENTS, &json!({"text": "b".repeat(70_000)}));
    assert_eq!(document.status, 413, "{document:?}");
    server.assert_unharmed("bodies that are too large");
}

/// Sends the head and then chunks without an end; gives what was answered before the server hung up.
fn endless(server: &Server, head: &str) -> String {
    let mut stream = server.connect();
    stream.write_all(head.as_bytes()).expect("sent");
    let mut reader = stream.try_clone().expect("a second handle");
    let answered = thread::spawn(move || {
        let mut answer = Vec::new();
        let _ = reader.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    });
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
    let end = Instant::now() + Duration::from_secs(30);
    while stream.write_all(chunk.as_bytes()).is_ok() {
        assert!(Instant::now() < end, "{head} is read without an end");
        thread::sleep(Duration::from_millis(10));
    }
    answered.join().expect("read")
}

#[test]
fn a_refused_body_without_an_end_is_hung_up_on() {
    let server = Server::start(&[]);
    for (path, status) in [(DOCUMENTS, "413"), ("/v1/nothing", "404"), ("/v1/models", "405")] {
        let answer = endless(&server, &head(path, "transfer-encoding: chunked"));
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{path}: {answer}");
        assert!(answer.to_ascii_lowercase().contains("connection: close"), "{path}: {answer}");
    }
    // Forms: one that is too large, one with no beginning, and one that says nothing of where its parts end.
    let small = Server::start(&["gateway.upload_bytes_max=4096"]);
    let part = "content-disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\n";
    let part = format!("{:x}\r\n--b\r\n{part}\r\n", part.len() + 5);
    for (kind, begin, status) in
        [("; boundary=b", part.as_str(), "413"), ("; boundary=b", "", "4"), ("", "", "400")]
    {
        let more = format!("transfer-encoding: chunked\r\ncontent-type: multipart/form-data{kind}");
        let answer = endless(&small, &(head(DOCUMENTS, &more) + begin));
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{kind}: {answer}");
        assert!(answer.to_ascii_lowercase().contains("connection: close"), "{kind}: {answer}");
    }
    let server = Server::start(&["gateway.api_keys=a-key-of-sixteen-bytes"]);
    let answer = endless(&server, &head(DOCUMENTS, "transfer-encoding: chunked"));
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
}

#[test]
fn a_body_in_chunks_is_read() {
    let server = Server::start(&[]);
    let request =
        head(DOCUMENTS, "transfer-encoding: chunked") + "7\r\n{\"text\"\r\n5\r\n:\"a\"}\r\n0\r\n\r\n";
    assert_eq!(server.raw(request.as_bytes()).status, 202);
}

#[test]
fn a_body_that_does_not_come_is_408_and_keeps_nobody_waiting() {
    let server = Server::start(&["gateway.body_seconds_max=3"]);
    let start = Instant::now();
    let mut stalled: Vec<_> = (0..20).map(|_| server.connect()).collect();
    for stream in &mut stalled {
        let head = head(DOCUMENTS, "content-length: 100000");
        stream.write_all((head + "{\"text\":").as_bytes()).expect("sent");
    }
    server.assert_unharmed("stalled bodies");
    assert!(start.elapsed() < Duration::from_secs(3), "others were kept waiting");
    for stream in &mut stalled {
        let slow = Answer::read(stream);
        assert_eq!(slow.status, 408, "{slow:?}");
        slow.assert_error_form();
    }
}

#[test]
fn a_body_that_drips_is_408() {
    let server = Server::start(&["gateway.body_seconds_max=2"]);
    let mut stream = server.connect();
    stream.write_all(head(DOCUMENTS, "content-length: 1000").as_bytes()).expect("sent");
    for _ in 0..25 {
        // Once it is refused, the rest of the body has nowhere to go.
        let _ = stream.write_all(b" ");
        thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(Answer::read(&mut stream).status, 408);
}

#[test]
fn a_head_that_does_not_come_is_408() {
    let server = Server::start(&["gateway.header_seconds_max=1"]);
    let mut stream = server.connect();
    stream.write_all(b"POST /v1/documents HTTP/1.1\r\nhost: loc").expect("sent");
    assert_eq!(Answer::read(&mut stream).status, 408);
}

#[test]
fn a_body_that_ends_early_writes_nothing() {
    let server = Server::start(&[]);
    let mut stream = server.connect();
    let head = head(DOCUMENTS, "content-length: 100");
    stream.write_all((head + "{\"text\":\"a\"}").as_bytes()).expect("sent");
    drop(stream);
    server.assert_unharmed("a body that ended early");
    assert_eq!(server.ledger.head(), 0);
}
