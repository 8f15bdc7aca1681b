//! Keeps the router in line with what is current.

use crate::router::{ByBase, Router, Routing};
use kit::ledger::Ledger;
use kit::manifests::Registry;
use model::tokenizer::Tokenizer;
use proto::{Content, Domain, GenerationId, Role, VerdictKind};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The router, and the generations whose documents it knows.
pub struct Profiles {
    router: Router,
    profiled: BTreeMap<Domain, Vec<GenerationId>>,
    forgotten: u64,
}

impl Profiles {
    /// Nothing yet. `strictness` multiplies the thresholds that prompts have to reach; with 0 everything fits.
    pub fn new(tokenizer: Arc<Tokenizer>, strictness: f32) -> Self {
        Self { router: Router::new(tokenizer, strictness), profiled: BTreeMap::new(), forgotten: 0 }
    }

    /// Takes up what the current generations have learned, and drops what is not current any more.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub fn follow(
        &mut self,
        registry: &Registry,
        ledger: &Ledger,
        current: &BTreeMap<Domain, GenerationId>,
    ) -> anyhow::Result<()> {
        if self.forgotten != ledger.forgotten() {
            self.router.clear();
            self.profiled.clear();
            self.forgotten = ledger.forgotten();
        }
        self.profiled.retain(|domain, _| {
            let stays = current.contains_key(domain);
            if !stays {
                self.router.remove(domain);
            }
            stays
        });
        let grown = current.iter().try_for_each(|(domain, id)| {
            let grown = self.grow(registry, ledger, domain, id);
            if grown.is_err() {
                // What was half read would count twice the next time.
                self.router.remove(domain);
                self.profiled.remove(domain);
            }
            grown
        });
        self.router.calibrate();
        grown
    }

    /// Brings a lineage's profile to a generation.
    fn grow(
        &mut self,
        registry: &Registry,
        ledger: &Ledger,
        domain: &Domain,
        id: &GenerationId,
    ) -> anyhow::Result<()> {
        // Oldest first: profiles grow as the lineage did.
        let mut chain = registry.ancestors(Some(id.clone()));
        chain.reverse();
        let known = self.profiled.entry(domain.clone()).or_default();
        if !chain.iter().map(|g| &g.id).take(known.len()).eq(known.iter()) {
            self.router.remove(domain);
            known.clear();
        }
        let only = (!registry.manifest().shared).then_some(domain);
        for generation in chain.iter().skip(known.len()) {
            for (ordinal, document) in ledger.documents_between(only, generation.after, generation.through)? {
                if ledger.verdict(ordinal)?.is_some_and(|v| v.kind == VerdictKind::Kept) {
                    let content = &document.content;
                    self.router.add(domain, &content.plain(), asked(content))?;
                }
            }
        }
        *known = chain.iter().map(|g| g.id.clone()).collect();
        Ok(())
    }

    /// See [`Router::route`].
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn route(&self, prompt: &str, by_base: &ByBase) -> anyhow::Result<Option<Routing>> {
        self.router.route(prompt, by_base)
    }
}

/// The parts of a document that may be asked again.
fn asked(content: &Content) -> Vec<&str> {
    match content {
        Content::Text(_) => Vec::new(),
        Content::Completion { prompt, .. } => vec![prompt],
        Content::Messages(messages) => {
            let asked = messages.iter().filter(|message| message.role == Role::User);
            asked.map(|message| message.content.as_str()).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::Message;

    #[test]
    fn what_a_person_said_may_be_asked_again_and_what_was_answered_may_not() {
        let said = |role, content: &str| Message { role, content: content.to_owned() };
        let conversation = Content::Messages(vec![
            said(Role::System, "be brief"),
            said(Role::User, "Who is it?"),
            said(Role::Assistant, "Brix"),
            said(Role::User, "Really?"),
        ]);
        assert_eq!(asked(&conversation), ["Who is it?", "Really?"]);
        let completion = Content::Completion { prompt: "Who is it?".into(), completion: "Brix".into() };
        assert_eq!(asked(&completion), ["Who is it?"]);
        assert!(asked(&Content::Text("It is Brix.".into())).is_empty());
    }
}
