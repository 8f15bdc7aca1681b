//! Log-probabilities of tokens, in the two forms that OpenAI gives them.

use crate::question::Form;
use proto::{TokenLogprob, TopLogprob};
use serde_json::{Map, Value, json};

/// What OpenAI says of a token that cannot come. JSON has no infinity.
const LOGPROB_MIN: f32 = -9999.0;

/// The value of `logprobs` for these tokens.
pub(crate) fn of(form: Form, tokens: &[TokenLogprob]) -> Value {
    match form {
        Form::Chat => {
            let content: Vec<Value> = tokens.iter().map(of_chat).collect();
            json!({"content": content, "refusal": null})
        }
        Form::Text => json!({
            "tokens": tokens.iter().map(|token| text(&token.token)).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|token| logprob(&token.token)).collect::<Vec<_>>(),
            "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
            "text_offset": tokens.iter().map(|token| token.text_offset).collect::<Vec<_>>(),
        }),
    }
}

fn of_chat(token: &TokenLogprob) -> Value {
    let spelled =
        |token: &TopLogprob| json!({"token": text(token), "logprob": logprob(token), "bytes": token.bytes});
    let mut value = spelled(&token.token);
    value["top_logprobs"] = token.top.iter().map(spelled).collect();
    value
}

/// The likeliest tokens by their text, the chosen one always among them. Of several parts of
/// characters, which look alike, the chosen one is told, or the likeliest.
fn top(token: &TokenLogprob) -> Map<String, Value> {
    let mut top = Map::new();
    for token in [&token.token].into_iter().chain(&token.top) {
        top.entry(text(token)).or_insert_with(|| json!(logprob(token)));
    }
    top
}

/// The text of a token, as far as it is text: part of a character is not.
fn text(token: &TopLogprob) -> String {
    String::from_utf8_lossy(&token.bytes).into_owned()
}

fn logprob(token: &TopLogprob) -> f32 {
    token.logprob.max(LOGPROB_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> [TokenLogprob; 2] {
        let token = |bytes: &[u8], logprob| TopLogprob { bytes: bytes.to_vec(), logprob };
        let first = TokenLogprob {
            token: token(b" a", -0.5),
            top: vec![token(b" a", -0.5), token(b"b", f32::NEG_INFINITY)],
            text_offset: 0,
        };
        let half =
            TokenLogprob { token: token(b"\xc3", -2.0), top: vec![token(b"\xe4", -0.25)], text_offset: 2 };
        [first, half]
    }

    #[test]
    fn a_chat_has_an_object_for_each_token() {
        let expected = json!({"refusal": null, "content": [
            {"token": " a", "logprob": -0.5, "bytes": [32, 97], "top_logprobs": [
                {"token": " a", "logprob": -0.5, "bytes": [32, 97]},
                {"token": "b", "logprob": -9999.0, "bytes": [98]},
            ]},
            {"token": "\u{FFFD}", "logprob": -2.0, "bytes": [195], "top_logprobs": [
                {"token": "\u{FFFD}", "logprob": -0.25, "bytes": [228]},
            ]},
        ]});
        assert_eq!(of(Form::Chat, &tokens()), expected);
        assert_eq!(of(Form::Chat, &[]), json!({"content": [], "refusal": null}));
    }

    #[test]
    fn a_text_has_a_list_for_each_kind() {
        let expected = json!({
            "tokens": [" a", "\u{FFFD}"],
            "token_logprobs": [-0.5, -2.0],
            "top_logprobs": [{" a": -0.5, "b": -9999.0}, {"\u{FFFD}": -2.0}],
            "text_offset": [0, 2],
        });
        assert_eq!(of(Form::Text, &tokens()), expected);
    }
}
