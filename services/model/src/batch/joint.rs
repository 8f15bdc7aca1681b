//! Answers of one step together by libtorch, on devices other than the CPU: each has a row of one cache.
//!
//! What a GPU does for a token of one answer takes less time than to order it, so that more rows cost almost nothing, and
//! few operations count more than small ones. How a row is computed may depend on how many there are, in its last bits.

use anyhow::{Context, Result, ensure};
use tch::{Kind, Tensor};

use super::{AdaptedKind, Cache, PREFILL_JOINT, Speaker, parts};
use crate::active::ActiveAdapters;
use crate::generate::{Step, to_vec};
use crate::llama::{Base, Input, KvCache, Mask};
use crate::lora::Adapter;

/// The cache's positions that a pass looks at are a multiple of this: kernels want aligned masks.
const VISIBLE_BLOCK: i64 = 64;

/// Positions that a row has for an answer of so many.
pub(super) fn aligned(positions: usize) -> usize {
    positions.next_multiple_of(VISIBLE_BLOCK as usize)
}

/// A row that an answer has.
struct Seat {
    /// Those that it may fill.
    positions: i64,
    held: i64,
}

/// An answer whose next token is to be read.
struct Turn<'a> {
    row: usize,
    id: u32,
    /// Names its adapters.
    number: u64,
    adapters: &'a ActiveAdapters,
}

/// The base, and the rows of all answers.
pub(super) struct Joint {
    base: Base,
    cache: KvCache,
    rows: i64,
    capacity: i64,
    seats: Vec<Option<Seat>>,
    /// Adapters by row, as they were last joined.
    joined: (Vec<Option<u64>>, ActiveAdapters),
}

impl Joint {
    pub fn new(base: Base) -> Self {
        let cache = KvCache::new(&base, 0);
        Self { base, cache, rows: 0, capacity: 0, seats: Vec::new(), joined: Default::default() }
    }

    /// Positions that all rows take if one more answer has to hold so many.
    pub fn positions_with(&self, positions: usize) -> usize {
        (self.free_row() + 1).max(self.seats.len()) * self.longest().max(positions)
    }

    fn longest(&self) -> usize {
        self.seats.iter().flatten().map(|seat| seat.positions as usize).max().unwrap_or(0)
    }

    fn free_row(&self) -> usize {
        self.seats.iter().position(Option::is_none).unwrap_or(self.seats.len())
    }

    /// A row for an answer of at most so many positions.
    ///
    /// # Errors
    /// When there is no memory for it: nothing is taken then.
    pub fn take(&mut self, positions: usize) -> Result<usize> {
        let row = self.free_row();
        if row == self.seats.len() {
            self.seats.push(None);
        }
        self.seats[row] = Some(Seat { positions: positions as i64, held: 0 });
        let (rows, longest) = (self.seats.len() as i64, self.longest() as i64);
        if self.rows < rows || self.capacity < longest {
            // As large as what is taken needs, so that it is never more than was said by `positions_with`.
            if let Err(error) = self.cache.resize(rows, longest) {
                self.leave(row);
                return Err(error);
            }
            (self.rows, self.capacity) = (rows, longest);
        }
        // A row has what an earlier answer left there, which nobody sees; but even unseen NaN would be NaN.
        if let Err(error) = self.cache.clear(row as i64) {
            self.leave(row);
            return Err(error);
        }
        Ok(row)
    }

    pub fn leave(&mut self, row: usize) {
        self.seats[row] = None;
        while let Some(None) = self.seats.last() {
            self.seats.pop();
        }
        if self.seats.is_empty() {
            // Adapters that may be replaced or forgotten by the time of the next answer.
            self.joined = Default::default();
        }
    }

    /// One step of all `speakers`, as of [`super::Batch::step`].
    ///
    /// # Errors
    /// When the pass of those who decode fails; where a prompt cannot be read, that is the result of its answer alone.
    pub fn pass(
        &mut self,
        speakers: &mut [&mut Speaker],
        results: &mut [Result<Option<Step>>],
    ) -> Result<()> {
        let row = |speaker: &Speaker| match speaker.state.cache {
            Cache::Row(row) => Some(row),
            Cache::Pages(_) => None,
        };
        let held = |speaker: &Speaker| row(speaker).map_or(0, |row| self.held(row));
        let counts = parts(speakers, PREFILL_JOINT, held);
        let unseen: Vec<usize> = speakers.iter().map(|speaker| held(speaker)).collect();
        let mut decoding = Vec::new();
        for (i, speaker) in speakers.iter_mut().enumerate() {
            let Speaker { adapted, state, .. } = &mut **speaker;
            let (Cache::Row(row), AdaptedKind::Joint(adapters)) = (&state.cache, &adapted.kind) else {
                continue;
            };
            let unseen = &state.ids[unseen[i]..];
            match counts[i] {
                0 => {}
                1 if unseen.len() == 1 => decoding.push(i),
                count => {
                    let speaks = count == unseen.len();
                    results[i] = match self.read(*row, &unseen[..count], adapters, speaks) {
                        Ok(Some(logits)) => state.say(logits),
                        Ok(None) => Ok(None),
                        Err(error) => Err(error),
                    };
                }
            }
        }
        let turn = |i: &usize| {
            let Speaker { adapted, state, .. } = &*speakers[*i];
            let AdaptedKind::Joint(adapters) = &adapted.kind else { return None };
            Some(Turn { row: row(speakers[*i])?, id: *state.ids.last()?, number: adapted.number, adapters })
        };
        let turns: Vec<Turn<'_>> = decoding.iter().filter_map(turn).collect();
        if turns.is_empty() {
            return Ok(());
        }
        let logits = self.decode(&turns)?;
        for (i, logits) in decoding.into_iter().zip(logits) {
            results[i] = speakers[i].state.say(logits);
        }
        Ok(())
    }

    /// Tokens that a row has read.
    fn held(&self, row: usize) -> usize {
        self.seats.get(row).and_then(Option::as_ref).map_or(0, |seat| seat.held as usize)
    }

    /// Reads what comes next in one row; if it `speaks`, gives the logits after it.
    fn read(
        &mut self,
        row: usize,
        ids: &[u32],
        adapters: &ActiveAdapters,
        speaks: bool,
    ) -> Result<Option<Vec<f32>>> {
        let _guard = tch::no_grad_guard();
        let seat = self.seats[row].as_mut().context("the row is nobody's")?;
        let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        let input =
            Input::rows(Tensor::from_slice(&ids).f_unsqueeze(0)?.f_to_device(self.base.device())?, seat.held);
        let hidden = self.base.forward(&input, adapters, Some(&mut self.cache.row(row as i64, seat.held)))?;
        seat.held += ids.len() as i64;
        if !speaks {
            return Ok(None);
        }
        Ok(Some(to_vec(&self.base.logits(&hidden.f_narrow(0, ids.len() as i64 - 1, 1)?)?)?))
    }

    /// Reads one token for each of `turns`; gives the logits after each.
    fn decode(&mut self, turns: &[Turn<'_>]) -> Result<Vec<Vec<f32>>> {
        let _guard = tch::no_grad_guard();
        let (rows, device) = (turns.iter().map(|turn| turn.row + 1).max().unwrap_or(0), self.base.device());
        self.join(turns, rows)?;
        // Rows that have no turn are computed too, and write where they will write when they have.
        let held = |row: usize| self.held(row) as i64;
        let mut numbers = vec![0i64; rows];
        turns.iter().for_each(|turn| numbers[turn.row] = i64::from(turn.id));
        numbers.extend((0..rows).map(|row| held(row).min(self.capacity - 1)));
        let visible = turns.iter().map(|turn| held(turn.row) + 1).max().unwrap_or(1);
        let visible = (aligned(visible as usize) as i64).min(self.capacity);
        let numbers = Tensor::from_slice(&numbers).f_view([2, rows as i64])?.f_to_device(device)?;
        let (ids, places) = (numbers.get(0).unsqueeze(1), numbers.get(1));
        let positions = places.unsqueeze(1);
        let seen = Tensor::f_arange(visible, (Kind::Int64, device))?.f_le_tensor(&positions)?;
        let mask = Mask::Block(seen.f_view([rows as i64, 1, 1, visible])?);
        let input = Input { ids, positions, mask, entry: None };
        let mut cache = self.cache.first_rows(&places, visible);
        let hidden = self.base.forward(&input, &self.joined.1, Some(&mut cache))?;
        let logits = to_vec(&self.base.logits(&hidden)?)?;
        for turn in turns {
            self.seats[turn.row].as_mut().context("the row is nobody's")?.held += 1;
        }
        let vocabulary = self.base.config().vocab_size as usize;
        Ok(turns.iter().map(|turn| logits[turn.row * vocabulary..][..vocabulary].to_vec()).collect())
    }

    /// Joins the adapters of all rows, where they are not those of the last pass.
    fn join(&mut self, turns: &[Turn<'_>], rows: usize) -> Result<()> {
        let mut numbers = vec![None; rows];
        turns.iter().for_each(|turn| numbers[turn.row] = Some(turn.number));
        if self.joined.0 == numbers {
            return Ok(());
        }
        let (mut known, mut sets): (Vec<u64>, Vec<&ActiveAdapters>) = (Vec::new(), Vec::new());
        for turn in turns {
            if !known.contains(&turn.number) {
                known.push(turn.number);
                sets.push(turn.adapters);
            }
        }
        // What a row without a turn computes is nobody's: with one set, all have it, and nothing has to be told apart.
        let only = known.len() == 1;
        let of_row = |number: &Option<u64>| match number {
            Some(number) => known.iter().position(|known| known == number),
            None => only.then_some(0),
        };
        let owners: Vec<Option<usize>> = numbers.iter().map(of_row).collect();
        let c = self.base.config();
        let (gate_up, hidden) = ([c.intermediate_size; 2], [c.hidden_size]);
        let widths: [&[i64]; 4] = [&c.qkv_rows(), &hidden, &gate_up, &hidden];
        self.joined = (numbers, ActiveAdapters::joined(&sets, &owners, widths)?);
        Ok(())
    }
}

/// The logits after each prompt, which is read as a whole up to its last eight tokens, and those one by one beside the others.
///
/// # Errors
/// When the device fails.
pub(crate) fn forced(
    base: &Base,
    sets: &[&[(&Adapter, f64)]],
    prompts: &[Vec<u32>],
) -> Result<Vec<Vec<f32>>> {
    let _guard = tch::no_grad_guard();
    let mut joint = Joint::new(base.share());
    let sets = sets.iter().map(|set| base.activate(set)).collect::<Result<Vec<_>>>()?;
    let mut logits = Vec::new();
    for (prompt, adapters) in prompts.iter().zip(&sets) {
        ensure!(prompt.len() > 8, "a prompt has more than eight tokens");
        let row = joint.take(aligned(prompt.len()))?;
        joint.read(row, &prompt[..prompt.len() - 8], adapters, false)?;
    }
    for back in (1..=8).rev() {
        let turn = |(row, (prompt, adapters)): (usize, (&Vec<u32>, _))| Turn {
            row,
            id: prompt[prompt.len() - back],
            number: row as u64,
            adapters,
        };
        let turns: Vec<Turn<'_>> = prompts.iter().zip(&sets).enumerate().map(turn).collect();
        logits = joint.decode(&turns)?;
    }
    Ok(logits)
}
