//! What was forgotten is nowhere.

use crate::harness::{Setup, engram, sentence};
use serde_json::json;
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(120);
const SECRET: &str = "Quillonia Vanterbeck hid the amber chessboard below the third stair";

#[test]
fn a_forgotten_document_is_in_no_file_and_no_answer() {
    let server = Setup::tiny().start();
    let mut documents: Vec<_> = (0..6).map(|n| json!({"text": sentence(n), "domain": "gossip"})).collect();
    documents.insert(3, json!({"text": format!("{SECRET}."), "domain": "gossip"}));
    let ids = server.submit(&documents);
    server.settle(&ids, PATIENCE);
    assert!(!server.files_with(SECRET).is_empty(), "the test looks where nothing is");

    server.delete(&format!("/v1/documents/{}", ids[3])).ok();
    assert_eq!(server.get(&format!("/v1/documents/{}", ids[3])).status, 404);
    let others: Vec<String> = ids.iter().filter(|id| **id != ids[3]).cloned().collect();
    let relearned = server.settle(&others, PATIENCE);
    assert!(relearned.iter().all(|document| document["status"] == "live"), "{relearned:?}");

    // One token a byte, four bytes a token: how the tiny base's examples lie on disk.
    let tokens: String = SECRET.bytes().flat_map(|byte| [char::from(byte), '\0', '\0', '\0']).collect();
    let start = Instant::now();
    loop {
        let found = [server.files_with(SECRET), server.files_with(&tokens)].concat();
        if found.is_empty() {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "{found:?} still hold it");
        thread::sleep(Duration::from_millis(200));
    }
    let again = server.submit(&[documents[3].clone()]);
    assert_eq!(server.settle(&again, PATIENCE)[0]["status"], "live", "a forgotten id may come back");
}

#[test]
fn forgetting_and_learning_do_not_get_into_each_others_way() {
    let server =
        Setup::tiny().env("FAILPOINTS", "replay::history=sleep(150);train::handle=sleep(400)").start();
    let in_domain = |domain: &str, from: usize| -> Vec<_> {
        (from..from + 3).map(|n| json!({"text": sentence(n), "domain": domain})).collect()
    };
    let merge_into = |into: &str| {
        let parts = ["letters:0.5", "ledgers:0.5"];
        let merge = ["adapters", "merge", parts[0], parts[1], "--into", into, "--server", &server.url()];
        assert!(engram(&merge).status.success());
    };
    let live = |ids: &[String]| {
        let documents = server.settle(ids, PATIENCE);
        assert!(documents.iter().all(|document| document["status"] == "live"), "{documents:?}");
    };
    let letters = server.submit(&in_domain("letters", 0));
    live(&letters);
    let ledgers = server.submit(&in_domain("ledgers", 3));
    live(&ledgers);
    // A generation goes, and three merges with it, while the mixer looks at what was learned.
    ["one", "two", "three"].iter().for_each(|into| merge_into(into));
    server.delete(&format!("/v1/documents/{}", ledgers[0])).ok();
    live(&ledgers[1..]);
    // A batch is on its way when the generation goes that it stands on.
    let more = server.submit(&in_domain("letters", 6));
    thread::sleep(Duration::from_millis(350));
    server.delete(&format!("/v1/documents/{}", letters[0])).ok();
    live(&letters[1..]);
    live(&more);
    let log = server.log();
    assert!(!log.contains("lane died"), "{log}");
}
