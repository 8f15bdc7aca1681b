//! A replay buffer that is full, with its rows on disk, as the learner's mixer keeps it.

use crate::topology;
use anyhow::{Context, Result};
use kit::settings::Settings;
use kit::store::Store;
use proto::wire::{self, Kind};
use proto::{Domain, Example, ExampleId, Piece};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use replay::{Buffer, Row};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// Examples that the buffer takes in at once while it is filled.
const TAKEN_IN: usize = 256;
/// Numbers in the signature of an example, as `filter` makes them.
const SIGNATURE_LEN: usize = 64;

/// The buffer, with its store in a temporary folder. Examples are random, all of one domain.
pub struct FullBuffer {
    buffer: Buffer,
    /// Closed before its folder goes.
    store: Store,
    folder: TempDir,
    domain: Domain,
    /// Tokens of an example, and how many there are to choose from.
    tokens: usize,
    vocabulary: u32,
    /// Examples that were offered so far.
    offered: u64,
}

impl FullBuffer {
    /// One of `capacity` examples of so many `tokens`, with the strategy that the settings name.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn new(settings: &Settings, capacity: usize, tokens: usize, vocabulary: u32) -> Result<Self> {
        let folder = tempfile::tempdir().context("no folder for a replay buffer")?;
        let store = Store::open(&folder.path().join("replay"))?;
        let mixing = topology::mixing(settings, folder.path().to_owned());
        let buffer = Buffer::new(capacity, mixing.strategy, mixing.seed);
        let mut full =
            Self { buffer, store, folder, domain: Domain::general(), tokens, vocabulary, offered: 0 };
        while full.offered < capacity as u64 {
            let left = capacity - usize::try_from(full.offered)?;
            full.take_in(left.min(TAKEN_IN))?;
        }
        Ok(full)
    }

    /// Offers new examples to the buffer, and brings the rows on disk in line with what it keeps of them.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn take_in(&mut self, count: usize) -> Result<()> {
        let examples: Vec<Example> = (0..count as u64).map(|n| self.example(self.offered + n)).collect();
        self.offered += count as u64;
        let changes = self.buffer.learn(examples.iter().map(|example| (example.id, row(example))).collect());
        for id in &changes.evicted {
            self.store.remove(*id)?;
        }
        for example in examples.iter().filter(|example| changes.entered.contains(&example.id)) {
            self.store.put(example.id, &wire::encode(Kind::Row, example)?)?;
        }
        self.store.flush()
    }

    /// Draws so many examples, and reads them.
    ///
    /// # Errors
    /// When a row cannot be read.
    pub fn draw(&self, count: usize, seed: u64) -> Result<Vec<Example>> {
        let ids = self.buffer.draw(Some(&self.domain), count, seed, &BTreeSet::new());
        let read = |id: ExampleId| -> Result<Example> {
            let bytes = self.store.get(id)?.context("a row of the replay buffer is missing")?;
            Ok(wire::decode(Kind::Row, &bytes, wire::PAYLOAD_BYTES_MAX)?)
        };
        ids.into_iter().map(read).collect()
    }

    /// The digest of all rows, which each batch carries.
    ///
    /// # Errors
    /// When a row cannot be read.
    pub fn digest(&self) -> Result<String> {
        self.store.digest()
    }

    /// Examples held.
    pub fn len(&self) -> usize {
        self.buffer.ids().count()
    }

    /// Bytes that its rows take on disk.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn disk_bytes(&self) -> Result<u64> {
        bytes_in(self.folder.path())
    }

    fn example(&self, ordinal: u64) -> Example {
        let mut rng = ChaCha8Rng::seed_from_u64(ordinal);
        let tokens = (0..self.tokens).map(|_| rng.random_range(0..self.vocabulary)).collect();
        Example {
            id: ExampleId { ordinal, chunk: 0 },
            domain: self.domain.clone(),
            piece: Piece { tokens, learned: vec![(0, self.tokens as u32)] },
            importance: 0.5,
            marked: false,
            held_out: false,
            signature: (0..SIGNATURE_LEN).map(|_| rng.random()).collect(),
        }
    }
}

/// As the mixer has it, with a loss that differs from example to example.
fn row(example: &Example) -> Row {
    Row {
        domain: example.domain.clone(),
        marked: None,
        first_loss: (example.id.ordinal % 7) as f32,
        signature: example.signature.clone(),
        answer: None,
    }
}

fn bytes_in(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() { bytes_in(&entry.path())? } else { metadata.len() };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_full_and_stays_so_and_what_is_drawn_can_be_read() {
        let settings = Settings::load(None, &[]).expect("settings");
        let mut full = FullBuffer::new(&settings, 300, 8, 50).expect("filled");
        assert_eq!(full.len(), 300);
        let drawn = full.draw(20, 1).expect("read");
        assert!(drawn.len() == 20 && drawn.iter().all(|example| example.piece.tokens.len() == 8));
        let before = full.digest().expect("a digest");
        full.take_in(40).expect("taken in");
        assert_eq!(full.len(), 300);
        assert_ne!(full.digest().expect("a digest"), before, "some of the new ones entered");
        assert!(full.disk_bytes().expect("counted") > 300 * 8 * 4);
    }
}
