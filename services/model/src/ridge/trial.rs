//! What prompts say of a regression that was solved without them.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::counts::Trial;
use super::head::unlike_anchors;
use super::products::Factor;
use super::{Answer, Lesson};

/// Prompts by which a regression is tried each time at most.
pub(super) const TRIED_MAX: usize = 256;

/// A mean over the last [`TRIED_MAX`] prompts or so.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Mean {
    #[serde(alias = "tried")]
    pub of: f64,
    #[serde(alias = "right")]
    pub sum: f64,
}

impl Mean {
    /// Takes in what `of` more prompts say.
    pub fn take(&mut self, Self { of, sum }: Self) {
        let kept = 1.0 - of / TRIED_MAX as f64;
        *self = Self { of: kept * self.of + of, sum: kept * self.sum + sum };
    }

    /// Of all that either saw.
    pub fn with(self, other: Self) -> Self {
        Self { of: self.of + other.of, sum: self.sum + other.sum }
    }

    /// Of a share of answers that were found: beyond what `guess` alone would find, of all that could be (Cohen's kappa, with the
    /// most frequent answer as the guess).
    pub fn skill(self, guess: f64) -> f64 {
        if self.of == 0.0 || guess >= 1.0 { 0.0 } else { (self.sum / self.of - guess) / (1.0 - guess) }
    }
}

/// Prompts by which a regression is tried that they are part of.
pub(super) struct Tried<'a> {
    lessons: &'a [Lesson<'a>],
    /// What it says of each, f64 [prompts, 1 + answers and one more with anchors].
    y: Tensor,
    /// How much of that each has said itself, and all that are as it is, f64 [prompts, 1].
    h: Tensor,
}

impl<'a> Tried<'a> {
    /// The first [`TRIED_MAX`] of a trial, where `weights`, f64 [1 + answers and one more with anchors, FEATURES], were solved with
    /// `factor`; none of none.
    pub fn new(
        Trial { rows, lessons, alike }: Trial<'a>,
        factor: &Factor,
        weights: &Tensor,
    ) -> Result<Option<Self>> {
        let lessons = &lessons[..lessons.len().min(TRIED_MAX)];
        let alike = Tensor::from_slice(&alike[..lessons.len()]).f_unsqueeze(1)?;
        if lessons.is_empty() {
            return Ok(None);
        }
        let x = rows.f_narrow(0, 0, lessons.len() as i64)?.f_to_kind(Kind::Double)?;
        let h = x
            .f_mul(&factor.solve(&x)?)?
            .f_sum_dim_intlist(&[1_i64][..], true, Kind::Double)?
            .f_mul(&alike)?;
        Ok(Some(Self { lessons, y: x.f_linear(weights, None::<&Tensor>)?, h }))
    }

    /// How many of their answers are found without them.
    pub fn answers(&self, known: &[Answer]) -> Result<Mean> {
        let of = |text: &str| known.iter().position(|answer| answer.text == text).map(|n| 1 + n as i64);
        let place = |(row, l): (i64, &Lesson<'_>)| Some((row, of(&l.answer.as_ref()?.1)?));
        let (rows, places): (Vec<i64>, Vec<i64>) = (0..).zip(self.lessons).filter_map(place).unzip();
        // One answer alone is found by whoever knows no other.
        if known.len() < 2 || rows.is_empty() {
            return Ok(Mean::default());
        }
        let (tried, places) = (Tensor::from_slice(&rows), Tensor::from_slice(&places));
        let y = self.y.f_narrow(1, 0, 1 + known.len() as i64)?.f_index_select(0, &tried)?;
        let truth = y.f_zeros_like()?.f_scatter_value(1, &places.f_unsqueeze(1)?, 1.0)?;
        let found = without(&y, &truth, &self.h.f_index_select(0, &tried)?)?.f_argmax(1, false)?;
        let found = found.f_eq_tensor(&places)?.f_sum(Kind::Double)?;
        Ok(Mean { of: rows.len() as f64, sum: found.f_double_value(&[])? })
    }

    /// How unlike anchors they are, which are last, without being counted: see [`super::Head::kinship`].
    pub fn kinship(&self) -> Result<Mean> {
        let unlike = unlike_anchors(&self.y)?;
        let sum = without(&unlike, &unlike.f_ones_like()?, &self.h)?.f_sum(Kind::Double)?;
        Ok(Mean { of: self.lessons.len() as f64, sum: sum.f_double_value(&[])? })
    }
}

/// What a regression would say of prompts had each not been part of it (Allen's PRESS, 1974).
fn without(y: &Tensor, truth: &Tensor, h: &Tensor) -> Result<Tensor> {
    Ok(y.f_sub(&h.f_mul(truth)?)?.f_div(&h.f_rsub_scalar(1.0)?.f_clamp_min(1e-9)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skill_is_what_is_found_beyond_a_guess() {
        let skill = |sum, guess| Mean { of: 10.0, sum }.skill(guess);
        assert_eq!((skill(10.0, 0.5), skill(5.0, 0.5), skill(10.0, 1.0)), (1.0, 0.0, 0.0));
        assert!(skill(2.0, 0.5) < 0.0 && Mean::default().skill(0.1) == 0.0);
    }

    #[test]
    fn a_mean_is_over_the_last_and_reads_what_was_kept_under_other_names() {
        let mut mean = Mean::default();
        mean.take(Mean { of: 64.0, sum: 64.0 });
        mean.take(Mean { of: 128.0, sum: 0.0 });
        assert_eq!(mean, Mean { of: 160.0, sum: 32.0 });
        mean.take(Mean { of: TRIED_MAX as f64, sum: 7.0 });
        assert_eq!(mean, Mean { of: TRIED_MAX as f64, sum: 7.0 });
        assert_eq!(serde_json::from_str::<Mean>(r#"{"tried": 2.0, "right": 1.0}"#).unwrap().sum, 1.0);
    }
}
