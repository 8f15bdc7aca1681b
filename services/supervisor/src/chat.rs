//! `engram chat`: a conversation with a running server.

mod input;

use crate::ask::{SamplingArgs, told_sources};
use crate::client::{Client, ServerArgs, segment, watched};
use anyhow::{Result, bail, ensure};
use input::Input;
use serde_json::{Value, json};
use std::io::Write;

const EXAMPLES: &str = "\
Examples:
  engram chat
  engram chat --model python --temperature 0.7
  engram chat --system 'Answer in one sentence.'

In the conversation, a line that starts with / is for the program; /help lists what there is:
  /learn                learn the last question with its answer
  /learn Under the pot. learn the last question with this answer
  /model python         let another adapter answer";

const HELP: &str = "\
/learn            learn the last question with its answer
/learn TEXT       learn the last question with TEXT as its answer; what taught this question another one is forgotten
/model            say who answers, and list who could
/model NAME       let NAME answer: auto, base, a domain, or domains joined by +
/clear            start anew
/help             this
/quit             leave; so does the end of the input (Ctrl-D)
Anything else is said to the model. Nothing of it is learned without /learn.";

/// What `engram chat` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// What the model is told before the conversation.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
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
    let system = args.system.as_ref().map(|text| json!({"role": "system", "content": text}));
    let messages = system.iter().cloned().collect();
    let mut input = Input::new()?;
    if input.is_terminal() {
        eprintln!("/help lists what there is besides talking");
    }
    let mut talk = Talk { client: &client, system, messages, last: None, out };
    while let Some(line) = input.next_line("> ")? {
        let line = line.trim();
        if ["/quit", "/exit"].contains(&line) {
            break;
        }
        // What could not be done is told, so that the conversation can go on.
        if let Err(error) = talk.hear(line, &mut request) {
            eprintln!("engram: {error:#}");
        }
    }
    Ok(())
}

/// The last question, its answer, the domain that gave it, where it was one, and the document that it is most likely from.
struct Exchange {
    question: Value,
    answer: Value,
    domain: Option<String>,
    document: Value,
}

struct Talk<'a> {
    client: &'a Client,
    system: Option<Value>,
    messages: Vec<Value>,
    last: Option<Exchange>,
    out: &'a mut dyn Write,
}

impl Talk<'_> {
    fn hear(&mut self, line: &str, request: &mut Value) -> Result<()> {
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match (command, rest.trim()) {
            ("", _) => Ok(()),
            ("/help" | "/?", _) => Ok(writeln!(self.out, "{HELP}")?),
            ("/clear", _) => {
                self.messages = self.system.iter().cloned().collect();
                self.last = None;
                Ok(())
            }
            ("/model", "") => self.models(request),
            ("/model", name) => {
                let names = self.names()?;
                for part in name.split('+') {
                    let part = part.split(':').next().unwrap_or_default().trim();
                    ensure!(
                        names.iter().any(|known| known == part),
                        "there is no {part}; /model lists what there is"
                    );
                }
                request["model"] = json!(name);
                Ok(())
            }
            ("/learn", correction) => self.learn(correction),
            (command, _) if command.starts_with('/') && !command[1..].contains('/') => {
                bail!("there is no {command}; /help lists what there is")
            }
            _ => self.ask(line, request),
        }
    }

    fn models(&mut self, request: &Value) -> Result<()> {
        writeln!(self.out, "{} answers", request["model"].as_str().unwrap_or("auto"))?;
        let names = self.names()?.join(" ");
        Ok(writeln!(self.out, "there are: {names}")?)
    }

    fn names(&self) -> Result<Vec<String>> {
        let models = self.client.get("/v1/models")?;
        let names = models["data"].as_array().into_iter().flatten().filter_map(|model| model["id"].as_str());
        Ok(names.map(str::to_owned).collect())
    }

    fn ask(&mut self, line: &str, request: &mut Value) -> Result<()> {
        let question = json!({"role": "user", "content": line});
        self.messages.push(question.clone());
        request["messages"] = json!(self.messages);
        let told = self.answer(request);
        // What could not be answered is taken back.
        let (content, domains, document) = told.inspect_err(|_| drop(self.messages.pop()))?;
        let answer = json!({"role": "assistant", "content": content});
        self.messages.push(answer.clone());
        let domain = if domains.len() == 1 { domains.into_iter().next() } else { None };
        self.last = Some(Exchange { question, answer, domain, document });
        Ok(())
    }

    /// Prints the answer while it comes; what it was, which domains gave it, and which document it is most likely from.
    fn answer(&mut self, request: &Value) -> Result<(String, Vec<String>, Value)> {
        let (mut content, mut domains, mut sources) = (String::new(), Vec::new(), Vec::new());
        let mut document = Value::Null;
        let out = &mut *self.out;
        self.client.stream("/v1/chat/completions", request, |event| {
            let text = event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
            content.push_str(text);
            if let Some(adapters) = event["engram"]["adapters"].as_array() {
                let names = adapters.iter().filter_map(|adapter| adapter["domain"].as_str());
                domains = names.map(str::to_owned).collect();
                document = event["engram"]["sources"][0]["document"].clone();
            }
            sources.extend(told_sources(event, 0));
            out.write_all(text.as_bytes())?;
            Ok(out.flush()?)
        })?;
        writeln!(out)?;
        if watched() && !domains.is_empty() {
            eprintln!("[{}]", domains.join("+"));
            sources.iter().for_each(|source| eprintln!("[{source}]"));
        }
        Ok((content, domains, document))
    }

    /// Whether a document is an answer to this very question.
    fn asks(&self, id: &str, question: &Value) -> bool {
        let Ok(told) = self.client.get(&format!("/v1/documents/{}?content=true", segment(id))) else {
            return false;
        };
        let content = &told["content"];
        let asked = content["prompt"].as_str().or_else(|| match content["messages"].as_array()?.as_slice() {
            [only, _] => only["content"].as_str(),
            _ => None,
        });
        let question = question["content"].as_str().unwrap_or_default().trim();
        asked.is_some_and(|asked| asked.trim().eq_ignore_ascii_case(question))
    }

    fn learn(&mut self, correction: &str) -> Result<()> {
        let Some(Exchange { question, answer, domain, document }) = &self.last else {
            bail!("there is nothing to learn yet: ask something first");
        };
        let mut feedback = json!({"rating": "good", "messages": [question, answer]});
        if !correction.is_empty() {
            feedback["rating"] = json!("bad");
            feedback["correction"] = json!(correction);
        }
        let from = document.as_str().filter(|_| !correction.is_empty());
        // One that answers another question may be right about that.
        let same = from.is_some_and(|id| self.asks(id, question));
        if same {
            feedback["document"] = document.clone();
        }
        if let Some(domain) = domain {
            feedback["domain"] = json!(domain);
        }
        let told = self.client.post("/v1/feedback", &feedback)?;
        let of = |field: &str| told[field].as_str().unwrap_or("-").to_owned();
        writeln!(self.out, "learning it in {}: engram documents show {}", of("domain"), of("id"))?;
        if let Some(forgotten) = told["forgotten"].as_str() {
            writeln!(self.out, "forgot {forgotten}, which taught the other answer")?;
        } else if let Some(id) = from.filter(|_| !same) {
            writeln!(
                self.out,
                "the other answer is from {id}; where that is wrong, too: engram documents forget {id}"
            )?;
        }
        Ok(self.out.flush()?)
    }
}
