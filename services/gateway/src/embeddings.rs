//! `POST /v1/embeddings`: what texts mean, as vectors.

use crate::body::Body;
use crate::doors;
use crate::error::{ApiError, Result};
use crate::fields::Fields;
use crate::selector;
use crate::spec;
use crate::state::State;
use actix_web::{HttpRequest, HttpResponse, web};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use proto::{Adapters, Embed};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

/// Texts in one request.
const TEXTS_MAX: usize = 256;

/// Gives texts as vectors, to compare them with.
#[utoipa::path(
    post, path = "/v1/embeddings", tag = "ask", request_body = spec::EmbeddingRequest,
    responses((status = 200, description = "A vector of length 1 for each text.", body = spec::Embeddings))
)]
pub(crate) async fn create(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse> {
    let body = Body::read(&request, payload, state.limits.body, &state.bodies).await?;
    let (body, _held) = body.json()?;
    let Asked { model, mut adapters, texts, packed } = read(body, state.limits.question.prompt_bytes_max)?;
    let time_max = state.limits.generation_time_max;
    let deadline = Instant::now() + time_max;
    let (mut data, mut tokens, many) = (Vec::new(), 0u64, texts.len() > 1);
    for (index, text) in texts.into_iter().enumerate() {
        let ask = doors::ask(&state.gateway.doors.embed, Embed { adapters, text });
        let answer = timeout_at(deadline, ask).await.map_err(|_| out_of_time(time_max.as_secs()))?;
        let place =
            |error: ApiError| if many { error.within("input", &format!("input[{index}]")) } else { error };
        let embedded = answer.map_err(place)?;
        tokens += u64::from(embedded.tokens);
        data.push(
            json!({"object": "embedding", "index": index, "embedding": written(&embedded.vector, packed)}),
        );
        // All texts of a request are read by the same weights, whatever is published meanwhile.
        adapters = match embedded.choice.adapters {
            same if same.is_empty() => Adapters::Base,
            same => Adapters::Fixed(same),
        };
    }
    Ok(HttpResponse::Ok().json(json!({
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    })))
}

fn out_of_time(seconds: u64) -> ApiError {
    ApiError::busy(format!("the vectors took over {seconds} s: ask for fewer"), 1).code("timeout")
}

/// A vector as JSON, or as OpenAI's clients ask for it: the bytes of its numbers in base64.
fn written(vector: &[f32], packed: bool) -> Value {
    if !packed {
        return json!(vector);
    }
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    json!(STANDARD.encode(bytes))
}

#[derive(Debug)]
struct Asked {
    model: String,
    adapters: Adapters,
    texts: Vec<String>,
    packed: bool,
}

fn read(body: Value, bytes_max: usize) -> Result<Asked> {
    let mut fields = Fields::of(body, "")?;
    let model = fields.string("model")?.unwrap_or_else(|| "base".to_owned());
    let adapters = selector::parse(&model)?;
    let what = format!("a text, or an array of 1 to {TEXTS_MAX} texts");
    let texts: Vec<String> = match fields.take("input") {
        Some(Value::String(text)) => vec![text],
        Some(Value::Array(items)) if (1..=TEXTS_MAX).contains(&items.len()) => {
            let text = |item| if let Value::String(text) = item { Some(text) } else { None };
            let texts: Option<Vec<String>> = items.into_iter().map(text).collect();
            texts.ok_or_else(|| fields.must_be("input", &what))?
        }
        _ => return Err(fields.must_be("input", &what)),
    };
    let packed = match fields.string("encoding_format")?.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(fields.must_be("encoding_format", "'float' or 'base64'")),
    };
    // OpenAI uses it to watch for abuse; here as there it has no effect on the answer.
    fields.string("user")?;
    fields.finish()?;
    let bytes: usize = texts.iter().map(String::len).sum();
    if bytes > bytes_max {
        let message = format!("'input' has {bytes} bytes of text, and {bytes_max} are read: ask with less");
        return Err(ApiError::too_large(message).param("input"));
    }
    Ok(Asked { model, adapters, texts, packed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_field() {
        for (body, param) in [
            (json!({}), "input"),
            (json!({"input": []}), "input"),
            (json!({"input": [1, 2]}), "input"),
            (json!({"input": ["a", 1]}), "input"),
            (json!({"input": "a".repeat(65)}), "input"),
            (json!({"input": "a", "encoding_format": "hex"}), "encoding_format"),
            (json!({"input": "a", "dimensions": 8}), "dimensions"),
            (json!({"input": "a", "model": "Not one"}), "model"),
        ] {
            let error = read(body.clone(), 64).expect_err("must be refused");
            assert_eq!(error.body()["error"]["param"], param, "{body}");
        }
        let asked = read(json!({"input": ["a", "b"], "encoding_format": "base64"}), 64).expect("valid");
        assert_eq!((asked.texts.len(), asked.packed, asked.adapters), (2, true, Adapters::Base));
    }
}
