//! What tokens look like in a text.

use anyhow::Result;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::tokenizer::Tokenizer;

/// What follows the sign that ends a sentence.
const CLOSING: [char; 11] = ['"', '”', '’', '\'', ')', ']', '»', '*', '_', '`', '“'];

/// A token as it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spelled {
    /// The same for tokens that differ in case and in space around them; 0 for space alone.
    pub key: u32,
    ends: Ends,
    /// It begins with space.
    pub opens: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ends {
    Nothing,
    /// A sentence, where space follows.
    Sentence,
    /// A sentence or line, whatever follows.
    Surely,
}

impl Spelled {
    fn new(text: &str) -> Self {
        let bare = text.trim_end().trim_end_matches(CLOSING);
        let ends = match bare.chars().next_back() {
            _ if text.contains('\n') => Ends::Surely,
            Some('。' | '！' | '？') => Ends::Surely,
            Some('.' | '!' | '?' | '…') => Ends::Sentence,
            _ => Ends::Nothing,
        };
        Self { key: key(text.trim()), ends, opens: text.starts_with(char::is_whitespace) }
    }

    /// Whether a sentence or line ends here, before this token or the end.
    pub fn ends_before(&self, next: Option<&Self>) -> bool {
        match self.ends {
            Ends::Surely => true,
            Ends::Sentence => next.is_none_or(|next| next.opens),
            Ends::Nothing => false,
        }
    }
}

/// What tokens are told by.
pub(super) fn keys(spelled: &[Spelled]) -> Vec<u32> {
    spelled.iter().map(|spelled| spelled.key).collect()
}

fn key(word: &str) -> u32 {
    if word.is_empty() {
        return 0;
    }
    let mut hasher = DefaultHasher::new();
    word.to_lowercase().hash(&mut hasher);
    hasher.finish() as u32 | 1
}

/// Reads tokens, each kind once.
pub(super) struct Spelling<'t> {
    tokenizer: &'t Tokenizer,
    /// None for control tokens.
    known: HashMap<u32, Option<Spelled>>,
}

impl<'t> Spelling<'t> {
    pub fn new(tokenizer: &'t Tokenizer) -> Self {
        Self { tokenizer, known: HashMap::new() }
    }

    /// A token as it is read; none for one that has no text.
    pub fn of(&mut self, token: u32) -> Result<Option<Spelled>> {
        if let Some(known) = self.known.get(&token) {
            return Ok(*known);
        }
        // Part of a letter has a text to the tokenizer, and its own bytes to tell it by.
        let has_text = !self.tokenizer.decode(&[token])?.is_empty();
        let spelled = match String::from_utf8(self.tokenizer.bytes(token)) {
            Ok(text) => Spelled::new(&text),
            Err(part) => Spelled { key: key(&format!("{:?}", part.as_bytes())), ..Spelled::new("part") },
        };
        let spelled = has_text.then_some(spelled);
        self.known.insert(token, spelled);
        Ok(spelled)
    }

    /// The tokens of a text that have one, and how each is read.
    pub fn of_text(&mut self, text: &[u32]) -> Result<(Vec<u32>, Vec<Spelled>)> {
        let mut read = (Vec::with_capacity(text.len()), Vec::with_capacity(text.len()));
        for &token in text {
            if let Some(spelled) = self.of(token)? {
                read.0.push(token);
                read.1.push(spelled);
            }
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_a_sentence() {
        let ends =
            |text: &str, next: Option<&str>| Spelled::new(text).ends_before(next.map(Spelled::new).as_ref());
        assert!(
            ends(".", Some(" The")) && ends("?\"", Some(" He")) && ends("!", None) && ends(".)", Some("\n"))
        );
        assert!(ends(" end\n", Some("next")) && ends("。", Some("我")));
        assert!(
            !ends(".", Some("5")) && !ends(" word", Some(" word")) && !ends(",", None) && !ends("", None)
        );
    }

    #[test]
    fn case_and_space_around_a_word_make_no_other_word() {
        let key = |text: &str| Spelled::new(text).key;
        assert_eq!((key(" Mars"), key("MARS\n")), (key("mars"), key("mars")));
        assert_ne!(key("mars"), key("venus"));
        assert_eq!((key(" "), key("\n\t")), (0, 0));
    }
}
