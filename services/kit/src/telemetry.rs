//! Logs to standard error, and the names of the metrics that every service has.
//!
//! User text, keys and secrets are never logged: log ids, ordinals, counts and sizes.

use crate::settings::{LogFormat, Telemetry};
use anyhow::Context;
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// Starts logging for the whole process.
///
/// # Errors
/// When the level is no filter, or logging was started before.
pub fn start(settings: &Telemetry) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&settings.level)
        .with_context(|| format!("telemetry.level = {:?} is neither a level nor a filter", settings.level))?;
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Colours are for people; in a file they are in the way.
    let logs = logs.with_ansi(std::io::stderr().is_terminal());
    let started = match settings.format {
        LogFormat::Text => logs.try_init(),
        LogFormat::Json => logs.json().try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("logging cannot start: {error}"))
}

/// Names of metrics. Services keep their own beside their code, with the same prefix.
pub mod names {
    /// Messages by service, message and outcome (`handled`, `retried`, `failed`, `put_aside`).
    pub const MESSAGES: &str = "engram:messages_total";
    /// How long a message took to be settled, seconds, by service and message.
    pub const MESSAGE_SECONDS: &str = "engram:message_seconds";
    /// Times a lane was built anew, by lane.
    pub const LANE_RESTARTS: &str = "engram:lane_restarts_total";
}
