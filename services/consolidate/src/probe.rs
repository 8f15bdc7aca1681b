//! What a lineage is measured on, with the best published score of each example.

use model::pack::Sequence;
use model::ridge::{Answer, exchange};
use proto::wire::{self, Kind};
use proto::{Example, ExampleId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One measured example.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Which.
    pub id: ExampleId,
    /// Its token ids.
    pub tokens: Vec<u32>,
    /// Which of them count.
    pub learned: Vec<(u32, u32)>,
    /// Its loss under the base alone, nats a token.
    pub base: f32,
    /// Its loss under the generation that was best on the whole probe.
    pub best: f32,
    /// The loss of the newest published generation.
    pub last: f32,
    /// Whether the generation that said most of the probe's answers to the letter said this one.
    pub said_best: bool,
    /// Whether the newest published one did.
    pub said_last: bool,
}

/// A lineage's probe.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// A uniform sample of learned examples: is what was learned still there?
    pub memory: Vec<Entry>,
    /// Chunks that are never trained on: is what was understood still there?
    pub held_out: Vec<Entry>,
    /// Best and last loss on each anchor sequence, in their fixed order.
    pub anchors: Vec<(f32, f32)>,
    /// Examples ever offered to `memory` and to `held_out`.
    pub offered: [u64; 2],
}

impl Entry {
    /// The entry's sequence.
    pub fn sequence(&self) -> Sequence {
        Sequence { tokens: self.tokens.clone(), learned: self.learned.clone(), rehearsed: false }
    }

    /// It answers a prompt; otherwise it is text.
    pub fn is_answer(&self) -> bool {
        self.learned.first().is_some_and(|&(from, _)| from > 0)
    }
}

impl Probe {
    /// Reads what [`Probe::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8]) -> anyhow::Result<Self> {
        Ok(wire::decode(Kind::Row, bytes, wire::PAYLOAD_BYTES_MAX)?)
    }

    /// What is measured apart from each other, by name; a part without entries is left out.
    pub fn parts(&mut self) -> Vec<(&'static str, Vec<&mut Entry>)> {
        let names = [["memory_text", "memory_answers"], ["held_out_text", "held_out_answers"]];
        let mut parts = Vec::new();
        for ([text, answers], entries) in names.into_iter().zip([&mut self.memory, &mut self.held_out]) {
            let (of_answers, of_text) = entries.iter_mut().partition(|entry| entry.is_answer());
            parts.extend([(text, of_text), (answers, of_answers)]);
        }
        parts.retain(|(_, entries): &(_, Vec<&mut Entry>)| !entries.is_empty());
        parts
    }

    /// Forgets which answers were said, and how well.
    pub fn unmark(&mut self) {
        for entry in self.memory.iter_mut().chain(&mut self.held_out).filter(|entry| entry.is_answer()) {
            (entry.said_best, entry.said_last) = (false, false);
            (entry.best, entry.last) = (entry.base, entry.base);
        }
    }

    /// No longer remembers what `fresh` examples correct: a fact whose very prompt is told with another answer is not lost, but
    /// wrong. One of the answers that `repeat` is as its documents have it, most of them, and stays.
    pub fn correct(&mut self, fresh: &[&Example], repeat: &[Answer]) {
        let told: BTreeMap<&[u32], &[u32]> =
            fresh.iter().filter_map(|e| exchange(&e.piece.tokens, &e.piece.learned)).collect();
        let repeats =
            |answer: &[u32]| repeat.iter().flat_map(|of| &of.forms).any(|form| form.tokens == answer);
        self.memory.retain(|entry| {
            let Some((prompt, answer)) = exchange(&entry.tokens, &entry.learned) else { return true };
            told.get(prompt).is_none_or(|now| *now == answer) || repeats(answer)
        });
    }

    /// A checksummed frame.
    pub fn to_bytes(&self) -> anyhow::Result<Vec<u8>> {
        Ok(wire::encode(Kind::Row, self)?)
    }
}

/// Writes down the losses of a new generation, and what it said to the letter. They become the mark for later ones
/// where their mean is the lowest so far, and where it said the most.
///
/// The mark is one generation's losses and not the lowest of each example: that would be lower than
/// any generation ever was, by what chance gives each example over the generations, and soon by more
/// than the tolerance.
pub fn note(entries: &mut [&mut Entry], losses: &[f32], said: &[bool]) {
    let marks: f32 = entries.iter().map(|entry| entry.best).sum();
    let lowest = losses.iter().sum::<f32>() < marks;
    let count = |said: &mut dyn Iterator<Item = bool>| said.filter(|said| *said).count();
    let most = count(&mut said.iter().copied()) > count(&mut entries.iter().map(|entry| entry.said_best));
    for ((entry, &loss), &said) in entries.iter_mut().zip(losses).zip(said) {
        (entry.last, entry.said_last) = (loss, said);
        if lowest {
            entry.best = loss;
        }
        if most {
            entry.said_best = said;
        }
    }
}

/// Which of `count` new examples a uniform sample of `capacity` takes in, and in whose place: Vitter's
/// algorithm R, from the seed alone. `offered` counts all that ever came by.
pub fn reservoir(
    offered: &mut u64,
    held: usize,
    capacity: usize,
    count: usize,
    seed: u64,
) -> Vec<(usize, usize)> {
    let mut filled = held;
    let mut places = Vec::new();
    for n in 0..count {
        let place = if filled < capacity {
            filled += 1;
            filled - 1
        } else {
            let digest = blake3::hash(&[seed.to_le_bytes(), offered.to_le_bytes()].concat());
            let word = u64::from_le_bytes(digest.as_bytes()[..8].try_into().expect("a digest has 32 bytes"));
            (word % (*offered + 1)) as usize
        };
        *offered += 1;
        if place < capacity {
            places.push((n, place));
        }
    }
    places
}

/// Puts examples with their losses where [`reservoir`] said.
/// `scores` are the losses of the base and of the candidate, and whether it said the answer, by place.
pub fn take_in(
    held: &mut Vec<Entry>,
    examples: &[&Example],
    scores: &[(f32, f32, bool)],
    places: &[(usize, usize)],
) {
    for (&(n, place), &(base, loss, said)) in places.iter().zip(scores) {
        let example = examples[n];
        let entry = Entry {
            id: example.id,
            tokens: example.piece.tokens.clone(),
            learned: example.piece.learned.clone(),
            base,
            best: loss,
            last: loss,
            said_best: said,
            said_last: said,
        };
        if place < held.len() {
            held[place] = entry;
        } else {
            held.push(entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sample_is_uniform_over_all_that_came_by() {
        let mut early = 0;
        for seed in 0..500 {
            let (mut offered, mut held) = (0, Vec::new());
            for batch in 0..20_usize {
                for (n, place) in reservoir(&mut offered, held.len(), 8, 5, seed) {
                    let value = batch * 5 + n;
                    if place < held.len() { held[place] = value } else { held.push(value) }
                }
            }
            assert_eq!(held.len(), 8);
            early += held.iter().filter(|v| **v < 50).count();
        }
        // 500 samples of 8: 2,000 of 4,000 expected from the first half, deviation about 30.
        assert!((1880..2120).contains(&early), "{early}");
    }

    #[test]
    fn the_mark_is_what_one_generation_reached() {
        let entry = |ordinal, loss| Entry {
            id: ExampleId { ordinal, chunk: 0 },
            tokens: vec![1, 2],
            learned: vec![(0, 2)],
            base: 5.0,
            best: loss,
            last: loss,
            said_best: ordinal == 1,
            said_last: false,
        };
        let mut entries = vec![entry(1, 2.0), entry(2, 2.0)];
        let marks = |entries: &[Entry]| entries.iter().map(|e| (e.best, e.last)).collect::<Vec<_>>();
        let said = |entries: &[Entry]| entries.iter().map(|e| (e.said_best, e.said_last)).collect::<Vec<_>>();
        note(&mut entries.iter_mut().collect::<Vec<_>>(), &[1.0, 3.1], &[false, true]);
        assert_eq!(marks(&entries), [(2.0, 1.0), (2.0, 3.1)]);
        assert_eq!(said(&entries), [(true, false), (false, true)], "one is no more than one");
        note(&mut entries.iter_mut().collect::<Vec<_>>(), &[2.4, 1.5], &[true, true]);
        assert_eq!(marks(&entries), [(2.4, 2.4), (1.5, 1.5)]);
        assert_eq!(said(&entries), [(true, true), (true, true)]);
    }

    #[test]
    fn texts_and_answers_are_parts_of_their_own() {
        let entry = |ordinal, from| Entry {
            id: ExampleId { ordinal, chunk: 0 },
            tokens: vec![1, 2, 3],
            learned: vec![(from, 3)],
            base: 5.0,
            best: 1.0,
            last: 1.0,
            said_best: false,
            said_last: false,
        };
        let memory = vec![entry(1, 0), entry(2, 2), entry(3, 0)];
        let mut probe = Probe { memory, held_out: vec![entry(4, 0)], ..Probe::default() };
        let ordinals = |entries: Vec<&mut Entry>| entries.iter().map(|e| e.id.ordinal).collect::<Vec<_>>();
        let parts: Vec<_> = probe.parts().into_iter().map(|(name, part)| (name, ordinals(part))).collect();
        assert_eq!(
            parts,
            [("memory_text", vec![1, 3]), ("memory_answers", vec![2]), ("held_out_text", vec![4])]
        );
    }

    #[test]
    fn a_probe_survives_its_bytes_and_damage_is_refused() {
        let probe = Probe { anchors: vec![(1.0, 2.0)], offered: [3, 4], ..Probe::default() };
        let mut bytes = probe.to_bytes().expect("bytes");
        assert_eq!(Probe::from_bytes(&bytes).expect("a probe"), probe);
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        assert!(Probe::from_bytes(&bytes).is_err());
    }
}
