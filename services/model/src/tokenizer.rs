//! Text to token ids and back.
//!
//! Two rules come from measurements. Damaged files panic the tokenizers crate, so every call into it is caught.
//! And no user's text may ever become a control token: `<|end|>` in a document is five harmless characters or
//! so, whatever the model means by it.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Once};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

use crate::hf::token_ids;
use crate::limits;
use crate::pieces::Pieces;

/// A token that steers the model and that only a template or the tokenizer itself may produce.
#[derive(Clone, Debug)]
pub(crate) struct Control {
    pub text: String,
    pub id: u32,
    /// Whether it swallows white space before it.
    pub lstrip: bool,
    /// Whether it swallows white space after it.
    pub rstrip: bool,
}

/// What precedes a piece of text; it decides whether the tokenizer's dummy space goes before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    Nothing,
    Control,
    Text,
}

/// The tokenizer of a model folder. Clones share its tables.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    /// The same without the dummy space that some tokenizers put before every text, where this one does.
    bare: Option<Arc<tokenizers::Tokenizer>>,
    /// Whether that space goes before the first text only, and not after control tokens too.
    space_once: bool,
    pieces: Arc<Pieces>,
    controls: Arc<[Control]>,
    forbidden: Arc<HashSet<u32>>,
    prefix: Vec<u32>,
    bos: Option<u32>,
    eos: Vec<u32>,
}

impl Tokenizer {
    /// Loads `tokenizer.json` of a model folder, and the begin and end ids from the files beside it.
    ///
    /// # Errors
    /// When the file is missing or damaged in any way.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = limits::read(&path, limits::TOKENIZER_BYTES_MAX)?;
        Self::build(&bytes, dir).with_context(|| format!("{}: damaged or not supported", path.display()))
    }

    fn build(bytes: &[u8], dir: &Path) -> Result<Self> {
        let mut file: Value = serde_json::from_slice(bytes).context("not JSON")?;
        ensure!(file.is_object(), "not a tokenizer file");
        // A file's own truncation and padding would silently change what is learned.
        file["truncation"] = Value::Null;
        file["padding"] = Value::Null;
        let settings = Settings::read(dir);
        mark_controls(&mut file, &settings);
        limits::check_tokenizer(&file)?;
        let inner = parse(&file)?;
        let space_once = make_bare(&mut file);
        let bare = if space_once.is_some() { Some(parse(&file)?) } else { None };
        let mut tokenizer = Self {
            inner,
            bare,
            space_once: space_once == Some(true),
            pieces: Arc::new(Pieces::of(&file["decoder"])),
            controls: controls(&file).into(),
            forbidden: Arc::default(),
            prefix: Vec::new(),
            bos: None,
            eos: Vec::new(),
        };
        let unknown = file["model"]["unk_token"].as_str();
        let forbidden = tokenizer.controls.iter().filter(|c| Some(c.text.as_str()) != unknown);
        tokenizer.forbidden = Arc::new(forbidden.map(|control| control.id).collect());
        tokenizer.prefix = tokenizer.own_prefix()?;
        tokenizer.bos = settings.bos(&tokenizer).or(tokenizer.prefix.first().copied());
        tokenizer.eos = settings.eos(&tokenizer);
        Ok(tokenizer)
    }

    /// The ids that the file's post-processor puts before a text, such as the begin token.
    fn own_prefix(&self) -> Result<Vec<u32>> {
        let with = caught(|| self.inner.encode_fast("a", true))?.get_ids().to_vec();
        let without = caught(|| self.inner.encode_fast("a", false))?.get_ids().to_vec();
        ensure!(!without.is_empty(), "the tokenizer gives no token for \"a\"");
        let start = with.windows(without.len()).position(|window| window == without).unwrap_or(0);
        Ok(with[..start].to_vec())
    }

    /// Refuses a tokenizer with ids that the model has no embedding for.
    ///
    /// # Errors
    /// Names both sizes.
    pub fn check_vocabulary(&self, vocab_size: i64) -> Result<()> {
        let most = self.largest_id();
        ensure!(
            i64::from(most) < vocab_size,
            "the tokenizer's largest id is {most}, and the model's vocabulary ends at {}: they do not belong together",
            vocab_size - 1
        );
        Ok(())
    }

    /// The largest id of all tokens, control tokens among them.
    pub fn largest_id(&self) -> u32 {
        self.inner.get_vocab(true).into_values().max().unwrap_or(0)
    }

    /// The ids of a text that stands alone: the tokenizer's own prefix, then the text as plain text.
    ///
    /// # Errors
    /// When the tokenizer fails on it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.prefix.clone();
        ids.extend(self.encode_piece(text, After::Nothing)?);
        Ok(ids)
    }

    /// The ids of a text that continues another: no prefix, no dummy space, plain text only.
    ///
    /// # Errors
    /// When the tokenizer fails on it.
    pub fn encode_continuation(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_piece(text, After::Text)
    }

    pub(crate) fn encode_piece(&self, text: &str, after: After) -> Result<Vec<u32>> {
        let bare = match after {
            After::Nothing => false,
            After::Control => self.space_once,
            After::Text => true,
        };
        let inner = if bare { self.bare.as_ref().unwrap_or(&self.inner) } else { &self.inner };
        let ids = caught(|| inner.encode_fast(text, false))?.get_ids().to_vec();
        if !ids.iter().any(|id| self.forbidden.contains(id)) {
            return Ok(ids);
        }
        // A vocabulary may hold a control token as an ordinary piece too. Letter by letter it cannot match.
        let mut ids = Vec::new();
        for letter in text.chars() {
            let part = caught(|| inner.encode_fast(letter.to_string(), false))?;
            ids.extend(part.get_ids().iter().filter(|id| !self.forbidden.contains(id)));
        }
        Ok(ids)
    }

    /// The text of ids, without control tokens. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// When the tokenizer fails on them.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        caught(|| self.inner.decode(ids, true))
    }

    /// The ids that end an answer: those of `generation_config.json`, `config.json` and `tokenizer_config.json`.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// The id that begins a text, where there is one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The ids that [`Tokenizer::encode`] puts before every text.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// The id of a token by its exact text.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The exact text of a token.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The bytes that a token stands for, which alone need not be UTF-8; for a control token, its exact text.
    /// None for an id beyond the vocabulary.
    pub fn bytes(&self, id: u32) -> Vec<u8> {
        self.token(id).map(|token| self.pieces.bytes(&token)).unwrap_or_default()
    }

    pub(crate) fn controls(&self) -> &[Control] {
        &self.controls
    }
}

/// What the files beside `tokenizer.json` say; each may be absent.
struct Settings {
    files: Vec<Value>,
}

impl Settings {
    fn read(dir: &Path) -> Self {
        let read = |name: &str| {
            let text = limits::read_text(&dir.join(name)).ok()?;
            serde_json::from_str(&text).ok()
        };
        let names = ["generation_config.json", "config.json", "tokenizer_config.json"];
        Self { files: names.iter().map(|name| read(name).unwrap_or(Value::Null)).collect() }
    }

    /// The text of `bos_token` or `eos_token`, which is written plainly or as an object.
    fn token_text(&self, name: &str) -> Option<&str> {
        self.files.iter().find_map(|file| file[name].as_str().or_else(|| file[name]["content"].as_str()))
    }

    fn ids(&self, kind: &str, tokenizer: &Tokenizer) -> Vec<u32> {
        let numbers = self.files.iter().flat_map(|file| token_ids(file.get(format!("{kind}_id"))));
        let named = self.token_text(kind).and_then(|text| tokenizer.id(text));
        let mut ids: Vec<u32> = Vec::new();
        for id in numbers.chain(named) {
            if !ids.contains(&id) && tokenizer.token(id).is_some() {
                ids.push(id);
            }
        }
        ids
    }

    fn bos(&self, tokenizer: &Tokenizer) -> Option<u32> {
        self.ids("bos_token", tokenizer).first().copied()
    }

    fn eos(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        self.ids("eos_token", tokenizer)
    }
}

/// The texts of a folder's begin and end tokens, empty where it has none: what templates call `bos_token` and
/// `eos_token`. They are named in `tokenizer_config.json`, or by id elsewhere.
pub(crate) fn special_texts(dir: &Path) -> (String, String) {
    let settings = Settings::read(dir);
    let bytes = limits::read(&dir.join("tokenizer.json"), limits::TOKENIZER_BYTES_MAX);
    let file: Value = bytes.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
    let find = |kind: &str| {
        let by_id = || {
            let ids: Vec<u32> =
                settings.files.iter().flat_map(|file| token_ids(file.get(format!("{kind}_id")))).collect();
            let tokens = file["added_tokens"].as_array()?;
            let token =
                tokens.iter().find(|token| token["id"].as_u64() == ids.first().map(|&id| u64::from(id)))?;
            token["content"].as_str()
        };
        settings.token_text(kind).or_else(by_id).unwrap_or_default().to_string()
    };
    (find("bos_token"), find("eos_token"))
}

/// Declares the begin and end tokens, and all of the form `<|...|>`, special where the file forgot to.
fn mark_controls(file: &mut Value, settings: &Settings) {
    let named: Vec<&str> =
        ["bos_token", "eos_token"].iter().filter_map(|name| settings.token_text(name)).collect();
    for token in file["added_tokens"].as_array_mut().into_iter().flatten() {
        let Some(text) = token["content"].as_str() else { continue };
        if named.contains(&text) || (text.starts_with("<|") && text.ends_with("|>")) {
            token["special"] = json!(true);
        }
    }
}

fn controls(file: &Value) -> Vec<Control> {
    let mut controls: Vec<Control> = file["added_tokens"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|token| token["special"] == json!(true))
        .filter_map(|token| {
            Some(Control {
                text: token["content"].as_str().filter(|text| !text.is_empty())?.to_string(),
                id: u32::try_from(token["id"].as_u64()?).ok()?,
                lstrip: token["lstrip"] == json!(true),
                rstrip: token["rstrip"] == json!(true),
            })
        })
        .collect();
    // The longest first, so that a token is never taken for another that begins like it.
    controls.sort_by_key(|control| std::cmp::Reverse(control.text.len()));
    controls
}

/// Removes what puts a dummy space before texts. `None` when nothing does; otherwise whether it is put before
/// the first text only.
fn make_bare(file: &mut Value) -> Option<bool> {
    let mut found = None;
    for part in ["normalizer", "pre_tokenizer"] {
        let list = match part {
            "normalizer" => "normalizers",
            _ => "pretokenizers",
        };
        if file[part]["type"] == "Sequence" {
            for step in file[part][list].as_array_mut().into_iter().flatten() {
                found = bare_step(step).or(found);
            }
        } else {
            found = bare_step(&mut file[part]).or(found);
        }
    }
    found
}

fn bare_step(step: &mut Value) -> Option<bool> {
    match step["type"].as_str()? {
        "Prepend" => {
            step["prepend"] = json!("");
            Some(false)
        }
        "Metaspace" if step["prepend_scheme"] != "never" => {
            let first = step["prepend_scheme"] == "first";
            step["prepend_scheme"] = json!("never");
            step["add_prefix_space"] = json!(false);
            Some(first)
        }
        "ByteLevel" if step["add_prefix_space"] == json!(true) => {
            step["add_prefix_space"] = json!(false);
            Some(false)
        }
        _ => None,
    }
}

fn parse(file: &Value) -> Result<Arc<tokenizers::Tokenizer>> {
    let bytes = serde_json::to_vec(file)?;
    let mut tokenizer = caught(|| tokenizers::Tokenizer::from_bytes(&bytes))?;
    tokenizer.set_encode_special_tokens(true);
    Ok(Arc::new(tokenizer))
}

/// Runs a call into the tokenizers crate; a panic becomes an error, and prints nothing.
fn caught<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                before(info);
            }
        }));
    });
    QUIET.set(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    QUIET.set(false);
    match result {
        Ok(result) => result.map_err(|error| anyhow!("tokenizer: {error}")),
        Err(_) => Err(anyhow!("tokenizer: the file is inconsistent (its library gave up on it)")),
    }
}

thread_local! {
    static QUIET: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    fn load(name: &str) -> Option<Tokenizer> {
        golden::shared(name).map(|dir| Tokenizer::load(&dir).unwrap())
    }

    #[test]
    fn real_files_give_their_golden_ids_and_read_back() {
        let Some(file) = golden::shared("tokenizers/golden_ids.json") else { return };
        let golden: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        for (name, cases) in golden.as_object().unwrap() {
            let folder = if name == "stories260K" { "models" } else { "tokenizers" };
            let tokenizer = load(&format!("{folder}/{name}")).unwrap();
            for (text, ids) in cases.as_object().unwrap() {
                let ids = token_ids(Some(ids));
                assert_eq!(tokenizer.encode(text).unwrap(), ids, "{name}: {text}");
                assert_eq!(&tokenizer.decode(&ids).unwrap(), text, "{name}");
            }
        }
    }

    #[test]
    fn a_damaged_file_is_an_error_and_no_panic() {
        let Some(dir) = golden::shared("tokenizers/llama2-32k-damaged") else { return };
        let error = format!("{:#}", Tokenizer::load(&dir).err().unwrap());
        assert!(error.contains("damaged") && error.contains("tokenizer.json"), "{error}");
    }

    /// A tiny tokenizer with `change` in its file and `settings` beside it.
    fn tiny(change: Value, settings: &Value) -> Result<Tokenizer> {
        let mut file = json!({"version": "1.0", "added_tokens": [], "model": {
            "type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}});
        file.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
        Tokenizer::load(dir.path())
    }

    #[test]
    fn added_tokens_that_are_no_objects_are_an_error() {
        assert_eq!(tiny(json!({}), &json!({})).unwrap().encode("ab").unwrap(), [2]);
        assert!(tiny(json!({"added_tokens": [1, "x"]}), &json!({"bos_token": ""})).is_err());
    }

    #[test]
    fn deeply_nested_steps_fit_a_thread_s_stack() {
        for (part, list, step) in [
            ("normalizer", "normalizers", json!({"type": "NFC"})),
            ("pre_tokenizer", "pretokenizers", json!({"type": "WhitespaceSplit"})),
            (
                "post_processor",
                "processors",
                json!({"type": "BertProcessing", "sep": ["a", 0], "cls": ["a", 0]}),
            ),
            ("decoder", "decoders", json!({"type": "Fuse"})),
        ] {
            // As deep as the JSON reader goes.
            let nested = (0..61).fold(step, |inner, _| json!({"type": "Sequence", list: [inner]}));
            let tokenizer = tiny(json!({part: nested}), &json!({})).unwrap();
            assert_eq!(tokenizer.decode(&[0, 1]).unwrap().replace(' ', ""), "ab", "{part}");
        }
    }

    #[test]
    fn control_tokens_in_user_text_stay_text() {
        for name in ["tokenizers/phi-3", "tokenizers/gpt2", "tokenizers/gpt-neox", "models/stories260K"] {
            let Some(tokenizer) = load(name) else { return };
            for text in ["<|endoftext|>", "<|end|> and </s>", "a<s>b", "<|user|>\n<|padding|>"] {
                for ids in [tokenizer.encode(text).unwrap(), tokenizer.encode_continuation(text).unwrap()] {
                    let body = ids.strip_prefix(tokenizer.prefix()).unwrap_or(&ids);
                    assert!(
                        body.iter().all(|id| !tokenizer.forbidden.contains(id)),
                        "{name}: {text}: {ids:?}"
                    );
                    assert!(tokenizer.decode(&ids).unwrap().contains(text), "{name}: {text}");
                }
            }
        }
    }

    #[test]
    fn a_continuation_joins_without_a_gap() {
        for name in ["tokenizers/phi-3", "tokenizers/gpt2", "models/stories260K"] {
            let Some(tokenizer) = load(name) else { return };
            for (one, two) in [("Once upon", " a time"), ("play", "ing"), ("line", "\nnext")] {
                let mut ids = tokenizer.encode(one).unwrap();
                ids.extend(tokenizer.encode_continuation(two).unwrap());
                assert_eq!(tokenizer.decode(&ids).unwrap(), format!("{one}{two}"), "{name}");
            }
        }
    }

    #[test]
    fn begin_and_end_ids_are_found_and_sizes_compared() {
        let Some(tokenizer) = load("models/stories260K") else { return };
        assert_eq!((tokenizer.bos(), tokenizer.eos_ids()), (Some(1), &[2][..]));
        assert!(tokenizer.check_vocabulary(511).is_err() && tokenizer.check_vocabulary(512).is_ok());
    }
}
