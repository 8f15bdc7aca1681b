//! Free space on the disk.

use anyhow::Context;
use std::path::Path;

/// The size beyond which a disk counts as no larger: a tenth of a large disk is far more than learning needs.
const SIZE_MAX: u64 = 64 << 30;

/// Free space of the file system that holds `path`, in percent of its size or of 64 GiB, whichever is less; 100 at
/// most.
///
/// # Errors
/// When the file system does not say.
pub fn free_percent(path: &Path) -> anyhow::Result<f64> {
    let stat =
        rustix::fs::statvfs(path).with_context(|| format!("{}: free space is unknown", path.display()))?;
    Ok(percent(stat.f_bavail.saturating_mul(stat.f_frsize), stat.f_blocks.saturating_mul(stat.f_frsize)))
}

fn percent(free: u64, size: u64) -> f64 {
    (free as f64 * 100.0 / size.clamp(1, SIZE_MAX) as f64).min(100.0)
}

/// Free space of the file system that holds `path`, in bytes.
///
/// # Errors
/// When the file system does not say.
pub fn free_bytes(path: &Path) -> anyhow::Result<u64> {
    let stat =
        rustix::fs::statvfs(path).with_context(|| format!("{}: free space is unknown", path.display()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_share() {
        let free = free_percent(&std::env::temp_dir()).expect("known");
        assert!((0.0..=100.0).contains(&free), "{free}");
        assert!(free_bytes(&std::env::temp_dir()).expect("known") > 0);
    }

    #[test]
    fn a_large_disk_is_not_full_at_a_tenth() {
        const GIB: u64 = 1 << 30;
        assert_eq!(percent(3 * GIB, 30 * GIB), 10.0);
        assert_eq!(percent(32 * GIB, 1000 * GIB), 50.0);
        assert_eq!(percent(900 * GIB, 1000 * GIB), 100.0);
        assert_eq!(percent(0, 0), 0.0);
    }
}
