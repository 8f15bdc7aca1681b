//! Sums over prompts and their answers.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::facts::{Facts, Told};
use super::features::{PART, PARTS, WAY, as_now, widened};
use super::products::{Factor, Products, System};
use super::trial::{Mean, Tried};
use super::{ANSWERS_MAX, Anchors, Answer, FEATURES, Form, Head, Rows};
use crate::passages::Passages;
use crate::weights;

/// What is added to the products' diagonal, as a share of its mean: on 150 to 15,000 requests with 150 labels a tenth and ten
/// times as much were no better by more than half a point.
pub(super) const RIDGE: f64 = 0.01;

/// The skill from which on it is trusted: 150 labels have 0.5 from three prompts each on, two labels need some six.
const SKILL_MIN: f64 = 0.3;
/// The least that prompts are taken to be unlike anchors: what a few of them say is chance.
const USUAL_MIN: f64 = 0.2;

const METADATA: &str = "ridge";

/// A prompt with what was answered to it.
#[derive(Debug, Clone)]
pub struct Lesson<'a> {
    /// The prompt.
    pub prompt: &'a [u32],
    /// The answer as tokens, with its text; none where it is one of those that do not repeat.
    pub answer: Option<(&'a [u32], String)>,
}

/// Sums of the products of prompts with themselves and with their answers: all that is kept of them.
#[derive(Debug)]
pub struct Counts {
    /// Sum of `x x^T` over prompts.
    products: Products,
    /// Sum of `x` over the prompts of each answer, i32 [1 + answers, FEATURES]. The first row is of answers that do not repeat.
    sums: Tensor,
    known: Known,
    facts: Facts,
    /// What texts say.
    pub(super) passages: Passages,
}

/// Prompts that were counted, by which a regression is tried as if each had not been.
#[derive(Clone, Copy)]
pub(super) struct Trial<'a> {
    /// What describes each.
    pub rows: &'a Rows,
    pub lessons: &'a [Lesson<'a>],
    /// How many of those that were counted are described as each is, and left out with it.
    pub alike: &'a [f64],
}

/// A regression that was solved.
pub(super) struct Regression {
    /// What it says, of facts nothing.
    pub head: Head,
    factor: Factor,
}

/// What the sums are of.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Known {
    answers: Vec<Answer>,
    /// Prompts that have each answer.
    prompts_of: Vec<u64>,
    /// All prompts, those of answers that do not repeat too.
    prompts: u64,
    /// What prompts said of the regression that was solved without them.
    trial: Mean,
    /// How unlike the anchors they were to it.
    #[serde(default)]
    kinship: Mean,
    /// The document from which on all were counted; none where that is not known.
    #[serde(default)]
    since: Option<u64>,
    /// In what way prompts are described.
    #[serde(default)]
    way: u32,
    /// The answers of facts.
    #[serde(default)]
    facts: Vec<Told>,
}

impl Counts {
    /// Nothing counted.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn new() -> Result<Self> {
        let sums = Tensor::f_zeros([1, FEATURES], (Kind::Int, tch::Device::Cpu))?;
        let known = Known { way: WAY, ..Known::default() };
        let (facts, passages) = (Facts::default(), Passages::default());
        Ok(Self { products: Products::default(), sums, known, facts, passages })
    }

    /// Whether an answer of this text is known.
    pub fn knows(&self, text: &str) -> bool {
        self.known.answers.iter().any(|answer| answer.text == text)
    }

    /// Answers that are known.
    pub fn answers(&self) -> usize {
        self.known.answers.len()
    }

    /// Prompts that have an answer of this text.
    pub fn prompts_of(&self, text: &str) -> u64 {
        let place = self.known.answers.iter().position(|answer| answer.text == text);
        place.map_or(0, |place| self.known.prompts_of[place])
    }

    /// Prompts that were counted.
    pub fn prompts(&self) -> u64 {
        self.known.prompts
    }

    /// Whether a document was counted, as far as is known.
    pub fn has(&self, document: u64) -> bool {
        self.known.since.is_some_and(|since| since <= document)
    }

    /// Notes that all documents are counted from this one on, unless that is known of an earlier one.
    pub fn begin_with(&mut self, document: u64) {
        self.known.since.get_or_insert(document);
    }

    /// Adds what others counted, of the same base. False where the sums would no longer fit or answers are more than
    /// [`ANSWERS_MAX`], and nothing is added.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn join(&mut self, other: &Self) -> Result<bool> {
        let new = other.known.answers.iter().filter(|answer| !self.knows(&answer.text)).count();
        if self.answers() + new > ANSWERS_MAX || !self.products.join(&other.products) {
            return Ok(false);
        }
        // Each was tried among its own answers, and one that finds too few of these is not made better by more to choose from.
        let trial = match (self.answers(), other.answers()) {
            (0, _) => other.known.trial,
            (_, 0) => self.known.trial,
            _ if self.is_trusted() && other.is_trusted() => self.known.trial.with(other.known.trial),
            _ => Mean::default(),
        };
        let mut row_of = vec![0_i64];
        for (answer, prompts) in other.known.answers.iter().zip(&other.known.prompts_of) {
            let known = &mut self.known.answers;
            let place = known.iter().position(|known| known.text == answer.text).unwrap_or(known.len());
            match known.get_mut(place) {
                Some(known) => known.take_in(answer),
                None => known.push(answer.clone()),
            }
            self.known.prompts_of.resize(known.len(), 0);
            self.known.prompts_of[place] += prompts;
            row_of.push(1 + place as i64);
        }
        self.sums = self.grown()?.f_index_add(0, &Tensor::from_slice(&row_of), &other.sums)?;
        let (known, of) = (&mut self.known, &other.known);
        known.prompts += of.prompts;
        known.trial = trial;
        // Documents of others are counted here and there.
        known.since = None;
        known.kinship = known.kinship.with(of.kinship);
        self.facts.join(&other.facts);
        self.passages.join(&other.passages);
        Ok(true)
    }

    /// The same prompts, as if none of their answers repeated: those that have no say would take it from others that they are joined
    /// with.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn without_answers(mut self) -> Result<Self> {
        self.sums = self.sums.f_sum_dim_intlist(&[0_i64][..], true, Kind::Int)?;
        let Known { prompts, kinship, since, way, .. } = self.known;
        self.known = Known { prompts, kinship, since, way, ..Known::default() };
        Ok(self)
    }

    /// The sums with a row for every answer that is known.
    fn grown(&self) -> Result<Tensor> {
        let more = 1 + self.known.answers.len() as i64 - self.sums.size()[0];
        let new = Tensor::f_zeros([more, FEATURES], (Kind::Int, tch::Device::Cpu))?;
        Ok(Tensor::f_cat(&[&self.sums, &new], 0)?)
    }

    /// Counts prompts, which `rows` describe. False where the sums would no longer fit, and nothing is counted; that is after some
    /// millions.
    ///
    /// # Errors
    /// When rows and lessons differ in number.
    pub fn add(&mut self, rows: &Rows, lessons: &[Lesson<'_>]) -> Result<bool> {
        ensure!(
            rows.size() == [lessons.len() as i64, FEATURES],
            "prompts and what describes them differ in number"
        );
        if !self.products.add(rows)? {
            return Ok(false);
        }
        let row_of = self.places(lessons);
        self.sums =
            self.grown()?.f_index_add(0, &Tensor::from_slice(&row_of), &rows.f_to_kind(Kind::Int)?)?;
        self.known.prompts += lessons.len() as u64;
        Ok(true)
    }

    /// Notes each lesson's answer, and says in which row of the sums its prompt counts.
    fn places(&mut self, lessons: &[Lesson<'_>]) -> Vec<i64> {
        let mut places: BTreeMap<String, usize> =
            self.known.answers.iter().enumerate().map(|(n, answer)| (answer.text.clone(), n)).collect();
        let mut row_of = Vec::with_capacity(lessons.len());
        for Lesson { prompt, answer } in lessons {
            let Some((tokens, text)) = answer else {
                row_of.push(0);
                continue;
            };
            let known = &mut self.known.answers;
            let place = *places.entry(text.clone()).or_insert_with(|| {
                known.push(Answer { text: text.clone(), forms: Vec::new() });
                self.known.prompts_of.push(0);
                known.len() - 1
            });
            known[place].note(tokens, prompt.last().copied());
            self.known.prompts_of[place] += 1;
            row_of.push(1 + place as i64);
        }
        row_of
    }

    /// Gives prompts, which `rows` describe, the answers that they have: they were counted as having none that repeats.
    ///
    /// # Errors
    /// When rows and lessons differ in number.
    pub fn correct(&mut self, rows: &Rows, lessons: &[Lesson<'_>]) -> Result<()> {
        let row_of = self.places(lessons);
        let rows = rows.f_to_kind(Kind::Int)?;
        let sums = self.grown()?.f_index_add(0, &Tensor::from_slice(&row_of), &rows)?;
        let _ = sums.f_narrow(0, 0, 1)?.f_sub_(&rows.f_sum_dim_intlist(&[0_i64][..], true, Kind::Int)?)?;
        self.sums = sums;
        Ok(())
    }

    /// Solves the regression of one number an answer, 1 for prompts that have it and 0 for others, the anchors too, and of one that is
    /// 1 for anchors: `W = (P + A + r I)^-1 S`, with `A` the products of anchors and `r` a hundredth of the mean of the diagonal of `P`.
    ///
    /// `trial` are some prompts that were counted, and what describes them, by which it is tried as if each had not been: a regression without prompt `x`
    /// gives it `(W^T x - h y) / (1 - h)`, with `h = x^T (P + A + r I)^-1 x` (Allen's PRESS, 1974). Where too few are found the head is
    /// not to be trusted: answers repeat there and have nothing to do with what prompts look like, as numbers in facts.
    ///
    /// Where no prompt was counted, but texts are remembered, that is all it knows.
    ///
    /// # Errors
    /// When there is neither.
    pub fn solve(&mut self, trial: Option<(&Rows, &[Lesson<'_>])>, anchors: &Anchors) -> Result<Head> {
        if self.known.prompts == 0 && !self.passages.is_empty() {
            let nothing = Tensor::f_zeros([1, FEATURES], (Kind::Float, tch::Device::Cpu))?;
            return Ok(Head::new(Vec::new(), nothing, false, None)?.and(self.passages.clone()));
        }
        let alike = vec![1.0; trial.map_or(0, |(_, lessons)| lessons.len())];
        let trial = trial.map(|(rows, lessons)| Trial { rows, lessons, alike: &alike });
        let solution = self.regress(trial, anchors)?;
        self.with_facts(solution)
    }

    /// What is solved before facts are.
    pub(super) fn regress(&mut self, trial: Option<Trial<'_>>, anchors: &Anchors) -> Result<Regression> {
        ensure!(self.known.prompts > 0, "no prompt was counted");
        let mut system = System::new()?;
        system.add(&self.products)?;
        let ridge = RIDGE * system.mean()?;
        if anchors.count > 0 {
            system.add(&anchors.products)?;
        }
        let factor = system.factor(ridge)?;
        let mut sums = self.sums.f_to_kind(Kind::Double)?;
        if anchors.count > 0 {
            sums = Tensor::f_cat(&[&sums, &anchors.sum.f_to_kind(Kind::Double)?], 0)?;
        }
        let weights = factor.solve(&sums)?;
        let tried = trial.map(|trial| Tried::new(trial, &factor, &weights));
        if let Some(tried) = tried.transpose()?.flatten() {
            self.known.trial.take(tried.answers(&self.known.answers)?);
            if anchors.count > 0 {
                self.known.kinship.take(tried.kinship()?);
            }
        }
        let Mean { of, sum } = self.known.kinship;
        let usual = (anchors.count > 0).then(|| (sum / of.max(1.0)).max(USUAL_MIN));
        let weights = weights.f_to_kind(Kind::Float)?.f_contiguous()?;
        let head = Head::new(self.known.answers.clone(), weights, self.is_trusted(), usual)?;
        Ok(Regression { head, factor })
    }

    /// What a regression says, of facts too.
    pub(super) fn with_facts(&self, Regression { head, factor }: Regression) -> Result<Head> {
        Ok(head.with(self.facts.solve(&factor)?).and(self.passages.clone()))
    }

    /// Facts that are remembered.
    pub fn facts(&self) -> usize {
        self.facts.len()
    }

    /// Remembers prompts, which `rows` describe, each with an answer of its own, as far as there is room: see [`super::FACTS_MAX`].
    ///
    /// # Errors
    /// When rows and answers differ in number.
    pub(super) fn remember(&mut self, rows: &Rows, answers: Vec<Told>) -> Result<()> {
        self.facts.put(rows, answers)
    }

    /// Whether enough answers that repeat were found to prompts that were not counted.
    pub fn is_trusted(&self) -> bool {
        let given: u64 = self.known.prompts_of.iter().sum();
        let most = self.known.prompts_of.iter().copied().max().unwrap_or(0);
        self.known.trial.skill(most as f64 / given.max(1) as f64) >= SKILL_MIN
    }

    /// As safetensors: of the products, which are symmetric, one half.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let products = match self.known.prompts {
            0 => Tensor::f_zeros([0], (Kind::Int, tch::Device::Cpu))?,
            _ => self.products.tensor(),
        };
        let mut tensors = vec![
            ("products".to_owned(), products),
            ("sums".to_owned(), self.sums.shallow_clone()),
            ("facts".to_owned(), self.facts.rows()?),
        ];
        tensors.extend(self.passages.tensors()?);
        let known = Known { facts: self.facts.answers().to_vec(), ..self.known.clone() };
        weights::to_bytes(&tensors, METADATA, &serde_json::to_string(&known)?)
    }

    /// Reads back what [`Counts::to_bytes`] wrote.
    ///
    /// # Errors
    /// When it is something else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let Parts { products, sums, facts, passages, mut known } = Parts::read(bytes)?;
        let Some(products) = products else { return Ok(Self { passages, ..Self::new()? }) };
        let facts = match facts {
            Some(rows) => Facts::new(&rows, std::mem::take(&mut known.facts))?,
            None => Facts::default(),
        };
        Ok(Self { products, sums, known, facts, passages })
    }
}

/// What [`Counts::to_bytes`] wrote, as it stands there.
struct Parts {
    /// None where nothing was counted.
    products: Option<Products>,
    /// i32 [1 + answers, FEATURES].
    sums: Tensor,
    /// u8 [facts, features]; none where an earlier version wrote it.
    facts: Option<Tensor>,
    passages: Passages,
    known: Known,
}

impl Parts {
    fn read(bytes: &[u8]) -> Result<Self> {
        let (mut tensors, known) = weights::from_bytes(bytes, METADATA)?;
        let mut known: Known = serde_json::from_str(&known).context("what was counted is not readable")?;
        let facts = tensors.remove("facts");
        let passages = Passages::from_tensors(|name| tensors.remove(name))?;
        let mut take = |name: &str| {
            let tensor =
                tensors.remove(name).with_context(|| format!("{name} of what was counted are missing"))?;
            ensure!(tensor.f_kind()? == Kind::Int, "{name} of what was counted are not i32");
            Ok(tensor)
        };
        let (half, sums) = (take("products")?, take("sums")?);
        ensure!(
            sums.dim() == 2 && sums.size()[0] == 1 + known.answers.len() as i64,
            "the parts of what was counted do not belong together"
        );
        let features = sums.size()[1];
        let sums = widened(sums)?;
        ensure!(
            sums.size()[1] == FEATURES && known.way <= WAY,
            "what was counted describes prompts in another way"
        );
        as_now(&sums, known.way)?;
        let mut products = (known.prompts > 0).then(|| Products::read(&half, features)).transpose()?;
        if known.way < WAY {
            let of_last = PARTS * PART;
            products
                .iter_mut()
                .for_each(|products| products.blank((of_last - PART) as usize, of_last as usize));
        }
        known.way = WAY;
        Ok(Self { products, sums, facts, passages, known })
    }
}

/// Adds the products of what [`Counts::to_bytes`] wrote to a system, and gives its sums, i32 [1 + answers, FEATURES].
pub(super) fn add_to(system: &mut System, bytes: &[u8]) -> Result<Tensor> {
    let Parts { products, sums, .. } = Parts::read(bytes)?;
    products.iter().try_for_each(|products| system.add(products))?;
    Ok(sums)
}

impl Answer {
    /// Notes the forms of another one of the same text.
    pub(super) fn take_in(&mut self, other: &Self) {
        other.forms.iter().for_each(|form| self.note(&form.tokens, form.after));
    }

    /// Notes as what tokens it followed a prompt that ended with `last`.
    fn note(&mut self, tokens: &[u32], last: Option<u32>) {
        match self.forms.iter_mut().find(|form| form.tokens == tokens) {
            None => self.forms.push(Form { tokens: tokens.to_vec(), after: last }),
            Some(form) if form.after != last => form.after = None,
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests;
