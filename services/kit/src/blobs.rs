//! Immutable files named by the BLAKE3 hash of their content, and verified by it on each load.

use anyhow::{Context, bail};
use proto::Blob;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// A folder of such files.
#[derive(Debug)]
pub struct Blobs {
    dir: PathBuf,
}

impl Blobs {
    /// Opens the folder, and makes it where it is not there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Writes bytes, durable when this returns. Equal bytes have one file.
    ///
    /// # Errors
    /// When the disk does not take them.
    pub fn put(&self, bytes: &[u8]) -> anyhow::Result<Blob> {
        let blob = Blob(blake3::hash(bytes).to_hex().to_string());
        let path = self.path(&blob)?;
        // A damaged file of this name is written again.
        if self.get(&blob).is_err() {
            write_durably(&path, bytes)?;
        }
        Ok(blob)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// When it is missing, or is not what its name says.
    pub fn get(&self, blob: &Blob) -> anyhow::Result<Vec<u8>> {
        let path = self.path(blob)?;
        let bytes = fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        if blake3::hash(&bytes).to_hex().as_str() != blob.0 {
            bail!("{} is damaged: its content does not have the hash of its name", path.display());
        }
        Ok(bytes)
    }

    /// Removes a file, where it is there.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self, blob: &Blob) -> anyhow::Result<()> {
        match fs::remove_file(self.path(blob)?) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Size of a file in bytes; none when it is not there.
    pub fn size(&self, blob: &Blob) -> Option<u64> {
        self.path(blob).ok().and_then(|path| fs::metadata(path).ok()).map(|meta| meta.len())
    }

    /// Removes all files but those named.
    ///
    /// # Errors
    /// When the folder cannot be read, or a file not be removed.
    pub fn retain(&self, keep: impl Fn(&Blob) -> bool) -> anyhow::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            // What a crash left half written has another ending, and goes too.
            if !keep(&Blob(name)) {
                fs::remove_file(&path).with_context(|| format!("{} cannot be removed", path.display()))?;
            }
        }
        Ok(())
    }

    /// A name comes out of files and messages; one that is no hash could lead out of the folder.
    fn path(&self, blob: &Blob) -> anyhow::Result<PathBuf> {
        let is_hash = blob.0.len() == 64 && blob.0.bytes().all(|b| b.is_ascii_hexdigit());
        if !is_hash {
            bail!("{:?} is not the name of a file here", blob.0);
        }
        Ok(self.dir.join(&blob.0))
    }
}

/// Writes a file so that it is there whole or not at all, also after a loss of power: content, then
/// name, then folder.
pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let part = path.with_extension("part");
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&part, path)
    };
    write().with_context(|| format!("{} cannot be written", path.display()))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).with_context(|| format!("{}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_is_got_and_damage_is_refused_and_repaired() {
        let dir = tempfile::tempdir().expect("a folder");
        let blobs = Blobs::open(dir.path()).expect("opened");
        let blob = blobs.put(b"weights").expect("put");
        assert_eq!(blobs.get(&blob).expect("got"), b"weights");
        fs::write(dir.path().join(&blob.0), b"weighty").expect("damaged");
        assert!(blobs.get(&blob).is_err());
        assert_eq!(blobs.put(b"weights").expect("put again"), blob);
        assert_eq!(blobs.get(&blob).expect("got"), b"weights");
        blobs.remove(&blob).expect("removed");
        assert!(blobs.get(&blob).is_err());
        blobs.remove(&blob).expect("removing twice is no error");
    }

    #[test]
    fn a_name_that_is_no_hash_leads_nowhere() {
        let dir = tempfile::tempdir().expect("a folder");
        let blobs = Blobs::open(&dir.path().join("blobs")).expect("opened");
        fs::write(dir.path().join("secret"), b"x").expect("written");
        assert!(blobs.get(&Blob("../secret".into())).is_err());
        assert!(blobs.remove(&Blob("../secret".into())).is_err());
    }

    #[test]
    fn what_nobody_names_is_removed_half_written_files_too() {
        let dir = tempfile::tempdir().expect("a folder");
        let blobs = Blobs::open(dir.path()).expect("opened");
        let (a, b) = (blobs.put(b"a").expect("put"), blobs.put(b"b").expect("put"));
        fs::write(dir.path().join("1234.part"), b"half").expect("written");
        blobs.retain(|blob| *blob == a).expect("retained");
        assert!(blobs.get(&a).is_ok() && blobs.get(&b).is_err());
        assert_eq!(fs::read_dir(dir.path()).expect("read").count(), 1);
    }
}
