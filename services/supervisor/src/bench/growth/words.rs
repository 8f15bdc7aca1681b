//! Texts of made-up words, of which each domain has its own and some that its neighbours have too.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SYLLABLES: [&str; 16] =
    ["ba", "ko", "ri", "mul", "te", "sa", "no", "vi", "len", "da", "fu", "gor", "pe", "hi", "zu", "wam"];
/// Words of a domain, and how many of them its neighbour does not have.
const WORDS: u64 = 400;
const OWN: u64 = 100;

/// A text of so many words of a domain, another one for each seed.
pub fn text(domain: u64, seed: u64, words: usize) -> String {
    let mut rng = ChaCha8Rng::seed_from_u64((domain << 32) ^ seed);
    let words: Vec<String> = (0..words).map(|_| word(domain * OWN + rng.random_range(0..WORDS))).collect();
    words.join(" ")
}

/// Another word for each number.
fn word(mut number: u64) -> String {
    let mut word = String::new();
    loop {
        word.push_str(SYLLABLES[(number % 16) as usize]);
        number /= 16;
        if number == 0 {
            return word;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn texts_differ_by_domain_and_seed_and_are_the_same_again() {
        let texts = [text(0, 0, 20), text(0, 1, 20), text(1, 0, 20)];
        assert_eq!(texts.iter().collect::<BTreeSet<_>>().len(), 3);
        assert_eq!(text(1, 0, 20), texts[2]);
        assert_eq!(texts[0].split(' ').count(), 20);
    }

    #[test]
    fn each_number_has_a_word_of_its_own() {
        assert_eq!((0..5000).map(word).collect::<BTreeSet<_>>().len(), 5000);
    }
}
