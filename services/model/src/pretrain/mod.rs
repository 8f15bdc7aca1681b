//! Pre-training: from folders of text to a base that `engram up` and transformers load.
//!
//! [`corpus`] reads and orders the texts, [`bpe`] learns the tokens, [`preset`] says what to train and how,
//! [`folder`] writes the result and [`evaluate`] tells how good it is. The loop is here; how weights move in one
//! step is in `trainer.rs` and `muon.rs`.

pub mod bpe;
pub mod corpus;
pub mod evaluate;
pub mod folder;
mod muon;
pub mod preset;
mod trainer;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::device::Placement;
use crate::llama::Base;
use crate::pack::Sequence;
use crate::tokenizer::Tokenizer;
use corpus::{Corpus, END_OF_TEXT, Order};
use evaluate::TextScore;
use preset::Preset;
use trainer::Trainer;

/// How long to train.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// By the clock: the schedule stretches to whatever this machine gets done.
    Time(Duration),
    /// By steps: the same weights every time, on the same machine with the same number of threads.
    Steps(u64),
}

/// What to pre-train.
#[derive(Clone, Debug)]
pub struct PretrainOptions {
    /// The shape, and how it is trained.
    pub preset: Preset,
    /// Folders of texts: `*.val.txt` is held out, every other `*.txt` is trained on.
    pub data: Vec<PathBuf>,
    /// The folder to write; it is made where it does not exist.
    pub out: PathBuf,
    /// How long to train.
    pub budget: Budget,
    /// Decides the first weights and the order of the windows.
    pub seed: u64,
    /// Where to train, in f32: sums of many small steps do not survive in less.
    pub placement: Placement,
    /// Set by Ctrl-C: the step that runs is finished, and what was learned is written.
    pub stop: Arc<AtomicBool>,
}

/// What is going on, as it happens.
#[derive(Clone, Debug, PartialEq)]
pub enum Progress {
    /// The tokenizer is trained.
    Tokenizer,
    /// The texts are tokenised.
    Corpus {
        /// Name and number of tokens of each.
        texts: Vec<(String, u64)>,
    },
    /// A step was made.
    Step(StepReport),
    /// A held-out text was scored, after the last step.
    Validation {
        /// Its file name, up to the first dot.
        name: String,
        /// What it scored.
        score: TextScore,
    },
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Steps made so far.
    pub step: u64,
    /// Tokens learned from so far.
    pub tokens: u64,
    /// Mean NLL of this step, in nats a token.
    pub loss: f64,
    /// How much of the run is done, from 0 to 1.
    pub done: f64,
    /// Since the first step began.
    pub elapsed: Duration,
}

/// Trains a tokenizer and a base on folders of text, and writes them as a Hugging Face folder.
///
/// # Errors
/// When a text cannot be read, the folder cannot be written, or the loss stops being finite.
pub fn run(options: &PretrainOptions, report: &mut dyn FnMut(Progress)) -> Result<()> {
    let config = options.preset.model()?;
    let data = &options.preset.data;
    let (training, held_out) = corpus::texts(&options.data)?;
    fs::create_dir_all(&options.out).with_context(|| format!("{}: cannot create", options.out.display()))?;

    bpe::train(&training, config.vocab_size as usize, data.tokenizer_bytes_max)
        .and_then(|tokenizer| bpe::write(&tokenizer, config.max_positions as usize, &options.out))?;
    let tokenizer = Tokenizer::load(&options.out)?;
    let end = tokenizer.id(END_OF_TEXT).context("the tokenizer has no end of text")?;
    ensure!(config.eos == [end], "the preset's eos_token_id has to be {end}, which is {END_OF_TEXT}");
    report(Progress::Tokenizer);

    let token_file = options.out.join("tokens.part");
    let corpus = Corpus::build(&tokenizer, end, &training, &token_file)?;
    report(Progress::Corpus {
        texts: corpus.sources().map(|(name, tokens)| (name.to_string(), tokens)).collect(),
    });

    let base = train(options, &corpus, report)?;
    fs::remove_file(&token_file).with_context(|| format!("{}: cannot remove", token_file.display()))?;
    folder::write(&base, &options.out)?;
    for path in &held_out {
        let score = evaluate::text(&base, &tokenizer, path, data.window_tokens, data.validation_bytes_max)?;
        report(Progress::Validation { name: short_name(path), score });
    }
    Ok(())
}

fn train(options: &PretrainOptions, corpus: &Corpus, report: &mut dyn FnMut(Progress)) -> Result<Base> {
    let (data, settings) = (&options.preset.data, &options.preset.optimiser);
    let mut order = Order::new(corpus, data.window_tokens, data.mix_exponent, options.seed)?;
    let mut trainer = Trainer::new(options.preset.model()?, &options.placement, settings, options.seed)?;
    let begin = Instant::now();
    let (mut step, mut tokens) = (0, 0);
    loop {
        let done = match options.budget {
            Budget::Time(limit) => begin.elapsed().as_secs_f64() / limit.as_secs_f64(),
            Budget::Steps(limit) => step as f64 / limit as f64,
        };
        // A budget of nothing makes this infinite or not a number, and the run is over at once.
        if done >= 1.0 || done.is_nan() || options.stop.load(Ordering::Relaxed) {
            return Ok(trainer.base);
        }
        let windows = order
            .by_ref()
            .take(settings.batch_windows)
            .map(|start| Ok(Sequence::whole(corpus.read(start, data.window_tokens)?)))
            .collect::<Result<Vec<_>>>()?;
        let warm = ((step + 1) as f64 / settings.warmup_steps as f64).min(1.0);
        let loss = trainer.step(&windows, warm * decay(done, settings.decay_share))?;
        step += 1;
        tokens += windows.iter().map(|window| window.learned_tokens() as u64).sum::<u64>();
        report(Progress::Step(StepReport { step, tokens, loss, done, elapsed: begin.elapsed() }));
    }
}

/// Warm-up, stable, decay (arXiv 2404.06395): full rates until the last `share` of the run, then a straight
/// line to zero.
fn decay(done: f64, share: f64) -> f64 {
    ((1.0 - done) / share).clamp(0.0, 1.0)
}

fn short_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.split('.').next().unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TINY: &str = r#"
        [model]
        model_type = "llama"
        hidden_size = 32
        num_hidden_layers = 2
        num_attention_heads = 2
        num_key_value_heads = 1
        intermediate_size = 64
        vocab_size = 300
        max_position_embeddings = 32
        tie_word_embeddings = true
        eos_token_id = 0

        [data]
        tokenizer_bytes_max = 100_000
        window_tokens = 32
        mix_exponent = 0.5
        validation_bytes_max = 2_000

        [optimiser]
        batch_windows = 8
        muon_rate = 0.02
        muon_momentum = 0.9
        adamw_rate = 0.01
        clip = 1.0
        warmup_steps = 2
        decay_share = 0.5
    "#;

    fn corpus_folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, count) in [("count.txt", 300), ("count.val.txt", 20)] {
            let text: String =
                (0..count).map(|i| format!("{i} sheep went over the hill\n{END_OF_TEXT}\n")).collect();
            fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    fn options(data: &Path, out: &Path, steps: u64) -> PretrainOptions {
        // Threads that share products this small mostly wait for one another.
        tch::set_num_threads(1);
        PretrainOptions {
            preset: Preset::parse(TINY).unwrap(),
            data: vec![data.to_path_buf()],
            out: out.to_path_buf(),
            budget: Budget::Steps(steps),
            seed: 3,
            placement: Placement::CPU_F32,
            stop: Arc::default(),
        }
    }

    #[test]
    fn a_base_learns_its_text_and_loads_again() {
        let data = corpus_folder();
        let out = tempfile::tempdir().unwrap();
        let (mut losses, mut bits) = (Vec::new(), Vec::new());
        run(&options(data.path(), out.path(), 30), &mut |progress| match progress {
            Progress::Step(step) => losses.push(step.loss),
            Progress::Validation { score, .. } => bits.push(score.bits_per_byte()),
            _ => {}
        })
        .unwrap();
        assert_eq!(losses.len(), 30);
        assert!(losses[29] < 0.3 * losses[0], "{losses:?}");

        // bf16 costs a little precision, and nothing else may differ.
        let base = Base::load(out.path(), &Placement::CPU_F32).unwrap();
        let tokenizer = Tokenizer::load(out.path()).unwrap();
        let text = data.path().join("count.val.txt");
        let again = evaluate::text(&base, &tokenizer, &text, 32, 2_000).unwrap().bits_per_byte();
        assert!((again - bits[0]).abs() < 0.02, "{again} {bits:?}");
    }

    #[test]
    fn equal_seeds_give_equal_weights() {
        let data = corpus_folder();
        let weights = || {
            let out = tempfile::tempdir().unwrap();
            run(&options(data.path(), out.path(), 3), &mut |_| ()).unwrap();
            fs::read(out.path().join("model.safetensors")).unwrap()
        };
        assert!(weights() == weights());
    }

    #[test]
    fn a_stop_ends_the_run_and_still_writes_the_base() {
        let data = corpus_folder();
        let out = tempfile::tempdir().unwrap();
        let options = options(data.path(), out.path(), u64::MAX);
        run(&options, &mut |progress| {
            if matches!(progress, Progress::Step(step) if step.step == 2) {
                options.stop.store(true, Ordering::Relaxed);
            }
        })
        .unwrap();
        Base::load(out.path(), &Placement::CPU_F32).unwrap();
        assert!(!out.path().join("tokens.part").exists());
    }

    #[test]
    fn folders_without_text_are_an_error() {
        let empty = tempfile::tempdir().unwrap();
        let out = tempfile::tempdir().unwrap();
        let error = run(&options(empty.path(), out.path(), 1), &mut |_| ()).unwrap_err();
        assert!(error.to_string().contains("no .txt file"), "{error}");
    }
}
