//! What a device with a watchdog and little memory asks for, as plain logic: Apple's GPUs end a command buffer
//! that runs too long, and any GPU's memory ends. Both are answered by less work at a time.

use std::cell::Cell;

use anyhow::Result;
use tch::Device;

/// Shares of the recommended memory that MPS allocates at most, and from which it gives memory back. libtorch
/// reads them from these variables when it is loaded, so the process that starts the worker sets them.
pub const WATERMARKS: [(&str, &str); 2] =
    [("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "0.8"), ("PYTORCH_MPS_LOW_WATERMARK_RATIO", "0.7")];

/// Tokens of one micro-batch on MPS at most: its forward and backward passes are what the watchdog times.
pub const MICRO_TOKENS_MAX: usize = 4096;

/// Tokens of a micro-batch on `device`, where the user asks for `asked`.
pub fn micro_tokens(asked: usize, device: Device) -> usize {
    if device == Device::Mps { asked.min(MICRO_TOKENS_MAX) } else { asked }
}

/// What a device's error means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// A command buffer ran for too long and was ended.
    Watchdog,
    /// Memory ran out.
    OutOfMemory,
    /// Anything else: less work would not help.
    Other,
}

/// Reads an error of libtorch, of Metal or of CUDA, in any letter case.
pub fn classify(error: &str) -> Trouble {
    let error = error.to_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| error.contains(word));
    if says(&[
        "out of memory",
        "outofmemory",
        "insufficient memory",
        "can't allocate memory",
        "cannot allocate memory",
    ]) {
        return Trouble::OutOfMemory;
    }
    if says(&[
        "caused gpu timeout error",
        "kiogpucommandbuffercallbackerrortimeout",
        "caused gpu hang error",
        "kiogpucommandbuffercallbackerrorhang",
        "impacting interactivity",
        "the launch timed out and was terminated",
    ]) {
        return Trouble::Watchdog;
    }
    Trouble::Other
}

/// Runs `attempt` with at most `limit` tokens in a micro-batch; where the device had too much at once, again with
/// half, for as long as a micro-batch holds several sequences. What was found to fit stays in `limit`.
///
/// `attempt` says how many sequences its largest micro-batch held, and must leave nothing behind when it fails.
///
/// # Errors
/// That of the last attempt.
pub fn fit<T>(limit: &Cell<usize>, mut attempt: impl FnMut(usize) -> (usize, Result<T>)) -> Result<T> {
    loop {
        let (sequences, result) = attempt(limit.get());
        let Err(error) = result else { return result };
        let trouble = classify(&format!("{error:#}"));
        if trouble == Trouble::Other {
            return Err(error);
        }
        if sequences <= 1 || limit.get() <= 1 {
            return Err(error.context(
                "the device cannot take even one sequence at a time: learn shorter ones (ingest.max_seq_len)",
            ));
        }
        limit.set(limit.get() / 2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use crate::learner::{Learner, LearnerConfig, Outcome};
    use crate::pack::Sequence;
    use anyhow::bail;
    use std::ops::ControlFlow;

    #[test]
    fn only_mps_limits_what_is_asked_for() {
        assert_eq!(micro_tokens(100_000, Device::Mps), MICRO_TOKENS_MAX);
        assert_eq!((micro_tokens(64, Device::Mps), micro_tokens(100_000, Device::Cpu)), (64, 100_000));
    }

    #[test]
    fn errors_are_told_apart() {
        for (text, trouble) in [
            ("MPS backend out of memory (MPS allocated: 9.0 GB, max allowed: 9.07 GB)", Trouble::OutOfMemory),
            ("CUDA out of memory. Tried to allocate 2.00 GiB", Trouble::OutOfMemory),
            (
                "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
                Trouble::OutOfMemory,
            ),
            (
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
                Trouble::OutOfMemory,
            ),
            (
                "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)",
                Trouble::Watchdog,
            ),
            ("Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)", Trouble::Watchdog),
            ("CUDA error: the launch timed out and was terminated", Trouble::Watchdog),
            ("shape mismatch: timeout of 3", Trouble::Other),
        ] {
            assert_eq!(classify(text), trouble, "{text}");
        }
    }

    /// Micro-batches of at most `limit` tokens.
    fn cut(sequences: &[Sequence], limit: usize) -> Vec<Vec<Sequence>> {
        sequences.chunks((limit / 12).max(1)).map(<[Sequence]>::to_vec).collect()
    }

    #[test]
    fn a_device_that_is_given_less_learns_the_same() {
        let sequences: Vec<Sequence> =
            (0..8).map(|i| Sequence::whole((0..12).map(|t| (t * 5 + i * 31) % 128).collect())).collect();
        let learner = || {
            Learner::new(golden::base("llama"), &golden::initial(), None, LearnerConfig::default()).unwrap()
        };
        let go = || ControlFlow::Continue(());
        let whole = learner().step(&cut(&sequences, 96), 1e-2, &mut { go }).unwrap();
        let (mut learner, limit, mut attempts) = (learner(), Cell::new(96), 0);
        let split = fit(&limit, |tokens| {
            attempts += 1;
            let batches = cut(&sequences, tokens);
            let largest = batches.iter().map(Vec::len).max().unwrap_or(0);
            let result = if largest * 12 > 30 {
                Err(anyhow::anyhow!("Caused GPU Timeout Error"))
            } else {
                learner.step(&batches, 1e-2, &mut { go })
            };
            (largest, result)
        })
        .unwrap();
        assert_eq!((attempts, limit.get(), split.outcome), (3, 24, Outcome::Applied));
        assert_eq!((split.tokens, learner.steps()), (whole.tokens, 1));
        assert_eq!(split.scores.iter().flatten().count(), sequences.len());
        assert!((split.loss - whole.loss).abs() < 1e-6);
        assert!((split.grad_norm / whole.grad_norm - 1.0).abs() < 1e-5);
    }

    #[test]
    fn one_sequence_that_is_too_much_and_any_other_error_are_told() {
        let (limit, mut tried) = (Cell::new(64), Vec::new());
        let error = fit(&limit, |tokens| -> (usize, Result<()>) {
            tried.push(tokens);
            (tokens / 16, Err(anyhow::anyhow!("CUDA out of memory")))
        })
        .unwrap_err();
        assert_eq!(tried, [64, 32, 16]);
        assert!(format!("{error:#}").contains("even one sequence"), "{error:#}");
        let fail = |_: usize| -> Result<()> { bail!("shape mismatch") };
        let limit = Cell::new(64);
        assert!(fit(&limit, |tokens| (9, fail(tokens))).is_err());
        assert_eq!(limit.get(), 64);
    }
}
