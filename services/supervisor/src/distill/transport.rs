//! How a request is sent: once, and so that what is refused tells all that its answer tells. The
//! client's own transport tries again by itself, and keeps back when a teacher wants to be asked.

use async_openai::error::OpenAIError;
use async_openai::middleware::HttpRequestFactory;
use reqwest::header::RETRY_AFTER;
use serde_json::Value;
use std::time::{Duration, SystemTime};

/// Of what a teacher says of a failure, bytes.
const REFUSAL_BYTES_MAX: usize = 64 << 10;
const REFUSAL_SHOWN: usize = 300;

/// An answer with a status that is not a success.
#[derive(Debug, thiserror::Error)]
#[error("status {status}: {told}")]
pub struct Refusal {
    /// Which.
    pub status: u16,
    /// How long the teacher wants to be left alone.
    pub after: Option<Duration>,
    /// What it says of it, in one line.
    pub told: String,
}

/// Sends a request once. What is not a success is an error that still knows its headers.
pub async fn send(
    http: reqwest::Client,
    request: HttpRequestFactory,
) -> Result<reqwest::Response, OpenAIError> {
    let mut response = http.execute(request.build().await?).await.map_err(OpenAIError::Reqwest)?;
    if response.status().is_success() {
        return Ok(response);
    }
    let after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    let (status, after) = (response.status().as_u16(), after.and_then(retry_after));
    let mut body = Vec::new();
    while let Ok(Some(part)) = response.chunk().await
        && body.len() < REFUSAL_BYTES_MAX
    {
        body.extend_from_slice(&part);
    }
    Err(OpenAIError::Boxed(Box::new(Refusal { status, after, told: told(&body) })))
}

/// Seconds, or a date.
fn retry_after(value: &str) -> Option<Duration> {
    if let Ok(seconds) = value.trim().parse() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(SystemTime::now()).unwrap_or_default())
}

/// What a failure says of itself, in one line.
pub fn told(body: &[u8]) -> String {
    let error = serde_json::from_slice::<Value>(body).unwrap_or_default();
    let error = error.get("error").unwrap_or(&error);
    let said = error["message"].as_str().or(error.as_str()).map(str::to_owned);
    let code = error["code"].as_str().map(|code| format!(" ({code})")).unwrap_or_default();
    let text = said.map_or_else(|| String::from_utf8_lossy(body).into_owned(), |said| said + &code);
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().take(REFUSAL_SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_times_are_seconds_or_dates() {
        assert_eq!(retry_after("2"), Some(Duration::from_secs(2)));
        assert_eq!(retry_after(" 0.5 "), Some(Duration::from_millis(500)));
        assert_eq!(retry_after("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(100));
        assert!(retry_after(&date).is_some_and(|wait| (90..=100).contains(&wait.as_secs())));
        for nonsense in ["-1", "soon", "inf"] {
            assert_eq!(retry_after(nonsense), None);
        }
    }

    #[test]
    fn failures_are_told_in_one_line() {
        let openai = br#"{"error": {"message": "No\nsuch model", "code": "model_not_found"}}"#;
        assert_eq!(told(openai), "No such model (model_not_found)");
        assert_eq!(told(br#"{"error": {"message": "no", "code": 404}}"#), "no");
        assert_eq!(told(br#"{"error": "plain"}"#), "plain");
        assert_eq!(told(b"<html>\n down</html>"), "<html> down</html>");
        assert!(told(&[b'x'; 5000]).len() <= REFUSAL_SHOWN);
    }
}
