//! `engram chat`: a conversation with a running server.

use crate::ask::SamplingArgs;
use crate::client::{Client, ServerArgs, watched};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::io::{BufRead, Write};

const EXAMPLES: &str = "\
Examples:
  engram chat
  engram chat --model python --temperature 0.7

In the conversation: /clear starts anew, /model NAME changes who answers, /quit leaves.";

/// What `engram chat` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    server: ServerArgs,
}

/// Answers each line of standard input, with all that was said before in mind.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let client = Client::new(&args.server)?;
    client.get("/v1/models")?;
    let mut request = args.sampling.request(true);
    let mut messages: Vec<Value> = Vec::new();
    prompt();
    for line in std::io::stdin().lock().lines() {
        let line = line.context("standard input is not UTF-8 text")?;
        match line.trim() {
            "" => {}
            "/quit" | "/exit" => break,
            "/clear" => messages.clear(),
            command if command.starts_with("/model ") => {
                request["model"] = json!(command["/model ".len()..].trim());
            }
            said => {
                messages.push(json!({"role": "user", "content": said}));
                request["messages"] = json!(messages);
                match answer(&client, &request, out) {
                    Ok(content) => messages.push(json!({"role": "assistant", "content": content})),
                    // What could not be answered is taken back, so that the conversation can go on.
                    Err(error) => {
                        messages.pop();
                        eprintln!("engram: {error:#}");
                    }
                }
            }
        }
        prompt();
    }
    Ok(())
}

fn prompt() {
    if watched() {
        eprint!("> ");
    }
}

fn answer(client: &Client, request: &Value, out: &mut dyn Write) -> Result<String> {
    let (mut content, mut from) = (String::new(), String::new());
    client.stream("/v1/chat/completions", request, |event| {
        let text = event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
        content.push_str(text);
        if let Some(adapters) = event["engram"]["adapters"].as_array() {
            let names: Vec<&str> = adapters.iter().filter_map(|adapter| adapter["domain"].as_str()).collect();
            from = names.join("+");
        }
        out.write_all(text.as_bytes())?;
        Ok(out.flush()?)
    })?;
    writeln!(out)?;
    if watched() && !from.is_empty() {
        eprintln!("[{from}]");
    }
    Ok(content)
}
