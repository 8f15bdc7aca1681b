//! What a teacher is asked: prompts, topics, files, and documents that the server has.

use super::pairs::FORM;
use super::submit::SOURCE;
use crate::client::{Client, segment};
use crate::corpus;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Text goes to the teacher in parts of this size, bytes: about 4,000 tokens.
const PART_BYTES_MAX: usize = 16 * 1024;
/// Documents are listed so many at a time.
const PAGE: usize = 1000;
/// Documents at these stages are not to be learned, nor is what derives from them.
const NOT_LEARNED: [&str; 2] = ["refused", "set_aside"];

/// Where the inputs are: one of four.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct InputArgs {
    /// Prompts to answer, one a line; in a .jsonl file each line is {"prompt": "..."}.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Topics, one a line: the teacher writes questions about each, and answers them.
    #[arg(long, value_name = "FILE")]
    topics: Option<PathBuf>,
    /// Files and folders of your own: the teacher reads them, writes questions about each, and
    /// answers them.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    about: Vec<PathBuf>,
    /// The same about the documents that the server has learned in the domain.
    #[arg(long)]
    pub about_documents: bool,
}

/// What an answer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The completion of the request.
    Answer,
    /// Questions with answers.
    Pairs,
}

/// One request to the teacher.
#[derive(Debug, Clone)]
pub struct Unit {
    /// Names it in the journal: a hash of all that it asks.
    pub key: String,
    /// Where a person finds it: `topics.txt:3`, `notes.md#2`.
    pub place: String,
    /// What answers say they derive from: a file, or the id of a document.
    pub derived_from: String,
    /// The document that has to be there when they are submitted.
    pub parent: Option<String>,
    /// What the teacher is sent.
    pub request: String,
    /// What its answer is.
    pub form: Form,
}

/// All requests, each once, and how many were left out because they were there already.
#[derive(Debug, Default)]
pub struct Units {
    /// In the order of the inputs.
    pub list: Vec<Unit>,
    /// Left out.
    pub twice: u64,
    keys: BTreeSet<String>,
}

impl Units {
    fn push(&mut self, place: String, derived_from: String, parent: Option<String>, ask: (Form, String)) {
        let (form, request) = ask;
        let mut hasher = blake3::Hasher::new();
        for part in [parent.as_deref().unwrap_or_default(), &format!("{form:?}"), &request] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        let key = hasher.finalize().to_hex()[..32].to_owned();
        if self.keys.insert(key.clone()) {
            self.list.push(Unit { key, place, derived_from, parent, request, form });
        } else {
            self.twice += 1;
        }
    }
}

/// Reads the inputs. `client` is there when documents of a server are among them.
///
/// # Errors
/// When one cannot be read, or there is nothing in them.
pub fn read(args: &InputArgs, client: Option<&Client>, domain: &str, questions: u32) -> Result<Units> {
    let mut units = Units::default();
    if let Some(file) = &args.prompts {
        for (place, line) in lines(file)? {
            let prompt = if is_jsonl(file) { prompt_of(&place, &line)? } else { line };
            ensure!(
                prompt.len() <= PART_BYTES_MAX,
                "{place} is over {PART_BYTES_MAX} bytes; make it shorter"
            );
            units.push(place.clone(), corpus::source(&place).to_owned(), None, (Form::Answer, prompt));
        }
    }
    if let Some(file) = &args.topics {
        for (place, line) in lines(file)? {
            let request = about("topic", "can answer without seeing it", &line, questions);
            units.push(place.clone(), corpus::source(&place).to_owned(), None, (Form::Pairs, request));
        }
    }
    let reader = corpus::reader()?;
    for file in corpus::files(&args.about)?.files {
        for draft in file.documents(&reader)? {
            match draft {
                Ok(draft) => {
                    let derived_from = corpus::source(&draft.place).to_owned();
                    units.document(
                        &draft.place,
                        &derived_from,
                        None,
                        &text_of(&draft.body.into()),
                        questions,
                    );
                }
                Err(error) => eprintln!("engram: skipped: {error:#}"),
            }
        }
    }
    if let Some(client) = client.filter(|_| args.about_documents) {
        for id in learned(client, domain)? {
            let path = format!("/v1/documents/{}?content=true", segment(&id));
            let text = text_of(&client.get(&path)?["content"]);
            units.document(&id, &id, Some(&id), &text, questions);
        }
    }
    ensure!(!units.list.is_empty(), "there is nothing to ask the teacher in what was named");
    Ok(units)
}

impl Units {
    fn document(
        &mut self,
        place: &str,
        derived_from: &str,
        parent: Option<&str>,
        text: &str,
        questions: u32,
    ) {
        let parts = corpus::split(text, PART_BYTES_MAX);
        let many = parts.len() > 1;
        for (number, part) in parts.into_iter().enumerate() {
            let place = if many { format!("{place}#{}", number + 1) } else { place.to_owned() };
            let request = about("document", "understands without having seen it", part, questions);
            self.push(place, derived_from.to_owned(), parent.map(str::to_owned), (Form::Pairs, request));
        }
    }
}

/// What is sent to get questions with answers. One message, since not every template has a place for
/// instructions.
fn about(what: &str, whom: &str, text: &str, questions: u32) -> String {
    let many =
        if questions == 1 { "one question".to_owned() } else { format!("{questions} different questions") };
    format!(
        "Write {many} about the {what} below, each with its answer. Write questions that someone {whom}. Answer \
         each in one to four sentences, completely and only with what is true. Write nothing else, and write \
         it in exactly this form:\n\n{FORM}\n\nThe {what}:\n\n{text}"
    )
}

/// Lines that are not blank, with their places.
fn lines(file: &Path) -> Result<Vec<(String, String)>> {
    let text =
        fs::read_to_string(file).with_context(|| format!("{} cannot be read as text", file.display()))?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let numbered =
        text.lines().enumerate().map(|(number, line)| (format!("{name}:{}", number + 1), line.trim()));
    Ok(numbered.filter(|(_, line)| !line.is_empty()).map(|(place, line)| (place, line.to_owned())).collect())
}

fn is_jsonl(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == "jsonl")
}

fn prompt_of(place: &str, line: &str) -> Result<String> {
    let value: Value = serde_json::from_str(line).with_context(|| format!("{place} is not JSON"))?;
    match value["prompt"].as_str().map(str::trim) {
        Some(prompt) if !prompt.is_empty() => Ok(prompt.to_owned()),
        _ => bail!("{place} has no \"prompt\" with a text"),
    }
}

/// The text of a document in any of its three forms.
fn text_of(content: &Value) -> String {
    let field = |name: &str| content[name].as_str();
    if let Some(text) = field("text") {
        return text.to_owned();
    }
    if let (Some(prompt), Some(completion)) = (field("prompt"), field("completion")) {
        return format!("{prompt}\n{completion}");
    }
    let messages = content["messages"].as_array().map_or(&[][..], Vec::as_slice);
    let said: Vec<&str> = messages.iter().filter_map(|message| message["content"].as_str()).collect();
    said.join("\n")
}

/// Ids of the domain's documents, the oldest first, but for what a teacher wrote itself.
fn learned(client: &Client, domain: &str) -> Result<Vec<String>> {
    let (mut ids, mut path) = (Vec::new(), format!("/v1/documents?domain={}&limit={PAGE}", segment(domain)));
    let first_page = path.clone();
    loop {
        let answer = client.get(&path)?;
        let page = answer["documents"].as_array().map_or(&[][..], Vec::as_slice);
        let is_own = |document: &&Value| {
            document["derived_from"].is_null()
                && document["source"] != SOURCE
                && !NOT_LEARNED.contains(&document["status"].as_str().unwrap_or_default())
        };
        ids.extend(
            page.iter().filter(is_own).filter_map(|document| document["id"].as_str()).map(str::to_owned),
        );
        match page.last().and_then(|last| last["id"].as_str()) {
            Some(last) if page.len() == PAGE => path = format!("{first_page}&before={}", segment(last)),
            _ => break,
        }
    }
    ids.reverse();
    ensure!(!ids.is_empty(), "the server has no documents of your own in the domain {domain}");
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn file(name: &str, text: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        fs::write(&path, text).expect("written");
        (folder, path)
    }

    fn inputs(prompts: Option<PathBuf>, topics: Option<PathBuf>, about: Vec<PathBuf>) -> Result<Units> {
        let args = InputArgs { prompts, topics, about, about_documents: false };
        read(&args, None, "general", 3)
    }

    #[test]
    fn prompts_are_lines_or_json_and_asked_once() {
        let (_folder, path) = file("p.txt", "Who?\n\n  Why? \nWho?\n");
        let units = inputs(Some(path), None, Vec::new()).expect("read");
        let asked: Vec<_> =
            units.list.iter().map(|unit| (unit.place.as_str(), unit.request.as_str())).collect();
        assert_eq!((asked, units.twice), (vec![("p.txt:1", "Who?"), ("p.txt:3", "Why?")], 1));

        let (_folder, path) = file("p.jsonl", "{\"prompt\": \"Who?\\nNow?\", \"n\": 1}\n");
        let units = inputs(Some(path), None, Vec::new()).expect("read");
        assert_eq!(units.list[0].request, "Who?\nNow?");
        for (text, word) in [("{\"text\": 1}", "p.jsonl:1"), ("x", "p.jsonl:1"), (" \n", "nothing to ask")] {
            let (_folder, path) = file("p.jsonl", text);
            let error = inputs(Some(path), None, Vec::new()).expect_err("must be refused");
            assert!(format!("{error:#}").contains(word), "{error:#}");
        }
    }

    #[test]
    fn topics_and_files_are_asked_about_and_long_ones_in_parts() {
        let (_folder, path) = file("topics.txt", "bees\nhoney\n");
        let units = inputs(None, Some(path), Vec::new()).expect("read").list;
        assert!(units[1].request.contains("3 different questions") && units[1].request.ends_with("honey"));
        assert_ne!(units[0].key, units[1].key);
        assert!(units.iter().all(|unit| unit.form == Form::Pairs));

        let (_folder, path) = file("long.md", &"A line of some words.\n".repeat(1000));
        let units = inputs(None, None, vec![path]).expect("read").list;
        let places: Vec<&str> = units.iter().map(|unit| unit.place.as_str()).collect();
        assert_eq!(places, ["long.md#1", "long.md#2"]);
        assert!(units.iter().all(|unit| unit.derived_from == "long.md" && unit.parent.is_none()));
    }

    #[test]
    fn the_text_of_each_form_is_found() {
        assert_eq!(text_of(&json!({"text": "a"})), "a");
        assert_eq!(text_of(&json!({"prompt": "a", "completion": "b"})), "a\nb");
        assert_eq!(text_of(&json!({"messages": [{"content": "a"}, {"content": "b"}]})), "a\nb");
    }
}
