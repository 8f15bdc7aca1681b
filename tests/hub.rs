//! A base from the Hugging Face hub: downloaded, kept, resumed, checked. The hub is a small one of
//! our own, [`server`].

mod server;

use crate::harness::{PROGRAM, Setup};
use crate::tiny;
use safetensors::SafeTensors;
use serde_json::json;
use server::{COMMIT, Hub, etag, is_large};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

const MODEL: &str = "org/name";

/// The files of the tiny base, and some that no base needs.
fn files() -> BTreeMap<String, Vec<u8>> {
    let folder = tempfile::tempdir().expect("a folder");
    tiny::write(folder.path());
    let entries = fs::read_dir(folder.path()).expect("readable").map(|entry| entry.expect("readable").path());
    let read = |path: PathBuf| {
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        (name, fs::read(path).expect("readable"))
    };
    let mut files: BTreeMap<String, Vec<u8>> = entries.map(read).collect();
    for other in ["pytorch_model.bin", "README.md", "../outside", "onnx/model.onnx"] {
        files.insert(other.to_owned(), b"unwanted".to_vec());
    }
    files
}

/// A user's machine: a home of its own, and a text to measure.
struct User {
    home: TempDir,
    hub: String,
}

impl User {
    fn of(hub: &Hub) -> Self {
        let home = tempfile::tempdir().expect("a folder");
        fs::write(home.path().join("text.txt"), "abc\n").expect("written");
        Self { home, hub: hub.url.clone() }
    }

    fn command(&self, base: &str, environment: &[(&str, &str)]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(["eval", "--json", "--base", base, "--data", "text.txt"]).current_dir(&self.home);
        for name in ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE"] {
            command.env_remove(name);
        }
        command.env("HF_HOME", self.home.path().join("hf")).env("HF_ENDPOINT", &self.hub);
        command.envs(environment.iter().copied()).stdin(Stdio::null());
        command
    }

    fn eval(&self, base: &str, environment: &[(&str, &str)]) -> Output {
        self.command(base, environment).output().expect("started")
    }

    /// Measures with a base, and gives back what was said beside the figures.
    fn succeeds(&self, base: &str, environment: &[(&str, &str)]) -> String {
        let output = self.eval(base, environment);
        assert!(output.status.success(), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("nll_per_token"), "{output:?}");
        String::from_utf8(output.stderr).expect("text")
    }

    /// Fails with one line, which holds each of the words.
    fn fails(&self, base: &str, environment: &[(&str, &str)], words: &[&str]) {
        let output = self.eval(base, environment);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{output:?}");
        assert!(told.starts_with("engram: ") && told.lines().count() == 1, "{told}");
        for word in words {
            assert!(told.contains(word), "{word} is not in: {told}");
        }
    }

    fn repo(&self) -> PathBuf {
        self.home.path().join("hf/hub/models--org--name")
    }

    fn snapshot(&self) -> PathBuf {
        self.repo().join("snapshots").join(COMMIT)
    }

    /// Names of the files in the blobs' folder.
    fn blobs(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.repo().join("blobs")) else { return Vec::new() };
        entries.map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned()).collect()
    }
}

/// What was asked for, as far as it was of files.
fn of_files(hub: &Hub) -> Vec<server::Asked> {
    hub.asked().into_iter().filter(|asked| !asked.path.starts_with("/api/")).collect()
}

#[test]
fn a_base_is_downloaded_once_and_kept_as_python_keeps_it() {
    let hub = Hub::start(files());
    let user = User::of(&hub);
    hub.faults().token = Some("secret".to_owned());
    assert_eq!(user.succeeds(MODEL, &[("HF_TOKEN", "secret")]), "");

    let asked = hub.asked();
    for other in ["pytorch_model.bin", "README.md", "outside", "onnx"] {
        assert!(!asked.iter().any(|asked| asked.path.contains(other)), "{other}: {asked:?}");
    }
    assert!(asked.iter().any(|asked| asked.host == "store"), "{asked:?}");
    for asked in &asked {
        assert_eq!(asked.token.is_some(), asked.host == "hub", "the token is for the hub alone: {asked:?}");
    }
    assert_eq!(fs::read_to_string(user.repo().join("refs/main")).expect("a reference"), COMMIT);
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        let (link, content) = (user.snapshot().join(file), hub.files()[file].clone());
        let blob = Path::new("../../blobs").join(etag(file, &content));
        assert_eq!(fs::read_link(&link).expect("a link"), blob);
        assert_eq!(fs::read(&link).expect("a file"), content);
    }
    assert_eq!(user.blobs().len(), 4);

    user.succeeds(MODEL, &[("HF_TOKEN", "secret")]);
    assert_eq!(hub.asked().len(), 1, "only which commit it is");
    user.succeeds(MODEL, &[("HF_HUB_OFFLINE", "1")]);
    user.succeeds(&format!("{MODEL}@{COMMIT}"), &[("HF_HUB_OFFLINE", "1")]);
    assert!(hub.asked().is_empty());
    user.fails("org/name@v1", &[("HF_HUB_OFFLINE", "1")], &["org/name@v1", "HF_HUB_OFFLINE"]);
    user.succeeds("org/name@refs/pr/1", &[("HF_TOKEN", "secret")]);
    assert!(user.repo().join("refs/refs/pr/1").is_file());
    assert!(of_files(&hub).is_empty(), "the same commit has the same files");
}

#[test]
fn a_server_starts_with_a_base_from_the_hub() {
    let hub = Hub::start(files());
    let user = User::of(&hub);
    let home = user.home.path().join("hf");
    let setup = Setup::base(PathBuf::from(MODEL));
    let setup = setup.env("HF_HOME", home.to_str().expect("a path")).env("HF_ENDPOINT", &hub.url);
    let server = setup.start();
    server.complete("base", "abc", 2);
    assert!(server.log().contains(COMMIT), "{}", server.log());
}

#[test]
fn a_cache_that_python_filled_is_used() {
    let hub = Hub::start(BTreeMap::new());
    let user = User::of(&hub);
    let cache = user.home.path().join("elsewhere");
    let repo = cache.join("models--org--name");
    for folder in ["blobs", "refs", &format!("snapshots/{COMMIT}"), ".no_exist"] {
        fs::create_dir_all(repo.join(folder)).expect("made");
    }
    for (file, content) in files().into_iter().filter(|(file, _)| !file.contains('/')) {
        let etag = etag(&file, &content);
        fs::write(repo.join("blobs").join(&etag), content).expect("written");
        let link = repo.join("snapshots").join(COMMIT).join(file);
        symlink(Path::new("../../blobs").join(etag), link).expect("linked");
    }
    fs::write(repo.join("refs/main"), COMMIT).expect("written");
    let cache = cache.to_str().expect("a path");
    user.succeeds(MODEL, &[("HF_HUB_CACHE", cache), ("HF_HUB_OFFLINE", "1")]);

    *hub.files() = files();
    user.succeeds(MODEL, &[("HF_HUB_CACHE", cache)]);
    assert!(of_files(&hub).is_empty(), "nothing is missing");
    let nowhere = [("HF_HUB_CACHE", cache), ("HF_ENDPOINT", "http://127.0.0.1:9")];
    let told = user.succeeds(MODEL, &nowhere);
    assert!(told.contains("cannot be reached") && told.contains("in the cache is used"), "{told}");

    fs::remove_file(repo.join("snapshots").join(COMMIT).join("model.safetensors")).expect("removed");
    user.fails(
        MODEL,
        &[("HF_HUB_CACHE", cache), ("HF_HUB_OFFLINE", "1")],
        &["no whole copy", "HF_HUB_OFFLINE"],
    );
    user.fails(MODEL, &nowhere, &["cannot be reached", "check the network"]);
    user.succeeds(MODEL, &[("HF_HUB_CACHE", cache)]);
    assert!(!hub.asked().iter().any(|asked| asked.host == "store"), "the blob was there, without a link");
}

#[test]
fn an_interrupted_download_is_gone_on_with() {
    let hub = Hub::start(files());
    let user = User::of(&hub);
    let size = hub.files()["model.safetensors"].len();
    let (first, second) = (10_000, 25_000);
    assert!(size > 2 * second, "{size}");

    // Broken off, and then silence: that is an error, and what came is kept.
    *hub.faults() = server::Faults { cut: Some((first, 1)), store_down: true, ..Default::default() };
    user.fails(MODEL, &[], &["model.safetensors broke off", "run the same command again"]);
    assert!(!user.snapshot().join("model.safetensors").exists());
    let part = fs::read(user.repo().join("blobs").join(incomplete(&hub))).expect("kept");
    assert_eq!(part, hub.files()["model.safetensors"][..first]);
    hub.asked();

    // Broken off a second time: the same run goes on.
    *hub.faults() = server::Faults { cut: Some((second, 1)), ..Default::default() };
    user.succeeds(MODEL, &[]);
    let from = |byte: usize| Some(format!("bytes={byte}-"));
    let asked = hub.asked().into_iter().filter(|asked| asked.host == "store");
    let sent: Vec<_> = asked.map(|asked| (asked.range, asked.sent)).collect();
    assert_eq!(sent, [(from(first), second), (from(first + second), size - first - second)]);
    assert!(!user.blobs().contains(&incomplete(&hub)));
}

fn incomplete(hub: &Hub) -> String {
    format!("{}.incomplete", etag("model.safetensors", &hub.files()["model.safetensors"]))
}

#[test]
fn what_arrives_changed_is_refused_and_not_kept() {
    let hub = Hub::start(files());
    let user = User::of(&hub);
    hub.faults().flip = true;
    user.fails(MODEL, &[], &["model.safetensors is not what the hub announced", "deleted"]);
    assert_eq!(user.blobs().len(), 3, "the small files only");

    // A beginning that is not of this file is found out at the end.
    hub.faults().flip = false;
    fs::write(user.repo().join("blobs").join(incomplete(&hub)), "another beginning").expect("written");
    user.fails(MODEL, &[], &["is not what the hub announced"]);
    user.succeeds(MODEL, &[]);

    let other = User::of(&hub);
    hub.faults().etag = Some("0".repeat(40));
    other.fails(MODEL, &[], &["config.json is not what the hub announced"]);
    assert!(other.blobs().is_empty());
}

#[test]
fn refusals_say_what_to_do() {
    let hub = Hub::start(files());
    let user = User::of(&hub);
    user.fails("org/nothing", &[], &["there is no model org/nothing"]);
    user.fails("org/name@v9", &[], &["no revision v9"]);
    user.fails(MODEL, &[("HF_ENDPOINT", "http://127.0.0.1:9")], &["cannot be reached", "check the network"]);
    user.fails(MODEL, &[("HF_ENDPOINT", "nowhere")], &["HF_ENDPOINT"]);
    user.fails(MODEL, &[("HF_HUB_OFFLINE", "1")], &["no whole copy", "HF_HUB_OFFLINE"]);

    hub.faults().token = Some("secret".to_owned());
    user.fails(MODEL, &[], &["set HF_TOKEN", "licence"]);
    user.fails(MODEL, &[("HF_TOKEN", "wrong")], &["refuses the token", "HF_TOKEN"]);
    fs::create_dir_all(user.home.path().join("hf")).expect("made");
    fs::write(user.home.path().join("hf/token"), "secret\n").expect("written");
    hub.faults().gated = true;
    user.fails(MODEL, &[], &["gated", "accept its licence at", "HF_TOKEN"]);
    *hub.faults() = server::Faults { size: Some(1 << 60), ..Default::default() };
    user.fails(MODEL, &[], &["make room", "HF_HUB_CACHE"]);
    *hub.faults() = server::Faults::default();

    let without = |file: &str, words: &[&str]| {
        let kept = hub.files().remove(file).expect("there");
        user.fails(MODEL, &[], words);
        hub.files().insert(file.to_owned(), kept);
    };
    without("model.safetensors", &["has no model.safetensors", "choose"]);
    without("tokenizer.json", &["has no tokenizer.json", "choose"]);
    hub.files().insert("config.json".to_owned(), b"{\"model_type\":\"other\"}".to_vec());
    hub.asked();
    let user = User::of(&hub);
    user.fails(MODEL, &[], &["org/name cannot be a base", "config.json"]);
    assert!(!hub.asked().iter().any(|asked| asked.host == "store"), "its weights would be of no use");
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let hub = Hub::start(files());
    let user = User::of(&hub);
    hub.faults().commit = Some("../../../outside".to_owned());
    user.fails(MODEL, &[], &["as the commit"]);
    *hub.faults() = server::Faults { etag: Some("../../../outside".to_owned()), ..Default::default() };
    user.fails(MODEL, &[], &["as the hash"]);
    *hub.faults() = server::Faults::default();
    hub.files().remove("model.safetensors");
    for shard in ["../outside", "a/b.safetensors", "a?b.safetensors", "gone.safetensors"] {
        let index = json!({"weight_map": {"x": shard}}).to_string();
        hub.files().insert("model.safetensors.index.json".to_owned(), index.into_bytes());
        // A commit never changes; who has seen the last index would not ask for this one.
        let user = User::of(&hub);
        user.fails(MODEL, &[], &[shard]);
        let inside = fs::read_dir(user.home.path()).expect("readable").count();
        assert_eq!(inside, 2, "the text and the cache");
        assert_eq!(fs::read_dir(user.repo()).expect("readable").count(), 2, "blobs and snapshots");
    }
    assert!(!hub.asked().iter().any(|asked| asked.host == "store"));
}

#[test]
fn shards_are_brought_by_two_programs_at_once_and_each_once() {
    let mut files = files();
    let whole = files.remove("model.safetensors").expect("there");
    let whole = SafeTensors::deserialize(&whole).expect("safetensors");
    let (one, two): (Vec<_>, Vec<_>) = whole.iter().partition(|(name, _)| name.contains("layers"));
    let mut map = serde_json::Map::new();
    for (shard, tensors) in
        [("model-00001-of-00002.safetensors", one), ("model-00002-of-00002.safetensors", two)]
    {
        map.extend(tensors.iter().map(|(name, _)| ((*name).to_owned(), json!(shard))));
        files.insert(shard.to_owned(), safetensors::serialize(tensors, None).expect("serialised"));
    }
    let index = json!({ "weight_map": map }).to_string();
    files.insert("model.safetensors.index.json".to_owned(), index.into_bytes());
    let shards = files.keys().filter(|file| is_large(file)).count();

    let hub = Hub::start(files);
    let user = User::of(&hub);
    let start = || user.command(MODEL, &[]).stdout(Stdio::null()).spawn().expect("started");
    let both = [start(), start()];
    for mut program in both {
        assert!(program.wait().expect("ended").success());
    }
    let sent = hub.asked().iter().filter(|asked| asked.host == "store").count();
    assert_eq!(sent, shards);
    assert!(user.blobs().iter().all(|blob| !blob.ends_with(".incomplete")), "{:?}", user.blobs());
}
