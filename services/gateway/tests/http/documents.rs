use crate::harness::{Answer, Server};
use serde_json::{Value, json};
use std::sync::Barrier;
use std::thread;

fn submit_as(server: &Server, key: &str, body: &Value) -> Answer {
    server.send("POST", "/v1/documents", &[("idempotency-key", key)], body.to_string().as_bytes())
}

#[test]
fn one_document_is_accepted_followed_and_listed() {
    let server = Server::start(&[]);
    let answer =
        server.post("/v1/documents", &json!({"text": "The key is under the pot.", "domain": "home"}));
    assert_eq!(answer.status, 202, "{answer:?}");
    let accepted = answer.json();
    assert_eq!((&accepted["status"], &accepted["domain"]), (&json!("accepted"), &json!("home")));
    let id = accepted["id"].as_str().expect("an id");
    let status = server.get(&format!("/v1/documents/{id}")).json();
    assert_eq!(
        (&status["id"], &status["status"], &status["held_out"]),
        (&json!(id), &json!("accepted"), &json!(0))
    );
    assert_eq!(status["trail"][0]["event"], "accepted");
    let listed = server.get("/v1/documents?domain=home&limit=5").json();
    assert_eq!(listed["documents"][0], status);
    assert_eq!(server.get("/v1/documents?domain=other").json(), json!({"documents": []}));
    assert_eq!(server.get("/v1/documents/unknown").status, 404);
}

#[test]
fn a_document_tells_where_it_comes_from_and_what_it_says() {
    let server = Server::start(&[]);
    let talk = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let contents =
        [json!({"text": "one"}), json!({"prompt": "two?", "completion": "2"}), json!({"messages": talk})];
    for content in contents {
        let mut body = content.clone();
        (body["source"], body["derived_from"]) = (json!("teacher"), json!("order-7"));
        let accepted = server.post("/v1/documents", &body).json();
        let path = format!("/v1/documents/{}", accepted["id"].as_str().expect("an id"));
        let told = server.get(&path).json();
        assert_eq!((&told["source"], &told["derived_from"]), (&json!("teacher"), &json!("order-7")));
        assert_eq!(told.get("content"), None, "only when it is asked for");
        assert_eq!(server.get(&format!("{path}?content=true")).json()["content"], content);
        assert_eq!(server.get(&format!("{path}?content=maybe")).status, 400);
    }
    assert_eq!(server.get("/v1/documents/unknown?content=true").status, 404);
}

#[test]
fn many_documents_keep_their_order_and_their_keys() {
    let server = Server::start(&[]);
    let body = json!({"documents": [{"text": "one"}, {"prompt": "two?", "completion": "2"}]});
    let answer = submit_as(&server, "batch", &body);
    assert_eq!(answer.status, 202, "{answer:?}");
    let ids: Vec<Value> = (0..2).map(|n| answer.json()["documents"][n]["id"].clone()).collect();
    assert_eq!(ids, [json!("batch.0"), json!("batch.1")]);
    let listed = server.get("/v1/documents").json();
    assert_eq!(listed["documents"][0]["id"], "batch.1", "newest first");
    let before = server.get("/v1/documents?before=batch.1").json();
    assert_eq!(before["documents"].as_array().map(Vec::len), Some(1));
    assert_eq!(server.get("/v1/documents?before=unknown").status, 404);
}

#[test]
fn the_same_id_a_hundred_times_at_once_is_one_document() {
    let server = Server::start(&[]);
    let (start, body) = (Barrier::new(100), json!({"text": "said again and again"}));
    let answers: Vec<Answer> = thread::scope(|scope| {
        let ask = || {
            start.wait();
            submit_as(&server, "order-7", &body)
        };
        let asking: Vec<_> = (0..100).map(|_| scope.spawn(ask)).collect();
        asking.into_iter().map(|thread| thread.join().expect("an answer")).collect()
    });
    for answer in &answers {
        assert_eq!((answer.status, &answer.json()["id"]), (202, &json!("order-7")), "{answer:?}");
    }
    assert_eq!(server.ledger.head(), 1);
    let other = submit_as(&server, "order-7", &json!({"text": "something else"}));
    assert_eq!((other.status, other.param()), (409, json!("Idempotency-Key")));
    other.assert_error_form();
    assert_eq!(server.ledger.head(), 1);
}

#[test]
fn a_batch_with_a_conflict_or_a_bad_field_writes_nothing() {
    let server = Server::start(&[]);
    assert_eq!(submit_as(&server, "b.1", &json!({"text": "first"})).status, 202);
    let conflicting =
        submit_as(&server, "b", &json!({"documents": [{"text": "new"}, {"text": "not first"}]}));
    assert_eq!((conflicting.status, conflicting.param()), (409, json!("documents[1]")));
    let mut documents = vec![json!({"text": "good"}); 3];
    documents.push(json!({"text": "bad", "importance": 7}));
    let bad = server.post("/v1/documents", &json!({"documents": documents}));
    assert_eq!((bad.status, bad.param()), (400, json!("documents[3].importance")));
    assert_eq!(server.ledger.head(), 1);
}

#[test]
fn a_full_backlog_is_503_with_a_time_to_come_back() {
    let server = Server::start(&["gateway.intake_documents_max=3"]);
    for n in 0..3 {
        assert_eq!(server.post("/v1/documents", &json!({"text": format!("document {n}")})).status, 202);
    }
    let full = server.post("/v1/documents", &json!({"text": "one more"}));
    assert_eq!(full.status, 503, "{full:?}");
    full.assert_error_form();
    let wait: u64 = full.header("retry-after").and_then(|wait| wait.parse().ok()).expect("seconds");
    assert!((1..=60).contains(&wait), "{wait}");
    assert_eq!(server.ledger.head(), 3);
}

#[test]
fn forgetting_goes_through_its_door() {
    let server = Server::start(&[]);
    let gone = server.send("DELETE", "/v1/documents/some-id", &[], b"");
    assert_eq!((gone.status, &gone.json()["id"]), (200, &json!("some-id")));
    let missing = server.send("DELETE", "/v1/documents/missing", &[], b"");
    assert_eq!(missing.status, 404);
    missing.assert_error_form();
}
