//! Free space on the disk.

use anyhow::Context;
use std::path::Path;

/// Free space of the file system that holds `path`, in percent of its size.
///
/// # Errors
/// When the file system does not say.
pub fn free_percent(path: &Path) -> anyhow::Result<f64> {
    let stat =
        rustix::fs::statvfs(path).with_context(|| format!("{}: free space is unknown", path.display()))?;
    Ok(stat.f_bavail as f64 * 100.0 / stat.f_blocks.max(1) as f64)
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
}
