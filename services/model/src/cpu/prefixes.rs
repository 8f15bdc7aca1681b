//! Beginnings of prompts that were read before, so that a chat's history is not read again with each turn.
//!
//! A page is found by the adapters it was computed with, the pages before it, and its tokens: all that it depends
//! on. What was computed with adapters that are dropped is dropped with them.

use std::collections::HashMap;
use std::sync::Arc;

use super::pages::{PAGE_TOKENS, Page};

/// The page before, and the tokens of this one.
type Key = (u64, [u32; PAGE_TOKENS]);

struct Kept {
    number: u64,
    page: Arc<Page>,
    /// When it was last used, and how many pages are before it: the end of a prompt is given up before its beginning.
    used: (u64, std::cmp::Reverse<usize>),
}

/// Full pages of earlier answers, by the number of their adapters.
#[derive(Default)]
pub struct Prefixes {
    kept: HashMap<u64, HashMap<Key, Kept>>,
    count: usize,
    number: u64,
    clock: u64,
}

/// The number that no page has: there is none before.
const NONE: u64 = 0;

impl Prefixes {
    /// Pages are kept for these adapters from now on.
    pub fn open(&mut self, adapters: u64) {
        self.kept.entry(adapters).or_default();
    }

    /// Drops all that was computed with these adapters; none of it is kept from now on.
    pub fn close(&mut self, adapters: u64) {
        self.count -= self.kept.remove(&adapters).map_or(0, |pages| pages.len());
    }

    /// Pages kept.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether none is kept.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The pages of the longest known beginning of `ids`, which leaves one token to read at least.
    pub fn find(&mut self, adapters: u64, ids: &[u32]) -> Vec<Arc<Page>> {
        self.clock += 1;
        let Some(kept) = self.kept.get_mut(&adapters) else { return Vec::new() };
        let (mut before, mut pages) = (NONE, Vec::new());
        for tokens in ids[..ids.len().saturating_sub(1)].as_chunks::<PAGE_TOKENS>().0 {
            let Some(found) = kept.get_mut(&(before, *tokens)) else { break };
            found.used.0 = self.clock;
            before = found.number;
            pages.push(Arc::clone(&found.page));
        }
        pages
    }

    /// Keeps the full pages of an answer whose tokens so far are `ids`.
    pub fn keep(&mut self, adapters: u64, ids: &[u32], pages: &[Arc<Page>]) {
        self.clock += 1;
        let Some(kept) = self.kept.get_mut(&adapters) else { return };
        let mut before = NONE;
        for (place, (tokens, page)) in ids.as_chunks::<PAGE_TOKENS>().0.iter().zip(pages).enumerate() {
            let entry = kept.entry((before, *tokens)).or_insert_with(|| {
                self.number += 1;
                self.count += 1;
                let used = (self.clock, std::cmp::Reverse(place));
                Kept { number: self.number, page: Arc::clone(page), used }
            });
            entry.used.0 = self.clock;
            before = entry.number;
        }
    }

    /// Drops what was not used for longest, until at most `max` pages are kept.
    pub fn shrink(&mut self, max: usize) {
        if self.count <= max {
            return;
        }
        let all = self
            .kept
            .iter()
            .flat_map(|(adapters, kept)| kept.iter().map(|(key, kept)| (kept.used, *adapters, *key)));
        let mut all: Vec<_> = all.collect();
        // A little more than has to go, so that this is not done for every page.
        let drop = (self.count - max + all.len() / 16).min(all.len());
        all.sort_unstable();
        for (_, adapters, key) in &all[..drop] {
            if let Some(kept) = self.kept.get_mut(adapters) {
                kept.remove(key);
            }
        }
        self.count -= drop;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::pages::PageShape;

    fn page() -> Arc<Page> {
        Arc::new(Page::new(PageShape { layers: 1, kv_heads: 1, head_dim: 2, half: false }))
    }

    fn tokens(pages: u32, last: u32) -> Vec<u32> {
        let mut ids: Vec<u32> = (0..pages * PAGE_TOKENS as u32).collect();
        if let Some(id) = ids.last_mut() {
            *id = last;
        }
        ids
    }

    #[test]
    fn the_longest_known_beginning_is_found_and_one_token_is_left() {
        let mut prefixes = Prefixes::default();
        prefixes.open(1);
        prefixes.keep(1, &tokens(3, 0), &[page(), page(), page()]);
        prefixes.keep(1, &tokens(3, 1), &[page(), page(), page()]);
        assert_eq!(prefixes.len(), 4);
        assert_eq!(prefixes.find(1, &tokens(3, 0)).len(), 2);
        assert_eq!(prefixes.find(1, &[tokens(3, 0), vec![5]].concat()).len(), 3);
        assert_eq!(prefixes.find(1, &[tokens(3, 9), vec![5]].concat()).len(), 2);
        assert!(prefixes.find(2, &tokens(3, 0)).is_empty() && prefixes.find(1, &[]).is_empty());
    }

    #[test]
    fn the_ends_of_what_was_not_used_for_longest_go_first() {
        let mut prefixes = Prefixes::default();
        prefixes.open(1);
        prefixes.open(2);
        prefixes.keep(1, &tokens(3, 0), &[page(), page(), page()]);
        prefixes.keep(2, &tokens(2, 0), &[page(), page()]);
        prefixes.shrink(4);
        let long = [tokens(3, 0), vec![5]].concat();
        assert_eq!((prefixes.find(1, &long).len(), prefixes.len()), (2, 4));
        prefixes.shrink(2);
        assert_eq!((prefixes.find(1, &long).len(), prefixes.find(2, &long).len()), (2, 0));
        prefixes.close(1);
        prefixes.keep(1, &tokens(1, 0), &[page()]);
        assert!(prefixes.is_empty());
    }
}
