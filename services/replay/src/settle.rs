//! The end of intake: a document's verdict and its examples, in one transaction.

use kit::ledger::Ledger;
use kit::service::{Fault, Handle, Service};
use proto::{Example, ExampleId, Kept, Verdict, VerdictKind};
use std::sync::Arc;

/// The importance of an example whose document carries none, until it was learned.
const UNMARKED: f32 = 0.5;

/// Settles judged documents in the ledger.
pub struct Settle {
    /// Where to.
    pub ledger: Arc<Ledger>,
    /// Share of chunks that are held out for the gate.
    pub held_out_share: f32,
    /// Examples a domain has before any is held out.
    pub held_out_after: u64,
}

impl Service for Settle {
    const NAME: &'static str = "replay";
}

impl Handle<Kept> for Settle {
    async fn handle(&mut self, kept: &Kept) -> Result<(), Fault> {
        fail::fail_point!("replay::handle");
        let examples = self.examples(kept)?;
        Ok(self.ledger.settle_intake(kept, examples).await?)
    }

    async fn put_aside(&mut self, kept: &Kept, reason: &str) -> Result<(), Fault> {
        let verdict = Verdict { kind: VerdictKind::Refused, reason: reason.to_owned(), score: 0.0 };
        let refused = Kept { verdict, pieces: Vec::new(), ..kept.clone() };
        Ok(self.ledger.settle_intake(&refused, Vec::new()).await?)
    }
}

impl Settle {
    fn examples(&self, kept: &Kept) -> anyhow::Result<Vec<Example>> {
        // A document in one piece, or marked as most important, is learned whole: the gate may
        // measure what could be missed, not keep anyone's only copy of a fact from being learned.
        let may_hold_out = kept.pieces.len() > 1
            && kept.importance != Some(1.0)
            && self.ledger.examples_in(&kept.domain)? >= self.held_out_after;
        let mut examples: Vec<Example> = Vec::with_capacity(kept.pieces.len());
        for (n, piece) in kept.pieces.iter().enumerate() {
            let id = ExampleId { ordinal: kept.ordinal, chunk: n as u32 };
            let held_out = may_hold_out && drawn(id, self.held_out_share);
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

    async fn bench(pieces: usize, importance: Option<f32>) -> (Settle, Kept, tempfile::TempDir) {
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
        (Settle { ledger, held_out_share: 1.0, held_out_after: 0 }, kept, folder)
    }

    #[actix::test]
    async fn no_document_is_held_out_whole() {
        for (pieces, importance, held_out) in [(1, None, 0), (5, None, 4), (5, Some(1.0), 0)] {
            let (settle, kept, _folder) = bench(pieces, importance).await;
            let examples = settle.examples(&kept).expect("examples");
            assert_eq!(examples.iter().filter(|e| e.held_out).count(), held_out, "{pieces} {importance:?}");
        }
    }

    #[actix::test]
    async fn a_document_delivered_twice_is_settled_once() {
        let (mut settle, kept, _folder) = bench(3, None).await;
        settle.handle(&kept).await.expect("settled");
        settle.handle(&kept).await.expect("settled again");
        assert_eq!(settle.ledger.examples_in(&Domain::general()).expect("a count"), 3);
        assert_eq!(settle.ledger.intake_cursor(), 1);
    }
}
