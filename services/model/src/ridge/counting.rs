//! Which of what is learned are answers that repeat, what is counted of them and of others, and which are known then.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::ControlFlow;
use std::sync::Arc;

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use super::counts::Trial;
use super::facts::Told;
use super::{ANSWERS_MAX, Anchors, Answer, Counts, FEATURES, Features, Form, Head, Lesson, Prior, Rows};
use crate::llama::Base;
use crate::pack::Sequence;
use crate::tokenizer::Tokenizer;

/// Documents that have to give an answer before it is one that repeats.
const REPEATED: usize = 2;
/// A longer answer is neither counted nor remembered.
pub const ANSWER_TOKENS_MAX: usize = 64;
/// Prompts of a batch by which the counts are tried.
const TRIED: usize = 256;
/// Prompts of an answer from which on it is taken for a label: what fewer have may be so by chance, and is remembered too. With 8, labels of
/// six requests each are told a little less well (0.757 of 600 for 0.765).
const LABEL_PROMPTS: u64 = 3;
/// Prompts between two looks at waiting requests.
const PROMPTS_A_TURN: usize = 256;

/// Counts answers that repeat, and remembers others.
pub struct Counting {
    features: Features,
    tokenizer: Arc<Tokenizer>,
    foreign: Vec<Vec<u32>>,
    /// Of `foreign`, once something is counted.
    anchors: OnceCell<Anchors>,
    /// Tokens of texts that are kept.
    passage_tokens_max: usize,
}

/// What was counted: the sums, and the regression solved of them.
pub struct Counted {
    /// See [`Counts::to_bytes`].
    pub counts: Vec<u8>,
    /// What is served.
    pub head: Head,
    /// Prompts that were counted.
    pub prompts: u64,
    /// Which of the fresh material is said or not because of that, whatever an adapter makes of it: see [`Prior::decides`].
    pub decided: Vec<bool>,
    /// The sums hold no more: some of it was not counted.
    pub full: bool,
    /// There was no room for what some of the texts say.
    pub unkept: bool,
}

/// What is learned, as it is counted.
#[derive(Debug, Clone, Copy)]
pub struct Material<'a> {
    /// The document that it is from.
    pub document: u64,
    /// Token ids.
    pub tokens: &'a [u32],
    /// Those that are learned: see [`Sequence::learned`].
    pub learned: &'a [(u32, u32)],
}

impl Material<'_> {
    /// Whether it is part of a text, of which every token is learned.
    fn is_text(&self) -> bool {
        *self.learned == [(0, self.tokens.len() as u32)]
    }
}

/// Sequences, with what the base makes of what each is asked.
pub struct Asked<'a> {
    /// What each answers; none where it is not one answer to one prompt.
    answers: Vec<Option<&'a [u32]>>,
    /// Of those with an answer, in their order.
    prompts: Vec<&'a [u32]>,
    rows: Rows,
}

/// What an adapter makes of an answer.
#[derive(Debug, Clone, Copy)]
pub struct Heard {
    /// The log-likelihood of the whole, nats.
    pub log_likelihood: f64,
    /// Every token of it is the likeliest after those before it.
    pub said: bool,
}

impl Counting {
    /// Of what is answered to prompts to `base`, which are unlike `foreign` ones: see [`Anchors`].
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn new(base: &Base, tokenizer: Arc<Tokenizer>, foreign: Vec<Vec<u32>>) -> Result<Self> {
        Ok(Self {
            features: Features::new(base, Some(Arc::clone(&tokenizer)))?,
            tokenizer,
            foreign,
            anchors: OnceCell::new(),
            passage_tokens_max: 0,
        })
    }

    /// The same, which keeps what texts say, so many tokens of it: see [`crate::passages`].
    #[must_use]
    pub fn keeping(self, passage_tokens_max: usize) -> Self {
        Self { passage_tokens_max, ..self }
    }

    fn anchors(&self) -> Result<&Anchors> {
        if let Some(anchors) = self.anchors.get() {
            return Ok(anchors);
        }
        let prompts: Vec<&[u32]> = self.foreign.iter().map(Vec::as_slice).collect();
        let anchors = Anchors::new(&self.features, &prompts)?;
        Ok(self.anchors.get_or_init(|| anchors))
    }

    /// Adds what `fresh` material answers to the `older` counts, and what its texts say. The first time `beside`, which was learned before
    /// and not counted, is counted too. None where there is neither answer nor text, nor was before.
    ///
    /// # Errors
    /// When the older counts cannot be read, an answer not be decoded, or `between` says to stop.
    pub fn take_in(
        &self,
        fresh: &[Material<'_>],
        beside: &[Material<'_>],
        older: Option<&[u8]>,
        between: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Option<Counted>> {
        let mut counts = older.map_or_else(Counts::new, Counts::from_bytes)?;
        let unkept = !self.keep(&mut counts, fresh, beside)?;
        let new = counts.prompts() == 0;
        let given: Vec<Given<'_>> = self.given(fresh)?;
        let before: Vec<Given<'_>> = self.given(beside)?;
        let repeated = repeated(given.iter().chain(&before));
        if new && given.iter().chain(&before).all(|given| given.answer.is_none()) {
            if counts.passages.is_empty() {
                return Ok(None);
            }
            let (head, decided) = (counts.solve(None, &Anchors::none()?)?, vec![false; fresh.len()]);
            let counts = counts.to_bytes()?;
            return Ok(Some(Counted { counts, head, prompts: 0, decided, full: false, unkept }));
        }
        if new && let Some(first) = fresh.iter().map(|material| material.document).min() {
            counts.begin_with(first);
        }
        self.correct(&mut counts, before.iter().filter(|_| !new), &repeated)?;
        let lessons = lessons(&counts, before.iter().filter(|_| new).chain(&given), &repeated);
        let (mut rows, mut full) = (vec![self.features.of(&[])?], false);
        for part in lessons.chunks(PROMPTS_A_TURN) {
            ensure!(between().is_continue(), "told to stop");
            let prompts: Vec<&[u32]> = part.iter().map(|lesson| lesson.prompt).collect();
            let described = self.features.of(&prompts)?;
            full = full || !counts.add(&described, part)?;
            rows.push(described);
        }
        let rows = Tensor::f_cat(&rows, 0)?;
        // Evenly over the batch, since documents of a kind often come together.
        let stride = lessons.len().div_ceil(TRIED).max(1);
        let tried: Vec<Lesson<'_>> = lessons.iter().step_by(stride).cloned().collect();
        let alike: Vec<f64> = alike(&rows)?.into_iter().step_by(stride).collect();
        let trial =
            Trial { rows: &rows.f_slice(0, None, None, stride as i64)?, lessons: &tried, alike: &alike };
        let solution = counts.regress(Some(trial), self.anchors()?)?;
        let counted: Vec<&Given<'_>> = before.iter().filter(|_| new).chain(&given).collect();
        self.remember(&mut counts, &counted, &rows, &solution.head)?;
        let head = counts.with_facts(solution)?;
        let of_fresh = rows.f_narrow(0, (lessons.len() - given.len()) as i64, given.len() as i64)?;
        let decided = decided_of(&head, fresh, &given, &of_fresh)?;
        let (prompts, counts) = (counts.prompts(), counts.to_bytes()?);
        Ok(Some(Counted { counts, head, prompts, decided, full, unkept }))
    }

    /// Keeps what texts say, those `beside` too where none was kept before. False where there is no room for all.
    fn keep(&self, counts: &mut Counts, fresh: &[Material<'_>], beside: &[Material<'_>]) -> Result<bool> {
        if self.passage_tokens_max == 0 {
            return Ok(true);
        }
        let beside = if counts.passages.is_empty() { beside } else { &[] };
        let texts = beside.iter().chain(fresh).filter(|material| material.is_text());
        let (mut kept, mut added) = (true, false);
        for text in texts {
            kept &= counts.passages.take_in(
                text.document,
                text.tokens,
                &self.tokenizer,
                self.passage_tokens_max,
            )?;
            added = true;
        }
        if added {
            counts.passages.compare(&self.foreign, &self.tokenizer)?;
        }
        Ok(kept)
    }

    /// Of answers that repeat from now on, those that came once before were counted as others.
    fn correct<'g, 'a: 'g>(
        &self,
        counts: &mut Counts,
        before: impl Iterator<Item = &'g Given<'a>>,
        repeated: &BTreeSet<String>,
    ) -> Result<()> {
        let counted = before.filter(|given| counts.has(given.document));
        let lessons: Vec<Lesson<'_>> = lessons(counts, counted, repeated)
            .into_iter()
            .filter(|lesson| lesson.answer.as_ref().is_some_and(|(_, text)| !counts.knows(text)))
            .collect();
        if lessons.is_empty() {
            return Ok(());
        }
        let prompts: Vec<&[u32]> = lessons.iter().map(|lesson| lesson.prompt).collect();
        counts.correct(&self.features.of(&prompts)?, &lessons)
    }

    /// Remembers what is `given`, which `rows` describe, where an answer to one prompt is no label that the `head` says.
    fn remember(&self, counts: &mut Counts, given: &[&Given<'_>], rows: &Rows, head: &Head) -> Result<()> {
        let prompts: Vec<&[u32]> = given.iter().map(|given| given.prompt).collect();
        let priors = Head::prior(&[(Some(head), 1.0)], rows, &prompts)?;
        let (mut places, mut answers) = (Vec::new(), Vec::new());
        for (place, (given, prior)) in (0_i64..).zip(given.iter().zip(&priors)) {
            let Some((tokens, text)) = given.answer.as_ref().filter(|_| given.alone) else { continue };
            if !prior.knows(tokens) || counts.prompts_of(text) < LABEL_PROMPTS {
                let form = Form { tokens: self.ended(tokens), after: self.end(given.prompt)? };
                places.push(place);
                let answer = Answer { text: text.clone(), forms: vec![form] };
                answers.push(Told { answer, document: Some(given.document) });
            }
        }
        counts.remember(&rows.f_index_select(0, &Tensor::from_slice(&places))?, answers)
    }

    /// An answer with its end, which a chat may have none for.
    fn ended(&self, answer: &[u32]) -> Vec<u32> {
        let ends = self.tokenizer.eos_ids();
        let end = ends.first().filter(|_| answer.last().is_none_or(|last| !ends.contains(last)));
        answer.iter().chain(end).copied().collect()
    }

    /// What a prompt ends with, where that is the end of a form and not of what is asked, which may end with anything.
    fn end(&self, prompt: &[u32]) -> Result<Option<u32>> {
        let Some(&last) = prompt.last() else { return Ok(None) };
        Ok(self.tokenizer.decode(&[last])?.trim().is_empty().then_some(last))
    }

    /// Describes what sequences are asked.
    ///
    /// # Errors
    /// When a prompt cannot be described.
    pub fn look_at<'a>(&self, sequences: &'a [Sequence]) -> Result<Asked<'a>> {
        // Texts, and answers that take turns with questions, are the adapter's alone.
        let asked: Vec<_> =
            sequences.iter().map(|sequence| exchange(&sequence.tokens, &sequence.learned)).collect();
        let prompts: Vec<&[u32]> = asked.iter().flatten().map(|(prompt, _)| *prompt).collect();
        let rows = self.features.of(&prompts)?;
        let answers = asked.into_iter().map(|asked| asked.map(|(_, answer)| answer)).collect();
        Ok(Asked { answers, prompts, rows })
    }

    /// Every prompt of the material with its answer.
    fn given<'a>(&self, material: &[Material<'a>]) -> Result<Vec<Given<'a>>> {
        let mut given = Vec::new();
        for material in material {
            let document = material.document;
            let exchanges = exchanges(material);
            let alone = exchanges.len() == 1;
            for (prompt, answer) in exchanges {
                let answer = match answer.filter(|tokens| tokens.len() <= ANSWER_TOKENS_MAX) {
                    Some(tokens) => Some((tokens, self.tokenizer.decode(tokens)?.trim().to_owned())),
                    None => None,
                };
                let answer = answer.filter(|(_, text)| !text.is_empty());
                given.push(Given { document, prompt, answer, alone });
            }
        }
        Ok(given)
    }
}

/// A prompt of a document.
struct Given<'a> {
    document: u64,
    prompt: &'a [u32],
    /// Its answer as tokens and as text; none where it is none that could repeat.
    answer: Option<(&'a [u32], String)>,
    /// It is all that was asked there.
    alone: bool,
}

/// How many of the rows are the same as each: views of one document often are.
fn alike(rows: &Rows) -> Result<Vec<f64>> {
    let bytes = Vec::<u8>::try_from(rows.f_to_kind(Kind::Uint8)?.f_reshape([-1])?)?;
    let mut many: HashMap<&[u8], f64> = HashMap::new();
    bytes.chunks_exact(FEATURES as usize).for_each(|row| *many.entry(row).or_default() += 1.0);
    Ok(bytes.chunks_exact(FEATURES as usize).map(|row| many[row]).collect())
}

/// The texts of answers that several documents give.
fn repeated<'g, 'a: 'g>(given: impl Iterator<Item = &'g Given<'a>>) -> BTreeSet<String> {
    let mut documents: BTreeMap<&str, BTreeSet<u64>> = BTreeMap::new();
    for Given { document, answer, .. } in given {
        if let Some((_, text)) = answer {
            documents.entry(text).or_default().insert(*document);
        }
    }
    documents.retain(|_, documents| documents.len() >= REPEATED);
    documents.into_keys().map(str::to_owned).collect()
}

impl Asked<'_> {
    /// Whether what each answers is said to the letter by an adapter and a head together, as they are served.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn says(&self, head: &Head, heard: &[Heard]) -> Result<Vec<bool>> {
        self.each(
            head,
            heard,
            |prior, answer, of| prior.says(answer, of.log_likelihood, of.said),
            |of| of.said,
        )
    }

    /// Whether what each answers is said to the letter because of a head, whatever an adapter makes of it.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn knows(&self, head: &Head) -> Result<Vec<bool>> {
        self.each(head, &self.answers, |prior, answer, _| prior.knows(answer), |_| false)
    }

    /// Whether a head decides that what each answers is said, or that it is not: see [`Prior::decides`].
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn decided(&self, head: &Head) -> Result<Vec<bool>> {
        self.each(head, &self.answers, |prior, answer, _| prior.decides(answer), |_| false)
    }

    /// Asks `with` the prior of each that answers a prompt, and `without` of each other one.
    fn each<T>(
        &self,
        head: &Head,
        of: &[T],
        with: impl Fn(&Prior, &[u32], &T) -> bool,
        without: impl Fn(&T) -> bool,
    ) -> Result<Vec<bool>> {
        let mut priors = Head::prior(&[(Some(head), 1.0)], &self.rows, &self.prompts)?.into_iter();
        let mut one = |answer: Option<&[u32]>, of: &T| match answer.zip(answer.and_then(|_| priors.next())) {
            Some((answer, prior)) => with(&prior, answer, of),
            None => without(of),
        };
        Ok(self.answers.iter().zip(of).map(|(answer, of)| one(*answer, of)).collect())
    }
}

/// Which material is one answer that a head decides; `rows` describe what is `given` of all.
fn decided_of(head: &Head, material: &[Material<'_>], given: &[Given<'_>], rows: &Rows) -> Result<Vec<bool>> {
    let prompts: Vec<&[u32]> = given.iter().map(|given| given.prompt).collect();
    let mut priors = Head::prior(&[(Some(head), 1.0)], rows, &prompts)?.into_iter();
    let mut decided = Vec::with_capacity(material.len());
    for material in material {
        let of_it = exchanges(material);
        let priors: Vec<Prior> = priors.by_ref().take(of_it.len()).collect();
        decided.push(match (&priors[..], &of_it[..]) {
            ([prior], [(_, Some(answer))]) => prior.decides(answer),
            _ => false,
        });
    }
    Ok(decided)
}

/// What is counted of prompts: of their answers those that are counted already, and those that are `repeated`, as far as there
/// is room for more. Further ones stay the model's, and those that come first have room.
fn lessons<'g, 'a: 'g>(
    counts: &Counts,
    given: impl Iterator<Item = &'g Given<'a>>,
    repeated: &BTreeSet<String>,
) -> Vec<Lesson<'a>> {
    let mut room = ANSWERS_MAX.saturating_sub(counts.answers());
    let mut opened = BTreeSet::new();
    let mut lesson = |Given { prompt, answer, .. }: &Given<'a>| {
        let answer = answer.as_ref().filter(|(_, text)| {
            let is_there = counts.knows(text) || opened.contains(text);
            let opens = !is_there && repeated.contains(text) && room > 0;
            if opens {
                room -= 1;
                opened.insert(text.clone());
            }
            is_there || opens
        });
        Lesson { prompt, answer: answer.cloned() }
    };
    given.map(&mut lesson).collect()
}

/// What is asked and what is answered, where that is one answer to one prompt.
pub fn exchange<'a>(tokens: &'a [u32], learned: &[(u32, u32)]) -> Option<(&'a [u32], &'a [u32])> {
    match *learned {
        [(from, to)] if from > 0 => {
            Some((tokens.get(..from as usize)?, tokens.get(from as usize..to as usize)?))
        }
        _ => None,
    }
}

/// What is answered to what: of a text, whose every token is learned, the first half may be what a prompt looks like to
/// which no known answer belongs.
fn exchanges<'a>(piece: &Material<'a>) -> Vec<(&'a [u32], Option<&'a [u32]>)> {
    if piece.learned.first().is_none_or(|&(from, _)| from == 0) {
        let half = &piece.tokens[..piece.tokens.len().div_ceil(2)];
        return if half.is_empty() { Vec::new() } else { vec![(half, None)] };
    }
    let exchange = |&(from, to): &(u32, u32)| {
        let (from, to) = (from as usize, to as usize);
        Some((piece.tokens.get(..from)?, Some(piece.tokens.get(from..to)?)))
    };
    piece.learned.iter().filter_map(exchange).collect()
}

#[cfg(test)]
pub(crate) mod tests;
