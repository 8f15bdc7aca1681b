//! A batch on its way through the learner, and what is written down of it.

use crate::course::{Fresh, Item};
use crate::review::Told;
use kit::compute::Stint;
use model::learner::{Learner, StepReport};
use model::pack::Sequence;
use model::ridge::Head;
use proto::{Batch, Example, TrainReport};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::collections::VecDeque;

/// Examples of a batch that are read at most where what they say is said because of what is counted.
pub(super) const COUNTED_READ: usize = 128;

/// A batch on its way through the learner.
pub(super) struct Run<'a> {
    pub learner: Learner,
    pub fresh: Vec<(Fresh, Sequence)>,
    pub rehearsed: Vec<Sequence>,
    /// Those of them that a pass takes beside all fresh examples.
    pub rehearsed_a_pass: usize,
    pub batch: &'a Batch,
    /// What was solved of what is counted, where what it says is not to be learned by heart.
    pub head: Option<&'a Head>,
    pub first: Vec<Option<f32>>,
    pub report: TrainReport,
    pub recent_bad: VecDeque<bool>,
    /// Its texts are read, and are the former self's to keep.
    pub read: bool,
    /// What was done since requests were last let in. A step is a single micro-batch as often as not, so it outlives them.
    pub last: Option<Stint>,
}

impl Run<'_> {
    /// Whether an item is kept as the former self knows it: a text that was rehearsed before, or that was just read. Answers
    /// are to be known by heart, and the former self may not know them yet.
    pub fn is_kept(&self, item: Item) -> bool {
        match item {
            Item::Rehearsed(n) => !is_answer(&self.rehearsed[n].learned),
            Item::Known(n) => !self.fresh[n].0.answer,
            Item::Fresh(_) | Item::Anchor(_) => false,
        }
    }

    /// Whether there are no texts in it or beside it: they would be unlearned while answers alone are trained on.
    pub fn answers_only(&self) -> bool {
        let mut examples = self.batch.fresh.iter().chain(&self.batch.rehearsed);
        examples.all(|example| is_answer(&example.piece.learned))
    }

    /// What its fresh and its rehearsed examples answer, but for those that broke a step or are not read.
    pub fn told(&self) -> (Vec<Told>, Vec<Told>) {
        let told = |item, sequence: &Sequence| {
            let tokens = |&(from, to): &(u32, u32)| sequence.tokens.get(from as usize..to as usize);
            Told { item, answer: sequence.learned.iter().filter_map(tokens).flatten().copied().collect() }
        };
        let fresh = self.fresh.iter().enumerate().filter(|(_, (fresh, _))| !fresh.out && !fresh.unread);
        let rehearsed =
            self.rehearsed.iter().enumerate().filter(|(_, sequence)| !sequence.learned.is_empty());
        (
            fresh.map(|(n, (_, sequence))| told(Item::Fresh(n), sequence)).collect(),
            rehearsed.map(|(n, sequence)| told(Item::Rehearsed(n), sequence)).collect(),
        )
    }

    /// Tokens of an example of the batch; none of an anchor, which is not of it.
    pub fn tokens(&self, item: Item) -> usize {
        match item {
            Item::Fresh(n) | Item::Known(n) => self.fresh[n].1.tokens.len(),
            Item::Rehearsed(n) => self.rehearsed[n].tokens.len(),
            Item::Anchor(_) => 0,
        }
    }
}

/// Writes down what a step that was taken says of each example.
pub(super) fn note(run: &mut Run<'_>, report: &StepReport, places: &[Vec<Item>]) {
    run.report.steps += 1;
    for (scores, places) in report.scores.iter().zip(places) {
        for (score, place) in scores.iter().zip(places) {
            if let Item::Fresh(n) | Item::Known(n) = *place {
                let loss = score.mean() as f32;
                run.fresh[n].0.loss = loss;
                run.first[n].get_or_insert(loss);
            }
        }
    }
    let tokens = places.iter().flatten().map(|&item| run.tokens(item)).sum::<usize>() as u64;
    run.report.tokens += tokens;
    metrics::counter!("engram:train_tokens_total", "lineage" => run.batch.lineage.to_string())
        .increment(tokens);
}

/// The examples as the course sees them, of which those are `counted` for which it says so. Of many of them only some are read, drawn with the
/// `seed`: what they say is said without the adapter, which is to learn their manner, and not them.
pub(super) fn as_fresh(examples: &[Example], counted: impl Fn(usize) -> bool, seed: u64) -> Vec<Fresh> {
    let as_fresh = |(n, example): (usize, &Example)| {
        let tokens = example.piece.tokens.len();
        let answer = is_answer(&example.piece.learned);
        Fresh { tokens, answer, loss: f32::INFINITY, counted: counted(n), unread: false, out: false }
    };
    let mut fresh: Vec<Fresh> = examples.iter().enumerate().map(as_fresh).collect();
    let mut counted: Vec<usize> = (0..fresh.len()).filter(|&n| fresh[n].counted).collect();
    counted.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    counted.into_iter().skip(COUNTED_READ).for_each(|n| fresh[n].unread = true);
    fresh
}

/// Text learns its windows to the end; an answer leaves its prompt unlearned.
pub(super) fn is_answer(learned: &[(u32, u32)]) -> bool {
    learned.first().is_some_and(|&(from, _)| from > 0)
}

pub(super) fn sequence(example: &Example) -> Sequence {
    let (tokens, learned) = (example.piece.tokens.clone(), example.piece.learned.clone());
    Sequence { tokens, learned, rehearsed: false }
}
