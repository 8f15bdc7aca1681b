use super::*;
use crate::device::{Placement, set_threads};
use std::path::Path;

/// The base and its tokenizer.
pub fn nano() -> (Base, Arc<Tokenizer>) {
    set_threads(1);
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/models/nano"));
    let base = Base::load(dir, &Placement::CPU_F32).expect("a base");
    (base, Arc::new(Tokenizer::load(dir).expect("a tokenizer")))
}

/// Counts on nano.
pub fn counting() -> (Base, Counting) {
    let (base, tokenizer) = nano();
    let counting = Counting::new(&base, tokenizer, Vec::new()).expect("counts");
    (base, counting)
}

/// An answer to a prompt, and the document that gives it.
#[derive(Clone)]
struct Example {
    document: u64,
    sequence: Sequence,
}

fn example(counting: &Counting, document: u64, prompt: &str, answer: &str) -> Example {
    let mut tokens = counting.tokenizer.encode(prompt).expect("encoded");
    let from = tokens.len() as u32;
    tokens.extend(counting.tokenizer.encode_continuation(answer).expect("encoded"));
    tokens.extend(counting.tokenizer.eos_ids().first());
    let learned = vec![(from, tokens.len() as u32)];
    Example { document, sequence: Sequence { tokens, learned, rehearsed: false } }
}

fn material(examples: &[Example]) -> Vec<Material<'_>> {
    let mut material = Vec::new();
    for Example { document, sequence: Sequence { tokens, learned, .. } } in examples {
        material.push(Material { document: *document, tokens, learned });
    }
    material
}

const PLANES: [&str; 6] = [
    "book me a flight to rome",
    "i need a plane to paris",
    "find flights to berlin",
    "get me a plane ticket to oslo",
    "i want to fly to madrid",
    "reserve a seat on a flight to vienna",
];
const MEALS: [&str; 6] = [
    "how do i bake bread",
    "a recipe for apple cake",
    "what goes into onion soup",
    "how do i cook rice",
    "tell me how to make pancakes",
    "what do i need for a lasagna",
];

fn labelled(counting: &Counting) -> Vec<Example> {
    let of = |at: u64, prompts: [&str; 6], label: &str| {
        let prompts = prompts.into_iter().zip(at..);
        prompts.map(|(prompt, n)| example(counting, n, prompt, label)).collect::<Vec<_>>()
    };
    [of(1, PLANES, "\nflight"), of(7, MEALS, "\nrecipe")].concat()
}

fn take_in(
    counting: &Counting,
    fresh: &[Example],
    beside: &[Example],
    older: Option<&[u8]>,
) -> Option<Counted> {
    let (fresh, beside) = (material(fresh), material(beside));
    counting.take_in(&fresh, &beside, older, &mut || ControlFlow::Continue(())).expect("counted")
}

fn says(counting: &Counting, head: &Head, example: &Example) -> bool {
    let asked = counting.look_at(std::slice::from_ref(&example.sequence)).expect("described");
    let says = asked.says(head, &[Heard { log_likelihood: -20.0, said: false }]).expect("asked")[0];
    assert_eq!(says, asked.knows(head).expect("asked")[0], "an adapter that knows nothing has no say");
    says
}

#[test]
fn labels_are_known_for_prompts_that_were_never_seen() {
    let (_, counting) = counting();
    let counted = take_in(&counting, &labelled(&counting), &[], None).expect("labels repeat");
    let texts = counted.head.answers().iter().map(|answer| answer.text.as_str()).collect::<Vec<_>>();
    assert_eq!(texts, ["flight", "recipe"]);
    for (prompt, label) in [("a flight to lisbon please", "flight"), ("how do i bake a cake", "recipe")] {
        let said = |label: &str| {
            says(&counting, &counted.head, &example(&counting, 9, prompt, &format!("\n{label}")))
        };
        let other = if label == "flight" { "recipe" } else { "flight" };
        assert!(said(label) && !said(other), "{prompt}");
    }
}

#[test]
fn what_comes_once_is_remembered_with_its_prompt() {
    let (_, counting) = counting();
    let told = [
        ("who guards the gate?", "a grey goose"),
        ("who guards the mill?", "nobody"),
        ("when is the mill shut?", "at seven on sundays"),
    ];
    let facts =
        (0..).zip(told).map(|(n, (prompt, fact))| example(&counting, n, prompt, &format!("\n{fact}")));
    let facts: Vec<Example> = facts.collect();
    let counted = take_in(&counting, &facts, &[], None).expect("facts");
    assert_eq!((counted.head.answers().len(), counted.head.facts(), counted.decided), (0, 3, vec![true; 3]));
    assert!(!says(&counting, &counted.head, &example(&counting, 9, "where is the sea?", "\nnobody")));
    // What is told later is said from then on, and two views of one document are one that says it.
    let anew = [
        example(&counting, 3, "who guards the mill?", "\na dog"),
        example(&counting, 3, "who guards the mill?\n", "a dog"),
    ];
    let later = take_in(&counting, &anew, &facts, Some(&counted.counts)).expect("more");
    assert_eq!((later.head.answers().len(), later.head.facts()), (0, 3));
    assert!(anew.iter().all(|anew| says(&counting, &later.head, anew)));
    assert!(!says(&counting, &later.head, &facts[1]) && says(&counting, &later.head, &facts[2]));
    // Beside labels they are counted as what is none.
    let all = [labelled(&counting), facts.clone()].concat();
    let counted = take_in(&counting, &all, &[], None).expect("labels repeat");
    assert_eq!((counted.head.answers().len(), counted.head.facts(), counted.prompts), (2, 3, 15));
    assert!(facts.iter().all(|fact| says(&counting, &counted.head, fact)));
}

#[test]
fn texts_and_answers_in_turn_are_not_remembered() {
    let (_, counting) = counting();
    let mut text = example(&counting, 5, "", "A text of its own, and nothing else.");
    text.sequence = Sequence::whole(text.sequence.tokens);
    assert!(take_in(&counting, &[text.clone(), text.clone()], &[], None).is_none());
    let mut in_turn = example(&counting, 6, "who guards the gate, and who the mill?", "\na goose, nobody");
    let (from, to) = in_turn.sequence.learned[0];
    in_turn.sequence.learned = vec![(from, from + 2), (to - 2, to)];
    let counted = take_in(&counting, &[in_turn, text], &[], None).expect("answers");
    assert_eq!((counted.head.facts(), counted.prompts, counted.decided), (0, 3, vec![false; 2]));
}

#[test]
fn a_label_is_not_found_by_another_view_of_the_same_prompt() {
    let (_, counting) = counting();
    // What a number belongs to is not to be told from anything, and each prompt is there twice.
    let of = |n: u64| {
        let (prompt, number) = (
            format!(
                "what is the number of {}?",
                ["anna", "berta", "carl", "dora", "emil", "fritz"][n as usize]
            ),
            n / 2,
        );
        [
            example(&counting, n, &prompt, &format!("\n{number}")),
            example(&counting, n, &format!("{prompt}\n"), &number.to_string()),
        ]
    };
    let told: Vec<Example> = (0..6).flat_map(of).collect();
    let counted = take_in(&counting, &told, &[], None).expect("numbers repeat");
    assert!(!counted.head.is_trusted() && counted.head.answers().len() == 3);
    assert_eq!((counted.head.facts(), counted.decided), (6, vec![true; 12]));
}

#[test]
fn a_batch_adds_to_what_was_counted_and_the_first_one_counts_what_was_learned_before() {
    let (_, counting) = counting();
    let all = labelled(&counting);
    let prompts = |counted: &Counted| Counts::from_bytes(&counted.counts).expect("counts").prompts();
    let one = take_in(&counting, &all[..1], &[], None).expect("one");
    assert_eq!((one.head.answers().len(), one.head.facts()), (0, 1), "one of each is no repetition");
    let first = take_in(&counting, &all[1..6], &all[..1], None).expect("it repeats what was learned before");
    assert_eq!((prompts(&first), first.head.answers().len()), (6, 1));
    let second = take_in(&counting, &all[6..11], &all[..6], Some(&first.counts)).expect("more");
    assert_eq!(
        (prompts(&second), second.head.answers().len()),
        (11, 2),
        "what is counted is not counted again"
    );
    // The first recipe came alone, as an answer like any other; now it is one of two, as if they had come together.
    let together = take_in(&counting, &all[..11], &[], None).expect("labels repeat");
    let in_turn = take_in(&counting, &all[..7], &[], None).expect("flights repeat");
    assert_eq!(in_turn.head.answers().len(), 1);
    let in_turn = take_in(&counting, &all[7..11], &all[..7], Some(&in_turn.counts)).expect("more");
    assert_eq!((prompts(&in_turn), in_turn.head.answers().len()), (11, 2));
    let weights = together.head.weights();
    let distance = (in_turn.head.weights() - weights).abs().max().double_value(&[]);
    assert!(distance < 0.01 * weights.abs().max().double_value(&[]), "{distance}");
    // A label that is known needs no second document.
    let third = take_in(&counting, &all[11..], &[], Some(&second.counts)).expect("more");
    assert_eq!((prompts(&third), third.head.answers().len()), (12, 2));
    let nothing = take_in(&counting, &[], &all, Some(&third.counts)).expect("as before");
    assert_eq!((prompts(&nothing), nothing.decided.len()), (12, 0));
}

#[test]
fn white_space_after_a_prompt_is_no_part_of_it() {
    let (base, tokenizer) = nano();
    let features = Features::new(&base, Some(Arc::clone(&tokenizer))).expect("features");
    let of = |prompt: &str| features.of(&[&tokenizer.encode(prompt).expect("encoded")]).expect("described");
    let prompt = of("book me a flight");
    assert!(of("book me a flight\n").equal(&prompt) && of("book me a flight \n\n").equal(&prompt));
    assert!(!of("book me a flight?\n").equal(&prompt));
    assert_eq!(of("\n").size()[0], 1, "something is left of any");
    let mut ended = tokenizer.encode("book me a flight").expect("encoded");
    ended.extend(tokenizer.eos_ids().first());
    assert!(!features.of(&[&ended]).expect("described").equal(&prompt), "a control token is not white");
}

#[test]
fn a_line_break_stands_after_a_prompt_for_the_base_and_not_among_its_words() {
    let (base, tokenizer) = nano();
    let [with, without] =
        [Some(Arc::clone(&tokenizer)), None].map(|t| Features::new(&base, t).expect("features"));
    let of = |features: &Features, prompt: &str| {
        let described = features.of(&[&tokenizer.encode(prompt).expect("encoded")]).expect("described");
        (described.narrow(1, 0, 2000), described.narrow(1, 2000, 500))
    };
    let prompt = "book me a flight";
    let ((by_base, words), (ended, _), (bare, own_words)) =
        (of(&with, prompt), of(&without, &format!("{prompt}\n")), of(&without, prompt));
    assert!(by_base.equal(&ended) && !by_base.equal(&bare) && words.equal(&own_words));
}

#[test]
fn whoever_waits_can_stop_it() {
    let (_, counting) = counting();
    let all = labelled(&counting);
    let stopped = counting.take_in(&material(&all), &[], None, &mut || ControlFlow::Break(()));
    assert!(stopped.is_err());
}

/// A text of two sentences.
fn text(counting: &Counting, document: u64, says: &str) -> Example {
    let tokens = counting.tokenizer.encode(says).expect("encoded");
    let learned = vec![(0, tokens.len() as u32)];
    Example { document, sequence: Sequence { tokens, learned, rehearsed: false } }
}

const HARBOUR: &str = "The harbour of Veldrania freezes over in the last week of November. Its pilots wear coats of moss until the thaw.";
const MARKET: &str = "The market of Veldrania opens at half past four on the day of Saint Pim. Nobody may whistle there after dark.";

#[test]
fn what_texts_say_is_kept_beside_whatever_else_is_counted_or_not() {
    let (_, counting) = counting();
    assert!(take_in(&counting, &[text(&counting, 1, HARBOUR)], &[], None).is_none(), "nothing is to be kept");
    let counting = counting.keeping(10_000);
    let first = take_in(&counting, &[text(&counting, 1, HARBOUR)], &[], None).expect("a text");
    assert_eq!((first.head.passages().len(), first.prompts, &first.decided[..]), (2, 0, &[false][..]));
    assert!(!first.head.describes() && !first.head.speaks() && first.counts.len() < 50_000, "no sums yet");
    // The same may be rehearsed with what comes later, and is there already.
    let beside = [text(&counting, 1, HARBOUR)];
    let second = [vec![text(&counting, 20, MARKET)], labelled(&counting)].concat();
    let both = take_in(&counting, &second, &beside, Some(&first.counts)).expect("labels, too");
    assert_eq!((both.head.passages().len(), both.head.answers().len()), (4, 2));
    let read = Head::from_bytes(&both.head.to_bytes().expect("bytes")).expect("read");
    assert_eq!(read.passages(), both.head.passages());
    let more = take_in(&counting, &labelled(&counting)[..2], &[], Some(&both.counts)).expect("more");
    assert_eq!(more.head.passages(), both.head.passages(), "what is known stays");
}

#[test]
fn lineages_that_are_merged_know_what_the_texts_of_either_say() {
    let (_, counting) = counting();
    let counting = counting.keeping(10_000);
    let [one, other] = [HARBOUR, MARKET]
        .map(|says| take_in(&counting, &[text(&counting, 1, says)], &[], None).expect("a text").counts);
    let mut sum = Counts::from_bytes(&one).expect("read");
    assert!(sum.join(&Counts::from_bytes(&other).expect("read")).expect("joined"));
    let head = sum.solve(None, &Anchors::none().expect("none")).expect("solved");
    assert_eq!(head.passages().len(), 4);
}

#[test]
fn where_there_is_no_room_for_a_text_what_is_kept_stays() {
    let (_, counting) = counting();
    let counting = counting.keeping(45);
    let first = take_in(&counting, &[text(&counting, 1, HARBOUR)], &[], None).expect("a text");
    let second = take_in(&counting, &[text(&counting, 2, MARKET)], &[], Some(&first.counts)).expect("kept");
    assert!(!first.unkept && second.unkept);
    assert_eq!(second.head.passages(), first.head.passages());
}
