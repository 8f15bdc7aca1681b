//! `engram bench update`, `generate`, `serve`, `memory` and `growth`: how fast learning and answers are, and what they take.

use crate::harness::engram;
use crate::tiny;
use serde_json::Value;
use std::fs;
use std::path::Path;

/// A shape of few weights, as a preset.
fn write_shape(path: &Path) {
    let preset =
        fs::read_to_string(crate::harness::root().join("configs/models/nano.toml")).expect("a preset");
    let smaller = preset.lines().map(|line| match line.split_once(" = ").map(|(key, _)| key) {
        Some("num_hidden_layers") => "num_hidden_layers = 2",
        Some("vocab_size") => "vocab_size = 300",
        _ => line,
    });
    fs::write(path, smaller.collect::<Vec<_>>().join("\n")).expect("written");
}

fn measured(folder: &Path, given: &[&str]) -> Value {
    reported(folder, &[given, &["--repeats", "2"]].concat())
}

fn reported(folder: &Path, given: &[&str]) -> Value {
    let json = folder.join("result.json").display().to_string();
    let output = engram(&[given, &["--json", &json, "--set", "base.threads=1"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&fs::read(json).expect("there")).expect("JSON")
}

#[test]
fn one_answer_is_timed_on_a_base_and_on_a_shape() {
    let folder = tempfile::tempdir().expect("a folder");
    let (base, shape) = (folder.path().join("base"), folder.path().join("shape.toml"));
    tiny::write(&base);
    write_shape(&shape);
    for model in [base, shape] {
        let model = model.display().to_string();
        let given = ["bench", "generate", "--model", &model, "--prompt-tokens", "50", "--tokens", "8"];
        let result = measured(folder.path(), &given);
        for figure in ["prompt_tokens_per_s", "decode_tokens_per_s"] {
            assert!(result[figure].as_f64().expect("a figure") > 0.0, "{result:#}");
            assert_eq!(result["all"][figure].as_array().map(Vec::len), Some(2));
        }
        let parameters = result["model"]["parameters"].as_u64().expect("a count");
        assert!((10_000..2_000_000).contains(&parameters), "{parameters}");
    }
}

#[test]
fn learning_is_timed_on_random_tokens_and_on_text() {
    let folder = tempfile::tempdir().expect("a folder");
    let (base, text) = (folder.path().join("base"), folder.path().join("facts.jsonl"));
    tiny::write(&base);
    fs::write(&text, "{\"prompt\": \"Where?\", \"response\": \" Here.\"}\n").expect("written");
    let (base, text) = (base.display().to_string(), text.display().to_string());
    for data in [&["--tokens", "16"][..], &["--data", &text]] {
        let given = ["bench", "update", "--base", &base, "--examples", "8", "--batch", "4"];
        let result = measured(folder.path(), &[&given[..], data].concat());
        assert_eq!((result["examples"].as_u64(), result["rehearsed"].as_u64()), (Some(8), Some(8)));
        for figure in ["tokens_per_s", "gflops", "matrix_peak_gflops", "peak_rss_bytes"] {
            assert!(result[figure].as_f64().expect("a figure") > 0.0, "{figure}: {result:#}");
        }
    }
}

#[test]
fn many_answers_are_timed_over_adapters() {
    let folder = tempfile::tempdir().expect("a folder");
    let base = folder.path().join("base");
    tiny::write(&base);
    let base = base.display().to_string();
    let given = ["bench", "serve", "--base", &base, "--streams", "1,5", "--adapters", "0,2"];
    let result = measured(folder.path(), &[&given[..], &["--prompt-tokens", "20", "--tokens", "8"]].concat());
    let rows = result["rows"].as_array().expect("rows");
    let asked: Vec<_> = rows.iter().map(|row| (row["adapters"].as_u64(), row["streams"].as_u64())).collect();
    assert_eq!(asked, [(0, 1), (0, 5), (2, 1), (2, 5)].map(|(adapters, n)| (Some(adapters), Some(n))));
    for row in rows {
        let figure = |name: &str| row[name].as_f64().expect("a figure");
        assert!(figure("tokens_per_s") > 0.0, "{row:#}");
        // So small a base may have ended one answer before the next is heard of.
        assert!(row["decode_tokens_per_s"].as_f64().is_none_or(|decoding| decoding > 0.0), "{row:#}");
        assert!(figure("first_ms_p50") <= figure("first_ms_p99"), "{row:#}");
        assert!(figure("between_ms_p50") <= figure("between_ms_p99"), "{row:#}");
    }
}

#[test]
fn answers_are_timed_while_something_is_learned() {
    let folder = tempfile::tempdir().expect("a folder");
    let base = folder.path().join("base");
    tiny::write(&base);
    let svg = folder.path().join("both.svg").display().to_string();
    let base = base.display().to_string();
    let given = ["bench", "serve", "--base", &base, "--streams", "2", "--adapters", "1", "--tokens", "64"];
    // Short micro-batches, of which several end while so small a base answers.
    let short = ["--set", "train.micro_tokens=64", "--set", "train.step_tokens=128"];
    let result =
        measured(folder.path(), &[&given[..], &short, &["--learning", "0.2,1", "--svg", &svg]].concat());
    let rows = result["rows"].as_array().expect("rows");
    let learning: Vec<_> = rows.iter().map(|row| row["learning"].as_f64()).collect();
    assert_eq!(learning, [None, Some(0.2), Some(1.0)], "first while nothing is learned");
    assert!(rows[2]["learned_tokens_per_s"].as_f64().expect("a figure") > 0.0, "{result:#}");
    let svg = fs::read_to_string(svg).expect("a drawing");
    assert!(svg.contains("p99, 2 streams, 1 adapters") && svg.contains("speed of learning"));
}

#[test]
fn what_is_resident_is_told_by_what_is_done_beside_the_estimate() {
    let folder = tempfile::tempdir().expect("a folder");
    let base = folder.path().join("base");
    tiny::write(&base);
    let base = base.display().to_string();
    let given =
        ["bench", "memory", "--base", &base, "--steps", "1", "--streams", "4", "--prompt-tokens", "40"];
    let small =
        ["replay.capacity=50", "train.step_tokens=128", "train.micro_tokens=64", "infer.cache_mb_max=1"];
    let set = small.iter().flat_map(|setting| ["--set", *setting]).collect::<Vec<_>>();
    let result = reported(folder.path(), &[&given[..], &set[..]].concat());
    let phases = result["phases"].as_array().expect("phases");
    let names: Vec<_> = phases.iter().filter_map(|phase| phase["name"].as_str()).collect();
    assert_eq!(names, ["loading", "replay buffer", "learning", "answering", "both"]);
    let peak = result["peak_rss_bytes"].as_u64().expect("a figure");
    assert!(
        phases.iter().all(|phase| (1..=peak).contains(&phase["peak_rss_bytes"].as_u64().expect("a figure")))
    );
    assert_eq!(result["replay_examples"].as_u64(), Some(50));
    // Keys and values of a token take 512 bytes in f32, and room is made before there is none left.
    assert!((1000..=4096).contains(&result["cached_tokens"].as_u64().expect("a figure")), "{result:#}");
    for figure in ["base_bytes", "adapter_bytes", "replay_buffer_bytes", "of_estimate"] {
        assert!(result[figure].as_f64().expect("a figure") > 0.0, "{figure}: {result:#}");
    }
    assert!(peak > result["base_bytes"].as_u64().expect("a figure"));
}

#[test]
fn what_grows_is_told_with_its_exponent_and_drawn() {
    let folder = tempfile::tempdir().expect("a folder");
    let (base, shape) = (folder.path().join("base"), folder.path().join("shape.toml"));
    tiny::write(&base);
    write_shape(&shape);
    let svg = folder.path().join("curves").display().to_string();
    let (base, shape) = (base.display().to_string(), shape.display().to_string());
    let models = format!("{base},{shape}");
    let given = ["bench", "growth", "--base", &base, "--models", &models, "--svg", &svg, "--tokens", "8"];
    let small = ["--examples", "8,32", "--kept", "20,200", "--domains", "1,4", "--adapters", "1,4"];
    let result = measured(folder.path(), &[&given[..], &small, &["--documents", "200,1000"]].concat());
    let curves = result["curves"].as_array().expect("curves");
    let names: Vec<_> = curves.iter().filter_map(|curve| curve["curve"].as_str()).collect();
    let rehearsal = ["rehearsal", "rehearsal-takes-in", "rehearsal-digest"];
    assert_eq!(
        names,
        [&["examples"][..], &rehearsal, &["routing", "adapters", "updates", "models", "intake"]].concat()
    );
    for curve in curves {
        assert_eq!(curve["points"].as_array().map(Vec::len), Some(2), "{curve:#}");
        assert!(curve["exponent"].is_f64() && curve["expected"].is_f64(), "{curve:#}");
        let name = format!("{}.svg", curve["curve"].as_str().expect("a name"));
        let drawn = fs::read_to_string(Path::new(&svg).join(name)).expect("a drawing");
        assert!(drawn.contains("measured"), "{curve:#}");
    }
}

#[test]
fn a_speed_that_cannot_be_measured_is_told_in_a_line() {
    let folder = tempfile::tempdir().expect("a folder");
    tiny::write(&folder.path().join("base"));
    let base = folder.path().join("base").display().to_string();
    for (given, told) in [
        (&["generate", "--base", &base, "--tokens", "1000"][..], "context of 256"),
        (&["generate", "--base", "giant"], "giant"),
        (&["generate", "--base", "giant.toml"], "giant.toml"),
        (&["generate", "--base", &base, "--set", "base.quantisation=int4"], "int8"),
        (&["serve", "--base", &base, "--tokens", "300"], "context of 256"),
        (&["serve", "--base", &base, "--streams", "0"], "--streams"),
        (&["serve", "--base", &base, "--learning", "1.5"], "--learning"),
        (&["serve", "--base", &base, "--svg", "both.svg"], "--learning"),
        (&["memory", "--base", &base, "--prompt-tokens", "300"], "context of 256"),
        (&["growth", "--base", &base, "--adapters", "17"], "--adapters"),
    ] {
        let output = engram(&[&["bench"], given].concat());
        let line = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && line.trim().lines().count() == 1, "{line}");
        assert!(line.contains(told), "{line} does not tell {told}");
    }
}
