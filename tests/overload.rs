//! More than it can take: it says so, and loses nothing.

use crate::harness::{Setup, sentence};
use serde_json::{Value, json};
use std::thread;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(180);

#[test]
fn a_full_intake_answers_503_with_a_time_and_takes_everything_in_the_end() {
    let server = Setup::tiny()
        .set("gateway.intake_documents_max=8")
        .env("FAILPOINTS", "filter::handle=sleep(20)")
        .start();
    let ids: Vec<String> = thread::scope(|scope| {
        let send = |sender: usize| {
            let (mut ids, mut refused) = (Vec::new(), 0);
            for number in 0..20 {
                let document = json!({"text": sentence(sender * 20 + number), "domain": "flood"});
                loop {
                    let answer = server.post("/v1/documents", &document);
                    if answer.status == 202 {
                        ids.push(answer.body["id"].as_str().expect("an id").to_owned());
                        break;
                    }
                    assert_eq!(answer.status, 503, "{answer:?}");
                    let after: u64 =
                        answer.retry_after.as_deref().expect("Retry-After").parse().expect("seconds");
                    assert!((1..=60).contains(&after), "{after}");
                    refused += 1;
                    thread::sleep(Duration::from_millis(100));
                }
            }
            (ids, refused)
        };
        let senders: Vec<_> = (0..6).map(|sender| scope.spawn(move || send(sender))).collect();
        let (ids, refused): (Vec<_>, Vec<_>) =
            senders.into_iter().map(|sender| sender.join().expect("sent")).unzip();
        assert!(refused.iter().sum::<usize>() > 0, "it was never full");
        ids.concat()
    });
    assert_eq!(ids.len(), 120);
    let settled = server.settle(&ids, PATIENCE);
    assert!(settled.iter().all(|document: &Value| document["status"] != "set_aside"));
}

#[test]
fn answering_goes_on_while_it_learns() {
    let server = Setup::tiny().start();
    let documents: Vec<Value> = (0..100).map(|n| json!({"text": sentence(n), "domain": "busy"})).collect();
    let ids = server.submit(&documents);
    let mut slowest = Duration::ZERO;
    while server.get(&format!("/v1/documents/{}", ids[99])).ok()["status"] != "live" {
        let start = std::time::Instant::now();
        server.complete("base", "A miller", 4);
        slowest = slowest.max(start.elapsed());
    }
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
}
