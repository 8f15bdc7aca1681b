//! The worker: builds all services, and runs them until it is told to finish.

use crate::lifeline;
use kit::settings::Settings;
use std::path::Path;

/// Runs all services until [`lifeline::finish`] says so.
pub fn run(_settings: Settings, data_dir: &Path, degraded: bool) -> anyhow::Result<()> {
    let finish = lifeline::finish()?;
    tracing::info!(degraded, data = %data_dir.display(), "nothing runs yet");
    Ok(finish.blocking_recv()?)
}
