//! A running server, as the other commands see it.

use crate::waiting::Waiting;
use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;
use std::cell::Cell;
use std::io::{BufRead, BufReader, IsTerminal};
use std::thread;
use std::time::{Duration, Instant};
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

/// Exported adapters are the largest answers, bytes.
const ANSWER_BYTES_MAX: u64 = 1 << 30;
const PATIENCE: Duration = Duration::from_secs(15);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const RESTART_PAUSE: Duration = Duration::from_millis(500);
/// A full server says how long to wait; this bounds what we believe.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// Where the server is.
#[derive(Debug, Clone, clap::Args)]
pub struct ServerArgs {
    /// Address of the server.
    #[arg(
        long,
        global = true,
        env = "ENGRAM_SERVER",
        default_value = "http://127.0.0.1:8420",
        value_name = "URL"
    )]
    pub server: String,
    /// Key, when the server asks for one.
    #[arg(long, global = true, env = "ENGRAM_API_KEY", hide_env_values = true)]
    pub key: Option<String>,
}

/// A connection to a server.
pub struct Client {
    agent: Agent,
    server: String,
    key: Option<String>,
    patience: Duration,
    /// Whether it has answered before: if so, a broken connection means that it is restarting.
    met: Cell<bool>,
}

/// A refusal of the server, which asking again will not change.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// The part of the request at fault, such as `documents[3].importance`.
    pub param: Option<String>,
    /// What the server answered it with.
    pub status: StatusCode,
    message: String,
}

/// That nobody answers.
#[derive(Debug, thiserror::Error)]
#[error("no server answers at {server} ({error}); start one with 'engram up', or name another with --server")]
pub struct NoServer {
    server: String,
    error: String,
}

/// A request.
#[derive(Clone, Copy)]
struct Ask<'a> {
    method: &'a str,
    path: &'a str,
    body: Option<&'a Value>,
    key: Option<&'a str>,
}

impl<'a> Ask<'a> {
    fn new(method: &'a str, path: &'a str) -> Self {
        Self { method, path, body: None, key: None }
    }
}

enum Attempt {
    Answered(Response<Body>),
    /// The server has not acted on the request and asks for it again after this long.
    Later(Duration, anyhow::Error),
}

impl Client {
    /// A client that waits a little for a full server, and for one that restarts meanwhile.
    ///
    /// # Errors
    /// When the address is not one of HTTP.
    pub fn new(args: &ServerArgs) -> Result<Self> {
        let server = args.server.trim_end_matches('/').to_owned();
        if !server.starts_with("http://") {
            bail!(
                "{server:?} is not an address that starts with http:// (for https, put a proxy in between)"
            );
        }
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .build()
            .into();
        Ok(Self { agent, server, key: args.key.clone(), patience: PATIENCE, met: Cell::new(false) })
    }

    /// The same client, which waits this long.
    pub fn patient(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The answer to a GET.
    pub fn get(&self, path: &str) -> Result<Value> {
        self.json(Ask::new("GET", path))
    }

    /// The answer to a POST.
    pub fn post(&self, path: &str, body: &Value) -> Result<Value> {
        self.json(Ask { body: Some(body), ..Ask::new("POST", path) })
    }

    /// The answer to a POST that may be sent again: the server knows it by its key.
    pub fn post_as(&self, key: &str, path: &str, body: &Value) -> Result<Value> {
        self.json(Ask { body: Some(body), key: Some(key), ..Ask::new("POST", path) })
    }

    /// The answer to a DELETE.
    pub fn delete(&self, path: &str) -> Result<Value> {
        self.json(Ask::new("DELETE", path))
    }

    /// Hands the `data:` of each event of a streamed answer to `each`.
    pub fn stream(&self, path: &str, body: &Value, mut each: impl FnMut(&Value) -> Result<()>) -> Result<()> {
        let response = self.send(Ask { body: Some(body), ..Ask::new("POST", path) })?;
        for line in BufReader::new(response.into_body().into_reader()).lines() {
            let line = line.context("the server broke off its answer; ask again")?;
            let Some(data) = line.strip_prefix("data:").map(str::trim) else { continue };
            if data == "[DONE]" {
                return Ok(());
            }
            let event: Value = serde_json::from_str(data).context("the server's stream is not JSON")?;
            if event.get("error").is_some() {
                bail!("{}", message_of(&event));
            }
            each(&event)?;
        }
        bail!("the server broke off its answer; ask again")
    }

    fn json(&self, ask: Ask<'_>) -> Result<Value> {
        let _waiting = Waiting::start();
        let mut response = self.send(ask)?;
        let answer = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_string();
        let answer = answer.with_context(|| format!("{} broke off its answer", self.server))?;
        if answer.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&answer)
            .with_context(|| format!("{} does not answer like Engram; is --server right?", self.server))
    }

    fn send(&self, ask: Ask<'_>) -> Result<Response<Body>> {
        let deadline = Instant::now() + self.patience;
        loop {
            match self.attempt(ask)? {
                Attempt::Answered(response) => return Ok(response),
                Attempt::Later(after, error) if Instant::now() + after > deadline => return Err(error),
                Attempt::Later(after, _) => thread::sleep(after),
            }
        }
    }

    fn attempt(&self, ask: Ask<'_>) -> Result<Attempt> {
        let mut request = ureq::http::Request::builder()
            .method(ask.method)
            .uri(format!("{}{}", self.server, ask.path))
            .header("content-type", "application/json");
        if let Some(key) = ask.key {
            request = request.header("idempotency-key", key);
        }
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let sent = match ask.body {
            Some(body) => self.agent.run(request.body(body.to_string())?),
            None => self.agent.run(request.body(())?),
        };
        let mut response = match sent {
            Ok(response) => response,
            Err(error) if self.met.get() => {
                return Ok(Attempt::Later(RESTART_PAUSE, self.unreachable(&error)));
            }
            Err(error) => return Err(self.unreachable(&error)),
        };
        self.met.set(true);
        let status = response.status();
        if status.is_success() {
            return Ok(Attempt::Answered(response));
        }
        let after = retry_after(&response);
        let text = response.body_mut().read_to_string().unwrap_or_default();
        let answer = serde_json::from_str(&text).unwrap_or(Value::Null);
        let error = self.refused(status, &answer);
        match status {
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => {
                Ok(Attempt::Later(after, error))
            }
            _ => Err(error),
        }
    }

    fn unreachable(&self, error: &ureq::Error) -> anyhow::Error {
        NoServer { server: self.server.clone(), error: error.to_string() }.into()
    }

    fn refused(&self, status: StatusCode, answer: &Value) -> anyhow::Error {
        match status {
            StatusCode::UNAUTHORIZED if self.key.is_some() => {
                anyhow!("{} does not know the key that --key or ENGRAM_API_KEY gave", self.server)
            }
            StatusCode::UNAUTHORIZED => {
                anyhow!("{} asks for a key: give it with --key or ENGRAM_API_KEY", self.server)
            }
            _ if answer.get("error").is_some() => {
                let param = answer["error"]["param"].as_str().map(str::to_owned);
                Refused { param, status, message: message_of(answer) }.into()
            }
            _ => anyhow!("{} answered {status}; is --server right?", self.server),
        }
    }
}

fn message_of(answer: &Value) -> String {
    let error = &answer["error"];
    let message = error["message"].as_str().unwrap_or("the server gave no reason");
    match error["param"].as_str() {
        Some(param) if !message.contains(param) => format!("{param}: {message}"),
        _ => message.to_owned(),
    }
}

fn retry_after(response: &Response<Body>) -> Duration {
    let header = response.headers().get("retry-after").and_then(|value| value.to_str().ok());
    let seconds = header.and_then(|text| text.parse().ok()).unwrap_or(1);
    Duration::from_secs(seconds).min(RETRY_AFTER_MAX)
}

/// Text for a path segment: ids and domains need nothing, all else is escaped.
pub fn segment(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b':' => {
                escaped.push(char::from(byte));
            }
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

/// Whether a person watches stderr: only then are bars and prompts drawn.
pub fn watched() -> bool {
    std::io::stderr().is_terminal()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_segment_cannot_leave_its_place() {
        assert_eq!(segment("order-7:a.b"), "order-7:a.b");
        assert_eq!(segment("../x?y"), "..%2Fx%3Fy");
    }

    #[test]
    fn an_error_names_its_parameter_once() {
        let of = |message, param| message_of(&json!({"error": {"message": message, "param": param}}));
        assert_eq!(of("must be below 2", json!("temperature")), "temperature: must be below 2");
        assert_eq!(of("temperature must be below 2", json!("temperature")), "temperature must be below 2");
        assert_eq!(of("no", Value::Null), "no");
    }
}
