//! Reading a request's body within limits of size, time and memory, which actix-web leaves to us.

use crate::error::{ApiError, Result};
use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::dev::ServiceResponse;
use actix_web::http::header;
use actix_web::{HttpMessage, HttpRequest, web};
use futures_util::StreamExt;
use serde_json::{Map, Value};
use std::any::Any;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

/// How long a body may lag behind `bytes_per_s_min`: networks pause.
const LAG_MAX: Duration = Duration::from_secs(5);

/// What one body may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Its size.
    pub bytes_max: usize,
    /// From the head to the last byte.
    pub time_max: Duration,
    /// How fast it comes, on average.
    pub bytes_per_s_min: u32,
}

impl Limits {
    /// How long after its head the next bytes of a body may come, when so many have.
    pub(crate) fn patience(self, bytes: usize) -> Duration {
        let earned = bytes as u64 / u64::from(self.bytes_per_s_min.max(1));
        (LAG_MAX + Duration::from_secs(earned)).min(self.time_max)
    }
}

/// The memory that all bodies share: a permit a byte.
pub(crate) type Budget = Arc<Semaphore>;

/// A share of the budget, to hold on to while what was read is worked on.
pub(crate) type Held = Option<OwnedSemaphorePermit>;

/// A body, with its share of the budget.
#[derive(Debug)]
pub(crate) struct Body {
    bytes: Vec<u8>,
    permit: Held,
}

impl Body {
    /// Reads the body of `request`, which must be JSON.
    pub(crate) async fn read(
        request: &HttpRequest,
        mut payload: web::Payload,
        limits: Limits,
        budget: &Budget,
    ) -> Result<Self> {
        let read = Self::receive(request, &mut payload, limits, budget).await;
        if read.is_err() {
            leave(request, payload);
        }
        read
    }

    async fn receive(
        request: &HttpRequest,
        payload: &mut web::Payload,
        limits: Limits,
        budget: &Budget,
    ) -> Result<Self> {
        check_headers(request, limits)?;
        let start = Instant::now();
        let mut body = Self { bytes: Vec::new(), permit: None };
        loop {
            match timeout_at(start + limits.patience(body.bytes.len()), payload.next()).await {
                Err(_) => return Err(too_slow(limits)),
                Ok(None) => return Ok(body),
                Ok(Some(Err(_))) => return Err(ApiError::malformed("the body ended too early")),
                Ok(Some(Ok(chunk))) => body.push(&chunk, limits, budget)?,
            }
        }
    }

    fn push(&mut self, chunk: &[u8], limits: Limits, budget: &Budget) -> Result<()> {
        if self.bytes.len() + chunk.len() > limits.bytes_max {
            return Err(too_large(limits));
        }
        let busy = || ApiError::busy("too many large requests at once", 1);
        let permits = u32::try_from(chunk.len()).map_err(|_| busy())?;
        let more = budget.clone().try_acquire_many_owned(permits).map_err(|_| busy())?;
        match &mut self.permit {
            Some(permit) => permit.merge(more),
            None => self.permit = Some(more),
        }
        self.bytes.extend_from_slice(chunk);
        Ok(())
    }

    /// The body's JSON.
    pub(crate) fn json(self) -> Result<(Value, Held)> {
        Ok((crate::json::parse(&self.bytes)?, self.permit))
    }

    /// The same, where no body at all, or null, says as much as an empty object.
    pub(crate) fn json_or_empty(self) -> Result<(Value, Held)> {
        if self.bytes.is_empty() {
            return Ok((Value::Object(Map::new()), self.permit));
        }
        let (body, held) = self.json()?;
        Ok((if body.is_null() { Value::Object(Map::new()) } else { body }, held))
    }
}

/// A request's body that was not read to its end, or what reads it.
pub(crate) struct Unread {
    _payload: Box<dyn Any>,
}

impl Unread {
    pub(crate) fn new(payload: impl Any) -> Self {
        Self { _payload: Box::new(payload) }
    }
}

/// Says that nobody reads on in the body of a request, which `payload` is or reads.
pub(crate) fn leave(request: &HttpRequest, payload: impl Any) {
    request.extensions_mut().insert(Unread::new(payload));
}

/// An answer's body that holds what was not read of the request. While it does, actix-web sees that there is more, and
/// closes the connection after the answer; a body in chunks it would otherwise read on for as long as it comes.
struct Holding {
    body: BoxBody,
    _unread: Unread,
}

impl MessageBody for Holding {
    type Error = <BoxBody as MessageBody>::Error;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<web::Bytes, Self::Error>>> {
        Pin::new(&mut self.get_mut().body).poll_next(context)
    }
}

/// Hands a body that nobody reads on from the request, which ends first, to its answer.
pub(crate) fn hand_over(response: ServiceResponse<BoxBody>) -> ServiceResponse<BoxBody> {
    let unread = response.request().extensions_mut().remove::<Unread>();
    match unread {
        Some(unread) => response.map_body(|_, body| Holding { body, _unread: unread }.boxed()),
        None => response,
    }
}

fn check_headers(request: &HttpRequest, limits: Limits) -> Result<()> {
    let headers = request.headers();
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or("unreadable"));
    if text(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        // Inflating would let a small request take much memory.
        return Err(ApiError::unsupported_media("compressed bodies are not read: send it as it is"));
    }
    if text(header::CONTENT_TYPE).is_some_and(|kind| !is_json(kind)) {
        return Err(ApiError::unsupported_media("send JSON, with Content-Type: application/json"));
    }
    let length = text(header::CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok());
    if length.is_some_and(|length| length > limits.bytes_max as u64) {
        return Err(too_large(limits));
    }
    Ok(())
}

fn is_json(content_type: &str) -> bool {
    let kind = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"))
}

/// The error of a body that comes more slowly than its limits say.
pub(crate) fn too_slow(limits: Limits) -> ApiError {
    let (seconds, rate) = (limits.time_max.as_secs(), limits.bytes_per_s_min);
    let message =
        format!("the body came too slowly: it takes at most {seconds} s in all, and {rate} bytes/s");
    ApiError::too_slow(message)
}

/// The error of a body that is larger than its limits say.
pub(crate) fn too_large(limits: Limits) -> ApiError {
    ApiError::too_large(format!(
        "the body is over {} bytes, which is what this path takes: send less in one request",
        limits.bytes_max
    ))
}
