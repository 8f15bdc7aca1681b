use crate::harness::{Answer, Server};
use serde_json::{Value, json};
use std::io::Write;

const BOUNDARY: &str = "xYzZY";

/// A part of a form: the name of the field, that of the file where it is one, and the content.
type Part<'a> = (&'a str, Option<&'a str>, &'a [u8]);

fn form(parts: &[Part<'_>]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, file, content) in parts {
        let file = file.map(|file| format!("; filename=\"{file}\"")).unwrap_or_default();
        let head = format!("--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"{name}\"{file}\r\n\r\n");
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(content);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("--{BOUNDARY}--\r\n").as_bytes());
    body
}

fn upload(server: &Server, parts: &[Part<'_>]) -> Answer {
    let kind = format!("multipart/form-data; boundary={BOUNDARY}");
    server.send("POST", "/v1/documents", &[("content-type", &kind)], &form(parts))
}

fn count(server: &Server) -> usize {
    server.get("/v1/documents?limit=1000").json()["documents"].as_array().map_or(0, Vec::len)
}

#[test]
fn files_become_documents_with_their_places() {
    let server = Server::start(&[]);
    let answer = upload(
        &server,
        &[
            ("file", Some("notes/a.md"), b"first"),
            ("domain", None, b"notes"),
            ("more", Some("b.md"), b"second\nthird"),
            ("importance", None, b"0.5"),
        ],
    );
    assert_eq!(answer.status, 202, "{answer:?}");
    let documents = answer.json()["documents"].as_array().expect("documents").clone();
    let of = |field: &str| documents.iter().map(|document| document[field].clone()).collect::<Vec<_>>();
    assert_eq!(of("place"), ["notes/a.md:1", "b.md:1", "b.md:2"]);
    assert_eq!(of("status"), ["accepted"; 3]);
    assert_eq!(of("domain"), ["notes"; 3]);
    let path = format!("/v1/documents/{}?content=true", documents[2]["id"].as_str().expect("an id"));
    assert_eq!(server.get(&path).json()["content"], json!({"text": "third"}));
    assert!(server.uploads().is_empty(), "nothing is left of an upload");
}

#[test]
fn an_upload_is_taken_whole_or_not_at_all_and_says_why() {
    let server = Server::start(&["gateway.upload_bytes_max=4096", "gateway.intake_documents_max=3"]);
    let large = vec![b'x'; 5000];
    let long = vec![b'd'; 2000];
    let cases: &[(&[Part<'_>], u16, &str)] = &[
        (&[], 400, "file"),
        (&[("domain", None, b"d")], 400, "file"),
        (&[("file", Some("a"), b"good"), ("file", Some("b.pdf"), b"unusable")], 400, "b.pdf"),
        (&[("file", Some("empty"), b"")], 400, "empty"),
        (&[("file", Some("a"), b"good"), ("domain", None, b"No Domain")], 400, "domain"),
        (&[("file", Some("a"), b"good"), ("importance", None, b"much")], 400, "importance"),
        (&[("file", Some("a"), b"good"), ("importence", None, b"1")], 400, "importence"),
        (&[("file", Some("a"), b"good"), ("domain", None, &long)], 400, "domain"),
        (&[("file", Some("a"), b"1\n2\n3\n4")], 413, "several uploads"),
        (&[("file", Some("a"), &large)], 413, "4096"),
    ];
    for (parts, status, told) in cases {
        let answer = upload(&server, parts);
        assert_eq!(answer.status, *status, "{answer:?}");
        answer.assert_error_form();
        assert!(answer.body.contains(told), "{told}: {answer:?}");
        assert_eq!((count(&server), server.uploads().len()), (0, 0), "{told}");
    }
    for (kind, body) in [
        ("multipart/form-data", &b"x"[..]),
        ("multipart/form-data; boundary=x", b"no form at all"),
        ("multipart/form-data; boundary=xYzZY", b"--xYzZY\r\ncontent-disposition: form-data; name=\"file\""),
    ] {
        let answer = server.send("POST", "/v1/documents", &[("content-type", kind)], body);
        assert_eq!(answer.status, 400, "{kind}: {answer:?}");
        answer.assert_error_form();
    }
    server.assert_unharmed("bad uploads");
}

#[test]
fn a_body_that_is_larger_than_it_said_is_cut_off() {
    let server = Server::start(&["gateway.upload_bytes_max=4096"]);
    let mut stream = server.connect();
    let head = format!(
        "POST /v1/documents HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\
         content-type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n"
    );
    let part = format!("--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"f\"; filename=\"f\"\r\n\r\n");
    let chunk = |bytes: &[u8]| [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat();
    stream.write_all(&[head.as_bytes(), &chunk(part.as_bytes())].concat()).expect("written");
    for _ in 0..8 {
        // It may hang up in the middle.
        let _ = stream.write_all(&chunk(&[b'x'; 1024]));
    }
    let _ = stream.write_all(b"0\r\n\r\n");
    let answer = Answer::read(&mut stream);
    assert_eq!(answer.status, 413, "{answer:?}");
    assert!(server.uploads().is_empty());
}

#[test]
fn the_same_upload_again_is_the_same_documents() {
    let server = Server::start(&[]);
    let ids = |answer: Answer| -> Vec<Value> {
        answer.json()["documents"].as_array().expect("documents").iter().map(|d| d["id"].clone()).collect()
    };
    let parts: &[Part<'_>] = &[("file", Some("a"), b"one\ntwo")];
    assert_eq!(ids(upload(&server, parts)), ids(upload(&server, parts)));
    assert_eq!(count(&server), 2);
}
