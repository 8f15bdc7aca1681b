//! Killed at any moment, it comes back with everything that it acknowledged.

use crate::harness::{Server, Setup, long, sentence};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(180);
/// What a new worker may take beyond loading its model.
const RESTART_MAX: Duration = Duration::from_secs(2);
const READY_MAX: Duration = Duration::from_secs(30);

/// Every place where a kill could tear something apart.
const FAIL_POINTS: [&str; 8] = [
    "ingest::handle",
    "filter::handle",
    "replay::handle",
    "train::handle",
    "train::learned",
    "consolidate::handle",
    "checkpoint::handle",
    "checkpoint::committed",
];

/// Kills are what these tests are about: so many must not make it stop learning.
fn setup() -> Setup {
    Setup::tiny().set("supervisor.restarts_max=1000").set("supervisor.restart_delay_ms_max=200")
}

fn documents(numbers: std::ops::Range<usize>) -> Vec<Value> {
    numbers.map(|number| json!({"text": sentence(number), "domain": "kept"})).collect()
}

/// Each acknowledged document is settled, and those that were learned are counted once each.
fn check(server: &Server, acknowledged: &[String]) {
    let settled = server.settle(acknowledged, PATIENCE);
    let learned = settled.iter().filter(|document| document["status"] == "live").count();
    let unsettled = |document: &&Value| {
        !["live", "probe", "refused"].contains(&document["status"].as_str().unwrap_or(""))
    };
    assert_eq!(settled.iter().find(unsettled), None);
    let distinct: BTreeSet<&String> = acknowledged.iter().collect();
    assert_eq!(distinct.len(), acknowledged.len(), "the test acknowledged an id twice");
    assert_eq!(server.learned("kept"), learned as u64, "each counts once");
    let answer = server.complete("kept", "A miller", 8);
    assert!(!answer.is_empty(), "weights that are not finite answer nothing");
}

#[test]
fn a_killed_worker_is_ready_again_within_two_seconds_and_its_load_time() {
    let mut server = setup().start();
    assert!(server.kill_worker());
    let load = server.wait_ready(READY_MAX);
    for _ in 0..3 {
        let worker = server.worker_id();
        assert!(server.kill_worker());
        let took = server.wait_new_worker(worker, READY_MAX);
        assert!(took < RESTART_MAX + load, "{took:?} with a load time of {load:?}");
    }
}

#[test]
fn a_kill_at_any_fail_point_loses_and_repeats_nothing() {
    for point in FAIL_POINTS {
        let server = setup().die_at(point).start();
        let acknowledged = server.submit(&documents(0..12));
        check(&server, &acknowledged);
        assert!(server.died(), "it never came to {point}");
    }
}

/// Clients keep submitting while the worker is killed `kills` times, at moments that the seed
/// chooses. The oracle is the list of ids that were answered with 202.
fn kills_under_load(kills: usize, seed: u64) {
    let mut server = setup().start();
    let (acknowledged, next) = (Mutex::new(Vec::new()), AtomicUsize::new(0));
    let over = AtomicBool::new(false);
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let first = next.fetch_add(3, Ordering::Relaxed);
                    let ids = server.submit(&documents(first..first + 3));
                    acknowledged.lock().expect("not poisoned").extend(ids);
                    thread::sleep(Duration::from_millis(300));
                }
            });
        }
        for _ in 0..kills {
            thread::sleep(Duration::from_millis(random.random_range(50..2500)));
            server.kill_worker();
        }
        over.store(true, Ordering::Relaxed);
    });
    server.wait_ready(READY_MAX);
    let acknowledged = acknowledged.into_inner().expect("not poisoned");
    eprintln!("{} documents acknowledged under {kills} kills", acknowledged.len());
    assert!(acknowledged.len() >= kills, "hardly any load");
    check(&server, &acknowledged);
}

#[test]
fn kills_at_random_moments_under_load_lose_and_repeat_nothing() {
    kills_under_load(if long() { 50 } else { 12 }, 42);
}

/// The generations that 60 documents become in several batches. With `killed`, the worker dies in
/// the middle of the first batch, and again after each of the first generations.
fn generations(killed: bool) -> Vec<String> {
    let setup = setup().set("base.precision=f32").set("replay.batch_examples=12");
    let setup = if killed { setup.die_at("train::learned") } else { setup };
    let mut server = setup.start();
    let ids = server.submit(&documents(0..60));
    for number in [0, 12, 24].into_iter().filter(|_| killed) {
        server.settle(&ids[number..=number], PATIENCE);
        server.kill_worker();
        server.wait_ready(READY_MAX);
    }
    server.settle(&ids, PATIENCE);
    assert_eq!(server.died(), killed);
    server.generations("kept")
}

#[test]
fn a_killed_run_ends_with_the_same_adapters_as_one_that_was_not() {
    let whole = generations(false);
    assert!(whole.len() >= 4, "{whole:?}");
    assert_eq!(whole, generations(true));
}

#[test]
fn a_signal_to_end_under_load_is_answered_by_a_clean_end_twice() {
    let mut server = setup().start();
    let mut acknowledged = Vec::new();
    for round in 0..2 {
        acknowledged.extend(server.submit(&documents(round * 30..round * 30 + 30)));
        thread::sleep(Duration::from_millis(700));
        server.signal(Signal::TERM);
        server.signal(Signal::TERM);
        let status = server.wait_end(Duration::from_secs(25));
        assert!(status.success(), "{status}");
        server.start();
    }
    check(&server, &acknowledged);
}

#[test]
fn the_worker_of_a_killed_supervisor_ends_and_the_folder_is_free_again() {
    let mut server = setup().start();
    let acknowledged = server.submit(&documents(0..6));
    server.signal(Signal::KILL);
    server.wait_end(Duration::from_secs(5));
    server.start();
    check(&server, &acknowledged);
}
