//! `learn` in a chat request: the exchange becomes a document. Nothing is learned from chats otherwise.

use crate::documents;
use crate::error::{ApiError, Result};
use crate::fields::Fields;
use crate::state::{State, now_ms};
use crate::submission;
use proto::{Choice, Domain, FinishReason, Message, Prompt, Role};
use serde_json::{Value, json};

/// The source of documents that are exchanges of a chat.
const SOURCE: &str = "chat";

/// What a request says of learning from it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Learn {
    /// Where it goes; the domain that answers, if none is named.
    domain: Option<Domain>,
}

/// Reads `learn`: true, false, or a domain. Of several answers nobody knows which is meant.
pub(crate) fn read(fields: &mut Fields, n: u32) -> Result<Option<Learn>> {
    let learn = match fields.take("learn") {
        None | Some(Value::Bool(false)) => return Ok(None),
        Some(Value::Bool(true)) => Learn { domain: None },
        Some(Value::String(name)) => {
            let domain = Domain::new(name).map_err(|error| ApiError::bad_name("learn", &error))?;
            Learn { domain: Some(domain) }
        }
        Some(_) => return Err(fields.must_be("learn", "true, false, or the domain that learns")),
    };
    if n > 1 {
        return Err(fields.must_be("learn", "left out where 'n' is more than 1"));
    }
    Ok(Some(learn))
}

/// An exchange that is to be learned once it is whole.
pub(crate) struct Lesson {
    messages: Vec<Message>,
    domain: Domain,
    answer: String,
}

impl Lesson {
    /// The beginning of one: the conversation so far, and who answers.
    pub(crate) fn new(learn: Learn, prompt: Prompt, choice: &Choice) -> Self {
        let messages = match prompt {
            Prompt::Messages(messages) => messages,
            Prompt::Text(content) => vec![Message { role: Role::User, content }],
        };
        let answering = match &choice.adapters[..] {
            [one] => one.domain.clone(),
            _ => Domain::general(),
        };
        Self { messages, domain: learn.domain.unwrap_or(answering), answer: String::new() }
    }

    /// The next piece of the answer.
    pub(crate) fn hear(&mut self, text: &str) {
        self.answer.push_str(text);
    }

    /// Submits the exchange; how its document stands, or why there is none. The answer itself is good in any case.
    pub(crate) async fn submit(mut self, state: &State, reason: FinishReason) -> Value {
        if reason != FinishReason::Stop {
            return json!({"status": "refused", "reason": "the answer was cut off before its end"});
        }
        self.messages.push(Message { role: Role::Assistant, content: self.answer });
        match submit(state, &json!(self.messages), &self.domain).await {
            Ok(document) => document,
            Err(error) => json!({"status": "refused", "reason": error.to_string()}),
        }
    }
}

async fn submit(state: &State, messages: &Value, domain: &Domain) -> Result<Value> {
    let body = json!({"messages": messages, "domain": domain, "source": SOURCE});
    let read = submission::read(body, None, state.limits.submission, now_ms())?;
    Ok(documents::append(state, read).await?.swap_remove(0))
}
