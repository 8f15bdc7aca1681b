//! Documents that an answer is from.

use crate::state::{State, read};
use proto::{Document, DocumentId, Source};
use serde_json::{Value, json};
use std::sync::Arc;

/// What is told of the sources of a choice. What the owner gave is named, and not questions that were made of it; what is no longer in the
/// ledger is not named at all.
pub(crate) async fn named(state: &State, choice: u32, sources: Vec<Source>) -> Vec<Value> {
    if sources.is_empty() {
        return Vec::new();
    }
    let ledger = Arc::clone(&state.gateway.ledger);
    let documents = read(move || {
        let mut documents = Vec::new();
        for Source { ordinal, likely } in sources {
            let there = ledger.documents_between(None, ordinal.saturating_sub(1), ordinal)?;
            for (_, document) in there {
                let parent = document.derived_from.as_ref().and_then(|of| DocumentId::new(of).ok());
                let parent = parent.map(|id| ledger.document(&id)).transpose()?.flatten();
                documents.push((parent.map_or(document, |(_, parent)| parent), likely));
            }
        }
        Ok(documents)
    });
    // The answer is as good without.
    let documents = documents.await.unwrap_or_default();
    let mut told: Vec<(Document, f32)> = Vec::new();
    for (document, likely) in documents {
        match told.iter_mut().find(|(known, _)| known.id == document.id) {
            Some((_, of_it)) => *of_it = (*of_it + likely).min(1.0),
            None => told.push((document, likely)),
        }
    }
    told.into_iter().map(|(document, likely)| {
        json!({"choice": choice, "document": document.id, "source": document.source, "likely": likely})
    }).collect()
}
