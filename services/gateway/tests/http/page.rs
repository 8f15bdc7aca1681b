use crate::harness::{CURRENT, KEY, PARENT, Server};
use serde_json::{Value, json};
use std::thread;
use std::time::Duration;

const HOSTILE: &str = "</td><script>alert(1)</script><img src=x onerror=\"alert(2)\"> & so on";

/// The regions in a stream of events, each with its last text.
fn regions(body: &str) -> Vec<(String, String)> {
    let mut regions: Vec<(String, String)> = Vec::new();
    for event in body.split("\n\n").filter(|event| event.starts_with("event: ")) {
        let (name, data) = event["event: ".len()..].split_once("\ndata: ").expect("a name, then data");
        let html: Value = serde_json::from_str(data).expect("a JSON string");
        let html = html.as_str().expect("a string").to_owned();
        regions.retain(|(known, _)| known != name);
        regions.push((name.to_owned(), html));
    }
    regions
}

#[test]
fn the_page_shows_documents_and_generations_and_runs_only_its_own_script() {
    let server = Server::start(&[]);
    let sent = server.post("/v1/documents", &json!({"text": HOSTILE, "source": "<b>"}));
    assert_eq!(sent.status, 202);
    let page = server.get("/");
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    let policy = page.header("content-security-policy").expect("a policy");
    for rule in ["default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"] {
        assert!(policy.contains(rule) && !policy.contains("unsafe"), "{policy}");
    }
    for shown in ["medical", &CURRENT[..8], &PARENT[..8], "tiny", "&lt;script&gt;alert(1)", "from &lt;b&gt;"]
    {
        assert!(page.body.contains(shown), "{shown} is not in {}", page.body);
    }
    // A policy that forbids them makes inline styles and handlers dead weight, and hostile ones harmless.
    for never in ["<script>", "<img src=x", " style=", " onclick=", "http://", "https://"] {
        let body = page.body.replace("http://www.w3.org/2000/svg", "");
        assert!(!body.contains(never), "{never} is in {body}");
    }
}

#[test]
fn what_the_page_is_made_of_comes_from_the_program() {
    let server = Server::start(&[]);
    for (path, kind) in [
        ("/assets/page.js", "text/javascript; charset=utf-8"),
        ("/assets/page.css", "text/css; charset=utf-8"),
        ("/assets/icon.svg", "image/svg+xml"),
    ] {
        let asset = server.get(path);
        assert_eq!((asset.status, asset.header("content-type")), (200, Some(kind)), "{path}");
        assert!(server.get("/").body.contains(path), "{path} is used");
    }
    server.get("/assets/other.js").assert_error_form();
}

#[test]
fn events_bring_every_region_and_then_what_changed_until_the_server_stops() {
    let server = Server::start(&[]);
    let shown = thread::scope(|scope| {
        let open = scope.spawn(|| server.get("/events"));
        thread::sleep(Duration::from_millis(700));
        assert_eq!(server.post("/v1/documents", &json!({"text": HOSTILE})).status, 202);
        thread::sleep(Duration::from_millis(1_500));
        server.stop.set();
        open.join().expect("an answer")
    });
    assert_eq!(shown.header("content-type"), Some("text/event-stream; charset=utf-8"));
    let regions = regions(&shown.body);
    assert!(shown.body.matches("event: documents\n").count() == 2, "{}", shown.body);
    let mut names: Vec<&str> = regions.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    let all = ["adapters", "documents", "domains", "learning", "model", "retention", "stages", "state"];
    assert_eq!(names, all);
    let (_, documents) = regions.iter().find(|(name, _)| name == "documents").expect("documents");
    assert!(documents.contains("&lt;script&gt;alert(1)"), "{documents}");
}

#[test]
fn documents_are_found_by_what_they_say() {
    let server = Server::start(&[]);
    for text in [HOSTILE, "The ladder is behind the shed."] {
        assert_eq!(server.post("/v1/documents", &json!({"text": text})).status, 202);
    }
    let found = server.get("/found?says=BEHIND%20%20the%20shed");
    assert_eq!((found.status, found.header("content-type")), (200, Some("text/html; charset=utf-8")));
    assert!(found.body.contains("The ladder") && !found.body.contains("alert"), "{}", found.body);
    let hostile = server.get("/found?says=%3Cscript%3E").body;
    assert!(hostile.contains("&lt;script&gt;alert(1)") && !hostile.contains("The ladder"), "{hostile}");
    assert!(server.get("/found?says=under%20the%20shed").body.contains("No document says this."));
    let id = found.body.split("document-").nth(1).and_then(|rest| rest.split('"').next()).expect("an id");
    let by_id = server.get(&format!("/found?says={id}")).body;
    assert!(by_id.contains("The ladder") && !by_id.contains("alert"), "{by_id}");
    assert_eq!((server.get("/found?says=").status, server.get("/found?says=a&limit=1").status), (400, 400));
}

#[test]
fn with_keys_the_page_tells_nothing_before_one_is_shown() {
    let server = Server::start(&[&format!("gateway.api_keys={KEY}")]);
    let page = server.get("/");
    assert_eq!(page.status, 200);
    assert!(page.body.contains("data-keys") && page.body.contains("asks for a key"), "{page:?}");
    for hidden in ["medical", &CURRENT[..8], "tiny"] {
        assert!(!page.body.contains(hidden), "{hidden} is in {}", page.body);
    }
    assert_eq!(server.get("/found?says=a").status, 401);
    assert_eq!((server.get("/events").status, server.get("/assets/page.js").status), (401, 200));
}

#[test]
fn other_peoples_pages_cannot_embed_or_load_it() {
    let server = Server::start(&[]);
    for (path, mode, dest) in
        [("/", "navigate", "iframe"), ("/events", "cors", "empty"), ("/assets/page.js", "no-cors", "script")]
    {
        let headers = [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", mode), ("sec-fetch-dest", dest)];
        assert_eq!(server.send("GET", path, &headers, b"").status, 403, "{path}");
    }
    let link =
        [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")];
    assert_eq!(server.send("GET", "/", &link, b"").status, 200, "a link leads here");
}
