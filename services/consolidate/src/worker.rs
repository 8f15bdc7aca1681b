//! What happens on the compute thread: measure, then take in what was learned.

use crate::gate;
use crate::probe::{Entry, Probe, note, reservoir, take_in};
use kit::compute::{Stint, Turn};
use kit::lane::Stop;
use model::device::helpers;
use model::ewc::{self, Ewc};
use model::llama::Base;
use model::lora::Adapter;
use model::loss::{SequenceScore, recite, score};
use model::pack::Sequence;
use model::ridge::{Counting, Head, Heard};
use proto::{Candidate, Example, ExampleId, Measure, Receipt, Recited, Retained};
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

/// Sequences between two looks at waiting requests.
const MICRO_SEQUENCES: usize = 8;

/// Examples from which on a sample is asked: of what is never trained on, or of what a batch does not rehearse.
const SAMPLE_MIN: u32 = 16;

/// Why a batch is learned again whose answers were not repeated, since they are counted, where that cannot be.
const NOT_COUNTED: &str =
    "counting its answers would have cost earlier knowledge, and they were not learned by heart";

/// How candidates are judged.
#[derive(Debug, Clone)]
pub struct Gating {
    /// Rise of the mean loss on what was learned that is let through, as a share of what was gained.
    pub tolerance: f32,
    /// The same for the anchor, as a share of the base's loss.
    pub anchor_tolerance: f32,
    /// Examples in the memory part of a probe.
    pub memory_probe: usize,
    /// Examples in its held-out part.
    pub held_out_probe: usize,
    /// Fresh examples that Fisher information is taken over; 0 without EWC.
    pub fisher_examples: usize,
    /// Weight of older Fisher information in the online form.
    pub fisher_decay: f64,
    /// Length of packed rows, tokens.
    pub row_tokens: usize,
    /// Answers that are said because of what is counted are to be known by heart all the same.
    pub repeat_counted: bool,
    /// Share of the time that measuring takes while requests run.
    pub share_while_serving: f32,
}

/// Owned by the compute thread.
pub struct Worker {
    base: Base,
    gating: Gating,
    anchors: Vec<Sequence>,
    /// None where answers that repeat are not counted.
    counting: Option<Counting>,
    turn: Arc<Turn>,
    stop: Stop,
}

/// What the parent generation left behind.
#[derive(Default)]
pub struct Held {
    /// Its probe.
    pub probe: Option<Vec<u8>>,
    /// Its Fisher information.
    pub fisher: Option<Vec<u8>>,
    /// What was solved of what it counted of answers that repeat.
    pub head: Option<Vec<u8>>,
}

/// What becomes of what is counted of answers that repeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answers {
    /// It is left out: nothing is to be counted.
    Off,
    /// It stays the parent's: nothing repeats, or what is known would be lost.
    AsBefore,
    /// It is the candidate's.
    Counted,
}

/// The gate's verdict on a candidate.
pub enum Verdict {
    /// Old knowledge is intact.
    Intact {
        /// Fisher information with the new one added.
        fisher: Option<Vec<u8>>,
        /// The probe with the new examples and scores.
        probe: Vec<u8>,
        /// What is known of answers that repeat.
        answers: Answers,
    },
    /// It is not, and this is what was lost.
    Harmed(String),
    /// The candidate changes nothing.
    Useless(String),
}

impl Worker {
    /// Takes the base, the gate's own anchor sequences: other ones than those rehearsed, and what counts answers that repeat.
    pub fn new(
        base: Base,
        gating: Gating,
        anchors: Vec<Sequence>,
        counting: Option<Counting>,
        turn: Arc<Turn>,
        stop: Stop,
    ) -> Self {
        Self { base, gating, anchors, counting, turn, stop }
    }

    /// Judges a candidate of these weights, and of what was solved of what it counted.
    ///
    /// # Errors
    /// When its files or the parent's do not fit the base.
    pub fn judge(
        &self,
        candidate: &Candidate,
        weights: &[u8],
        head: Option<&[u8]>,
        held: &Held,
    ) -> anyhow::Result<(Verdict, Receipt)> {
        let (started, _helpers) = (Instant::now(), helpers());
        let adapter = Adapter::from_bytes(weights, self.base.config())?;
        adapter.check_finite()?;
        if !adapter.has_effect() {
            let reason = "learning from it changed nothing".to_owned();
            return Ok((Verdict::Useless(reason), Receipt::default()));
        }
        let mut probe = match &held.probe {
            Some(bytes) => Probe::from_bytes(bytes)?,
            None => Probe { anchors: self.base_anchors()?, ..Probe::default() },
        };
        if self.counting.is_none() && held.head.is_some() {
            // What was said by counts that are no longer wanted is nothing to hold an adapter to.
            probe.unmark();
        }
        let learned: BTreeSet<ExampleId> = candidate.learned.iter().map(|l| l.id).collect();
        let fresh: Vec<&Example> = candidate.batch.fresh.iter().filter(|e| learned.contains(&e.id)).collect();
        let read = |bytes: Option<&[u8]>| {
            bytes.filter(|_| self.counting.is_some()).map(Head::from_bytes).transpose()
        };
        let (counted, older) = (read(head)?, read(held.head.as_deref())?);
        // Answers that repeat by chance are facts, each of which can be corrected.
        let labels = older.as_ref().filter(|head| head.is_trusted());
        probe.correct(&fresh, labels.map_or(&[], Head::answers));
        let rehearsed = candidate.batch.rehearsed.iter().map(|example| example.id).collect();
        // Once it was refused it was learned by heart, and what it counted is no longer needed.
        let relies = candidate.batch.attempt == 0 && !self.gating.repeat_counted;
        let relies = relies && counted.as_ref().is_some_and(Head::speaks);
        let (retained, counted) =
            self.measure(&mut probe, &adapter, &rehearsed, counted.as_ref(), older.as_ref())?;
        // What is learned is probed whole while it is little; a few chunks that were never trained on are
        // no sample of what was understood.
        let least = |probe: &str| if probe.starts_with("held_out") { SAMPLE_MIN } else { 0 };
        let harmed = retained.iter().find(|r| !gate::passes(&r.measure, least(&r.probe))).map(harm);
        let harmed = harmed.or_else(|| (relies && counted.is_none()).then(|| NOT_COUNTED.to_owned()));
        let verdict = match harmed {
            Some(reason) => Verdict::Harmed(reason),
            None => {
                let head = counted.or(older.as_ref());
                let probe = self.take_in(candidate, &fresh, &adapter, head, probe)?;
                let fisher = self.fisher(&adapter, &fresh, candidate.batch.seed, held.fisher.as_deref())?;
                let answers = match counted {
                    Some(_) => Answers::Counted,
                    None if self.counting.is_some() => Answers::AsBefore,
                    None => Answers::Off,
                };
                Verdict::Intact { fisher, probe, answers }
            }
        };
        let seconds = started.elapsed().as_secs_f32();
        Ok((verdict, Receipt { probes: retained, seconds }))
    }

    /// Measures the candidate on every part of the probe, and writes its scores into it. What was counted with the
    /// batch is given back, unless fewer known answers would be said with it than with the `older` head.
    fn measure<'h>(
        &self,
        probe: &mut Probe,
        adapter: &Adapter,
        rehearsed: &BTreeSet<ExampleId>,
        counted: Option<&'h Head>,
        older: Option<&Head>,
    ) -> anyhow::Result<(Vec<Retained>, Option<&'h Head>)> {
        let gating = &self.gating;
        let parts = probe.parts();
        let mut told = Vec::with_capacity(parts.len());
        for (_, entries) in &parts {
            let sequences: Vec<Sequence> = entries.iter().map(|entry| entry.sequence()).collect();
            told.push(self.ask(adapter, &[counted.or(older), older], &sequences)?);
        }
        let all = |head: usize| told.iter().flat_map(|told| &told[head]).filter(|told| told.said).count();
        let is_kept = parts.iter().zip(&told).all(|((_, entries), told)| {
            let (best, before) = marks(entries);
            gate::says_as_many(gate::recited(&best, &before, &said(&told[0]), gating.tolerance))
        });
        let takes = is_kept || all(0) >= all(1);
        if !takes {
            tracing::info!(
                "answers of a batch are not counted: with them fewer of those known would be said"
            );
        }
        let mut rows = Vec::new();
        // Text and answers are judged apart: an answer gains some nats and a text some tenths, so that in one mean a text
        // could be lost for what is allowed of the answers.
        for ((name, mut entries), told) in parts.into_iter().zip(&told) {
            let told = &told[usize::from(!takes)];
            // Of what is said because of what is counted, what the adapter makes changes nothing that is served.
            let after =
                entries.iter().zip(told).map(|(entry, told)| if told.known { entry.best } else { told.loss });
            let after: Vec<f32> = after.collect();
            let now: Vec<(&Entry, f32)> =
                entries.iter().map(|entry| &**entry).zip(after.iter().copied()).collect();
            let mut measure = self.compare(&now, gate::Z95);
            if entries.iter().all(|entry| entry.is_answer()) {
                let (best, before) = marks(&entries);
                measure.recited = Some(gate::recited(&best, &before, &said(told), gating.tolerance));
            }
            rows.push(retained(name, measure));
            let rested: Vec<_> =
                now.into_iter().filter(|(entry, _)| !rehearsed.contains(&entry.id)).collect();
            let is_sample = !rehearsed.is_empty() && rested.len() >= SAMPLE_MIN as usize;
            if name == "memory_text" && is_sample {
                // What is rehearsed gets better whatever else the batch teaches.
                rows.push(retained("rested_text", self.compare(&rested, gate::NO_BOUND)));
            }
            note(&mut entries, &after, &said(told));
        }
        let after = self.losses(&[(adapter, 1.0)], &self.anchors)?;
        let (best, before): (Vec<f32>, Vec<f32>) = probe.anchors.iter().copied().unzip();
        let allowed = gating.anchor_tolerance * gate::mean(&best);
        rows.push(retained("anchor", gate::measure(&best, &before, &after, allowed, gate::Z95)));
        for (anchor, loss) in probe.anchors.iter_mut().zip(after) {
            // The anchor's best stays the base's own: to fit it better than the base is no merit.
            anchor.1 = loss;
        }
        Ok((rows, counted.filter(|_| takes)))
    }

    /// Compares the losses of entries with those before; for `z` see [`gate::measure`].
    fn compare(&self, now: &[(&Entry, f32)], z: f32) -> Measure {
        let of = |loss: fn(&Entry) -> f32| now.iter().map(|(entry, _)| loss(entry)).collect::<Vec<f32>>();
        let (base, best, before) = (of(|e| e.base), of(|e| e.best), of(|e| e.last));
        let after: Vec<f32> = now.iter().map(|(_, after)| *after).collect();
        gate::measure(&best, &before, &after, gate::share_of_gain(&base, &best, self.gating.tolerance), z)
    }

    /// The probe with what was learned, as a frame.
    fn take_in(
        &self,
        candidate: &Candidate,
        fresh: &[&Example],
        adapter: &Adapter,
        head: Option<&Head>,
        mut probe: Probe,
    ) -> anyhow::Result<Vec<u8>> {
        let batch = &candidate.batch;
        let held_out: Vec<&Example> = batch.held_out.iter().collect();
        let [memory_offered, held_out_offered] = &mut probe.offered;
        let parts = [
            (&mut probe.memory, memory_offered, fresh, self.gating.memory_probe),
            (&mut probe.held_out, held_out_offered, &held_out[..], self.gating.held_out_probe),
        ];
        for (entries, offered, examples, capacity) in parts {
            let places = reservoir(offered, entries.len(), capacity, examples.len(), batch.seed);
            let chosen: Vec<Sequence> = places.iter().map(|&(n, _)| sequence(examples[n])).collect();
            let base = self.losses(&[], &chosen)?;
            let told = self.ask(adapter, &[head], &chosen)?.into_iter().flatten();
            let scores: Vec<_> =
                base.into_iter().zip(told).map(|(base, told)| (base, told.loss, told.said)).collect();
            take_in(entries, examples, &scores, &places);
        }
        probe.to_bytes()
    }

    /// Fisher information in its online form (Schwarz et al. 2018): the older one decays, that of the
    /// fresh examples is added, and the penalty's centre moves to the candidate. What is rehearsed is in the older one
    /// already, and would count once more each time.
    fn fisher(
        &self,
        adapter: &Adapter,
        fresh: &[&Example],
        seed: u64,
        older: Option<&[u8]>,
    ) -> anyhow::Result<Option<Vec<u8>>> {
        if self.gating.fisher_examples == 0 || fresh.is_empty() {
            return Ok(older.map(<[u8]>::to_vec));
        }
        let stride = fresh.len().div_ceil(self.gating.fisher_examples);
        let sample: Vec<Sequence> = fresh.iter().step_by(stride).map(|e| sequence(e)).collect();
        let Some(new) = ewc::fisher(&self.base, adapter, &sample, seed, &mut self.between())? else {
            anyhow::bail!("told to stop");
        };
        let state = match older {
            Some(bytes) => {
                let older = Ewc::from_bytes(bytes, adapter.parameter_count())?;
                older.update(self.gating.fisher_decay, &new, adapter)?
            }
            None => Ewc::new(new, adapter)?,
        };
        Ok(Some(state.to_bytes()?))
    }

    /// Lets waiting requests go first, between two parts of what is done, and says whether to stop.
    fn between(&self) -> impl FnMut() -> ControlFlow<()> {
        let mut last = self.stint();
        move || {
            self.turn.yield_after(&last, self.gating.share_while_serving, &self.stop);
            last = self.stint();
            if self.stop.is_set() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
    }

    /// The base's own loss on its anchor sequences: where the first generation starts from.
    fn base_anchors(&self) -> anyhow::Result<Vec<(f32, f32)>> {
        let losses = self.losses(&[], &self.anchors)?;
        Ok(losses.into_iter().map(|loss| (loss, loss)).collect())
    }

    /// The mean loss of each sequence.
    fn losses(&self, adapters: &[(&Adapter, f64)], sequences: &[Sequence]) -> anyhow::Result<Vec<f32>> {
        self.in_turn(sequences, |part| {
            let scores = score(&self.base, adapters, part, self.gating.row_tokens)?;
            Ok(scores.iter().map(mean).collect())
        })
    }

    /// What is told of each sequence, as served with each of the heads.
    fn ask(
        &self,
        adapter: &Adapter,
        heads: &[Option<&Head>],
        sequences: &[Sequence],
    ) -> anyhow::Result<Vec<Vec<Told>>> {
        let recited = self
            .in_turn(sequences, |part| recite(&self.base, &[(adapter, 1.0)], part, self.gating.row_tokens))?;
        let alone =
            |(score, said): &(SequenceScore, bool)| Told { loss: mean(score), said: *said, known: false };
        let mut told = vec![recited.iter().map(alone).collect::<Vec<_>>(); heads.len()];
        let says_something = heads.iter().flatten().any(|head| head.describes());
        let Some(counting) = self.counting.as_ref().filter(|_| says_something) else {
            return Ok(told);
        };
        let heard =
            |(score, said): &(SequenceScore, bool)| Heard { log_likelihood: -score.nll_sum, said: *said };
        let heard: Vec<Heard> = recited.iter().map(heard).collect();
        let asked = counting.look_at(sequences)?;
        for (told, head) in told.iter_mut().zip(heads) {
            let Some(head) = head else { continue };
            let served = asked.says(head, &heard)?.into_iter().zip(asked.knows(head)?);
            for (told, (said, known)) in told.iter_mut().zip(served) {
                (told.said, told.known) = (said, known && !self.gating.repeat_counted);
            }
        }
        Ok(told)
    }

    /// Measures some sequences at a time, and lets waiting requests in between.
    fn in_turn<T>(
        &self,
        sequences: &[Sequence],
        measure: impl Fn(&[Sequence]) -> anyhow::Result<Vec<T>>,
    ) -> anyhow::Result<Vec<T>> {
        let mut all = Vec::with_capacity(sequences.len());
        for part in sequences.chunks(MICRO_SEQUENCES) {
            let stint = self.stint();
            all.extend(measure(part)?);
            self.turn.yield_after(&stint, self.gating.share_while_serving, &self.stop);
        }
        Ok(all)
    }

    fn stint(&self) -> Stint {
        Stint::begin(self.base.is_on_cpu())
    }
}

/// What is told of a sequence.
#[derive(Debug, Clone, Copy)]
struct Told {
    /// The adapter's mean loss, nats a token.
    loss: f32,
    /// It is said to the letter.
    said: bool,
    /// That is so because of what is counted, whatever the adapter makes of it.
    known: bool,
}

fn said(told: &[Told]) -> Vec<bool> {
    told.iter().map(|told| told.said).collect()
}

/// What the best and the newest published generation said.
fn marks(entries: &[&mut Entry]) -> (Vec<bool>, Vec<bool>) {
    entries.iter().map(|entry| (entry.said_best, entry.said_last)).unzip()
}

fn mean(score: &SequenceScore) -> f32 {
    score.mean() as f32
}

fn sequence(example: &Example) -> Sequence {
    Sequence {
        tokens: example.piece.tokens.clone(),
        learned: example.piece.learned.clone(),
        rehearsed: false,
    }
}

fn retained(probe: &str, measure: Measure) -> Retained {
    Retained { probe: probe.to_owned(), measure }
}

/// What the user reads when a candidate was refused.
fn harm(row: &Retained) -> String {
    let Measure { best, after, rise_upper, rise_allowed, examples, recited, .. } = row.measure;
    let probe = row.probe.replace('_', " ");
    let lost = match recited.filter(|recited| !gate::says_as_many(*recited)) {
        Some(Recited { best, after, .. }) => {
            format!("of {examples} {probe} it would say {after} to the letter, and said {best}")
        }
        None => format!(
            "on {examples} {probe} examples the loss went from {best:.3} to {after:.3}, by up to {rise_upper:.3}, and \
             {rise_allowed:.3} is allowed"
        ),
    };
    format!("learning it would have cost earlier knowledge: {lost}")
}

#[cfg(test)]
mod tests;
