//! Reading what `POST /v1/chat/completions` and `POST /v1/completions` bring. Pure, so that a bad
//! request costs nothing but its reading.

use crate::error::{ApiError, Result};
use crate::fields::Fields;
use crate::lesson::{self, Learn};
use crate::{format, messages, sampling, selector};
use proto::{Generate, Prompt};
use serde_json::{Map, Value};

/// Answers to one request.
const ANSWERS_MAX: u32 = 16;

/// Which of the two routes asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// `/v1/chat/completions`: messages in, a message out.
    Chat,
    /// `/v1/completions`: text in, its continuation out.
    Text,
}

/// A request for text, read.
#[derive(Debug)]
pub(crate) struct Question {
    /// For the model.
    pub generate: Generate,
    /// Whether the answer comes as events.
    pub stream: bool,
    /// Whether the exchange is learned.
    pub learn: Option<Learn>,
    /// For the answer.
    pub asked: Asked,
}

/// What an answer has to know of its question.
#[derive(Debug)]
pub(crate) struct Asked {
    /// By which route it came.
    pub form: Form,
    /// `model`, as it was written.
    pub model: String,
    /// Whether the last event of a stream counts the tokens.
    pub include_usage: bool,
    /// Whether tokens are told with their log-probabilities.
    pub logprobs: bool,
}

/// What a request for text may hold, and what it has where it leaves it open.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Text in the prompt, or in all messages together.
    pub prompt_bytes_max: usize,
    /// `max_tokens`, where it is left out.
    pub tokens_default: u32,
}

/// Reads a body. `seed` is for a request that brings none.
pub(crate) fn read(body: Value, form: Form, limits: Limits, seed: u64) -> Result<Question> {
    let mut fields = Fields::of(body, "")?;
    let model = fields.string("model")?.unwrap_or_else(|| "auto".to_owned());
    let adapters = selector::parse(&model)?;
    let prompt = match form {
        Form::Chat => messages::read(&mut fields)?.map(Prompt::Messages),
        Form::Text => text_prompt(&mut fields)?.map(Prompt::Text),
    };
    let missing = match form {
        Form::Chat => "messages",
        Form::Text => "prompt",
    };
    let prompt = prompt.ok_or_else(|| {
        ApiError::invalid(missing, format!("'{missing}' is missing: it says what to answer"))
    })?;
    let (bytes, bytes_max) = (prompt_bytes(&prompt), limits.prompt_bytes_max);
    if bytes > bytes_max {
        let message =
            format!("'{missing}' has {bytes} bytes of text, and {bytes_max} are read: ask with less");
        return Err(ApiError::too_large(message).param(missing));
    }
    let sampling = sampling::read(&mut fields, form, limits.tokens_default, seed)?;
    let schema = if form == Form::Chat { format::read(&mut fields)? } else { None };
    let n = answers(&mut fields)?;
    let learn = if form == Form::Chat { lesson::read(&mut fields, n)? } else { None };
    let stream = fields.bool("stream")?.unwrap_or(false);
    let include_usage = stream_options(&mut fields, stream)?;
    // OpenAI uses it to watch for abuse; here as there it has no effect on the answer.
    fields.string("user")?;
    for (field, value) in fields.rest() {
        match is_default(field, value) {
            Some(true) => {}
            Some(false) => {
                let message = format!("'{field}' is not supported yet, other than with its default");
                return Err(ApiError::invalid(field, message));
            }
            None => return Err(fields.unknown(field)),
        }
    }
    let asked = Asked { form, model, include_usage, logprobs: sampling.logprobs.is_some() };
    Ok(Question { generate: Generate { adapters, prompt, sampling, n, schema }, stream, learn, asked })
}

fn prompt_bytes(prompt: &Prompt) -> usize {
    match prompt {
        Prompt::Text(text) => text.len(),
        Prompt::Messages(messages) => messages.iter().map(|message| message.content.len()).sum(),
    }
}

fn text_prompt(fields: &mut Fields) -> Result<Option<String>> {
    match fields.take("prompt") {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Array(mut texts)) if texts.len() == 1 => match texts.pop() {
            Some(Value::String(text)) => Ok(Some(text)),
            _ => Err(fields.must_be("prompt", "a string, or an array with one string")),
        },
        Some(_) => Err(fields.must_be("prompt", "a string, or an array with one string")),
    }
}

/// Reads `n`. All answers are given, so the best of more than `n` cannot be picked.
fn answers(fields: &mut Fields) -> Result<u32> {
    let n = fields.whole("n", 1..=ANSWERS_MAX)?.unwrap_or(1);
    match fields.whole("best_of", 1..=ANSWERS_MAX)? {
        Some(best_of) if best_of != n => Err(fields.must_be("best_of", "left out, or equal to 'n'")),
        _ => Ok(n),
    }
}

fn stream_options(fields: &mut Fields, stream: bool) -> Result<bool> {
    let Some(options) = fields.take("stream_options") else { return Ok(false) };
    if !stream {
        return Err(fields.must_be("stream_options", "left out where 'stream' is not true"));
    }
    let mut options = Fields::of(options, "stream_options")?;
    let include_usage = options.bool("include_usage")?.unwrap_or(false);
    options.finish()?;
    Ok(include_usage)
}

/// For a field of OpenAI's that is not supported here: whether the value is the default, with which
/// the field changes nothing. None for a field that OpenAI does not know either.
fn is_default(field: &str, value: &Value) -> Option<bool> {
    if value.is_null() {
        return Some(true);
    }
    Some(match field {
        "echo" | "store" => *value == false,
        // Nothing is called, so nothing is called in parallel either.
        "parallel_tool_calls" => value.is_boolean(),
        "metadata" => value.as_object().is_some_and(Map::is_empty),
        "tools" | "functions" => value.as_array().is_some_and(Vec::is_empty),
        "tool_choice" | "function_call" => *value == "none" || *value == "auto",
        "response_format" => *value == serde_json::json!({"type": "text"}),
        "modalities" => *value == serde_json::json!(["text"]),
        "service_tier" => *value == "auto" || *value == "default",
        "audio" | "prediction" | "prompt_cache_key" | "reasoning_effort" | "safety_identifier" | "suffix"
        | "verbosity" | "web_search_options" => false,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use actix_web::ResponseError;
    use proto::Adapters;
    use serde_json::json;

    fn ask(form: Form, body: Value) -> Result<Question> {
        read(body, form, Limits { prompt_bytes_max: 64, tokens_default: 4096 }, 42)
    }

    #[test]
    fn left_out_fields_have_their_defaults() {
        let question = ask(Form::Text, json!({"prompt": "a", "seed": null})).expect("valid");
        let sampling = question.generate.sampling;
        assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (1.0, 1.0, 0));
        assert_eq!((sampling.max_tokens, sampling.seed), (4096, 42));
        assert!(sampling.stop.is_empty() && !question.stream && !question.asked.include_usage);
        assert_eq!((question.generate.n, sampling.logprobs, question.asked.logprobs), (1, None, false));
        assert_eq!((sampling.min_p, sampling.repetition_penalty), (0.0, 1.0));
        assert_eq!((sampling.presence_penalty, sampling.frequency_penalty), (0.0, 0.0));
        assert!(sampling.logit_bias.is_empty());
        assert_eq!((question.asked.model.as_str(), question.generate.adapters), ("auto", Adapters::Auto));
    }

    #[test]
    fn given_fields_are_read() {
        let body = json!({
            "model": "base", "messages": [{"role": "user", "content": "hi"}], "stream": true,
            "max_tokens": 9, "max_completion_tokens": 8, "temperature": 0, "top_p": 0.5, "top_k": 3,
            "seed": -1, "stop": "x", "stream_options": {"include_usage": true}, "user": "u",
            "n": 2, "logprobs": true, "top_logprobs": 3, "tools": [], "response_format": {"type": "text"},
            "presence_penalty": -2, "frequency_penalty": 0.5, "min_p": 0.25, "repetition_penalty": 1.5,
            "logit_bias": {"50256": -100, "0": 1.5},
        });
        let question = ask(Form::Chat, body).expect("valid");
        let sampling = question.generate.sampling;
        assert_eq!((sampling.max_tokens, sampling.seed, sampling.top_k), (8, u64::MAX, 3));
        assert_eq!(sampling.stop, ["x"]);
        assert!(question.stream && question.asked.include_usage && question.asked.logprobs);
        assert_eq!((question.generate.n, sampling.logprobs, sampling.min_p), (2, Some(3), 0.25));
        assert_eq!((sampling.presence_penalty, sampling.frequency_penalty), (-2.0, 0.5));
        assert_eq!(sampling.repetition_penalty, 1.5);
        assert_eq!(sampling.logit_bias, [(0, 1.5), (50256, -100.0)].into());
        let array = ask(Form::Text, json!({"prompt": ["a"], "stop": ["x", "y"]})).expect("valid");
        assert_eq!(array.generate.prompt, Prompt::Text("a".into()));
        assert_eq!(array.generate.sampling.stop, ["x", "y"]);
    }

    #[test]
    fn numbers_are_read_in_every_form_that_json_has_for_them() {
        let body = json!({"prompt": "a", "max_tokens": 9.0, "seed": -5.0, "top_p": 5e-324, "top_k": 1e3});
        let sampling = ask(Form::Text, body).expect("valid").generate.sampling;
        assert_eq!((sampling.max_tokens, sampling.seed, sampling.top_k), (9, -5i64 as u64, 1000));
        assert!(sampling.top_p > 0.0);
    }

    #[test]
    fn a_refusal_names_the_field() {
        for (field, value) in [
            ("prompt", json!(null)),
            ("prompt", json!(["a", "b"])),
            ("prompt", json!([1, 2])),
            ("model", json!(7)),
            ("n", json!(1e9)),
            ("n", json!(1_000_000_000)),
            ("n", json!(0)),
            ("n", json!(17)),
            ("best_of", json!(2)),
            ("max_tokens", json!(-1)),
            ("max_tokens", json!(0)),
            ("max_tokens", json!(9_223_372_036_854_775_808u64)),
            ("max_tokens", json!("9")),
            ("max_completion_tokens", json!(9)),
            ("temperature", json!(2.1)),
            ("temperature", json!("NaN")),
            ("top_p", json!(0)),
            ("top_p", json!(1.1)),
            ("top_k", json!(-1)),
            ("seed", json!(0.5)),
            ("seed", json!(1e300)),
            ("stop", json!(["a", "b", "c", "d", "e"])),
            ("stop", json!("")),
            ("stop", json!([1])),
            ("stream", json!("yes")),
            ("stream_options", json!({"include_usage": true})),
            ("user", json!(1)),
            ("min_p", json!(-0.1)),
            ("min_p", json!(1.1)),
            ("repetition_penalty", json!(0)),
            ("presence_penalty", json!(2.1)),
            ("frequency_penalty", json!(-2.1)),
            ("logprobs", json!(true)),
            ("logprobs", json!(21)),
            ("top_logprobs", json!(1)),
            ("echo", json!(true)),
            ("suffix", json!("s")),
            ("logit_bias", json!([1])),
            ("logit_bias", json!({"1": 101})),
            ("logit_bias", json!({"1": "a"})),
            ("logit_bias", json!({"-1": 1})),
            ("logit_bias", json!({"+1": 1})),
            ("logit_bias", json!({"4294967296": 1})),
            ("logit_bias", json!({"word": 1})),
            ("tools", json!([{}])),
            ("response_format", json!({"type": "json_object"})),
            ("temprature", json!(1)),
        ] {
            let mut body = json!({"prompt": "a"});
            body[field] = value.clone();
            let error = ask(Form::Text, body).expect_err(field);
            assert_eq!(error.body()["error"]["param"], field, "{value}");
        }
    }

    #[test]
    fn each_form_asks_for_logprobs_in_its_own_way() {
        let chat = |more: Value| {
            let mut body = json!({"messages": [{"role": "user", "content": "a"}]});
            body.as_object_mut().expect("fields").extend(more.as_object().expect("fields").clone());
            ask(Form::Chat, body)
        };
        let told = |more| chat(more).expect("valid").generate.sampling.logprobs;
        assert_eq!(told(json!({"logprobs": true})), Some(0));
        assert_eq!(told(json!({"logprobs": true, "top_logprobs": 20})), Some(20));
        assert_eq!(told(json!({"logprobs": false})), None);
        for (more, param) in [
            (json!({"logprobs": 5}), "logprobs"),
            (json!({"top_logprobs": 5}), "top_logprobs"),
            (json!({"logprobs": false, "top_logprobs": 5}), "top_logprobs"),
            (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        ] {
            assert_eq!(chat(more).expect_err(param).body()["error"]["param"], param);
        }
        let text = ask(Form::Text, json!({"prompt": "a", "logprobs": 5, "n": 3, "best_of": 3}));
        let generate = text.expect("valid").generate;
        assert_eq!((generate.sampling.logprobs, generate.n), (Some(5), 3));
    }

    #[test]
    fn too_long_a_prompt_is_413() {
        let error = ask(Form::Text, json!({"prompt": "a".repeat(65)})).expect_err("too long");
        assert_eq!((error.status_code().as_u16(), &error.body()["error"]["param"]), (413, &json!("prompt")));
    }

    #[test]
    fn chat_reads_no_prompt_and_text_no_messages() {
        let messages = json!([{"role": "user", "content": "a"}]);
        for (form, body, param) in [
            (Form::Chat, json!({"prompt": "a"}), "messages"),
            (Form::Text, json!({"messages": messages}), "prompt"),
            (Form::Chat, json!({"messages": messages, "prompt": "a"}), "prompt"),
        ] {
            let error = ask(form, body).expect_err(param);
            assert_eq!(error.body()["error"]["param"], param);
        }
    }
}
