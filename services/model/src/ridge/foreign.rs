//! Prompts that belong to no document: what the base says of its own accord, cut to the length of questions.

use anyhow::Result;

use crate::pack::Sequence;
use crate::tokenizer::Tokenizer;

/// Tokens of the shortest and of the longest one.
const TOKENS: [usize; 2] = [4, 40];
/// Prompts at most, evenly from all: more say little.
const PROMPTS_MAX: usize = 400;

/// Cuts anchor sequences into prompts of all lengths, each as it is and as `chat` asks it.
///
/// # Errors
/// When the tokenizer does not know a token.
pub fn foreign(
    anchors: &[Sequence],
    tokenizer: &Tokenizer,
    chat: &dyn Fn(&str) -> Result<Vec<u32>>,
) -> Result<Vec<Vec<u32>>> {
    let [shortest, longest] = TOKENS;
    let lengths = longest - shortest + 1;
    let (mut prompts, mut pieces) = (Vec::new(), 0);
    for anchor in anchors {
        let mut rest = anchor.tokens.as_slice();
        while rest.len() >= shortest {
            // A stride that has no divisor in common with their number comes by every length.
            let length = (shortest + pieces * 5 % lengths).min(rest.len());
            pieces += 1;
            let (piece, after) = rest.split_at(length);
            rest = after;
            let text = tokenizer.decode(piece)?;
            prompts.push(tokenizer.encode(text.trim())?);
            // A template may refuse any conversation; then nobody asks in one.
            prompts.extend(chat(text.trim()));
        }
    }
    prompts.retain(|prompt| !prompt.is_empty());
    // An odd stride, so that both forms stay.
    let stride = prompts.len().div_ceil(PROMPTS_MAX) | 1;
    Ok(prompts.into_iter().step_by(stride).collect())
}

#[cfg(test)]
mod tests {
    use super::super::counting::tests::nano;
    use super::*;

    #[test]
    fn pieces_of_all_lengths_are_asked_in_both_forms() {
        let (_, tokenizer) = nano();
        let anchors: Vec<Sequence> =
            (0..40_u32).map(|n| Sequence::whole((0..64).map(|i| 300 + n * 61 + i).collect())).collect();
        let prompts =
            foreign(&anchors, &tokenizer, &|text| tokenizer.encode(&format!("user {text}"))).expect("cut");
        let user = tokenizer.encode("user").expect("encoded");
        let (asked, plain): (Vec<_>, Vec<_>) = prompts.iter().partition(|prompt| prompt.starts_with(&user));
        for form in [&asked, &plain] {
            let (short, long) = (form.iter().filter(|p| p.len() < 10), form.iter().filter(|p| p.len() > 30));
            assert!((100..200).contains(&form.len()) && short.count() > 9 && long.count() > 9);
        }
        let refused = foreign(&anchors, &tokenizer, &|_| anyhow::bail!("no conversation")).expect("cut");
        assert_eq!(refused.len(), plain.len());
        let many = vec![anchors; 9].concat();
        let cut = foreign(&many, &tokenizer, &|text| tokenizer.encode(&format!("user {text}"))).expect("cut");
        let asked = cut.iter().filter(|prompt| prompt.starts_with(&user)).count();
        assert!(
            (300..=PROMPTS_MAX).contains(&cut.len()) && (100..300).contains(&asked),
            "{} {asked}",
            cut.len()
        );
        assert!(foreign(&[], &tokenizer, &|_| Ok(vec![1])).expect("cut").is_empty());
    }
}
