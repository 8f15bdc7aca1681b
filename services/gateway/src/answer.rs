//! Answers of the model in OpenAI's forms: whole, or chunk by chunk.

use crate::logprobs;
use crate::question::{Asked, Form};
use proto::{BaseId, Choice, FinishReason, TokenLogprob, Usage};
use serde_json::{Value, json};

/// One of the choices that a request is answered with, as OpenAI calls them, as far as it came.
#[derive(Default)]
pub(crate) struct Completion {
    pub text: String,
    /// The tokens of the text, where asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// Set once it has ended.
    pub reason: Option<FinishReason>,
    /// Documents that it is from: see [`crate::sources`].
    pub sources: Vec<Value>,
}

/// What all chunks of one answer have in common.
pub(crate) struct Answer {
    asked: Asked,
    id: String,
    created_s: u64,
    fingerprint: String,
    choice: Choice,
}

impl Answer {
    /// The answer that the adapters in `choice` give; `number` tells it from all others.
    pub(crate) fn new(asked: Asked, choice: Choice, base: &BaseId, number: u64, created_s: u64) -> Self {
        let prefix = match asked.form {
            Form::Chat => "chatcmpl",
            Form::Text => "cmpl",
        };
        let fingerprint = fingerprint(base, &choice);
        Self { asked, id: format!("{prefix}-{number:016x}"), created_s, fingerprint, choice }
    }

    /// The whole answer, for a request that is not streamed.
    pub(crate) fn whole(&self, completions: &[Completion], usage: Usage) -> Value {
        let object = match self.asked.form {
            Form::Chat => "chat.completion",
            Form::Text => "text_completion",
        };
        let choice = |(index, completion): (usize, &Completion)| {
            let text = &completion.text;
            let mut choice = match self.asked.form {
                Form::Chat => json!({"message": {"role": "assistant", "content": text, "refusal": null}}),
                Form::Text => json!({"text": text}),
            };
            let logprobs = self.asked.logprobs.then_some(&completion.logprobs[..]);
            self.complete(&mut choice, index as u32, logprobs, completion.reason);
            choice
        };
        let mut whole = self.frame(object, completions.iter().enumerate().map(choice).collect());
        whole["usage"] = counted(usage);
        let sources = completions.iter().flat_map(|completion| completion.sources.clone());
        whole["engram"] = self.provenance(sources.collect());
        whole
    }

    /// The chunk before a choice's text: a chat says who speaks.
    pub(crate) fn opening(&self, index: u32) -> Option<Value> {
        let delta = json!({"delta": {"role": "assistant", "content": ""}});
        (self.asked.form == Form::Chat).then(|| self.chunk(index, delta, &[], None))
    }

    /// A chunk of a choice's text. A token that ends in part of a character brings no text yet.
    pub(crate) fn piece(&self, index: u32, text: &str, logprobs: &[TokenLogprob]) -> Value {
        let choice = match self.asked.form {
            Form::Chat => json!({"delta": {"content": text}}),
            Form::Text => json!({"text": text}),
        };
        self.chunk(index, choice, logprobs, None)
    }

    /// The chunk after a choice's text: why it ended, who answered, and which documents it is from.
    pub(crate) fn closing(&self, index: u32, reason: FinishReason, sources: Vec<Value>) -> Value {
        let choice = match self.asked.form {
            Form::Chat => json!({"delta": {}}),
            Form::Text => json!({"text": ""}),
        };
        let mut last = self.chunk(index, choice, &[], Some(reason));
        last["engram"] = self.provenance(sources);
        last
    }

    /// The chunk after all choices, where asked for: the tokens.
    pub(crate) fn count(&self, usage: Usage) -> Option<Value> {
        let mut count = self.frame(self.chunk_object(), Vec::new());
        count["usage"] = counted(usage);
        self.asked.include_usage.then_some(count)
    }

    fn chunk(
        &self,
        index: u32,
        mut choice: Value,
        logprobs: &[TokenLogprob],
        reason: Option<FinishReason>,
    ) -> Value {
        let logprobs = Some(logprobs).filter(|logprobs| !logprobs.is_empty());
        self.complete(&mut choice, index, logprobs, reason);
        let mut chunk = self.frame(self.chunk_object(), vec![choice]);
        if self.asked.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn chunk_object(&self) -> &'static str {
        match self.asked.form {
            Form::Chat => "chat.completion.chunk",
            Form::Text => "text_completion",
        }
    }

    /// Adds what every choice has, whole or in chunks.
    fn complete(
        &self,
        choice: &mut Value,
        index: u32,
        logprobs: Option<&[TokenLogprob]>,
        reason: Option<FinishReason>,
    ) {
        choice["index"] = json!(index);
        choice["logprobs"] = json!(logprobs.map(|tokens| logprobs::of(self.asked.form, tokens)));
        choice["finish_reason"] = json!(reason);
    }

    fn frame(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created_s,
            "model": self.asked.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        })
    }

    /// Which adapters answered, and because of which documents: OpenAI has no place for it, and one wants to know.
    fn provenance(&self, sources: Vec<Value>) -> Value {
        json!({"adapters": self.choice.adapters, "confidence": self.choice.confidence, "sources": sources})
    }
}

/// Equal for answers that come from the same weights.
fn fingerprint(base: &BaseId, choice: &Choice) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(base.as_str().as_bytes());
    for adapter in &choice.adapters {
        let generation = adapter.generation.as_ref().map_or("", |id| id.as_str());
        hasher.update(format!("+{}@{generation}:{}", adapter.domain, adapter.weight).as_bytes());
    }
    format!("fp_{}", &hasher.finalize().to_hex()[..12])
}

fn counted(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens.saturating_add(usage.completion_tokens),
    })
}
