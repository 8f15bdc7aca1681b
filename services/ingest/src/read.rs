//! Files as documents, by one path for uploads and for `engram learn`.
//!
//! Text, Markdown and source code are taken as they stand; a JSONL file has a document a line. HTML and PDF are
//! formats in which others can write anything, so they become text in a process of their own, with limits
//! (`confined`), which runs [`convert`].

mod confined;
mod convert;
mod lines;

pub use convert::convert;
pub use lines::{split, tail};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{Read, Seek};
use std::path::PathBuf;

/// A larger file is a dump or a disk image, not something to read, bytes.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// So much of a file's beginning is looked at to tell what it is, bytes.
const SNIFFED_BYTES: u64 = 8 * 1024;
/// The name of what comes through a pipe, which has no extension to go by.
pub const STDIN: &str = "stdin";

/// A document that was found in a file.
#[derive(Debug, PartialEq)]
pub struct Draft {
    /// Where a person finds it: `notes.md`, `notes.md#2`, `facts.jsonl:17`.
    pub place: String,
    /// What `POST /v1/documents` takes.
    pub body: Map<String, Value>,
}

/// A form that is not text, and becomes text in a process of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A web page.
    Html,
    /// Pages that were laid out.
    Pdf,
}

impl Form {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Html => "html",
            Self::Pdf => "pdf",
        }
    }
}

impl std::str::FromStr for Form {
    type Err = anyhow::Error;
    fn from_str(name: &str) -> Result<Self> {
        [Self::Html, Self::Pdf]
            .into_iter()
            .find(|form| form.as_str() == name)
            .with_context(|| format!("{name:?} is no form that is converted"))
    }
}

/// What a file is.
#[derive(Debug, PartialEq)]
enum Kind {
    Text,
    Lines,
    Converted(Form),
    Binary,
}

/// Reads files.
#[derive(Debug, Clone)]
pub struct Reader {
    /// The program whose command `convert` is [`convert`].
    pub program: PathBuf,
    /// Where a converted text lies until it is read.
    pub scratch: PathBuf,
    /// Longer text becomes several documents, bytes.
    pub document_bytes_max: usize,
}

impl Reader {
    /// The documents in a file; a part that cannot be one is an error of its own. A file that holds no text at
    /// all, such as a picture, has none.
    ///
    /// # Errors
    /// When the file as a whole cannot be read, in a line that names it.
    pub fn documents(&self, mut file: File, name: &str) -> Result<Vec<Result<Draft>>> {
        let mut head = Vec::new();
        let unreadable = || format!("{name} cannot be read");
        (&mut file).take(SNIFFED_BYTES).read_to_end(&mut head).with_context(unreadable)?;
        file.rewind().with_context(unreadable)?;
        match kind(name, &head) {
            Kind::Binary => Ok(Vec::new()),
            Kind::Lines => Ok(lines::lines(name, &text(file, name)?, self.document_bytes_max)),
            Kind::Text => Ok(self.whole(name, &text(file, name)?)),
            Kind::Converted(form) => {
                let converted = confined::run(self, form, file, name)?;
                let lost = |page: &u32| Err(anyhow!("{name}: page {page} is damaged, and was left out"));
                let mut found = self.whole(name, &converted.text);
                found.extend(converted.lost.iter().map(lost));
                Ok(found)
            }
        }
    }

    fn whole(&self, name: &str, text: &str) -> Vec<Result<Draft>> {
        lines::parts(name, text, &Map::new(), self.document_bytes_max).into_iter().map(Ok).collect()
    }
}

fn kind(name: &str, head: &[u8]) -> Kind {
    let extension = name.rsplit_once('.').map(|(_, extension)| extension.to_ascii_lowercase());
    let begin = String::from_utf8_lossy(&head[..head.len().min(1024)]).to_ascii_lowercase();
    let begin = begin.trim_start_matches('\u{feff}').trim_start();
    match extension.as_deref() {
        // What comes before it in the first kilobyte, readers skip.
        _ if begin.contains("%pdf-") && (begin.starts_with("%pdf-") || head.contains(&0)) => {
            Kind::Converted(Form::Pdf)
        }
        Some("pdf") => Kind::Converted(Form::Pdf),
        _ if head.contains(&0) => Kind::Binary,
        Some("jsonl" | "ndjson") => Kind::Lines,
        Some("html" | "htm" | "xhtml") => Kind::Converted(Form::Html),
        None if name == STDIN && begin.starts_with('{') => Kind::Lines,
        None if begin.starts_with("<!doctype html") || begin.starts_with("<html") => {
            Kind::Converted(Form::Html)
        }
        _ => Kind::Text,
    }
}

fn text(file: File, name: &str) -> Result<String> {
    let mut bytes = Vec::new();
    let read = file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes);
    read.with_context(|| format!("{name} cannot be read"))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        bail!("{name} is larger than {} MiB; split it first", FILE_BYTES_MAX >> 20);
    }
    String::from_utf8(bytes).map_err(|_| anyhow!("{name} is neither UTF-8 text nor a known binary form"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn read(name: &str, content: &[u8]) -> Result<Vec<Result<Draft>>> {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(content).expect("written");
        file.rewind().expect("rewound");
        let scratch = std::env::temp_dir();
        // Nothing here is converted: tests/documents.rs does that with the real program.
        Reader { program: "/nowhere".into(), scratch, document_bytes_max: 64 * 1024 }.documents(file, name)
    }

    #[test]
    fn long_text_comes_in_numbered_parts_and_binary_files_do_not_come_at_all() {
        let drafts = read("long.md", "word ".repeat(20_000).as_bytes()).expect("read");
        let places: Vec<_> = drafts.iter().flatten().map(|draft| draft.place.as_str()).collect();
        assert_eq!(places, ["long.md#1", "long.md#2"]);
        assert!(read("image.png", b"\x89PNG\0\0").expect("read").is_empty());
        let error = read("latin.txt", b"caf\xe9").expect_err("not UTF-8").to_string();
        assert!(error.contains("latin.txt"), "{error}");
    }

    #[test]
    fn a_form_is_told_by_its_beginning_or_its_name() {
        let pdf = Kind::Converted(Form::Pdf);
        assert_eq!(kind("report", b"%PDF-1.7\n\0"), pdf);
        assert_eq!(kind("report.bin", b"junk\n%PDF-1.7\n\0"), pdf);
        assert_eq!(kind("about-pdf.md", b"A file that starts with %PDF- is one."), Kind::Text);
        assert_eq!(kind("empty.pdf", b""), pdf);
        assert_eq!(kind("page.HTM", b"plain"), Kind::Converted(Form::Html));
        assert_eq!(kind(STDIN, b"\xef\xbb\xbf <!DOCTYPE html><p>"), Kind::Converted(Form::Html));
        assert_eq!(kind("page.md", b"<html> is a tag"), Kind::Text);
        assert_eq!(kind(STDIN, b" {\"text\": 1}"), Kind::Lines);
        assert_eq!(kind("facts.jsonl", b"{}"), Kind::Lines);
        assert_eq!(kind("main.rs", b"fn main() {}"), Kind::Text);
    }
}
