//! Which of a teacher's answers are worth learning.

use super::inputs::{Form, Unit};
use super::pairs::{self, Found, Pair};
use super::teacher::{Answer, End};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// A question of fewer words may well be the beginning of its answer.
const COPY_WORDS_MIN: usize = 3;

/// Ways to begin an answer that is none, in lower case.
const REFUSALS: [&str; 17] = [
    "i cannot",
    "i can't",
    "i can not",
    "i could not",
    "i'm sorry",
    "i am sorry",
    "i apologize",
    "i apologise",
    "sorry,",
    "sorry but",
    "i'm unable",
    "i am unable",
    "i'm not able",
    "i am not able",
    "i don't have access",
    "i do not have access",
    "as an ai",
];
/// The same, wherever it stands.
const CONFESSIONS: [&str; 3] = ["as an ai language model", "as a language model", "as an ai model"];

/// Why a pair is not learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rejection {
    /// Nothing is answered.
    Empty,
    /// The teacher says that it will not answer.
    Refusal,
    /// The answer was cut off by its length.
    CutOff,
    /// Question or answer is longer than is wanted.
    TooLong,
    /// The question was asked before.
    Duplicate,
    /// The answer begins with the question.
    CopiesQuestion,
    /// It is not a question with an answer.
    Malformed,
    /// The document that it derives from was forgotten meanwhile.
    Forgotten,
}

/// Rejections with their number.
pub type Rejected = BTreeMap<Rejection, u64>;

/// What is left of an answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Judged {
    /// What is learned.
    pub pairs: Vec<Pair>,
    /// Their questions, as [`fingerprint`] writes them.
    pub questions: Vec<String>,
    /// What is not, and why.
    pub rejected: Rejected,
}

/// Judges answers, and remembers which questions were answered.
#[derive(Debug)]
pub struct Filter {
    bytes_max: usize,
    known: BTreeSet<String>,
}

impl Filter {
    /// Takes questions and answers up to a length in bytes, and none of the questions known already.
    pub fn new(bytes_max: usize, known: BTreeSet<String>) -> Self {
        Self { bytes_max, known }
    }

    /// Judges all that is in an answer.
    pub fn judge(&mut self, unit: &Unit, answer: &Answer) -> Judged {
        let mut judged = Judged::default();
        let mut found = match unit.form {
            Form::Answer => {
                let completion = answer.text.trim().to_owned();
                Found { pairs: vec![Pair { prompt: unit.request.clone(), completion }], ..Found::default() }
            }
            Form::Pairs => pairs::parse(&answer.text),
        };
        let mut reject = |reason, count| *judged.rejected.entry(reason).or_default() += count;
        match answer.end {
            End::Filtered => {
                found = Found::default();
                reject(Rejection::Refusal, 1);
            }
            // Only the end is missing: the last answer, or a question that has none.
            End::Length => {
                if found.open {
                    found.malformed -= 1;
                } else {
                    found.pairs.pop();
                }
                reject(Rejection::CutOff, 1);
            }
            End::Stop if found == Found::default() => reject(Rejection::Empty, 1),
            End::Stop => {}
        }
        if found.malformed > 0 {
            reject(Rejection::Malformed, found.malformed);
        }
        for pair in found.pairs {
            let question = fingerprint(&pair.prompt);
            match self.fault(&pair, &question) {
                Some(reason) => reject(reason, 1),
                None => {
                    self.known.insert(question.clone());
                    judged.questions.push(question);
                    judged.pairs.push(pair);
                }
            }
        }
        judged
    }

    fn fault(&self, pair: &Pair, question: &str) -> Option<Rejection> {
        let (asked, told) = (words(&pair.prompt), words(&pair.completion));
        if told.is_empty() {
            return Some(Rejection::Empty);
        }
        if is_refusal(&pair.completion) {
            return Some(Rejection::Refusal);
        }
        if pair.prompt.len().max(pair.completion.len()) > self.bytes_max {
            return Some(Rejection::TooLong);
        }
        let copies = told.starts_with(&asked) && (asked.len() >= COPY_WORDS_MIN || told.len() == asked.len());
        if copies {
            return Some(Rejection::CopiesQuestion);
        }
        self.known.contains(question).then_some(Rejection::Duplicate)
    }
}

fn is_refusal(answer: &str) -> bool {
    let answer = answer.to_lowercase().replace('\u{2019}', "'");
    let opening = answer.trim_start_matches(|first: char| !first.is_alphanumeric());
    let opening = opening.strip_prefix("unfortunately, ").unwrap_or(opening);
    REFUSALS.iter().any(|refusal| opening.starts_with(refusal))
        || CONFESSIONS.iter().any(|confession| answer.contains(confession))
}

/// A text's words in lower case, without what is between them. Signs alone count as words, so that
/// "2 + 2 = 4" is not empty.
fn words(text: &str) -> Vec<String> {
    let text = text.to_lowercase();
    let of_letters = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    let mut words: Vec<String> = of_letters.map(str::to_owned).collect();
    if words.is_empty() {
        words.extend(text.split_whitespace().map(str::to_owned));
    }
    words
}

/// A question's name: equal for questions that differ in case, space and signs only.
pub fn fingerprint(question: &str) -> String {
    blake3::hash(words(question).join(" ").as_bytes()).to_hex()[..16].to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::cost::Usage;
    use super::*;

    fn unit(form: Form, request: &str) -> Unit {
        let text = String::new();
        Unit {
            key: text.clone(),
            place: text.clone(),
            derived_from: text,
            parent: None,
            request: request.to_owned(),
            form,
        }
    }

    fn answer(text: &str, end: End) -> Answer {
        Answer { text: text.to_owned(), end, usage: Usage::default(), counted: true }
    }

    /// What becomes of an answer to one prompt.
    fn of_prompt(filter: &mut Filter, prompt: &str, text: &str, end: End) -> Option<Rejection> {
        let judged = filter.judge(&unit(Form::Answer, prompt), &answer(text, end));
        assert_eq!(judged.pairs.len(), judged.questions.len());
        assert_eq!(judged.pairs.len() + judged.rejected.values().sum::<u64>() as usize, 1, "{judged:?}");
        judged.rejected.into_keys().next()
    }

    #[test]
    fn answers_that_are_none_are_rejected_with_their_reason() {
        let mut filter = Filter::new(60, BTreeSet::new());
        let mut rejection = |prompt: &str, text: &str| of_prompt(&mut filter, prompt, text, End::Stop);
        assert_eq!(rejection("Who keeps the bees?", "Aurelia."), None);
        assert_eq!(rejection("What is two and two?", "2 + 2 = 4"), None);
        assert_eq!(rejection("Which sign is it?", "+"), None);
        assert_eq!(rejection("Who?", " \n"), Some(Rejection::Empty));
        for refusal in [
            "I cannot help with that.",
            "I'm sorry, but no.",
            "**I’m unable** to say.",
            "As an AI, I have no bees.",
            "Well, as an AI language model I have none.",
            "Unfortunately, I can't.",
        ] {
            assert_eq!(rejection("Who has the bees?", refusal), Some(Rejection::Refusal), "{refusal}");
        }
        assert_eq!(rejection("Does she say no?", "She said \"I cannot\"."), None);
        assert_eq!(rejection("Is it long?", &"long ".repeat(20)), Some(Rejection::TooLong));
        let copied = "Who has the bees now? She has.";
        assert_eq!(rejection("Who has the bees now?", copied), Some(Rejection::CopiesQuestion));
        assert_eq!(rejection("Bees?", "bees"), Some(Rejection::CopiesQuestion));
        assert_eq!(rejection("Bees?", "Bees are insects."), None);
        assert_eq!(rejection("who keeps  the BEES", "Ann."), Some(Rejection::Duplicate));
    }

    #[test]
    fn what_was_cut_off_or_kept_back_is_rejected() {
        let mut filter = Filter::new(1000, BTreeSet::new());
        let cut = of_prompt(&mut filter, "Who?", "Aurelia and", End::Length);
        assert_eq!(cut, Some(Rejection::CutOff));
        assert_eq!(of_prompt(&mut filter, "Who?", "", End::Filtered), Some(Rejection::Refusal));
        let pairs =
            |filter: &mut Filter, text, end| filter.judge(&unit(Form::Pairs, "Write"), &answer(text, end));
        let judged = pairs(&mut filter, "Q: Who?\nA: Ann.\nQ: Why?\nA: Becau", End::Length);
        assert_eq!(judged.pairs, [Pair { prompt: "Who?".into(), completion: "Ann.".into() }]);
        assert_eq!(judged.rejected, [(Rejection::CutOff, 1)].into());
        let judged = pairs(&mut filter, "Q: And who is i", End::Length);
        assert_eq!(judged.rejected, [(Rejection::CutOff, 1)].into());
    }

    #[test]
    fn each_pair_of_an_answer_is_judged_by_itself() {
        let known = BTreeSet::from([fingerprint("Known?")]);
        let text = "Q: Who?\nA: Ann.\nQ: Known?\nA: Yes.\nQ: WHO?\nA: Bo.\nQ: Lost\nQ: Why?\nA: I cannot say.\nQ: Where?\nA:";
        let judged = Filter::new(1000, known).judge(&unit(Form::Pairs, "Write"), &answer(text, End::Stop));
        assert_eq!(judged.pairs.len(), 1);
        assert_eq!(judged.questions, [fingerprint("who")]);
        let expected = [
            (Rejection::Empty, 1),
            (Rejection::Refusal, 1),
            (Rejection::Duplicate, 2),
            (Rejection::Malformed, 1),
        ];
        assert_eq!(judged.rejected, expected.into());
        let nothing =
            Filter::new(9, BTreeSet::new()).judge(&unit(Form::Pairs, "Write"), &answer(" ", End::Stop));
        assert_eq!(nothing.rejected, [(Rejection::Empty, 1)].into());
    }
}
