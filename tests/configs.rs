//! The files in `configs/`: each is read, and what it configures starts as far as this machine can.

use crate::harness::{PROGRAM, engram, root};
use crate::tiny;
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn config(name: &str) -> String {
    root().join("configs").join(name).to_string_lossy().into_owned()
}

/// Starts a server with this file, and asks it how it is. What only another machine has is put in by `more`.
fn starts(name: &str, more: &[&str], key: Option<&str>) {
    let folder = tempfile::tempdir().expect("a folder");
    tiny::write(&folder.path().join("base"));
    let port =
        TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("an address").port();
    let listen = if key.is_some() { format!("0.0.0.0:{port}") } else { format!("127.0.0.1:{port}") };
    let mut command = Command::new(PROGRAM);
    command.args(["up", "--config", &config(name), "--listen", &listen]).args(more);
    command.arg("--base").arg(folder.path().join("base")).arg("--data").arg(folder.path().join("data"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    if let Some(key) = key {
        command.env("ENGRAM__GATEWAY__API_KEYS", key);
    }
    let mut child = command.spawn().expect("started");
    let log = BufReader::new(child.stderr.take().expect("piped"));
    let reading = std::thread::spawn(move || log.lines().map_while(Result::ok).collect::<Vec<_>>());
    let url = format!("http://127.0.0.1:{port}");
    let start = Instant::now();
    let status = loop {
        let mut ask = Command::new(PROGRAM);
        ask.args(["status", "--json", "--server", &url]).stdin(Stdio::null());
        ask.envs(key.map(|key| ("ENGRAM_API_KEY", key)));
        let output = ask.output().expect("run");
        let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        if status["ready"] == true {
            break status;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "{name} is not ready: {output:?}");
        std::thread::sleep(Duration::from_millis(100));
    };
    assert_eq!(status["base"]["device"], "cpu", "{status}");
    if key.is_some() {
        let without = engram(&["status", "--server", &url]);
        assert!(String::from_utf8_lossy(&without.stderr).contains("asks for a key"), "{without:?}");
        let (live, dead) = (health(&port.to_string()), health("1"));
        assert!(live.status.success() && !dead.status.success(), "{live:?} {dead:?}");
    }
    let pid = rustix::process::Pid::from_raw(child.id() as i32).expect("a process");
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("told to end");
    assert!(child.wait().expect("ended").success(), "{name} ends in order");
    let log = reading.join().expect("read");
    if name == "production.toml" {
        let first = log.first().expect("a line");
        serde_json::from_str::<Value>(first).unwrap_or_else(|error| panic!("{error}: {first}"));
    }
}

/// What the image is asked for its health, of a server on another port.
fn health(port: &str) -> Output {
    let file = fs::read_to_string(root().join("configs/Containerfile")).expect("readable");
    let check = file.lines().find_map(|line| line.strip_prefix("HEALTHCHECK ")?.split_once("CMD "));
    let words: Vec<String> = serde_json::from_str(check.expect("a command").1).expect("a list");
    let words: Vec<String> = words.iter().map(|word| word.replace("8420", port)).collect();
    Command::new(&words[0]).args(&words[1..]).output().expect("run")
}

const ON_THE_PROCESSOR: [&str; 4] = ["--set", "base.device=cpu", "--set", "base.precision=f32"];

#[test]
fn each_starts_a_server() {
    starts("default.toml", &[], None);
    starts("apple-silicon.toml", &ON_THE_PROCESSOR, None);
    starts("cuda.toml", &ON_THE_PROCESSOR, None);
    starts("production.toml", &[], Some("a-key-of-sixteen-or-more"));
}

#[test]
fn what_a_machine_lacks_is_told_and_not_worked_around() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().to_string_lossy().into_owned();
    let check = |name: &str, which: &str| -> (Value, bool) {
        let output = engram(&[
            "doctor",
            "--json",
            "--config",
            &config(name),
            "--data",
            &data,
            "--listen",
            "127.0.0.1:0",
        ]);
        let lines = String::from_utf8(output.stdout).expect("text");
        let found: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        let settings = found.iter().find(|one| one["check"] == "settings").expect("settings");
        assert_eq!(settings["ok"], true, "{name}: {settings}");
        let one =
            found.iter().find(|one| one["check"] == which).unwrap_or_else(|| panic!("{which}: {found:?}"));
        (one.clone(), output.status.success())
    };
    for (name, device) in [("apple-silicon.toml", "mps"), ("cuda.toml", "cuda")] {
        let (found, success) = check(name, "device");
        // Where there is such a GPU, the check passes.
        if found["ok"] == false {
            assert!(!success && found["found"].as_str().is_some_and(|told| told.contains(device)), "{found}");
        }
    }
    let (base, success) = check("default.toml", "base");
    assert!(success && base["found"].as_str().is_some_and(|told| told.contains("4.9 M")), "{base}");
}

#[test]
fn a_file_says_only_what_differs() {
    let flat = |name: &str| -> Vec<String> {
        let text = fs::read_to_string(root().join("configs").join(name)).expect("readable");
        let (mut section, mut found) = (String::new(), Vec::new());
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if let Some(name) = line.strip_prefix('[') {
                section = name.trim_end_matches(']').to_owned();
            } else if !line.is_empty() {
                found.push(format!("{section}.{line}"));
            }
        }
        found
    };
    let default = flat("default.toml");
    for name in ["apple-silicon.toml", "cuda.toml", "production.toml"] {
        for setting in flat(name) {
            assert!(!default.contains(&setting), "{name}: {setting} is the default");
        }
    }
}

#[test]
fn the_systemd_unit_is_sound() {
    let unit = fs::read_to_string(root().join("configs/engram.service")).expect("readable");
    let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).expect("a command");
    let (program, arguments) = start.split_once(' ').expect("arguments");
    assert!(arguments.starts_with("up --config /etc/engram/production.toml --data "), "{arguments}");
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        eprintln!("skipped: there is no systemd-analyze");
        return;
    }
    // What the unit expects of a machine is put where the check looks for it.
    let folder = tempfile::tempdir().expect("a folder");
    let here = unit
        .replace(program, PROGRAM)
        .replace("/opt/engram/lib", "/usr/lib")
        .replace("file:///etc/engram/production.toml", "https://example.org");
    let file = folder.path().join("engram.service");
    fs::write(&file, here).expect("written");
    let verify = |file: &Path| {
        Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(file).output().expect("run")
    };
    let output = verify(&file);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let broken = folder.path().join("broken.service");
    fs::write(&broken, "[Service]\nExecStart=/no/such/program\n").expect("written");
    assert!(!verify(&broken).status.success(), "the check can fail");
}

#[test]
fn the_containerfile_copies_what_is_there_and_starts_what_is_known() {
    let file = fs::read_to_string(root().join("configs/Containerfile")).expect("readable");
    let copied =
        file.lines().filter_map(|line| line.strip_prefix("COPY ")).filter(|line| !line.starts_with("--from"));
    for line in copied {
        let from = line.split_whitespace().next().expect("a path");
        assert!(root().join(from).exists(), "{line}");
    }
    let commands = ["CMD [", "ENTRYPOINT ["].map(|start| {
        let line = file.lines().rfind(|line| line.starts_with(start)).expect(start);
        let words = line.split_once(' ').expect("words").1;
        serde_json::from_str::<Vec<String>>(words).expect("a list")
    });
    let [arguments, program] = commands;
    assert_eq!(program, ["engram"]);
    // The same words, with the file where it is here: they fail of the base alone.
    let data = tempfile::tempdir().expect("a folder");
    let here: Vec<String> = arguments
        .iter()
        .map(|word| match word.as_str() {
            "/etc/engram/production.toml" => config("production.toml"),
            "/data" => data.path().to_string_lossy().into_owned(),
            word => word.to_owned(),
        })
        .collect();
    let here: Vec<&str> = here.iter().map(String::as_str).chain(["--base", "/no/such/base"]).collect();
    let output = engram(&here);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && told.contains("/no/such/base"), "{told}");
    assert!(Path::new(PROGRAM).exists());
}
