//! Ctrl-C, for commands that finish what they are at before they end.

use anyhow::Result;
use std::process::exit;
use std::thread;
use tokio::signal::ctrl_c;

/// What a program that was interrupted ends with.
const INTERRUPTED: i32 = 130;

/// Calls `first` at the first Ctrl-C; a second one ends the program as ever.
///
/// # Errors
/// When no thread can be had that waits for it.
pub fn at_interrupt(first: impl FnOnce() + Send + 'static) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("interrupt".into()).spawn(move || {
        runtime.block_on(async {
            if ctrl_c().await.is_ok() {
                first();
                if ctrl_c().await.is_ok() {
                    exit(INTERRUPTED);
                }
            }
        });
    })?;
    Ok(())
}
