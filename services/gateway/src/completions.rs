//! `POST /v1/chat/completions` and `POST /v1/completions`, whole or as a stream of events.

use crate::answer::Answer;
use crate::body::Body;
use crate::doors::unanswered;
use crate::error::{ApiError, Result};
use crate::metrics::Running;
use crate::question::{self, Form, Question};
use crate::state::{State, now_ms, random};
use actix_web::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::stream;
use kit::link::Events;
use proto::{Choice, FinishReason, GenerateEvent, Usage};
use serde_json::Value;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

/// Chunks that wait for a client which reads slowly.
const CHUNKS_MAX: usize = 16;

pub(crate) async fn chat(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse> {
    answer(Form::Chat, state, request, payload).await
}

pub(crate) async fn text(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse> {
    answer(Form::Text, state, request, payload).await
}

async fn answer(
    form: Form,
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse> {
    let body = Body::read(&request, payload, state.limits.body, &state.bodies).await?;
    let (body, held) = body.json()?;
    let info = &state.gateway.info;
    let Question { generate, stream, asked } = question::read(body, form, state.limits.question, random())?;
    drop(held);
    let time_max = state.limits.generation_time_max;
    let deadline = Instant::now() + time_max;
    let running = Running::start();
    let begin = async {
        let events = state.gateway.doors.generate.generate(generate).await;
        started(events.map_err(unanswered)?).await
    };
    let (choice, events) = timeout_at(deadline, begin).await.map_err(|_| out_of_time(time_max))??;
    let answer = Answer::new(asked, choice, &info.base_id, random(), now_ms() / 1000);
    let told = Told { answer, events, running, deadline, time_max };
    if stream { Ok(told.streamed()) } else { told.whole().await }
}

/// Waits for the first event, which says who answers, or why nobody does.
async fn started(mut events: Events<GenerateEvent>) -> Result<(Choice, Events<GenerateEvent>)> {
    match events.next().await {
        Some(GenerateEvent::Started(choice)) => Ok((choice, events)),
        Some(GenerateEvent::Refused { param, message }) => Err(refused(param, message)),
        _ => Err(broken_off()),
    }
}

/// An answer that is being told.
struct Told {
    answer: Answer,
    events: Events<GenerateEvent>,
    running: Running,
    deadline: Instant,
    time_max: Duration,
}

impl Told {
    /// The next piece of text, or the end.
    async fn next(&mut self) -> Result<Step> {
        match self.events.next().await {
            Some(GenerateEvent::Text(text)) => {
                self.running.piece();
                Ok(Step::Text(text))
            }
            Some(GenerateEvent::Finished { reason, usage }) => {
                self.running.finished(reason, usage);
                Ok(Step::End(reason, usage))
            }
            Some(GenerateEvent::Refused { param, message }) => Err(refused(param, message)),
            Some(GenerateEvent::Started(_)) | None => Err(broken_off()),
        }
    }

    async fn whole(mut self) -> Result<HttpResponse> {
        let (deadline, time_max) = (self.deadline, self.time_max);
        let (text, reason, usage) =
            timeout_at(deadline, self.collect()).await.map_err(|_| out_of_time(time_max))??;
        Ok(HttpResponse::Ok().json(self.answer.whole(&text, reason, usage)))
    }

    async fn collect(&mut self) -> Result<(String, FinishReason, Usage)> {
        let mut text = String::new();
        loop {
            match self.next().await? {
                Step::Text(piece) => text.push_str(&piece),
                Step::End(reason, usage) => return Ok((text, reason, usage)),
            }
        }
    }

    fn streamed(self) -> HttpResponse {
        let (sender, receiver) = mpsc::channel(CHUNKS_MAX);
        // A task of its own, since the deadline must hold for a client that does not read, too.
        actix_web::rt::spawn(self.tell(sender));
        let chunks = stream::unfold(receiver, async |mut receiver| {
            let chunk: web::Bytes = receiver.recv().await?;
            Some((Ok::<_, Infallible>(chunk), receiver))
        });
        HttpResponse::Ok()
            .insert_header((CONTENT_TYPE, "text/event-stream; charset=utf-8"))
            .insert_header((CACHE_CONTROL, "no-cache"))
            .streaming(chunks)
    }

    /// Sends all events. Ends early, and with it the generation, when the client has left.
    async fn tell(mut self, sender: mpsc::Sender<web::Bytes>) {
        let (deadline, time_max) = (self.deadline, self.time_max);
        let outcome = tokio::select! {
            () = sender.closed() => return,
            outcome = timeout_at(deadline, self.tell_all(&sender)) => outcome,
        };
        let failure = match outcome {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(_) => out_of_time(time_max),
        };
        // The status has gone out long ago, so the failure is an event. A client that does not
        // read will not read this either.
        let _ = sender.try_send(event(&failure.body()));
        let _ = sender.try_send(DONE);
    }

    async fn tell_all(&mut self, sender: &mpsc::Sender<web::Bytes>) -> Result<()> {
        // A client that left is noticed where this future is awaited.
        let send = async |chunk| drop(sender.send(chunk).await);
        if let Some(opening) = self.answer.opening() {
            send(event(&opening)).await;
        }
        loop {
            match self.next().await? {
                Step::Text(text) => send(event(&self.answer.piece(&text))).await,
                Step::End(reason, usage) => {
                    for chunk in self.answer.closing(reason, usage) {
                        send(event(&chunk)).await;
                    }
                    send(DONE).await;
                    return Ok(());
                }
            }
        }
    }
}

enum Step {
    Text(String),
    End(FinishReason, Usage),
}

/// What ends a stream of events, as OpenAI's clients expect it.
const DONE: web::Bytes = web::Bytes::from_static(b"data: [DONE]\n\n");

/// A server-sent event. JSON text has no line breaks, so one `data:` line holds it.
fn event(data: &Value) -> web::Bytes {
    web::Bytes::from(format!("data: {data}\n\n"))
}

fn refused(param: String, message: String) -> ApiError {
    if param == "model" { ApiError::model_not_found(message) } else { ApiError::invalid(param, message) }
}

fn broken_off() -> ApiError {
    ApiError::busy("the model broke off its answer, and is on its way back: ask again", 1)
}

fn out_of_time(time_max: Duration) -> ApiError {
    let seconds = time_max.as_secs();
    ApiError::busy(format!("the answer took over {seconds} s: ask for fewer tokens"), 1).code("timeout")
}
