//! A small hub: serves folders over the protocol of the Hugging Face hub, remembers what it was asked,
//! and misbehaves where a test wants it to.

use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

/// The commit that every revision is at.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What is there, and what goes wrong.
#[derive(Default)]
pub struct Faults {
    /// Bytes after which the store breaks off, the first so many times.
    pub cut: Option<(usize, u32)>,
    /// The store gives no answers, once it has broken off as often as it should.
    pub store_down: bool,
    /// The store changes a byte.
    pub flip: bool,
    /// Only who has this token is let in.
    pub token: Option<String>,
    /// Files are for those who accepted a licence.
    pub gated: bool,
    /// Said to be the hash of each file.
    pub etag: Option<String>,
    /// Said to be the size of each file.
    pub size: Option<u64>,
    /// Said to be the commit.
    pub commit: Option<String>,
}

/// A request as it came in.
#[derive(Debug, Clone)]
pub struct Asked {
    /// `hub` or `store`.
    pub host: &'static str,
    pub method: String,
    pub path: String,
    pub range: Option<String>,
    pub token: Option<String>,
    /// Bytes of the file that were sent.
    pub sent: usize,
}

struct State {
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    faults: Mutex<Faults>,
    asked: Mutex<Vec<Asked>>,
    store: String,
}

/// A running hub, and the store that it redirects to for large files.
pub struct Hub {
    pub url: String,
    state: Arc<State>,
}

impl Hub {
    /// Serves these files as the model `org/name`.
    pub fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        let (hub, store) = (listen(), listen());
        let state = State {
            files: Mutex::new(files),
            faults: Mutex::default(),
            asked: Mutex::default(),
            store: format!("http://{}", store.local_addr().expect("an address")),
        };
        let state = Arc::new(state);
        let url = format!("http://{}", hub.local_addr().expect("an address"));
        for (listener, host) in [(hub, "hub"), (store, "store")] {
            let state = state.clone();
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let state = state.clone();
                    thread::spawn(move || state.answer(host, &stream.expect("a connection")));
                }
            });
        }
        Self { url, state }
    }

    /// What goes wrong, to be changed.
    pub fn faults(&self) -> MutexGuard<'_, Faults> {
        self.state.faults.lock().expect("no test failed while it changed them")
    }

    /// What it serves, to be changed.
    pub fn files(&self) -> MutexGuard<'_, BTreeMap<String, Vec<u8>>> {
        self.state.files.lock().expect("no test failed while it changed them")
    }

    /// What it was asked since the last call.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut *self.state.asked.lock().expect("no thread failed"))
    }
}

fn listen() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").expect("a free port")
}

/// Large files are stored elsewhere, and named by their SHA-256.
pub fn is_large(file: &str) -> bool {
    file.ends_with(".safetensors")
}

/// The name of a file's content.
pub fn etag(file: &str, content: &[u8]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    if is_large(file) {
        return hex(&Sha256::digest(content));
    }
    let git = Sha1::new_with_prefix(format!("blob {}\0", content.len())).chain_update(content);
    hex(&git.finalize())
}

impl State {
    fn answer(&self, host: &'static str, stream: &TcpStream) {
        let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
        let Some(first) = lines.next() else { return };
        let mut words = first.split(' ').map(str::to_owned);
        let (method, path) = (words.next().expect("a method"), words.next().expect("a path"));
        let headers: BTreeMap<String, String> = lines
            .take_while(|line| !line.is_empty())
            .filter_map(|line| line.split_once(": ").map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned())))
            .collect();
        let header = |name: &str| headers.get(name).cloned();
        let mut asked = Asked {
            host,
            method,
            path,
            range: header("range"),
            token: header("authorization").and_then(|value| value.strip_prefix("Bearer ").map(str::to_owned)),
            sent: 0,
        };
        let whole = if host == "hub" { self.hub(&asked) } else { self.store(&mut asked) };
        self.asked.lock().expect("no thread failed").push(asked);
        // A client that has gone away has its reasons.
        let _ = (&mut &*stream).write_all(&whole);
        let _ = stream.shutdown(Shutdown::Write);
    }

    fn hub(&self, asked: &Asked) -> Vec<u8> {
        let faults = self.faults.lock().expect("no thread failed");
        let files = self.files.lock().expect("no thread failed");
        if faults.token.is_some() && faults.token != asked.token {
            return head(401, &[("x-error-code", "RepoNotFound")], 0);
        }
        let parts: Vec<&str> = asked.path.trim_start_matches('/').split('/').collect();
        match parts[..] {
            ["api", "models", "org", "name", "revision", "main" | "v1" | "refs%2Fpr%2F1"] => {
                let siblings: Vec<_> = files.keys().map(|file| json!({ "rfilename": file })).collect();
                let commit = faults.commit.as_deref().unwrap_or(COMMIT);
                let body = json!({"sha": commit, "siblings": siblings}).to_string();
                [head(200, &[], body.len()), body.into_bytes()].concat()
            }
            ["api", "models", "org", "name", ..] => head(404, &[("x-error-code", "RevisionNotFound")], 0),
            ["org", "name", "resolve", COMMIT, _] if faults.gated => {
                head(403, &[("x-error-code", "GatedRepo")], 0)
            }
            // As the real one: small files are a step further, on the same host.
            ["org", "name", "resolve", COMMIT, file] if files.contains_key(file) && !is_large(file) => {
                head(307, &[("location", &format!("/cache/{file}")), ("etag", "\"of-the-redirect\"")], 0)
            }
            ["cache", file] if files.contains_key(file) => {
                let content = &files[file];
                let etag = faults.etag.clone().unwrap_or_else(|| etag(file, content));
                let whole = head(200, &[("etag", &format!("\"{etag}\""))], content.len());
                if asked.method == "HEAD" { whole } else { [whole, content.clone()].concat() }
            }
            ["org", "name", "resolve", COMMIT, file] if files.contains_key(file) => {
                let size = faults.size.unwrap_or(files[file].len() as u64).to_string();
                let etag = format!("\"{}\"", faults.etag.clone().unwrap_or_else(|| etag(file, &files[file])));
                let location = format!("{}/{file}", self.store);
                let mine = [("location", location.as_str()), ("etag", "\"of-the-redirect\"")];
                head(302, &[&mine[..], &[("x-linked-etag", &etag), ("x-linked-size", &size)]].concat(), 0)
            }
            _ => head(404, &[("x-error-code", "RepoNotFound")], 0),
        }
    }

    fn store(&self, asked: &mut Asked) -> Vec<u8> {
        let mut faults = self.faults.lock().expect("no thread failed");
        if faults.store_down && faults.cut.is_none_or(|(_, times)| times == 0) {
            return Vec::new();
        }
        let mut content =
            self.files.lock().expect("no thread failed")[asked.path.trim_start_matches('/')].clone();
        if faults.flip {
            let middle = content.len() / 2;
            content[middle] ^= 1;
        }
        let from = asked.range.as_deref().and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-'));
        let from: usize = from.map_or(0, |from| from.parse().expect("a number"));
        let range = format!("bytes {from}-{}/{}", content.len() - 1, content.len());
        let status = if asked.range.is_some() { 206 } else { 200 };
        let whole =
            head(status, &[("etag", "\"of-the-store\""), ("content-range", &range)], content.len() - from);
        let mut rest = &content[from..];
        if let Some((bytes, times @ 1..)) = faults.cut {
            rest = &rest[..bytes.min(rest.len())];
            faults.cut = Some((bytes, times - 1));
        }
        asked.sent = rest.len();
        [&whole, rest].concat()
    }
}

fn head(status: u16, headers: &[(&str, &str)], length: usize) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {status} -\r\ncontent-length: {length}\r\nconnection: close\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    (text + "\r\n").into_bytes()
}
