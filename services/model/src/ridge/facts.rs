//! Answers that nothing else has: each is remembered with its prompt.
//!
//! What many prompts share the sums know; what one prompt alone has would have to be learned by heart. The same regression
//! tells that prompt from all others: solved for it alone, it says how like it any prompt is, however much they all have in common.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::products::Factor;
use super::{Answer, FEATURES, Rows};

/// Facts that are remembered at most: each takes 2,500 bytes where it is counted and 5,000 where it is solved.
pub const FACTS_MAX: usize = 4096;

/// Facts that are solved at once, each with three times 20 kB.
const FACTS_A_SOLUTION: usize = 1024;

/// A prompt that is so like a fact's own has its answer as likely as not. Of invented facts among 100 to 6,000 of the same six kinds the
/// same question in other words comes to 0.6 to 0.7 in the mean (a tenth is below 0.43 to 0.51), and is like no other one more in 99 of 100; the
/// nearest to a question of that kind about something unknown to 0.3 to 0.37, to one of another kind to 0.2 to 0.3.
const LIKE: f64 = 0.45;
/// How sure that is: the odds are `exp(SURENESS * (likeness - LIKE))`.
const SURENESS: f64 = 30.0;
/// What is less like a prompt has no say.
const LIKE_MIN: f64 = 0.25;

/// An answer of its own that a prompt has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Told {
    #[serde(flatten)]
    pub answer: Answer,
    /// The document that told it last; none where an earlier version noted it.
    #[serde(default)]
    pub document: Option<u64>,
}

/// Prompts with answers of their own.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Facts {
    /// What describes each prompt, FEATURES bytes each.
    rows: Vec<u8>,
    /// The answer to each.
    answers: Vec<Told>,
}

impl Facts {
    /// As they were written: `rows` are u8 [facts, FEATURES].
    pub fn new(rows: &Tensor, answers: Vec<Told>) -> Result<Self> {
        ensure!(
            rows.size() == [answers.len() as i64, FEATURES] && rows.f_kind()? == Kind::Uint8,
            "facts and what describes their prompts differ in number"
        );
        Ok(Self { rows: Vec::<u8>::try_from(rows.f_reshape([-1])?)?, answers })
    }

    pub fn len(&self) -> usize {
        self.answers.len()
    }

    pub fn answers(&self) -> &[Told] {
        &self.answers
    }

    /// What describes the prompts, u8 [facts, FEATURES].
    pub fn rows(&self) -> Result<Tensor> {
        Ok(Tensor::from_slice(&self.rows).f_view([-1, FEATURES])?)
    }

    /// Remembers prompts, which `rows` describe, with an answer each. A prompt that is there already has the new answer from now on, or
    /// the same in another form; what comes when there is no room is not remembered.
    ///
    /// # Errors
    /// When they differ in number.
    pub fn put(&mut self, rows: &Rows, answers: Vec<Told>) -> Result<()> {
        let other = Self::new(&rows.f_to_kind(Kind::Uint8)?, answers)?;
        self.join(&other);
        Ok(())
    }

    /// Remembers what others do: see [`Facts::put`].
    pub fn join(&mut self, other: &Self) {
        let prompts =
            |rows: &[u8]| rows.chunks_exact(FEATURES as usize).map(<[u8]>::to_vec).collect::<Vec<_>>();
        let mut places: HashMap<Vec<u8>, usize> = prompts(&self.rows).into_iter().zip(0..).collect();
        for (prompt, answer) in prompts(&other.rows).into_iter().zip(&other.answers) {
            if let Some(&place) = places.get(&prompt) {
                let known = &mut self.answers[place];
                if known.answer.text == answer.answer.text {
                    known.answer.take_in(&answer.answer);
                    known.document = answer.document;
                } else {
                    *known = answer.clone();
                }
            } else if self.answers.len() < FACTS_MAX {
                self.rows.extend(&prompt);
                places.insert(prompt, self.answers.len());
                self.answers.push(answer.clone());
            }
        }
    }

    /// Solves `w = (P + A + r I)^-1 x / h` of each prompt `x`, with `h = x^T (P + A + r I)^-1 x`: the regression of a number
    /// that is 1 for `x` and 0 for all else, in lengths of what it says of `x`, which is so 1.
    pub fn solve(&self, factor: &Factor) -> Result<Solved> {
        let mut weights = Vec::new();
        for rows in self.rows.chunks(FACTS_A_SOLUTION * FEATURES as usize) {
            let x = Tensor::from_slice(rows).f_view([-1, FEATURES])?.f_to_kind(Kind::Double)?;
            let solved = factor.solve(&x)?;
            let own = x.f_mul(&solved)?.f_sum_dim_intlist(&[1_i64][..], true, Kind::Double)?;
            weights.push(solved.f_div(&own.f_clamp_min(1e-12)?)?.f_to_kind(Kind::Half)?);
        }
        let none = Tensor::f_zeros([0, FEATURES], (Kind::Half, Device::Cpu))?;
        let weights = if weights.is_empty() { none } else { Tensor::f_cat(&weights, 0)? };
        Solved::new(weights, self.answers.clone())
    }
}

/// Facts as they are served.
#[derive(Debug)]
pub(super) struct Solved {
    /// f32 [facts, FEATURES], of f16.
    weights: Tensor,
    answers: Vec<Told>,
}

/// What facts say of a prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Likely {
    /// How likely the prompt is one of theirs.
    pub all: f64,
    /// How likely that is each one, by its place; those that are like it.
    pub each: Vec<(usize, f64)>,
}

impl Solved {
    /// As they were written: `weights` are f16 [facts, FEATURES].
    pub fn new(weights: Tensor, answers: Vec<Told>) -> Result<Self> {
        ensure!(
            weights.size() == [answers.len() as i64, FEATURES] && weights.f_kind()? == Kind::Half,
            "facts and their weights differ in number"
        );
        let weights = weights.f_to_kind(Kind::Float)?;
        ensure!(
            answers.is_empty() || crate::weights::is_finite(&weights)?,
            "the regression on facts is not finite"
        );
        Ok(Self { weights, answers })
    }

    /// None.
    pub fn none() -> Result<Self> {
        Self::new(Tensor::f_zeros([0, FEATURES], (Kind::Half, Device::Cpu))?, Vec::new())
    }

    pub fn answers(&self) -> &[Told] {
        &self.answers
    }

    /// f16 [facts, FEATURES].
    pub fn weights(&self) -> Result<Tensor> {
        Ok(self.weights.f_to_kind(Kind::Half)?)
    }

    /// How likely prompts, which `features` describe, are those of facts, where what else is said of each is as like it as `against` says.
    ///
    /// # Errors
    /// When features are not what it takes.
    pub fn likely(&self, features: &Tensor, against: &[f64]) -> Result<Vec<Likely>> {
        if self.answers.is_empty() {
            return Ok(vec![Likely::default(); against.len()]);
        }
        let like = features.f_linear(&self.weights, None::<&Tensor>)?.f_to_kind(Kind::Double)?;
        let like = Vec::<Vec<f64>>::try_from(like).context("what facts say of prompts")?;
        ensure!(like.len() == against.len(), "prompts and what is said of them differ in number");
        Ok(like.iter().zip(against).map(|(like, &against)| likely(like, against)).collect())
    }
}

fn likely(like: &[f64], against: f64) -> Likely {
    let most = like.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let heard = (0..).zip(like).filter(|(_, like)| **like >= LIKE_MIN);
    let odds: Vec<(usize, f64)> = heard.map(|(n, like)| (n, (SURENESS * (like - most)).exp())).collect();
    if odds.is_empty() {
        return Likely::default();
    }
    let all = 1.0 / (1.0 + (SURENESS * (against.max(LIKE) - most)).exp());
    let whole: f64 = odds.iter().map(|(_, odds)| odds).sum();
    Likely { all, each: odds.into_iter().map(|(n, odds)| (n, all * odds / whole)).collect() }
}

#[cfg(test)]
mod tests {
    use super::super::{Anchors, Counts, Features, Form, Head, Lesson, Prior};
    use super::*;
    use crate::golden;

    fn answer(token: u32) -> Told {
        let form = Form { tokens: vec![token, 0], after: None };
        let answer = Answer { text: token.to_string(), forms: vec![form] };
        Told { answer, document: Some(1000 + u64::from(token)) }
    }

    /// Prompts of one kind that differ in two tokens.
    fn prompt(n: u32) -> Vec<u32> {
        vec![3, 14, 15, 20 + n % 7, 40 + n * 11 % 31, 9]
    }

    fn rows(features: &Features, prompts: &[Vec<u32>]) -> Rows {
        features.of(&prompts.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap()
    }

    /// Counts that remember prompts, each with the answer of its number.
    fn told(features: &Features, prompts: &[Vec<u32>]) -> Counts {
        let mut counts = Counts::new().unwrap();
        let lessons: Vec<Lesson<'_>> = prompts.iter().map(|prompt| Lesson { prompt, answer: None }).collect();
        assert!(counts.add(&rows(features, prompts), &lessons).unwrap());
        let answers = (0..prompts.len() as u32).map(|n| answer(60 + n)).collect();
        counts.remember(&rows(features, prompts), answers).unwrap();
        counts
    }

    fn priors(head: &Head, features: &Features, prompts: &[Vec<u32>]) -> Vec<Prior> {
        let asked: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        Head::prior(&[(Some(head), 1.0)], &rows(features, prompts), &asked).unwrap()
    }

    #[test]
    fn each_of_many_alike_is_recalled_and_what_is_unlike_them_is_not() {
        let features = Features::new(&golden::base("llama"), None).unwrap();
        let prompts: Vec<Vec<u32>> = (0..30).map(prompt).collect();
        let mut counts = told(&features, &prompts);
        let anchors: Vec<Vec<u32>> = (0..40).map(|n| vec![100 + n % 20, 90, 70 + n % 13, n]).collect();
        let asked: Vec<&[u32]> = anchors.iter().map(Vec::as_slice).collect();
        let head = counts.solve(None, &Anchors::new(&features, &asked).unwrap()).unwrap();
        assert!(!head.is_trusted() && head.speaks() && head.facts() == 30 && head.answers().is_empty());
        for (n, prior) in (0..).zip(priors(&head, &features, &prompts)) {
            assert!(
                prior.knows(&[60 + n, 0]) && prior.of(&[61 + n, 0]) < 0.01,
                "{n}: {}",
                prior.of(&[60 + n, 0])
            );
        }
        let others = [vec![101, 90, 74, 50], vec![119, 90, 71, 3, 2]];
        assert!(priors(&head, &features, &others).iter().all(|prior| prior.rest() > 0.5));
        let recalled = head.recalls(&rows(&features, &[&prompts[..1], &others].concat())).unwrap();
        assert!(recalled[0] > 0.99 && recalled[1] < 0.5 && recalled[2] < 0.5, "{recalled:?}");
    }

    #[test]
    fn a_prompt_has_the_answer_that_it_was_told_last_and_every_form_of_it() {
        let features = Features::new(&golden::base("llama"), None).unwrap();
        let prompts = [prompt(1), prompt(2)];
        let mut counts = told(&features, &prompts);
        let mut other_form = answer(61);
        other_form.answer.forms[0].tokens.insert(0, 7);
        counts.remember(&rows(&features, &prompts), vec![answer(90), other_form]).unwrap();
        let head = counts.solve(None, &Anchors::none().unwrap()).unwrap();
        let [first, second] = &priors(&head, &features, &prompts)[..] else { panic!("two") };
        assert!(first.knows(&[90, 0]) && first.of(&[60, 0]) == 0.0 && counts.facts() == 2);
        assert!(second.of(&[61, 0]) > 0.4 && second.of(&[7, 61, 0]) > 0.4);
        let mut first = first.clone();
        for token in [90, 0] {
            first.mix(&mut vec![0.0; 128]);
            first.accept(token);
        }
        let sources = first.sources();
        assert!(matches!(sources[..], [of] if of.document == 1090 && of.likely > 0.9), "{sources:?}");
    }

    #[test]
    fn what_was_written_says_the_same_and_earlier_files_have_none() {
        let features = Features::new(&golden::base("llama"), None).unwrap();
        let prompts: Vec<Vec<u32>> = (0..9).map(prompt).collect();
        let mut counts = told(&features, &prompts);
        let head = counts.solve(None, &Anchors::none().unwrap()).unwrap();
        let read = Head::from_bytes(&head.to_bytes().unwrap()).unwrap();
        assert_eq!(priors(&read, &features, &prompts), priors(&head, &features, &prompts));
        let mut again = Counts::from_bytes(&counts.to_bytes().unwrap()).unwrap();
        assert_eq!(again.to_bytes().unwrap(), counts.to_bytes().unwrap());
        let solved = again.solve(None, &Anchors::none().unwrap()).unwrap();
        assert_eq!(priors(&solved, &features, &prompts), priors(&head, &features, &prompts));
        let damaged = Tensor::zeros([3, FEATURES], (Kind::Uint8, Device::Cpu));
        assert!(Facts::new(&damaged, vec![answer(1)]).is_err());
        assert!(Solved::new(damaged.to_kind(Kind::Half), vec![answer(1)]).is_err());
    }

    #[test]
    fn there_is_room_for_so_many_and_those_that_are_there_stay() {
        let row = |n: usize| (0..FEATURES as usize).map(move |at| (n >> (at % 16) & 1) as u8);
        let many = |from: usize, count: usize| Facts {
            rows: (from..from + count).flat_map(row).collect(),
            answers: (from..from + count).map(|n| answer(n as u32)).collect(),
        };
        let mut facts = many(0, FACTS_MAX - 1);
        facts.join(&many(FACTS_MAX, 3));
        assert_eq!((facts.len(), &facts.answers()[FACTS_MAX - 1]), (FACTS_MAX, &answer(FACTS_MAX as u32)));
        facts.join(&Facts { answers: vec![answer(7)], ..many(3, 1) });
        assert_eq!(
            (facts.len(), &facts.answers()[3]),
            (FACTS_MAX, &answer(7)),
            "what is there can be told anew"
        );
    }

    #[test]
    fn what_else_is_said_of_a_prompt_has_to_be_less_sure() {
        let alone = likely(&[0.8, 0.3, 0.1], f64::NEG_INFINITY);
        assert!(alone.all > 0.99 && alone.each.len() == 2 && alone.each[0].1 > 0.99);
        assert!((likely(&[0.8], 0.8).all - 0.5).abs() < 1e-9 && likely(&[0.8], 0.9).all < 0.05);
        assert!((likely(&[LIKE], 0.1).all - 0.5).abs() < 1e-9);
        assert_eq!(likely(&[0.2, -0.4], 0.0), Likely::default());
    }
}
