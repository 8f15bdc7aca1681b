//! Lineages that count prompts, told apart by what all of them counted.

use kit::blobs::Blobs;
use kit::manifests::Registry;
use model::device::helpers;
use model::ridge::{Rows, Whose};
use proto::{Blob, Domain, GenerationId};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What each lineage counted.
pub type Counted = BTreeMap<Domain, Blob>;

/// What of the current generations is to be told apart: not those whose answers prompts do not tell, and not a lineage without a
/// document of its own, such as a merge, which no prompt is routed to.
pub fn counted(registry: &Registry, current: &BTreeMap<Domain, GenerationId>) -> Counted {
    let counts = |(domain, id): (&Domain, &GenerationId)| {
        let head = registry.generation(id)?.answer_head.clone().filter(|head| head.trusted)?;
        let taught = registry.ancestors(Some(id.clone())).iter().any(|generation| generation.documents > 0);
        taught.then(|| (domain.clone(), head.counts))
    };
    current.iter().filter_map(counts).collect()
}

/// Solving has this part of the time at most: learning and answers have the rest.
const SHARE: u32 = 10;

/// The regression over what all current lineages counted, solved beside what goes on: that takes a good part of a second, and a
/// prompt is not to wait for it. Until then the one before says what it can.
#[derive(Debug, Default)]
pub struct Apart {
    wanted: Mutex<Wanted>,
    solved: Mutex<Solved>,
}

/// What is to be told apart.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Want {
    /// What is current.
    of: Counted,
    /// How often documents were forgotten.
    forgotten: u64,
}

#[derive(Debug, Default)]
struct Wanted {
    want: Want,
    /// Somebody solves until there is nothing to solve.
    at_work: bool,
}

#[derive(Debug, Default)]
struct Solved {
    of: Counted,
    /// None where there are not two to be told apart.
    whose: Option<Whose>,
}

impl Apart {
    /// Notes what is current, when documents were `forgotten` so many times: of what was solved with them nothing stays.
    pub fn follow(&self, counted: Counted, forgotten: u64) {
        let mut wanted = lock(&self.wanted);
        if wanted.want.forgotten != forgotten {
            self.keep(Solved::default());
        }
        wanted.want = Want { of: counted, forgotten };
    }

    /// Whether there is something to solve that nobody is at.
    fn begin(&self) -> bool {
        let mut wanted = lock(&self.wanted);
        let begin = !wanted.at_work && lock(&self.solved).of != wanted.want.of;
        wanted.at_work |= begin;
        begin
    }

    /// Whether that which was begun is at its end: what was `tried` is still what is wanted. Where it failed it is not tried again.
    fn end(&self, tried: &Want) -> bool {
        let mut wanted = lock(&self.wanted);
        wanted.at_work = wanted.want != *tried;
        !wanted.at_work
    }

    /// Has solved what is wanted, unless that is done or somebody is at it.
    pub fn catch_up(self: &Arc<Self>, blobs: &Arc<Blobs>) {
        if !self.begin() {
            return;
        }
        let (apart, blobs) = (Arc::clone(self), Arc::clone(blobs));
        tokio::spawn(async move {
            loop {
                let started = Instant::now();
                let (solving, files) = (Arc::clone(&apart), Arc::clone(&blobs));
                let solved = tokio::task::spawn_blocking(move || solving.solve(&files)).await;
                let Ok((tried, solved)) = solved else {
                    lock(&apart.wanted).at_work = false;
                    return;
                };
                let seconds = started.elapsed().as_secs_f32();
                match solved {
                    Ok(()) => tracing::debug!(seconds, "lineages are told apart"),
                    Err(error) => tracing::warn!("prompts are told apart by their words alone: {error:#}"),
                }
                // What comes meanwhile waits for the end of the rest.
                tokio::time::sleep(started.elapsed() * (SHARE - 1)).await;
                if apart.end(&tried) {
                    return;
                }
            }
        });
    }

    /// Solves what is wanted, unless that is done by now; says what that was, and whether it went well. What was counted may not be
    /// there to be read; then nobody is told apart.
    pub fn solve(&self, blobs: &Blobs) -> (Want, anyhow::Result<()>) {
        // Threads of this one would be in the way of those that answer and learn.
        let _helpers = helpers();
        let want = lock(&self.wanted).want.clone();
        let of = &want.of;
        if lock(&self.solved).of == *of {
            return (want, Ok(()));
        }
        // One alone is told from nobody, and need not be read.
        let read = of.values().filter(|_| of.len() > 1).map(|counts| blobs.get(counts));
        // Without a solution nothing stays of the one before.
        let (solved, end) = match Whose::solve(read) {
            Ok(whose) => (Solved { of: of.clone(), whose }, Ok(())),
            Err(error) => (Solved::default(), Err(error)),
        };
        let wanted = lock(&self.wanted);
        // What was forgotten meanwhile may be in it.
        let stays = wanted.want.forgotten == want.forgotten;
        self.keep(if stays { solved } else { Solved::default() });
        (want, end)
    }

    fn keep(&self, solved: Solved) {
        let told_apart = if solved.whose.is_some() { solved.of.len() } else { 0 };
        metrics::gauge!("engram:lineages_told_apart").set(told_apart as f64);
        *lock(&self.solved) = solved;
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
    use model::ridge::{Counts, Features, Lesson};
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
        apart.follow(counted.clone(), 0);
        assert!(share(&apart).is_empty() && apart.begin() && !apart.begin(), "one at a time");
        let solve = |apart: &Apart| {
            let (tried, end) = apart.solve(&blobs);
            end.map(|()| tried)
        };
        let tried = solve(&apart).expect("solved");
        assert!(apart.end(&tried) && !apart.begin(), "nothing is new");
        assert!(matches!(share(&apart)[..], [cooking, travel] if cooking < 0.1 && travel > 0.9));

        let one: Counted = counted.clone().into_iter().take(1).collect();
        apart.follow(one, 0);
        assert!(apart.begin());
        let tried = solve(&apart).expect("solved");
        assert!(share(&apart).is_empty(), "one alone");
        apart.follow(counted.clone(), 0);
        assert!(!apart.end(&tried), "another came meanwhile");
        let tried = solve(&apart).expect("solved");
        assert!(apart.end(&tried) && share(&apart).len() == 2);
        apart.follow(counted.clone(), 1);
        assert!(share(&apart).is_empty(), "something was forgotten");
        assert!(!apart.end(&tried), "and what is current is the same, and to be solved anew");
        lock(&apart.wanted).at_work = false;
        assert!(
            apart.begin() && solve(&apart).is_ok_and(|tried| apart.end(&tried)) && share(&apart).len() == 2
        );

        let mut damaged = counted.clone();
        damaged.values_mut().for_each(|blob| *blob = Blob("0".repeat(64)));
        apart.follow(damaged, 1);
        assert!(apart.begin());
        let (tried, end) = apart.solve(&blobs);
        assert!(end.is_err() && share(&apart).is_empty());
        apart.follow(counted, 1);
        assert!(!apart.end(&tried), "what came while it failed is solved");
    }
}
