//! It keeps what it learned: the experiment of `scripts/prove retention`, scaled down.

use crate::harness::{PROGRAM, Server, Setup, nano, sentence};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(600);
const DOCUMENTS: usize = 40;
/// Of the gain on the first texts, what may be lost to the second.
const LOSS_OF_GAIN_MAX: f64 = 0.1;

/// Texts of another kind, as unlike the sentences as a ledger is unlike a tale.
fn receipt(number: usize) -> String {
    const GOODS: [&str; 5] = ["copper wire", "lamp oil", "oak planks", "blue paint", "iron nails"];
    let (count, good) = (number * 37 % 90 + 3, GOODS[number % 5]);
    format!(
        "RECEIPT No. {}\nitem: {good}\ncount: {count}\nprice each: {}.50\nsold to: account {}\npaid in full, no return after day {}\n",
        number * 7919 % 10_007,
        number * 13 % 40 + 1,
        number * 104_729 % 9973,
        number * 17 % 30 + 1,
    )
}

fn teach(server: &Server, documents: impl Iterator<Item = String>) {
    let documents: Vec<Value> = documents.map(|text| json!({"text": text, "domain": "both"})).collect();
    let settled = server.settle(&server.submit(&documents), PATIENCE);
    let live = settled.iter().filter(|document| document["status"] == "live").count();
    assert!(live * 10 >= settled.len() * 9, "only {live} of {} were learned: {settled:?}", settled.len());
}

/// Nats a token on `text`, of the base or of the base with what it has learned.
fn nll(base: &Path, adapter: Option<&Path>, text: &Path) -> f64 {
    let mut command = Command::new(PROGRAM);
    command.arg("eval").arg("--base").arg(base).arg("--data").arg(text).arg("--json");
    if let Some(adapter) = adapter {
        command.arg("--adapter").arg(adapter);
    }
    let output = command.output().expect("started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let figures: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    figures["nll_per_token"].as_f64().expect("a figure")
}

fn export(server: &Server, folder: &Path) {
    let mut command = Command::new(PROGRAM);
    command.args(["adapters", "export", "both", "--server", &server.url(), "--out"]).arg(folder);
    assert!(command.status().expect("started").success());
}

#[test]
fn what_was_learned_first_is_still_known_after_what_was_learned_second() {
    let Some(base) = nano() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let held_out = folder.path().join("held-out.txt");
    let texts: String = (DOCUMENTS..DOCUMENTS + 20).map(|n| sentence(n) + "\n<|endoftext|>\n").collect();
    fs::write(&held_out, texts).expect("written");

    let server = Setup::base(base.clone()).start();
    teach(&server, (0..DOCUMENTS).map(sentence));
    let (first, both) = (folder.path().join("first"), folder.path().join("both"));
    export(&server, &first);
    teach(&server, (0..DOCUMENTS).map(receipt));
    export(&server, &both);

    let [untaught, taught, after] =
        [None, Some(&first), Some(&both)].map(|adapter| nll(&base, adapter.map(|a| a.as_path()), &held_out));
    let loss_of_gain = (after - taught) / (untaught - taught);
    eprintln!(
        "nats a token: base {untaught:.3}, first {taught:.3}, both {after:.3}; loss of gain {loss_of_gain:.3}"
    );
    assert!(taught < untaught * 0.8, "hardly anything was learned: {untaught} to {taught}");
    assert!(loss_of_gain < LOSS_OF_GAIN_MAX, "{loss_of_gain}");
}
