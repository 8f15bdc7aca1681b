//! One run: answers are judged, written into the journal, and handed on.

use super::Args;
use super::asking::{Asking, Event, Order};
use super::cost::Prices;
use super::filter::{Filter, Rejected};
use super::inputs::Unit;
use super::journal::{self, Journal, Outcome};
use super::report::{Bar, Tally};
use super::submit::{self, Job};
use super::teacher::{Answer, Hitch, Passing};
use crate::client::Client;
use crate::interrupt::at_interrupt;
use anyhow::{Result, anyhow};
use serde_json::Value;
use std::io::Write;
use std::sync::{Arc, mpsc};

const AGAIN: &str = "run the same command again to go on";

/// A run, and what has come of it.
pub struct Run<'a> {
    args: &'a Args,
    units: Arc<[Unit]>,
    journal: Journal,
    filter: Filter,
    tally: Tally,
    bar: Bar,
    /// Where pairs go that the server is to have; none when they are written to `--out`, or once
    /// nothing more will come.
    jobs: Option<mpsc::Sender<Job>>,
    ended: Result<()>,
}

impl<'a> Run<'a> {
    /// Nothing is asked yet.
    ///
    /// # Errors
    /// When no bar can be drawn.
    pub fn new(
        args: &'a Args,
        units: Arc<[Unit]>,
        journal: Journal,
        prices: Option<Prices>,
        twice: u64,
    ) -> Result<Self> {
        let filter = Filter::new(args.max_bytes as usize, journal.questions());
        let bar = Bar::new(units.len())?;
        let tally = Tally::new(prices, twice);
        Ok(Self { args, units, journal, filter, tally, bar, jobs: None, ended: Ok(()) })
    }

    /// Asks for what is wanted, and tells what came of it.
    ///
    /// # Errors
    /// When not all is answered, or what is answered cannot be handed on. What is answered is kept.
    pub fn all(
        mut self,
        asking: &Arc<Asking>,
        wanted: Vec<usize>,
        server: Option<Client>,
        out: &mut dyn Write,
    ) -> Result<()> {
        if let Err(error) = self.ask(asking, wanted, server) {
            // This one is of our own disk, and says more than what followed from it.
            self.ended = Err(error);
        }
        self.bar.clear();
        let written = self.write_out();
        for outcome in self.units.iter().filter_map(|unit| self.journal.outcome(&unit.key)) {
            self.tally.count(outcome);
        }
        let place = self.journal.path().to_owned();
        let closed = self.journal.close();
        self.tally.report(self.args, &place, self.ended.as_ref().err(), out)?;
        self.ended.and(written).and(closed)
    }

    fn ask(&mut self, asking: &Arc<Asking>, wanted: Vec<usize>, server: Option<Client>) -> Result<()> {
        let (told, mut events) = tokio::sync::mpsc::channel(asking.parallel);
        if let Some(server) = server {
            self.jobs = Some(submit::start(server, told.clone())?);
        }
        self.hand_on_earlier()?;
        let many = wanted.len();
        if wanted.is_empty() {
            self.jobs = None;
            drop(told);
        } else {
            let interrupted = Arc::clone(asking);
            at_interrupt(move || interrupted.order(Order::Finish))?;
            asking.start(wanted, told)?;
        }
        let (mut over_budget, mut last) = (false, None);
        while let Some(event) = events.blocking_recv() {
            match event {
                Event::Answered(index, answer) => self.answered(index, &answer)?,
                Event::Again(reason, usage) => self.tally.failed(reason, usage),
                Event::GaveUp(index, hitch, usage) => {
                    self.tally.failed(hitch.reason, usage);
                    self.tally.unanswered += 1;
                    last = Some((index, hitch));
                }
                Event::OverBudget => over_budget = true,
                Event::Final(error) => self.end(asking, Order::Leave, error),
                Event::HandedOn(index, Ok(rejected)) => self.handed_on(index, rejected)?,
                Event::HandedOn(_, Err(error)) => self.end(asking, Order::Finish, error),
                // What is still to be handed on is all there will be.
                Event::Asked => self.jobs = None,
            }
            self.bar.show(&self.tally);
        }
        let left = many as u64 - self.tally.answered;
        if left > 0 && self.ended.is_ok() {
            self.ended = Err(match last {
                _ if over_budget => anyhow!(
                    "stopped before --max-cost, with {left} of {many} requests left; raise it and {AGAIN}"
                ),
                Some((index, hitch)) => self.unanswered(index, &hitch, left, many),
                None => anyhow!("interrupted, with {left} of {many} requests left; {AGAIN}"),
            });
        }
        Ok(())
    }

    /// The first reason counts: what comes after may follow from it.
    fn end(&mut self, asking: &Asking, order: Order, error: anyhow::Error) {
        asking.order(order);
        if self.ended.is_ok() {
            self.ended = Err(error);
        }
    }

    fn unanswered(&self, index: usize, hitch: &Hitch, left: u64, many: usize) -> anyhow::Error {
        let hint = match hitch.reason {
            Passing::RateLimited => "lower --requests-per-minute or --parallel",
            Passing::Timeout => "raise --timeout, or lower --parallel",
            Passing::Malformed | Passing::Truncated => "see whether --teacher streams chat completions",
            Passing::Connection | Passing::ServerError => "see whether the teacher is up",
        };
        let (teacher, place) = (&self.args.teacher, &self.units[index].place);
        anyhow!(
            "{teacher} gave no answer to {left} of {many} requests (the last, {place}: {hitch}); {hint}, and {AGAIN}"
        )
    }

    /// What an earlier run had no time to hand on is handed on first.
    fn hand_on_earlier(&mut self) -> Result<()> {
        for index in 0..self.units.len() {
            if let Some(outcome) = self.journal.outcome(&self.units[index].key) {
                let submitted = outcome.submitted;
                self.bar.inc();
                self.tally.known += 1;
                if !submitted {
                    self.hand_on(index)?;
                }
            }
        }
        Ok(())
    }

    fn answered(&mut self, index: usize, answer: &Answer) -> Result<()> {
        let judged = self.filter.judge(&self.units[index], answer);
        self.tally.heard(answer, &judged);
        self.bar.inc();
        let outcome = Outcome {
            pairs: judged.pairs,
            questions: judged.questions,
            rejected: judged.rejected,
            usage: answer.usage,
            submitted: false,
        };
        self.journal.answered(&self.units[index].key, outcome)?;
        self.hand_on(index)
    }

    /// Hands on the pairs of a unit; those for `--out` are written at the end.
    fn hand_on(&mut self, index: usize) -> Result<()> {
        let unit = &self.units[index];
        let (Some(jobs), Some(outcome)) = (&self.jobs, self.journal.outcome(&unit.key)) else {
            return Ok(());
        };
        if outcome.pairs.is_empty() {
            return self.handed_on(index, Rejected::new());
        }
        let documents = submit::documents(unit, &outcome.pairs, &self.args.domain);
        // Where an earlier one could not be handed on, this one stays in the journal for the next run.
        let _ = jobs.send(Job { index, parent: unit.parent.clone(), documents });
        Ok(())
    }

    fn handed_on(&mut self, index: usize, rejected: Rejected) -> Result<()> {
        let key = &self.units[index].key;
        if rejected.is_empty() {
            self.tally.submitted += self.journal.outcome(key).map_or(0, |outcome| outcome.pairs.len() as u64);
        }
        self.journal.submitted(key, rejected)
    }

    /// Writes `--out` whole, in the order of the inputs, whatever the order of the answers was; not,
    /// when there was no answer.
    fn write_out(&self) -> Result<()> {
        let Some(file) = self.args.out.as_ref().filter(|_| self.tally.known + self.tally.answered > 0) else {
            return Ok(());
        };
        let of = |unit: &Unit| -> Vec<Value> {
            let outcome = self.journal.outcome(&unit.key);
            outcome.map_or_else(Vec::new, |o| submit::documents(unit, &o.pairs, &self.args.domain))
        };
        let lines: String = self.units.iter().flat_map(of).map(|document| format!("{document}\n")).collect();
        journal::replace(file, lines.as_bytes())
    }
}
