use crate::harness::{KEY, Server};
use serde_json::json;

/// Every route, with a body that it takes.
const ROUTES: [(&str, &str, &str); 25] = [
    ("GET", "/v1/documents", ""),
    ("POST", "/v1/documents", r#"{"text":"a"}"#),
    ("GET", "/v1/documents/some-id", ""),
    ("DELETE", "/v1/documents/some-id", ""),
    ("POST", "/v1/chat/completions", r#"{"messages":[{"role":"user","content":"a"}]}"#),
    ("POST", "/v1/completions", r#"{"prompt":"a"}"#),
    ("GET", "/v1/models", ""),
    ("GET", "/v1/models/base", ""),
    ("GET", "/v1/adapters", ""),
    ("GET", "/v1/adapters/medical/log", ""),
    ("POST", "/v1/adapters/medical/rollback", "{}"),
    ("GET", "/v1/adapters/medical/export", ""),
    ("POST", "/v1/adapters/medical/import", r#"{"adapter_config":{},"adapter_model":""}"#),
    ("POST", "/v1/adapters/medical/merge", r#"{"from":"a+b"}"#),
    ("POST", "/v1/load_lora_adapter", r#"{"lora_name":"a","lora_path":"a"}"#),
    ("POST", "/v1/unload_lora_adapter", r#"{"lora_name":"a"}"#),
    ("POST", "/v1/embeddings", r#"{"input":"a"}"#),
    ("POST", "/tokenize", r#"{"prompt":"a"}"#),
    ("POST", "/detokenize", r#"{"tokens":[97]}"#),
    ("GET", "/v1/status", ""),
    ("GET", "/metrics", ""),
    ("GET", "/nowhere", ""),
    ("GET", "/livez/", ""),
    ("GET", "/%6civez", ""),
    ("PUT", "/v1/models", ""),
];
const OPEN: [&str; 3] = ["/livez", "/readyz", "/health"];

#[test]
fn with_keys_every_route_but_the_probes_needs_one() {
    let server = Server::start(&[&format!("gateway.api_keys={KEY}")]);
    let good = format!("Bearer {KEY}");
    for (method, path, body) in ROUTES {
        for host in ["localhost", "engram.example"] {
            let with = |key: &[(&str, &str)]| {
                let headers = [key, &[("host", host)]].concat();
                server.send(method, path, &headers, body.as_bytes())
            };
            for bad in
                [&[][..], &[("authorization", "Bearer a-key-of-sixteen-and-less")], &[("authorization", KEY)]]
            {
                let refused = with(bad);
                assert_eq!(refused.status, 401, "{method} {path} {bad:?}");
                assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
                refused.assert_error_form();
            }
            assert_ne!(with(&[("authorization", &good)]).status, 401, "{method} {path}");
        }
    }
    for path in OPEN {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
}

#[test]
fn without_keys_only_this_machine_is_answered() {
    let server = Server::start(&[]);
    for (method, path, body) in ROUTES {
        let refused = server.send(method, path, &[("host", "evil.example")], body.as_bytes());
        assert_eq!(refused.status, 403, "{method} {path}");
        refused.assert_error_form();
        let origin = server.send(method, path, &[("origin", "https://evil.example")], body.as_bytes());
        assert_eq!(origin.status, 403, "{method} {path}");
        assert_ne!(server.send(method, path, &[], body.as_bytes()).status, 403, "{method} {path}");
    }
    for path in OPEN {
        assert_eq!(server.send("GET", path, &[("host", "10.0.0.7:8420")], b"").status, 200, "{path}");
    }
}

#[test]
fn a_key_that_asks_too_often_is_told_when_to_come_back() {
    let keys = format!("gateway.api_keys={KEY},another-key-of-sixteen");
    let server = Server::start(&[&keys, "gateway.requests_per_s=1", "gateway.burst=3"]);
    let ask =
        |key: &str| server.send("GET", "/v1/models", &[("authorization", &format!("Bearer {key}"))], b"");
    // On a slow machine some of the burst comes back meanwhile.
    let answers: Vec<_> = (0..20).map(|_| ask(KEY)).collect();
    assert!(answers[..3].iter().all(|answer| answer.status == 200), "{answers:?}");
    let refused = answers.iter().find(|answer| answer.status == 429).expect("too often");
    assert_eq!(refused.header("retry-after"), Some("1"));
    refused.assert_error_form();
    assert_eq!(ask("another-key-of-sixteen").status, 200);
}

#[test]
fn what_is_nowhere_is_404_and_the_wrong_method_405() {
    let server = Server::start(&[]);
    for path in ["/page", "/v1", "/v1/documents/", "/v1/adapters/medical", "//v1/models", "/v1/models/a/b"] {
        let nowhere = server.get(path);
        assert_eq!(nowhere.status, 404, "{path}");
        nowhere.assert_error_form();
    }
    for (method, path, allow) in [
        ("PUT", "/v1/documents", "GET, POST"),
        ("POST", "/v1/documents/x", "GET, DELETE"),
        ("GET", "/v1/completions", "POST"),
        ("BREW", "/v1/status", "GET"),
    ] {
        let refused = server.send(method, path, &[], b"");
        assert_eq!((refused.status, refused.header("allow")), (405, Some(allow)), "{method} {path}");
        refused.assert_error_form();
    }
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "a"})).status, 200);
}
