//! Answers that follow a JSON Schema: of the next tokens, those that would leave it are ruled out.
//!
//! What may follow is `llguidance`'s to say. It goes by the bytes that each token stands for, so that a token may end
//! in the middle of a character, or hold the end of one part of a text and the beginning of the next.

use std::collections::HashSet;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, bail, ensure};
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, panic_utils};
use serde_json::{Value, json};

use crate::tokenizer::Tokenizer;

/// White space between two parts: a space, or a line break with what indents the next line. Were there no end to it, a
/// small model could go on with spaces for ever.
const SPACE: &str = r"\x20|\r?\n[\x20\x09]{0,16}";

/// Where `llguidance` looks for its own settings in a schema.
const SETTINGS: &str = "x-guidance";

/// Bytes of a token at most; longer ones, which the trie may not hold, are not chosen.
const TOKEN_BYTES_MAX: usize = 512;

/// States of the automaton that reads the words of an answer, each of 1 to 2 kB.
const STATES_MAX: usize = 20_000;

/// Makes grammars of schemas, for the tokens of one model.
pub struct Grammars {
    tokenizer: Tokenizer,
    vocabulary: usize,
    end_ids: Vec<u32>,
    /// Made when the first grammar is. Held while one is compiled, so that compiling takes one core at most.
    factory: Mutex<Option<ParserFactory>>,
}

impl Grammars {
    /// For a model with this tokenizer and so many logits, whose answers end with one of `end_ids`.
    pub fn new(tokenizer: &Tokenizer, vocabulary: usize, end_ids: Vec<u32>) -> Self {
        Self { tokenizer: tokenizer.clone(), vocabulary, end_ids, factory: Mutex::new(None) }
    }

    /// Compiles a JSON Schema. This takes milliseconds, or a hundred and more for a large one.
    ///
    /// # Errors
    /// When it is none, cannot be fulfilled, or asks for what is not supported: says what.
    pub fn compile(&self, schema: &str) -> Result<Grammar> {
        let mut schema: Value = serde_json::from_str(schema)?;
        let fields = schema.as_object_mut().context("a schema is an object")?;
        ensure!(!fields.contains_key(SETTINGS), "'{SETTINGS}' is not supported: leave it out");
        fields.insert(SETTINGS.to_owned(), json!({"whitespace_pattern": SPACE}));
        let mut factory = self.factory.lock().unwrap_or_else(PoisonError::into_inner);
        let factory = match &mut *factory {
            Some(factory) => factory,
            none => none.insert(panic_utils::catch_unwind(AssertUnwindSafe(|| self.factory()))?),
        };
        // What panics is refused as well, so that nobody waits for a grammar that never comes.
        let create = || factory.create_parser(TopLevelGrammar::from_json_schema(schema));
        let parser = panic_utils::catch_unwind(AssertUnwindSafe(create)).map_err(explained)?;
        let mut matcher = Matcher::new(Ok(parser));
        if let Some(warning) = matcher.grammar_warnings().first() {
            bail!("not supported: {warning}");
        }
        Ok(Grammar { matcher })
    }

    fn factory(&self) -> Result<ParserFactory> {
        let mut factory = ParserFactory::new_simple(&self.tokens())?;
        factory.quiet();
        factory.limits_mut().max_lexer_states = STATES_MAX;
        factory.limits_mut().verbose_errors = false;
        Ok(factory)
    }

    /// The bytes of each token; none for control tokens, which are no text.
    fn tokens(&self) -> TokEnv {
        let known = |id: &u32| (*id as usize) < self.vocabulary;
        let ends: Vec<u32> = self.end_ids.iter().copied().filter(known).collect();
        let controls = self.tokenizer.controls().iter().map(|control| control.id);
        let silent: HashSet<u32> = controls.chain(ends.iter().copied()).collect();
        let mut words = vec![Vec::new(); self.vocabulary];
        for (word, id) in words.iter_mut().zip(0..) {
            let bytes = self.tokenizer.bytes(id);
            if bytes.len() <= TOKEN_BYTES_MAX && !silent.contains(&id) {
                *word = bytes;
            }
        }
        let info = TokRxInfo::new(words.len() as u32, ends.first().copied().unwrap_or(INVALID_TOKEN));
        let trie = TokTrie::from(&info, &words);
        let trie = if ends.is_empty() { trie } else { trie.with_eos_tokens(&ends) };
        Arc::new(ApproximateTokEnv::new(trie))
    }
}

/// What an answer has to follow, and how far it has come. A clone goes its own way from there.
#[derive(Clone)]
pub struct Grammar {
    matcher: Matcher,
}

/// An answer that follows a grammar cannot go on.
#[derive(Debug, thiserror::Error)]
#[error("no token can go on with what follows this schema: simplify it ({0})")]
pub struct Stuck(String);

impl Grammar {
    /// Rules out all tokens that may not come next, by their logits, one for each token.
    ///
    /// # Errors
    /// [`Stuck`] when there is none that may, or to find out takes too much.
    pub fn narrow(&mut self, logits: &mut [f32]) -> Result<(), Stuck> {
        let allowed = self.matcher.compute_mask().map_err(|error| Stuck(one_line(&error)))?;
        for (logits, bits) in logits.chunks_mut(32).zip(allowed.as_slice()) {
            for (bit, logit) in logits.iter_mut().enumerate() {
                if bits >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        Ok(())
    }

    /// Takes the token that was chosen. True when nothing may come after it.
    ///
    /// # Errors
    /// [`Stuck`] when the token may not come next, or to find out takes too much.
    pub fn accept(&mut self, id: u32) -> Result<bool, Stuck> {
        self.matcher.consume_token(id).map_err(|error| Stuck(one_line(&error)))?;
        Ok(self.matcher.is_stopped())
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Grammar")
    }
}

/// What is wrong with a schema, in words that do not speak of settings nobody here can change.
fn explained(error: anyhow::Error) -> anyhow::Error {
    let message = one_line(&error);
    if message.contains("coerce_one_of") {
        return anyhow!(
            "oneOf is not supported where two of its schemas could fit the same value: use anyOf"
        );
    }
    anyhow!("{message}")
}

fn one_line(error: &anyhow::Error) -> String {
    let message = error.to_string();
    // States and stack traces follow on lines of their own.
    let told = message.split("\n<").next().unwrap_or_default();
    told.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests;
