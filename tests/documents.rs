//! What becomes of a document, from its submission to its being served.

use crate::harness::{Setup, ids, sentence};
use serde_json::{Value, json};
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(120);

fn events(document: &Value) -> Vec<&str> {
    let trail = document["trail"].as_array().expect("a trail");
    trail.iter().map(|entry| entry["event"].as_str().expect("an event")).collect()
}

#[test]
fn a_document_goes_live_and_its_trail_tells_how() {
    let server = Setup::tiny().start();
    let body = json!({"prompt": "Who keeps the bees?", "completion": " Aurelia.", "domain": "farm", "importance": 1.0});
    let answer = server.post("/v1/documents", &body);
    assert_eq!(answer.status, 202, "{answer:?}");
    assert_eq!((&answer.body["status"], &answer.body["domain"]), (&json!("accepted"), &json!("farm")));
    let id = answer.body["id"].as_str().expect("an id").to_owned();

    let mut document = server.settle(std::slice::from_ref(&id), PATIENCE).remove(0);
    assert_eq!(document["status"], "live", "{document}");
    // It is served a moment before its trail says so.
    let served = Instant::now();
    while events(&document).last() != Some(&"live") && served.elapsed() < Duration::from_secs(10) {
        thread::sleep(Duration::from_millis(20));
        document = server.get(&format!("/v1/documents/{id}")).ok();
    }
    assert_eq!(events(&document), ["accepted", "kept", "learned", "live"], "{document}");
    let times: Vec<u64> = document["trail"]
        .as_array()
        .expect("a trail")
        .iter()
        .map(|e| e["at_ms"].as_u64().expect("a time"))
        .collect();
    assert!(times.is_sorted(), "{document}");

    let log = server.get("/v1/adapters/farm/log").ok();
    assert!(log.to_string().contains(document["generation"].as_str().expect("a generation")), "{log}");
    let models = server.get("/v1/models").ok();
    let models: Vec<&str> =
        models["data"].as_array().expect("models").iter().filter_map(|m| m["id"].as_str()).collect();
    assert!(["base", "auto", "farm"].iter().all(|model| models.contains(model)), "{models:?}");
    let listed = server.get("/v1/documents?domain=farm&limit=10").ok();
    assert_eq!(ids(&listed), [id]);
}

#[test]
fn the_same_id_a_hundred_times_at_once_is_one_document_and_other_content_a_conflict() {
    let server = Setup::tiny().start();
    let send = |text: &str| {
        let body = json!({"text": text, "domain": "once"}).to_string().into_bytes();
        let headers = [("idempotency-key", "order-7"), ("content-type", "application/json")];
        server.try_request("POST", "/v1/documents", Some(body), &headers).expect("answered")
    };
    let text = sentence(1);
    thread::scope(|scope| {
        let senders: Vec<_> = (0..100).map(|_| scope.spawn(|| send(&text))).collect();
        for sender in senders {
            let answer = sender.join().expect("sent");
            assert_eq!((answer.status, &answer.body["id"]), (202, &json!("order-7")), "{answer:?}");
        }
    });
    assert_eq!(send(&sentence(2)).status, 409);
    server.settle(&["order-7".to_owned()], PATIENCE);
    assert_eq!(ids(&server.get("/v1/documents?domain=once").ok()), ["order-7"]);
    assert_eq!(server.learned("once"), 1);
}

#[test]
fn what_is_refused_says_why_and_does_not_hold_up_the_rest() {
    let server = Setup::tiny().start();
    let documents = [
        json!({"text": "x ".repeat(3000), "domain": "mixed"}),
        json!({"text": sentence(3), "domain": "mixed"}),
        json!({"text": sentence(3) + " ", "domain": "mixed"}),
        json!({"text": sentence(4), "domain": "mixed"}),
    ];
    let settled = server.settle(&server.submit(&documents), PATIENCE);
    let statuses: Vec<&str> = settled.iter().filter_map(|document| document["status"].as_str()).collect();
    assert_eq!(statuses, ["refused", "live", "refused", "live"], "{settled:?}");
    for refused in settled.iter().filter(|document| document["status"] == "refused") {
        let reason = refused["reason"].as_str().expect("a reason");
        assert!(reason.len() > 10 && !reason.contains("x x x"), "{reason}");
    }
}

#[test]
fn the_list_is_read_page_by_page() {
    let server = Setup::tiny().start();
    let documents: Vec<Value> = (0..25).map(|n| json!({"text": sentence(n), "domain": "pages"})).collect();
    let mut expected = server.submit(&documents);
    let (mut seen, mut path) = (Vec::new(), "/v1/documents?domain=pages&limit=10".to_owned());
    loop {
        let page = ids(&server.get(&path).ok());
        let Some(last) = page.last() else { break };
        assert!(page.len() <= 10);
        path = format!("/v1/documents?domain=pages&limit=10&before={last}");
        seen.extend(page);
    }
    expected.reverse();
    assert_eq!(seen, expected, "the newest first, each once");
}

#[test]
fn a_document_is_found_by_what_it_says() {
    let server = Setup::tiny().set("train.enabled=false").start();
    let fact = json!({"prompt": "Where is the spare key?", "completion": " Under the third\n flower pot.", "domain": "home"});
    let exchange = json!([{"role": "user", "content": "A pot?"}, {"role": "assistant", "content": "Yes, the THIRD flower pot."}]);
    let documents = [
        fact,
        json!({"text": "Nothing is kept under the second flower pot."}),
        json!({"messages": exchange}),
        json!({"text": "A third flower, and pots beside it."}),
    ];
    let told = server.submit(&documents);
    let found = |asked: &str| ids(&server.get(&format!("/v1/documents?{asked}")).ok());
    assert_eq!(found("says=third%20flower%20%20Pot"), [told[2].clone(), told[0].clone()], "the newest first");
    assert_eq!(found("says=third%20flower%20pot&limit=1"), [told[2].clone()]);
    let after = format!("says=third%20flower%20pot&limit=1&before={}", told[2]);
    assert_eq!(found(&after), [told[0].clone()], "the list goes on");
    assert_eq!(found("says=flower%20pot&domain=home"), [told[0].clone()]);
    assert!(found("says=fourth%20flower").is_empty());
}
