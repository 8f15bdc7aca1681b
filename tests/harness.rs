//! Starts the real program in a folder of its own, talks to it, kills it, and leaves nothing behind.

use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use ureq::Agent;

use crate::tiny;

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_engram-under-test");
const START_MAX: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
/// How much of a log is shown when a test fails, bytes.
const LOG_SHOWN: usize = 20_000;

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository").to_owned()
}

/// Runs a command of the program to its end.
pub fn engram(arguments: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).stdin(Stdio::null()).env_remove("ENGRAM_SERVER").env_remove("ENGRAM_API_KEY");
    command.output().expect("started")
}

/// The built-in base, or why it is not there.
pub fn nano() -> Option<PathBuf> {
    let folder = root().join("configs/models/nano");
    let there = folder.join("model.safetensors").exists();
    if !there {
        eprintln!("skipped: {} is not there", folder.display());
    }
    there.then_some(folder)
}

/// Whether tests that take minutes are wanted.
pub fn long() -> bool {
    std::env::var_os("ENGRAM_TEST_LONG").is_some()
}

/// How to start a server.
pub struct Setup {
    base: Option<PathBuf>,
    settings: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Setup {
    /// With a tiny base that knows nothing.
    pub fn tiny() -> Self {
        Self { base: None, settings: Vec::new(), environment: Vec::new() }
    }

    /// With the base in this folder.
    pub fn base(folder: PathBuf) -> Self {
        Self { base: Some(folder), ..Self::tiny() }
    }

    /// With this setting, as section.key=value.
    pub fn set(mut self, setting: &str) -> Self {
        self.settings.push(setting.to_owned());
        self
    }

    /// With this variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Killed once when it comes to this fail point.
    pub fn die_at(self, point: &str) -> Self {
        self.env("ENGRAM_DIE_AT", point)
    }

    /// Starts, and waits until it is ready. One server runs at a time, whichever process of the test
    /// runner asks: those that learn side by side would measure each other.
    pub fn start(self) -> Server {
        let turn = File::create(Path::new(env!("CARGO_TARGET_TMPDIR")).join("turn")).expect("a lock file");
        turn.lock().expect("locked");
        let folder = tempfile::tempdir().expect("a folder");
        let base = self.base.clone().unwrap_or_else(|| {
            tiny::write(&folder.path().join("base"));
            folder.path().join("base")
        });
        let mut server = Server {
            setup: self,
            base,
            folder,
            address: free_address(),
            child: None,
            starts: 0,
            _turn: turn,
        };
        server.start();
        server
    }
}

/// An answer: its status and its body, null when that is not JSON.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub retry_after: Option<String>,
    pub body: Value,
}

impl Answer {
    /// The body of an answer that has to be a success.
    pub fn ok(self) -> Value {
        assert!((200..300).contains(&self.status), "{self:?}");
        self.body
    }
}

/// A running program.
pub struct Server {
    setup: Setup,
    base: PathBuf,
    folder: TempDir,
    address: String,
    child: Option<Child>,
    starts: u32,
    _turn: File,
}

fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("an address").to_string()
}

impl Server {
    /// Starts a program that was ended, on the same folder, and waits until it is ready.
    pub fn start(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        let log = self.folder.path().join(format!("log.{}", self.starts));
        let log = File::create(log).expect("a log");
        self.starts += 1;
        let mut command = Command::new(PROGRAM);
        command.arg("up").arg("--base").arg(&self.base).arg("--data").arg(self.data());
        command.args(["--listen", &self.address]);
        for setting in &self.setup.settings {
            command.args(["--set", setting]);
        }
        command.envs(self.setup.environment.iter().map(|(name, value)| (name, value)));
        command.env("ENGRAM_DIE_MARK", self.folder.path().join("died"));
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        self.child = Some(command.spawn().expect("started"));
        self.wait_ready(START_MAX);
    }

    /// The data folder.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// Where it is, for the command line.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// `host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// How long it took until it was ready.
    pub fn wait_ready(&mut self, patience: Duration) -> Duration {
        let start = Instant::now();
        loop {
            if let Some(Ok(Some(status))) = self.child.as_mut().map(Child::try_wait) {
                panic!("the program ended with {status}");
            }
            if self.try_request("GET", "/readyz", None, &[]).is_ok_and(|answer| answer.status == 200) {
                return start.elapsed();
            }
            assert!(start.elapsed() < patience, "not ready after {patience:?}");
            thread::sleep(POLL);
        }
    }

    /// The answer to a GET.
    pub fn get(&self, path: &str) -> Answer {
        self.try_request("GET", path, None, &[]).unwrap_or_else(|error| panic!("GET {path}: {error}"))
    }

    /// The body of a GET that has to be a success, as text.
    pub fn text(&self, path: &str) -> String {
        let answer = ureq::get(format!("{}{path}", self.url())).call();
        let answer = answer.and_then(|mut answer| answer.body_mut().read_to_string());
        answer.unwrap_or_else(|error| panic!("GET {path}: {error}"))
    }

    /// The answer to a POST.
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.try_post(path, body).unwrap_or_else(|error| panic!("POST {path}: {error}"))
    }

    /// The answer to a POST, or that none came.
    pub fn try_post(&self, path: &str, body: &Value) -> Result<Answer, ureq::Error> {
        self.try_request("POST", path, Some(body.to_string().into_bytes()), &[])
    }

    /// The answer to a DELETE.
    pub fn delete(&self, path: &str) -> Answer {
        self.try_request("DELETE", path, None, &[]).unwrap_or_else(|error| panic!("DELETE {path}: {error}"))
    }

    /// The answer to any request.
    pub fn try_request(
        &self,
        method: &str,
        path: &str,
        body: Option<Vec<u8>>,
        headers: &[(&str, &str)],
    ) -> Result<Answer, ureq::Error> {
        let agent: Agent = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(60)))
            .allow_non_standard_methods(true)
            .build()
            .into();
        let mut request = ureq::http::Request::builder().method(method).uri(format!("{}{path}", self.url()));
        if body.is_some() && headers.is_empty() {
            request = request.header("content-type", "application/json");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut response = match body {
            Some(body) => agent.run(request.body(body)?)?,
            None => agent.run(request.body(())?)?,
        };
        let header = response.headers().get("retry-after").and_then(|value| value.to_str().ok());
        let retry_after = header.map(str::to_owned);
        let text = response.body_mut().read_to_string()?;
        let body = serde_json::from_str(&text).unwrap_or(Value::Null);
        Ok(Answer { status: response.status().as_u16(), retry_after, body })
    }

    /// Submits documents, and gives back their ids. A full or restarting server is asked again, as
    /// any client would.
    pub fn submit(&self, documents: &[Value]) -> Vec<String> {
        let body = json!({ "documents": documents });
        let start = Instant::now();
        loop {
            match self.try_post("/v1/documents", &body) {
                Ok(answer) if ![429, 503].contains(&answer.status) => return ids(&answer.ok()),
                other => assert!(start.elapsed() < START_MAX, "not accepted: {other:?}"),
            }
            thread::sleep(POLL);
        }
    }

    /// Waits until every document is settled, and gives back what the server says of each.
    pub fn settle(&self, ids: &[String], patience: Duration) -> Vec<Value> {
        let start = Instant::now();
        let settle = |id: &String| loop {
            let path = format!("/v1/documents/{id}");
            let answer = self.try_request("GET", &path, None, &[]);
            if let Ok(answer) = answer.as_ref().map(|answer| &answer.body)
                && let Some(status) = answer["status"].as_str()
                && !["accepted", "waiting", "learned"].contains(&status)
            {
                return answer.clone();
            }
            assert!(start.elapsed() < patience, "{id} is not settled after {patience:?}: {answer:?}");
            thread::sleep(POLL);
        };
        ids.iter().map(settle).collect()
    }

    /// The greedy continuation of a prompt by `model`.
    pub fn complete(&self, model: &str, prompt: &str, max_tokens: u32) -> String {
        let body = json!({"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0});
        let answer = self.post("/v1/completions", &body).ok();
        answer["choices"][0]["text"].as_str().expect("a text").to_owned()
    }

    /// Kills the worker as `kill -9` does. False when there was none to kill.
    pub fn kill_worker(&self) -> bool {
        let worker = self.worker();
        worker.is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok())
    }

    /// The process id of the worker, 0 while there is none.
    pub fn worker_id(&self) -> i32 {
        self.worker().map_or(0, |pid| pid.as_raw_nonzero().get())
    }

    /// How long it takes until a worker other than `old` is ready.
    pub fn wait_new_worker(&mut self, old: i32, patience: Duration) -> Duration {
        let start = Instant::now();
        while [0, old].contains(&self.worker_id()) {
            assert!(start.elapsed() < patience, "no new worker after {patience:?}");
            thread::sleep(POLL);
        }
        self.wait_ready(patience);
        start.elapsed()
    }

    /// Whether it was killed where [`Setup::die_at`] said.
    pub fn died(&self) -> bool {
        self.folder.path().join("died").exists()
    }

    /// The generations of a domain, the current one first.
    pub fn generations(&self, domain: &str) -> Vec<String> {
        let log = self.get(&format!("/v1/adapters/{domain}/log")).ok();
        let generations = log["generations"].as_array().unwrap_or_else(|| panic!("no generations in {log}"));
        generations
            .iter()
            .map(|generation| generation["generation"].as_str().expect("a name").to_owned())
            .collect()
    }

    /// Documents that a domain has learned, as its manifest counts them.
    pub fn learned(&self, domain: &str) -> u64 {
        let list = self.get("/v1/adapters").ok();
        let adapters = list["adapters"].as_array().unwrap_or_else(|| panic!("no adapters in {list}"));
        let adapter = adapters.iter().find(|adapter| adapter["domain"] == domain);
        adapter
            .and_then(|adapter| adapter["documents"].as_u64())
            .unwrap_or_else(|| panic!("no {domain} in {list}"))
    }

    fn worker(&self) -> Option<Pid> {
        let supervisor = self.child.as_ref()?.id();
        let children = Command::new("pgrep").args(["-P", &supervisor.to_string()]).output().ok()?;
        let pid = String::from_utf8_lossy(&children.stdout).lines().next()?.parse().ok()?;
        Pid::from_raw(pid)
    }

    /// Sends the supervisor a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = self.child.as_ref().and_then(|child| Pid::from_raw(child.id() as i32));
        kill_process(pid.expect("running"), signal).expect("signalled");
    }

    /// Waits for the end of the program.
    pub fn wait_end(&mut self, patience: Duration) -> ExitStatus {
        let (start, mut child) = (Instant::now(), self.child.take().expect("running"));
        loop {
            if let Some(status) = child.try_wait().expect("waited") {
                return status;
            }
            if start.elapsed() > patience {
                self.child = Some(child);
                panic!("it did not end within {patience:?}");
            }
            thread::sleep(POLL);
        }
    }

    /// All that was logged.
    pub fn log(&self) -> String {
        let mut log = String::new();
        for start in 0..self.starts {
            if let Ok(mut file) = File::open(self.folder.path().join(format!("log.{start}"))) {
                // A log cut off in the middle of a character is shown as far as it can be read.
                let _ = file.read_to_string(&mut log);
            }
        }
        log
    }

    /// The files of the data folder that hold these bytes.
    pub fn files_with(&self, needle: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.data()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).expect("readable") {
                let path = entry.expect("readable").path();
                if path.is_dir() {
                    folders.push(path);
                } else if holds(&fs::read(&path).expect("readable"), needle.as_bytes()) {
                    found.push(path);
                }
            }
        }
        found
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = self.log();
            let skipped = log.len().saturating_sub(LOG_SHOWN);
            let shown: String = log.char_indices().filter(|(at, _)| *at >= skipped).map(|(_, c)| c).collect();
            eprintln!("--- log of {}\n{shown}---", self.address);
        }
        self.kill_worker();
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn holds(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|window| window == needle)
}

/// The ids in an answer to `POST /v1/documents`.
pub fn ids(answer: &Value) -> Vec<String> {
    let documents = answer["documents"].as_array().unwrap_or_else(|| panic!("no documents in {answer}"));
    documents.iter().map(|document| document["id"].as_str().expect("an id").to_owned()).collect()
}

/// Sentences that differ from each other enough for no filter to take them for duplicates.
pub fn sentence(number: usize) -> String {
    const WHO: [&str; 7] = [
        "A miller",
        "The old captain",
        "My neighbour",
        "Her sister",
        "The clerk",
        "A violinist",
        "The gardener",
    ];
    const DOES: [&str; 11] = [
        "carries apples to",
        "paints a picture of",
        "writes letters about",
        "walks slowly past",
        "has never seen",
        "sings loudly in",
        "dreams at night of",
        "sells warm bread near",
        "measures the height of",
        "hides gold under",
        "tells children about",
    ];
    const WHERE: [&str; 13] = [
        "the harbour",
        "a ruined tower",
        "the northern bridge",
        "our school",
        "the frozen lake",
        "a quiet library",
        "the market square",
        "an empty theatre",
        "the railway station",
        "a field of barley",
        "the lighthouse",
        "the glass factory",
        "a garden of roses",
    ];
    let (who, does, place) = (WHO[number % 7], DOES[number % 11], WHERE[number % 13]);
    format!(
        "{who} {does} {place}, and on day {number} everyone in town number {} remembers it well.",
        number * 7919 % 10007
    )
}
