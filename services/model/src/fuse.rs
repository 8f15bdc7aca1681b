//! A base with an adapter in its weights: for programs that know no adapters.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::device::Precision;
use crate::limits;
use crate::lora::Adapter;
use crate::weights;

/// What lies beside the weights in a model folder and belongs to its text side.
const BESIDE: [&str; 4] = ["json", "jinja", "txt", "model"];
const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";

impl Adapter {
    /// What it adds to each matrix of the model, `scale * B A` [outputs, inputs] in f32, by the matrix's module.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn changes(&self) -> Result<Vec<(String, Tensor)>> {
        let _guard = tch::no_grad_guard();
        let change = |module: &crate::lora::Module| {
            let (a, b) = self.factors(module);
            Ok((module.target.module(module.layer), b.f_matmul(&a)?.f_mul_scalar(module.scale)?))
        };
        self.modules.iter().map(change).collect()
    }
}

/// Writes the base in `dir` with the adapter added to its weights into the folder `out`, as a model folder in the
/// Hugging Face form, in `precision`. A shard at a time is in memory.
///
/// # Errors
/// When the adapter changes a matrix that the base does not have, or a weight does not fit the precision.
pub fn write(dir: &Path, adapter: &Adapter, precision: Precision, out: &Path) -> Result<()> {
    let _guard = tch::no_grad_guard();
    ensure!(
        !out.exists() || fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none()),
        "{} is there already: give a new or an empty folder",
        out.display()
    );
    fs::create_dir_all(out).with_context(|| format!("{}: cannot create", out.display()))?;
    let mut changes: BTreeMap<String, Tensor> =
        adapter.changes()?.into_iter().map(|(module, change)| (module + ".weight", change)).collect();
    let mut bytes = 0;
    for file in weights::model_files(dir)? {
        let name = file.file_name().context("a weight file has no name")?;
        let mut tensors = Vec::new();
        for (name, tensor) in weights::read_tensors(&file)? {
            let tensor = fused(&name, &tensor, changes.remove(&name).as_ref(), precision.kind())?;
            bytes += tensor.numel() * tensor.f_kind()?.elt_size_in_bytes();
            tensors.push((name, tensor));
        }
        let to = out.join(name);
        fs::write(&to, weights::to_bytes(&tensors, "format", "pt")?)
            .with_context(|| format!("{}: cannot write", to.display()))?;
    }
    if let Some(name) = changes.keys().next() {
        bail!("the adapter changes {name}, which the base in {} does not have", dir.display());
    }
    copy_beside(dir, precision, bytes, out)
}

fn fused(name: &str, tensor: &Tensor, change: Option<&Tensor>, kind: Kind) -> Result<Tensor> {
    if !matches!(tensor.f_kind()?, Kind::Float | Kind::Half | Kind::BFloat16) {
        return Ok(tensor.shallow_clone());
    }
    let sum = match change {
        Some(change) => {
            ensure!(
                tensor.size() == change.size(),
                "{name} is {:?} in the base, and {:?} in the adapter",
                tensor.size(),
                change.size()
            );
            tensor.f_to_kind(Kind::Float)?.f_add(change)?
        }
        None => tensor.shallow_clone(),
    };
    let rounded = sum.f_to_kind(kind)?;
    ensure!(weights::is_finite(&rounded)?, "{name} does not fit {kind:?}: take another precision");
    Ok(rounded)
}

fn copy_beside(dir: &Path, precision: Precision, bytes: usize, out: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("{}: cannot be read", dir.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let wanted = path.extension().is_some_and(|extension| BESIDE.iter().any(|known| extension == *known));
        let to = out.join(&name);
        match name.as_str() {
            _ if !wanted || !path.is_file() => {}
            CONFIG => rewrite(&path, &to, |config| {
                let name = match precision {
                    Precision::F32 => "float32",
                    Precision::Bf16 => "bfloat16",
                    Precision::F16 => "float16",
                };
                // Newer programs read the one, older ones the other.
                for key in ["torch_dtype", "dtype"] {
                    if config.get(key).is_some() || key == "torch_dtype" {
                        config[key] = json!(name);
                    }
                }
            })?,
            INDEX => rewrite(&path, &to, |index| index["metadata"] = json!({"total_size": bytes}))?,
            _ => drop(fs::copy(&path, &to).with_context(|| format!("{}: cannot write", to.display()))?),
        }
    }
    Ok(())
}

fn rewrite(from: &Path, to: &Path, change: impl FnOnce(&mut Value)) -> Result<()> {
    let mut value: Value = serde_json::from_str(&limits::read_text(from)?)?;
    change(&mut value);
    fs::write(to, format!("{value:#}\n")).with_context(|| format!("{}: cannot write", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Placement;
    use crate::golden;
    use crate::llama::Base;

    fn logits(dir: &Path, adapter: Option<&Adapter>) -> Tensor {
        tch::set_num_threads(1);
        let base = Base::load(dir, &Placement::CPU_F32).unwrap();
        let ids = Tensor::from_slice(&[1i64, 7, 3, 9, 2, 5]).view([1, 6]);
        let active: Vec<_> = adapter.iter().map(|adapter| (*adapter, 1.0)).collect();
        golden::logits(&base, &base.activate(&active).unwrap(), &ids)
    }

    #[test]
    fn a_fused_base_computes_what_base_and_adapter_do() {
        let (base, folder) = (golden::dir("llama"), tempfile::tempdir().unwrap());
        for name in ["peft-r8", "peft-rslora", "peft-rank-pattern"] {
            let (adapter, out) = (golden::adapter(name), folder.path().join(name));
            write(&base, &adapter, Precision::F32, &out).unwrap();
            let fused = logits(&out, None);
            assert!(golden::distance(&fused, &logits(&base, Some(&adapter))) < 1e-4, "{name}");
            assert!(golden::distance(&fused, &logits(&base, None)) > 1e-3, "{name} changes something");
            let again = write(&base, &adapter, Precision::F32, &out).unwrap_err().to_string();
            assert!(again.contains("there already"), "{again}");
        }
        let half = folder.path().join("half");
        write(&base, &golden::adapter("peft-r8"), Precision::Bf16, &half).unwrap();
        let told = |name: &str| fs::read_to_string(half.join(name)).unwrap();
        assert!(told("config.json").contains("\"torch_dtype\": \"bfloat16\""), "{}", told("config.json"));
        let size = |dir: &Path| fs::metadata(dir.join("model.safetensors")).unwrap().len();
        assert!(size(&half) < size(&folder.path().join("peft-r8")) * 6 / 10);
    }
}
