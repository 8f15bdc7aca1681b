//! `engram bench`: tasks one after another, learned by the services themselves.

use crate::harness::{PROGRAM, engram};
use crate::tiny;
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Two tasks of two labels each, which the first letter of a text decides.
fn write_tasks(folder: &Path) {
    for (task, letters, labels) in
        [("fruit", ["a", "b"], ["sour", "sweet"]), ("tools", ["m", "n"], ["long", "round"])]
    {
        let lines = |from: usize, count: usize| -> String {
            let line = |n: usize| {
                let (letter, label) = (letters[n % 2], labels[n % 2]);
                format!("{{\"text\":\"{}\",\"label\":\"{label}\"}}\n", letter.repeat(4 + n / 2))
            };
            (from..from + count).map(line).collect()
        };
        fs::create_dir_all(folder.join(task)).expect("made");
        fs::write(folder.join(task).join("train.jsonl"), lines(0, 12)).expect("written");
        fs::write(folder.join(task).join("test.jsonl"), lines(12, 4)).expect("written");
    }
    fs::write(folder.join("tale.txt"), "once\n<|endoftext|>\n").expect("written");
    fs::write(folder.join("tale.val.txt"), "upon\n<|endoftext|>\n").expect("written");
}

fn retention(folder: &Path, more: &[&str]) -> Value {
    let [base, tasks, json] =
        ["base", "tasks", "result.json"].map(|name| folder.join(name).display().to_string());
    let given =
        ["bench", "retention", "--base", &base, "--tasks", &tasks, "--order", "fruit,tools", "--json", &json];
    // One epoch of what the bench is for, on a base with random weights: the words are learned by heart. At half of the rate, since
    // one such base in eight does not settle at the whole.
    let set =
        ["base.precision=f32", "ingest.views=verbatim", "filter.near_duplicate=1", "train.answer_rate=0.75"];
    let set = set.map(|set| ["--set", set]).concat();
    let output = engram(&[&given, set.as_slice(), more].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&fs::read(json).expect("there")).expect("JSON")
}

#[cfg(target_os = "linux")]
#[test]
fn a_benchmark_has_the_threads_of_a_worker() {
    let folder = tempfile::tempdir().expect("a folder");
    tiny::write(folder.path());
    let base = folder.path().display().to_string();
    let output = std::process::Command::new(PROGRAM)
        .args(["bench", "update", "--base", &base, "--examples", "4", "--tokens", "8", "--repeats", "1"])
        .env("OMP_DISPLAY_ENV", "VERBOSE")
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let last = |name: &str| said.lines().rfind(|line| line.contains(name)).unwrap_or_default().to_owned();
    assert!(last("OMP_WAIT_POLICY").ends_with("'PASSIVE'"), "{said}");
    assert!(last("GOMP_SPINCOUNT").ends_with("'0'"), "{said}");
}

#[test]
fn what_is_learned_and_what_is_kept_stand_side_by_side() {
    let folder = tempfile::tempdir().expect("a folder");
    tiny::write(&folder.path().join("base"));
    write_tasks(&folder.path().join("tasks"));
    let svg = folder.path().join("matrix.svg");
    let result = retention(
        folder.path(),
        &["--method", "replay", "--mode", "shared", "--seeds", "2", "--svg", &svg.display().to_string()],
    );
    assert_eq!(result["tasks"], serde_json::json!(["fruit", "tools"]));
    let matrix = &result["matrix"]["mean"];
    assert!(matrix[0][1].is_null() && matrix[1][1].is_f64(), "{matrix}");
    let just = result["just_learned_average"]["mean"].as_f64().expect("a figure");
    assert!(just > 0.7, "four answers of which one is right each time: {result:#}");
    for figure in [
        "final_average",
        "backward_transfer",
        "forgetting",
        "forgetting_rate",
        "loss_of_gain",
        "base_drift",
        "seconds",
        "adapter_bytes",
        "replay_bytes",
    ] {
        assert!(
            result[figure]["mean"].is_f64() && result[figure]["deviation"].is_f64(),
            "{figure}: {result:#}"
        );
    }
    assert_eq!(result["method"], "replay");
    assert_eq!(result["own_labels"]["measure"], "accuracy");
    assert_eq!(result["settings"]["train"]["adapters"], "shared");
    assert_eq!((&result["options"]["label_by"], &result["options"]["limit"]), (&"mean".into(), &Value::Null));
    assert!(fs::read_to_string(svg).expect("drawn").contains("after tools"));
}

#[test]
fn new_labels_are_told_apart_by_themselves_where_old_ones_are_known() {
    let folder = tempfile::tempdir().expect("a folder");
    tiny::write(&folder.path().join("base"));
    write_tasks(&folder.path().join("tasks"));
    let loss_of_the_second = |method: &str| {
        // Nothing but the mask tells them apart: no rehearsal and no anchors, and a pass of one step, so that what is measured
        // precedes all that the second task teaches.
        let none_rehearsed = [
            "--mode",
            "shared",
            "--limit",
            "2",
            "--set",
            "replay.new_data_ratio=1",
            "--set",
            "train.anchor_share=0",
        ];
        let result = retention(folder.path(), &[["--method", method].as_slice(), &none_rehearsed].concat());
        result["runs"][0]["documents"]["last_batch"]["first_loss"]
            .as_f64()
            .expect("a loss before it was learned")
    };
    let (naive, ace) = (loss_of_the_second("naive"), loss_of_the_second("ace"));
    assert!(ace < naive, "the first labels' tokens have no part in it: {ace} and {naive}");
}

#[test]
fn an_adapter_for_each_task_is_measured_by_choice_and_by_oracle() {
    let folder = tempfile::tempdir().expect("a folder");
    tiny::write(&folder.path().join("base"));
    write_tasks(&folder.path().join("tasks"));
    let result = retention(folder.path(), &["--mode", "per-domain"]);
    assert!(result["oracle_own_labels"]["final_average"]["mean"].as_f64() > Some(0.7), "{result:#}");
    let routed =
        ["routed_right", "routed_base", "routed_wrong"].map(|r| result[r]["mean"].as_f64().expect("a share"));
    assert!((routed.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{routed:?}");
}

#[test]
fn the_bounds_learn_all_at_once_and_each_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    tiny::write(&folder.path().join("base"));
    write_tasks(&folder.path().join("tasks"));
    let joint = retention(folder.path(), &["--method", "joint"]);
    assert_eq!(joint["matrix"]["mean"].as_array().map(Vec::len), Some(1));
    assert!(
        joint["forgetting"]["mean"].is_null() && joint["final_average"]["mean"].as_f64() > Some(0.7),
        "{joint:#}"
    );
    let single = retention(folder.path(), &["--method", "single", "--limit", "8", "--mode", "shared"]);
    assert!(
        single["matrix"]["mean"][1][0].is_null() && single["matrix"]["mean"][1][1].is_f64(),
        "{single:#}"
    );
    assert_eq!(single["runs"][0]["documents"]["live"], 16);
}

#[test]
fn quality_stands_beside_a_bag_of_words_and_what_is_published() {
    let folder = tempfile::tempdir().expect("a folder");
    tiny::write(&folder.path().join("base"));
    write_tasks(&folder.path().join("tasks"));
    let [base, tasks, one, json] = ["base", "tasks", "tasks/fruit", "result.json"]
        .map(|name| folder.path().join(name).display().to_string());
    let quality = |data: &str, more: &[&str]| -> (String, Value) {
        let given = ["bench", "quality", "--base", &base, "--data", data, "--json", &json];
        // As for retention: the words are learned by heart.
        let set = [
            "--set",
            "base.precision=f32",
            "--set",
            "ingest.views=verbatim",
            "--set",
            "filter.near_duplicate=1",
            "--set",
            "train.answer_passes_max=60",
        ];
        let output = engram(&[&given, set.as_slice(), more].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let result = serde_json::from_slice(&fs::read(&json).expect("there")).expect("JSON");
        (String::from_utf8_lossy(&output.stdout).into_owned(), result)
    };
    let (table, result) = quality(&one, &["--published", "0.9", "--source", "a paper of 2023"]);
    assert!(result["accuracy"].as_f64() > Some(0.7), "{result:#}");
    // All of its words are new, so that it guesses.
    assert_eq!(result["tfidf_accuracy"], 0.5);
    assert_eq!(result["published"], serde_json::json!({"accuracy": 0.9, "source": "a paper of 2023"}));
    assert_eq!((&result["examples"], &result["documents"]["live"]), (&12.into(), &12.into()));
    for figure in ["seconds", "ms_per_answer"] {
        assert!(result[figure].as_f64() > Some(0.0), "{figure}: {result:#}");
    }
    assert_eq!(result["settings"]["ingest"]["views"], "verbatim");
    for told in ["engram", "TF-IDF", "a paper of 2023", "0.900", "12 learned, 0 refused, 0 set aside"] {
        assert!(table.contains(told), "{table} does not tell {told}");
    }
    let (table, result) = quality(&tasks, &["--examples", "8"]);
    assert_eq!(
        (&result["examples"], &result["labels"], &result["routed"]),
        (&8.into(), &4.into(), &true.into())
    );
    assert!(result["published"].is_null() && !table.contains("published"), "{table}");
}

#[test]
fn what_quality_cannot_measure_is_told_in_a_line() {
    let folder = tempfile::tempdir().expect("a folder");
    write_tasks(&folder.path().join("tasks"));
    let tasks = folder.path().join("tasks").display().to_string();
    let empty = tempfile::tempdir().expect("a folder").path().display().to_string();
    for (data, more, told) in [
        (&empty, &[][..], "cannot be read"),
        (&tasks, &["--examples", "10001"], "10000"),
        (&tasks, &["--published", "0.9"], "--source"),
        (&tasks, &["--source", "a paper"], "--published"),
        (&tasks, &["--published", "90", "--source", "a paper"], "0 to 1"),
        (&tasks, &["--set", "train.rnak=8"], "train.rank"),
    ] {
        let output = engram(&[&["bench", "quality", "--data", data.as_str()], more].concat());
        let line = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && line.trim().lines().count() == 1, "{line}");
        assert!(line.contains(told), "{line} does not tell {told}");
    }
}

#[test]
fn what_cannot_be_measured_is_told_in_a_line() {
    let folder = tempfile::tempdir().expect("a folder");
    tiny::write(&folder.path().join("base"));
    let tasks = folder.path().join("tasks");
    write_tasks(&tasks);
    let (base, tasks) = (folder.path().join("base").display().to_string(), tasks.display().to_string());
    for (more, told) in [
        (&["--order", "fruit,cars"][..], "fruit, tale, tools"),
        (&["--order", "fruit,tale"], "texts and lines"),
        (&["--order", "fruit", "--capacity", "many"], "2%"),
        (&["--order", "fruit", "--capacity", "0"], "--method naive"),
        (&["--order", "fruit", "--capacity", "2%", "--method", "naive"], "rehearses nothing"),
        (&["--order", "fruit", "--mode", "per-domain", "--method", "joint"], "one adapter"),
        (&["--order", "fruit", "--drift", &base], "X.val.txt"),
        (&["--order", "fruit", "--set", "train.rnak=8"], "train.rank"),
    ] {
        let given = ["bench", "retention", "--base", base.as_str(), "--tasks", tasks.as_str()];
        let output = engram(&[&given, more].concat());
        let line = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && line.trim().lines().count() == 1, "{line}");
        assert!(line.contains(told), "{line} does not tell {told}");
    }
}
