//! The worker: builds all services, and runs them until it is told to finish.

use crate::lifeline::Orders;

/// Runs all services until [`crate::lifeline::finish`] says so.
pub fn run(orders: Orders) -> anyhow::Result<()> {
    let finish = crate::lifeline::finish()?;
    tracing::info!(degraded = orders.degraded, data = %orders.data_dir.display(), "nothing runs yet");
    finish.blocking_recv()?;
    Ok(())
}
