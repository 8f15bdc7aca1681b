//! The description of the API in OpenAPI's form, made from the handlers, and a page to read it on.
//!
//! What requests and answers look like is said once more in [`requests`] and [`answers`], as types
//! that nothing is read into: the readers refuse by name and place, which no derived one does. Tests
//! hold the two together.

mod answers;
mod page;
mod requests;

pub(crate) use answers::{
    AdapterLog, Adapters, ChatCompletion, Documents, Embeddings, Exported, Failure, Forgotten, Health, Heard,
    Imported, Model, Models, RolledBack, Shown, Status, StreamEvent, Submitted, TextCompletion, Tokenized,
    Untokenized,
};
pub(crate) use requests::{
    ChatRequest, CompletionRequest, Detokenize, EmbeddingRequest, FeedbackRequest, ImportRequest, LoadLora,
    MergeRequest, RollbackRequest, Submission, Tokenize, UnloadLora, Upload,
};

use crate::{adapters, completions, documents, embeddings, feedback, lora, models, probes, words};
use actix_web::HttpResponse;
use std::sync::LazyLock;
use utoipa::OpenApi as _;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{
    ContentBuilder, OpenApi, PathItem, Ref, RefOr, ResponseBuilder, SecurityRequirement, path::Operation,
};

/// What every path may answer beside what it says of itself.
const REFUSED: &str = "Refused: the message says why, `param` names the field at fault.";
const LATER: &str = "Not now, or our own fault: ask again after `Retry-After` seconds.";

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Engram",
        description = "A small language model that keeps learning from its owner's documents. Text is asked for \
                       as at OpenAI, adapters are loaded as with vLLM.",
        license(name = "MIT OR Apache-2.0")
    ),
    paths(
        documents::submit, feedback::submit, documents::list, documents::show, documents::forget,
        completions::chat, completions::text, embeddings::create, models::list, models::show, words::tokenize, words::detokenize,
        adapters::list, adapters::log, adapters::rollback, adapters::export, adapters::import, adapters::merge,
        lora::load, lora::unload,
        probes::status, probes::health, probes::livez, probes::readyz, probes::metrics
    ),
    tags(
        (name = "learn", description = "Documents: given, followed, forgotten."),
        (name = "ask", description = "Text, as at OpenAI."),
        (name = "govern", description = "Adapters: looked into, undone, exchanged."),
        (name = "watch", description = "How the server is.")
    ),
    components(schemas(Failure))
)]
struct Api;

static SPEC: LazyLock<OpenApi> = LazyLock::new(|| {
    let mut spec = Api::openapi();
    if let Some(components) = &mut spec.components {
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        components.add_security_scheme("key", SecurityScheme::Http(bearer));
    }
    // With keys one is needed; without, none is.
    let key = SecurityRequirement::new::<_, [&str; 0], &str>("key", []);
    spec.security = Some(vec![SecurityRequirement::default(), key]);
    for operation in spec.paths.paths.values_mut().flat_map(operations) {
        for (status, description) in [("4XX", REFUSED), ("5XX", LATER)] {
            let failure = RefOr::Ref(Ref::from_schema_name("Failure"));
            let content = ContentBuilder::new().schema(Some(failure)).build();
            let response =
                ResponseBuilder::new().description(description).content("application/json", content);
            operation.responses.responses.entry(status.to_owned()).or_insert_with(|| response.build().into());
        }
    }
    spec
});

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.post, &mut item.delete].into_iter().flatten()
}

/// `GET /openapi.json`.
pub(crate) async fn json() -> HttpResponse {
    HttpResponse::Ok().json(&*SPEC)
}

/// `GET /docs`.
pub(crate) async fn read() -> HttpResponse {
    crate::page::document().content_type("text/html; charset=utf-8").body(page::of(&SPEC).into_string())
}
