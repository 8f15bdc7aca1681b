//! The one path between text and tokens, and between adapters and PEFT folders, as the services that
//! know no model see it.

use anyhow::Context;
use infer::Language;
use kit::answers::AnswerFiles;
use model::chat::ChatTemplate;
use model::hf::ModelConfig;
use model::lora::Adapter;
use model::merge;
use model::ridge::{Anchors, Counts};
use model::tokenizer::Tokenizer;
use proto::{Merge, MergeMethod, Message, PeftFiles, Piece};
use std::path::Path;
use std::sync::Arc;

/// The text side of a base.
pub struct Text {
    language: Arc<Language>,
    base_name: String,
    fingerprint: String,
}

impl Text {
    /// Loads tokenizer and chat template of a base folder.
    ///
    /// # Errors
    /// When one is missing or damaged.
    pub fn load(dir: &Path) -> anyhow::Result<Self> {
        let config = ModelConfig::load(dir)?;
        let tokenizer = Tokenizer::load(dir)?;
        tokenizer.check_vocabulary(config.vocab_size)?;
        let template = ChatTemplate::load(dir)?;
        let base_name = dir.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let file = dir.join("tokenizer.json");
        let bytes = std::fs::read(&file).with_context(|| format!("{} cannot be read", file.display()))?;
        let fingerprint = format!("{} {}", blake3::hash(&bytes).to_hex(), template.id());
        let language = Arc::new(Language { config, tokenizer: Arc::new(tokenizer), template });
        Ok(Self { language, base_name, fingerprint })
    }

    /// Differs where the same document would become other tokens.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Shared with inference.
    pub fn language(&self) -> Arc<Language> {
        Arc::clone(&self.language)
    }
}

impl ingest::Encode for Text {
    fn start(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        self.language.tokenizer.encode(text)
    }

    fn more(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        self.language.tokenizer.encode_continuation(text)
    }

    fn chat(&self, messages: &[Message]) -> anyhow::Result<Piece> {
        let turns: Vec<(&str, &str)> =
            messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
        let sequence = self.language.template.encode_training(&self.language.tokenizer, &turns)?;
        Ok(Piece { tokens: sequence.tokens, learned: sequence.learned })
    }

    fn end(&self) -> Option<u32> {
        self.language.tokenizer.eos_ids().first().copied()
    }
}

impl gateway::Words for Text {
    fn encode(&self, text: &str, whole: bool) -> anyhow::Result<Vec<u32>> {
        let tokenizer = &self.language.tokenizer;
        if whole { tokenizer.encode(text) } else { tokenizer.encode_continuation(text) }
    }

    fn encode_chat(&self, messages: &[Message], open: bool) -> anyhow::Result<Vec<u32>> {
        let turns: Vec<(&str, &str)> =
            messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
        self.language.template.encode_chat(&self.language.tokenizer, &turns, open)
    }

    fn decode(&self, tokens: &[u32]) -> anyhow::Result<String> {
        self.language.tokenizer.decode(tokens)
    }

    fn token(&self, id: u32) -> Option<String> {
        self.language.tokenizer.token(id)
    }
}

impl checkpoint::Peft for Text {
    fn import(&self, files: &PeftFiles) -> anyhow::Result<Vec<u8>> {
        let folder = tempfile::tempdir().context("no folder for the adapter's files")?;
        std::fs::write(folder.path().join("adapter_config.json"), &files.config)?;
        std::fs::write(folder.path().join("adapter_model.safetensors"), &files.weights)?;
        let adapter = Adapter::read_peft(folder.path(), &self.language.config);
        // What is wrong is told of the files as they were sent, not of where they lie for a moment.
        let here = format!("{}/", folder.path().display());
        adapter.map_err(|error| anyhow::anyhow!("{}", format!("{error:#}").replace(&here, "")))?.to_bytes()
    }

    fn export(&self, weights: &[u8]) -> anyhow::Result<PeftFiles> {
        let folder = tempfile::tempdir().context("no folder for the adapter's files")?;
        Adapter::from_bytes(weights, &self.language.config)?.write_peft(folder.path(), &self.base_name)?;
        let config = std::fs::read_to_string(folder.path().join("adapter_config.json"))?;
        let weights = std::fs::read(folder.path().join("adapter_model.safetensors"))?;
        Ok(PeftFiles { config, weights })
    }

    fn merge(&self, parts: &[(Vec<u8>, f64)], how: &Merge) -> anyhow::Result<Vec<u8>> {
        let shape = &self.language.config;
        let adapters = parts.iter().map(|(bytes, _)| Adapter::from_bytes(bytes, shape));
        let adapters = adapters.collect::<anyhow::Result<Vec<_>>>()?;
        let weighted: Vec<_> = adapters.iter().zip(parts.iter().map(|(_, weight)| *weight)).collect();
        let how = merge::Merge {
            method: match how.method {
                MergeMethod::Linear => merge::Method::Linear,
                MergeMethod::Svd => merge::Method::Svd,
                MergeMethod::Ties => merge::Method::Ties,
                MergeMethod::Dare => merge::Method::Dare,
            },
            rank: how.rank.map(i64::from),
            density: how.density.map(f64::from),
            seed: how.seed,
        };
        let merged = merge::merge(&weighted, &how, shape)?;
        anyhow::ensure!(merged.has_effect(), "what is merged cancels out: nothing is left of it");
        merged.to_bytes()
    }

    fn add_up(&self, counts: &[Vec<u8>]) -> anyhow::Result<Option<AnswerFiles>> {
        let mut sum = Counts::new()?;
        for counts in counts {
            let counts = Counts::from_bytes(counts)?;
            let counts = if counts.is_trusted() { counts } else { counts.without_answers()? };
            if !sum.join(&counts)? {
                return Ok(None);
            }
        }
        // There is no base here to say what it would say itself: until the next batch no prompt is told from what it would say.
        let head = sum.solve(None, &Anchors::none()?)?;
        Ok(Some(AnswerFiles {
            counts: sum.to_bytes()?,
            solved: head.to_bytes()?,
            answers: head.answers().len() as u64,
            prompts: sum.prompts(),
            trusted: head.is_trusted(),
            facts: head.facts() as u64,
            passages: head.passages().len() as u64,
        }))
    }
}
