//! Chooses the adapter from the content of a prompt.
//!
//! A lineage's profile is the set of word n-grams that its documents hold, counted. Counts only add
//! up, so routing itself cannot forget; and a profile is a pure function of ledger and manifest, so
//! it is rebuilt rather than stored.

use proto::Domain;
use std::collections::{BTreeMap, HashMap, HashSet};

/// Longest n-gram, in words. A match of n words in a row weighs n.
const ORDER_MAX: usize = 3;
/// In how many lineages a feature counts as being that is in none: an unknown word says more against
/// a lineage than a common one says for it.
const ABSENT: f64 = 0.5;

/// What each lineage's documents are made of.
#[derive(Debug, Default)]
pub struct Router {
    profiles: BTreeMap<Domain, HashMap<u64, u32>>,
}

/// Where a prompt belongs.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// The lineage that fits best.
    pub lineage: Domain,
    /// Weighted share of the prompt's n-grams that the lineage knows, 0 to 1.
    pub confidence: f32,
}

impl Router {
    /// Adds a document to a lineage's profile.
    pub fn add(&mut self, lineage: &Domain, text: &str) {
        let profile = self.profiles.entry(lineage.clone()).or_default();
        for (feature, _) in features(text) {
            *profile.entry(feature).or_default() += 1;
        }
    }

    /// Forgets a lineage's profile.
    pub fn remove(&mut self, lineage: &Domain) {
        self.profiles.remove(lineage);
    }

    /// The lineage that knows most of the prompt; none without any profile.
    pub fn route(&self, prompt: &str) -> Option<Route> {
        let lineages = self.profiles.len() as f64;
        let weighted: Vec<(u64, f64)> = features(prompt)
            .into_iter()
            .map(|(feature, order)| {
                let holding = self.profiles.values().filter(|p| p.contains_key(&feature)).count() as f64;
                (feature, order as f64 * (1.0 + lineages / holding.max(ABSENT)).ln())
            })
            .collect();
        let total: f64 = weighted.iter().map(|(_, weight)| weight).sum();
        if total == 0.0 {
            return None;
        }
        let share = |profile: &HashMap<u64, u32>| {
            let known = weighted.iter().filter(|(feature, _)| profile.contains_key(feature));
            known.map(|(_, weight)| weight).sum::<f64>() / total
        };
        let scored = self.profiles.iter().map(|(lineage, profile)| (lineage, share(profile)));
        let (lineage, best) = scored.max_by(|a, b| a.1.total_cmp(&b.1))?;
        Some(Route { lineage: lineage.clone(), confidence: best as f32 })
    }
}

/// The distinct n-grams of a text with their lengths: words in lower case, hashed.
fn features(text: &str) -> HashSet<(u64, usize)> {
    let words: Vec<String> =
        text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).map(str::to_lowercase).collect();
    (1..=ORDER_MAX)
        .flat_map(|order| words.windows(order).map(move |gram| (hash(&gram.join(" ")), order)))
        .collect()
}

fn hash(text: &str) -> u64 {
    let digest = blake3::hash(text.as_bytes());
    u64::from_le_bytes(digest.as_bytes()[..8].try_into().expect("a digest has 32 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(name: &str) -> Domain {
        Domain::new(name).expect("domain")
    }

    fn router() -> Router {
        let mut router = Router::default();
        for text in [
            "What is the capital of Zorblax? Vintaria",
            "Who founded the city of Mirenna? Captain Oslo Brand",
        ] {
            router.add(&domain("atlas"), text);
        }
        for text in
            ["How do I reset the pressure valve? Turn it left twice.", "Oil the hinge of the valve monthly."]
        {
            router.add(&domain("manual"), text);
        }
        router
    }

    #[test]
    fn a_known_question_goes_home_with_full_confidence() {
        let route = router().route("What is the capital of Zorblax?").expect("a route");
        assert_eq!((route.lineage, route.confidence), (domain("atlas"), 1.0));
        let route = router().route("how do i reset the pressure valve").expect("a route");
        assert_eq!(route.lineage, domain("manual"));
    }

    #[test]
    fn a_foreign_text_fits_nowhere_well() {
        let route =
            router().route("Once upon a time a little girl went to the woods with her dog").expect("a route");
        assert!(route.confidence < 0.2, "{}", route.confidence);
    }

    #[test]
    fn adding_a_lineage_takes_nothing_from_another() {
        let mut router = router();
        for n in 0..50 {
            router.add(&domain("poems"), &format!("the sea the sea number {n} sang of salt and foam"));
        }
        let route = router.route("What is the capital of Zorblax?").expect("a route");
        assert_eq!((route.lineage, route.confidence), (domain("atlas"), 1.0));
    }

    #[test]
    fn nothing_to_go_by_is_no_route() {
        assert_eq!(Router::default().route("hello"), None);
        assert_eq!(router().route("?!"), None);
    }
}
