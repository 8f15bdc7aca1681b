//! Compute threads: where tensors live.
//!
//! What a thread works with is built on it and never leaves it. Work goes in as closures, answers
//! come back as values. After a panic the thread ends, because what it worked with is suspect.

use crate::host::panic_message;
use crate::lane::Stop;
use crossbeam_channel::{Receiver, Sender, TryRecvError, TrySendError, bounded};
use rustix::time::{ClockId, clock_gettime};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::{oneshot, watch};

/// Why a compute thread did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ComputeError {
    /// It has as much work waiting as it takes.
    #[error("compute thread {thread} is busy")]
    Busy {
        /// Its name.
        thread: &'static str,
    },
    /// This very work made it panic; it has ended.
    #[error("compute thread {thread} panicked: {message}")]
    Panicked {
        /// Its name.
        thread: &'static str,
        /// What the panic said.
        message: String,
    },
    /// It had ended before.
    #[error("compute thread {thread} is dead")]
    Dead {
        /// Its name.
        thread: &'static str,
    },
}

/// A worker with a life of its own between the jobs it is given.
pub trait Engine {
    /// Does a bounded piece of work. Returns whether there is more; otherwise the next call comes
    /// after the next job.
    fn step(&mut self) -> bool;
}

/// Whether a thread may go on after a job.
type Alive = bool;
type Job<W> = Box<dyn FnOnce(&mut W) -> Alive + Send>;

/// A thread that owns a `W`. Dropping this ends the thread, after the job it is at.
pub struct Compute<W> {
    name: &'static str,
    jobs: Option<Sender<Job<W>>>,
    thread: Option<JoinHandle<()>>,
    /// Its sender is the thread's own, so that the end of the thread closes it.
    last_words: watch::Receiver<Option<String>>,
}

impl<W: 'static> Compute<W> {
    /// Starts a thread and builds its `W` on it. At most one job waits for it at a time.
    ///
    /// # Errors
    /// What `init` failed with, or that the thread could not be started.
    pub async fn start(
        name: &'static str,
        init: impl FnOnce() -> anyhow::Result<W> + Send + 'static,
    ) -> anyhow::Result<Self> {
        Self::spawn(name, 1, init, |worker, jobs, _| {
            for job in jobs {
                if !job(worker) {
                    return;
                }
            }
        })
        .await
    }

    /// Starts a thread whose `W` goes on working between jobs. At most `jobs_max` of them wait.
    ///
    /// # Errors
    /// As for [`Compute::start`].
    pub async fn start_engine(
        name: &'static str,
        jobs_max: usize,
        init: impl FnOnce() -> anyhow::Result<W> + Send + 'static,
    ) -> anyhow::Result<Self>
    where
        W: Engine,
    {
        Self::spawn(name, jobs_max, init, run_engine).await
    }

    async fn spawn(
        name: &'static str,
        jobs_max: usize,
        init: impl FnOnce() -> anyhow::Result<W> + Send + 'static,
        run: impl FnOnce(&mut W, &Receiver<Job<W>>, &watch::Sender<Option<String>>) + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (jobs, inbox) = bounded(jobs_max);
        let (ready, is_ready) = oneshot::channel();
        let (words, last_words) = watch::channel(None);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let built = catch_unwind(AssertUnwindSafe(init));
            let built =
                built.unwrap_or_else(|panic| Err(anyhow::anyhow!("panicked: {}", panic_message(&*panic))));
            match built {
                Ok(mut worker) => {
                    if ready.send(Ok(())).is_ok() {
                        run(&mut worker, &inbox, &words);
                    }
                }
                Err(error) => drop(ready.send(Err(error))),
            }
        })?;
        let compute = Self { name, jobs: Some(jobs), thread: Some(thread), last_words };
        let started = is_ready.await.unwrap_or_else(|_| Err(anyhow::anyhow!("its thread ended")));
        started.map_err(|error| error.context(format!("compute thread {name} did not start")))?;
        Ok(compute)
    }

    /// Does a job on the thread, and waits for what it returns.
    ///
    /// # Errors
    /// When the thread has no room for the job, or is dead, or dies of it.
    pub async fn run<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut W) -> R + Send + 'static,
    ) -> Result<R, ComputeError> {
        let (reply, answer) = oneshot::channel();
        self.put(Box::new(move |worker| match catch_unwind(AssertUnwindSafe(|| job(worker))) {
            Ok(result) => {
                // Whoever asked may have gone away; the thread goes on.
                let _ = reply.send(Ok(result));
                true
            }
            Err(panic) => {
                let _ = reply.send(Err(panic_message(&*panic)));
                false
            }
        }))?;
        let thread = self.name;
        match answer.await {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(message)) => Err(ComputeError::Panicked { thread, message }),
            Err(_) => Err(ComputeError::Dead { thread }),
        }
    }

    fn put(&self, job: Job<W>) -> Result<(), ComputeError> {
        let thread = self.name;
        let Some(jobs) = &self.jobs else { return Err(ComputeError::Dead { thread }) };
        jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => ComputeError::Busy { thread },
            TrySendError::Disconnected(_) => ComputeError::Dead { thread },
        })
    }

    /// Waits for the thread's end and returns what it died of. An engine can die between jobs, when
    /// nobody waits for an answer that would tell; [`crate::lane::Crew::source`] can watch over it.
    pub fn death(&self) -> impl Future<Output = ComputeError> + Send + 'static {
        let (thread, mut words) = (self.name, self.last_words.clone());
        async move {
            match words.wait_for(Option::is_some).await.ok().and_then(|words| words.clone()) {
                Some(message) => ComputeError::Panicked { thread, message },
                None => ComputeError::Dead { thread },
            }
        }
    }
}

/// Takes all jobs that wait, then a step, and so on; sleeps when there is neither.
fn run_engine<W: Engine>(
    worker: &mut W,
    jobs: &Receiver<Job<W>>,
    last_words: &watch::Sender<Option<String>>,
) {
    let mut more = false;
    loop {
        let next = if more { jobs.try_recv() } else { jobs.recv().map_err(|_| TryRecvError::Disconnected) };
        match next {
            Ok(job) => {
                if !job(worker) {
                    return;
                }
                more = true;
            }
            Err(TryRecvError::Disconnected) => return,
            Err(TryRecvError::Empty) => match catch_unwind(AssertUnwindSafe(|| worker.step())) {
                Ok(goes_on) => more = goes_on,
                Err(panic) => {
                    last_words.send_replace(Some(panic_message(&*panic)));
                    return;
                }
            },
        }
    }
}

/// Two threads must never work on the same files or fill memory with the same weights, so the end
/// of this is the end of the thread.
impl<W> Drop for Compute<W> {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // A panic was caught on the thread and told to whoever waited.
            let _ = thread.join();
        }
    }
}

/// Time between two looks at whether requests still run.
const GLANCE: Duration = Duration::from_millis(5);

/// Work between two looks at whether requests wait.
#[derive(Debug, Clone, Copy)]
pub struct Stint {
    began: Instant,
    /// What the thread had of the processor before, where that is what counts.
    had: Option<Duration>,
}

impl Stint {
    /// Begins one. Where the calling thread computes on the processor, its time there counts, which is what the work takes alone: while
    /// answers have the processor, the work waits, and pauses already. Where a device computes, time itself counts.
    pub fn begin(on_processor: bool) -> Self {
        Self { began: Instant::now(), had: on_processor.then(time_on_processor) }
    }

    /// How long to rest, so that the work was done at this share of the speed that it has alone.
    fn pause(&self, share: f64) -> Duration {
        let passed = self.began.elapsed();
        let alone = self.had.map_or(passed, |had| time_on_processor().saturating_sub(had));
        alone.div_f64(share).saturating_sub(passed)
    }
}

/// What the calling thread has had of the processor.
pub fn time_on_processor() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// Whose turn it is: how training, which is never urgent, makes way for answers, which are.
#[derive(Debug, Default)]
pub struct Turn {
    running: AtomicUsize,
}

/// A request that waits or runs; training makes way while this lives.
#[derive(Debug)]
pub struct Running(Arc<Turn>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Turn {
    /// Nobody runs yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Marks a request as waiting or running until the guard is dropped.
    pub fn enter(self: &Arc<Self>) -> Running {
        self.running.fetch_add(1, Ordering::Relaxed);
        Running(Arc::clone(self))
    }

    /// Requests that wait or run.
    pub fn running(&self) -> usize {
        self.running.load(Ordering::Relaxed)
    }

    /// Called by the trainer between two micro-steps, with the last one: sleeps while requests run, so that training has at
    /// most `share` (0 to 1) of the speed that it has alone.
    pub fn yield_after(&self, last: &Stint, share: f32, stop: &Stop) {
        let pause = last.pause(f64::from(share).clamp(0.01, 1.0));
        let started = Instant::now();
        while self.running() > 0 && !stop.is_set() {
            let left = pause.saturating_sub(started.elapsed());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(GLANCE));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_error_of_the_start_is_returned() {
        let started = Compute::<()>::start("test", || anyhow::bail!("no model")).await;
        let error = started.err().expect("refused");
        assert_eq!(format!("{error:#}"), "compute thread test did not start: no model");
        let started = Compute::<()>::start("test", || panic!("bad weights")).await;
        assert!(format!("{:#}", started.err().expect("refused")).ends_with("panicked: bad weights"));
    }

    #[tokio::test]
    async fn after_a_panic_every_call_finds_it_dead() {
        let compute = Compute::start("test", || Ok(1)).await.expect("started");
        assert_eq!(compute.run(|n| *n + 1).await, Ok(2));
        let panicked = ComputeError::Panicked { thread: "test", message: "injected".into() };
        assert_eq!(compute.run(|_| panic!("injected")).await, Err::<(), _>(panicked));
        compute.death().await;
        for _ in 0..3 {
            assert_eq!(compute.run(|n| *n).await, Err(ComputeError::Dead { thread: "test" }));
        }
    }

    #[tokio::test]
    async fn a_full_thread_is_busy() {
        let compute = Compute::start("test", || Ok(())).await.expect("started");
        let (release, held) = std::sync::mpsc::channel::<()>();
        let (begun, has_begun) = oneshot::channel();
        let first = compute.run(move |()| {
            let _ = begun.send(());
            held.recv()
        });
        let rest = async {
            has_begun.await.expect("begun");
            // One waits beside the one that runs; the next is turned away.
            let second = compute.run(|()| 2);
            let third = async {
                let outcome = compute.run(|()| 3).await;
                release.send(()).expect("released");
                outcome
            };
            tokio::join!(second, third)
        };
        let (first, (second, third)) = tokio::join!(first, rest);
        assert!(first.is_ok());
        assert_eq!((second, third), (Ok(2), Err(ComputeError::Busy { thread: "test" })));
    }

    /// Counts down by itself.
    struct Countdown {
        left: u32,
        steps: u32,
    }

    impl Engine for Countdown {
        fn step(&mut self) -> bool {
            assert!(self.left != 1000, "injected");
            self.steps += 1;
            self.left = self.left.saturating_sub(1);
            self.left > 0
        }
    }

    #[tokio::test]
    async fn an_engine_works_between_jobs_and_sleeps_when_there_is_nothing_to_do() {
        let engine =
            Compute::start_engine("test", 4, || Ok(Countdown { left: 0, steps: 0 })).await.expect("started");
        engine.run(|c| c.left = 50).await.expect("taken");
        while engine.run(|c| c.left).await.expect("answered") > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // One step follows each job, to see whether it brought work; none happens without one.
        let before = engine.run(|c| c.steps).await.expect("answered");
        tokio::time::sleep(Duration::from_millis(20)).await;
        let after = engine.run(|c| c.steps).await.expect("answered");
        assert!(after <= before + 1, "{before} {after}");
    }

    #[tokio::test]
    async fn an_engine_that_dies_by_itself_is_heard() {
        let engine =
            Compute::start_engine("test", 4, || Ok(Countdown { left: 0, steps: 0 })).await.expect("started");
        engine.run(|c| c.left = 1000).await.expect("taken");
        let panicked = ComputeError::Panicked { thread: "test", message: "injected".into() };
        assert_eq!(engine.death().await, panicked);
    }

    /// Work that began as long ago, and had the processor all the time.
    fn worked(time: Duration) -> Stint {
        Stint { began: Instant::now().checked_sub(time).expect("a later time"), had: None }
    }

    #[test]
    fn training_makes_way_only_while_requests_run() {
        let (turn, stop) = (Turn::new(), Stop::new());
        let took = |turn: &Turn| {
            let started = Instant::now();
            turn.yield_after(&worked(Duration::from_millis(30)), 0.25, &stop);
            started.elapsed()
        };
        assert!(took(&turn) < Duration::from_millis(20));
        let running = turn.enter();
        assert!(took(&turn) >= Duration::from_millis(89));
        drop(running);
        assert_eq!(turn.running(), 0);
        // However long the pause would be, it ends with the last request, and when training has to stop.
        let long = worked(Duration::from_secs(60));
        let running = turn.enter();
        let ends = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(running);
        });
        turn.yield_after(&long, 0.1, &stop);
        ends.join().expect("ended");
        let _running = turn.enter();
        stop.set();
        turn.yield_after(&long, 0.1, &stop);
    }

    #[test]
    fn time_without_the_processor_is_no_work() {
        let stint = Stint::begin(true);
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(stint.pause(0.5), Duration::ZERO, "it has rested longer than it has worked");
        let stint = Stint::begin(true);
        while time_on_processor() < stint.had.expect("counted") + Duration::from_millis(60) {}
        assert!(stint.pause(0.1) > Duration::from_millis(60), "{:?}", stint.pause(0.1));
    }
}
