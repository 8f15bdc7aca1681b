//! What the lineages' learned examples answer.

use proto::{Domain, Example};
use std::collections::{BTreeMap, BTreeSet};

/// The tokens of all answers that each lineage has learned.
#[derive(Debug, Default)]
pub struct Answers {
    tokens: BTreeMap<Domain, BTreeSet<u32>>,
}

impl Answers {
    /// Adds those of examples that a lineage has learned.
    pub fn learn(&mut self, lineage: &Domain, examples: &[Example]) {
        let tokens = self.tokens.entry(lineage.clone()).or_default();
        tokens.extend(examples.iter().flat_map(|example| example.piece.answers()).flatten());
    }

    /// Those of a lineage, ascending.
    pub fn tokens(&self, lineage: &Domain) -> Vec<u32> {
        self.tokens.get(lineage).into_iter().flatten().copied().collect()
    }
}

/// A digest of an answer, by which it is told which ones repeat.
pub fn digest(answer: &[u32]) -> u64 {
    let bytes: Vec<u8> = answer.iter().flat_map(|token| token.to_le_bytes()).collect();
    u64::from_le_bytes(blake3::hash(&bytes).as_bytes()[..8].try_into().expect("a digest has 32 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::{ExampleId, Piece};

    fn example(tokens: &[u32], learned: (u32, u32)) -> Example {
        Example {
            id: ExampleId { ordinal: 1, chunk: 0 },
            domain: Domain::general(),
            piece: Piece { tokens: tokens.to_vec(), learned: vec![learned] },
            importance: 0.5,
            marked: false,
            held_out: false,
            signature: Vec::new(),
        }
    }

    #[test]
    fn each_lineage_knows_the_tokens_of_its_own_answers_and_no_texts() {
        let (one, other) = (Domain::general(), Domain::new("other").expect("a domain"));
        let mut answers = Answers::default();
        answers.learn(&one, &[example(&[1, 2, 9, 5], (2, 4)), example(&[1, 7, 7], (0, 3))]);
        let mut talk = example(&[4, 9, 0, 3], (1, 2));
        talk.piece.learned.push((3, 4));
        answers.learn(&one, &[talk]);
        answers.learn(&other, &[example(&[1, 8], (1, 2))]);
        assert_eq!(answers.tokens(&one), [3, 5, 9]);
        assert_eq!(answers.tokens(&other), [8]);
        assert!(answers.tokens(&Domain::new("third").expect("a domain")).is_empty());
    }

    #[test]
    fn answers_that_repeat_have_one_digest() {
        assert_eq!(digest(&[9, 4]), digest(&[9, 4]));
        assert_ne!(digest(&[9, 4]), digest(&[9, 4, 0]));
    }
}
