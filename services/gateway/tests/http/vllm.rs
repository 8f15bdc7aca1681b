//! What vLLM adds to OpenAI's API.

use crate::harness::{CURRENT, PARENT, Server, generation_id};
use serde_json::json;
use std::fs;

#[test]
fn texts_and_conversations_become_tokens_and_tokens_text() {
    let server = Server::start(&[]);
    let tokens = server.post("/tokenize", &json!({"prompt": "Hi", "model": "medical"})).json();
    let expected = json!({"count": 3, "max_model_len": 512, "tokens": [256, 72, 105], "token_strs": null});
    assert_eq!(tokens, expected);
    let bare = json!({"prompt": "Hi", "add_special_tokens": false, "return_token_strs": true});
    let bare = server.post("/tokenize", &bare).json();
    assert_eq!((&bare["count"], &bare["token_strs"]), (&json!(2), &json!(["72", "105"])));
    let talk = json!({"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": false});
    assert_eq!(server.post("/tokenize", &talk).json()["tokens"], json!([72, 105, 10]));
    let text = server.post("/detokenize", &json!({"tokens": [256, 72, 105]})).json();
    assert_eq!(text, json!({"prompt": "Hi"}));
    let unknown = server.post("/detokenize", &json!({"tokens": [72, 257]}));
    assert_eq!((unknown.status, unknown.param()), (400, json!("tokens[1]")));
}

#[test]
fn an_adapter_is_loaded_from_the_imports_of_the_data_folder() {
    let server = Server::start(&[]);
    let folder = server.folder.path().join("imports/poetry-v1");
    fs::create_dir_all(&folder).expect("made");
    fs::write(folder.join("adapter_config.json"), r#"{"r": 8}"#).expect("written");
    fs::write(folder.join("adapter_model.safetensors"), [0, 159, 255]).expect("written");
    let load = |body| server.post("/v1/load_lora_adapter", &body);

    let loaded = load(json!({"lora_name": "poetry", "lora_path": "poetry-v1"}));
    assert_eq!(loaded.status, 200, "{loaded:?}");
    assert!(loaded.body.contains("'poetry' added"), "{loaded:?}");
    let import = server.seen.imported.lock().expect("not poisoned").take().expect("an import");
    assert_eq!((import.lineage.as_str(), import.expected), ("poetry", None));
    assert_eq!(import.files.weights, [0, 159, 255]);

    // What is there is not replaced by mistake.
    let taken = load(json!({"lora_name": "medical", "lora_path": "poetry-v1"}));
    assert_eq!((taken.status, taken.param()), (400, json!("lora_name")));
    assert_eq!(server.seen.imported.lock().expect("not poisoned").take(), None);
    let replaced = load(json!({"lora_name": "medical", "lora_path": "poetry-v1", "load_inplace": true}));
    assert_eq!(replaced.status, 200, "{replaced:?}");
    let import = server.seen.imported.lock().expect("not poisoned").take().expect("an import");
    assert_eq!(import.expected, Some(generation_id(CURRENT)));

    for (body, status, param) in [
        (json!({"lora_path": "poetry-v1"}), 400, "lora_name"),
        (json!({"lora_name": "Not a name", "lora_path": "poetry-v1"}), 400, "lora_name"),
        (json!({"lora_name": "a", "lora_path": "../poetry-v1"}), 400, "lora_path"),
        (json!({"lora_name": "a"}), 400, "lora_path"),
        (json!({"lora_name": "a", "lora_path": "none"}), 404, "lora_path"),
        (json!({"lora_name": "a", "lora_path": "poetry-v1", "lora_int_id": 1}), 400, "lora_int_id"),
    ] {
        let refused = load(body.clone());
        assert_eq!((refused.status, refused.param()), (status, json!(param)), "{body}");
    }
}

#[test]
fn what_was_learned_here_is_not_unloaded() {
    let server = Server::start(&[]);
    let unload = |name: &str| server.post("/v1/unload_lora_adapter", &json!({"lora_name": name}));
    let learned = unload("medical");
    assert_eq!((learned.status, learned.param()), (409, json!("lora_name")));
    assert_eq!(unload("none").status, 404);
    let log = server.get("/v1/adapters/medical/log").json();
    assert_eq!(log["generations"][1]["generation"], PARENT, "{log}");
}
