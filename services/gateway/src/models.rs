//! `GET /v1/models`: the base, the router, and each lineage and generation as a model.

use crate::error::{ApiError, Result};
use crate::spec;
use crate::state::State;
use actix_web::{HttpResponse, web};
use proto::GenerationId;
use serde_json::{Value, json};

/// Lists the base, the router, each domain and each generation.
#[utoipa::path(
    get, path = "/v1/models", tag = "ask",
    responses((status = 200, description = "All that `model` may be, but for sums.", body = spec::Models))
)]
pub(crate) async fn list(state: web::Data<State>) -> HttpResponse {
    HttpResponse::Ok().json(json!({"object": "list", "data": models(&state)}))
}

/// Tells of one model.
#[utoipa::path(
    get, path = "/v1/models/{id}", tag = "ask",
    params(("id" = String, Path, description = "Its name.")),
    responses((status = 200, description = "The model.", body = spec::Model))
)]
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
    let kept = state.gateway.settings.checkpoint.generations_kept;
    let model = |id: &str, created_s: u64, parent: Option<&str>, generation: Option<&GenerationId>| {
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
    let mut models =
        vec![model("base", state.started_s, None, None), model("auto", state.started_s, Some("base"), None)];
    for (domain, lineage) in registry.try_manifest().iter().flat_map(|manifest| &manifest.lineages) {
        let chain = registry.chain(domain);
        let created_s = chain.first().map_or(state.started_s, |current| current.published_ms / 1000);
        models.push(model(domain.as_str(), created_s, Some("base"), lineage.current.as_ref()));
        // Each generation whose weights are still there is a model too.
        for generation in chain.iter().take(kept) {
            let named = |id: &GenerationId| format!("{domain}@{id}");
            let parent = generation.parent.as_ref().map_or_else(|| "base".to_owned(), named);
            let created_s = generation.published_ms / 1000;
            models.push(model(&named(&generation.id), created_s, Some(&parent), Some(&generation.id)));
        }
    }
    models
}
