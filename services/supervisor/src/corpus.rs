//! Files and folders as documents: what `engram learn` sends.

use anyhow::{Context, Result, anyhow, bail};
use ignore::WalkBuilder;
use serde_json::{Map, Value};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The server takes documents up to this size, bytes; longer text is sent in parts.
pub const DOCUMENT_BYTES_MAX: usize = 64 * 1024;
/// A larger file is a dump or a disk image, not something to read, bytes.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// A file with a zero byte in its first so many bytes is taken for binary.
const SNIFFED_BYTES: usize = 8 * 1024;

/// The fields of a document that the server knows. Data sets often carry others, for others.
const FIELDS: [&str; 8] =
    ["text", "prompt", "completion", "messages", "domain", "importance", "source", "derived_from"];
/// The server takes sources up to this length, bytes.
const SOURCE_BYTES_MAX: usize = 256;

/// A document on its way to the server.
#[derive(Debug, PartialEq)]
pub struct Draft {
    /// Where a person finds it: `notes.md`, `notes.md#2`, `facts.jsonl:17`.
    pub place: String,
    /// The body of the request.
    pub body: Map<String, Value>,
}

/// A file to read, and the name that its documents carry as their source.
#[derive(Debug)]
pub struct SourceFile {
    path: PathBuf,
    name: String,
}

/// The files under `paths`, in a stable order. What git ignores and what is hidden is left out,
/// unless it is named itself.
///
/// # Errors
/// When a path cannot be read.
pub fn files(paths: &[PathBuf]) -> Result<Vec<SourceFile>> {
    let mut found = Vec::new();
    for root in paths {
        if root.as_os_str() == "-" {
            found.push(SourceFile { path: root.clone(), name: "stdin".into() });
            continue;
        }
        if !root.exists() {
            bail!("there is no file or folder {}", root.display());
        }
        let walk = WalkBuilder::new(root).require_git(false).sort_by_file_path(Ord::cmp).build();
        for entry in walk {
            let entry = entry.with_context(|| format!("{} cannot be read", root.display()))?;
            if entry.file_type().is_some_and(|kind| kind.is_file()) {
                found.push(SourceFile { name: source_name(root, entry.path()), path: entry.into_path() });
            }
        }
    }
    Ok(found)
}

/// A file of a folder is named from the folder on; one that was named itself, by its file name.
fn source_name(root: &Path, path: &Path) -> String {
    let parent = root.parent().unwrap_or(root);
    path.strip_prefix(parent).unwrap_or(path).to_string_lossy().into_owned()
}

impl SourceFile {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its documents; a line that cannot be one is an error of its own. A binary file has none.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn documents(&self) -> Result<Vec<Result<Draft>>> {
        let bytes = self.read().with_context(|| format!("{} cannot be read", self.path.display()))?;
        if bytes[..bytes.len().min(SNIFFED_BYTES)].contains(&0) {
            return Ok(Vec::new());
        }
        let Ok(text) = String::from_utf8(bytes) else {
            return Ok(vec![Err(anyhow!("{} is neither UTF-8 text nor a known binary form", self.name))]);
        };
        let lines = self.path.extension().is_some_and(|extension| extension == "jsonl")
            || (self.name == "stdin" && text.trim_start().starts_with('{'));
        if !lines {
            return Ok(parts(&self.name, &text, &Map::new()));
        }
        let numbered = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        Ok(numbered.flat_map(|(number, line)| self.line(number + 1, line)).collect())
    }

    fn read(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        if self.name == "stdin" {
            std::io::stdin().lock().take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        } else {
            fs::File::open(&self.path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        }
        if bytes.len() as u64 > FILE_BYTES_MAX {
            bail!("it is larger than {} MiB; split it first", FILE_BYTES_MAX >> 20);
        }
        Ok(bytes)
    }

    fn line(&self, number: usize, line: &str) -> Vec<Result<Draft>> {
        let place = format!("{}:{number}", self.name);
        let Ok(Value::Object(mut body)) = serde_json::from_str(line) else {
            return vec![Err(anyhow!("{place} is not a JSON object"))];
        };
        body.retain(|field, _| FIELDS.contains(&field.as_str()));
        body.entry("source").or_insert_with(|| source(&self.name).into());
        let has = |key: &str| body.contains_key(key);
        if has("prompt") && has("completion") || has("messages") {
            return vec![Ok(Draft { place, body })];
        }
        match body.remove("text") {
            Some(Value::String(text)) => parts(&place, &text, &body),
            _ => vec![Err(anyhow!(
                "{place} has none of the three forms {{\"text\"}}, {{\"prompt\", \"completion\"}}, {{\"messages\"}}"
            ))],
        }
    }
}

/// Text as one document, or as many when it is longer than the server takes.
fn parts(place: &str, text: &str, fields: &Map<String, Value>) -> Vec<Result<Draft>> {
    let pieces = split(text, DOCUMENT_BYTES_MAX);
    let many = pieces.len() > 1;
    let draft = |(index, piece): (usize, &str)| {
        let place = if many { format!("{place}#{}", index + 1) } else { place.to_owned() };
        let mut body = fields.clone();
        body.insert("text".into(), piece.into());
        body.entry("source").or_insert_with(|| source(&place).into());
        Ok(Draft { place, body })
    };
    pieces.into_iter().enumerate().map(draft).collect()
}

/// A place as a source: of one that is too long, the end says more than the beginning.
pub fn source(place: &str) -> &str {
    let least = place.len().saturating_sub(SOURCE_BYTES_MAX);
    let start = (least..place.len()).find(|at| place.is_char_boundary(*at));
    &place[start.unwrap_or(0)..]
}

/// Cuts text into pieces of at most `limit` bytes: at the last blank line that fits, else at the
/// last line break, else at the last space, else between two characters. Blank pieces are dropped.
pub fn split(text: &str, limit: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while rest.len() > limit {
        let end = (1..=limit).rev().find(|at| rest.is_char_boundary(*at)).unwrap_or(rest.len());
        let window = &rest[..end];
        let cut = ["\n\n", "\n", " "]
            .iter()
            .find_map(|border| window.rfind(border).map(|at| at + border.len()))
            .unwrap_or(window.len());
        let (piece, after) = rest.split_at(cut);
        pieces.push(piece);
        rest = after;
    }
    pieces.push(rest);
    pieces.retain(|piece| !piece.trim().is_empty());
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drafts_of(name: &str, content: &[u8]) -> Vec<Result<Draft>> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        fs::write(&path, content).expect("written");
        let found = files(&[path]).expect("found");
        found[0].documents().expect("readable")
    }

    #[test]
    fn a_split_loses_nothing_but_blank_pieces_and_prefers_paragraphs() {
        let text = "one two\n\nthree four\n\nfive".repeat(50);
        let pieces = split(&text, 100);
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|piece| piece.len() <= 100));
        assert!(pieces[..pieces.len() - 1].iter().all(|piece| piece.ends_with("\n\n")));
        assert_eq!(split("ééééé", 3), ["é", "é", "é", "é", "é"]);
        assert!(split(" \n\n ", 100).is_empty());
    }

    #[test]
    fn a_line_of_each_form_is_a_document_and_a_bad_one_harms_no_neighbour() {
        let lines = b"{\"text\":\"a\"}\n\nnonsense\n{\"prompt\":\"p\",\"completion\":\"c\",\"source\":\"s\"}\n{\"messages\":[]}\n{\"x\":1}\n";
        let drafts = drafts_of("facts.jsonl", lines);
        let places: Vec<_> = drafts.iter().flatten().map(|draft| draft.place.as_str()).collect();
        assert_eq!(places, ["facts.jsonl:1", "facts.jsonl:4", "facts.jsonl:5"]);
        let errors: Vec<_> = drafts.iter().filter_map(|draft| draft.as_ref().err()).collect();
        assert!(errors[0].to_string().contains("facts.jsonl:3"), "{errors:?}");
        assert!(errors[1].to_string().contains("facts.jsonl:6"), "{errors:?}");
        let sources: Vec<_> = drafts.iter().flatten().map(|draft| draft.body["source"].clone()).collect();
        assert_eq!(sources, ["facts.jsonl", "s", "facts.jsonl"]);
    }

    #[test]
    fn long_text_comes_in_numbered_parts_and_binary_files_do_not_come_at_all() {
        let drafts = drafts_of("long.md", "word ".repeat(20_000).as_bytes());
        let places: Vec<_> = drafts.iter().flatten().map(|draft| draft.place.as_str()).collect();
        assert_eq!(places, ["long.md#1", "long.md#2"]);
        assert!(drafts_of("image.png", b"\x89PNG\0\0").is_empty());
        assert!(drafts_of("latin.txt", b"caf\xe9")[0].is_err());
    }

    #[test]
    fn folders_are_read_without_what_is_hidden_or_ignored() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join("notes").join(name);
        for (name, text) in
            [("b.md", "b"), ("a.txt", "a"), (".secret", "s"), ("out/x.o", "x"), (".gitignore", "out/")]
        {
            fs::create_dir_all(at(name).parent().expect("a parent")).expect("made");
            fs::write(at(name), text).expect("written");
        }
        let found = files(&[folder.path().join("notes")]).expect("found");
        let names: Vec<_> = found.iter().map(SourceFile::name).collect();
        assert_eq!(names, ["notes/a.txt", "notes/b.md"]);
        assert!(files(&[folder.path().join("nothing")]).is_err());
    }
}
