use super::*;
use proptest::collection::vec;
use proptest::prelude::*;

/// Tokens 0 to 3 with these probabilities.
fn four() -> Vec<f32> {
    [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect()
}

fn sampler(sampling: Sampling) -> Sampler {
    Sampler::new(sampling, &[])
}

/// What comes first, how often, by 10000 seeds: penalties would have a longer answer depend on itself.
fn firsts(sampling: &Sampling, prompt: &[u32]) -> [u32; 4] {
    let mut counts = [0; 4];
    for seed in 0..10_000 {
        let mut sampler = Sampler::new(Sampling { seed, ..sampling.clone() }, prompt);
        counts[sampler.choose(four()).unwrap().id as usize] += 1;
    }
    counts
}

/// Whether these counts of 10000 draws are those of this distribution, by five standard deviations.
fn follow(counts: [u32; 4], expected: [f64; 4]) -> bool {
    let near = |(count, p): (u32, f64)| {
        (f64::from(count) - 10_000.0 * p).abs() <= 5.0 * (10_000.0 * p * (1.0 - p)).sqrt()
    };
    counts.into_iter().zip(expected).all(near)
}

/// The logits after `answer` was generated.
fn adjusted(sampling: Sampling, prompt: &[u32], answer: &[u32], logits: &[f32]) -> Vec<f32> {
    let mut sampler = Sampler::new(sampling, prompt);
    for &id in answer {
        let mut forced = vec![0.0; logits.len()];
        forced[id as usize] = 1e6;
        assert_eq!(sampler.choose(forced).unwrap().id, id);
    }
    let mut logits = logits.to_vec();
    sampler.adjust(&mut logits);
    logits
}

#[test]
fn senseless_parameters_are_refused() {
    let plain = Sampling::default;
    for (sampling, name) in [
        (Sampling { temperature: f64::NAN, ..plain() }, "temperature"),
        (Sampling { temperature: -1.0, ..plain() }, "temperature"),
        (Sampling { top_p: 0.0, ..plain() }, "top_p"),
        (Sampling { min_p: 1.1, ..plain() }, "min_p"),
        (Sampling { min_p: f64::NAN, ..plain() }, "min_p"),
        (Sampling { repetition_penalty: 0.0, ..plain() }, "repetition_penalty"),
        (Sampling { presence_penalty: -2.1, ..plain() }, "presence_penalty"),
        (Sampling { frequency_penalty: 2.1, ..plain() }, "frequency_penalty"),
        (Sampling { logit_bias: [(1, 101.0)].into(), ..plain() }, "logit_bias"),
        (Sampling { logprobs: Some(21), ..plain() }, "logprobs"),
        (Sampling { max_tokens: 0, ..plain() }, "max_tokens"),
        (Sampling { stop: vec![String::new()], ..plain() }, "stop"),
    ] {
        assert!(sampling.check().unwrap_err().to_string().contains(name));
    }
}

#[test]
fn sampling_follows_the_distribution() {
    let plain = Sampling { temperature: 1.0, ..Sampling::default() };
    let with = |change: fn(&mut Sampling)| {
        let mut sampling = plain.clone();
        change(&mut sampling);
        firsts(&sampling, &[])
    };
    assert!(follow(with(|_| ()), [0.5, 0.3, 0.15, 0.05]));
    assert!(follow(with(|s| s.top_p = 0.7), [0.625, 0.375, 0.0, 0.0]));
    assert!(follow(with(|s| s.top_k = 3), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0]));
    // 0.15 / 0.5 is just enough, 0.05 / 0.5 is not.
    assert!(follow(with(|s| s.min_p = 0.29), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0]));
    assert!(follow(with(|s| s.min_p = 1.0), [1.0, 0.0, 0.0, 0.0]));
    // At temperature 1/2 probabilities are squared, and min-p looks at those: 0.09 / 0.25 and 0.0225 / 0.25.
    let sharp = with(|s| (s.temperature, s.min_p) = (0.5, 0.2));
    assert!(follow(sharp, [0.25 / 0.34, 0.09 / 0.34, 0.0, 0.0]));
    // Top-p counts what top-k left, of which 0.5 is 0.625.
    assert!(follow(with(|s| (s.top_k, s.top_p) = (2, 0.64)), [0.625, 0.375, 0.0, 0.0]));
    assert!(follow(with(|s| (s.top_k, s.top_p) = (2, 0.62)), [1.0, 0.0, 0.0, 0.0]));
    // ln 2 more is twice the mass.
    let biased = with(|s| s.logit_bias = [(3, f64::from(2f32.ln()))].into());
    assert!(follow(biased, [0.5 / 1.05, 0.3 / 1.05, 0.15 / 1.05, 0.1 / 1.05]));
}

#[test]
fn the_repetition_penalty_divides_and_multiplies_once() {
    let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
    let logits = [4.0, -3.0, 1.0, -1.0, 0.0];
    // 0 and 1 are in the prompt, 1 and 2 in the answer, and 2 twice; each is penalised once.
    assert_eq!(adjusted(sampling, &[0, 1, 1], &[1, 2, 2], &logits), [2.0, -6.0, 0.5, -1.0, 0.0]);
}

#[test]
fn presence_and_frequency_count_the_answer_alone() {
    let sampling = Sampling { presence_penalty: 0.5, frequency_penalty: 0.25, ..Sampling::default() };
    let logits = [1.0, 1.0, 1.0];
    assert_eq!(adjusted(sampling, &[0, 0, 2], &[1, 2, 2], &logits), [1.0, 0.25, 0.0]);
    let raising = Sampling { presence_penalty: -2.0, frequency_penalty: -1.0, ..Sampling::default() };
    assert_eq!(adjusted(raising, &[0], &[1], &logits), [1.0, 4.0, 1.0]);
}

#[test]
fn bias_comes_before_penalties() {
    let logit_bias = [(0, -3.0), (2, 1.0)].into();
    let sampling =
        Sampling { logit_bias, repetition_penalty: 2.0, frequency_penalty: 1.0, ..Sampling::default() };
    // (2 - 3) * 2 - 1, the second as it is, and 2 + 1.
    assert_eq!(adjusted(sampling, &[], &[0], &[2.0, 2.0, 2.0]), [-3.0, 2.0, 3.0]);
}

#[test]
fn logprobs_are_the_models_own_whatever_the_temperature() {
    for temperature in [0.0, 0.3, 2.0] {
        let sampling =
            Sampling { temperature, top_k: 1, top_p: 0.1, logprobs: Some(2), ..Sampling::default() };
        let (logprob, top) = sampler(sampling).choose(four()).unwrap().logprobs.unwrap();
        assert!((logprob - 0.5f32.ln()).abs() < 1e-6);
        assert_eq!(top.iter().map(|t| t.id).collect::<Vec<_>>(), [0, 1]);
        assert!((top[0].logprob - logprob).abs() < 1e-6 && (top[1].logprob - 0.3f32.ln()).abs() < 1e-6);
    }
    let biased = Sampling { logit_bias: [(3, 100.0)].into(), logprobs: Some(0), ..Sampling::default() };
    let chosen = sampler(biased).choose(four()).unwrap();
    assert_eq!((chosen.id, chosen.logprobs), (3, Some((0.0, Vec::new()))));
    assert!(sampler(Sampling::default()).choose(four()).unwrap().logprobs.is_none());
}

#[test]
fn a_greedy_answer_under_a_penalty_does_not_repeat_itself() {
    let logits: Vec<f32> = vec![2.0, 1.9, 1.8, 1.7];
    let greedy = |sampling: Sampling| {
        let mut sampler = sampler(sampling);
        (0..4).map(|_| sampler.choose(logits.clone()).unwrap().id).collect::<Vec<_>>()
    };
    assert_eq!(greedy(Sampling::default()), [0, 0, 0, 0]);
    assert_eq!(greedy(Sampling { repetition_penalty: 1.5, ..Sampling::default() }), [0, 1, 2, 3]);
    assert_eq!(greedy(Sampling { presence_penalty: 0.5, ..Sampling::default() }), [0, 1, 2, 3]);
    assert_eq!(greedy(Sampling { frequency_penalty: 0.5, ..Sampling::default() }), [0, 1, 2, 3]);
}

#[test]
fn damaged_logits_are_an_error() {
    for damage in [f32::NAN, f32::INFINITY] {
        assert!(sampler(Sampling::default()).choose(vec![0.0, damage]).is_err());
    }
    assert!(sampler(Sampling::default()).choose(vec![f32::NEG_INFINITY; 2]).is_err());
    assert_eq!(sampler(Sampling::default()).choose(vec![f32::NEG_INFINITY, 0.0]).unwrap().id, 1);
}

fn vocabulary() -> impl Strategy<Value = Vec<f32>> {
    vec(-15f32..15.0, 2..60)
}

proptest! {
    #[test]
    fn neutral_options_change_nothing(logits in vocabulary(), seed: u64, temperature in 0.0..2.0) {
        let sampling = Sampling { temperature, seed, ..Sampling::default() };
        let mut plain = ChaCha8Rng::seed_from_u64(seed);
        let mut sampler = Sampler::new(sampling, &[0, 1]);
        for _ in 0..8 {
            let best = logits.iter().copied().fold(f32::MIN, f32::max);
            let masses = |x: &f32| (f64::from(x - best) / temperature).exp();
            let expected = if temperature == 0.0 {
                logits.iter().position(|&x| x == best).unwrap()
            } else {
                draw(&logits.iter().map(masses).collect::<Vec<_>>(), &mut plain)
            };
            prop_assert_eq!(sampler.choose(logits.clone()).unwrap().id as usize, expected);
        }
    }

    #[test]
    fn what_is_banned_never_comes_and_what_is_forced_always(
        logits in vocabulary(), seed: u64, temperature in 0.0..2.0, at: prop::sample::Index,
    ) {
        let id = at.index(logits.len()) as u32;
        for (bias, comes) in [(-100.0, false), (100.0, true)] {
            let logit_bias = [(id, bias)].into();
            let mut sampler = sampler(Sampling { temperature, seed, logit_bias, ..Sampling::default() });
            for _ in 0..8 {
                prop_assert_eq!(sampler.choose(logits.clone()).unwrap().id == id, comes);
            }
        }
    }

    #[test]
    fn log_probabilities_are_of_one_distribution(
        logits in vocabulary(), seed: u64, repetition_penalty in 0.5..2.0, top in 0usize..=20,
    ) {
        let sampling = |logprobs| {
            Sampling { temperature: 1.0, seed, repetition_penalty, logprobs, ..Sampling::default() }
        };
        let all = Sampler::new(sampling(Some(logits.len())), &[0]).choose(logits.clone()).unwrap();
        let (logprob, all_of_them) = all.logprobs.unwrap();
        let sum: f64 = all_of_them.iter().map(|t| f64::from(t.logprob).exp()).sum();
        prop_assert!((sum - 1.0).abs() < 1e-5, "{}", sum);
        prop_assert!(all_of_them.is_sorted_by(|x, y| x.logprob >= y.logprob));
        let chosen = TopLogprob { id: all.id, logprob };
        prop_assert!(all_of_them.contains(&chosen));
        let some = Sampler::new(sampling(Some(top)), &[0]).choose(logits.clone()).unwrap();
        prop_assert_eq!(&some.logprobs.unwrap().1[..], &all_of_them[..top.min(logits.len())]);
        // Telling them does not change the choice.
        prop_assert_eq!(Sampler::new(sampling(None), &[0]).choose(logits).unwrap().id, some.id);
    }

    #[test]
    fn truncation_keeps_what_it_says(
        logits in vocabulary(), seed: u64, top_k in 1usize..10, min_p in 0.0..1.0, top_p in 0.01..1.0,
    ) {
        let rank = |id: u32| {
            let order = |&other: &u32| {
                by_likelihood(&(logits[other as usize], other), &(logits[id as usize], id)).is_lt()
            };
            (0..logits.len() as u32).filter(order).count()
        };
        let sampling = Sampling { temperature: 1.0, seed, top_k, min_p, top_p, ..Sampling::default() };
        let id = sampler(sampling).choose(logits.clone()).unwrap().id;
        let best = logits.iter().copied().fold(f32::MIN, f32::max);
        prop_assert!(rank(id) < top_k);
        prop_assert!(f64::from(logits[id as usize] - best).exp() >= min_p);
    }
}
