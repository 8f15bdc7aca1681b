//! The frozen base: which folder `--base` means.

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

/// The folder that `--base` means: the built-in base, or a folder in the Hugging Face form.
///
/// # Errors
/// When there is no such base, or something is missing in its folder.
pub fn resolve(base: &str, data_dir: &Path) -> Result<PathBuf> {
    let folder = Path::new(base);
    if folder.is_dir() {
        check(folder)?;
        return folder.canonicalize().with_context(|| format!("{base} cannot be resolved"));
    }
    if base == BUILT_IN {
        return unpack(NANO, &data_dir.join("bases").join(BUILT_IN));
    }
    if is_hub_name(base) {
        bail!(
            "there is no folder {base}, and this version does not download bases; do it yourself with \
             'hf download {base} --local-dir {name}', then give --base ./{name}",
            name = base.rsplit('/').next().unwrap_or(base)
        );
    }
    bail!(
        "there is no base {base}; give a folder with config.json, tokenizer.json and model.safetensors, or '{BUILT_IN}'"
    )
}

/// `org/name`, as the Hugging Face hub names models.
fn is_hub_name(base: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    base.split_once('/').is_some_and(|(org, name)| plain(org) && plain(name))
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
        assert!(told("HuggingFaceTB/SmolLM2-135M").contains("hf download"));
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
