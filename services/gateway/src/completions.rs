//! `POST /v1/chat/completions` and `POST /v1/completions`, whole or as a stream of events.

use crate::answer::{Answer, Completion};
use crate::body::Body;
use crate::doors::unanswered;
use crate::error::{ApiError, Result};
use crate::events;
use crate::lesson::Lesson;
use crate::metrics::Running;
use crate::question::{self, Form, Question};
use crate::sources;
use crate::spec;
use crate::state::{State, now_ms, random};
use actix_web::{HttpRequest, HttpResponse, web};
use kit::link::Events;
use proto::{Choice, FinishReason, GenerateEvent, TokenLogprob, Usage};
use serde_json::Value;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

/// Chunks that wait for a client which reads slowly.
const CHUNKS_MAX: usize = 16;

/// Goes on with a conversation.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "ask", request_body = spec::ChatRequest,
    responses((status = 200, description = "The answer, or its events where `stream` is true.", content(
        (spec::ChatCompletion = "application/json"), (spec::StreamEvent = "text/event-stream"))))
)]
pub(crate) async fn chat(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse> {
    answer(Form::Chat, state, request, payload).await
}

/// Continues a text.
#[utoipa::path(
    post, path = "/v1/completions", tag = "ask", request_body = spec::CompletionRequest,
    responses((status = 200, description = "The answer, or its events where `stream` is true.", content(
        (spec::TextCompletion = "application/json"), (spec::StreamEvent = "text/event-stream"))))
)]
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
    let Question { generate, stream, learn, asked } =
        question::read(body, form, state.limits.question, random())?;
    drop(held);
    let learn = learn.map(|learn| (learn, generate.prompt.clone()));
    let time_max = state.limits.generation_time_max;
    let deadline = Instant::now() + time_max;
    let running = Running::start();
    let n = generate.n;
    let begin = async {
        let events = state.gateway.doors.generate.generate(generate).await;
        started(events.map_err(unanswered)?).await
    };
    let (choice, events) = timeout_at(deadline, begin).await.map_err(|_| out_of_time(time_max))??;
    let lesson = learn.map(|(learn, prompt)| Lesson::new(learn, prompt, &choice));
    let answer = Answer::new(asked, choice, &info.base_id, random(), now_ms() / 1000);
    let (usage, state) = (Usage::default(), state.clone());
    let told = Told { answer, events, n, open: n, usage, lesson, state, running, deadline, time_max };
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
    /// Dropping them ends the generation of all choices.
    events: Events<GenerateEvent>,
    /// Choices wanted.
    n: u32,
    /// Those of them that have not ended.
    open: u32,
    /// Tokens of those that have.
    usage: Usage,
    /// Where the exchange is to be learned.
    lesson: Option<Lesson>,
    state: web::Data<State>,
    running: Running,
    deadline: Instant,
    time_max: Duration,
}

impl Told {
    /// The next piece of a choice, or its end; none once all have ended.
    async fn next(&mut self) -> Result<Option<Step>> {
        if self.open == 0 {
            return Ok(None);
        }
        match self.events.next().await {
            Some(GenerateEvent::Text { index, text, logprobs }) => {
                self.running.piece();
                Ok(Some(Step::Text { index, text, logprobs }))
            }
            Some(GenerateEvent::Finished { index, reason, usage, sources }) => {
                self.open -= 1;
                // All choices continue the same prompt, which is counted once.
                self.usage.prompt_tokens = usage.prompt_tokens;
                self.usage.completion_tokens += usage.completion_tokens;
                self.running.choice_finished(reason);
                if self.open == 0 {
                    self.running.finished(self.usage);
                }
                let sources = sources::named(&self.state, index, sources).await;
                Ok(Some(Step::End { index, reason, sources }))
            }
            Some(GenerateEvent::Refused { param, message }) => Err(refused(param, message)),
            Some(GenerateEvent::Started(_)) | None => Err(broken_off()),
        }
    }

    async fn whole(mut self) -> Result<HttpResponse> {
        let (deadline, time_max) = (self.deadline, self.time_max);
        let completions = timeout_at(deadline, self.collect()).await.map_err(|_| out_of_time(time_max))??;
        let mut whole = self.answer.whole(&completions, self.usage);
        if let (Some(mut lesson), [only]) = (self.lesson, &completions[..]) {
            lesson.hear(&only.text);
            let reason = only.reason.unwrap_or(FinishReason::Length);
            whole["engram"]["document"] = lesson.submit(&self.state, reason).await;
        }
        Ok(HttpResponse::Ok().json(whole))
    }

    async fn collect(&mut self) -> Result<Vec<Completion>> {
        let mut completions: Vec<Completion> = (0..self.n).map(|_| Completion::default()).collect();
        while let Some(step) = self.next().await? {
            let (Step::Text { index, .. } | Step::End { index, .. }) = step;
            let completion = completions.get_mut(index as usize).ok_or_else(broken_off)?;
            match step {
                Step::Text { text, logprobs, .. } => {
                    completion.text.push_str(&text);
                    completion.logprobs.extend(logprobs);
                }
                Step::End { reason, sources, .. } => {
                    (completion.reason, completion.sources) = (Some(reason), sources);
                }
            }
        }
        Ok(completions)
    }

    fn streamed(self) -> HttpResponse {
        let (sender, receiver) = mpsc::channel(CHUNKS_MAX);
        // A task of its own, since the deadline must hold for a client that does not read, too.
        actix_web::rt::spawn(self.tell(sender));
        events::stream(receiver)
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
        for opening in (0..self.n).filter_map(|index| self.answer.opening(index)) {
            send(event(&opening)).await;
        }
        while let Some(step) = self.next().await? {
            let chunk = match step {
                Step::Text { index, text, logprobs } => {
                    self.lesson.iter_mut().for_each(|lesson| lesson.hear(&text));
                    self.answer.piece(index, &text, &logprobs)
                }
                Step::End { index, reason, sources } => {
                    let mut closing = self.answer.closing(index, reason, sources);
                    if let Some(lesson) = self.lesson.take() {
                        closing["engram"]["document"] = lesson.submit(&self.state, reason).await;
                    }
                    closing
                }
            };
            send(event(&chunk)).await;
        }
        if let Some(count) = self.answer.count(self.usage) {
            send(event(&count)).await;
        }
        send(DONE).await;
        Ok(())
    }
}

enum Step {
    Text { index: u32, text: String, logprobs: Vec<TokenLogprob> },
    End { index: u32, reason: FinishReason, sources: Vec<Value> },
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
