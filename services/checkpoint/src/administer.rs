//! What an owner asks for: roll back, forget, import, export.

use crate::{Checkpoint, now_ms};
use anyhow::Context;
use kit::blobs::Blobs;
use kit::latents::Latents;
use kit::manifests::Registry;
use kit::service::{Answer, Fault};
use kit::store::Store;
use proto::{
    BaseId, Domain, Export, Forget, Forgotten, Generation, GenerationId, Import, PeftFiles, Refusal,
    Rollback, RolledBack, SetAside, TrailEntry,
};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

/// The reason that documents of rolled back generations carry.
const ROLLED_BACK: &str = "rolled back";

impl Answer<Rollback> for Checkpoint {
    type Reply = Result<RolledBack, Refusal>;

    async fn answer(&mut self, ask: Rollback) -> Result<Self::Reply, Fault> {
        let chain = self.registry.chain(&ask.lineage);
        let target = match rollback_target(&ask, &chain) {
            Ok(target) => target,
            Err(refusal) => return Ok(Err(refusal)),
        };
        if let Some(target) = &target
            && let Err(error) = self.blobs.get(&target.weights)
        {
            tracing::warn!(generation = %target.id, %error, "cannot roll back to it");
            let message = format!("the weights of generation {} are no longer kept", target.id);
            return Ok(Err(Refusal::NotFound(message)));
        }
        let from = chain[0].id.clone();
        let to = target.as_ref().map(|g| g.id.clone());
        let after = target.as_ref().map_or(0, |g| g.through);
        let mut through = 0;
        self.edit(&ask.lineage, |lineage| {
            through = lineage.cursor;
            lineage.current.clone_from(&to);
            lineage.documents =
                chain.iter().skip_while(|g| Some(&g.id) != to.as_ref()).map(|g| g.documents).sum();
            lineage.attempt = 0;
            let reason = ROLLED_BACK.to_owned();
            lineage.set_aside.push(SetAside { after, through, reason });
        })?;
        let _ = self.serve().await;
        let documents = self.withdraw(&ask.lineage, after, through).await?;
        tracing::info!(lineage = %ask.lineage, %from, ?to, documents, "rolled back");
        Ok(Ok(RolledBack { from, to }))
    }
}

impl Answer<Forget> for Checkpoint {
    type Reply = Result<Forgotten, Refusal>;

    async fn answer(&mut self, ask: Forget) -> Result<Self::Reply, Fault> {
        // First the documents themselves, so that no batch that is planned from here on can hold them.
        let removed = self.ledger.forget(&ask.id)?;
        let purged = self.finish_forgetting()?;
        if !purged.is_empty() {
            let _ = self.serve().await;
        }
        let Some((_, document)) = removed.first() else {
            return Ok(Err(Refusal::NotFound(format!("there is no document '{}'", ask.id))));
        };
        let manifest = self.registry.manifest();
        let lineage = if manifest.shared { Domain::general() } else { document.domain.clone() };
        let serving = manifest.lineages.get(&lineage).and_then(|l| l.current.clone());
        let (derived_documents, removed_generations) = (removed.len() as u32 - 1, purged.len() as u32);
        tracing::info!(id = %ask.id, derived_documents, removed_generations, "forgot a document");
        Ok(Ok(Forgotten { id: ask.id, derived_documents, removed_generations, serving }))
    }
}

impl Answer<Import> for Checkpoint {
    type Reply = Result<GenerationId, Refusal>;

    async fn answer(&mut self, ask: Import) -> Result<Self::Reply, Fault> {
        let current = self.registry.lineage(&ask.lineage).current;
        if let Err(refusal) = expect(ask.expected.as_ref(), current.as_ref()) {
            return Ok(Err(refusal));
        }
        let weights = match self.peft.import(&ask.files) {
            Ok(weights) => self.blobs.put(&weights)?,
            Err(error) => {
                let message = format!("the adapter cannot be used with this base: {error:#}");
                return Ok(Err(Refusal::Invalid { param: "adapter_model".into(), message }));
            }
        };
        // What these weights were taught elsewhere was not counted here.
        Ok(Ok(self.take_over(&ask.lineage, weights, Vec::new(), None).await?))
    }
}

impl Answer<Export> for Checkpoint {
    type Reply = Result<PeftFiles, Refusal>;

    async fn answer(&mut self, ask: Export) -> Result<Self::Reply, Fault> {
        let chain = self.registry.chain(&ask.lineage);
        let wanted = chain.iter().find(|g| ask.generation.as_ref().is_none_or(|id| *id == g.id));
        let Some(generation) = wanted else {
            let which = ask.generation.map_or("no generation".into(), |id| format!("no generation {id}"));
            return Ok(Err(Refusal::NotFound(format!("'{}' has {which}", ask.lineage))));
        };
        let Ok(weights) = self.blobs.get(&generation.weights) else {
            let message = format!("the weights of generation {} are no longer kept", generation.id);
            return Ok(Err(Refusal::NotFound(message)));
        };
        Ok(Ok(self.peft.export(&weights)?))
    }
}

impl Checkpoint {
    /// Removes what was made of documents that the ledger has forgotten, with this base and with every other one that
    /// learned in this data folder; gives the generations of this one that are gone. What a crash cut short is taken
    /// up again where this is called at the start.
    ///
    /// # Errors
    /// When something cannot be removed. The ledger goes on knowing what is to be forgotten.
    pub fn finish_forgetting(&self) -> anyhow::Result<Vec<GenerationId>> {
        let documents = self.ledger.forgetting()?;
        if documents.is_empty() {
            return Ok(Vec::new());
        }
        let purged = self.purge(&documents)?;
        for folder in self.other_bases()? {
            let purge = || match self.of_other_base(&folder)? {
                Some(other) => other.purge(&documents).map(drop),
                None => Ok(()),
            };
            purge().with_context(|| {
                let folder = folder.display();
                format!("{folder} may hold what is to be forgotten; where it is not needed, remove it")
            })?;
        }
        // Deleted rows stay readable in the pages of a file until it is written anew.
        self.ledger.rewrite()?;
        self.ledger.nothing_left()?;
        Ok(purged)
    }

    /// Removes what was made of documents from the generations, files and stores of one base.
    fn purge(&self, documents: &[(Domain, u64)]) -> anyhow::Result<Vec<GenerationId>> {
        let _past = self.registry.hold_past();
        let shared = self.registry.manifest().shared;
        let place = |(domain, ordinal): &(Domain, u64)| {
            (if shared { Domain::general() } else { domain.clone() }, *ordinal)
        };
        let dirty = self.that_hold(&documents.iter().map(place).collect::<Vec<_>>());
        let gone: BTreeSet<&GenerationId> = dirty.iter().map(|g| &g.id).collect();
        let affected: Vec<Domain> = self.registry.manifest().lineages.keys().cloned().collect();
        for affected in affected {
            let chain = self.registry.chain(&affected);
            // The oldest one counts: all that came after it stands on it.
            if let Some(at) = chain.iter().rposition(|g| gone.contains(&g.id)) {
                let target = chain[at + 1..].iter().find(|g| self.blobs.get(&g.weights).is_ok());
                self.fall_back(&affected, target.map(|g| &**g))?;
            }
        }
        let ordinals: BTreeSet<u64> = documents.iter().map(|(_, ordinal)| *ordinal).collect();
        for id in self.store.ids()?.into_iter().filter(|id| ordinals.contains(&id.ordinal)) {
            self.store.remove(id)?;
        }
        self.latents.forget(&ordinals)?;
        self.remove_files(dirty.iter().flat_map(|g| g.files()).collect())?;
        for generation in &dirty {
            self.registry.remove_generation(&generation.id)?;
        }
        self.store.rewrite()?;
        Ok(dirty.iter().map(|g| g.id.clone()).collect())
    }

    /// The folders of the other bases that learned in this data folder.
    fn other_bases(&self) -> anyhow::Result<Vec<PathBuf>> {
        let Ok(entries) = fs::read_dir(&self.bases) else { return Ok(Vec::new()) };
        let folders = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        let own = Some(OsStr::new(self.base.as_str()));
        Ok(folders.into_iter().filter(|folder| folder.is_dir() && folder.file_name() != own).collect())
    }

    /// The same service over what another base learned; none where it learned nothing.
    fn of_other_base(&self, folder: &Path) -> anyhow::Result<Option<Self>> {
        let registry = Registry::open(folder)?;
        if registry.try_manifest().is_none() {
            return Ok(None);
        }
        Ok(Some(Self {
            registry: Arc::new(registry),
            blobs: Arc::new(Blobs::open(&folder.join("blobs"))?),
            ledger: Arc::clone(&self.ledger),
            store: Arc::new(Store::open(&folder.join("replay"))?),
            latents: Arc::new(Latents::open(&folder.join("latents"), u64::MAX)?),
            base: BaseId::new(folder.file_name().unwrap_or_default().to_string_lossy())?,
            bases: self.bases.clone(),
            peft: Arc::clone(&self.peft),
            generations_kept: self.generations_kept,
            publish: self.publish.clone(),
        }))
    }

    /// Every generation that holds something of documents, which are named by lineage and ordinal:
    /// those that learned one, and all that stand on one of them, since what came after may have
    /// rehearsed it; merges of them too, and what was rolled back and is still there.
    fn that_hold(&self, documents: &[(Domain, u64)]) -> Vec<Arc<Generation>> {
        let learned = |g: &Arc<Generation>| {
            let within = |ordinal: u64| g.after < ordinal && ordinal <= g.through;
            documents.iter().any(|(lineage, ordinal)| g.lineage == *lineage && within(*ordinal))
        };
        let (mut dirty, mut clean): (Vec<_>, Vec<_>) =
            self.registry.generations().into_iter().partition(learned);
        loop {
            let gone: BTreeSet<GenerationId> = dirty.iter().map(|g| g.id.clone()).collect();
            let stands_on =
                |g: &Arc<Generation>| g.parent.iter().chain(&g.merged_from).any(|id| gone.contains(id));
            let (more, rest): (Vec<_>, Vec<_>) = clean.into_iter().partition(stands_on);
            if more.is_empty() {
                return dirty;
            }
            dirty.extend(more);
            clean = rest;
        }
    }

    /// Serves an older generation, or the base, and learns again whatever came after it.
    fn fall_back(&self, lineage: &Domain, to: Option<&Generation>) -> anyhow::Result<()> {
        let chain = self.registry.chain(lineage);
        let documents =
            chain.iter().skip_while(|g| to.is_none_or(|t| t.id != g.id)).map(|g| g.documents).sum();
        self.edit(lineage, |entry| {
            entry.current = to.map(|g| g.id.clone());
            entry.cursor = to.map_or(0, |g| g.through);
            entry.documents = documents;
            entry.attempt = 0;
            let cursor = entry.cursor;
            // What the gate refused gets another chance; what the owner rolled back does not.
            entry.set_aside.retain(|s| s.through <= cursor || s.reason == ROLLED_BACK);
        })
    }

    /// Takes the documents of a lineage out of what waits to be learned, and says so in their trails.
    async fn withdraw(&self, lineage: &Domain, after: u64, through: u64) -> anyhow::Result<usize> {
        let shared = self.registry.manifest().shared;
        let ordinals = self.ledger.withdraw((!shared).then_some(lineage), after, through)?;
        let at_ms = now_ms();
        let entry = || TrailEntry { event: "set_aside".into(), at_ms, detail: Some(ROLLED_BACK.into()) };
        let count = ordinals.len();
        self.ledger.record(ordinals.into_iter().map(|ordinal| (ordinal, entry())).collect()).await?;
        Ok(count)
    }
}

/// The generation to serve again; none is the base.
fn rollback_target(ask: &Rollback, chain: &[Arc<Generation>]) -> Result<Option<Arc<Generation>>, Refusal> {
    let Some(current) = chain.first() else {
        return Err(Refusal::NotFound(format!("'{}' has no generation to roll back from", ask.lineage)));
    };
    expect(ask.expected.as_ref(), Some(&current.id))?;
    match &ask.to {
        None => Ok(chain.get(1).cloned()),
        Some(to) if *to == current.id => {
            Err(Refusal::Conflict(format!("generation {to} is current already")))
        }
        Some(to) => chain.iter().find(|g| g.id == *to).cloned().map(Some).ok_or_else(|| {
            Refusal::NotFound(format!("'{}' has no generation {to} before its current one", ask.lineage))
        }),
    }
}

pub(crate) fn expect(expected: Option<&GenerationId>, current: Option<&GenerationId>) -> Result<(), Refusal> {
    match expected {
        Some(expected) if Some(expected) != current => {
            let now = current.map_or("the base".to_owned(), ToString::to_string);
            Err(Refusal::Conflict(format!("expected generation {expected}, but {now} is current")))
        }
        _ => Ok(()),
    }
}
