//! Tasks that arrive one after another, as folders and files.

use crate::corpus::{DOCUMENT_BYTES_MAX, split};
use crate::judge::answer;
use anyhow::{Context, Result, anyhow, bail, ensure};
use model::pretrain::corpus;
use proto::Content;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// A line of a task.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Line {
    /// A text and the label that belongs to it.
    Labelled { text: String, label: String },
    /// A prompt and the one right answer.
    Answered { prompt: String, response: String },
}

impl Line {
    /// The label, where there is one.
    pub fn label(&self) -> Option<&str> {
        match self {
            Self::Labelled { label, .. } => Some(label),
            Self::Answered { .. } => None,
        }
    }

    /// What is asked.
    pub fn asked(&self) -> &str {
        match self {
            Self::Labelled { text, .. } => text,
            Self::Answered { prompt, .. } => prompt,
        }
    }

    /// The document that teaches it.
    pub fn content(&self) -> Content {
        let (prompt, completion) = match self {
            Self::Labelled { text, label } => (text, answer(label)),
            Self::Answered { prompt, response } => (prompt, response.clone()),
        };
        Content::Completion { prompt: prompt.clone(), completion }
    }
}

/// Something to learn, and what it is measured on.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    /// Its name: that of its folder or file.
    pub name: String,
    /// What is learned, in the order of the file.
    pub documents: Vec<Content>,
    /// Every label in its files, whatever a limit leaves out: fewer to choose from would be easier.
    pub labels: BTreeSet<String>,
    /// What it is measured on.
    pub test: Test,
}

/// What a task is measured on.
#[derive(Debug, Clone, PartialEq)]
pub enum Test {
    /// The share of lines that are answered right.
    Lines(Vec<Line>),
    /// The loss on held-out documents.
    Text(Vec<String>),
}

/// How many documents of each task are taken at most.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    /// To learn.
    pub learned: Option<usize>,
    /// To measure on.
    pub measured: Option<usize>,
}

/// The tasks in a folder: sub-folders with `train.jsonl` and `test.jsonl`, and pairs `X.txt`, `X.val.txt`. By name, or
/// in the order given, which may leave some out. What `limits` leave is taken evenly over each file.
///
/// # Errors
/// When there is none, one that is named is not there, or a file is not what it should be.
pub fn load(folder: &Path, order: &[String], limits: Limits) -> Result<Vec<Task>> {
    let mut found: BTreeMap<String, Task> = BTreeMap::new();
    let place = folder.display();
    for entry in fs::read_dir(folder).with_context(|| format!("{place} cannot be read"))? {
        let path = entry?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let task = match name.strip_suffix(".txt") {
            _ if path.join("train.jsonl").is_file() => Some(of_lines(&name, &path, limits)?),
            Some(stem) if !stem.ends_with(".val") => of_text(stem, folder, limits)?,
            _ => None,
        };
        found.extend(task.map(|task| (task.name.clone(), task)));
    }
    if found.is_empty() {
        bail!(
            "{place} holds no task: give a folder of folders with train.jsonl and test.jsonl, or of pairs X.txt, X.val.txt"
        );
    }
    if order.is_empty() {
        return Ok(found.into_values().collect());
    }
    let known = found.keys().cloned().collect::<Vec<_>>().join(", ");
    let take = |name: &String| {
        found
            .remove(name)
            .with_context(|| format!("--order names {name}, of which there are: {known}, each once"))
    };
    order.iter().map(take).collect()
}

/// The lines of a task's file.
///
/// # Errors
/// When it cannot be read, has no line, or a line has neither form.
pub fn lines(path: &Path) -> Result<Vec<Line>> {
    let name = path.display();
    let text = fs::read_to_string(path).with_context(|| format!("{name} cannot be read"))?;
    let numbered = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let parse = |(number, line)| {
        serde_json::from_str::<Line>(line).map_err(|_| {
            anyhow!("{name}:{}: a line is {{\"text\",\"label\"}} or {{\"prompt\",\"response\"}}", number + 1)
        })
    };
    let lines: Vec<Line> = numbered.map(parse).collect::<Result<_>>()?;
    ensure!(!lines.is_empty(), "{name} holds no line");
    Ok(lines)
}

/// Texts with their labels, of one domain.
#[derive(Debug, Clone, PartialEq)]
pub struct Labelled {
    /// Its name: that of its folder.
    pub name: String,
    /// What may be learned: texts with their labels.
    pub learned: Vec<(String, String)>,
    /// What is measured on.
    pub measured: Vec<(String, String)>,
}

/// The labelled texts in a folder with train.jsonl and test.jsonl, or in all such folders in it, by name.
///
/// # Errors
/// When there are none, or a line has no label.
pub fn labelled(folder: &Path) -> Result<Vec<Labelled>> {
    let place = folder.display();
    let of = |path: &Path| {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let read = |file: &str| pairs(&path.join(file));
        Ok(Labelled { name, learned: read("train.jsonl")?, measured: read("test.jsonl")? })
    };
    if folder.join("train.jsonl").is_file() {
        return Ok(vec![of(folder)?]);
    }
    let entries = fs::read_dir(folder).with_context(|| format!("{place} cannot be read"))?;
    let mut found = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    found.retain(|path| path.join("train.jsonl").is_file());
    found.sort();
    ensure!(!found.is_empty(), "{place} holds neither train.jsonl nor a folder with one");
    found.iter().map(|path| of(path)).collect()
}

fn pairs(path: &Path) -> Result<Vec<(String, String)>> {
    let pair = |line| match line {
        Line::Labelled { text, label } => Ok((text, label)),
        Line::Answered { .. } => {
            bail!("{} holds a line without a label: give lines {{\"text\",\"label\"}}", path.display())
        }
    };
    lines(path)?.into_iter().map(pair).collect()
}

fn of_lines(name: &str, folder: &Path, limits: Limits) -> Result<Task> {
    let read = |file: &str| lines(&folder.join(file));
    let (learned, test) = (read("train.jsonl")?, read("test.jsonl")?);
    let labels = learned.iter().chain(&test).filter_map(Line::label).map(str::to_owned).collect();
    let documents = thinned(learned, limits.learned).iter().map(Line::content).collect();
    Ok(Task { name: name.to_owned(), documents, labels, test: Test::Lines(thinned(test, limits.measured)) })
}

fn of_text(name: &str, folder: &Path, limits: Limits) -> Result<Option<Task>> {
    let held_out = folder.join(format!("{name}.val.txt"));
    if !held_out.is_file() {
        return Ok(None);
    }
    let read = |path: &Path, limit: Option<usize>| -> Result<Vec<String>> {
        let documents: Vec<String> = corpus::documents(path)?.collect::<Result<_>>()?;
        ensure!(!documents.is_empty(), "{} holds no document", path.display());
        Ok(thinned(documents, limit))
    };
    let learned = read(&folder.join(format!("{name}.txt")), limits.learned)?;
    // As `engram learn` sends them: what is longer than the server takes comes in parts.
    let parts = learned.iter().flat_map(|document| split(document, DOCUMENT_BYTES_MAX));
    let documents = parts.map(|part| Content::Text(part.to_owned())).collect();
    let (labels, test) = (BTreeSet::new(), Test::Text(read(&held_out, limits.measured)?));
    Ok(Some(Task { name: name.to_owned(), documents, labels, test }))
}

/// At most `limit` of a list, evenly over it: files are often sorted by label.
pub fn thinned<T>(items: Vec<T>, limit: Option<usize>) -> Vec<T> {
    let count = items.len();
    let limit = limit.unwrap_or(count).min(count);
    let taken = |n: usize| (n + 1) * limit / count.max(1) > n * limit / count.max(1);
    items.into_iter().enumerate().filter(|(n, _)| taken(*n)).map(|(_, item)| item).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            fs::write(path, text).expect("written");
        };
        write(
            "intents/train.jsonl",
            "{\"text\":\"hi\",\"label\":\"greeting\"}\n\n{\"text\":\"bye\",\"label\":\"leave\"}\n",
        );
        write("intents/test.jsonl", "{\"text\":\"hello\",\"label\":\"greeting\"}\n");
        write("sums/train.jsonl", "{\"prompt\":\"2+2=\",\"response\":\"4\"}\n");
        write("sums/test.jsonl", "{\"prompt\":\"1+1=\",\"response\":\"2\"}\n");
        write("notes.txt", "one\n<|endoftext|>\ntwo\n<|endoftext|>\n");
        write("notes.val.txt", "three\n<|endoftext|>\n");
        write("alone.txt", "has no held-out text");
        folder
    }

    #[test]
    fn folders_and_pairs_are_tasks_by_name_or_in_the_order_given() {
        let folder = folder();
        let tasks = load(folder.path(), &[], Limits::default()).expect("tasks");
        assert_eq!(tasks.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["intents", "notes", "sums"]);
        let completion = |prompt: &str, completion: &str| Content::Completion {
            prompt: prompt.into(),
            completion: completion.into(),
        };
        assert_eq!(tasks[0].documents, [completion("hi", "\ngreeting"), completion("bye", "\nleave")]);
        assert_eq!(tasks[1].documents.len(), 2);
        assert!(matches!(&tasks[1].test, Test::Text(held_out) if held_out.len() == 1));
        assert_eq!(tasks[2].documents, [completion("2+2=", "4")]);
        let ordered =
            load(folder.path(), &["sums".into(), "notes".into()], Limits::default()).expect("tasks");
        assert_eq!(ordered.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["sums", "notes"]);
    }

    #[test]
    fn what_is_not_there_or_not_a_task_is_told() {
        let folder = folder();
        let told = |order: &[&str]| {
            let order: Vec<String> = order.iter().map(ToString::to_string).collect();
            format!("{:#}", load(folder.path(), &order, Limits::default()).expect_err("refused"))
        };
        assert!(told(&["sum"]).contains("intents, notes, sums"));
        assert!(told(&["sums", "sums"]).contains("each once"));
        let empty = tempfile::tempdir().expect("a folder");
        assert!(
            format!("{:#}", load(empty.path(), &[], Limits::default()).expect_err("refused"))
                .contains("holds no task")
        );
        fs::write(folder.path().join("sums/test.jsonl"), "{\"prompt\":\"1\"}\n").expect("written");
        assert!(told(&[]).contains("test.jsonl:1"));
    }

    #[test]
    fn labelled_texts_are_of_one_folder_or_of_many() {
        let folder = folder();
        let one = labelled(&folder.path().join("intents")).expect("labelled");
        assert_eq!((one.len(), one[0].name.as_str(), one[0].learned.len()), (1, "intents", 2));
        assert_eq!(one[0].measured, [("hello".to_owned(), "greeting".to_owned())]);
        let told = |path: &Path| format!("{:#}", labelled(path).expect_err("refused"));
        assert!(told(folder.path()).contains("without a label"));
        fs::remove_dir_all(folder.path().join("sums")).expect("removed");
        assert_eq!(labelled(folder.path()).expect("labelled"), one);
        fs::remove_dir_all(folder.path().join("intents")).expect("removed");
        assert!(told(folder.path()).contains("neither"));
    }

    #[test]
    fn a_limit_takes_from_the_whole_file() {
        assert_eq!(thinned((0..10).collect(), Some(5)), [1, 3, 5, 7, 9]);
        let folder = folder();
        let tasks = load(folder.path(), &["intents".into()], Limits { learned: Some(1), measured: None })
            .expect("tasks");
        assert_eq!(
            (tasks[0].documents.len(), tasks[0].labels.len()),
            (1, 2),
            "all labels stay to choose from"
        );
        assert_eq!(thinned((0..4).collect(), Some(9)), [0, 1, 2, 3]);
        assert_eq!(thinned((0..150).collect::<Vec<_>>(), Some(50)).len(), 50);
    }
}
