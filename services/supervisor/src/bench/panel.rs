//! Who answers a text in a benchmark: the base, one adapter, or those that `auto` picks.

use super::system::Served;
use super::system::System;
use crate::judge::{Judge, LabelBy, Respondent};
use anyhow::Result;
use infer::{Apart, ByBase, Profiles};
use kit::settings::Settings;
use model::tokenizer::Tokenizer;
use proto::Domain;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Which adapter answers.
#[derive(Clone, Copy)]
pub enum Pick<'a> {
    /// None.
    Base,
    /// That of a domain.
    Fixed(&'a Domain),
    /// Those that the content decides for, as for the model `auto`.
    Auto,
}

/// The lineages that answer a text, with their weights; none is the base.
pub type Answering = Vec<(Domain, f32)>;

/// The adapters of a system as they are served, and the router that picks among them.
pub struct Panel {
    /// What measures their answers.
    pub judge: Judge,
    profiles: Profiles,
    apart: Apart,
    route_top: usize,
    served: BTreeMap<Domain, Served>,
}

impl Panel {
    /// Of a system that has learned nothing yet.
    pub fn new(system: &System, settings: &Settings, base_dir: &Path) -> Result<Self> {
        let tokenizer = Tokenizer::load(base_dir)?;
        Ok(Self {
            profiles: Profiles::new(Arc::new(tokenizer.clone()), settings.infer.route_strictness),
            apart: Apart::default(),
            judge: Judge::new(system.plant().base(), tokenizer, settings.ingest.max_seq_len)?,
            route_top: settings.infer.route_top,
            served: BTreeMap::new(),
        })
    }

    /// Takes up what the system serves by now.
    pub fn follow(&mut self, system: &System) -> Result<()> {
        self.served = system.served()?;
        let (plant, current) = (system.plant(), system.current());
        self.apart.follow(infer::counted(&plant.registry, &current), plant.ledger.forgotten());
        self.apart.solve(&plant.blobs).1?;
        self.profiles.follow(&plant.registry, &plant.ledger, &current)
    }

    /// Texts by what answers them.
    pub fn picked<S: AsRef<str>>(&self, texts: &[S], pick: Pick<'_>) -> Result<Vec<(Answering, Vec<usize>)>> {
        let mut groups: Vec<(Answering, Vec<usize>)> = Vec::new();
        let by_base = if matches!(pick, Pick::Auto) { self.by_base(texts)? } else { Vec::new() };
        for (n, text) in texts.iter().enumerate() {
            let answering = match pick {
                Pick::Base => Vec::new(),
                Pick::Fixed(domain) => vec![(domain.clone(), 1.0)],
                Pick::Auto => {
                    let routing = self.profiles.route(text.as_ref(), &by_base[n])?;
                    routing.map(|routing| routing.top(self.route_top)).unwrap_or_default()
                }
            };
            match groups.iter_mut().find(|(group, _)| *group == answering) {
                Some((_, places)) => places.push(n),
                None => groups.push((answering, vec![n])),
            }
        }
        Ok(groups)
    }

    /// What the base makes of each text, by lineage.
    fn by_base<S: AsRef<str>>(&self, texts: &[S]) -> Result<Vec<ByBase>> {
        let mut by_base = vec![ByBase::default(); texts.len()];
        if self.served.values().all(|served| served.head.is_none()) {
            return Ok(by_base);
        }
        let rows = self.judge.described(texts)?;
        for (domain, served) in &self.served {
            let of_texts = served.head.as_ref().map(|head| head.kinship(&rows)).transpose()?.flatten();
            for (of_text, kinship) in by_base.iter_mut().zip(of_texts.into_iter().flatten()) {
                of_text.kinship.insert(domain.clone(), kinship);
            }
            let recalled = served.head.as_ref().map(|head| head.recalls(&rows)).transpose()?;
            for (of_text, recalled) in by_base.iter_mut().zip(recalled.into_iter().flatten()) {
                of_text.recalled.insert(domain.clone(), recalled);
            }
        }
        for (of_text, shares) in by_base.iter_mut().zip(self.apart.shares(&rows)?) {
            of_text.shares = shares;
        }
        Ok(by_base)
    }

    /// What they are served with.
    pub fn respondent(&self, answering: &Answering) -> Respondent<'_> {
        let mut respondent = Respondent::default();
        for (domain, weight) in answering {
            if let Some(served) = self.served.get(domain) {
                let weight = f64::from(*weight);
                respondent.adapters.push((&served.adapter, weight));
                respondent.heads.push((served.head.as_ref(), weight));
            }
        }
        respondent
    }

    /// For each text the likeliest label of each group, by whom `pick` lets answer it; see [`Judge::likeliest`].
    pub fn label<S: AsRef<str>>(
        &self,
        texts: &[S],
        labels: &[&str],
        groups: &[Vec<usize>],
        pick: Pick<'_>,
        by: LabelBy,
    ) -> Result<Vec<Vec<usize>>> {
        let mut chosen = vec![Vec::new(); texts.len()];
        for (answering, places) in self.picked(texts, pick)? {
            let asked: Vec<&str> = places.iter().map(|&n| texts[n].as_ref()).collect();
            let of_group = self.judge.likeliest(&self.respondent(&answering), &asked, labels, groups, by)?;
            places.into_iter().zip(of_group).for_each(|(n, choice)| chosen[n] = choice);
        }
        Ok(chosen)
    }
}
