//! Answers that are a stream of server-sent events.

use actix_web::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use actix_web::{HttpResponse, web};
use futures_util::stream;
use std::convert::Infallible;
use tokio::sync::mpsc;

/// The answer that tells what comes out of this channel. It is dropped when the client leaves.
pub(crate) fn stream(receiver: mpsc::Receiver<web::Bytes>) -> HttpResponse {
    let chunks = stream::unfold(receiver, async |mut receiver| {
        let chunk: web::Bytes = receiver.recv().await?;
        Some((Ok::<_, Infallible>(chunk), receiver))
    });
    HttpResponse::Ok()
        .insert_header((CONTENT_TYPE, "text/event-stream; charset=utf-8"))
        .insert_header((CACHE_CONTROL, "no-cache"))
        .streaming(chunks)
}
