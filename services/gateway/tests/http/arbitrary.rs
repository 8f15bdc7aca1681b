use crate::harness::Server;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Map, Value, json};

/// Names that mean something somewhere, so that values come where they are looked at.
const FIELDS: [&str; 33] = [
    "text",
    "prompt",
    "completion",
    "messages",
    "documents",
    "domain",
    "importance",
    "source",
    "role",
    "content",
    "type",
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "n",
    "best_of",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "1",
    "to",
    "adapter_config",
    "adapter_model",
];
const WORDS: [&str; 12] = [
    "",
    "user",
    "assistant",
    "text",
    "base",
    "auto",
    "a:0.5+b",
    "medical",
    "\0",
    "\u{202e}",
    "00000000000000aa",
    "é\n",
];
const PATHS: [&str; 6] = [
    "/v1/documents",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/feedback",
    "/v1/adapters/medical/rollback",
    "/v1/adapters/medical/import",
];

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-1..3i64).prop_map(Value::from),
        select(&WORDS[..]).prop_map(Value::from),
        ".{0,20}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![vec(inner.clone(), 0..4).prop_map(Value::from), object(inner)]
    })
}

fn object(value: impl Strategy<Value = Value>) -> impl Strategy<Value = Value> {
    let field = (select(&FIELDS[..]), value);
    vec(field, 0..5)
        .prop_map(|fields| fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect::<Map<_, _>>().into())
}

#[test]
fn no_json_is_the_servers_fault() {
    let server = Server::start(&[]);
    // Failures are printed; a file of them beside the sources would be one more thing to keep.
    let mut runner = TestRunner::new(Config { failure_persistence: None, cases: 400, ..Config::default() });
    let body = prop_oneof![4 => object(value()), 1 => value()];
    let outcome = runner.run(&(select(&PATHS[..]), body), |(path, body)| {
        let answer = server.post(path, &body);
        prop_assert!((200..500).contains(&answer.status), "{path} {body}: {answer:?}");
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
    server.assert_unharmed("all of this");
}

#[test]
fn no_bytes_are_the_servers_fault() {
    let server = Server::start(&[]);
    let mut runner = TestRunner::new(Config { failure_persistence: None, cases: 200, ..Config::default() });
    let damage = (any::<proptest::sample::Index>(), any::<u8>());
    let outcome = runner.run(&(select(&PATHS[..]), vec(damage, 1..4)), |(path, damage)| {
        let whole = json!({"documents": [{"text": "a", "importance": 0.5}], "model": "auto", "prompt": "é"});
        let mut bytes = whole.to_string().into_bytes();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let answer = server.send("POST", path, &[], &bytes);
        prop_assert!((200..500).contains(&answer.status), "{path} {bytes:?}: {answer:?}");
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
    server.assert_unharmed("all of this");
}
