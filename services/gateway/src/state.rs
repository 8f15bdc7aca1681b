//! What the handlers share.

use crate::backlog::Backlog;
use crate::disk::Disk;
use crate::error::{ApiError, Result};
use crate::guard::{Guard, Rate};
use crate::page::{Board, Pulse};
use crate::upload::Uploads;
use crate::{Gateway, body, question, submission};
use actix_web::web;
use kit::lane::Stop;
use kit::ledger::LedgerError;
use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::Semaphore;

/// The slowest that a body may come, on average.
const BODY_BYTES_PER_S_MIN: u32 = 1024;
/// An import may come over a slow line: its 64 MiB at 1 MiB/s, and as much again.
const IMPORT_TIME_MAX: Duration = Duration::from_secs(128);
/// Files are as large, and may come over a slower line.
const UPLOAD_TIME_MAX: Duration = Duration::from_secs(600);

/// The gateway with what it measures and remembers while it serves.
pub(crate) struct State {
    pub gateway: Gateway,
    pub limits: Limits,
    pub guard: Guard,
    /// Memory for bodies that are being read and worked on.
    pub bodies: body::Budget,
    pub backlog: Backlog,
    pub disk: Disk,
    /// What the open pages show.
    pub board: Board,
    /// How learning went lately.
    pub pulse: Pulse,
    pub uploads: Uploads,
    pub started: Instant,
    /// When it started, for models that were never published: seconds since 1970.
    pub started_s: u64,
    pub stop: Stop,
}

/// The settings, in the form that the modules take them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Of every body but an import's.
    pub body: body::Limits,
    /// Of an adapter that is imported.
    pub import: body::Limits,
    /// Of files that are submitted.
    pub upload: body::Limits,
    pub submission: submission::Limits,
    pub question: question::Limits,
    pub generation_time_max: Duration,
}

impl State {
    pub(crate) fn new(gateway: Gateway, stop: Stop) -> Self {
        let s = &gateway.settings.gateway;
        let body = body::Limits {
            bytes_max: s.body_bytes_max,
            time_max: Duration::from_secs(s.body_seconds_max),
            bytes_per_s_min: BODY_BYTES_PER_S_MIN,
        };
        let limits = Limits {
            body,
            import: body::Limits { bytes_max: s.import_bytes_max, time_max: IMPORT_TIME_MAX, ..body },
            upload: body::Limits { bytes_max: s.upload_bytes_max, time_max: UPLOAD_TIME_MAX, ..body },
            submission: submission::Limits {
                documents_max: s.documents_per_request_max,
                document_bytes_max: s.document_bytes_max,
            },
            question: question::Limits {
                prompt_bytes_max: s.prompt_bytes_max,
                tokens_default: gateway.settings.infer.max_tokens_default,
            },
            generation_time_max: Duration::from_secs(s.generation_seconds_max),
        };
        let rate = Rate { requests_per_s: at_least_one(s.requests_per_s), burst: at_least_one(s.burst) };
        Self {
            guard: Guard::new(&s.api_keys, rate),
            // Room for the largest body, and as much beside it for everybody else's.
            bodies: Arc::new(Semaphore::new(2 * s.import_bytes_max.max(s.body_bytes_max))),
            limits,
            backlog: Backlog::default(),
            disk: Disk::default(),
            board: Board::default(),
            pulse: Pulse::default(),
            uploads: Uploads::new(&gateway.info.data_dir),
            started: Instant::now(),
            started_s: now_ms() / 1000,
            stop,
            gateway,
        }
    }

    /// Whether requests for text can be answered.
    pub(crate) fn is_ready(&self) -> bool {
        !self.stop.is_set() && (self.gateway.ready)()
    }

    /// Whether learning waits for room on the disk.
    pub(crate) fn too_full_to_learn(&self) -> bool {
        let limits = &self.gateway.settings.limits;
        !self.disk.has(&self.gateway.info.data_dir, limits.disk_free_learn_percent)
    }
}

/// Reads the ledger on a thread that may wait for it: while it is being rewritten, probes still
/// have to be answered.
pub(crate) async fn read<T: Send + 'static>(
    work: impl FnOnce() -> std::result::Result<T, LedgerError> + Send + 'static,
) -> Result<T> {
    let done = web::block(work).await.map_err(|error| ApiError::internal(&error))?;
    done.map_err(|error| ApiError::internal(&error))
}

fn at_least_one(number: u32) -> NonZeroU32 {
    NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN)
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

/// A number that nobody can foresee: the standard library seeds its hash maps from the system's
/// random numbers, each differently.
pub(crate) fn random() -> u64 {
    RandomState::new().hash_one(0)
}
