//! What happens on the compute thread: the base, a learner for each batch, and the course.

mod count;
mod mend;
mod run;

use crate::course::{Course, Fresh, Item, by_heart};
use crate::recall::Recall;
use crate::review;
use anyhow::Context;
use kit::answers::AnswerFiles;
use kit::compute::{Stint, Turn};
use kit::lane::Stop;
use model::device::helpers;
use model::ewc::Ewc;
use model::guard::{Apart, Elastic, Former, FormerShares};
use model::learner::{Learner, LearnerConfig, Outcome, StepReport};
use model::llama::Base;
use model::lora::{Adapter, LoraConfig};
use model::mps;
use model::orthogonal::Orthogonal;
use model::pack::Sequence;
use model::ridge::{Counted, Counting};
use proto::{Batch, ExampleId, LearnedExample, TrainReport};
use run::{Run, as_fresh, note, sequence};
use std::cell::Cell;
use std::collections::{BTreeSet, VecDeque};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

/// Bad steps among the last [`BAD_WINDOW`] after which a batch is started again at half the rate, and
/// given up the second time.
const BAD_STEPS_MAX: usize = 3;
const BAD_WINDOW: usize = 20;

/// Decay of the second moment of the gradients while nothing but answers is still to be known by heart: they are learned in
/// some hundred steps, in which the usual 0.999 remembers the first gradients, when all was wrong, to the end.
const BETA2_BY_HEART: f64 = 0.95;

/// How batches are learned.
#[derive(Debug, Clone)]
pub struct Training {
    /// Shape of new adapters.
    pub lora: LoraConfig,
    /// Clipping, AdamW and packing.
    pub learner: LearnerConfig,
    /// Peak learning rate.
    pub rate: f64,
    /// How long, and in which mixture.
    pub course: Course,
    /// Tokens between two looks at `stop` and at waiting requests.
    pub micro_tokens: usize,
    /// Strength of the EWC penalty; 0 is off.
    pub ewc_lambda: f64,
    /// Parts that an adapter's ranks are cut into, one a batch, and what keeps them apart; none is off.
    pub olora: Option<(i64, f64)>,
    /// What the parent generation has to say.
    pub former: FormerShares,
    /// Answers that are said because of what is counted are learned by heart all the same.
    pub repeat_counted: bool,
    /// Share of the time that learning takes while requests run.
    pub share_while_serving: f32,
}

/// Owned by the compute thread.
pub struct Worker {
    base: Base,
    training: Training,
    anchors: Vec<Sequence>,
    recall: Recall,
    /// None where answers that repeat are not counted.
    counting: Option<Counting>,
    turn: Arc<Turn>,
    stop: Stop,
    /// Tokens of a micro-batch: the setting, or less once the device had too much at once.
    micro_tokens: Cell<usize>,
}

/// What a batch starts from: the bytes its parent left behind.
pub struct Start {
    /// Adapter weights.
    pub weights: Vec<u8>,
    /// Optimiser state.
    pub optimiser: Option<Vec<u8>>,
    /// Fisher information.
    pub fisher: Option<Vec<u8>>,
    /// What was counted of answers that repeat.
    pub counts: Option<Vec<u8>>,
}

/// How a batch ended.
pub enum End {
    /// With a candidate.
    Learned(Box<Outgoing>),
    /// Without: training does not stay finite, and this is why.
    Diverged(String),
    /// Told to stop.
    Stopped,
}

/// A candidate's files and figures.
pub struct Outgoing {
    /// Adapter weights.
    pub weights: Vec<u8>,
    /// Optimiser state.
    pub optimiser: Vec<u8>,
    /// What it took.
    pub report: TrainReport,
    /// What was learned.
    pub examples: Vec<LearnedExample>,
    /// What was left out, and why.
    pub put_aside: Vec<(ExampleId, String)>,
    /// What is known of answers that repeat.
    pub answers: Option<AnswerFiles>,
}

impl Worker {
    /// Takes the base, the anchor sequences that are rehearsed beside every batch, what is kept of the base's
    /// hidden states, and what counts answers that repeat.
    pub fn new(
        base: Base,
        training: Training,
        anchors: Vec<Sequence>,
        recall: Recall,
        counting: Option<Counting>,
        turn: Arc<Turn>,
        stop: Stop,
    ) -> Self {
        let micro_tokens = Cell::new(mps::micro_tokens(training.micro_tokens, base.device()));
        Self { base, training, anchors, recall, counting, turn, stop, micro_tokens }
    }

    /// Learns a batch.
    ///
    /// # Errors
    /// When what it starts from does not fit the base.
    pub fn learn(&mut self, batch: &Batch, start: Option<Start>) -> anyhow::Result<End> {
        let (started, _helpers) = (Instant::now(), helpers());
        let (start, nothing) = (start.as_ref(), BTreeSet::new());
        let Some(counted) = self.unless_stopped(self.count(batch, start, &nothing))? else {
            return Ok(End::Stopped);
        };
        let mut rate = self.training.rate * f64::from(batch.rate_scale);
        for _ in 0..2 {
            let mut run = self.begin(batch, start, counted.as_ref())?;
            match self.train(&mut run, rate)? {
                ControlFlow::Continue(()) => return self.finish(run, start, counted.as_ref(), started),
                ControlFlow::Break(Halt::Stopped) => return Ok(End::Stopped),
                ControlFlow::Break(Halt::Diverged) => rate /= 2.0,
            }
        }
        Ok(End::Diverged("its loss or gradient does not stay finite, also at half the learning rate".into()))
    }

    /// What came of something, or none where it failed because the lane is taken down.
    fn unless_stopped<T>(&self, came: anyhow::Result<T>) -> anyhow::Result<Option<T>> {
        if came.is_err() && self.stop.is_set() { Ok(None) } else { came.map(Some) }
    }

    fn begin<'a>(
        &self,
        batch: &'a Batch,
        start: Option<&Start>,
        counted: Option<&'a Counted>,
    ) -> anyhow::Result<Run<'a>> {
        let config = self.base.config();
        let adapter = match start {
            Some(start) => Adapter::from_bytes(&start.weights, config).context("the parent's weights")?,
            None => Adapter::new(self.training.lora.clone(), config, batch.seed)?,
        };
        // With parts of an adapter each batch has its own weights, and moments begin with them.
        let optimiser = start.and_then(|s| s.optimiser.as_deref()).filter(|_| self.training.olora.is_none());
        let mut learner = Learner::new(self.base.share(), &adapter, optimiser, self.training.learner)?;
        let fisher = start.and_then(|s| s.fisher.as_deref()).filter(|_| self.training.ewc_lambda > 0.0);
        if let Some(bytes) = fisher {
            let ewc = Ewc::from_bytes(bytes, adapter.parameter_count())?;
            learner.hold_to(Elastic::new(ewc, self.training.ewc_lambda, learner.adapter())?);
        }
        if let Some((parts, lambda)) = self.training.olora {
            learner.hold_to(Orthogonal::new(learner.adapter(), batch.number, parts, lambda)?);
        }
        let shares = self.training.former;
        if start.is_some() && (shares.fresh > 0.0 || shares.rehearsed > 0.0) {
            learner.hold_to(Former::new(&self.base, learner.adapter(), shares)?);
        }
        let new = batch.fresh.iter().flat_map(|example| example.piece.answers()).flatten();
        let known = batch.known_answers.iter();
        if let Some(apart) = Apart::new(&self.base, new.copied(), known.copied()) {
            learner.hold_to(apart);
        }
        let examples = batch.rehearsed.iter().chain(&batch.fresh);
        learner.remember_in(self.recall.of(examples.map(|e| (e.piece.tokens.clone(), e.id))));
        let counted = self.relied_on(batch, counted);
        let decided = |n: usize| counted.is_some_and(|counted| counted.decided[n]);
        let fresh = as_fresh(&batch.fresh, decided, batch.seed);
        // Beside those that are not read nothing has to be rehearsed, and a single pass needs no more than it takes.
        let read = fresh.iter().filter(|f| !f.unread).count();
        let in_proportion = |count: usize| (count * read).div_ceil(fresh.len().max(1));
        let a_pass = in_proportion(batch.rehearsed_a_pass as usize);
        let once = fresh.iter().all(|f| f.counted);
        let rehearsed = if once { a_pass } else { in_proportion(batch.rehearsed.len()) };
        Ok(Run {
            learner,
            fresh: fresh.into_iter().zip(batch.fresh.iter().map(sequence)).collect(),
            rehearsed: batch.rehearsed.iter().take(rehearsed).map(sequence).collect(),
            rehearsed_a_pass: a_pass,
            batch,
            head: counted.map(|counted| &counted.head).filter(|head| head.describes()),
            first: vec![None; batch.fresh.len()],
            report: TrainReport::default(),
            recent_bad: VecDeque::new(),
            read: false,
            last: None,
        })
    }

    fn train(&self, run: &mut Run<'_>, rate: f64) -> anyhow::Result<ControlFlow<Halt>> {
        let rehearsed: Vec<usize> = run.rehearsed.iter().map(|s| s.tokens.len()).collect();
        let anchors: Vec<usize> = self.anchors.iter().map(|s| s.tokens.len()).collect();
        let said = self.said(run)?;
        for pass in 0.. {
            let fresh: Vec<Fresh> = run.fresh.iter().map(|(f, _)| *f).collect();
            let (course, batch) = (&self.training.course, run.batch);
            let a_pass = run.rehearsed_a_pass;
            let steps = course.pass(pass, &fresh, &rehearsed, a_pass, &anchors, batch.seed);
            if steps.is_empty() {
                break;
            }
            run.report.passes = pass + 1;
            self.remember(run, &steps)?;
            let due = |item: &Item| if let Item::Fresh(n) = *item { Some(n) } else { None };
            let by_heart = by_heart(&fresh, steps.iter().flatten().filter_map(due));
            run.learner.decay_squares(by_heart.then_some(BETA2_BY_HEART));
            let count = steps.len();
            for (n, items) in steps.iter().enumerate() {
                let rate = rate * course.rate(pass, n, count, &fresh);
                if let ControlFlow::Break(halt) = self.step(run, items, rate)? {
                    return Ok(ControlFlow::Break(halt));
                }
            }
            let others = run.fresh.iter().filter(|(f, _)| f.loss.is_finite() && !f.counted);
            if let Some(loss) = mean(others.map(|(f, _)| f.loss)) {
                run.report.last_loss = loss;
                metrics::gauge!("engram:train_loss", "lineage" => run.batch.lineage.to_string())
                    .set(f64::from(loss));
                let due = steps.iter().flatten().filter(|item| matches!(item, Item::Fresh(_))).count();
                tracing::debug!(pass, due, steps = count, loss, "a pass over a batch");
            }
        }
        run.learner.decay_squares(None);
        let mut end = self.review(run, rate)?;
        if end.is_continue() {
            end = self.mend(run, said, rate)?;
        }
        Ok(end)
    }

    /// The passes over an even mixture of old and new answers, where those before were not even. A batch that learns or
    /// rehearses texts has none: they would be unlearned meanwhile; nor has one whose every answer is said without the adapter.
    fn review(&self, run: &mut Run<'_>, rate: f64) -> anyhow::Result<ControlFlow<Halt>> {
        let (course, batch) = (&self.training.course, run.batch);
        if !run.answers_only() || run.fresh.iter().all(|(f, _)| f.counted) {
            return Ok(ControlFlow::Continue(()));
        }
        let anchors: Vec<usize> = self.anchors.iter().map(|s| s.tokens.len()).collect();
        for n in 0..course.review_passes {
            let (fresh, rehearsed) = run.told();
            let Some(items) = review::mixture(&fresh, &rehearsed, run.rehearsed_a_pass, n) else { break };
            if n == 0 {
                // Answers that come as often as the new ones need not be spared any longer.
                let told = fresh.iter().chain(&rehearsed).flat_map(|told| &told.answer);
                let apart = Apart::new(&self.base, told.copied(), batch.known_answers.iter().copied());
                run.learner.hold_to(apart.unwrap_or_else(Apart::over));
            }
            let items = items.into_iter().map(|item| (item, run.tokens(item))).collect();
            let steps = course.mixture(n, items, &anchors, batch.seed);
            for (at, items) in steps.iter().enumerate() {
                let halt = self.step(run, items, rate * course.review_rate(n, at, steps.len()))?;
                if halt.is_break() {
                    return Ok(halt);
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// When the texts of the batch are read and only its answers are still learned, the adapter that has just read them
    /// is the former self from here on: with the parent they would be unlearned, and with their own words learned by heart.
    fn remember(&self, run: &mut Run<'_>, steps: &[Vec<Item>]) -> anyhow::Result<()> {
        let read = |item: &Item| matches!(*item, Item::Known(n) if !run.fresh[n].0.answer);
        let shares = self.training.former;
        if shares.rehearsed > 0.0 && !run.read && steps.iter().flatten().any(read) {
            run.read = true;
            run.learner.hold_to(Former::new(&self.base, run.learner.adapter(), shares)?);
        }
        Ok(())
    }

    fn step(&self, run: &mut Run<'_>, items: &[Item], rate: f64) -> anyhow::Result<ControlFlow<Halt>> {
        let before = self.micro_tokens.get();
        let taken = mps::fit(&self.micro_tokens, |tokens| {
            let (micro_batches, places) = self.micro_batches(run, items, tokens);
            let most = micro_batches.iter().map(Vec::len).max().unwrap_or(0);
            let report = self.attempt(run, &micro_batches, rate);
            (most, report.map(|report| (micro_batches, places, report)))
        });
        if self.micro_tokens.get() < before {
            let micro_tokens = self.micro_tokens.get();
            tracing::warn!(
                micro_tokens,
                "the device had too much at once: micro-batches are smaller from here on"
            );
        }
        let (micro_batches, places, report) = taken?;
        let Some(report) = report else { return Ok(ControlFlow::Continue(())) };
        match report.outcome {
            Outcome::Stopped => return Ok(ControlFlow::Break(Halt::Stopped)),
            Outcome::NonFinite => self.leave_out(run, &micro_batches, &places)?,
            Outcome::Applied | Outcome::Overflow => note(run, &report, &places),
        }
        run.recent_bad.push_back(report.outcome == Outcome::NonFinite);
        if run.recent_bad.len() > BAD_WINDOW {
            run.recent_bad.pop_front();
        }
        let bad = run.recent_bad.iter().filter(|b| **b).count();
        Ok(if bad >= BAD_STEPS_MAX { ControlFlow::Break(Halt::Diverged) } else { ControlFlow::Continue(()) })
    }

    /// One step, again for as long as an f16 gradient overflows; none where nothing is to be learned.
    fn attempt(
        &self,
        run: &mut Run<'_>,
        micro_batches: &[Vec<Sequence>],
        rate: f64,
    ) -> anyhow::Result<Option<StepReport>> {
        if micro_batches.iter().flatten().all(|s| s.learned_tokens() == 0) {
            return Ok(None);
        }
        loop {
            let report = run.learner.step(micro_batches, rate, &mut || self.between(&mut run.last))?;
            match report.outcome {
                // The loss scale was lowered, which is no fault of the batch.
                Outcome::Overflow => run.report.skipped_steps += 1,
                _ => return Ok(Some(report)),
            }
        }
    }

    /// Between micro-batches: stop when told to, and let waiting requests go first.
    fn between(&self, last: &mut Option<Stint>) -> ControlFlow<()> {
        if self.stop.is_set() {
            return ControlFlow::Break(());
        }
        if let Some(last) = last {
            self.turn.yield_after(last, self.training.share_while_serving, &self.stop);
        }
        *last = Some(Stint::begin(self.base.is_on_cpu()));
        ControlFlow::Continue(())
    }

    /// The sequences of a step in micro-batches of about `tokens`, and the item behind each sequence.
    fn micro_batches(
        &self,
        run: &Run<'_>,
        items: &[Item],
        tokens: usize,
    ) -> (Vec<Vec<Sequence>>, Vec<Vec<Item>>) {
        let (mut batches, mut places) = (Vec::new(), Vec::new());
        let mut filled = usize::MAX;
        // What is rehearsed lies apart, so that a former self is asked of nothing that it has no say in.
        let (rehearsed, others): (Vec<Item>, Vec<Item>) = items.iter().partition(|&&item| run.is_kept(item));
        for item in rehearsed.into_iter().chain(others) {
            let mut sequence = self.sequence(run, item).clone();
            sequence.rehearsed = run.is_kept(item);
            if filled.saturating_add(sequence.tokens.len()) > tokens {
                batches.push(Vec::new());
                places.push(Vec::new());
                filled = 0;
            }
            filled += sequence.tokens.len();
            if let (Some(batch), Some(place)) = (batches.last_mut(), places.last_mut()) {
                batch.push(sequence);
                place.push(item);
            }
        }
        (batches, places)
    }

    fn sequence<'r>(&'r self, run: &'r Run<'_>, item: Item) -> &'r Sequence {
        match item {
            Item::Fresh(n) | Item::Known(n) => &run.fresh[n].1,
            Item::Rehearsed(n) => &run.rehearsed[n],
            Item::Anchor(n) => &self.anchors[n],
        }
    }

    /// A step was not finite: the examples that alone make it so are left out from here on.
    fn leave_out(
        &self,
        run: &mut Run<'_>,
        batches: &[Vec<Sequence>],
        places: &[Vec<Item>],
    ) -> anyhow::Result<()> {
        run.report.skipped_steps += 1;
        for (batch, places) in batches.iter().zip(places) {
            for offender in run.learner.find_offenders(batch)? {
                match places[offender] {
                    Item::Fresh(n) | Item::Known(n) => run.fresh[n].0.out = true,
                    Item::Rehearsed(n) => run.rehearsed[n].learned.clear(),
                    Item::Anchor(_) => {}
                }
                tracing::warn!(item = ?places[offender], "an example breaks training and is left out");
            }
        }
        Ok(())
    }

    fn finish(
        &self,
        run: Run<'_>,
        start: Option<&Start>,
        counted: Option<&Counted>,
        started: Instant,
    ) -> anyhow::Result<End> {
        let Run { learner, fresh, batch, first, mut report, .. } = run;
        let reason = "its loss or gradient is not finite";
        let out = batch.fresh.iter().zip(&fresh).filter(|(_, (f, _))| f.out);
        let put_aside: Vec<_> = out.map(|(e, _)| (e.id, reason.to_owned())).collect();
        let gone: BTreeSet<ExampleId> = put_aside.iter().map(|(id, _)| *id).collect();
        // What is not read is known all the same, and nothing that was hard to learn.
        let known = fresh.iter().zip(&first).map(|((f, _), loss)| loss.or(f.unread.then_some(0.0)));
        let learned = batch.fresh.iter().zip(known).filter(|(e, _)| !gone.contains(&e.id));
        let examples: Vec<LearnedExample> = learned
            .filter_map(|(e, loss)| loss.map(|first_loss| LearnedExample { id: e.id, first_loss }))
            .collect();
        let of = |counted: bool| {
            fresh.iter().zip(&first).filter(move |((f, _), _)| !f.out && f.counted == counted)
        };
        report.first_loss = mean(of(false).filter_map(|(_, loss)| *loss)).unwrap_or_default();
        (report.examples, report.counted) = (examples.len() as u64, of(true).count() as u64);
        learner.adapter().check_finite()?;
        // What broke a step is not learned, and is not counted either.
        let again = if gone.is_empty() { None } else { self.count(batch, start, &gone)? };
        let counted = if gone.is_empty() { counted } else { again.as_ref() };
        report.seconds = started.elapsed().as_secs_f32();
        Ok(End::Learned(Box::new(Outgoing {
            weights: learner.adapter().to_bytes()?,
            optimiser: learner.optimiser_bytes()?,
            report,
            examples,
            put_aside,
            answers: counted.map(count::files).transpose()?,
        })))
    }
}

fn mean(of: impl Iterator<Item = f32>) -> Option<f32> {
    let (sum, count) = of.fold((0.0, 0), |(sum, count), loss| (sum + loss, count + 1));
    (count > 0).then(|| sum / count as f32)
}

enum Halt {
    Stopped,
    Diverged,
}

#[cfg(test)]
mod tests;
