//! Telling the server, so that being killed between any two steps loses nothing.

use super::scan::{Change, Found, Seen, hash};
use super::state::{Known, State};
use crate::client::{Client, Refused, segment};
use crate::corpus::{Draft, Reader};
use crate::sending::Sending;
use anyhow::Result;
use proto::{Content, Document, Domain, Message};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::Write;
use ureq::http::StatusCode;

/// Documents are listed so many at a time.
const PAGE: usize = 1000;

/// What is said of every document.
#[derive(Debug, Default)]
pub struct About {
    /// Its domain.
    pub domain: Option<String>,
    /// Its importance.
    pub importance: Option<f32>,
}

/// A server that is being told.
pub struct Applying<'a> {
    /// The server.
    pub client: &'a Client,
    /// Reads the files.
    pub reader: Reader,
    /// What is said of every document.
    pub about: About,
    /// What was learned.
    pub state: State,
    /// Gets a line for everything that is done.
    pub out: &'a mut dyn Write,
}

impl Applying<'_> {
    /// Compares what is known with what the server has. A server that has none of it is a new one, which learns
    /// everything; of one that lacks some, its owner has forgotten that by hand, and it stays so.
    ///
    /// # Errors
    /// When the server does not answer.
    pub fn reconcile(&mut self) -> Result<()> {
        let known: BTreeSet<String> =
            self.state.files.values().flat_map(|known| known.documents.iter().cloned()).collect();
        if known.is_empty() {
            return Ok(());
        }
        let mut path = format!("/v1/documents?limit={PAGE}");
        if let Some(domain) = &self.about.domain {
            path.push_str(&format!("&domain={}", segment(domain)));
        }
        let mut before = String::new();
        loop {
            let page = self.client.get(&format!("{path}{before}"))?;
            let ids: Vec<&str> = page["documents"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|document| document["id"].as_str())
                .collect();
            if ids.iter().any(|id| known.contains(*id)) {
                return Ok(());
            }
            match ids.last() {
                Some(last) => before = format!("&before={}", segment(last)),
                None => break,
            }
        }
        writeln!(self.out, "new server: it knows nothing of this folder, and is taught all of it")?;
        self.state.files.clear();
        self.state.stale.clear();
        self.state.save()
    }

    /// Does what a change asks for.
    ///
    /// # Errors
    /// When the server does not answer, or the state cannot be written.
    pub fn apply(&mut self, change: &Change, found: &Found) -> Result<()> {
        match change {
            Change::Rename { from, to } => {
                if let Some(known) = self.state.files.remove(from) {
                    self.state.files.insert(to.clone(), found.files[to].known(known.documents));
                }
                self.state.save()?;
                self.line("renamed", &format!("{from} -> {to}"), "")
            }
            Change::Learn(name) => self.learn(name, &found.files[name]),
            Change::Forget(name) => {
                let documents =
                    self.state.files.remove(name).map(|known| known.documents).unwrap_or_default();
                let count = documents.len();
                self.state.stale.extend(documents);
                self.state.save()?;
                fail::fail_point!("watch::gone");
                self.forget_stale()?;
                self.line("forgot", name, &counted(count))
            }
        }
    }

    fn learn(&mut self, name: &str, seen: &Seen) -> Result<()> {
        let before = self.state.files.get(name).cloned().unwrap_or_default();
        let drafts = seen.file.documents(&self.reader);
        if hash(&seen.file.path)?.as_ref() != Some(&seen.hash) {
            // It is being written: the next event, or the next look, finds it whole.
            return Ok(());
        }
        let (drafts, mut errors) = sorted(drafts.unwrap_or_else(|error| vec![Err(error)]), &self.about);
        // First it is written down what the server will be told, so that it can be taken back.
        let mut may_know: BTreeSet<String> = drafts.iter().filter_map(id_of).collect();
        may_know.extend(before.documents.iter().cloned());
        let begun = Known { hash: None, stamp: seen.stamp, documents: may_know.clone() };
        self.state.files.insert(name.to_owned(), begun);
        self.state.save()?;
        fail::fail_point!("watch::begun");
        let mut sending = Sending::to(self.client);
        for draft in drafts {
            sending.push(draft)?;
        }
        let (sent, refused) = sending.finish()?;
        errors.extend(refused);
        fail::fail_point!("watch::sent");
        let says: BTreeSet<String> =
            sent.iter().filter_map(|sent| sent.answer["id"].as_str().map(str::to_owned)).collect();
        // A version that nothing can be read from is most likely half of one: what was known stays known.
        let unreadable = says.is_empty() && !errors.is_empty();
        let kept = if unreadable { before.documents.clone() } else { says };
        self.state.stale.extend(may_know.difference(&kept).cloned());
        let (count, dropped) = (kept.len(), before.documents.difference(&kept).count());
        self.state.files.insert(name.to_owned(), seen.known(kept));
        self.state.save()?;
        fail::fail_point!("watch::known");
        for error in &errors {
            self.line("left out", &format!("{error:#}"), "")?;
        }
        if !sent.is_empty() {
            self.line("learn", name, &counted(count))?;
        }
        self.forget_stale()?;
        if dropped > 0 {
            self.line("forgot", name, &format!("{} that it no longer says", counted(dropped)))?;
        }
        Ok(())
    }

    /// Has the server forget what no file says any more.
    ///
    /// # Errors
    /// When the server does not answer, or the state cannot be written.
    pub fn forget_stale(&mut self) -> Result<()> {
        while let Some(id) = self.state.stale.first().cloned() {
            if !self.state.is_said(&id) {
                match self.client.delete(&format!("/v1/documents/{}", segment(&id))) {
                    Ok(_) => {}
                    Err(error) if is_missing(&error) => {}
                    Err(error) => return Err(error),
                }
                fail::fail_point!("watch::forgotten");
            }
            self.state.stale.remove(&id);
            self.state.save()?;
        }
        Ok(())
    }

    fn line(&mut self, what: &str, name: &str, more: &str) -> Result<()> {
        writeln!(self.out, "{}", format!("{what:9}  {name}  {more}").trim_end())?;
        Ok(self.out.flush()?)
    }
}

/// Drafts with what is said of all of them, and what is none.
fn sorted(drafts: Vec<Result<Draft>>, about: &About) -> (Vec<Draft>, Vec<anyhow::Error>) {
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for draft in drafts {
        match draft {
            Ok(mut draft) => {
                let body = &mut draft.body;
                about.domain.iter().for_each(|domain| drop(body.insert("domain".into(), json!(domain))));
                about.importance.iter().for_each(|x| drop(body.insert("importance".into(), json!(x))));
                good.push(draft);
            }
            Err(error) => bad.push(error),
        }
    }
    (good, bad)
}

/// The id that the server will give a document; none for one that it will refuse.
fn id_of(draft: &Draft) -> Option<String> {
    let text = |key: &str| draft.body.get(key).and_then(Value::as_str).map(str::to_owned);
    let content = match (text("text"), text("prompt"), text("completion")) {
        (Some(text), _, _) => Content::Text(text),
        (_, Some(prompt), Some(completion)) => Content::Completion { prompt, completion },
        _ => {
            let messages = draft.body.get("messages")?.clone();
            Content::Messages(serde_json::from_value::<Vec<Message>>(messages).ok()?)
        }
    };
    let domain = text("domain").map_or_else(|| Ok(Domain::general()), Domain::new).ok()?;
    Some(Document::content_id(&domain, &content).to_string())
}

fn is_missing(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Refused>().is_some_and(|refused| refused.status == StatusCode::NOT_FOUND)
}

fn counted(documents: usize) -> String {
    format!("{documents} document{}", if documents == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(body: Value) -> Option<String> {
        let Value::Object(body) = body else { return None };
        id_of(&Draft { place: "a:1".into(), body })
    }

    #[test]
    fn the_id_is_that_of_the_content_in_its_domain() {
        let text = Document::content_id(&Domain::general(), &Content::Text("a".into())).to_string();
        assert_eq!(id(json!({"text": "a", "source": "s"})), Some(text.clone()));
        assert_ne!(id(json!({"text": "a", "domain": "d"})), Some(text));
        assert!(id(json!({"prompt": "a", "completion": "b"})).is_some());
        assert!(id(json!({"messages": [{"role": "user", "content": "a"}]})).is_some());
        assert_eq!(id(json!({"messages": "a"})), None);
        assert_eq!(id(json!({"text": "a", "domain": "No"})), None);
    }
}
