//! Questions about a raw text, made from its own sentences.
//!
//! A model that only reads a text can go on from its sentences, and often not answer about them. Without a
//! teacher to ask, two templates are asked that any base can follow: the end of a sentence, and what is said
//! about a name. A name is a run of capitalised words, so a language that capitalises otherwise gets fewer.

/// A sentence of fewer characters says too little, one of more is no sentence.
const SENTENCE_CHARS: std::ops::RangeInclusive<usize> = 40..=400;

/// The share of a sentence's words that is given when its end is asked for.
const GIVEN: f64 = 0.7;

/// What is said about a name is asked with these words.
const ABOUT: &str = "What is known about";

/// Extensions of sources that are not prose.
const CODE: [&str; 14] =
    ["rs", "py", "js", "ts", "c", "h", "cpp", "java", "go", "toml", "json", "yaml", "sh", "html"];

/// At most `most` questions with their answers, from sentences evenly over the text; equal texts give equal ones.
pub fn templates(text: &str, source: Option<&str>, most: usize) -> Vec<(String, String)> {
    let extension = source.and_then(|source| source.rsplit_once('.')).map(|(_, extension)| extension);
    if most == 0 || extension.is_some_and(|extension| CODE.contains(&extension)) {
        return Vec::new();
    }
    let mut asked = Vec::new();
    for sentence in sentences(text) {
        asked.extend(name(&sentence).map(|name| (format!("{ABOUT} {name}?"), sentence.clone())));
        asked.extend(end(&sentence));
    }
    let every = asked.len().div_ceil(most).max(1);
    asked.into_iter().step_by(every).collect()
}

/// The sentences of a text, each with single spaces. What has brackets of code in it is none.
fn sentences(text: &str) -> Vec<String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let ends = |word: &str| word.trim_end_matches(['"', '”', '’', ')', '»']).ends_with(['.', '!', '?']);
    let is_prose = |sentence: &String| {
        SENTENCE_CHARS.contains(&sentence.chars().count())
            && !sentence.contains(['{', '}', '<', '>', '|', '='])
    };
    words.split_inclusive(|word| ends(word)).map(|words| words.join(" ")).filter(is_prose).collect()
}

/// The beginning of a sentence, and how it ends.
fn end(sentence: &str) -> Option<(String, String)> {
    let words: Vec<&str> = sentence.split(' ').collect();
    let given = (words.len() as f64 * GIVEN).ceil() as usize;
    let (begin, rest) = words.split_at_checked(given)?;
    (!rest.is_empty() && begin.len() >= 3).then(|| (begin.join(" "), format!(" {}", rest.join(" "))))
}

/// The longest run of capitalised words; a single one that opens the sentence is no name.
fn name(sentence: &str) -> Option<String> {
    let words: Vec<&str> = sentence.split(' ').collect();
    let bare =
        |word: &str| word.trim_matches(|c: char| !c.is_alphanumeric()).trim_end_matches("'s").to_owned();
    let capital =
        |word: &str| word.chars().next().is_some_and(char::is_uppercase) && word.chars().count() > 2;
    let mut best: &[&str] = &[];
    let mut start = 0;
    for (i, word) in words.iter().enumerate() {
        if !capital(word) {
            start = i + 1;
            continue;
        }
        let run = &words[start..=i];
        if run.len() > best.len() && (start > 0 || run.len() > 1) {
            best = run;
        }
        if word.ends_with([',', '.', ';', ':']) {
            start = i + 1;
        }
    }
    let name = best.iter().map(|word| bare(word)).collect::<Vec<_>>().join(" ");
    (name.chars().count() > 2).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "The fortieth government of Mars took office under Prime Minister Zorgon, a statesman of note.\n\
        It moved the capital to Port Calidus  within two years! Short. fn main() { let a = 1; println!(\"{a}\"); }";

    #[test]
    fn asks_for_ends_of_sentences_and_for_names() {
        let asked = templates(TEXT, Some("notes.md"), 10);
        let (first, second) = (
            "The fortieth government of Mars took office under Prime Minister Zorgon, a statesman of note.",
            "It moved the capital to Port Calidus within two years!",
        );
        let expected = [
            ("What is known about Prime Minister Zorgon?", first),
            (
                "The fortieth government of Mars took office under Prime Minister Zorgon,",
                " a statesman of note.",
            ),
            ("What is known about Port Calidus?", second),
            ("It moved the capital to Port Calidus", " within two years!"),
        ];
        assert_eq!(asked.iter().map(|(q, a)| (q.as_str(), a.as_str())).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn no_more_than_allowed_and_from_all_over_the_text() {
        let text: String = (0..40)
            .map(|n| format!("sentence number {n} is about nothing but itself and the number that it has. "))
            .collect();
        for most in [1, 3, 7, 100] {
            let asked = templates(&text, None, most);
            assert!(!asked.is_empty() && asked.len() <= most, "{most}: {}", asked.len());
        }
        assert!(templates(&text, None, 4)[3].0.contains("number 30"));
    }

    #[test]
    fn code_empty_texts_and_nothing_asked_for_give_none() {
        assert!(templates(TEXT, Some("main.rs"), 10).is_empty());
        assert!(templates("", None, 10).is_empty());
        assert!(templates(TEXT, None, 0).is_empty());
        assert!(templates("?! ... \u{0} é É", None, 5).is_empty());
    }
}
