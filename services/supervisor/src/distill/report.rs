//! What is shown of a run, while it goes on and at its end.

use super::Args;
use super::cost::{Prices, Usage};
use super::filter::{Judged, Rejected};
use super::journal::Outcome;
use super::teacher::{Answer, Passing};
use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

const TICK: Duration = Duration::from_millis(200);

/// Counts of a run.
#[derive(Debug)]
pub struct Tally {
    prices: Option<Prices>,
    twice: u64,
    /// Units that an earlier run has had answered.
    pub known: u64,
    /// Units that were answered.
    pub answered: u64,
    /// Units that were not, however often they were asked.
    pub unanswered: u64,
    /// Pairs that the server has taken.
    pub submitted: u64,
    failures: BTreeMap<Passing, u64>,
    usage: Usage,
    estimated: bool,
    rejected_now: u64,
    /// Of all units, those of earlier runs too.
    accepted: u64,
    rejected: Rejected,
}

impl Tally {
    /// Of nothing; `twice` inputs were left out, because they were there already.
    pub fn new(prices: Option<Prices>, twice: u64) -> Self {
        Self {
            prices,
            twice,
            known: 0,
            answered: 0,
            unanswered: 0,
            submitted: 0,
            failures: BTreeMap::new(),
            usage: Usage::default(),
            estimated: false,
            rejected_now: 0,
            accepted: 0,
            rejected: Rejected::new(),
        }
    }

    /// An answer came.
    pub fn heard(&mut self, answer: &Answer, judged: &Judged) {
        self.answered += 1;
        self.usage += answer.usage;
        self.estimated |= !answer.counted;
        self.rejected_now += judged.rejected.values().sum::<u64>();
    }

    /// A request brought none.
    pub fn failed(&mut self, reason: Passing, usage: Usage) {
        *self.failures.entry(reason).or_default() += 1;
        self.usage += usage;
        self.estimated |= usage != Usage::default();
    }

    /// What became of a unit, of this run or an earlier one.
    pub fn count(&mut self, outcome: &Outcome) {
        self.accepted += outcome.questions.len() as u64;
        for (reason, count) in &outcome.rejected {
            *self.rejected.entry(*reason).or_default() += count;
        }
    }

    fn cost(&self) -> Option<f64> {
        self.prices.map(|prices| prices.of(self.usage))
    }

    fn requests(&self) -> u64 {
        self.answered + self.failures.values().sum::<u64>()
    }

    fn now(&self) -> String {
        let Usage { tokens_in, tokens_out } = self.usage;
        let cost = self.cost().map(|cost| format!(", cost {cost:.4}")).unwrap_or_default();
        format!("{tokens_in} tokens in, {tokens_out} out{cost}, {} rejected", self.rejected_now)
    }

    /// Tells what came of the run.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn report(
        &self,
        args: &Args,
        journal: &Path,
        ended: Option<&anyhow::Error>,
        out: &mut dyn Write,
    ) -> Result<()> {
        if args.json {
            return Ok(writeln!(out, "{}", self.json(args, journal, ended))?);
        }
        let rejected: Vec<String> =
            self.rejected.iter().map(|(why, count)| format!("{count} {}", name(why))).collect();
        let rejected = if rejected.is_empty() { "none".to_owned() } else { rejected.join(", ") };
        let failures: Vec<String> =
            self.failures.iter().map(|(why, count)| format!("{count} {why}")).collect();
        let failures =
            if failures.is_empty() { String::new() } else { format!(" ({})", failures.join(", ")) };
        let Usage { tokens_in, tokens_out } = self.usage;
        let about = if self.estimated { "about " } else { "" };
        writeln!(out, "pairs     {} accepted; rejected: {rejected}", self.accepted)?;
        writeln!(out, "requests  {}{failures}; {} units were answered before", self.requests(), self.known)?;
        writeln!(out, "tokens    {about}{tokens_in} in, {tokens_out} out")?;
        if let Some(cost) = self.cost() {
            writeln!(out, "cost      {about}{cost:.4}")?;
        }
        match &args.out {
            Some(file) => writeln!(out, "written   {} to {}", self.accepted, file.display())?,
            None => writeln!(out, "submitted {} to domain {}", self.submitted, args.domain)?,
        }
        Ok(())
    }

    fn json(&self, args: &Args, journal: &Path, ended: Option<&anyhow::Error>) -> Value {
        let failures: BTreeMap<String, u64> =
            self.failures.iter().map(|(why, count)| (why.to_string().replace(' ', "_"), *count)).collect();
        json!({
            "accepted": self.accepted,
            "rejected": self.rejected,
            "answered": self.answered,
            "answered_before": self.known,
            "unanswered": self.unanswered,
            "left_out_twice": self.twice,
            "requests": self.requests(),
            "failures": failures,
            "submitted": self.submitted,
            "tokens_in": self.usage.tokens_in,
            "tokens_out": self.usage.tokens_out,
            "estimated": self.estimated,
            "cost": self.cost(),
            "out": args.out,
            "journal": journal,
            "error": ended.map(|error| format!("{error:#}")),
        })
    }
}

/// As it is written in JSON.
fn name(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default()
}

/// The progress bar; nothing where nobody watches.
pub struct Bar(ProgressBar);

impl Bar {
    /// For so many units.
    ///
    /// # Errors
    /// When it cannot be drawn.
    pub fn new(units: usize) -> Result<Self> {
        let bar = ProgressBar::new(units as u64);
        bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} {eta} {msg}")?);
        bar.enable_steady_tick(TICK);
        Ok(Self(bar))
    }

    /// One unit more is answered.
    pub fn inc(&self) {
        self.0.inc(1);
    }

    /// What it costs so far.
    pub fn show(&self, tally: &Tally) {
        self.0.set_message(tally.now());
    }

    /// Takes it away.
    pub fn clear(&self) {
        self.0.finish_and_clear();
    }
}
