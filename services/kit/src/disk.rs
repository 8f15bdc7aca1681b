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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_share() {
        let free = free_percent(&std::env::temp_dir()).expect("known");
        assert!((0.0..=100.0).contains(&free), "{free}");
    }
}
