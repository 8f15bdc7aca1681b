//! Vectors in place of text.

use super::Engine;
use anyhow::Context;
use model::embed::embed;
use proto::Weighted;

impl Engine {
    /// What a text means through these adapters, every generation of which is loaded.
    ///
    /// # Errors
    /// When it is longer than the context, or the model fails on it.
    pub fn embed(&self, tokens: &[u32], adapters: &[Weighted]) -> anyhow::Result<Vec<f32>> {
        let mut active = Vec::new();
        for weighted in adapters {
            if let Some(id) = &weighted.generation {
                let adapter =
                    self.adapters.get(id).context("its generation is no longer loaded; ask again")?;
                active.push((adapter, f64::from(weighted.weight)));
            }
        }
        let base = self.batch.base();
        embed(base, &base.activate(&active)?, tokens)
    }
}
