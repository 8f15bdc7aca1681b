//! Published adapters, merged into one.

use crate::harness::{PROGRAM, Setup, sentence};
use serde_json::json;
use std::process::Command;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(300);

#[test]
fn a_merge_answers_as_the_sum_of_its_parts_does_and_is_forgotten_with_them() {
    let server = Setup::tiny().set("base.precision=f32").start();
    let mut ids = Vec::new();
    for (number, domain) in ["letters", "ledgers"].into_iter().enumerate() {
        let texts: Vec<_> =
            (0..4).map(|n| json!({"text": sentence(number * 4 + n), "domain": domain})).collect();
        ids = server.submit(&texts);
        server.settle(&ids, PATIENCE);
    }
    let merge = |arguments: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.args(["adapters", "merge", "letters:0.7", "ledgers:0.3", "--server", &server.url()]);
        command.args(arguments).output().expect("run")
    };
    for (into, arguments) in [("exact", &[][..]), ("small", &["--method", "svd", "--rank", "4"])] {
        let output = merge(&[&["--into", into], arguments].concat());
        assert!(output.status.success(), "{output:?}");
    }
    let sum = server.complete("letters:0.7+ledgers:0.3", "The", 24);
    assert_eq!(server.complete("exact", "The", 24), sum, "the exact sum says the same");
    assert!(!server.complete("small", "The", 24).is_empty());
    let refused = merge(&["--into", "exact", "--rank", "4"]);
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && told.contains("svd"), "{told}");
    assert_eq!(told.trim().lines().count(), 1, "{told}");

    server.delete(&format!("/v1/documents/{}", ids[0])).ok();
    assert!(server.generations("exact").is_empty(), "the merge held what was forgotten");
}
