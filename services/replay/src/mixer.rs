//! The start of learning: which lineage learns next, from which fresh examples, beside which
//! rehearsed ones.

use crate::answers::{self, Answers};
use crate::buffer::{Buffer, Row, Strategy};
use anyhow::Context;
use kit::blobs::Blobs;
use kit::lane::Stop;
use kit::ledger::{Ledger, Room};
use kit::link::Link;
use kit::manifests::Registry;
use kit::store::Store;
use proto::wire::{self, Kind};
use proto::{Batch, Domain, Example, ExampleId, Generation, LearnedExample, Lineage, Manifest};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Tokens of a prompt with its answer, in the mean, of which as many are counted together as may be.
const COUNTED_TOKENS: usize = 64;
/// Passes until rehearsal comes round to the same examples. A few that are repeated in every pass are
/// learned by heart, and all the others forgotten.
const REHEARSAL_ROUNDS: usize = 8;
/// Rehearsed examples beside each fresh text, up to so many: beside fewer a few texts of another kind, which
/// nothing contradicts, take a share of what a domain understands with them.
const BESIDE_A_TEXT: usize = 6;
/// See [`BESIDE_A_TEXT`].
const BESIDE_TEXTS_MAX: usize = 64;

/// How batches are mixed.
#[derive(Debug, Clone)]
pub struct Mixing {
    /// Examples the replay buffer holds.
    pub capacity: usize,
    /// What it keeps when it is full.
    pub strategy: Strategy,
    /// Share of fresh examples in a batch.
    pub new_data_ratio: f32,
    /// Examples rehearsed at least, as far as there are any.
    pub rehearse_min: usize,
    /// Fresh examples in a batch at most; a longer document still comes whole.
    pub batch_examples: usize,
    /// Fresh examples in a batch at most, where each is one short answer to one prompt, which is counted.
    pub batch_counted: usize,
    /// Tokens of such an answer at most.
    pub answer_tokens: usize,
    /// Answers that come once of which a lineage remembers so many.
    pub facts_max: usize,
    /// Whether learning asks which answers are known.
    pub known_answers: bool,
    /// Looks for work at least this often.
    pub poll: Duration,
    /// Seed of all that is random in learning.
    pub seed: u64,
    /// The folder whose disk has to have this much free, in percent, before anything is learned.
    pub disk: PathBuf,
    /// See `disk`.
    pub disk_free_percent: f64,
}

impl Mixing {
    /// What is learned together, of so many documents at most, by a lineage that remembers so many facts. Where there is no room
    /// for more of them they are learned by heart, fewer at a time.
    fn room(&self, documents: usize, facts: usize) -> Room {
        let (examples, answer_tokens) = (self.batch_examples, self.answer_tokens);
        let counted = self.batch_counted.min(self.facts_max.saturating_sub(facts));
        Room { documents, examples, counted, answer_tokens, counted_tokens: counted * COUNTED_TOKENS }
    }

    /// Examples that each pass rehearses beside `fresh` ones, of which some are `texts`: as many as the ratio asks for or
    /// as are the least, and twice as many again with each refusal by the gate that is to be avoided.
    fn rehearsed_a_pass(&self, fresh: usize, texts: usize, care: u32) -> usize {
        let ratio = self.new_data_ratio.clamp(0.01, 1.0);
        let asked = (fresh as f32 * (1.0 - ratio) / ratio).round() as usize;
        let beside_texts = (texts * BESIDE_A_TEXT).min(BESIDE_TEXTS_MAX);
        let least = if ratio < 1.0 { self.rehearse_min.max(beside_texts) } else { 0 };
        asked.max(least) << care.min(4)
    }
}

/// Mixes batches, one at a time: the next is planned when the manifest says what became of the last.
pub struct Mixer {
    mixing: Mixing,
    ledger: Arc<Ledger>,
    registry: Arc<Registry>,
    blobs: Arc<Blobs>,
    store: Arc<Store>,
    buffer: Buffer,
    /// The answers that were learned, where they are asked for.
    answers: Answers,
    /// Generations whose examples the buffer has been offered, in order of publication.
    offered: Vec<Arc<Generation>>,
    /// Whether it was too full when it was last looked at.
    disk_full: bool,
    next: Link<Batch>,
}

impl Mixer {
    /// A mixer whose buffer holds what the published generations learned.
    ///
    /// # Errors
    /// When the ledger or the generations cannot be read.
    pub fn new(
        mixing: Mixing,
        ledger: Arc<Ledger>,
        registry: Arc<Registry>,
        blobs: Arc<Blobs>,
        store: Arc<Store>,
        next: Link<Batch>,
    ) -> anyhow::Result<Self> {
        let buffer = Buffer::new(mixing.capacity, mixing.strategy, mixing.seed);
        let (answers, offered) = (Answers::default(), Vec::new());
        let mut mixer =
            Self { mixing, ledger, registry, blobs, store, buffer, answers, offered, disk_full: false, next };
        mixer.rebuild().context("the replay buffer could not be rebuilt from the ledger")?;
        Ok(mixer)
    }

    /// Mixes batches until told to stop.
    ///
    /// # Errors
    /// When the ledger or the store fails, or the learner is gone: the lane is to be rebuilt.
    pub async fn run(mut self, stop: Stop) -> anyhow::Result<()> {
        let mut manifests = self.registry.subscribe();
        while !stop.is_set() {
            manifests.borrow_and_update();
            if let Some((batch, judged)) = self.mix()? {
                let lineage = batch.lineage.clone();
                tracing::info!(
                    lineage = %batch.lineage, number = batch.number, attempt = batch.attempt,
                    fresh = batch.fresh.len(), rehearsed = batch.rehearsed.len(), "learning a batch"
                );
                self.next.send(batch).await?;
                self.settled(&lineage, judged, &stop).await;
            } else {
                tokio::select! {
                    () = tokio::time::sleep(self.mixing.poll) => {}
                    () = self.ledger.wait_for_settled() => {}
                    _ = manifests.changed() => {}
                    () = stop.wait() => {}
                }
            }
        }
        Ok(())
    }

    /// The next batch, if there is something to learn and room for it, and how many its lineage has had judged.
    fn mix(&mut self) -> anyhow::Result<Option<(Batch, u64)>> {
        let registry = Arc::clone(&self.registry);
        let _past = registry.hold_past();
        let manifest = registry.manifest();
        self.follow(&manifest)?;
        let batch = if self.has_room()? { self.plan(&manifest)? } else { None };
        Ok(batch.map(|batch| {
            let judged = manifest.lineages.get(&batch.lineage).map_or(0, |l| l.judged);
            (batch, judged)
        }))
    }

    /// Whether the disk has room for another generation. Documents wait until it has.
    fn has_room(&mut self) -> anyhow::Result<bool> {
        let (free, least) = (kit::disk::free_percent(&self.mixing.disk)?, self.mixing.disk_free_percent);
        let full = free < least;
        if full != std::mem::replace(&mut self.disk_full, full) {
            match full {
                true => tracing::warn!(
                    free,
                    least,
                    "the disk is too full to learn (limits.disk_free_learn_percent)"
                ),
                false => tracing::info!(free, "the disk has room to learn again"),
            }
        }
        Ok(!full)
    }

    /// Waits until the manifest says what became of the lineage's batch.
    async fn settled(&self, lineage: &Domain, judged: u64, stop: &Stop) {
        let mut manifests = self.registry.subscribe();
        loop {
            manifests.borrow_and_update();
            let manifest = self.registry.manifest();
            if manifest.lineages.get(lineage).map_or(0, |l| l.judged) != judged {
                return;
            }
            tokio::select! {
                _ = manifests.changed() => {}
                () = stop.wait() => return,
            }
        }
    }

    /// Brings the buffer in line with what is current: new generations are offered to it; when
    /// history itself changed (a rollback, something forgotten) it is built anew.
    fn follow(&mut self, manifest: &Manifest) -> anyhow::Result<()> {
        let history = self.history(manifest);
        let kept = history.iter().zip(&self.offered).take_while(|(a, b)| a.id == b.id).count();
        if kept < self.offered.len() {
            return self.rebuild();
        }
        for generation in &history[kept..] {
            self.offer(generation.clone(), true)?;
        }
        Ok(())
    }

    /// Current generations and their ancestors, in order of publication.
    fn history(&self, manifest: &Manifest) -> Vec<Arc<Generation>> {
        let mut history = Vec::new();
        for lineage in manifest.lineages.values() {
            history.extend(self.registry.ancestors(lineage.current.clone()));
        }
        history.sort_by_key(|g| g.manifest);
        fail::fail_point!("replay::history");
        history
    }

    /// Builds the buffer from history, and writes its rows only where they are not there already.
    fn rebuild(&mut self) -> anyhow::Result<()> {
        self.buffer = Buffer::new(self.mixing.capacity, self.mixing.strategy, self.mixing.seed);
        self.offered.clear();
        self.answers = Answers::default();
        for generation in self.history(&self.registry.manifest()) {
            self.offer(generation, false)?;
        }
        let ids: Vec<ExampleId> = self.buffer.ids().collect();
        if self.store.ids()? == ids && self.rows_are_sound(&ids) {
            return Ok(());
        }
        tracing::info!(examples = ids.len(), "rebuilding the replay buffer from the ledger");
        self.store.clear()?;
        for example in self.ledger.examples_of(&ids)? {
            self.put(&example)?;
        }
        self.store.flush()
    }

    fn rows_are_sound(&self, ids: &[ExampleId]) -> bool {
        ids.iter().all(|id| self.get(*id).is_ok_and(|example| example.id == *id))
    }

    /// Offers what a generation learned to the buffer.
    fn offer(&mut self, generation: Arc<Generation>, store: bool) -> anyhow::Result<()> {
        let bytes = self.blobs.get(&generation.learned)?;
        let learned: Vec<LearnedExample> = wire::decode(Kind::Row, &bytes, wire::PAYLOAD_BYTES_MAX)?;
        let losses: BTreeMap<ExampleId, f32> = learned.iter().map(|l| (l.id, l.first_loss)).collect();
        let ids: Vec<ExampleId> = losses.keys().copied().collect();
        let examples = self.ledger.examples_of(&ids)?;
        let rows = examples.iter().map(|example| (example.id, row(example, losses[&example.id])));
        let changes = self.buffer.learn(rows.collect());
        if self.mixing.known_answers {
            self.answers.learn(&generation.lineage, &examples);
        }
        self.offered.push(generation);
        if store {
            for id in &changes.evicted {
                self.store.remove(*id)?;
            }
            for example in examples.iter().filter(|e| changes.entered.contains(&e.id)) {
                self.put(example)?;
            }
            self.store.flush()?;
        }
        Ok(())
    }

    fn put(&self, example: &Example) -> anyhow::Result<()> {
        self.store.put(example.id, &wire::encode(Kind::Row, example)?)
    }

    fn get(&self, id: ExampleId) -> anyhow::Result<Example> {
        let bytes = self.store.get(id)?.context("a row of the replay buffer is missing")?;
        Ok(wire::decode(Kind::Row, &bytes, wire::PAYLOAD_BYTES_MAX)?)
    }

    /// The next batch, if there is something to learn.
    fn plan(&self, manifest: &Manifest) -> anyhow::Result<Option<Batch>> {
        let cursors: BTreeMap<Domain, u64> = if manifest.shared {
            let cursor = manifest.lineages.get(&Domain::general()).map_or(0, |l| l.cursor);
            self.ledger.domains()?.into_iter().map(|d| (d, cursor)).collect()
        } else {
            manifest.lineages.iter().map(|(d, l)| (d.clone(), l.cursor)).collect()
        };
        let Some((domain, _)) = self.ledger.oldest_waiting(&cursors)? else { return Ok(None) };
        let lineage = if manifest.shared { Domain::general() } else { domain };
        let at = manifest.lineages.get(&lineage).cloned().unwrap_or_default();
        let only = (!manifest.shared).then_some(&lineage);
        // While documents are still being judged, a short window waits: what a batch holds must not
        // depend on how far intake happened to be. Asked first, so that what is judged meanwhile is in the window.
        let more_to_come = self.ledger.intake_cursor() < self.ledger.head();
        let documents_max = at.documents_max().map_or(usize::MAX, |documents| documents as usize);
        let head = at.current.as_ref().and_then(|id| self.registry.generation(id)?.answer_head.clone());
        let facts = head.map_or(0, |head| head.facts as usize);
        let window = self.ledger.fresh(only, at.cursor, self.mixing.room(documents_max, facts))?;
        if more_to_come && !window.full && (window.documents as usize) < documents_max {
            return Ok(None);
        }
        if window.examples.is_empty() {
            return Ok(None);
        }
        let seed_of = |attempt| seed(self.mixing.seed, &lineage, &Lineage { attempt, ..at.clone() });
        let seed = seed_of(at.attempt);
        // A lineage whose last batches only passed with more rehearsal at a lower rate starts there.
        let care = at.caution + at.attempt;
        let texts = window.examples.iter().filter(|example| example.piece.answers().next().is_none()).count();
        let rehearsed_a_pass = self.mixing.rehearsed_a_pass(window.examples.len(), texts, care);
        // Answers take many passes, in which fewer texts beside them would be learned by heart.
        let only_texts = texts == window.examples.len();
        // The same ones for each attempt: with others, the gate would be asked until it is lucky.
        let resting = if only_texts { self.buffer.resting(only, seed_of(0)) } else { BTreeSet::new() };
        let ids = self.buffer.draw(only, rehearsed_a_pass * REHEARSAL_ROUNDS, seed, &resting);
        let rehearsed = ids.into_iter().map(|id| self.get(id)).collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Some(Batch {
            parent: at.current.clone(),
            number: at.number,
            attempt: at.attempt,
            after: at.cursor,
            through: window.through,
            documents: window.documents,
            seed,
            fresh: window.examples,
            rehearsed,
            rehearsed_a_pass: rehearsed_a_pass as u32,
            known_answers: self.answers.tokens(&lineage),
            rate_scale: 0.5_f32.powi(care as i32),
            held_out: window.held_out,
            replay_digest: self.store.digest()?,
            lineage,
        }))
    }
}

fn row(example: &Example, first_loss: f32) -> Row {
    Row {
        domain: example.domain.clone(),
        marked: example.marked.then_some(example.importance),
        first_loss,
        signature: example.signature.clone(),
        answer: example.piece.answers().next().map(answers::digest),
    }
}

/// The batch's own seed: different for each batch and attempt, equal for the same one again.
fn seed(seed: u64, lineage: &Domain, at: &Lineage) -> u64 {
    let text = format!("{seed} {lineage} {} {} {}", at.number, at.attempt, at.cursor);
    let digest = blake3::hash(text.as_bytes());
    u64::from_le_bytes(digest.as_bytes()[..8].try_into().expect("a digest has 32 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_texts_are_rehearsed_beside_as_often_as_many() {
        let mixing = Mixing {
            capacity: 100,
            strategy: Strategy::Hybrid,
            new_data_ratio: 0.5,
            rehearse_min: 16,
            batch_examples: 256,
            batch_counted: 1024,
            answer_tokens: 64,
            facts_max: 4096,
            known_answers: false,
            poll: Duration::from_secs(1),
            seed: 0,
            disk: PathBuf::new(),
            disk_free_percent: 0.0,
        };
        let a_pass = |fresh, texts, care| mixing.rehearsed_a_pass(fresh, texts, care);
        assert_eq!([1, 2, 9, 11, 64, 200].map(|texts| a_pass(texts, texts, 0)), [16, 16, 54, 64, 64, 200]);
        assert_eq!([1, 9, 40].map(|answers| a_pass(answers, 0, 0)), [16, 16, 40], "answers need no more");
        assert_eq!([0, 1, 2].map(|care| a_pass(9, 9, care)), [54, 108, 216]);
        let share = |new_data_ratio| Mixing { new_data_ratio, ..mixing.clone() }.rehearsed_a_pass(9, 9, 0);
        assert_eq!([0.1, 0.9, 1.0].map(share), [81, 54, 0]);
    }
}
