//! A sign of life for a person who waits.

use crate::client::watched;
use indicatif::ProgressBar;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// What takes longer shows that it goes on.
const SHOWN_AFTER: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_millis(200);

/// While it lives, and after a while, a line on stderr says that something is waited for.
pub struct Waiting {
    running: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Waiting {
    /// From now on.
    pub fn start() -> Self {
        Self { running: watched().then(show) }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some((end, shown)) = self.running.take() {
            drop(end);
            // The line is gone before anything else is written.
            let _ = shown.join();
        }
    }
}

fn show() -> (Sender<()>, JoinHandle<()>) {
    let (end, ended) = channel::<()>();
    let shown = thread::spawn(move || {
        if ended.recv_timeout(SHOWN_AFTER) == Err(RecvTimeoutError::Timeout) {
            let bar = ProgressBar::new_spinner().with_message("waiting for the server");
            bar.enable_steady_tick(TICK);
            // It ends when its owner does.
            let _ = ended.recv();
            bar.finish_and_clear();
        }
    });
    (end, shown)
}
