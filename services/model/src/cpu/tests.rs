//! The pass on the CPU against the plain one, and against itself in other company.

use super::vector::LEVELS;
use super::*;
use crate::device::{Placement, Precision};
use crate::golden;
use crate::quant::Quantisation;
use tch::Tensor;

fn cpu(base: &Base) -> Cpu {
    Cpu::new(base).unwrap().unwrap()
}

fn ids(row: &Tensor) -> Vec<u32> {
    Vec::<i64>::try_from(row).unwrap().into_iter().map(|id| id as u32).collect()
}

/// The logits after each token of a row, read one at a time.
fn logits(cpu: &mut Cpu, adapters: &Arc<CpuAdapters>, row: &[u32]) -> Tensor {
    let mut pages = cpu.begin(Vec::new());
    let rows = row.iter().map(|id| {
        let span = Span { ids: &[*id], adapters, pages: &mut pages, speaks: true };
        Tensor::from_slice(&cpu.forward(&mut [span]).unwrap()[0].take().unwrap())
    });
    Tensor::stack(&rows.collect::<Vec<_>>(), 0)
}

fn apart(base: &Base, adapters: &[(&Adapter, f64)], file: &str) -> f64 {
    let golden = golden::tensors(file);
    let (mut cpu, active) = (cpu(base), Arc::new(Cpu::activate(base, adapters).unwrap()));
    let (ids_of, expected) = (&golden["input_ids"], &golden["logits"]);
    let rows = ids_of.size()[0];
    let apart = (0..rows)
        .map(|row| golden::distance(&logits(&mut cpu, &active, &ids(&ids_of.get(row))), &expected.get(row)));
    apart.fold(0.0, f64::max)
}

#[test]
fn logits_equal_transformers() {
    for name in ["llama", "llama3-rope", "mistral", "qwen2", "qwen3"] {
        let apart = apart(&golden::base(name), &[], &format!("{name}/golden.safetensors"));
        assert!(apart < 1e-4, "{name}: {apart}");
    }
}

#[test]
fn logits_with_adapters_equal_peft() {
    let base = golden::base("llama");
    for name in ["peft-r8", "peft-qv", "peft-rslora", "peft-rank-pattern"] {
        let apart = apart(&base, &[(&golden::adapter(name), 1.0)], &format!("{name}/golden.safetensors"));
        assert!(apart < 1e-4, "{name}: {apart}");
    }
    let (one, two) = (golden::adapter("peft-r8"), golden::adapter("merge-second"));
    assert!(apart(&base, &[(&one, 0.7), (&two, 0.3)], "merge-cat.safetensors") < 1e-4);
}

/// A base of the shape that blocks of 64 fit into, and an adapter that changes much.
fn wide(precision: Precision, quantisation: Quantisation) -> (Base, Adapter) {
    tch::set_num_threads(2);
    let config = ModelConfig {
        hidden_size: 128,
        intermediate_size: 192,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        vocab_size: 500,
        max_positions: 512,
        layers: 2,
        ..golden::config("llama")
    };
    let base =
        Base::random(&config, 3, &Placement { precision, quantisation, ..Placement::CPU_F32 }).unwrap();
    let adapter = Adapter::new(crate::lora::LoraConfig::default(), &config, 5).unwrap();
    let noise = (Tensor::arange(adapter.parameter_count(), (Kind::Float, Device::Cpu)) * 0.37).sin() * 0.05;
    let adapter = adapter.with_flat(adapter.flat() + noise).unwrap();
    (base, adapter)
}

const KINDS: [(Precision, Quantisation, f64); 5] = [
    (Precision::F32, Quantisation::None, 1e-4),
    (Precision::Bf16, Quantisation::None, 0.03),
    (Precision::F16, Quantisation::None, 0.03),
    (Precision::Bf16, Quantisation::Int8, 0.03),
    (Precision::Bf16, Quantisation::Nf4, 0.03),
];

#[test]
fn every_format_gives_what_the_plain_pass_gives() {
    let row: Vec<u32> = (0..70).map(|i| i * 37 % 500).collect();
    let tensor = Tensor::from_slice(&row.iter().map(|&id| i64::from(id)).collect::<Vec<_>>()).unsqueeze(0);
    for (precision, quantisation, tolerance) in KINDS {
        let (base, adapter) = wide(precision, quantisation);
        for weight in [0.0, 0.8] {
            let plain = golden::logits(&base, &base.activate(&[(&adapter, weight)]).unwrap(), &tensor).get(0);
            let active = Arc::new(Cpu::activate(&base, &[(&adapter, weight)]).unwrap());
            // On every kind of processor that this one can be.
            for level in LEVELS {
                if level <= Level::best() {
                    let mut cpu = cpu(&base);
                    cpu.set_level(level);
                    let ours = logits(&mut cpu, &active, &row);
                    let relative = golden::distance(&ours, &plain) / plain.abs().max().double_value(&[]);
                    assert!(relative < tolerance, "{precision:?} {quantisation} {level:?}: {relative}");
                }
            }
        }
    }
}

#[test]
fn a_copy_in_sixteen_bits_changes_nothing_and_is_made_only_where_it_does_not() {
    let row: Vec<u32> = (0..20).map(|i| i * 37 % 500).collect();
    let (wide, adapter) = wide(Precision::F32, Quantisation::None);
    let stored = Base::random_in_16_bits(wide.config(), 3, &Placement::CPU_F32).unwrap();
    for (base, is_narrow) in [(&wide, false), (&stored, true)] {
        let active = Arc::new(Cpu::activate(base, &[(&adapter, 1.0)]).unwrap());
        let (mut plain, mut narrow) = (cpu(base), Cpu::narrow(base).unwrap().unwrap());
        assert!(logits(&mut plain, &active, &row).equal(&logits(&mut narrow, &active, &row)));
        if narrow.level >= Level::Avx2 && narrow.level < Level::Avx512Bf16 {
            let weights = [&narrow.head, &narrow.layers[0].qkv, &narrow.layers[1].down];
            assert!(weights.iter().all(|weight| weight.is_bf16() == is_narrow));
        }
    }
}

#[test]
fn a_token_is_computed_alike_in_any_company() {
    let levels = LEVELS.into_iter().filter(|&level| level <= Level::best());
    for (level, (precision, quantisation, _)) in levels.flat_map(|level| KINDS.map(|kind| (level, kind))) {
        let (base, adapter) = wide(precision, quantisation);
        let none = Arc::new(CpuAdapters::default());
        let one = Arc::new(Cpu::activate(&base, &[(&adapter, 1.0)]).unwrap());
        let two = Arc::new(Cpu::activate(&base, &[(&adapter, 0.3), (&adapter, 0.5)]).unwrap());
        let row = |seed: u32, len: u32| (0..len).map(|i| (i * 37 + seed * 11) % 500).collect::<Vec<u32>>();
        let all = [(row(1, 80), &none), (row(2, 45), &one), (row(3, 33), &two), (row(4, 7), &one)];
        let mut cpu = cpu(&base);
        cpu.set_level(level);
        let alone: Vec<Vec<f32>> = all
            .iter()
            .map(|(row, adapters)| {
                let all = logits(&mut cpu, adapters, row);
                to_vec(&all.get(-1)).unwrap()
            })
            .collect();
        // All but the last token in parts of five lengths, and the last ones together.
        let mut pages: Vec<Pages> = all.iter().map(|_| cpu.begin(Vec::new())).collect();
        for part in [40, 20, 19, 1] {
            let mut spans = Vec::new();
            for ((row, adapters), pages) in all.iter().zip(&mut pages) {
                let (held, left) = (pages.len(), row.len() - 1 - pages.len());
                if left > 0 {
                    let ids = &row[held..held + left.min(part)];
                    spans.push(Span { ids, adapters, pages, speaks: false });
                }
            }
            cpu.forward(&mut spans).unwrap();
        }
        let last = |row: &[u32]| row.len() - 1;
        let mut spans: Vec<Span<'_>> = all
            .iter()
            .zip(&mut pages)
            .map(|((row, adapters), pages)| Span { ids: &row[last(row)..], adapters, pages, speaks: true })
            .collect();
        let together: Vec<Vec<f32>> = cpu.forward(&mut spans).unwrap().into_iter().flatten().collect();
        assert_eq!(together, alone, "{level:?} {precision:?} {quantisation}");
        // An answer that begins with the full pages of another one goes on as that one would.
        let begun = pages[0].full().to_vec();
        assert_eq!(begun.len(), 2);
        let mut again = cpu.begin(begun);
        let span = Span { ids: &all[0].0[64..], adapters: &none, pages: &mut again, speaks: true };
        assert_eq!(cpu.forward(&mut [span]).unwrap()[0].as_ref(), Some(&alone[0]));
    }
}

#[test]
fn ids_beyond_the_vocabulary_are_refused() {
    let base = golden::base("llama");
    let (mut cpu, none) = (cpu(&base), Arc::new(CpuAdapters::default()));
    let mut pages = cpu.begin(Vec::new());
    let span = Span { ids: &[1 << 20], adapters: &none, pages: &mut pages, speaks: true };
    assert!(cpu.forward(&mut [span]).unwrap_err().to_string().contains("vocabulary"));
    assert!(pages.is_empty());
}
