//! Many answers at once: one forward pass a step over all of them, whatever their lengths and adapters.
//!
//! On a CPU that is [`crate::cpu`]'s pass. Other devices take each answer's step by itself, as [`Decoder`] does.

use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::cpu::{Cpu, CpuAdapters, PAGE_TOKENS, Pages, Prefixes, Span};
use crate::generate::{Decoder, Step};
use crate::llama::Base;
use crate::lora::Adapter;
use crate::sampling::Sampling;
use crate::tokenizer::Tokenizer;
use crate::voice::Voice;

/// Prompt tokens of a pass that also decodes: what they cost is what the other answers wait.
const PREFILL_BESIDE: usize = 64;
/// Prompt tokens of a pass that does nothing else.
const PREFILL_ALONE: usize = 256;

/// Adapters made ready for answers; all that are answered with the same ones share them.
pub struct Adapted {
    number: u64,
    kind: AdaptedKind,
}

enum AdaptedKind {
    Cpu(Arc<CpuAdapters>),
    /// As they were given: each answer prepares them.
    Plain(Vec<(Adapter, f64)>),
}

/// One answer under way.
pub struct Speaker {
    adapted: Rc<Adapted>,
    /// Pages that are set aside for it.
    reserved: usize,
    state: State,
}

enum State {
    Paged(Box<Paged>),
    Plain(Box<Decoder>),
}

struct Paged {
    voice: Voice,
    /// Prompt and answer so far.
    ids: Vec<u32>,
    /// None before its prompt is begun.
    pages: Option<Pages>,
}

impl Paged {
    /// Tokens that the model has not seen.
    fn unseen(&self) -> &[u32] {
        &self.ids[self.pages.as_ref().map_or(0, Pages::len)..]
    }
}

impl Speaker {
    /// Tokens generated so far.
    pub fn generated(&self) -> usize {
        match &self.state {
            State::Paged(paged) => paged.voice.generated(),
            State::Plain(decoder) => decoder.generated(),
        }
    }
}

/// Why an answer is not begun.
#[derive(Debug)]
pub enum NotBegun {
    /// There is no room for its keys and values before others have ended.
    Later,
    /// There never is room for so long a prompt and answer: says how much there is.
    TooLong(String),
    /// It makes no sense: says why.
    Refused(anyhow::Error),
}

/// A base, with all that its answers share.
pub struct Batch {
    base: Base,
    cpu: Option<Cpu>,
    prefixes: Prefixes,
    pages_max: usize,
    reserved: usize,
    adapted: u64,
}

impl Batch {
    /// Answers of `base`, whose keys and values take `cache_bytes_max` at most. As many threads compute as libtorch
    /// has on the calling thread.
    ///
    /// # Errors
    /// When the base's weights are not as a base has them.
    pub fn new(base: Base, cache_bytes_max: usize) -> Result<Self> {
        let cpu = Cpu::new(&base)?;
        Ok(Self::on(base, cpu, cache_bytes_max))
    }

    /// The same with a copy of the weights in 16 bits, where that has the same numbers: see [`Cpu::narrow`].
    ///
    /// # Errors
    /// As for [`Batch::new`].
    pub fn narrow(base: Base, cache_bytes_max: usize) -> Result<Self> {
        let cpu = Cpu::narrow(&base)?;
        Ok(Self::on(base, cpu, cache_bytes_max))
    }

    fn on(base: Base, cpu: Option<Cpu>, cache_bytes_max: usize) -> Self {
        let pages_max = cache_bytes_max / page_bytes(&base);
        Self { base, cpu, prefixes: Prefixes::default(), pages_max, reserved: 0, adapted: 0 }
    }

    /// The base.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// Makes adapters ready, each with its weight. What is read with them is kept for later prompts, until
    /// [`Batch::forget`].
    ///
    /// # Errors
    /// When one belongs to a model of another shape, or a weight is not finite.
    pub fn adapt(&mut self, adapters: &[(&Adapter, f64)]) -> Result<Rc<Adapted>> {
        let kind = if self.cpu.is_some() {
            AdaptedKind::Cpu(Arc::new(Cpu::activate(&self.base, adapters)?))
        } else {
            AdaptedKind::Plain(adapters.iter().map(|(adapter, weight)| (adapter.share(), *weight)).collect())
        };
        self.adapted += 1;
        self.prefixes.open(self.adapted);
        Ok(Rc::new(Adapted { number: self.adapted, kind }))
    }

    /// Drops all that was read with these adapters. Answers under way go on, and leave nothing behind.
    pub fn forget(&mut self, adapted: &Adapted) {
        self.prefixes.close(adapted.number);
    }

    /// Tokens whose keys and values are kept for later prompts.
    pub fn kept_tokens(&self) -> usize {
        self.prefixes.len() * PAGE_TOKENS
    }

    /// Takes up an answer, if its keys and values find room, to its last token.
    ///
    /// # Errors
    /// When there is no room yet; or when a parameter makes no sense, or the prompt is empty or fills the context.
    pub fn begin(
        &mut self,
        adapted: &Rc<Adapted>,
        tokenizer: &Tokenizer,
        prompt: &[u32],
        sampling: Sampling,
    ) -> Result<Speaker, NotBegun> {
        let length = prompt.len().max(1).saturating_add(sampling.max_tokens);
        let length = length.min(self.base.config().max_positions as usize);
        let needed = length.div_ceil(PAGE_TOKENS);
        if needed > self.pages_max {
            let max = self.pages_max * PAGE_TOKENS;
            return Err(NotBegun::TooLong(format!(
                "prompt and answer may take {length} tokens, and the cache holds {max}; ask for fewer with max_tokens, \
                 or raise infer.cache_mb_max"
            )));
        }
        if self.reserved + needed > self.pages_max {
            return Err(NotBegun::Later);
        }
        let state = match &adapted.kind {
            AdaptedKind::Cpu(_) => {
                let (voice, ids) =
                    Voice::new(self.base.config(), tokenizer, prompt, sampling).map_err(NotBegun::Refused)?;
                State::Paged(Box::new(Paged { voice, ids, pages: None }))
            }
            AdaptedKind::Plain(adapters) => {
                let adapters: Vec<(&Adapter, f64)> =
                    adapters.iter().map(|(a, weight)| (a, *weight)).collect();
                let decoder = Decoder::new(&self.base, &adapters, tokenizer, prompt, sampling);
                State::Plain(Box::new(decoder.map_err(NotBegun::Refused)?))
            }
        };
        self.reserved += needed;
        self.prefixes.shrink(self.pages_max - self.reserved);
        Ok(Speaker { adapted: Rc::clone(adapted), reserved: needed, state })
    }

    /// Ends an answer, whether it was finished or not. What it has read is kept for later prompts.
    pub fn end(&mut self, speaker: Speaker) {
        self.reserved -= speaker.reserved;
        if let State::Paged(paged) = &speaker.state
            && let Some(pages) = &paged.pages
        {
            self.prefixes.keep(speaker.adapted.number, &paged.ids, pages.full());
        }
        self.prefixes.shrink(self.pages_max - self.reserved);
    }

    /// One pass for all `speakers`: a token for each whose prompt is read, and a part of the prompts of the others.
    /// For each, what came of it; none where the prompt is not read yet.
    pub fn step(&mut self, speakers: &mut [&mut Speaker]) -> Vec<Result<Option<Step>>> {
        let mut results: Vec<Result<Option<Step>>> = speakers.iter().map(|_| Ok(None)).collect();
        for (result, speaker) in results.iter_mut().zip(speakers.iter_mut()) {
            if let State::Plain(decoder) = &mut speaker.state {
                *result = decoder.advance();
            }
        }
        if let Err(error) = self.pass(speakers, &mut results) {
            let message = format!("{error:#}");
            results.iter_mut().for_each(|result| *result = Err(anyhow::anyhow!("{message}")));
        }
        results
    }

    fn pass(&mut self, speakers: &mut [&mut Speaker], results: &mut [Result<Option<Step>>]) -> Result<()> {
        let Some(cpu) = &mut self.cpu else { return Ok(()) };
        let counts = parts(speakers);
        // Those with the same adapters side by side.
        let mut order: Vec<usize> = (0..speakers.len()).filter(|&i| counts[i] > 0).collect();
        order.sort_by_key(|&i| speakers[i].adapted.number);
        let mut turns = Vec::new();
        let mut slots: Vec<Option<&mut &mut Speaker>> = speakers.iter_mut().map(Some).collect();
        for i in order {
            let speaker = slots[i].take().context("each speaks once")?;
            let Speaker { adapted, state: State::Paged(paged), .. } = &mut **speaker else { continue };
            if paged.pages.is_none() {
                let known = self.prefixes.find(adapted.number, &paged.ids);
                paged.pages = Some(cpu.begin(known));
            }
            turns.push((i, &**adapted, &mut **paged));
        }
        let mut spans = Vec::new();
        for (i, adapted, paged) in &mut turns {
            let AdaptedKind::Cpu(adapters) = &adapted.kind else { continue };
            let Paged { ids, pages: Some(pages), .. } = &mut **paged else { continue };
            let unseen = &ids[pages.len()..];
            let count = counts[*i].min(unseen.len());
            spans.push(Span { ids: &unseen[..count], adapters, speaks: count == unseen.len(), pages });
        }
        let logits = cpu.forward(&mut spans)?;
        for ((i, adapted, paged), logits) in turns.iter_mut().zip(logits) {
            let Some(logits) = logits else { continue };
            if paged.voice.generated() == 0
                && let Some(pages) = &paged.pages
            {
                // The next answer to this prompt need not wait for the end of this one.
                self.prefixes.keep(adapted.number, &paged.ids, pages.full());
            }
            results[*i] = paged.voice.say(logits).map(|step| {
                paged.ids.push(step.id);
                Some(step)
            });
        }
        self.prefixes.shrink(self.pages_max - self.reserved);
        Ok(())
    }
}

/// How many tokens each speaker reads in the next pass: those who decode one, and those who read share what is left,
/// the first first.
fn parts(speakers: &[&mut Speaker]) -> Vec<usize> {
    let unseen = |speaker: &&mut Speaker| match &speaker.state {
        State::Paged(paged) if !paged.voice.is_done() => paged.unseen().len(),
        _ => 0,
    };
    let unseen: Vec<usize> = speakers.iter().map(unseen).collect();
    let mut left = if unseen.contains(&1) { PREFILL_BESIDE } else { PREFILL_ALONE };
    let part = |unseen: usize| match unseen {
        0 | 1 => unseen,
        _ => {
            let part = unseen.min(left);
            left -= part;
            part
        }
    };
    unseen.into_iter().map(part).collect()
}

/// Bytes that the keys and values of [`PAGE_TOKENS`] tokens take.
fn page_bytes(base: &Base) -> usize {
    let c = base.config();
    let numbers = 2 * c.layers * c.kv_heads * c.head_dim * PAGE_TOKENS as i64;
    numbers as usize * base.placement().kind().elt_size_in_bytes()
}

#[cfg(test)]
mod tests;
