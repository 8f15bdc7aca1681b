//! Hands accepted pairs to the server, on a thread of its own: it may have to wait for a server that
//! is full or restarting, and answers are written into the journal meanwhile.

use super::asking::Event;
use super::filter::{Rejected, Rejection};
use super::inputs::Unit;
use super::pairs::Pair;
use crate::client::{Client, Refused, segment};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::sync::mpsc;
use std::thread;
use tokio::sync::mpsc::Sender;
use ureq::http::StatusCode;

/// What other programs call the source of a document that a teacher wrote.
pub const SOURCE: &str = "teacher";

/// The pairs of the unit with this index, as documents.
pub struct Job {
    /// Which unit.
    pub index: usize,
    /// The document that has to be there.
    pub parent: Option<String>,
    /// The pairs; never empty.
    pub documents: Vec<Value>,
}

/// Begins to hand on what is sent to it, and tells what came of each. It ends when nothing more can
/// come, or with the first that cannot be handed on.
///
/// # Errors
/// When no thread can be had.
pub fn start(server: Client, told: Sender<Event>) -> Result<mpsc::Sender<Job>> {
    let (jobs, inbox) = mpsc::channel::<Job>();
    thread::Builder::new().name("submit".into()).spawn(move || {
        for job in inbox {
            let done = hand_on(&server, &job);
            let failed = done.is_err();
            // When nobody listens any more, nobody can write down what was submitted.
            if told.blocking_send(Event::HandedOn(job.index, done)).is_err() || failed {
                return;
            }
        }
    })?;
    Ok(jobs)
}

fn hand_on(server: &Client, job: &Job) -> Result<Rejected> {
    if !is_there(server, job.parent.as_deref())? {
        return Ok(Rejected::from([(Rejection::Forgotten, job.documents.len() as u64)]));
    }
    let body = json!({ "documents": job.documents });
    // The key is of what is sent, so that the same answer is the same documents however often it is
    // sent, and another answer is others.
    let hash = blake3::hash(body.to_string().as_bytes()).to_hex();
    let key = format!("distill-{}", &hash[..32]);
    server.post_as(&key, "/v1/documents", &body).context("the server does not take an answer")?;
    Ok(Rejected::new())
}

/// Whether a document that answers derive from is still there: what was forgotten stays forgotten.
fn is_there(server: &Client, parent: Option<&str>) -> Result<bool> {
    let Some(parent) = parent else { return Ok(true) };
    match server.get(&format!("/v1/documents/{}", segment(parent))) {
        Ok(_) => Ok(true),
        Err(error) => match error.downcast_ref::<Refused>() {
            Some(refused) if refused.status == StatusCode::NOT_FOUND => Ok(false),
            _ => Err(error),
        },
    }
}

/// The pairs of a unit as documents. A completion begins with a space, since it continues its prompt.
pub fn documents(unit: &Unit, pairs: &[Pair], domain: &str) -> Vec<Value> {
    let document = |pair: &Pair| {
        json!({
            "prompt": pair.prompt,
            "completion": format!(" {}", pair.completion),
            "domain": domain,
            "source": SOURCE,
            "derived_from": unit.derived_from,
        })
    };
    pairs.iter().map(document).collect()
}
