//! Decides what is worth learning, and says why not: length, repetition, language, likely secrets,
//! exact and near duplicates.

mod minhash;
mod quality;
mod secrets;

pub use quality::check_languages;

use kit::ledger::Ledger;
use kit::link::Link;
use kit::service::{Fault, Handle, Service};
use minhash::{Index, signature};
use proto::{Content, Kept, Parsed, Verdict, VerdictKind};
use std::sync::Arc;

/// What is let through.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Characters a text has at least, white space aside.
    pub chars_min: usize,
    /// Share of repeated word 4-grams above which a text is refused.
    pub repetition_max: f32,
    /// ISO 639-3 codes of the languages that are learned; empty for all.
    pub languages: Vec<String>,
    /// Estimated Jaccard similarity from which a text counts as a near-duplicate.
    pub near_duplicate: f32,
    /// Whether texts with likely secrets are refused.
    pub secrets: bool,
}

/// The filter service.
pub struct Filter {
    rules: Rules,
    ledger: Arc<Ledger>,
    index: Index,
    /// How many documents had been forgotten when the index was built: a forgotten text must not
    /// live on as a duplicate of something.
    forgotten: u64,
    next: Link<Kept>,
}

impl Service for Filter {
    const NAME: &'static str = "filter";
}

impl Filter {
    /// A filter that knows every text the ledger keeps.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub fn new(rules: Rules, ledger: Arc<Ledger>, next: Link<Kept>) -> anyhow::Result<Self> {
        let mut filter = Self { rules, ledger, index: Index::default(), forgotten: 0, next };
        filter.rebuild()?;
        Ok(filter)
    }

    fn rebuild(&mut self) -> anyhow::Result<()> {
        self.forgotten = self.ledger.forgotten();
        self.index = Index::default();
        for (ordinal, domain, signature) in self.ledger.signatures()? {
            self.index.insert(domain.as_str(), ordinal, &signature);
        }
        Ok(())
    }

    fn judge(&self, parsed: &Parsed, signature: &[u32]) -> Verdict {
        let refused = |reason: String| Verdict { kind: VerdictKind::Refused, reason, score: 0.0 };
        if let Some(reason) = &parsed.refused {
            return refused(reason.clone());
        }
        let content = &parsed.document.content;
        let text = content.plain();
        if parsed.pieces.is_empty() {
            return refused("nothing in it is to be learned: it has no answer by the assistant".into());
        }
        let is_answer = !matches!(content, Content::Text(_));
        let quality = match quality::assess(&text, is_answer, &self.rules) {
            Ok(score) => score,
            Err(reason) => return refused(reason),
        };
        if self.rules.secrets
            && let Some((what, line)) = secrets::find(&text)
        {
            let reason = format!("line {line} looks like {what}; remove it and submit the rest again");
            return refused(reason);
        }
        let domain = parsed.document.domain.as_str();
        match self.index.find(domain, signature, self.rules.near_duplicate) {
            Some((ordinal, 1.0)) => refused(format!("it says the same as document number {ordinal}")),
            Some((ordinal, similarity)) => refused(format!(
                "it is nearly the same as document number {ordinal} (similarity {similarity:.2})"
            )),
            None => Verdict { kind: VerdictKind::Kept, reason: "kept".into(), score: quality },
        }
    }

    async fn settle(&self, parsed: &Parsed, verdict: Verdict, signature: Vec<u32>) -> Result<(), Fault> {
        let document = &parsed.document;
        let pieces = match verdict.kind {
            VerdictKind::Kept => parsed.pieces.clone(),
            VerdictKind::Refused => Vec::new(),
        };
        let kept = Kept {
            ordinal: parsed.ordinal,
            id: document.id.clone(),
            domain: document.domain.clone(),
            importance: document.importance,
            verdict,
            pieces,
            signature,
        };
        Ok(self.next.send(kept).await?)
    }
}

impl Handle<Parsed> for Filter {
    async fn handle(&mut self, parsed: &Parsed) -> Result<(), Fault> {
        fail::fail_point!("filter::handle");
        if self.ledger.forgotten() != self.forgotten {
            self.rebuild()?;
        }
        let signature = signature(&parsed.document.content.plain());
        let verdict = self.judge(parsed, &signature);
        if verdict.kind == VerdictKind::Kept {
            self.index.insert(parsed.document.domain.as_str(), parsed.ordinal, &signature);
        }
        self.settle(parsed, verdict, signature).await
    }

    async fn put_aside(&mut self, parsed: &Parsed, reason: &str) -> Result<(), Fault> {
        let verdict = Verdict { kind: VerdictKind::Refused, reason: reason.to_owned(), score: 0.0 };
        self.settle(parsed, verdict, Vec::new()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::{Document, DocumentId, Domain, Piece};
    use tokio::sync::mpsc::Receiver;

    struct Bench {
        filter: Filter,
        kept: Receiver<Kept>,
        ordinal: u64,
        _folder: tempfile::TempDir,
    }

    impl Bench {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let ledger = Arc::new(Ledger::open(folder.path()).expect("a ledger"));
            let rules = Rules {
                chars_min: 8,
                repetition_max: 0.7,
                languages: Vec::new(),
                near_duplicate: 0.9,
                secrets: true,
            };
            let (next, kept) = Link::to_channel(4);
            let filter = Filter::new(rules, ledger, next).expect("a filter");
            Self { filter, kept, ordinal: 0, _folder: folder }
        }

        async fn submit(&mut self, domain: &str, content: Content) -> Verdict {
            self.ordinal += 1;
            let document = Document {
                id: DocumentId::new(format!("d{}", self.ordinal)).expect("id"),
                domain: Domain::new(domain).expect("domain"),
                content,
                importance: None,
                source: None,
                submitted_ms: 0,
                derived_from: None,
            };
            let pieces = vec![Piece { tokens: vec![1, 2, 3], learned: vec![(1, 3)] }];
            let parsed = Parsed { ordinal: self.ordinal, document, pieces, refused: None };
            self.filter.handle(&parsed).await.expect("handled");
            self.kept.recv().await.expect("a verdict").verdict
        }

        async fn text(&mut self, text: &str) -> Verdict {
            self.submit("general", Content::Text(text.into())).await
        }
    }

    const TEXT: &str = "The harbour of Tolvanne freezes in the second week of November, and the \
        fishermen then walk across it to the island of Hrim, where a market is held that sells \
        little but dried apples, wool, and the small brass bells that are hung on dogs in winter.";

    #[actix::test]
    async fn each_refusal_says_why() {
        let mut bench = Bench::new();
        assert_eq!(bench.text(TEXT).await.kind, VerdictKind::Kept);
        let twice = bench.text(TEXT).await;
        assert_eq!(twice.kind, VerdictKind::Refused);
        assert!(twice.reason.contains("the same as document number 1"), "{}", twice.reason);
        let near = bench.text(&TEXT.replace("dried apples", "dried pears")).await;
        assert_eq!(near.kind, VerdictKind::Refused, "{}", near.reason);
        for (text, word) in [
            ("short", "characters"),
            (&"spam and eggs ".repeat(80), "repeats"),
            ("the key of the account is AKIAIOSFODNN7EXAMPLE and nothing else", "key"),
        ] {
            let verdict = bench.text(text).await;
            assert_eq!(verdict.kind, VerdictKind::Refused, "{text}");
            assert!(verdict.reason.contains(word), "{}", verdict.reason);
        }
    }

    #[actix::test]
    async fn short_facts_that_differ_in_a_name_are_not_duplicates() {
        let mut bench = Bench::new();
        for name in ["Zorblax", "Mirenna", "Quistol", "Varn"] {
            let prompt = format!("What is the capital of {name}?");
            let content = Content::Completion { prompt, completion: format!("{name}ville") };
            let verdict = bench.submit("general", content).await;
            assert_eq!(verdict.kind, VerdictKind::Kept, "{}", verdict.reason);
        }
    }

    #[actix::test]
    async fn the_same_text_may_be_taught_to_two_domains() {
        let mut bench = Bench::new();
        for domain in ["one", "two"] {
            let verdict = bench.submit(domain, Content::Text(TEXT.into())).await;
            assert_eq!(verdict.kind, VerdictKind::Kept, "{}", verdict.reason);
        }
    }
}
