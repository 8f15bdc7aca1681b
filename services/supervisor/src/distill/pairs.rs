//! Questions with answers, as teachers write them.

use regex::Regex;
use serde::{Deserialize, Serialize};
use std::sync::LazyLock;

/// What is learned: a prompt with its completion.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// What is asked.
    pub prompt: String,
    /// What is answered.
    pub completion: String,
}

/// What was found in an answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// In order.
    pub pairs: Vec<Pair>,
    /// Questions without an answer, and an answer in which there is no pair at all.
    pub malformed: u64,
    /// The last of these is what the answer ends with.
    pub open: bool,
}

/// How a teacher is asked to write pairs.
pub const FORM: &str = "Q: the question\nA: the answer";

/// `Q:`, also as `**Q1:**`, `2. Question:` or `### Answer 3:`, and the text after it.
static MARK: LazyLock<Regex> = LazyLock::new(|| {
    let mark = r"(?i)^[\s#>*_-]*(?:\d+[.)]\s*)?[*_]*(q|question|a|answer)\s*\d*\s*[*_]*\s*:[*_]*\s*(.*)$";
    Regex::new(mark).expect("the expression is tested")
});
/// A line that only separates.
static RULE: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"^\s*(?:[-*_=]\s*){3,}$").expect("the expression is tested"));

/// Where in a pair one is.
enum Place {
    Before,
    Question(String),
    Answer(String, String),
}

/// The pairs in an answer. What is said before the first is passed over; an answer may have many
/// lines.
pub fn parse(text: &str) -> Found {
    let mut found = Found::default();
    let mut place = Place::Before;
    for line in text.lines().filter(|line| !RULE.is_match(line)) {
        let mark = MARK.captures(line).map(|parts| {
            let is_question = parts[1].to_ascii_lowercase().starts_with('q');
            (is_question, parts.get(2).map_or("", |rest| rest.as_str()))
        });
        place = match (place, mark) {
            (old, Some((true, rest))) => {
                found.end(old);
                Place::Question(rest.to_owned())
            }
            (Place::Question(question), Some((false, rest))) => Place::Answer(question, rest.to_owned()),
            (Place::Question(question), None) => Place::Question(question + "\n" + line),
            // Within an answer "A:" is nothing special: it may be a line of code.
            (Place::Answer(question, answer), _) => Place::Answer(question, answer + "\n" + line),
            (Place::Before, _) => Place::Before,
        };
    }
    let nowhere = matches!(place, Place::Before) && !text.trim().is_empty();
    found.open = nowhere || matches!(place, Place::Question(_));
    found.end(place);
    found.malformed += u64::from(nowhere);
    found
}

impl Found {
    fn end(&mut self, place: Place) {
        match place {
            Place::Before => {}
            Place::Question(_) => self.malformed += 1,
            Place::Answer(question, answer) => {
                let prompt = clean(&question);
                if prompt.is_empty() {
                    self.malformed += 1;
                } else {
                    self.pairs.push(Pair { prompt, completion: clean(&answer) });
                }
            }
        }
    }
}

/// Without the stars that close what a bold mark opened, and without space around it.
fn clean(text: &str) -> String {
    let text = text.trim();
    let text = if text.matches("**").count() % 2 == 1 { text.trim_end_matches('*') } else { text };
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (Vec<(String, String)>, u64) {
        let found = parse(text);
        let pairs = found.pairs.into_iter().map(|pair| (pair.prompt, pair.completion)).collect();
        (pairs, found.malformed)
    }

    fn pair(prompt: &str, completion: &str) -> (String, String) {
        (prompt.to_owned(), completion.to_owned())
    }

    #[test]
    fn pairs_are_found_however_they_are_dressed() {
        let two = (vec![pair("Who?", "Ann."), pair("Why?", "So.")], 0);
        for text in [
            "Q: Who?\nA: Ann.\n\nQ: Why?\nA: So.",
            "Here are two:\n\nq: Who?\na: Ann.\nq: Why?\na: So.\n",
            "1. **Q: Who?**\n   **A:** Ann.\n\n2. **Q: Why?**\n   **A:** So.",
            "### Question 1: Who?\n### Answer 1: Ann.\n---\n### Question 2: Why?\n### Answer 2: So.",
            "Q1:\nWho?\nA1:\nAnn.\n\n* * *\nQ2:\nWhy?\nA2:\nSo.",
            "Q: Who?\r\nA: Ann.\r\nQ: Why?\r\nA: So.\r\n",
        ] {
            assert_eq!(parsed(text), two, "{text}");
        }
    }

    #[test]
    fn an_answer_may_have_lines_and_marks_of_its_own() {
        let (pairs, malformed) =
            parsed("Q: How?\nA: So:\n\n- one\n- two\na: int = 3\n**b**\nQ: Else?\nA: No.");
        assert_eq!(pairs[0], pair("How?", "So:\n\n- one\n- two\na: int = 3\n**b**"));
        assert_eq!((pairs.len(), malformed), (2, 0));
    }

    #[test]
    fn what_is_no_pair_is_counted() {
        assert_eq!(parsed("Q: Who?\nQ: Why?\nA: So."), (vec![pair("Why?", "So.")], 1));
        assert_eq!(parsed("Q: Who?\nA: Ann.\nQ: Wh"), (vec![pair("Who?", "Ann.")], 1));
        assert_eq!(parsed("Q:\nA: Ann."), (Vec::new(), 1));
        assert_eq!(parsed("Q: Who?\nA:"), (vec![pair("Who?", "")], 0));
        assert_eq!(parsed("I would rather not."), (Vec::new(), 1));
        assert_eq!(parsed("A: Ann."), (Vec::new(), 1));
        assert_eq!(parsed(" \n"), (Vec::new(), 0));
    }
}
