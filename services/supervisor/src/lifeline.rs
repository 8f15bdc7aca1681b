//! The pipe from the supervisor to the standard input of its worker.
//!
//! First the orders go down it, as one line, so that no key shows in a list of processes. Then it
//! stays open and silent for as long as the worker is wanted: its end says "finish", whether the
//! supervisor closed it or died. That needs no signal, and works when the supervisor is killed.

use anyhow::{Context, Result};
use kit::settings::Settings;
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;
use tokio::sync::oneshot;

/// What a worker needs to know.
#[derive(Debug, Serialize, Deserialize)]
pub struct Orders {
    /// All settings, checked.
    pub settings: Settings,
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// The folder of the base.
    pub base_dir: PathBuf,
    /// Serve, but do not learn: the worker died too often.
    pub degraded: bool,
}

impl Orders {
    /// Reads the orders of this worker.
    ///
    /// # Errors
    /// When this process was not started by a supervisor.
    pub fn read() -> Result<Self> {
        let mut line = String::new();
        io::stdin().lock().read_line(&mut line)?;
        serde_json::from_str(&line).context("this command is for 'engram up' to start; run that instead")
    }

    /// How long the worker may take to finish what runs.
    pub fn grace(&self) -> Duration {
        Duration::from_secs(self.settings.supervisor.stop_seconds_max)
    }

    /// The orders as the line that [`Orders::read`] reads.
    pub fn line(&self) -> Result<Vec<u8>> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        Ok(line)
    }
}

/// Resolves when this worker is to finish. One that does not within `grace` is ended: its
/// supervisor, which would do that otherwise, may be gone.
///
/// # Errors
/// When no thread can be started.
pub fn finish(grace: Duration) -> Result<oneshot::Receiver<()>> {
    let (tell, told) = oneshot::channel();
    thread::Builder::new().name("lifeline".into()).spawn(move || {
        // Nothing more comes down the pipe; what ends this wait is its end, in whichever way.
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        let _ = tell.send(());
        thread::sleep(grace);
        std::process::exit(1);
    })?;
    Ok(told)
}
