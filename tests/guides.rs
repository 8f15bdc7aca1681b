//! The guides: each command in them is run, and prints what they say.

use crate::harness::{PROGRAM, Setup, nano, root};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

/// A command with the lines that it prints.
#[derive(Debug, Default, PartialEq)]
struct Step {
    command: String,
    prints: Vec<String>,
}

/// The steps in the `console` blocks of a guide.
fn steps(markdown: &str) -> Vec<Step> {
    let (mut steps, mut inside) = (Vec::<Step>::new(), false);
    for line in markdown.lines() {
        match (line.strip_prefix("```"), line.strip_prefix("$ "), steps.last_mut()) {
            (Some(language), ..) => inside = language == "console",
            (_, Some(command), _) if inside => {
                steps.push(Step { command: command.to_owned(), ..Step::default() });
            }
            (.., Some(step)) if inside => step.prints.push(line.to_owned()),
            _ => {}
        }
    }
    steps
}

/// Whether these are the lines that were expected, where `...` stands for some text or for some lines.
fn fits(expected: &[String], printed: &[&str]) -> bool {
    match expected.split_first() {
        None => printed.is_empty(),
        Some((first, rest)) if first == "..." => (0..=printed.len()).any(|n| fits(rest, &printed[n..])),
        Some((first, rest)) => {
            printed.split_first().is_some_and(|(line, more)| line_fits(first, line) && fits(rest, more))
        }
    }
}

fn line_fits(expected: &str, line: &str) -> bool {
    match expected.split_once("...") {
        None => expected == line,
        Some((begin, rest)) => line.strip_prefix(begin).is_some_and(|left| {
            (0..=left.len()).any(|at| left.is_char_boundary(at) && line_fits(rest, &left[at..]))
        }),
    }
}

/// Runs the commands of a guide in one shell, in a folder of their own, beside a server on the built-in base.
fn follow(name: &str) {
    follow_with(name, &[]);
}

/// The same with settings.
fn follow_with(name: &str, settings: &[&str]) {
    let Some(base) = nano() else { return };
    let guide = fs::read_to_string(root().join("configs/guides").join(name)).expect("readable");
    let steps = steps(&guide);
    assert!(steps.len() > 3, "{name} has commands");
    let setup = Setup::base(base).set("base.threads=1");
    let server = settings.iter().fold(setup, |setup, setting| setup.set(setting)).start();
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    for name in ["bin", "work", "told"] {
        fs::create_dir(at(name)).expect("made");
    }
    symlink(PROGRAM, at("bin/engram")).expect("linked");
    let script: String = steps
        .iter()
        .enumerate()
        .map(|(n, step)| format!("{{ {}\n}} > ../told/{n} 2> ../told/{n}.err || exit 1\n", step.command))
        .collect();
    let mut shell = Command::new("bash");
    shell.arg("-c").arg(script).current_dir(at("work")).stdin(Stdio::null());
    let path = std::env::var("PATH").unwrap_or_default();
    shell.env("PATH", format!("{}:{path}", at("bin").display())).env("ENGRAM_SERVER", server.url());
    shell.env("ENGRAM_DATA", at("data")).env("XDG_DATA_HOME", at("home")).env_remove("ENGRAM_API_KEY");
    let ended = shell.status().expect("bash runs");
    let told =
        |name: String| fs::read_to_string(at("told").join(name)).unwrap_or_else(|_| "(not run)".into());
    for (n, step) in steps.iter().enumerate() {
        let (printed, complained) = (told(n.to_string()), told(format!("{n}.err")));
        let lines: Vec<&str> = printed.lines().collect();
        let expected = &step.prints;
        assert!(
            fits(expected, &lines),
            "{name}: $ {}\n--- expected\n{}\n--- printed\n{printed}{complained}",
            step.command,
            expected.join("\n")
        );
    }
    assert!(ended.success(), "{name}: a command failed");
}

#[test]
fn learn_a_folder() {
    follow("learn-a-folder.md");
}

#[test]
fn chat() {
    follow("chat.md");
}

#[test]
fn teach_a_format() {
    follow("teach-a-format.md");
}

#[test]
fn roll_back() {
    follow("roll-back.md");
}

#[test]
fn forget() {
    follow("forget.md");
}

#[test]
fn move_an_adapter() {
    follow_with("move-an-adapter.md", &["train.repeat_counted=true"]);
}

#[test]
fn tune_retention() {
    follow("tune-retention.md");
}

#[test]
fn every_guide_is_followed_and_listed() {
    let source = fs::read_to_string(root().join("tests/guides.rs")).expect("readable");
    let folder = root().join("configs/guides");
    let list = fs::read_to_string(folder.join("README.md")).expect("readable");
    for entry in fs::read_dir(&folder).expect("readable") {
        let name = entry.expect("readable").file_name().to_string_lossy().into_owned();
        if name != "README.md" {
            let followed = ["follow", "follow_with"].map(|how| source.contains(&format!("{how}(\"{name}\"")));
            assert!(followed.contains(&true), "{name} is followed by no test");
            assert!(list.contains(&format!("({name})")), "{name} is not listed");
        }
    }
}

#[test]
fn every_link_in_a_guide_leads_somewhere() {
    let folder = root().join("configs/guides");
    for entry in fs::read_dir(&folder).expect("readable") {
        let path = entry.expect("readable").path();
        let text = fs::read_to_string(&path).expect("readable");
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            assert!(target.contains("://") || folder.join(target).exists(), "{}: {target}", path.display());
        }
    }
}

#[test]
fn what_a_guide_says_and_what_is_printed_are_told_apart() {
    let guide =
        "```sh\n$ not this\n```\n```console\n$ one\na\n...\n$ two\n```\ntext\n```console\nstray\n```\n";
    let found = steps(guide);
    assert_eq!((found.len(), found[0].command.as_str()), (2, "one"));
    let check = |expected: &[&str], printed: &[&str]| {
        fits(&expected.iter().map(ToString::to_string).collect::<Vec<_>>(), printed)
    };
    assert!(check(&["a", "...", "z"], &["a", "b", "c", "z"]) && check(&["a ... c"], &["a b c"]));
    assert!(!check(&["a"], &["a", "b"]) && !check(&["a ... c"], &["a b"]) && !check(&[], &["a"]));
    assert!(Path::new(PROGRAM).exists());
}
