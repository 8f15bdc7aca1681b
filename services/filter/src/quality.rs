//! Is a text worth learning from?

use crate::Rules;
use std::collections::HashSet;

/// Words a text needs before its repetition says anything.
const REPETITION_WORDS_MIN: usize = 40;
/// Characters a text needs before its language can be told.
const LANGUAGE_CHARS_MIN: usize = 60;

/// Refuses a language that is never found.
///
/// # Errors
/// Names it, and those that there are.
pub fn check_languages(codes: &[String]) -> anyhow::Result<()> {
    for code in codes {
        if whatlang::Lang::from_code(code).is_none_or(|language| language.code() != code) {
            let known: Vec<&str> = whatlang::Lang::all().iter().map(whatlang::Lang::code).collect();
            anyhow::bail!(
                "filter.languages: {code:?} is none that can be told; give ISO 639-3 codes: {}",
                known.join(", ")
            );
        }
    }
    Ok(())
}

/// A text's quality, 0 to 1; or, for the user, why it is not worth learning. An answer to a prompt
/// may be as short as a word; raw text may not.
pub fn assess(text: &str, is_answer: bool, rules: &Rules) -> Result<f32, String> {
    let chars = text.chars().filter(|c| !c.is_whitespace()).count();
    let least = if is_answer { 1 } else { rules.chars_min };
    if chars < least {
        return Err(format!("it has {chars} characters; {least} are the least (filter.chars_min)"));
    }
    let repeated = repetition(text);
    if repeated > rules.repetition_max {
        let percent = (repeated * 100.0).round();
        return Err(format!("it repeats itself: {percent} % of its phrases occur before in it"));
    }
    if !rules.languages.is_empty() && chars >= LANGUAGE_CHARS_MIN {
        let found = whatlang::detect(text).filter(whatlang::Info::is_reliable);
        if let Some(language) = found.map(|info| info.lang().code())
            && !rules.languages.iter().any(|l| l == language)
        {
            return Err(format!("its language is {language}, which filter.languages does not list"));
        }
    }
    let readable = text.chars().filter(|c| !c.is_control() || c.is_whitespace()).count();
    let share = readable as f32 / text.chars().count().max(1) as f32;
    if share < 0.9 {
        return Err("it looks like binary data: more than a tenth of it is control characters".into());
    }
    Ok(share * (1.0 - repeated))
}

/// Share of word 4-grams that occurred before in the text; 0 for short ones.
fn repetition(text: &str) -> f32 {
    let words: Vec<&str> = text.split_whitespace().collect();
    if words.len() < REPETITION_WORDS_MIN {
        return 0.0;
    }
    let mut seen = HashSet::new();
    let grams = words.windows(4);
    let total = grams.len();
    let repeated = grams.filter(|gram| !seen.insert(*gram)).count();
    repeated as f32 / total as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(languages: &[&str]) -> Rules {
        Rules {
            chars_min: 20,
            repetition_max: 0.7,
            languages: languages.iter().map(ToString::to_string).collect(),
            near_duplicate: 0.9,
            secrets: true,
        }
    }

    #[test]
    fn an_answer_may_be_short_and_raw_text_may_not() {
        assert!(assess("42", true, &rules(&[])).is_ok());
        assert!(assess("42", false, &rules(&[])).is_err());
    }

    #[test]
    fn a_language_that_is_never_found_is_refused_by_name() {
        let check =
            |codes: &[&str]| check_languages(&codes.iter().map(ToString::to_string).collect::<Vec<_>>());
        check(&["eng", "fra", "cmn"]).expect("known");
        check(&[]).expect("all");
        let error = check(&["eng", "english"]).expect_err("not a code").to_string();
        assert!(error.contains("\"english\"") && error.contains("eng,"), "{error}");
    }

    #[test]
    fn languages_are_told_apart_when_a_list_is_given() {
        let french = "Il était une fois, dans un petit village au bord de la mer, une vieille dame qui \
            ne parlait à personne et que tout le monde pourtant saluait.";
        assert!(assess(french, false, &rules(&[])).is_ok());
        assert!(assess(french, false, &rules(&["fra"])).is_ok());
        let reason = assess(french, false, &rules(&["eng"])).expect_err("not English");
        assert!(reason.contains("fra"), "{reason}");
    }

    #[test]
    fn a_list_of_like_rows_is_not_called_repetition() {
        let rows: String = (0..100).map(|n| format!("row {n} holds value {}\n", n * 7)).collect();
        assert!(assess(&rows, false, &rules(&[])).is_ok());
    }
}
