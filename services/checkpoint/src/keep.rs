//! Which files are kept.

use crate::Checkpoint;
use proto::{AnswerHead, Blob, Domain, Learned};
use std::collections::BTreeSet;

impl Checkpoint {
    /// Removes the weights and learner state of generations that are too old to roll back to. What
    /// they learned stays written down: the replay buffer is rebuilt from it.
    pub(crate) fn prune(&self, lineage: &Domain) -> anyhow::Result<()> {
        let chain = self.registry.chain(lineage);
        let (_, old) = chain.split_at(chain.len().min(self.generations_kept));
        self.remove_files(old.iter().flat_map(|g| g.state_files()).collect())
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
                    needed.extend(generation.state_files());
                }
            }
        }
        files.difference(&needed).try_for_each(|blob| self.blobs.remove(blob))
    }
}

/// The files of a batch that passed the gate.
pub(crate) fn left_behind(learned: &Learned) -> BTreeSet<Blob> {
    let Learned { weights, optimiser, fisher, probe, answer_head, .. } = learned;
    let files = [Some(weights), Some(optimiser), fisher.as_ref(), Some(probe)].into_iter().flatten();
    files.chain(answer_head.iter().flat_map(AnswerHead::files)).cloned().collect()
}
