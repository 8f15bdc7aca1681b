//! How likely each of many answers is to follow a text.
//!
//! The text is computed once, and answers that begin alike share what they have in common: they are a tree whose
//! nodes see the text and the path that leads to them.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use crate::active::ActiveAdapters;
use crate::llama::{Base, Input, Mask};
use crate::loss::CHUNK_ROWS;

/// Tokens of one forward pass, padding included.
const PASS_TOKENS: usize = 8192;

/// Answers as a tree of tokens.
#[derive(Debug)]
pub struct Labels {
    /// Every token that leads on. A parent stands before its children.
    nodes: Vec<Node>,
    /// For each answer its tokens, each with the node it follows; none follows the text itself.
    answers: Vec<Vec<(Option<usize>, u32)>>,
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

    /// For each text the mean log-likelihood a token of every answer, in nats, in the order of [`Labels::new`].
    ///
    /// # Errors
    /// When a text is empty, or does not fit the model's context together with the longest answer.
    pub fn score(&self, base: &Base, adapters: &ActiveAdapters, texts: &[Vec<u32>]) -> Result<Vec<Vec<f64>>> {
        let _guard = tch::no_grad_guard();
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
        // Texts of like length share a pass, so that little of it is padding.
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|&i| texts[i].len());
        let mut scores = vec![Vec::new(); texts.len()];
        let mut rest = order.as_slice();
        while let Some(&first) = rest.first() {
            let fits =
                |count: &usize| count * (texts[rest[count - 1]].len() + self.nodes.len()) <= PASS_TOKENS;
            let count = (1..=rest.len()).take_while(fits).last().unwrap_or(1);
            debug_assert!(texts[first].len() <= texts[rest[count - 1]].len());
            let (group, after) = rest.split_at(count);
            let group_texts: Vec<&[u32]> = group.iter().map(|&i| texts[i].as_slice()).collect();
            for (&i, of_text) in group.iter().zip(self.pass(base, adapters, &group_texts)?) {
                scores[i] = of_text;
            }
            rest = after;
        }
        Ok(scores)
    }

    fn pass(&self, base: &Base, adapters: &ActiveAdapters, texts: &[&[u32]]) -> Result<Vec<Vec<f64>>> {
        let length = texts.iter().map(|text| text.len()).max().unwrap_or(0) + self.nodes.len();
        let hidden = base.forward(&self.input(base, texts, length), adapters, None)?;
        // What an answer's token is predicted from: a place in the flattened rows.
        let mut wanted: Vec<(i64, i64)> = Vec::new();
        for (row, text) in texts.iter().enumerate() {
            for &(from, token) in self.answers.iter().flatten() {
                let place = row * length + from.map_or(text.len() - 1, |node| text.len() + node);
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
        let mut mean = |answer: &Vec<_>| {
            rest.by_ref().take(answer.len()).map(|l| f64::from(*l)).sum::<f64>() / answer.len() as f64
        };
        Ok(texts.iter().map(|_| self.answers.iter().map(&mut mean).collect()).collect())
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
        for chunk in places.chunks(CHUNK_ROWS as usize) {
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

    /// Rows of a text, the tree, and padding that sees itself only.
    fn input(&self, base: &Base, texts: &[&[u32]], length: usize) -> Input {
        let rows = texts.len();
        let (mut ids, mut positions) = (vec![0_i64; rows * length], vec![0_i64; rows * length]);
        let mut seen = vec![false; rows * length * length];
        for (row, text) in texts.iter().enumerate() {
            let at = row * length;
            let mut sees = |from: usize, to: usize| seen[(at + from) * length + to] = true;
            for (i, &token) in text.iter().enumerate() {
                (ids[at + i], positions[at + i]) = (i64::from(token), i as i64);
                (0..=i).for_each(|to| sees(i, to));
            }
            for (n, node) in self.nodes.iter().enumerate() {
                let i = text.len() + n;
                (ids[at + i], positions[at + i]) = (i64::from(node.token), (text.len() + node.depth) as i64);
                (0..text.len()).for_each(|to| sees(i, to));
                let mut path = Some(n);
                while let Some(on) = path {
                    sees(i, text.len() + on);
                    path = self.nodes[on].parent;
                }
            }
            (text.len() + self.nodes.len()..length).for_each(|i| sees(i, i));
        }
        let shape = [rows as i64, length as i64];
        let device = base.device();
        let tensor = |values: &[i64]| Tensor::from_slice(values).view(shape).to_device(device);
        let seen = Tensor::from_slice(&seen).view([shape[0], 1, shape[1], shape[1]]).to_device(device);
        Input { ids: tensor(&ids), positions: tensor(&positions), mask: Mask::Block(seen) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use crate::loss;
    use crate::pack::Sequence;

    #[test]
    fn the_tree_scores_what_each_answer_scores_alone() {
        let base = golden::base("llama");
        let adapter = golden::adapter("peft-r8");
        let active = base.activate(&[(&adapter, 1.0)]).unwrap();
        // Answers that share a beginning, one that another begins with, and one of a single token.
        let answers = [vec![5, 6, 7, 1], vec![5, 6, 9], vec![5, 6], vec![8, 7, 1], vec![3]];
        let texts: Vec<Vec<u32>> =
            [9_u32, 2, 17].iter().map(|n| (0..*n).map(|i| (i * 11 + n) % 128).collect()).collect();
        let labels = Labels::new(&answers).unwrap();
        assert_eq!((labels.nodes.len(), labels.depth()), (5, 4));
        let scores = labels.score(&base, &active, &texts).unwrap();
        for (text, scores) in texts.iter().zip(&scores) {
            for (answer, score) in answers.iter().zip(scores) {
                let tokens = [text.as_slice(), answer.as_slice()].concat();
                let learned = vec![(text.len() as u32, tokens.len() as u32)];
                let alone =
                    loss::score(&base, &[(&adapter, 1.0)], &[Sequence { tokens, learned }], 64).unwrap();
                assert!(
                    (alone[0].mean() + score).abs() < 1e-4,
                    "{answer:?}: {} and {score}",
                    alone[0].mean()
                );
            }
        }
    }

    #[test]
    fn what_has_no_tokens_or_does_not_fit_is_refused() {
        let base = golden::base("llama");
        let none = ActiveAdapters::none();
        assert!(Labels::new(&[vec![1], vec![]]).is_err());
        let labels = Labels::new(&[vec![1, 2]]).unwrap();
        assert!(labels.score(&base, &none, &[vec![]]).is_err());
        assert!(labels.score(&base, &none, &[vec![1; 255]]).is_err());
        assert!(labels.score(&base, &none, &[vec![1; 254]]).is_ok());
    }
}
