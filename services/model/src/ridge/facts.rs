//! Answers that nothing else has: each is remembered with its prompt.
//!
//! What many prompts share the sums know; what one prompt alone has would have to be learned by heart. The same regression
//! tells that prompt from all others: solved for it alone, it says how like it any prompt is, however much they all have in common.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::products::Factor;
use super::solved::Solved;
use super::{Answer, FEATURES, Rows};

/// Facts that are remembered at most: each takes 2,500 bytes where it is counted, and as many where it is served.
pub const FACTS_MAX: usize = 32_768;

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

    /// What describes each prompt.
    fn prompts(&self) -> impl Iterator<Item = &[u8]> {
        self.rows.chunks_exact(FEATURES as usize)
    }

    /// Remembers what others do: see [`Facts::put`].
    pub fn join(&mut self, other: &Self) {
        let known: HashMap<&[u8], usize> = self.prompts().zip(0..).collect();
        let places: Vec<Option<usize>> = other.prompts().map(|prompt| known.get(prompt).copied()).collect();
        let mut new: HashMap<&[u8], usize> = HashMap::new();
        for ((prompt, answer), place) in other.prompts().zip(&other.answers).zip(places) {
            if let Some(place) = place.or_else(|| new.get(prompt).copied()) {
                let known = &mut self.answers[place];
                if known.answer.text == answer.answer.text {
                    known.answer.take_in(&answer.answer);
                    known.document = answer.document;
                } else {
                    *known = answer.clone();
                }
            } else if self.answers.len() < FACTS_MAX {
                new.insert(prompt, self.answers.len());
                self.rows.extend(prompt);
                self.answers.push(answer.clone());
            }
        }
    }

    /// The regression of each: see [`Solved`].
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn solve(&self, factor: &Factor) -> Result<Solved> {
        Solved::new(factor, &self.rows, self.answers.clone())
    }
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
        let damaged = Tensor::zeros([3, FEATURES], (Kind::Uint8, tch::Device::Cpu));
        assert!(Facts::new(&damaged, vec![answer(1)]).is_err());
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
}
