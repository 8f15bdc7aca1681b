use super::*;
use crate::ridge::Prior;
use std::path::Path;

fn tokenizer() -> Arc<Tokenizer> {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/models/nano"));
    Arc::new(Tokenizer::load(dir).expect("a tokenizer"))
}

const ARTICLE: &str = "The fortieth government of Mars took office under Prime Minister Zorgon, a statesman of note. \
    It moved the capital to Port Calidus within two years of the vote! Its embassies on the moons of Jupiter stood in Ganymede and Callisto.";
const OTHER: &str = "A compiler turns the text of a program into instructions that a processor can follow.\n\
    The borrow checker refuses programs in which a reference outlives what it points to.";

fn passages(texts: &[&str]) -> Passages {
    let (tokenizer, mut passages) = (tokenizer(), Passages::default());
    for (document, text) in (1..).zip(texts) {
        let tokens = tokenizer.encode(text).unwrap();
        assert!(passages.take_in(document, &tokens, &tokenizer, 10_000).unwrap());
    }
    passages
}

fn index(texts: &[&str]) -> Index {
    Index::new(passages(texts), tokenizer()).unwrap()
}

/// The likeliest continuation, as text, and how likely it is that what is asked is known.
fn found(index: &Index, asked: &str, is_question: bool) -> (String, f64) {
    let tokenizer = tokenizer();
    let tokens = tokenizer.encode_continuation(&format!(" {asked}")).unwrap();
    let asked = Asked { tokens: &tokens, is_question, is_apart: false, end: None };
    let found = index.find(asked).unwrap();
    let text = found.first().map(|found| tokenizer.decode(&found.tokens).unwrap()).unwrap_or_default();
    (text, found.iter().map(|found| found.likely).sum())
}

#[test]
fn a_text_is_cut_after_sentences_and_lines_and_nothing_is_lost() {
    let tokenizer = tokenizer();
    let kept = passages(&[ARTICLE, OTHER]);
    let text = |n: usize| tokenizer.decode(&kept.tokens[kept.range(n)]).unwrap();
    assert_eq!(kept.len(), 5);
    assert!(text(0).ends_with("a statesman of note.") && text(1).trim().starts_with("It moved"));
    assert!(text(3).trim().ends_with("can follow.") && text(4).trim().starts_with("The borrow checker"));
    assert_eq!(kept.goes_on, [true, true, false, true, false]);
    assert_eq!((0..3).map(text).collect::<String>().trim(), ARTICLE);
}

#[test]
fn what_has_no_sentences_is_cut_before_words() {
    let tokenizer = tokenizer();
    let endless = "endless words without any stop ".repeat(100);
    let kept = passages(&[&endless]);
    assert!(kept.len() > 3);
    for n in 0..kept.len() {
        assert!(kept.range(n).len() <= TOKENS_MAX);
        let text = tokenizer.decode(&kept.tokens[kept.range(n)]).unwrap();
        assert!(n == 0 || text.starts_with(' ') || text.is_empty(), "{text:?}");
    }
}

#[test]
fn a_sentence_that_is_begun_goes_on_as_it_did_in_other_words_too() {
    let index = index(&[ARTICLE, OTHER]);
    let (text, likely) = found(&index, "It moved the capital to Port", false);
    assert!(text.starts_with(" Calidus within two years") && likely > 0.99, "{text:?} {likely}");
    let (text, likely) = found(&index, "embassies on moons of Jupiter were opened in GANYMEDE and", false);
    assert!(text.starts_with(" Callisto.") && likely > 0.5, "{text:?} {likely}");
}

#[test]
fn after_a_whole_sentence_comes_the_next_one() {
    let index = index(&[ARTICLE, OTHER]);
    let first =
        "The fortieth government of Mars took office under Prime Minister Zorgon, a statesman of note.";
    let (text, likely) = found(&index, first, false);
    assert!(text.trim().starts_with("It moved the capital") && likely > 0.9, "{text:?} {likely}");
    let (text, _) = found(&index, &format!("{first} It moved"), false);
    assert!(text.starts_with(" the capital"), "{text:?}");
    let last = "Its embassies on the moons of Jupiter stood in Ganymede and Callisto.";
    assert!(found(&index, last, false).1 < 0.1, "nothing follows it");
}

#[test]
fn a_text_goes_on_to_its_end_in_whole_sentences_and_no_further() {
    let known = index(&[ARTICLE, OTHER]);
    let (text, _) = found(&known, "It moved the capital to Port", false);
    let rest = ARTICLE.split_once("to Port").unwrap().1;
    assert_eq!(text, rest, "and nothing of the other text");
    let long: Vec<String> = (0..90)
        .map(|n| format!("Section {n} of the charter tells what the clerk of year {n} has to do."))
        .collect();
    let long = index(&[&long.join(" ")]);
    let (text, _) = found(&long, "Section 7 of the charter tells what the clerk of year 7", false);
    assert!(text.starts_with(" has to do. Section 8 of") && text.ends_with("has to do."), "{text:?}");
    assert!((20..60).contains(&text.matches("charter").count()), "{text:?}");
}

#[test]
fn a_question_is_answered_with_what_the_text_says_and_its_end() {
    let index = index(&[ARTICLE, OTHER]);
    let (text, likely) = found(&index, "Which moons of Jupiter had embassies?", true);
    assert_eq!(text, "Its embassies on the moons of Jupiter stood in Ganymede and Callisto.");
    assert!(likely > 0.5, "{likely}");
    let tokens = tokenizer().encode_continuation(" Which moons of Jupiter had embassies?").unwrap();
    let asked = Asked { tokens: &tokens, is_question: true, is_apart: false, end: Some(7) };
    assert!(index.find(asked).unwrap().iter().all(|found| found.tokens.last() == Some(&7)));
}

#[test]
fn what_no_text_is_about_is_left_to_the_model() {
    let index = index(&[ARTICLE, OTHER]);
    for asked in ["How do I cook rice for eight people?", "Once upon a time there lived", ""] {
        let (_, likely) = found(&index, asked, asked.ends_with('?'));
        assert!(likely < 0.3, "{asked}: {likely}");
    }
    let (_, likely) = found(&Index::new(Passages::default(), tokenizer()).unwrap(), ARTICLE, false);
    assert_eq!(likely, 0.0);
}

#[test]
fn a_prompt_has_to_be_more_like_a_passage_than_prompts_about_anything_else_are() {
    let tokenizer = tokenizer();
    let asked = "embassies on moons of Jupiter were opened in Ganymede and";
    let before = found(&index(&[ARTICLE]), asked, false).1;
    let mut passages = passages(&[ARTICLE]);
    let foreign: Vec<Vec<u32>> = (0..40)
        .map(|_| tokenizer.encode("the embassies on the moons stood in the way of the vote").unwrap())
        .collect();
    passages.compare(&foreign, &tokenizer).unwrap();
    let after = found(&Index::new(passages, tokenizer).unwrap(), asked, false).1;
    assert!(after < before, "{before} {after}");
}

#[test]
fn common_words_do_not_bring_up_one_of_a_few_sentences() {
    let tokenizer = tokenizer();
    let (asked, own) = ("It was the best of times when the", "the pride of the county");
    let mut passages =
        passages(&["It ran for ninety years, and was the pride of the county when the lamps were lit."]);
    let share = |passages: &Passages, asked: &str| {
        let index = Index::new(passages.clone(), Arc::clone(&tokenizer)).unwrap();
        index.share(&tokenizer.encode_continuation(&format!(" {asked}")).unwrap()).unwrap()
    };
    let before = share(&passages, asked);
    let others =
        ["it was the end of it when the rain came", "he was the king of the hill", "when the sun was up"];
    let others: Vec<Vec<u32>> =
        others.iter().cycle().take(60).map(|text| tokenizer.encode(text).unwrap()).collect();
    passages.compare(&others, &tokenizer).unwrap();
    let after = share(&passages, asked);
    assert!(after < 0.7 * before, "{before} {after}");
    assert!(share(&passages, own) > 0.99);
}

#[test]
fn what_is_hardly_alike_is_not_said_at_all() {
    assert_eq!(find::sureness(0.19, 0.25), 0.0);
    assert!(find::sureness(0.20, 0.25) > 0.3 && (find::sureness(0.25, 0.25) - 0.5).abs() < 1e-9);
    let mut passages = passages(&[ARTICLE]);
    passages.foreign = [0.6, 0.3];
    let index = Index::new(passages, tokenizer()).unwrap();
    let (text, likely) = found(&index, "The fortieth president of the club, and the", false);
    assert_eq!((text.as_str(), likely), ("", 0.0));
    assert!(found(&index, "The fortieth government of Mars took", false).1 > 0.9);
}

#[test]
fn there_is_room_for_so_many_tokens_and_others_can_join() {
    let tokenizer = tokenizer();
    let mut kept = passages(&[ARTICLE]);
    let (before, tokens) = (kept.clone(), tokenizer.encode(OTHER).unwrap());
    assert!(!kept.take_in(2, &tokens, &tokenizer, kept.tokens.len() + 5).unwrap());
    assert_eq!(kept, before, "what has no room is not kept in part");
    let mut other = Passages::default();
    assert!(other.take_in(2, &tokens, &tokenizer, 10_000).unwrap());
    kept.join(&other);
    assert_eq!(kept, passages(&[ARTICLE, OTHER]));
}

#[test]
fn what_was_written_reads_back_and_what_does_not_fit_together_is_refused() {
    let mut kept = passages(&[ARTICLE, OTHER]);
    let foreign = tokenizer().encode("what is told elsewhere is told in other words").unwrap();
    kept.compare(&vec![foreign; 3], &tokenizer()).unwrap();
    assert!(kept.others.prompts == 3 && !kept.others.common.is_empty());
    let named = |tensors: Vec<(String, Tensor)>| {
        let mut tensors: BTreeMap<String, Tensor> = tensors.into_iter().collect();
        Passages::from_tensors(|name| tensors.remove(name))
    };
    assert_eq!(named(kept.tensors().unwrap().into()).unwrap(), kept);
    let new = [DOCUMENTS, OTHERS, COMMON];
    let earlier = kept.tensors().unwrap().into_iter().filter(|(name, _)| !new.contains(&name.as_str()));
    let earlier = named(earlier.collect()).unwrap();
    assert_eq!(
        (earlier.len(), earlier.document(0)),
        (kept.len(), None),
        "which documents it was from is not known"
    );
    assert_eq!(Passages::from_tensors(|_| None).unwrap(), Passages::default(), "an earlier file");
    let mut short = kept.clone();
    short.tokens.pop();
    let mut on = kept.clone();
    on.goes_on[4] = true;
    let mut back = kept;
    let (mut from, mut of_none, mut of_more) = (back.clone(), back.clone(), back.clone());
    from.documents.pop();
    of_none.others.common.reverse();
    of_more.others.prompts = 2;
    back.ends.swap(0, 1);
    for damaged in [short, on, back, from, of_none, of_more] {
        assert!(named(damaged.tensors().unwrap().into()).is_err());
    }
}

#[test]
fn what_is_found_says_which_document_it_is_from() {
    let index = index(&[ARTICLE, OTHER]);
    let tokens = tokenizer().encode_continuation(" the borrow checker refuses programs in which a").unwrap();
    let found =
        index.find(Asked { tokens: &tokens, is_question: false, is_apart: false, end: None }).unwrap();
    assert_eq!(found[0].document, Some(2));
    let mut prior = Prior::default().beside(found.clone());
    assert_eq!(prior.sources(), [], "nothing is said yet");
    for &token in &found[0].tokens {
        // The model would say anything as well.
        prior.mix(&mut vec![0.0; 8192]);
        prior.accept(token);
    }
    let sources = prior.sources();
    assert!(matches!(sources[..], [of] if of.document == 2 && of.likely > 0.9), "{sources:?}");
}

#[test]
fn what_is_found_shares_what_short_answers_leave() {
    let found = [Found { tokens: vec![5, 6], likely: 0.5, document: None }];
    let prior = Prior::default().beside(found.clone()).beside(found);
    assert!((prior.of(&[5]) - 0.75).abs() < 1e-9 && (prior.rest() - 0.25).abs() < 1e-9);
}
