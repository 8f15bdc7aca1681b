use crate::harness::{Server, generation_id};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

fn ask(learn: Value, stream: bool) -> Value {
    json!({"messages": [{"role": "user", "content": "hi"}], "learn": learn, "stream": stream})
}

fn documents(server: &Server) -> Vec<Value> {
    server.get("/v1/documents").json()["documents"].as_array().expect("documents").clone()
}

#[test]
fn nothing_is_learned_from_a_chat_unless_it_says_so() {
    let server = Server::start(&[]);
    for learn in [Value::Null, json!(false)] {
        let answer = server.post(CHAT, &ask(learn, false)).json();
        assert_eq!(answer["engram"].get("document"), None, "{answer}");
    }
    assert!(documents(&server).is_empty());

    let answer = server.post(CHAT, &ask(json!(true), false)).json();
    let document = &answer["engram"]["document"];
    assert_eq!(
        (&document["status"], &document["domain"]),
        (&json!("accepted"), &json!("medical")),
        "{answer}"
    );
    assert_eq!(answer["engram"]["adapters"][0]["generation"], json!(generation_id("00000000000000bb")));
    let path = format!("/v1/documents/{}?content=true", document["id"].as_str().expect("an id"));
    let told = server.get(&path).json();
    let said = json!({"messages": [{"role": "user", "content": "hi"},
        {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}]});
    assert_eq!((&told["content"], &told["source"]), (&said, &json!("chat")));
}

#[test]
fn a_streamed_chat_is_learned_when_it_has_ended_and_goes_where_it_is_sent() {
    let server = Server::start(&[]);
    let answer = server.post(CHAT, &ask(json!("home"), true));
    let events: Vec<Value> = answer
        .body
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .filter(|data| *data != "[DONE]")
        .map(|data| serde_json::from_str(data).expect("JSON"))
        .collect();
    let text: String =
        events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    let document = &events.last().expect("events")["engram"]["document"];
    assert_eq!(document["domain"], "home", "{answer:?}");
    let path = format!("/v1/documents/{}?content=true", document["id"].as_str().expect("an id"));
    assert_eq!(server.get(&path).json()["content"]["messages"][1]["content"], text);
    assert_eq!(documents(&server).len(), 1);
}

#[test]
fn what_cannot_be_learned_does_not_spoil_the_answer() {
    let server = Server::start(&["gateway.document_bytes_max=64"]);
    let mut long = ask(json!(true), false);
    long["messages"][0]["content"] = "long ".repeat(30).into();
    let answer = server.post(CHAT, &long);
    assert_eq!(answer.status, 200, "{answer:?}");
    let document = &answer.json()["engram"]["document"];
    assert_eq!(document["status"], "refused");
    assert!(document["reason"].as_str().is_some_and(|reason| reason.contains("64")), "{document}");
    for (learn, n) in [(json!("No"), 1), (json!(7), 1), (json!(true), 2)] {
        let mut body = ask(learn, false);
        body["n"] = n.into();
        let answer = server.post(CHAT, &body);
        assert_eq!((answer.status, answer.param()), (400, json!("learn")), "{answer:?}");
    }
    let text = server.post("/v1/completions", &json!({"prompt": "hi", "learn": true}));
    assert_eq!((text.status, text.param()), (400, json!("learn")), "only a chat is an exchange");
    assert!(documents(&server).is_empty());
}

#[test]
fn feedback_teaches_what_was_good_and_puts_right_what_was_not() {
    let server = Server::start(&[]);
    let talk = |answer: &str| json!([{"role": "user", "content": "Where is the key?"}, {"role": "assistant", "content": answer}]);
    let say = |body: Value| {
        let answer = server.post("/v1/feedback", &body);
        assert_eq!(answer.status, 202, "{answer:?}");
        answer.json()
    };
    let good = say(json!({"rating": "good", "messages": talk("In the well."), "domain": "home"}));
    assert_eq!(
        (&good["status"], &good["domain"], &good["forgotten"]),
        (&json!("accepted"), &json!("home"), &Value::Null)
    );
    let bad = json!({"rating": "bad", "messages": talk("In the well."), "correction": "Under the pot.", "domain": "home"});
    let put_right = say(bad.clone());
    assert_eq!(put_right["forgotten"], good["id"], "what taught the bad answer is forgotten");
    let path = format!("/v1/documents/{}?content=true", put_right["id"].as_str().expect("an id"));
    assert_eq!(server.get(&path).json()["content"]["messages"], talk("Under the pot."));
    let mut elsewhere = bad;
    elsewhere["domain"] = "other".into();
    assert_eq!(say(elsewhere)["forgotten"], Value::Null, "another domain never learned it");
    // Taught in other words, and as another kind of document.
    let pair = json!({"prompt": "The key is where?", "completion": " In the well.", "domain": "home"});
    let taught = server.post("/v1/documents", &pair).json()["id"].clone();
    let text = server.post("/v1/documents", &json!({"text": "The key is in the well."})).json()["id"].clone();
    for (document, forgotten) in [(&text, &Value::Null), (&taught, &taught)] {
        let bad = json!({"rating": "bad", "messages": talk("In the well."), "correction": "In the shed.", "document": document});
        assert_eq!(say(bad)["forgotten"], *forgotten, "only a document that gives this very answer");
    }
    let silent = say(json!({"rating": "bad", "messages": talk(""), "correction": "Under the mat."}));
    assert_eq!(silent["forgotten"], Value::Null, "an empty answer was never learned");
    let answer = server.post("/v1/feedback", &json!({"rating": "bad", "prompt": "q", "completion": "a"}));
    assert_eq!((answer.status, answer.param()), (400, json!("correction")));
    assert_eq!(server.get("/v1/feedback").status, 405);
}
