//! Many answers at once: one forward pass a step over all of them, whatever their lengths and adapters.
//!
//! On a CPU that is [`crate::cpu`]'s pass; elsewhere one of libtorch with a row for each, and parts of prompts before it.

mod joint;

use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::active::ActiveAdapters;
use crate::cpu::{Cpu, CpuAdapters, PAGE_TOKENS, Pages, Prefixes, Span};
use crate::generate::Step;
use crate::llama::Base;
use crate::lora::Adapter;
use crate::ridge::Source;
use crate::sampling::Sampling;
use crate::tokenizer::Tokenizer;
use crate::voice::Voice;
use joint::Joint;
pub(crate) use joint::forced;

/// Prompt tokens of one step, on a CPU.
const PREFILL: Prefill = Prefill { beside: 64, alone: 256 };
/// The same on a GPU, which does many as fast as few.
const PREFILL_JOINT: Prefill = Prefill { beside: 512, alone: 2048 };

/// How many prompt tokens a step reads.
#[derive(Clone, Copy)]
struct Prefill {
    /// Where it also decodes: what they cost is what the other answers wait.
    beside: usize,
    /// Where it does nothing else.
    alone: usize,
}

/// Adapters made ready for answers; all that are answered with the same ones share them.
pub struct Adapted {
    number: u64,
    kind: AdaptedKind,
}

enum AdaptedKind {
    Cpu(Arc<CpuAdapters>),
    Joint(ActiveAdapters),
}

/// One answer under way.
pub struct Speaker {
    adapted: Rc<Adapted>,
    /// Pages that are set aside for it.
    reserved: usize,
    state: Box<State>,
}

struct State {
    voice: Voice,
    /// Prompt and answer so far.
    ids: Vec<u32>,
    /// What keeps keys and values.
    cache: Cache,
}

enum Cache {
    /// None before its prompt is begun.
    Pages(Option<Pages>),
    /// A row of the joint cache.
    Row(usize),
}

impl Speaker {
    /// Documents that the answer is from: see [`crate::ridge::Prior::sources`].
    pub fn sources(&self) -> Vec<Source> {
        self.state.voice.sources()
    }

    /// Tokens generated so far.
    pub fn generated(&self) -> usize {
        self.state.voice.generated()
    }
}

impl State {
    /// The next token, by the logits after all that came before.
    fn say(&mut self, logits: Vec<f32>) -> Result<Option<Step>> {
        let step = self.voice.say(logits)?;
        self.ids.push(step.id);
        Ok(Some(step))
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
    way: Way,
    prefixes: Prefixes,
    pages_max: usize,
    reserved: usize,
    adapted: u64,
}

enum Way {
    Cpu(Box<Cpu>),
    Joint(Box<Joint>),
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
        let way =
            cpu.map_or_else(|| Way::Joint(Box::new(Joint::new(base.share()))), |cpu| Way::Cpu(Box::new(cpu)));
        Self { base, way, prefixes: Prefixes::default(), pages_max, reserved: 0, adapted: 0 }
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
        let _guard = tch::no_grad_guard();
        let kind = match &self.way {
            Way::Cpu(_) => AdaptedKind::Cpu(Arc::new(Cpu::activate(&self.base, adapters)?)),
            Way::Joint(_) => {
                let active = self.base.activate(adapters)?;
                // In one pass with others, what is infinite here would be no number for them.
                active.check_finite()?;
                AdaptedKind::Joint(active)
            }
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
        // Of an empty prompt the tokenizer's beginning is read.
        let read = if prompt.is_empty() { tokenizer.prefix().len() } else { prompt.len() };
        let length = read.max(1).saturating_add(sampling.max_tokens);
        let length = length.min(self.base.config().max_positions as usize);
        let length = if matches!(self.way, Way::Joint(_)) { joint::aligned(length) } else { length };
        let needed = length.div_ceil(PAGE_TOKENS);
        if needed > self.pages_max {
            let max = self.pages_max * PAGE_TOKENS;
            return Err(NotBegun::TooLong(format!(
                "prompt and answer may take {length} tokens, and the cache holds {max}; ask for fewer with max_tokens, \
                 or raise infer.cache_mb_max"
            )));
        }
        let reserved = match &self.way {
            Way::Cpu(_) => self.reserved + needed,
            Way::Joint(joint) => joint.positions_with(length).div_ceil(PAGE_TOKENS),
        };
        if reserved > self.pages_max {
            return Err(NotBegun::Later);
        }
        let (voice, ids) =
            Voice::new(self.base.config(), tokenizer, prompt, sampling).map_err(NotBegun::Refused)?;
        let cache = match &mut self.way {
            Way::Cpu(_) => Cache::Pages(None),
            Way::Joint(joint) => Cache::Row(joint.take(length).map_err(NotBegun::Refused)?),
        };
        self.reserved += needed;
        self.shrink();
        let state = Box::new(State { voice, ids, cache });
        Ok(Speaker { adapted: Rc::clone(adapted), reserved: needed, state })
    }

    /// Makes what is kept for later prompts as small as what is set aside for answers allows.
    fn shrink(&mut self) {
        self.prefixes.shrink(self.pages_max.saturating_sub(self.reserved));
    }

    /// Ends an answer, whether it was finished or not. What it has read is kept for later prompts.
    pub fn end(&mut self, speaker: Speaker) {
        self.reserved -= speaker.reserved;
        match (&speaker.state.cache, &mut self.way) {
            (Cache::Pages(Some(pages)), _) => {
                self.prefixes.keep(speaker.adapted.number, &speaker.state.ids, pages.full());
            }
            (Cache::Row(row), Way::Joint(joint)) => joint.leave(*row),
            _ => {}
        }
        self.shrink();
    }

    /// One pass for all `speakers`: a token for each whose prompt is read, and a part of the prompts of the others.
    /// For each, what came of it; none where the prompt is not read yet.
    pub fn step(&mut self, speakers: &mut [&mut Speaker]) -> Vec<Result<Option<Step>>> {
        let mut results: Vec<Result<Option<Step>>> = speakers.iter().map(|_| Ok(None)).collect();
        let done = match &mut self.way {
            Way::Cpu(_) => self.pass(speakers, &mut results),
            Way::Joint(joint) => joint.pass(speakers, &mut results),
        };
        if let Err(error) = done {
            let message = format!("{error:#}");
            results.iter_mut().for_each(|result| *result = Err(anyhow::anyhow!("{message}")));
        }
        results
    }

    fn pass(&mut self, speakers: &mut [&mut Speaker], results: &mut [Result<Option<Step>>]) -> Result<()> {
        let Way::Cpu(cpu) = &mut self.way else { return Ok(()) };
        let held = |speaker: &Speaker| match &speaker.state.cache {
            Cache::Pages(pages) => pages.as_ref().map_or(0, Pages::len),
            Cache::Row(_) => 0,
        };
        let counts = parts(speakers, PREFILL, held);
        // Those with the same adapters side by side.
        let mut order: Vec<usize> = (0..speakers.len()).filter(|&i| counts[i] > 0).collect();
        order.sort_by_key(|&i| speakers[i].adapted.number);
        let mut turns = Vec::new();
        let mut slots: Vec<Option<&mut &mut Speaker>> = speakers.iter_mut().map(Some).collect();
        for i in order {
            let speaker = slots[i].take().context("each speaks once")?;
            let Speaker { adapted, state, .. } = &mut **speaker;
            if let Cache::Pages(pages @ None) = &mut state.cache {
                *pages = Some(cpu.begin(self.prefixes.find(adapted.number, &state.ids)));
            }
            turns.push((i, &**adapted, &mut **state));
        }
        let mut spans = Vec::new();
        for (i, adapted, state) in &mut turns {
            let AdaptedKind::Cpu(adapters) = &adapted.kind else { continue };
            let State { ids, cache: Cache::Pages(Some(pages)), .. } = &mut **state else { continue };
            let unseen = &ids[pages.len()..];
            let count = counts[*i].min(unseen.len());
            spans.push(Span { ids: &unseen[..count], adapters, speaks: count == unseen.len(), pages });
        }
        let logits = cpu.forward(&mut spans)?;
        for ((i, adapted, state), logits) in turns.iter_mut().zip(logits) {
            let Some(logits) = logits else { continue };
            if state.voice.generated() == 0
                && let Cache::Pages(Some(pages)) = &state.cache
            {
                // The next answer to this prompt need not wait for the end of this one.
                self.prefixes.keep(adapted.number, &state.ids, pages.full());
            }
            results[*i] = state.say(logits);
        }
        self.shrink();
        Ok(())
    }
}

/// How many tokens each speaker reads in the next step: those who decode one, and those who read share what is left, the
/// first first. `held` says how many one has read.
fn parts(speakers: &[&mut Speaker], prefill: Prefill, held: impl Fn(&Speaker) -> usize) -> Vec<usize> {
    let unseen = |speaker: &&mut Speaker| {
        if speaker.state.voice.is_done() { 0 } else { speaker.state.ids.len() - held(speaker) }
    };
    let unseen: Vec<usize> = speakers.iter().map(unseen).collect();
    let mut left = if unseen.contains(&1) { prefill.beside } else { prefill.alone };
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
