//! How far intake is behind, and how long a client should wait for it.

use crate::error::{ApiError, Result};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often the drain rate is measured.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);
/// The longest wait that a client is told, in seconds.
const RETRY_S_MAX: u64 = 60;

/// Measures how fast intake works off what was accepted.
#[derive(Debug, Default)]
pub(crate) struct Backlog(Mutex<Option<Sample>>);

#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Instant,
    cursor: u64,
    documents_per_s: f64,
}

impl Backlog {
    /// Whether `incoming` documents fit: intake has judged all up to `cursor` of `head`.
    pub(crate) fn admit(&self, cursor: u64, head: u64, incoming: u64, depth_max: u64) -> Result<()> {
        let documents_per_s = self.drain_rate(cursor, Instant::now());
        let depth = head.saturating_sub(cursor);
        if depth + incoming <= depth_max {
            return Ok(());
        }
        let message =
            format!("{depth} documents wait to be judged, and {depth_max} may wait: try again later");
        // Nothing drained makes this infinite, which the clamp turns into the longest wait.
        let seconds = (depth as f64 / documents_per_s).ceil().clamp(1.0, RETRY_S_MAX as f64);
        Err(ApiError::busy(message, seconds as u64))
    }

    fn drain_rate(&self, cursor: u64, now: Instant) -> f64 {
        let mut sample = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = sample.unwrap_or(Sample { at: now, cursor, documents_per_s: 0.0 });
        let elapsed = now.duration_since(last.at);
        if sample.is_none() || elapsed >= SAMPLE_EVERY {
            let drained = cursor.saturating_sub(last.cursor) as f64 / elapsed.as_secs_f64().max(1.0);
            let documents_per_s = (last.documents_per_s + drained) / 2.0;
            *sample = Some(Sample { at: now, cursor, documents_per_s });
            return documents_per_s;
        }
        last.documents_per_s
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use actix_web::ResponseError;
    use actix_web::http::header::RETRY_AFTER;

    fn retry_after(error: &ApiError) -> u64 {
        let response = error.error_response();
        let value = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        value.and_then(|value| value.parse().ok()).expect("seconds")
    }

    #[test]
    fn a_full_backlog_is_503_with_a_wait_in_bounds() {
        let backlog = Backlog::default();
        backlog.admit(10, 14, 1, 5).expect("fits exactly");
        let error = backlog.admit(10, 14, 2, 5).expect_err("one too many");
        assert_eq!((error.status_code().as_u16(), retry_after(&error)), (503, 60));
    }

    #[test]
    fn the_wait_follows_the_measured_rate() {
        let backlog = Backlog::default();
        let start = Instant::now();
        backlog.drain_rate(0, start);
        for second in 1..=20 {
            backlog.drain_rate(second * 100, start + Duration::from_secs(second));
        }
        let rate = backlog.drain_rate(2_000, start + Duration::from_millis(20_001));
        assert!((99.0..101.0).contains(&rate), "{rate}");
    }
}
