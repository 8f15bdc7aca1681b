//! Trains a byte-level BPE tokenizer, and writes it so that transformers loads it too.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde_json::json;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, Tokenizer};

use super::corpus::{self, END_OF_TEXT};

/// Learns `vocab_size` tokens from the first `sample_bytes_max` bytes of each text.
///
/// Every byte is a token, so nothing is unknown. Digits stand alone: a number that was never seen
/// is then still spelled from parts that were.
///
/// # Errors
/// When a text cannot be read.
pub fn train(texts: &[PathBuf], vocab_size: usize, sample_bytes_max: usize) -> Result<Tokenizer> {
    let mut sample = Vec::new();
    for text in texts {
        let mut bytes = 0;
        for document in corpus::documents(text)? {
            let document = document?;
            bytes += document.len();
            sample.push(document);
            if bytes >= sample_bytes_max {
                break;
            }
        }
    }
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer
        .with_pre_tokenizer(Some(Sequence::new(vec![
            Digits::new(true).into(),
            ByteLevel::new(false, false, true).into(),
        ])))
        .with_decoder(Some(ByteLevel::default()));
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer
        .train(&mut TrainerWrapper::from(trainer), sample.into_iter())
        .map_err(|error| anyhow!("cannot train the tokenizer: {error}"))?;
    Ok(tokenizer)
}

/// Writes `tokenizer.json` and `tokenizer_config.json` into `folder`.
///
/// # Errors
/// When they cannot be written.
pub fn write(tokenizer: &Tokenizer, context: usize, folder: &Path) -> Result<()> {
    tokenizer
        .save(folder.join("tokenizer.json"), false)
        .map_err(|error| anyhow!("cannot write the tokenizer: {error}"))?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_bos_token": false,
        "clean_up_tokenization_spaces": false,
    });
    let path = folder.join("tokenizer_config.json");
    fs::write(&path, format!("{config:#}\n")).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_back_any_text_and_keeps_digits_apart() {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("a.txt");
        fs::write(&text, "the cat sat on the mat\n".repeat(50)).unwrap();
        let tokenizer = train(&[text], 300, 1 << 20).unwrap();
        assert!(tokenizer.get_vocab_size(true) <= 300);
        assert_eq!(tokenizer.token_to_id(END_OF_TEXT), Some(0));
        for text in ["the cat", "  2024 naïve – \u{0} 猫\n\n\tx"] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(ids.get_ids(), true).unwrap(), text);
        }
        assert_eq!(tokenizer.encode("2024", false).unwrap().len(), 4);
        assert_eq!(tokenizer.encode(" the", false).unwrap().len(), 1);
    }
}
