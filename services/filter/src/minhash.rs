//! MinHash signatures (Broder 1997) and an index of them by bands, for near-duplicates.

use proto::similarity;
use std::collections::HashMap;

/// Hash values in a signature.
pub const SIGNATURE_LEN: usize = 64;
/// Values in a band: 16 bands of 4 find nine pairs in ten at similarity 0.6, all but one in a
/// thousand at 0.8.
const BAND: usize = 4;
/// Words in a shingle.
const SHINGLE: usize = 3;
/// Texts of fewer words than this are duplicates only when they are equal: two short facts differ
/// in one name, and that name is all they say.
const NEAR_WORDS_MIN: usize = 40;

/// The MinHash signature of a text over shingles of three words, upper and lower case alike. Short
/// texts get the hash of the whole text instead, so that they are alike only when they are equal.
pub fn signature(text: &str) -> Vec<u32> {
    let words: Vec<String> =
        text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).map(str::to_lowercase).collect();
    let shingles: Vec<u64> = if words.len() < NEAR_WORDS_MIN {
        vec![hash(text.trim().as_bytes())]
    } else {
        words.windows(SHINGLE).map(|w| hash(w.join(" ").as_bytes())).collect()
    };
    (0..SIGNATURE_LEN as u64)
        .map(|n| {
            let least = shingles.iter().map(|&s| mix(s ^ mix(n + 1))).min();
            (least.unwrap_or(0) >> 32) as u32
        })
        .collect()
}

fn hash(bytes: &[u8]) -> u64 {
    let digest = blake3::hash(bytes);
    u64::from_le_bytes(digest.as_bytes()[..8].try_into().expect("a digest has 32 bytes"))
}

/// The finaliser of SplitMix64: a fast hash of a hash, from which the 64 orders are made.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Signatures by band: two texts are compared only when one band of them is equal.
#[derive(Default)]
pub struct Index {
    bands: HashMap<u64, Vec<u64>>,
    signatures: HashMap<u64, Vec<u32>>,
}

impl Index {
    /// Adds a document of a domain.
    pub fn insert(&mut self, domain: &str, ordinal: u64, signature: &[u32]) {
        if self.signatures.insert(ordinal, signature.to_vec()).is_none() {
            for key in keys(domain, signature) {
                self.bands.entry(key).or_default().push(ordinal);
            }
        }
    }

    /// The most similar document of the domain, if it reaches `at_least`, with its similarity.
    pub fn find(&self, domain: &str, signature: &[u32], at_least: f32) -> Option<(u64, f32)> {
        let mut best: Option<(u64, f32)> = None;
        for key in keys(domain, signature) {
            for ordinal in self.bands.get(&key).into_iter().flatten() {
                let found = similarity(signature, &self.signatures[ordinal]);
                if found >= at_least && best.is_none_or(|(_, b)| found > b) {
                    best = Some((*ordinal, found));
                }
            }
        }
        best
    }
}

/// One key a band; the domain is part of it, because the same text may be taught to two domains.
fn keys(domain: &str, signature: &[u32]) -> impl Iterator<Item = u64> {
    let seed = hash(domain.as_bytes());
    signature.chunks(BAND).enumerate().map(move |(n, band)| {
        band.iter().fold(mix(seed ^ n as u64), |key, &value| mix(key ^ u64::from(value)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(words: std::ops::Range<u32>) -> String {
        words.map(|n| format!("word{n} ")).collect()
    }

    #[test]
    fn the_estimate_is_near_the_true_similarity() {
        // 400 and 400 words, 300 of them shared: 298 common shingles of 498.
        let (a, b) = (signature(&text(0..400)), signature(&text(100..500)));
        let truth = 298.0 / 498.0;
        assert!((similarity(&a, &b) - truth).abs() < 0.2, "{}", similarity(&a, &b));
        assert_eq!(similarity(&a, &a), 1.0);
    }

    #[test]
    fn the_index_finds_a_near_duplicate_among_many() {
        let mut index = Index::default();
        for n in 0..500 {
            index.insert("d", u64::from(n), &signature(&text(n * 1000..n * 1000 + 200)));
        }
        let near = signature(&text(77_000..77_195));
        assert_eq!(index.find("d", &near, 0.8).map(|(n, _)| n), Some(77));
        assert_eq!(index.find("other", &near, 0.8), None);
        assert_eq!(index.find("d", &signature(&text(900_000..900_200)), 0.5), None);
    }
}
