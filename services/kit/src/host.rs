//! The one actor on the data path: everything about a message that is not a service's own logic.

use crate::compute::ComputeError;
use crate::lane::Deaths;
use crate::link::{Ask, Delivery, Door, Link, Unanswered};
use crate::service::{Answer, Fault, Handle, Message, Service};
use crate::telemetry::names;
use actix::{Actor, Addr, AtomicResponse, Context, WrapFuture};
use anyhow::anyhow;
use futures_util::FutureExt;
use std::any::Any;
use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tracing::Instrument;

/// A message during which a service died this often is put aside instead of handled again.
const KILLS_MAX: u32 = 2;

/// How often a message was being handled when its service died. It outlives the services: a lane
/// hands the same one to each crew it builds.
#[derive(Debug, Default)]
pub struct Suspects {
    kills: Mutex<HashMap<(&'static str, String), u32>>,
}

impl Suspects {
    fn kills(&self, service: &'static str, key: &str) -> u32 {
        self.locked().get(&(service, key.to_owned())).copied().unwrap_or(0)
    }

    fn blame(&self, service: &'static str, key: &str) {
        *self.locked().entry((service, key.to_owned())).or_default() += 1;
    }

    fn clear(&self, service: &'static str, key: &str) {
        self.locked().remove(&(service, key.to_owned()));
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, HashMap<(&'static str, String), u32>> {
        self.kills.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs a service: one message at a time, each within a tracing span, counted, and settled.
pub struct Host<S: Service> {
    /// Taken out while a message is handled; gone for good once the service has died.
    service: Option<S>,
    deaths: Deaths,
    suspects: Arc<Suspects>,
}

impl<S: Service> Host<S> {
    pub(crate) fn new(service: S, deaths: Deaths, suspects: Arc<Suspects>) -> Self {
        Self { service: Some(service), deaths, suspects }
    }
}

/// A service is moved, never pinned: its futures borrow it from a place of their own.
impl<S: Service> Unpin for Host<S> {}

impl<S: Service> Actor for Host<S> {
    type Context = Context<Self>;
}

/// However a host comes to its end, its lane learns of it; one that is being torn down no longer
/// listens.
impl<S: Service> Drop for Host<S> {
    fn drop(&mut self) {
        self.deaths.report(S::NAME, "its actor is gone");
    }
}

impl<S: Handle<M>, M: Message> actix::Handler<Delivery<M>> for Host<S> {
    type Result = AtomicResponse<Self, ()>;

    fn handle(&mut self, delivery: Delivery<M>, _: &mut Context<Self>) -> Self::Result {
        let taken = self.service.take();
        let (deaths, suspects) = (self.deaths.clone(), Arc::clone(&self.suspects));
        let work = async move {
            let span =
                tracing::info_span!("message", service = S::NAME, kind = M::NAME, key = delivery.key());
            match taken {
                Some(service) => settle(service, &delivery, &deaths, &suspects).instrument(span).await,
                None => None,
            }
        };
        let put_back = actix::fut::ActorFutureExt::map(work.into_actor(self), put_back);
        AtomicResponse::new(Box::pin(put_back))
    }
}

impl<S, Q, R> actix::Handler<Ask<Q, R>> for Host<S>
where
    S: Answer<Q, Reply = R>,
    Q: Send + 'static,
    R: Send + 'static,
{
    type Result = AtomicResponse<Self, Result<R, Unanswered>>;

    fn handle(&mut self, ask: Ask<Q, R>, _: &mut Context<Self>) -> Self::Result {
        let taken = self.service.take();
        let deaths = self.deaths.clone();
        let work = async move {
            let Some(mut service) = taken else { return (None, Err(Unanswered::Closed)) };
            let (question, _permit) = ask.into_parts();
            let span = tracing::info_span!("question", service = S::NAME);
            match guarded(service.answer(question)).instrument(span).await {
                Ok(reply) => (Some(service), Ok(reply)),
                Err(Fault::Retry(after)) => (Some(service), Err(Unanswered::Later(after))),
                Err(Fault::Poison(reason)) => (Some(service), Err(Unanswered::Refused(reason))),
                Err(Fault::Fatal(error)) => {
                    deaths.report(S::NAME, &format!("{error:#}"));
                    (None, Err(Unanswered::Closed))
                }
            }
        };
        let work =
            actix::fut::ActorFutureExt::map(work.into_actor(self), |(service, reply), host, context| {
                put_back(service, host, context);
                reply
            });
        AtomicResponse::new(Box::pin(work))
    }
}

/// Without its service a host ends, which gives back the permits of everything in its mailbox.
fn put_back<S: Service>(service: Option<S>, host: &mut Host<S>, context: &mut Context<Host<S>>) {
    if service.is_none() {
        actix::ActorContext::stop(context);
    }
    host.service = service;
}

/// Handles one message to its end. Gives the service back, unless it died.
async fn settle<S: Handle<M>, M: Message>(
    mut service: S,
    message: &M,
    deaths: &Deaths,
    suspects: &Suspects,
) -> Option<S> {
    let key = message.key();
    let kills = suspects.kills(S::NAME, &key);
    let mut aside = (kills >= KILLS_MAX)
        .then(|| format!("{} stopped {kills} times while it was working on this", S::NAME));
    let started = Instant::now();
    loop {
        let outcome = match &aside {
            None => guarded(service.handle(message)).await,
            Some(reason) => guarded(service.put_aside(message, reason)).await,
        };
        match outcome {
            Ok(()) => {
                suspects.clear(S::NAME, &key);
                let how = if aside.is_none() { "handled" } else { "put_aside" };
                count::<S, M>(how);
                let labels = [("service", S::NAME), ("message", M::NAME)];
                metrics::histogram!(names::MESSAGE_SECONDS, &labels).record(started.elapsed());
                return Some(service);
            }
            Err(Fault::Retry(after)) => {
                count::<S, M>("retried");
                tracing::debug!(?after, "message is handled again later");
                tokio::time::sleep(after).await;
            }
            Err(Fault::Poison(reason)) if aside.is_none() => {
                tracing::warn!(reason, "message is put aside");
                aside = Some(reason);
            }
            Err(Fault::Poison(reason)) => {
                return died::<S, M>(
                    &key,
                    &anyhow!("could not put a message aside: {reason}"),
                    deaths,
                    suspects,
                );
            }
            Err(Fault::Fatal(error)) => return died::<S, M>(&key, &error, deaths, suspects),
        }
    }
}

/// Tells the lane of the end of a service; nothing is left of it.
fn died<S: Service, M: Message>(
    key: &str,
    error: &anyhow::Error,
    deaths: &Deaths,
    suspects: &Suspects,
) -> Option<S> {
    count::<S, M>("failed");
    // Other deaths, such as a full disk or a neighbour's end, are not this message's doing.
    if error.chain().any(|cause| cause.is::<Panicked>() || is_compute_panic(cause)) {
        suspects.blame(S::NAME, key);
    }
    deaths.report(S::NAME, &format!("{error:#}"));
    None
}

fn is_compute_panic(cause: &(dyn std::error::Error + 'static)) -> bool {
    matches!(cause.downcast_ref(), Some(ComputeError::Panicked { .. }))
}

fn count<S: Service, M: Message>(outcome: &'static str) {
    let labels = [("service", S::NAME), ("message", M::NAME), ("outcome", outcome)];
    metrics::counter!(names::MESSAGES, &labels).increment(1);
}

/// A handler panicked.
#[derive(Debug, thiserror::Error)]
#[error("panicked: {0}")]
struct Panicked(String);

/// Turns a panic into a fault. Whatever it left half done is in the service, which is dropped.
async fn guarded<T>(work: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
    match AssertUnwindSafe(work).catch_unwind().await {
        Ok(outcome) => outcome,
        Err(panic) => Err(Fault::Fatal(Panicked(panic_message(&*panic)).into())),
    }
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

/// A service that runs, as the lane that builds it sees it: what other services are linked to.
pub struct Hosted<S: Service> {
    address: Addr<Host<S>>,
}

impl<S: Service> Hosted<S> {
    pub(crate) fn new(address: Addr<Host<S>>) -> Self {
        Self { address }
    }

    /// An edge to this service, over which at most `credit` messages are unsettled at any time.
    pub fn link<M: Message>(&self, credit: usize) -> Link<M>
    where
        S: Handle<M>,
    {
        Link::to_host(self.address.clone().recipient(), credit)
    }

    /// Lets this service answer what is asked at the door, from now until the next one takes over.
    pub fn answer_at<Q, R>(&self, door: &Door<Q, R>)
    where
        S: Answer<Q, Reply = R>,
        Q: Send + 'static,
        R: Send + 'static,
    {
        door.bind(self.address.clone().recipient());
    }
}
