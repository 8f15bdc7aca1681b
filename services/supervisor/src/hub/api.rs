//! What the hub is asked, and what its refusals mean.

use super::cache::{is_commit, is_hex};
use super::{Name, Settings};
use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use ureq::http::{HeaderMap, Request, Response, Uri, header};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// A connection that gives nothing for so long is given up.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const REDIRECTS_MAX: usize = 10;
/// The list of a repository's files, bytes.
const LIST_BYTES_MAX: u64 = 64 << 20;

/// That the hub could not be reached, or could not answer just now: asking again may help.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Passing(pub(super) String);

/// A model on the hub, to ask about.
pub(super) struct Hub {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    /// The model.
    pub(super) name: Name,
}

/// The commit that a revision is at.
pub(super) struct Commit {
    pub(super) sha: String,
    pub(super) files: BTreeSet<String>,
}

/// What a file has to be.
pub(super) struct Announced {
    /// SHA-256 of its content, or the SHA-1 that git names it by.
    pub(super) etag: String,
    /// Bytes.
    pub(super) size: u64,
}

#[derive(Deserialize)]
struct Revision {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Hub {
    /// Nothing is asked yet.
    pub(super) fn new(settings: &Settings, name: &Name) -> Result<Self> {
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::PlatformVerifier)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let agent = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            // Redirects are followed here, so that the token is not sent along to another host.
            .max_redirects(0)
            // A size or a hash is that of the file as it is.
            .accept_encoding("identity")
            .user_agent(concat!("engram/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(ANSWER_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT))
            .build()
            .into();
        origin(&settings.endpoint).context("HF_ENDPOINT is not an address")?;
        let (endpoint, token) = (settings.endpoint.clone(), settings.token.clone());
        Ok(Self { agent, endpoint, token, name: name.clone() })
    }

    /// The commit that the revision is at now.
    ///
    /// # Errors
    /// When there is no such model or revision, this user may not see it, or the hub is not there.
    pub(super) fn commit(&self) -> Result<Commit> {
        let (endpoint, name) = (&self.endpoint, &self.name);
        let revision = name.revision.replace('/', "%2F");
        let url = format!("{endpoint}/api/models/{}/{}/revision/{revision}", name.org, name.name);
        let mut response = self.follow("GET", url, 0, |_| true)?.0;
        let text = response.body_mut().with_config().limit(LIST_BYTES_MAX).read_to_string();
        let text = text.map_err(|error| self.unreachable(&error))?;
        let answer: Revision = serde_json::from_str(&text)
            .with_context(|| format!("{endpoint} does not answer like a hub; is HF_ENDPOINT right?"))?;
        // It becomes the name of a folder.
        if !is_commit(&answer.sha) {
            bail!("{endpoint} names {:?} as the commit of {name}, which is none", answer.sha);
        }
        let files = answer.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        Ok(Commit { sha: answer.sha, files })
    }

    /// What a file of a commit has to be, without the file.
    ///
    /// # Errors
    /// As [`Self::commit`], and when the answer names no hash or size.
    pub(super) fn announced(&self, commit: &str, file: &str) -> Result<Announced> {
        // Where the file itself lies is another host, whose headers describe its own copy.
        let within = |next: &str| self.is_hub(next);
        let (response, passed) = self.follow("HEAD", self.file(commit, file), 0, within)?;
        let linked = |name: &str| {
            let headers = passed.iter().chain([response.headers()]);
            headers.filter_map(|headers| text(headers, name)).next_back()
        };
        let etag = linked("x-linked-etag").or_else(|| text(response.headers(), "etag"));
        let own_size =
            || text(response.headers(), "content-length").filter(|_| response.status().is_success());
        let size = linked("x-linked-size").or_else(own_size).and_then(|size| size.parse().ok());
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"'));
        match (etag, size) {
            // It becomes the name of a file, and says what to check.
            (Some(etag), Some(size)) if is_hex(etag) && [40, 64].contains(&etag.len()) => {
                Ok(Announced { etag: etag.to_owned(), size })
            }
            (Some(etag), Some(_)) => {
                bail!("{} gives {etag:?} as the hash of {file}, which is none", self.endpoint)
            }
            _ => {
                bail!("{} does not say which hash and size {file} has; is HF_ENDPOINT right?", self.endpoint)
            }
        }
    }

    /// A file of a commit, from its byte `from` on if the other side can do that: status 206 says so.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub(super) fn content(&self, commit: &str, file: &str, from: u64) -> Result<Response<Body>> {
        Ok(self.follow("GET", self.file(commit, file), from, |_| true)?.0)
    }

    fn file(&self, commit: &str, file: &str) -> String {
        format!("{}/{}/{}/resolve/{commit}/{file}", self.endpoint, self.name.org, self.name.name)
    }

    /// One request, and those it is redirected to, as long as `goes` likes where to.
    /// Gives back the last answer, and the headers of those before it.
    fn follow(
        &self,
        method: &str,
        mut url: String,
        from: u64,
        goes: impl Fn(&str) -> bool,
    ) -> Result<(Response<Body>, Vec<HeaderMap>)> {
        let mut passed = Vec::new();
        while passed.len() <= REDIRECTS_MAX {
            let response = self.send(method, &url, from)?;
            let status = response.status();
            if status.is_success() || status == 416 && from > 0 {
                return Ok((response, passed));
            }
            if !status.is_redirection() {
                return Err(self.refusal(&url, &response));
            }
            let to = text(response.headers(), "location").context("a redirect of the hub leads nowhere")?;
            let next = if to.starts_with('/') { origin(&url)? + to } else { to.to_owned() };
            if url.starts_with("https://") && !next.starts_with("https://") {
                bail!("{url} leads to {next}, where what is sent can be read and changed by others");
            }
            if !goes(&next) {
                return Ok((response, passed));
            }
            passed.push(response.headers().clone());
            url = next;
        }
        bail!("{} redirects in a circle", self.endpoint)
    }

    fn send(&self, method: &str, url: &str, from: u64) -> Result<Response<Body>> {
        let mut request = Request::builder().method(method).uri(url);
        if let Some(token) = &self.token
            && self.is_hub(url)
        {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        let request = request.body(()).with_context(|| format!("{url:?} is not an address"))?;
        self.agent.run(request).map_err(|error| self.unreachable(&error))
    }

    /// Whether an address is of the hub itself.
    fn is_hub(&self, url: &str) -> bool {
        origin(url).is_ok_and(|url| origin(&self.endpoint).is_ok_and(|hub| hub == url))
    }

    fn unreachable(&self, error: &ureq::Error) -> anyhow::Error {
        let endpoint = &self.endpoint;
        Passing(format!("{endpoint} cannot be reached ({error}): check the network, or give --base a folder"))
            .into()
    }

    fn refusal(&self, url: &str, response: &Response<Body>) -> anyhow::Error {
        let (name, endpoint) = (&self.name, &self.endpoint);
        let page = format!("{endpoint}/{}/{}", name.org, name.name);
        let status = response.status().as_u16();
        // Where files lie, an address is good for a while; the hub gives another one.
        if !self.is_hub(url) || [408, 429].contains(&status) || status >= 500 {
            let host = origin(url).unwrap_or_else(|_| endpoint.clone());
            return Passing(format!("{host} cannot answer now (status {status}): try again in a while"))
                .into();
        }
        let code = text(response.headers(), "x-error-code").unwrap_or_default();
        let told = match (status, code) {
            (403, _) | (401, "GatedRepo") => format!(
                "{name} is gated: accept its licence at {page}, and set HF_TOKEN to a token of that account"
            ),
            (401, _) if self.token.is_some() => {
                format!("{endpoint} refuses the token for {name}: set HF_TOKEN to one that may read it")
            }
            (401, _) => format!(
                "{endpoint} shows no {name}: check the name, and if it is private or gated set HF_TOKEN to a \
                 token that may read it (and accept its licence at {page})"
            ),
            (404, "RevisionNotFound") => {
                format!("{name} has no revision {}: {page}/tree/main names those there are", name.revision)
            }
            (404, _) => format!("there is no model {name} on {endpoint}: check its name and revision"),
            _ => format!("{endpoint} refuses {name} with status {status} {code}"),
        };
        anyhow!(told)
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim)
}

/// Scheme, host and port of an address.
fn origin(url: &str) -> Result<String> {
    let uri: Uri = url.parse().with_context(|| format!("{url:?} is not an address"))?;
    match (uri.scheme_str(), uri.authority()) {
        (Some(scheme @ ("http" | "https")), Some(authority)) => Ok(format!("{scheme}://{authority}")),
        _ => bail!("{url:?} is not an address that starts with https:// or http://"),
    }
}
