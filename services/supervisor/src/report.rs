//! `engram doctor --full`: a device beside the CPU, as a report that its owner can paste into an issue.

use crate::doctor::LIBTORCH_VERSION;
use crate::up;
use anyhow::{Result, bail};
use kit::settings::Settings;
use model::device::{Placement, Precision};
use model::quant::Quantisation;
use model::selftest::{self, Measured, REFERENCE, Speed};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::thread::available_parallelism;
use std::time::Duration;

/// What was compared with a limit.
struct Check {
    placement: String,
    name: &'static str,
    /// The figure and its limit, or why there is none.
    found: Result<Measured>,
}

impl Check {
    fn is_ok(&self) -> bool {
        self.found.as_ref().is_ok_and(Measured::is_ok)
    }
}

/// Writes the report, in Markdown or as one JSON object; tells on stderr what it is at.
///
/// # Errors
/// When a check fails, after the report.
pub fn run(settings: &Settings, time: Duration, as_json: bool, out: &mut dyn Write) -> Result<()> {
    let placement = up::placement(settings)?;
    // The goldens and the base that speed is measured on are dense: they are about the device.
    let chosen = Placement { quantisation: Quantisation::None, ..placement };
    let mut placements = vec![chosen];
    if chosen != REFERENCE {
        placements.push(REFERENCE);
    }
    let mut checks = Vec::new();
    let mut speeds: Vec<(String, Result<Speed>)> = Vec::new();
    for placement in &placements {
        eprintln!("engram: {placement}: comparing");
        checks.extend(compare(placement));
        eprintln!("engram: {placement}: measuring speed");
        let share = time / placements.len() as u32;
        speeds.push((placement.to_string(), selftest::speed(placement, share)));
    }
    let machine = machine(settings, &chosen);
    if as_json {
        writeln!(out, "{}", to_json(&machine, &checks, &speeds))?;
    } else {
        markdown(&machine, &checks, &speeds, out)?;
    }
    let failed =
        checks.iter().filter(|c| !c.is_ok()).count() + speeds.iter().filter(|(_, s)| s.is_err()).count();
    if failed > 0 {
        out.flush()?;
        bail!(
            "{failed} of these checks failed: use --set base.device=cpu, and send the report to its developers"
        );
    }
    Ok(())
}

fn compare(placement: &Placement) -> Vec<Check> {
    let check = |name, found| Check { placement: placement.to_string(), name, found };
    let tested = selftest::check(placement.device, placement.precision);
    // It is passed or not; there is no single figure.
    let tested = tested.map(|()| Measured { value: 0.0, limit: 0.0 });
    let logits = selftest::logits(placement);
    let (loss, norm) = match selftest::training(placement) {
        Ok((loss, norm, _)) => (Ok(loss), Ok(norm)),
        Err(error) => (Err(anyhow::anyhow!("{error:#}")), Err(error)),
    };
    vec![
        check("self-test", tested),
        check("logits", logits),
        check("logits of answers side by side", selftest::side_by_side(placement)),
        check("losses of 10 steps", loss),
        check("gradient norms of 10 steps", norm),
    ]
}

/// What the machine is, each by its name.
fn machine(settings: &Settings, placement: &Placement) -> Vec<(&'static str, String)> {
    let unknown = || "unknown".to_owned();
    vec![
        ("engram", env!("CARGO_PKG_VERSION").to_owned()),
        ("libtorch", LIBTORCH_VERSION.to_owned()),
        ("system", system().unwrap_or_else(unknown)),
        ("processor", processor().unwrap_or_else(unknown)),
        ("threads", threads(settings.base.threads)),
        (
            "memory",
            memory().map_or_else(unknown, |bytes| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))),
        ),
        ("device", device(placement)),
        ("bf16 self-test", tested(placement, Precision::Bf16)),
        ("f16 self-test", tested(placement, Precision::F16)),
    ]
}

/// What else the device could compute in: where it cannot, `auto` is f32.
fn tested(placement: &Placement, precision: Precision) -> String {
    match selftest::check(placement.device, precision) {
        Ok(()) => "passed".to_owned(),
        Err(error) => format!("failed: {}", cell(&error)),
    }
}

/// Cores, and how many threads compute.
pub fn threads(setting: usize) -> String {
    let logical = available_parallelism().map_or(1, std::num::NonZero::get);
    let physical = physical_cores().map_or_else(String::new, |n| format!("{n} physical, "));
    let used = if setting > 0 { setting } else { tch::get_num_threads().max(1) as usize };
    let compute = if used == 1 { "thread computes" } else { "threads compute" };
    format!("{physical}{logical} logical cores; {used} {compute} (base.threads = {setting})")
}

fn physical_cores() -> Option<usize> {
    if let Some(text) = told("sysctl", &["-n", "hw.physicalcpu"]).filter(|_| cfg!(target_os = "macos")) {
        return text.parse().ok();
    }
    cores_in(&fs::read_to_string("/proc/cpuinfo").ok()?)
}

/// The different pairs of socket and core in a Linux `cpuinfo`.
fn cores_in(cpuinfo: &str) -> Option<usize> {
    let (mut socket, mut cores) = ("0", BTreeSet::new());
    for (name, value) in cpuinfo.lines().filter_map(|line| line.split_once(':')) {
        match name.trim() {
            "physical id" => socket = value.trim(),
            "core id" => drop(cores.insert((socket, value.trim()))),
            _ => {}
        }
    }
    (!cores.is_empty()).then_some(cores.len())
}

/// The system that its owner knows it by, such as "macOS 15.1, aarch64".
fn system() -> Option<String> {
    let name = if cfg!(target_os = "macos") {
        format!("macOS {}", told("sw_vers", &["-productVersion"])?)
    } else {
        let text = fs::read_to_string("/etc/os-release").ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
        line.trim_matches('"').to_owned()
    };
    Some(format!("{name}, {}", std::env::consts::ARCH))
}

fn processor() -> Option<String> {
    if cfg!(target_os = "macos") {
        return told("sysctl", &["-n", "machdep.cpu.brand_string"]);
    }
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Bytes of memory that there are for this process: the machine's, or what its control group leaves it.
pub fn memory() -> Option<u64> {
    if cfg!(target_os = "macos") {
        return told("sysctl", &["-n", "hw.memsize"])?.parse().ok();
    }
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let machine = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10;
    // A container sees its own limit here; "max" is none.
    let group =
        fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    Some(group.map_or(machine, |limit: u64| limit.min(machine)))
}

fn device(placement: &Placement) -> String {
    let name = match placement.device {
        tch::Device::Cuda(_) => {
            told("nvidia-smi", &["--query-gpu=name,driver_version", "--format=csv,noheader"])
        }
        tch::Device::Mps => told("sysctl", &["-n", "machdep.cpu.brand_string"]),
        _ => None,
    };
    name.map_or_else(|| placement.to_string(), |name| format!("{placement}: {name}"))
}

/// The first line that a program of the system prints, if it is there.
fn told(program: &str, arguments: &[&str]) -> Option<String> {
    let output =
        Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let line = text.lines().next().unwrap_or_default().trim();
    (output.status.success() && !line.is_empty()).then(|| line.to_owned())
}

/// The rows of the table of speeds: name, unit, and how to read it.
type Row = (&'static str, fn(&Speed) -> f64);
const ROWS: [Row; 4] = [
    ("square products, GFLOP/s", |speed| speed.products),
    ("learning, tokens/s", |speed| speed.learning),
    ("prompt of 512, tokens/s", |speed| speed.prefill),
    ("decoding one answer, tokens/s", |speed| speed.decode),
];

fn markdown(
    machine: &[(&str, String)],
    checks: &[Check],
    speeds: &[(String, Result<Speed>)],
    out: &mut dyn Write,
) -> Result<()> {
    writeln!(out, "## engram doctor --full\n\n| | |\n|---|---|")?;
    for (name, value) in machine {
        writeln!(out, "| {name} | {value} |")?;
    }
    writeln!(
        out,
        "\nAgainst transformers and PEFT in f32, as the largest relative difference:\n\n\
         | verdict | on | what | found | at most |\n|---|---|---|---|---|"
    )?;
    for check in checks {
        let verdict = if check.is_ok() { "ok" } else { "FAIL" };
        let (found, limit) = match &check.found {
            Ok(figure) if figure.limit > 0.0 => {
                (format!("{:.1e}", figure.value), format!("{:.0e}", figure.limit))
            }
            Ok(_) => ("passed".to_owned(), String::new()),
            Err(error) => (cell(error), String::new()),
        };
        writeln!(out, "| {verdict} | {} | {} | {found} | {limit} |", check.placement, check.name)?;
    }
    writeln!(out, "\nSpeed, on a base of 5 million random weights:\n")?;
    let names: Vec<&str> = speeds.iter().map(|(name, _)| name.as_str()).collect();
    writeln!(out, "| | {} |\n|---|{}", names.join(" | "), "---:|".repeat(names.len()))?;
    for (name, figure) in ROWS {
        let figure = |(_, speed): &(String, Result<Speed>)| match speed {
            Ok(speed) => format!("{:.0}", figure(speed)),
            Err(error) => format!("FAIL: {}", cell(error)),
        };
        writeln!(out, "| {name} | {} |", speeds.iter().map(figure).collect::<Vec<_>>().join(" | "))?;
    }
    Ok(())
}

/// An error in one cell of a table: its first line, as libtorch's go on for pages.
fn cell(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    text.lines().next().unwrap_or_default().replace('|', "/")
}

fn to_json(machine: &[(&str, String)], checks: &[Check], speeds: &[(String, Result<Speed>)]) -> Value {
    let machine: serde_json::Map<String, Value> =
        machine.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
    let check = |check: &Check| match &check.found {
        Ok(figure) if figure.limit > 0.0 => {
            json!({"on": check.placement, "check": check.name, "ok": check.is_ok(),
            "found": figure.value, "at_most": figure.limit})
        }
        Ok(_) => json!({"on": check.placement, "check": check.name, "ok": true}),
        Err(error) => {
            json!({"on": check.placement, "check": check.name, "ok": false, "error": format!("{error:#}")})
        }
    };
    let speed = |(name, speed): &(String, Result<Speed>)| match speed {
        Ok(speed) => json!({"on": name, "products_gflop_per_s": speed.products,
            "learning_tokens_per_s": speed.learning, "prompt_tokens_per_s": speed.prefill,
            "decoding_tokens_per_s": speed.decode}),
        Err(error) => json!({"on": name, "error": format!("{error:#}")}),
    };
    json!({
        "machine": machine,
        "checks": checks.iter().map(check).collect::<Vec<_>>(),
        "speed": speeds.iter().map(speed).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_pairs_of_socket_and_core() {
        let text = |pairs: &[(u8, u8)]| -> String {
            pairs.iter().map(|(s, c)| format!("physical id\t: {s}\ncore id\t\t: {c}\n\n")).collect()
        };
        assert_eq!(cores_in(&text(&[(0, 0), (0, 0), (0, 1), (1, 0)])), Some(3));
        assert_eq!(cores_in("processor : 0\n"), None);
    }

    #[test]
    fn a_failure_is_a_verdict_in_one_line() {
        let checks = [
            Check {
                placement: "mps, bf16".into(),
                name: "logits",
                found: Ok(Measured { value: 0.2, limit: 0.05 }),
            },
            Check {
                placement: "mps, bf16".into(),
                name: "self-test",
                found: Err(anyhow::anyhow!("a | b\nc")),
            },
        ];
        let speeds = [("mps, bf16".to_owned(), Err(anyhow::anyhow!("gone")))];
        let mut out = Vec::new();
        markdown(&[("engram", "1".into())], &checks, &speeds, &mut out).expect("written");
        let text = String::from_utf8(out).expect("text");
        assert!(text.contains("| FAIL | mps, bf16 | logits | 2.0e-1 | 5e-2 |"), "{text}");
        assert!(text.contains("| FAIL | mps, bf16 | self-test | a / b |  |"), "{text}");
        assert!(text.contains("FAIL: gone"), "{text}");
        assert_eq!(to_json(&[], &checks, &speeds)["checks"][0]["ok"], json!(false));
    }
}
