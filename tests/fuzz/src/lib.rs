//! What each fuzz target does with its input. An error is a good answer; a panic, an abort, a hang and a
//! promise that does not hold are findings.

mod seeds;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use model::hf::ModelConfig;
use model::lora::Adapter;
use model::tokenizer::Tokenizer;
use model::weights::{self, Weights};
use tch::Kind;

/// Writes the seeds of a target to the folder that `FUZZ_SEEDS` names and ends the process, where it is set.
/// The targets do this themselves so that libtorch is not compiled a second time for a program of its own.
pub fn write_seeds_if_asked(target: &str) {
    if let Some(dir) = std::env::var_os("FUZZ_SEEDS") {
        seeds::write(target, Path::new(&dir));
        std::process::exit(0);
    }
}

/// `config.json`: what is accepted has numbers that can be used, and is written as it was read.
pub fn config_json(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(config) = ModelConfig::from_json(text) else { return };
    config.check().expect("what was read passes its own check");
    assert!(config.parameter_count() > 0);
    let frequencies = config.rope_frequencies();
    assert_eq!(frequencies.len() as i64, config.head_dim / 2);
    assert!(frequencies.iter().all(|f| (*f as f32).is_finite() && *f >= 0.0), "{frequencies:?}");
    let written = config.to_json("float32").to_string();
    let again = ModelConfig::from_json(&written).expect("what was written is read");
    // The JSON library reads some numbers with an error in the last digit, so those are taken over.
    let (rms_norm_eps, rope_theta, rope_scaling) =
        (config.rms_norm_eps, config.rope_theta, config.rope_scaling);
    assert_eq!(ModelConfig { rms_norm_eps, rope_theta, rope_scaling, ..again }, config);
}

/// A safetensors file, by each of the three ways in.
pub fn safetensors(data: &[u8]) {
    let path = scratch().join("model.safetensors");
    std::fs::write(&path, data).expect("the scratch folder can be written to");
    if let Ok(read) = weights::read_tensors(&path) {
        // What is handed out is there in full.
        for tensor in read.values() {
            let _ = weights::is_finite(tensor);
        }
        let mut weights = Weights::open(std::slice::from_ref(&path)).expect("the same header");
        for name in read.keys() {
            let shape = weights.shape(name).expect("the same names").to_vec();
            let _ = weights.take(name, &shape, Kind::Float);
        }
        weights.finish(|_| false).expect("all are taken");
    } else {
        let _ = Weights::open(&[path]);
    }
    let _ = weights::from_bytes(data, "format");
}

/// A folder of `tokenizer.json` and, after a zero byte, `tokenizer_config.json`.
pub fn tokenizer_json(data: &[u8]) {
    let dir = scratch();
    let (tokenizer, settings) = split(data);
    std::fs::write(dir.join("tokenizer.json"), tokenizer).expect("the scratch folder can be written to");
    std::fs::write(dir.join("tokenizer_config.json"), settings)
        .expect("the scratch folder can be written to");
    let Ok(tokenizer) = Tokenizer::load(dir) else { return };
    let _ = tokenizer.check_vocabulary(512);
    for text in ["", "a", "Hello <|end|></s> na\u{ef}ve \u{4f60}\n\n  cab <0x0A>", "aaaa aaaa bbbb abab"] {
        for ids in [tokenizer.encode(text), tokenizer.encode_continuation(text)].into_iter().flatten() {
            let _ = tokenizer.decode(&ids);
            for id in ids {
                tokenizer.bytes(id);
            }
        }
    }
    let _ = tokenizer.decode(&[0, 1, 2, 3, 4, 256, u32::MAX]);
    for id in [0, 1, 2, 3, 4, 256, u32::MAX].iter().chain(tokenizer.eos_ids()) {
        tokenizer.bytes(*id);
    }
    let _ = tokenizer.id("a");
}

/// A PEFT folder of `adapter_config.json` and, after a zero byte, `adapter_model.safetensors`; and the second
/// part as an adapter of our own.
pub fn adapter(data: &[u8]) {
    static MODEL: OnceLock<ModelConfig> = OnceLock::new();
    let model = MODEL.get_or_init(seeds::llama);
    let dir = scratch();
    let (config, tensors) = split(data);
    std::fs::write(dir.join("adapter_config.json"), config).expect("the scratch folder can be written to");
    std::fs::write(dir.join("adapter_model.safetensors"), tensors)
        .expect("the scratch folder can be written to");
    for adapter in [Adapter::read_peft(dir, model), Adapter::from_bytes(tensors, model)].into_iter().flatten()
    {
        adapter.check_model(model).expect("it was read for this model");
        adapter.check_finite().expect("what was read is finite");
        let bytes = adapter.to_bytes().expect("what was read is written");
        let again = Adapter::from_bytes(&bytes, model).expect("what was written is read");
        assert!(again.flat().equal(adapter.flat()) && again.config().targets == adapter.config().targets);
    }
}

/// The parts before and after the first zero byte, which no JSON holds.
fn split(data: &[u8]) -> (&[u8], &[u8]) {
    let at = data.iter().position(|byte| *byte == 0).unwrap_or(data.len());
    (&data[..at], data.get(at + 1..).unwrap_or_default())
}

/// A folder of this process's own, in the one that the script gives and removes.
fn scratch() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let parent = std::env::var_os("FUZZ_SCRATCH").map_or_else(std::env::temp_dir, PathBuf::from);
        let dir = parent.join(format!("engram-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a scratch folder can be made");
        dir
    })
}
