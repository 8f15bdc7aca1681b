//! `engram status`, and how answers of the server are laid out for people.

use crate::client::{Client, ServerArgs};
use anyhow::Result;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::thread;
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  engram status
  engram status --watch            every two seconds, until Ctrl-C
  engram status --json | jq .documents
  engram status --json --watch 10 >> status.jsonl";

/// Moves to the upper left corner and clears from there on.
const CLEAR: &str = "\x1b[H\x1b[J";

/// What `engram status` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Print all that the server says, as JSON.
    #[arg(long)]
    json: bool,
    /// Look again every so many seconds, until stopped.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2",
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    watch: Option<u64>,
    #[command(flatten)]
    server: ServerArgs,
}

/// Prints what the server says of itself.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let client = Client::new(&args.server)?;
    let status = client.get("/v1/status")?;
    let Some(seconds) = args.watch else {
        return if args.json { show(&status, true, out) } else { glance(&status, out) };
    };
    let clear = !args.json && io::stdout().is_terminal();
    let mut answer = Ok(status);
    loop {
        if clear {
            write!(out, "{CLEAR}")?;
        }
        match &answer {
            Ok(status) if args.json => writeln!(out, "{status}")?,
            Ok(status) => glance(status, out)?,
            Err(error) => eprintln!("engram: {error:#}; looking again"),
        }
        out.flush()?;
        thread::sleep(Duration::from_secs(seconds));
        answer = client.get("/v1/status");
    }
}

/// Why a server that says this of itself learns nothing; none if it does.
pub(crate) fn not_learning(status: &Value) -> Option<&'static str> {
    match (status["learning"] == true, status["disk_full"] == true) {
        (false, _) => Some("off (train.enabled, or too many restarts)"),
        (true, true) => Some("waits for room on the disk (limits.disk_free_learn_percent)"),
        (true, false) => None,
    }
}

/// What one wants to see first, on a screen.
fn glance(status: &Value, out: &mut dyn Write) -> Result<()> {
    let (base, documents) = (&status["base"], &status["documents"]);
    let ready = if status["ready"] == true { "ready" } else { "not ready yet" };
    let up = lasted(status["uptime_s"].as_u64().unwrap_or(0));
    writeln!(out, "server     {ready}, up {up}, version {}", plain(&status["version"]))?;
    let millions = base["parameters"].as_f64().unwrap_or(0.0) / 1e6;
    let [name, context, device, precision] =
        ["name", "context_length", "device", "precision"].map(|field| plain(&base[field]));
    writeln!(
        out,
        "base       {name}, {millions:.1} M parameters, context {context}, on {device} in {precision}"
    )?;
    let [accepted, backlog, learned] =
        ["accepted", "backlog", "learned"].map(|field| plain(&documents[field]));
    writeln!(out, "documents  {accepted} accepted, {backlog} waiting to be judged, {learned} learned")?;
    writeln!(out, "learning   {}", not_learning(status).unwrap_or("on"))?;
    let rows: Vec<Value> = domains(status);
    if !rows.is_empty() {
        writeln!(out)?;
        let columns = ["domain", "documents", "kept", "refused", "learned", "set aside", "serves"];
        table(&columns, &rows, out)?;
    }
    Ok(())
}

/// A row for each domain that has documents or an adapter.
fn domains(status: &Value) -> Vec<Value> {
    let adapters = status["adapters"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut rows: BTreeMap<String, Value> = status["domains"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(domain, counts)| {
            let mut row = counts.clone();
            row["domain"] = json!(domain);
            (domain.clone(), row)
        })
        .collect();
    for adapter in adapters {
        let domain = plain(&adapter["domain"]);
        let row = rows.entry(domain.clone()).or_insert_with(|| json!({"domain": domain}));
        row["learned"] = adapter["documents"].clone();
        row["set aside"] = json!(adapter["set_aside"].as_array().map_or(0, Vec::len));
        row["serves"] = adapter["generation"].clone();
    }
    rows.into_values().collect()
}

/// A time as a person says it.
fn lasted(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// An answer as JSON, or as indented lines of names and values.
pub fn show(answer: &Value, json: bool, out: &mut dyn Write) -> Result<()> {
    if json {
        writeln!(out, "{answer:#}")?;
        return Ok(());
    }
    lines(answer, 0, out)
}

fn lines(value: &Value, depth: usize, out: &mut dyn Write) -> Result<()> {
    let pad = "  ".repeat(depth);
    match value {
        Value::Object(fields) => {
            let width = fields.keys().map(String::len).max().unwrap_or(0);
            for (name, value) in fields {
                if is_nested(value) {
                    writeln!(out, "{pad}{name}")?;
                    lines(value, depth + 1, out)?;
                } else {
                    writeln!(out, "{pad}{name:width$}  {}", plain(value))?;
                }
            }
        }
        Value::Array(items) => {
            for (place, item) in items.iter().enumerate() {
                if place > 0 && is_nested(item) {
                    writeln!(out)?;
                }
                lines(item, depth, out)?;
            }
        }
        _ => writeln!(out, "{pad}{}", plain(value))?,
    }
    Ok(())
}

fn is_nested(value: &Value) -> bool {
    match value {
        Value::Object(fields) => !fields.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    }
}

/// A value as a person would write it.
pub fn plain(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Number(number) if number.is_f64() => {
            // Adding zero makes a negative zero an ordinary one.
            number.as_f64().map_or_else(String::new, |number| format!("{:.4}", number + 0.0))
        }
        Value::Object(_) | Value::Array(_) if !is_nested(value) => "none".into(),
        other => other.to_string(),
    }
}

/// Rows under headings, as wide as they need to be. A column is named by the field that it shows.
pub fn table(columns: &[&str], rows: &[Value], out: &mut dyn Write) -> Result<()> {
    let cells: Vec<Vec<String>> =
        rows.iter().map(|row| columns.iter().map(|column| plain(&row[column])).collect()).collect();
    let width = |index: usize| {
        let cells = cells.iter().map(|row| row[index].chars().count());
        cells.chain([columns[index].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let headings = columns.iter().map(|column| (*column).to_owned()).collect();
    for row in std::iter::once(&headings).chain(&cells) {
        let line: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        writeln!(out, "{}", line.join("  ").trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_glance_shows_server_base_documents_and_domains() {
        let status = json!({
            "version": "0.1.0", "ready": true, "uptime_s": 200, "learning": true,
            "base": {"name": "nano", "parameters": 4_900_000, "context_length": 512, "device": "cpu", "precision": "f32"},
            "documents": {"accepted": 3, "backlog": 0, "learned": 2},
            "domains": {"home": {"documents": 3, "kept": 2, "refused": 1}},
            "adapters": [{"domain": "home", "documents": 2, "set_aside": [], "generation": "ab"},
                         {"domain": "merged", "documents": 0, "set_aside": [], "generation": "cd"}],
        });
        let mut out = Vec::new();
        glance(&status, &mut out).expect("shown");
        let told = String::from_utf8(out).expect("text");
        for line in [
            "server     ready, up 3 min, version 0.1.0",
            "base       nano, 4.9 M parameters, context 512, on cpu in f32",
            "documents  3 accepted, 0 waiting to be judged, 2 learned",
            "home    3          2     1        2        0          ab",
        ] {
            assert!(told.lines().any(|told| told == line), "{line}: {told}");
        }
        assert!(told.contains("merged  -") && told.contains("cd"), "{told}");
    }

    #[test]
    fn a_glance_says_why_nothing_is_learned() {
        let learning = |status: Value| {
            let mut out = Vec::new();
            glance(&status, &mut out).expect("shown");
            let told = String::from_utf8(out).expect("text");
            told.lines().find_map(|line| line.strip_prefix("learning   ")).expect("a line").to_owned()
        };
        assert_eq!(learning(json!({"learning": true, "disk_full": false})), "on");
        assert_eq!(
            learning(json!({"learning": false, "disk_full": true})),
            "off (train.enabled, or too many restarts)"
        );
        let full = learning(json!({"learning": true, "disk_full": true}));
        assert_eq!(full, "waits for room on the disk (limits.disk_free_learn_percent)");
    }

    #[test]
    fn nested_answers_are_indented_in_their_order_and_tables_aligned() {
        let mut out = Vec::new();
        show(&json!({"state": "ready", "queue": {"depth": 3, "loss": 0.5}, "none": []}), false, &mut out)
            .expect("shown");
        assert_eq!(
            String::from_utf8_lossy(&out),
            "state  ready\nqueue\n  depth  3\n  loss   0.5000\nnone   none\n"
        );
        let mut out = Vec::new();
        table(&["id", "reason"], &[json!({"id": "abc"})], &mut out).expect("shown");
        assert_eq!(String::from_utf8_lossy(&out), "id   reason\nabc  -\n");
    }
}
