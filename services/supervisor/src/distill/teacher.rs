//! The teacher: one question, one answer, and what its failures mean.

use super::cost::Usage;
use super::transport::{Refusal, send, told};
use anyhow::{Context, Result, anyhow, ensure};
use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::middleware::HttpRequestFactory;
use futures_util::StreamExt;
use reqwest::redirect::Policy;
use serde::Deserialize;
use serde_json::{Value, json};
use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::time::timeout;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// An answer may take so many times as long as the teacher may be silent.
const SILENCES_MAX: u32 = 20;
/// More than any answer has; the rest is not read, bytes.
const ANSWER_BYTES_MAX: usize = 256 << 10;

/// How to reach a teacher.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Address of its API, up to `/v1`.
    pub url: String,
    /// Which of its models.
    pub model: String,
    /// The key that it asks for.
    pub key: Option<String>,
    /// The variable that the key is from, for messages.
    pub key_env: String,
    /// The longest answer.
    pub tokens_max: u32,
    /// How its answers vary; left out, it decides.
    pub temperature: Option<f32>,
    /// How long it may be silent.
    pub silence_max: Duration,
}

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It is whole.
    Stop,
    /// It was cut off at its longest.
    Length,
    /// The teacher kept it back.
    Filtered,
}

/// What a teacher answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// How it ended.
    pub end: End,
    /// What it took.
    pub usage: Usage,
    /// Whether the teacher counted that itself; else it is an estimate.
    pub counted: bool,
}

/// Why there is no answer, where asking again may help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Passing {
    /// Too many requests.
    #[error("rate limited")]
    RateLimited,
    /// The teacher is at fault.
    #[error("server error")]
    ServerError,
    /// It was silent for too long.
    #[error("timeout")]
    Timeout,
    /// It cannot be reached, or broke off.
    #[error("connection")]
    Connection,
    /// What it sent is not an answer.
    #[error("malformed")]
    Malformed,
    /// It ended before the answer did.
    #[error("truncated")]
    Truncated,
}

/// What kept an answer from coming.
#[derive(Debug)]
pub struct Hitch {
    /// Of which kind it is.
    pub reason: Passing,
    /// What is known of it beyond that; may be empty.
    pub detail: String,
    /// How long the teacher wants to be left alone.
    pub after: Option<Duration>,
}

impl Hitch {
    fn new(reason: Passing, detail: impl ToString) -> Self {
        Self { reason, detail: detail.to_string(), after: None }
    }
}

impl fmt::Display for Hitch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.detail.as_str() {
            "" => write!(f, "{}", self.reason),
            detail => write!(f, "{}: {detail}", self.reason),
        }
    }
}

/// A request without an answer.
#[derive(Debug)]
pub enum Failure {
    /// To be asked again.
    Again {
        /// Why.
        hitch: Hitch,
        /// What it took all the same, as far as one can tell.
        usage: Usage,
    },
    /// No request will be answered.
    Final(anyhow::Error),
}

/// A part of a streamed answer. Only what is needed is read, since compatible servers differ in all
/// else.
#[derive(Debug, Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Counted>,
    error: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    delta: Option<Delta>,
    finish_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Delta {
    content: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Counted {
    prompt_tokens: u64,
    completion_tokens: u64,
}

/// A teacher that can be asked.
pub struct Teacher {
    settings: Settings,
    client: Client<OpenAIConfig>,
    /// Newer models of OpenAI know only this name of the limit; most others know only the older.
    names_completion: AtomicBool,
}

impl Teacher {
    /// Nothing is asked yet.
    ///
    /// # Errors
    /// When address or key cannot be used.
    pub fn new(mut settings: Settings) -> Result<Self> {
        let url = settings.url.trim_end_matches('/');
        settings.url = url.strip_suffix("/chat/completions").unwrap_or(url).to_owned();
        let parsed = reqwest::Url::parse(&settings.url);
        ensure!(
            parsed.is_ok_and(|url| ["http", "https"].contains(&url.scheme()) && url.has_host()),
            "--teacher {:?} is not an address such as https://api.openai.com/v1",
            settings.url
        );
        let key = settings.key.clone().unwrap_or_default();
        // It becomes a header.
        let usable = key.bytes().all(|byte| byte.is_ascii_graphic());
        ensure!(usable, "the key in {} holds characters that no key has", settings.key_env);
        // Somebody else may have done so before, with the same one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            // Keys and documents go where they were sent to, and nowhere else.
            .redirect(Policy::none())
            .user_agent(concat!("engram/", env!("CARGO_PKG_VERSION")))
            .build()
            .context("TLS cannot be set up")?;
        let config = OpenAIConfig::new().with_api_base(&settings.url).with_api_key(key);
        let transport = http.clone();
        let service = tower::service_fn(move |request: HttpRequestFactory| send(transport.clone(), request));
        let client = Client::build(http, config).with_http_service(service);
        Ok(Self { settings, client, names_completion: AtomicBool::new(false) })
    }

    /// The answer to a request.
    ///
    /// # Errors
    /// When there is none.
    pub async fn ask(&self, request: &str) -> Result<Answer, Failure> {
        let mut heard = Heard::default();
        let whole = timeout(self.settings.silence_max * SILENCES_MAX, self.hear(request, &mut heard)).await;
        match whole.unwrap_or_else(|_| Err(Hitch::new(Passing::Timeout, "it came too slowly").into())) {
            Ok(end) => {
                let counted = heard.counted.is_some();
                let usage = heard.usage(request);
                Ok(Answer { text: heard.text, end, usage, counted })
            }
            Err(Trouble::Passing(hitch)) => {
                // What was refused costs nothing; what was begun does, whether it arrived or not.
                let usage = if heard.begun { heard.usage(request) } else { Usage::default() };
                Err(Failure::Again { hitch, usage })
            }
            Err(Trouble::Final(error)) => Err(Failure::Final(error)),
        }
    }

    /// More than a request can take.
    pub fn most(&self, request: &str) -> Usage {
        Usage::most(request, self.settings.tokens_max)
    }

    async fn hear(&self, request: &str, heard: &mut Heard) -> Result<End, Trouble> {
        let chat = self.client.chat();
        let silence = |_| Trouble::from(Hitch::new(Passing::Timeout, ""));
        let newer = self.names_completion.load(Ordering::Relaxed);
        let opened = chat.create_stream_byot::<_, Chunk>(self.body(request, newer));
        let opened = timeout(self.settings.silence_max, opened).await.map_err(silence)?;
        let mut stream: Pin<Box<dyn futures_util::Stream<Item = Result<Chunk, OpenAIError>> + Send>> =
            opened.map_err(|error| self.trouble(error, newer))?;
        heard.begun = true;
        let mut end = None;
        while let Some(chunk) = timeout(self.settings.silence_max, stream.next()).await.map_err(silence)? {
            let chunk = chunk.map_err(|error| self.trouble(error, newer))?;
            if let Some(error) = chunk.error {
                return Err(Hitch::new(Passing::ServerError, told(error.to_string().as_bytes())).into());
            }
            heard.counted = chunk.usage.or(heard.counted.take());
            let Some(choice) = chunk.choices.into_iter().next() else { continue };
            heard.pieces += 1;
            heard.text += choice.delta.and_then(|delta| delta.content).as_deref().unwrap_or_default();
            end = choice.finish_reason.as_deref().map(End::of).or(end);
            if heard.text.len() > ANSWER_BYTES_MAX {
                end = Some(End::Length);
                break;
            }
        }
        // A stream that just ends is a connection that was lost.
        end.ok_or_else(|| Hitch::new(Passing::Truncated, "it ended before the answer did").into())
    }

    fn body(&self, request: &str, newer: bool) -> Value {
        let mut body = json!({
            "model": self.settings.model,
            "messages": [{"role": "user", "content": request}],
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let limit = if newer { "max_completion_tokens" } else { "max_tokens" };
        body[limit] = json!(self.settings.tokens_max);
        if let Some(temperature) = self.settings.temperature {
            body["temperature"] = json!(temperature);
        }
        body
    }

    fn trouble(&self, error: OpenAIError, newer: bool) -> Trouble {
        match error {
            OpenAIError::Boxed(error) => match error.downcast::<Refusal>() {
                Ok(refusal) => self.refused(*refusal, newer),
                Err(error) => Hitch::new(Passing::Connection, error).into(),
            },
            OpenAIError::Reqwest(error) if error.is_builder() => {
                Trouble::Final(anyhow!("no request can be made to {}: {error}", self.settings.url))
            }
            OpenAIError::Reqwest(error) => {
                let reason = if error.is_timeout() { Passing::Timeout } else { Passing::Connection };
                // The address is told anyway; what matters comes last.
                Hitch::new(reason, format!("{:#}", anyhow::Error::from(error.without_url()))).into()
            }
            OpenAIError::JSONDeserialize(error, _) => Hitch::new(Passing::Malformed, error).into(),
            other => Hitch::new(Passing::Connection, other).into(),
        }
    }

    fn refused(&self, refusal: Refusal, newer: bool) -> Trouble {
        let Settings { url, model, key, key_env, .. } = &self.settings;
        let Refusal { status, after, told } = refusal;
        // Some teachers quote the key that they do not like.
        let told = key.as_ref().map_or_else(|| told.clone(), |key| told.replace(key, "***"));
        let message = match status {
            429 if told.contains("insufficient_quota") => {
                format!("{url} says that the account's quota is used up: {told}")
            }
            408 | 425 | 429 => {
                return Hitch { after, ..Hitch::new(Passing::RateLimited, told) }.into();
            }
            500..=599 => {
                let detail = format!("status {status} {told}").trim().to_owned();
                return Hitch { after, ..Hitch::new(Passing::ServerError, detail) }.into();
            }
            400 if !newer && told.contains("max_completion_tokens") => {
                self.names_completion.store(true, Ordering::Relaxed);
                let after = Some(Duration::ZERO);
                return Hitch { after, ..Hitch::new(Passing::Malformed, told) }.into();
            }
            300..=399 => format!("{url} leads elsewhere (status {status}): give --teacher the final address"),
            401 if key.is_none() => format!("{url} asks for a key: put it into the variable {key_env}"),
            401 => format!("{url} refuses the key in {key_env}: {told}"),
            403 => format!("{url} does not allow this with the key in {key_env}: {told}"),
            404 => format!("{url} has no chat model {model}; check --teacher and --model: {told}"),
            _ => format!("{url} refuses the request with status {status}: {told}"),
        };
        Trouble::Final(anyhow!(message.trim_end_matches(": ").to_owned()))
    }
}

/// What went wrong with one request.
enum Trouble {
    Passing(Hitch),
    Final(anyhow::Error),
}

impl From<Hitch> for Trouble {
    fn from(hitch: Hitch) -> Self {
        Self::Passing(hitch)
    }
}

/// What of an answer has come.
#[derive(Default)]
struct Heard {
    begun: bool,
    text: String,
    /// Chunks with text: about as many as tokens.
    pieces: u64,
    counted: Option<Counted>,
}

impl Heard {
    fn usage(&self, request: &str) -> Usage {
        match &self.counted {
            Some(counted) => {
                Usage { tokens_in: counted.prompt_tokens, tokens_out: counted.completion_tokens }
            }
            None => Usage::likely(request, self.pieces),
        }
    }
}

impl End {
    fn of(reason: &str) -> Self {
        match reason {
            "length" => Self::Length,
            "content_filter" => Self::Filtered,
            _ => Self::Stop,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(url: &str, key: Option<&str>) -> Settings {
        Settings {
            url: url.into(),
            model: "m".into(),
            key: key.map(str::to_owned),
            key_env: "KEY".into(),
            tokens_max: 9,
            temperature: None,
            silence_max: Duration::from_secs(1),
        }
    }

    #[test]
    fn addresses_and_keys_are_checked() {
        for url in ["http://127.0.0.1:1/v1/", "https://host/v1/chat/completions"] {
            assert!(Teacher::new(settings(url, None)).expect("usable").settings.url.ends_with("/v1"));
        }
        for (url, key) in [("nowhere", None), ("ftp://host", None), ("http://host", Some("a\nb"))] {
            assert!(Teacher::new(settings(url, key)).is_err(), "{url}");
        }
    }

    #[test]
    fn refusals_say_what_to_do_and_never_the_key() {
        let teacher = Teacher::new(settings("http://host/v1", Some("sk-secret"))).expect("usable");
        let refuse = |status, told: &str| {
            let newer = teacher.names_completion.load(Ordering::Relaxed);
            let after = Some(Duration::from_secs(3));
            match teacher.refused(Refusal { status, after, told: told.into() }, newer) {
                Trouble::Final(error) => error.to_string(),
                Trouble::Passing(hitch) => hitch.to_string(),
            }
        };
        let told = refuse(401, "bad key sk-secret");
        assert!(told.contains("KEY") && told.contains("***") && !told.contains("sk-secret"), "{told}");
        assert!(refuse(404, "no").contains("--model"));
        assert!(refuse(308, "").contains("--teacher"));
        assert!(refuse(422, "no such field").contains("no such field"));
        assert!(refuse(429, "quota (insufficient_quota)").contains("quota is used up"));
        assert_eq!(refuse(429, "slow down"), "rate limited: slow down");
        assert_eq!(refuse(503, ""), "server error: status 503");
        assert!(refuse(405, "").ends_with("status 405"));
        // The other name is tried once.
        assert!(refuse(400, "use 'max_completion_tokens'").starts_with("malformed"));
        assert_eq!(teacher.body("x", true)["max_completion_tokens"], 9);
        assert!(refuse(400, "use 'max_completion_tokens'").contains("status 400"));
    }
}
