//! The bytes that each token stands for. A token may be part of a character, so its text alone would lose them.

use serde_json::Value;

/// How a vocabulary writes bytes, by what its file says of decoding.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pieces {
    /// Each byte as a character of its own, as in GPT-2.
    byte_level: bool,
    /// Bytes outside the vocabulary as `<0x0A>`.
    byte_fallback: bool,
    /// Texts that stand for others, such as `▁` for a space.
    replaced: Vec<(String, String)>,
}

impl Pieces {
    /// Reads the `decoder` of a `tokenizer.json`.
    pub fn of(decoder: &Value) -> Self {
        let mut pieces = Self::default();
        let one = std::slice::from_ref(decoder);
        for step in decoder["decoders"].as_array().map_or(one, Vec::as_slice) {
            match step["type"].as_str() {
                Some("ByteLevel") => pieces.byte_level = true,
                Some("ByteFallback") => pieces.byte_fallback = true,
                Some("Metaspace") => pieces.replace(&step["replacement"], " "),
                Some("Replace") => {
                    pieces.replace(&step["pattern"]["String"], step["content"].as_str().unwrap_or_default());
                }
                _ => {}
            }
        }
        pieces
    }

    fn replace(&mut self, text: &Value, by: &str) {
        let text = text.as_str().filter(|text| !text.is_empty());
        self.replaced.extend(text.map(|text| (text.to_owned(), by.to_owned())));
    }

    /// The bytes of a token that the vocabulary writes like this.
    pub fn bytes(&self, token: &str) -> Vec<u8> {
        if self.byte_level {
            // What is written otherwise was added to the vocabulary later, and means what it says.
            let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
            return bytes.unwrap_or_else(|| token.as_bytes().to_vec());
        }
        let hexadecimal = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        let hexadecimal = hexadecimal.filter(|digits| self.byte_fallback && digits.len() == 2);
        if let Some(byte) = hexadecimal.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            return vec![byte];
        }
        let replaced =
            self.replaced.iter().fold(token.to_owned(), |token, (text, by)| token.replace(text, by));
        replaced.into_bytes()
    }
}

/// The byte that GPT-2's vocabulary writes as this character: bytes that print stand for themselves, the others
/// are counted from U+0100 on.
fn byte_of(character: char) -> Option<u8> {
    let prints = |byte: &u8| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(character) {
        code @ 0..=0xFF => u8::try_from(code).ok().filter(prints),
        code => (0..=u8::MAX).filter(|byte| !prints(byte)).nth(code as usize - 0x100),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use crate::tokenizer::Tokenizer;
    use serde_json::json;

    #[test]
    fn each_way_of_writing_bytes_is_read() {
        let gpt2 = Pieces::of(&json!({"type": "ByteLevel"}));
        assert_eq!(gpt2.bytes("Ġa"), b" a");
        assert_eq!(gpt2.bytes("Ċ"), b"\n");
        assert_eq!(gpt2.bytes("ä½"), [0xE4, 0xBD]);
        assert_eq!(gpt2.bytes("<|end of text|>"), b"<|end of text|>");
        let decoders = json!([
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}
        ]);
        let llama = Pieces::of(&json!({"type": "Sequence", "decoders": decoders}));
        assert_eq!(llama.bytes("▁▁a"), b"  a");
        assert_eq!(llama.bytes("<0xE4>"), [0xE4]);
        assert_eq!(llama.bytes("<0xZZ>"), b"<0xZZ>");
        assert_eq!(Pieces::of(&Value::Null).bytes("é"), "é".as_bytes());
        let metaspace = Pieces::of(&json!({"type": "Metaspace", "replacement": "▁"}));
        assert_eq!(metaspace.bytes("▁a<0x0A>"), b" a<0x0A>");
    }

    #[test]
    fn every_byte_has_one_character() {
        let mut bytes: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=u8::MAX).collect::<Vec<_>>());
    }

    #[test]
    fn the_bytes_of_tokens_add_up_to_their_text() {
        let text = "naïve café 你好 🦙\n\tdone <|endoftext|>";
        let nano = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/models/nano").into();
        let shared = ["tokenizers/phi-3", "tokenizers/gpt2", "tokenizers/gpt-neox", "models/stories260K"];
        for dir in shared.into_iter().filter_map(golden::shared).chain([nano]) {
            let tokenizer = Tokenizer::load(&dir).unwrap();
            let ids = tokenizer.encode_continuation(text).unwrap();
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.bytes(id)).collect();
            assert_eq!(String::from_utf8(bytes).unwrap(), text, "{}", dir.display());
        }
    }
}
