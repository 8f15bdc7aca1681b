//! What happens on the compute thread: measure, then take in what was learned.

use crate::counting::{Counted, Counting, Heard};
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
use model::ridge::Head;
use proto::{Candidate, Example, ExampleId, Measure, Receipt, Recited, Retained};
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

/// Sequences between two looks at waiting requests.
const MICRO_SEQUENCES: usize = 8;

/// Examples from which on a sample is asked: of what is never trained on, or of what a batch does not rehearse.
const SAMPLE_MIN: u32 = 16;

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
    /// What it counted of answers that repeat.
    pub counts: Option<Vec<u8>>,
    /// What was solved of that.
    pub head: Option<Vec<u8>>,
}

/// What becomes of the counts of answers that repeat.
pub enum Answers {
    /// They are left out: nothing is to be counted.
    Off,
    /// They stay as the parent's: nothing repeats, or what is known would be lost.
    AsBefore,
    /// With those of the batch.
    Counted(Box<Counted>),
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
        counting: Answers,
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

    /// Judges a candidate.
    ///
    /// # Errors
    /// When its weights or the parent's files do not fit the base.
    pub fn judge(
        &self,
        candidate: &Candidate,
        weights: &[u8],
        held: Held,
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
        let counted = self.count(candidate, &fresh, &held)?;
        let older = held.head.as_deref().filter(|_| self.counting.is_some());
        let older = older.map(Head::from_bytes).transpose()?;
        let rehearsed = candidate.batch.rehearsed.iter().map(|example| example.id).collect();
        let (retained, counted) = self.measure(&mut probe, &adapter, &rehearsed, counted, older.as_ref())?;
        // What is learned is probed whole while it is little; a few chunks that were never trained on are
        // no sample of what was understood.
        let least = |probe: &str| if probe.starts_with("held_out") { SAMPLE_MIN } else { 0 };
        let harmed = retained.iter().find(|r| !gate::passes(&r.measure, least(&r.probe))).map(harm);
        let verdict = match harmed {
            Some(reason) => Verdict::Harmed(reason),
            None => {
                let head = counted.as_ref().map(|counted| &counted.head).or(older.as_ref());
                let probe = self.take_in(candidate, &fresh, &adapter, head, probe)?;
                let fisher = self.fisher(&adapter, &fresh, candidate.batch.seed, held.fisher.as_deref())?;
                let counting = match counted {
                    Some(counted) => Answers::Counted(Box::new(counted)),
                    None if self.counting.is_some() => Answers::AsBefore,
                    None => Answers::Off,
                };
                Verdict::Intact { fisher, probe, counting }
            }
        };
        let seconds = started.elapsed().as_secs_f32();
        Ok((verdict, Receipt { probes: retained, seconds }))
    }

    /// Counts what the batch answers, beside what its parent counted.
    fn count(
        &self,
        candidate: &Candidate,
        fresh: &[&Example],
        held: &Held,
    ) -> anyhow::Result<Option<Counted>> {
        let Some(counting) = &self.counting else { return Ok(None) };
        let beside: Vec<&Example> = candidate.batch.rehearsed.iter().collect();
        counting.take_in(fresh, &beside, held.counts.as_deref(), &mut self.between())
    }

    /// Measures the candidate on every part of the probe, and writes its scores into it. What was counted of the batch is
    /// given back, unless fewer known answers would be said with it than with the `older` head.
    fn measure(
        &self,
        probe: &mut Probe,
        adapter: &Adapter,
        rehearsed: &BTreeSet<ExampleId>,
        counted: Option<Counted>,
        older: Option<&Head>,
    ) -> anyhow::Result<(Vec<Retained>, Option<Counted>)> {
        let gating = &self.gating;
        let parts = probe.parts();
        let sequences = |entries: &[&mut Entry]| entries.iter().map(|entry| entry.sequence()).collect();
        let sequences: Vec<Vec<Sequence>> = parts.iter().map(|(_, entries)| sequences(entries)).collect();
        let heard =
            sequences.iter().map(|part| self.hear(adapter, part)).collect::<anyhow::Result<Vec<_>>>()?;
        let said = |head: Option<&Head>| -> anyhow::Result<Vec<Vec<bool>>> {
            sequences.iter().zip(&heard).map(|(part, heard)| self.says(head, part, heard)).collect()
        };
        let head = counted.as_ref().map(|counted| &counted.head).or(older);
        let (mut said, said_before) = (said(head)?, said(older)?);
        let all = |said: &[Vec<bool>]| said.iter().flatten().filter(|said| **said).count();
        let is_kept = parts.iter().zip(&said).all(|((_, entries), said)| {
            let (best, before) = marks(entries);
            gate::says_as_many(gate::recited(&best, &before, said, gating.tolerance))
        });
        let takes = is_kept || all(&said) >= all(&said_before);
        if !takes {
            said = said_before;
            tracing::info!(
                "answers of a batch are not counted: with them fewer of those known would be said"
            );
        }
        let mut rows = Vec::new();
        // Text and answers are judged apart: an answer gains some nats and a text some tenths, so that in one mean a text
        // could be lost for what is allowed of the answers.
        for (((name, mut entries), heard), said) in parts.into_iter().zip(&heard).zip(&said) {
            let after: Vec<f32> = heard.iter().map(|heard| heard.loss).collect();
            let now: Vec<(&Entry, f32)> =
                entries.iter().map(|entry| &**entry).zip(after.iter().copied()).collect();
            let mut measure = self.compare(&now, gate::Z95);
            if entries.iter().all(|entry| entry.is_answer()) {
                let (best, before) = marks(&entries);
                measure.recited = Some(gate::recited(&best, &before, said, gating.tolerance));
            }
            rows.push(retained(name, measure));
            let rested: Vec<_> =
                now.into_iter().filter(|(entry, _)| !rehearsed.contains(&entry.id)).collect();
            let is_sample = !rehearsed.is_empty() && rested.len() >= SAMPLE_MIN as usize;
            if name == "memory_text" && is_sample {
                // What is rehearsed gets better whatever else the batch teaches.
                rows.push(retained("rested_text", self.compare(&rested, gate::NO_BOUND)));
            }
            note(&mut entries, &after, said);
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
            let heard = self.hear(adapter, &chosen)?;
            let said = self.says(head, &chosen, &heard)?;
            let scores = base.into_iter().zip(&heard).zip(said);
            let scores: Vec<_> = scores.map(|((base, heard), said)| (base, heard.loss, said)).collect();
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

    /// What the adapter makes of each sequence.
    fn hear(&self, adapter: &Adapter, sequences: &[Sequence]) -> anyhow::Result<Vec<Heard>> {
        let recited = self
            .in_turn(sequences, |part| recite(&self.base, &[(adapter, 1.0)], part, self.gating.row_tokens))?;
        let heard = |(score, said): &(SequenceScore, bool)| Heard {
            loss: mean(score),
            log_likelihood: -score.nll_sum,
            said: *said,
        };
        Ok(recited.iter().map(heard).collect())
    }

    /// Which sequences are said to the letter as they are served.
    fn says(
        &self,
        head: Option<&Head>,
        sequences: &[Sequence],
        heard: &[Heard],
    ) -> anyhow::Result<Vec<bool>> {
        let by_model = || heard.iter().map(|heard| heard.said).collect();
        let (Some(counting), Some(head)) = (&self.counting, head) else { return Ok(by_model()) };
        counting.says(head, sequences, heard)
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
