use crate::completions::{chat, events};
use crate::harness::Server;
use serde_json::{Value, json};

const TEXT: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
/// What the first choice says; each other adds its number.
const SAID: &str = "Hello\n\"wörld\"";

fn said(index: usize) -> String {
    if index == 0 { SAID.to_owned() } else { format!("{SAID} {index}") }
}

/// What a stream brings for a choice.
fn choices(events: &[Value], index: usize) -> impl Iterator<Item = &Value> {
    let all = events.iter().flat_map(|event| event["choices"].as_array().expect("choices"));
    all.filter(move |choice| choice["index"] == index)
}

#[test]
fn what_shapes_the_choice_of_tokens_is_handed_on() {
    let server = Server::start(&[]);
    let body = json!({
        "prompt": "hi", "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": -0.5,
        "frequency_penalty": 0.25, "logit_bias": {"3": -100, "9": 1.5}, "top_k": 40, "n": 2, "best_of": 2,
    });
    assert_eq!(server.post(TEXT, &body).status, 200);
    let asked = server.seen.asked.lock().expect("not poisoned").clone().expect("a request");
    assert_eq!((asked.n, asked.sampling.top_k, asked.sampling.min_p), (2, 40, 0.1));
    assert_eq!((asked.sampling.repetition_penalty, asked.sampling.presence_penalty), (1.2, -0.5));
    assert_eq!(asked.sampling.frequency_penalty, 0.25);
    assert_eq!(asked.sampling.logit_bias, [(3, -100.0), (9, 1.5)].into());
    assert_eq!(asked.sampling.logprobs, None);
}

#[test]
fn each_of_n_choices_has_its_index_and_the_prompt_counts_once() {
    let server = Server::start(&[]);
    let text = server.post(TEXT, &json!({"prompt": "hi", "n": 3})).json();
    let talk = server.post(CHAT, &chat("hi", json!({"n": 3}))).json();
    for (answer, of) in [(&text, "/text"), (&talk, "/message/content")] {
        let choices = answer["choices"].as_array().expect("choices");
        assert_eq!(choices.len(), 3);
        for (index, choice) in choices.iter().enumerate() {
            assert_eq!(choice.pointer(of), Some(&json!(said(index))));
            let rest = (&choice["index"], &choice["finish_reason"], &choice["logprobs"]);
            assert_eq!(rest, (&json!(index), &json!("stop"), &Value::Null));
        }
        let usage = json!({"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9});
        assert_eq!(answer["usage"], usage);
    }
}

#[test]
fn a_stream_tells_n_choices_side_by_side() {
    let server = Server::start(&[]);
    let options = json!({"n": 3, "stream": true, "stream_options": {"include_usage": true}});
    let events = events(&server.post(CHAT, &chat("hi", options)).body);
    for index in 0..3 {
        let choices: Vec<&Value> = choices(&events, index).collect();
        assert_eq!(choices[0]["delta"]["role"], "assistant");
        let text: String = choices.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
        assert_eq!(text, said(index));
        let ends = choices.iter().filter(|choice| choice["finish_reason"] == "stop");
        assert_eq!(ends.count(), 1);
        assert_eq!(choices.last().expect("a last one")["finish_reason"], "stop");
    }
    let count = events.last().expect("a count");
    assert_eq!((&count["choices"], &count["usage"]["completion_tokens"]), (&json!([]), &json!(6)));
    assert!(events.iter().all(|event| event["choices"].as_array().is_some_and(|all| all.len() <= 1)));
}

#[test]
fn a_chat_tells_logprobs_in_its_form() {
    let server = Server::start(&[]);
    let body = chat("hi", json!({"logprobs": true, "top_logprobs": 2}));
    let answer = server.post(CHAT, &body).json();
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["refusal"], Value::Null);
    let first = json!({"token": "Hello", "logprob": 0.0, "bytes": [72, 101, 108, 108, 111], "top_logprobs": [
        {"token": "Hello", "logprob": 0.0, "bytes": [72, 101, 108, 108, 111]},
        {"token": "\u{FFFD}", "logprob": -9999.0, "bytes": [195]},
    ]});
    assert_eq!((logprobs["content"].as_array().map(Vec::len), &logprobs["content"][0]), (Some(2), &first));
    let mut streamed = body;
    streamed["stream"] = json!(true);
    let events = events(&server.post(CHAT, &streamed).body);
    let told = choices(&events, 0).filter_map(|choice| choice["logprobs"]["content"].as_array());
    assert_eq!(&Value::from(told.flatten().cloned().collect::<Vec<_>>()), &logprobs["content"]);
    for choice in choices(&events, 0).filter(|choice| choice["logprobs"].is_object()) {
        assert_eq!(choice["logprobs"]["content"][0]["token"], choice["delta"]["content"]);
    }
    let bare = server.post(CHAT, &chat("hi", json!({"logprobs": true}))).json();
    assert_eq!(bare["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
}

#[test]
fn a_text_tells_logprobs_in_its_form() {
    let server = Server::start(&[]);
    let answer = server.post(TEXT, &json!({"prompt": "hi", "logprobs": 2, "n": 2})).json();
    let expected = json!({
        "tokens": ["Hello", "\n\"wörld\" 1"],
        "token_logprobs": [0.0, 0.0],
        "top_logprobs": [
            {"Hello": 0.0, "\u{FFFD}": -9999.0},
            {"\n\"wörld\" 1": 0.0, "\u{FFFD}": -9999.0},
        ],
        "text_offset": [0, 5],
    });
    assert_eq!(answer["choices"][1]["logprobs"], expected);
    let body = json!({"prompt": "hi", "logprobs": 0, "n": 2, "stream": true});
    let events = events(&server.post(TEXT, &body).body);
    let told: Vec<&Value> = choices(&events, 1).map(|choice| &choice["logprobs"]).collect();
    assert_eq!((&told[0]["tokens"], &told[0]["text_offset"]), (&json!(["Hello"]), &json!([0])));
    assert_eq!(
        (&told[1]["top_logprobs"], &told[1]["text_offset"]),
        (&json!([{"\n\"wörld\" 1": 0.0}]), &json!([5]))
    );
    assert_eq!(told.last(), Some(&&Value::Null));
}
