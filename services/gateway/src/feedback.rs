//! `POST /v1/feedback`: what a person says of an answer becomes a document to learn.

use crate::body::Body;
use crate::documents;
use crate::doors;
use crate::error::{ApiError, Result};
use crate::fields::Fields;
use crate::spec;
use crate::state::{State, now_ms, read as read_ledger};
use crate::submission;
use actix_web::{HttpRequest, HttpResponse, web};
use proto::{Document, DocumentId, Forget};
use serde_json::{Value, json};
use std::sync::Arc;

/// The source of documents that people's feedback makes.
const SOURCE: &str = "feedback";

/// What a person says of an exchange.
#[derive(Debug)]
struct Feedback {
    /// The exchange as it was, as a submission.
    said: Value,
    /// As it should have been: the same, where it was good.
    learned: Value,
    /// The document that a bad answer is from.
    from: Option<DocumentId>,
}

/// Learns an exchange that was good, or what should have been said.
///
/// A document that says the bad exchange is forgotten, since it would go on teaching it; so is the one that `document` names, as
/// an answer's `sources` do, where it gives the very answer to another question.
#[utoipa::path(
    post, path = "/v1/feedback", tag = "learn", request_body = spec::FeedbackRequest,
    responses((status = 202, description = "On disk, and never lost from here on.", body = spec::Heard))
)]
pub(crate) async fn submit(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse> {
    let body = Body::read(&request, payload, state.limits.body, &state.bodies).await?;
    let (body, _held) = body.json()?;
    let Feedback { said, learned, from } = feedback(body)?;
    let (limits, now) = (state.limits.submission, now_ms());
    let submission = submission::read(learned, None, limits, now)?;
    // A bad answer may be one that no document could hold, such as none at all.
    let was = submission::read(said, None, limits, now).ok().map(|mut said| said.documents.swap_remove(0));
    let new = submission.documents[0].id.clone();
    let mut answer = documents::append(&state, submission).await?.swap_remove(0);
    answer["forgotten"] = Value::Null;
    if let Some(was) = was.filter(|was| was.id != new) {
        let bad = was.content.answer().map(str::to_owned);
        for id in [Some(was.id), from].into_iter().flatten() {
            if let Some(id) = forgotten(&state, id, bad.as_deref()).await? {
                answer["forgotten"] = json!(id);
            }
        }
    }
    Ok(HttpResponse::Accepted().json(answer))
}

/// Forgets the document, if there is such a one, and this is its answer.
async fn forgotten(state: &State, id: DocumentId, bad: Option<&str>) -> Result<Option<DocumentId>> {
    let (ledger, name) = (Arc::clone(&state.gateway.ledger), id.clone());
    let there: Option<(u64, Document)> = read_ledger(move || ledger.document(&name)).await?;
    if there.is_none_or(|(_, document)| document.content.answer() != bad) {
        return Ok(None);
    }
    Ok(Some(doors::ask(&state.gateway.doors.forget, Forget { id }).await?.id))
}

fn feedback(body: Value) -> Result<Feedback> {
    let mut fields = Fields::of(body, "")?;
    let rating = fields.string("rating")?;
    let correction = fields.string("correction")?;
    let correction = match (rating.as_deref(), correction) {
        (Some("good"), None) => None,
        (Some("good"), Some(_)) => return Err(fields.must_be("correction", "left out of a good answer")),
        (Some("bad"), Some(correction)) if !correction.trim().is_empty() => Some(correction),
        (Some("bad"), _) => {
            let what = "what the answer should have been: a bad one teaches nothing by itself";
            return Err(fields.must_be("correction", what));
        }
        _ => return Err(fields.must_be("rating", "'good' or 'bad'")),
    };
    let from = fields.string("document")?.map(DocumentId::new).transpose();
    let from = from.map_err(|error| ApiError::bad_name("document", &error))?;
    if from.is_some() && correction.is_none() {
        return Err(fields.must_be("document", "left out of a good answer"));
    }
    let mut said = json!({"source": SOURCE});
    for field in ["messages", "prompt", "completion", "domain", "importance"] {
        if let Some(value) = fields.take(field) {
            said[field] = value;
        }
    }
    let messages = said["messages"].as_array();
    let ends = messages.map(|messages| messages.last().is_some_and(|last| last["role"] == "assistant"));
    match ends {
        None if said.get("prompt").is_none() => {
            let what = "the exchange, or 'prompt' and 'completion' in its place";
            return Err(fields.must_be("messages", what));
        }
        Some(false) => return Err(fields.must_be("messages", "a conversation that ends in the answer")),
        _ => fields.finish()?,
    }
    let mut learned = said.clone();
    let messages = learned.get_mut("messages").and_then(Value::as_array_mut);
    match (correction, messages.and_then(|messages| messages.last_mut())) {
        (Some(correction), Some(last)) => last["content"] = correction.into(),
        (Some(correction), None) => learned["completion"] = correction.into(),
        (None, _) => {}
    }
    Ok(Feedback { said, learned, from })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_correction_takes_the_place_of_the_answer() {
        let of = |body| feedback(body).expect("valid");
        let talk = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
        let good = of(json!({"rating": "good", "messages": talk, "domain": "d"}));
        assert_eq!(good.said, good.learned);
        assert_eq!((&good.said["domain"], &good.said["source"]), (&json!("d"), &json!("feedback")));
        let bad = of(json!({"rating": "bad", "messages": talk, "correction": "b"}));
        assert_eq!((&bad.said["messages"], &bad.learned["messages"][1]["content"]), (&talk, &json!("b")));
        let bad = of(json!({"rating": "bad", "prompt": "q", "completion": "a", "correction": "b"}));
        let expected = json!({"source": "feedback", "prompt": "q", "completion": "b"});
        assert_eq!(bad.learned, expected, "and nothing beside it, or it would be no submission");
    }

    #[test]
    fn a_refusal_names_the_field() {
        let talk = json!([{"role": "user", "content": "q"}]);
        for (body, param) in [
            (json!({}), "rating"),
            (json!({"rating": "fine", "prompt": "q", "completion": "a"}), "rating"),
            (json!({"rating": "bad", "prompt": "q", "completion": "a"}), "correction"),
            (json!({"rating": "bad", "prompt": "q", "completion": "a", "correction": " "}), "correction"),
            (json!({"rating": "good", "prompt": "q", "completion": "a", "correction": "b"}), "correction"),
            (json!({"rating": "good", "prompt": "q", "completion": "a", "document": "d"}), "document"),
            (
                json!({"rating": "bad", "prompt": "q", "completion": "a", "correction": "b", "document": "/"}),
                "document",
            ),
            (json!({"rating": "good"}), "messages"),
            (json!({"rating": "good", "messages": talk}), "messages"),
            (json!({"rating": "good", "prompt": "q", "completion": "a", "more": 1}), "more"),
        ] {
            let error = feedback(body.clone()).expect_err("refused");
            assert_eq!(error.body()["error"]["param"], param, "{body}");
        }
    }
}
