//! The frozen base: which folder `--base` means.

use crate::hub;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// The base that comes with the program.
pub const BUILT_IN: &str = "nano";

/// Its files, in the program itself, so that a copied program needs nothing beside it.
const NANO: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../../../configs/models/nano/config.json")),
    ("tokenizer.json", include_bytes!("../../../configs/models/nano/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../../configs/models/nano/tokenizer_config.json")),
    ("model.safetensors", include_bytes!("../../../configs/models/nano/model.safetensors")),
];

/// Where everything is kept, unless `--data` says otherwise.
///
/// # Errors
/// When this system has no place for such things.
pub fn data_dir() -> Result<PathBuf> {
    let place = dirs::data_dir().context("this system names no place for data; give one with --data")?;
    Ok(place.join("engram"))
}

/// The folder that `--base` means, with all in it that serving needs.
///
/// # Errors
/// When there is no such base, or something is missing in its folder.
pub fn resolve(base: &str, data_dir: &Path) -> Result<PathBuf> {
    let folder = find(base, data_dir)?;
    check(&folder)?;
    folder.canonicalize().with_context(|| format!("{base} cannot be resolved"))
}

/// The folder that `--base` means: a folder in the Hugging Face form, the built-in base, or a model on
/// the Hugging Face hub.
///
/// # Errors
/// When there is no such base, or it cannot be brought here.
pub fn find(base: &str, data_dir: &Path) -> Result<PathBuf> {
    if Path::new(base).is_dir() {
        return Ok(PathBuf::from(base));
    }
    if base == BUILT_IN {
        return unpack(NANO, &data_dir.join("bases").join(BUILT_IN));
    }
    if let Some(name) = hub::Name::parse(base) {
        return hub::resolve(&name);
    }
    bail!(
        "there is no base {base}; give a folder with config.json, tokenizer.json and model.safetensors, a model on \
         the Hugging Face hub as org/name, or '{BUILT_IN}'"
    )
}

fn check(folder: &Path) -> Result<()> {
    let has = |name: &str| folder.join(name).is_file();
    let weights = has("model.safetensors") || has("model.safetensors.index.json");
    let missing = [
        (has("config.json"), "config.json"),
        (has("tokenizer.json"), "tokenizer.json"),
        (weights, "model.safetensors (or model.safetensors.index.json with its shards)"),
    ];
    match missing.iter().find(|(there, _)| !there) {
        Some((_, name)) => bail!("the base folder {} has no {name}", folder.display()),
        None => Ok(()),
    }
}

/// Writes the files that are not there already. Each comes into being by a rename, so that one cut
/// off by a crash is never taken for whole.
fn unpack(files: &[(&str, &[u8])], folder: &Path) -> Result<PathBuf> {
    fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    for (name, bytes) in files {
        let (target, part) = (folder.join(name), folder.join(format!("{name}.part")));
        if fs::read(&target).is_ok_and(|there| there == *bytes) {
            continue;
        }
        fs::write(&part, bytes)
            .and_then(|()| fs::rename(&part, &target))
            .with_context(|| format!("{} cannot be written", target.display()))?;
    }
    Ok(folder.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_name_is_told_what_to_do() {
        let data = tempfile::tempdir().expect("a folder");
        let told = |base: &str| format!("{:#}", resolve(base, data.path()).expect_err("refused"));
        assert!(told("giant").contains("'nano'"));
        assert!(told("./no/such/folder").contains("there is no base"));
        assert!(told(&data.path().to_string_lossy()).contains("has no config.json"));
    }

    #[test]
    fn unpacking_repairs_what_is_damaged_and_leaves_the_rest() {
        let data = tempfile::tempdir().expect("a folder");
        let folder = data.path().join("deep/base");
        let files: &[(&str, &[u8])] = &[("a", b"one"), ("b", b"two")];
        unpack(files, &folder).expect("unpacked");
        fs::write(folder.join("a"), "damaged").expect("written");
        unpack(files, &folder).expect("unpacked again");
        assert_eq!(fs::read(folder.join("a")).expect("there"), b"one");
        assert_eq!(fs::read_dir(&folder).expect("there").count(), 2);
    }
}
