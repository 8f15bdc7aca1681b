use crate::harness::{CURRENT, PARENT, Server};
use proto::MergeMethod;
use serde_json::{Value, json};

#[test]
fn models_are_the_base_the_router_and_the_lineages_with_their_generations() {
    let server = Server::start(&[]);
    let models = server.get("/v1/models").json();
    let ids: Vec<&Value> =
        models["data"].as_array().expect("a list").iter().map(|model| &model["id"]).collect();
    let named = [CURRENT, PARENT].map(|generation| format!("medical@{generation}"));
    assert_eq!(ids, ["base", "auto", "medical", &named[0], &named[1]]);
    let medical = server.get("/v1/models/medical").json();
    assert_eq!((&medical["root"], &medical["parent"]), (&json!("tiny"), &json!("base")));
    assert_eq!((&medical["generation"], &medical["created"]), (&json!(CURRENT), &json!(1_700_000_000)));
    for (model, parent) in [(&named[0], &*named[1]), (&named[1], "base")] {
        assert_eq!(server.get(&format!("/v1/models/{model}")).json()["parent"], parent, "{model}");
    }
    let unknown = server.get("/v1/models/poetry");
    assert_eq!((unknown.status, &unknown.json()["error"]["code"]), (404, &json!("model_not_found")));
}

#[test]
fn a_lineage_shows_its_generations_newest_first() {
    let server = Server::start(&[]);
    let list = server.get("/v1/adapters").json();
    assert_eq!(list["adapters"][0]["domain"], "medical");
    assert_eq!(
        (&list["adapters"][0]["generation"], &list["adapters"][0]["documents"]),
        (&json!(CURRENT), &json!(2))
    );
    let log = server.get("/v1/adapters/medical/log").json();
    let entry = |n: usize| (&log["generations"][n]["generation"], &log["generations"][n]["live"]);
    assert_eq!([entry(0), entry(1)], [(&json!(CURRENT), &json!(true)), (&json!(PARENT), &json!(false))]);
    assert_eq!(server.get("/v1/adapters/none/log").status, 404);
}

#[test]
fn rolling_back_checks_what_is_expected() {
    let server = Server::start(&[]);
    let rollback = |body: &Value| server.post("/v1/adapters/medical/rollback", body);
    assert_eq!(rollback(&json!({})).json(), json!({"from": CURRENT, "to": PARENT}));
    assert_eq!(rollback(&json!({"expected_generation": CURRENT, "to": PARENT})).status, 200);
    let conflict = rollback(&json!({"expected_generation": PARENT}));
    assert_eq!(conflict.status, 409);
    conflict.assert_error_form();
    for nothing in [&b""[..], b"null"] {
        let answer = server.send("POST", "/v1/adapters/medical/rollback", &[], nothing);
        assert_eq!(answer.status, 200, "no body says as much");
    }
}

#[test]
fn what_was_exported_can_be_imported() {
    let server = Server::start(&[]);
    let exported = server.get("/v1/adapters/medical/export").json();
    assert_eq!(exported, json!({"adapter_config": {"r": 16}, "adapter_model": "AJ//"}));
    let imported = server.post("/v1/adapters/medical/import", &exported);
    assert_eq!(imported.json(), json!({"domain": "medical", "generation": CURRENT}));
    let files = server.seen.imported.lock().expect("not poisoned").take().expect("an import").files;
    assert_eq!((files.config.as_str(), files.weights.as_slice()), (r#"{"r":16}"#, &[0, 159, 255][..]));
    assert_eq!(server.get(&format!("/v1/adapters/medical/export?generation={PARENT}")).status, 404);
    assert_eq!(server.get("/v1/adapters/medical/export?generation=x").param(), json!("generation"));
    assert_eq!(server.get("/v1/adapters/medical/export?version=1").param(), json!("version"));
}

#[test]
fn a_merge_is_asked_for_as_a_sum() {
    let server = Server::start(&[]);
    let body = json!({"from": "a:0.7+b:0.3", "method": "ties", "rank": 8, "density": 0.25, "seed": 9});
    let merged = server.post("/v1/adapters/both/merge", &body);
    assert_eq!(merged.json(), json!({"domain": "both", "generation": CURRENT}));
    let asked = server.seen.merged.lock().expect("not poisoned").take().expect("a merge");
    let from: Vec<_> = asked.from.iter().map(|w| (w.domain.as_str(), w.weight)).collect();
    assert_eq!(from, [("a", 0.7), ("b", 0.3)]);
    assert_eq!((asked.lineage.as_str(), asked.method), ("both", MergeMethod::Ties));
    assert_eq!((asked.rank, asked.density, asked.seed), (Some(8), Some(0.25), 9));
}

#[test]
fn an_import_may_be_larger_than_other_bodies() {
    let server = Server::start(&["gateway.import_bytes_max=4194304"]);
    let import = |bytes: usize| {
        let body = json!({"adapter_config": {}, "adapter_model": "A".repeat(bytes)});
        server.post("/v1/adapters/medical/import", &body).status
    };
    assert_eq!([import(3 << 20), import(5 << 20)], [200, 413]);
}
