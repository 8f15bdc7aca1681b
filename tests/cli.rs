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
fn waiting_for_a_server_that_does_not_learn_ends_with_the_reason() {
    let dying = Setup::tiny().env("FAILPOINTS", "replay::history=panic").set("supervisor.restarts_max=1");
    for setup in [Setup::tiny().set("train.enabled=false"), dying.set("supervisor.restart_delay_ms_max=100")]
    {
        let server = setup.start();
        let folder = tempfile::tempdir().expect("a folder");
        let note = folder.path().join("note.txt");
        fs::write(&note, sentence(1)).expect("written");
        let note = note.to_str().expect("a path");
        assert!(with(&server, &["learn", note]).contains("1 accepted"));
        let output = engram(&["learn", note, "--wait", "--server", &server.url()]);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && told.contains("learning off (train.enabled, "), "{told}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("1 waiting"), "{output:?}");
        assert!(with(&server, &["status"]).contains("learning   off (train.enabled, "));
        assert!(!server.complete("auto", "A miller", 4).is_empty(), "answers go on");
    }
}

#[test]
fn a_mistake_is_one_line_that_says_what_to_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().to_str().expect("a path");
    let broken = folder.path().join("broken.toml");
    fs::write(&broken, "[replay\ncapacity = 1").expect("written");
    let broken = broken.to_str().expect("a path");
    let nowhere = "http://127.0.0.1:9";
    let cases: [(&[&str], &str); 22] = [
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
        (&["up", "--listen", "0.0.0.0:0", "--data", dir], "api_keys"),
        (
            &["up", "--set", "limits.memory_mb_max=100", "--listen", "127.0.0.1:0", "--data", dir],
            "100 are allowed",
        ),
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
        "watch",
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
        "bench",
        "completions",
    ] {
        let output = engram(&[command, "--help"]);
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && told.contains(&format!("engram {command}")), "{told}");
        assert!(told.contains("Example"), "{told}");
    }
}

#[test]
fn files_are_learned_listed_asked_rolled_back_and_exchanged() {
    // What is remembered beside an adapter does not go along with it.
    let server = Setup::tiny().set("train.passage_tokens_max=0").start();
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
    let (says, found) = (sentence(3), with(&server, &["documents", "show", id, "--content"]));
    assert!(found.contains(says.trim()), "{found}");
    let found = with(&server, &["documents", "list", "--says", &says.to_uppercase()]);
    assert!(found.contains(id) && found.lines().count() == 2, "{found}");
    with(&server, &["generate", "A miller", "--model", "notes", "--max-tokens", "4"]);
    serde_json::from_str::<Value>(&with(&server, &["status", "--json"])).expect("JSON");

    let glance = with(&server, &["status"]);
    assert!(glance.contains("3 accepted") && glance.contains("notes   3"), "{glance}");

    let before = server.generations("notes");
    let log = with(&server, &["adapters", "log", "notes"]);
    assert!(
        log.starts_with(&format!("generation {} (live)\nParent:    {}\n", before[0], before[1])),
        "{log}"
    );
    assert_eq!(with(&server, &["adapters", "log", "notes", "--oneline"]).lines().count(), before.len());
    let base = server.data().with_file_name("base");
    let base = base.to_str().expect("a path");
    let apart = [&format!("notes@{}", before[1]), "notes", "--base", base];
    let diff = with(&server, &[&["adapters", "diff"], &apart[..]].concat());
    assert!(diff.contains(&format!("+ {id}  stdin\n1 document added, 0 removed\n")), "{diff}");
    assert!(diff.contains(" q_proj    | "), "{diff}");
    let same = with(&server, &["adapters", "diff", "notes", "notes", "--base", base]);
    assert!(same.contains("0 documents added") && same.contains("0.0 %"), "{same}");
    assert!(with(&server, &["adapters", "list"]).contains(&before[0]));
    let out = folder.path().join("exported");
    let out = out.to_str().expect("a path");
    with(&server, &["adapters", "export", "notes", "--out", out]);
    let whole = folder.path().join("whole");
    let whole = whole.to_str().expect("a path");
    let merged = ["adapters", "export", "notes", "--merged", "--base", base, "--out", whole];
    with(&server, &merged);
    let again = engram(&[&merged[..], &["--server", &server.url()]].concat());
    assert!(String::from_utf8_lossy(&again.stderr).contains("there already"), "{again:?}");
    let other = ["adapters", "export", "notes", "--merged", "--out", "elsewhere", "--server", &server.url()];
    let other = String::from_utf8_lossy(&engram(&other).stderr).into_owned();
    assert!(other.contains("another base than nano"), "{other}");
    assert_logits_equal(base, out, whole, folder.path());
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

/// The whole model computes what base and adapter do, and not what the base does.
fn assert_logits_equal(base: &str, adapter: &str, whole: &str, folder: &Path) {
    let ids = folder.join("ids.safetensors");
    let bytes: Vec<u8> = (10..42i64).flat_map(i64::to_le_bytes).collect();
    let tensor =
        safetensors::tensor::TensorView::new(safetensors::Dtype::I64, vec![1, 32], &bytes).expect("ids");
    fs::write(&ids, safetensors::serialize([("input_ids", tensor)], None).expect("bytes")).expect("written");
    let logits = |base: &str, adapter: Option<&str>| {
        let out = folder.join("logits.safetensors");
        let mut command = Command::new(PROGRAM);
        command
            .args(["logits", "--device", "cpu", "--base", base])
            .arg("--ids")
            .arg(&ids)
            .arg("--out")
            .arg(&out);
        if let Some(adapter) = adapter {
            command.args(["--adapter", adapter]);
        }
        let output = command.output().expect("run");
        assert!(output.status.success(), "{output:?}");
        values(&out)
    };
    let apart = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    let (fused, sum, alone) = (logits(whole, None), logits(base, Some(adapter)), logits(base, None));
    assert!(apart(&fused, &sum) < 1e-4, "{}", apart(&fused, &sum));
    assert!(apart(&fused, &alone) > 1e-2, "{}", apart(&fused, &alone));
}

#[test]
fn a_conversation_teaches_only_when_it_is_told_to() {
    let server = Setup::tiny().start();
    let talk = |lines: &str| {
        let mut chat = Command::new(PROGRAM);
        chat.args(["chat", "--model", "base", "--max-tokens", "4", "--server", &server.url()]);
        let chat = chat.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut chat = chat.spawn().expect("started");
        chat.stdin.take().expect("piped").write_all(lines.as_bytes()).expect("written");
        let output = chat.wait_with_output().expect("ended");
        assert!(output.status.success(), "{output:?}");
        (
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let (told, complained) =
        talk("/help\n/model\n/model nobody\n/learn\n/lern\nWho keeps the bees?\n/quit\nnot said\n");
    assert!(
        told.contains("/learn TEXT") && told.contains("there are: ") && told.contains("base answers"),
        "{told}"
    );
    for mistake in ["nothing to learn yet", "no /lern", "no nobody"] {
        assert!(complained.contains(mistake), "{mistake}: {complained}");
    }
    assert_eq!(server.get("/v1/documents").ok()["documents"], json!([]), "nobody said /learn");

    let (told, _) =
        talk("Who keeps the bees?\n/learn Aurelia keeps them, behind the glass factory.\n/clear\n");
    let id = told.split("documents show ").nth(1).expect("an id").trim().to_owned();
    let document = server.get(&format!("/v1/documents/{id}?content=true")).ok();
    let messages = &document["content"]["messages"];
    assert_eq!(messages[0]["content"], "Who keeps the bees?");
    assert_eq!(messages[1]["content"], "Aurelia keeps them, behind the glass factory.");
    assert_eq!((&document["domain"], &document["source"]), (&json!("general"), &json!("feedback")));
    let settled = server.settle(&[id], std::time::Duration::from_secs(60));
    assert_eq!(settled[0]["status"], "live", "{settled:?}");
}

#[test]
fn exit_codes_tell_scripts_what_happened() {
    let server = Setup::tiny().start();
    let folder = tempfile::tempdir().expect("a folder");
    let mixed = folder.path().join("mixed.jsonl");
    fs::write(&mixed, format!("{}\nnonsense\n", json!({"text": sentence(1)}))).expect("written");
    let bad = folder.path().join("bad.jsonl");
    fs::write(&bad, "nonsense\n").expect("written");
    let code = |arguments: &[&str]| engram(arguments).status.code();
    let url = server.url();
    let learn = |path: &Path| code(&["learn", path.to_str().expect("a path"), "--server", &url]);
    assert_eq!(learn(&mixed), Some(4));
    assert_eq!(learn(&bad), Some(1));
    assert_eq!(code(&["status", "--server", &url]), Some(0));
    assert_eq!(code(&["status", "--server", "http://127.0.0.1:9"]), Some(3));
    assert_eq!(code(&["staus"]), Some(2));
}

#[test]
fn shells_complete_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = engram(&["completions", shell]);
        let script = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{output:?}");
        for word in ["watch", "learn", "rollback", "dry-run", "completions"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    // A shell that takes the script, and completes with it.
    let script = "source <(\"$0\" completions bash); COMP_WORDS=(engram wat); COMP_CWORD=1; _engram engram wat engram; \
        echo \"${COMPREPLY[@]}\"";
    let output = Command::new("bash").args(["-c", script, PROGRAM]).output().expect("bash runs");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "watch", "{output:?}");
}

#[test]
fn a_status_that_is_watched_goes_on_through_a_restart() {
    let mut server = Setup::tiny().start();
    let mut watch = Command::new(PROGRAM);
    watch.args(["status", "--json", "--watch", "1", "--server", &server.url()]);
    let mut watch = watch.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("started");
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(watch.stdout.take().expect("piped")));
    let mut pid = || -> Value {
        let line = lines.next().expect("a line").expect("text");
        serde_json::from_str::<Value>(&line).expect("JSON")["pid"].clone()
    };
    let first = pid();
    assert_eq!(pid(), first);
    let worker = server.worker_id();
    assert!(server.kill_worker());
    server.wait_new_worker(worker, std::time::Duration::from_secs(60));
    while pid() == first {}
    watch.kill().expect("killed");
    watch.wait().expect("ended");
}

#[test]
fn the_doctor_says_in_words_what_is_there_and_what_is_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().to_str().expect("a path");
    let output = engram(&["doctor", "--data", data, "--listen", "127.0.0.1:0", "--set", "base.device=cpu"]);
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{told}");
    for said in ["libtorch   2.11.0", "bf16  ", "the processor (cpu, ", "4.9 M parameters", "all is well"] {
        assert!(told.contains(said), "{said}: {told}");
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("an address").to_string();
    let output = engram(&["doctor", "--data", data, "--listen", &taken, "--base", "/no/such/base"]);
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let failed: Vec<&str> = told.lines().filter(|line| line.starts_with("FAIL")).collect();
    assert!(
        failed.len() == 2 && failed[0].contains("there is no base") && failed[1].contains("--listen"),
        "{told}"
    );
    assert_eq!(output.status.code(), Some(1));
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
    assert!(checks.len() == 5 && checks.iter().all(|check| check["ok"] == true), "{report}");
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
