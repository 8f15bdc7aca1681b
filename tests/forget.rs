//! What was forgotten is nowhere.

use crate::harness::{Setup, sentence};
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
