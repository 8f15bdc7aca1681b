//! The inputs that fuzzing starts from: the goldens, and what they do not cover, made here so that it is small.

use std::fs;
use std::path::{Path, PathBuf};

use model::hf::ModelConfig;
use model::lora::{Adapter, LoraConfig, Target};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

fn golden(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../golden")).join(name)
}

fn read(name: &str) -> Vec<u8> {
    fs::read(golden(name)).expect("the goldens are in the repository")
}

/// The shape that the golden adapters are for.
pub fn llama() -> ModelConfig {
    ModelConfig::load(&golden("llama")).expect("the golden configuration is good")
}

pub fn write(target: &str, dir: &Path) {
    let seeds = match target {
        "config_json" => configs(),
        "safetensors" => safetensors(),
        "tokenizer_json" => tokenizers(),
        "adapter" => adapters(),
        other => panic!("no target {other}"),
    };
    fs::create_dir_all(dir).expect("the corpus folder can be made");
    for (i, seed) in seeds.iter().enumerate() {
        fs::write(dir.join(format!("seed-{i:02}")), seed).expect("the corpus folder can be written to");
    }
}

fn configs() -> Vec<Vec<u8>> {
    let small = json!({"model_type": "qwen2", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 9, "rope_scaling": {"type": "linear", "factor": 2.0}});
    let names = ["llama", "llama3-rope", "mistral", "qwen2", "qwen3"];
    let mut seeds: Vec<Vec<u8>> = names.iter().map(|name| read(&format!("{name}/config.json"))).collect();
    seeds.push(small.to_string().into_bytes());
    seeds
}

fn safetensors() -> Vec<Vec<u8>> {
    let kinds = [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Int64];
    let tensor = |kind| Tensor::ones([2, 3], (Kind::Float, Device::Cpu)).to_kind(kind);
    let mut all: Vec<_> = kinds.iter().map(|kind| (format!("{kind:?}"), tensor(*kind))).collect();
    all.push(("empty".into(), Tensor::zeros([0, 4], (Kind::Float, Device::Cpu))));
    all.push(("scalar".into(), Tensor::from(1f32)));
    let small = model::weights::to_bytes(&all, "format", "pt").expect("these kinds are written");
    vec![
        small,
        read("distill.safetensors"),
        read("train.safetensors"),
        read("peft-qv/adapter_model.safetensors"),
    ]
}

fn adapters() -> Vec<Vec<u8>> {
    let joined = |config: Vec<u8>, tensors: Vec<u8>| [config, vec![0], tensors].concat();
    let part = |name: &str, file: &str| read(&format!("{name}/{file}"));
    let both = |name| joined(part(name, "adapter_config.json"), part(name, "adapter_model.safetensors"));
    let mut seeds = vec![both("peft-qv")];
    for rslora in [false, true] {
        let config = LoraConfig {
            layers: if rslora { vec![1] } else { Vec::new() },
            rank: 1,
            alpha: 2.0,
            rslora,
            targets: vec![Target::K],
            rank_pattern: [("layers.1.self_attn.k_proj".to_owned(), 2)].into(),
            alpha_pattern: [("k_proj".to_owned(), 0.5)].into(),
        };
        let adapter = Adapter::new(config, &llama(), 1).expect("a good configuration");
        let adapter = adapter.with_flat(adapter.flat().ones_like()).expect("the same shape");
        let dir = std::env::temp_dir().join(format!("engram-fuzz-seed-{}", std::process::id()));
        adapter.write_peft(&dir, "llama").expect("a temporary folder can be written to");
        let file = |name| fs::read(dir.join(name)).expect("it was written");
        seeds.push(joined(file("adapter_config.json"), file("adapter_model.safetensors")));
        seeds.push(joined(Vec::new(), adapter.to_bytes().expect("what was made is written")));
        fs::remove_dir_all(&dir).expect("it was made");
    }
    seeds
}

/// Tiny tokenizers of each kind that the library knows, with every step that real files have.
fn tokenizers() -> Vec<Vec<u8>> {
    let bpe = json!({"type": "BPE", "unk_token": null, "byte_fallback": true, "fuse_unk": true, "dropout": null,
        "vocab": {"<unk>": 0, "<s>": 1, "a": 2, "b": 3, "ab": 4, "\u{2581}": 5, "<0x0A>": 6, "\u{2581}a": 7},
        "merges": [["a", "b"], ["\u{2581}", "a"]]});
    let words = json!({"a": 0, "b": 1, "##b": 2, "[UNK]": 3, "c": 4});
    let word_piece = json!({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100, "vocab": words});
    let word_level = json!({"type": "WordLevel", "unk_token": "[UNK]", "vocab": words});
    let unigram = json!({"type": "Unigram", "unk_id": 0, "byte_fallback": false,
        "vocab": [["<unk>", 0.0], ["a", -1.5], ["b", -2.0], ["ab", -2.5], ["\u{2581}", -3.0]]});
    let gpt2 = json!({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
        "use_regex": true}, "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
        "use_regex": true}, "post_processor": {"type": "ByteLevel", "add_prefix_space": true,
        "trim_offsets": false, "use_regex": true}});
    let llama2 = json!({"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "\u{2581}"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]},
        "decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "post_processor": {"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}});
    let llama3 = json!({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "(?i:'s|'t)|\\p{L}+|\\p{N}{1,3}|\\s+(?!\\S)"},
        "behavior": "Isolated", "invert": false}, {"type": "Digits", "individual_digits": true},
        {"type": "Punctuation", "behavior": "Isolated"}, {"type": "WhitespaceSplit"}]},
        "decoder": {"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": true}});
    let bert = json!({"normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
        "strip_accents": null, "lowercase": true}, "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true}, "post_processor":
        {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 4]}});
    // 1024 bytes of table, all zero, which map nothing, and one empty rule.
    let charsmap = format!("AAQA{}", "A".repeat(4 * 342));
    let t5 = json!({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "StripAccents"},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u{2581}"},
        {"type": "Precompiled", "precompiled_charsmap": charsmap}]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "first",
        "split": true}, "decoder": {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always",
        "split": true}});
    let settings = json!({"bos_token": {"content": "<s>"}, "eos_token": "<|end|>", "eos_token_id": [8, 1]});
    [
        (&bpe, &gpt2),
        (&bpe, &llama2),
        (&bpe, &llama3),
        (&word_piece, &bert),
        (&word_level, &t5),
        (&unigram, &t5),
    ]
    .into_iter()
    .map(|(model, steps)| whole(model, steps, &settings))
    .collect()
}

fn whole(model: &Value, steps: &Value, settings: &Value) -> Vec<u8> {
    let mut file = steps.clone();
    file["version"] = json!("1.0");
    file["model"] = model.clone();
    let token = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": special, "rstrip": false,
            "normalized": !special, "special": special})
    };
    file["added_tokens"] = json!([token(1, "<s>", true), token(8, "<|end|>", true), token(9, "cab", false)]);
    [file.to_string(), settings.to_string()].join("\0").into_bytes()
}
