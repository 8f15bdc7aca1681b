//! What becomes of the logits of one answer: tokens, and the text that is certain with them.

use std::collections::VecDeque;

use anyhow::{Result, ensure};

use crate::hf::ModelConfig;
use crate::ridge::Source;
use crate::sampling::{Sampler, Sampling, TopLogprob};
use crate::stream::StreamDecoder;
use crate::tokenizer::Tokenizer;

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// By an end token, a stop text, or the end of the grammar.
    Stop,
    /// By `max_tokens` or the model's context limit.
    Length,
}

/// A token of the answer's text, and how likely it was.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// Its id.
    pub id: u32,
    /// Its log-probability, as [`Sampling::logprobs`] says.
    pub logprob: f32,
    /// The most likely tokens at its place, the likeliest first.
    pub top: Vec<TopLogprob>,
    /// Where its text begins in the answer, in characters.
    pub text_offset: usize,
}

/// One generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Its id.
    pub id: u32,
    /// The text that became certain with it; often empty.
    pub text: String,
    /// Where asked for: the tokens that `text` comes from, as far as earlier steps did not tell them. So the
    /// tokens of all steps are those of the text: without an end token, and without those of a stop text, but for
    /// one that begins before it.
    pub logprobs: Vec<TokenLogprob>,
    /// Set on the last one.
    pub finish: Option<Finish>,
}

/// Chooses the tokens of one answer, and says what text they make.
pub(crate) struct Voice {
    sampler: Sampler,
    stream: StreamDecoder,
    stops: StopMatcher,
    untold: Untold,
    max_tokens: usize,
    context: usize,
    prompt: usize,
    end_ids: Vec<u32>,
    generated: usize,
    done: bool,
}

impl Voice {
    /// The voice of an answer, and the prompt that it answers: an empty one is what the tokenizer begins with.
    ///
    /// # Errors
    /// When a parameter makes no sense, or the prompt is empty or fills the context.
    pub fn new(
        config: &ModelConfig,
        tokenizer: &Tokenizer,
        prompt: &[u32],
        sampling: Sampling,
    ) -> Result<(Self, Vec<u32>)> {
        sampling.check()?;
        let prompt = if prompt.is_empty() { tokenizer.prefix() } else { prompt };
        ensure!(!prompt.is_empty(), "the prompt is empty, and this model has no token to begin with");
        ensure!(
            (prompt.len() as i64) < config.max_positions,
            "the prompt has {} tokens; the model's context is {}",
            prompt.len(),
            config.max_positions
        );
        ensure!(
            prompt.iter().all(|&id| i64::from(id) < config.vocab_size),
            "the prompt has ids beyond the vocabulary"
        );
        ensure!(
            sampling.logit_bias.keys().all(|&id| i64::from(id) < config.vocab_size),
            "logit_bias has ids beyond the vocabulary"
        );
        let mut end_ids = tokenizer.eos_ids().to_vec();
        end_ids.extend(&sampling.stop_ids);
        let voice = Self {
            stream: StreamDecoder::new(tokenizer, prompt),
            stops: StopMatcher::new(&sampling.stop),
            untold: Untold::default(),
            max_tokens: sampling.max_tokens,
            context: config.max_positions as usize,
            prompt: prompt.len(),
            end_ids,
            generated: 0,
            done: false,
            sampler: Sampler::new(sampling, prompt),
        };
        Ok((voice, prompt.to_vec()))
    }

    /// Documents that the answer is from: see [`crate::ridge::Prior::sources`].
    pub fn sources(&self) -> Vec<Source> {
        self.sampler.sources()
    }

    /// Tokens generated so far.
    pub fn generated(&self) -> usize {
        self.generated
    }

    /// Whether the answer has ended.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// The next token, by the logits after everything before it.
    ///
    /// # Errors
    /// When the logits are not finite, or the grammar cannot go on.
    pub fn say(&mut self, logits: Vec<f32>) -> Result<Step> {
        let chosen = self.sampler.choose(logits)?;
        let id = chosen.id;
        self.generated += 1;
        let full = self.prompt + self.generated >= self.context;
        let mut finish = (full || self.generated >= self.max_tokens).then_some(Finish::Length);
        let mut text = String::new();
        if chosen.last || self.end_ids.contains(&id) {
            finish = Some(Finish::Stop);
        }
        if !self.end_ids.contains(&id) {
            self.untold.token(id, chosen.logprobs);
            if let Some(part) = self.stream.push(id)? {
                self.untold.text(&part);
                text = self.stops.push(&part);
            }
        }
        if finish.is_some() && !self.stops.hit {
            if let Some(part) = self.stream.finish()? {
                text += &self.stops.push(&part);
            }
            text += &self.stops.finish();
        }
        if self.stops.hit {
            finish = Some(Finish::Stop);
        }
        self.done = finish.is_some();
        let logprobs = self.untold.told(&text, self.done && !self.stops.hit);
        Ok(Step { id, text, logprobs, finish })
    }
}

/// Tokens whose text has not come out yet, because it is part of a character, or of what may become a stop text.
#[derive(Default)]
struct Untold {
    tokens: VecDeque<TokenLogprob>,
    /// Characters of text that all tokens made.
    made: usize,
    /// Characters of text that came out.
    told: usize,
}

impl Untold {
    /// A token was chosen.
    fn token(&mut self, id: u32, logprobs: Option<(f32, Vec<TopLogprob>)>) {
        let token = logprobs.map(|(logprob, top)| TokenLogprob { id, logprob, top, text_offset: self.made });
        self.tokens.extend(token);
    }

    /// It made this text certain.
    fn text(&mut self, text: &str) {
        self.made += text.chars().count();
    }

    /// This text comes out; gives the tokens that it begins with, or all that are left.
    fn told(&mut self, text: &str, all: bool) -> Vec<TokenLogprob> {
        self.told += text.chars().count();
        let count = self.tokens.iter().take_while(|token| all || token.text_offset < self.told).count();
        self.tokens.drain(..count).collect()
    }
}

/// Finds stop texts in a stream, holding back what might become one.
struct StopMatcher {
    stops: Vec<String>,
    held: String,
    hit: bool,
}

impl StopMatcher {
    fn new(stops: &[String]) -> Self {
        Self { stops: stops.to_vec(), held: String::new(), hit: false }
    }

    /// Takes text; gives what can no longer be part of a stop text. After a hit it gives nothing more.
    fn push(&mut self, text: &str) -> String {
        if self.hit {
            return String::new();
        }
        self.held += text;
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.hit = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let starts = self.held.char_indices().map(|(i, _)| i);
        let safe = starts
            .filter(|&i| self.stops.iter().any(|stop| stop.starts_with(&self.held[i..])))
            .min()
            .unwrap_or(self.held.len());
        let rest = self.held.split_off(safe);
        std::mem::replace(&mut self.held, rest)
    }

    /// The end of the stream: what was held back is text after all.
    fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matcher_holds_back_only_what_may_become_a_stop() {
        let mut matcher = StopMatcher::new(&["</end>".into(), "é!".into()]);
        assert_eq!(matcher.push("a < b </e"), "a < b ");
        assert_eq!(matcher.push("x é"), "</ex ");
        assert_eq!(matcher.push("? </"), "é? ");
        assert_eq!(matcher.push("end> more"), "");
        assert!(matcher.hit && matcher.push("x").is_empty());
    }

    #[test]
    fn tokens_that_share_a_character_come_out_with_it() {
        let mut untold = Untold::default();
        let logprobs = || Some((-1.0, Vec::new()));
        untold.token(1, logprobs());
        assert!(untold.told("", false).is_empty());
        untold.token(2, logprobs());
        untold.text("é!");
        let told = untold.told("é", false);
        assert_eq!(told.iter().map(|t| (t.id, t.text_offset)).collect::<Vec<_>>(), [(1, 0), (2, 0)]);
        untold.token(3, logprobs());
        assert_eq!(untold.told("!", true)[0].text_offset, 2);
    }
}
