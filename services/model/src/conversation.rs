//! From a rendered conversation to tokens.
//!
//! The template is rendered with a placeholder for each content. Its control tokens are found, and only then
//! the contents are put in, as plain text.

use anyhow::{Context, Result, ensure};

use crate::chat::{ChatTemplate, Turn};
use crate::pack::Sequence;
use crate::tokenizer::{After, Control, Tokenizer};

/// Around a placeholder, white space that no template writes: where it is gone, the template trims contents.
const SPACE: char = '\u{2003}';
const OPEN: char = '\u{E000}';
const CLOSE: char = '\u{E001}';

impl ChatTemplate {
    /// The conversation as tokens, and what the assistant says in it as learned ranges.
    pub(crate) fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Turn],
        add_generation_prompt: bool,
    ) -> Result<Sequence> {
        let items = self.items(tokenizer, messages, add_generation_prompt)?;
        let mut writer = Writer::new(tokenizer, if self.is_default { tokenizer.prefix() } else { &[] });
        for (i, item) in items.iter().enumerate() {
            match item {
                Item::AnswerBegins => writer.begin_answer()?,
                Item::Content { text, answer } => writer.content(text, *answer)?,
                Item::Control(control) => writer.control(control.id)?,
                Item::Text(text) => {
                    let closes = text.trim().is_empty() && matches!(items.get(i + 1), Some(Item::Control(_)));
                    writer.template_text(text, closes)?;
                }
            }
        }
        writer.finish()
    }

    /// The rendered conversation cut into what is text, what are contents and what are control tokens.
    fn items<'a>(
        &self,
        tokenizer: &'a Tokenizer,
        messages: &[Turn<'a>],
        add_generation_prompt: bool,
    ) -> Result<Vec<Item<'a>>> {
        ensure!(!messages.is_empty(), "a conversation needs at least one message");
        let marks: Vec<String> =
            (0..messages.len()).map(|i| format!("{SPACE}{OPEN}{i}{CLOSE}{SPACE}")).collect();
        let marked: Vec<Turn> =
            messages.iter().zip(&marks).map(|((role, _), mark)| (*role, mark.as_str())).collect();
        let full = self.render(&marked, add_generation_prompt)?;
        let mut cuts = Vec::new();
        for i in (0..messages.len()).filter(|&i| messages[i].0 == "assistant") {
            // Where generation would have begun; a template that cannot say so begins at the content.
            let before =
                self.render_any(&marked[..i], true).ok().filter(|before| full.starts_with(before.as_str()));
            cuts.extend(before.map(|before| before.len()));
        }
        let mut items = Vec::new();
        let (mut start, mut rest) = (0, full.as_str());
        while !rest.is_empty() {
            let cut = cuts.iter().map(|cut| cut.saturating_sub(start)).filter(|&cut| cut > 0).min();
            if cuts.contains(&start) {
                items.push(Item::AnswerBegins);
            }
            let part = &rest[..cut.unwrap_or(rest.len()).min(rest.len())];
            let part = part.find(OPEN).map_or(part, |at| &part[..at]);
            split_controls(part, tokenizer.controls(), &mut items);
            (start, rest) = (start + part.len(), &rest[part.len()..]);
            if let Some(inside) = rest.strip_prefix(OPEN) {
                let (number, after) =
                    inside.split_once(CLOSE).context("the chat template takes contents apart")?;
                let (role, content) = number
                    .parse()
                    .ok()
                    .and_then(|i: usize| messages.get(i))
                    .context("the chat template changes contents")?;
                let length = rest.len() - after.len();
                let after_space = after.strip_prefix(SPACE);
                push_content(content, *role == "assistant", after_space.is_some(), &mut items);
                let length = length + if after_space.is_some() { SPACE.len_utf8() } else { 0 };
                (start, rest) = (start + length, &rest[length..]);
            }
        }
        apply_strips(&mut items);
        Ok(items)
    }
}

/// A part of a rendered conversation.
#[derive(Debug)]
enum Item<'a> {
    Text(String),
    Content { text: &'a str, answer: bool },
    Control(&'a Control),
    AnswerBegins,
}

/// Adds a content, trimmed on the sides where the template trimmed its placeholder.
fn push_content<'a>(content: &'a str, answer: bool, keeps_end: bool, items: &mut Vec<Item<'a>>) {
    let mut keeps_start = false;
    if let Some(Item::Text(before)) = items.last_mut().filter(|item| matches!(item, Item::Text(_))) {
        keeps_start = before.ends_with(SPACE);
        if keeps_start {
            before.pop();
        }
        if before.is_empty() {
            items.pop();
        }
    }
    let text = if keeps_start { content } else { content.trim_start() };
    let text = if keeps_end { text } else { text.trim_end() };
    items.push(Item::Content { text, answer });
}

/// Cuts template text at its control tokens, which are sorted by falling length.
fn split_controls<'a>(mut text: &str, controls: &'a [Control], items: &mut Vec<Item<'a>>) {
    while !text.is_empty() {
        let first =
            controls.iter().filter_map(|c| Some((text.find(c.text.as_str())?, c))).min_by_key(|(at, _)| *at);
        let Some((at, control)) = first else {
            items.push(Item::Text(text.to_string()));
            return;
        };
        if at > 0 {
            items.push(Item::Text(text[..at].to_string()));
        }
        items.push(Item::Control(control));
        text = &text[at + control.text.len()..];
    }
}

/// Some control tokens swallow the white space beside them.
fn apply_strips(items: &mut Vec<Item>) {
    for i in 0..items.len() {
        let Item::Control(control) = &items[i] else { continue };
        let (left, right) = (control.lstrip, control.rstrip);
        if let Some(Item::Text(text)) =
            i.checked_sub(1).filter(|_| left).and_then(|before| items.get_mut(before))
        {
            text.truncate(text.trim_end().len());
        }
        if let Some(Item::Text(text)) = items.get_mut(i + 1).filter(|_| right) {
            *text = text.trim_start().to_string();
        }
    }
    items.retain(|item| !matches!(item, Item::Text(text) if text.is_empty()));
}

/// Turns items into tokens, and keeps account of what is learned.
struct Writer<'a> {
    tokenizer: &'a Tokenizer,
    sequence: Sequence,
    /// Text that is not encoded yet, because more may join it.
    run: String,
    after: After,
    learning: bool,
    /// Whether the answer's content has been written, so that its end is awaited.
    said: bool,
}

impl<'a> Writer<'a> {
    fn new(tokenizer: &'a Tokenizer, prefix: &[u32]) -> Self {
        let sequence = Sequence { tokens: prefix.to_vec(), ..Sequence::default() };
        Self { tokenizer, sequence, run: String::new(), after: After::Nothing, learning: false, said: false }
    }

    fn begin_answer(&mut self) -> Result<()> {
        self.flush()?;
        (self.learning, self.said) = (true, false);
        Ok(())
    }

    fn end_answer(&mut self) -> Result<()> {
        self.flush()?;
        (self.learning, self.said) = (false, false);
        Ok(())
    }

    fn template_text(&mut self, text: &str, closes: bool) -> Result<()> {
        if self.said && !closes {
            self.end_answer()?;
        }
        self.run += text;
        Ok(())
    }

    fn content(&mut self, text: &str, answer: bool) -> Result<()> {
        if self.said {
            self.end_answer()?;
        }
        if answer && !self.learning {
            self.begin_answer()?;
        }
        self.run += text;
        self.said = answer;
        Ok(())
    }

    fn control(&mut self, id: u32) -> Result<()> {
        self.flush()?;
        self.push(&[id], After::Control);
        if self.said {
            self.end_answer()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if !self.run.is_empty() {
            let ids = self.tokenizer.encode_piece(&self.run, self.after)?;
            self.run.clear();
            self.push(&ids, After::Text);
        }
        Ok(())
    }

    fn push(&mut self, ids: &[u32], after: After) {
        let start = self.sequence.tokens.len() as u32;
        self.sequence.tokens.extend(ids);
        let end = self.sequence.tokens.len() as u32;
        self.after = after;
        if self.learning && start < end {
            match self.sequence.learned.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => self.sequence.learned.push((start, end)),
            }
        }
    }

    fn finish(mut self) -> Result<Sequence> {
        self.flush()?;
        Ok(self.sequence)
    }
}
