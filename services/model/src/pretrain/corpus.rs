//! Folders of text as training windows: documents, a token file on disk, and a seeded order.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rand::distr::weighted::WeightedIndex;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::tokenizer::Tokenizer;

/// Ends a document, as a line of its own in the text and as a token in the model.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// A text without separators must not become one string of any length.
const DOCUMENT_BYTES_MAX: usize = 1 << 20;

/// The training and the held-out texts of some folders, each sorted by path.
///
/// Held out is what ends in `.val.txt`; every other `.txt` file is for training.
///
/// # Errors
/// When a folder cannot be read, or there is nothing to train on.
pub fn texts(folders: &[PathBuf]) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut train, mut held_out) = (Vec::new(), Vec::new());
    for folder in folders {
        let entries =
            fs::read_dir(folder).with_context(|| format!("cannot read the folder {}", folder.display()))?;
        for entry in entries {
            let path = entry?.path();
            match path.file_name().and_then(|name| name.to_str()) {
                Some(name) if name.ends_with(".val.txt") => held_out.push(path),
                Some(name) if name.ends_with(".txt") => train.push(path),
                _ => {}
            }
        }
    }
    ensure!(!train.is_empty(), "the data folders hold no .txt file to train on");
    train.sort();
    held_out.sort();
    Ok((train, held_out))
}

/// The documents of a text file, without their separators and the line ends before those.
///
/// # Errors
/// When something cannot be read.
pub fn documents(path: &Path) -> Result<impl Iterator<Item = Result<String>> + use<>> {
    let name = path.display().to_string();
    let file = File::open(path).with_context(|| format!("cannot read {name}"))?;
    let mut lines = BufReader::new(file);
    Ok(std::iter::from_fn(move || {
        next_document(&mut lines).with_context(|| format!("cannot read {name}")).transpose()
    }))
}

fn next_document(lines: &mut impl BufRead) -> Result<Option<String>> {
    let mut text = String::new();
    loop {
        let start = text.len();
        let ended = lines.read_line(&mut text)? == 0;
        let separator = text[start..].trim_end() == END_OF_TEXT;
        if separator {
            text.truncate(start);
        }
        if ended || separator || text.len() >= DOCUMENT_BYTES_MAX {
            text.truncate(text.trim_end().len());
            if !text.is_empty() {
                return Ok(Some(text));
            }
            if ended {
                return Ok(None);
            }
        }
    }
}

/// A part of the token file: the tokens of one text.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Source {
    name: String,
    start: u64,
    tokens: u64,
}

/// All training tokens, two bytes each, in one file; windows are read from it as they are needed.
pub struct Corpus {
    file: File,
    sources: Vec<Source>,
}

impl Corpus {
    /// Tokenises `texts` into the file `path`. Every document is followed by `end`.
    ///
    /// # Errors
    /// When a text cannot be read, or the file cannot be written.
    pub fn build(tokenizer: &Tokenizer, end: u32, texts: &[PathBuf], path: &Path) -> Result<Self> {
        tokenizer.check_vocabulary(1 << 16).context("the token file has two bytes for a token")?;
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        let mut out = BufWriter::new(file);
        let mut sources = Vec::new();
        let mut start = 0;
        for text in texts {
            let mut tokens = 0;
            for document in documents(text)? {
                let mut ids = tokenizer.encode(&document?)?;
                ids.push(end);
                for id in &ids {
                    out.write_all(&(*id as u16).to_le_bytes())?;
                }
                tokens += ids.len() as u64;
            }
            let name = text.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            sources.push(Source { name, start, tokens });
            start += tokens;
        }
        out.flush()?;
        let file = File::open(path)?;
        Ok(Self { file, sources })
    }

    /// Name and number of tokens of each text.
    pub fn sources(&self) -> impl Iterator<Item = (&str, u64)> {
        self.sources.iter().map(|source| (source.name.as_str(), source.tokens))
    }

    /// The `length` tokens from position `start` on.
    ///
    /// # Errors
    /// When the file is shorter, or cannot be read.
    pub fn read(&self, start: u64, length: usize) -> Result<Vec<u32>> {
        let mut bytes = vec![0; 2 * length];
        self.file.read_exact_at(&mut bytes, 2 * start).context("cannot read the token file")?;
        let token = |pair: &[u8]| u32::from(u16::from_le_bytes([pair[0], pair[1]]));
        Ok(bytes.chunks_exact(2).map(token).collect())
    }
}

/// The endless, seeded order in which windows are trained on.
///
/// A text of n tokens is drawn in proportion to n^`exponent`: at 1 the largest text drowns the
/// others, at 0 all count alike. Within a text every window comes once before any comes again.
pub struct Order {
    random: ChaCha8Rng,
    choice: WeightedIndex<f64>,
    texts: Vec<Windows>,
}

struct Windows {
    starts: Vec<u64>,
    used: usize,
}

impl Order {
    /// The order of windows of `length` tokens. Neighbours share one token: the last that the one predicts
    /// is the first that the other reads.
    ///
    /// # Errors
    /// When no text is as long as a window.
    pub fn new(corpus: &Corpus, length: usize, exponent: f64, seed: u64) -> Result<Self> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let (mut texts, mut weights) = (Vec::new(), Vec::new());
        for source in &corpus.sources {
            let stride = length as u64 - 1;
            let count = source.tokens.saturating_sub(1) / stride;
            if count == 0 {
                continue;
            }
            let mut starts: Vec<u64> = (0..count).map(|i| source.start + i * stride).collect();
            starts.shuffle(&mut random);
            texts.push(Windows { starts, used: 0 });
            weights.push((source.tokens as f64).powf(exponent));
        }
        ensure!(!texts.is_empty(), "no text is as long as one window of {length} tokens");
        let choice = WeightedIndex::new(weights)?;
        Ok(Self { random, choice, texts })
    }
}

impl Iterator for Order {
    type Item = u64;

    /// Where the next window starts.
    fn next(&mut self) -> Option<u64> {
        let text = &mut self.texts[self.random.sample(&self.choice)];
        if text.used == text.starts.len() {
            text.starts.shuffle(&mut self.random);
            text.used = 0;
        }
        text.used += 1;
        Some(text.starts[text.used - 1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corpus(tokens: &[u64]) -> Corpus {
        let mut file = tempfile::tempfile().unwrap();
        let mut sources = Vec::new();
        let mut start = 0;
        for &tokens in tokens {
            sources.push(Source { name: String::new(), start, tokens });
            start += tokens;
        }
        for id in 0..start {
            file.write_all(&(id as u16).to_le_bytes()).unwrap();
        }
        Corpus { file, sources }
    }

    #[test]
    fn documents_end_at_separators_and_at_the_end_of_the_file() {
        let mut text = tempfile::NamedTempFile::new().unwrap();
        write!(text, "one\ntwo\n{END_OF_TEXT}\n\n{END_OF_TEXT}\nthree <|endoftext|> four").unwrap();
        let found: Vec<String> = documents(text.path()).unwrap().map(Result::unwrap).collect();
        assert_eq!(found, ["one\ntwo", "three <|endoftext|> four"]);
    }

    #[test]
    fn text_that_is_not_utf8_is_an_error_and_not_a_panic() {
        let mut text = tempfile::NamedTempFile::new().unwrap();
        text.write_all(b"fine\n\xff\xfe\n").unwrap();
        let error = documents(text.path()).unwrap().next().unwrap().unwrap_err();
        assert!(error.to_string().contains("cannot read"), "{error}");
    }

    #[test]
    fn order_is_a_function_of_the_seed_and_sees_every_window_once() {
        let corpus = corpus(&[101, 5, 41]);
        let order = |seed| Order::new(&corpus, 11, 1.0, seed).unwrap();
        let first: Vec<u64> = order(7).take(50).collect();
        assert_eq!(first, order(7).take(50).collect::<Vec<_>>());
        assert_ne!(first, order(8).take(50).collect::<Vec<_>>());
        let mut large: Vec<u64> = first.into_iter().filter(|&start| start < 101).take(10).collect();
        large.sort();
        assert_eq!(large, (0..10).map(|i| i * 10).collect::<Vec<_>>());
    }

    #[test]
    fn windows_read_what_was_written() {
        let corpus = corpus(&[300]);
        assert_eq!(corpus.read(255, 3).unwrap(), [255, 256, 257]);
        assert!(corpus.read(299, 2).is_err());
    }
}
