//! A learner that goes on while something else is measured.

use super::subject::Subject;
use super::update::{RATE, adapter, learner, micro_batches, random, rehearsed};
use crate::topology;
use anyhow::{Result, anyhow, ensure};
use kit::compute::{Stint, Turn};
use kit::lane::Stop;
use model::device::set_threads;
use model::learner::{Learner, Outcome};
use model::pack::Sequence;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Random tokens in an example.
const TOKENS: usize = 64;

/// A learner on a thread of its own, which makes way for running requests as the services' does.
pub struct Meanwhile {
    stop: Stop,
    tokens: Arc<AtomicU64>,
    thread: JoinHandle<Result<()>>,
}

impl Meanwhile {
    /// Starts it, and returns once its first step is taken. While a request of `turn` runs, it has at most `share` of
    /// its speed.
    ///
    /// # Errors
    /// When it cannot learn.
    pub fn start(subject: &Subject, turn: &Arc<Turn>, share: f32) -> Result<Self> {
        Self::begin(subject, turn, share, false)
    }

    /// The same with as much rehearsed as is new, which is held to the former self.
    ///
    /// # Errors
    /// As for [`Meanwhile::start`].
    pub fn rehearsing(subject: &Subject, turn: &Arc<Turn>, share: f32) -> Result<Self> {
        Self::begin(subject, turn, share, true)
    }

    fn begin(subject: &Subject, turn: &Arc<Turn>, share: f32, rehearsing: bool) -> Result<Self> {
        let training = topology::training(&subject.settings, subject.base.config())?;
        let count = training.course.step_tokens.div_ceil(TOKENS);
        let mut sequences = random(subject, count, TOKENS)?;
        if rehearsing {
            rehearsed(&mut sequences[count / 2..]);
        }
        let step = micro_batches(&sequences, training.micro_tokens);
        let (stop, tokens) = (Stop::new(), Arc::new(AtomicU64::new(0)));
        let course = Course {
            step,
            share,
            turn: Arc::clone(turn),
            stop: stop.clone(),
            tokens: Arc::clone(&tokens),
            on_processor: subject.base.is_on_cpu(),
        };
        let (base, adapter, threads) =
            (subject.to_learn()?, adapter(subject)?, subject.settings.base.threads);
        let thread = std::thread::Builder::new().name("train".into()).spawn(move || {
            if threads > 0 {
                set_threads(threads);
            }
            // The guard is made here, where it is used: it does not go from thread to thread.
            course.run(if rehearsing {
                learner(base, &adapter, &training)?
            } else {
                Learner::new(base, &adapter, None, training.learner)?
            })
        })?;
        let learning = Self { stop, tokens, thread };
        while learning.tokens() == 0 && !learning.thread.is_finished() {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(learning)
    }

    /// Tokens learned so far.
    pub fn tokens(&self) -> u64 {
        self.tokens.load(Ordering::Relaxed)
    }

    /// Whether it ended by itself, which only an error has it do.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends it.
    ///
    /// # Errors
    /// What ended it before.
    pub fn finish(self) -> Result<()> {
        self.stop.set();
        self.thread.join().map_err(|_| anyhow!("the learner panicked"))?
    }

    /// Tokens a second where nothing else runs.
    ///
    /// # Errors
    /// As for [`Meanwhile::start`].
    pub fn idle_speed(subject: &Subject, time: Duration) -> Result<f64> {
        let learning = Self::start(subject, &Turn::new(), 1.0)?;
        let (before, started) = (learning.tokens(), Instant::now());
        std::thread::sleep(time);
        let speed = (learning.tokens() - before) as f64 / started.elapsed().as_secs_f64();
        learning.finish()?;
        Ok(speed)
    }
}

/// What the thread does.
struct Course {
    step: Vec<Vec<Sequence>>,
    share: f32,
    turn: Arc<Turn>,
    stop: Stop,
    tokens: Arc<AtomicU64>,
    on_processor: bool,
}

impl Course {
    fn run(&self, mut learner: Learner) -> Result<()> {
        while !self.stop.is_set() {
            let mut parts = self.step.iter().map(|part| part.iter().map(|s| s.tokens.len()).sum::<usize>());
            let mut last: Option<(Stint, usize)> = None;
            let mut between = || {
                // What a part took is known when the next one is about to begin, and of the last one after the step.
                if let Some((stint, tokens)) = &last {
                    self.tokens.fetch_add(*tokens as u64, Ordering::Relaxed);
                    self.turn.yield_after(stint, self.share, &self.stop);
                }
                last = parts.next().map(|tokens| (Stint::begin(self.on_processor), tokens));
                if self.stop.is_set() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let report = learner.step(&self.step, RATE, &mut between)?;
            match report.outcome {
                Outcome::Applied => drop(between()),
                Outcome::Stopped => return Ok(()),
                Outcome::NonFinite | Outcome::Overflow => ensure!(false, "a step did not stay finite"),
            }
        }
        Ok(())
    }
}
