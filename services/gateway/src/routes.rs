//! The one table of what is answered where.

use crate::error::ApiError;
use crate::state::State;
use crate::{
    adapters, body, completions, documents, embeddings, feedback, lora, metrics, models, page, probes, spec,
    upload, words,
};
use actix_web::body::BoxBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::guard::fn_guard;
use actix_web::middleware::Next;
use actix_web::{HttpMessage, HttpRequest, Resource, ResponseError, web};

/// All routes. Whatever is not among them is 404, or 405 where only the method is wrong.
pub(crate) fn routes(app: &mut web::ServiceConfig) {
    app.service(
        at("/v1/documents", "GET, POST")
            .route(web::get().to(documents::list))
            .route(web::post().guard(fn_guard(upload::is_upload)).to(upload::submit))
            .route(web::post().to(documents::submit)),
    )
    .service(
        at("/v1/documents/{id}", "GET, DELETE")
            .route(web::get().to(documents::show))
            .route(web::delete().to(documents::forget)),
    )
    .service(at("/v1/feedback", "POST").route(web::post().to(feedback::submit)))
    .service(at("/v1/chat/completions", "POST").route(web::post().to(completions::chat)))
    .service(at("/v1/completions", "POST").route(web::post().to(completions::text)))
    .service(at("/v1/models", "GET").route(web::get().to(models::list)))
    .service(at("/v1/models/{id}", "GET").route(web::get().to(models::show)))
    .service(at("/v1/adapters", "GET").route(web::get().to(adapters::list)))
    .service(at("/v1/adapters/{domain}/log", "GET").route(web::get().to(adapters::log)))
    .service(at("/v1/adapters/{domain}/rollback", "POST").route(web::post().to(adapters::rollback)))
    .service(at("/v1/adapters/{domain}/export", "GET").route(web::get().to(adapters::export)))
    .service(at("/v1/adapters/{domain}/import", "POST").route(web::post().to(adapters::import)))
    .service(at("/v1/adapters/{domain}/merge", "POST").route(web::post().to(adapters::merge)))
    .service(at("/v1/load_lora_adapter", "POST").route(web::post().to(lora::load)))
    .service(at("/v1/unload_lora_adapter", "POST").route(web::post().to(lora::unload)))
    .service(at("/v1/embeddings", "POST").route(web::post().to(embeddings::create)))
    .service(at("/tokenize", "POST").route(web::post().to(words::tokenize)))
    .service(at("/detokenize", "POST").route(web::post().to(words::detokenize)))
    .service(at("/v1/status", "GET").route(web::get().to(probes::status)))
    .service(at("/livez", "GET").route(web::get().to(probes::livez)))
    .service(at("/readyz", "GET").route(web::get().to(probes::readyz)))
    .service(at("/health", "GET").route(web::get().to(probes::health)))
    .service(at("/metrics", "GET").route(web::get().to(probes::metrics)))
    .service(at("/", "GET").route(web::get().to(page::show)))
    .service(at("/found", "GET").route(web::get().to(page::found)))
    .service(at("/events", "GET").route(web::get().to(page::follow)))
    .service(at("/openapi.json", "GET").route(web::get().to(spec::json)))
    .service(at("/docs", "GET").route(web::get().to(spec::read)))
    .service(at("/assets/{name}", "GET").route(web::get().to(page::asset)))
    .app_data(
        web::PathConfig::default()
            .error_handler(|_, _| ApiError::malformed("the path is not valid UTF-8").into()),
    )
    .default_service(web::to(nowhere));
}

fn at(path: &str, allow: &'static str) -> Resource {
    let refuse = move |request: HttpRequest, payload: web::Payload| async move {
        body::leave(&request, payload);
        Err::<&str, _>(ApiError::method_not_allowed(allow))
    };
    web::resource(path).default_service(web::to(refuse))
}

async fn nowhere(request: HttpRequest, payload: web::Payload) -> Result<&'static str, ApiError> {
    body::leave(&request, payload);
    let path: String = request.path().chars().take(80).collect();
    Err(ApiError::not_found(format!("there is nothing at {path}")))
}

/// Lets a request in, or answers it at the door; and counts it.
pub(crate) async fn guarded(
    state: web::Data<State>,
    mut request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, actix_web::Error> {
    let response = match state.guard.admit(request.path(), request.headers()) {
        Ok(()) => next.call(request).await?,
        Err(error) => {
            let unread = body::Unread::new(request.take_payload());
            request.extensions_mut().insert(unread);
            request.into_response(error.error_response())
        }
    };
    let response = body::hand_over(response);
    metrics::http_request(response.request().match_pattern(), response.status().as_u16());
    Ok(response)
}
