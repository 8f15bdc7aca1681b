//! The doors beside OpenAI's: the page, vLLM's additions, and what Prometheus reads.

use crate::harness::{Setup, sentence};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::fs;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(300);

#[test]
fn the_page_and_the_metrics_tell_what_was_learned() {
    let server = Setup::tiny().start();
    let texts: Vec<Value> = (0..3).map(|n| json!({"text": sentence(n), "domain": "ledgers"})).collect();
    let ids = server.submit(&[texts, vec![json!({"text": "short"})]].concat());
    let settled = server.settle(&ids, PATIENCE);
    let told: Vec<&str> = settled.iter().filter_map(|document| document["status"].as_str()).collect();
    assert_eq!(told, ["live", "live", "live", "refused"]);

    let page = server.text("/");
    let generation = server.generations("ledgers").remove(0);
    for shown in
        [&sentence(1)[..40], "3 documents in ledgers", &generation[..8], "Retention receipt", "refused"]
    {
        assert!(page.contains(shown), "{shown} is not in {page}");
    }
    let reason = settled[3]["reason"].as_str().expect("a reason");
    assert!(page.contains(reason), "{reason} is not in {page}");

    let metrics = server.text("/metrics");
    for line in [
        "engram:documents_live{domain=\"ledgers\"} 3",
        "engram:documents_waiting{domain=\"ledgers\"} 0",
        "engram:documents_refused{domain=\"general\"} 1",
        "engram:retention_loss{domain=\"ledgers\",probe=\"anchor\"}",
        "engram:train_tokens_total{lineage=\"ledgers\"}",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
}

#[test]
fn an_adapter_that_was_exported_is_loaded_answers_and_is_unloaded() {
    // What is remembered beside an adapter does not go along with it.
    let setup = Setup::tiny().set("train.passage_tokens_max=0");
    let server = setup.set("base.precision=f32").start();
    let texts: Vec<Value> = (0..3).map(|n| json!({"text": sentence(n), "domain": "ledgers"})).collect();
    server.settle(&server.submit(&texts), PATIENCE);
    let exported = server.get("/v1/adapters/ledgers/export").ok();
    let folder = server.data().join("imports/from-elsewhere");
    fs::create_dir_all(&folder).expect("made");
    fs::write(folder.join("adapter_config.json"), exported["adapter_config"].to_string()).expect("written");
    let weights = STANDARD.decode(exported["adapter_model"].as_str().expect("a text")).expect("base64");
    fs::write(folder.join("adapter_model.safetensors"), weights).expect("written");

    let load = json!({"lora_name": "copy", "lora_path": "from-elsewhere"});
    assert_eq!(server.post("/v1/load_lora_adapter", &load).status, 200);
    let learned = server.complete("ledgers", "The", 24);
    assert_eq!(server.complete("copy", "The", 24), learned);
    assert_ne!(server.complete("base", "The", 24), learned);
    let named = format!("copy@{}", server.generations("copy")[0]);
    assert_eq!(server.get(&format!("/v1/models/{named}")).ok()["parent"], "base");
    assert_eq!(server.complete(&named, "The", 24), learned);

    let unload = json!({"lora_name": "copy"});
    assert_eq!(server.post("/v1/unload_lora_adapter", &unload).status, 200);
    assert!(server.generations("copy").is_empty());
    assert_eq!(server.complete("copy", "The", 24), server.complete("base", "The", 24));
    assert_eq!(server.post("/v1/unload_lora_adapter", &unload).status, 404, "there is nothing left of it");
    let kept = server.post("/v1/unload_lora_adapter", &json!({"lora_name": "ledgers"}));
    assert_eq!(kept.status, 409, "it was learned here");
}

#[test]
fn tokens_are_those_that_the_model_reads() {
    let server = Setup::tiny().start();
    let told = server.post("/tokenize", &json!({"prompt": "Häuser", "return_token_strs": true})).ok();
    // The tiny base has a token a byte.
    assert_eq!(told["count"], "Häuser".len());
    assert_eq!(told["token_strs"].as_array().map(Vec::len), Some("Häuser".len()));
    let back = server.post("/detokenize", &json!({"tokens": told["tokens"]})).ok();
    assert_eq!(back["prompt"], "Häuser");
    let ask = json!({"prompt": "Häuser", "model": "base", "max_tokens": 1});
    assert_eq!(server.post("/v1/completions", &ask).ok()["usage"]["prompt_tokens"], told["count"]);
    let talk = json!({"messages": [{"role": "user", "content": "Hi"}]});
    assert_eq!(
        server.post("/tokenize", &talk).ok()["count"],
        3,
        "the template ends a message with a line break"
    );
}

#[test]
fn a_text_is_a_vector_that_differs_through_an_adapter() {
    let server = Setup::tiny().set("base.precision=f32").start();
    let texts: Vec<Value> = (0..3).map(|n| json!({"text": sentence(n), "domain": "ledgers"})).collect();
    server.settle(&server.submit(&texts), PATIENCE);
    let embed = |model: &str, input: Value| {
        let answer = server.post("/v1/embeddings", &json!({"model": model, "input": input})).ok();
        let vectors = answer["data"].as_array().expect("vectors").iter();
        let numbers = |vector: &Value| serde_json::from_value::<Vec<f64>>(vector["embedding"].clone());
        vectors.map(|vector| numbers(vector).expect("numbers")).collect::<Vec<_>>()
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let base = embed("base", json!([sentence(1), sentence(2), sentence(1)]));
    assert_eq!((base.len(), base[0].len()), (3, 64), "the tiny base is 64 wide");
    assert!((dot(&base[0], &base[0]) - 1.0).abs() < 1e-4, "its length is 1");
    assert_eq!(base[0], base[2]);
    assert!(dot(&base[0], &base[1]) < 0.9999, "another text is another vector");
    let learned = embed("ledgers", json!(sentence(1)));
    assert!(dot(&learned[0], &base[0]) < 0.9999, "an adapter reads it otherwise");
    for (model, input, param) in [("auto", "a", "model"), ("base", "", "input"), ("none", "a", "model")] {
        let refused = server.post("/v1/embeddings", &json!({"model": model, "input": input}));
        assert!((400..500).contains(&refused.status), "{refused:?}");
        assert_eq!(refused.body["error"]["param"], param, "{refused:?}");
    }
}
