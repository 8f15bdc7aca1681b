//! How many documents there are at each stage: for the page, and for Prometheus.

use kit::ledger::{Ledger, LedgerError};
use proto::{Domain, Manifest};
use std::collections::BTreeMap;

/// Documents by stage.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Accepted and not judged yet.
    pub judging: u64,
    /// Learned, and served.
    pub live: u64,
    pub domains: BTreeMap<Domain, OfDomain>,
}

/// Those of a domain.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct OfDomain {
    pub kept: u64,
    pub refused: u64,
    /// Kept, and next to be learned.
    pub waiting: u64,
}

impl Tally {
    /// Counts them.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub(crate) fn take(ledger: &Ledger, manifest: Option<&Manifest>) -> Result<Self, LedgerError> {
        let mut tally =
            Self { judging: ledger.head().saturating_sub(ledger.intake_cursor()), ..Self::default() };
        tally.live = manifest.map_or(0, |m| m.lineages.values().map(|lineage| lineage.documents).sum());
        let shared = manifest.is_some_and(|manifest| manifest.shared);
        for (domain, counts) in ledger.counts()? {
            let lineage = if shared { Domain::general() } else { domain.clone() };
            let lineage = manifest.and_then(|manifest| manifest.lineages.get(&lineage));
            let waiting = ledger.waiting(&domain, lineage.map_or(0, |lineage| lineage.cursor))?;
            let (kept, refused) = (counts.kept, counts.refused);
            tally.domains.insert(domain, OfDomain { kept, refused, waiting });
        }
        Ok(tally)
    }

    pub(crate) fn waiting(&self) -> u64 {
        self.domains.values().map(|of| of.waiting).sum()
    }

    pub(crate) fn refused(&self) -> u64 {
        self.domains.values().map(|of| of.refused).sum()
    }

    /// Kept, and in no served generation: set aside, rolled back, or held out for the gate as a whole.
    pub(crate) fn aside(&self) -> u64 {
        let kept: u64 = self.domains.values().map(|of| of.kept).sum();
        kept.saturating_sub(self.live + self.waiting())
    }
}
