use super::*;
use crate::device::Placement;
use crate::ewc::Ewc;
use crate::golden;
use crate::guard::{Apart, Elastic, Former, FormerShares};
use crate::lora::LoraConfig;
use std::collections::BTreeSet;

fn go() -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn rows(tensor: &Tensor) -> Vec<Sequence> {
    let rows: Vec<Vec<i64>> = tensor.try_into().unwrap();
    rows.into_iter().map(|row| Sequence::whole(row.into_iter().map(|id| id as u32).collect())).collect()
}

fn batches() -> Vec<Vec<Sequence>> {
    let batches = &golden::tensors("train.safetensors")["batches"];
    (0..batches.size()[0]).map(|i| rows(&batches.get(i))).collect()
}

fn learner() -> Learner {
    Learner::new(golden::base("llama"), &golden::initial(), None, LearnerConfig::default()).unwrap()
}

#[test]
fn the_golden_run_is_reproduced() {
    let golden = golden::tensors("train.safetensors");
    let mut learner = learner();
    for (i, batch) in batches().into_iter().enumerate() {
        let report = learner.step(&[batch], 1e-2, &mut go).unwrap();
        let (loss, norm) =
            (golden["losses"].double_value(&[i as i64]), golden["grad_norms"].double_value(&[i as i64]));
        assert_eq!(report.outcome, Outcome::Applied);
        assert!((report.loss / loss - 1.0).abs() < 1e-4, "step {i}: loss {} for {loss}", report.loss);
        assert!(
            (report.grad_norm / norm - 1.0).abs() < 1e-4,
            "step {i}: norm {} for {norm}",
            report.grad_norm
        );
    }
    let distance = golden::distance(learner.adapter().flat(), golden::adapter("train-final").flat());
    assert!(distance < 1e-3, "{distance}");
}

#[test]
fn accumulation_and_packing_do_not_change_a_step() {
    let batch = batches().remove(0);
    let parts: Vec<Vec<Sequence>> = batch.chunks(1).map(<[Sequence]>::to_vec).collect();
    let (mut whole, mut split) = (learner(), learner());
    let one = whole.step(&[batch], 1e-2, &mut go).unwrap();
    let two = split.step(&parts, 1e-2, &mut go).unwrap();
    assert!((one.loss - two.loss).abs() < 1e-6 && (one.grad_norm / two.grad_norm - 1.0).abs() < 1e-5);
    // Adam's first step is a sign, so that gradients near zero may turn: compare what was not near.
    assert!(golden::distance(whole.adapter().flat(), split.adapter().flat()) < 2e-2);
}

#[test]
fn a_resumed_learner_goes_on_exactly() {
    let batches = batches();
    let mut one = learner();
    for batch in &batches[..3] {
        one.step(std::slice::from_ref(batch), 1e-2, &mut go).unwrap();
    }
    let bytes = one.adapter().to_bytes().unwrap();
    let adapter = Adapter::from_bytes(&bytes, one.base().config()).unwrap();
    let state = one.optimiser_bytes().unwrap();
    let mut two = Learner::new(one.base().share(), &adapter, Some(&state), LearnerConfig::default()).unwrap();
    for learner in [&mut one, &mut two] {
        learner.step(&batches[3..5], 1e-2, &mut go).unwrap();
    }
    assert_eq!(one.adapter().to_bytes().unwrap(), two.adapter().to_bytes().unwrap());
    assert_eq!(one.optimiser_bytes().unwrap(), two.optimiser_bytes().unwrap());
}

#[test]
fn a_stop_leaves_everything_as_it_was() {
    let mut learner = learner();
    let (weights, state) = (learner.adapter().to_bytes().unwrap(), learner.optimiser_bytes().unwrap());
    let mut calls = 0;
    let mut stop = || {
        calls += 1;
        if calls == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let report = learner.step(&batches(), 1e-2, &mut stop).unwrap();
    assert_eq!((report.outcome, report.scores.len()), (Outcome::Stopped, 1));
    assert_eq!(weights, learner.adapter().to_bytes().unwrap());
    assert_eq!(state, learner.optimiser_bytes().unwrap());
}

/// A base in which one token's embedding is infinite.
fn poisoned(id: i64) -> Base {
    let mut base = golden::base("llama");
    base.embedding = base.embedding.copy();
    let _ = base.embedding.get(id).fill_(f64::INFINITY);
    base
}

#[test]
fn a_non_finite_loss_changes_nothing_and_the_offenders_are_found() {
    let mut learner = Learner::new(poisoned(77), &golden::initial(), None, LearnerConfig::default()).unwrap();
    let clean = |i: u32| Sequence::whole((0..12).map(|t| (t * 5 + i) % 77).collect());
    let mut batch: Vec<Sequence> = (0..9).map(clean).collect();
    assert!(learner.find_offenders(&batch).unwrap().is_empty());
    batch[2].tokens[4] = 77;
    batch[8].tokens[0] = 77;
    let (weights, state) = (learner.adapter().to_bytes().unwrap(), learner.optimiser_bytes().unwrap());
    let report = learner.step(std::slice::from_ref(&batch), 1e-2, &mut go).unwrap();
    assert_eq!(report.outcome, Outcome::NonFinite);
    assert_eq!(weights, learner.adapter().to_bytes().unwrap());
    assert_eq!(state, learner.optimiser_bytes().unwrap());
    assert_eq!(learner.find_offenders(&batch).unwrap(), [2, 8]);
}

#[test]
fn ewc_holds_weights_back() {
    let run = |lambda: f64| {
        let mut learner = learner();
        let anchor = learner.adapter().deep_copy();
        let fisher = anchor.flat().ones_like();
        learner.hold_to(Elastic::new(Ewc::new(fisher, &anchor).unwrap(), lambda, &anchor).unwrap());
        for batch in batches() {
            learner.step(&[batch], 1e-2, &mut go).unwrap();
        }
        golden::distance(learner.adapter().flat(), anchor.flat())
    };
    assert!(run(100.0) < 0.5 * run(0.0));
}

#[test]
fn tokens_are_spared_until_that_is_over() {
    let text = batches().remove(0).remove(0);
    let said: BTreeSet<u32> = text.tokens.iter().copied().collect();
    let unsaid =
        || (0..golden::base("llama").config().vocab_size as u32).filter(|token| !said.contains(token));
    let run = |spare: bool, over: bool| {
        let mut learner = learner();
        if spare {
            learner.hold_to(Apart::new(learner.base(), std::iter::empty(), unsaid()).expect("tokens"));
        }
        if over {
            learner.hold_to(Apart::over());
        }
        learner.step(&[vec![text.clone()]], 1e-2, &mut go).unwrap();
        learner.adapter().to_bytes().unwrap()
    };
    assert_ne!(run(true, false), run(false, false));
    assert_eq!(run(true, true), run(false, false));
}

/// How far predictions have moved after the golden run on sequences that are `rehearsed`.
fn moved(shares: FormerShares, rehearsed: bool) -> f64 {
    let mut learner = learner();
    let before = learner.adapter().deep_copy();
    learner.hold_to(Former::new(learner.base(), &before, shares).unwrap());
    for mut batch in batches() {
        batch.iter_mut().for_each(|sequence| sequence.rehearsed = rehearsed);
        learner.step(&[batch], 1e-2, &mut go).unwrap();
    }
    let ids = &golden::tensors("train.safetensors")["batches"].get(0);
    let logits = |adapter: &Adapter| {
        let active = learner.base().activate(&[(adapter, 1.0)]).unwrap();
        golden::logits(learner.base(), &active, ids).log_softmax(-1, tch::Kind::Float)
    };
    golden::distance(&logits(learner.adapter()), &logits(&before))
}

#[test]
fn the_former_self_holds_the_predictions_back() {
    let free = moved(FormerShares::default(), false);
    let held = moved(FormerShares { fresh: 0.9, rehearsed: 0.0 }, false);
    assert!(held < 0.8 * free, "{held} of {free}");
}

#[test]
fn the_former_self_speaks_of_what_is_new_and_of_what_is_rehearsed_apart() {
    let free = moved(FormerShares::default(), false);
    let rehearsed_alone = FormerShares { fresh: 0.0, rehearsed: 0.9 };
    assert_eq!(moved(rehearsed_alone, false), free);
    assert_eq!(moved(FormerShares { fresh: 0.9, rehearsed: 0.0 }, true), free);
    assert!(moved(rehearsed_alone, true) < 0.8 * free);
}

#[test]
fn f16_learns_with_a_loss_scale_that_backs_off() {
    let placement = Placement { precision: Precision::F16, ..Placement::CPU_F32 };
    let base = Base::load(&golden::dir("llama"), &placement).unwrap();
    let adapter = Adapter::new(LoraConfig::default(), base.config(), 1).unwrap();
    let mut learner = Learner::new(base, &adapter, None, LearnerConfig::default()).unwrap();
    learner.optimiser.counters_mut().loss_scale = SCALE_MAX * 1024.0;
    let batch = batches().remove(0);
    let mut outcomes = Vec::new();
    let mut losses = Vec::new();
    for _ in 0..40 {
        let report = learner.step(std::slice::from_ref(&batch), 1e-2, &mut go).unwrap();
        outcomes.push(report.outcome);
        losses.push(report.loss);
    }
    let skipped = outcomes.iter().take_while(|&&outcome| outcome == Outcome::Overflow).count();
    assert!(
        skipped > 0 && outcomes[skipped..].iter().all(|&outcome| outcome == Outcome::Applied),
        "{outcomes:?}"
    );
    assert_eq!(learner.steps(), (outcomes.len() - skipped) as u64);
    assert!(losses[39] < losses[0] - 0.5, "{losses:?}");
}

#[test]
fn an_f16_gradient_that_overflows_is_skipped_and_the_scale_comes_back() {
    let placement = Placement { precision: Precision::F16, ..Placement::CPU_F32 };
    let base = Base::load(&golden::dir("llama"), &placement).unwrap();
    // An alpha this large has no effect on the loss while B is zero, and takes B's gradient over 65504.
    let config = LoraConfig { alpha: 40_000.0, ..LoraConfig::default() };
    let adapter = Adapter::new(config, base.config(), 1).unwrap();
    let mut learner = Learner::new(base, &adapter, None, LearnerConfig::default()).unwrap();
    let batch = batches().remove(0);
    let step = |learner: &mut Learner| {
        let before = (learner.adapter().to_bytes().unwrap(), learner.optimiser.to_bytes().unwrap());
        let scale = learner.optimiser.counters().loss_scale;
        let report = learner.step(std::slice::from_ref(&batch), 1e-9, &mut go).unwrap();
        (report.outcome, before, scale)
    };
    let mut skipped = 0;
    loop {
        let (outcome, (weights, state), scale) = step(&mut learner);
        let now = learner.optimiser.counters().loss_scale;
        if outcome == Outcome::Applied {
            assert_eq!(now, scale);
            break;
        }
        assert_eq!((outcome, now), (Outcome::Overflow, scale / 2.0));
        assert_eq!(weights, learner.adapter().to_bytes().unwrap());
        // With its counters put back, the state is what it was: both moments and the step count.
        learner.optimiser.counters_mut().loss_scale = scale;
        assert_eq!(state, learner.optimiser.to_bytes().unwrap());
        learner.optimiser.counters_mut().loss_scale = now;
        skipped += 1;
    }
    assert!(skipped > 0 && learner.steps() == 1, "skipped {skipped}");

    let scale = learner.optimiser.counters().loss_scale;
    let saved = learner.optimiser_bytes().unwrap();
    let (base, config) = (learner.base().share(), LearnerConfig::default());
    let mut resumed = Learner::new(base, &learner.adapter().deep_copy(), Some(&saved), config).unwrap();
    assert_eq!(resumed.optimiser.counters(), learner.optimiser.counters());
    resumed.optimiser.counters_mut().scale_age = SCALE_GROWTH_STEPS - 2;
    let scales: Vec<f64> = (0..2)
        .map(|_| {
            assert_eq!(step(&mut resumed).0, Outcome::Applied);
            resumed.optimiser.counters().loss_scale
        })
        .collect();
    assert_eq!(scales, [scale, scale * 2.0]);
    assert_eq!(resumed.optimiser.counters().scale_age, 0);
}
