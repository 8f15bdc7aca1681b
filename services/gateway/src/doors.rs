//! The services behind the gateway.

use crate::error::ApiError;
use futures_util::future::LocalBoxFuture;
use kit::link::{Door, Events, Unanswered};
use proto::{
    Embed, Embedded, Export, Forget, Forgotten, Generate, GenerateEvent, GenerationId, Import, Merge,
    PeftFiles, Refusal, Rollback, RolledBack,
};
use std::sync::Arc;

/// The services behind the gateway.
#[derive(Clone)]
pub struct Doors {
    /// Answers requests for text.
    pub generate: Arc<dyn Generator>,
    /// Gives texts as vectors.
    pub embed: Door<Embed, Result<Embedded, Refusal>>,
    /// Serves an older generation.
    pub rollback: Door<Rollback, Result<RolledBack, Refusal>>,
    /// Forgets a document.
    pub forget: Door<Forget, Result<Forgotten, Refusal>>,
    /// Publishes an adapter made elsewhere.
    pub import: Door<Import, Result<GenerationId, Refusal>>,
    /// Merge adapters.
    pub merge: Door<Merge, Result<GenerationId, Refusal>>,
    /// Gives out an adapter.
    pub export: Door<Export, Result<PeftFiles, Refusal>>,
}

/// Who answers requests for text.
pub trait Generator: Send + Sync {
    /// The events of the answer. Dropping them cancels it.
    ///
    /// # Errors
    /// [`Unanswered::Busy`] when as many requests as allowed are running and waiting.
    fn generate(&self, request: Generate) -> LocalBoxFuture<'_, Result<Events<GenerateEvent>, Unanswered>>;
}

/// A door whose service answers with the events, or that it is full.
impl<Full: Send + 'static> Generator for Door<Generate, Result<Events<GenerateEvent>, Full>> {
    fn generate(&self, request: Generate) -> LocalBoxFuture<'_, Result<Events<GenerateEvent>, Unanswered>> {
        Box::pin(async { self.try_ask(request).await?.map_err(|_full| Unanswered::Busy) })
    }
}

/// Asks at a door of an administrator.
pub(crate) async fn ask<Q, R>(door: &Door<Q, Result<R, Refusal>>, question: Q) -> Result<R, ApiError>
where
    Q: Send + 'static,
    R: Send + 'static,
{
    Ok(door.try_ask(question).await.map_err(unanswered)??)
}

/// What a client is told of a question that got no answer.
pub(crate) fn unanswered(reason: Unanswered) -> ApiError {
    match reason {
        Unanswered::Refused(message) => ApiError::malformed(message),
        Unanswered::Later(wait) => ApiError::busy(reason.to_string(), wait.as_secs().clamp(1, 60)),
        Unanswered::Busy | Unanswered::Closed => ApiError::busy(reason.to_string(), 1),
    }
}
