//! The end of intake: a document's verdict and its examples, in one transaction.

use anyhow::Context;
use kit::ledger::{Ledger, Settling};
use kit::service::{Fault, Handle, Service};
use proto::{Domain, Example, ExampleId, Kept, Verdict, VerdictKind};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Documents that are on their way to disk together at most.
const SETTLING_MAX: usize = 256;

/// The importance of an example whose document carries none, until it was learned.
const UNMARKED: f32 = 0.5;

/// What is held out of documents, to measure with.
#[derive(Debug, Clone, Copy)]
pub struct HoldOut {
    /// Share of chunks that are held out for the gate.
    pub share: f32,
    /// Examples a domain has before any is held out.
    pub after: u64,
}

/// Settles judged documents in the ledger: hands them over one by one, so that many share a commit.
pub struct Settle {
    ledger: Arc<Ledger>,
    hold_out: HoldOut,
    /// To whoever sees that they get to disk.
    settling: mpsc::Sender<Settling>,
    /// Examples of each domain, those on their way to disk too, while so many documents had been forgotten.
    examples: (u64, BTreeMap<Domain, u64>),
}

/// Sees that what is handed over gets to disk.
pub struct Settled(mpsc::Receiver<Settling>);

impl Settled {
    /// Waits for it, until nothing more comes.
    ///
    /// # Errors
    /// When something does not get there: the lane is to be rebuilt, and it comes again.
    pub async fn run(mut self) -> anyhow::Result<()> {
        while let Some(settling) = self.0.recv().await {
            settling.on_disk().await?;
        }
        Ok(())
    }
}

impl Service for Settle {
    const NAME: &'static str = "replay";
}

impl Handle<Kept> for Settle {
    async fn handle(&mut self, kept: &Kept) -> Result<(), Fault> {
        fail::fail_point!("replay::handle");
        let examples = self.examples(kept)?;
        self.settle(kept, examples).await
    }

    async fn put_aside(&mut self, kept: &Kept, reason: &str) -> Result<(), Fault> {
        let verdict = Verdict { kind: VerdictKind::Refused, reason: reason.to_owned(), score: 0.0 };
        let refused = Kept { verdict, pieces: Vec::new(), ..kept.clone() };
        self.settle(&refused, Vec::new()).await
    }
}

impl Settle {
    /// Settles documents, of which something may be held out, and what sees that they get to disk.
    pub fn new(ledger: Arc<Ledger>, hold_out: HoldOut) -> (Self, Settled) {
        let (settling, settled) = mpsc::channel(SETTLING_MAX);
        (Self { ledger, hold_out, settling, examples: (0, BTreeMap::new()) }, Settled(settled))
    }

    async fn settle(&self, kept: &Kept, examples: Vec<Example>) -> Result<(), Fault> {
        let settling = self.ledger.settle_intake(kept, examples).await?;
        Ok(self.settling.send(settling).await.context("nobody sees to it that documents are settled")?)
    }

    /// The examples of a domain before those of this document.
    fn examples_before(&mut self, domain: &Domain) -> anyhow::Result<&mut u64> {
        let forgotten = self.ledger.forgotten();
        if self.examples.0 != forgotten {
            self.examples = (forgotten, BTreeMap::new());
        }
        let examples = &mut self.examples.1;
        if !examples.contains_key(domain) {
            examples.insert(domain.clone(), self.ledger.examples_in(domain)?);
        }
        examples.get_mut(domain).context("the examples of a domain were just counted")
    }

    fn examples(&mut self, kept: &Kept) -> anyhow::Result<Vec<Example>> {
        // A document in one piece, or marked as most important, is learned whole: the gate may
        // measure what could be missed, not keep anyone's only copy of a fact from being learned.
        let HoldOut { share, after } = self.hold_out;
        let before = self.examples_before(&kept.domain)?;
        let may_hold_out = kept.pieces.len() > 1 && kept.importance != Some(1.0) && *before >= after;
        *before += kept.pieces.len() as u64;
        let mut examples: Vec<Example> = Vec::with_capacity(kept.pieces.len());
        for (n, piece) in kept.pieces.iter().enumerate() {
            let id = ExampleId { ordinal: kept.ordinal, chunk: n as u32 };
            let held_out = may_hold_out && drawn(id, share);
            examples.push(Example {
                id,
                domain: kept.domain.clone(),
                piece: piece.clone(),
                importance: kept.importance.unwrap_or(UNMARKED),
                marked: kept.importance.is_some(),
                held_out,
                signature: kept.signature.clone(),
            });
        }
        if examples.iter().all(|e| e.held_out)
            && let Some(first) = examples.first_mut()
        {
            first.held_out = false;
        }
        Ok(examples)
    }
}

/// Whether a chunk is among the held-out share: decided by its name, so that it is decided the same
/// however often it is delivered.
fn drawn(id: ExampleId, share: f32) -> bool {
    let digest = blake3::hash(format!("held out {} {}", id.ordinal, id.chunk).as_bytes());
    let word = u32::from_le_bytes(digest.as_bytes()[..4].try_into().expect("a digest has 32 bytes"));
    (word as f32 / u32::MAX as f32) < share
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::{Content, Document, DocumentId, Domain, Piece};

    const HOLD_OUT: HoldOut = HoldOut { share: 1.0, after: 0 };

    async fn bench(pieces: usize, importance: Option<f32>) -> (Arc<Ledger>, Kept, tempfile::TempDir) {
        let folder = tempfile::tempdir().expect("a folder");
        let ledger = Arc::new(Ledger::open(folder.path()).expect("a ledger"));
        let document = Document {
            id: DocumentId::new("d").expect("id"),
            domain: Domain::general(),
            content: Content::Text("text".into()),
            importance,
            source: None,
            submitted_ms: 0,
            derived_from: None,
        };
        ledger.append(vec![document]).await.expect("appended");
        let piece = Piece { tokens: vec![1, 2], learned: vec![(0, 2)] };
        let kept = Kept {
            ordinal: 1,
            id: DocumentId::new("d").expect("id"),
            domain: Domain::general(),
            importance,
            verdict: Verdict { kind: VerdictKind::Kept, reason: "kept".into(), score: 1.0 },
            pieces: vec![piece; pieces],
            signature: vec![1; 64],
        };
        (ledger, kept, folder)
    }

    #[actix::test]
    async fn no_document_is_held_out_whole() {
        for (pieces, importance, held_out) in [(1, None, 0), (5, None, 4), (5, Some(1.0), 0)] {
            let (ledger, kept, _folder) = bench(pieces, importance).await;
            let (mut settle, _) = Settle::new(ledger, HOLD_OUT);
            let examples = settle.examples(&kept).expect("examples");
            assert_eq!(examples.iter().filter(|e| e.held_out).count(), held_out, "{pieces} {importance:?}");
        }
    }

    #[actix::test]
    async fn a_document_delivered_twice_is_settled_once() {
        let (ledger, kept, _folder) = bench(3, None).await;
        let (mut settle, settled) = Settle::new(Arc::clone(&ledger), HOLD_OUT);
        settle.handle(&kept).await.expect("handed over");
        settle.handle(&kept).await.expect("handed over again");
        drop(settle);
        settled.run().await.expect("on disk");
        assert_eq!(ledger.examples_in(&Domain::general()).expect("a count"), 3);
        assert_eq!(ledger.intake_cursor(), 1);
    }

    #[actix::test]
    async fn what_is_held_out_does_not_depend_on_what_is_on_disk_already() {
        let (ledger, kept, _folder) = bench(3, None).await;
        let (mut settle, _settled) = Settle::new(ledger, HoldOut { share: 1.0, after: 6 });
        let mut held_out = |ordinal| {
            let kept = Kept { ordinal, ..kept.clone() };
            settle.examples(&kept).expect("examples").iter().filter(|e| e.held_out).count()
        };
        assert_eq!([held_out(1), held_out(2), held_out(3)], [0, 0, 2], "six before the third");
    }
}
