//! Files in `POST /v1/documents`: `multipart/form-data`, streamed to disk, and read by `ingest`.
//!
//! A file's documents are accepted all together or not at all, like those of any other submission, and go through
//! the same checks.

use crate::body;
use crate::documents;
use crate::error::{ApiError, Result};
use crate::state::{State, now_ms};
use crate::submission;
use actix_multipart::{Field, Multipart};
use actix_web::guard::GuardContext;
use actix_web::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use actix_web::{HttpRequest, HttpResponse, web};
use anyhow::Context;
use futures_util::{StreamExt, stream};
use serde_json::{Map, Value, json};
use std::cell::RefCell;
use std::fs::{self, File};
use std::future::Future;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

/// Uploads that are received and read at the same time: reading takes memory.
const UPLOADS_MAX: usize = 2;
/// Files in one upload.
const FILES_MAX: usize = 1000;
/// The longest value of a field that is no file, bytes.
const VALUE_BYTES_MAX: usize = 1024;
/// Fields that say something about every document.
const FIELDS: [&str; 4] = ["domain", "importance", "source", "derived_from"];
/// Where uploads lie, in the data folder, until they are read.
pub const FOLDER: &str = "uploads";

/// A document that was found in a file.
#[derive(Debug)]
pub struct Found {
    /// Where in the upload: `facts.jsonl:17`.
    pub place: String,
    /// The document, as `POST /v1/documents` takes it.
    pub body: Map<String, Value>,
}

/// Finds the documents in a file.
pub trait Reader: Send + Sync {
    /// Those in `file`, which its sender called `name`.
    ///
    /// # Errors
    /// Why it is not usable, in a line that names it.
    fn documents(&self, file: File, name: &str) -> std::result::Result<Vec<Found>, String>;
}

/// Room for uploads.
pub(crate) struct Uploads {
    turns: Semaphore,
    folder: PathBuf,
}

impl Uploads {
    /// In `data_dir`. What an earlier process left is deleted: nobody will come back for it.
    pub(crate) fn new(data_dir: &Path) -> Self {
        let folder = data_dir.join(FOLDER);
        let _ = fs::remove_dir_all(&folder);
        Self { turns: Semaphore::new(UPLOADS_MAX), folder }
    }

    fn file(&self) -> anyhow::Result<File> {
        fs::create_dir_all(&self.folder).context("the folder of uploads")?;
        Ok(tempfile::tempfile_in(&self.folder)?)
    }
}

/// Whether a request brings files.
pub(crate) fn is_upload(context: &GuardContext<'_>) -> bool {
    let kind = context.head().headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    kind.is_some_and(|kind| kind.trim_start().to_ascii_lowercase().starts_with("multipart/"))
}

pub(crate) async fn submit(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse> {
    // Kept here too: the form lets go of what it reads when there is a mistake in it.
    let payload = Rc::new(RefCell::new(payload));
    let read = Rc::clone(&payload);
    let parts = stream::poll_fn(move |context| read.borrow_mut().poll_next_unpin(context));
    let answer = take(&state, &request, Multipart::new(request.headers(), parts)).await;
    if answer.is_err() {
        body::leave(&request, payload);
    }
    answer
}

async fn take(state: &State, request: &HttpRequest, parts: Multipart) -> Result<HttpResponse> {
    let limits = state.limits.upload;
    let length = request.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    if length.and_then(|length| length.parse().ok()).is_some_and(|bytes: usize| bytes > limits.bytes_max) {
        return Err(body::too_large(limits));
    }
    let key = documents::idempotency_key(request)?.map(str::to_owned);
    documents::admit(state, 1)?;
    let turn = state.uploads.turns.try_acquire();
    let _turn = turn.map_err(|_| ApiError::busy("other uploads are being read", 1))?;
    let mut form = Form { limits, start: Instant::now(), bytes: 0, files: Vec::new(), about: Map::new() };
    form.receive(&state.uploads, parts).await?;
    let Form { files, about, .. } = form;
    if files.is_empty() {
        return Err(ApiError::invalid("file", "the form has no file: send one as the field 'file'"));
    }
    let reader = Arc::clone(&state.gateway.reader);
    let found = web::block(move || found(&*reader, files, &about)).await;
    let found = found.map_err(|error| ApiError::internal(&error))??;
    let limits = submission::Limits {
        documents_max: state.gateway.settings.gateway.intake_documents_max as usize,
        ..state.limits.submission
    };
    let (places, bodies): (Vec<String>, Vec<Value>) = found.into_iter().unzip();
    if bodies.len() > limits.documents_max {
        let (many, max) = (bodies.len(), limits.documents_max);
        let message =
            format!("these are {many} documents, and {max} fit at a time: send them in several uploads");
        return Err(ApiError::too_large(message).param("file"));
    }
    let read = submission::read(json!({ "documents": bodies }), key.as_deref(), limits, now_ms())?;
    let mut answers = documents::append(state, read).await?;
    for (answer, place) in answers.iter_mut().zip(places) {
        answer["place"] = place.into();
    }
    Ok(HttpResponse::Accepted().json(json!({ "documents": answers })))
}

/// Each document with its place; `about` goes for all of them.
fn found(
    reader: &dyn Reader,
    files: Vec<(String, File)>,
    about: &Map<String, Value>,
) -> Result<Vec<(String, Value)>> {
    let mut all = Vec::new();
    for (name, file) in files {
        let found = reader.documents(file, &name).map_err(|error| ApiError::invalid("file", error))?;
        if found.is_empty() {
            let message = format!(
                "there is nothing to learn in {name}: text, Markdown, source code, JSONL, HTML and PDF are read"
            );
            return Err(ApiError::invalid("file", message));
        }
        for mut one in found {
            one.body.extend(about.clone());
            all.push((one.place, Value::Object(one.body)));
        }
    }
    Ok(all)
}

/// A form as it comes in.
struct Form {
    limits: body::Limits,
    start: Instant,
    bytes: usize,
    files: Vec<(String, File)>,
    about: Map<String, Value>,
}

impl Form {
    async fn receive(&mut self, uploads: &Uploads, mut form: Multipart) -> Result<()> {
        while let Some(field) = self.in_time(form.next()).await? {
            let field = field.map_err(|error| malformed(&error))?;
            let name = field.name().unwrap_or_default().to_owned();
            let file = field.content_disposition().and_then(|told| told.get_filename()).map(shown);
            match file {
                Some(file) => {
                    if self.files.len() == FILES_MAX {
                        let message = format!("an upload takes {FILES_MAX} files at most: send several");
                        return Err(ApiError::too_large(message).param("file"));
                    }
                    let received = self.file(uploads, field).await?;
                    self.files.push((file, received));
                }
                None if FIELDS.contains(&name.as_str()) => {
                    let value = self.value(&name, field).await?;
                    self.about.insert(name, value);
                }
                None => {
                    let name = shown(&name);
                    let message =
                        format!("unknown field '{name}': a form has files, and {}", FIELDS.join(", "));
                    return Err(ApiError::invalid(name, message));
                }
            }
        }
        Ok(())
    }

    async fn file(&mut self, uploads: &Uploads, mut field: Field) -> Result<File> {
        let failed = |error: anyhow::Error| {
            tracing::error!(error = format!("{error:#}"), "an upload could not be written");
            ApiError::busy("the upload could not be written to disk", 1)
        };
        let mut file = uploads.file().map_err(failed)?;
        while let Some(chunk) = self.in_time(field.next()).await? {
            let chunk = chunk.map_err(|error| malformed(&error))?;
            self.count(chunk.len())?;
            // On a thread that may wait for the disk.
            let written = web::block(move || file.write_all(&chunk).map(|()| file)).await;
            let written = written.map_err(|error| ApiError::internal(&error))?;
            file = written.map_err(|error| failed(error.into()))?;
        }
        file.rewind().map_err(|error| failed(error.into()))?;
        Ok(file)
    }

    async fn value(&mut self, name: &str, mut field: Field) -> Result<Value> {
        let mut bytes = Vec::new();
        while let Some(chunk) = self.in_time(field.next()).await? {
            let chunk = chunk.map_err(|error| malformed(&error))?;
            self.count(chunk.len())?;
            bytes.extend_from_slice(&chunk);
            if bytes.len() > VALUE_BYTES_MAX {
                return Err(ApiError::invalid(name, format!("'{name}' is over {VALUE_BYTES_MAX} bytes")));
            }
        }
        let text = String::from_utf8(bytes);
        let text = text.map_err(|_| ApiError::invalid(name, format!("'{name}' is not UTF-8 text")))?;
        let number = || text.trim().parse::<f64>().ok().map(Value::from);
        Ok(if name == "importance" { number().unwrap_or_else(|| text.clone().into()) } else { text.into() })
    }

    fn count(&mut self, bytes: usize) -> Result<()> {
        self.bytes += bytes;
        if self.bytes > self.limits.bytes_max { Err(body::too_large(self.limits)) } else { Ok(()) }
    }

    async fn in_time<T>(&self, next: impl Future<Output = T>) -> Result<T> {
        let deadline = self.start + self.limits.patience(self.bytes);
        timeout_at(deadline, next).await.map_err(|_| body::too_slow(self.limits))
    }
}

/// A name that comes back in answers: without control characters, and not endless.
fn shown(name: &str) -> String {
    let name: String = name.chars().filter(|c| !c.is_control()).take(200).collect();
    if name.is_empty() { "upload".to_owned() } else { name }
}

fn malformed(error: &dyn std::fmt::Display) -> ApiError {
    ApiError::malformed(format!("the form cannot be read: {error}"))
}
