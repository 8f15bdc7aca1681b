//! One run: answers are judged, written into the journal, and handed on.

use super::Args;
use super::asking::{Asking, Event};
use super::cost::Prices;
use super::filter::{Filter, Rejected, Rejection};
use super::inputs::{SOURCE, Unit};
use super::journal::{self, Journal, Outcome};
use super::report::{Bar, Tally};
use super::teacher::{Answer, Passing};
use crate::client::{Client, Refused, segment};
use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use std::io::Write;
use std::sync::Arc;
use ureq::http::StatusCode;

/// After so many units in a row without an answer the others are not asked for either.
const GIVEN_UP_MAX: u32 = 3;

/// A run, and what has come of it.
pub struct Run<'a> {
    args: &'a Args,
    units: Arc<[Unit]>,
    journal: Journal,
    /// The server that gets the pairs; without one they are written to `--out`.
    server: Option<Client>,
    filter: Filter,
    tally: Tally,
    bar: Bar,
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
        server: Option<Client>,
        prices: Option<Prices>,
        twice: u64,
    ) -> Result<Self> {
        let filter = Filter::new(args.max_bytes as usize, journal.questions());
        let bar = Bar::new(units.len())?;
        let tally = Tally::new(prices, twice);
        Ok(Self { args, units, journal, server, filter, tally, bar })
    }

    /// Asks for what is wanted, and tells what came of it.
    ///
    /// # Errors
    /// When not all is answered, or what is answered cannot be handed on. What is answered is kept.
    pub fn all(mut self, asking: &Arc<Asking>, wanted: Vec<usize>, out: &mut dyn Write) -> Result<()> {
        let mut ended = self.hand_on_earlier();
        if ended.is_ok() && !wanted.is_empty() {
            ended = self.ask(asking, wanted);
        }
        self.bar.clear();
        let written = self.write_out();
        for outcome in self.units.iter().filter_map(|unit| self.journal.outcome(&unit.key)) {
            self.tally.count(outcome);
        }
        let place = self.journal.path().to_owned();
        let closed = self.journal.close();
        self.tally.report(self.args, &place, ended.as_ref().err(), out)?;
        ended.and(written).and(closed)
    }

    /// Submits what an earlier run had no time to.
    fn hand_on_earlier(&mut self) -> Result<()> {
        let units = Arc::clone(&self.units);
        for unit in units.iter() {
            if let Some(outcome) = self.journal.outcome(&unit.key) {
                self.bar.inc();
                self.tally.known += 1;
                if !outcome.submitted {
                    self.hand_on(unit)?;
                }
            }
        }
        Ok(())
    }

    fn ask(&mut self, asking: &Arc<Asking>, wanted: Vec<usize>) -> Result<()> {
        let (count, units) = (wanted.len(), Arc::clone(&self.units));
        let mut events = asking.start(wanted)?;
        let (mut in_a_row, mut over_budget, mut last) = (0, false, None);
        while let Some(event) = events.blocking_recv() {
            match event {
                Event::Answered(index, answer) => {
                    in_a_row = 0;
                    self.answered(&units[index], &answer)?;
                }
                Event::Again(reason, usage) => self.tally.failed(reason, usage),
                Event::GaveUp(index, reason, usage) => {
                    self.tally.failed(reason, usage);
                    self.tally.unanswered += 1;
                    in_a_row += 1;
                    last = Some((index, reason));
                    if in_a_row == GIVEN_UP_MAX {
                        break;
                    }
                }
                Event::OverBudget => over_budget = true,
                Event::Final(error) => return Err(error),
            }
            self.bar.show(&self.tally);
        }
        let left = count as u64 - self.tally.answered;
        let again = "run the same command again to go on";
        if asking.is_stopped() {
            bail!("interrupted, with {left} of {count} requests left; {again}");
        }
        if over_budget {
            bail!("stopped before --max-cost, with {left} of {count} requests left; raise it and {again}");
        }
        match last {
            Some((index, reason)) => Err(self.unanswered(&units[index], reason, left, count)),
            None => Ok(()),
        }
    }

    fn unanswered(&self, unit: &Unit, reason: Passing, left: u64, count: usize) -> anyhow::Error {
        let hint = match reason {
            Passing::RateLimited => "lower --requests-per-minute or --parallel",
            Passing::Timeout => "raise --timeout, or lower --parallel",
            Passing::Malformed | Passing::Truncated => "see whether --teacher streams chat completions",
            Passing::Connection | Passing::ServerError => "see whether the teacher is up",
        };
        let (teacher, place) = (&self.args.teacher, &unit.place);
        anyhow!(
            "{teacher} gave no answer to {left} of {count} requests (the last, {place}: {reason}); {hint}, and run \
             the same command again to go on"
        )
    }

    fn answered(&mut self, unit: &Unit, answer: &Answer) -> Result<()> {
        let judged = self.filter.judge(unit, answer);
        self.tally.heard(answer, &judged);
        self.bar.inc();
        let outcome = Outcome {
            pairs: judged.pairs,
            questions: judged.questions,
            rejected: judged.rejected,
            usage: answer.usage,
            submitted: false,
        };
        self.journal.answered(&unit.key, outcome)?;
        self.hand_on(unit)
    }

    /// Submits the pairs of a unit; those for `--out` are written at the end.
    fn hand_on(&mut self, unit: &Unit) -> Result<()> {
        let (Some(server), Some(outcome)) = (&self.server, self.journal.outcome(&unit.key)) else {
            return Ok(());
        };
        let mut rejected = Rejected::new();
        let many = outcome.pairs.len() as u64;
        if many > 0 {
            if is_there(server, unit.parent.as_deref())? {
                let documents = documents(unit, outcome, &self.args.domain);
                // The key is of what is sent, so that the same answer is the same documents however
                // often it is sent, and another answer is others.
                let hash = blake3::hash(documents.to_string().as_bytes()).to_hex();
                let key = format!("distill-{}", &hash[..32]);
                let body = json!({ "documents": documents });
                server.post_as(&key, "/v1/documents", &body).context("the server does not take an answer")?;
                self.tally.submitted += many;
            } else {
                rejected.insert(Rejection::Forgotten, many);
            }
        }
        self.journal.submitted(&unit.key, rejected)
    }

    /// Writes `--out` whole, in the order of the inputs, whatever the order of the answers was.
    fn write_out(&self) -> Result<()> {
        let Some(file) = &self.args.out else { return Ok(()) };
        let mut text = String::new();
        for unit in self.units.iter() {
            let Some(outcome) = self.journal.outcome(&unit.key) else { continue };
            for mut document in
                documents(unit, outcome, &self.args.domain).as_array().into_iter().flatten().cloned()
            {
                // So that 'engram learn' shows the answer as it would be submitted.
                document["domain"] = json!(self.args.domain);
                text += &format!("{document}\n");
            }
        }
        journal::replace(file, text.as_bytes())
    }
}

/// The pairs of a unit as documents. A completion begins with a space, since it continues its prompt.
fn documents(unit: &Unit, outcome: &Outcome, domain: &str) -> Value {
    let document = |pair: &super::pairs::Pair| {
        json!({
            "prompt": pair.prompt,
            "completion": format!(" {}", pair.completion),
            "domain": domain,
            "source": SOURCE,
            "derived_from": unit.derived_from,
        })
    };
    outcome.pairs.iter().map(document).collect()
}

/// Whether a document that answers derive from is still there: what was forgotten stays forgotten.
fn is_there(server: &Client, parent: Option<&str>) -> Result<bool> {
    let Some(parent) = parent else { return Ok(true) };
    match server.get(&format!("/v1/documents/{}", segment(parent))) {
        Ok(_) => Ok(true),
        Err(error) => match error.downcast_ref::<Refused>() {
            Some(refused) if refused.status == StatusCode::NOT_FOUND => Ok(false),
            _ => Err(error),
        },
    }
}
