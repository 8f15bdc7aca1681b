//! `POST /tokenize` and `POST /detokenize`, in the shapes that vLLM gives them.

use crate::body::Body;
use crate::error::{ApiError, Result};
use crate::fields::{self, Fields};
use crate::messages;
use crate::selector;
use crate::spec;
use crate::state::State;
use actix_web::{HttpRequest, HttpResponse, web};
use proto::Message;
use serde_json::{Value, json};
use std::sync::Arc;

/// Token ids in one request: as many as a prompt of the largest size could have.
const TOKENS_MAX: usize = 1 << 18;

/// The text side of the base: text to tokens, and back.
pub trait Words: Send + Sync {
    /// The tokens of a text; `whole`, with those that begin a text of its own.
    ///
    /// # Errors
    /// When the tokenizer fails on it.
    fn encode(&self, text: &str, whole: bool) -> anyhow::Result<Vec<u32>>;

    /// The tokens of a conversation; `open`, up to where the assistant speaks next.
    ///
    /// # Errors
    /// When the chat template refuses it.
    fn encode_chat(&self, messages: &[Message], open: bool) -> anyhow::Result<Vec<u32>>;

    /// The text of tokens, control tokens left out.
    ///
    /// # Errors
    /// When the tokenizer fails on them.
    fn decode(&self, tokens: &[u32]) -> anyhow::Result<String>;

    /// A token as the vocabulary writes it; none where there is no such token.
    fn token(&self, id: u32) -> Option<String>;
}

/// Cuts a text or a conversation into tokens.
#[utoipa::path(
    post, path = "/tokenize", tag = "ask", request_body = spec::Tokenize,
    responses((status = 200, description = "The tokens.", body = spec::Tokenized))
)]
pub(crate) async fn tokenize(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse> {
    let body = Body::read(&request, payload, state.limits.body, &state.bodies).await?;
    let (body, _held) = body.json()?;
    let words = Arc::clone(&state.gateway.words);
    let question = read_tokenize(body, state.limits.question.prompt_bytes_max)?;
    // A long text takes the tokenizer long enough to keep others waiting.
    let tokens = web::block(move || {
        let tokens = match &question.text {
            Text::Prompt(text) => words.encode(text, question.flag),
            Text::Messages(messages) => words.encode_chat(messages, question.flag),
        };
        let tokens =
            tokens.map_err(|error| ApiError::invalid(question.text.field(), format!("{error:#}")))?;
        let spelled = question.spelled.then(|| tokens.iter().map(|id| words.token(*id)).collect::<Vec<_>>());
        Ok::<_, ApiError>((tokens, spelled))
    });
    let (tokens, spelled) = tokens.await.map_err(|error| ApiError::internal(&error))??;
    Ok(HttpResponse::Ok().json(json!({
        "count": tokens.len(),
        "max_model_len": state.gateway.info.context_length,
        "tokens": tokens,
        "token_strs": spelled,
    })))
}

/// Puts tokens together.
#[utoipa::path(
    post, path = "/detokenize", tag = "ask", request_body = spec::Detokenize,
    responses((status = 200, description = "The text, control tokens left out.", body = spec::Untokenized))
)]
pub(crate) async fn detokenize(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse> {
    let body = Body::read(&request, payload, state.limits.body, &state.bodies).await?;
    let (body, _held) = body.json()?;
    let tokens = read_detokenize(body)?;
    let words = &state.gateway.words;
    if let Some(place) = tokens.iter().position(|id| words.token(*id).is_none()) {
        let message = format!("this model has no token {}", tokens[place]);
        return Err(ApiError::invalid(format!("tokens[{place}]"), message));
    }
    let prompt = words.decode(&tokens).map_err(|error| ApiError::invalid("tokens", format!("{error:#}")))?;
    Ok(HttpResponse::Ok().json(json!({"prompt": prompt})))
}

/// What is to be cut into tokens.
#[derive(Debug, PartialEq)]
enum Text {
    Prompt(String),
    Messages(Vec<Message>),
}

impl Text {
    fn field(&self) -> &'static str {
        match self {
            Self::Prompt(_) => "prompt",
            Self::Messages(_) => "messages",
        }
    }
}

#[derive(Debug, PartialEq)]
struct Question {
    text: Text,
    /// Whether a prompt begins as a text of its own, or the assistant speaks next in a conversation.
    flag: bool,
    /// Whether the tokens are spelled out too.
    spelled: bool,
}

fn read_tokenize(body: Value, bytes_max: usize) -> Result<Question> {
    let mut fields = Fields::of(body, "")?;
    model(&mut fields)?;
    let spelled = fields.bool("return_token_strs")?.unwrap_or(false);
    let (text, flag) = match (fields.string("prompt")?, messages::read(&mut fields)?) {
        (Some(prompt), None) => (Text::Prompt(prompt), "add_special_tokens"),
        (None, Some(messages)) => (Text::Messages(messages), "add_generation_prompt"),
        _ => return Err(ApiError::invalid("prompt", "give either 'prompt' or 'messages'")),
    };
    let flag = fields.bool(flag)?.unwrap_or(true);
    fields.finish()?;
    let bytes = match &text {
        Text::Prompt(prompt) => prompt.len(),
        Text::Messages(messages) => messages.iter().map(|message| message.content.len()).sum(),
    };
    if bytes > bytes_max {
        let message = format!("there are {bytes} bytes of text, and {bytes_max} are read: ask with less");
        return Err(ApiError::too_large(message).param(text.field()));
    }
    Ok(Question { text, flag, spelled })
}

fn read_detokenize(body: Value) -> Result<Vec<u32>> {
    let mut fields = Fields::of(body, "")?;
    model(&mut fields)?;
    let tokens = match fields.take("tokens") {
        Some(Value::Array(tokens)) if tokens.len() <= TOKENS_MAX => tokens,
        _ => return Err(fields.must_be("tokens", &format!("an array of at most {TOKENS_MAX} token ids"))),
    };
    fields.finish()?;
    let id = |(place, token): (usize, Value)| {
        let id = fields::whole(&token).and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| ApiError::invalid(format!("tokens[{place}]"), "a token id is a whole number from 0"))
    };
    tokens.into_iter().enumerate().map(id).collect()
}

/// Reads `model`: all of them have the tokenizer of the base, so only its form matters.
fn model(fields: &mut Fields) -> Result<()> {
    fields.string("model")?.map_or(Ok(()), |model| selector::parse(&model).map(drop))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_field() {
        for (body, param) in [
            (json!({}), "prompt"),
            (json!({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}), "prompt"),
            (json!({"prompt": 1}), "prompt"),
            (json!({"prompt": "a".repeat(65)}), "prompt"),
            (json!({"prompt": "a", "add_generation_prompt": true}), "add_generation_prompt"),
            (json!({"messages": []}), "messages"),
            (json!({"prompt": "a", "model": 1}), "model"),
            (json!({"prompt": "a", "return_token_strs": 1}), "return_token_strs"),
        ] {
            let error = read_tokenize(body.clone(), 64).expect_err("must be refused");
            assert_eq!(error.body()["error"]["param"], param, "{body}");
        }
        for (body, param) in [
            (json!({}), "tokens"),
            (json!({"tokens": "a"}), "tokens"),
            (json!({"tokens": [1, -1]}), "tokens[1]"),
            (json!({"tokens": [1.5]}), "tokens[0]"),
            (json!({"tokens": [4_294_967_296u64]}), "tokens[0]"),
            (json!({"tokens": [], "prompt": "a"}), "prompt"),
        ] {
            let error = read_detokenize(body.clone()).expect_err("must be refused");
            assert_eq!(error.body()["error"]["param"], param, "{body}");
        }
    }
}
