//! What the counts say of a prompt.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::facts::Told;
use super::features::{WAY, as_now, widened};
use super::prior::Path;
use super::solved::Solved;
use super::{Answer, FEATURES, Prior};
use crate::passages::Passages;
use crate::weights;

/// How sure the regression is taken to be: probabilities are `softmax(SHARPNESS * y)`. Of 10, 20 and 40, this has the
/// least loss on unseen requests after 500, 1,500 and 3,000 of 15,000 with 150 labels, and after all of them 0.1 more than 40.
pub(super) const SHARPNESS: f64 = 20.0;

/// The share of an answer's probability that what is known beside it has a say in; the rest is the model's, whatever that says.
pub const TRUST: f64 = 0.95;

const METADATA: &str = "ridge-head";

/// The solution of the regression: a linear map from a prompt's features to known answers.
#[derive(Debug)]
pub struct Head {
    answers: Vec<Answer>,
    /// f32 [1 + answers, FEATURES], and with anchors a last row, of these; the first row is of answers that do not repeat.
    weights: Tensor,
    /// Whether it finds enough answers to prompts that it never saw to have a say.
    trusted: bool,
    /// How unlike anchors prompts usually are that it never saw; none where it was solved without anchors.
    usual: Option<f64>,
    /// Answers that come once, each with its prompt.
    facts: Solved,
    /// What texts say.
    passages: Passages,
}

/// What is written beside the weights.
#[derive(Serialize, Deserialize)]
struct Beside {
    answers: Vec<Answer>,
    trusted: bool,
    #[serde(default)]
    usual: Option<f64>,
    /// In what way prompts are described.
    #[serde(default)]
    way: u32,
    /// The answers of facts.
    #[serde(default)]
    facts: Vec<Told>,
}

impl Head {
    pub(super) fn new(
        answers: Vec<Answer>,
        weights: Tensor,
        trusted: bool,
        usual: Option<f64>,
    ) -> Result<Self> {
        ensure!(
            weights.size() == [1 + answers.len() as i64 + i64::from(usual.is_some()), FEATURES],
            "answers and weights differ in number"
        );
        ensure!(weights::is_finite(&weights)?, "the regression on known answers is not finite");
        ensure!(usual.is_none_or(|usual| usual.is_finite() && usual > 0.0), "no prompt is unlike anchors");
        let (facts, passages) = (Solved::none()?, Passages::default());
        Ok(Self { answers, weights, trusted, usual, facts, passages })
    }

    /// With facts.
    pub(super) fn with(self, facts: Solved) -> Self {
        Self { facts, ..self }
    }

    /// With what texts say.
    pub(super) fn and(self, passages: Passages) -> Self {
        Self { passages, ..self }
    }

    /// As safetensors.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut tensors = vec![("weights".to_owned(), self.weights.shallow_clone())];
        tensors.extend(self.facts.tensors()?);
        tensors.extend(self.passages.tensors()?);
        let (answers, trusted, usual) = (self.answers.clone(), self.trusted, self.usual);
        let beside = Beside { answers, trusted, usual, way: WAY, facts: self.facts.answers().to_vec() };
        weights::to_bytes(&tensors, METADATA, &serde_json::to_string(&beside)?)
    }

    /// Reads back what [`Head::to_bytes`] wrote.
    ///
    /// # Errors
    /// When it is something else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let (mut tensors, beside) = weights::from_bytes(bytes, METADATA)?;
        let beside = serde_json::from_str(&beside).context("known answers are not readable")?;
        let Beside { answers, trusted, usual, way, facts } = beside;
        let weights = tensors.remove("weights").context("the weights of known answers are missing")?;
        let weights = widened(weights)?;
        ensure!(way <= WAY, "the weights of known answers describe prompts in another way");
        as_now(&weights, way)?;
        ensure!(weights.f_kind()? == Kind::Float, "the weights of known answers are not f32");
        let passages = Passages::from_tensors(|name| tensors.remove(name))?;
        let facts = Solved::from_tensors(&mut tensors, facts)?;
        Ok(Self::new(answers, weights, trusted, usual)?.with(facts).and(passages))
    }

    /// Answers that it knows.
    pub fn answers(&self) -> &[Answer] {
        &self.answers
    }

    /// Whether it has a say in which of the answers that repeat a prompt has: see [`super::Counts::solve`].
    pub fn is_trusted(&self) -> bool {
        self.trusted
    }

    /// Whether it says anything of what describes a prompt: see [`super::Features`].
    pub fn describes(&self) -> bool {
        !self.answers.is_empty() || self.facts() > 0 || self.tells_kinship()
    }

    /// What texts say.
    pub fn passages(&self) -> &Passages {
        &self.passages
    }

    /// Takes what texts say out of it.
    pub fn take_passages(&mut self) -> Passages {
        std::mem::take(&mut self.passages)
    }

    /// Whether it has a say in what short answers are.
    pub fn speaks(&self) -> bool {
        self.trusted || self.facts() > 0
    }

    /// Answers that come once, each with its prompt.
    pub fn facts(&self) -> usize {
        self.facts.answers().len()
    }

    #[cfg(test)]
    pub(super) fn weights(&self) -> &Tensor {
        &self.weights
    }

    /// Whether there is a [`Head::kinship`].
    pub fn tells_kinship(&self) -> bool {
        self.usual.is_some()
    }

    /// For each row of features how much it is of the kind that was counted: 0 for one like anchors, 1 for what is usual of prompts
    /// of that kind, and beyond. None where it was solved without anchors.
    ///
    /// # Errors
    /// When features are not what a head takes.
    pub fn kinship(&self, features: &Tensor) -> Result<Option<Vec<f64>>> {
        let Some(usual) = self.usual else { return Ok(None) };
        let unlike = unlike_anchors(&features.f_linear(&self.weights, None::<&Tensor>)?)?;
        let kinship = unlike.f_to_kind(Kind::Double)?.f_div_scalar(usual)?.f_clamp(0.0, 1.0)?;
        Ok(Some(Vec::<f64>::try_from(kinship.f_squeeze_dim(1)?)?))
    }

    /// For each row of features how likely the prompt is that of a fact, asked as it was told or in other words.
    ///
    /// # Errors
    /// When features are not what a head takes.
    pub fn recalls(&self, features: &Tensor) -> Result<Vec<f64>> {
        let nothing_else = vec![f64::NEG_INFINITY; features.size()[0] as usize];
        Ok(self.facts.likely(features, &nothing_else)?.into_iter().map(|likely| likely.all).collect())
    }

    /// For each row of features the probability of answers that do not repeat, of each known answer, and with anchors of these; and what
    /// it says of the likeliest answer, which is 1 for one that is certain. Nothing of answers where it is not trusted.
    fn probabilities(&self, features: &Tensor) -> Result<(Vec<Vec<f64>>, Vec<f64>)> {
        let y = features.f_linear(&self.weights, None::<&Tensor>)?;
        let prompts = y.size()[0];
        if !self.trusted || self.answers.is_empty() {
            return Ok((vec![Vec::new(); prompts as usize], vec![f64::NEG_INFINITY; prompts as usize]));
        }
        let of_answers = y.f_narrow(1, 1, self.answers.len() as i64)?;
        let best = Vec::<f64>::try_from(of_answers.f_amax([1], false)?.f_to_kind(Kind::Double)?)?;
        let y = y.f_mul_scalar(SHARPNESS)?;
        // Where every answer repeated, nothing says what another prompt would look like.
        if self.weights.f_get(0)?.f_abs()?.f_max()?.f_double_value(&[])? == 0.0 {
            let _ = y.f_narrow(1, 0, 1)?.f_fill_(f64::NEG_INFINITY)?;
        }
        Ok((Vec::<Vec<f64>>::try_from(y.f_softmax(-1, Kind::Double)?)?, best))
    }

    /// What the heads, each with its weight, say of prompts. `features` has a row for each of them. A weight without a head, or
    /// with one that knows nothing, is a say of the model alone.
    ///
    /// # Errors
    /// When weights are not above 0, or features are not what a head takes.
    pub fn prior(
        heads: &[(Option<&Self>, f64)],
        features: &Tensor,
        prompts: &[&[u32]],
    ) -> Result<Vec<Prior>> {
        let whole: f64 = heads.iter().map(|(_, weight)| weight).sum();
        ensure!(
            whole.is_finite() && heads.iter().all(|(_, w)| *w >= 0.0) && whole > 0.0,
            "heads need weights above 0"
        );
        // An adapter at less than its full weight has less than its full say, alone too.
        let whole = whole.max(1.0);
        let mut paths: Vec<Vec<Path>> = prompts.iter().map(|_| Vec::new()).collect();
        for (head, weight) in heads {
            let Some(head) = head.filter(|head| head.speaks()) else { continue };
            let (rows, best) = head.probabilities(features)?;
            let of_facts = head.facts.likely(features, &best)?;
            for (((paths, prompt), row), facts) in paths.iter_mut().zip(prompts).zip(rows).zip(of_facts) {
                let (last, share) = (prompt.last().copied(), TRUST * weight / whole);
                let repeat = row.iter().skip(1).map(|p| share * (1.0 - facts.all) * p);
                paths.extend(
                    head.answers.iter().zip(repeat).flat_map(|(answer, p)| answer.paths(last, p, None)),
                );
                let told = facts.each.iter().map(|&(n, p)| (&head.facts.answers()[n], share * p));
                paths.extend(told.flat_map(|(told, p)| told.answer.paths(last, p, told.document)));
            }
        }
        Ok(paths.into_iter().map(Prior::new).collect())
    }
}

impl Answer {
    /// As what tokens it may follow a prompt that ends with `last`, where it is so `likely` as a document says it.
    fn paths(&self, last: Option<u32>, likely: f64, document: Option<u64>) -> Vec<Path> {
        let forms = self.tokens_after(last);
        let likely = likely / forms.len().max(1) as f64;
        forms.into_iter().map(|tokens| Path { tokens: tokens.to_vec(), likely, document }).collect()
    }
}

/// What a regression says for all that was counted less what it says for anchors, which are last: [prompts, 1], and 1 for a
/// prompt that it knows.
pub(super) fn unlike_anchors(y: &Tensor) -> Result<Tensor> {
    let of_anchors = y.f_narrow(1, -1, 1)?;
    Ok(y.f_sum_dim_intlist(&[1_i64][..], true, y.kind())?.f_sub(&of_anchors.f_mul_scalar(2.0)?)?)
}

#[cfg(test)]
mod tests {
    use super::super::{Anchors, Counts, Features, Lesson};
    use super::*;
    use crate::golden;

    /// Prompts of two kinds, the first answered with `[3, 0]`, the second with `[4, 0]`.
    fn head(others: bool) -> (Features, Head) {
        let features = Features::new(&golden::base("llama"), None).unwrap();
        let prompts: Vec<Vec<u32>> = (0..30).map(|n| prompt(n % 3, n)).collect();
        let lesson = |(n, prompt): (usize, &'static [u32])| {
            let answer = match n % 3 {
                0 => Some((&[3_u32, 0][..], "first".to_owned())),
                1 => Some((&[4_u32, 0][..], "second".to_owned())),
                _ => None,
            };
            (others || answer.is_some()).then_some(Lesson { prompt, answer })
        };
        let prompts: &'static [Vec<u32>] = prompts.leak();
        let lessons: Vec<_> = prompts.iter().map(Vec::as_slice).enumerate().filter_map(lesson).collect();
        let mut counts = Counts::new().unwrap();
        assert!(counts.add(&rows(&features, &lessons), &lessons).unwrap());
        let head =
            counts.solve(Some((&rows(&features, &lessons), &lessons)), &Anchors::none().unwrap()).unwrap();
        assert!(head.is_trusted());
        (features, head)
    }

    fn rows(features: &Features, lessons: &[Lesson<'_>]) -> Tensor {
        features.of(&lessons.iter().map(|lesson| lesson.prompt).collect::<Vec<_>>()).unwrap()
    }

    /// A prompt of a kind.
    fn prompt(kind: u32, n: u32) -> Vec<u32> {
        vec![10 + kind * 30, 11 + kind * 30, 90 + n % 7]
    }

    fn prior(heads: &[(Option<&Head>, f64)], features: &Features, prompt: &[u32]) -> Prior {
        Head::prior(heads, &features.of(&[prompt]).unwrap(), &[prompt]).unwrap().remove(0)
    }

    #[test]
    fn a_prompt_like_those_of_an_answer_has_that_answer() {
        let (features, head) = head(true);
        let [first, second, other] =
            [0, 1, 2].map(|kind| prior(&[(Some(&head), 1.0)], &features, &prompt(kind, 101)));
        let of = |prior: &Prior| [[3, 0], [4, 0]].map(|answer| prior.of(&answer));
        assert!(of(&first)[0] > 0.9 && of(&second)[1] > 0.9, "{:?} {:?}", of(&first), of(&second));
        assert!(other.rest() > 0.9, "answers that do not repeat are the model's: {}", other.rest());
    }

    #[test]
    fn the_model_always_has_a_say_and_heads_share_by_weight() {
        let (features, head) = head(false);
        let prompt = prompt(0, 101);
        let alone = prior(&[(Some(&head), 1.0)], &features, &prompt);
        let mass = alone.of(&[3, 0]) + alone.of(&[4, 0]);
        assert!((mass - TRUST).abs() < 1e-6 && (alone.rest() - (1.0 - TRUST)).abs() < 1e-6);
        let half = prior(&[(Some(&head), 0.7), (None, 0.7)], &features, &prompt);
        assert!((half.of(&[3, 0]) - alone.of(&[3, 0]) / 2.0).abs() < 1e-6);
        let twice = prior(&[(Some(&head), 0.7), (Some(&head), 0.3)], &features, &prompt);
        assert!((twice.of(&[3, 0]) - alone.of(&[3, 0])).abs() < 1e-6);
        let faint = prior(&[(Some(&head), 0.25)], &features, &prompt);
        assert!((faint.of(&[3, 0]) - alone.of(&[3, 0]) / 4.0).abs() < 1e-6);
        let rows = features.of(&[&prompt[..]]).unwrap();
        assert!(Head::prior(&[(Some(&head), 0.0)], &rows, &[&prompt]).is_err());
    }

    #[test]
    fn answers_that_prompts_do_not_tell_are_left_to_the_model() {
        let features = Features::new(&golden::base("llama"), None).unwrap();
        // As numbers in facts: which one belongs to a prompt is known from nothing but that it was told.
        let prompts: Vec<Vec<u32>> =
            (0..60_u32).map(|n| vec![n * 37 % 128, n * 71 % 128, n * 13 % 128]).collect();
        let numbers: Vec<[u32; 2]> = (0..6).map(|n| [20 + n, 0]).collect();
        let lesson = |(n, prompt): (usize, &'static Vec<u32>)| {
            let number = n * n / 3 % 6;
            Lesson { prompt, answer: Some((&*numbers[number].to_vec().leak(), number.to_string())) }
        };
        let prompts: &'static [Vec<u32>] = prompts.leak();
        let lessons: Vec<Lesson<'_>> = prompts.iter().enumerate().map(lesson).collect();
        let mut counts = Counts::new().unwrap();
        assert!(counts.add(&rows(&features, &lessons), &lessons).unwrap());
        let head =
            counts.solve(Some((&rows(&features, &lessons), &lessons)), &Anchors::none().unwrap()).unwrap();
        assert!(!head.is_trusted() && head.answers().len() == 6);
        assert_eq!(prior(&[(Some(&head), 1.0)], &features, &prompts[0]), Prior::default());
    }

    #[test]
    fn what_is_like_anchors_is_of_no_kind_that_was_counted() {
        let features = Features::new(&golden::base("llama"), None).unwrap();
        let prompts: Vec<Vec<u32>> = (0..30).map(|n| prompt(n % 2, n)).collect();
        let lesson = |prompt: &'static [u32]| Lesson { prompt, answer: None };
        let prompts: &'static [Vec<u32>] = prompts.leak();
        let lessons: Vec<Lesson<'_>> = prompts.iter().map(|prompt| lesson(prompt)).collect();
        let mut counts = Counts::new().unwrap();
        assert!(counts.add(&rows(&features, &lessons), &lessons).unwrap());
        let anchors: Vec<Vec<u32>> = (0..30).map(|n| prompt(2, n)).collect();
        let anchors =
            Anchors::new(&features, &anchors.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
        let head = counts.solve(Some((&rows(&features, &lessons), &lessons)), &anchors).unwrap();
        let head = Head::from_bytes(&head.to_bytes().unwrap()).unwrap();
        let asked = [0, 1, 2].map(|kind| prompt(kind, 101));
        let described = features.of(&asked.each_ref().map(Vec::as_slice)).unwrap();
        let kinship = head.kinship(&described).unwrap().unwrap();
        assert!(kinship[0] > 0.8 && kinship[1] > 0.8 && kinship[2] < 0.2, "{kinship:?}");
        let alone =
            counts.solve(Some((&rows(&features, &lessons), &lessons)), &Anchors::none().unwrap()).unwrap();
        assert!(alone.kinship(&described).unwrap().is_none(), "nothing to be unlike");
    }

    #[test]
    fn bytes_read_back_and_others_are_refused() {
        let (features, head) = head(true);
        let bytes = head.to_bytes().unwrap();
        let read = Head::from_bytes(&bytes).unwrap();
        assert_eq!((read.answers(), read.to_bytes().unwrap()), (head.answers(), bytes.clone()));
        assert!(Head::from_bytes(&bytes[..90]).is_err());
        assert!(Head::new(Vec::new(), head.weights().shallow_clone(), true, None).is_err());
        assert!(Head::new(head.answers().to_vec(), head.weights() * f64::NAN, true, None).is_err());
        drop(features);
    }
}
