//! Reading and writing safetensors, strictly.
//!
//! `VarStore::load` is never used: it broadcasts wrong shapes, converts types, takes NaN, and leaves live
//! weights half overwritten when a key is missing. Here everything is checked before anything is replaced.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, SafeTensors, View};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::limits;

/// Maps a file into memory for reading.
pub(crate) fn map(path: &Path) -> Result<Mmap> {
    // Opening a pipe would wait for a writer.
    ensure!(!path.exists() || path.is_file(), "{}: not a regular file", path.display());
    let file = File::open(path).with_context(|| format!("{}: cannot open", path.display()))?;
    // SAFETY: the map is read-only. A file that another process cuts short meanwhile would kill this one, as it
    // would any program that maps its weights; model folders are not written to while they are in use.
    #[allow(unsafe_code)]
    unsafe { Mmap::map(&file) }.with_context(|| format!("{}: cannot map into memory", path.display()))
}

/// The weight files of a model folder: the one `model.safetensors`, or the shards its index names, sorted.
///
/// # Errors
/// When there is neither, or the index is malformed or names a file outside the folder.
pub fn model_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let single = dir.join("model.safetensors");
    if single.exists() {
        return Ok(vec![single]);
    }
    let index = dir.join("model.safetensors.index.json");
    let text = limits::read_text(&index).with_context(|| {
        format!("{}: neither model.safetensors nor model.safetensors.index.json can be read", dir.display())
    })?;
    let index: Value = serde_json::from_str(&text).with_context(|| format!("{}", index.display()))?;
    let map = index["weight_map"].as_object().context("the shard index has no weight_map")?;
    let names: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
    ensure!(!names.is_empty(), "the weight_map of the shard index is empty");
    for name in &names {
        let plain = Path::new(name).file_name().is_some_and(|file| file == *name);
        ensure!(plain, "the shard index names {name:?}, which is not a plain file name");
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

/// Where one tensor lies in a mapped file.
struct Entry {
    file: usize,
    kind: Kind,
    shape: Vec<i64>,
    start: usize,
    end: usize,
}

/// The tensors of some safetensors files, handed out one at a time and checked on the way.
pub struct Weights {
    files: Vec<Mmap>,
    entries: BTreeMap<String, Entry>,
}

impl Weights {
    /// Maps the files and reads their headers.
    ///
    /// # Errors
    /// When a file is missing or not safetensors, or two files hold the same name.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        let mut weights = Self { files: Vec::new(), entries: BTreeMap::new() };
        for path in paths {
            let data = map(path)?;
            weights.read_header(&data).with_context(|| format!("{}", path.display()))?;
            weights.files.push(data);
        }
        Ok(weights)
    }

    fn read_header(&mut self, data: &[u8]) -> Result<()> {
        let (header, metadata) = SafeTensors::read_metadata(data).context("not a safetensors file")?;
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let shape = info.shape.iter().map(|&n| n as i64).collect();
            let kind = kind_of(info.dtype).with_context(|| format!("tensor {name}"))?;
            // Eight bytes before the header hold its length.
            let entry = Entry {
                file: self.files.len(),
                kind,
                shape,
                start: 8 + header + start,
                end: 8 + header + end,
            };
            ensure!(self.entries.insert(name.clone(), entry).is_none(), "tensor {name} is in two files");
        }
        Ok(())
    }

    /// Whether a tensor of this name is left.
    pub fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The shape of a tensor that is left.
    pub fn shape(&self, name: &str) -> Option<&[i64]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// Takes out one tensor, as a copy on the CPU in `kind`.
    ///
    /// # Errors
    /// When it is missing, has another shape, is not a float, or holds NaN or infinity.
    pub fn take(&mut self, name: &str, shape: &[i64], kind: Kind) -> Result<Tensor> {
        let entry = self.entries.remove(name).with_context(|| format!("tensor {name} is missing"))?;
        ensure!(entry.shape == shape, "tensor {name} has shape {:?}, expected {shape:?}", entry.shape);
        ensure!(
            matches!(entry.kind, Kind::Float | Kind::Half | Kind::BFloat16),
            "tensor {name} is {:?}: only f32, f16 and bf16 are read",
            entry.kind
        );
        let data = &self.files[entry.file][entry.start..entry.end];
        let tensor = Tensor::f_from_data_size(data, shape, entry.kind)?.f_to_kind(kind)?;
        ensure!(is_finite(&tensor)?, "tensor {name} holds NaN or infinity (as {kind:?})");
        Ok(tensor)
    }

    /// Ends the reading: whatever is left was not expected. `ignored` names what may be left.
    ///
    /// # Errors
    /// Names up to three tensors that belong to no module.
    pub fn finish(self, ignored: impl Fn(&str) -> bool) -> Result<()> {
        let left: Vec<&String> = self.entries.keys().filter(|name| !ignored(name)).collect();
        if left.is_empty() {
            return Ok(());
        }
        bail!("{} unexpected tensors, among them {:?}", left.len(), &left[..left.len().min(3)])
    }
}

/// Whether a tensor holds neither NaN nor infinity.
///
/// # Errors
/// Only those of libtorch.
pub fn is_finite(tensor: &Tensor) -> Result<bool> {
    if tensor.numel() == 0 {
        return Ok(true);
    }
    // Both ends are NaN when any element is, and no copy is made.
    let (least, most) = tensor.f_aminmax(None::<i64>, false)?;
    Ok(least.f_double_value(&[])?.is_finite() && most.f_double_value(&[])?.is_finite())
}

fn kind_of(dtype: Dtype) -> Result<Kind> {
    Ok(match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I32 => Kind::Int,
        Dtype::U8 => Kind::Uint8,
        Dtype::I64 => Kind::Int64,
        other => bail!("type {other:?} is not supported"),
    })
}

/// A tensor's bytes in the form that safetensors writes.
struct Blob {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Blob {
    fn new(tensor: &Tensor) -> Result<Self> {
        let dtype = match tensor.f_kind()? {
            Kind::Float => Dtype::F32,
            Kind::BFloat16 => Dtype::BF16,
            Kind::Half => Dtype::F16,
            Kind::Int => Dtype::I32,
            Kind::Uint8 => Dtype::U8,
            Kind::Int64 => Dtype::I64,
            other => bail!("a tensor of kind {other:?} is not written"),
        };
        let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
        let mut bytes = vec![0; tensor.numel() * tensor.f_kind()?.elt_size_in_bytes()];
        tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
        Ok(Self { dtype, shape: tensor.size().iter().map(|&n| n as usize).collect(), bytes })
    }
}

impl View for &Blob {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Serialises named tensors, with one entry of metadata; equal input gives equal bytes.
///
/// One entry only, because the format's writer keeps metadata in a hash map, whose order would vary.
///
/// # Errors
/// When a tensor has a kind other than f32, f16, bf16, i32 or i64.
pub fn to_bytes(tensors: &[(String, Tensor)], key: &str, value: &str) -> Result<Vec<u8>> {
    let blobs: Vec<(&str, Blob)> = tensors
        .iter()
        .map(|(name, tensor)| Ok((name.as_str(), Blob::new(tensor)?)))
        .collect::<Result<_>>()?;
    let metadata = HashMap::from([(key.to_string(), value.to_string())]);
    Ok(safetensors::serialize(blobs.iter().map(|(name, blob)| (*name, blob)), Some(metadata))?)
}

/// Reads back what [`to_bytes`] wrote: the tensors by name, and the value of metadata entry `key`.
///
/// # Errors
/// When the bytes are not safetensors, or the entry is missing.
pub fn from_bytes(bytes: &[u8], key: &str) -> Result<(BTreeMap<String, Tensor>, String)> {
    let value = metadata(bytes, key)?;
    let mut tensors = BTreeMap::new();
    for (name, view) in SafeTensors::deserialize(bytes)?.tensors() {
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        tensors.insert(name, Tensor::f_from_data_size(view.data(), &shape, kind_of(view.dtype())?)?);
    }
    Ok((tensors, value))
}

/// The value of metadata entry `key` of safetensors.
pub(crate) fn metadata(bytes: &[u8], key: &str) -> Result<String> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).context("not safetensors")?;
    let value = metadata.metadata().as_ref().and_then(|map| map.get(key));
    value.cloned().with_context(|| format!("no metadata {key:?}"))
}

/// All tensors of a safetensors file as they are: for data such as token ids, not for weights.
///
/// # Errors
/// When the file cannot be read or holds a kind other than f32, f16, bf16, i32 and i64.
pub fn read_tensors(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let data = map(path)?;
    let file =
        SafeTensors::deserialize(&data).with_context(|| format!("{}: not safetensors", path.display()))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        tensors.insert(name, Tensor::f_from_data_size(view.data(), &shape, kind_of(view.dtype())?)?);
    }
    Ok(tensors)
}

/// One flat f32 vector out of a map of tensors, checked.
pub(crate) fn take_flat(tensors: &mut BTreeMap<String, Tensor>, name: &str, len: i64) -> Result<Tensor> {
    let tensor = tensors.remove(name).with_context(|| format!("tensor {name} is missing"))?;
    ensure!(tensor.size() == [len], "tensor {name} has shape {:?}, expected [{len}]", tensor.size());
    ensure!(tensor.f_kind()? == Kind::Float, "tensor {name} is not f32");
    ensure!(is_finite(&tensor)?, "tensor {name} holds NaN or infinity");
    Ok(tensor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_equal_for_equal_tensors_and_read_back() {
        let tensors = vec![
            ("b".to_string(), Tensor::from_slice(&[1f32, 2.0])),
            ("a".to_string(), Tensor::from_slice(&[3i64])),
        ];
        let one = to_bytes(&tensors, "k", "v").unwrap();
        assert_eq!(one, to_bytes(&tensors, "k", "v").unwrap());
        let (read, value) = from_bytes(&one, "k").unwrap();
        assert_eq!((read["b"].size(), value.as_str()), (vec![2], "v"));
        assert!(from_bytes(&one, "other").is_err());
    }

    #[test]
    fn shards_outside_the_folder_are_refused() {
        let dir = std::env::temp_dir().join(format!("engram-shards-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("model.safetensors.index.json"), r#"{"weight_map":{"x":"../secret"}}"#)
            .unwrap();
        let error = model_files(&dir).unwrap_err().to_string();
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(error.contains("../secret"), "{error}");
    }
}
