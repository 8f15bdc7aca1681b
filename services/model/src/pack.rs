//! Sequences, and how several of them share a row without seeing each other.

use anyhow::{Result, ensure};
use tch::{Device, Tensor};

use crate::llama::{Base, Entry, Input, Mask};

/// Tokens to learn from or to score.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sequence {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Half-open ranges of tokens that count: ascending, not overlapping. Token 0 never counts, since nothing
    /// precedes it.
    pub learned: Vec<(u32, u32)>,
    /// It was learned before, and is rehearsed.
    pub rehearsed: bool,
}

impl Sequence {
    /// A sequence of which every token but the first counts.
    pub fn whole(tokens: Vec<u32>) -> Self {
        let learned = vec![(0, tokens.len() as u32)];
        Self { tokens, learned, rehearsed: false }
    }

    /// Number of tokens that count.
    pub fn learned_tokens(&self) -> usize {
        self.learned.iter().map(|&(start, end)| end.saturating_sub(start.max(1)) as usize).sum()
    }

    fn check(&self, base: &Base) -> Result<()> {
        let config = base.config();
        let length = self.tokens.len();
        ensure!(
            length as i64 <= config.max_positions,
            "a sequence of {length} tokens does not fit the model's context of {}: cut it",
            config.max_positions
        );
        if let Some(id) = self.tokens.iter().find(|&&id| i64::from(id) >= config.vocab_size) {
            anyhow::bail!("token id {id} is beyond the model's vocabulary of {}", config.vocab_size);
        }
        let mut last = 0;
        for &(start, end) in &self.learned {
            ensure!(
                last <= start && start <= end && end as usize <= length,
                "learned range {start}..{end} is out of place"
            );
            last = end;
        }
        Ok(())
    }
}

/// One token that counts.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Learned {
    /// Where the preceding token lies in the flattened rows.
    from: i64,
    target: i64,
    /// Which sequence it belongs to.
    owner: usize,
    /// That sequence is rehearsed.
    rehearsed: bool,
}

/// Sequences laid into rows of equal length.
#[derive(Debug)]
pub struct Packed {
    rows: i64,
    length: i64,
    ids: Vec<i64>,
    positions: Vec<i64>,
    /// The number of each token's sequence within its row; padding has its own.
    segments: Vec<i64>,
    learned: Vec<Learned>,
    /// Where each sequence begins in the flattened rows; an empty one nowhere.
    starts: Vec<i64>,
    entry: Option<Entry>,
    spared: Option<Spared>,
}

/// Tokens that are not made less likely by those who do not say them: see [`crate::guard::Apart`].
#[derive(Debug)]
pub(crate) struct Spared {
    /// Whether each learned token's sequence leaves them alone, bool [learned tokens, 1].
    pub by: Tensor,
    /// Which tokens of the vocabulary they are, bool [1, vocab_size].
    pub tokens: Tensor,
}

/// Lays sequences into rows of at most `row_tokens` tokens, or of the longest sequence where that is longer.
///
/// There are as few rows as that takes, and they are as short as so many can be, since most devices compute what is missing of a
/// row like the rest of it: a pure function of the input.
///
/// # Errors
/// When a sequence does not fit the model: too long, ids beyond the vocabulary, ranges out of place.
pub fn pack(base: &Base, sequences: &[Sequence], row_tokens: usize) -> Result<Packed> {
    for sequence in sequences {
        sequence.check(base)?;
    }
    let rows = short_rows(sequences, row_tokens);
    let tokens = |row: &Vec<usize>| row.iter().map(|&i| sequences[i].tokens.len()).sum::<usize>();
    let length = rows.iter().map(tokens).max().unwrap_or(0);
    let mut packed = Packed {
        rows: rows.len() as i64,
        length: length as i64,
        ids: Vec::with_capacity(rows.len() * length),
        positions: Vec::new(),
        segments: Vec::new(),
        learned: Vec::new(),
        starts: vec![0; sequences.len()],
        entry: None,
        spared: None,
    };
    for row in &rows {
        packed.push_row(sequences, row, length);
    }
    Ok(packed)
}

/// Which sequences share a row, of as few rows as `row_tokens` takes, each as short as that allows, about.
fn short_rows(sequences: &[Sequence], row_tokens: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..sequences.len()).filter(|&i| !sequences[i].tokens.is_empty()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(sequences[i].tokens.len()));
    let longest = order.first().map_or(0, |&i| sequences[i].tokens.len());
    let most = row_tokens.max(longest);
    let rows = first_fit(sequences, &order, most);
    let total: usize = sequences.iter().map(|sequence| sequence.tokens.len()).sum();
    let mut room = total.div_ceil(rows.len().max(1)).max(longest);
    while room < most {
        let shorter = first_fit(sequences, &order, room);
        if shorter.len() <= rows.len() {
            return shorter;
        }
        room += room / 32 + 1;
    }
    rows
}

/// Each sequence of `order` in the first row that has room for it.
fn first_fit(sequences: &[Sequence], order: &[usize], room: usize) -> Vec<Vec<usize>> {
    let mut rows: Vec<(usize, Vec<usize>)> = Vec::new();
    for &i in order {
        let need = sequences[i].tokens.len();
        match rows.iter_mut().find(|(used, _)| used + need <= room) {
            Some((used, row)) => {
                *used += need;
                row.push(i);
            }
            None => rows.push((need, vec![i])),
        }
    }
    rows.into_iter().map(|(_, row)| row).collect()
}

impl Packed {
    fn push_row(&mut self, sequences: &[Sequence], row: &[usize], length: usize) {
        let end = self.ids.len() + length;
        for (segment, &owner) in row.iter().enumerate() {
            let (sequence, start) = (&sequences[owner], self.ids.len() as i64);
            self.starts[owner] = start;
            for &(from, to) in &sequence.learned {
                self.learned.extend((from.max(1)..to).map(|t| Learned {
                    from: start + i64::from(t) - 1,
                    target: i64::from(sequence.tokens[t as usize]),
                    owner,
                    rehearsed: sequence.rehearsed,
                }));
            }
            self.ids.extend(sequence.tokens.iter().map(|&id| i64::from(id)));
            self.positions.extend(0..sequence.tokens.len() as i64);
            self.segments.extend(sequence.tokens.iter().map(|_| segment as i64));
        }
        // Padding sees padding: a row of a mask with nothing visible would be NaN.
        let padding = end - self.ids.len();
        self.ids.extend(std::iter::repeat_n(0, padding));
        self.positions.extend(0..padding as i64);
        self.segments.extend(std::iter::repeat_n(-1, padding));
    }

    /// Number of sequences, empty ones included.
    pub fn sequences(&self) -> usize {
        self.starts.len()
    }

    /// Where sequence `i` begins in the flattened rows.
    pub(crate) fn start(&self, i: usize) -> i64 {
        self.starts[i]
    }

    /// Where sequences lie in the flattened rows, in the order in which they do, and their lengths; padding is none.
    pub(crate) fn spans(&self) -> Vec<(usize, usize)> {
        let mut spans: Vec<(usize, usize)> = Vec::new();
        for (i, _) in self.segments.iter().enumerate().filter(|&(_, &segment)| segment >= 0) {
            match spans.last_mut() {
                Some((_, tokens)) if self.positions[i] > 0 => *tokens += 1,
                _ => spans.push((i, 1)),
            }
        }
        spans
    }

    /// The same, entering the blocks there.
    pub(crate) fn entering(self, entry: Entry) -> Self {
        Self { entry: Some(entry), ..self }
    }

    /// The same, with tokens spared by every sequence that has none of them to learn. `tokens` says which, by id.
    pub(crate) fn sparing(mut self, tokens: &[bool], device: Device) -> Self {
        let says = |learned: &Learned| tokens.get(learned.target as usize).is_some_and(|spared| *spared);
        let mut saying = vec![false; self.sequences()];
        self.learned.iter().for_each(|learned| saying[learned.owner] |= says(learned));
        let by: Vec<bool> = self.learned.iter().map(|learned| !saying[learned.owner]).collect();
        let tensor = |values: &[bool], shape| Tensor::from_slice(values).view(shape).to_device(device);
        self.spared = Some(Spared { by: tensor(&by, [-1, 1]), tokens: tensor(tokens, [1, -1]) });
        self
    }

    /// The same, with these tokens to be predicted in place of those that came.
    pub(crate) fn predicting(mut self, tokens: &[i64]) -> Self {
        self.learned.iter_mut().zip(tokens).for_each(|(learned, token)| learned.target = *token);
        self
    }

    /// The same with padding in the place of sequences that nothing is learned of, or that `keep` says no to: it is asked whether they
    /// are rehearsed. Nothing is spared.
    pub(crate) fn only(&self, keep: impl Fn(bool) -> bool) -> Self {
        let learned: Vec<Learned> = self.learned.iter().filter(|of| keep(of.rehearsed)).copied().collect();
        let mut segments = vec![-1; self.segments.len()];
        let mut owner = None;
        for of in &learned {
            if owner.replace(of.owner) == Some(of.owner) {
                continue;
            }
            let start = self.starts[of.owner] as usize;
            let row_end = (start / self.length as usize + 1) * self.length as usize;
            let segment = self.segments[start];
            for at in (start..row_end).take_while(|&at| self.segments[at] == segment) {
                segments[at] = segment;
            }
        }
        Self {
            rows: self.rows,
            length: self.length,
            ids: self.ids.clone(),
            positions: self.positions.clone(),
            segments,
            learned,
            starts: self.starts.clone(),
            entry: self.entry.as_ref().map(Entry::share),
            spared: None,
        }
    }

    /// What is spared, by whom.
    pub(crate) fn spared(&self) -> Option<&Spared> {
        self.spared.as_ref()
    }

    /// Rows and their length in tokens.
    pub fn shape(&self) -> (i64, i64) {
        (self.rows, self.length)
    }

    /// Number of tokens that count.
    pub fn learned_tokens(&self) -> usize {
        self.learned.len()
    }

    /// The sequence that each learned token belongs to, in the order of [`Packed::targets`].
    pub(crate) fn owners(&self) -> impl Iterator<Item = usize> {
        self.learned.iter().map(|learned| learned.owner)
    }

    /// Whether each learned token is of a rehearsed sequence, in the order of [`Packed::targets`].
    pub(crate) fn rehearsed(&self) -> impl Iterator<Item = bool> {
        self.learned.iter().map(|learned| learned.rehearsed)
    }

    /// For each learned token, the flattened place of the hidden state that predicts it, and its id.
    pub(crate) fn targets(&self, device: Device) -> (Tensor, Tensor) {
        let from: Vec<i64> = self.learned.iter().map(|learned| learned.from).collect();
        let target: Vec<i64> = self.learned.iter().map(|learned| learned.target).collect();
        (Tensor::from_slice(&from).to_device(device), Tensor::from_slice(&target).to_device(device))
    }

    /// The forward pass's input. Rows of one sequence each need no mask but the causal one.
    pub fn input(&self, device: Device) -> Input {
        let mut input = self.unmasked(device);
        if self.segments.iter().any(|&segment| segment > 0) {
            let segments =
                Tensor::from_slice(&self.segments).view([self.rows, self.length]).to_device(device);
            let same = segments.unsqueeze(1).eq_tensor(&segments.unsqueeze(2));
            input.mask = Mask::Block(same.tril(0).unsqueeze(1));
        }
        input
    }

    /// The same for those who see to it themselves that sequences do not see each other.
    pub(crate) fn unmasked(&self, device: Device) -> Input {
        let shape = [self.rows, self.length];
        let tensor = |values: &[i64]| Tensor::from_slice(values).view(shape).to_device(device);
        let entry = self.entry.as_ref().map(Entry::share);
        Input { ids: tensor(&self.ids), positions: tensor(&self.positions), mask: Mask::Causal, entry }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::active::ActiveAdapters;
    use crate::{golden, loss};
    use proptest::prelude::*;

    fn sequence(length: u32) -> Sequence {
        Sequence::whole((0..length).collect())
    }

    #[test]
    fn rows_are_few_and_short_and_every_token_counts_once() {
        let base = golden::base("llama");
        let packed = pack(&base, &[sequence(3), sequence(7), sequence(0), sequence(5)], 10).unwrap();
        assert_eq!(packed.shape(), (2, 8));
        assert_eq!(packed.learned_tokens(), 2 + 6 + 4);
        assert_eq!(packed.segments, [0, 0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 0, 0, 1, 1, 1]);
        assert_eq!(packed.positions[7..14], [0, 0, 1, 2, 3, 4, 0]);
        assert!(matches!(packed.input(Device::Cpu).mask, Mask::Block(_)));
        // Where nothing shorter would do, rows are as long as they may be; one that is longer has a row of its length.
        assert_eq!(pack(&base, &[sequence(6), sequence(6), sequence(6)], 12).unwrap().shape(), (2, 12));
        assert_eq!(pack(&base, &[sequence(20), sequence(6), sequence(6)], 12).unwrap().shape(), (2, 20));
    }

    proptest! {
        #[test]
        fn little_of_many_short_sequences_rows_is_empty(
            lengths in proptest::collection::vec(1u32..40, 16..80),
            row_tokens in 128usize..512,
        ) {
            let sequences: Vec<Sequence> = lengths.iter().map(|&length| sequence(length)).collect();
            let rows = short_rows(&sequences, row_tokens);
            let tokens = |row: &Vec<usize>| row.iter().map(|&i| lengths[i] as usize).sum::<usize>();
            let (total, longest) = (rows.iter().map(tokens).sum::<usize>(), rows.iter().map(tokens).max().unwrap());
            prop_assert_eq!(total, lengths.iter().sum::<u32>() as usize);
            prop_assert!(longest <= row_tokens && rows.len() <= total.div_ceil(row_tokens) + 1);
            prop_assert!(rows.len() * longest <= total + total / 4 + 40, "{} of {longest} for {total}", rows.len());
            let mut all = rows.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn spans_are_sequences_without_what_fills_up_rows() {
        let base = golden::base("llama");
        let packed =
            pack(&base, &[sequence(3), sequence(7), sequence(0), sequence(5), sequence(1)], 10).unwrap();
        assert_eq!(packed.shape(), (2, 8));
        assert_eq!(packed.spans(), [(0, 7), (7, 1), (8, 5), (13, 3)]);
        assert_eq!(pack(&base, &[sequence(3), sequence(2)], 1).unwrap().spans(), [(0, 3), (3, 2)]);
        assert!(pack(&base, &[], 8).unwrap().spans().is_empty());
    }

    #[test]
    fn what_is_not_asked_for_is_padding() {
        let base = golden::base("llama");
        let rehearsed = |length| Sequence { rehearsed: true, ..sequence(length) };
        let packed =
            pack(&base, &[sequence(3), rehearsed(4), rehearsed(1), rehearsed(6), sequence(2)], 8).unwrap();
        let only = packed.only(|rehearsed| rehearsed);
        assert_eq!((only.shape(), only.sequences()), (packed.shape(), 5));
        assert_eq!(only.owners().collect::<Vec<_>>(), [3, 3, 3, 3, 3, 1, 1, 1]);
        // Nothing is learned of a single token.
        assert_eq!(only.spans(), [(packed.start(3) as usize, 6), (packed.start(1) as usize, 4)]);
        assert_eq!(packed.only(|_| true).spans().len(), 4);
        // What is left is read as before.
        let hidden = |packed: &Packed| loss::recorded_hidden(&base, &ActiveAdapters::none(), packed).unwrap();
        let kept: Vec<i64> =
            (0..).zip(packed.rehearsed()).filter(|(_, rehearsed)| *rehearsed).map(|(i, _)| i).collect();
        let expected = hidden(&packed).index_select(0, &Tensor::from_slice(&kept));
        assert!(golden::distance(&hidden(&only), &expected) < 1e-5);
    }

    #[test]
    fn ranges_say_what_counts() {
        let base = golden::base("llama");
        let sequence =
            Sequence { tokens: vec![9, 8, 7, 6, 5], learned: vec![(0, 2), (4, 5)], rehearsed: false };
        assert_eq!(sequence.learned_tokens(), 2);
        let packed = pack(&base, &[sequence], 5).unwrap();
        let learned: Vec<_> = packed.learned.iter().map(|l| (l.from, l.target)).collect();
        assert_eq!(learned, [(0, 8), (3, 5)]);
        assert!(matches!(packed.input(Device::Cpu).mask, Mask::Causal));
    }

    #[test]
    fn sequences_that_do_not_fit_the_model_are_refused() {
        let base = golden::base("llama");
        for bad in [
            Sequence::whole(vec![0; 257]),
            Sequence::whole(vec![128]),
            Sequence { learned: vec![(0, 3)], ..Sequence::whole(vec![1, 2]) },
            Sequence { learned: vec![(1, 2), (0, 1)], ..Sequence::whole(vec![1, 2]) },
        ] {
            assert!(pack(&base, &[bad], 8).is_err());
        }
    }
}
