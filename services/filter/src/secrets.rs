//! Finds what looks like a secret. A model that learned a key would recite it.

use regex::Regex;
use std::sync::LazyLock;

/// Each rule's name, as the user reads it, with its pattern. Only forms that their issuers made to be
/// recognised, or an assignment that says what it is: a guess from randomness alone would refuse
/// hashes and ids, of which code and logs are full.
static RULES: LazyLock<Vec<(&str, Regex)>> = LazyLock::new(|| {
    [
        ("a private key", r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----"),
        ("an AWS access key", r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
        ("a GitHub token", r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,})\b"),
        ("a GitLab token", r"\bglpat-[A-Za-z0-9_-]{20,}\b"),
        ("a Slack token", r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
        ("an API key", r"\bsk-(?:[a-z]+-)*[A-Za-z0-9_-]{32,}"),
        ("a Google API key", r"\bAIza[0-9A-Za-z_-]{35}\b"),
        ("a Stripe key", r"\b[rs]k_live_[0-9a-zA-Z]{20,}\b"),
        ("a JSON web token", r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
        (
            "a password or key in an assignment",
            r#"(?i)\b(?:password|passwd|secret|api_?key|access_?token|auth_?token)["']?\s*[:=]\s*["'][^"'\s<>{}$]{12,}["']"#,
        ),
    ]
    .into_iter()
    .map(|(name, pattern)| (name, Regex::new(pattern).expect("the pattern is a constant")))
    .collect()
});

/// The first likely secret: what it looks like, and the line it is on, counted from 1.
pub fn find(text: &str) -> Option<(&'static str, usize)> {
    let first = RULES.iter().filter_map(|(name, rule)| rule.find(text).map(|m| (m.start(), *name))).min()?;
    let line = text[..first.0].matches('\n').count() + 1;
    Some((first.1, line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_forms_are_found_with_their_line() {
        let key = format!("first line\nsecond\ntoken: ghp_{}\n", "a1B2".repeat(9));
        assert_eq!(find(&key), Some(("a GitHub token", 3)));
        assert_eq!(find("-----BEGIN RSA PRIVATE KEY-----\nMIIE").map(|f| f.0), Some("a private key"));
        let assigned = find(r#"password = "correct-horse-battery""#).map(|f| f.0);
        assert_eq!(assigned, Some("a password or key in an assignment"));
    }

    #[test]
    fn prose_code_and_hashes_are_not_secrets() {
        for text in [
            "My password is easy to forget, so I wrote a poem about the key.",
            "commit 2fd4e1c67a2d28fced849ee1bb76e7391b93eb12",
            "let api_key = std::env::var(\"API_KEY\")?;",
            "password: \"${DATABASE_PASSWORD}\"",
        ] {
            assert_eq!(find(text), None, "{text}");
        }
    }
}
