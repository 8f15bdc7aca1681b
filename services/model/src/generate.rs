//! Generation: one token a step, so that a caller can interleave several requests on one thread.

use anyhow::{Result, ensure};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Tensor};

use crate::active::ActiveAdapters;
use crate::llama::{Base, Input, KvCache};
use crate::lora::Adapter;
use crate::stream::StreamDecoder;
use crate::tokenizer::Tokenizer;

/// Prompt tokens of one forward pass: bounds the memory of a long prompt.
const PREFILL_TOKENS: i64 = 512;

/// Stop strings that one request may have.
const STOPS_MAX: usize = 16;

/// How tokens are chosen, and when to end.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; 1 samples from the model's own distribution.
    pub temperature: f64,
    /// Only the k most likely tokens; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability; 1 for all.
    pub top_p: f64,
    /// Equal seeds give equal texts, on one machine and thread count.
    pub seed: u64,
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Ids that end the answer beside the tokenizer's own, such as a chat template's end of turn.
    pub stop_ids: Vec<u32>,
}

impl Default for Sampling {
    fn default() -> Self {
        let (stop, stop_ids) = (Vec::new(), Vec::new());
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0, max_tokens: 256, stop, stop_ids }
    }
}

impl Sampling {
    /// Refuses what no request could mean.
    ///
    /// # Errors
    /// The message names the parameter.
    pub fn check(&self) -> Result<()> {
        ensure!((0.0..=100.0).contains(&self.temperature), "temperature has to be from 0 to 100");
        ensure!(self.top_p > 0.0 && self.top_p <= 1.0, "top_p has to be above 0 and at most 1");
        ensure!(self.max_tokens > 0, "max_tokens has to be at least 1");
        ensure!(self.stop.len() <= STOPS_MAX, "stop: at most {STOPS_MAX} texts");
        ensure!(self.stop.iter().all(|stop| !stop.is_empty()), "stop: an empty text would stop at once");
        Ok(())
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// By an end token or a stop text.
    Stop,
    /// By `max_tokens` or the model's context limit.
    Length,
}

/// One generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Its id.
    pub id: u32,
    /// The text that became certain with it; often empty.
    pub text: String,
    /// Set on the last one.
    pub finish: Option<Finish>,
}

/// A request that is being answered. It keeps the base and the adapters it began with.
pub struct Decoder {
    base: Base,
    adapters: ActiveAdapters,
    cache: KvCache,
    sampling: Sampling,
    random: ChaCha8Rng,
    stream: StreamDecoder,
    stops: StopMatcher,
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
        let mut end_ids = tokenizer.eos_ids().to_vec();
        end_ids.extend(&sampling.stop_ids);
        Ok(Self {
            adapters: base.activate(adapters)?,
            cache: KvCache::new(base, 1),
            random: ChaCha8Rng::seed_from_u64(sampling.seed),
            stream: StreamDecoder::new(tokenizer, prompt),
            stops: StopMatcher::new(&sampling.stop),
            end_ids,
            unseen: prompt.to_vec(),
            generated: 0,
            done: false,
            sampling,
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
        let id = choose(&logits, &self.sampling, &mut self.random)?;
        self.generated += 1;
        self.unseen = vec![id];
        let full = self.cache.len() + 1 >= self.base.config().max_positions;
        let mut finish = (full || self.generated >= self.sampling.max_tokens).then_some(Finish::Length);
        let mut text = String::new();
        if self.end_ids.contains(&id) {
            finish = Some(Finish::Stop);
        } else if let Some(part) = self.stream.push(id)? {
            text = self.stops.push(&part);
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
        Ok(Some(Step { id, text, finish }))
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

/// Sorting a whole vocabulary for top-p is slow, and its mass is nearly always in this many tokens.
const LIKELY: usize = 1024;

/// Chooses a token id from logits.
fn choose(logits: &[f32], sampling: &Sampling, random: &mut ChaCha8Rng) -> Result<u32> {
    ensure!(
        logits.iter().all(|x| !x.is_nan()),
        "the model's output is not a number: its weights are damaged"
    );
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    ensure!(best.is_finite(), "the model's output is not finite: its weights are damaged");
    if sampling.temperature == 0.0 {
        return Ok(logits.iter().position(|&x| x == best).unwrap_or(0) as u32);
    }
    let mass = |x: f32| (f64::from(x - best) / sampling.temperature).exp();
    let mut tokens: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
    // Equal logits are ordered by id, so that equal seeds give equal texts.
    let order = |x: &(f32, u32), y: &(f32, u32)| y.0.total_cmp(&x.0).then(x.1.cmp(&y.1));
    if sampling.top_k > 0 && sampling.top_k < tokens.len() {
        tokens.select_nth_unstable_by(sampling.top_k - 1, order);
        tokens.truncate(sampling.top_k);
        tokens.sort_unstable_by(order);
    }
    if sampling.top_p < 1.0 {
        let enough = sampling.top_p * tokens.iter().map(|t| mass(t.0)).sum::<f64>();
        let sorted = LIKELY.min(tokens.len());
        if sorted < tokens.len() {
            tokens.select_nth_unstable_by(sorted, order);
        }
        tokens[..sorted].sort_unstable_by(order);
        if tokens[..sorted].iter().map(|t| mass(t.0)).sum::<f64>() < enough {
            tokens.sort_unstable_by(order);
        }
        let mut sum = 0.0;
        let kept = tokens.iter().take_while(|t| {
            let before = sum;
            sum += mass(t.0);
            before < enough
        });
        let kept = kept.count().max(1);
        tokens.truncate(kept);
    }
    let masses: Vec<f64> = tokens.iter().map(|t| mass(t.0)).collect();
    Ok(tokens[draw(&masses, random)].1)
}

/// Draws an index with probability in proportion to its mass.
pub(crate) fn draw(masses: &[f64], random: &mut ChaCha8Rng) -> usize {
    let mut left = random.random::<f64>() * masses.iter().sum::<f64>();
    for (i, mass) in masses.iter().enumerate() {
        left -= mass;
        if left < 0.0 {
            return i;
        }
    }
    // Rounding can leave a trace at the end: take the last that has any mass.
    masses.iter().rposition(|&mass| mass > 0.0).unwrap_or(0)
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
    fn senseless_parameters_are_refused() {
        for (sampling, name) in [
            (Sampling { temperature: f64::NAN, ..Sampling::default() }, "temperature"),
            (Sampling { temperature: -1.0, ..Sampling::default() }, "temperature"),
            (Sampling { top_p: 0.0, ..Sampling::default() }, "top_p"),
            (Sampling { max_tokens: 0, ..Sampling::default() }, "max_tokens"),
            (Sampling { stop: vec![String::new()], ..Sampling::default() }, "stop"),
        ] {
            assert!(sampling.check().unwrap_err().to_string().contains(name));
        }
    }

    #[test]
    fn sampling_follows_the_distribution() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut count = |sampling: &Sampling| {
            let mut counts = [0; 4];
            (0..10_000).for_each(|_| counts[choose(&logits, sampling, &mut random).unwrap() as usize] += 1);
            counts
        };
        let plain = count(&Sampling { temperature: 1.0, ..Sampling::default() });
        assert!((4800..5200).contains(&plain[0]) && (400..600).contains(&plain[3]), "{plain:?}");
        let nucleus = count(&Sampling { temperature: 1.0, top_p: 0.7, ..Sampling::default() });
        assert!((6000..6500).contains(&nucleus[0]) && nucleus[2..] == [0, 0], "{nucleus:?}");
        let best = count(&Sampling { temperature: 1.0, top_k: 3, ..Sampling::default() });
        assert_eq!(best[3], 0);
        assert!(choose(&[0.0, f32::NAN], &Sampling::default(), &mut random).is_err());
    }
}
