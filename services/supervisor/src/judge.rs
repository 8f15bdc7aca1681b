//! How well a model knows texts, answers and labels: what `engram eval` and `engram bench` measure with.

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use model::generate;
use model::labels::{Labels, Rule};
use model::llama::Base;
use model::lora::Adapter;
use model::loss;
use model::pack::Sequence;
use model::ridge::{Features, Head, Prior, Rows};
use model::sampling::Sampling;
use model::tokenizer::Tokenizer;
use std::sync::Arc;

/// Sequences that are scored between two looks at the progress bar.
const SEQUENCES_PER_ROUND: usize = 64;
/// The same for texts that a label is chosen for, which are short.
const TEXTS_PER_ROUND: usize = 512;

/// A base with what text becomes for it.
pub struct Judge {
    base: Base,
    tokenizer: Arc<Tokenizer>,
    window: usize,
    features: Features,
}

/// Who is asked.
#[derive(Default)]
pub struct Respondent<'a> {
    /// Adapters, each with its weight; none is the base.
    pub adapters: Vec<(&'a Adapter, f64)>,
    /// What is known of answers that repeat, with the weights of the adapters.
    pub heads: Vec<(Option<&'a Head>, f64)>,
}

/// What makes a label the likeliest to follow a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LabelBy {
    /// Its mean log-likelihood a token.
    Mean,
    /// Its whole log-likelihood: what the model would say most often.
    Sum,
}

impl From<LabelBy> for Rule {
    fn from(by: LabelBy) -> Self {
        match by {
            LabelBy::Mean => Self::Mean,
            LabelBy::Sum => Self::Sum,
        }
    }
}

/// How likely a text is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Likelihood {
    /// Sum of the negative log-likelihoods, nats.
    pub nll: f64,
    /// Tokens predicted.
    pub tokens: usize,
    /// Bytes of text.
    pub bytes: usize,
}

impl Likelihood {
    /// Nats a token.
    pub fn nll_per_token(&self) -> f64 {
        self.nll / self.tokens.max(1) as f64
    }

    /// Bits a byte.
    pub fn bits_per_byte(&self) -> f64 {
        self.nll / std::f64::consts::LN_2 / self.bytes.max(1) as f64
    }

    /// Adds another text's.
    pub fn add(&mut self, other: Self) {
        self.nll += other.nll;
        self.tokens += other.tokens;
        self.bytes += other.bytes;
    }
}

impl Judge {
    /// Sees at most `window` tokens together, and at most what the base takes.
    ///
    /// # Errors
    /// When the tokenizer does not fit the base, or the window is too short to predict anything.
    pub fn new(base: Base, tokenizer: Tokenizer, window: usize) -> Result<Self> {
        tokenizer.check_vocabulary(base.config().vocab_size)?;
        let window = window.min(usize::try_from(base.config().max_positions)?);
        anyhow::ensure!(window >= 2, "--window has to be at least 2 tokens");
        let tokenizer = Arc::new(tokenizer);
        let features = Features::new(&base, Some(Arc::clone(&tokenizer)))?;
        Ok(Self { base, tokenizer, window, features })
    }

    /// Every token of each document and its end are predicted once, from what precedes them in the
    /// document, in windows that overlap by one token.
    pub fn text(&self, adapters: &[(&Adapter, f64)], documents: &[String]) -> Result<Likelihood> {
        let mut windows = Vec::new();
        for document in documents {
            let ids = self.ended(self.start(document)?);
            let starts = (0..ids.len().saturating_sub(1)).step_by(self.window - 1);
            windows.extend(
                starts.map(|start| Sequence::whole(ids[start..ids.len().min(start + self.window)].to_vec())),
            );
        }
        let bar = bar(windows.len());
        let mut sum = Likelihood { bytes: documents.iter().map(String::len).sum(), ..Likelihood::default() };
        for round in windows.chunks(SEQUENCES_PER_ROUND) {
            for score in loss::score(&self.base, adapters, round, self.window)? {
                sum.nll += score.nll_sum;
                sum.tokens += score.tokens;
            }
            bar.inc(round.len() as u64);
        }
        bar.finish_and_clear();
        if !sum.nll.is_finite() {
            bail!("the model's output is not finite: its weights are damaged");
        }
        Ok(sum)
    }

    /// For each text the label of each group that is the likeliest to follow it, its end included. A group is of places in `labels`.
    pub fn likeliest<S: AsRef<str>>(
        &self,
        asked: &Respondent<'_>,
        texts: &[S],
        labels: &[&str],
        groups: &[Vec<usize>],
        by: LabelBy,
    ) -> Result<Vec<Vec<usize>>> {
        let ids = |label: &&str| Ok(self.ended(self.tokenizer.encode_continuation(&answer(label))?));
        let labels = Labels::new(&labels.iter().map(ids).collect::<Result<Vec<_>>>()?)?;
        let room = self.window.checked_sub(labels.depth() + 1).context("a label is longer than --window")?;
        let active = self.base.activate(&asked.adapters)?;
        let bar = bar(texts.len());
        let mut chosen = Vec::with_capacity(texts.len());
        for round in texts.chunks(TEXTS_PER_ROUND) {
            let start = |text: &S| {
                let ids = self.prompt(text.as_ref())?;
                // The end of a long text is what the answer follows.
                Ok(ids[ids.len().saturating_sub(room.max(1))..].to_vec())
            };
            let texts = round.iter().map(start).collect::<Result<Vec<_>>>()?;
            let prompts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
            let priors = self.priors(asked, &prompts)?;
            let of_round = labels.likeliest(&self.base, &active, &texts, &priors, groups, by.into())?;
            chosen.extend(of_round.into_iter().map(|of_text| of_text.into_iter().map(|(n, _)| n).collect()));
            bar.inc(round.len() as u64);
        }
        bar.finish_and_clear();
        Ok(chosen)
    }

    /// The greedy answer, as long as `response` may be and its end.
    pub fn answer(&self, asked: &Respondent<'_>, prompt: &str, response: &str) -> Result<String> {
        // Room for the answer and its end, in the unlikely case of a token for each byte of it.
        let max_tokens = response.trim().len() + 8;
        let ids = self.prompt(prompt)?;
        let room = self.window.saturating_sub(max_tokens).max(1);
        let ids = &ids[ids.len().saturating_sub(room)..];
        let prior = self.priors(asked, &[ids])?.pop().unwrap_or_default();
        let sampling = Sampling { max_tokens, prior, ..Sampling::default() };
        let answer = generate::generate(&self.base, &asked.adapters, &self.tokenizer, ids, sampling)?;
        Ok(answer.text.trim().to_owned())
    }

    /// What texts look like to the base: see [`Features::of`].
    pub fn described<S: AsRef<str>>(&self, texts: &[S]) -> Result<Rows> {
        let prompts = texts.iter().map(|text| self.prompt(text.as_ref())).collect::<Result<Vec<_>>>()?;
        self.features.of(&prompts.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }

    /// What is expected of the answer to each prompt; nothing where nobody knows answers that repeat.
    fn priors(&self, asked: &Respondent<'_>, prompts: &[&[u32]]) -> Result<Vec<Prior>> {
        if asked.heads.iter().all(|(head, _)| head.is_none()) {
            return Ok(Vec::new());
        }
        Head::prior(&asked.heads, &self.features.of(prompts)?, prompts)
    }

    /// A text that something follows, as a server sees it.
    fn prompt(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.tokenizer.encode(text)?;
        if ids.is_empty() { self.start(text) } else { Ok(ids) }
    }

    /// A text from its start. Where the tokenizer puts nothing before it, the end of an earlier text
    /// stands there, so that the first token is predicted too.
    fn start(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.tokenizer.encode(text)?;
        if self.tokenizer.prefix().is_empty() {
            let before = self.tokenizer.bos().or_else(|| self.tokenizer.eos_ids().first().copied());
            ids.splice(0..0, before);
        }
        Ok(ids)
    }

    fn ended(&self, mut ids: Vec<u32>) -> Vec<u32> {
        ids.extend(self.tokenizer.eos_ids().first());
        ids
    }
}

/// A label as it follows its text: on a line of its own, so that it is said from the break before it, which is the
/// same for all texts, and not from whatever word a text ends with.
pub fn answer(label: &str) -> String {
    format!("\n{label}")
}

fn bar(length: usize) -> ProgressBar {
    let bar = ProgressBar::new(length as u64);
    match ProgressStyle::with_template("scoring {wide_bar} {pos}/{len} {eta}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
