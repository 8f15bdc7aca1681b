//! Keeps the router in line with what is current.

use crate::router::{Route, Router};
use kit::ledger::Ledger;
use kit::manifests::Registry;
use proto::{Domain, GenerationId, VerdictKind};
use std::collections::BTreeMap;

/// The router, and the generations whose documents it knows.
#[derive(Debug, Default)]
pub struct Profiles {
    router: Router,
    profiled: BTreeMap<Domain, Vec<GenerationId>>,
    forgotten: u64,
}

impl Profiles {
    /// Takes up what the current generations have learned, and drops what is not current any more.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub fn follow(
        &mut self,
        registry: &Registry,
        ledger: &Ledger,
        current: &BTreeMap<Domain, GenerationId>,
    ) -> anyhow::Result<()> {
        if self.forgotten != ledger.forgotten() {
            *self = Self { forgotten: ledger.forgotten(), ..Self::default() };
        }
        self.profiled.retain(|domain, _| {
            let stays = current.contains_key(domain);
            if !stays {
                self.router.remove(domain);
            }
            stays
        });
        for (domain, id) in current {
            // Oldest first: profiles grow as the lineage did.
            let mut chain = registry.ancestors(Some(id.clone()));
            chain.reverse();
            let known = self.profiled.entry(domain.clone()).or_default();
            if !chain.iter().map(|g| &g.id).take(known.len()).eq(known.iter()) {
                self.router.remove(domain);
                known.clear();
            }
            for generation in chain.iter().skip(known.len()) {
                let only = (!registry.manifest().shared).then_some(domain);
                for (ordinal, document) in
                    ledger.documents_between(only, generation.after, generation.through)?
                {
                    if ledger.verdict(ordinal)?.is_some_and(|v| v.kind == VerdictKind::Kept) {
                        self.router.add(domain, &document.content.plain());
                    }
                }
            }
            *known = chain.iter().map(|g| g.id.clone()).collect();
        }
        Ok(())
    }

    /// The lineage that knows most of a prompt; none without any.
    pub fn route(&self, prompt: &str) -> Option<Route> {
        self.router.route(prompt)
    }
}
