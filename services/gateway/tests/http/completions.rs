use crate::harness::{Server, eventually};
use proto::Adapters;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::sync::atomic::Ordering;

/// The events of a stream, each checked for its framing; the last is `[DONE]`.
pub fn events(body: &str) -> Vec<Value> {
    let mut events: Vec<&str> = body.split("\n\n").collect();
    assert_eq!(events.pop(), Some(""), "the last event is closed: {body:?}");
    assert_eq!(events.pop(), Some("data: [DONE]"), "{body:?}");
    let data = |event: &&str| {
        let data = event.strip_prefix("data: ").unwrap_or_else(|| panic!("{event:?}"));
        assert!(!data.contains('\n'), "{event:?}");
        serde_json::from_str(data).expect("JSON")
    };
    events.iter().map(data).collect()
}

pub fn chat(prompt: &str, more: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": prompt}]});
    for (field, value) in more.as_object().expect("fields") {
        body[field] = value.clone();
    }
    body
}

#[test]
fn a_whole_chat_answer_has_openais_form() {
    let server = Server::start(&[]);
    let answer = server.post("/v1/chat/completions", &chat("hi", json!({"model": "medical"}))).json();
    assert_eq!(answer["object"], "chat.completion");
    assert!(answer["id"].as_str().is_some_and(|id| id.starts_with("chatcmpl-")), "{answer}");
    assert_eq!(answer["model"], "medical");
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["content"], "Hello\n\"wörld\"");
    assert_eq!((&choice["message"]["role"], &choice["finish_reason"]), (&json!("assistant"), &json!("stop")));
    let usage = json!({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5});
    assert_eq!(answer["usage"], usage);
    assert_eq!(answer["engram"]["adapters"][0]["domain"], "medical");
    assert_eq!(answer["engram"]["confidence"], 0.75);
    assert!(answer["system_fingerprint"].as_str().is_some_and(|print| print.starts_with("fp_")), "{answer}");
}

#[test]
fn an_answer_names_the_documents_that_it_is_from() {
    let server = Server::start(&[]);
    let given = json!({"text": "The ladder is behind the shed.", "source": "shed.md"});
    let id = server.post("/v1/documents", &given).json()["id"].clone();
    let one = |choice: u32| json!({"choice": choice, "document": id, "source": "shed.md", "likely": 0.75});
    let whole = server.post("/v1/chat/completions", &chat("cite", json!({"n": 2}))).json();
    assert_eq!(whole["engram"]["sources"], json!([one(0), one(1)]), "what is no longer there is not named");
    let streamed = server.post("/v1/completions", &json!({"prompt": "cite", "n": 2, "stream": true}));
    let told: Vec<Value> = events(&streamed.body)
        .iter()
        .filter(|event| event["choices"][0]["finish_reason"] == "stop")
        .map(|event| event["engram"]["sources"].clone())
        .collect();
    assert_eq!(told, [json!([one(1)]), json!([one(0)])]);
    let own = server.post("/v1/completions", &json!({"prompt": "hi"})).json();
    assert_eq!(own["engram"]["sources"], json!([]));
}

#[test]
fn a_whole_text_answer_has_openais_form() {
    let server = Server::start(&[]);
    let answer = server.post("/v1/completions", &json!({"prompt": ["hi"], "seed": 7})).json();
    assert_eq!((&answer["object"], &answer["model"]), (&json!("text_completion"), &json!("auto")));
    assert_eq!(answer["choices"][0]["text"], "Hello\n\"wörld\"");
    let asked = server.seen.asked.lock().expect("not poisoned").clone().expect("a request");
    assert_eq!((asked.adapters, asked.sampling.seed), (Adapters::Auto, 7));
}

#[test]
fn a_streamed_chat_is_framed_as_events() {
    let server = Server::start(&[]);
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let answer = server.post("/v1/chat/completions", &chat("hi", options));
    assert!(
        answer.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream")),
        "{answer:?}"
    );
    let events = events(&answer.body);
    let deltas: Vec<&Value> = events.iter().map(|event| &event["choices"][0]["delta"]).collect();
    assert_eq!(deltas[0], &json!({"role": "assistant", "content": ""}));
    let text: String = deltas.iter().filter_map(|delta| delta["content"].as_str()).collect();
    assert_eq!(text, "Hello\n\"wörld\"");
    let [.., last, count] = &events[..] else { panic!("{events:?}") };
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    assert_eq!(last["engram"]["adapters"][0]["domain"], "medical");
    assert_eq!((&count["choices"], &count["usage"]["total_tokens"]), (&json!([]), &json!(5)));
    for event in &events {
        assert_eq!((&event["object"], &event["id"]), (&json!("chat.completion.chunk"), &events[0]["id"]));
    }
}

#[test]
fn a_streamed_text_counts_tokens_only_where_asked() {
    let server = Server::start(&[]);
    let events = events(&server.post("/v1/completions", &json!({"prompt": "hi", "stream": true})).body);
    let text: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, "Hello\n\"wörld\"");
    assert!(events.iter().all(|event| event.get("usage").is_none()), "{events:?}");
}

#[test]
fn what_the_model_refuses_is_the_clients_fault() {
    let server = Server::start(&[]);
    for stream in [false, true] {
        let refused = server.post("/v1/completions", &json!({"prompt": "refuse", "stream": stream}));
        assert_eq!((refused.status, refused.param()), (400, json!("prompt")));
        let unknown = server.post("/v1/completions", &json!({"prompt": "no model", "stream": stream}));
        assert_eq!(unknown.status, 404);
        assert_eq!(unknown.json()["error"]["code"], "model_not_found");
        let many = server.post("/v1/completions", &json!({"prompt": "too many", "n": 9, "stream": stream}));
        assert_eq!((many.status, many.param()), (400, json!("n")));
        let full = server.post("/v1/completions", &json!({"prompt": "full", "stream": stream}));
        assert_eq!((full.status, full.header("retry-after")), (503, Some("1")));
    }
}

#[test]
fn an_answer_that_breaks_off_says_so() {
    let server = Server::start(&[]);
    let whole = server.post("/v1/completions", &json!({"prompt": "die"}));
    assert_eq!(whole.status, 503);
    whole.assert_error_form();
    let streamed = server.post("/v1/completions", &json!({"prompt": "die", "stream": true}));
    assert_eq!(streamed.status, 200);
    let events = events(&streamed.body);
    assert_eq!(events[0]["choices"][0]["text"], "Hel");
    assert_eq!(events[1]["error"]["type"], "server_error");
}

#[test]
fn an_answer_ends_at_its_deadline() {
    let server = Server::start(&["gateway.generation_seconds_max=1"]);
    let whole = server.post("/v1/completions", &json!({"prompt": "hang"}));
    assert_eq!((whole.status, &whole.json()["error"]["code"]), (503, &json!("timeout")));
    let streamed = server.post("/v1/completions", &json!({"prompt": "hang", "stream": true}));
    assert_eq!(events(&streamed.body)[1]["error"]["code"], "timeout");
    eventually("both were given up", || server.seen.abandoned.load(Ordering::Relaxed) == 2);
}

#[test]
fn a_client_that_leaves_ends_its_generation() {
    let server = Server::start(&[]);
    for (count, stream) in [(1, true), (2, false)] {
        let body = json!({"prompt": "hang", "stream": stream, "n": 3}).to_string();
        let mut client = server.connect();
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        client.write_all((head + &body).as_bytes()).expect("sent");
        if stream {
            client.read_exact(&mut [0; 64]).expect("the answer began");
        } else {
            eventually("it was asked", || server.seen.asked.lock().expect("not poisoned").is_some());
        }
        *server.seen.asked.lock().expect("not poisoned") = None;
        drop(client);
        eventually("it was given up", || server.seen.abandoned.load(Ordering::Relaxed) == count);
    }
}

#[test]
fn embeddings_are_numbers_or_their_bytes() {
    let server = Server::start(&[]);
    let answer = server.post("/v1/embeddings", &json!({"input": ["ab", "abc"], "model": "base"})).json();
    assert_eq!(answer["data"][1], json!({"object": "embedding", "index": 1, "embedding": [3.0, -0.5]}));
    assert_eq!(answer["usage"], json!({"prompt_tokens": 5, "total_tokens": 5}));
    let packed = server.post("/v1/embeddings", &json!({"input": "ab", "encoding_format": "base64"})).json();
    // 2.0 and -0.5 as f32, little-endian.
    assert_eq!(packed["data"][0]["embedding"], "AAAAQAAAAL8=");
    let refused = server.post("/v1/embeddings", &json!({"input": ["ab", ""]}));
    assert_eq!((refused.status, refused.param()), (400, json!("input[1]")));
}
