//! Brings the files of a commit into the cache, each checked against its hash.

use super::api::{Announced, Commit, Hub, Passing};
use super::cache::Cache;
use super::is_plain;
use anyhow::{Context, Result, bail, ensure};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use model::hf::ModelConfig;
use model::weights;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;
use ureq::http::StatusCode;

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Those that a base has at most, beside its weights.
const SMALL: [&str; 5] =
    [CONFIG, TOKENIZER, "tokenizer_config.json", "chat_template.jinja", "generation_config.json"];

/// A download that is broken off is gone on with, unless so many tries in a row bring nothing.
const IDLE_TRIES_MAX: u32 = 3;
const PAUSE: Duration = Duration::from_millis(300);
const CHUNK_BYTES: usize = 1 << 18;
/// Less than this is not worth a line.
const TOLD_BYTES_MIN: u64 = 10 << 20;

/// Brings what is missing of a commit, and names its folder.
///
/// # Errors
/// When a file that a base needs is not there, is of a kind that this program does not run, does not
/// arrive, or is not what was announced.
pub(super) fn bring(hub: &Hub, cache: &Cache, commit: &Commit) -> Result<PathBuf> {
    let (name, has) = (&hub.name, |file: &str| commit.files.contains(file));
    for file in [CONFIG, TOKENIZER] {
        ensure!(has(file), "{name} has no {file}, so it cannot be a base; choose another model");
    }
    ensure!(
        has(WEIGHTS) || has(INDEX),
        "{name} has no {WEIGHTS}, and other formats are not read; choose a model or a revision that has it"
    );
    let fetch = Fetch { hub, cache, commit: &commit.sha, folder: cache.snapshot(&commit.sha) };
    let sharded = !has(WEIGHTS);
    // The weights come last, so that a copy with weights has the rest, too.
    let small = SMALL.into_iter().chain(sharded.then_some(INDEX)).filter(|file| has(file));
    fetch.files(small.map(str::to_owned).collect())?;
    // Before gigabytes are brought that nothing can be done with.
    ModelConfig::load(&fetch.folder).with_context(|| format!("{name} cannot be a base"))?;
    fetch.files(if sharded { fetch.shards(commit)? } else { vec![WEIGHTS.to_owned()] })?;
    cache.remember(&name.revision, &commit.sha)?;
    Ok(fetch.folder)
}

struct Fetch<'a> {
    hub: &'a Hub,
    cache: &'a Cache,
    commit: &'a str,
    folder: PathBuf,
}

impl Fetch<'_> {
    /// The files that the index names.
    fn shards(&self, commit: &Commit) -> Result<Vec<String>> {
        let name = &self.hub.name;
        let files = weights::model_files(&self.folder).with_context(|| format!("{name} cannot be a base"))?;
        let shard = |path: &PathBuf| {
            let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            ensure!(is_plain(&file), "{INDEX} of {name} names {file:?}, which is not a plain file name");
            ensure!(commit.files.contains(&file), "{name} has no {file}, which its {INDEX} names");
            Ok(file)
        };
        files.iter().map(shard).collect()
    }

    /// Brings those that the commit's folder does not have.
    fn files(&self, mut files: Vec<String>) -> Result<()> {
        files.retain(|file| !self.folder.join(file).is_file());
        let announced = |file: String| Ok((self.hub.announced(self.commit, &file)?, file));
        let wanted: Vec<(Announced, String)> = files.into_iter().map(announced).collect::<Result<_>>()?;
        let total = wanted.iter().fold(0, |sum: u64, (announced, _)| sum.saturating_add(announced.size));
        let missing = wanted.iter().fold(0, |sum: u64, (file, _)| sum.saturating_add(self.missing(file)));
        if missing > 0 {
            self.check_room(missing)?;
        }
        if missing >= TOLD_BYTES_MIN {
            eprintln!("engram: downloading {} of {}", HumanBytes(missing), self.hub.name);
        }
        let bar = bar(total);
        let mut before = 0;
        for (announced, file) in &wanted {
            bar.set_message(file.clone());
            bar.set_position(before);
            self.file(file, announced, &bar)?;
            before += announced.size;
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Bytes that have yet to arrive.
    fn missing(&self, announced: &Announced) -> u64 {
        match length(&self.cache.blob(&announced.etag)) {
            Some(size) if size == announced.size => 0,
            _ => {
                let there = length(&self.cache.incomplete(&announced.etag)).unwrap_or(0);
                announced.size.saturating_sub(there)
            }
        }
    }

    fn check_room(&self, missing: u64) -> Result<()> {
        let folder = self.cache.folder()?;
        let free = kit::disk::free_bytes(folder)?;
        ensure!(
            missing <= free,
            "{} needs {} more, and the disk of {} has {} free: make room there, or set HF_HUB_CACHE to a \
             folder on another disk",
            self.hub.name,
            HumanBytes(missing),
            folder.display(),
            HumanBytes(free)
        );
        Ok(())
    }

    /// Brings one file, unless the cache holds it for another commit.
    fn file(&self, file: &str, announced: &Announced, bar: &ProgressBar) -> Result<()> {
        let etag = &announced.etag;
        let _turn = self.cache.lock(etag, file)?;
        let (blob, part) = (self.cache.blob(etag), self.cache.incomplete(etag));
        if length(&blob) != Some(announced.size) {
            let folder = blob.parent().unwrap_or(&blob);
            fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
            self.patiently(file, announced, &part, bar)?;
            let written = || -> io::Result<()> {
                // What the blob's name promises has to hold after a crash, too.
                File::open(&part)?.sync_all()?;
                fs::rename(&part, &blob)
            };
            written().with_context(|| format!("{} cannot be written", blob.display()))?;
        }
        self.cache.link(self.commit, file, etag)
    }

    /// Goes on after each interruption, as long as something arrives.
    fn patiently(&self, file: &str, announced: &Announced, part: &Path, bar: &ProgressBar) -> Result<()> {
        let (mut furthest, mut idle) = (length(part).unwrap_or(0), 0);
        while let Err(error) = self.go_on(file, announced, part, bar) {
            if error.downcast_ref::<Passing>().is_none() {
                return Err(error);
            }
            let reached = length(part).unwrap_or(0);
            idle = if reached > furthest { 0 } else { idle + 1 };
            furthest = furthest.max(reached);
            if idle >= IDLE_TRIES_MAX {
                return Err(error.context(format!(
                    "{file} broke off after {} of {}; run the same command again, and it goes on from there",
                    HumanBytes(reached),
                    HumanBytes(announced.size)
                )));
            }
            thread::sleep(PAUSE * idle);
        }
        check(file, announced, part)
    }

    /// Adds to what has arrived so far, until it is as long as announced.
    fn go_on(&self, file: &str, announced: &Announced, part: &Path, bar: &ProgressBar) -> Result<()> {
        let unwritten = || format!("{} cannot be written; is its disk full?", part.display());
        let mut out = File::options().append(true).create(true).open(part).with_context(unwritten)?;
        let mut there = out.metadata().with_context(unwritten)?.len();
        // More than the whole is no beginning of it.
        if there > announced.size {
            out.set_len(0).with_context(unwritten)?;
            there = 0;
        }
        if there == announced.size && there > 0 {
            return Ok(());
        }
        let response = self.hub.content(self.commit, file, there)?;
        if there > 0 && !continues(&response, there) {
            out.set_len(0).with_context(unwritten)?;
            // Whoever cannot go on from there either gives all of it, or has to be asked for that.
            if response.status() != StatusCode::OK {
                return Err(Passing(format!("{file} cannot be gone on with")).into());
            }
            there = 0;
        }
        let start = bar.position();
        bar.set_position(start + there);
        // What was there before says nothing about how fast the rest comes.
        bar.reset_eta();
        // A byte too many shows that there are too many.
        let mut body = response.into_body().into_reader().take(announced.size - there + 1);
        let mut chunk = vec![0; CHUNK_BYTES];
        let broken = loop {
            match body.read(&mut chunk) {
                Ok(0) => break None,
                Ok(count) => {
                    out.write_all(&chunk[..count]).with_context(unwritten)?;
                    there += count as u64;
                    bar.inc(count as u64);
                }
                Err(error) => break Some(error),
            }
        };
        if there >= announced.size {
            return Ok(());
        }
        bar.set_position(start);
        let why = broken.map_or_else(|| "the connection was closed".to_owned(), |error| error.to_string());
        Err(Passing(why).into())
    }
}

/// Whether an answer goes on from this byte.
fn continues<T>(response: &ureq::http::Response<T>, from: u64) -> bool {
    let range = response.headers().get("content-range").and_then(|range| range.to_str().ok());
    response.status() == StatusCode::PARTIAL_CONTENT
        && range.is_some_and(|range| range.starts_with(&format!("bytes {from}-")))
}

/// Compares what arrived with what was announced. What differs is deleted: nothing could be added to
/// it that makes it right.
fn check(file: &str, announced: &Announced, part: &Path) -> Result<()> {
    let unread = || format!("{} cannot be read", part.display());
    let size = fs::metadata(part).with_context(unread)?.len();
    let hash = hash(part, size, &announced.etag).with_context(unread)?;
    if size == announced.size && hash == announced.etag {
        return Ok(());
    }
    fs::remove_file(part).with_context(|| format!("{} cannot be deleted", part.display()))?;
    bail!(
        "{file} is not what the hub announced ({size} bytes with hash {hash} instead of {} bytes with hash \
         {}), so it was deleted; run the same command again, and if this comes again, do not trust the network",
        announced.size,
        announced.etag
    )
}

/// The hash of a file, of the kind that `like` is: SHA-256, or the SHA-1 that git names it by.
fn hash(path: &Path, size: u64, like: &str) -> io::Result<String> {
    if like.len() == 40 {
        hash_with(Sha1::new_with_prefix(format!("blob {size}\0")), path)
    } else {
        hash_with(Sha256::new(), path)
    }
}

fn hash_with(mut hash: impl Digest, path: &Path) -> io::Result<String> {
    let (mut file, mut chunk) = (File::open(path)?, vec![0; CHUNK_BYTES]);
    loop {
        match file.read(&mut chunk)? {
            0 => break,
            count => hash.update(&chunk[..count]),
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn length(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|metadata| metadata.len())
}

fn bar(length: u64) -> ProgressBar {
    let bar = ProgressBar::new(length);
    match ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_git_and_of_sha256() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        fs::write(&path, "hello\n").expect("written");
        let git = "ce013625030ba8dba906f756967f9e9ca394464a";
        assert_eq!(hash(&path, 6, git).expect("a hash"), git);
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        assert_eq!(hash(&path, 6, sha256).expect("a hash"), sha256);
    }
}
