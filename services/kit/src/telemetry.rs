//! Logs to standard error, and the names of the metrics that every service has.
//!
//! User text, keys and secrets are never logged: log ids, ordinals, counts and sizes.

/// Names of metrics. Services keep their own beside their code, with the same prefix.
pub mod names {
    /// Messages by service, message and outcome (`handled`, `retried`, `failed`, `put_aside`).
    pub const MESSAGES: &str = "engram:messages_total";
    /// How long a message took to be settled, seconds, by service and message.
    pub const MESSAGE_SECONDS: &str = "engram:message_seconds";
    /// Times a lane was built anew, by lane.
    pub const LANE_RESTARTS: &str = "engram:lane_restarts_total";
}
