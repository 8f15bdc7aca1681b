//! The fields that say how the next token is chosen: OpenAI's, and `top_k`, `min_p` and
//! `repetition_penalty`, as vLLM adds them.

use crate::error::Result;
use crate::fields::{self, Fields};
use crate::question::Form;
use proto::Sampling;
use serde_json::Value;
use std::collections::BTreeMap;

/// Stop texts in one request, as at OpenAI.
const STOPS_MAX: usize = 4;
/// The longest stop text, in bytes.
const STOP_BYTES_MAX: usize = 256;
/// The largest `max_tokens`. More than the model's context is no error, since clients send the same
/// number to every model: the answer ends where the context does.
const TOKENS_MAX: u32 = 1 << 20;
/// Alternatives told for each token.
const TOP_LOGPROBS_MAX: u32 = 20;
/// Tokens with a bias. They are looked at before every token that is chosen.
const BIASES_MAX: usize = 1024;
/// What a bias may be.
const BIAS_MAX: f32 = 100.0;

/// Reads the fields. `tokens` is the length of an answer, and `seed` the seed, where the body says none.
pub(crate) fn read(fields: &mut Fields, form: Form, tokens: u32, seed: u64) -> Result<Sampling> {
    let max_tokens = fields.whole("max_tokens", 1..=TOKENS_MAX)?;
    let max_tokens = match form {
        // The newer name; the older one is still sent by most clients.
        Form::Chat => fields.whole("max_completion_tokens", 1..=TOKENS_MAX)?.or(max_tokens),
        Form::Text => max_tokens,
    };
    let top_p = fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0);
    if top_p == 0.0 {
        return Err(fields.must_be("top_p", "above 0"));
    }
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0),
        top_p,
        top_k: fields.whole("top_k", 0..=u32::MAX)?.unwrap_or(0),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(0.0),
        repetition_penalty: fields.number("repetition_penalty", 0.1..=10.0)?.unwrap_or(1.0),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        logit_bias: logit_bias(fields)?,
        logprobs: logprobs(fields, form)?,
        seed: self::seed(fields)?.unwrap_or(seed),
        max_tokens: max_tokens.unwrap_or(tokens),
        stop: stops(fields)?,
    })
}

fn seed(fields: &mut Fields) -> Result<Option<u64>> {
    let Some(value) = fields.take("seed") else { return Ok(None) };
    // OpenAI's seeds are signed; all that matters is that equal ones stay equal.
    let seed = fields::whole(&value).and_then(|seed| {
        let signed = i64::try_from(seed).map(|seed| seed as u64);
        signed.or_else(|_| u64::try_from(seed)).ok()
    });
    match seed {
        Some(seed) => Ok(Some(seed)),
        None => Err(fields.must_be("seed", "a whole number of 64 bits")),
    }
}

fn stops(fields: &mut Fields) -> Result<Vec<String>> {
    let values = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(values)) => values,
        Some(value) => vec![value],
    };
    let text = |value: Value| match value {
        Value::String(text) if (1..=STOP_BYTES_MAX).contains(&text.len()) => Some(text),
        _ => None,
    };
    let count = values.len();
    match values.into_iter().map(text).collect() {
        Some(stops) if count <= STOPS_MAX => Ok(stops),
        _ => {
            let what = format!("up to {STOPS_MAX} texts of 1 to {STOP_BYTES_MAX} bytes");
            Err(fields.must_be("stop", &what))
        }
    }
}

fn logit_bias(fields: &mut Fields) -> Result<BTreeMap<u32, f32>> {
    let Some(value) = fields.take("logit_bias") else { return Ok(BTreeMap::new()) };
    let bias = |(id, bias): (&String, &Value)| {
        let id = id.parse().ok().filter(|_| id.bytes().all(|byte| byte.is_ascii_digit()))?;
        let bias = bias.as_f64().map(|bias| bias as f32);
        Some((id, bias.filter(|bias| (-BIAS_MAX..=BIAS_MAX).contains(bias))?))
    };
    let given = value.as_object().filter(|given| given.len() <= BIASES_MAX);
    let biases: Option<BTreeMap<u32, f32>> = given.and_then(|given| given.iter().map(bias).collect());
    biases.ok_or_else(|| {
        let number = format!("a number from -{BIAS_MAX} to {BIAS_MAX}");
        fields.must_be(
            "logit_bias",
            &format!("an object with {number} for each of up to {BIASES_MAX} token ids"),
        )
    })
}

/// How many alternatives to tell for each token, where log-probabilities are asked for.
fn logprobs(fields: &mut Fields, form: Form) -> Result<Option<u32>> {
    if form == Form::Text {
        return fields.whole("logprobs", 0..=TOP_LOGPROBS_MAX);
    }
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.whole("top_logprobs", 0..=TOP_LOGPROBS_MAX)?;
    if top.is_some() && !wanted {
        return Err(fields.must_be("top_logprobs", "left out where 'logprobs' is not true"));
    }
    Ok(wanted.then_some(top.unwrap_or(0)))
}
