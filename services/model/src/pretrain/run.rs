//! The loop: windows, steps, points of the curve, and the state on disk.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;

use super::corpus::{Corpus, Order};
use super::evaluate::Windows;
use super::state::{self, Identity, LAST, Point, Record, STABLE};
use super::trainer::Trainer;
use super::{Budget, PretrainOptions, Progress, StepReport, curve, short_name};
use crate::distillation::{Mix, Teacher};
use crate::llama::Base;
use crate::optim::Counters;
use crate::pack::Sequence;
use crate::tokenizer::Tokenizer;

/// Points of the loss curve, evenly over a run.
const POINTS: f64 = 20.0;

/// How much of each held-out text a point of the curve scores.
const POINT_BYTES: usize = 40_000;

/// Steps over which the speed is averaged.
const SPEED_STEPS: f64 = 20.0;

/// A run under way.
pub(super) struct Run<'a> {
    options: &'a PretrainOptions,
    corpus: &'a Corpus,
    held_out: Vec<(String, Windows)>,
    order: Order,
    trainer: Trainer,
    teacher: Option<Teacher>,
    record: Record,
    /// Whether it goes on from a state.
    resumed: bool,
    /// When it would have begun, had it never been interrupted.
    begin: Instant,
    saved: Instant,
    /// Sum and number of the losses since the last point.
    losses: (f64, u64),
    tokens_per_s: f64,
}

impl<'a> Run<'a> {
    /// Sets up a run, or takes up the one whose state lies in the folder.
    pub fn new(
        options: &'a PretrainOptions,
        corpus: &'a Corpus,
        tokenizer: &Tokenizer,
        held_out: &[PathBuf],
        teacher: Option<Teacher>,
    ) -> Result<Self> {
        let (data, settings) = (&options.preset.data, &options.preset.optimiser);
        let mut order = Order::new(corpus, data.window_tokens, data.mix_exponent, options.seed)?;
        let mut trainer = Trainer::new(options.preset.model()?, &options.placement, settings, options.seed)?;
        let identity = Identity {
            preset: serde_json::to_value(&options.preset)?,
            seed: options.seed,
            teacher: teacher.as_ref().map(|teacher| {
                let Mix { alpha, temperature } = teacher.mix();
                json!({"config": teacher.base().config().to_json(""), "alpha": alpha, "temperature": temperature})
            }),
            texts: corpus.sources().map(|(name, tokens)| (name.to_string(), tokens)).collect(),
        };
        let mut record = Record {
            identity,
            budget: options.budget,
            falling: false,
            step: 0,
            tokens: 0,
            elapsed: Duration::ZERO,
            curve: Vec::new(),
            counters: Counters::default(),
        };
        if options.resume {
            let folder = options.out.join(state::FOLDER);
            let name = state::choose(&folder, &record.identity, options.budget)?;
            record = Record { budget: options.budget, ..state::restore(&folder.join(name), &mut trainer)? };
            // The order is a function of the seed: what was drawn is drawn again, and dropped.
            order.by_ref().take(settings.batch_windows * record.step as usize).for_each(drop);
        }
        let held_out = held_out
            .iter()
            .map(|path| {
                Ok((short_name(path), Windows::read(tokenizer, path, data.window_tokens, POINT_BYTES)?))
            })
            .collect::<Result<_>>()?;
        let now = Instant::now();
        Ok(Self {
            options,
            corpus,
            held_out,
            order,
            trainer,
            teacher,
            resumed: options.resume,
            begin: now.checked_sub(record.elapsed).unwrap_or(now),
            saved: now,
            losses: (0.0, 0),
            tokens_per_s: 0.0,
            record,
        })
    }

    /// Trains to the end of the budget, or until it is told to stop.
    pub fn train(mut self, report: &mut dyn FnMut(Progress)) -> Result<Base> {
        let settings = &self.options.preset.optimiser;
        if self.resumed {
            report(Progress::Resumed { step: self.record.step, elapsed: self.record.elapsed });
        }
        loop {
            self.record.elapsed = self.begin.elapsed();
            let done = self.done();
            let over = done >= 1.0 || done.is_nan();
            if over || self.options.stop.load(Ordering::Relaxed) {
                if !over {
                    let Record { elapsed, step, falling, .. } = self.record;
                    report(Progress::Stopped { elapsed, step, falling });
                }
                self.point(report)?;
                self.save(LAST)?;
                self.trainer.refresh()?;
                return Ok(self.trainer.base);
            }
            let fall = decay(done, settings.decay_share);
            if fall < 1.0 && !self.record.falling {
                self.save(STABLE)?;
                self.record.falling = true;
            }
            let warm = ((self.record.step + 1) as f64 / settings.warmup_steps as f64).min(1.0);
            self.step(done, warm * fall, report)?;
            if done * POINTS >= (self.record.curve.len() + 1) as f64 {
                self.point(report)?;
            }
            if self.saved.elapsed() >= self.options.save_every {
                self.save(LAST)?;
            }
        }
    }

    /// How much of the budget is used up. A budget of nothing makes this infinite or not a number, and the run
    /// is over at once.
    fn done(&self) -> f64 {
        match self.options.budget {
            Budget::Time(limit) => self.record.elapsed.as_secs_f64() / limit.as_secs_f64(),
            Budget::Steps(limit) => self.record.step as f64 / limit as f64,
        }
    }

    fn step(&mut self, done: f64, scale: f64, report: &mut dyn FnMut(Progress)) -> Result<()> {
        let start = Instant::now();
        let length = self.options.preset.data.window_tokens;
        let windows = self
            .order
            .by_ref()
            .take(self.options.preset.optimiser.batch_windows)
            .map(|start| Ok(Sequence::whole(self.corpus.read(start, length)?)))
            .collect::<Result<Vec<_>>>()?;
        let loss = self.trainer.step(&windows, scale, self.teacher.as_ref())?;
        let tokens: usize = windows.iter().map(Sequence::learned_tokens).sum();
        self.record.step += 1;
        self.record.tokens += tokens as u64;
        self.losses = (self.losses.0 + loss, self.losses.1 + 1);
        let speed = tokens as f64 / start.elapsed().as_secs_f64();
        let share = 1.0 / SPEED_STEPS.min(self.losses.1 as f64 + 1.0);
        self.tokens_per_s +=
            if self.tokens_per_s == 0.0 { speed } else { share * (speed - self.tokens_per_s) };
        let elapsed = self.begin.elapsed();
        let seconds = match self.options.budget {
            Budget::Time(limit) => limit.saturating_sub(elapsed).as_secs_f64(),
            Budget::Steps(limit) => {
                limit.saturating_sub(self.record.step) as f64 * tokens as f64 / self.tokens_per_s
            }
        };
        report(Progress::Step(StepReport {
            step: self.record.step,
            tokens: self.record.tokens,
            loss,
            done,
            elapsed,
            tokens_per_s: self.tokens_per_s,
            left: Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX),
        }));
        Ok(())
    }

    /// Adds a point to the curve.
    fn point(&mut self, report: &mut dyn FnMut(Progress)) -> Result<()> {
        if self.losses.1 == 0 {
            return Ok(());
        }
        self.trainer.refresh()?;
        let mut point = Point {
            tokens: self.record.tokens,
            training: self.losses.0 / self.losses.1 as f64,
            held_out: Default::default(),
        };
        for (name, windows) in &self.held_out {
            point.held_out.insert(name.clone(), windows.score(&self.trainer.base)?.nll_per_token());
        }
        self.losses = (0.0, 0);
        self.record.curve.push(point.clone());
        report(Progress::Point(point));
        Ok(())
    }

    fn save(&mut self, name: &str) -> Result<()> {
        let folder = self.options.out.join(state::FOLDER);
        state::save(&folder, name, &self.trainer, &self.record)?;
        self.saved = Instant::now();
        curve::write(&self.record.curve, &folder.join("loss.svg"))
    }
}

/// Warm-up, stable, decay (arXiv 2404.06395): full rates until the last `share` of the run, then a straight
/// line to zero.
fn decay(done: f64, share: f64) -> f64 {
    ((1.0 - done) / share).clamp(0.0, 1.0)
}
