use super::*;
use crate::distillation::Mix;
use crate::golden;
use crate::lora::{LoraConfig, Target};
use crate::loss::taught_gradient;
use crate::pack::{Sequence, pack};

fn sequences() -> Vec<Sequence> {
    let make = |n: u32| Sequence::whole((0..9 + 3 * n).map(|i| (i * i * 7 + n * 31) % 128).collect());
    let mut sequences: Vec<Sequence> = (0..7).map(make).collect();
    sequences[2].learned = vec![(3, 9)];
    sequences[4].rehearsed = true;
    sequences
}

/// The gradient that autograd finds.
fn by_autograd(
    base: &Base,
    adapter: &Adapter,
    packed: &Packed,
    teacher: Option<&Teacher>,
) -> (Vec<SequenceScore>, Tensor) {
    let leaf = adapter.flat().detach().copy().set_requires_grad(true);
    let adapter = adapter.with_flat(leaf.shallow_clone()).unwrap();
    let active = base.activate(&[(&adapter, 1.0)]).unwrap();
    let mut found = taught_gradient(base, &active, packed, 0.01, &[&leaf], teacher).unwrap();
    (found.scores, found.gradients.remove(0))
}

fn adapter(base: &Base, config: LoraConfig) -> Adapter {
    let adapter = Adapter::new(config, base.config(), 1).unwrap();
    let numbers = Tensor::arange(adapter.parameter_count(), (Kind::Float, Device::Cpu));
    adapter.with_flat(adapter.flat() + (numbers * 0.37).sin() * 0.05).unwrap()
}

#[test]
fn it_gives_what_autograd_gives() {
    let everywhere = || LoraConfig { rank: 4, targets: Target::ALL.to_vec(), ..LoraConfig::default() };
    for name in ["llama", "llama3-rope", "mistral", "qwen2"] {
        let base = golden::base(name);
        assert!(applies(&base));
        let upper = everywhere().in_top_layers(1, base.config()).unwrap();
        let uneven = LoraConfig { rank_pattern: [("k_proj".into(), 2)].into(), ..everywhere() };
        let attention = LoraConfig { targets: vec![Target::V, Target::Q], ..everywhere() };
        for (i, config) in
            [LoraConfig::default(), everywhere(), upper, uneven, attention].into_iter().enumerate()
        {
            let adapter = adapter(&base, config);
            for row_tokens in [1, 64] {
                let packed = pack(&base, &sequences(), row_tokens).unwrap();
                let (scores, expected) = by_autograd(&base, &adapter, &packed, None);
                let (ours, found) = adapter_gradient(&base, &adapter, &packed, 0.01, None).unwrap();
                let size = expected.abs().max().double_value(&[]);
                assert!(golden::distance(&found, &expected) < 1e-5 * size, "{name}, {i}, {row_tokens}");
                for (one, two) in scores.iter().zip(ours) {
                    assert!((one.nll_sum - two.nll_sum).abs() < 1e-3 && one.tokens == two.tokens);
                }
            }
        }
    }
}

#[test]
fn a_teacher_and_spared_tokens_are_heard() {
    let base = golden::base("llama");
    // A head that is trained is none of ours: what lies above it is libtorch's then.
    let mut plain = base.share();
    plain.head = base.head.copy().set_requires_grad(true);
    let adapter = adapter(&base, LoraConfig::default());
    let spared: Vec<bool> = (0..128).map(|token| token % 5 == 0).collect();
    let pack = || pack(&base, &sequences(), 64).unwrap();
    for (fresh, rehearsed) in [(0.3, 0.3), (0.0, 0.7), (1.0, 0.0), (0.2, 1.0)] {
        let mix = Mix { alpha: fresh, temperature: 2.0 };
        let teacher = Teacher::new(base.share(), mix).unwrap().rehearsing(rehearsed).unwrap();
        let teacher = teacher.with_adapter(&golden::adapter("peft-qv")).unwrap();
        let sparing = pack().sparing(&spared, Device::Cpu);
        for (packed, teacher) in [(&pack(), Some(&teacher)), (&sparing, None), (&sparing, Some(&teacher))] {
            let (scores, expected) = by_autograd(&plain, &adapter, packed, teacher);
            let (ours, found) = adapter_gradient(&base, &adapter, packed, 0.01, teacher).unwrap();
            assert!(golden::distance(&found, &expected) < 1e-5 * expected.abs().max().double_value(&[]));
            for (one, two) in scores.iter().zip(ours) {
                assert!((one.nll_sum - two.nll_sum).abs() < 1e-3 && one.tokens == two.tokens);
            }
        }
    }
}

#[test]
fn hidden_states_are_those_of_the_plain_pass_with_any_adapters() {
    let _guard = tch::no_grad_guard();
    let everywhere = LoraConfig { rank: 3, targets: Target::ALL.to_vec(), ..LoraConfig::default() };
    for (precision, apart) in [(Precision::F32, 1e-4), (Precision::Bf16, 0.15)] {
        let base = Base::load(&golden::dir("llama"), &Placement { precision, ..Placement::CPU_F32 }).unwrap();
        let upper = adapter(&base, everywhere.clone().in_top_layers(1, base.config()).unwrap());
        let (one, other) = (adapter(&base, everywhere.clone()), adapter(&base, LoraConfig::default()));
        let sets: [&[(&Adapter, f64)]; 3] =
            [&[], &[(&one, 1.0)], &[(&one, 0.5), (&upper, 1.0), (&other, -0.25)]];
        for adapters in sets {
            let active = base.activate(adapters).unwrap();
            for row_tokens in [1, 64] {
                let packed = pack(&base, &sequences(), row_tokens).unwrap();
                let found = loss::learned_hidden(&base, &active, &packed).unwrap().to_kind(Kind::Float);
                let plain = loss::recorded_hidden(&base, &active, &packed).unwrap().to_kind(Kind::Float);
                let distance = golden::distance(&found, &plain);
                assert!(distance < apart, "{precision:?}, {} adapters: {distance}", adapters.len());
            }
        }
    }
}

#[test]
fn in_sixteen_bits_it_is_as_near_to_f32_as_autograd_is() {
    let wide = golden::base("llama");
    let half = Placement { precision: Precision::Bf16, ..Placement::CPU_F32 };
    let base = Base::load(&golden::dir("llama"), &half).unwrap();
    let adapter = adapter(&base, LoraConfig::default());
    let packed = pack(&base, &sequences(), 64).unwrap();
    let exact = by_autograd(&wide, &adapter, &packed, None).1;
    let off = |found: &Tensor| (found - &exact).norm().double_value(&[]) / exact.norm().double_value(&[]);
    let theirs = off(&by_autograd(&base, &adapter, &packed, None).1);
    let ours = off(&adapter_gradient(&base, &adapter, &packed, 0.01, None).unwrap().1);
    println!("off by {ours} by hand, {theirs} by autograd");
    assert!(ours < 1.2 * theirs && ours < 0.05, "{ours} {theirs}");
}

/// The cosine of the angle between two vectors.
fn likeness(one: &Tensor, two: &Tensor) -> f64 {
    (one.dot(two) / (one.norm() * two.norm())).double_value(&[])
}

#[test]
fn in_8_bits_the_gradient_points_the_same_way() {
    for (name, quantisation) in
        [("llama", Quantisation::None), ("qwen2", Quantisation::None), ("llama", Quantisation::Int8)]
    {
        let placement = Placement { quantisation, ..Placement::CPU_F32 };
        let plain = Base::load(&golden::dir(name), &placement).unwrap();
        let mut base = plain.share();
        let layers = base.layers.iter().map(crate::base::Layer::matrices);
        base.codes = Some(BaseCodes::new(layers, &base.head).unwrap().into());
        assert!(applies(&base));
        let adapter =
            adapter(&base, LoraConfig { rank: 4, targets: Target::ALL.to_vec(), ..LoraConfig::default() });
        let teacher = Teacher::new(plain.share(), Mix { alpha: 0.3, temperature: 2.0 }).unwrap();
        let packed = pack(&base, &sequences(), 64).unwrap();
        let former = Teacher::new(base.share(), Mix { alpha: 0.0, temperature: 2.0 }).unwrap();
        let former = former.rehearsing(0.5).unwrap().with_adapter(&golden::adapter("peft-qv"));
        let former = former.ok().filter(|_| name == "llama");
        for teacher in [None, Some(&teacher), former.as_ref()] {
            let (scores, expected) =
                loss::adapter_gradient(&plain, &adapter, &packed, 0.01, teacher).unwrap();
            let (ours, found) = adapter_gradient(&base, &adapter, &packed, 0.01, teacher).unwrap();
            let alike = likeness(&found, &expected);
            assert!(alike > 0.997 && alike < 1.0 - 1e-9, "{name}, {quantisation}: {alike}");
            for (one, two) in scores.iter().zip(ours) {
                assert!((one.nll_sum / two.nll_sum - 1.0).abs() < 0.01 && one.tokens == two.tokens);
            }
        }
    }
}
