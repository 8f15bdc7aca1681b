//! Documents on their way to a server.

use crate::client::{Client, Refused};
use crate::corpus::Draft;
use anyhow::{Result, bail};
use serde_json::{Map, Value, json};

/// Documents a request may hold.
const BATCH_DOCUMENTS_MAX: usize = 100;
/// A request may hold 1 MiB; the rest is room for its frame, bytes.
const BATCH_BYTES_MAX: usize = (1 << 20) - 4096;

/// A document that the server has taken.
pub struct Sent {
    /// Where it was found.
    pub place: String,
    /// What the server says of it.
    pub answer: Value,
}

/// Documents on their way, in batches.
pub struct Sending<'a> {
    client: &'a Client,
    batch: Vec<Draft>,
    bytes: usize,
    sent: Vec<Sent>,
    unusable: Vec<anyhow::Error>,
}

impl<'a> Sending<'a> {
    /// On their way to this server.
    pub fn to(client: &'a Client) -> Self {
        Self { client, batch: Vec::new(), bytes: 0, sent: Vec::new(), unusable: Vec::new() }
    }

    /// Adds a document, and sends what has come together once it is enough for a request.
    ///
    /// # Errors
    /// When the server takes none of it.
    pub fn push(&mut self, draft: Draft) -> Result<()> {
        let size = size_of(&draft);
        if self.batch.len() == BATCH_DOCUMENTS_MAX || self.bytes + size > BATCH_BYTES_MAX {
            self.post()?;
        }
        self.bytes += size;
        self.batch.push(draft);
        Ok(())
    }

    /// Notes what cannot be sent at all.
    pub fn leave_out(&mut self, reason: anyhow::Error) {
        self.unusable.push(reason);
    }

    /// Sends the rest; what was taken, and what cannot be used.
    ///
    /// # Errors
    /// When the server takes none of it.
    pub fn finish(mut self) -> Result<(Vec<Sent>, Vec<anyhow::Error>)> {
        self.post()?;
        Ok((self.sent, self.unusable))
    }

    /// Sends the batch. The server takes it whole or not at all: a document that it names as the
    /// reason is left out, and the rest goes again. That is harmless even when the answer was lost,
    /// because a document's id is the hash of what it says.
    fn post(&mut self) -> Result<()> {
        self.bytes = 0;
        let mut batch = std::mem::take(&mut self.batch);
        while !batch.is_empty() {
            let bodies: Vec<&Map<String, Value>> = batch.iter().map(|draft| &draft.body).collect();
            match self.client.post("/v1/documents", &json!({ "documents": bodies })) {
                Ok(answer) => return self.taken(batch, &answer),
                Err(error) => match offender(&error).filter(|place| *place < batch.len()) {
                    Some(place) => self.unusable.push(error.context(batch.remove(place).place)),
                    None => return Err(error),
                },
            }
        }
        Ok(())
    }

    fn taken(&mut self, batch: Vec<Draft>, answer: &Value) -> Result<()> {
        let answers = answer["documents"].as_array().cloned().unwrap_or_default();
        if answers.len() != batch.len() {
            bail!("the server took {} documents of {}; is --server an Engram?", answers.len(), batch.len());
        }
        let pairs = batch.into_iter().zip(answers);
        self.sent.extend(pairs.map(|(draft, answer)| Sent { place: draft.place, answer }));
        Ok(())
    }
}

/// The document that a refusal is about: its `param` is `documents[3]`, or a field of that.
fn offender(error: &anyhow::Error) -> Option<usize> {
    let param = error.downcast_ref::<Refused>()?.param.as_deref()?;
    let (place, _) = param.strip_prefix("documents[")?.split_once(']')?;
    place.parse().ok()
}

fn size_of(draft: &Draft) -> usize {
    serde_json::to_vec(&draft.body).map_or(0, |bytes| bytes.len() + 1)
}
