//! `engram status`, and how answers of the server are laid out for people.

use crate::client::{Client, ServerArgs};
use anyhow::Result;
use serde_json::Value;
use std::io::Write;

const EXAMPLES: &str = "\
Examples:
  engram status
  engram status --json | jq .";

/// What `engram status` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// Prints what the server says of itself.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let status = Client::new(&args.server)?.get("/v1/status")?;
    show(&status, args.json, out)
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
    fn nested_answers_are_indented_and_tables_aligned() {
        let mut out = Vec::new();
        show(&json!({"state": "ready", "queue": {"depth": 3, "loss": 0.5}, "none": []}), false, &mut out)
            .expect("shown");
        assert_eq!(
            String::from_utf8_lossy(&out),
            "none   none\nqueue\n  depth  3\n  loss   0.5000\nstate  ready\n"
        );
        let mut out = Vec::new();
        table(&["id", "reason"], &[json!({"id": "abc"})], &mut out).expect("shown");
        assert_eq!(String::from_utf8_lossy(&out), "id   reason\nabc  -\n");
    }
}
