//! A gateway that runs, and a client that can send what no client should.

use futures_util::future::LocalBoxFuture;
use gateway::{Doors, Gateway, Generator, Recorder, ServerInfo, Words};
use kit::lane::Stop;
use kit::ledger::Ledger;
use kit::link::{Door, Events, ReplyTo, Unanswered, events};
use kit::manifests::Registry;
use kit::settings::Settings;
use proto::{
    BaseId, Blob, Choice, Domain, Embed, Embedded, Export, FinishReason, Forget, Forgotten, Generate,
    GenerateEvent, Generation, GenerationId, Import, Lineage, Manifest, Merge, Message, PeftFiles, Prompt,
    Receipt, Refusal, Rollback, RolledBack, Source, TokenLogprob, TopLogprob, TrainReport, Usage, Weighted,
};
use serde_json::Value;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The lineage `medical` serves this.
pub const CURRENT: &str = "00000000000000bb";
/// And served this before.
pub const PARENT: &str = "00000000000000aa";
/// A key that the settings allow.
pub const KEY: &str = "a-key-of-sixteen-and-more";

/// What the fakes behind the doors have seen.
#[derive(Default)]
pub struct Seen {
    /// Requests for text, the last one.
    pub asked: Mutex<Option<Generate>>,
    /// Answers whose client went away before their end.
    pub abandoned: AtomicU64,
    /// The last import.
    pub imported: Mutex<Option<Import>>,
    /// The last merge.
    pub merged: Mutex<Option<Merge>>,
}

/// A gateway that runs.
pub struct Server {
    pub address: SocketAddr,
    pub ledger: Arc<Ledger>,
    pub seen: Arc<Seen>,
    pub ready: Arc<AtomicBool>,
    pub stop: Stop,
    pub thread: Option<JoinHandle<anyhow::Result<()>>>,
    /// The data folder.
    pub folder: TempDir,
}

impl Server {
    /// Starts with the default settings and these.
    pub fn start(flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let seen = Arc::new(Seen::default());
        let (gateway, ready) = gateway(flags, &folder, &seen);
        let (ledger, stop) = (Arc::clone(&gateway.ledger), Stop::new());
        let (told, bound) = mpsc::channel();
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            actix_web::rt::System::new().block_on(async move {
                let bound = gateway.bind(stopped)?;
                told.send(bound.address())?;
                bound.serve().await
            })
        });
        let address = bound.recv_timeout(Duration::from_secs(10)).expect("bound");
        Self { address, ledger, seen, ready, stop, thread: Some(thread), folder }
    }

    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, &[], body.to_string().as_bytes())
    }

    /// A request with a length, and with these headers beside the usual ones.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut head = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\n");
        let mut line = |name: &str, value: &str| head.push_str(&format!("{name}: {value}\r\n"));
        if !headers.iter().any(|(name, _)| *name == "host") {
            line("host", "localhost");
        }
        if !headers.iter().any(|(name, _)| *name == "content-type") {
            line("content-type", "application/json");
        }
        line("content-length", &body.len().to_string());
        headers.iter().for_each(|(name, value)| line(name, value));
        head.push_str("\r\n");
        self.raw(&[head.as_bytes(), body].concat())
    }

    /// These bytes on a connection of their own.
    pub fn raw(&self, bytes: &[u8]) -> Answer {
        let mut stream = self.connect();
        // A server that refuses early may close before all of it is written.
        let _ = stream.write_all(bytes);
        Answer::read(&mut stream)
    }

    /// Files that are left of uploads.
    pub fn uploads(&self) -> Vec<std::fs::DirEntry> {
        let folder = self.folder.path().join(gateway::UPLOADS);
        std::fs::read_dir(folder).map_or_else(|_| Vec::new(), |entries| entries.flatten().collect())
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("connected");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        stream
    }

    /// Fails unless an ordinary request is answered as ever.
    pub fn assert_unharmed(&self, after: &str) {
        let answer = self.post("/v1/completions", &serde_json::json!({"prompt": "hi", "max_tokens": 2}));
        assert_eq!(answer.status, 200, "after {after}: {answer:?}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.set();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    /// Reads to the end of the connection.
    pub fn read(stream: &mut TcpStream) -> Self {
        let mut bytes = Vec::new();
        match stream.read_to_end(&mut bytes) {
            Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("no answer: {error}"),
            _ => {}
        }
        let text = String::from_utf8(bytes).expect("text");
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
        let body = if chunked { dechunked(body) } else { body.to_owned() };
        Self { status, head: head.to_owned(), body }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.head.lines().filter_map(|line| line.split_once(": "));
        headers.find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// The parameter that an error names.
    pub fn param(&self) -> Value {
        self.json()["error"]["param"].clone()
    }

    /// Fails unless this is an error in OpenAI's form.
    pub fn assert_error_form(&self) {
        let error = self.json()["error"].clone();
        let fields = error.as_object().unwrap_or_else(|| panic!("{self:?}"));
        for field in ["message", "type", "param", "code"] {
            assert!(fields.contains_key(field), "{field}: {self:?}");
        }
        assert!(error["message"].as_str().is_some_and(|message| message.len() > 5), "{self:?}");
    }
}

fn dechunked(mut rest: &str) -> String {
    let mut body = String::new();
    while let Some((size, tail)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).expect("a size");
        body.push_str(&tail[..size]);
        rest = tail.get(size + 2..).unwrap_or("");
    }
    body
}

/// Waits until this holds.
pub fn eventually(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what} never held");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A gateway on a folder of its own, with its switch for being ready.
pub fn gateway(flags: &[&str], folder: &TempDir, seen: &Arc<Seen>) -> (Gateway, Arc<AtomicBool>) {
    static RECORDER: OnceLock<Recorder> = OnceLock::new();
    let mut all = vec!["gateway.listen=127.0.0.1:0".to_owned()];
    all.extend(flags.iter().map(|flag| (*flag).to_owned()));
    let ready = Arc::new(AtomicBool::new(true));
    let told = Arc::clone(&ready);
    let gateway = Gateway {
        settings: Settings::load(None, &all).expect("settings"),
        ledger: Arc::new(Ledger::open(&folder.path().join("ledger")).expect("a ledger")),
        registry: Arc::new(registry(folder)),
        doors: doors(seen),
        words: Arc::new(Bytes),
        reader: Arc::new(Lines),
        ready: Box::new(move || told.load(Ordering::Relaxed)),
        learning: Box::new(|| true),
        info: ServerInfo {
            base_name: "tiny".into(),
            base_id: base(),
            parameters: 260_000,
            context_length: 512,
            device: "cpu".into(),
            precision: "f32".into(),
            data_dir: folder.path().to_owned(),
        },
        metrics: RECORDER.get_or_init(|| Recorder::install().expect("installed once")).clone(),
    };
    (gateway, ready)
}

fn base() -> BaseId {
    BaseId::new("0123456789abcdef").expect("an id")
}

pub fn generation_id(text: &str) -> GenerationId {
    GenerationId::new(text).expect("an id")
}

/// One lineage, `medical`, with two generations.
fn registry(folder: &TempDir) -> Registry {
    let registry = Registry::open(&folder.path().join("lineages")).expect("a registry");
    let lineage = Domain::new("medical").expect("a domain");
    let generation = |id, parent: Option<&str>, number| Generation {
        id: generation_id(id),
        lineage: lineage.clone(),
        base: base(),
        parent: parent.map(generation_id),
        merged_from: Vec::new(),
        number,
        manifest: number + 1,
        after: number,
        through: number + 1,
        documents: 1,
        weights: Blob("0".repeat(64)),
        optimiser: None,
        fisher: None,
        answer_head: None,
        probe: None,
        learned: Blob("0".repeat(64)),
        report: TrainReport::default(),
        receipt: Receipt::default(),
        published_ms: 1_700_000_000_000,
    };
    for (number, (id, parent)) in [(PARENT, None), (CURRENT, Some(PARENT))].into_iter().enumerate() {
        let number = number as u64;
        let mut manifest = Manifest { number: number + 1, ..Manifest::empty(base(), false) };
        let current =
            Lineage { current: Some(generation_id(id)), documents: number + 1, ..Lineage::default() };
        manifest.lineages.insert(lineage.clone(), current);
        registry.commit(manifest, Some(generation(id, parent, number))).expect("committed");
    }
    registry.set_live(2);
    registry
}

fn doors(seen: &Arc<Seen>) -> Doors {
    let (keep, merges) = (Arc::clone(seen), Arc::clone(seen));
    Doors {
        generate: Arc::new(Fake(Arc::clone(seen))),
        embed: answered(|ask: Embed| match ask.text.as_str() {
            "" => Err(Refusal::Invalid { param: "input".into(), message: "it is empty".into() }),
            text => {
                let choice = Choice { adapters: Vec::new(), confidence: None };
                Ok(Embedded { vector: vec![text.len() as f32, -0.5], choice, tokens: text.len() as u32 })
            }
        }),
        rollback: answered(|ask: Rollback| match ask.expected {
            Some(expected) if expected.as_str() != CURRENT => {
                Err(Refusal::Conflict(format!("it is {CURRENT}")))
            }
            _ => Ok(RolledBack { from: generation_id(CURRENT), to: ask.to.or(Some(generation_id(PARENT))) }),
        }),
        forget: answered(|ask: Forget| match ask.id.as_str() {
            "missing" => Err(Refusal::NotFound("there is no such document".into())),
            _ => Ok(Forgotten { id: ask.id, derived_documents: 0, removed_generations: 1, serving: None }),
        }),
        import: answered(move |ask: Import| {
            *keep.imported.lock().expect("not poisoned") = Some(ask);
            Ok(generation_id(CURRENT))
        }),
        merge: answered(move |ask: Merge| {
            *merges.merged.lock().expect("not poisoned") = Some(ask);
            Ok(generation_id(CURRENT))
        }),
        export: answered(|ask: Export| match ask.generation {
            Some(id) if id.as_str() != CURRENT => {
                Err(Refusal::NotFound("there is no such generation".into()))
            }
            _ => Ok(PeftFiles { config: r#"{"r": 16}"#.into(), weights: vec![0, 159, 255] }),
        }),
    }
}

/// A door behind which this function answers, on a thread of its own.
fn answered<Q, R>(answer: impl Fn(Q) -> R + Send + 'static) -> Door<Q, R>
where
    Q: Send + 'static,
    R: Send + 'static,
{
    let (door, mut questions) = Door::to_channel(8);
    thread::spawn(move || {
        while let Some((question, reply)) = questions.blocking_recv() {
            let _ = reply.send(answer(question));
        }
    });
    door
}

/// A token a byte, and 256 before each text.
struct Bytes;

impl Words for Bytes {
    fn encode(&self, text: &str, whole: bool) -> anyhow::Result<Vec<u32>> {
        let begin = whole.then_some(256);
        Ok(begin.into_iter().chain(text.bytes().map(u32::from)).collect())
    }

    fn encode_chat(&self, messages: &[Message], open: bool) -> anyhow::Result<Vec<u32>> {
        let text: String = messages.iter().map(|message| format!("{}\n", message.content)).collect();
        self.encode(&text, open)
    }

    fn decode(&self, tokens: &[u32]) -> anyhow::Result<String> {
        Ok(tokens.iter().filter_map(|id| u8::try_from(*id).ok()).map(char::from).collect())
    }

    fn token(&self, id: u32) -> Option<String> {
        (id <= 256).then(|| id.to_string())
    }
}

/// Finds a document in each line; `unusable` cannot be read.
struct Lines;

impl gateway::Reader for Lines {
    fn documents(&self, mut file: File, name: &str) -> Result<Vec<gateway::Found>, String> {
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(|error| error.to_string())?;
        if text == "unusable" {
            return Err(format!("{name} cannot be read"));
        }
        let found = |(number, line): (usize, &str)| gateway::Found {
            place: format!("{name}:{}", number + 1),
            body: serde_json::Map::from_iter([("text".to_owned(), line.into())]),
        };
        Ok(text.lines().enumerate().map(found).collect())
    }
}

/// Answers by what the prompt says: `full`, `refuse`, `no model`, `too many`, `die`, `hang`, or
/// anything else.
struct Fake(Arc<Seen>);

impl Generator for Fake {
    fn generate(&self, request: Generate) -> LocalBoxFuture<'_, Result<Events<GenerateEvent>, Unanswered>> {
        let prompt = match &request.prompt {
            Prompt::Text(text) => text.clone(),
            Prompt::Messages(messages) => {
                messages.last().map(|m: &Message| m.content.clone()).unwrap_or_default()
            }
        };
        *self.0.asked.lock().expect("not poisoned") = Some(request.clone());
        if prompt == "full" {
            return Box::pin(async { Err(Unanswered::Busy) });
        }
        let (reply, events) = events(4);
        let seen = Arc::clone(&self.0);
        thread::spawn(move || tell(&prompt, &request, &reply, &seen));
        Box::pin(async { Ok(events) })
    }
}

fn tell(prompt: &str, request: &Generate, reply: &ReplyTo<GenerateEvent>, seen: &Seen) {
    let refused =
        |param: &str| GenerateEvent::Refused { param: param.into(), message: "it is too long".into() };
    let domain = Domain::new("medical").expect("a domain");
    let adapter = Weighted { domain, generation: Some(generation_id(CURRENT)), weight: 1.0 };
    let started = GenerateEvent::Started(Choice { adapters: vec![adapter], confidence: Some(0.75) });
    let began = vec![started.clone(), piece(request, 0, 0, "Hel")];
    let script = match prompt {
        "refuse" => vec![refused("prompt")],
        "no model" => vec![refused("model")],
        "too many" => vec![refused("n")],
        "die" | "hang" => began,
        // From the first document, and from one that is no longer there.
        "cite" => [vec![started], answers(request, &[(1, 0.75), (99, 0.125)])].concat(),
        _ => [vec![started], answers(request, &[])].concat(),
    };
    for event in script {
        let _ = reply.blocking_send(event);
    }
    if prompt == "hang" {
        while !reply.is_gone() {
            thread::sleep(Duration::from_millis(5));
        }
        seen.abandoned.fetch_add(1, Ordering::Relaxed);
    }
}

/// The answers, a piece of each in turn. Each but the first ends with its number; the last is the
/// first to end. All are from the same documents.
fn answers(request: &Generate, from: &[(u64, f32)]) -> Vec<GenerateEvent> {
    let first = (0..request.n).map(|index| piece(request, index, 0, "Hello"));
    let second = (0..request.n).map(|index| {
        let number = if index == 0 { String::new() } else { format!(" {index}") };
        piece(request, index, 5, &format!("\n\"wörld\"{number}"))
    });
    let usage = Usage { prompt_tokens: 3, completion_tokens: 2 };
    let sources: Vec<Source> = from.iter().map(|&(ordinal, likely)| Source { ordinal, likely }).collect();
    let finished = |index| {
        let (reason, sources) = (FinishReason::Stop, sources.clone());
        GenerateEvent::Finished { index, reason, usage, sources }
    };
    let ends = (0..request.n).rev().map(finished);
    first.chain(second).chain(ends).collect()
}

/// A piece of text, which is one token; it was certain, and nothing else likely at all.
fn piece(request: &Generate, index: u32, text_offset: u32, text: &str) -> GenerateEvent {
    let logprobs = request.sampling.logprobs.map(|top| {
        let token = TopLogprob { bytes: text.into(), logprob: 0.0 };
        let other = TopLogprob { bytes: vec![0xC3], logprob: f32::NEG_INFINITY };
        let top = [token.clone(), other].into_iter().take(top as usize).collect();
        TokenLogprob { token, top, text_offset }
    });
    GenerateEvent::Text { index, text: text.into(), logprobs: logprobs.into_iter().collect() }
}
