//! The page at `/`: what the server does, live, and what its owner does with it.
//!
//! [`look`] reads how things stand, [`shell`] and [`regions`] write it as HTML, [`charts`] as SVG,
//! [`pulse`] remembers how learning went lately. `GET /events` sends each region again when it has
//! changed, and `page.js` puts it in its place; `GET /found` lists the documents that it looks for. All that comes from documents passes `maud`, which
//! escapes it; the page asks nobody but this server for anything, and its policy forbids more.

mod charts;
mod look;
mod pulse;
mod regions;
mod shell;

pub(crate) use pulse::Pulse;

use crate::documents;
use crate::error::{ApiError, Result};
use crate::events;
use crate::query::Query;
use crate::state::{State, read};
use actix_web::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use actix_web::{HttpRequest, HttpResponse, HttpResponseBuilder, web};
use look::Look;
use maud::Markup;
use proto::Document;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, sleep};

/// How often an open page is told what has changed.
const EVERY: Duration = Duration::from_millis(500);
/// How often it is told something at all, so that those between us keep the connection.
const ALIVE_EVERY: Duration = Duration::from_secs(15);
/// Pages that are open at a time.
const PAGES_MAX: usize = 64;
/// Events that wait for a page which reads slowly.
const EVENTS_MAX: usize = 16;

/// Scripts and styles come from here, pictures too, and nothing else is loaded, embedded or embedding.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
                      connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'";

/// What all open pages share.
pub(crate) struct Board {
    pages: Arc<Semaphore>,
    last: Mutex<Option<(Instant, Arc<Regions>)>>,
}

/// The live parts of the page, by the name of their place.
type Regions = BTreeMap<&'static str, String>;

impl Default for Board {
    fn default() -> Self {
        Self { pages: Arc::new(Semaphore::new(PAGES_MAX)), last: Mutex::default() }
    }
}

impl Board {
    /// The regions as they are now. However many pages are open, they are written once.
    async fn regions(&self, state: &web::Data<State>) -> Result<Arc<Regions>> {
        let mut last = self.last.lock().await;
        if let Some((at, regions)) = &*last
            && at.elapsed() < EVERY / 2
        {
            return Ok(Arc::clone(regions));
        }
        let look = Look::take(state).await?;
        let text = |(name, markup): (&'static str, Markup)| (name, markup.into_string());
        let regions: Arc<Regions> = Arc::new(regions::all(&look).into_iter().map(text).collect());
        *last = Some((Instant::now(), Arc::clone(&regions)));
        Ok(regions)
    }
}

/// `GET /`. Where keys are needed, whoever opens the page has not shown one yet, so it is empty until
/// its script has asked for one.
pub(crate) async fn show(state: web::Data<State>) -> Result<HttpResponse> {
    let keys = state.guard.needs_key();
    let regions = if keys { Arc::default() } else { state.board.regions(&state).await? };
    let page = shell::page(&state, &regions, keys).into_string();
    Ok(document().content_type("text/html; charset=utf-8").body(page))
}

/// `GET /events`: each region when it has changed, all of them at first.
pub(crate) async fn follow(state: web::Data<State>) -> Result<HttpResponse> {
    let pages = Arc::clone(&state.board.pages);
    let full = |_| ApiError::busy(format!("{PAGES_MAX} pages are open already: close one"), 5);
    let seat = pages.try_acquire_owned().map_err(full)?;
    // Refused now rather than in the stream, where nothing reads why.
    state.board.regions(&state).await?;
    let (sender, receiver) = mpsc::channel(EVENTS_MAX);
    actix_web::rt::spawn(async move {
        let stop = state.stop.clone();
        tokio::select! {
            () = stop.wait() => {}
            () = sender.closed() => {}
            () = tell(&state, &sender, seat) => {}
        }
    });
    Ok(events::stream(receiver))
}

async fn tell(state: &web::Data<State>, sender: &mpsc::Sender<web::Bytes>, _seat: OwnedSemaphorePermit) {
    let (mut told, mut last) = (Arc::<Regions>::default(), Instant::now());
    // What cannot be read now ends the stream; the page comes back and finds out what is the matter.
    while let Ok(regions) = state.board.regions(state).await {
        for (name, html) in regions.iter().filter(|(name, html)| told.get(*name) != Some(*html)) {
            let event = format!("event: {name}\ndata: {}\n\n", json!(html));
            if sender.send(event.into()).await.is_err() {
                return;
            }
            last = Instant::now();
        }
        if last.elapsed() >= ALIVE_EVERY {
            let _ = sender.send(web::Bytes::from_static(b": still here\n\n")).await;
            last = Instant::now();
        }
        told = regions;
        sleep(EVERY).await;
    }
}

/// `GET /found?says=TEXT`: the newest documents that say this, or have it as their id, as the page lists documents.
pub(crate) async fn found(state: web::Data<State>, request: HttpRequest) -> Result<HttpResponse> {
    let mut query = Query::of(&request)?;
    let says = query.text("says", documents::SAYS_MAX)?;
    query.finish()?;
    let (ledger, registry) = (Arc::clone(&state.gateway.ledger), Arc::clone(&state.gateway.registry));
    let id = says.clone();
    let saying = documents::saying(says);
    let wanted = move |document: &Document| id.as_deref() == Some(document.id.as_str()) || saying(document);
    let rows = read(move || look::rows(&ledger, &registry, wanted)).await?;
    let region = regions::documents(&rows, "No document says this.").into_string();
    Ok(document().content_type("text/html; charset=utf-8").body(region))
}

/// The files that the page is made of.
pub(crate) async fn asset(name: web::Path<String>) -> Result<HttpResponse> {
    let (kind, text) = match name.as_str() {
        "page.js" => ("text/javascript; charset=utf-8", include_str!("page/page.js")),
        "page.css" => ("text/css; charset=utf-8", include_str!("page/page.css")),
        "docs.css" => ("text/css; charset=utf-8", include_str!("spec/docs.css")),
        "icon.svg" => ("image/svg+xml", include_str!("page/icon.svg")),
        _ => return Err(ApiError::not_found("there is no such file")),
    };
    Ok(document().insert_header((CONTENT_TYPE, kind)).body(text))
}

/// An answer for a browser to show, and to nobody else's page.
pub(crate) fn document() -> HttpResponseBuilder {
    let mut response = HttpResponse::Ok();
    response
        .insert_header(("content-security-policy", POLICY))
        .insert_header(("cross-origin-opener-policy", "same-origin"))
        .insert_header(("cross-origin-resource-policy", "same-origin"))
        .insert_header(("referrer-policy", "no-referrer"))
        .insert_header(("x-content-type-options", "nosniff"))
        .insert_header((CACHE_CONTROL, "no-cache"));
    response
}
