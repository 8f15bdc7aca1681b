//! Answers that are not a success, in the form that OpenAI's clients read.

use actix_web::http::StatusCode;
use actix_web::{HttpResponse, HttpResponseBuilder, ResponseError};
use proto::{IdError, Refusal};
use serde_json::{Value, json};
use std::fmt;

/// An answer that is not a success: `{"error":{"message","type","param","code"}}`.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    header: Option<(&'static str, String)>,
}

pub(crate) type Result<T> = std::result::Result<T, ApiError>;

impl ApiError {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None, header: None }
    }

    /// 400: `param` breaks a rule, which the message states.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message).param(param)
    }

    /// 400: the body as a whole cannot be read.
    pub(crate) fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 400: a name in `param` that no such thing can have.
    pub(crate) fn bad_name(param: impl Into<String>, error: &IdError) -> Self {
        Self::invalid(param, error.to_string())
    }

    /// 401: the key is missing or not one of ours.
    pub(crate) fn unauthorized() -> Self {
        let message = "this server needs a key: send the header 'Authorization: Bearer KEY'";
        let mut error = Self::new(StatusCode::UNAUTHORIZED, message).code("invalid_api_key");
        error.header = Some(("www-authenticate", "Bearer".to_owned()));
        error
    }

    /// 403: whoever asks, this is not answered.
    pub(crate) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, message)
    }

    /// 404: there is no such thing.
    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message).code("not_found")
    }

    /// 404 for a model, with the code that OpenAI's clients look for.
    pub(crate) fn model_not_found(message: impl Into<String>) -> Self {
        Self::not_found(message).code("model_not_found").param("model")
    }

    /// 405: the path exists, and takes only the methods in `allow`.
    pub(crate) fn method_not_allowed(allow: &str) -> Self {
        let message = format!("this path takes only {allow}");
        let mut error = Self::new(StatusCode::METHOD_NOT_ALLOWED, message);
        error.header = Some(("allow", allow.to_owned()));
        error
    }

    /// 408: the body did not come in time.
    pub(crate) fn too_slow(message: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, message).code("request_timeout")
    }

    /// 409: it is not what the caller takes it to be.
    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, message).code("conflict")
    }

    /// 413: over a limit that the message states.
    pub(crate) fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, message).code("too_large")
    }

    /// 415: a body in a form that is not read here.
    pub(crate) fn unsupported_media(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message)
    }

    /// 429: this key asks too often.
    pub(crate) fn rate_limited(retry_after_s: u64) -> Self {
        let message = format!("too many requests with this key; try again in {retry_after_s} s");
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, message);
        error.code("rate_limit_exceeded").retry_after(retry_after_s)
    }

    /// 503: not now; the client may ask again after `retry_after_s` seconds.
    pub(crate) fn busy(message: impl Into<String>, retry_after_s: u64) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message).code("overloaded").retry_after(retry_after_s)
    }

    /// 500: our own fault. The cause goes to the log, and not to the client.
    pub(crate) fn internal(cause: &dyn fmt::Display) -> Self {
        tracing::error!(%cause, "request failed");
        let message = "the server could not do this; its log says why";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message).code("internal_error")
    }

    pub(crate) fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Says where in a list the parameter `from` is.
    pub(crate) fn within(mut self, from: &str, place: &str) -> Self {
        if self.param.as_deref() == Some(from) {
            self.param = Some(place.to_owned());
        }
        self
    }

    pub(crate) fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    fn retry_after(mut self, seconds: u64) -> Self {
        self.header = Some(("retry-after", seconds.to_string()));
        self
    }

    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The body, which a stream of events also ends with when it fails half-way.
    pub(crate) fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind(),
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl ResponseError for ApiError {
    fn status_code(&self) -> StatusCode {
        self.status
    }

    fn error_response(&self) -> HttpResponse {
        let mut response = HttpResponseBuilder::new(self.status);
        if let Some((name, value)) = &self.header {
            response.insert_header((*name, value.as_str()));
        }
        response.json(self.body())
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NotFound(message) => Self::not_found(message),
            Refusal::Conflict(message) => Self::conflict(message),
            Refusal::Invalid { param, message } => Self::invalid(param, message),
            Refusal::Unavailable(message) => Self::busy(message, 1),
        }
    }
}
