//! What the small files of a model folder may ask for. A few bytes can ask for more memory than any machine has,
//! and a failed allocation ends the process, where no error can be returned any more.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Bytes of a `tokenizer.json` that is read. The largest in use have a million tokens and some 60 MB.
pub(crate) const TOKENIZER_BYTES_MAX: u64 = 128 << 20;
/// Bytes of any other JSON file of a model folder that is read; those in use have at most a few megabytes.
pub(crate) const SETTINGS_BYTES_MAX: u64 = 16 << 20;
/// How many times longer a tokenizer's steps together may make a text. Real ones come to a few dozen.
const GROWTH_MAX: u64 = 1024;
/// The longest word in characters that WordPiece looks at, which takes time with the square of it. Usual is 100.
const WORD_CHARS_MAX: u64 = 1000;

/// Reads a whole file, unless it is larger than `bytes_max` or no file at all: a pipe would never end.
pub(crate) fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let read = || -> Result<Vec<u8>> {
        ensure!(std::fs::metadata(path)?.is_file(), "not a regular file");
        let mut bytes = Vec::new();
        std::fs::File::open(path)?.take(bytes_max + 1).read_to_end(&mut bytes)?;
        ensure!(bytes.len() as u64 <= bytes_max, "larger than {} MiB", bytes_max >> 20);
        Ok(bytes)
    };
    read().with_context(|| format!("{}: cannot read", path.display()))
}

/// As [`read`], as text.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    String::from_utf8(read(path, SETTINGS_BYTES_MAX)?).with_context(|| format!("{}", path.display()))
}

/// Refuses a `tokenizer.json` that would answer a short text with an endless one.
///
/// # Errors
/// Names the part that asks for too much.
pub(crate) fn check_tokenizer(file: &Value) -> Result<()> {
    let mut all = 1u64;
    for part in ["normalizer", "pre_tokenizer", "post_processor", "decoder"] {
        all = all.saturating_mul(growth(&file[part]).with_context(|| part.to_owned())?);
        ensure!(
            all <= GROWTH_MAX,
            "{part}: the steps up to here make a text more than {GROWTH_MAX} times longer"
        );
    }
    let word = file["model"]["max_input_chars_per_word"].as_u64().unwrap_or(0);
    ensure!(word <= WORD_CHARS_MAX, "max_input_chars_per_word is {word}: the most is {WORD_CHARS_MAX}");
    Ok(())
}

/// A bound on how many times longer some steps make a text, one after the other.
///
/// A step is known by its fields, because its type may be left out.
fn growth(step: &Value) -> Result<u64> {
    let inner: Vec<&Value> = match step {
        Value::Array(steps) => steps.iter().collect(),
        Value::Object(fields) => fields.values().collect(),
        _ => return Ok(1),
    };
    let mut all = own_growth(step)?.max(1);
    for value in inner {
        all = all.saturating_mul(growth(value)?);
    }
    Ok(all)
}

fn own_growth(step: &Value) -> Result<u64> {
    let mut own = 1u64;
    if let Some(pattern) = step.get("pattern") {
        let content = length(&step["content"]);
        own = match length(&pattern["String"]) {
            // A regular expression may match between any two letters.
            0 => content + 1,
            pattern => content.div_ceil(pattern),
        };
    }
    if step["type"] == "ByteLevel" || step.get("trim_offsets").is_some() {
        // A byte becomes a character of up to two bytes.
        own *= 2;
    }
    if step.get("word_delimiter_token").is_some() || step.get("suffix").is_some() {
        // An empty one matches between any two letters, and becomes a space.
        own *= 2;
    }
    if let Some(pieces) = step["single"].as_array() {
        let ids = |token: &Value| token["ids"].as_array().map_or(0, Vec::len) as u64;
        let tokens = step["special_tokens"].as_object();
        let most = tokens.into_iter().flat_map(|tokens| tokens.values()).map(ids).max().unwrap_or(1);
        own = own.saturating_mul(pieces.len() as u64).saturating_mul(most.max(1));
    }
    if let Some(text) = step["precompiled_charsmap"].as_str() {
        own = own.saturating_mul(longest_rule(text)?);
    }
    Ok(own)
}

fn length(value: &Value) -> u64 {
    value.as_str().map_or(0, str::len) as u64
}

/// The length in bytes of the longest rule of a `precompiled_charsmap`: in base 64, the length of a table as
/// four bytes, the table, and the rules, each with a zero byte after it.
fn longest_rule(base64: &str) -> Result<u64> {
    let bytes = from_base64(base64);
    let (head, rest) = bytes.split_first_chunk().context("precompiled_charsmap is too short")?;
    let table = u32::from_le_bytes(*head) as usize;
    let rules = rest.get(table / 4 * 4..).context("precompiled_charsmap is shorter than it says")?;
    Ok(rules.split(|byte| *byte == 0).map(<[u8]>::len).max().unwrap_or(0) as u64)
}

/// The bytes of base 64 as far as it is well formed; whether all of it is, the tokenizers crate checks.
fn from_base64(text: &str) -> Vec<u8> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let digits: Vec<u8> = text.bytes().map_while(digit).collect();
    let bytes = |four: &[u8]| {
        let number = four.iter().fold(0u32, |number, digit| number << 6 | u32::from(*digit));
        let number = number << (6 * (4 - four.len()));
        number.to_be_bytes().into_iter().skip(1).take(four.len() * 6 / 8)
    };
    digits.chunks(4).flat_map(bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn base64_is_read_and_a_table_longer_than_the_file_refused() {
        assert_eq!(from_base64("aGVsbG8="), b"hello");
        assert_eq!(from_base64("aGVsbG8h"), b"hello!");
        // Says that 4 GiB of table follow.
        assert!(longest_rule("/////wAA").is_err());
        // Four bytes of table, then the rules `ab` and `c`.
        assert_eq!(longest_rule("BAAAAAAAAABhYgBjAA==").unwrap(), 2);
    }

    #[test]
    fn steps_that_double_a_text_again_and_again_are_refused() {
        let doubling = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
        let between = json!({"pattern": {"Regex": ""}, "content": "bbb"});
        let template = json!({"type": "TemplateProcessing", "single": [{"Sequence": {}}, {"Sequence": {}}]});
        let byte_level = json!({"type": "ByteLevel"});
        for (part, list, step) in [
            ("normalizer", "normalizers", doubling.clone()),
            ("normalizer", "normalizers", between),
            ("pre_tokenizer", "pretokenizers", byte_level),
            ("post_processor", "processors", template),
            ("decoder", "decoders", doubling),
            ("decoder", "decoders", json!({"pad_token": "", "word_delimiter_token": "", "cleanup": true})),
        ] {
            let once = json!({part: {"type": "Sequence", list: [step]}});
            check_tokenizer(&once).unwrap();
            let often = json!({part: {"type": "Sequence", list: vec![step; 40]}});
            let error = format!("{:#}", check_tokenizer(&often).unwrap_err());
            assert!(error.contains(part), "{error}");
        }
        assert!(check_tokenizer(&json!({"model": {"max_input_chars_per_word": 1u64 << 60}})).is_err());
    }

    #[test]
    fn only_regular_files_of_a_bounded_size_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, "four").unwrap();
        assert_eq!(read(&path, 4).unwrap(), b"four");
        assert!(format!("{:#}", read(&path, 3).unwrap_err()).contains("config.json"));
        assert!(read(dir.path(), 4).is_err());
        #[cfg(unix)]
        assert!(format!("{:#}", read(Path::new("/dev/zero"), 4).unwrap_err()).contains("regular"));
    }
}
