//! Asking a teacher for many answers: how fast, how many at a time, and how often again.
//!
//! This runs on a thread of its own. What comes of each request is told to whoever judges and submits
//! answers, who may wait for the server meanwhile.

use super::cost::{Budget, Usage};
use super::filter::Rejected;
use super::inputs::Unit;
use super::teacher::{Answer, Failure, Hitch, Passing, Teacher};
use anyhow::Result;
use futures_util::{StreamExt, stream};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

/// The wait before the first repetition; it doubles with each.
const PAUSE: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// A teacher that wants to be left alone for longer is asked again all the same.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(600);

/// After so many units in a row without an answer the others are not asked for either.
const GIVEN_UP_MAX: u32 = 3;

/// What came of a request.
#[derive(Debug)]
pub enum Event {
    /// An answer to the unit with this index.
    Answered(usize, Answer),
    /// None; the unit is asked again.
    Again(Passing, Usage),
    /// None, and that was the last try.
    GaveUp(usize, Hitch, Usage),
    /// The next request could cost more than is left.
    OverBudget,
    /// No request will be answered.
    Final(anyhow::Error),
    /// Nothing is under way any more.
    Asked,
    /// The server has the pairs of the unit with this index, or will not have them.
    HandedOn(usize, Result<Rejected>),
}

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Order {
    /// As long as there is something to ask.
    GoOn,
    /// What is under way is finished, and nothing else begun.
    Finish,
    /// What is under way is left.
    Leave,
}

/// How to ask.
pub struct Asking {
    /// Who is asked.
    pub teacher: Teacher,
    /// What it may cost.
    pub budget: Budget,
    /// Requests at a time.
    pub parallel: usize,
    /// Repetitions of a request.
    pub retries: u32,
    /// Requests are let through at this pace.
    pub pace: Option<DefaultDirectRateLimiter>,
    /// Until then the teacher is left alone.
    pub quiet_until: Mutex<Instant>,
    /// Units in a row without an answer.
    pub given_up: AtomicU32,
    /// Whether to go on.
    pub order: watch::Sender<Order>,
    /// The answer to each unit is one request.
    pub units: Arc<[Unit]>,
}

/// At most so many requests a minute, one after the other: without bursts.
pub fn pace(requests_per_minute: NonZeroU32) -> DefaultDirectRateLimiter {
    RateLimiter::direct(Quota::per_minute(requests_per_minute).allow_burst(NonZeroU32::MIN))
}

impl Asking {
    /// Asks for the units with these indices, and tells what comes of each.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn start(self: &Arc<Self>, wanted: Vec<usize>, told: mpsc::Sender<Event>) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let asking = Arc::clone(self);
        thread::Builder::new().name("teacher".into()).spawn(move || {
            runtime.block_on(async {
                let each = stream::iter(wanted).map(|index| asking.unit(index, &told));
                let all = each.buffer_unordered(asking.parallel).for_each(|()| async {});
                tokio::select! {
                    () = all => {}
                    () = asking.ordered(Order::Leave) => {}
                    // Nobody wants the answers any more.
                    () = told.closed() => {}
                }
                let _ = told.send(Event::Asked).await;
            });
        })?;
        Ok(())
    }

    /// Orders no less than this.
    pub fn order(&self, order: Order) {
        self.order.send_modify(|old| *old = order.max(*old));
    }

    async fn ordered(&self, order: Order) {
        // The sender lives as long as this, so there is always a next value to wait for.
        let _ = self.order.subscribe().wait_for(|now| *now >= order).await;
    }

    async fn unit(&self, index: usize, told: &mpsc::Sender<Event>) {
        let request = &self.units[index].request;
        for attempt in 0..=self.retries {
            let most = self.teacher.most(request);
            match self.unless_stopped(self.turn(most)).await {
                Some(true) => {}
                Some(false) => {
                    self.order(Order::Finish);
                    // Nobody is left to be told when this cannot be.
                    let _ = told.send(Event::OverBudget).await;
                    return;
                }
                None => return,
            }
            let answer = self.teacher.ask(request).await;
            self.budget.settle(most, used(&answer));
            let last = attempt == self.retries;
            // Here, since others begin before whoever is told can order anything.
            let event = match answer {
                Ok(answer) => {
                    self.given_up.store(0, Ordering::Relaxed);
                    Event::Answered(index, answer)
                }
                Err(Failure::Final(error)) => {
                    self.order(Order::Finish);
                    Event::Final(error)
                }
                Err(Failure::Again { hitch, usage }) if last => {
                    if self.given_up.fetch_add(1, Ordering::Relaxed) + 1 == GIVEN_UP_MAX {
                        self.order(Order::Finish);
                    }
                    Event::GaveUp(index, hitch, usage)
                }
                Err(Failure::Again { hitch: Hitch { reason, after, .. }, usage }) => {
                    if told.send(Event::Again(reason, usage)).await.is_err() {
                        return;
                    }
                    let pause = after.map_or_else(|| backoff(attempt), |after| after.min(RETRY_AFTER_MAX));
                    if after.is_some() {
                        self.leave_alone(pause);
                    }
                    match self.unless_stopped(sleep(pause)).await {
                        Some(()) => continue,
                        None => return,
                    }
                }
            };
            let _ = told.send(event).await;
            return;
        }
    }

    /// Waits until a request may be sent; not, when there is too little left for it.
    async fn turn(&self, most: Usage) -> bool {
        if let Some(pace) = &self.pace {
            pace.until_ready().await;
        }
        // It may be moved on meanwhile.
        while Instant::now() < self.quiet_until() {
            sleep_until(self.quiet_until()).await;
        }
        self.budget.reserve(most).await
    }

    /// What a teacher says to one request holds for all of them.
    fn leave_alone(&self, pause: Duration) {
        let mut until = self.quiet_until.lock().unwrap_or_else(PoisonError::into_inner);
        *until = (*until).max(Instant::now() + pause);
    }

    fn quiet_until(&self) -> Instant {
        *self.quiet_until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What comes of some work; nothing, when all is to stop.
    async fn unless_stopped<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.ordered(Order::Finish) => None,
            done = work => Some(done),
        }
    }
}

fn used(answer: &Result<Answer, Failure>) -> Usage {
    match answer {
        Ok(answer) => answer.usage,
        Err(Failure::Again { usage, .. }) => *usage,
        Err(Failure::Final(_)) => Usage::default(),
    }
}

/// Doubles with each attempt, less a random part of up to one half, so that requests that failed
/// together do not come back together.
fn backoff(attempt: u32) -> Duration {
    let longest = PAUSE.saturating_mul(1 << attempt.min(20)).min(PAUSE_MAX);
    // The standard library's only randomness.
    let random = RandomState::new().hash_one(attempt) as f64 / u64::MAX as f64;
    longest.mul_f64(1.0 - random / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_differ_and_have_an_end() {
        for attempt in 0..40 {
            let longest = PAUSE.saturating_mul(1 << attempt.min(20)).min(PAUSE_MAX);
            let pause = backoff(attempt);
            assert!(pause <= longest && pause >= longest / 2, "{attempt}: {pause:?}");
        }
        let pauses: std::collections::BTreeSet<Duration> = (0..20).map(|_| backoff(3)).collect();
        assert!(pauses.len() > 10, "{pauses:?}");
    }

    #[tokio::test]
    async fn requests_come_one_after_the_other() {
        let pace = pace(NonZeroU32::new(600).expect("not zero"));
        let start = std::time::Instant::now();
        for _ in 0..4 {
            pace.until_ready().await;
        }
        assert!(start.elapsed() >= Duration::from_millis(290), "{:?}", start.elapsed());
    }
}
