//! Rules of the house that no compiler checks.

use crate::harness::root;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const FILE_LINES_MAX: usize = 500;
/// Those with a use for tensors.
const MAY_USE_MODEL: [&str; 4] = ["train", "consolidate", "infer", "supervisor"];

/// Our crates, each with those of ours that it depends on; a crate's own tests may use more.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("metadata");
    let packages = metadata["packages"].as_array().expect("packages");
    let name = |value: &Value| value["name"].as_str().expect("a name").to_owned();
    let ours: BTreeSet<String> = packages.iter().map(name).collect();
    let of = |package: &Value| {
        let dependencies = package["dependencies"].as_array().expect("dependencies").iter();
        let used = dependencies.filter(|dependency| dependency["kind"].is_null()).map(name);
        used.filter(|name| ours.contains(name)).collect()
    };
    packages.iter().map(|package| (name(package), of(package))).collect()
}

#[test]
fn dependencies_go_from_supervisor_to_services_to_kit_to_proto() {
    let dependencies = dependencies();
    let allowed = |package: &str, used: &str| match package {
        "proto" | "model" => false,
        "kit" => used == "proto",
        "supervisor" => used != "tests",
        "tests" => true,
        _ => ["kit", "proto"].contains(&used) || used == "model" && MAY_USE_MODEL.contains(&package),
    };
    assert!(dependencies.len() > 10, "{dependencies:?}");
    for (package, used) in &dependencies {
        for used in used {
            assert!(allowed(package, used), "{package} must not depend on {used}");
        }
    }
}

/// Our source files with their text.
fn sources() -> Vec<(PathBuf, String)> {
    let root = root();
    let mut folders = vec![root.join("proto"), root.join("services"), root.join("tests")];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("readable") {
            let path = entry.expect("readable").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("readable");
                files.push((path.strip_prefix(&root).expect("inside").to_owned(), text));
            }
        }
    }
    assert!(files.len() > 20, "{files:?}");
    files
}

#[test]
fn no_file_is_longer_than_one_can_read_at_a_sitting() {
    for (path, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= FILE_LINES_MAX, "{} has {lines} lines", path.display());
    }
}

#[test]
fn storage_and_wire_crates_are_each_known_in_one_place() {
    for name in ["redb", "sled", "bincode"] {
        let path = format!("{name}::");
        let uses = |text: &str| text.lines().any(|line| is_code(line) && line.contains(&path));
        let sources = sources();
        let users = sources.iter().filter(|(file, text)| !is_this(file) && uses(text));
        let modules: BTreeSet<PathBuf> = users.map(|(file, _)| module(file)).collect();
        assert_eq!(modules.len(), 1, "{name} is used in {modules:?}");
        let at_home = |module: &PathBuf| module.starts_with("services/kit") || module.starts_with("proto");
        assert!(modules.iter().all(at_home), "{modules:?}");
    }
}

#[test]
fn nothing_is_left_unfinished() {
    for (path, text) in sources().iter().filter(|(path, _)| !is_this(path)) {
        for mark in ["todo!(", "unimplemented!(", "dbg!(", "FIXME", "TODO", "XXX"] {
            assert!(!text.contains(mark), "{} holds {mark}", path.display());
        }
    }
}

/// A file of a crate's `src`, or the folder there that it lies in.
fn module(path: &Path) -> PathBuf {
    let depth = path.iter().position(|part| part == "src").map_or(0, |src| src + 2);
    path.iter().take(depth).collect::<PathBuf>().with_extension("")
}

fn is_this(path: &Path) -> bool {
    path == Path::new("tests/tidy.rs")
}

fn is_code(line: &str) -> bool {
    !line.trim_start().starts_with("//")
}
