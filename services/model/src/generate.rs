//! Generation of one answer in the plain way, by libtorch: what evaluation does, and what serving is compared with.

use anyhow::Result;
use tch::{Device, Tensor};

use crate::active::ActiveAdapters;
use crate::llama::{Base, Input, KvCache};
use crate::lora::Adapter;
use crate::sampling::Sampling;
use crate::tokenizer::Tokenizer;
use crate::voice::Voice;
pub use crate::voice::{Finish, Step, TokenLogprob};

/// Prompt tokens of one forward pass: bounds the memory of a long prompt.
const PREFILL_TOKENS: usize = 512;

/// A request that is being answered. It keeps the base and the adapters it began with.
pub struct Decoder {
    base: Base,
    adapters: ActiveAdapters,
    cache: KvCache,
    voice: Voice,
    /// What the model has not seen yet: the prompt at first, then the last token.
    unseen: Vec<u32>,
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
        let (voice, unseen) = Voice::new(base.config(), tokenizer, prompt, sampling)?;
        let (adapters, cache) = (base.activate(adapters)?, KvCache::new(base, 1));
        Ok(Self { base: base.share(), adapters, cache, voice, unseen })
    }

    /// Generates the next token; `None` once the answer has ended. The first call reads the prompt.
    ///
    /// # Errors
    /// When the model's output is not finite.
    pub fn step(&mut self) -> Result<Option<Step>> {
        while !self.voice.is_done() {
            if let Some(step) = self.advance()? {
                return Ok(Some(step));
            }
        }
        Ok(None)
    }

    /// Reads a part of the prompt; once it is read, generates the next token.
    ///
    /// # Errors
    /// When the model's output is not finite.
    pub fn advance(&mut self) -> Result<Option<Step>> {
        let _guard = tch::no_grad_guard();
        let rest = self.unseen.split_off(self.unseen.len().min(PREFILL_TOKENS));
        let ids: Vec<i64> = self.unseen.iter().map(|&id| i64::from(id)).collect();
        let ids = Tensor::from_slice(&ids).unsqueeze(0).to_device(self.base.device());
        let input = Input::rows(ids, self.cache.len());
        let hidden = self.base.forward(&input, &self.adapters, Some(&mut self.cache))?;
        self.unseen = rest;
        if !self.unseen.is_empty() {
            return Ok(None);
        }
        let last = hidden.f_narrow(0, hidden.size()[0] - 1, 1)?;
        let step = self.voice.say(to_vec(&self.base.logits(&last)?)?)?;
        self.unseen.push(step.id);
        Ok(Some(step))
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
    fn bias_beyond_the_vocabulary_is_refused() {
        let Some((base, tokenizer, _)) = stories() else { return };
        let sampling = Sampling { logit_bias: [(512, 1.0)].into(), ..Sampling::default() };
        let refused = Decoder::new(&base, &[], &tokenizer, &[1], sampling).err().unwrap();
        assert!(refused.to_string().contains("logit_bias"));
    }
}
