//! Lineages that count prompts, told apart by what all of them counted.

use kit::blobs::Blobs;
use kit::manifests::Registry;
use model::ridge::{Counts, Rows, Whose};
use proto::{Blob, Domain, GenerationId};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What each lineage counted.
pub type Counted = BTreeMap<Domain, Blob>;

/// What of the current generations is to be told apart: not those whose answers prompts do not tell.
pub fn counted(registry: &Registry, current: &BTreeMap<Domain, GenerationId>) -> Counted {
    let counts = |(domain, id): (&Domain, &GenerationId)| {
        let head = registry.generation(id)?.answer_head.clone().filter(|head| head.trusted)?;
        Some((domain.clone(), head.counts))
    };
    current.iter().filter_map(counts).collect()
}

/// The regression over what all current lineages counted, solved beside what goes on: that takes a good part of a second, and a
/// prompt is not to wait for it. Until then the one before says what it can.
#[derive(Debug, Default)]
pub struct Apart {
    /// What is current.
    wanted: Mutex<Counted>,
    /// Held by who solves, so that of many that are wanted one after another only the last need be solved.
    solving: Mutex<()>,
    solved: Mutex<Solved>,
}

#[derive(Debug, Default)]
struct Solved {
    of: Counted,
    /// None where there are not two to be told apart.
    whose: Option<Whose>,
}

impl Apart {
    /// Notes what is current. True where something is to be solved.
    pub fn follow(&self, counted: Counted) -> bool {
        let new = lock(&self.solved).of != counted;
        *lock(&self.wanted) = counted;
        new
    }

    /// Solves what is wanted, unless that is done by now.
    ///
    /// # Errors
    /// When what was counted cannot be read; then nobody is told apart.
    pub fn solve(&self, blobs: &Blobs) -> anyhow::Result<()> {
        let _alone = lock(&self.solving);
        let of = lock(&self.wanted).clone();
        if lock(&self.solved).of == of {
            return Ok(());
        }
        // One alone is told from nobody, and need not be read.
        let read = of.values().filter(|_| of.len() > 1).map(|counts| Counts::from_bytes(&blobs.get(counts)?));
        // Without a solution nothing stays of the one before, whose documents may have been forgotten.
        let (solved, end) = match Whose::solve(read) {
            Ok(whose) => (Solved { of, whose }, Ok(())),
            Err(error) => (Solved::default(), Err(error)),
        };
        let told_apart = if solved.whose.is_some() { solved.of.len() } else { 0 };
        metrics::gauge!("engram:lineages_told_apart").set(told_apart as f64);
        *lock(&self.solved) = solved;
        end
    }

    /// For each prompt, which a row describes, how likely it is of each lineage, of those that are told apart.
    ///
    /// # Errors
    /// When rows are not what describes prompts.
    pub fn shares(&self, rows: &Rows) -> anyhow::Result<Vec<BTreeMap<Domain, f64>>> {
        let solved = lock(&self.solved);
        let Some(whose) = &solved.whose else {
            return Ok(vec![BTreeMap::new(); rows.size().first().map_or(0, |&n| n as usize)]);
        };
        let named = |shares: Vec<f64>| solved.of.keys().cloned().zip(shares).collect();
        Ok(whose.shares(rows)?.into_iter().map(named).collect())
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::device::Placement;
    use model::llama::Base;
    use model::ridge::{Features, Lesson};
    use std::path::Path;

    /// What is counted of prompts with one answer.
    fn counts(features: &Features, prompts: &[Vec<u32>]) -> Vec<u8> {
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let answer = Some((&[9_u32, 0][..], "one".to_owned()));
        let lessons: Vec<_> =
            prompts.iter().map(|prompt| Lesson { prompt, answer: answer.clone() }).collect();
        let mut counts = Counts::new().expect("nothing");
        assert!(counts.add(&features.of(&prompts).expect("described"), &lessons).expect("counted"));
        counts.to_bytes().expect("bytes")
    }

    #[test]
    fn what_is_current_is_told_apart_once_it_is_solved_and_what_cannot_be_read_is_not() {
        let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/models/nano"));
        let base = Base::load(dir, &Placement::CPU_F32).expect("a base");
        let features = Features::new(&base, None).expect("features");
        let folder = tempfile::tempdir().expect("a folder");
        let blobs = Blobs::open(folder.path()).expect("opened");
        let prompt = |kind: u32, n: u32| vec![300 + 50 * kind, 301 + 50 * kind, 700 + n];
        let of = |kind| counts(&features, &(0..6).map(|n| prompt(kind, n)).collect::<Vec<_>>());
        let named = |(n, name)| (Domain::new(name).expect("a domain"), blobs.put(&of(n)).expect("written"));
        let counted: Counted = [(0, "cooking"), (1, "travel")].into_iter().map(named).collect();

        let (apart, rows) = (Apart::default(), features.of(&[&prompt(1, 9)]).expect("described"));
        let share =
            |apart: &Apart| apart.shares(&rows).expect("one row")[0].values().copied().collect::<Vec<_>>();
        assert!(apart.follow(counted.clone()) && share(&apart).is_empty(), "not solved yet");
        apart.solve(&blobs).expect("solved");
        assert!(!apart.follow(counted.clone()), "nothing is new");
        assert!(matches!(share(&apart)[..], [cooking, travel] if cooking < 0.1 && travel > 0.9));

        let one: Counted = counted.clone().into_iter().take(1).collect();
        assert!(apart.follow(one) && apart.solve(&blobs).is_ok());
        assert!(share(&apart).is_empty(), "one alone");
        assert!(apart.follow(counted.clone()) && apart.solve(&blobs).is_ok());
        let mut damaged = counted;
        damaged.values_mut().for_each(|blob| *blob = Blob("0".repeat(64)));
        assert!(apart.follow(damaged) && apart.solve(&blobs).is_err());
        assert!(share(&apart).is_empty(), "nothing stays of what may have been forgotten");
    }
}
