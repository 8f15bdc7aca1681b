//! What is current: manifests, the generations they name, and the view of them that services share.
//!
//! Each file is JSON after a line with its BLAKE3 hash, so that a damaged one is an error and its
//! parent the fallback.

use crate::blobs::write_durably;
use anyhow::{Context, bail};
use proto::{Batch, Domain, Generation, GenerationId, Lineage, Manifest};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use tokio::sync::watch;

/// Manifest files that are kept, for a fallback and for whoever wants to know.
const MANIFESTS_KEPT: u64 = 20;

/// The current manifest and all generations, in memory and on disk. Written by `checkpoint` alone.
#[derive(Debug)]
pub struct Registry {
    dir: PathBuf,
    generations: RwLock<BTreeMap<GenerationId, Arc<Generation>>>,
    current: watch::Sender<Option<Arc<Manifest>>>,
    live: AtomicU64,
    past: Mutex<()>,
}

impl Registry {
    /// Reads a folder, and makes it where it is not there. A manifest that is missing, empty, damaged,
    /// or names a generation that is, gives way to the newest one before it.
    ///
    /// # Errors
    /// When the folder cannot be read, or holds manifests of which none is whole.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        for part in ["manifests", "generations"] {
            let folder = dir.join(part);
            fs::create_dir_all(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
        }
        let mut generations = BTreeMap::new();
        for path in files(&dir.join("generations"))? {
            match read::<Generation>(&path) {
                Ok(generation) => drop(generations.insert(generation.id.clone(), Arc::new(generation))),
                Err(error) => tracing::warn!(%error, "a generation cannot be read"),
            }
        }
        let manifest = newest(dir, &generations)?;
        let (current, _) = watch::channel(manifest.map(Arc::new));
        let live = AtomicU64::new(0);
        let (generations, past) = (RwLock::new(generations), Mutex::new(()));
        Ok(Self { dir: dir.to_owned(), generations, current, live, past })
    }

    /// Makes a manifest current, with the generation it is about: durable when this returns.
    ///
    /// # Errors
    /// When the disk does not take it; what was current still is.
    pub fn commit(&self, manifest: Manifest, generation: Option<Generation>) -> anyhow::Result<()> {
        if let Some(generation) = generation {
            write(&self.generation_path(&generation.id), &generation)?;
            let mut generations = self.generations.write().unwrap_or_else(PoisonError::into_inner);
            generations.insert(generation.id.clone(), Arc::new(generation));
        }
        let name = format!("{:012}.json", manifest.number);
        let path = self.dir.join("manifests").join(&name);
        write(&path, &manifest)?;
        if read::<Manifest>(&path)? != manifest {
            bail!("{} was not written as it should be", path.display());
        }
        fail::fail_point!("manifest::before_rename");
        write_durably(&self.dir.join("CURRENT"), name.as_bytes())?;
        fail::fail_point!("manifest::after_rename");
        if let Some(old) = manifest.number.checked_sub(MANIFESTS_KEPT) {
            // Only for room: what stays is not wrong.
            let _ = fs::remove_file(self.dir.join("manifests").join(format!("{old:012}.json")));
        }
        self.current.send_replace(Some(Arc::new(manifest)));
        Ok(())
    }

    /// The current manifest; none before the first.
    pub fn try_manifest(&self) -> Option<Arc<Manifest>> {
        self.current.borrow().clone()
    }

    /// The current manifest.
    ///
    /// # Panics
    /// Before the first one was committed, which happens before any service is built.
    pub fn manifest(&self) -> Arc<Manifest> {
        self.try_manifest().expect("the worker commits a first manifest before it builds services")
    }

    /// Tells of each new manifest.
    pub fn subscribe(&self) -> watch::Receiver<Option<Arc<Manifest>>> {
        self.current.subscribe()
    }

    /// A generation.
    pub fn generation(&self, id: &GenerationId) -> Option<Arc<Generation>> {
        self.generations.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// All generations, those that were rolled back among them.
    pub fn generations(&self) -> Vec<Arc<Generation>> {
        self.generations.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Forgets a generation that no manifest names any more.
    ///
    /// # Errors
    /// When its file cannot be removed.
    pub fn remove_generation(&self, id: &GenerationId) -> anyhow::Result<()> {
        self.generations.write().unwrap_or_else(PoisonError::into_inner).remove(id);
        match fs::remove_file(self.generation_path(id)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// A lineage; an empty one where nothing was learned yet.
    pub fn lineage(&self, domain: &Domain) -> Lineage {
        self.try_manifest().and_then(|m| m.lineages.get(domain).cloned()).unwrap_or_default()
    }

    /// The current generation of a lineage and its ancestors, newest first.
    pub fn chain(&self, lineage: &Domain) -> Vec<Arc<Generation>> {
        self.ancestors(self.lineage(lineage).current)
    }

    /// A generation and its ancestors, newest first.
    pub fn ancestors(&self, mut at: Option<GenerationId>) -> Vec<Arc<Generation>> {
        let mut chain = Vec::new();
        while let Some(generation) = at.and_then(|id| self.generation(&id)) {
            at = generation.parent.clone();
            chain.push(generation);
        }
        chain
    }

    /// The generation, current or before it, in which a lineage learned a document.
    pub fn learned_in(&self, lineage: &Domain, ordinal: u64) -> Option<Arc<Generation>> {
        self.chain(lineage).into_iter().find(|g| g.after < ordinal && ordinal <= g.through)
    }

    /// Whether a lineage has moved on from where a batch found it: by a rollback, an import, or something forgotten.
    pub fn has_passed(&self, batch: &Batch) -> bool {
        let lineage = self.lineage(&batch.lineage);
        lineage.cursor != batch.after || lineage.current != batch.parent
    }

    /// Keeps the past as it is while this is held: forgetting waits with what it removes, and whoever reads what
    /// generations learned waits for a forgetting to be over.
    pub fn hold_past(&self) -> MutexGuard<'_, ()> {
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that inference serves this manifest.
    pub fn set_live(&self, number: u64) {
        self.live.fetch_max(number, Ordering::Relaxed);
    }

    /// The newest manifest that inference serves.
    pub fn live(&self) -> u64 {
        self.live.load(Ordering::Relaxed)
    }

    fn generation_path(&self, id: &GenerationId) -> PathBuf {
        self.dir.join("generations").join(format!("{id}.json"))
    }
}

/// The manifest that `CURRENT` names, or the newest whole one.
fn newest(
    dir: &Path,
    generations: &BTreeMap<GenerationId, Arc<Generation>>,
) -> anyhow::Result<Option<Manifest>> {
    let mut paths = files(&dir.join("manifests"))?;
    paths.sort();
    let named =
        fs::read_to_string(dir.join("CURRENT")).ok().map(|name| dir.join("manifests").join(name.trim()));
    let before_it =
        |path: &&PathBuf| named.as_ref().is_none_or(|named| !paths.contains(named) || *path <= named);
    for path in paths.iter().rev().filter(before_it) {
        let whole = read::<Manifest>(path).and_then(|manifest| {
            let mut named = manifest.lineages.values().filter_map(|l| l.current.as_ref());
            match named.find(|id| !generations.contains_key(*id)) {
                Some(id) => bail!("{} names generation {id}, which is not there", path.display()),
                None => Ok(manifest),
            }
        });
        match whole {
            Ok(manifest) => return Ok(Some(manifest)),
            Err(error) => tracing::error!(%error, "a manifest cannot be used; taking the one before it"),
        }
    }
    if paths.is_empty() {
        return Ok(None);
    }
    bail!("no manifest in {} can be used; restore the folder from a copy", dir.display())
}

fn files(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("{} cannot be read", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            paths.push(path);
        }
    }
    Ok(paths)
}

fn write<T: Serialize>(path: &Path, value: &T) -> anyhow::Result<()> {
    let body = serde_json::to_string_pretty(value)?;
    write_durably(path, format!("{}\n{body}\n", blake3::hash(body.as_bytes()).to_hex()).as_bytes())
}

fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text = fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
    let (hash, body) = text.split_once('\n').unwrap_or_default();
    let body = body.strip_suffix('\n').unwrap_or(body);
    if blake3::hash(body.as_bytes()).to_hex().as_str() != hash {
        bail!("{} is damaged: its content does not have its hash", path.display());
    }
    serde_json::from_str(body).with_context(|| format!("{}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::BaseId;

    fn manifest(number: u64) -> Manifest {
        let base = BaseId::new("0123456789abcdef").expect("an id");
        Manifest { number, ..Manifest::empty(base, false) }
    }

    fn folder_with(numbers: std::ops::RangeInclusive<u64>) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a folder");
        let registry = Registry::open(dir.path()).expect("opened");
        for number in numbers {
            registry.commit(manifest(number), None).expect("committed");
        }
        dir
    }

    fn current(dir: &Path) -> u64 {
        Registry::open(dir).expect("opened").manifest().number
    }

    #[test]
    fn the_newest_manifest_is_current_and_old_ones_go() {
        let dir = folder_with(1..=50);
        assert_eq!(current(dir.path()), 50);
        assert_eq!(files(&dir.path().join("manifests")).expect("files").len() as u64, MANIFESTS_KEPT);
    }

    #[test]
    fn without_current_or_with_an_empty_one_the_newest_is_taken() {
        let dir = folder_with(1..=3);
        fs::remove_file(dir.path().join("CURRENT")).expect("removed");
        assert_eq!(current(dir.path()), 3);
        fs::write(dir.path().join("CURRENT"), "").expect("emptied");
        assert_eq!(current(dir.path()), 3);
    }

    #[test]
    fn a_manifest_that_was_not_made_current_is_not() {
        let dir = folder_with(1..=3);
        fs::write(dir.path().join("CURRENT"), "000000000002.json").expect("written");
        assert_eq!(current(dir.path()), 2);
    }

    #[test]
    fn each_damage_of_a_manifest_leads_to_its_parent() {
        let dir = folder_with(1..=3);
        let path = dir.path().join("manifests/000000000003.json");
        let whole = fs::read(&path).expect("read");
        for at in (0..whole.len()).step_by(7) {
            let mut damaged = whole.clone();
            damaged[at] ^= 4;
            fs::write(&path, &damaged).expect("damaged");
            assert_eq!(current(dir.path()), 2, "byte {at}");
            fs::write(&path, &whole[..at]).expect("cut");
            assert_eq!(current(dir.path()), 2, "cut at {at}");
        }
    }

    #[test]
    fn a_manifest_whose_generation_is_gone_gives_way() {
        let dir = folder_with(1..=2);
        let registry = Registry::open(dir.path()).expect("opened");
        let mut third = manifest(3);
        let current_id = Some(GenerationId::new("fedcba9876543210").expect("an id"));
        third.lineages.insert(Domain::general(), Lineage { current: current_id, ..Lineage::default() });
        registry.commit(third, None).expect("committed");
        assert_eq!(current(dir.path()), 2);
    }

    #[test]
    fn a_folder_without_any_whole_manifest_says_so() {
        let dir = folder_with(1..=1);
        fs::write(dir.path().join("manifests/000000000001.json"), "").expect("emptied");
        assert!(Registry::open(dir.path()).is_err());
    }
}
