//! The messages of a conversation, as OpenAI writes them.

use crate::error::{ApiError, Result};
use crate::fields::Fields;
use proto::{Message, Role};
use serde_json::Value;

/// Messages in one conversation.
const MESSAGES_MAX: usize = 4096;

/// Reads the field `messages`: content is a string, or an array of parts of type `text`.
pub(crate) fn read(fields: &mut Fields) -> Result<Option<Vec<Message>>> {
    let path = fields.path("messages");
    let Some(items) = fields.array("messages", MESSAGES_MAX)? else { return Ok(None) };
    let message = |(n, item)| read_one(Fields::of(item, format!("{path}[{n}]"))?);
    items.into_iter().enumerate().map(message).collect::<Result<_>>().map(Some)
}

fn read_one(mut fields: Fields) -> Result<Message> {
    let role = match fields.string("role")?.as_deref() {
        // What newer clients call the system's role.
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        _ => return Err(fields.must_be("role", "'system', 'user' or 'assistant'")),
    };
    let content = content(&mut fields)?;
    fields.finish()?;
    Ok(Message { role, content })
}

fn content(fields: &mut Fields) -> Result<String> {
    match fields.take("content") {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(parts)) => {
            let path = fields.path("content");
            let part = |(n, part)| text_part(Fields::of(part, format!("{path}[{n}]"))?);
            parts.into_iter().enumerate().map(part).collect()
        }
        _ => Err(fields.must_be("content", "a string, or an array of parts of type 'text'")),
    }
}

fn text_part(mut fields: Fields) -> Result<String> {
    if fields.string("type")?.as_deref() != Some("text") {
        return Err(fields.must_be("type", "'text': nothing else is read here"));
    }
    let text = fields.string("text")?;
    let text = text.ok_or_else(|| ApiError::invalid(fields.path("text"), "a text is missing"))?;
    fields.finish()?;
    Ok(text)
}
