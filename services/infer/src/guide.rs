//! What an answer follows is compiled beside everything else: neither other requests nor running answers wait for it.

use kit::link::ReplyTo;
use model::grammar::{Grammar, Grammars};
use proto::GenerateEvent;
use std::sync::{Arc, Mutex, PoisonError};

/// What the answers of a request follow, once it is compiled.
#[derive(Clone, Default)]
pub struct Guide(Arc<Mutex<Option<Grammar>>>);

impl Guide {
    /// Whether it is compiled.
    pub(crate) fn is_there(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// For one answer.
    pub(crate) fn grammar(&self) -> Option<Grammar> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, grammar: Grammar) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(grammar);
    }
}

/// A schema on its way to the guide of a request.
pub(crate) struct Compilation {
    grammars: Arc<Grammars>,
    schema: String,
    guide: Guide,
    started: GenerateEvent,
    reply: ReplyTo<GenerateEvent>,
}

impl Compilation {
    /// Of `schema`, for the request that is answered at `reply`, first of all with `started`.
    pub(crate) fn new(
        grammars: &Arc<Grammars>,
        schema: String,
        started: GenerateEvent,
        reply: ReplyTo<GenerateEvent>,
    ) -> Self {
        Self { grammars: Arc::clone(grammars), schema, guide: Guide::default(), started, reply }
    }

    /// Where it will be.
    pub(crate) fn guide(&self) -> Guide {
        self.guide.clone()
    }

    /// Compiles it, and lets the request begin; or refuses it, and whoever asked goes away.
    pub(crate) fn run(self) {
        if self.reply.is_gone() {
            return;
        }
        match self.grammars.compile(&self.schema) {
            Ok(grammar) => {
                // In this order: what answers comes before the first of its text.
                let _ = self.reply.try_send(self.started);
                self.guide.set(grammar);
            }
            Err(error) => {
                let message = format!("no answer can follow this schema: {error:#}");
                let param = "response_format".to_owned();
                let _ = self.reply.try_send(GenerateEvent::Refused { param, message });
            }
        }
    }
}
