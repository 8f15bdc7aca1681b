//! Pre-training: from folders of text to a base that `engram up` and transformers load.
//!
//! [`corpus`] reads and orders the texts, [`bpe`] learns the tokens, [`preset`] says what to train and how and
//! [`plan`] what that takes; `run.rs` is the loop, `trainer.rs` and `muon.rs` are one step of it, [`state`] is what
//! it goes on from after an end or a crash. [`folder`] writes the result, [`curve`] draws the way there and
//! [`evaluate`] tells how good it is.

pub mod bpe;
pub mod corpus;
pub mod curve;
pub mod evaluate;
pub mod folder;
mod muon;
pub mod plan;
pub mod preset;
mod run;
pub mod state;
mod trainer;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::device::Placement;
use crate::distillation::{Mix, Teacher};
use crate::llama::Base;
use crate::tokenizer::Tokenizer;
use corpus::Corpus;
use evaluate::TextScore;
use preset::Preset;

/// How long to train.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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
    /// How long to train, in all.
    pub budget: Budget,
    /// Decides the first weights and the order of the windows.
    pub seed: u64,
    /// Where to train, and in what precision to compute. Weights and optimiser state are f32.
    pub placement: Placement,
    /// The folder of a base whose logits are learned from too, and how much. Its tokenizer is taken over.
    pub teacher: Option<(PathBuf, Mix)>,
    /// Go on with the run whose state lies in `out`.
    pub resume: bool,
    /// How often the state is saved.
    pub save_every: Duration,
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
    /// A run goes on.
    Resumed {
        /// Steps it had made.
        step: u64,
        /// Time it had taken.
        elapsed: Duration,
    },
    /// A step was made.
    Step(StepReport),
    /// The beginnings of the held-out texts were scored on the way.
    Point(state::Point),
    /// The run was stopped before its rates had fallen to zero.
    Stopped {
        /// Time it has taken so far.
        elapsed: Duration,
        /// Steps made so far.
        step: u64,
        /// Whether they had begun to fall.
        falling: bool,
    },
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
    /// Since the first step began, in all sittings.
    pub elapsed: Duration,
    /// Tokens learned in a second, over the last steps.
    pub tokens_per_s: f64,
    /// How long it will go on.
    pub left: Duration,
}

/// Trains a tokenizer and a base on folders of text, and writes them as a Hugging Face folder.
///
/// # Errors
/// When a text cannot be read, the folder cannot be written or already holds a run, or the loss stops being
/// finite.
pub fn run(options: &PretrainOptions, report: &mut dyn FnMut(Progress)) -> Result<()> {
    let config = options.preset.model()?;
    let data = &options.preset.data;
    let (training, held_out) = corpus::texts(&options.data)?;
    let folder = options.out.join(state::FOLDER);
    let begun = folder.join(state::LAST).exists();
    ensure!(
        options.resume || !begun,
        "{} already holds a run: go on with it by --resume, or delete it, or give another --out",
        folder.display()
    );
    ensure!(begun || !options.resume, "{} holds no run to resume: leave out --resume", folder.display());
    fs::create_dir_all(&folder).with_context(|| format!("{}: cannot create", folder.display()))?;

    let teacher = match &options.teacher {
        Some((folder, mix)) => Some(Teacher::new(Base::load(folder, &options.placement)?, *mix)?),
        None => None,
    };
    if let (Some((from, _)), Some(teacher)) = (&options.teacher, &teacher) {
        check_teacher(teacher, options)?;
        folder::copy_tokenizer(from, &options.out)?;
    } else if !options.resume {
        bpe::train(&training, config.vocab_size as usize, data.tokenizer_bytes_max)
            .and_then(|tokenizer| bpe::write(&tokenizer, config.max_positions as usize, &options.out))?;
    }
    let tokenizer = Tokenizer::load(&options.out)?;
    let end = *tokenizer.eos_ids().first().context("the tokenizer has no end of text")?;
    ensure!(config.eos.contains(&end), "the preset's eos_token_id has to be {end}, which ends a text");
    report(Progress::Tokenizer);

    let token_file = folder.join("tokens.part");
    let corpus = Corpus::build(&tokenizer, end, &training, &token_file)?;
    report(Progress::Corpus {
        texts: corpus.sources().map(|(name, tokens)| (name.to_string(), tokens)).collect(),
    });
    let base = run::Run::new(options, &corpus, &tokenizer, &held_out, teacher)?.train(report)?;
    fs::remove_file(&token_file).with_context(|| format!("{}: cannot remove", token_file.display()))?;
    folder::write(&base, &options.out)?;

    // What is scored is what was written.
    let base = Base::load(&options.out, &options.placement)?;
    for path in &held_out {
        let score = evaluate::text(&base, &tokenizer, path, data.window_tokens, data.validation_bytes_max)?;
        report(Progress::Validation { name: short_name(path), score });
    }
    Ok(())
}

/// A teacher and its student have to speak of the same tokens, in windows that both can read.
fn check_teacher(teacher: &Teacher, options: &PretrainOptions) -> Result<()> {
    let (student, teacher) = (options.preset.model()?, teacher.base().config());
    ensure!(
        student.vocab_size == teacher.vocab_size,
        "the preset's vocab_size is {}, and the teacher's is {}: they have to be equal",
        student.vocab_size,
        teacher.vocab_size
    );
    ensure!(
        options.preset.data.window_tokens as i64 <= teacher.max_positions,
        "window_tokens is {}, more than the teacher's context of {}",
        options.preset.data.window_tokens,
        teacher.max_positions
    );
    Ok(())
}

fn short_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.split('.').next().unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::corpus::END_OF_TEXT;
    use super::*;
    use crate::active::ActiveAdapters;
    use crate::device::Precision;
    use crate::golden;
    use std::sync::atomic::Ordering;
    use tch::{Kind, Tensor};
    use tempfile::tempdir;

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
        matrices = "muon"
        micro_tokens = 128
        batch_windows = 8
        muon_rate = 0.02
        muon_momentum = 0.9
        adamw_rate = 0.01
        clip = 1.0
        warmup_steps = 2
        decay_share = 0.5
    "#;

    fn corpus_folder() -> tempfile::TempDir {
        let folder = tempdir().unwrap();
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
            teacher: None,
            resume: false,
            save_every: Duration::from_secs(3600),
            stop: Arc::default(),
        }
    }

    #[test]
    fn a_base_learns_its_text_and_loads_again() {
        let data = corpus_folder();
        let out = tempdir().unwrap();
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

    /// `tests/golden/pretrained` was written by `engram pretrain`, and its reference by transformers 5.23 from
    /// that very folder.
    #[test]
    fn what_is_written_means_the_same_to_transformers() {
        let base = golden::base("pretrained");
        let golden = golden::tensors("pretrained/golden.safetensors");
        let logits = golden::logits(&base, &ActiveAdapters::none(), &golden["input_ids"]);
        assert!(golden::distance(&logits, &golden["logits"]) < 1e-4);
        let tokenizer = Tokenizer::load(&golden::dir("pretrained")).unwrap();
        let text = "The sheep went over every hill, 42 times. A keeper belongs to the clock";
        let ids: Vec<i64> = tokenizer.encode(text).unwrap().into_iter().map(i64::from).collect();
        assert_eq!(Vec::<i64>::try_from(golden["input_ids"].get(0)).unwrap(), ids[..24]);
        assert_eq!(Vec::<i64>::try_from(golden["input_ids"].get(1)).unwrap(), ids[ids.len() - 24..]);
    }

    #[test]
    fn equal_seeds_give_equal_weights() {
        let data = corpus_folder();
        let weights = || {
            let out = tempdir().unwrap();
            run(&options(data.path(), out.path(), 3), &mut |_| ()).unwrap();
            fs::read(out.path().join("model.safetensors")).unwrap()
        };
        assert!(weights() == weights());
    }

    #[test]
    fn a_run_that_was_stopped_and_resumed_ends_with_the_same_weights() {
        let data = corpus_folder();
        let bytes = |out: &Path| fs::read(out.join("model.safetensors")).unwrap();
        for precision in [Precision::F32, Precision::Bf16] {
            let run_to = |out: &Path, stop_at: u64, resume: bool| {
                let mut options = options(data.path(), out, 8);
                options.placement.precision = precision;
                options.resume = resume;
                run(&options, &mut |progress| match progress {
                    Progress::Step(step) if step.step == stop_at => {
                        options.stop.store(true, Ordering::Relaxed)
                    }
                    _ => {}
                })
                .unwrap();
            };
            let (whole, parts) = (tempdir().unwrap(), tempdir().unwrap());
            run_to(whole.path(), u64::MAX, false);
            // Before the rates fall, while they fall, and to the end.
            for (stop_at, resume) in [(3, false), (6, true), (u64::MAX, true)] {
                run_to(parts.path(), stop_at, resume);
            }
            assert!(bytes(whole.path()) == bytes(parts.path()), "{precision:?}");
        }
    }

    #[test]
    fn a_longer_run_goes_on_from_before_the_rates_fell() {
        let data = corpus_folder();
        let out = tempdir().unwrap();
        run(&options(data.path(), out.path(), 8), &mut |_| ()).unwrap();
        let longer = PretrainOptions { resume: true, ..options(data.path(), out.path(), 12) };
        let mut first = None;
        run(&longer, &mut |progress| {
            if let Progress::Resumed { step, .. } = progress {
                first = Some(step);
            }
        })
        .unwrap();
        // The rates of 8 steps fall after the half, which 4 steps had just reached.
        assert_eq!(first, Some(5));
        let state = state::record(&out.path().join("training").join(state::LAST)).unwrap();
        assert_eq!(state.step, 12);
    }

    #[test]
    fn a_run_is_not_overwritten_and_not_resumed_with_other_settings() {
        let data = corpus_folder();
        let out = tempdir().unwrap();
        let options = options(data.path(), out.path(), 2);
        let none = PretrainOptions { resume: true, ..options.clone() };
        let none = run(&none, &mut |_| ()).unwrap_err().to_string();
        assert!(none.contains("no run to resume"), "{none}");
        run(&options, &mut |_| ()).unwrap();
        let again = run(&options, &mut |_| ()).unwrap_err().to_string();
        assert!(again.contains("--resume"), "{again}");
        let other = PretrainOptions { resume: true, seed: 4, ..options };
        let other = run(&other, &mut |_| ()).unwrap_err().to_string();
        assert!(other.contains("another seed"), "{other}");
    }

    #[test]
    fn gradients_of_parts_add_up_to_those_of_the_whole_step() {
        let data = corpus_folder();
        let losses = |micro_tokens: usize| {
            let out = tempdir().unwrap();
            let mut options = options(data.path(), out.path(), 4);
            options.preset.optimiser.micro_tokens = micro_tokens;
            let mut losses = Vec::new();
            run(&options, &mut |progress| {
                if let Progress::Step(step) = progress {
                    losses.push(step.loss);
                }
            })
            .unwrap();
            losses
        };
        for (whole, parts) in losses(1024).iter().zip(losses(32)) {
            assert!((whole - parts).abs() < 1e-4 * whole, "{whole} {parts}");
        }
    }

    #[test]
    fn a_student_speaks_its_teachers_tokens_and_comes_nearer_to_it() {
        let data = corpus_folder();
        let (large, alone, taught) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
        run(&options(data.path(), large.path(), 40), &mut |_| ()).unwrap();
        // A text on which the teacher thinks otherwise than who learns from the text alone.
        let other = tempdir().unwrap();
        let text: String =
            (0..300).map(|i| format!("hill the over {i} went sheep\n{END_OF_TEXT}\n")).collect();
        fs::write(other.path().join("other.txt"), text).unwrap();
        let teacher = Base::load(large.path(), &Placement::CPU_F32).unwrap();
        let tokenizer = Tokenizer::load(large.path()).unwrap();
        let divergence = |out: &Path, alpha: f64| {
            let mut options = options(other.path(), out, 20);
            options.preset =
                Preset::parse(&TINY.replace("num_hidden_layers = 2", "num_hidden_layers = 1")).unwrap();
            options.teacher = Some((large.path().to_path_buf(), Mix { alpha, temperature: 2.0 }));
            run(&options, &mut |_| ()).unwrap();
            let student = Base::load(out, &Placement::CPU_F32).unwrap();
            let ids = tokenizer.encode("hill the over 77 went sheep").unwrap();
            let ids =
                Tensor::from_slice(&ids.iter().map(|&id| i64::from(id)).collect::<Vec<_>>()).unsqueeze(0);
            let log_probs = |base: &Base| {
                golden::logits(base, &ActiveAdapters::none(), &ids).log_softmax(-1, Kind::Float)
            };
            let (p, q) = (log_probs(&student), log_probs(&teacher));
            (q.exp() * (q - p)).sum(Kind::Float).double_value(&[])
        };
        let (without, with) = (divergence(alone.path(), 0.0), divergence(taught.path(), 1.0));
        assert!(with < 0.5 * without, "{with} {without}");
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            let read = |out: &Path| fs::read(out.join(file)).unwrap();
            assert!(read(large.path()) == read(taught.path()), "{file}");
        }

        let mut wrong = options(data.path(), &taught.path().join("other"), 2);
        wrong.preset = Preset::parse(&TINY.replace("vocab_size = 300", "vocab_size = 310")).unwrap();
        wrong.teacher = Some((large.path().to_path_buf(), Mix { alpha: 0.5, temperature: 2.0 }));
        let error = run(&wrong, &mut |_| ()).unwrap_err().to_string();
        assert!(error.contains("vocab_size is 310"), "{error}");
    }

    #[test]
    fn a_stop_ends_the_run_and_still_writes_the_base() {
        let data = corpus_folder();
        let out = tempdir().unwrap();
        let options = options(data.path(), out.path(), u64::MAX);
        run(&options, &mut |progress| {
            if matches!(progress, Progress::Step(step) if step.step == 2) {
                options.stop.store(true, Ordering::Relaxed);
            }
        })
        .unwrap();
        Base::load(out.path(), &Placement::CPU_F32).unwrap();
        assert!(!out.path().join("training/tokens.part").exists());
        assert!(out.path().join("training/loss.svg").is_file());
    }

    #[test]
    fn folders_without_text_are_an_error() {
        let empty = tempdir().unwrap();
        let out = tempdir().unwrap();
        let error = run(&options(empty.path(), out.path(), 1), &mut |_| ()).unwrap_err();
        assert!(error.to_string().contains("no .txt file"), "{error}");
    }
}
