//! Which files are kept.

use crate::Checkpoint;
use proto::{Blob, Domain, Generation};
use std::collections::BTreeSet;

impl Checkpoint {
    /// Removes the weights and learner state of generations that are too old to roll back to. What
    /// they learned stays written down: the replay buffer is rebuilt from it.
    pub(crate) fn prune(&self, lineage: &Domain) -> anyhow::Result<()> {
        let chain = self.registry.chain(lineage);
        let (_, old) = chain.split_at(chain.len().min(self.generations_kept));
        self.remove_files(old.iter().flat_map(|g| state_files(g)).collect())
    }

    /// Removes files that no generation still needs: equal content has one file, whoever names it.
    pub(crate) fn remove_files(&self, files: BTreeSet<Blob>) -> anyhow::Result<()> {
        if files.is_empty() {
            return Ok(());
        }
        let lineages: Vec<Domain> = self.registry.manifest().lineages.keys().cloned().collect();
        let mut needed = BTreeSet::new();
        for lineage in lineages {
            for (age, generation) in self.registry.chain(&lineage).iter().enumerate() {
                needed.insert(generation.learned.clone());
                if age < self.generations_kept {
                    needed.extend(state_files(generation));
                }
            }
        }
        files.difference(&needed).try_for_each(|blob| self.blobs.remove(blob))
    }
}

/// What is needed to serve a generation, and to learn on from it.
pub(crate) fn state_files(generation: &Generation) -> Vec<Blob> {
    let Generation { weights, optimiser, fisher, probe, .. } = generation;
    [Some(weights), optimiser.as_ref(), fisher.as_ref(), probe.as_ref()]
        .into_iter()
        .flatten()
        .cloned()
        .collect()
}
