//! The command line, by itself and with a server.

use crate::harness::{PROGRAM, Server, Setup, sentence};
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};

fn engram(arguments: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).stdin(Stdio::null()).env_remove("ENGRAM_SERVER").env_remove("ENGRAM_API_KEY");
    command.output().expect("started")
}

fn with(server: &Server, arguments: &[&str]) -> String {
    let output = engram(&[arguments, &["--server", &server.url()]].concat());
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn a_mistake_is_one_line_that_says_what_to_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().to_str().expect("a path");
    let broken = folder.path().join("broken.toml");
    fs::write(&broken, "[replay\ncapacity = 1").expect("written");
    let broken = broken.to_str().expect("a path");
    let nowhere = "http://127.0.0.1:9";
    let cases: [(&[&str], &str); 20] = [
        (&["lern"], "learn"),
        (&["learn"], "<PATH>"),
        (&["learn", "/no/such/file"], "/no/such/file"),
        (&["learn", dir, "--importance", "2"], "0 to 1"),
        (&["learn", dir, "--server", nowhere], "engram up"),
        (&["status", "--server", nowhere], "engram up"),
        (&["status", "--server", "ftp://x"], "http://"),
        (&["generate", "hi", "--temperature", "warm"], "--temperature"),
        (&["generate", "hi", "--server", nowhere], "engram up"),
        (&["chat", "--server", nowhere], "engram up"),
        (&["adapters", "import", dir, "--domain", "d", "--server", nowhere], "adapter_config.json"),
        (&["up", "--base", "org/name", "--data", dir], "hf download"),
        (&["up", "--base", dir, "--data", dir], "config.json"),
        (&["up", "--config", "/no/such.toml", "--data", dir], "/no/such.toml"),
        (&["up", "--config", broken, "--data", dir], "broken.toml"),
        (&["up", "--set", "replay.capasity=1", "--data", dir], "capacity"),
        (&["up", "--set", "nonsense", "--data", dir], "nonsense"),
        (&["up", "--listen", "nowhere", "--data", dir], "nowhere"),
        (&["logits", "--base", dir, "--ids", "x", "--out", "y"], "config.json"),
        (&["eval", "--base", dir, "--data", "x"], "config.json"),
    ];
    for (arguments, expected) in cases {
        let output = engram(arguments);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{arguments:?} succeeded");
        assert!(told.starts_with("engram: ") && told.lines().count() == 1, "{arguments:?}: {told}");
        assert!(told.contains(expected) && !told.contains("panicked"), "{arguments:?}: {told}");
    }
}

#[test]
fn help_teaches_by_examples() {
    for command in [
        "up",
        "learn",
        "generate",
        "chat",
        "status",
        "documents",
        "adapters",
        "eval",
        "logits",
        "doctor",
        "pretrain",
    ] {
        let output = engram(&[command, "--help"]);
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && told.contains(&format!("engram {command}")), "{told}");
        assert!(told.contains("Example"), "{told}");
    }
}

#[test]
fn files_are_learned_listed_asked_rolled_back_and_exchanged() {
    let server = Setup::tiny().start();
    let folder = tempfile::tempdir().expect("a folder");
    let notes = folder.path().join("notes");
    fs::create_dir_all(&notes).expect("made");
    fs::write(notes.join("a.md"), sentence(1)).expect("written");
    fs::write(notes.join("b.jsonl"), format!("{}\nnonsense\n", json!({"text": sentence(2), "meta": 7})))
        .expect("written");

    let output = engram(&[
        "learn",
        notes.to_str().expect("a path"),
        "--domain",
        "notes",
        "--wait",
        "--server",
        &server.url(),
    ]);
    let (told, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(told.contains("2 live"), "{told}{complained}");
    assert!(complained.contains("b.jsonl:2") && !output.status.success(), "{complained}");

    let mut learn = Command::new(PROGRAM);
    let arguments = ["learn", "-", "--domain", "notes", "--wait", "--json", "--server"];
    let learn = learn.args(arguments).arg(server.url()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut learn = learn.spawn().expect("started");
    learn.stdin.take().expect("piped").write_all(sentence(3).as_bytes()).expect("written");
    let output = learn.wait_with_output().expect("ended");
    let learned: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&learned["status"], &learned["place"]), (&json!("live"), &json!("stdin")));

    let id = learned["id"].as_str().expect("an id");
    assert!(with(&server, &["documents", "list", "--domain", "notes"]).contains(id));
    assert!(with(&server, &["documents", "show", id]).contains("live"));
    with(&server, &["generate", "A miller", "--model", "notes", "--max-tokens", "4"]);
    serde_json::from_str::<Value>(&with(&server, &["status", "--json"])).expect("JSON");

    let before = server.generations("notes");
    assert!(with(&server, &["adapters", "list"]).contains(&before[0]));
    let out = folder.path().join("exported");
    let out = out.to_str().expect("a path");
    with(&server, &["adapters", "export", "notes", "--out", out]);
    with(&server, &["adapters", "rollback", "notes"]);
    with(&server, &["adapters", "import", out, "--domain", "copied"]);
    let copied = server.complete("copied", "A miller", 8);
    assert_eq!(copied, server.complete(&format!("notes@{}", before[0]), "A miller", 8));
    with(&server, &["documents", "forget", id]);
    assert_eq!(server.get(&format!("/v1/documents/{id}")).status, 404);
}

#[test]
fn a_second_server_on_the_same_folder_is_refused() {
    let server = Setup::tiny().start();
    let data = server.data();
    let base = data.with_file_name("base");
    let output = engram(&[
        "up",
        "--base",
        &base.to_string_lossy(),
        "--data",
        &data.to_string_lossy(),
        "--listen",
        "127.0.0.1:0",
    ]);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("in use") && told.contains("process id"), "{told}");
    assert_eq!(server.get("/livez").status, 200);
}
