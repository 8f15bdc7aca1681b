//! JSONL, and text that is longer than a document may be.

use super::Draft;
use anyhow::{Result, anyhow};
use serde_json::{Map, Value};

/// The fields of a document that the server knows. Data sets often carry others, for others.
const FIELDS: [&str; 8] =
    ["text", "prompt", "completion", "messages", "domain", "importance", "source", "derived_from"];
/// The server takes sources up to this length, bytes.
const SOURCE_BYTES_MAX: usize = 256;

/// A document a line.
pub(super) fn lines(name: &str, text: &str, document_bytes_max: usize) -> Vec<Result<Draft>> {
    let numbered = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let of = |(number, line)| match self::line(&format!("{name}:{}", number + 1), name, line) {
        Ok((place, text, body)) => match text {
            Some(text) => parts(&place, &text, &body, document_bytes_max).into_iter().map(Ok).collect(),
            None => vec![Ok(Draft { place, body })],
        },
        Err(error) => vec![Err(error)],
    };
    numbered.flat_map(of).collect()
}

/// What a line says: its place, its text where it is a raw one, and all else.
fn line(place: &str, name: &str, line: &str) -> Result<(String, Option<String>, Map<String, Value>)> {
    let Ok(Value::Object(mut body)) = serde_json::from_str(line) else {
        return Err(anyhow!("{place} is not a JSON object"));
    };
    body.retain(|field, _| FIELDS.contains(&field.as_str()));
    body.entry("source").or_insert_with(|| tail(name).into());
    let has = |key: &str| body.contains_key(key);
    if has("prompt") && has("completion") || has("messages") {
        return Ok((place.to_owned(), None, body));
    }
    match body.remove("text") {
        Some(Value::String(text)) => Ok((place.to_owned(), Some(text), body)),
        _ => Err(anyhow!(
            "{place} has none of the three forms {{\"text\"}}, {{\"prompt\", \"completion\"}}, {{\"messages\"}}"
        )),
    }
}

/// Text as one document, or as many when it is longer than that.
pub(super) fn parts(
    place: &str,
    text: &str,
    fields: &Map<String, Value>,
    document_bytes_max: usize,
) -> Vec<Draft> {
    let pieces = split(text, document_bytes_max);
    let many = pieces.len() > 1;
    let draft = |(index, piece): (usize, &str)| {
        let place = if many { format!("{place}#{}", index + 1) } else { place.to_owned() };
        let mut body = fields.clone();
        body.insert("text".into(), piece.into());
        body.entry("source").or_insert_with(|| tail(&place).into());
        Draft { place, body }
    };
    pieces.into_iter().enumerate().map(draft).collect()
}

/// A place as a source: of one that is too long, the end says more than the beginning.
pub fn tail(place: &str) -> &str {
    let least = place.len().saturating_sub(SOURCE_BYTES_MAX);
    let start = (least..place.len()).find(|at| place.is_char_boundary(*at));
    &place[start.unwrap_or(0)..]
}

/// Cuts text into pieces of at most `limit` bytes: at the last blank line that fits, else at the
/// last line break, else at the last space, else between two characters. Blank pieces are dropped.
pub fn split(text: &str, limit: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while rest.len() > limit {
        let end = (1..=limit).rev().find(|at| rest.is_char_boundary(*at)).unwrap_or(rest.len());
        let window = &rest[..end];
        let cut = ["\n\n", "\n", " "]
            .iter()
            .find_map(|border| window.rfind(border).map(|at| at + border.len()))
            .unwrap_or(window.len());
        let (piece, after) = rest.split_at(cut);
        pieces.push(piece);
        rest = after;
    }
    pieces.push(rest);
    pieces.retain(|piece| !piece.trim().is_empty());
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_loses_nothing_but_blank_pieces_and_prefers_paragraphs() {
        let text = "one two\n\nthree four\n\nfive".repeat(50);
        let pieces = split(&text, 100);
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|piece| piece.len() <= 100));
        assert!(pieces[..pieces.len() - 1].iter().all(|piece| piece.ends_with("\n\n")));
        assert_eq!(split("ééééé", 3), ["é", "é", "é", "é", "é"]);
        assert!(split(" \n\n ", 100).is_empty());
    }

    #[test]
    fn a_line_of_each_form_is_a_document_and_a_bad_one_harms_no_neighbour() {
        let text = "{\"text\":\"a\"}\n\nnonsense\n{\"prompt\":\"p\",\"completion\":\"c\",\"source\":\"s\"}\n\
            {\"messages\":[]}\n{\"x\":1}\n";
        let drafts = lines("facts.jsonl", text, 100);
        let places: Vec<_> = drafts.iter().flatten().map(|draft| draft.place.as_str()).collect();
        assert_eq!(places, ["facts.jsonl:1", "facts.jsonl:4", "facts.jsonl:5"]);
        let errors: Vec<_> = drafts.iter().filter_map(|draft| draft.as_ref().err()).collect();
        assert!(errors[0].to_string().contains("facts.jsonl:3"), "{errors:?}");
        assert!(errors[1].to_string().contains("facts.jsonl:6"), "{errors:?}");
        let sources: Vec<_> = drafts.iter().flatten().map(|draft| draft.body["source"].clone()).collect();
        assert_eq!(sources, ["facts.jsonl", "s", "facts.jsonl"]);
    }
}
