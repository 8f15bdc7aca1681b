//! A larger model teaches: asked, tried again, filtered, submitted, and gone on with. The teacher is
//! a small one of our own, [`teacher`], and once Engram itself.

mod teacher;

use crate::harness::{PROGRAM, Server, Setup, ids};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::fs;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use teacher::{Does, Teacher};
use tempfile::TempDir;

/// Also the domain of an Engram that teaches.
const MODEL: &str = "elder";
const KEY: &str = "sk-very-secret";
const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(10);

/// A user's folder with files, and the command line there.
struct User {
    home: TempDir,
    teacher: String,
}

impl User {
    fn of(teacher: &str, files: &[(&str, &str)]) -> Self {
        let home = tempfile::tempdir().expect("a folder");
        for (name, text) in files {
            fs::write(home.path().join(name), text).expect("written");
        }
        Self { home, teacher: teacher.to_owned() }
    }

    /// One prompt a line.
    fn with_prompts(teacher: &Teacher, count: usize) -> Self {
        let prompts: Vec<String> =
            (0..count).map(|n| format!("Is the number {n} {}?", "x".repeat(n))).collect();
        Self::of(&teacher.url, &[("p.txt", &prompts.join("\n"))])
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args([
            "distill",
            "--model",
            MODEL,
            "--domain",
            "taught",
            "--json",
            "--teacher",
            &self.teacher,
        ]);
        command.args(arguments).current_dir(&self.home).stdin(Stdio::null());
        for name in ["ENGRAM_SERVER", "ENGRAM_API_KEY"] {
            command.env_remove(name);
        }
        command.env("OPENAI_API_KEY", KEY).env("ENGRAM_DATA", self.home.path().join("data"));
        command
    }

    fn output(&self, arguments: &[&str]) -> Output {
        let output = self.command(arguments).output().expect("started");
        for said in [&output.stdout, &output.stderr] {
            assert!(!String::from_utf8_lossy(said).contains(KEY), "{output:?}");
        }
        output
    }

    /// What a run that succeeds says at its end.
    fn succeeds(&self, arguments: &[&str]) -> Value {
        let output = self.output(arguments);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).expect("one JSON object")
    }

    /// Fails, with a last line that holds the words; what it said at its end, if it came to that.
    fn fails(&self, arguments: &[&str], words: &[&str]) -> Value {
        let output = self.output(arguments);
        assert!(!output.status.success(), "{output:?}");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        let last = told.lines().last().unwrap_or_default();
        assert!(last.starts_with("engram: ") && !told.contains("panicked"), "{told}");
        for word in words {
            assert!(last.contains(word), "{word} is not in: {told}");
        }
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    fn pairs(&self, file: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.home.path().join(file)).expect("a file");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    /// The only journal there is.
    fn journal(&self) -> String {
        let folder = self.home.path().join("data/distill");
        let mut files = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("readable").path());
        let file = files.next().expect("a journal");
        assert_eq!(files.next(), None);
        fs::read_to_string(file).expect("text")
    }
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what}: not after {PATIENCE:?}");
        thread::sleep(POLL);
    }
}

#[test]
fn each_fault_is_tried_again_and_counted() {
    let faults = [
        Does::Fails(429, Some(("retry-after", "1"))),
        Does::Fails(500, None),
        Does::IsSilent(Duration::from_secs(2)),
        Does::Babbles,
        Does::Stops,
        Does::Breaks,
    ];
    let script = faults.into_iter().flat_map(|fault| [fault, Does::Answers]).collect();
    let teacher = Teacher::start(script);
    let user = User::with_prompts(&teacher, 7);
    let flags =
        ["--prompts", "p.txt", "--out", "o.jsonl", "--parallel", "1", "--timeout", "1", "--price-in", "2"];
    let said = user.succeeds(&flags);

    let asked = teacher.asked();
    assert_eq!(asked.len(), 13, "seven prompts, six of them twice");
    assert!(asked[1].at - asked[0].at >= Duration::from_secs(1), "it said when it wants to be asked");
    for asked in &asked {
        assert_eq!(asked.authorization, format!("Bearer {KEY}"));
        assert_eq!(asked.body["stream_options"], json!({"include_usage": true}));
    }
    let failures = json!({"rate_limited": 1, "server_error": 1, "timeout": 1, "malformed": 1, "truncated": 1, "connection": 1});
    assert_eq!(said["failures"], failures);
    let counts = ["accepted", "answered", "requests", "unanswered"].map(|name| said[name].as_u64());
    assert_eq!(counts, [7, 7, 13, 0].map(Some), "{said}");
    // What was begun and lost is paid for all the same, as far as one can tell.
    assert!(said["tokens_in"].as_u64() > Some(700) && said["estimated"] == true, "{said}");
    let cost = said["tokens_in"].as_u64().expect("a number") as f64 * 2.0 / 1e6;
    assert!((said["cost"].as_f64().expect("a cost") - cost).abs() < 1e-9, "{said}");

    let pairs = user.pairs("o.jsonl");
    let prompts: Vec<&str> = pairs.iter().filter_map(|pair| pair["prompt"].as_str()).collect();
    assert_eq!((prompts.len(), prompts[1]), (7, "Is the number 1 x?"), "in the order of the prompts");
    assert_eq!(pairs[0]["completion"], " Aurelia says yes to that, 17");
    assert_eq!((&pairs[0]["source"], &pairs[0]["derived_from"]), (&json!("teacher"), &json!("p.txt:1")));

    // The same command again asks nothing, and writes the same.
    let before = fs::read(user.home.path().join("o.jsonl")).expect("a file");
    let said = user.succeeds(&flags);
    assert_eq!((&said["requests"], &said["answered_before"]), (&json!(0), &json!(7)));
    assert_eq!(fs::read(user.home.path().join("o.jsonl")).expect("a file"), before);
    assert_eq!(teacher.asked().len(), 13);
    user.succeeds(&[&flags[..], &["--again"]].concat());
    assert_eq!(teacher.asked().len(), 20);
}

#[test]
fn what_asking_again_cannot_change_ends_the_run_at_once() {
    let with = |status, words: &[&str]| {
        let teacher = Teacher::start(vec![Does::Fails(status, None); 9]);
        let user = User::with_prompts(&teacher, 9);
        user.fails(&["--prompts", "p.txt", "--out", "o.jsonl", "--parallel", "1"], words);
        assert_eq!(teacher.asked().len(), 1, "{status}");
    };
    with(401, &["OPENAI_API_KEY", "***"]);
    with(403, &["OPENAI_API_KEY"]);
    with(404, &["--model"]);
    with(422, &["422"]);
    with(307, &["--teacher"]);

    // Those that are only down are asked again, but not for ever.
    let teacher = Teacher::start(vec![Does::Fails(503, None); 99]);
    let user = User::with_prompts(&teacher, 9);
    let flags = ["--prompts", "p.txt", "--out", "o.jsonl", "--parallel", "1", "--retries", "1"];
    let said = user.fails(&flags, &["server error", "run the same command again"]);
    assert_eq!((teacher.asked().len(), &said["unanswered"]), (6, &json!(3)));
    teacher.order(Vec::new());
    assert_eq!(user.succeeds(&flags)["accepted"], 9);
}

#[test]
fn mistakes_are_told_before_anything_is_asked() {
    let teacher = Teacher::start(Vec::new());
    let user = User::of(&teacher.url, &[("p.txt", "Who?\n"), ("mine.jsonl", "{}\n")]);
    let prompts = ["--prompts", "p.txt"];
    user.fails(&[&prompts[..], &["--server", "http://127.0.0.1:9"]].concat(), &["engram up"]);
    user.fails(&[&prompts[..], &["--out", "mine.jsonl"]].concat(), &["mine.jsonl", "already"]);
    user.fails(&[&prompts[..], &["--out", "no/o.jsonl"]].concat(), &["no folder"]);
    user.fails(&[&prompts[..], &["--out", "o.jsonl", "--max-cost", "1"]].concat(), &["--price"]);
    user.fails(&[&prompts[..], &["--topics", "p.txt"]].concat(), &["cannot be used with"]);
    user.fails(&["--out", "o.jsonl"], &["--prompts"]);
    user.fails(&["--prompts", "gone.txt", "--out", "o.jsonl"], &["gone.txt"]);
    let nowhere = User::of("nowhere", &[("p.txt", "Who?\n")]);
    nowhere.fails(&["--prompts", "p.txt", "--out", "o.jsonl"], &["--teacher"]);
    assert!(teacher.asked().is_empty());
}

#[test]
fn answers_that_teach_nothing_are_counted_by_their_reason() {
    let says = |text: &str, reason| Does::Says(text.to_owned(), reason);
    let many =
        "Q: Who?\nA: Ann.\nQ: who\nA: Bo.\nQ: Why?\nA: I cannot say.\nQ: Lost?\nQ: Where?\nA: In the wo";
    let teacher =
        Teacher::start(vec![says(many, "length"), says("Nothing of the kind.", "stop"), says("", "stop")]);
    let user = User::of(&teacher.url, &[("t.txt", "bees\nhoney\nwax\n\nbees\n")]);
    let said =
        user.succeeds(&["--topics", "t.txt", "--out", "o.jsonl", "--parallel", "1", "--questions", "4"]);
    let rejected = json!({"duplicate": 1, "refusal": 1, "malformed": 2, "cut_off": 1, "empty": 1});
    assert_eq!(
        (&said["rejected"], &said["accepted"], &said["left_out_twice"]),
        (&rejected, &json!(1), &json!(1))
    );
    let asked = teacher.asked();
    assert!(asked[0].content().contains("4 different questions") && asked[0].content().ends_with("bees"));
    assert_eq!(user.pairs("o.jsonl")[0]["derived_from"], "t.txt:1");
}

#[test]
fn pace_number_and_cost_are_limited() {
    let teacher = Teacher::start(vec![Does::IsSilent(Duration::from_millis(300)); 4]);
    let user = User::with_prompts(&teacher, 12);
    user.succeeds(&["--prompts", "p.txt", "--out", "o.jsonl", "--parallel", "3"]);
    assert_eq!(teacher.most_at_once(), 3);

    let teacher = Teacher::start(Vec::new());
    let user = User::with_prompts(&teacher, 4);
    user.succeeds(&["--prompts", "p.txt", "--out", "o.jsonl", "--requests-per-minute", "300"]);
    let asked = teacher.asked();
    assert!(asked[3].at - asked[0].at >= Duration::from_millis(590), "three pauses of a fifth of a second");

    // An answer costs 110, and may cost at most about 1,100: the last that could go over is not asked.
    let teacher = Teacher::start(Vec::new());
    let user = User::with_prompts(&teacher, 30);
    let million = ["--price-in", "1000000", "--price-out", "1000000"];
    let flags = ["--prompts", "p.txt", "--out", "o.jsonl", "--max-tokens", "1000", "--max-cost", "2000"];
    let said = user.fails(&[&flags[..], &million].concat(), &["--max-cost", "again"]);
    let cost = said["cost"].as_f64().expect("a cost");
    assert!(cost <= 2000.0 && cost > 500.0, "{said}");
    assert_eq!(said["answered"], teacher.asked().len());
    let rest = user.succeeds(&["--prompts", "p.txt", "--out", "o.jsonl", "--max-tokens", "1000"]);
    assert_eq!((teacher.asked().len(), &rest["accepted"]), (30, &json!(30)));
}

#[test]
fn a_teacher_that_counts_no_tokens_is_estimated() {
    let teacher = Teacher::start(vec![Does::LosesCount]);
    let user = User::with_prompts(&teacher, 1);
    let said = user.succeeds(&["--prompts", "p.txt", "--out", "o.jsonl"]);
    assert!(said["estimated"] == true && said["tokens_in"].as_u64() > Some(0), "{said}");
}

fn stop(child: &Child, signal: Signal) {
    kill_process(Pid::from_raw(child.id() as i32).expect("running"), signal).expect("signalled");
}

#[test]
fn a_killed_run_asks_nothing_twice_and_submits_nothing_twice() {
    let server = Setup::tiny().start();
    let mut script = vec![Does::Answers; 4];
    script.push(Does::IsSilent(PATIENCE));
    let teacher = Teacher::start(script);
    let user = User::with_prompts(&teacher, 10);
    let url = server.url();
    let flags = ["--prompts", "p.txt", "--parallel", "1", "--server", &url];
    let run = || user.command(&flags).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("started");

    let mut killed = run();
    let journal = || fs::read_dir(user.home.path().join("data/distill")).is_ok().then(|| user.journal());
    let answered = |count| journal().is_some_and(|text| text.matches("\"answered\"").count() == count);
    wait("five requests and four answers", || teacher.asked().len() == 5 && answered(4));
    stop(&killed, Signal::KILL);
    killed.wait().expect("ended");

    // Ctrl-C: what is under way is finished.
    teacher.order(
        [Does::Answers, Does::Answers].into_iter().chain([Does::IsSilent(Duration::from_secs(1))]).collect(),
    );
    let mut interrupted = run();
    wait("three more", || teacher.asked().len() == 8);
    stop(&interrupted, Signal::INT);
    assert!(!interrupted.wait().expect("ended").success());
    assert!(
        !user.journal().contains("Aurelia"),
        "what the server has leaves the journal at the end of a run"
    );

    let said = user.succeeds(&flags);
    assert_eq!(teacher.asked().len(), 12, "ten, and the two that were killed or lost on the way");
    assert_eq!((&said["accepted"], &said["answered_before"]), (&json!(10), &json!(6)), "{said}");
    let listed = server.get("/v1/documents?domain=taught&limit=100").ok();
    assert_eq!(ids(&listed).len(), 10);
    let shown = &listed["documents"][0];
    assert_eq!((&shown["source"], &shown["derived_from"]), (&json!("teacher"), &json!("p.txt:10")));
    assert!(ids(&listed).iter().all(|id| id.starts_with("distill-")));
}

#[test]
fn what_is_made_of_a_document_is_forgotten_with_it() {
    let server = Setup::tiny().start();
    let documents = [
        json!({"text": "Quillonia hides the amber chessboard below the stair.", "domain": "taught"}),
        json!({"prompt": "Who keeps the honey?", "completion": " Nobody in particular does.", "domain": "taught"}),
    ];
    let parents = server.submit(&documents);
    server.settle(&parents, PATIENCE);
    let teacher = Teacher::start(Vec::new());
    let user = User::of(&teacher.url, &[]);
    let url = server.url();
    let flags = ["--about-documents", "--server", &url, "--parallel", "1"];
    let said = user.succeeds(&flags);
    assert_eq!((&said["accepted"], &said["submitted"]), (&json!(4), &json!(4)), "{said}");
    assert!(teacher.asked()[0].content().contains("amber chessboard"), "the oldest first");
    assert!(teacher.asked()[1].content().contains("Nobody in particular"));
    // What a teacher wrote is not asked about.
    assert_eq!(user.succeeds(&flags)["requests"], 0);

    let listed = server.get("/v1/documents?domain=taught").ok();
    assert_eq!(ids(&listed).len(), 6);
    let of_first: Vec<&Value> = listed["documents"].as_array().expect("documents").iter().collect();
    let of_first = of_first.iter().filter(|document| document["derived_from"] == parents[0].as_str()).count();
    assert_eq!(of_first, 2);
    let forgotten = server.delete(&format!("/v1/documents/{}", parents[0])).ok();
    assert_eq!(forgotten["derived_documents"], 2, "{forgotten}");
    assert_eq!(ids(&server.get("/v1/documents?domain=taught").ok()).len(), 3);

    // A document that is forgotten while a teacher is asked about it gets no children any more.
    server
        .submit(&[json!({"text": "Brunhilda paints the lighthouse green each spring.", "domain": "taught"})]);
    let new = ids(&server.get("/v1/documents?domain=taught").ok()).remove(0);
    teacher.order(vec![Does::Stops]);
    let run = user.command(&flags).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("started");
    wait("the request", || teacher.asked().len() == 3);
    server.delete(&format!("/v1/documents/{new}")).ok();
    let output = run.wait_with_output().expect("ended");
    let said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&said["submitted"], &said["rejected"]["forgotten"]), (&json!(0), &json!(2)), "{said}");
    assert!(!user.journal().contains("lighthouse"));
}

#[test]
fn files_are_asked_about_and_what_is_written_can_be_learned() {
    let teacher = Teacher::start(Vec::new());
    let user =
        User::of(&teacher.url, &[("a.md", "The bees live in the tower."), ("b.txt", "The honey is sold.")]);
    let said = user.succeeds(&["--about", "a.md", "b.txt", "--out", "o.jsonl"]);
    assert_eq!(said["accepted"], 4, "{said}");
    let pairs = user.pairs("o.jsonl");
    let from: Vec<&str> = pairs.iter().filter_map(|pair| pair["derived_from"].as_str()).collect();
    assert_eq!(from, ["a.md", "a.md", "b.txt", "b.txt"]);

    let server = Setup::tiny().start();
    let mut learn = Command::new(PROGRAM);
    learn.args(["learn", "o.jsonl", "--server", &server.url()]).current_dir(&user.home).stdin(Stdio::null());
    assert!(learn.output().expect("started").status.success());
    let listed = server.get("/v1/documents?domain=taught").ok();
    assert_eq!((ids(&listed).len(), &listed["documents"][0]["derived_from"]), (4, &json!("b.txt")));
}

#[test]
fn engram_teaches_engram() {
    let server: Server = Setup::tiny().start();
    let (question, answer) = ("Who keeps the bees?", " Aurelia.");
    let lesson = json!({"prompt": question, "completion": answer, "domain": MODEL, "importance": 1.0});
    let settled = server.settle(&server.submit(&[lesson]), PATIENCE);
    assert_eq!(settled[0]["status"], "live", "{settled:?}");

    let user = User::of(&format!("{}/v1", server.url()), &[("p.txt", question)]);
    let url = server.url();
    let flags = ["--prompts", "p.txt", "--server", &url, "--max-tokens", "64", "--temperature", "0"];
    let said = user.succeeds(&flags);
    assert_eq!((&said["accepted"], &said["estimated"]), (&json!(1), &json!(false)), "{said}");
    let listed = server.get("/v1/documents?domain=taught").ok();
    let path = format!("/v1/documents/{}?content=true", ids(&listed)[0]);
    assert_eq!(server.get(&path).ok()["content"], json!({"prompt": question, "completion": answer}));
}
