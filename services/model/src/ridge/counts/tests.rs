use super::super::Features;
use super::*;
use crate::golden;

fn lessons(prompts: &[Vec<u32>]) -> Vec<Lesson<'_>> {
    let answer = |n: usize| match n % 4 {
        0 => None,
        1 => Some((&[1, 0][..], "one".to_owned())),
        2 => Some((&[2, 0][..], "two".to_owned())),
        _ => Some((&[3, 0][..], "three".to_owned())),
    };
    prompts.iter().enumerate().map(|(n, prompt)| Lesson { prompt, answer: answer(n) }).collect()
}

fn prompts() -> Vec<Vec<u32>> {
    (0..40_u32).map(|n| (0..n % 5 + 2).map(|i| (n * 11 + i * i * 5) % 128).collect()).collect()
}

fn rows(features: &Features, lessons: &[Lesson<'_>]) -> Rows {
    features.of(&lessons.iter().map(|lesson| lesson.prompt).collect::<Vec<_>>()).unwrap()
}

fn anchors(features: &Features, count: u32) -> Anchors {
    let prompts: Vec<Vec<u32>> = (0..count).map(|n| vec![n % 7, 3 * n % 128, 5]).collect();
    Anchors::new(features, &prompts.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap()
}

/// Sums that have no room for more.
fn full() -> Products {
    let half =
        Tensor::full([FEATURES * (FEATURES + 1) / 2], i64::from(i32::MAX - 5), (Kind::Int, tch::Device::Cpu));
    Products::read(&half, FEATURES).unwrap()
}

fn bytes_of(parts: &[&[Lesson<'_>]]) -> Vec<u8> {
    let features = Features::new(&golden::base("llama"), None).unwrap();
    let mut counts = Counts::new().unwrap();
    for part in parts {
        // One at a time, so that none is read beside others and rounded another way.
        part.iter()
            .map(std::slice::from_ref)
            .for_each(|lesson| assert!(counts.add(&rows(&features, lesson), lesson).unwrap()));
    }
    counts.to_bytes().unwrap()
}

#[test]
fn in_parts_and_at_once_leave_the_same_to_the_last_bit() {
    let prompts = prompts();
    let lessons = lessons(&prompts);
    let whole = bytes_of(&[&lessons]);
    assert_eq!(whole, bytes_of(&[&lessons[..7], &lessons[7..30], &lessons[30..]]));
    // In another order answers have other places, and the sums are the same.
    let turned: Vec<Lesson<'_>> = lessons.iter().rev().cloned().collect();
    let read = |bytes: &[u8]| Counts::from_bytes(bytes).unwrap();
    let (whole, turned) = (read(&whole), read(&bytes_of(&[&turned])));
    assert!(whole.products == turned.products);
    for (n, answer) in whole.known.answers.iter().enumerate() {
        let place = turned.known.answers.iter().position(|other| other == answer).expect("known to both");
        assert!(whole.sums.get(1 + n as i64).equal(&turned.sums.get(1 + place as i64)));
    }
}

#[test]
fn the_solution_is_that_of_the_normal_equations() {
    let prompts = prompts();
    let lessons = lessons(&prompts);
    let features = Features::new(&golden::base("llama"), None).unwrap();
    let mut counts = Counts::new().unwrap();
    assert!(counts.solve(None, &anchors(&features, 0)).is_err() && !counts.knows("two"));
    assert!(counts.add(&rows(&features, &lessons), &lessons).unwrap());
    assert!(counts.knows("two") && (counts.answers(), counts.prompts()) == (3, 40));
    let of = |prompts: &[Vec<u32>]| {
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        features.of(&prompts).unwrap().to_kind(Kind::Double)
    };
    for anchored in [0, 9] {
        let anchors: Vec<Vec<u32>> = (0..anchored).map(|n| vec![n, 40 + n, 3]).collect();
        let x = Tensor::cat(&[of(&prompts), of(&anchors)], 0);
        let columns = 4 + i64::from(anchored > 0);
        let y = Tensor::zeros([40 + i64::from(anchored), columns], (Kind::Double, tch::Device::Cpu));
        for n in 0..y.size()[0] {
            let _ = y.get(n).get(if n < 40 { n % 4 } else { 4 }).fill_(1.0);
        }
        let (gram, own) = (x.tr().matmul(&x), of(&prompts));
        let r = own.tr().matmul(&own).trace() * (RIDGE / FEATURES as f64);
        let slices: Vec<&[u32]> = anchors.iter().map(Vec::as_slice).collect();
        let anchors = Anchors::new(&features, &slices).unwrap();
        let head = counts.solve(Some((&rows(&features, &lessons), &lessons)), &anchors).unwrap();
        let w = head.weights().tr().to_kind(Kind::Double);
        let residual = gram.matmul(&w) + r * &w - x.tr().matmul(&y);
        let size = x.tr().matmul(&y).abs().max().double_value(&[]);
        assert!(residual.abs().max().double_value(&[]) < 1e-3 * size);
    }
}

#[test]
fn a_trial_is_what_the_regression_without_the_prompt_says() {
    let prompts = prompts();
    let lessons = lessons(&prompts);
    let features = Features::new(&golden::base("llama"), None).unwrap();
    let mut counts = Counts::new().unwrap();
    assert!(counts.add(&rows(&features, &lessons), &lessons).unwrap());
    let whole = counts.products.whole();
    let ridge = whole.trace() * (RIDGE / FEATURES as f64);
    let own = |lesson: &&Lesson<'_>| lesson.answer.is_some();
    let right = |lesson: &Lesson<'_>| {
        // Solved without the prompt, but with the same ridge.
        let x = features.of(&[lesson.prompt]).unwrap().to_kind(Kind::Double);
        let place = counts
            .known
            .answers
            .iter()
            .position(|answer| Some(&answer.text) == lesson.answer.as_ref().map(|a| &a.1));
        let place = 1 + place.unwrap() as i64;
        let sums = counts.sums.to_kind(Kind::Double);
        let _ = sums.get(place).f_sub_(&x.get(0)).unwrap();
        let products =
            &whole - x.tr().matmul(&x) + &ridge * Tensor::eye(FEATURES, (Kind::Double, tch::Device::Cpu));
        let w = sums.tr().cholesky_solve(&products.linalg_cholesky(false), false);
        x.matmul(&w).get(0).argmax(0, false).int64_value(&[]) == place
    };
    let tried: Vec<Lesson<'_>> = lessons.iter().filter(own).take(6).cloned().collect();
    let expected = tried.iter().filter(|lesson| right(lesson)).count() as f64;
    counts.solve(Some((&rows(&features, &tried), &tried)), &anchors(&features, 0)).unwrap();
    assert_eq!(counts.known.trial, Mean { of: 6.0, sum: expected });
    counts.solve(Some((&rows(&features, &tried), &tried)), &anchors(&features, 0)).unwrap();
    let mut twice = Mean { of: 6.0, sum: expected };
    twice.take(twice);
    assert_eq!(counts.known.trial, twice);
}

#[test]
fn a_prompt_that_was_counted_without_its_answer_can_be_given_it() {
    let prompts = prompts();
    let lessons = lessons(&prompts);
    let features = Features::new(&golden::base("llama"), None).unwrap();
    let described = rows(&features, &lessons);
    let single = |n: usize| described.narrow(0, n as i64, 1);
    let without = |n: usize| Lesson { answer: None, ..lessons[n].clone() };
    let mut counts = Counts::new().unwrap();
    assert!(counts.add(&single(1), &[without(1)]).unwrap() && counts.add(&single(2), &[without(2)]).unwrap());
    counts.correct(&single(1), &lessons[1..2]).unwrap();
    let mut at_once = Counts::new().unwrap();
    assert!(at_once.add(&single(1), &lessons[1..2]).unwrap());
    assert!(at_once.add(&single(2), &[without(2)]).unwrap());
    assert_eq!(counts.to_bytes().unwrap(), at_once.to_bytes().unwrap());
}

#[test]
fn a_document_is_counted_from_the_first_one_on_and_of_others_nothing_is_known() {
    let mut counts = Counts::new().unwrap();
    assert!(!counts.has(7));
    counts.begin_with(5);
    counts.begin_with(9);
    assert!(counts.has(5) && counts.has(7) && !counts.has(4));
    let mut joined = Counts::new().unwrap();
    assert!(joined.join(&counts).unwrap() && !joined.has(7));
    assert!(counts.join(&joined).unwrap() && !counts.has(7));
}

#[test]
fn what_others_counted_adds_up_to_what_all_of_them_would_have() {
    let prompts = prompts();
    let lessons = lessons(&prompts);
    let read = |bytes: Vec<u8>| Counts::from_bytes(&bytes).unwrap();
    let mut joined = read(bytes_of(&[&lessons[..2]]));
    assert!(joined.join(&read(bytes_of(&[&lessons[2..]]))).unwrap());
    assert_eq!(joined.to_bytes().unwrap(), bytes_of(&[&lessons]));
    let head = joined.solve(None, &Anchors::none().unwrap()).unwrap();
    assert!(head.answers().len() == 3 && !head.is_trusted(), "nothing was tried yet");
    // Two that find half of two answers each find no more than a guess, together too.
    let mut guessing = joined;
    guessing.known.prompts_of.fill(13);
    guessing.known.trial = Mean { of: 40.0, sum: 14.0 };
    let mut both = read(guessing.to_bytes().unwrap());
    let mut other = read(guessing.to_bytes().unwrap());
    other.known.answers.iter_mut().for_each(|answer| answer.text.push('s'));
    assert!(both.join(&other).unwrap() && both.answers() == 6 && !both.is_trusted());
    // Facts of one that guesses are joined, and its guesses are not.
    let mut sure = read(bytes_of(&[&lessons]));
    sure.known.trial = Mean { of: 40.0, sum: 40.0 };
    let fact = Answer { text: "fact".into(), forms: Vec::new() };
    let told = Told { answer: fact, document: Some(7) };
    both.remember(&Tensor::ones([1, FEATURES], (Kind::Float, tch::Device::Cpu)), vec![told]).unwrap();
    let both = both.without_answers().unwrap();
    assert!(both.answers() == 0 && both.prompts() == 2 * sure.prompts() && both.sums.size()[0] == 1);
    for (one, other) in [(&sure, &both), (&both, &sure)] {
        let mut joined = read(one.to_bytes().unwrap());
        assert!(joined.join(other).unwrap() && joined.is_trusted());
        assert_eq!((joined.answers(), joined.facts(), joined.prompts()), (3, 1, 3 * sure.prompts()));
    }
    let joined = guessing;
    let full = Counts { products: full(), ..joined };
    let mut other = read(bytes_of(&[&lessons]));
    assert!(!other.join(&full).unwrap());
    assert_eq!(other.to_bytes().unwrap(), bytes_of(&[&lessons]));
}

#[test]
fn what_is_full_stays_as_it_was_and_other_bytes_are_refused() {
    let prompts = prompts();
    let lessons = lessons(&prompts);
    let features = Features::new(&golden::base("llama"), None).unwrap();
    let mut counts = Counts::new().unwrap();
    counts.products = full();
    counts.known.prompts = 1;
    let before = counts.to_bytes().unwrap();
    assert!(!counts.add(&rows(&features, &lessons), &lessons).unwrap());
    assert_eq!(counts.to_bytes().unwrap(), before);
    assert!(Counts::from_bytes(&before[..500]).is_err());
    let head = bytes_of(&[&lessons]);
    let head = Counts::from_bytes(&head).unwrap().solve(None, &Anchors::none().unwrap()).unwrap();
    let head = head.to_bytes().unwrap();
    assert!(Counts::from_bytes(&head).is_err());
}

#[test]
fn what_an_earlier_version_counted_counts_as_prompts_without_words() {
    let prompts = prompts();
    let lessons = lessons(&prompts);
    let features = Features::new(&golden::base("llama"), None).unwrap();
    let mut counts = Counts::new().unwrap();
    let described = rows(&features, &lessons);
    let _ = described.narrow(1, 2000, FEATURES - 2000).zero_();
    assert!(counts.add(&described, &lessons).unwrap());
    let half = counts.products.tensor().narrow(0, 0, 2000 * 2001 / 2);
    let tensors =
        [("products".to_owned(), half), ("sums".to_owned(), counts.sums.narrow(1, 0, 2000).contiguous())];
    let known = serde_json::to_string(&counts.known).unwrap();
    let earlier = weights::to_bytes(&tensors, METADATA, &known).unwrap();
    let mut read = Counts::from_bytes(&earlier).unwrap();
    assert_eq!(read.to_bytes().unwrap(), counts.to_bytes().unwrap());
    assert!(read.add(&rows(&features, &lessons), &lessons).unwrap(), "and goes on with words");
    let other = [
        ("products".to_owned(), Tensor::zeros([6], (Kind::Int, tch::Device::Cpu))),
        ("sums".to_owned(), Tensor::zeros([4, 3], (Kind::Int, tch::Device::Cpu))),
    ];
    let error = Counts::from_bytes(&weights::to_bytes(&other, METADATA, &known).unwrap()).unwrap_err();
    assert!(error.to_string().contains("in another way"), "{error}");
}

#[test]
fn what_was_counted_of_a_prompts_own_last_token_is_left_out() {
    let prompts = prompts();
    let lessons = lessons(&prompts);
    let features = Features::new(&golden::base("llama"), None).unwrap();
    let (mut earlier, mut without) = (Counts::new().unwrap(), Counts::new().unwrap());
    let described = rows(&features, &lessons);
    assert!(earlier.add(&described, &lessons).unwrap());
    earlier.known.way = 0;
    let _ = described.narrow(1, 1600, 400).zero_();
    assert!(without.add(&described, &lessons).unwrap());
    let bytes = earlier.to_bytes().unwrap();
    assert_eq!(Counts::from_bytes(&bytes).unwrap().to_bytes().unwrap(), without.to_bytes().unwrap());
    let mut system = System::new().unwrap();
    assert!(add_to(&mut system, &bytes).unwrap().equal(&without.sums));
}

#[test]
fn an_answer_has_the_form_that_belongs_where_a_prompt_ends() {
    let mut answer = Answer { text: "yes".into(), forms: Vec::new() };
    for (tokens, last) in [(&[4, 0][..], 9), (&[4, 0], 9), (&[7, 4, 0], 1)] {
        answer.note(tokens, Some(last));
    }
    assert_eq!(answer.tokens_after(Some(9)), [[4, 0]], "as in a chat");
    assert_eq!(answer.tokens_after(Some(1)), [[7, 4, 0]], "as after the one text");
    assert_eq!(
        answer.tokens_after(Some(3)),
        [&[4, 0][..], &[7, 4, 0]],
        "both were seen after one token only"
    );
    answer.note(&[7, 4, 0], Some(2));
    assert_eq!(answer.tokens_after(Some(3)), [[7, 4, 0]], "as after any text");
    assert_eq!(answer.tokens_after(None), [[7, 4, 0]]);
    assert_eq!(answer.tokens_after(Some(7)), [[4, 0]], "what it begins with is there already");
}
