//! Logs to standard error, and the names of the metrics that every service has.
//!
//! User text, keys and secrets are never logged: log ids, ordinals, counts and sizes.

use crate::settings::{LogFormat, Telemetry};
use anyhow::{Context, ensure};
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// Starts logging for the whole process.
///
/// # Errors
/// When the level is no filter, or logging was started before.
pub fn start(settings: &Telemetry) -> anyhow::Result<()> {
    let filter = filter(&settings.level)?;
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Colours are for people; in a file they are in the way.
    let logs = logs.with_ansi(std::io::stderr().is_terminal());
    let started = match settings.format {
        LogFormat::Text => logs.try_init(),
        LogFormat::Json => logs.json().try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("logging cannot start: {error}"))
}

/// What is logged.
///
/// # Errors
/// When `level` is no filter.
pub fn filter(level: &str) -> anyhow::Result<EnvFilter> {
    let wrong = || {
        format!(
            "telemetry.level is {level:?}; it takes error, warn, info, debug, trace or off, or a filter such as \"info,train=debug\""
        )
    };
    // A word alone would be taken for a part of the program, of which everything is logged, and of the rest nothing.
    let alone = !level.is_empty() && level.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':');
    ensure!(!alone || level.parse::<LevelFilter>().is_ok(), wrong());
    EnvFilter::try_new(level).with_context(wrong)
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
