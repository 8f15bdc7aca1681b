//! A watched folder: whatever happens to it and to the watcher, in the end the server knows what lies in it.

use crate::harness::{PROGRAM, Server, Setup, sentence};
use serde_json::json;
use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);

/// A folder with a watcher's state beside it.
struct Folder {
    outside: TempDir,
}

impl Folder {
    fn new() -> Self {
        let outside = tempfile::tempdir().expect("a folder");
        fs::create_dir(outside.path().join("notes")).expect("made");
        Self { outside }
    }

    fn dir(&self) -> PathBuf {
        self.outside.path().join("notes")
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir().join(name), text).expect("written");
    }

    fn command(&self, server: &Server, more: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("watch").arg(self.dir()).args(["--domain", "notes", "--server", &server.url()]);
        command.arg("--state").arg(self.outside.path().join("state.json")).args(more);
        command.stdin(Stdio::null()).env_remove("ENGRAM_API_KEY");
        command
    }

    /// Brings the server up to date; the lines that were printed.
    fn once(&self, server: &Server) -> Vec<String> {
        let output = self.command(server, &["--once"]).output().expect("run");
        assert!(output.status.success(), "{output:?}");
        lines(&output)
    }
}

fn lines(output: &Output) -> Vec<String> {
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    String::from_utf8_lossy(&output.stdout).lines().map(words).collect()
}

/// The texts that the server knows.
fn known(server: &Server) -> BTreeSet<String> {
    let listed = server.get("/v1/documents?limit=1000").ok();
    let texts = listed["documents"].as_array().expect("documents").iter().filter_map(|document| {
        let path = format!("/v1/documents/{}?content=true", document["id"].as_str().expect("an id"));
        let answer = server.get(&path);
        // It may be forgotten since it was listed.
        (answer.status != 404).then(|| answer.ok()["content"]["text"].as_str().expect("a text").to_owned())
    });
    texts.collect()
}

fn texts(numbers: &[usize]) -> BTreeSet<String> {
    numbers.iter().map(|number| sentence(*number)).collect()
}

fn line(number: usize) -> String {
    format!("{}\n", json!({"text": sentence(number)}))
}

#[test]
fn what_is_new_changed_renamed_or_deleted_is_known_again_after_each_look() {
    let (server, folder) = (Setup::tiny().start(), Folder::new());
    folder.write("a.md", &sentence(1));
    folder.write("b.jsonl", &(line(2) + &line(3)));
    folder.write("skipped.log", &sentence(9));
    folder.write(".gitignore", "*.log\n");
    assert_eq!(folder.once(&server), ["learn notes/a.md 1 document", "learn notes/b.jsonl 2 documents"]);
    assert_eq!(known(&server), texts(&[1, 2, 3]));
    assert!(folder.once(&server).is_empty(), "nothing has changed");

    // A line of a file changes: the other is not touched. A copy says nothing new, and its original may go.
    let before = server.get("/v1/documents").ok();
    folder.write("b.jsonl", &(line(2) + &line(4)));
    fs::copy(folder.dir().join("a.md"), folder.dir().join("c.md")).expect("copied");
    let told = [
        "learn notes/b.jsonl 2 documents",
        "forgot notes/b.jsonl 1 document that it no longer says",
        "learn notes/c.md 1 document",
    ];
    assert_eq!(folder.once(&server), told);
    assert_eq!(known(&server), texts(&[1, 2, 4]));
    let after = server.get("/v1/documents").ok();
    let accepted = |list: &serde_json::Value, text: &str| {
        list["documents"].as_array().expect("documents").iter().find_map(|document| {
            let id = document["id"].as_str().expect("an id");
            let content = server.get(&format!("/v1/documents/{id}?content=true"));
            (content.body["content"]["text"] == text).then(|| document["trail"][0]["at_ms"].clone())
        })
    };
    assert_eq!(accepted(&before, &sentence(2)), accepted(&after, &sentence(2)), "it was not learned again");

    fs::remove_file(folder.dir().join("a.md")).expect("removed");
    assert_eq!(folder.once(&server), ["forgot notes/a.md 1 document"]);
    assert_eq!(known(&server), texts(&[1, 2, 4]), "c.md still says it");
    fs::rename(folder.dir().join("c.md"), folder.dir().join("d.md")).expect("renamed");
    assert_eq!(folder.once(&server), ["renamed notes/c.md -> notes/d.md"]);
    fs::remove_file(folder.dir().join("d.md")).expect("removed");
    let dry = folder.command(&server, &["--dry-run"]).output().expect("run");
    assert_eq!(lines(&dry), ["would forget notes/d.md"]);
    assert_eq!(known(&server), texts(&[1, 2, 4]), "a dry run does nothing");
    assert_eq!(folder.once(&server), ["forgot notes/d.md 1 document"]);
    assert_eq!(known(&server), texts(&[2, 4]));

    // What becomes ignored is gone from where the watcher looks; what cannot be read stays as it was known.
    folder.write(".gitignore", "*.log\nb.jsonl\n");
    folder.write("e.md", &sentence(5));
    folder.once(&server);
    assert_eq!(known(&server), texts(&[5]));
    fs::write(folder.dir().join("e.md"), b"half \xff").expect("written");
    let told = folder.once(&server);
    assert!(told.len() == 1 && told[0].contains("left out") && told[0].contains("e.md"), "{told:?}");
    assert!(folder.once(&server).is_empty(), "it is told once");
    assert_eq!(known(&server), texts(&[5]));

    // An empty folder is most likely a disk that is not there.
    fs::remove_file(folder.dir().join("e.md")).expect("removed");
    let empty = folder.command(&server, &["--once"]).output().expect("run");
    let told = String::from_utf8_lossy(&empty.stderr).into_owned();
    assert!(!empty.status.success() && told.contains("--allow-empty"), "{told}");
    assert_eq!(known(&server), texts(&[5]));
    let meant = folder.command(&server, &["--once", "--allow-empty"]).output().expect("run");
    assert!(meant.status.success(), "{meant:?}");
    assert!(known(&server).is_empty());
}

#[test]
fn a_watcher_that_is_killed_at_any_step_leaves_nothing_behind() {
    let server = Setup::tiny().start();
    let mut number = 0;
    for point in ["begun", "sent", "known", "gone", "forgotten"] {
        let folder = Folder::new();
        let [a, b, c, d] = [1, 2, 3, 4].map(|n| number + n);
        number += 4;
        folder.write("a.md", &sentence(a));
        folder.write("b.md", &sentence(b));
        folder.once(&server);
        // One changes, one goes, one is new: each step is taken.
        folder.write("a.md", &sentence(c));
        fs::remove_file(folder.dir().join("b.md")).expect("removed");
        folder.write("d.md", &sentence(d));
        let mark = folder.outside.path().join("died");
        let mut dying = folder.command(&server, &["--once"]);
        dying.env("ENGRAM_DIE_AT", format!("watch::{point}")).env("ENGRAM_DIE_MARK", &mark);
        let output = dying.output().expect("run");
        assert!(!output.status.success() && mark.exists(), "{point}: {output:?}");
        // Before it comes back, the folder changes once more: what was told half-way must not stay.
        folder.write("a.md", &sentence(a));
        fs::remove_file(folder.dir().join("d.md")).expect("removed");
        folder.once(&server);
        assert_eq!(known(&server), texts(&[a]), "killed at watch::{point}");
        fs::remove_file(folder.dir().join("a.md")).expect("removed");
        folder.command(&server, &["--once", "--allow-empty"]).output().expect("run");
        assert!(known(&server).is_empty(), "killed at watch::{point}");
    }
}

/// A watcher that runs.
struct Watching(Child);

impl Watching {
    fn start(folder: &Folder, server: &Server) -> Self {
        let mut command = folder.command(server, &["--rescan", "3"]);
        Self(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started"))
    }

    /// Kills it, and gives back what it said.
    fn kill(mut self) -> String {
        self.0.kill().expect("killed");
        let mut told = String::new();
        let (mut out, mut err) = (self.0.stdout.take().expect("piped"), self.0.stderr.take().expect("piped"));
        out.read_to_string(&mut told).expect("text");
        err.read_to_string(&mut told).expect("text");
        self.0.wait().expect("ended");
        told
    }
}

fn eventually(server: &Server, numbers: &[usize]) {
    let start = Instant::now();
    while known(server) != texts(numbers) {
        assert!(start.elapsed() < PATIENCE, "{:?} is not {:?}", known(server), texts(numbers));
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_watcher_follows_a_folder_through_its_own_end_and_the_servers() {
    let (mut server, folder) = (Setup::tiny().start(), Folder::new());
    folder.write("a.md", &sentence(1));
    let watching = Watching::start(&folder, &server);
    eventually(&server, &[1]);
    fs::create_dir(folder.dir().join("deep")).expect("made");
    folder.write("deep/b.md", &sentence(2));
    eventually(&server, &[1, 2]);
    let second = folder.command(&server, &["--once"]).output().expect("run");
    assert!(String::from_utf8_lossy(&second.stderr).contains("watched already"), "{second:?}");

    // The server's worker dies, and the folder changes meanwhile.
    let worker = server.worker_id();
    assert!(server.kill_worker());
    folder.write("c.md", &sentence(3));
    server.wait_new_worker(worker, PATIENCE);
    eventually(&server, &[1, 2, 3]);
    let told = watching.kill();
    assert!(told.contains("watching") && !told.contains("panicked"), "{told}");

    // While nobody watches, much happens.
    fs::rename(folder.dir().join("deep"), folder.dir().join("deeper")).expect("renamed");
    fs::remove_file(folder.dir().join("a.md")).expect("removed");
    folder.write("c.md", &sentence(4));
    let watching = Watching::start(&folder, &server);
    eventually(&server, &[2, 4]);
    let told = watching.kill();
    assert!(told.contains("renamed    notes/deep/b.md -> notes/deeper/b.md"), "{told}");
}

#[test]
fn mistakes_are_told_in_a_line() {
    let (server, folder) = (Setup::tiny().start(), Folder::new());
    let told = |dir: &Path, more: &[&str]| {
        let mut command = Command::new(PROGRAM);
        let output = command.arg("watch").arg(dir).args(["--once"]).args(more).output().expect("run");
        assert!(!output.status.success(), "{output:?}");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(told.starts_with("engram: ") && told.lines().count() == 1, "{told}");
        (told, output.status.code())
    };
    let state = folder.outside.path().join("broken.json");
    fs::write(&state, "{").expect("written");
    let (state, url) = (state.to_str().expect("a path"), server.url());
    assert!(told(Path::new("/no/such"), &[]).0.contains("/no/such"));
    assert!(told(&folder.outside.path().join("broken.json"), &[]).0.contains("no folder"));
    assert!(told(&folder.dir(), &["--importance", "2"]).0.contains("0 to 1"));
    assert!(told(&folder.dir(), &["--state", state, "--server", &url]).0.contains("damaged"));
    let fresh = folder.outside.path().join("fresh.json");
    let fresh = fresh.to_str().expect("a path");
    assert_eq!(told(&folder.dir(), &["--state", fresh, "--server", "http://127.0.0.1:9"]).1, Some(3));
}
