//! A teacher of our own: the chat completions of OpenAI, streamed, with faults on order.

use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

/// What it does with a request.
#[derive(Debug, Clone)]
pub enum Does {
    /// Answers well.
    Answers,
    /// Says this, with this reason for the end.
    Says(String, &'static str),
    /// Fails with a status, and a header.
    Fails(u16, Option<(&'static str, &'static str)>),
    /// Takes the request, and is silent for so long.
    IsSilent(Duration),
    /// Streams what is not JSON.
    Babbles,
    /// Ends the stream in good order, but before the answer ends.
    Stops,
    /// Loses the connection in the middle of a chunk.
    Breaks,
    /// Answers well, but counts no tokens.
    LosesCount,
}

/// A request that came.
#[derive(Debug, Clone)]
pub struct Asked {
    pub at: Instant,
    pub authorization: String,
    pub body: Value,
}

impl Asked {
    /// What was asked.
    pub fn content(&self) -> &str {
        self.body["messages"][0]["content"].as_str().expect("a message")
    }
}

struct State {
    script: Mutex<VecDeque<Does>>,
    asked: Mutex<Vec<Asked>>,
    most_at_once: Mutex<(usize, usize)>,
}

/// A running teacher.
pub struct Teacher {
    pub url: String,
    state: Arc<State>,
}

impl Teacher {
    /// It does what is ordered with one request after the other, and answers all others well.
    pub fn start(script: Vec<Does>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}/v1", listener.local_addr().expect("an address"));
        let state = State {
            script: Mutex::new(script.into()),
            asked: Mutex::default(),
            most_at_once: Mutex::default(),
        };
        let state = Arc::new(state);
        let own = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let state = Arc::clone(&own);
                thread::spawn(move || state.hear(&stream.expect("a connection")));
            }
        });
        Self { url, state }
    }

    /// All that it was asked.
    pub fn asked(&self) -> Vec<Asked> {
        lock(&self.state.asked).clone()
    }

    /// The most requests that were under way together.
    pub fn most_at_once(&self) -> usize {
        lock(&self.state.most_at_once).1
    }

    /// What it does with the next requests.
    pub fn order(&self, script: Vec<Does>) {
        *lock(&self.state.script) = script.into();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no thread failed")
}

impl State {
    fn hear(&self, stream: &TcpStream) {
        let mut reader = BufReader::new(stream);
        let (mut first, mut length, mut authorization) = (String::new(), 0, String::new());
        reader.read_line(&mut first).expect("a line");
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).expect("a line");
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse().expect("a number"),
                "authorization" => authorization = value.to_owned(),
                _ => {}
            }
        }
        if first.is_empty() {
            return;
        }
        assert!(first.starts_with("POST /v1/chat/completions "), "{first}");
        let mut body = vec![0; length];
        reader.read_exact(&mut body).expect("a body");
        let asked =
            Asked { at: Instant::now(), authorization, body: serde_json::from_slice(&body).expect("JSON") };
        assert_eq!(asked.body["stream"], true, "{}", asked.body);
        lock(&self.asked).push(asked.clone());
        self.count(1);
        let does = lock(&self.script).pop_front().unwrap_or(Does::Answers);
        // A client that has gone away has its reasons.
        let _ = answer(stream, &asked, does);
        self.count(-1);
        let _ = stream.shutdown(Shutdown::Both);
    }

    fn count(&self, change: isize) {
        let mut counts = lock(&self.most_at_once);
        counts.0 = counts.0.saturating_add_signed(change);
        counts.1 = counts.1.max(counts.0);
    }
}

/// What a good teacher says.
fn good(asked: &str) -> String {
    match asked.rsplit_once("\n\nThe ") {
        Some((_, text)) => {
            let subject: String = text.split_whitespace().skip(1).take(4).collect::<Vec<_>>().join(" ");
            format!(
                "Q: Who knows of {subject}?\nA: Aurelia does.\n\nQ: Since when, of {subject}?\nA: Since spring."
            )
        }
        None => format!("Aurelia says yes to that, {}", asked.len()),
    }
}

fn answer(mut stream: &TcpStream, asked: &Asked, does: Does) -> std::io::Result<()> {
    let piece = |text: &str| {
        let choice = json!({"index": 0, "delta": {"content": text}, "finish_reason": null});
        format!(
            "data: {}\n\n",
            json!({"object": "chat.completion.chunk", "choices": [choice], "usage": null})
        )
    };
    let end = |reason: &str| {
        let choice = json!({"index": 0, "delta": {}, "finish_reason": reason});
        format!("data: {}\n\n", json!({"choices": [choice]}))
    };
    let counted = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":100,\"completion_tokens\":10}}\n\n";
    let done = "data: [DONE]\n\n";
    let whole = |text: &str, reason: &str| {
        let (first, second) = text.split_at(text.char_indices().nth(3).map_or(0, |(at, _)| at));
        piece(first) + ": a comment\n\n" + &piece(second) + &end(reason)
    };
    let text = good(asked.content());
    let events = match does {
        Does::Answers => whole(&text, "stop") + counted + done,
        Does::Says(text, reason) => whole(&text, reason) + counted + done,
        Does::LosesCount => whole(&text, "stop") + done,
        Does::Babbles => "data: {\"choices\": [oops\n\n".to_owned() + done,
        Does::Stops => piece("Aurelia says"),
        Does::IsSilent(time) => {
            thread::sleep(time);
            return Ok(());
        }
        Does::Breaks => {
            let head =
                "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
            return stream.write_all(format!("{head}fff\r\n{}", piece("Aurelia")).as_bytes());
        }
        Does::Fails(status, header) => {
            let body = json!({"error": {"message": format!("no, {}", asked.authorization), "code": null}})
                .to_string();
            let header = header.map(|(name, value)| format!("{name}: {value}\r\n")).unwrap_or_default();
            let head = format!(
                "HTTP/1.1 {status} -\r\n{header}connection: close\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            return stream.write_all((head + &body).as_bytes());
        }
    };
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
    stream.write_all(head.as_bytes())?;
    stream.write_all(events.as_bytes())
}
