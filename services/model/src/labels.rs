//! Which of many answers is the likeliest to follow a text.
//!
//! Answers that begin alike share what they have in common: they are a tree whose nodes see the text and the path that
//! leads to them. Of the tree only those branches are computed that may still hold the likeliest answer: a
//! log-likelihood only falls with further tokens, so that of the first tokens, up to the first that tells answers apart,
//! bounds the whole from above, and over the length of the answer its mean.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Result, anyhow, ensure};
use tch::{Kind, Tensor};

use crate::active::ActiveAdapters;
use crate::llama::{Base, Input, Mask};
use crate::loss::chunk_rows;

/// Tokens of one forward pass, padding included.
const PASS_TOKENS: usize = 8192;
/// Answers of a group that are computed before bounds are compared with the best of them.
const FIRST_TRIED: usize = 6;

/// What makes an answer the likeliest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Its log-likelihood: how often the model would say it. Long answers are less likely than short ones.
    Sum,
    /// Its log-likelihood over its tokens, so that length is no disadvantage.
    Mean,
}

impl Rule {
    /// The score of an answer of so many tokens, in nats.
    fn score(self, log_likelihood: f64, tokens: usize) -> f64 {
        match self {
            Self::Sum => log_likelihood,
            Self::Mean => log_likelihood / tokens as f64,
        }
    }
}

/// A token of an answer, with the node it follows; none follows the text itself.
type Step = (Option<usize>, u32);

/// Answers as a tree of tokens.
#[derive(Debug)]
pub struct Labels {
    /// Every token that leads on. A parent stands before its children.
    nodes: Vec<Node>,
    /// The steps of each answer.
    answers: Vec<Vec<Step>>,
}

#[derive(Debug)]
struct Node {
    token: u32,
    parent: Option<usize>,
    /// Tokens of the answer before this one.
    depth: usize,
}

impl Labels {
    /// A tree of answers, each with its end token if it is to have one.
    ///
    /// # Errors
    /// When an answer is empty.
    pub fn new(answers: &[Vec<u32>]) -> Result<Self> {
        let mut nodes: Vec<Node> = Vec::new();
        let mut known: HashMap<(Option<usize>, u32), usize> = HashMap::new();
        let mut paths = Vec::with_capacity(answers.len());
        for answer in answers {
            ensure!(!answer.is_empty(), "an answer to choose from has no tokens");
            let mut at = None;
            let mut path = Vec::with_capacity(answer.len());
            for (depth, &token) in answer.iter().enumerate() {
                path.push((at, token));
                // The last token is predicted, and nothing is predicted from it.
                if depth + 1 < answer.len() {
                    at = Some(*known.entry((at, token)).or_insert_with(|| {
                        nodes.push(Node { token, parent: at, depth });
                        nodes.len() - 1
                    }));
                }
            }
            paths.push(path);
        }
        Ok(Self { nodes, answers: paths })
    }

    /// Tokens of the longest answer.
    pub fn depth(&self) -> usize {
        self.answers.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// For each text and each group of answers the likeliest by `rule`, and its score in nats. Answers are numbered in the order of [`Labels::new`]; of equals the last one wins.
    ///
    /// # Errors
    /// When a text is empty, or does not fit the model's context together with the longest answer, or a group is empty.
    pub fn likeliest(
        &self,
        base: &Base,
        adapters: &ActiveAdapters,
        texts: &[Vec<u32>],
        groups: &[Vec<usize>],
        rule: Rule,
    ) -> Result<Vec<Vec<(usize, f64)>>> {
        let _guard = tch::no_grad_guard();
        self.check(base, texts)?;
        ensure!(groups.iter().all(|group| !group.is_empty()), "there is no answer to choose from");
        let wanted: BTreeSet<usize> = groups.iter().flatten().copied().collect();
        let openings = self.openings(&wanted);
        let firsts: BTreeSet<&[Step]> = openings.values().copied().collect();
        let firsts: Vec<&[Step]> = firsts.into_iter().collect();
        let first = self.sums(base, adapters, texts, &vec![firsts.clone(); texts.len()])?;
        let mut choices: Vec<Choice> =
            first.iter().map(|sums| self.bounds(&openings, &firsts, sums, rule)).collect();
        for round in 0..2 {
            let tried: Vec<Vec<usize>> =
                choices.iter().map(|choice| choice.next(groups, round == 0)).collect();
            let path = |&n: &usize| self.answers[n].as_slice();
            let paths: Vec<Vec<&[Step]>> = tried.iter().map(|t| t.iter().map(path).collect()).collect();
            let sums = self.sums(base, adapters, texts, &paths)?;
            for ((choice, tried), sums) in choices.iter_mut().zip(&tried).zip(sums) {
                let score = |(&n, sum): (&usize, f64)| (n, rule.score(sum, self.answers[n].len()));
                choice.known.extend(tried.iter().zip(sums).map(score));
            }
        }
        let best = |choice: &Choice| -> Result<Vec<(usize, f64)>> {
            groups
                .iter()
                .map(|group| choice.best(group).ok_or_else(|| anyhow!("no answer was computed")))
                .collect()
        };
        choices.iter().map(best).collect()
    }

    fn check(&self, base: &Base, texts: &[Vec<u32>]) -> Result<()> {
        let context = base.config().max_positions as usize;
        for text in texts {
            ensure!(!text.is_empty(), "a text to choose an answer for has no tokens");
            ensure!(
                text.len() + self.depth() <= context,
                "a text of {} tokens and an answer of {} do not fit the model's context of {context}",
                text.len(),
                self.depth()
            );
        }
        Ok(())
    }

    /// How each of these answers opens: with what they all begin with, such as a line break, and the token after it.
    fn openings(&self, wanted: &BTreeSet<usize>) -> BTreeMap<usize, &[Step]> {
        let answer = |n: &usize| self.answers[*n].as_slice();
        let first = wanted.first().map(answer).unwrap_or_default();
        let common = |n| first.iter().zip(answer(n)).take_while(|(a, b)| a == b).count();
        let common = wanted.iter().map(common).min().unwrap_or(0);
        wanted.iter().map(|n| (*n, &answer(n)[..answer(n).len().min(common + 1)])).collect()
    }

    /// What the log-likelihoods of the answers' openings say of the answers.
    fn bounds(
        &self,
        openings: &BTreeMap<usize, &[Step]>,
        firsts: &[&[Step]],
        sums: &[f64],
        rule: Rule,
    ) -> Choice {
        let of_first: HashMap<&[Step], f64> = firsts.iter().copied().zip(sums.iter().copied()).collect();
        let bound = |n: &usize| {
            let opening = of_first.get(openings.get(n)?)?;
            Some(rule.score(*opening, self.answers[*n].len()))
        };
        Choice { bounds: (0..self.answers.len()).map(|n| bound(&n)).collect(), known: HashMap::new() }
    }

    /// For each text the log-likelihood of each of its paths, in nats.
    fn sums(
        &self,
        base: &Base,
        adapters: &ActiveAdapters,
        texts: &[Vec<u32>],
        paths: &[Vec<&[Step]>],
    ) -> Result<Vec<Vec<f64>>> {
        let mut rows: Vec<Row<'_>> =
            texts.iter().zip(paths).map(|(text, paths)| self.row(text, paths)).collect();
        // Rows of like length share a pass, so that little of it is padding.
        let mut order: Vec<usize> = (0..rows.len()).filter(|&i| !paths[i].is_empty()).collect();
        order.sort_by_key(|&i| rows[i].length());
        let mut sums = vec![Vec::new(); texts.len()];
        let mut rest = order.as_slice();
        while !rest.is_empty() {
            let fits = |count: &usize| count * rows[rest[count - 1]].length() <= PASS_TOKENS;
            let count = (1..=rest.len()).take_while(fits).last().unwrap_or(1);
            let (group, after) = rest.split_at(count);
            let members: Vec<Row<'_>> = group.iter().map(|&i| std::mem::take(&mut rows[i])).collect();
            for (&i, of_row) in group.iter().zip(self.pass(base, adapters, &members)?) {
                sums[i] = of_row;
            }
            rest = after;
        }
        Ok(sums)
    }

    /// A text with the nodes that lead to its paths.
    fn row<'a>(&self, text: &'a [u32], paths: &[&'a [Step]]) -> Row<'a> {
        let nodes: BTreeSet<usize> =
            paths.iter().flat_map(|path| path.iter().filter_map(|step| step.0)).collect();
        Row { text, paths: paths.to_vec(), nodes: nodes.into_iter().collect() }
    }

    fn pass(&self, base: &Base, adapters: &ActiveAdapters, rows: &[Row<'_>]) -> Result<Vec<Vec<f64>>> {
        let length = rows.iter().map(Row::length).max().unwrap_or(0);
        let hidden = base.forward(&self.input(base, rows, length), adapters, None)?;
        // What an answer's token is predicted from: a place in the flattened rows.
        let mut wanted: Vec<(i64, i64)> = Vec::new();
        for (n, row) in rows.iter().enumerate() {
            for &(from, token) in row.paths.iter().copied().flatten() {
                let place = n * length + from.map_or(row.text.len() - 1, |node| row.place(node));
                wanted.push((place as i64, i64::from(token)));
            }
        }
        let places: Vec<i64> = {
            let mut places: Vec<i64> = wanted.iter().map(|(place, _)| *place).collect();
            places.sort_unstable();
            places.dedup();
            places
        };
        let likelihoods = self.likelihoods(base, &hidden, &places, &wanted)?;
        let mut rest = likelihoods.iter();
        let mut sum = |path: &&[Step]| rest.by_ref().take(path.len()).map(|l| f64::from(*l)).sum::<f64>();
        Ok(rows.iter().map(|row| row.paths.iter().map(&mut sum).collect()).collect())
    }

    /// The log-likelihood of each token `wanted`, with the full distribution of a few places at a time.
    fn likelihoods(
        &self,
        base: &Base,
        hidden: &Tensor,
        places: &[i64],
        wanted: &[(i64, i64)],
    ) -> Result<Vec<f32>> {
        let mut by_place: Vec<usize> = (0..wanted.len()).collect();
        by_place.sort_by_key(|&i| wanted[i].0);
        let mut found = vec![0_f32; wanted.len()];
        let mut next = by_place.into_iter().peekable();
        for chunk in places.chunks(chunk_rows(base.config().vocab_size) as usize) {
            let rows = hidden.f_index_select(0, &Tensor::from_slice(chunk).to_device(base.device()))?;
            let log_probs = base.logits(&rows)?.f_log_softmax(-1, Kind::Float)?;
            let (mut indices, mut flat) = (Vec::new(), Vec::new());
            for (n, &place) in chunk.iter().enumerate() {
                while let Some(i) = next.next_if(|&i| wanted[i].0 == place) {
                    indices.push(i);
                    flat.push(n as i64 * base.config().vocab_size + wanted[i].1);
                }
            }
            let flat = Tensor::from_slice(&flat).to_device(base.device());
            let taken = log_probs.f_view([-1])?.f_index_select(0, &flat)?.f_to_device(tch::Device::Cpu)?;
            let mut values = vec![0_f32; indices.len()];
            taken.f_copy_data(&mut values, indices.len())?;
            for (i, value) in indices.into_iter().zip(values) {
                found[i] = value;
            }
        }
        Ok(found)
    }

    /// Rows of a text, its nodes, and padding that sees itself only.
    fn input(&self, base: &Base, rows: &[Row<'_>], length: usize) -> Input {
        let (mut ids, mut positions) = (vec![0_i64; rows.len() * length], vec![0_i64; rows.len() * length]);
        let mut seen = vec![false; rows.len() * length * length];
        for (n, row) in rows.iter().enumerate() {
            let at = n * length;
            let mut sees = |from: usize, to: usize| seen[(at + from) * length + to] = true;
            for (i, &token) in row.text.iter().enumerate() {
                (ids[at + i], positions[at + i]) = (i64::from(token), i as i64);
                (0..=i).for_each(|to| sees(i, to));
            }
            for &on in &row.nodes {
                let (i, node) = (row.place(on), &self.nodes[on]);
                (ids[at + i], positions[at + i]) =
                    (i64::from(node.token), (row.text.len() + node.depth) as i64);
                (0..row.text.len()).for_each(|to| sees(i, to));
                let mut path = Some(on);
                while let Some(on) = path {
                    sees(i, row.place(on));
                    path = self.nodes[on].parent;
                }
            }
            (row.length()..length).for_each(|i| sees(i, i));
        }
        let shape = [rows.len() as i64, length as i64];
        let device = base.device();
        let tensor = |values: &[i64]| Tensor::from_slice(values).view(shape).to_device(device);
        let seen = Tensor::from_slice(&seen).view([shape[0], 1, shape[1], shape[1]]).to_device(device);
        Input { ids: tensor(&ids), positions: tensor(&positions), mask: Mask::Block(seen), entry: None }
    }
}

/// A text, paths whose likelihood is asked for, and the nodes that lead to them, in order.
#[derive(Default)]
struct Row<'a> {
    text: &'a [u32],
    paths: Vec<&'a [Step]>,
    nodes: Vec<usize>,
}

impl Row<'_> {
    fn length(&self) -> usize {
        self.text.len() + self.nodes.len()
    }

    /// Where a node stands in the row.
    fn place(&self, node: usize) -> usize {
        self.text.len() + self.nodes.partition_point(|&n| n < node)
    }
}

/// What is known of a text's answers.
struct Choice {
    /// What the score of each answer cannot exceed; none where nobody asked.
    bounds: Vec<Option<f64>>,
    /// The score of those that were computed.
    known: HashMap<usize, f64>,
}

impl Choice {
    /// The likeliest computed answer of a group.
    fn best(&self, group: &[usize]) -> Option<(usize, f64)> {
        let known = group.iter().filter_map(|n| Some((*n, *self.known.get(n)?)));
        known.max_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// Answers to compute: at first the most promising of each group, then all that may be likelier than its best.
    fn next(&self, groups: &[Vec<usize>], first: bool) -> Vec<usize> {
        let mut next = BTreeSet::new();
        for group in groups {
            let mut open: Vec<(usize, f64)> = group
                .iter()
                .filter(|n| !self.known.contains_key(n))
                .filter_map(|&n| Some((n, self.bounds[n]?)))
                .collect();
            if first {
                open.sort_by(|a, b| b.1.total_cmp(&a.1));
                open.truncate(FIRST_TRIED);
            } else if let Some((_, best)) = self.best(group) {
                open.retain(|(_, bound)| *bound >= best);
            }
            next.extend(open.into_iter().map(|(n, _)| n));
        }
        next.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use crate::lora::Adapter;
    use crate::loss;
    use crate::pack::Sequence;

    #[test]
    fn the_choice_is_that_of_every_answer_scored_alone() {
        let base = golden::base("llama");
        let adapter = golden::adapter("peft-r8");
        // Answers of one to four tokens, many of which begin alike.
        let answers: Vec<Vec<u32>> =
            (0..40_u32).map(|n| (0..=n % 4).map(|i| (n / (4 - i) * 7 + i * 13) % 128).collect()).collect();
        let texts: Vec<Vec<u32>> =
            (2..12_u32).map(|n| (0..n).map(|i| (i * 11 + n) % 128).collect()).collect();
        // And such that all begin with the same two.
        let alike: Vec<Vec<u32>> =
            answers.iter().map(|answer| [&[5, 9], answer.as_slice()].concat()).collect();
        for answers in [answers, alike] {
            check(&base, &adapter, &answers, &texts);
        }
    }

    fn check(base: &Base, adapter: &Adapter, answers: &[Vec<u32>], texts: &[Vec<u32>]) {
        let active = base.activate(&[(adapter, 1.0)]).unwrap();
        let labels = Labels::new(answers).unwrap();
        let groups = [(0..40).collect(), (0..40).filter(|n| n % 3 == 0).collect::<Vec<_>>(), vec![7]];
        let alone = |text: &[u32], answer: &[u32], rule: Rule| {
            let tokens = [text, answer].concat();
            let learned = vec![(text.len() as u32, tokens.len() as u32)];
            let sequence = Sequence { tokens, learned, rehearsed: false };
            let score = loss::score(base, &[(adapter, 1.0)], &[sequence], 64).unwrap()[0];
            if rule == Rule::Sum { -score.nll_sum } else { -score.mean() }
        };
        for rule in [Rule::Sum, Rule::Mean] {
            let chosen = labels.likeliest(base, &active, texts, &groups, rule).unwrap();
            for (text, chosen) in texts.iter().zip(&chosen) {
                let alone: Vec<f64> = answers.iter().map(|answer| alone(text, answer, rule)).collect();
                for (group, &(answer, score)) in groups.iter().zip(chosen) {
                    let best = group.iter().map(|&n| alone[n]).fold(f64::NEG_INFINITY, f64::max);
                    assert!(
                        (score - best).abs() < 1e-4 && (alone[answer] - best).abs() < 1e-4,
                        "{score} for {best}"
                    );
                }
            }
        }
    }

    #[test]
    fn only_what_may_be_likelier_is_computed() {
        let bounds = (0..10).map(|n| Some(-f64::from(n))).collect();
        let mut choice = Choice { bounds, known: HashMap::new() };
        let groups = [(0..10).collect::<Vec<_>>(), vec![8, 9]];
        assert_eq!(choice.next(&groups, true), [0, 1, 2, 3, 4, 5, 8, 9]);
        choice.known.extend((0..6).chain(8..10).map(|n| (n, -7.5 - n as f64)));
        assert_eq!(choice.next(&groups, false), [6, 7]);
        choice.known.extend([(6, -6.0), (7, -7.0)]);
        assert_eq!((choice.best(&groups[0]), choice.best(&groups[1])), (Some((6, -6.0)), Some((8, -15.5))));
    }

    #[test]
    fn answers_open_with_what_they_have_in_common_and_a_token_more() {
        let labels = Labels::new(&[vec![1, 2, 3], vec![1, 2, 4, 5], vec![1, 2], vec![1, 6]]).unwrap();
        let openings = |wanted: &[usize]| -> Vec<Vec<u32>> {
            let openings = labels.openings(&wanted.iter().copied().collect());
            openings.values().map(|opening| opening.iter().map(|step| step.1).collect()).collect()
        };
        assert_eq!(openings(&[0, 1]), [vec![1, 2, 3], vec![1, 2, 4]]);
        assert_eq!(openings(&[0, 2]), [vec![1, 2, 3], vec![1, 2]]);
        assert_eq!(openings(&[0, 3]), [vec![1, 2], vec![1, 6]]);
        assert_eq!(openings(&[1]), [vec![1, 2, 4, 5]]);
    }

    #[test]
    fn what_has_no_tokens_or_does_not_fit_is_refused() {
        let base = golden::base("llama");
        let none = ActiveAdapters::none();
        assert!(Labels::new(&[vec![1], vec![]]).is_err());
        let labels = Labels::new(&[vec![1, 2]]).unwrap();
        let of = |text: Vec<u32>| labels.likeliest(&base, &none, &[text], &[vec![0]], Rule::Mean);
        assert!(of(vec![]).is_err());
        assert!(of(vec![1; 255]).is_err());
        assert!(of(vec![1; 254]).is_ok());
        assert!(labels.likeliest(&base, &none, &[vec![1]], &[vec![]], Rule::Sum).is_err());
    }
}
