//! Generation: one token a step, so that a caller can interleave several requests on one thread.

use std::collections::VecDeque;

use anyhow::{Result, ensure};
use tch::{Device, Tensor};

use crate::active::ActiveAdapters;
use crate::llama::{Base, Input, KvCache};
use crate::lora::Adapter;
use crate::sampling::{Sampler, Sampling, TopLogprob};
use crate::stream::StreamDecoder;
use crate::tokenizer::Tokenizer;

/// Prompt tokens of one forward pass: bounds the memory of a long prompt.
const PREFILL_TOKENS: i64 = 512;

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// By an end token or a stop text.
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

/// A request that is being answered. It keeps the base and the adapters it began with.
pub struct Decoder {
    base: Base,
    adapters: ActiveAdapters,
    cache: KvCache,
    sampler: Sampler,
    stream: StreamDecoder,
    stops: StopMatcher,
    untold: Untold,
    max_tokens: usize,
    end_ids: Vec<u32>,
    /// What the model has not seen yet: the prompt at first, then the last token.
    unseen: Vec<u32>,
    generated: usize,
    done: bool,
}

impl Decoder {
    /// Takes up a request.
    ///
    /// # Errors
    /// When a parameter makes no sense, an adapter does not fit, or the prompt is empty or fills the context.
    pub fn new(
        base: &Base,
        adapters: &[(&Adapter, f64)],
        tokenizer: &Tokenizer,
        prompt: &[u32],
        sampling: Sampling,
    ) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        sampling.check()?;
        let config = base.config();
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
        Ok(Self {
            adapters: base.activate(adapters)?,
            cache: KvCache::new(base, 1),
            stream: StreamDecoder::new(tokenizer, prompt),
            stops: StopMatcher::new(&sampling.stop),
            untold: Untold::default(),
            max_tokens: sampling.max_tokens,
            end_ids,
            unseen: prompt.to_vec(),
            generated: 0,
            done: false,
            sampler: Sampler::new(sampling, prompt),
            base: base.share(),
        })
    }

    /// Generates the next token; `None` once the answer has ended. The first call reads the prompt.
    ///
    /// # Errors
    /// When the model's output is not finite.
    pub fn step(&mut self) -> Result<Option<Step>> {
        if self.done {
            return Ok(None);
        }
        let logits = self.next_logits()?;
        let chosen = self.sampler.choose(logits)?;
        let id = chosen.id;
        self.generated += 1;
        self.unseen = vec![id];
        let full = self.cache.len() + 1 >= self.base.config().max_positions;
        let mut finish = (full || self.generated >= self.max_tokens).then_some(Finish::Length);
        let mut text = String::new();
        if self.end_ids.contains(&id) {
            finish = Some(Finish::Stop);
        } else {
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
        Ok(Some(Step { id, text, logprobs, finish }))
    }

    /// Tokens generated so far.
    pub fn generated(&self) -> usize {
        self.generated
    }

    /// Logits after everything seen, on the CPU, [vocab_size].
    fn next_logits(&mut self) -> Result<Vec<f32>> {
        let _guard = tch::no_grad_guard();
        let ids: Vec<i64> = self.unseen.iter().map(|&id| i64::from(id)).collect();
        let ids = Tensor::from_slice(&ids).unsqueeze(0).to_device(self.base.device());
        let total = ids.size()[1];
        let mut last = None;
        for start in (0..total).step_by(PREFILL_TOKENS as usize) {
            let part = ids.narrow(1, start, PREFILL_TOKENS.min(total - start));
            let input = Input::rows(part, self.cache.len());
            let hidden = self.base.forward(&input, &self.adapters, Some(&mut self.cache))?;
            last = Some(hidden.f_narrow(0, hidden.size()[0] - 1, 1)?);
        }
        let last = last.ok_or_else(|| anyhow::anyhow!("nothing to read"))?;
        to_vec(&self.base.logits(&last)?)
    }
}

/// An answer as a whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Its ids, an end token included.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Generates a whole answer.
///
/// # Errors
/// As [`Decoder::new`] and [`Decoder::step`].
pub fn generate(
    base: &Base,
    adapters: &[(&Adapter, f64)],
    tokenizer: &Tokenizer,
    prompt: &[u32],
    sampling: Sampling,
) -> Result<Answer> {
    let mut decoder = Decoder::new(base, adapters, tokenizer, prompt, sampling)?;
    let mut answer = Answer { text: String::new(), ids: Vec::new(), finish: Finish::Length };
    while let Some(step) = decoder.step()? {
        answer.ids.push(step.id);
        answer.text += &step.text;
        answer.finish = step.finish.unwrap_or(answer.finish);
    }
    Ok(answer)
}

/// Copies a tensor's values to the CPU as f32, in order.
pub(crate) fn to_vec(tensor: &Tensor) -> Result<Vec<f32>> {
    let tensor = tensor.f_to_device(Device::Cpu)?.f_contiguous()?;
    let mut values = vec![0f32; tensor.numel()];
    tensor.f_copy_data(&mut values, tensor.numel())?;
    Ok(values)
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
    use crate::device::Placement;
    use crate::golden;
    use crate::hf::token_ids;
    use crate::lora::LoraConfig;
    use serde_json::Value;

    fn stories() -> Option<(Base, Tokenizer, Value)> {
        let dir = golden::shared("models/stories260K")?;
        tch::set_num_threads(1);
        let golden =
            serde_json::from_str(&std::fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap();
        Some((Base::load(&dir, &Placement::CPU_F32).unwrap(), Tokenizer::load(&dir).unwrap(), golden))
    }

    #[test]
    fn the_trained_checkpoint_continues_its_golden_text() {
        let Some((base, tokenizer, golden)) = stories() else { return };
        for case in golden["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let prompt = tokenizer.encode(text).unwrap();
            assert_eq!(prompt, token_ids(Some(&case["ids"])));
            let sampling = Sampling { max_tokens: 48, ..Sampling::default() };
            let answer = generate(&base, &[], &tokenizer, &prompt, sampling).unwrap();
            assert_eq!(answer.ids, token_ids(Some(&case["greedy_48"])));
            assert_eq!(format!("{text}{}", answer.text), case["greedy_text"].as_str().unwrap());
            assert_eq!(answer.finish, Finish::Length);
        }
    }

    #[test]
    fn decoding_with_the_cache_equals_recomputing() {
        let Some((base, tokenizer, _)) = stories() else { return };
        let mut adapter = Adapter::new(LoraConfig::default(), base.config(), 3).unwrap();
        let noise =
            (Tensor::arange(adapter.parameter_count(), (tch::Kind::Float, Device::Cpu)) * 0.37).sin() * 0.02;
        adapter = adapter.with_flat(adapter.flat() + noise).unwrap();
        let mut ids = tokenizer.encode("One day").unwrap();
        let sampling = Sampling { max_tokens: 40, ..Sampling::default() };
        let answer = generate(&base, &[(&adapter, 0.8)], &tokenizer, &ids, sampling).unwrap();
        let active = base.activate(&[(&adapter, 0.8)]).unwrap();
        for &id in &answer.ids {
            let row: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
            let logits = golden::logits(&base, &active, &Tensor::from_slice(&row).unsqueeze(0));
            assert_eq!(logits.get(0).get(-1).argmax(None, false).int64_value(&[]), i64::from(id));
            ids.push(id);
        }
    }

    #[test]
    fn equal_seeds_give_equal_texts_and_limits_hold() {
        let Some((base, tokenizer, _)) = stories() else { return };
        let prompt = tokenizer.encode("Tom").unwrap();
        let run = |seed, top_k, top_p| {
            let sampling =
                Sampling { temperature: 0.9, seed, top_k, top_p, max_tokens: 20, ..Sampling::default() };
            generate(&base, &[], &tokenizer, &prompt, sampling).unwrap()
        };
        assert_eq!(run(5, 0, 1.0), run(5, 0, 1.0));
        assert_ne!(run(5, 0, 1.0).ids, run(6, 0, 1.0).ids);
        let greedy =
            generate(&base, &[], &tokenizer, &prompt, Sampling { max_tokens: 20, ..Sampling::default() })
                .unwrap();
        assert_eq!((run(7, 1, 1.0).ids, run(7, 0, 1e-9).ids), (greedy.ids.clone(), greedy.ids));
        let endless = Sampling { max_tokens: usize::MAX, ..Sampling::default() };
        let answer = generate(&base, &[], &tokenizer, &prompt, endless).unwrap();
        assert!(prompt.len() + answer.ids.len() <= 512);
    }

    #[test]
    fn stop_texts_end_the_answer_and_do_not_leak() {
        let Some((base, tokenizer, _)) = stories() else { return };
        let prompt = tokenizer.encode("Once upon a time, there was a little girl named Lily.").unwrap();
        let sampling = Sampling { stop: vec!["the park.".into()], ..Sampling::default() };
        let mut decoder = Decoder::new(&base, &[], &tokenizer, &prompt, sampling).unwrap();
        let (mut text, mut finish) = (String::new(), None);
        while let Some(step) = decoder.step().unwrap() {
            text += &step.text;
            finish = step.finish;
        }
        assert_eq!((text.as_str(), finish), (" She loved to play outside in ", Some(Finish::Stop)));
    }

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
    fn an_answer_depends_on_its_seed_and_on_nothing_beside_it() {
        let Some((base, tokenizer, _)) = stories() else { return };
        let prompt = tokenizer.encode("Tom").unwrap();
        let sampling = |seed| Sampling { temperature: 1.0, seed, max_tokens: 16, ..Sampling::default() };
        let alone: Vec<Answer> =
            (0..8).map(|seed| generate(&base, &[], &tokenizer, &prompt, sampling(seed)).unwrap()).collect();
        let decoder = |seed| Decoder::new(&base, &[], &tokenizer, &prompt, sampling(seed)).unwrap();
        let mut beside: Vec<(Decoder, Vec<u32>)> = (0..8).map(|seed| (decoder(seed), Vec::new())).collect();
        for _ in 0..16 {
            for (decoder, ids) in &mut beside {
                ids.extend(decoder.step().unwrap().map(|step| step.id));
            }
        }
        assert!(alone.iter().zip(&beside).all(|(alone, (_, ids))| alone.ids == *ids));
    }

    #[test]
    fn logprobs_are_told_with_the_text_of_their_tokens() {
        let Some((base, tokenizer, _)) = stories() else { return };
        let prompt = tokenizer.encode("Once upon a time, there was a little girl named Lily.").unwrap();
        let stop = vec!["the park.".into()];
        let sampling = Sampling { stop, logprobs: Some(2), ..Sampling::default() };
        let mut decoder = Decoder::new(&base, &[], &tokenizer, &prompt, sampling.clone()).unwrap();
        let (mut text, mut told, mut ids) = (String::new(), Vec::new(), Vec::new());
        while let Some(step) = decoder.step().unwrap() {
            text += &step.text;
            told.extend(step.logprobs);
            ids.push(step.id);
        }
        assert!(told.len() < ids.len() && told.iter().zip(&ids).all(|(token, &id)| token.id == id));
        let bytes: Vec<u8> = told.iter().flat_map(|token| tokenizer.bytes(token.id)).collect();
        // The stop text begins within the last of them.
        assert_eq!(String::from_utf8(bytes).unwrap(), format!("{text}the"));
        for (i, token) in told.iter().enumerate() {
            let before: usize = told[..i].iter().map(|t| tokenizer.bytes(t.id).len()).sum();
            assert_eq!(token.text_offset, before);
            // A greedy choice is the likeliest one.
            assert_eq!(
                (token.top.len(), token.top[0].id, token.top[0].logprob),
                (2, token.id, token.logprob)
            );
        }
        // They are those of the model, read in one pass.
        let all: Vec<i64> = prompt.iter().chain(&ids).map(|&id| i64::from(id)).collect();
        let active = base.activate(&[]).unwrap();
        let logits = golden::logits(&base, &active, &Tensor::from_slice(&all).unsqueeze(0));
        let logprobs = logits.get(0).log_softmax(-1, tch::Kind::Double);
        for (i, token) in told.iter().enumerate() {
            let at = [(prompt.len() + i - 1) as i64, i64::from(token.id)];
            assert!((logprobs.double_value(&at) - f64::from(token.logprob)).abs() < 1e-4);
        }
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

    #[test]
    fn bias_beyond_the_vocabulary_is_refused() {
        let Some((base, tokenizer, _)) = stories() else { return };
        let sampling = Sampling { logit_bias: [(512, 1.0)].into(), ..Sampling::default() };
        let refused = Decoder::new(&base, &[], &tokenizer, &[1], sampling).err().unwrap();
        assert!(refused.to_string().contains("logit_bias"));
    }
}
