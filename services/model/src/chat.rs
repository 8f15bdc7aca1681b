//! Chat templates: one path from messages to tokens, for training and for answering.
//!
//! A template's control tokens become control tokens; what people wrote stays text. Tokens never straddle the
//! place where an answer begins, since generation begins there too.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use minijinja::{Environment, ErrorKind, context};
use serde_json::Value;

use crate::limits;
use crate::pack::Sequence;
use crate::tokenizer::{Tokenizer, special_texts};

/// What a base without a template gets: each content on a line, and an answer ends with the end token.
const DEFAULT: &str = "{% for message in messages %}{{ message.content }}\
    {% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}";

/// Instructions that a template may take: it comes from a model folder and may not run for ever.
const FUEL: u64 = 2_000_000;

const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// A message: role and content.
pub type Turn<'a> = (&'a str, &'a str);

/// How a model writes conversations.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos: String,
    eos: String,
    pub(crate) is_default: bool,
}

impl ChatTemplate {
    /// Loads a model folder's template: `chat_template.jinja`, or the one in `tokenizer_config.json`, or a
    /// default that puts each content on a line of its own.
    ///
    /// # Errors
    /// When the template's syntax is wrong.
    pub fn load(dir: &Path) -> Result<Self> {
        let source = find_source(dir)?;
        let (bos, eos) = special_texts(dir);
        Self::new(source.as_deref(), &bos, &eos).with_context(|| format!("{}: chat template", dir.display()))
    }

    fn new(source: Option<&str>, bos: &str, eos: &str) -> Result<Self> {
        let text = source.unwrap_or(DEFAULT).to_string();
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| strftime(&format, SystemTime::now()));
        environment.add_filter("tojson", tojson);
        // Marks for training on answers, which minijinja does not know; we find answers by ourselves.
        let plain = text
            .replace("{% generation %}", "")
            .replace("{%- generation -%}", "")
            .replace("{%- generation %}", "")
            .replace("{% endgeneration %}", "")
            .replace("{%- endgeneration -%}", "")
            .replace("{%- endgeneration %}", "");
        environment.add_template_owned("chat", plain).map_err(|error| anyhow::anyhow!("{error:#}"))?;
        let (bos, eos) = (bos.to_string(), eos.to_string());
        Ok(Self { environment, source: text, bos, eos, is_default: source.is_none() })
    }

    /// A hash of the template, to keep with adapters that were trained through it.
    pub fn id(&self) -> String {
        blake3::hash(self.source.as_bytes()).to_hex()[..16].to_string()
    }

    /// The conversation as text, as transformers' `apply_chat_template` gives it.
    ///
    /// # Errors
    /// When a role is unknown or the template refuses the conversation.
    pub fn render(&self, messages: &[Turn], add_generation_prompt: bool) -> Result<String> {
        ensure!(!messages.is_empty(), "a conversation needs at least one message");
        for (role, _) in messages {
            ensure!(ROLES.contains(role), "role {role:?} is unknown: use one of {ROLES:?}");
        }
        self.render_any(messages, add_generation_prompt)
    }

    pub(crate) fn render_any(&self, messages: &[Turn], add_generation_prompt: bool) -> Result<String> {
        let messages: Vec<_> =
            messages.iter().map(|(role, content)| context!(role => *role, content => *content)).collect();
        let (bos_token, eos_token) = (&self.bos, &self.eos);
        let template = self.environment.get_template("chat")?;
        let values = context!(messages, add_generation_prompt, bos_token, eos_token);
        template.render(values).map_err(|error| anyhow::anyhow!("the chat template refuses this: {error:#}"))
    }

    /// The conversation as token ids, to answer it (`add_generation_prompt`) or as it stands.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn encode_chat(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Turn],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>> {
        Ok(self.encode(tokenizer, messages, add_generation_prompt)?.tokens)
    }

    /// The conversation as a training sequence, in which exactly what the assistant says is learned, with the
    /// token that ends its turn. It is cut behind the last learned token.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`], and when the assistant says nothing.
    pub fn encode_training(&self, tokenizer: &Tokenizer, messages: &[Turn]) -> Result<Sequence> {
        let mut sequence = self.encode(tokenizer, messages, false)?;
        let Some(&(_, end)) = sequence.learned.last() else {
            bail!("nothing to learn: the assistant says nothing")
        };
        sequence.tokens.truncate(end as usize);
        Ok(sequence)
    }

    /// The ids that end the assistant's turn; generation has to stop at them.
    ///
    /// # Errors
    /// When the template refuses the simplest conversation.
    pub fn end_of_turn(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let sequence = self.encode_training(tokenizer, &[("user", "a"), ("assistant", "b")])?;
        let is_control = |id: &&u32| tokenizer.controls().iter().any(|control| control.id == **id);
        Ok(sequence.tokens.last().filter(is_control).copied().into_iter().collect())
    }
}

fn find_source(dir: &Path) -> Result<Option<String>> {
    if let Ok(text) = limits::read_text(&dir.join("chat_template.jinja")) {
        return Ok(Some(text));
    }
    let Ok(text) = limits::read_text(&dir.join("tokenizer_config.json")) else { return Ok(None) };
    let config: Value =
        serde_json::from_str(&text).with_context(|| format!("{}: tokenizer_config.json", dir.display()))?;
    Ok(match &config["chat_template"] {
        Value::String(text) => Some(text.clone()),
        // Some models have several by name.
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry["name"] == "default").or(named.first());
            default.and_then(|entry| entry["template"].as_str()).map(String::from)
        }
        _ => None,
    })
}

/// JSON as Python writes it into templates: minijinja's own escapes what HTML would not take.
fn tojson(
    value: minijinja::Value,
    options: minijinja::value::Kwargs,
) -> Result<minijinja::Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let text =
        if indent.is_some() { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
    let text = text.map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))?;
    Ok(minijinja::Value::from_safe_string(text))
}

/// The formats that templates use, in UTC.
fn strftime(format: &str, now: SystemTime) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    // Days to a civil date, by Howard Hinnant's algorithm; years begin in March there.
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let (day, month) = (day_of_year - (153 * shifted + 2) / 5 + 1, (shifted + 2) % 12);
    let year = year_of_era + era * 400 + u64::from(month < 2);
    let name = MONTHS[month as usize];
    format
        .replace("%Y", &year.to_string())
        .replace("%m", &format!("{:02}", month + 1))
        .replace("%d", &format!("{day:02}"))
        .replace("%B", name)
        .replace("%b", &name[..3])
        .replace("%H", &format!("{:02}", seconds / 3600 % 24))
        .replace("%M", &format!("{:02}", seconds / 60 % 60))
        .replace("%S", &format!("{:02}", seconds % 60))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use std::time::Duration;

    fn phi3() -> Option<(Tokenizer, ChatTemplate)> {
        let dir = golden::shared("tokenizers/phi-3")?;
        Some((Tokenizer::load(&dir).unwrap(), ChatTemplate::load(&dir).unwrap()))
    }

    fn text(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
        ids.iter().map(|&id| tokenizer.token(id).unwrap()).collect()
    }

    #[test]
    fn the_models_own_template_is_rendered() {
        let Some((_, template)) = phi3() else { return };
        let rendered = template.render(&[("user", "Hi"), ("assistant", "Yo")], false).unwrap();
        assert_eq!(rendered, "<s><|user|>\nHi<|end|>\n<|assistant|>\nYo<|end|>\n");
    }

    #[test]
    fn template_tokens_are_real_and_user_text_is_not() {
        let Some((tokenizer, template)) = phi3() else { return };
        let ids = template.encode_chat(&tokenizer, &[("user", "a<|end|>b <s>")], true).unwrap();
        let control = |name: &str| tokenizer.id(name).unwrap();
        let count = |name: &str| ids.iter().filter(|&&id| id == control(name)).count();
        assert_eq!((count("<s>"), count("<|user|>"), count("<|end|>"), count("<|assistant|>")), (1, 1, 1, 1));
        assert!(tokenizer.decode(&ids).unwrap().contains("a<|end|>b <s>"));
    }

    #[test]
    fn answers_are_learned_with_their_end() {
        let Some((tokenizer, template)) = phi3() else { return };
        let turns = [("user", "Hi"), ("assistant", "Yo man"), ("user", "And"), ("assistant", "Bye")];
        let sequence = template.encode_training(&tokenizer, &turns).unwrap();
        let learned: Vec<Vec<String>> = sequence
            .learned
            .iter()
            .map(|&(start, end)| text(&tokenizer, &sequence.tokens[start as usize..end as usize]))
            .collect();
        assert_eq!(learned, [["Y", "o", "▁man", "<|end|>"].as_slice(), &["By", "e", "<|end|>"]]);
        // What precedes an answer in training is exactly the prompt that asks for it.
        let prompt = template.encode_chat(&tokenizer, &turns[..3], true).unwrap();
        assert_eq!(sequence.tokens[..sequence.learned[1].0 as usize], prompt);
        assert_eq!(template.end_of_turn(&tokenizer).unwrap(), [tokenizer.id("<|end|>").unwrap()]);
        assert!(template.encode_training(&tokenizer, &turns[..1]).is_err());
    }

    #[test]
    fn a_base_without_a_template_gets_lines() {
        let Some(dir) = golden::shared("models/stories260K") else { return };
        let (tokenizer, template) = (Tokenizer::load(&dir).unwrap(), ChatTemplate::load(&dir).unwrap());
        let turns = [("user", "Who?"), ("assistant", "Lily")];
        assert_eq!(template.render(&turns, false).unwrap(), "Who?\nLily</s>\n");
        let sequence = template.encode_training(&tokenizer, &turns).unwrap();
        let prompt = template.encode_chat(&tokenizer, &turns[..1], true).unwrap();
        assert_eq!(prompt, tokenizer.encode("Who?\n").unwrap());
        assert_eq!(sequence.tokens[..prompt.len()], prompt);
        let mut answer = tokenizer.encode_continuation("Lily").unwrap();
        answer.push(2);
        assert_eq!(sequence.tokens[prompt.len()..], answer);
        assert_eq!(sequence.learned, [(prompt.len() as u32, sequence.tokens.len() as u32)]);
    }

    /// A template whose generation prompt ends before a space: the space belongs to the answer's first token.
    #[test]
    fn answers_begin_where_generation_does() {
        let Some(dir) = golden::shared("tokenizers/gpt2") else { return };
        let tokenizer = Tokenizer::load(&dir).unwrap();
        let source = "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content | trim }}\n{% else %}\
            A: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}";
        let template = ChatTemplate::new(Some(source), "", "<|endoftext|>").unwrap();
        let turns = [("user", "  where? \n"), ("assistant", "In Paris")];
        let sequence = template.encode_training(&tokenizer, &turns).unwrap();
        let mut expected = tokenizer.encode("Q: where?\nA:").unwrap();
        assert_eq!(template.encode_chat(&tokenizer, &turns[..1], true).unwrap(), expected);
        let start = expected.len() as u32;
        expected.extend(tokenizer.encode_continuation(" In Paris").unwrap());
        expected.push(tokenizer.id("<|endoftext|>").unwrap());
        assert_eq!(
            (sequence.tokens, sequence.learned),
            (expected.clone(), vec![(start, expected.len() as u32)])
        );
    }

    /// What Python's templates make of conversations, for the shapes that most models use;
    /// `tests/interop/test_templates.py` has transformers say the same.
    #[test]
    fn templates_of_the_common_shapes_render_as_in_python() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/chat");
        let mut rendered = 0;
        for file in std::fs::read_dir(folder).unwrap() {
            let golden: Value =
                serde_json::from_slice(&std::fs::read(file.unwrap().path()).unwrap()).unwrap();
            let of = |name: &str| golden[name].as_str().unwrap();
            let template =
                ChatTemplate::new(Some(of("chat_template")), of("bos_token"), of("eos_token")).unwrap();
            for case in golden["cases"].as_array().unwrap() {
                let said = |message: &'static str, turn: &Value| turn[message].as_str().unwrap().to_string();
                let turns: Vec<(String, String)> = case["messages"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|turn| (said("role", turn), said("content", turn)))
                    .collect();
                let turns: Vec<Turn> = turns.iter().map(|(role, content)| (&**role, &**content)).collect();
                let text = template.render(&turns, case["add_generation_prompt"] == true);
                assert_eq!(text.ok().as_deref(), case["text"].as_str(), "{case}");
                rendered += 1;
            }
        }
        assert_eq!(rendered, 4 * 12);
    }

    #[test]
    fn templates_cannot_run_for_ever_or_break_the_caller() {
        let endless = "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}";
        let refuse = |source: &str| {
            let template = ChatTemplate::new(Some(source), "", "")?;
            template.render(&[("user", "x")], false)
        };
        assert!(refuse(endless).is_err());
        assert!(refuse("{% if %}").is_err());
        assert!(
            refuse("{{ raise_exception('only tools') }}").unwrap_err().to_string().contains("only tools")
        );
        let template = ChatTemplate::new(None, "", "").unwrap();
        assert!(template.render(&[("root", "x")], false).unwrap_err().to_string().contains("root"));
        assert!(template.render(&[], false).is_err());
    }

    #[test]
    fn helpers_do_as_in_python() {
        let time = UNIX_EPOCH + Duration::from_secs(1_709_210_096);
        assert_eq!(strftime("%d %b %Y, %B %m %H:%M:%S", time), "29 Feb 2024, February 02 12:34:56");
        let template =
            ChatTemplate::new(Some("{{ messages[0].content | tojson }}|{{ ' a '.strip() }}"), "", "")
                .unwrap();
        assert_eq!(template.render(&[("user", "<'&\">")], false).unwrap(), r#""<'&\">"|a"#);
    }
}
