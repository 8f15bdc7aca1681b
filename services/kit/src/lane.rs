//! Lanes: groups of services that are built together and, when one of them dies, rebuilt together.
//!
//! A dead actor stays dead, and a pipeline with a hole in it loses work. So nothing is repaired in
//! place: a lane tears all of its services down and builds them anew, and what was not settled
//! comes again from the durable thing at the lane's beginning.

use crate::host::{Host, Hosted, Suspects, panic_message};
use crate::service::Service;
use crate::telemetry::names;
use actix::{Actor, Arbiter};
use futures_util::FutureExt;
use std::any::Any;
use std::collections::VecDeque;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// A flag that ends things: async code waits for it, compute threads look at it.
#[derive(Debug, Clone)]
pub struct Stop {
    own: Arc<watch::Sender<bool>>,
    parent: Option<Arc<Stop>>,
}

impl Default for Stop {
    fn default() -> Self {
        Self { own: Arc::new(watch::Sender::new(false)), parent: None }
    }
}

impl Stop {
    /// A flag that is not set.
    pub fn new() -> Self {
        Self::default()
    }

    /// A flag that is set with this one, and can be set without it.
    pub fn child(&self) -> Self {
        Self { parent: Some(Arc::new(self.clone())), ..Self::default() }
    }

    /// Sets the flag, for good.
    pub fn set(&self) {
        self.own.send_replace(true);
    }

    /// Whether it is set.
    pub fn is_set(&self) -> bool {
        *self.own.borrow() || self.parent.as_ref().is_some_and(|parent| parent.is_set())
    }

    /// Waits until it is set.
    pub fn wait(&self) -> Pin<Box<dyn Future<Output = ()> + Send + 'static>> {
        let mut own = self.own.subscribe();
        // The sender is kept alive, since a closed channel would look like a set flag.
        let sender = Arc::clone(&self.own);
        let parent = self.parent.as_ref().map(|parent| parent.wait());
        Box::pin(async move {
            let own = own.wait_for(|set| *set);
            match parent {
                None => drop(own.await),
                Some(parent) => tokio::select! { _ = own => (), () = parent => () },
            }
            drop(sender);
        })
    }
}

/// How patient a lane is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Wait before the first restart; it doubles with each further one.
    pub delay_min: Duration,
    /// The longest wait.
    pub delay_max: Duration,
    /// Restarts within `window` before the lane gives up.
    pub restarts_max: usize,
    /// See `restarts_max`; a lane that lived this long starts again from the shortest wait.
    pub window: Duration,
    /// How long the threads of dead services may take to end.
    pub tear_down_max: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            delay_min: Duration::from_millis(100),
            delay_max: Duration::from_secs(30),
            restarts_max: 5,
            window: Duration::from_secs(60),
            tear_down_max: Duration::from_secs(20),
        }
    }
}

/// How a lane ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LaneOutcome {
    /// It was told to stop.
    Stopped,
    /// It died too often, or cannot be torn down. What follows is for whoever runs it to say.
    Degraded {
        /// What its last death was.
        reason: String,
    },
}

/// The end of a service, and with it of its crew.
#[derive(Debug)]
struct Death {
    service: &'static str,
    reason: String,
}

/// Where a crew's members report their deaths.
#[derive(Debug, Clone)]
pub(crate) struct Deaths(mpsc::UnboundedSender<Death>);

impl Deaths {
    pub(crate) fn report(&self, service: &'static str, reason: &str) {
        // Nobody listens to a crew that is being torn down already.
        let _ = self.0.send(Death { service, reason: reason.to_owned() });
    }
}

/// One incarnation of a lane's services. The lane's factory builds them into it, last first, since
/// each needs the links to what comes after it.
pub struct Crew {
    stop: Stop,
    deaths: Deaths,
    suspects: Arc<Suspects>,
    members: Vec<Member>,
}

struct Member {
    name: &'static str,
    arbiter: Arbiter,
    /// An actor ends when its last address is dropped, and a service may have no link to it.
    _address: Option<Box<dyn Any + Send>>,
}

impl Crew {
    /// Starts a service on a thread of its own.
    pub fn host<S: Service>(&mut self, service: S) -> Hosted<S> {
        let arbiter = Arbiter::new();
        let host = Host::new(service, self.deaths.clone(), Arc::clone(&self.suspects));
        let address = Host::start_in_arbiter(&arbiter.handle(), move |_| host);
        self.members.push(Member { name: S::NAME, arbiter, _address: Some(Box::new(address.clone())) });
        Hosted::new(address)
    }

    /// Starts what has a life of its own, such as the feeder at a lane's beginning, on a thread of
    /// its own. Its error, or a panic, is the death of the crew; its end without one is not.
    pub fn source<F>(&mut self, name: &'static str, work: impl FnOnce() -> F + Send + 'static)
    where
        F: Future<Output = anyhow::Result<()>> + 'static,
    {
        let arbiter = Arbiter::new();
        let deaths = self.deaths.clone();
        arbiter.spawn_fn(move || {
            let work = AssertUnwindSafe(async move { work().await }).catch_unwind();
            actix::spawn(work.map(move |outcome| match outcome {
                Ok(Ok(())) => (),
                Ok(Err(error)) => deaths.report(name, &format!("{error:#}")),
                Err(panic) => deaths.report(name, &format!("panicked: {}", panic_message(&*panic))),
            }));
        });
        self.members.push(Member { name, arbiter, _address: None });
    }

    /// Set when this crew is being torn down, be it for a death or for the end of everything.
    pub fn stop(&self) -> &Stop {
        &self.stop
    }

    /// Ends all members. False when a thread of theirs does not end in time.
    async fn tear_down(self, limit: Duration) -> bool {
        self.stop.set();
        // What was built last comes first in the pipeline: nothing new flows in while the rest ends.
        for member in self.members.iter().rev() {
            member.arbiter.stop();
        }
        let names: Vec<_> = self.members.iter().map(|member| member.name).collect();
        let join = tokio::task::spawn_blocking(move || {
            for member in self.members {
                // The thread's own panic was reported by whoever died of it.
                let _ = member.arbiter.join();
            }
        });
        let ended = tokio::time::timeout(limit, join).await.is_ok();
        if !ended {
            tracing::error!(?names, ?limit, "a thread of these services does not end");
        }
        ended
    }
}

/// Runs lanes.
pub struct Lane;

impl Lane {
    /// Builds the lane's services with `factory`, and again after each death, until `stop` is set
    /// or the policy's patience ends. Runs within an actix system.
    pub async fn run(
        name: &'static str,
        policy: Policy,
        mut factory: impl AsyncFnMut(&mut Crew) -> anyhow::Result<()>,
        stop: Stop,
    ) -> LaneOutcome {
        let suspects = Arc::new(Suspects::default());
        let mut restarts: VecDeque<Instant> = VecDeque::new();
        let mut delay = policy.delay_min;
        while !stop.is_set() {
            let born = Instant::now();
            let death = match live(&policy, &mut factory, &stop, &suspects).await {
                Life::Stopped => break,
                Life::Died(death) => death,
                Life::Stuck(reason) => return LaneOutcome::Degraded { reason },
            };
            let reason = format!("{}: {}", death.service, death.reason);
            if born.elapsed() >= policy.window {
                delay = policy.delay_min;
            }
            restarts.retain(|at| at.elapsed() < policy.window);
            if restarts.len() >= policy.restarts_max {
                tracing::error!(lane = name, reason, "lane died too often and is given up");
                return LaneOutcome::Degraded { reason };
            }
            restarts.push_back(Instant::now());
            metrics::counter!(names::LANE_RESTARTS, "lane" => name).increment(1);
            tracing::warn!(lane = name, reason, ?delay, "lane died and is built anew");
            tokio::select! { () = tokio::time::sleep(delay) => (), () = stop.wait() => () }
            delay = policy.delay_max.min(delay * 2);
        }
        LaneOutcome::Stopped
    }
}

enum Life {
    Stopped,
    Died(Death),
    Stuck(String),
}

/// From the building of a crew to the end of its last thread.
async fn live(
    policy: &Policy,
    factory: &mut impl AsyncFnMut(&mut Crew) -> anyhow::Result<()>,
    stop: &Stop,
    suspects: &Arc<Suspects>,
) -> Life {
    let (sender, mut died) = mpsc::unbounded_channel();
    let (deaths, suspects) = (Deaths(sender), Arc::clone(suspects));
    let mut crew = Crew { stop: stop.child(), deaths, suspects, members: Vec::new() };
    let build = AssertUnwindSafe(factory(&mut crew)).catch_unwind();
    let built = tokio::select! { built = build => Some(built), () = stop.wait() => None };
    let failed = |reason| Some(Death { service: "factory", reason });
    let death = match built {
        None => None,
        Some(Err(panic)) => failed(format!("panicked: {}", panic_message(&*panic))),
        Some(Ok(Err(error))) => failed(format!("{error:#}")),
        Some(Ok(Ok(()))) => tokio::select! { death = died.recv() => death, () = stop.wait() => None },
    };
    drop(died);
    if !crew.tear_down(policy.tear_down_max).await {
        let cause = death.map_or_else(String::new, |death| format!(" after {}", death.reason));
        return Life::Stuck(format!("a thread did not end{cause}"));
    }
    death.map_or(Life::Stopped, Life::Died)
}

#[cfg(test)]
mod tests;
