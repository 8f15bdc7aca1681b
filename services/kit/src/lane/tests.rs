//! Pipelines of small services, with exact counts of what was handled.

use super::*;
use crate::compute::Compute;
use crate::link::{Door, Link, Unanswered};
use crate::service::{Answer, Fault, Handle, Message};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Note(u64);

impl Message for Note {
    const NAME: &'static str = "note";
    fn key(&self) -> String {
        self.0.to_string()
    }
}

const NOTES: u64 = 200;
const CREDIT: usize = 4;

/// The durable things at both ends of the lane, and what is to go wrong in between.
#[derive(Default)]
struct World {
    settled: Mutex<BTreeMap<u64, &'static str>>,
    order: Mutex<Vec<u64>>,
    aside: Mutex<Vec<(u64, &'static str, String)>>,
    /// Times left that a service, by its place, dies of a note.
    deadly: Mutex<BTreeMap<(usize, u64), u32>>,
    crews: AtomicUsize,
}

impl World {
    fn with_deaths(deaths: &[(usize, u64, u32)]) -> Arc<Self> {
        let deadly = deaths.iter().map(|(place, note, times)| ((*place, *note), *times)).collect();
        Arc::new(Self { deadly: Mutex::new(deadly), ..Self::default() })
    }

    fn strike(&self, place: usize, note: u64) -> bool {
        let mut deadly = self.deadly.lock().expect("not poisoned");
        let Some(left) = deadly.get_mut(&(place, note)).filter(|left| **left > 0) else { return false };
        *left -= 1;
        true
    }

    /// As the ledger does it: what is settled already is left as it is.
    fn settle(&self, note: u64, how: &'static str) {
        let mut settled = self.settled.lock().expect("not poisoned");
        if settled.insert(note, how).is_none() {
            self.order.lock().expect("not poisoned").push(note);
        }
    }

    fn is_done(&self) -> bool {
        self.settled.lock().expect("not poisoned").len() as u64 == NOTES
    }

    fn crews(&self) -> usize {
        self.crews.load(Ordering::SeqCst)
    }
}

/// Hands notes on; the last one settles them.
struct Relay<const PLACE: usize> {
    world: Arc<World>,
    next: Option<Link<Note>>,
    done: Stop,
}

impl<const PLACE: usize> Service for Relay<PLACE> {
    const NAME: &'static str = ["first", "second", "third"][PLACE];
}

impl<const PLACE: usize> Handle<Note> for Relay<PLACE> {
    async fn handle(&mut self, note: &Note) -> Result<(), Fault> {
        assert!(!self.world.strike(PLACE, note.0), "injected");
        self.pass_on(*note).await
    }

    async fn put_aside(&mut self, note: &Note, reason: &str) -> Result<(), Fault> {
        self.world.aside.lock().expect("not poisoned").push((note.0, Self::NAME, reason.to_owned()));
        self.pass_on(*note).await
    }
}

impl<const PLACE: usize> Relay<PLACE> {
    async fn pass_on(&self, note: Note) -> Result<(), Fault> {
        if let Some(next) = &self.next {
            return Ok(next.send(note).await?);
        }
        self.world.settle(note.0, Self::NAME);
        if self.world.is_done() {
            self.done.set();
        }
        Ok(())
    }
}

/// Feeds what is not settled, in order, as the feeder of a ledger would.
fn feed(crew: &mut Crew, world: &Arc<World>, next: Link<Note>) {
    world.crews.fetch_add(1, Ordering::SeqCst);
    let settled: Vec<u64> = world.settled.lock().expect("not poisoned").keys().copied().collect();
    crew.source("feeder", move || async move {
        for note in (1..=NOTES).filter(|note| !settled.contains(note)) {
            next.send(Note(note)).await?;
        }
        Ok(())
    });
}

fn policy() -> Policy {
    Policy { delay_min: Duration::from_millis(1), ..Policy::default() }
}

async fn run_pipeline(world: &Arc<World>) -> LaneOutcome {
    let stop = Stop::new();
    let factory = async |crew: &mut Crew| {
        let world = || Arc::clone(world);
        let third = crew.host(Relay::<2> { world: world(), next: None, done: stop.clone() });
        let next = Some(third.link(CREDIT));
        let second = crew.host(Relay::<1> { world: world(), next, done: stop.clone() });
        let next = Some(second.link(CREDIT));
        let first = crew.host(Relay::<0> { world: world(), next, done: stop.clone() });
        feed(crew, &world(), first.link(CREDIT));
        Ok(())
    };
    within(Lane::run("test", policy(), factory, stop.clone())).await
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), work).await.expect("it came to an end")
}

#[actix::test]
async fn three_panics_in_three_services_lose_nothing_and_count_nothing_twice() {
    let world = World::with_deaths(&[(0, 20, 1), (1, 90, 1), (2, 150, 1)]);
    assert_eq!(run_pipeline(&world).await, LaneOutcome::Stopped);
    assert_eq!(*world.order.lock().expect("not poisoned"), (1..=NOTES).collect::<Vec<_>>());
    assert_eq!(world.crews(), 4);
    assert!(world.aside.lock().expect("not poisoned").is_empty());
}

#[actix::test]
async fn a_message_that_kills_a_service_twice_is_put_aside_with_the_reason() {
    let world = World::with_deaths(&[(1, 7, u32::MAX)]);
    assert_eq!(run_pipeline(&world).await, LaneOutcome::Stopped);
    let aside = world.aside.lock().expect("not poisoned").clone();
    let reason = "second stopped 2 times while it was working on this".to_owned();
    assert_eq!(aside, [(7, "second", reason)]);
    assert_eq!(world.crews(), 3);
    assert_eq!(world.order.lock().expect("not poisoned").len() as u64, NOTES);
}

#[actix::test]
async fn a_lane_that_dies_again_and_again_gives_up() {
    let builds = AtomicUsize::new(0);
    let factory = async |crew: &mut Crew| {
        builds.fetch_add(1, Ordering::SeqCst);
        crew.source("feeder", || async { anyhow::bail!("no disk") });
        Ok(())
    };
    let outcome = within(Lane::run("test", policy(), factory, Stop::new())).await;
    assert_eq!(outcome, LaneOutcome::Degraded { reason: "feeder: no disk".into() });
    assert_eq!(builds.load(Ordering::SeqCst), 1 + policy().restarts_max);
}

#[actix::test]
async fn a_factory_that_panics_is_a_death_like_any_other() {
    let factory = async |_: &mut Crew| panic!("no model");
    let policy = Policy { restarts_max: 1, ..policy() };
    let outcome = within(Lane::run("test", policy, factory, Stop::new())).await;
    assert_eq!(outcome, LaneOutcome::Degraded { reason: "factory: panicked: no model".into() });
}

/// Holds every note until it is let go.
struct Slow {
    gate: Arc<tokio::sync::Semaphore>,
    settled: Arc<AtomicUsize>,
}

impl Service for Slow {
    const NAME: &'static str = "slow";
}

impl Handle<Note> for Slow {
    async fn handle(&mut self, _: &Note) -> Result<(), Fault> {
        self.gate.acquire().await?.forget();
        self.settled.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    async fn put_aside(&mut self, _: &Note, _: &str) -> Result<(), Fault> {
        Ok(())
    }
}

#[actix::test]
async fn never_more_messages_are_in_flight_than_there_are_credits() {
    let (gate, settled) = (Arc::new(tokio::sync::Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
    let (sent, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let stop = Stop::new();
    let factory = async |crew: &mut Crew| {
        let slow = crew.host(Slow { gate: Arc::clone(&gate), settled: Arc::clone(&settled) });
        let link = slow.link(CREDIT);
        let (sent, most, settled) = (Arc::clone(&sent), Arc::clone(&most), Arc::clone(&settled));
        crew.source("feeder", move || async move {
            for note in 1..=NOTES {
                link.send(Note(note)).await?;
                let in_flight = sent.fetch_add(1, Ordering::SeqCst) + 1 - settled.load(Ordering::SeqCst);
                most.fetch_max(in_flight.max(link.in_flight()), Ordering::SeqCst);
            }
            Ok(())
        });
        Ok(())
    };
    let watch = async {
        // A receiver that settles nothing gets as much as there is credit for, and no more.
        until(|| sent.load(Ordering::SeqCst) == CREDIT).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(sent.load(Ordering::SeqCst), CREDIT);
        gate.add_permits(NOTES as usize);
        until(|| settled.load(Ordering::SeqCst) as u64 == NOTES).await;
        stop.set();
    };
    let lane = Lane::run("test", policy(), factory, stop.clone());
    let (outcome, ()) = within(async { tokio::join!(lane, watch) }).await;
    assert_eq!(outcome, LaneOutcome::Stopped);
    assert_eq!(most.load(Ordering::SeqCst), CREDIT);
}

async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Does its work on a compute thread, which a note may bring down.
struct Worker {
    compute: Compute<u64>,
    relay: Relay<0>,
}

impl Service for Worker {
    const NAME: &'static str = "worker";
}

impl Handle<Note> for Worker {
    async fn handle(&mut self, note: &Note) -> Result<(), Fault> {
        let (world, note) = (Arc::clone(&self.relay.world), *note);
        let job = move |sum: &mut u64| {
            assert!(!world.strike(0, note.0), "injected");
            *sum += note.0;
        };
        self.compute.run(job).await?;
        self.relay.pass_on(note).await
    }

    async fn put_aside(&mut self, note: &Note, reason: &str) -> Result<(), Fault> {
        self.relay.put_aside(note, reason).await
    }
}

async fn run_worker(world: &Arc<World>) -> LaneOutcome {
    let stop = Stop::new();
    let factory = async |crew: &mut Crew| {
        let compute = Compute::start("sum", || Ok(0)).await?;
        let relay = Relay { world: Arc::clone(world), next: None, done: stop.clone() };
        let worker = crew.host(Worker { compute, relay });
        feed(crew, world, worker.link(CREDIT));
        Ok(())
    };
    within(Lane::run("test", policy(), factory, stop.clone())).await
}

#[actix::test]
async fn a_dead_compute_thread_rebuilds_the_lane() {
    let world = World::with_deaths(&[(0, 50, 1)]);
    assert_eq!(run_worker(&world).await, LaneOutcome::Stopped);
    assert_eq!(world.crews(), 2);
    assert_eq!(*world.order.lock().expect("not poisoned"), (1..=NOTES).collect::<Vec<_>>());
}

#[actix::test]
async fn a_message_that_kills_the_compute_thread_twice_is_put_aside() {
    let world = World::with_deaths(&[(0, 50, u32::MAX)]);
    assert_eq!(run_worker(&world).await, LaneOutcome::Stopped);
    assert_eq!(world.crews(), 3);
    let aside: Vec<u64> = world.aside.lock().expect("not poisoned").iter().map(|(note, ..)| *note).collect();
    assert_eq!(aside, [50]);
}

/// Refuses some, delays some, and keeps the order of all.
struct Moody {
    world: Arc<World>,
    done: Stop,
}

impl Service for Moody {
    const NAME: &'static str = "moody";
}

impl Handle<Note> for Moody {
    async fn handle(&mut self, note: &Note) -> Result<(), Fault> {
        if self.world.strike(0, note.0) {
            return Err(Fault::Retry(Duration::from_millis(5)));
        }
        if note.0.is_multiple_of(10) {
            return Err(Fault::Poison("round".into()));
        }
        self.settle(note, "handled")
    }

    async fn put_aside(&mut self, note: &Note, reason: &str) -> Result<(), Fault> {
        assert_eq!(reason, "round");
        self.settle(note, "aside")
    }
}

impl Moody {
    fn settle(&self, note: &Note, how: &'static str) -> Result<(), Fault> {
        self.world.settle(note.0, how);
        if self.world.is_done() {
            self.done.set();
        }
        Ok(())
    }
}

#[actix::test]
async fn retries_keep_the_order_and_poison_is_put_aside() {
    let world = World::with_deaths(&[(0, 3, 2), (0, 40, 1)]);
    let stop = Stop::new();
    let factory = async |crew: &mut Crew| {
        let moody = crew.host(Moody { world: Arc::clone(&world), done: stop.clone() });
        feed(crew, &world, moody.link(CREDIT));
        Ok(())
    };
    within(Lane::run("test", policy(), factory, stop.clone())).await;
    assert_eq!(*world.order.lock().expect("not poisoned"), (1..=NOTES).collect::<Vec<_>>());
    assert_eq!(world.crews(), 1);
    let settled = world.settled.lock().expect("not poisoned").clone();
    assert_eq!(settled.values().filter(|how| **how == "aside").count() as u64, NOTES / 10);
}

/// Doubles numbers, and dies of 13.
struct Doubler;

impl Service for Doubler {
    const NAME: &'static str = "doubler";
}

impl Answer<u64> for Doubler {
    type Reply = u64;

    async fn answer(&mut self, question: u64) -> Result<u64, Fault> {
        match question {
            13 => panic!("injected"),
            0 => Err(Fault::Poison("nothing to double".into())),
            _ => Ok(question * 2),
        }
    }
}

#[actix::test]
async fn a_door_outlives_the_service_behind_it() {
    let (door, stop) = (Door::new(2), Stop::new());
    assert_eq!(door.ask(1).await, Err(Unanswered::Closed));
    let factory = async |crew: &mut Crew| {
        crew.host(Doubler).answer_at(&door);
        Ok(())
    };
    let asker = async {
        let patiently = async |question| loop {
            match door.ask(question).await {
                Err(Unanswered::Closed) => tokio::time::sleep(Duration::from_millis(1)).await,
                answer => return answer,
            }
        };
        assert_eq!(patiently(21).await, Ok(42));
        assert_eq!(door.ask(0).await, Err(Unanswered::Refused("nothing to double".into())));
        assert_eq!(door.ask(13).await, Err(Unanswered::Closed));
        assert_eq!(patiently(4).await, Ok(8));
        assert_eq!(door.permits(), 2);
        stop.set();
    };
    let lane = Lane::run("test", policy(), factory, stop.clone());
    let (outcome, ()) = within(async { tokio::join!(lane, asker) }).await;
    assert_eq!(outcome, LaneOutcome::Stopped);
}

#[actix::test]
async fn a_stop_reaches_its_children_and_not_its_parent() {
    let parent = Stop::new();
    let child = parent.child();
    let waiting = child.child();
    child.set();
    within(waiting.wait()).await;
    assert!(waiting.is_set() && !parent.is_set());
    let other = parent.child();
    parent.set();
    within(other.wait()).await;
    assert!(other.is_set());
}
