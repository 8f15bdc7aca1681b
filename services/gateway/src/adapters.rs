//! `/v1/adapters`: what was learned, as versions that can be inspected, undone and exchanged.

use crate::body::Body;
use crate::doors;
use crate::error::{ApiError, Result};
use crate::fields::Fields;
use crate::query::Query;
use crate::selector;
use crate::spec;
use crate::state::State;
use actix_web::{HttpRequest, HttpResponse, web};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use proto::{Adapters, Domain, Export, Generation, GenerationId, Import, Merge, PeftFiles, Rollback};
use serde_json::{Value, json};

/// Lists the adapters.
#[utoipa::path(
    get, path = "/v1/adapters", tag = "govern",
    responses((status = 200, description = "One for each domain.", body = spec::Adapters))
)]
pub(crate) async fn list(state: web::Data<State>) -> HttpResponse {
    HttpResponse::Ok().json(json!({"adapters": lineages(&state)}))
}

/// Where each lineage stands; `GET /v1/status` shows it too.
pub(crate) fn lineages(state: &State) -> Vec<Value> {
    let registry = &state.gateway.registry;
    let manifest = registry.try_manifest();
    let lineage = |(domain, lineage): (&Domain, &proto::Lineage)| {
        let current = lineage.current.as_ref().and_then(|id| registry.generation(id));
        json!({
            "domain": domain,
            "generation": lineage.current,
            "documents": lineage.documents,
            "published_ms": current.map(|generation| generation.published_ms),
            "cursor": lineage.cursor,
            "attempt": lineage.attempt,
            "set_aside": lineage.set_aside,
        })
    };
    manifest.iter().flat_map(|manifest| &manifest.lineages).map(lineage).collect()
}

/// Tells the generations of an adapter.
#[utoipa::path(
    get, path = "/v1/adapters/{domain}/log", tag = "govern", params(("domain" = String, Path, description = "The domain of the adapter.", pattern = "^[a-z][a-z0-9_-]{0,63}$")),
    responses((status = 200, description = "The current one first, each with its receipt.", body = spec::AdapterLog))
)]
pub(crate) async fn log(state: web::Data<State>, domain: web::Path<String>) -> Result<HttpResponse> {
    let domain = existing(&state, domain)?;
    let registry = &state.gateway.registry;
    let current = registry.lineage(&domain).current;
    let entry = |generation: &Generation| {
        json!({
            "generation": generation.id,
            "live": current.as_ref() == Some(&generation.id),
            "parent": generation.parent,
            "merged_from": generation.merged_from,
            "number": generation.number,
            "documents": generation.documents,
            "after": generation.after,
            "through": generation.through,
            "published_ms": generation.published_ms,
            "report": generation.report,
            "receipt": generation.receipt,
            "known_answers": generation.answer_head.as_ref().map(|head| {
                json!({
                    "answers": head.answers,
                    "prompts": head.prompts,
                    "trusted": head.trusted,
                    "facts": head.facts,
                    "passages": head.passages,
                })
            }),
        })
    };
    let generations: Vec<Value> =
        registry.chain(&domain).iter().map(|generation| entry(generation)).collect();
    Ok(HttpResponse::Ok().json(json!({"domain": domain, "current": current, "generations": generations})))
}

/// Serves an older generation again.
#[utoipa::path(
    post, path = "/v1/adapters/{domain}/rollback", tag = "govern", params(("domain" = String, Path, description = "The domain of the adapter.", pattern = "^[a-z][a-z0-9_-]{0,63}$")),
    request_body = Option<spec::RollbackRequest>,
    responses((status = 200, description = "It is served.", body = spec::RolledBack))
)]
pub(crate) async fn rollback(
    state: web::Data<State>,
    domain: web::Path<String>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse> {
    let lineage = existing(&state, domain)?;
    let body = Body::read(&request, payload, state.limits.body, &state.bodies).await?;
    let (body, _held) = body.json_or_empty()?;
    let mut fields = Fields::of(body, "")?;
    let to = generation(&mut fields, "to")?;
    let expected = generation(&mut fields, "expected_generation")?;
    fields.finish()?;
    let answer = doors::ask(&state.gateway.doors.rollback, Rollback { lineage, to, expected }).await?;
    Ok(HttpResponse::Ok().json(answer))
}

/// Gives an adapter out in PEFT's form.
#[utoipa::path(
    get, path = "/v1/adapters/{domain}/export", tag = "govern",
    params(
        ("domain" = String, Path, description = "The domain of the adapter.", pattern = "^[a-z][a-z0-9_-]{0,63}$"),
        ("generation" = Option<String>, Query, description = "The current one where left out.", pattern = "^[0-9a-f]{16}$")
    ),
    responses((status = 200, description = "Its two files.", body = spec::Exported))
)]
pub(crate) async fn export(
    state: web::Data<State>,
    domain: web::Path<String>,
    request: HttpRequest,
) -> Result<HttpResponse> {
    let lineage = existing(&state, domain)?;
    let mut query = Query::of(&request)?;
    let generation = query.name("generation", GenerationId::new)?;
    query.finish()?;
    let files = doors::ask(&state.gateway.doors.export, Export { lineage, generation }).await?;
    let config: Value = serde_json::from_str(&files.config).map_err(|error| ApiError::internal(&error))?;
    let weights = STANDARD.encode(&files.weights);
    Ok(HttpResponse::Ok().json(json!({"adapter_config": config, "adapter_model": weights})))
}

/// Takes an adapter in.
#[utoipa::path(
    post, path = "/v1/adapters/{domain}/import", tag = "govern", params(("domain" = String, Path, description = "The domain of the adapter.", pattern = "^[a-z][a-z0-9_-]{0,63}$")), request_body = spec::ImportRequest,
    responses((status = 200, description = "It is served.", body = spec::Imported))
)]
pub(crate) async fn import(
    state: web::Data<State>,
    domain: web::Path<String>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse> {
    let lineage = name(domain)?;
    let body = Body::read(&request, payload, state.limits.import, &state.bodies).await?;
    // Decoding 64 MiB takes long enough to keep others waiting.
    let read = web::block(move || read_import(lineage, body)).await;
    let (import, _held) = read.map_err(|error| ApiError::internal(&error))??;
    let domain = import.lineage.clone();
    let generation = doors::ask(&state.gateway.doors.import, import).await?;
    Ok(HttpResponse::Ok().json(json!({"domain": domain, "generation": generation})))
}

/// Makes one adapter of several.
#[utoipa::path(
    post, path = "/v1/adapters/{domain}/merge", tag = "govern", params(("domain" = String, Path, description = "The domain of the adapter.", pattern = "^[a-z][a-z0-9_-]{0,63}$")), request_body = spec::MergeRequest,
    responses((status = 200, description = "It is served.", body = spec::Imported))
)]
pub(crate) async fn merge(
    state: web::Data<State>,
    domain: web::Path<String>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse> {
    let lineage = name(domain)?;
    let body = Body::read(&request, payload, state.limits.body, &state.bodies).await?;
    let (body, _held) = body.json()?;
    let merge = read_merge(lineage, body)?;
    let domain = merge.lineage.clone();
    let generation = doors::ask(&state.gateway.doors.merge, merge).await?;
    Ok(HttpResponse::Ok().json(json!({"domain": domain, "generation": generation})))
}

fn read_merge(lineage: Domain, body: Value) -> Result<Merge> {
    let mut fields = Fields::of(body, "")?;
    let from = fields.string("from")?.and_then(|text| match selector::parse(&text) {
        Ok(Adapters::Fixed(from)) => Some(from),
        _ => None,
    });
    let from =
        from.ok_or_else(|| fields.must_be("from", "adapters with weights, such as \"a:0.7+b:0.3\""))?;
    let method = fields.string("method")?.unwrap_or_else(|| "linear".into());
    let method = serde_json::from_value(Value::String(method))
        .map_err(|_| fields.must_be("method", "linear, svd, ties or dare"))?;
    let merge = Merge {
        lineage,
        from,
        method,
        rank: fields.whole("rank", 1..=u32::MAX)?,
        density: fields.number("density", 0.0..=1.0)?,
        seed: fields.whole("seed", 0..=u32::MAX)?.map_or(0, u64::from),
        expected: generation(&mut fields, "expected_generation")?,
    };
    fields.finish()?;
    Ok(merge)
}

fn read_import(lineage: Domain, body: Body) -> Result<(Import, crate::body::Held)> {
    let (body, held) = body.json()?;
    let mut fields = Fields::of(body, "")?;
    let config = match fields.take("adapter_config") {
        Some(config @ Value::Object(_)) => config.to_string(),
        _ => return Err(fields.must_be("adapter_config", "the content of adapter_config.json, an object")),
    };
    let weights = fields.string("adapter_model")?.and_then(|text| STANDARD.decode(text).ok());
    let what = "the bytes of adapter_model.safetensors, in base64";
    let weights = weights.ok_or_else(|| fields.must_be("adapter_model", what))?;
    let expected = generation(&mut fields, "expected_generation")?;
    fields.finish()?;
    Ok((Import { lineage, files: PeftFiles { config, weights }, expected }, held))
}

fn generation(fields: &mut Fields, key: &str) -> Result<Option<GenerationId>> {
    let id = fields.string(key)?.map(GenerationId::new).transpose();
    id.map_err(|error| ApiError::bad_name(key, &error))
}

fn name(domain: web::Path<String>) -> Result<Domain> {
    Domain::new(domain.into_inner()).map_err(|error| ApiError::bad_name("domain", &error))
}

fn existing(state: &State, domain: web::Path<String>) -> Result<Domain> {
    let domain = name(domain)?;
    let manifest = state.gateway.registry.try_manifest();
    if manifest.is_some_and(|manifest| manifest.lineages.contains_key(&domain)) {
        return Ok(domain);
    }
    Err(ApiError::not_found(format!("there is no adapter '{domain}'; GET /v1/adapters lists them")))
}
