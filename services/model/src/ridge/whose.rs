//! Whose a prompt is, of several who counted theirs.

use std::ops::Range;

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use super::counts::{RIDGE, add_to};
use super::head::SHARPNESS;
use super::products::System;

/// One regression over the prompts of all.
///
/// The counts of one say which of its answers a prompt has, if it is one of its own; what is usual for the others it does not
/// know. Sums of sums are sums over all prompts, so that nothing but a solution is needed for the regression which tells any answer
/// of anyone from all others.
#[derive(Debug)]
pub struct Whose {
    /// f32 [answers of all, those that do not repeat among them, FEATURES].
    weights: Tensor,
    /// The rows of each.
    rows: Vec<Range<i64>>,
}

impl Whose {
    /// Of the counts of each, as [`super::Counts::to_bytes`] writes them, `W = (P + r I)^-1 S` with the sum of their products and all
    /// of their sums; of less than two, which need not be told apart, none.
    ///
    /// # Errors
    /// Those of `counts`, or when one is something else, or none has a feature.
    pub fn solve(counts: impl Iterator<Item = Result<Vec<u8>>>) -> Result<Option<Self>> {
        let mut counts = counts.peekable();
        let Some(first) = counts.next().filter(|_| counts.peek().is_some()) else { return Ok(None) };
        let mut system = System::new()?;
        let (mut sums, mut rows, mut end) = (Vec::new(), Vec::new(), 0);
        for counts in std::iter::once(first).chain(counts) {
            let of_answers = add_to(&mut system, &counts?)?;
            let begin = end;
            end += of_answers.size()[0];
            rows.push(begin..end);
            sums.push(of_answers.f_to_kind(Kind::Double)?);
        }
        let ridge = RIDGE * system.mean()?;
        let weights = system.factor(ridge)?.solve(&Tensor::f_cat(&sums, 0)?)?;
        let weights = weights.f_to_kind(Kind::Float)?.f_contiguous()?;
        ensure!(crate::weights::is_finite(&weights)?, "the regression on whose prompts are is not finite");
        Ok(Some(Self { weights, rows }))
    }

    /// For each row of features how likely it is of each, in the order in which they were given; they sum to 1. An answer says
    /// `exp(20 y) - 1` for its own, so that one which has nothing to do with a prompt says nothing, however many of them there are.
    ///
    /// # Errors
    /// When features are not what it takes.
    pub fn shares(&self, features: &Tensor) -> Result<Vec<Vec<f64>>> {
        let y = features.f_linear(&self.weights, None::<&Tensor>)?.f_to_kind(Kind::Double)?;
        let said = y.f_mul_scalar(SHARPNESS)?.f_expm1()?.f_clamp_min(0.0)?;
        let of = |rows: &Range<i64>| {
            let own = said.f_narrow(1, rows.start, rows.end - rows.start)?;
            own.f_sum_dim_intlist(&[1_i64][..], false, Kind::Double)
        };
        let of_each = self.rows.iter().map(of).collect::<Result<Vec<_>, _>>()?;
        // Where nobody says anything it is as likely of anyone.
        let of_each = Tensor::f_stack(&of_each, 1)?.f_add_scalar(1e-9)?;
        let shares = of_each.f_div(&of_each.f_sum_dim_intlist(&[1_i64][..], true, Kind::Double)?)?;
        Ok(Vec::<Vec<f64>>::try_from(shares)?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Counts, FEATURES, Features, Lesson};
    use super::*;
    use crate::golden;

    /// What one counts of ten prompts of each kind, each kind with an answer of its own.
    fn counts(features: &Features, kinds: &[u32]) -> Vec<u8> {
        let many = kinds.len();
        let prompts: Vec<Vec<u32>> = (0..10 * many).map(|n| prompt(kinds[n % many], n as u32)).collect();
        let rows = features.of(&prompts.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
        let lesson = |(n, prompt): (usize, &'static Vec<u32>)| {
            let answer: &'static [u32] = vec![kinds[n % many], 0].leak();
            Lesson { prompt, answer: Some((answer, kinds[n % many].to_string())) }
        };
        let prompts: &'static [Vec<u32>] = prompts.leak();
        let lessons: Vec<_> = prompts.iter().enumerate().map(lesson).collect();
        let mut counts = Counts::new().unwrap();
        assert!(counts.add(&rows, &lessons).unwrap());
        counts.to_bytes().unwrap()
    }

    /// A prompt of a kind.
    fn prompt(kind: u32, n: u32) -> Vec<u32> {
        vec![10 + kind * 5, 11 + kind * 5, 110 + n % 7]
    }

    #[test]
    fn a_prompt_is_whose_answers_it_is_likely_to_have() {
        let features = Features::new(&golden::base("llama"), None).unwrap();
        let kinds = [[0, 1], [2, 3], [4, 1]];
        let whose = Whose::solve(kinds.iter().map(|kinds| Ok(counts(&features, kinds)))).unwrap().unwrap();
        let asked = [0, 2, 4, 1].map(|kind| prompt(kind, 103));
        let rows = features.of(&asked.each_ref().map(Vec::as_slice)).unwrap();
        let shares = whose.shares(&rows).unwrap();
        assert!(shares.iter().all(|of_prompt| (of_prompt.iter().sum::<f64>() - 1.0).abs() < 1e-9));
        assert!((0..3).all(|n| shares[n][n] > 0.8), "{shares:?}");
        let [first, second, third] = shares[3][..] else { panic!("one for each") };
        assert!(second < 0.1 && (first - third).abs() < 0.1, "of two that both have it neither: {shares:?}");
    }

    #[test]
    fn many_answers_that_have_nothing_to_do_with_a_prompt_say_nothing() {
        let features = Features::new(&golden::base("llama"), None).unwrap();
        let many: Vec<u32> = (3..19).collect();
        let counted = [counts(&features, &[0, 1]), counts(&features, &many)];
        let whose = Whose::solve(counted.into_iter().map(Ok)).unwrap().unwrap();
        let asked = [0, 1, 7].map(|kind| prompt(kind, 103));
        let rows = features.of(&asked.each_ref().map(Vec::as_slice)).unwrap();
        let shares = whose.shares(&rows).unwrap();
        assert!(shares[0][0] > 0.9 && shares[1][0] > 0.9 && shares[2][1] > 0.9, "{shares:?}");
        let nothing = Tensor::zeros([1, FEATURES], (Kind::Float, tch::Device::Cpu));
        assert_eq!(whose.shares(&nothing).unwrap(), [[0.5, 0.5]]);
    }

    #[test]
    fn one_alone_is_told_from_nobody() {
        let features = Features::new(&golden::base("llama"), None).unwrap();
        assert!(Whose::solve(std::iter::once(Ok(counts(&features, &[0, 1])))).unwrap().is_none());
        assert!(Whose::solve(std::iter::empty()).unwrap().is_none());
        assert!(
            Whose::solve((0..2).map(|_| Counts::new()?.to_bytes())).is_err(),
            "no prompt has any feature"
        );
    }
}
