//! Writes a base as a Hugging Face folder.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use tch::{Kind, Tensor};

use crate::llama::Base;
use crate::weights;

/// Writes `config.json` and `model.safetensors` (in bf16) into `folder`.
///
/// # Errors
/// When they cannot be written.
pub fn write(base: &Base, folder: &Path) -> Result<()> {
    let save = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        fs::write(&path, bytes).with_context(|| format!("{}: cannot write", path.display()))
    };
    let tensors = named(base)?
        .into_iter()
        .map(|(name, tensor)| Ok((name, tensor.f_detach()?.f_to_kind(Kind::BFloat16)?)))
        .collect::<Result<Vec<_>>>()?;
    save("model.safetensors", &weights::to_bytes(&tensors, "format", "pt")?)?;
    save("config.json", format!("{:#}\n", base.config().to_json("bfloat16")).as_bytes())
}

/// What a tokenizer may consist of.
const TOKENIZER_FILES: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"];

/// Takes over the tokenizer of another model folder.
///
/// # Errors
/// When a file cannot be copied.
pub fn copy_tokenizer(from: &Path, to: &Path) -> Result<()> {
    for name in TOKENIZER_FILES {
        let path = from.join(name);
        if path.is_file() {
            fs::copy(&path, to.join(name)).with_context(|| format!("{}: cannot copy", path.display()))?;
        }
    }
    Ok(())
}

/// Every weight under the name that transformers knows it by; merged projections are taken apart.
fn named(base: &Base) -> Result<Vec<(String, Tensor)>> {
    let mut all = vec![("model.embed_tokens.weight".to_string(), base.embedding.shallow_clone())];
    if !base.config.tied {
        all.push(("lm_head.weight".into(), base.head.shallow_clone()));
    }
    let ff = base.config.intermediate_size;
    for (i, layer) in base.layers.iter().enumerate() {
        let mut add =
            |part: &str, tensor: Tensor| all.push((format!("model.layers.{i}.{part}.weight"), tensor));
        let qkv = layer.qkv.dense()?.f_split_with_sizes(base.config.qkv_rows(), 0)?;
        let gate_up = layer.gate_up.dense()?.f_split_with_sizes([ff, ff], 0)?;
        for (part, tensor) in ["q_proj", "k_proj", "v_proj"].iter().zip(qkv) {
            add(&format!("self_attn.{part}"), tensor);
        }
        for (part, tensor) in ["gate_proj", "up_proj"].iter().zip(gate_up) {
            add(&format!("mlp.{part}"), tensor);
        }
        if let Some(bias) = &layer.qkv_bias {
            let parts = bias.f_split_with_sizes(base.config.qkv_rows(), 0)?;
            for (part, tensor) in ["q_proj", "k_proj", "v_proj"].iter().zip(parts) {
                all.push((format!("model.layers.{i}.self_attn.{part}.bias"), tensor));
            }
        }
        for (part, tensor) in ["q_norm", "k_norm"].iter().zip(layer.qk_norm.iter().flatten()) {
            all.push((format!("model.layers.{i}.self_attn.{part}.weight"), tensor.shallow_clone()));
        }
        let mut add =
            |part: &str, tensor: Tensor| all.push((format!("model.layers.{i}.{part}.weight"), tensor));
        add("self_attn.o_proj", layer.o.dense()?);
        add("mlp.down_proj", layer.down.dense()?);
        add("input_layernorm", layer.attention_norm.shallow_clone());
        add("post_attention_layernorm", layer.mlp_norm.shallow_clone());
    }
    all.push(("model.norm.weight".into(), base.norm.shallow_clone()));
    Ok(all)
}
