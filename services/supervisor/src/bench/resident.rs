//! Memory that this process has, as the system counts it.

use anyhow::Result;
use nix::sys::resource::{UsageWho, getrusage};
use std::fs;

/// Bytes of memory that are resident.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resident {
    /// Now; none where the system does not say it.
    pub now: Option<u64>,
    /// The most at once, since [`restart`] or, where that does nothing, since the process began.
    pub peak: u64,
}

/// Reads what the system says.
///
/// # Errors
/// When it says nothing.
pub fn resident() -> Result<Resident> {
    // Where this file is not, or says less, the most since the beginning is still known.
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = kilobytes(&status, "VmHWM:").map_or_else(peak, Ok)?;
    Ok(Resident { now: kilobytes(&status, "VmRSS:"), peak })
}

/// Lets the peak begin again at what is resident now, where the system can.
pub fn restart() {
    // Only Linux has this; elsewhere the peak goes on from the beginning of the process, as its reader is told.
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// The most memory that this process had at once, in bytes.
///
/// # Errors
/// When the system does not say it.
pub fn peak() -> Result<u64> {
    // The system counts in bytes on a Mac, and in KiB elsewhere.
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    Ok(u64::try_from(getrusage(UsageWho::RUSAGE_SELF)?.max_rss())? * unit)
}

/// Bytes that a line of Linux's `/proc/self/status` tells in KiB.
fn kilobytes(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|count| count * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_lines_are_read_and_others_passed_over() {
        let status = "Name:\tengram\nVmHWM:\t    2000 kB\nVmRSS:\t 1500 kB\nThreads:\t2\n";
        assert_eq!(kilobytes(status, "VmHWM:"), Some(2_048_000));
        assert_eq!(kilobytes(status, "VmRSS:"), Some(1_536_000));
        assert_eq!(kilobytes(status, "VmSwap:"), None);
        assert_eq!(kilobytes(status, "Threads:"), None, "not in KiB");
    }

    #[test]
    fn what_is_resident_is_no_more_than_the_peak() {
        let resident = resident().expect("told");
        assert!(resident.peak > 0 && resident.now.is_none_or(|now| now <= resident.peak), "{resident:?}");
    }
}
