//! Reading what `POST /v1/documents` brings. Pure: all of a request is judged before any of it is
//! written.

use crate::error::{ApiError, Result};
use crate::fields::Fields;
use crate::messages;
use proto::{Content, Document, DocumentId, Domain, Message, Role};
use serde_json::Value;

/// The longest `source` and `derived_from`, in bytes.
const SOURCE_BYTES_MAX: usize = 256;

/// What a submission may hold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Documents in one request.
    pub documents_max: usize,
    /// Text in one document, in bytes.
    pub document_bytes_max: usize,
}

/// The documents of one request.
#[derive(Debug)]
pub(crate) struct Submission {
    /// In the order given; never empty.
    pub documents: Vec<Document>,
    /// Whether they came as `{"documents": [...]}`, and are answered so.
    pub many: bool,
}

/// Reads a body. `key` is the client's Idempotency-Key.
pub(crate) fn read(body: Value, key: Option<&str>, limits: Limits, now_ms: u64) -> Result<Submission> {
    let mut fields = Fields::of(body, "")?;
    if !fields.has("documents") {
        let id = key.map(document_id).transpose()?;
        let documents = vec![document(fields, id, limits, now_ms)?];
        return Ok(Submission { documents, many: false });
    }
    let items = fields.array("documents", limits.documents_max)?.unwrap_or_default();
    fields.finish()?;
    let one = |(n, item)| {
        let id = key.map(|key| document_id(&format!("{key}.{n}"))).transpose()?;
        document(Fields::of(item, format!("documents[{n}]"))?, id, limits, now_ms)
    };
    let documents = items.into_iter().enumerate().map(one).collect::<Result<_>>()?;
    Ok(Submission { documents, many: true })
}

fn document_id(key: &str) -> Result<DocumentId> {
    DocumentId::new(key).map_err(|error| ApiError::bad_name("Idempotency-Key", &error))
}

fn document(mut fields: Fields, id: Option<DocumentId>, limits: Limits, now_ms: u64) -> Result<Document> {
    let content = content(&mut fields)?;
    let domain = match fields.string("domain")? {
        Some(name) => Domain::new(name).map_err(|error| ApiError::bad_name(fields.path("domain"), &error))?,
        None => Domain::general(),
    };
    let importance = fields.number("importance", 0.0..=1.0)?;
    let source = short(&mut fields, "source")?;
    let derived_from = short(&mut fields, "derived_from")?;
    let path = fields.path("");
    fields.finish()?;
    let (bytes, bytes_max) = (content.len_bytes(), limits.document_bytes_max);
    if bytes > bytes_max {
        let message = format!(
            "the document has {bytes} bytes of text, and one document takes {bytes_max}: \
             split it, and submit its parts as documents of their own"
        );
        let error = ApiError::too_large(message);
        // A document that is the whole body has no place in it.
        return Err(match path.trim_end_matches('.') {
            "" => error,
            place => error.param(place),
        });
    }
    let id = id.unwrap_or_else(|| Document::content_id(&domain, &content));
    Ok(Document { id, domain, content, importance, source, submitted_ms: now_ms, derived_from })
}

fn short(fields: &mut Fields, key: &str) -> Result<Option<String>> {
    let text = fields.string(key)?;
    if text.as_ref().is_some_and(|text| text.len() > SOURCE_BYTES_MAX) {
        return Err(fields.must_be(key, &format!("at most {SOURCE_BYTES_MAX} bytes long")));
    }
    Ok(text)
}

fn content(fields: &mut Fields) -> Result<Content> {
    let forms = ["text", "prompt", "messages"].map(|form| fields.has(form));
    if forms.iter().filter(|there| **there).count() != 1 {
        let message = "a document takes exactly one of 'text', 'prompt' with 'completion', and \
                       'messages'";
        return Err(ApiError::invalid(fields.path("text"), message));
    }
    if let Some(text) = fields.string("text")? {
        return Ok(Content::Text(not_blank(fields, "text", text)?));
    }
    if let Some(prompt) = fields.string("prompt")? {
        let prompt = not_blank(fields, "prompt", prompt)?;
        let completion = fields.string("completion")?.unwrap_or_default();
        let completion = not_blank(fields, "completion", completion)?;
        return Ok(Content::Completion { prompt, completion });
    }
    let messages = messages::read(fields)?.unwrap_or_default();
    if !messages.iter().any(teaches) {
        let what = "a conversation in which the assistant says something: that is what is learned";
        return Err(fields.must_be("messages", what));
    }
    Ok(Content::Messages(messages))
}

fn not_blank(fields: &Fields, key: &str, text: String) -> Result<String> {
    if text.trim().is_empty() { Err(fields.must_be(key, "a text that is not empty")) } else { Ok(text) }
}

fn teaches(message: &Message) -> bool {
    message.role == Role::Assistant && !message.content.trim().is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use actix_web::ResponseError;
    use serde_json::json;

    const LIMITS: Limits = Limits { documents_max: 3, document_bytes_max: 64 };

    fn submit(body: Value, key: Option<&str>) -> Result<Submission> {
        read(body, key, LIMITS, 7)
    }

    #[test]
    fn the_three_forms_are_read() {
        let one = |body| submit(body, None).expect("valid").documents.remove(0);
        let text = one(json!({"text": "a", "domain": "d", "importance": 1, "source": "s"}));
        assert_eq!(text.content, Content::Text("a".into()));
        assert_eq!((text.domain.as_str(), text.importance), ("d", Some(1.0)));
        let pair = one(json!({"prompt": "a", "completion": "b", "importance": null, "derived_from": "x"}));
        assert_eq!(pair.content, Content::Completion { prompt: "a".into(), completion: "b".into() });
        assert_eq!((pair.domain.as_str(), pair.importance), ("general", None));
        assert_eq!((text.derived_from, pair.derived_from.as_deref()), (None, Some("x")));
        let parts = json!([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]);
        let talk = one(json!({"messages": [{"role": "user", "content": parts},
                                           {"role": "assistant", "content": "yes"}]}));
        assert_eq!(talk.content.plain(), "hi\nyes");
    }

    #[test]
    fn ids_come_from_the_key_or_from_the_content() {
        let many = json!({"documents": [{"text": "a"}, {"text": "b"}]});
        let ids = |submission: Submission| -> Vec<String> {
            submission.documents.into_iter().map(|d| d.id.into()).collect()
        };
        assert_eq!(ids(submit(many.clone(), Some("k")).expect("valid")), ["k.0", "k.1"]);
        assert_eq!(ids(submit(json!({"text": "a"}), Some("k")).expect("valid")), ["k"]);
        let hashed = ids(submit(many, None).expect("valid"));
        assert_eq!(hashed[0], ids(submit(json!({"text": "a"}), None).expect("valid"))[0]);
        assert_ne!(hashed[0], hashed[1]);
    }

    #[test]
    fn a_refusal_names_the_field() {
        for (body, param) in [
            (json!([]), Value::Null),
            (json!({}), json!("text")),
            (json!({"text": ""}), json!("text")),
            (json!({"text": " \n"}), json!("text")),
            (json!({"text": 1}), json!("text")),
            (json!({"text": "a", "prompt": "b"}), json!("text")),
            (json!({"text": "a", "completion": "b"}), json!("completion")),
            (json!({"prompt": "a"}), json!("completion")),
            (json!({"text": "a", "id": "x"}), json!("id")),
            (json!({"text": "a", "domain": "No"}), json!("domain")),
            (json!({"text": "a", "domain": "auto"}), json!("domain")),
            (json!({"text": "a", "importance": 1.01}), json!("importance")),
            (json!({"text": "a", "importance": -0.1}), json!("importance")),
            (json!({"text": "a", "importance": "1"}), json!("importance")),
            (json!({"text": "a", "source": "s".repeat(300)}), json!("source")),
            (json!({"text": "a", "derived_from": "s".repeat(300)}), json!("derived_from")),
            (json!({"messages": []}), json!("messages")),
            (json!({"messages": [{"role": "user", "content": "a"}]}), json!("messages")),
            (json!({"messages": [{"role": "tool", "content": "a"}]}), json!("messages[0].role")),
            (json!({"messages": [{"role": "user"}]}), json!("messages[0].content")),
            (json!({"documents": []}), json!("documents")),
            (json!({"documents": [1]}), json!("documents[0]")),
            (json!({"documents": [{"text": "a"}], "domain": "d"}), json!("domain")),
            (
                json!({"documents": [{"text": "a"}, {"text": "b", "importance": 2}]}),
                json!("documents[1].importance"),
            ),
            (json!({"documents": vec![json!({"text": "a"}); 4]}), json!("documents")),
        ] {
            let error = submit(body.clone(), None).expect_err("must be refused");
            assert_eq!(error.status_code(), 400, "{body}");
            assert_eq!(error.body()["error"]["param"], param, "{body}");
        }
        for key in ["", "a b", "ключ"] {
            let error = submit(json!({"text": "a"}), Some(key)).expect_err("must be refused");
            assert_eq!(error.body()["error"]["param"], "Idempotency-Key", "{key}");
        }
    }

    #[test]
    fn too_much_text_is_413_with_the_limit() {
        let body = json!({"documents": [{"text": "a"}, {"text": "b".repeat(65)}]});
        let error = submit(body, None).expect_err("too large");
        assert_eq!(error.status_code(), 413);
        assert_eq!(error.body()["error"]["param"], "documents[1]");
        assert!(error.to_string().contains("64"), "{error}");
    }
}
