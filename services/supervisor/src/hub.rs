//! Bases from the Hugging Face hub, kept in the cache that Python's `huggingface_hub` keeps them in.
//!
//! The crate `hf-hub` (1.0.0) neither resumes an interrupted file, nor checks its hash, nor knows
//! `HF_HUB_OFFLINE`; so the protocol, which is three kinds of requests, is spoken here: [`api`] asks,
//! [`cache`] knows where things lie, and [`download`] brings them.

mod api;
mod cache;
mod download;

use anyhow::{Context, Result, bail};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

const ENDPOINT: &str = "https://huggingface.co";
const REVISION: &str = "main";

/// A model on the hub: `org/name`, or `org/name@revision`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    org: String,
    name: String,
    revision: String,
}

impl Name {
    /// The name, when the text is one.
    pub fn parse(text: &str) -> Option<Self> {
        let (repo, revision) = text.split_once('@').unwrap_or((text, REVISION));
        let (org, name) = repo.split_once('/')?;
        // Two dashes stand for the slash in the names of the cache's folders.
        let good = !repo.contains("--") && [org, name].into_iter().chain(revision.split('/')).all(is_plain);
        good.then(|| Self { org: org.to_owned(), name: name.to_owned(), revision: revision.to_owned() })
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.org, self.name)?;
        if self.revision == REVISION { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

/// Whether a text that came from elsewhere is harmless as the name of a file and in an address.
fn is_plain(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('.')
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

/// Where the hub is, where its cache is, and how this user may use them; from the variables that
/// `huggingface_hub` reads.
#[derive(Debug)]
struct Settings {
    endpoint: String,
    cache: PathBuf,
    token: Option<String>,
    offline: bool,
}

impl Settings {
    fn load() -> Result<Self> {
        Self::read(|name| std::env::var(name).ok(), dirs::home_dir())
    }

    fn read(variable: impl Fn(&str) -> Option<String>, home: Option<PathBuf>) -> Result<Self> {
        let set = |name: &str| variable(name).map(|value| value.trim().to_owned()).filter(|v| !v.is_empty());
        let folder = |name: &str| {
            let text = set(name)?;
            Some(match (text.strip_prefix("~/"), &home) {
                (Some(rest), Some(home)) => home.join(rest),
                _ => PathBuf::from(text),
            })
        };
        let huggingface = folder("HF_HOME")
            .or_else(|| folder("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .or_else(|| home.as_ref().map(|home| home.join(".cache/huggingface")))
            .context("there is no home folder for the hub's cache; set HF_HOME to a folder")?;
        let kept = || {
            let path = folder("HF_TOKEN_PATH").unwrap_or_else(|| huggingface.join("token"));
            let text = fs::read_to_string(path).ok()?;
            Some(text.trim().to_owned()).filter(|token| !token.is_empty())
        };
        let token = set("HF_TOKEN").or_else(kept);
        if token.as_ref().is_some_and(|token| !token.bytes().all(|byte| byte.is_ascii_graphic())) {
            bail!("the token in HF_TOKEN, or in the file that keeps it, is not one line of plain letters");
        }
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            bail!("HF_ENDPOINT is {endpoint:?}, which does not start with https:// or http://");
        }
        let offline = set("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_uppercase();
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache: folder("HF_HUB_CACHE").unwrap_or_else(|| huggingface.join("hub")),
            token,
            offline: ["1", "ON", "YES", "TRUE"].contains(&offline.as_str()),
        })
    }
}

/// The folder of a model in the cache; what is missing there is downloaded first.
///
/// The hub is asked each time which commit the revision is at. When it gives no answer, a copy that
/// is whole is good enough, and stderr says so.
///
/// # Errors
/// When the hub and the cache both cannot give the model, when it is none that this program runs,
/// or when what arrives is not what was announced.
pub fn resolve(name: &Name) -> Result<PathBuf> {
    let settings = Settings::load()?;
    let cache = cache::Cache::new(&settings.cache, name);
    let kept = cache.whole(&name.revision);
    if settings.offline {
        return kept.with_context(|| offline(name, &settings.cache));
    }
    let hub = api::Hub::new(&settings, name)?;
    match (hub.commit(), kept) {
        (Ok(commit), _) => download::bring(&hub, &cache, &commit),
        (Err(error), Some(folder)) => {
            eprintln!("engram: {error:#}; until then, the copy of {name} in the cache is used");
            Ok(folder)
        }
        (Err(error), None) => Err(error),
    }
}

fn offline(name: &Name, cache: &Path) -> String {
    format!(
        "the cache {} holds no whole copy of {name}, and HF_HUB_OFFLINE forbids the network; run this once \
         without HF_HUB_OFFLINE, or give --base a folder",
        cache.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        let name = |text: &str| Name::parse(text).map(|name| (name.to_string(), name.revision));
        let is = |text: &str, revision: &str| Some((text.to_owned(), revision.to_owned()));
        assert_eq!(name("org/some.name-1_B"), is("org/some.name-1_B", "main"));
        assert_eq!(name("org/name@v1.0"), is("org/name@v1.0", "v1.0"));
        assert_eq!(name("org/name@refs/pr/1"), is("org/name@refs/pr/1", "refs/pr/1"));
        for text in [
            "nano",
            "./org/name",
            "../name",
            "org/../name",
            "/org/name",
            "a/b/c",
            "org/",
            "org/name@",
            "a--b/c",
            "org/name@../x",
            "org/name@a//b",
            "org/na me",
            "org/name?x",
        ] {
            assert_eq!(name(text), None, "{text}");
        }
    }

    #[test]
    fn the_variables_of_huggingface_hub_are_followed() {
        let home = tempfile::tempdir().expect("a folder");
        fs::create_dir_all(home.path().join(".cache/huggingface")).expect("made");
        fs::write(home.path().join(".cache/huggingface/token"), "from-file\n").expect("written");
        let read = |set: &[(&str, &str)]| {
            let variable = |name: &str| {
                set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
            };
            Settings::read(variable, Some(home.path().to_owned()))
        };
        let cache = |set: &[(&str, &str)]| read(set).expect("settings").cache;
        assert_eq!(cache(&[]), home.path().join(".cache/huggingface/hub"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "~/h")]), home.path().join("h/hub"));
        assert_eq!(cache(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
        let token = |set: &[(&str, &str)]| read(set).expect("settings").token;
        assert_eq!(token(&[]).as_deref(), Some("from-file"));
        assert_eq!(token(&[("HF_TOKEN", " given ")]).as_deref(), Some("given"));
        assert_eq!(token(&[("HF_HOME", "/h")]), None);
        assert!(read(&[("HF_TOKEN", "two\nlines")]).is_err());
        assert!(read(&[("HF_ENDPOINT", "huggingface.co")]).is_err());
        assert_eq!(read(&[("HF_ENDPOINT", "http://mirror/")]).expect("settings").endpoint, "http://mirror");
        assert!(read(&[("HF_HUB_OFFLINE", "yes")]).expect("settings").offline);
        assert!(!read(&[("HF_HUB_OFFLINE", "0")]).expect("settings").offline);
    }
}
