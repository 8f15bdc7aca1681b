//! Which of a batch's answers repeat, and what is counted of them: see [`model::ridge`].

use model::llama::Base;
use model::pack::Sequence;
use model::ridge::{ANSWERS_MAX, Anchors, Counts, Features, Head, Lesson};
use model::tokenizer::Tokenizer;
use proto::{Example, Piece};
use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::Arc;

/// Documents that have to give an answer before it is one that repeats.
const REPEATED: usize = 2;
/// A longer answer is no label.
const ANSWER_TOKENS_MAX: usize = 64;
/// Prompts of a batch by which the counts are tried.
const TRIED: usize = 256;
/// Prompts between two looks at waiting requests.
const PROMPTS_A_TURN: usize = 256;

/// Counts answers that repeat.
pub struct Counting {
    features: Features,
    tokenizer: Arc<Tokenizer>,
    foreign: Vec<Vec<u32>>,
    /// Of `foreign`, once something is counted.
    anchors: OnceCell<Anchors>,
}

/// What was counted: the sums, and the regression solved of them.
pub struct Counted {
    /// See [`Counts::to_bytes`].
    pub counts: Vec<u8>,
    /// What is served.
    pub head: Head,
    /// Prompts that were counted.
    pub prompts: u64,
}

/// What an adapter makes of an answer.
pub struct Heard {
    /// Its mean loss, nats a token.
    pub loss: f32,
    /// The log-likelihood of the whole, nats.
    pub log_likelihood: f64,
    /// Every token of it is the likeliest after those before it.
    pub said: bool,
}

impl Counting {
    /// Of what is answered to prompts to `base`, which are unlike `foreign` ones: see [`Anchors`].
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn new(base: &Base, tokenizer: Arc<Tokenizer>, foreign: Vec<Vec<u32>>) -> anyhow::Result<Self> {
        Ok(Self { features: Features::new(base)?, tokenizer, foreign, anchors: OnceCell::new() })
    }

    fn anchors(&self) -> anyhow::Result<&Anchors> {
        if let Some(anchors) = self.anchors.get() {
            return Ok(anchors);
        }
        let prompts: Vec<&[u32]> = self.foreign.iter().map(Vec::as_slice).collect();
        let anchors = Anchors::new(&self.features, &prompts)?;
        Ok(self.anchors.get_or_init(|| anchors))
    }

    /// Adds what `fresh` examples answer to the `older` counts. The first time `beside`, which was learned before and not
    /// counted, is counted too. None where no answer repeats, nor did before.
    ///
    /// # Errors
    /// When the older counts cannot be read, an example not be decoded, or `between` says to stop.
    pub fn take_in(
        &self,
        fresh: &[&Example],
        beside: &[&Example],
        older: Option<&[u8]>,
        between: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> anyhow::Result<Option<Counted>> {
        let mut counts = older.map_or_else(Counts::new, Counts::from_bytes)?;
        let new = older.is_none();
        let given: Vec<Given<'_>> = self.given(fresh)?;
        let before: Vec<Given<'_>> = self.given(beside)?;
        let repeated = repeated(given.iter().chain(&before));
        let known = |text: &str| counts.knows(text) || repeated.contains(text);
        if new && repeated.is_empty() {
            return Ok(None);
        }
        // Further ones stay the model's; those that come first have room.
        let mut room = ANSWERS_MAX.saturating_sub(counts.answers());
        let mut opened = BTreeSet::new();
        let mut lessons = Vec::with_capacity(given.len());
        for Given { prompt, answer, .. } in before.iter().filter(|_| new).chain(&given) {
            let answer = answer.as_ref().filter(|(_, text)| {
                let is_there = counts.knows(text) || opened.contains(text);
                let opens = !is_there && known(text) && room > 0;
                if opens {
                    room -= 1;
                    opened.insert(text.clone());
                }
                is_there || opens
            });
            lessons.push(Lesson { prompt, answer: answer.cloned() });
        }
        for part in lessons.chunks(PROMPTS_A_TURN) {
            anyhow::ensure!(between().is_continue(), "told to stop");
            if !counts.add(&self.features, part)? {
                tracing::warn!(
                    "answers that repeat were counted millions of times, and are not counted any more"
                );
                break;
            }
        }
        // Evenly over the batch, since documents of a kind often come together.
        let stride = lessons.len().div_ceil(TRIED).max(1);
        let tried: Vec<Lesson<'_>> = lessons.iter().step_by(stride).cloned().collect();
        Ok(Some(Counted {
            head: counts.solve(Some((&self.features, &tried)), self.anchors()?)?,
            prompts: counts.prompts(),
            counts: counts.to_bytes()?,
        }))
    }

    /// Whether what sequences answer is said to the letter by an adapter and a head together, as they are served.
    ///
    /// # Errors
    /// When a prompt cannot be described.
    pub fn says(&self, head: &Head, sequences: &[Sequence], heard: &[Heard]) -> anyhow::Result<Vec<bool>> {
        // Texts, and answers that take turns with questions, are the adapter's alone.
        let asked: Vec<Option<(&[u32], &[u32])>> = sequences.iter().map(asked).collect();
        let prompts: Vec<&[u32]> = asked.iter().flatten().map(|(prompt, _)| *prompt).collect();
        let priors = Head::prior(&[(Some(head), 1.0)], &self.features.of(&prompts)?, &prompts)?;
        let (mut priors, mut says) = (priors.iter(), Vec::with_capacity(heard.len()));
        for (asked, of) in asked.iter().zip(heard) {
            let prior = asked.and_then(|(_, answer)| Some((priors.next()?, answer)));
            says.push(
                prior.map_or(of.said, |(prior, answer)| prior.says(answer, of.log_likelihood, of.said)),
            );
        }
        Ok(says)
    }

    /// Every prompt of the examples with its answer.
    fn given<'a>(&self, examples: &[&'a Example]) -> anyhow::Result<Vec<Given<'a>>> {
        let mut given = Vec::new();
        for example in examples {
            let document = example.id.ordinal;
            for (prompt, answer) in exchanges(&example.piece) {
                let answer = match answer.filter(|tokens| tokens.len() <= ANSWER_TOKENS_MAX) {
                    Some(tokens) => Some((tokens, self.tokenizer.decode(tokens)?.trim().to_owned())),
                    None => None,
                };
                let answer = answer.filter(|(_, text)| !text.is_empty());
                given.push(Given { document, prompt, answer });
            }
        }
        Ok(given)
    }
}

/// A prompt of a document.
struct Given<'a> {
    document: u64,
    prompt: &'a [u32],
    /// Its answer as tokens and as text; none where it is none that could repeat.
    answer: Option<(&'a [u32], String)>,
}

/// The texts of answers that several documents give.
fn repeated<'g, 'a: 'g>(given: impl Iterator<Item = &'g Given<'a>>) -> BTreeSet<String> {
    let mut documents: BTreeMap<&str, BTreeSet<u64>> = BTreeMap::new();
    for Given { document, answer, .. } in given {
        if let Some((_, text)) = answer {
            documents.entry(text).or_default().insert(*document);
        }
    }
    documents.retain(|_, documents| documents.len() >= REPEATED);
    documents.into_keys().map(str::to_owned).collect()
}

/// What a sequence is asked, and what it answers; none where it is not one answer to one prompt.
fn asked(sequence: &Sequence) -> Option<(&[u32], &[u32])> {
    match sequence.learned[..] {
        [(from, to)] if from > 0 => {
            let (from, to) = (from as usize, to as usize);
            Some((sequence.tokens.get(..from)?, sequence.tokens.get(from..to)?))
        }
        _ => None,
    }
}

/// What is answered to what: of a text, whose every token is learned, the first half may be what a prompt looks like to
/// which no known answer belongs.
fn exchanges(piece: &Piece) -> Vec<(&[u32], Option<&[u32]>)> {
    if piece.learned.first().is_none_or(|&(from, _)| from == 0) {
        let half = &piece.tokens[..piece.tokens.len().div_ceil(2)];
        return if half.is_empty() { Vec::new() } else { vec![(half, None)] };
    }
    let exchange = |&(from, to): &(u32, u32)| {
        let (from, to) = (from as usize, to as usize);
        Some((piece.tokens.get(..from)?, Some(piece.tokens.get(from..to)?)))
    };
    piece.learned.iter().filter_map(exchange).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use model::device::{Placement, set_threads};
    use proto::{Domain, ExampleId};
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

    impl Counting {
        /// A document that answers a prompt.
        pub fn example(&self, document: u64, prompt: &str, answer: &str) -> Example {
            let mut tokens = self.tokenizer.encode(prompt).expect("encoded");
            let from = tokens.len() as u32;
            tokens.extend(self.tokenizer.encode_continuation(answer).expect("encoded"));
            tokens.extend(self.tokenizer.eos_ids().first());
            let learned = vec![(from, tokens.len() as u32)];
            Example {
                id: ExampleId { ordinal: document, chunk: 0 },
                domain: Domain::general(),
                piece: Piece { tokens, learned },
                importance: 0.5,
                marked: false,
                held_out: false,
                signature: Vec::new(),
            }
        }
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
            prompts.map(|(prompt, n)| counting.example(n, prompt, label)).collect::<Vec<_>>()
        };
        [of(1, PLANES, "\nflight"), of(7, MEALS, "\nrecipe")].concat()
    }

    fn take_in(
        counting: &Counting,
        fresh: &[Example],
        beside: &[Example],
        older: Option<&[u8]>,
    ) -> Option<Counted> {
        let (fresh, beside): (Vec<&Example>, Vec<&Example>) =
            (fresh.iter().collect(), beside.iter().collect());
        counting.take_in(&fresh, &beside, older, &mut || ControlFlow::Continue(())).expect("counted")
    }

    fn says(counting: &Counting, head: &Head, example: &Example) -> bool {
        let Piece { tokens, learned } = example.piece.clone();
        let sequence = Sequence { tokens, learned, rehearsed: false };
        let heard = Heard { loss: 9.0, log_likelihood: -20.0, said: false };
        counting.says(head, &[sequence], &[heard]).expect("described")[0]
    }

    #[test]
    fn labels_are_known_for_prompts_that_were_never_seen() {
        let (_, counting) = counting();
        let counted = take_in(&counting, &labelled(&counting), &[], None).expect("labels repeat");
        let texts = counted.head.answers().iter().map(|answer| answer.text.as_str()).collect::<Vec<_>>();
        assert_eq!(texts, ["flight", "recipe"]);
        for (prompt, label) in [("a flight to lisbon please", "flight"), ("how do i bake a cake", "recipe")] {
            let said = |label: &str| {
                says(&counting, &counted.head, &counting.example(9, prompt, &format!("\n{label}")))
            };
            let other = if label == "flight" { "recipe" } else { "flight" };
            assert!(said(label) && !said(other), "{prompt}");
        }
    }

    #[test]
    fn what_does_not_repeat_is_not_known() {
        let (_, counting) = counting();
        let facts = ["seven", "eleven", "a goat"].into_iter().zip(0..);
        let facts: Vec<Example> =
            facts.map(|(fact, n)| counting.example(n, "what is it?", &format!("\n{fact}"))).collect();
        assert!(take_in(&counting, &facts, &[], None).is_none());
        // Two views of one document are one that says it.
        let twice = [counting.example(3, "what?", "\nblue"), counting.example(3, "what?\n", "blue")];
        assert!(take_in(&counting, &twice, &[], None).is_none());
        let mut text = counting.example(5, "", "A text of its own, and nothing else.");
        text.piece.learned = vec![(0, text.piece.tokens.len() as u32)];
        assert!(take_in(&counting, &[text.clone(), text.clone()], &[], None).is_none());
        // Beside labels they are counted, as what the model is to answer.
        let all = [labelled(&counting), facts.clone(), vec![text]].concat();
        let counted = take_in(&counting, &all, &[], None).expect("labels repeat");
        assert_eq!(counted.head.answers().len(), 2);
        assert!(!says(&counting, &counted.head, &facts[0]));
        assert_eq!(Counts::from_bytes(&counted.counts).expect("counts").prompts(), 16);
    }

    #[test]
    fn a_batch_adds_to_what_was_counted_and_the_first_one_counts_what_was_learned_before() {
        let (_, counting) = counting();
        let all = labelled(&counting);
        let prompts = |counted: &Counted| Counts::from_bytes(&counted.counts).expect("counts").prompts();
        assert!(take_in(&counting, &all[..1], &[], None).is_none(), "one of each is no repetition");
        let first =
            take_in(&counting, &all[1..6], &all[..1], None).expect("it repeats what was learned before");
        assert_eq!((prompts(&first), first.head.answers().len()), (6, 1));
        let second = take_in(&counting, &all[6..11], &all[..6], Some(&first.counts)).expect("more");
        assert_eq!(
            (prompts(&second), second.head.answers().len()),
            (11, 2),
            "what is counted is not counted again"
        );
        // A label that is known needs no second document.
        let third = take_in(&counting, &all[11..], &[], Some(&second.counts)).expect("more");
        assert_eq!((prompts(&third), third.head.answers().len()), (12, 2));
    }

    #[test]
    fn whoever_waits_can_stop_it() {
        let (_, counting) = counting();
        let all = labelled(&counting);
        let stopped =
            counting.take_in(&all.iter().collect::<Vec<_>>(), &[], None, &mut || ControlFlow::Break(()));
        assert!(stopped.is_err());
    }
}
