//! `engram generate`: a running server continues a prompt.

use crate::client::{Client, ServerArgs, watched};
use anyhow::{Context, Result};
use clap::value_parser;
use serde_json::{Value, json};
use std::io::{Read, Write};

const EXAMPLES: &str = "\
Examples:
  engram generate 'Where is the spare key?'
  engram generate 'def add(a, b):' --model python --max-tokens 64 --temperature 0
  engram generate --model 'python:0.7+medical:0.3' --seed 7 'Once'
  engram generate 'Once upon' --n 3 --temperature 0.8 --min-p 0.05
  engram generate 'The capital is' --max-tokens 4 --logprobs 3
  engram generate - < prompt.txt";

/// What shapes an answer.
#[derive(Debug, Clone, clap::Args)]
pub struct SamplingArgs {
    /// Who answers: `auto` (chosen from the prompt), `base`, a domain, or domains joined by `+`.
    #[arg(long, default_value = "auto")]
    pub model: String,
    /// Tokens to answer with at most.
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: u32,
    /// 0 takes the most likely token each time.
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f32,
    /// Choose among the most likely tokens that together have this probability; 1 allows all.
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Choose among this many of the most likely tokens; 0 allows all.
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Choose among tokens with at least this share of the most likely one's probability; 0 allows all.
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Make tokens of prompt and answer less likely to come again: 1 changes nothing, 1.1 is mild.
    #[arg(long, value_name = "R")]
    repetition_penalty: Option<f32>,
    /// Make tokens of the answer less likely to come again, -2 to 2: 0 changes nothing.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// The same, for each time that they came: -2 to 2.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Equal seeds give equal answers.
    #[arg(long)]
    seed: Option<u64>,
    /// Text that ends the answer; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

impl SamplingArgs {
    /// The request, but for its prompt.
    pub fn request(&self, stream: bool) -> Value {
        let mut request = json!({
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": stream,
        });
        let mut set = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                request[name] = value;
            }
        };
        set("top_p", self.top_p.map(Value::from));
        set("top_k", self.top_k.map(Value::from));
        set("min_p", self.min_p.map(Value::from));
        set("repetition_penalty", self.repetition_penalty.map(Value::from));
        set("presence_penalty", self.presence_penalty.map(Value::from));
        set("frequency_penalty", self.frequency_penalty.map(Value::from));
        set("seed", self.seed.map(Value::from));
        if !self.stop.is_empty() {
            request["stop"] = json!(self.stop);
        }
        request
    }
}

/// What `engram generate` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The text to continue; `-` reads it from standard input.
    #[arg(allow_hyphen_values = true)]
    prompt: String,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Answers to give, one below the other; with a temperature above 0 they differ.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(1..))]
    n: u32,
    /// Show the log-probability of each token of an answer, and those of the K most likely ones.
    #[arg(long, value_name = "K")]
    logprobs: Option<u32>,
    /// Print the whole answer as JSON instead of streaming its text.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// Prints the continuation while it comes; several of them, or the tokens of one, once they are whole.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let client = Client::new(&args.server)?;
    let mut prompt = args.prompt.clone();
    if prompt == "-" {
        prompt.clear();
        std::io::stdin().read_to_string(&mut prompt).context("standard input is not UTF-8 text")?;
    }
    let stream = !args.json && args.n == 1 && args.logprobs.is_none();
    let mut request = args.sampling.request(stream);
    request["prompt"] = json!(prompt);
    request["n"] = json!(args.n);
    request["logprobs"] = json!(args.logprobs);
    if stream {
        let mut sources = Vec::new();
        client.stream("/v1/completions", &request, |event| {
            out.write_all(event["choices"][0]["text"].as_str().unwrap_or_default().as_bytes())?;
            sources.extend(told_sources(event, 0));
            Ok(out.flush()?)
        })?;
        writeln!(out)?;
        if watched() {
            sources.iter().for_each(|source| eprintln!("[{source}]"));
        }
        return Ok(());
    }
    let answer = client.post("/v1/completions", &request)?;
    if args.json {
        return Ok(writeln!(out, "{answer:#}")?);
    }
    for (number, choice) in answer["choices"].as_array().into_iter().flatten().enumerate() {
        if args.n > 1 {
            writeln!(out, "{}[{}]", if number > 0 { "\n" } else { "" }, number + 1)?;
        }
        writeln!(out, "{}", choice["text"].as_str().unwrap_or_default())?;
        write!(out, "{}", tokens(&choice["logprobs"]))?;
        if watched() {
            told_sources(&answer, number).iter().for_each(|source| eprintln!("[{source}]"));
        }
    }
    Ok(())
}

/// For each document that a choice of an answer is from, where that came from and how to see it.
pub fn told_sources(answer: &Value, choice: usize) -> Vec<String> {
    let one = |of: &Value| {
        let id = of["document"].as_str().filter(|_| of["choice"] == choice)?;
        let from = of["source"].as_str().unwrap_or("a document");
        let likely = 100.0 * of["likely"].as_f64()?;
        Some(format!("from {from} ({likely:.0} %): engram documents show {id}"))
    };
    answer["engram"]["sources"].as_array().into_iter().flatten().filter_map(one).collect()
}

/// A line for each token: its log-probability and text, and after a bar those of the most likely ones.
fn tokens(logprobs: &Value) -> String {
    let list = |name: &str| logprobs[name].as_array().map_or(&[][..], Vec::as_slice);
    let one =
        |token: &str, logprob: &Value| format!("{:8.3} {token:?}", logprob.as_f64().unwrap_or_default());
    let line = |((token, logprob), top): ((&Value, &Value), &Value)| {
        let mut top: Vec<(&String, &Value)> = top.as_object().into_iter().flatten().collect();
        top.sort_by(|x, y| y.1.as_f64().unwrap_or_default().total_cmp(&x.1.as_f64().unwrap_or_default()));
        let top: String = top.iter().map(|(token, logprob)| format!(" {}", one(token, logprob))).collect();
        format!("{}  |{top}\n", one(token.as_str().unwrap_or_default(), logprob))
    };
    list("tokens").iter().zip(list("token_logprobs")).zip(list("top_logprobs")).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_listed_with_the_likeliest_first() {
        let logprobs = json!({
            "tokens": [" a", "\n"],
            "token_logprobs": [-1.25, -0.5],
            "top_logprobs": [{" a": -1.25, "b": -0.75}, {"\n": -0.5}],
            "text_offset": [0, 2],
        });
        let expected =
            "  -1.250 \" a\"  |   -0.750 \"b\"   -1.250 \" a\"\n  -0.500 \"\\n\"  |   -0.500 \"\\n\"\n";
        assert_eq!(tokens(&logprobs), expected);
        assert_eq!(tokens(&Value::Null), "");
    }

    #[test]
    fn only_flags_that_were_given_are_sent() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        let request = |flags: &[&str]| {
            let line = <Line as clap::Parser>::try_parse_from([&["engram", "Once"], flags].concat());
            line.unwrap_or_else(|error| panic!("{error}")).args.sampling.request(false)
        };
        let plain = json!({"model": "auto", "max_tokens": 256, "temperature": 0.0, "stream": false});
        assert_eq!(request(&[]), plain);
        let flags = ["--min-p", "0.5", "--presence-penalty", "-1", "--frequency-penalty=0.5", "--top-k", "9"];
        let given = request(&flags);
        assert_eq!((&given["min_p"], &given["presence_penalty"]), (&json!(0.5), &json!(-1.0)));
        assert_eq!((&given["frequency_penalty"], &given["top_k"]), (&json!(0.5), &json!(9)));
        assert_eq!(given.get("top_p"), None);
    }
}
