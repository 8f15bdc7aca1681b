//! Who is let in: keys, rates, and on loopback the protection against other people's web pages.

use crate::error::{ApiError, Result};
use actix_web::http::header::{self, HeaderMap, HeaderName};
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use std::num::NonZeroU32;

/// What answers without a key, so that a supervisor or a load balancer need not hold one.
const OPEN_PATHS: [&str; 3] = ["/livez", "/readyz", "/health"];

/// What a browser shows before its user has been asked for the key: the page without any of its content,
/// and the description of the API, which is the same everywhere.
const PAGE_PATHS: [&str; 7] = [
    "/",
    "/docs",
    "/openapi.json",
    "/assets/page.js",
    "/assets/page.css",
    "/assets/docs.css",
    "/assets/icon.svg",
];

/// Requests of one key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rate {
    /// In the long run.
    pub requests_per_s: NonZeroU32,
    /// At once.
    pub burst: NonZeroU32,
}

/// Decides which requests are answered.
pub(crate) struct Guard {
    keys: Vec<Key>,
    clock: DefaultClock,
}

struct Key {
    /// Of the key: hashes are compared in constant time, and a hash in memory betrays nothing.
    hash: blake3::Hash,
    rate: DefaultDirectRateLimiter,
}

impl Guard {
    /// Without keys everybody on this machine is let in, and nobody's web page.
    pub(crate) fn new(keys: &[String], rate: Rate) -> Self {
        let quota = Quota::per_second(rate.requests_per_s).allow_burst(rate.burst);
        let key = |key: &String| Key { hash: blake3::hash(key.as_bytes()), rate: RateLimiter::direct(quota) };
        Self { keys: keys.iter().map(key).collect(), clock: DefaultClock::default() }
    }

    /// Whether one of some keys has to be shown.
    pub(crate) fn needs_key(&self) -> bool {
        !self.keys.is_empty()
    }

    /// Whether a request for `path` with these headers is answered.
    pub(crate) fn admit(&self, path: &str, headers: &HeaderMap) -> Result<()> {
        if OPEN_PATHS.contains(&path) {
            return Ok(());
        }
        if self.keys.is_empty() {
            return same_machine(headers);
        }
        if PAGE_PATHS.contains(&path) {
            return Ok(());
        }
        let given = bearer(headers).map(|key| blake3::hash(key.as_bytes()));
        // All keys are looked at, so that the time taken does not tell which of them it was.
        let mut known = None;
        for key in &self.keys {
            if Some(key.hash) == given {
                known = Some(key);
            }
        }
        let key = known.ok_or_else(ApiError::unauthorized)?;
        key.rate.check().map_err(|not_until| {
            let wait = not_until.wait_time_from(self.clock.now());
            ApiError::rate_limited(wait.as_secs() + 1)
        })
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = only(headers, header::AUTHORIZATION)?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
}

/// A page in a browser can reach loopback under its own host name (DNS rebinding), or post to it
/// from its own origin. Both headers are set by the browser, and the page cannot change them.
fn same_machine(headers: &HeaderMap) -> Result<()> {
    if !only(headers, header::HOST).is_some_and(is_loopback) {
        let message = "without keys this server answers only under localhost, 127.0.0.1 and [::1]";
        return Err(ApiError::forbidden(message));
    }
    if headers.contains_key(header::ORIGIN) {
        let origin = only(headers, header::ORIGIN).unwrap_or_default();
        let host = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        if !host.is_some_and(is_loopback) {
            let message = "without keys this server answers no web page of another origin";
            return Err(ApiError::forbidden(message));
        }
    }
    // Pictures and frames come without an origin. To follow a link here is allowed: it changes nothing.
    let fetch = |name| only(headers, HeaderName::from_static(name)).unwrap_or_default();
    if fetch("sec-fetch-site") == "cross-site"
        && (fetch("sec-fetch-mode"), fetch("sec-fetch-dest")) != ("navigate", "document")
    {
        return Err(ApiError::forbidden("without keys this server is part of no other web page"));
    }
    Ok(())
}

/// The header's value, where it is there once and readable.
fn only(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    let mut values = headers.get_all(name);
    match (values.next(), values.next()) {
        (Some(value), None) => value.to_str().ok(),
        _ => None,
    }
}

/// Whether `host` is this machine's name for itself, with any port.
fn is_loopback(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    ["localhost", "127.0.0.1", "[::1]"].iter().any(|own| own.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use actix_web::ResponseError;
    use actix_web::http::header::HeaderValue;

    fn guard(keys: &[&str]) -> Guard {
        let keys: Vec<String> = keys.iter().map(|key| (*key).to_owned()).collect();
        let [requests_per_s, burst] = [1, 2].map(|n| NonZeroU32::new(n).expect("not zero"));
        Guard::new(&keys, Rate { requests_per_s, burst })
    }

    fn status(guard: &Guard, path: &str, headers: &[(HeaderName, &str)]) -> u16 {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(name.clone(), HeaderValue::from_str(value).expect("a header"));
        }
        guard.admit(path, &map).map_or_else(|error| error.status_code().as_u16(), |()| 200)
    }

    #[test]
    fn without_keys_only_this_machine_is_answered() {
        let guard = guard(&[]);
        for host in ["localhost", "LOCALHOST:80", "127.0.0.1:8080", "[::1]", "[::1]:1"] {
            assert_eq!(status(&guard, "/v1/models", &[(header::HOST, host)]), 200, "{host}");
        }
        for host in ["evil.example", "localhost.evil.example", "127.0.0.1.x:1", "", "::1", "[::2]"] {
            assert_eq!(status(&guard, "/v1/models", &[(header::HOST, host)]), 403, "{host}");
            assert_eq!(status(&guard, "/livez", &[(header::HOST, host)]), 200, "{host}");
        }
        assert_eq!(status(&guard, "/", &[]), 403);
        let twice = [(header::HOST, "localhost"), (header::HOST, "localhost")];
        assert_eq!(status(&guard, "/", &twice), 403);
    }

    #[test]
    fn a_web_page_of_another_origin_is_refused() {
        for (origin, expected) in [
            ("http://localhost:3000", 200),
            ("https://127.0.0.1", 200),
            ("null", 403),
            ("https://evil.example", 403),
            ("http://localhost.evil.example", 403),
        ] {
            let headers = [(header::HOST, "localhost"), (header::ORIGIN, origin)];
            assert_eq!(status(&guard(&[]), "/v1/documents", &headers), expected, "{origin}");
        }
    }

    #[test]
    fn a_link_may_lead_here_and_a_frame_or_picture_may_not() {
        for (mode, dest, expected) in [
            ("navigate", "document", 200),
            ("navigate", "iframe", 403),
            ("no-cors", "image", 403),
            ("no-cors", "script", 403),
            ("", "", 403),
        ] {
            let fetch = |site| {
                let names = ["sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest"];
                let [site, mode, dest] = [(0, site), (1, mode), (2, dest)]
                    .map(|(n, value)| (HeaderName::from_static(names[n]), value));
                status(&guard(&[]), "/", &[(header::HOST, "localhost"), site, mode, dest])
            };
            assert_eq!(fetch("cross-site"), expected, "{mode} {dest}");
            assert_eq!(fetch("same-origin"), 200, "{mode} {dest}");
        }
    }

    #[test]
    fn with_keys_the_empty_page_is_open_and_nothing_in_it() {
        let guard = guard(&["one"]);
        for path in PAGE_PATHS {
            assert_eq!(status(&guard, path, &[]), 200, "{path}");
        }
        for path in ["/events", "/assets/other", "/v1/status", "/metrics"] {
            assert_eq!(status(&guard, path, &[]), 401, "{path}");
        }
    }

    #[test]
    fn with_keys_one_of_them_is_needed_and_its_rate_is_kept() {
        let guard = guard(&["one", "two"]);
        let with = |value| status(&guard, "/v1/models", &[(header::AUTHORIZATION, value)]);
        assert_eq!(status(&guard, "/v1/models", &[]), 401);
        for bad in ["", "one", "Bearer", "Bearer three", "Basic one", "Bearer one two"] {
            assert_eq!(with(bad), 401, "{bad}");
        }
        assert_eq!([with("Bearer one"), with("bearer one"), with("Bearer one")], [200, 200, 429]);
        assert_eq!(with("Bearer two"), 200);
    }
}
