//! The command line, by itself and with a server.

use crate::harness::{PROGRAM, Server, Setup, engram, root, sentence};
use crate::tiny;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

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
        (&["up", "--base", "giant", "--data", dir], "org/name"),
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
        "distill",
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
fn several_answers_come_with_their_tokens() {
    let server = Setup::tiny().start();
    let ask = |seed: &str, more: &[&str]| {
        let shape = ["--max-tokens", "8", "--temperature", "1", "--min-p", "0.001", "--seed", seed];
        let ask = ["generate", "A miller", "--model", "base", "--presence-penalty", "-0.5"];
        with(&server, &[&ask[..], &shape, more].concat())
    };
    let answer: Value =
        serde_json::from_str(&ask("3", &["--n", "3", "--logprobs", "2", "--json"])).expect("JSON");
    let choices = answer["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), 3);
    for (choice, seed) in choices.iter().zip(["3", "4", "5"]) {
        assert_eq!(ask(seed, &[]), format!("{}\n", choice["text"].as_str().expect("a text")));
        let told = &choice["logprobs"];
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(told[list].as_array().map(Vec::len), Some(8), "{told}");
        }
    }
    assert_eq!(answer["usage"]["completion_tokens"], 3 * 8);
    let printed = ask("3", &["--n", "2", "--logprobs", "1"]);
    assert!(printed.starts_with("[1]\n") && printed.contains("\n[2]\n"), "{printed}");
}

#[test]
fn logits_equal_the_golden_ones() {
    let folder = tempfile::tempdir().expect("a folder");
    let (golden, out) = (root().join("tests/golden/llama"), folder.path().join("logits.safetensors"));
    let (base, ids) = (golden.to_string_lossy().into_owned(), golden.join("golden.safetensors"));
    let output = engram(&[
        "logits",
        "--base",
        &base,
        "--ids",
        &ids.to_string_lossy(),
        "--out",
        &out.to_string_lossy(),
    ]);
    assert!(output.status.success(), "{output:?}");
    let (expected, computed) = (values(&ids), values(&out));
    assert_eq!(expected.len(), computed.len());
    let distance = expected.iter().zip(&computed).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(distance < 1e-4, "{distance}");
}

fn values(file: &Path) -> Vec<f32> {
    let bytes = fs::read(file).expect("readable");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let logits = tensors.tensor("logits").expect("logits");
    logits
        .data()
        .chunks_exact(4)
        .map(|four| f32::from_le_bytes(four.try_into().expect("four bytes")))
        .collect()
}

#[test]
fn texts_and_tasks_are_measured() {
    let folder = tempfile::tempdir().expect("a folder");
    let base = folder.path().join("base");
    tiny::write(&base);
    let eval = |name: &str, data: &str| -> Value {
        let file = folder.path().join(name);
        fs::write(&file, data).expect("written");
        let output =
            engram(&["eval", "--json", "--base", &base.to_string_lossy(), "--data", &file.to_string_lossy()]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).expect("JSON")
    };
    let text = eval("text.txt", "abc\n<|endoftext|>\ndefgh\n<|endoftext|>\n");
    assert_eq!(text["tokens"], 3 + 1 + 5 + 1, "a token a byte, and the ends");
    // Random weights know nothing, which is a loss of about the logarithm of the vocabulary.
    let nll = text["nll_per_token"].as_f64().expect("a figure");
    assert!((nll - 257f64.ln()).abs() < 1.0, "{nll}");
    let labels = eval("labels.jsonl", "{\"text\":\"a\",\"label\":\"x\"}\n{\"text\":\"b\",\"label\":\"x\"}\n");
    assert_eq!(
        (&labels["accuracy"], &labels["examples"]),
        (&json!(1.0), &json!(2)),
        "there is one label only"
    );
    let answers = eval("answers.jsonl", "{\"prompt\":\"a\",\"response\":\"no random model says this\"}\n");
    assert_eq!((&answers["accuracy"], &answers["examples"]), (&json!(0.0), &json!(1)));
}

#[test]
fn the_doctor_compares_this_machine_with_the_reference() {
    let full = |more: &[&str]| {
        let output =
            engram(&[&["doctor", "--full", "--seconds", "1", "--set", "base.device=cpu"], more].concat());
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{told}{}", String::from_utf8_lossy(&output.stdout));
        assert!(told.contains("comparing"), "progress: {told}");
        String::from_utf8(output.stdout).expect("text")
    };
    let report = full(&["--set", "base.precision=bf16"]);
    assert!(report.contains("| ok | cpu, bf16") && report.contains("| ok | cpu, f32"), "{report}");
    assert!(!report.contains("FAIL"), "{report}");
    let report: Value =
        serde_json::from_str(&full(&["--json", "--set", "base.precision=f32", "--set", "base.threads=1"]))
            .expect("JSON");
    assert_eq!(report["machine"]["device"], "cpu, f32, 1 threads");
    let checks = report["checks"].as_array().expect("checks");
    assert!(checks.len() == 4 && checks.iter().all(|check| check["ok"] == true), "{report}");
    assert!(report["speed"][0]["decoding_tokens_per_s"].as_f64().expect("a figure") > 0.0, "{report}");
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
