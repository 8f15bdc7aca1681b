//! Access to the reference values in `tests/golden` for the unit tests of this crate.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tch::Tensor;

use crate::active::ActiveAdapters;
use crate::device::Placement;
use crate::hf::ModelConfig;
use crate::llama::{Base, Input};
use crate::lora::Adapter;
use crate::weights;

pub fn dir(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden")).join(name)
}

/// A part of the shared data, which lies beside the checkout on some machines only.
pub fn shared(name: &str) -> Option<PathBuf> {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data")).join(name);
    if !path.exists() {
        println!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

pub fn tensors(name: &str) -> BTreeMap<String, Tensor> {
    weights::read_tensors(&dir(name)).unwrap()
}

pub fn config(name: &str) -> ModelConfig {
    ModelConfig::load(&dir(name)).unwrap()
}

/// One thread, because sums in another order are other numbers.
pub fn base(name: &str) -> Base {
    tch::set_num_threads(1);
    Base::load(&dir(name), &Placement::CPU_F32).unwrap()
}

pub fn adapter(name: &str) -> Adapter {
    Adapter::read_peft(&dir(name), &config("llama")).unwrap()
}

/// The adapter that the golden training run starts from. It has no effect yet, so that reading it as a PEFT
/// folder is rightly refused.
pub fn initial() -> Adapter {
    let mut tensors = tensors("train-initial/adapter_model.safetensors");
    let like = adapter("train-final");
    Adapter::from_parts(like.config().clone(), &config("llama"), |name, _| Ok(tensors.remove(name).unwrap()))
        .unwrap()
}

pub fn logits(base: &Base, adapters: &ActiveAdapters, ids: &Tensor) -> Tensor {
    let _guard = tch::no_grad_guard();
    let hidden = base.forward(&Input::rows(ids.shallow_clone(), 0), adapters, None).unwrap();
    let (batch, length) = ids.size2().unwrap();
    base.logits(&hidden).unwrap().view([batch, length, -1])
}

/// The largest absolute difference.
pub fn distance(x: &Tensor, y: &Tensor) -> f64 {
    (x - y).abs().max().double_value(&[])
}
