//! Text from a stream of ids.

use anyhow::Result;

use crate::tokenizer::Tokenizer;

/// Turns ids into text one at a time, never giving out half a character.
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    ids: Vec<u32>,
    /// `ids[..read]` have been given out; they are decoded again, because a token's text depends on its past.
    read: usize,
}

/// Ids of context that are enough for any tokenizer's spacing rules.
const CONTEXT_IDS: usize = 6;

/// Ids that may wait for the rest of a character. Four bytes make one, so more is no character at all.
const WAITING_IDS: usize = 8;

impl StreamDecoder {
    /// A decoder of what follows `context`.
    pub fn new(tokenizer: &Tokenizer, context: &[u32]) -> Self {
        let ids = context[context.len().saturating_sub(CONTEXT_IDS)..].to_vec();
        Self { tokenizer: tokenizer.clone(), read: ids.len(), ids }
    }

    /// Takes an id; gives the text that is now certain, if any.
    ///
    /// # Errors
    /// When the tokenizer fails on it.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.ids.push(id);
        let text = self.unread()?;
        let waiting = text.ends_with('\u{FFFD}') && self.ids.len() - self.read < WAITING_IDS;
        if text.is_empty() || waiting {
            return Ok(None);
        }
        self.read = self.ids.len();
        self.ids.drain(..self.read.saturating_sub(CONTEXT_IDS));
        self.read = self.ids.len();
        Ok(Some(text))
    }

    /// The text that was held back, if any, as it is.
    ///
    /// # Errors
    /// When the tokenizer fails on it.
    pub fn finish(&mut self) -> Result<Option<String>> {
        let text = self.unread()?;
        self.read = self.ids.len();
        Ok((!text.is_empty()).then_some(text))
    }

    fn unread(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.read])?;
        let all = self.tokenizer.decode(&self.ids)?;
        // Where the context ends in half a character, its text changes once the rest is there.
        let common = before.trim_end_matches('\u{FFFD}');
        Ok(all
            .strip_prefix(before.as_str())
            .or_else(|| all.strip_prefix(common))
            .unwrap_or_default()
            .to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    #[test]
    fn a_stream_gives_whole_characters_that_add_up() {
        let text = "naïve café 你好 🦙 done";
        for name in ["tokenizers/phi-3", "tokenizers/gpt2", "models/stories260K"] {
            let Some(dir) = golden::shared(name) else { return };
            let tokenizer = Tokenizer::load(&dir).unwrap();
            let ids = tokenizer.encode(text).unwrap();
            for split in [0, 1, 2] {
                let mut stream = StreamDecoder::new(&tokenizer, &ids[..split]);
                let mut all = tokenizer.decode(&ids[..split]).unwrap();
                for &id in &ids[split..] {
                    let part = stream.push(id).unwrap().unwrap_or_default();
                    assert!(!part.contains('\u{FFFD}'));
                    all += &part;
                }
                all += &stream.finish().unwrap().unwrap_or_default();
                assert_eq!(all, text, "{name}");
            }
        }
    }
}
