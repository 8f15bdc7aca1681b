//! `/v1/documents`: submitting, listing, following and forgetting.

use crate::body::Body;
use crate::doors;
use crate::error::{ApiError, Result};
use crate::metrics;
use crate::query::Query;
use crate::spec;
use crate::state::{State, now_ms, read};
use crate::submission::{self, Submission};
use actix_web::{HttpRequest, HttpResponse, web};
use kit::ledger::{Appended, LedgerError};
use kit::status::document_status;
use proto::{Content, Document, DocumentId, DocumentStatus, Domain, Forget, Stage};
use serde_json::{Value, json};
use std::sync::Arc;

/// Documents in one list, where `limit` is left out, and at most.
const LIST_DEFAULT: u32 = 50;
const LIST_MAX: u32 = 1000;

/// Gives documents to learn.
#[utoipa::path(
    post, path = "/v1/documents", tag = "learn",
    request_body(content((spec::Submission = "application/json"), (spec::Upload = "multipart/form-data"))),
    params(("Idempotency-Key" = Option<String>, Header, description = "The document's id; `KEY.N` in a list.", pattern = "^[A-Za-z0-9._:-]{1,128}$")),
    responses((status = 202, description = "On disk, and never lost from here on.", body = spec::Submitted))
)]
pub(crate) async fn submit(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse> {
    let body = Body::read(&request, payload, state.limits.body, &state.bodies).await?;
    let (body, _held) = body.json()?;
    let key = idempotency_key(&request)?;
    let submission = submission::read(body, key, state.limits.submission, now_ms())?;
    let many = submission.many;
    let mut answers = append(&state, submission).await?;
    let answer = if many { json!({"documents": answers}) } else { answers.swap_remove(0) };
    Ok(HttpResponse::Accepted().json(answer))
}

/// Writes documents to the ledger, and says how each of them stands.
pub(crate) async fn append(state: &State, submission: Submission) -> Result<Vec<Value>> {
    let Submission { documents, many } = submission;
    admit(state, documents.len() as u64)?;
    let names: Vec<(DocumentId, Domain)> =
        documents.iter().map(|document| (document.id.clone(), document.domain.clone())).collect();
    let before = statuses(state, names.iter().map(|(id, _)| id.clone()).collect()).await?;
    // What was put aside and comes again is to be learned after all.
    let aside = before.iter().filter(|status| status.status == Stage::SetAside);
    let again = aside.map(|status| status.id.clone()).collect();
    let appended = state.gateway.ledger.append_again(documents, again).await.map_err(not_written)?;
    if let Some(place) = appended.iter().position(|one| matches!(one, Appended::Conflict)) {
        return Err(conflict(&names[place].0, many.then_some(place)));
    }
    let stage = |id: &DocumentId, appended: &Appended| match appended {
        Appended::New { .. } => Stage::Accepted,
        _ => before.iter().find(|status| status.id == *id).map_or(Stage::Accepted, |status| status.status),
    };
    let answers = names
        .iter()
        .zip(&appended)
        .map(|((id, domain), appended)| json!({"id": id, "status": stage(id, appended), "domain": domain}));
    let answers: Vec<Value> = answers.collect();
    let new = appended.iter().filter(|one| matches!(one, Appended::New { .. })).count();
    metrics::documents_accepted(new as u64);
    Ok(answers)
}

/// Whether there is room for more documents, in the queue of those to judge and on the disk.
pub(crate) fn admit(state: &State, incoming: u64) -> Result<()> {
    let (ledger, settings) = (&state.gateway.ledger, &state.gateway.settings);
    let depth_max = settings.gateway.intake_documents_max;
    state.backlog.admit(ledger.intake_cursor(), ledger.head(), incoming, depth_max)?;
    state.disk.admit(&state.gateway.info.data_dir, settings.limits.disk_free_intake_percent)
}

pub(crate) fn idempotency_key(request: &HttpRequest) -> Result<Option<&str>> {
    let Some(value) = request.headers().get("idempotency-key") else { return Ok(None) };
    let readable = value.to_str().map(Some);
    readable.map_err(|_| ApiError::invalid("Idempotency-Key", "'Idempotency-Key' is not ASCII text"))
}

/// What could not be made durable is not acknowledged; the client asks again.
fn not_written(error: LedgerError) -> ApiError {
    tracing::error!(%error, "documents could not be written");
    ApiError::busy("the documents could not be written to disk; none was accepted", 1)
}

fn conflict(id: &DocumentId, place: Option<usize>) -> ApiError {
    let message = format!("there is a document '{id}' with other content: use another Idempotency-Key");
    let error = ApiError::conflict(message);
    match place {
        Some(place) => error.param(format!("documents[{place}]")),
        None => error.param("Idempotency-Key"),
    }
}

/// Characters that documents are looked for by, at most.
pub(crate) const SAYS_MAX: usize = 1000;

/// Lists documents.
#[utoipa::path(
    get, path = "/v1/documents", tag = "learn",
    params(
        ("domain" = Option<String>, Query, description = "Those of this domain.", pattern = "^[a-z][a-z0-9_-]{0,63}$"),
        ("before" = Option<String>, Query, description = "Those given before this document.", pattern = "^[A-Za-z0-9._:-]{1,128}$"),
        ("says" = Option<String>, Query, description = "Those that say this, whatever its case and white space.", min_length = 1, max_length = 1000),
        ("limit" = Option<u32>, Query, description = "At most so many.", minimum = 1, maximum = 1000)
    ),
    responses((status = 200, description = "The newest first.", body = spec::Documents))
)]
pub(crate) async fn list(state: web::Data<State>, request: HttpRequest) -> Result<HttpResponse> {
    let mut query = Query::of(&request)?;
    let domain = query.name("domain", Domain::new)?;
    let before = query.name("before", DocumentId::new)?;
    let says = query.text("says", SAYS_MAX)?;
    let limit = query.whole("limit", 1..=LIST_MAX)?.unwrap_or(LIST_DEFAULT);
    query.finish()?;
    let ledger = Arc::clone(&state.gateway.ledger);
    let rows = read(move || {
        let before = match before {
            None => None,
            Some(id) => match ledger.document(&id)? {
                Some((ordinal, _)) => Some(ordinal),
                None => return Ok(Err(no_such_document(&id).param("before"))),
            },
        };
        Ok(Ok(ledger.list(domain.as_ref(), limit as usize, before, saying(says))?))
    });
    let ids = rows.await??.into_iter().map(|accepted| accepted.document.id).collect();
    Ok(HttpResponse::Ok().json(json!({"documents": statuses(&state, ids).await?})))
}

/// Whether a document says this; all do where it is left out.
pub(crate) fn saying(says: Option<String>) -> impl Fn(&Document) -> bool {
    let says = says.map(|says| folded(&says));
    move |document| says.as_ref().is_none_or(|says| folded(&document.content.plain()).contains(says))
}

/// A text by which others are found that say the same: in lower case, with a space between words.
fn folded(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase()
}

/// Tells where a document is, and all that happened to it.
#[utoipa::path(
    get, path = "/v1/documents/{id}", tag = "learn",
    params(
        ("id" = String, Path, description = "The document.", pattern = "^[A-Za-z0-9._:-]{1,128}$"),
        ("content" = Option<bool>, Query, description = "Whether to tell what it says, too.")
    ),
    responses((status = 200, description = "Its whole trail.", body = spec::Shown))
)]
pub(crate) async fn show(
    state: web::Data<State>,
    request: HttpRequest,
    id: web::Path<String>,
) -> Result<HttpResponse> {
    let id = document_id(id)?;
    let mut query = Query::of(&request)?;
    let with_content = query.flag("content")?;
    query.finish()?;
    let status = statuses(&state, vec![id.clone()]).await?.pop();
    let mut answer = json!(status.ok_or_else(|| no_such_document(&id))?);
    if with_content {
        let (ledger, name) = (Arc::clone(&state.gateway.ledger), id.clone());
        let document = read(move || ledger.document(&name)).await?;
        let (_, document) = document.ok_or_else(|| no_such_document(&id))?;
        answer["content"] = content(document.content);
    }
    Ok(HttpResponse::Ok().json(answer))
}

/// What a document says, in the form that it was submitted in.
fn content(content: Content) -> Value {
    match content {
        Content::Text(text) => json!({"text": text}),
        Content::Completion { prompt, completion } => json!({"prompt": prompt, "completion": completion}),
        Content::Messages(messages) => json!({"messages": messages}),
    }
}

/// Forgets a document with all that learned from it.
#[utoipa::path(
    delete, path = "/v1/documents/{id}", tag = "learn",
    params(("id" = String, Path, description = "The document.", pattern = "^[A-Za-z0-9._:-]{1,128}$")),
    responses((status = 200, description = "It is gone.", body = spec::Forgotten))
)]
pub(crate) async fn forget(state: web::Data<State>, id: web::Path<String>) -> Result<HttpResponse> {
    let id = document_id(id)?;
    let forgotten = doors::ask(&state.gateway.doors.forget, Forget { id }).await?;
    Ok(HttpResponse::Ok().json(forgotten))
}

fn document_id(id: web::Path<String>) -> Result<DocumentId> {
    DocumentId::new(id.into_inner()).map_err(|error| ApiError::bad_name("id", &error))
}

fn no_such_document(id: &DocumentId) -> ApiError {
    ApiError::not_found(format!("there is no document '{id}'"))
}

/// How the documents stand, but for those that are not there.
async fn statuses(state: &State, ids: Vec<DocumentId>) -> Result<Vec<DocumentStatus>> {
    let (ledger, registry) = (Arc::clone(&state.gateway.ledger), Arc::clone(&state.gateway.registry));
    let status = move |id: &DocumentId| document_status(&ledger, &registry, registry.live(), id).transpose();
    read(move || ids.iter().filter_map(status).collect()).await
}
