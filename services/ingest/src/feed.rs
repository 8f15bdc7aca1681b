//! The start of intake: what the ledger has accepted and nobody has judged yet.

use kit::lane::Stop;
use kit::ledger::Ledger;
use kit::link::Link;
use proto::Accepted;
use std::sync::Arc;

/// Documents read at a time.
const READ_MAX: usize = 64;

/// Sends accepted documents on, in the order of the ledger, as fast as credit allows.
pub struct Feeder {
    /// Where from.
    pub ledger: Arc<Ledger>,
    /// To `ingest`.
    pub next: Link<Accepted>,
}

impl Feeder {
    /// Feeds until told to stop. What was sent and not settled when the lane died is sent again, since
    /// each incarnation starts from the ledger's own cursor.
    ///
    /// # Errors
    /// When the ledger cannot be read, or the lane is coming down.
    pub async fn run(self, stop: Stop) -> anyhow::Result<()> {
        let mut sent = self.ledger.intake_cursor();
        while !stop.is_set() {
            let accepted = self.ledger.next_accepted(sent, READ_MAX)?;
            if accepted.is_empty() {
                tokio::select! {
                    () = self.ledger.wait_for_append(sent) => {}
                    () = stop.wait() => {}
                }
            }
            for document in accepted {
                sent = document.ordinal;
                self.next.send(document).await?;
            }
        }
        Ok(())
    }
}
