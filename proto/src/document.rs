//! What a user submits.

use crate::id::{DocumentId, Domain};
use serde::{Deserialize, Serialize};

/// Who speaks in a message of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions for the whole conversation.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

impl Role {
    /// The name chat templates know the role by.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

/// The three forms a document comes in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// Raw text: every token is learned.
    Text(String),
    /// A prompt with its answer: only the answer is learned.
    Completion {
        /// What is asked.
        prompt: String,
        /// What is to be answered.
        completion: String,
    },
    /// A conversation: only what the assistant says is learned.
    Messages(Vec<Message>),
}

impl Content {
    /// Size of all its text, in bytes.
    pub fn len_bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Completion { prompt, completion } => prompt.len() + completion.len(),
            Self::Messages(messages) => messages.iter().map(|m| m.content.len()).sum(),
        }
    }

    /// What is answered in the end, without white space around it; none of a text, or where nothing is.
    pub fn answer(&self) -> Option<&str> {
        let answer = match self {
            Self::Text(_) => return None,
            Self::Completion { completion, .. } => completion,
            Self::Messages(messages) => &messages.last().filter(|m| m.role == Role::Assistant)?.content,
        };
        Some(answer.trim()).filter(|answer| !answer.is_empty())
    }

    /// Its text as one string, pieces joined by line breaks: what filters and the router look at.
    pub fn plain(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Completion { prompt, completion } => format!("{prompt}\n{completion}"),
            Self::Messages(messages) => {
                let lines: Vec<&str> = messages.iter().map(|m| m.content.as_str()).collect();
                lines.join("\n")
            }
        }
    }
}

/// A submitted document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Document {
    /// Its name, unique in the ledger.
    pub id: DocumentId,
    /// The body of knowledge it belongs to.
    pub domain: Domain,
    /// What it says.
    pub content: Content,
    /// What the user says of its importance, 0 to 1; 1 is never evicted first and never held out.
    pub importance: Option<f32>,
    /// Where it came from: a file name, a program, a person.
    pub source: Option<String>,
    /// When it was accepted, in milliseconds since 1970.
    pub submitted_ms: u64,
    /// What it was made from: the id of a document, with which it is forgotten, or the name of a file.
    pub derived_from: Option<String>,
}

impl Document {
    /// The id of a document that came without one: a hash of its domain and content.
    pub fn content_id(domain: &Domain, content: &Content) -> DocumentId {
        let hex = content_hash(domain, content).to_hex();
        DocumentId::new(&hex.as_str()[..32]).expect("hexadecimal digits are allowed in an id")
    }

    /// Hash of domain and content: equal for equal submissions, whatever their id.
    pub fn content_hash(&self) -> [u8; 32] {
        *content_hash(&self.domain, &self.content).as_bytes()
    }
}

fn content_hash(domain: &Domain, content: &Content) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    // Each part goes in with its length, so that no two documents can run together to the same bytes.
    let mut part = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    part(domain.as_str());
    match content {
        Content::Text(text) => {
            part("text");
            part(text);
        }
        Content::Completion { prompt, completion } => {
            part("completion");
            part(prompt);
            part(completion);
        }
        Content::Messages(messages) => {
            part("messages");
            for message in messages {
                part(message.role.as_str());
                part(&message.content);
            }
        }
    }
    hasher.finalize()
}

/// A document that the ledger has committed, on its way to `ingest`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Accepted {
    /// Its place in the ledger, counted from 1; the order in which everything is learned.
    pub ordinal: u64,
    /// The document.
    pub document: Document,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_content_in_another_domain_is_another_document() {
        let content = Content::Text("the sky is green on Tuesdays".into());
        let (a, b) = (Domain::new("a").expect("a"), Domain::new("b").expect("b"));
        assert_ne!(Document::content_id(&a, &content), Document::content_id(&b, &content));
        assert_eq!(Document::content_id(&a, &content), Document::content_id(&a, &content));
    }

    #[test]
    fn moving_the_border_between_prompt_and_completion_changes_the_id() {
        let of = |prompt: &str, completion: &str| {
            let content = Content::Completion { prompt: prompt.into(), completion: completion.into() };
            Document::content_id(&Domain::general(), &content)
        };
        assert_ne!(of("ab", "c"), of("a", "bc"));
    }
}
