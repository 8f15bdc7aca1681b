//! How learning went lately, second by second, from the metrics that the learner counts.

use crate::metrics::Recorder;
use crate::state::now_ms;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

const EVERY: Duration = Duration::from_secs(1);
/// Beats that are kept: ten minutes of learning.
const BEATS_MAX: usize = 600;
/// A learner that counted no token for this long is not learning.
const IDLE_AFTER_MS: u64 = 2_500;

const LOSS: &str = "engram:train_loss";
const TOKENS: &str = "engram:train_tokens_total";

/// One second in which a lineage was learning.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Beat {
    pub at_ms: u64,
    pub lineage: String,
    /// Mean loss of what is being learned, in the last whole pass over it, nats a token.
    pub loss: f64,
    pub tokens_per_s: f64,
}

/// The last beats.
#[derive(Debug, Default)]
pub(crate) struct Pulse(Mutex<Felt>);

#[derive(Debug, Default)]
struct Felt {
    beats: VecDeque<Beat>,
    at_ms: u64,
    /// Tokens learned by lineage, when last looked.
    tokens: BTreeMap<String, f64>,
}

impl Pulse {
    /// Feels it every second, for ever.
    pub(crate) async fn watch(&self, metrics: &Recorder) {
        loop {
            self.feel(metrics.values(TOKENS), &metrics.values(LOSS), now_ms());
            tokio::time::sleep(EVERY).await;
        }
    }

    fn feel(&self, tokens: Vec<(String, f64)>, losses: &[(String, f64)], now_ms: u64) {
        let mut felt = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let felt = &mut *felt;
        let seconds =
            now_ms.saturating_sub(std::mem::replace(&mut felt.at_ms, now_ms)).max(1) as f64 / 1000.0;
        for (lineage, total) in tokens {
            let before = felt.tokens.insert(lineage.clone(), total).unwrap_or(0.0);
            let loss = losses.iter().find(|(name, _)| *name == lineage).map(|(_, loss)| *loss);
            // Before the end of the first pass there is no loss to tell.
            if let Some(loss) = loss.filter(|loss| total > before && loss.is_finite()) {
                let tokens_per_s = (total - before) / seconds;
                felt.beats.push_back(Beat { at_ms: now_ms, lineage, loss, tokens_per_s });
            }
        }
        let too_many = felt.beats.len().saturating_sub(BEATS_MAX);
        felt.beats.drain(..too_many);
    }

    /// The last beats, the oldest first.
    pub(crate) fn beats(&self) -> Vec<Beat> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).beats.iter().cloned().collect()
    }
}

/// The last of these beats, if it is not over.
pub(crate) fn now(beats: &[Beat], now_ms: u64) -> Option<&Beat> {
    beats.last().filter(|beat| now_ms.saturating_sub(beat.at_ms) < IDLE_AFTER_MS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_seconds_in_which_tokens_were_learned_are_beats() {
        let pulse = Pulse::default();
        let feel = |tokens: f64, now_ms| {
            pulse.feel(vec![("a".into(), tokens)], &[("a".into(), 2.0), ("b".into(), 9.0)], now_ms);
        };
        feel(100.0, 1_000);
        feel(100.0, 2_000);
        feel(400.0, 4_000);
        let beats = pulse.beats();
        let speeds: Vec<(u64, f64)> = beats.iter().map(|beat| (beat.at_ms, beat.tokens_per_s)).collect();
        assert_eq!(speeds, [(1_000, 100.0), (4_000, 150.0)]);
        assert_eq!(now(&beats, 5_000).map(|beat| beat.loss), Some(2.0));
        assert_eq!(now(&beats, 9_000), None);
        (0..700).for_each(|n| feel(1_000.0 + f64::from(n), 10_000 + u64::from(n as u16)));
        assert_eq!(pulse.beats().len(), BEATS_MAX);
    }
}
