//! Which learned examples are kept for rehearsal, and which of them are rehearsed.
//!
//! Pure bookkeeping: no disk, no clock, no hidden randomness. The same history gives the same
//! buffer, which is what lets it be rebuilt from the ledger and compared by digest.

use proto::{Domain, ExampleId, similarity};
use std::collections::{BTreeMap, BTreeSet};

/// How the buffer chooses what to keep when it is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// A uniform sample of all that was learned (Vitter's algorithm R).
    Reservoir,
    /// The most important; of equals, the newest.
    Importance,
    /// Those least like the others.
    Diversity,
    /// Fair between domains and between answers that repeat; within those, important and unlike the others.
    Hybrid,
}

/// Importance by reason, from most to least.
const HIGH_LOSS: f32 = 0.8;
const DIVERSE: f32 = 0.7;
const RECENT: f32 = 0.5;
const RANDOM: f32 = 0.3;

/// An example is diverse when nothing in the sample it is compared with is more similar than this.
const DIVERSE_BELOW: f32 = 0.2;
/// Rows that an example is compared with.
const COMPARED: usize = 32;
/// What an example loses in worth with each doubling of those that have its answer: about what importance can make
/// up for, so that each of many labels keeps its place (class-balanced memory, Chrysakis and Moens 2020).
const REPEATED_ANSWER: f32 = 0.5;
/// One in so many texts rests in each batch.
const RESTING_SHARE: usize = 3;
/// Fewer resting ones are no sample, and none rests.
const RESTING_MIN: usize = 16;
/// The newest quarter of the capacity counts as recent.
const RECENT_SHARE: usize = 4;

/// What the policy knows of a learned example.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The domain it teaches.
    pub domain: Domain,
    /// What the user said of its importance.
    pub marked: Option<f32>,
    /// Mean loss when it was first seen, nats a token.
    pub first_loss: f32,
    /// MinHash signature.
    pub signature: Vec<u32>,
    /// A digest of the answer to a prompt; none of raw text.
    pub answer: Option<u64>,
}

#[derive(Debug, Clone)]
struct Held {
    row: Row,
    /// Counts up with each example that was ever offered.
    order: u64,
    /// Importance by reason; `None` for those that only age decides.
    reason: Option<f32>,
}

/// What [`Buffer::learn`] changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Rows that entered.
    pub entered: Vec<ExampleId>,
    /// Rows that left.
    pub evicted: Vec<ExampleId>,
}

/// The bounded set of learned examples.
#[derive(Debug, Clone)]
pub struct Buffer {
    capacity: usize,
    strategy: Strategy,
    seed: u64,
    held: BTreeMap<ExampleId, Held>,
    offered: u64,
}

impl Buffer {
    /// An empty buffer of at most `capacity` examples.
    pub fn new(capacity: usize, strategy: Strategy, seed: u64) -> Self {
        Self { capacity, strategy, seed, held: BTreeMap::new(), offered: 0 }
    }

    /// The ids held, ascending.
    pub fn ids(&self) -> impl Iterator<Item = ExampleId> + '_ {
        self.held.keys().copied()
    }

    /// Takes in what one generation learned, and evicts what no longer fits.
    pub fn learn(&mut self, learned: Vec<(ExampleId, Row)>) -> Changes {
        let high = upper_quartile(learned.iter().map(|(_, row)| row.first_loss));
        let mut changes = Changes::default();
        for (id, row) in learned {
            let order = self.offered;
            self.offered += 1;
            if self.strategy == Strategy::Reservoir && !self.reservoir_slot(order, &mut changes) {
                continue;
            }
            let reason = row.marked.or_else(|| self.reason(id, &row, high));
            self.held.insert(id, Held { row, order, reason });
            changes.entered.push(id);
        }
        if self.strategy != Strategy::Reservoir {
            self.evict(&mut changes);
        }
        // What came and went within one call never was in the buffer.
        let gone: BTreeSet<_> = changes.evicted.iter().copied().collect();
        let entered: BTreeSet<_> = changes.entered.iter().copied().collect();
        changes.entered.retain(|id| !gone.contains(id));
        changes.evicted.retain(|id| !entered.contains(id));
        changes
    }

    /// Draws up to `count` examples of `domain` (of all, without one) by importance, without
    /// replacement: each gets the key u^(1/w) for its weight w, and the highest keys are drawn
    /// (Efraimidis and Spirakis 2006). The same seed draws the same examples.
    ///
    /// `resting` are left out.
    pub fn draw(
        &self,
        domain: Option<&Domain>,
        count: usize,
        seed: u64,
        resting: &BTreeSet<ExampleId>,
    ) -> Vec<ExampleId> {
        let mut keyed: Vec<(f64, ExampleId)> = self
            .of(domain)
            .filter(|(id, _)| !resting.contains(id))
            .map(|(id, held)| {
                let weight = f64::from(self.importance(held)).max(1e-3);
                (unit(seed, id).ln() / weight, id)
            })
            .collect();
        keyed.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        keyed.into_iter().take(count).map(|(_, id)| id).collect()
    }

    /// A third of the texts of `domain` (of all, without one), drawn evenly; none where they would be too few to measure with.
    ///
    /// Texts that are rehearsed get better whatever else a batch teaches: only the others show the gate what it costs.
    pub fn resting(&self, domain: Option<&Domain>, seed: u64) -> BTreeSet<ExampleId> {
        let texts = self.of(domain).filter(|(_, held)| held.row.answer.is_none());
        let mut keyed: Vec<(f64, ExampleId)> = texts.map(|(id, _)| (unit(seed, id), id)).collect();
        keyed.sort_by(|a, b| a.0.total_cmp(&b.0));
        let count = Some(keyed.len() / RESTING_SHARE).filter(|count| *count >= RESTING_MIN).unwrap_or(0);
        keyed.into_iter().take(count).map(|(_, id)| id).collect()
    }

    fn of(&self, domain: Option<&Domain>) -> impl Iterator<Item = (ExampleId, &Held)> {
        let held = self.held.iter().map(|(id, held)| (*id, held));
        held.filter(move |(_, held)| domain.is_none_or(|domain| held.row.domain == *domain))
    }

    /// Whether the next example of algorithm R gets a place; it may take another's.
    fn reservoir_slot(&mut self, order: u64, changes: &mut Changes) -> bool {
        if self.held.len() < self.capacity {
            return true;
        }
        let slot = (unit(self.seed, ExampleId { ordinal: order, chunk: 0 }) * (order + 1) as f64) as usize;
        let Some(id) = self.held.keys().nth(slot).copied().filter(|_| slot < self.capacity) else {
            return false;
        };
        self.held.remove(&id);
        changes.evicted.push(id);
        true
    }

    fn reason(&self, id: ExampleId, row: &Row, high_loss: f32) -> Option<f32> {
        if row.first_loss >= high_loss {
            return Some(HIGH_LOSS);
        }
        (redundancy(&self.sample(), id, &row.signature) < DIVERSE_BELOW).then_some(DIVERSE)
    }

    fn importance(&self, held: &Held) -> f32 {
        held.reason.unwrap_or_else(|| {
            let recent = (self.capacity / RECENT_SHARE).max(1) as u64;
            if self.offered - held.order <= recent { RECENT } else { RANDOM }
        })
    }

    /// A fixed sample of the rows, which others are compared with.
    fn sample(&self) -> Vec<(ExampleId, &[u32])> {
        let stride = (self.held.len() / COMPARED).max(1);
        self.held.iter().step_by(stride).map(|(id, held)| (*id, &held.row.signature[..])).collect()
    }

    /// Removes the rows with the lowest worth until the rest fits.
    fn evict(&mut self, changes: &mut Changes) {
        let excess = self.held.len().saturating_sub(self.capacity);
        if excess == 0 {
            return;
        }
        let fair = self.strategy == Strategy::Hybrid;
        let mut counts = Counts::default();
        // Found once for all rows: to reach it in the map takes a walk over all of them.
        let sample = self.sample();
        let place = |(id, held): (&ExampleId, &Held)| Place {
            id: *id,
            order: held.order,
            worth: self.worth(*id, held, &sample),
            domain: counts.domain(&held.row),
            answer: counts.answer(&held.row),
        };
        let mut left: Vec<Place> = self.held.iter().map(place).collect();
        for _ in 0..excess {
            let largest = counts.of_domain.iter().copied().max().unwrap_or(0);
            let candidates = left.iter().enumerate().filter_map(|(at, place)| {
                let eligible = !fair || counts.of_domain[place.domain] == largest;
                eligible
                    .then(|| (at, place.worth - if fair { counts.penalty(place) } else { 0.0 }, place.order))
            });
            let Some((at, ..)) = candidates.min_by(|a, b| a.1.total_cmp(&b.1).then(a.2.cmp(&b.2))) else {
                break;
            };
            let place = left.swap_remove(at);
            counts.remove(&place);
            self.held.remove(&place.id);
            changes.evicted.push(place.id);
        }
    }

    fn worth(&self, id: ExampleId, held: &Held, sample: &[(ExampleId, &[u32])]) -> f32 {
        let redundancy = || redundancy(sample, id, &held.row.signature);
        match self.strategy {
            Strategy::Reservoir => 0.0,
            Strategy::Importance => self.importance(held),
            Strategy::Diversity => 1.0 - redundancy(),
            Strategy::Hybrid if held.row.marked.is_some_and(|m| m >= 1.0) => f32::MAX,
            // The draw keeps old and unremarkable rows from leaving in the order they came.
            Strategy::Hybrid => {
                let draw = unit(self.seed, id) as f32;
                self.importance(held) - 0.5 * redundancy() + 0.3 * draw
            }
        }
    }
}

/// The highest similarity to a sample of the other rows, 0 to 1.
fn redundancy(sample: &[(ExampleId, &[u32])], id: ExampleId, signature: &[u32]) -> f32 {
    let others = sample.iter().filter(|(other, _)| other.ordinal != id.ordinal);
    others.map(|(_, theirs)| similarity(signature, theirs)).fold(0.0, f32::max)
}

/// A row that may be evicted.
struct Place {
    id: ExampleId,
    order: u64,
    worth: f32,
    /// Its domain and its answer, as numbers of [`Counts`].
    domain: usize,
    answer: Option<usize>,
}

/// How many rows each domain has, and each answer within one.
#[derive(Default)]
struct Counts {
    domains: BTreeMap<Domain, usize>,
    of_domain: Vec<usize>,
    answers: BTreeMap<(usize, u64), usize>,
    of_answer: Vec<usize>,
}

impl Counts {
    /// Counts a row's domain; its number.
    fn domain(&mut self, row: &Row) -> usize {
        let next = self.domains.len();
        let number = *self.domains.entry(row.domain.clone()).or_insert(next);
        self.of_domain.resize(self.domains.len(), 0);
        self.of_domain[number] += 1;
        number
    }

    /// Counts a row's answer; its number.
    fn answer(&mut self, row: &Row) -> Option<usize> {
        let domain = *self.domains.get(&row.domain)?;
        let next = self.answers.len();
        let number = *self.answers.entry((domain, row.answer?)).or_insert(next);
        self.of_answer.resize(self.answers.len(), 0);
        self.of_answer[number] += 1;
        Some(number)
    }

    fn remove(&mut self, place: &Place) {
        self.of_domain[place.domain] -= 1;
        if let Some(answer) = place.answer {
            self.of_answer[answer] -= 1;
        }
    }

    fn penalty(&self, place: &Place) -> f32 {
        REPEATED_ANSWER * place.answer.map_or(0.0, |answer| (self.of_answer[answer] as f32).log2())
    }
}

fn upper_quartile(losses: impl Iterator<Item = f32>) -> f32 {
    let mut sorted: Vec<f32> = losses.collect();
    sorted.sort_by(f32::total_cmp);
    sorted.get(sorted.len() * 3 / 4).copied().unwrap_or(f32::INFINITY)
}

/// A number in (0, 1) that depends on nothing but the seed and the id.
fn unit(seed: u64, id: ExampleId) -> f64 {
    let mut bytes = [0; 20];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&id.ordinal.to_le_bytes());
    bytes[16..].copy_from_slice(&id.chunk.to_le_bytes());
    let digest = blake3::hash(&bytes);
    let word = u64::from_le_bytes(digest.as_bytes()[..8].try_into().expect("a digest has 32 bytes"));
    ((word >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection, prop_assert, prop_assert_eq, proptest};

    const STRATEGIES: [Strategy; 4] =
        [Strategy::Reservoir, Strategy::Importance, Strategy::Diversity, Strategy::Hybrid];

    fn id(n: u64) -> ExampleId {
        ExampleId { ordinal: n, chunk: 0 }
    }

    fn row(domain: &str, n: u64) -> Row {
        let signature = (0..64).map(|k| (unit(n, id(k)) * 1e9) as u32).collect();
        Row {
            domain: Domain::new(domain).expect("domain"),
            marked: None,
            first_loss: (n % 7) as f32,
            signature,
            answer: None,
        }
    }

    proptest! {
        #[test]
        fn never_over_capacity_and_a_pure_function_of_history(
            batches in collection::vec(1_u64..40, 1..12), capacity in 1_usize..60,
        ) {
            for strategy in STRATEGIES {
                let run = || {
                    let mut buffer = Buffer::new(capacity, strategy, 9);
                    let mut mirror = BTreeSet::new();
                    let mut n = 0;
                    for &size in &batches {
                        let learned = (n..n + size).map(|n| (id(n), row(["a", "b"][(n % 2) as usize], n))).collect();
                        n += size;
                        let changes = buffer.learn(learned);
                        mirror.extend(changes.entered);
                        for id in changes.evicted {
                            prop_assert!(mirror.remove(&id), "evicted what was not there");
                        }
                        prop_assert!(buffer.held.len() <= capacity);
                        prop_assert_eq!(buffer.ids().collect::<BTreeSet<_>>(), mirror.clone());
                    }
                    Ok(mirror)
                };
                prop_assert_eq!(run()?, run()?);
            }
        }
    }

    #[test]
    fn the_reservoir_is_uniform_over_all_that_was_learned() {
        let mut early = 0;
        for seed in 0..200 {
            let mut buffer = Buffer::new(20, Strategy::Reservoir, seed);
            for n in 0..200 {
                buffer.learn(vec![(id(n), row("a", n))]);
            }
            early += buffer.ids().filter(|id| id.ordinal < 100).count();
        }
        // 200 buffers of 20: 2,000 of 4,000 expected from the first half, deviation about 32.
        assert!((1850..2150).contains(&early), "{early}");
    }

    #[test]
    fn what_the_user_marked_stays() {
        for strategy in [Strategy::Importance, Strategy::Hybrid] {
            let mut buffer = Buffer::new(10, strategy, 1);
            let mut marked = row("a", 0);
            marked.marked = Some(1.0);
            buffer.learn(vec![(id(0), marked)]);
            for n in 1..300 {
                buffer.learn(vec![(id(n), row("a", n))]);
            }
            assert!(buffer.ids().any(|i| i == id(0)), "{strategy:?}");
        }
    }

    #[test]
    fn a_small_domain_keeps_its_place_beside_a_large_one() {
        let mut buffer = Buffer::new(40, Strategy::Hybrid, 1);
        buffer.learn((0..15).map(|n| (id(n), row("small", n))).collect());
        buffer.learn((100..600).map(|n| (id(n), row("large", n))).collect());
        let small = buffer.ids().filter(|id| id.ordinal < 100).count();
        assert_eq!(small, 15, "it holds less than its share of 20, so all of it stays");
    }

    #[test]
    fn each_of_many_answers_keeps_its_place_however_often_another_comes() {
        let mut buffer = Buffer::new(40, Strategy::Hybrid, 1);
        let answered = |n: u64, answer| (id(n), Row { answer: Some(answer), ..row("a", n) });
        for batch in 0..10 {
            // Ten labels, ten examples each, one batch after another.
            buffer.learn((0..10).map(|n| answered(batch * 10 + n, batch)).collect());
        }
        let mut kept = [0; 10];
        buffer.ids().for_each(|id| kept[id.ordinal as usize / 10] += 1);
        assert!(kept.iter().all(|count| (3..=5).contains(count)), "{kept:?}");
        // Raw text, none of which repeats, is not crowded out by them.
        buffer.learn((1000..1040).map(|n| (id(n), row("a", n))).collect());
        let text = buffer.ids().filter(|id| id.ordinal >= 1000).count();
        assert!((10..=35).contains(&text), "{text}");
    }

    #[test]
    fn diversity_evicts_what_is_there_twice() {
        let mut buffer = Buffer::new(20, Strategy::Diversity, 1);
        let copies: Vec<_> = (0..10).map(|n| (id(n), Row { ..row("a", 7777) })).collect();
        buffer.learn(copies);
        buffer.learn((10..29).map(|n| (id(n), row("a", n))).collect());
        assert_eq!(buffer.ids().filter(|id| id.ordinal < 10).count(), 1);
    }

    #[test]
    fn important_examples_are_drawn_more_often_and_none_twice() {
        let mut buffer = Buffer::new(100, Strategy::Hybrid, 1);
        let learned = (0..50).map(|n| {
            let mut row = row("a", 7);
            row.first_loss = if n == 0 { 9.0 } else { 1.0 };
            row.marked = Some(if n < 10 { 1.0 } else { 0.1 });
            (id(n), row)
        });
        buffer.learn(learned.collect());
        let mut high = 0;
        for seed in 0..100 {
            let drawn = buffer.draw(None, 10, seed, &BTreeSet::new());
            assert_eq!(drawn.iter().collect::<BTreeSet<_>>().len(), 10);
            high += drawn.iter().filter(|id| id.ordinal < 10).count();
        }
        // By weight, an important one is ten times as likely to come first; uniform would be 200.
        assert!(high > 500, "{high}");
        assert_eq!(buffer.draw(None, 10, 3, &BTreeSet::new()), buffer.draw(None, 10, 3, &BTreeSet::new()));
        assert!(buffer.draw(Some(&Domain::new("b").expect("b")), 10, 3, &BTreeSet::new()).is_empty());
    }

    #[test]
    fn a_third_of_many_texts_rests_and_no_answer_does() {
        let of = |texts: u64| {
            let mut buffer = Buffer::new(1000, Strategy::Hybrid, 1);
            let answered = |n| (id(n), Row { answer: Some(n), ..row("a", n) });
            let all = (0..texts).map(|n| (id(n), row("a", n))).chain((1000..1060).map(answered));
            buffer.learn(all.collect());
            buffer
        };
        let buffer = of(60);
        let resting = buffer.resting(None, 1);
        assert!(resting.len() == 20 && resting.iter().all(|id| id.ordinal < 60), "{resting:?}");
        assert_ne!(buffer.resting(None, 2), resting, "others rest beside the next batch");
        assert!(buffer.resting(Some(&Domain::new("b").expect("b")), 1).is_empty());
        let drawn = buffer.draw(None, 1000, 1, &resting);
        assert!(drawn.len() == 100 && drawn.iter().all(|id| !resting.contains(id)));
        assert_eq!(of(47).resting(None, 1).len(), 0, "fifteen would be no sample");
        assert_eq!(of(48).resting(None, 1).len(), 16);
    }

    #[test]
    fn important_texts_rest_as_often_as_others() {
        let mut buffer = Buffer::new(100, Strategy::Hybrid, 1);
        let marked = |n| (id(n), Row { marked: Some(if n < 30 { 1.0 } else { 0.1 }), ..row("a", n) });
        buffer.learn((0..60).map(marked).collect());
        let early = |seed| buffer.resting(None, seed).iter().filter(|id| id.ordinal < 30).count();
        let early: usize = (0..100).map(early).sum();
        // 1,000 of 2,000 expected, deviation about 18.
        assert!((900..1100).contains(&early), "{early}");
    }
}
