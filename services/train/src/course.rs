//! The course of a batch: which sequences each step trains on, in which order, for how long.
//!
//! Knows no tensor. Raw text is read a fixed number of times: more would learn it by heart and
//! nothing else. Answers to prompts are repeated until they are known, because a fact that is half
//! known is not known; what is known already is not repeated.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// A sequence of the batch by its place in one of three lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Item {
    /// The n-th fresh example.
    Fresh(usize),
    /// The n-th fresh example again, after it was learned in this batch.
    Known(usize),
    /// The n-th rehearsed example.
    Rehearsed(usize),
    /// The n-th anchor sequence.
    Anchor(usize),
}

/// How long a batch is trained on.
#[derive(Debug, Clone, Copy)]
pub struct Course {
    /// Passes over every fresh example.
    pub passes: u32,
    /// Passes over answers that are not known yet, at most. What is said because of what is counted has one.
    pub answer_passes_max: u32,
    /// An answer is known when its mean loss is under this, nats a token.
    pub loss_target: f32,
    /// Optimiser steps at least; small batches are read more often.
    pub steps_min: u32,
    /// Tokens in an optimiser step at most, about; small batches take smaller steps.
    pub step_tokens: usize,
    /// Tokens of anchor for each token of the batch.
    pub anchor_share: f32,
    /// Factor on the learning rate while answers alone are learned; in proportion where there is text beside them.
    pub answer_rate: f64,
    /// Passes over an even mixture of old and new answers at the end, where few of each are rehearsed.
    pub review_passes: u32,
}

/// A pass is cut into about this many steps: what is learned depends on the number of steps more than
/// on their size.
const STEPS_A_PASS: usize = 16;
/// The lowest share of the peak learning rate.
const RATE_MIN: f64 = 0.02;
/// The share of the learning rate of answers that reviews begin with.
const REVIEW_RATE: f64 = 0.3;
/// Rounds at most in which rehearsed answers are learned again that a batch has cost.
pub const MENDING_ROUNDS: u32 = 12;
/// Rehearsed tokens a pass that are no more than they should be, however short the fresh examples are.
const REHEARSED_TOKENS_MIN: usize = 512;
/// Tokens under which a step's gradient is mostly noise, and its overhead most of its time.
const STEP_TOKENS_MIN: usize = 256;
/// The same of a pass in which nothing but answers is to be known by heart: see [`by_heart`]. A hundred facts take half the passes in
/// steps of a quarter.
const STEPS_BY_HEART: usize = 64;
/// See [`STEPS_BY_HEART`].
const STEP_TOKENS_BY_HEART: usize = 64;
/// The share of the learning rate of answers that such steps take.
const RATE_BY_HEART: f64 = 2.0 / 3.0;

/// A fresh example, as the course sees it.
#[derive(Debug, Clone, Copy)]
pub struct Fresh {
    /// Tokens in it.
    pub tokens: usize,
    /// It answers a prompt.
    pub answer: bool,
    /// Its mean loss when it was last trained on, nats a token.
    pub loss: f32,
    /// Its answer is said because of what is counted, whatever the adapter knows of it.
    pub counted: bool,
    /// It is one of many that are counted, of which the adapter reads others.
    pub unread: bool,
    /// It broke a step, and is left out.
    pub out: bool,
}

/// Whether nothing but answers is to be known by heart in a pass over those of the `fresh` examples that are `due`, in a batch
/// without texts: these are unlearned the more the more steps follow them.
pub fn by_heart(fresh: &[Fresh], mut due: impl Iterator<Item = usize>) -> bool {
    fresh.iter().all(|f| f.answer) && due.all(|n| fresh[n].is_by_heart())
}

impl Fresh {
    /// Its answer is to be known by heart.
    fn is_by_heart(&self) -> bool {
        self.answer && !self.counted
    }
}

impl Course {
    /// The steps of pass number `pass`, from 0, each a list of items; empty when the batch is
    /// learned. `rehearsed` and `anchors` are lengths in tokens.
    ///
    /// Beside all fresh examples a pass takes `a_pass` of the rehearsed ones, and beside some of them
    /// as many in proportion; the next pass goes on where the last one stopped. They are fewer where they are longer
    /// than the fresh ones: a few short answers between long texts would teach the texts by heart and not be learned.
    pub fn pass(
        &self,
        pass: u32,
        fresh: &[Fresh],
        rehearsed: &[usize],
        a_pass: usize,
        anchors: &[usize],
        seed: u64,
    ) -> Vec<Vec<Item>> {
        let read = fresh.iter().filter(|f| !f.unread).count();
        let fresh_tokens: usize = fresh.iter().filter(|f| !f.unread).map(|f| f.tokens).sum();
        let mean = (rehearsed.iter().sum::<usize>() / rehearsed.len().max(1)).max(1);
        let in_proportion = (a_pass * fresh_tokens / read.max(1)).max(REHEARSED_TOKENS_MIN);
        let asked = a_pass;
        let a_pass = a_pass.min(rehearsed.len()).min(in_proportion.div_ceil(mean));
        let total = fresh_tokens + a_pass * mean;
        let passes = self.passes(total.div_ceil(self.step_size(total, false)));
        let active: Vec<usize> = (0..fresh.len()).filter(|&n| self.due(&fresh[n], pass, passes)).collect();
        if active.is_empty() {
            return Vec::new();
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed.wrapping_add(u64::from(pass).wrapping_mul(0x9e37_79b9)));
        let count = (a_pass * active.len()).div_ceil(read);
        let from = pass as usize * a_pass;
        let chosen = (from..from + count).map(|n| n % rehearsed.len());
        let mut items: Vec<(Item, usize)> =
            active.iter().map(|&n| (Item::Fresh(n), fresh[n].tokens)).collect();
        items.extend(chosen.map(|n| (Item::Rehearsed(n), rehearsed[n])));
        let active_tokens: usize = active.iter().map(|&n| fresh[n].tokens).sum();
        items.extend(self.own(pass, passes, fresh, active_tokens * asked.min(read) / read, &mut rng));
        let batch_tokens: usize = items.iter().map(|(_, tokens)| tokens).sum();
        items.extend(self.anchors(anchors, batch_tokens, &mut rng));
        items.shuffle(&mut rng);
        self.steps(items, by_heart(fresh, active.into_iter()))
    }

    /// Whether a fresh example is still learned in pass number `pass`, where `passes` are over all.
    fn due(&self, f: &Fresh, pass: u32, passes: u32) -> bool {
        let unknown = f.is_by_heart() && f.loss > self.loss_target;
        let read = if f.counted { 1 } else { passes };
        !f.out && !f.unread && (pass < read || (pass < self.answer_passes_max && unknown))
    }

    /// The factor on the peak learning rate for step `step` of `steps` in pass number `pass`: it falls in a
    /// line to 0 over all passes that this batch may take, from 1 for text and from `answer_rate` for answers.
    ///
    /// Steps of full size to the end leave the weights where the last few examples threw them, and what
    /// was known before pays for it.
    pub fn rate(&self, pass: u32, step: usize, steps: usize, fresh: &[Fresh]) -> f64 {
        let most = |f: &Fresh| match (f.counted, f.answer) {
            (true, _) => 1,
            (false, false) => self.passes(steps),
            (false, true) => self.passes(steps).max(self.answer_passes_max),
        };
        let passes = fresh.iter().map(most).max().unwrap_or(1);
        let within = (step as f64 + 0.5) / steps.max(1) as f64;
        let falling = (1.0 - (f64::from(pass) + within) / f64::from(passes)).max(RATE_MIN);
        let due = || (0..fresh.len()).filter(|&n| self.due(&fresh[n], pass, self.passes(steps)));
        let tokens: usize = due().map(|n| fresh[n].tokens).sum();
        let of_answers: usize = due().filter(|&n| fresh[n].answer).map(|n| fresh[n].tokens).sum();
        let share = of_answers as f64 / tokens.max(1) as f64;
        let small = if by_heart(fresh, due()) { RATE_BY_HEART } else { 1.0 };
        falling * small * (1.0 + (self.answer_rate - 1.0) * share)
    }

    /// The steps of review number `n`, from 0, over these items and their lengths in tokens, with anchors beside them.
    pub fn mixture(
        &self,
        n: u32,
        mut items: Vec<(Item, usize)>,
        anchors: &[usize],
        seed: u64,
    ) -> Vec<Vec<Item>> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed.wrapping_sub(u64::from(n) + 1));
        let tokens = items.iter().map(|(_, tokens)| tokens).sum();
        items.extend(self.anchors(anchors, tokens, &mut rng));
        items.shuffle(&mut rng);
        self.steps(items, false)
    }

    /// The factor on the peak learning rate for step `step` of `steps` in review number `n`: it falls to 0 over all of them.
    pub fn review_rate(&self, n: u32, step: usize, steps: usize) -> f64 {
        let within = (step as f64 + 0.5) / steps.max(1) as f64;
        let done = (f64::from(n) + within) / f64::from(self.review_passes.max(1));
        REVIEW_RATE * self.answer_rate * (1.0 - done)
    }

    /// The factor on the peak learning rate in round number `n` of mending: it falls to 0 over all of them.
    pub fn mending_rate(&self, n: u32) -> f64 {
        REVIEW_RATE * self.answer_rate * (1.0 - f64::from(n) / f64::from(MENDING_ROUNDS))
    }

    /// Passes over all of a batch: more where a pass has few steps.
    fn passes(&self, steps_a_pass: usize) -> u32 {
        self.passes.max(self.steps_min.div_ceil(steps_a_pass.max(1) as u32))
    }

    fn step_size(&self, total: usize, by_heart: bool) -> usize {
        let (steps, least) = match by_heart {
            true => (STEPS_BY_HEART, STEP_TOKENS_BY_HEART),
            false => (STEPS_A_PASS, STEP_TOKENS_MIN),
        };
        (total / steps).max(least).min(self.step_tokens)
    }

    /// Fresh examples that are learned already, of about so many tokens: the answers that are not would undo them.
    fn own(
        &self,
        pass: u32,
        passes: u32,
        fresh: &[Fresh],
        tokens: usize,
        rng: &mut ChaCha8Rng,
    ) -> Vec<(Item, usize)> {
        let done = |n: &usize| !fresh[*n].out && !fresh[*n].unread && !self.due(&fresh[*n], pass, passes);
        let mut order: Vec<usize> = (0..fresh.len()).filter(done).collect();
        order.shuffle(rng);
        let mut filled = 0;
        let room = |n: &usize| {
            let before = filled;
            filled += fresh[*n].tokens;
            before < tokens
        };
        order.into_iter().take_while(room).map(|n| (Item::Known(n), fresh[n].tokens)).collect()
    }

    fn anchors(&self, anchors: &[usize], batch_tokens: usize, rng: &mut ChaCha8Rng) -> Vec<(Item, usize)> {
        let mut left = (batch_tokens as f32 * self.anchor_share) as usize;
        let mut order: Vec<usize> = (0..anchors.len()).collect();
        order.shuffle(rng);
        let mut out = Vec::new();
        for n in order {
            if left == 0 {
                break;
            }
            out.push((Item::Anchor(n), anchors[n]));
            left = left.saturating_sub(anchors[n]);
        }
        out
    }

    /// Cuts the items into steps of about equal size, so that no step is a small rest.
    fn steps(&self, items: Vec<(Item, usize)>, by_heart: bool) -> Vec<Vec<Item>> {
        let total: usize = items.iter().map(|(_, tokens)| tokens).sum();
        let count = total.div_ceil(self.step_size(total, by_heart)).max(1);
        let size = total.div_ceil(count);
        let mut steps = vec![Vec::new()];
        let mut filled = 0;
        for (item, tokens) in items {
            if filled >= size * steps.len() {
                steps.push(Vec::new());
            }
            filled += tokens;
            if let Some(step) = steps.last_mut() {
                step.push(item);
            }
        }
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const COURSE: Course = Course {
        passes: 2,
        answer_passes_max: 10,
        loss_target: 0.05,
        steps_min: 1,
        step_tokens: 100,
        anchor_share: 0.1,
        answer_rate: 1.0,
        review_passes: 2,
    };

    fn fresh(count: usize, answer: bool, loss: f32) -> Vec<Fresh> {
        vec![Fresh { tokens: 40, answer, loss, counted: false, unread: false, out: false }; count]
    }

    fn items(steps: &[Vec<Item>]) -> BTreeSet<Item> {
        steps.iter().flatten().copied().collect()
    }

    #[test]
    fn a_pass_holds_everything_once_and_fills_its_steps_evenly() {
        let steps = COURSE.pass(0, &fresh(10, false, 3.0), &[40; 10], 10, &[50; 4], 1);
        let all = items(&steps);
        assert_eq!(all.iter().filter(|i| matches!(i, Item::Fresh(_))).count(), 10);
        assert_eq!(all.iter().filter(|i| matches!(i, Item::Rehearsed(_))).count(), 10);
        assert_eq!(all.iter().filter(|i| matches!(i, Item::Anchor(_))).count(), 2);
        assert_eq!(all.len(), steps.iter().map(Vec::len).sum::<usize>(), "nothing twice");
        assert!(steps.iter().all(|s| (1..=4).contains(&s.len())), "{steps:?}");
    }

    #[test]
    fn text_is_read_a_fixed_number_of_times() {
        assert!(!COURSE.pass(1, &fresh(10, false, 3.0), &[], 0, &[], 1).is_empty());
        assert!(COURSE.pass(2, &fresh(10, false, 3.0), &[], 0, &[], 1).is_empty());
    }

    #[test]
    fn answers_are_repeated_until_known_with_rehearsal_in_proportion() {
        let mut batch = fresh(10, true, 0.01);
        batch[3].loss = 1.0;
        let all = items(&COURSE.pass(5, &batch, &[40; 10], 10, &[], 1));
        assert!(all.contains(&Item::Fresh(3)));
        let rehearsed = all.iter().filter(|item| matches!(item, Item::Rehearsed(_))).count();
        assert_eq!(
            (rehearsed, all.len()),
            (1, 3),
            "what is not known, one rehearsed, one of its own: {all:?}"
        );
        let alone = items(&COURSE.pass(5, &batch, &[], 0, &[], 1));
        assert_eq!(alone, BTreeSet::from([Item::Fresh(3)]), "without rehearsal not of its own either");
        assert!(COURSE.pass(10, &batch, &[40; 10], 10, &[], 1).is_empty(), "at most so many passes");
    }

    #[test]
    fn passes_take_turns_through_what_is_rehearsed() {
        let batch = fresh(10, false, 3.0);
        let taken = |pass| -> BTreeSet<usize> {
            let steps = COURSE.pass(pass, &batch, &[40; 25], 10, &[], 1);
            let rehearsed = |item| if let Item::Rehearsed(n) = item { Some(n) } else { None };
            items(&steps).into_iter().filter_map(rehearsed).collect()
        };
        assert_eq!(taken(0), (0..10).collect());
        assert_eq!(taken(1), (10..20).collect());
        let course = Course { passes: 3, ..COURSE };
        let third = items(&course.pass(2, &batch, &[40; 25], 10, &[], 1));
        assert!(third.contains(&Item::Rehearsed(24)) && third.contains(&Item::Rehearsed(4)), "round again");
    }

    #[test]
    fn long_texts_are_rehearsed_in_proportion_to_short_answers() {
        let rehearsed = |steps: &[Vec<Item>]| {
            items(steps).into_iter().filter(|item| matches!(item, Item::Rehearsed(_))).count()
        };
        let batch = fresh(40, true, 3.0);
        assert_eq!(rehearsed(&COURSE.pass(0, &batch, &[200; 300], 40, &[], 1)), 8, "1600 tokens to 1600");
        assert_eq!(
            rehearsed(&COURSE.pass(0, &batch[..1], &[200; 300], 16, &[], 1)),
            4,
            "640 at a ratio of 16"
        );
        assert_eq!(rehearsed(&COURSE.pass(0, &batch[..1], &[200; 300], 1, &[], 1)), 1);
        assert_eq!(
            rehearsed(&COURSE.pass(0, &batch, &[20; 300], 40, &[], 1)),
            40,
            "never more than asked for"
        );
    }

    #[test]
    fn answers_are_learned_faster_and_text_beside_them_is_not() {
        let course = Course { answer_rate: 3.0, ..COURSE };
        let of = |batch: &[Fresh], pass| course.rate(pass, 0, 1, batch) / COURSE.rate(pass, 0, 1, batch);
        let is = |rate: f64, expected: f64| assert!((rate - expected).abs() < 1e-9, "{rate}");
        is(of(&fresh(3, false, 3.0), 0), 1.0);
        is(of(&fresh(3, true, 3.0), 0), 3.0);
        let mixed = [fresh(3, false, 3.0), fresh(1, true, 3.0)].concat();
        is(of(&mixed, 0), 1.5);
        // Once the text is read, the answers are alone.
        is(of(&mixed, 2), 3.0);
    }

    #[test]
    fn a_small_batch_is_read_more_often() {
        let course = Course { steps_min: 6, ..COURSE };
        assert!(!course.pass(5, &fresh(1, false, 3.0), &[], 0, &[], 1).is_empty());
        assert!(course.pass(6, &fresh(1, false, 3.0), &[], 0, &[], 1).is_empty());
    }

    #[test]
    fn the_rate_falls_over_all_passes_a_batch_may_take() {
        let (text, answers) = (fresh(3, false, 3.0), fresh(3, true, 3.0));
        let is = |rate: f64, expected: f64| assert!((rate - expected).abs() < 1e-9, "{rate}");
        is(COURSE.rate(0, 0, 2, &text), 0.875);
        is(COURSE.rate(1, 1, 2, &text), 0.125);
        is(COURSE.rate(0, 0, 1, &answers), 0.95 * RATE_BY_HEART);
        is(COURSE.rate(9, 0, 1, &answers), 0.05 * RATE_BY_HEART);
        // A small batch is read more often, and the rate falls over those passes.
        let small = Course { steps_min: 10, ..COURSE };
        is(small.rate(9, 0, 1, &text), 0.05);
    }

    #[test]
    fn answers_that_are_counted_are_read_once() {
        let counted: Vec<Fresh> =
            fresh(3, true, 3.0).into_iter().map(|f| Fresh { counted: true, ..f }).collect();
        let course = Course { steps_min: 6, ..COURSE };
        assert_eq!(items(&course.pass(0, &counted, &[], 0, &[], 1)).len(), 3);
        assert!(course.pass(1, &counted, &[], 0, &[], 1).is_empty());
        assert_eq!(course.rate(0, 0, 2, &counted), 0.75, "it falls to the end of that");
        // Beside one that is to be known by heart they are what it must not undo.
        let mixed = [counted, fresh(1, true, 3.0)].concat();
        let left = items(&COURSE.pass(2, &mixed, &[40; 10], 8, &[], 1));
        assert!(left.contains(&Item::Fresh(3)) && left.iter().any(|item| matches!(item, Item::Known(0..3))));
        assert_eq!(COURSE.rate(0, 0, 1, &mixed), 0.95);
    }

    #[test]
    fn of_many_that_are_counted_some_are_read_with_rehearsal_in_proportion() {
        let mut counted: Vec<Fresh> =
            fresh(100, true, 3.0).into_iter().map(|f| Fresh { counted: true, unread: true, ..f }).collect();
        counted[..10].iter_mut().for_each(|f| f.unread = false);
        let all = items(&COURSE.pass(0, &counted, &[40; 300], 30, &[], 1));
        let of = |wanted: fn(&Item) -> bool| all.iter().filter(|item| wanted(item)).count();
        assert_eq!(of(|item| matches!(item, Item::Fresh(0..10))), 10);
        assert_eq!((of(|item| matches!(item, Item::Rehearsed(_))), all.len()), (30, 40));
        assert!(COURSE.pass(1, &counted, &[40; 300], 30, &[], 1).is_empty());
        // What is not read does not stand beside one that is to be known by heart either.
        let mixed = [counted, fresh(1, true, 3.0)].concat();
        let left = items(&COURSE.pass(2, &mixed, &[40; 300], 30, &[], 1));
        assert!(!left.iter().any(|item| matches!(item, Item::Known(10..) | Item::Fresh(0..100))), "{left:?}");
    }

    #[test]
    fn what_is_learned_by_heart_takes_smaller_steps() {
        let course = Course { step_tokens: 4096, ..COURSE };
        let steps = |batch: &[Fresh]| course.pass(0, batch, &[], 0, &[], 1).len();
        assert!(steps(&fresh(100, true, 3.0)) > 60, "of 64 tokens in the mean");
        assert!(steps(&fresh(100, false, 3.0)) < 20);
        assert!(steps(&[fresh(99, true, 3.0), fresh(1, false, 3.0)].concat()) < 20, "a text is among them");
    }

    #[test]
    fn a_review_holds_its_items_once_with_anchors_at_a_rate_that_falls_to_nothing() {
        let taken = vec![(Item::Fresh(1), 40), (Item::Rehearsed(3), 40), (Item::Fresh(3), 40)];
        let steps = COURSE.mixture(0, taken.clone(), &[12; 4], 1);
        let mut all: Vec<Item> = steps.concat();
        all.retain(|item| !matches!(item, Item::Anchor(_)));
        all.sort();
        assert_eq!(all, [Item::Fresh(1), Item::Fresh(3), Item::Rehearsed(3)]);
        assert_eq!(steps.concat().len(), 3 + 1, "a tenth of 120 tokens is an anchor of 12");
        let orders: BTreeSet<Vec<Item>> =
            (0..6).map(|n| COURSE.mixture(n, taken.clone(), &[], 1).concat()).collect();
        assert!(orders.len() > 1, "each in an order of its own");
        let is = |rate: f64, expected: f64| assert!((rate - expected).abs() < 1e-9, "{rate}");
        is(COURSE.review_rate(0, 0, 2), REVIEW_RATE * 0.875);
        is(Course { answer_rate: 3.0, ..COURSE }.review_rate(1, 1, 2), REVIEW_RATE * 3.0 * 0.125);
    }

    #[test]
    fn the_order_depends_on_seed_and_pass_alone() {
        let run = |pass, seed| COURSE.pass(pass, &fresh(9, false, 3.0), &[40; 9], 9, &[50; 4], seed);
        assert_eq!(run(0, 1), run(0, 1));
        assert_ne!(run(0, 1), run(1, 1));
        assert_ne!(run(0, 1), run(0, 2));
    }

    #[test]
    fn what_broke_a_step_is_left_out() {
        let mut batch = fresh(3, false, 3.0);
        batch[1].out = true;
        assert!(!items(&COURSE.pass(0, &batch, &[], 0, &[], 1)).contains(&Item::Fresh(1)));
    }
}
