//! A base with random weights and one token a byte: it starts in no time, and knows nothing.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{Dtype, TensorView};

const HIDDEN: usize = 64;
const INNER: usize = 128;
const LAYERS: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const CONTEXT: usize = 256;
/// The bytes, and the token that ends a text.
const VOCABULARY: usize = 257;
const END: &str = "<|endoftext|>";

/// Writes the base into `folder`.
pub fn write(folder: &Path) {
    fs::create_dir_all(folder).expect("a folder for the base");
    let save = |name: &str, value: &Value| fs::write(folder.join(name), value.to_string()).expect("written");
    save("config.json", &config());
    save("tokenizer.json", &tokenizer());
    save(
        "tokenizer_config.json",
        &json!({"bos_token": END, "eos_token": END, "chat_template":
            "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"}),
    );
    fs::write(folder.join("model.safetensors"), weights()).expect("written");
}

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": true,
        "bos_token_id": VOCABULARY - 1,
        "eos_token_id": VOCABULARY - 1,
        "torch_dtype": "float32",
    })
}

fn weights() -> Vec<u8> {
    let (kv, mut shapes) = (HIDDEN / HEADS * KV_HEADS, BTreeMap::new());
    shapes.insert("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]);
    shapes.insert("model.norm.weight".to_owned(), vec![HIDDEN]);
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![kv, HIDDEN]),
            ("self_attn.v_proj", vec![kv, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![INNER, HIDDEN]),
            ("mlp.up_proj", vec![INNER, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INNER]),
        ] {
            shapes.insert(format!("model.layers.{layer}.{name}.weight"), shape);
        }
    }
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let data: BTreeMap<&String, Vec<u8>> =
        shapes.iter().map(|(name, shape)| (name, values(shape, &mut random))).collect();
    let view = |name: &String| {
        TensorView::new(Dtype::F32, shapes[name].clone(), &data[name])
            .expect("as many bytes as the shape says")
    };
    safetensors::serialize(shapes.keys().map(|name| (name.clone(), view(name))), None).expect("serialised")
}

/// Norms are one; all else is small and random.
fn values(shape: &[usize], random: &mut ChaCha8Rng) -> Vec<u8> {
    let count: usize = shape.iter().product();
    let mut value = || if shape.len() == 1 { 1.0f32 } else { random.random_range(-0.1..0.1) };
    (0..count).flat_map(|_| value().to_le_bytes()).collect()
}

/// A byte-level tokenizer without a single merge.
fn tokenizer() -> Value {
    let vocabulary: BTreeMap<String, usize> =
        (0..=255u8).map(|byte| (shown(byte).to_string(), usize::from(byte))).collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{"id": VOCABULARY - 1, "content": END, "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "vocab": vocabulary, "merges": []},
    })
}

/// The character that byte-level tokenizers write for a byte: itself where it is visible, else the
/// next free one from 256 on.
fn shown(byte: u8) -> char {
    let visible = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if visible(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|byte| !visible(*byte)).count();
    char::from_u32(256 + before as u32).expect("a character")
}
