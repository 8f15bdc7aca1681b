//! Answers that go through the base together, by the passes that serve, without the requests around them.

use super::subject::Subject;
use anyhow::{Result, bail, ensure};
use model::batch::{Adapted, Batch, NotBegun, Speaker};
use model::lora::{Adapter, LoraConfig};
use model::sampling::Sampling;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Instant;

/// What answers, and with which adapters.
pub struct Together<'a> {
    subject: &'a Subject,
    batch: Batch,
    adapted: Vec<Rc<Adapted>>,
    logit_bias: BTreeMap<u32, f64>,
    /// Prompts asked so far, of which no two are equal.
    asked: u64,
}

impl<'a> Together<'a> {
    /// Answers whose keys and values take `cache_bytes` at most, spread over so many adapters; with none it is the base
    /// that answers.
    ///
    /// # Errors
    /// When the base cannot be prepared for answers.
    pub fn new(subject: &'a Subject, cache_bytes: usize, adapters: u64) -> Result<Self> {
        let mut batch = subject.batch(cache_bytes)?;
        let mut adapted = Vec::new();
        for number in 0..adapters {
            adapted.push(batch.adapt(&[(&adapter(subject, number)?.to_device(subject.base.device()), 1.0)])?);
        }
        if adapted.is_empty() {
            adapted.push(batch.adapt(&[])?);
        }
        let logit_bias = subject.endless().into_iter().map(|(id, bias)| (id, f64::from(bias))).collect();
        Ok(Self { subject, batch, adapted, logit_bias, asked: 0 })
    }

    /// Answers as many prompts of `prompt` tokens at once, each with so many `tokens`; seconds of each pass in which all
    /// of them decoded.
    ///
    /// # Errors
    /// When an answer cannot be begun, or a pass fails.
    pub fn answer(&mut self, streams: usize, prompt: usize, tokens: usize) -> Result<Vec<f64>> {
        let mut speakers = Vec::new();
        for stream in 0..streams {
            speakers.push(self.begin(stream, prompt, tokens)?);
        }
        let mut passes = Vec::new();
        loop {
            let decoding = speakers.iter().all(|speaker| speaker.generated() > 0);
            let mut running: Vec<&mut Speaker> =
                speakers.iter_mut().filter(|speaker| speaker.generated() < tokens).collect();
            if running.is_empty() {
                break;
            }
            let all = decoding && running.len() == streams;
            let started = Instant::now();
            for step in self.batch.step(&mut running) {
                step?;
            }
            if all {
                passes.push(started.elapsed().as_secs_f64());
            }
        }
        for speaker in speakers {
            self.batch.end(speaker);
        }
        Ok(passes)
    }

    fn begin(&mut self, stream: usize, prompt: usize, tokens: usize) -> Result<Speaker> {
        self.asked += 1;
        let prompt = self.subject.prompt(prompt, self.asked);
        let sampling =
            Sampling { max_tokens: tokens, logit_bias: self.logit_bias.clone(), ..Sampling::default() };
        let adapted = &self.adapted[stream % self.adapted.len()];
        match self.batch.begin(adapted, &self.subject.language.tokenizer, &prompt, sampling) {
            Ok(speaker) => Ok(speaker),
            Err(NotBegun::Refused(error)) => Err(error),
            Err(NotBegun::TooLong(message)) => bail!("{message}"),
            Err(NotBegun::Later) => {
                bail!(
                    "so many answers have no room at once: raise infer.cache_mb_max, or ask for fewer or shorter ones"
                )
            }
        }
    }

    /// Tokens whose keys and values are kept of prompts that were answered.
    pub fn kept_tokens(&self) -> usize {
        self.batch.kept_tokens()
    }
}

/// Refuses what is longer than the base's context.
///
/// # Errors
/// Says how long that is.
pub fn ensure_fits(subject: &Subject, length: u64) -> Result<()> {
    let context = subject.base.config().max_positions;
    ensure!(
        i64::try_from(length).is_ok_and(|length| length <= context),
        "{length} tokens are more than the base's context of {context}; ask for fewer"
    );
    Ok(())
}

/// An adapter with an effect, another one for each number.
///
/// # Errors
/// When the base has no place for it.
pub fn adapter(subject: &Subject, number: u64) -> Result<Adapter> {
    let fresh = Adapter::new(LoraConfig::default(), subject.base.config(), number)?;
    // A fresh one changes nothing: its B is zero.
    fresh.with_flat(fresh.flat() + 0.001)
}
