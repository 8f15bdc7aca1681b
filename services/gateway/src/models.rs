//! `GET /v1/models`: the base, the router, and each lineage as a model of its own.

use crate::error::{ApiError, Result};
use crate::state::State;
use actix_web::{HttpResponse, web};
use serde_json::{Value, json};

pub(crate) async fn list(state: web::Data<State>) -> HttpResponse {
    HttpResponse::Ok().json(json!({"object": "list", "data": models(&state)}))
}

pub(crate) async fn show(state: web::Data<State>, id: web::Path<String>) -> Result<HttpResponse> {
    let model = models(&state).into_iter().find(|model| model["id"] == id.as_str());
    let model = model.ok_or_else(|| {
        let name: String = id.chars().take(80).collect();
        ApiError::model_not_found(format!("there is no model '{name}'; GET /v1/models lists them"))
    })?;
    Ok(HttpResponse::Ok().json(model))
}

fn models(state: &State) -> Vec<Value> {
    let (info, registry) = (&state.gateway.info, &state.gateway.registry);
    let model = |id: &str, created_s: u64, parent: Option<&str>, generation: Value| {
        json!({
            "id": id,
            "object": "model",
            "created": created_s,
            "owned_by": "engram",
            "root": info.base_name,
            "parent": parent,
            "generation": generation,
            "max_model_len": info.context_length,
        })
    };
    let mut models = vec![
        model("base", state.started_s, None, Value::Null),
        model("auto", state.started_s, Some("base"), Value::Null),
    ];
    for (domain, lineage) in registry.try_manifest().iter().flat_map(|manifest| &manifest.lineages) {
        let current = lineage.current.as_ref().and_then(|id| registry.generation(id));
        let created_s = current.as_ref().map_or(state.started_s, |generation| generation.published_ms / 1000);
        models.push(model(domain.as_str(), created_s, Some("base"), json!(lineage.current)));
    }
    models
}
