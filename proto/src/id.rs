//! Names that travel: checked once, where they enter, and trusted from there on.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Why a name was refused, in words that tell the user what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {given:?} is not usable: {rule}")]
pub struct IdError {
    what: &'static str,
    given: String,
    rule: &'static str,
}

impl IdError {
    fn new(what: &'static str, given: &str, rule: &'static str) -> Self {
        // A hostile name may be huge; the message that quotes it stays short.
        let given = given.chars().take(80).collect();
        Self { what, given, rule }
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal, $rule:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The checked name.
            ///
            /// # Errors
            /// When the text breaks the rule that the error states.
            pub fn new(text: impl Into<String>) -> Result<Self, IdError> {
                let text = text.into();
                let check: fn(&str) -> bool = $check;
                if check(&text) { Ok(Self(text)) } else { Err(IdError::new($what, &text, $rule)) }
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.0)
            }
        }
    };
}

name_type!(
    /// A document's name: the client's idempotency key, or the hash of domain and content.
    DocumentId,
    "document id",
    "it takes 1 to 128 of the characters A-Z a-z 0-9 . _ : -",
    |text| {
        (1..=128).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:-".contains(&b))
    }
);

name_type!(
    /// A named body of knowledge, which owns one adapter lineage.
    Domain,
    "domain",
    "it takes 1 to 64 of the characters a-z 0-9 _ -, starts with a letter, and is not 'base' or 'auto'",
    |text| {
        (1..=64).contains(&text.len())
            && text.starts_with(|c: char| c.is_ascii_lowercase())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-".contains(&b))
            && !["base", "auto"].contains(&text)
    }
);

name_type!(
    /// A published adapter version: the first 16 hexadecimal digits of its content's BLAKE3 hash.
    GenerationId,
    "generation",
    "it is 16 hexadecimal digits",
    |text| text.len() == 16 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
);

name_type!(
    /// The frozen base a lineage belongs to: the first 16 hexadecimal digits of its files' BLAKE3 hash.
    BaseId,
    "base",
    "it is 16 hexadecimal digits",
    |text| text.len() == 16 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
);

impl Domain {
    /// Where documents go that name no domain.
    pub const GENERAL: &'static str = "general";

    /// The domain of documents that name none.
    pub fn general() -> Self {
        Self(Self::GENERAL.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_to_their_alphabet() {
        assert!(DocumentId::new("order-7:2026.1").is_ok());
        for bad in ["", "a b", "../etc/passwd", "a/b", &"x".repeat(129)] {
            assert!(DocumentId::new(bad).is_err(), "{bad}");
        }
        assert!(Domain::new("rust_code-2").is_ok());
        for bad in ["", "base", "auto", "Medical", "2fast", "a+b", "a@b", "a:b", "médical"] {
            assert!(Domain::new(bad).is_err(), "{bad}");
        }
        assert!(GenerationId::new("0123456789abcdef").is_ok());
        assert!(GenerationId::new("0123456789ABCDEF").is_err());
    }

    #[test]
    fn an_error_quotes_a_short_piece_of_a_huge_name() {
        let message = Domain::new("x".repeat(1_000_000)).expect_err("too long").to_string();
        assert!(message.len() < 300, "{}", message.len());
    }
}
