//! The worker process, kept alive.

use crate::lifeline::Orders;
use anyhow::{Context, Result};
use kit::settings;
use std::collections::VecDeque;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin, Command};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time;

/// Variables that libtorch reads when it is loaded, which is before any of our code runs.
///
/// Waiting threads that spin would take the cores from answering.
const ENVIRONMENT: &[(&str, &str)] = &[("OMP_WAIT_POLICY", "PASSIVE"), ("GOMP_SPINCOUNT", "0")];

/// Runs the worker until a signal asks for the end, and starts it again whenever it dies.
///
/// # Errors
/// When the worker cannot be started at all.
pub async fn keep_alive(mut orders: Orders) -> Result<()> {
    let mut signals = Signals::new()?;
    let mut restarts = Restarts::new(&orders.settings.supervisor);
    loop {
        let started = Instant::now();
        let mut worker = Worker::start(&orders).await?;
        let status = tokio::select! {
            status = worker.child.wait() => status.context("the worker cannot be watched")?,
            _ = signals.next() => return worker.finish(&mut signals, orders.grace()).await,
        };
        let delay = restarts.died(started, Instant::now());
        if restarts.too_many() && !orders.degraded {
            tracing::error!(
                "the worker dies too often: it goes on without learning, until engram is started anew"
            );
            orders.degraded = true;
        }
        tracing::warn!(%status, restart_in_ms = delay.as_millis() as u64, "the worker died");
        tokio::select! {
            () = time::sleep(delay) => {}
            _ = signals.next() => return Ok(()),
        }
    }
}

/// The variables of a worker that computes with `threads` threads, or as many as libtorch likes where that is 0.
/// A variable that the user has set stays as it is.
fn environment(threads: usize) -> Vec<(&'static str, String)> {
    let fixed = ENVIRONMENT.iter().map(|(name, value)| (*name, (*value).to_owned()));
    let threads = (threads > 0).then(|| threads.to_string());
    let counts = threads.into_iter().flat_map(|n| [("OMP_NUM_THREADS", n.clone()), ("MKL_NUM_THREADS", n)]);
    // On a Mac, memory that is shared with the screen must not run out.
    let marks = model::mps::WATERMARKS.iter().filter(|_| cfg!(target_os = "macos"));
    fixed.chain(counts).chain(marks.map(|(name, value)| (*name, (*value).to_owned()))).collect()
}

/// Goes on with the variables of a worker: starts this program anew in its own place, with the same arguments, unless they are set.
/// So what measures or does the work of a worker has the threads of one.
///
/// # Errors
/// When it cannot be started.
pub fn become_like_a_worker() -> Result<()> {
    let mut missing = environment(0);
    missing.retain(|(name, _)| std::env::var_os(name).is_none());
    if missing.is_empty() {
        return Ok(());
    }
    let program = std::env::current_exe().context("this program cannot find itself")?;
    let mut command = std::process::Command::new(program);
    Err(command.args(std::env::args_os().skip(1)).envs(missing).exec())
        .context("this program cannot be started anew")
}

struct Worker {
    child: Child,
    lifeline: ChildStdin,
}

impl Worker {
    async fn start(orders: &Orders) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe().context("this program cannot find itself")?);
        for (name, value) in environment(orders.settings.base.threads) {
            if std::env::var_os(name).is_none() {
                command.env(name, value);
            }
        }
        // In a group of its own, so that Ctrl-C reaches the supervisor alone, which then ends it in order.
        command.arg("worker").stdin(Stdio::piped()).process_group(0).kill_on_drop(true);
        let mut child = command.spawn().context("the worker cannot be started")?;
        let mut lifeline = child.stdin.take().context("the worker has no standard input")?;
        // A worker that died already is found by whoever waits for it, so this may fail quietly.
        let _ = lifeline.write_all(&orders.line()?).await;
        tracing::info!(pid = child.id(), degraded = orders.degraded, "the worker is started");
        Ok(Self { child, lifeline })
    }

    /// Lets the worker finish what runs; after `grace`, or at a Ctrl-C while it does, it is killed.
    async fn finish(mut self, signals: &mut Signals, grace: Duration) -> Result<()> {
        tracing::info!("finishing");
        drop(self.lifeline);
        let status = tokio::select! {
            status = time::timeout(grace, self.child.wait()) => status.ok(),
            _ = signals.interrupt.recv() => None,
        };
        if status.is_none() {
            tracing::warn!(
                "the worker did not finish in time, and is killed; nothing that was accepted is lost"
            );
            self.child.kill().await.context("the worker cannot be killed")?;
        }
        Ok(())
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> Option<()> {
        tokio::select! {
            terminate = self.terminate.recv() => terminate,
            interrupt = self.interrupt.recv() => interrupt,
        }
    }
}

/// When to start a worker that died.
#[derive(Debug)]
struct Restarts {
    settings: settings::Supervisor,
    /// The latest deaths, oldest first.
    deaths: VecDeque<Instant>,
    delay: Duration,
}

impl Restarts {
    fn new(settings: &settings::Supervisor) -> Self {
        Self { settings: settings.clone(), deaths: VecDeque::new(), delay: Duration::ZERO }
    }

    /// How long to wait with the next start: twice as long as the last time, unless the worker lived
    /// for so long that it has to be called healthy.
    fn died(&mut self, started: Instant, died: Instant) -> Duration {
        let window = Duration::from_secs(self.settings.restarts_window_s);
        let least = Duration::from_millis(self.settings.restart_delay_ms_min);
        let most = Duration::from_millis(self.settings.restart_delay_ms_max);
        self.deaths.push_back(died);
        self.deaths.retain(|death| died.duration_since(*death) < window);
        let healthy = died.duration_since(started) >= window;
        self.delay = if healthy { least } else { (self.delay * 2).clamp(least, most) };
        self.delay
    }

    fn too_many(&self) -> bool {
        self.deaths.len() >= self.settings.restarts_max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restarts() -> Restarts {
        Restarts::new(&settings::Supervisor {
            restart_delay_ms_min: 100,
            restart_delay_ms_max: 30_000,
            restarts_max: 5,
            restarts_window_s: 60,
            stop_seconds_max: 20,
        })
    }

    #[test]
    fn the_worker_is_told_its_threads_and_to_wait_without_spinning() {
        let of = |threads, name| environment(threads).into_iter().find(|(n, _)| *n == name).map(|(_, v)| v);
        assert_eq!(of(3, "OMP_NUM_THREADS").as_deref(), Some("3"));
        assert_eq!(of(3, "MKL_NUM_THREADS").as_deref(), Some("3"));
        assert_eq!(of(0, "OMP_NUM_THREADS"), None);
        assert_eq!(of(0, "OMP_WAIT_POLICY").as_deref(), Some("PASSIVE"));
        assert_eq!(of(0, model::mps::WATERMARKS[0].0).is_some(), cfg!(target_os = "macos"));
    }

    #[test]
    fn the_delay_doubles_to_its_limit_and_a_healthy_minute_resets_it() {
        let (mut restarts, start) = (restarts(), Instant::now());
        let delays: Vec<u128> = (0..11).map(|_| restarts.died(start, start).as_millis()).collect();
        assert_eq!(delays, [100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000]);
        assert_eq!(restarts.died(start, start + Duration::from_secs(60)).as_millis(), 100);
    }

    #[test]
    fn five_deaths_within_a_minute_are_too_many_and_five_in_an_hour_are_not() {
        let (mut quick, mut slow, start) = (restarts(), restarts(), Instant::now());
        for death in 0..5 {
            assert!(!quick.too_many());
            quick.died(start, start + Duration::from_secs(death * 10));
            slow.died(start, start + Duration::from_secs(death * 600));
        }
        assert!(quick.too_many() && !slow.too_many());
    }
}
