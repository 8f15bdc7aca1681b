//! Answers of the model in OpenAI's forms: whole, or chunk by chunk.

use crate::question::{Asked, Form};
use proto::{BaseId, Choice, FinishReason, Usage};
use serde_json::{Value, json};

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
    pub(crate) fn whole(&self, text: &str, reason: FinishReason, usage: Usage) -> Value {
        let (object, choice) = match self.asked.form {
            Form::Chat => {
                let message = json!({"role": "assistant", "content": text, "refusal": null});
                ("chat.completion", json!({"message": message}))
            }
            Form::Text => ("text_completion", json!({"text": text})),
        };
        let mut whole = self.frame(object, choice, Some(reason));
        whole["usage"] = counted(usage);
        whole["engram"] = self.provenance();
        whole
    }

    /// The chunk before the text: a chat says who speaks.
    pub(crate) fn opening(&self) -> Option<Value> {
        let delta = json!({"delta": {"role": "assistant", "content": ""}});
        (self.asked.form == Form::Chat).then(|| self.chunk(delta, None))
    }

    /// A chunk of text.
    pub(crate) fn piece(&self, text: &str) -> Value {
        match self.asked.form {
            Form::Chat => self.chunk(json!({"delta": {"content": text}}), None),
            Form::Text => self.chunk(json!({"text": text}), None),
        }
    }

    /// The chunks after the text: why it ended and who answered, and the tokens where asked for.
    pub(crate) fn closing(&self, reason: FinishReason, usage: Usage) -> Vec<Value> {
        let mut last = match self.asked.form {
            Form::Chat => self.chunk(json!({"delta": {}}), Some(reason)),
            Form::Text => self.chunk(json!({"text": ""}), Some(reason)),
        };
        last["engram"] = self.provenance();
        let mut chunks = vec![last];
        if self.asked.include_usage {
            let mut count = self.chunk(json!({}), None);
            count["choices"] = json!([]);
            count["usage"] = counted(usage);
            chunks.push(count);
        }
        chunks
    }

    fn chunk(&self, choice: Value, reason: Option<FinishReason>) -> Value {
        let object = match self.asked.form {
            Form::Chat => "chat.completion.chunk",
            Form::Text => "text_completion",
        };
        let mut chunk = self.frame(object, choice, reason);
        if self.asked.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn frame(&self, object: &str, mut choice: Value, reason: Option<FinishReason>) -> Value {
        choice["index"] = json!(0);
        choice["logprobs"] = Value::Null;
        choice["finish_reason"] = json!(reason);
        json!({
            "id": self.id,
            "object": object,
            "created": self.created_s,
            "model": self.asked.model,
            "system_fingerprint": self.fingerprint,
            "choices": [choice],
        })
    }

    /// Which adapters answered: OpenAI has no place for it, and one wants to know.
    fn provenance(&self) -> Value {
        json!({"adapters": self.choice.adapters, "confidence": self.choice.confidence})
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
