//! Free space on the disk, looked at now and then.

use crate::error::{ApiError, Result};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often it is looked at: a full queue of documents is far less than a percent of a disk.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long a client should wait: room is made by people.
const RETRY_S: u64 = 60;

/// What was free when it was last looked at, in percent.
#[derive(Debug, Default)]
pub(crate) struct Disk(Mutex<Option<(Instant, f64)>>);

impl Disk {
    /// Whether the disk that holds `folder` takes more documents.
    pub(crate) fn admit(&self, folder: &Path, free_percent_min: u8) -> Result<()> {
        if !self.has(folder, free_percent_min) {
            let message = format!(
                "the server's disk is too full to take documents (limits.disk_free_intake_percent = \
                 {free_percent_min})"
            );
            return Err(ApiError::busy(message, RETRY_S));
        }
        Ok(())
    }

    /// Whether the disk that holds `folder` is free to at least so many percent.
    pub(crate) fn has(&self, folder: &Path, free_percent_min: u8) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = last.filter(|(at, _)| at.elapsed() < LOOK_EVERY);
        let (at, free) = match fresh {
            Some(looked) => looked,
            // A file system that does not say is full only when a write fails.
            None => (Instant::now(), kit::disk::free_percent(folder).unwrap_or(100.0)),
        };
        *last = Some((at, free));
        free >= f64::from(free_percent_min)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_with_too_little_room_takes_nothing() {
        let disk = Disk::default();
        disk.admit(&std::env::temp_dir(), 0).expect("room enough");
        disk.admit(&std::env::temp_dir(), 101).expect_err("never that much");
    }
}
