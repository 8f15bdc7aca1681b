use crate::harness::{KEY, Seen, Server, eventually, gateway};
use kit::lane::Stop;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

/// Why a gateway does not start with this setting.
fn refusal(flag: &str) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let (gateway, _) = gateway(&[flag], &folder, &Arc::new(Seen::default()));
    match gateway.bind(Stop::new()) {
        Ok(_) => panic!("{flag} must be refused"),
        Err(error) => format!("{error:#}"),
    }
}

#[test]
fn an_address_that_cannot_be_had_is_explained() {
    let server = Server::start(&[]);
    let taken = refusal(&format!("gateway.listen={}", server.address));
    assert!(taken.contains("in use") && taken.contains("--listen"), "{taken}");
    let open = refusal("gateway.listen=0.0.0.0:0");
    assert!(open.contains("gateway.api_keys"), "{open}");
    assert!(refusal("gateway.listen=192.0.2.1:0").contains("key"), "keys come first");
    assert!(refusal("gateway.listen=here").contains("not an address"));
}

#[test]
fn with_a_key_it_may_listen_beyond_loopback() {
    let key = format!("gateway.api_keys={KEY}");
    let server = Server::start(&["gateway.listen=0.0.0.0:0", &key]);
    assert_eq!(server.get("/livez").status, 200);
    assert_eq!(server.get("/v1/models").status, 401);
}

#[test]
fn probes_tell_alive_from_ready() {
    let server = Server::start(&[]);
    assert_eq!([server.get("/livez").status, server.get("/readyz").status], [200, 200]);
    server.ready.store(false, Ordering::Relaxed);
    let (live, ready) = (server.get("/livez"), server.get("/readyz"));
    assert_eq!([live.status, ready.status], [200, 503]);
    assert_eq!(
        [live, ready].map(|a| a.header("content-type") == Some("text/plain; charset=utf-8")),
        [true; 2]
    );
    assert_eq!(server.get("/health").json(), json!({"status": "not ready"}));
}

#[test]
fn the_status_says_what_runs_where() {
    let server = Server::start(&[]);
    assert_eq!(server.post("/v1/documents", &json!({"text": "a"})).status, 202);
    let status = server.get("/v1/status").json();
    assert_eq!((&status["base"]["name"], &status["base"]["device"]), (&json!("tiny"), &json!("cpu")));
    assert_eq!((&status["documents"]["accepted"], &status["documents"]["backlog"]), (&json!(1), &json!(1)));
    assert_eq!((&status["ready"], &status["manifest_live"]), (&json!(true), &json!(2)));
    assert_eq!(status["domains"]["general"]["documents"], 1);
    assert_eq!(status["adapters"][0]["domain"], "medical");
}

#[test]
fn metrics_have_the_names_that_dashboards_know() {
    let server = Server::start(&[]);
    server.assert_unharmed("nothing");
    let page = server.get("/metrics").body;
    for name in [
        "engram:num_requests_running",
        "engram:e2e_request_latency_seconds_bucket",
        "engram:time_to_first_token_seconds_bucket",
        "engram:generation_tokens_total",
        "engram:request_success_total{finished_reason=\"stop\"}",
        "engram:http_requests_total{route=\"/v1/completions\",status=\"200\"}",
    ] {
        assert!(page.contains(name), "{name} is not in:\n{page}");
    }
}

#[test]
fn told_to_stop_it_finishes_what_runs_and_ends() {
    let mut server = Server::start(&["gateway.generation_seconds_max=1"]);
    let start = Instant::now();
    thread::scope(|scope| {
        let running =
            scope.spawn(|| server.post("/v1/completions", &json!({"prompt": "hang", "stream": true})));
        eventually("it runs", || server.seen.asked.lock().expect("not poisoned").is_some());
        server.stop.set();
        server.stop.set();
        let answer = running.join().expect("an answer");
        assert!(answer.body.ends_with("data: [DONE]\n\n"), "{answer:?}");
    });
    let ended = server.thread.take().expect("a thread").join().expect("no panic");
    ended.expect("ended well");
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}
