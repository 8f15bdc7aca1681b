//! Files as documents: text, HTML, PDF, and what only looks like them; by upload and on the command line.

use crate::harness::{Server, Setup, engram, root, sentence};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(120);
const PAGE: &str = "<!doctype html><html><body><h1>Keeping bees</h1><p>Aurelia keeps nine hives of bees behind the \
    glass factory, and sells their honey in <a href='http://x/'>autumn</a>.</p><script>let secret = 7;</script></body></html>";

fn golden(name: &str) -> PathBuf {
    root().join("tests/golden/documents").join(name)
}

fn learn(server: &Server, paths: &[&Path], more: &[&str]) -> Output {
    let paths: Vec<&str> = paths.iter().map(|path| path.to_str().expect("a path")).collect();
    engram(&[&["learn"], &paths[..], more, &["--server", &server.url()]].concat())
}

fn told(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// An upload of these files in a form.
fn upload(server: &Server, files: &[(&str, Vec<u8>)]) -> crate::harness::Answer {
    let mut body = Vec::new();
    for (name, content) in files {
        body.extend(
            format!("--xYzZY\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n")
                .bytes(),
        );
        body.extend(content);
        body.extend(b"\r\n");
    }
    body.extend(b"--xYzZY--\r\n");
    let kind = [("content-type", "multipart/form-data; boundary=xYzZY")];
    server.try_request("POST", "/v1/documents", Some(body), &kind).expect("answered")
}

fn text_of(server: &Server, id: &str) -> String {
    let document = server.get(&format!("/v1/documents/{id}?content=true")).ok();
    document["content"]["text"].as_str().expect("a text").to_owned()
}

#[test]
fn a_folder_is_learned_with_its_pages_and_papers_and_an_upload_gives_the_same_documents() {
    let server = Setup::tiny().start();
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join("notes").join(name);
    fs::create_dir_all(at("build")).expect("made");
    let pdf = fs::read(golden("report.pdf")).expect("readable");
    fs::write(at("report.pdf"), &pdf).expect("written");
    fs::write(at("bees.html"), PAGE).expect("written");
    fs::write(at("a.md"), sentence(1)).expect("written");
    fs::write(at(".gitignore"), "build/\n*.log\n").expect("written");
    fs::write(at("build/out.txt"), sentence(2)).expect("written");
    fs::write(at("run.log"), sentence(3)).expect("written");
    for (name, number) in [("train.jsonl", 4), ("valid.jsonl", 5), ("test.jsonl", 6)] {
        fs::write(at(name), json!({"text": sentence(number)}).to_string()).expect("written");
    }

    let output = learn(&server, &[&folder.path().join("notes")], &["--json", "--wait"]);
    assert!(output.status.success(), "{}", told(&output));
    assert!(told(&output).contains("valid.jsonl, which is to measure with"), "{}", told(&output));
    let lines = String::from_utf8(output.stdout).expect("text");
    let learned: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let places: Vec<&str> = learned.iter().map(|one| one["place"].as_str().expect("a place")).collect();
    assert_eq!(places, ["notes/a.md", "notes/bees.html", "notes/report.pdf", "notes/train.jsonl:1"]);
    assert!(learned.iter().all(|one| one["status"] == "live"), "{learned:?}");

    let id = |place: usize| learned[place]["id"].as_str().expect("an id");
    let page = text_of(&server, id(1));
    assert!(page.starts_with("# Keeping bees") && page.contains("their honey in autumn."), "{page}");
    assert!(!page.contains("secret") && !page.contains("http"), "{page}");
    let paper = text_of(&server, id(2));
    for said in ["year 6678", "“nine miles”", "planted barley around the tower"] {
        assert!(paper.contains(said), "{said}: {paper}");
    }

    let files = [("notes/bees.html", PAGE.as_bytes().to_vec()), ("notes/report.pdf", pdf)];
    let uploaded = upload(&server, &files).ok();
    for (number, place) in [(0, 1), (1, 2)] {
        assert_eq!(uploaded["documents"][number]["id"], learned[place]["id"], "one path: {uploaded}");
        assert_eq!(uploaded["documents"][number]["status"], "live");
    }
}

#[test]
fn a_paper_that_cannot_be_read_is_one_line_that_says_why() {
    let server = Setup::tiny().start();
    let folder = tempfile::tempdir().expect("a folder");
    let whole = fs::read(golden("report.pdf")).expect("readable");
    let cases: [(&str, Vec<u8>, &str); 6] = [
        ("locked.pdf", fs::read(golden("locked.pdf")).expect("readable"), "protected by a password"),
        ("scan.pdf", fs::read(golden("scan.pdf")).expect("readable"), "text recognition"),
        ("bomb.pdf", fs::read(golden("bomb.pdf")).expect("readable"), "1024 MiB"),
        ("cut.pdf", whole[..whole.len() / 3].to_vec(), "damaged"),
        ("nothing.pdf", Vec::new(), "damaged"),
        ("deep.html", "<div>".repeat(4_000).into_bytes(), "deep.html"),
    ];
    for (name, bytes, expected) in cases {
        let path = folder.path().join(name);
        fs::write(&path, &bytes).expect("written");
        let start = Instant::now();
        let output = learn(&server, &[&path], &[]);
        let complained = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{name}: {}", told(&output));
        assert!(complained.contains(name) && complained.contains(expected), "{name}: {complained}");
        assert!(complained.lines().count() == 2 && !complained.contains("panicked"), "{name}: {complained}");
        assert!(start.elapsed() < PATIENCE, "{name} took {:?}", start.elapsed());
        let answer = upload(&server, &[("good.md", sentence(1).into_bytes()), (name, bytes)]);
        assert_eq!(answer.status, 400, "{name}: {answer:?}");
        let message = answer.body["error"]["message"].as_str().expect("a message").to_owned();
        assert!(message.contains(expected), "{name}: {message}");
    }
    let listed = server.get("/v1/documents").ok();
    assert_eq!(listed["documents"], json!([]), "nothing of it was accepted");
    assert_eq!(server.get("/readyz").status, 200);

    let free = learn(&server, &[&golden("printing-forbidden.pdf")], &["--json"]);
    assert!(free.status.success(), "what only may not be printed can be read: {}", told(&free));
}

#[test]
fn uploads_are_bounded_and_nothing_of_them_is_left() {
    let server = Setup::tiny().set("gateway.upload_bytes_max=100000").start();
    let secret = "Quillonia hid the amber chessboard below the third stair.";
    let small = format!("{secret} {}", sentence(1));
    let answer = upload(&server, &[("a.txt", small.clone().into_bytes()), ("b.bin", vec![0; 10])]);
    assert_eq!(answer.status, 400, "a picture is no text: {answer:?}");
    assert_eq!(server.files_with(secret), [] as [PathBuf; 0]);
    assert_eq!(upload(&server, &[("a.txt", vec![b'x'; 200_000])]).status, 413);
    let taken = upload(&server, &[("a.txt", small.into_bytes())]).ok();
    let id = taken["documents"][0]["id"].as_str().expect("an id").to_owned();
    assert_eq!(server.settle(&[id], PATIENCE)[0]["status"], "live");
    let uploads = fs::read_dir(server.data().join("uploads")).map_or(0, Iterator::count);
    assert_eq!(uploads, 0);
}
