//! What a service is: a plain struct with one handler per message.
//!
//! A service knows no actor, no channel and no acknowledgement, so that a unit test calls its
//! handlers directly. [`crate::host::Host`] gives it all of that.

use proto::{Accepted, Batch, Candidate, Judgement, Kept, Parsed, Publish};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::future::Future;
use std::time::Duration;

/// What a message that travels between services has to offer.
pub trait Message: Serialize + DeserializeOwned + Send + 'static {
    /// Its name in logs and metrics.
    const NAME: &'static str;

    /// What it is about; the same for every delivery of it, so that a message which brings a
    /// service down again and again is recognised. Never holds user text.
    fn key(&self) -> String;
}

/// Why a message could not be handled, and with it what happens next.
#[derive(Debug)]
pub enum Fault {
    /// Not now: the same message is handled again after this time, before any other.
    Retry(Duration),
    /// Never: it is put aside, with this reason, which its owner can read. Quotes no user text.
    Poison(String),
    /// This lane is broken: all of its services are built anew, and unsettled work comes again.
    Fatal(anyhow::Error),
}

/// Whatever a handler did not expect breaks its lane: durable state is what it comes back from.
impl<E: Into<anyhow::Error>> From<E> for Fault {
    fn from(error: E) -> Self {
        Self::Fatal(error.into())
    }
}

/// A service.
pub trait Service: Send + 'static {
    /// Its name in logs, metrics and thread names.
    const NAME: &'static str;
}

/// A service that handles messages of one type.
///
/// The futures need not be `Send`: a service stays on its own thread. They must not block it for
/// long either; long work belongs on a [`crate::compute::Compute`] thread.
pub trait Handle<M: Message>: Service {
    /// Does the work. Returning `Ok` settles the message, so what it asks for must be done, or
    /// handed on, by then.
    ///
    /// # Errors
    /// The [`Fault`] says what happens to the message and to the lane.
    fn handle(&mut self, message: &M) -> impl Future<Output = Result<(), Fault>>;

    /// Puts a message aside that cannot be handled ([`Fault::Poison`]), or that twice was being
    /// handled when the service died. The reason is for the document's owner.
    ///
    /// # Errors
    /// As for [`Handle::handle`], but for `Poison`: what cannot even be put aside breaks the lane.
    fn put_aside(&mut self, message: &M, reason: &str) -> impl Future<Output = Result<(), Fault>>;
}

/// A service that answers questions.
pub trait Answer<Q>: Service {
    /// What it answers with.
    type Reply: Send + 'static;

    /// The answer.
    ///
    /// # Errors
    /// `Retry` and `Poison` go back to whoever asked; `Fatal` breaks the lane.
    fn answer(&mut self, question: Q) -> impl Future<Output = Result<Self::Reply, Fault>>;
}

/// Gives a message its name and key.
macro_rules! message {
    ($type:ident, $name:literal, |$message:ident| $key:expr) => {
        impl Message for $type {
            const NAME: &'static str = $name;
            fn key(&self) -> String {
                let $message = self;
                $key
            }
        }
    };
}

message!(Accepted, "accepted", |m| m.ordinal.to_string());
message!(Parsed, "parsed", |m| m.ordinal.to_string());
message!(Kept, "kept", |m| m.ordinal.to_string());
message!(Batch, "batch", |m| batch_key(m));
message!(Candidate, "candidate", |m| batch_key(&m.batch));
message!(Judgement, "judgement", |m| batch_key(&m.batch));
message!(Publish, "publish", |m| m.manifest.number.to_string());

/// A refused batch that comes again, and a part of one that was split, are other messages.
fn batch_key(batch: &Batch) -> String {
    format!("{}/{}/{}/{}", batch.lineage, batch.number, batch.attempt, batch.through)
}
