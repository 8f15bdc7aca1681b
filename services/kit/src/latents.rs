//! What a frozen base makes of examples, so that it need not be computed again: files by example, bounded.
//!
//! A cache. Nothing is acknowledged on it, what is damaged or belongs to another base is not there, and all of it may
//! be removed at any time. Forgetting a document removes what was computed from it.

use anyhow::Context;
use proto::ExampleId;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes of a hash; a file begins with two: of what it was computed from, and of what follows.
const HASH_BYTES: usize = 32;

/// A folder of such files. Shared by threads.
#[derive(Debug)]
pub struct Latents {
    dir: PathBuf,
    bytes_max: u64,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    /// Sizes, and when each file was written: a count that grows.
    files: BTreeMap<ExampleId, (u64, u64)>,
    /// The files by when they were written.
    by_age: BTreeMap<u64, ExampleId>,
    bytes: u64,
    /// Documents that were forgotten while a batch that holds them may be under way.
    forgotten: BTreeSet<u64>,
}

impl Held {
    fn insert(&mut self, id: ExampleId, size: u64) {
        self.remove(id);
        let age = self.by_age.last_key_value().map_or(0, |(age, _)| age + 1);
        self.files.insert(id, (size, age));
        self.by_age.insert(age, id);
        self.bytes += size;
    }

    fn remove(&mut self, id: ExampleId) {
        if let Some((size, age)) = self.files.remove(&id) {
            self.by_age.remove(&age);
            self.bytes -= size;
        }
    }
}

impl Latents {
    /// Opens the folder, and makes it where it is not there; it will hold at most `bytes_max`.
    ///
    /// # Errors
    /// When it cannot be made or read.
    pub fn open(dir: &Path, bytes_max: u64) -> anyhow::Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
        let mut found = Vec::new();
        for entry in fs::read_dir(dir)? {
            let (entry, meta) = entry.and_then(|entry| entry.metadata().map(|meta| (entry, meta)))?;
            match id(&entry.file_name().to_string_lossy()) {
                Some(id) => found.push((meta.modified()?, id, meta.len())),
                None => fs::remove_file(entry.path())?,
            }
        }
        found.sort();
        let mut held = Held::default();
        for (_, id, size) in found {
            held.insert(id, size);
        }
        let latents = Self { dir: dir.to_owned(), bytes_max, held: Mutex::new(held) };
        latents.make_room(&mut latents.held(), 0)?;
        Ok(latents)
    }

    /// What was computed of an example `from` this; none when it is not there, is damaged, or was computed from
    /// something else.
    pub fn get(&self, id: ExampleId, from: &[u8; HASH_BYTES]) -> Option<Vec<u8>> {
        let mut bytes = {
            let held = self.held();
            held.files.contains_key(&id).then(|| fs::read(self.path(id)).ok()).flatten()?
        };
        let (hashes, content) = bytes.split_at_checked(2 * HASH_BYTES)?;
        let intact =
            hashes[..HASH_BYTES] == *from && hashes[HASH_BYTES..] == *blake3::hash(content).as_bytes();
        intact.then(|| bytes.split_off(2 * HASH_BYTES))
    }

    /// Keeps what was computed of an example `from` something, a hash of all that it depends on. The oldest make room.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn put(&self, id: ExampleId, from: &[u8; HASH_BYTES], content: &[u8]) -> anyhow::Result<()> {
        let mut held = self.held();
        let size = (content.len() + 2 * HASH_BYTES) as u64;
        if size > self.bytes_max || held.forgotten.contains(&id.ordinal) {
            return Ok(());
        }
        self.make_room(&mut held, size)?;
        let file = [from, blake3::hash(content).as_bytes(), content].concat();
        let path = self.path(id);
        // Known of before it is there, so that what is left of it where the disk fails is forgotten too.
        held.insert(id, size);
        fs::write(&path, file).with_context(|| format!("{} cannot be written", path.display()))
    }

    /// Removes all that was computed of these documents, and takes nothing of them any more.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn forget(&self, ordinals: &BTreeSet<u64>) -> anyhow::Result<()> {
        let mut held = self.held();
        held.forgotten.extend(ordinals);
        let gone: Vec<ExampleId> =
            held.files.keys().filter(|id| ordinals.contains(&id.ordinal)).copied().collect();
        gone.into_iter().try_for_each(|id| self.remove(&mut held, id))
    }

    fn make_room(&self, held: &mut Held, size: u64) -> anyhow::Result<()> {
        while held.bytes + size > self.bytes_max
            && let Some((_, &oldest)) = held.by_age.first_key_value()
        {
            self.remove(held, oldest)?;
        }
        Ok(())
    }

    fn remove(&self, held: &mut Held, id: ExampleId) -> anyhow::Result<()> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("{} cannot be removed", path.display()))
            }
            _ => {
                held.remove(id);
                Ok(())
            }
        }
    }

    fn path(&self, id: ExampleId) -> PathBuf {
        self.dir.join(format!("{}-{}", id.ordinal, id.chunk))
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn id(name: &str) -> Option<ExampleId> {
    let (ordinal, chunk) = name.split_once('-')?;
    Some(ExampleId { ordinal: ordinal.parse().ok()?, chunk: chunk.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: [u8; HASH_BYTES] = [7; HASH_BYTES];

    fn example(ordinal: u64) -> ExampleId {
        ExampleId { ordinal, chunk: 2 }
    }

    fn there(latents: &Latents) -> Vec<u64> {
        (0..10).filter(|&n| latents.get(example(n), &FROM).is_some()).collect()
    }

    #[test]
    fn what_was_put_is_there_also_after_a_restart_and_damage_is_not() {
        let dir = tempfile::tempdir().expect("a folder");
        let latents = Latents::open(dir.path(), 1000).expect("opened");
        latents.put(example(1), &FROM, b"one").expect("put");
        latents.put(example(2), &FROM, b"two").expect("put");
        fs::write(dir.path().join("2-2"), [&FROM[..], &FROM, b"tow"].concat()).expect("damaged");
        fs::write(dir.path().join("else"), b"").expect("written");
        for latents in [latents, Latents::open(dir.path(), 1000).expect("opened again")] {
            assert_eq!(latents.get(example(1), &FROM).as_deref(), Some(&b"one"[..]));
            assert_eq!(latents.get(example(1), &[8; HASH_BYTES]), None, "another base's");
            assert_eq!(there(&latents), [1]);
        }
    }

    #[test]
    fn the_oldest_make_room() {
        let dir = tempfile::tempdir().expect("a folder");
        let latents = Latents::open(dir.path(), 210).expect("opened");
        for n in [1, 2, 1, 3, 4] {
            latents.put(example(n), &FROM, b"12345").expect("put");
        }
        assert_eq!(there(&latents), [1, 3, 4]);
        latents.put(example(5), &FROM, &[0; 200]).expect("too large is no error");
        assert_eq!(there(&latents), [1, 3, 4]);
        drop(latents);
        assert_eq!(there(&Latents::open(dir.path(), 70).expect("opened")).len(), 1);
        assert_eq!(there(&Latents::open(dir.path(), 0).expect("opened")).len(), 0);
    }

    #[test]
    fn what_somebody_removed_or_could_not_be_written_stands_in_nobodys_way() {
        let dir = tempfile::tempdir().expect("a folder");
        let latents = Latents::open(dir.path(), 150).expect("opened");
        latents.put(example(1), &FROM, b"12345").expect("put");
        fs::remove_file(dir.path().join("1-2")).expect("removed");
        // A folder in the place of a file cannot be written to.
        fs::create_dir(dir.path().join("2-2")).expect("made");
        assert!(latents.put(example(2), &FROM, b"12345").is_err());
        fs::remove_dir(dir.path().join("2-2")).expect("removed");
        latents.put(example(3), &FROM, b"12345").expect("put: the first made room");
        latents.forget(&BTreeSet::from([1, 2])).expect("forgotten");
        assert_eq!(there(&latents), [3]);
    }

    #[test]
    fn nothing_of_a_forgotten_document_is_kept_or_taken_again() {
        let dir = tempfile::tempdir().expect("a folder");
        let latents = Latents::open(dir.path(), 1000).expect("opened");
        latents.put(example(1), &FROM, b"secret").expect("put");
        latents.put(example(2), &FROM, b"other").expect("put");
        latents.forget(&BTreeSet::from([1])).expect("forgotten");
        latents.put(example(1), &FROM, b"secret").expect("no error");
        assert_eq!(there(&latents), [2]);
        assert_eq!(fs::read_dir(dir.path()).expect("read").count(), 1);
    }
}
