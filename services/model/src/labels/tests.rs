use super::*;
use crate::golden;
use crate::lora::Adapter;
use crate::loss;
use crate::pack::Sequence;

#[test]
fn the_choice_is_that_of_every_answer_scored_alone() {
    let base = golden::base("llama");
    let adapter = golden::adapter("peft-r8");
    // Answers of one to four tokens, many of which begin alike.
    let answers: Vec<Vec<u32>> =
        (0..40_u32).map(|n| (0..=n % 4).map(|i| (n / (4 - i) * 7 + i * 13) % 128).collect()).collect();
    let texts: Vec<Vec<u32>> = (2..12_u32).map(|n| (0..n).map(|i| (i * 11 + n) % 128).collect()).collect();
    // And such that all begin with the same two.
    let alike: Vec<Vec<u32>> = answers.iter().map(|answer| [&[5, 9], answer.as_slice()].concat()).collect();
    for answers in [answers, alike] {
        check(&base, &adapter, &answers, &texts);
    }
}

fn check(base: &Base, adapter: &Adapter, answers: &[Vec<u32>], texts: &[Vec<u32>]) {
    let active = base.activate(&[(adapter, 1.0)]).unwrap();
    let labels = Labels::new(answers).unwrap();
    let groups = [(0..40).collect(), (0..40).filter(|n| n % 3 == 0).collect::<Vec<_>>(), vec![7]];
    let alone = |text: &[u32], answer: &[u32], rule: Rule| {
        let tokens = [text, answer].concat();
        let learned = vec![(text.len() as u32, tokens.len() as u32)];
        let sequence = Sequence { tokens, learned, rehearsed: false };
        let score = loss::score(base, &[(adapter, 1.0)], &[sequence], 64).unwrap()[0];
        if rule == Rule::Sum { -score.nll_sum } else { -score.mean() }
    };
    for rule in [Rule::Sum, Rule::Mean] {
        let chosen = labels.likeliest(base, &active, texts, &[], &groups, rule).unwrap();
        for (text, chosen) in texts.iter().zip(&chosen) {
            let alone: Vec<f64> = answers.iter().map(|answer| alone(text, answer, rule)).collect();
            for (group, &(answer, score)) in groups.iter().zip(chosen) {
                let best = group.iter().map(|&n| alone[n]).fold(f64::NEG_INFINITY, f64::max);
                assert!(
                    (score - best).abs() < 1e-4 && (alone[answer] - best).abs() < 1e-4,
                    "{score} for {best}"
                );
            }
        }
    }
}

#[test]
fn only_what_may_be_likelier_is_computed() {
    let bounds = (0..10).map(|n| Some(-f64::from(n))).collect();
    let mut choice = Choice { bounds, known: HashMap::new() };
    let groups = [(0..10).collect::<Vec<_>>(), vec![8, 9]];
    assert_eq!(choice.next(&groups, true), [0, 1, 2, 3, 4, 5, 8, 9]);
    choice.known.extend((0..6).chain(8..10).map(|n| (n, -7.5 - n as f64)));
    assert_eq!(choice.next(&groups, false), [6, 7]);
    choice.known.extend([(6, -6.0), (7, -7.0)]);
    assert_eq!((choice.best(&groups[0]), choice.best(&groups[1])), (Some((6, -6.0)), Some((8, -15.5))));
}

#[test]
fn answers_open_with_what_they_have_in_common() {
    let labels = Labels::new(&[vec![1, 2, 3], vec![1, 2, 4, 5], vec![1, 2], vec![1, 6]]).unwrap();
    let opening = |wanted: &[usize]| labels.opening(&wanted.iter().copied().collect()).len();
    assert_eq!([opening(&[0, 1]), opening(&[0, 2]), opening(&[0, 3]), opening(&[1])], [2, 2, 1, 4]);
}

#[test]
fn long_texts_are_few_at_once() {
    let labels = Labels::new(&[vec![1, 2, 3]]).unwrap();
    let at_once = |lengths: &[usize]| {
        let texts: Vec<Vec<u32>> = lengths.iter().map(|&length| vec![1; length]).collect();
        labels.side_by_side(&texts, &(0..lengths.len()).collect::<Vec<_>>())
    };
    assert_eq!(at_once(&[6; 2000]), READ_TOKENS / 8);
    assert_eq!(at_once(&[6, 6, 4094]), 2);
    assert_eq!(at_once(&[100_000]), 1);
}

#[test]
fn a_text_is_read_once_and_no_node_twice() {
    let base = golden::base("llama");
    let none = ActiveAdapters::none();
    let labels = Labels::new(&[vec![1, 2, 3], vec![1, 2, 4, 5], vec![1, 6, 7]]).unwrap();
    let mut reading = Reading::new(&labels, &base, &none, vec![&[8, 9, 10], &[11]]);
    let groups = [vec![0, 1, 2], vec![0, 1]];
    labels.choose(&mut reading, &groups, Rule::Sum).unwrap();
    // The longer text with what all answers begin with; then, in both rows, what tells them apart: 2, 4 and 6.
    assert_eq!(reading.cache.len(), 4 + 3);
    let all: BTreeSet<usize> = (0..labels.nodes.len()).collect();
    reading.nodes(&[all.clone(), all]).unwrap();
    assert_eq!(reading.cache.len(), 4 + 3);
}

#[test]
fn what_has_no_tokens_or_does_not_fit_is_refused() {
    let base = golden::base("llama");
    let none = ActiveAdapters::none();
    assert!(Labels::new(&[vec![1], vec![]]).is_err());
    let labels = Labels::new(&[vec![1, 2]]).unwrap();
    let of = |text: Vec<u32>| labels.likeliest(&base, &none, &[text], &[], &[vec![0]], Rule::Mean);
    assert!(of(vec![]).is_err());
    assert!(of(vec![1; 255]).is_err());
    assert!(of(vec![1; 254]).is_ok());
    assert!(labels.likeliest(&base, &none, &[vec![1]], &[], &[vec![]], Rule::Sum).is_err());
    let nothing = Labels::new(&[]).unwrap().likeliest(&base, &none, &[vec![1]], &[], &[], Rule::Sum);
    assert_eq!(nothing.unwrap(), [vec![]]);
}
