//! What a supervisor, a load balancer, Prometheus and `engram status` ask.

use crate::adapters;
use crate::error::Result;
use crate::metrics;
use crate::spec;
use crate::state::{State, read};
use crate::tally::Tally;
use actix_web::{HttpResponse, HttpResponseBuilder, web};
use kit::ledger::DomainCounts;
use serde_json::{Value, json};
use std::sync::Arc;

/// The process answers.
#[utoipa::path(
    get, path = "/livez", tag = "watch",
    responses((status = 200, description = "It does.", body = String, content_type = "text/plain"))
)]
pub(crate) async fn livez() -> HttpResponse {
    plain(HttpResponse::Ok(), "ok")
}

/// Requests for text can be answered.
#[utoipa::path(
    get, path = "/readyz", tag = "watch",
    responses(
        (status = 200, description = "They can.", body = String, content_type = "text/plain"),
        (status = 503, description = "Not yet.", body = String, content_type = "text/plain")
    )
)]
pub(crate) async fn readyz(state: web::Data<State>) -> HttpResponse {
    if state.is_ready() {
        plain(HttpResponse::Ok(), "ready")
    } else {
        let mut later = HttpResponse::ServiceUnavailable();
        later.insert_header(("retry-after", "1"));
        plain(later, "not ready")
    }
}

fn plain(mut response: HttpResponseBuilder, text: &'static str) -> HttpResponse {
    response.content_type("text/plain; charset=utf-8").body(text)
}

/// Tells whether it is well.
#[utoipa::path(
    get, path = "/health", tag = "watch",
    responses((status = 200, description = "Whether requests for text can be answered.", body = spec::Health))
)]
pub(crate) async fn health(state: web::Data<State>) -> HttpResponse {
    let status = if state.is_ready() { "ok" } else { "not ready" };
    HttpResponse::Ok().json(json!({"status": status}))
}

/// Counts and measures.
#[utoipa::path(
    get, path = "/metrics", tag = "watch",
    responses((status = 200, description = "In Prometheus' text format.", body = String, content_type = "text/plain"))
)]
pub(crate) async fn metrics(state: web::Data<State>) -> Result<HttpResponse> {
    let (ledger, registry) = (Arc::clone(&state.gateway.ledger), Arc::clone(&state.gateway.registry));
    let tally = read(move || Tally::take(&ledger, registry.try_manifest().as_deref())).await?;
    metrics::refresh(&tally, &state.gateway.registry);
    let page = state.gateway.metrics.page();
    Ok(HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(page))
}

/// Tells how the server is.
#[utoipa::path(
    get, path = "/v1/status", tag = "watch",
    responses((status = 200, description = "All at once.", body = spec::Status))
)]
pub(crate) async fn status(state: web::Data<State>) -> Result<HttpResponse> {
    let gateway = &state.gateway;
    let (info, ledger, registry) = (&gateway.info, &gateway.ledger, &gateway.registry);
    let (head, judged) = (ledger.head(), ledger.intake_cursor());
    let manifest = registry.try_manifest();
    let domains = domains(&state).await?;
    Ok(HttpResponse::Ok().json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "ready": state.is_ready(),
        "uptime_s": state.started.elapsed().as_secs(),
        "base": {
            "name": info.base_name,
            "id": info.base_id,
            "parameters": info.parameters,
            "context_length": info.context_length,
            "device": info.device,
            "precision": info.precision,
        },
        "data_dir": info.data_dir,
        "documents": {
            "accepted": head,
            "judged": judged,
            "backlog": head.saturating_sub(judged),
            "learned": manifest.as_ref().map_or(0, |m| m.lineages.values().map(|l| l.documents).sum::<u64>()),
        },
        "learning": (gateway.learning)(),
        "disk_full": state.too_full_to_learn(),
        "manifest": manifest.map(|manifest| manifest.number),
        "manifest_live": registry.live(),
        "domains": domains,
        "adapters": adapters::lineages(&state),
    })))
}

/// How much there is of each domain, and what was made of it.
async fn domains(state: &State) -> Result<Value> {
    let ledger = Arc::clone(&state.gateway.ledger);
    let count = |counts: &DomainCounts| {
        json!({
            "documents": counts.documents,
            "kept": counts.kept,
            "refused": counts.refused,
            "examples": counts.examples,
            "held_out": counts.held_out,
        })
    };
    let counts = read(move || ledger.counts()).await?;
    Ok(counts.iter().map(|(domain, counts)| (domain.to_string(), count(counts))).collect())
}
