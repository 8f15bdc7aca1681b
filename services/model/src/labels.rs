//! Which of many answers is the likeliest to follow a text.
//!
//! Answers that begin alike share what they have in common: they are a tree whose nodes see the text and the path that
//! leads to them. The text is read once, and no node twice: keys and values of both are kept while answers are compared. Of
//! the tree only those branches are read that may still hold the likeliest answer: a log-likelihood only falls with
//! further tokens, so that of the first tokens, up to the first that tells answers apart, bounds the whole from above,
//! and over the length of the answer its mean.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Context, Result, anyhow, ensure};
use tch::{Kind, Tensor};

use crate::active::ActiveAdapters;
use crate::llama::{Base, Input, KvCache, Mask};
use crate::loss::chunk_rows;
use crate::ridge::Prior;

/// Texts are read side by side for as long as they and their trees have so many tokens.
const READ_TOKENS: usize = 8192;
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
    /// The tokens that may follow each node, and the text.
    following: BTreeMap<Option<usize>, BTreeSet<u32>>,
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
        let mut labels = Self {
            nodes: Vec::new(),
            following: BTreeMap::new(),
            answers: Vec::with_capacity(answers.len()),
        };
        let mut known: HashMap<Step, usize> = HashMap::new();
        for answer in answers {
            ensure!(!answer.is_empty(), "an answer to choose from has no tokens");
            let mut at = None;
            let mut path = Vec::with_capacity(answer.len());
            for (depth, &token) in answer.iter().enumerate() {
                path.push((at, token));
                labels.following.entry(at).or_default().insert(token);
                // The last token is predicted, and nothing is predicted from it.
                if depth + 1 < answer.len() {
                    at = Some(*known.entry((at, token)).or_insert_with(|| {
                        labels.nodes.push(Node { token, parent: at, depth });
                        labels.nodes.len() - 1
                    }));
                }
            }
            labels.answers.push(path);
        }
        Ok(labels)
    }

    /// The node that a step leads to; none where answers end with it.
    fn node(&self, step: Step) -> Option<usize> {
        self.nodes.iter().position(|node| (node.parent, node.token) == step)
    }

    /// Tokens of the longest answer.
    pub fn depth(&self) -> usize {
        self.answers.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// For each text and each group of answers the likeliest by `rule`, and its score in nats. Answers are numbered in
    /// the order of [`Labels::new`]; of equals the last one wins. `priors` say for each text what is expected of its answer
    /// beside what the model says; none where there are no such expectations.
    ///
    /// # Errors
    /// When a text is empty, or does not fit the model's context together with the longest answer, or a group is empty.
    pub fn likeliest(
        &self,
        base: &Base,
        adapters: &ActiveAdapters,
        texts: &[Vec<u32>],
        priors: &[Prior],
        groups: &[Vec<usize>],
        rule: Rule,
    ) -> Result<Vec<Vec<(usize, f64)>>> {
        let _guard = tch::no_grad_guard();
        self.check(base, texts)?;
        ensure!(
            priors.is_empty() || priors.len() == texts.len(),
            "there is not one expectation for each text"
        );
        ensure!(groups.iter().all(|group| !group.is_empty()), "there is no answer to choose from");
        // Texts of like length are read side by side, so that little of it is padding.
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|&i| texts[i].len());
        let mut likeliest = vec![Vec::new(); texts.len()];
        let mut rest = order.as_slice();
        while !rest.is_empty() {
            let (members, after) = rest.split_at(self.side_by_side(texts, rest));
            let members_texts = members.iter().map(|&i| texts[i].as_slice()).collect();
            let mut reading = Reading::new(self, base, adapters, members_texts);
            reading.expected = members.iter().filter_map(|&i| Some(self.expected(priors.get(i)?))).collect();
            for (&i, chosen) in members.iter().zip(self.choose(&mut reading, groups, rule)?) {
                likeliest[i] = chosen;
            }
            rest = after;
        }
        Ok(likeliest)
    }

    /// What a prior leaves to the model, and the probability that it gives to each answer.
    fn expected(&self, prior: &Prior) -> (f64, Vec<f64>) {
        let tokens = |path: &Vec<Step>| path.iter().map(|step| step.1).collect::<Vec<u32>>();
        (prior.rest(), self.answers.iter().map(|path| prior.of(&tokens(path))).collect())
    }

    /// How many of these texts are read at once, the shortest of which come first: one at least.
    fn side_by_side(&self, texts: &[Vec<u32>], order: &[usize]) -> usize {
        let fits = |count: &usize| count * (texts[order[count - 1]].len() + self.nodes.len()) <= READ_TOKENS;
        (1..=order.len()).take_while(fits).last().unwrap_or(1)
    }

    /// The likeliest of each group for each text of a reading.
    fn choose(
        &self,
        reading: &mut Reading<'_>,
        groups: &[Vec<usize>],
        rule: Rule,
    ) -> Result<Vec<Vec<(usize, f64)>>> {
        let wanted: BTreeSet<usize> = groups.iter().flatten().copied().collect();
        let opening = self.opening(&wanted);
        let path = |n: usize| self.answers[n].as_slice();
        reading.texts(opening)?;
        let mut choices: Vec<Choice> = Vec::new();
        for (text, likely) in reading.likely.iter().enumerate() {
            let mut bounds = vec![None; self.answers.len()];
            for &n in &wanted {
                let opening = &path(n)[..path(n).len().min(opening.len() + 1)];
                let bound = reading.mixed(text, n, sum(likely, opening)?);
                bounds[n] = Some(rule.score(bound, path(n).len()));
            }
            choices.push(Choice { bounds, known: HashMap::new() });
        }
        for round in 0..2 {
            let tried: Vec<Vec<usize>> =
                choices.iter().map(|choice| choice.next(groups, round == 0)).collect();
            let nodes =
                |tried: &Vec<usize>| tried.iter().flat_map(|&n| path(n)).filter_map(|s| s.0).collect();
            reading.nodes(&tried.iter().map(nodes).collect::<Vec<_>>())?;
            for (text, (choice, tried)) in choices.iter_mut().zip(&tried).enumerate() {
                for &n in tried {
                    let log_likelihood = reading.mixed(text, n, sum(&reading.likely[text], path(n))?);
                    choice.known.insert(n, rule.score(log_likelihood, path(n).len()));
                }
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

    /// What all of these answers begin with, such as a line break.
    fn opening(&self, wanted: &BTreeSet<usize>) -> &[Step] {
        let answer = |n: &usize| self.answers[*n].as_slice();
        let first = wanted.first().map(answer).unwrap_or_default();
        let common = |n| first.iter().zip(answer(n)).take_while(|(a, b)| a == b).count();
        &first[..wanted.iter().map(common).min().unwrap_or(0)]
    }
}

/// The log-likelihood of a path, in nats.
fn sum(likely: &HashMap<Step, f64>, path: &[Step]) -> Result<f64> {
    path.iter().map(|step| likely.get(step).context("a step was not come to")).sum()
}

/// A few texts that are read side by side, each with what is read of its tree.
struct Reading<'a> {
    labels: &'a Labels,
    base: &'a Base,
    adapters: &'a ActiveAdapters,
    texts: Vec<&'a [u32]>,
    cache: KvCache,
    /// Where in the cache each text's nodes are.
    places: Vec<HashMap<usize, usize>>,
    /// For each text the log-likelihood of every step that follows what is read, in nats.
    likely: Vec<HashMap<Step, f64>>,
    /// For each text what is expected beside the model; nothing where nothing is.
    expected: Vec<(f64, Vec<f64>)>,
}

impl<'a> Reading<'a> {
    fn new(labels: &'a Labels, base: &'a Base, adapters: &'a ActiveAdapters, texts: Vec<&'a [u32]>) -> Self {
        let cache = KvCache::new(base, texts.len() as i64);
        let (places, likely) = (vec![HashMap::new(); texts.len()], vec![HashMap::new(); texts.len()]);
        Self { labels, base, adapters, texts, cache, places, likely, expected: Vec::new() }
    }

    /// The log-likelihood of answer `n` to a text, of which the model alone gives `log_likelihood`.
    fn mixed(&self, text: usize, n: usize, log_likelihood: f64) -> f64 {
        match self.expected.get(text) {
            Some((rest, of)) => (rest * log_likelihood.exp() + of[n]).ln(),
            None => log_likelihood,
        }
    }

    /// Reads the texts, and what all answers begin with.
    fn texts(&mut self, opening: &[Step]) -> Result<()> {
        // The node that a step leads to is the one that the next step comes from. The last may lead to none.
        let nodes: Vec<usize> = opening.iter().skip(1).filter_map(|step| step.0).collect();
        let last = opening.last().and_then(|step| self.labels.node(*step));
        let nodes: Vec<usize> = nodes.into_iter().chain(last).collect();
        let rows: Vec<Vec<i64>> = self
            .texts
            .iter()
            .map(|text| {
                let nodes = nodes.iter().map(|&node| &self.labels.nodes[node].token);
                text.iter().chain(nodes).map(|&token| i64::from(token)).collect()
            })
            .collect();
        let length = rows.iter().map(Vec::len).max().unwrap_or(0);
        let mut ids: Vec<i64> = Vec::with_capacity(rows.len() * length);
        for row in rows {
            // What pads a row comes after it, where nothing looks.
            ids.extend(row.iter().chain(std::iter::repeat(&0)).take(length));
        }
        let ids = Tensor::from_slice(&ids).view([-1, length as i64]).to_device(self.base.device());
        let hidden = self.base.forward(&Input::rows(ids, 0), self.adapters, Some(&mut self.cache))?;
        let mut read = Vec::new();
        for (n, text) in self.texts.iter().enumerate() {
            let at = n * length + text.len();
            read.push((n, None, at - 1));
            for (i, &node) in nodes.iter().enumerate() {
                self.places[n].insert(node, text.len() + i);
                read.push((n, Some(node), at + i));
            }
        }
        self.follow(&hidden, &read)
    }

    /// Reads for each text those of its nodes that it has not read.
    fn nodes(&mut self, wanted: &[BTreeSet<usize>]) -> Result<()> {
        let unread = |(n, nodes): (usize, &BTreeSet<usize>)| -> Vec<usize> {
            nodes.iter().copied().filter(|node| !self.places[n].contains_key(node)).collect()
        };
        let rows: Vec<Vec<usize>> = wanted.iter().enumerate().map(unread).collect();
        let length = rows.iter().map(Vec::len).max().unwrap_or(0);
        if length == 0 {
            return Ok(());
        }
        let (held, mut read) = (self.cache.len() as usize, Vec::new());
        for (n, row) in rows.iter().enumerate() {
            self.places[n].extend(row.iter().enumerate().map(|(i, &node)| (node, held + i)));
            read.extend(row.iter().enumerate().map(|(i, &node)| (n, Some(node), n * length + i)));
        }
        let input = self.input(&rows, length);
        let hidden = self.base.forward(&input, self.adapters, Some(&mut self.cache))?;
        self.follow(&hidden, &read)
    }

    /// Nodes, each of which sees its text, the path that leads to it and itself; and padding that sees itself.
    fn input(&self, rows: &[Vec<usize>], length: usize) -> Input {
        let (held, nodes) = (self.cache.len() as usize, &self.labels.nodes);
        let (mut ids, mut positions) = (vec![0_i64; rows.len() * length], vec![0_i64; rows.len() * length]);
        let mut seen = vec![false; rows.len() * length * (held + length)];
        for (n, row) in rows.iter().enumerate() {
            let text = self.texts[n].len();
            for i in 0..length {
                let (at, seen) = (n * length + i, &mut seen[(n * length + i) * (held + length)..]);
                seen[held + i] = true;
                let Some(&node) = row.get(i) else { continue };
                (ids[at], positions[at]) = (i64::from(nodes[node].token), (text + nodes[node].depth) as i64);
                seen[..text].fill(true);
                let parents = std::iter::successors(nodes[node].parent, |&parent| nodes[parent].parent);
                parents
                    .filter_map(|parent| self.places[n].get(&parent))
                    .for_each(|&place| seen[place] = true);
            }
        }
        let (rows, length, device) = (rows.len() as i64, length as i64, self.base.device());
        let tensor = |values: &[i64]| Tensor::from_slice(values).view([rows, length]).to_device(device);
        let seen = Tensor::from_slice(&seen).view([rows, 1, length, -1]).to_device(device);
        Input { ids: tensor(&ids), positions: tensor(&positions), mask: Mask::Block(seen), entry: None }
    }

    /// Notes how likely each step is from what was `read`: a text, its node, and the row of `hidden` that is its. The full
    /// distribution is there for a few rows at a time.
    fn follow(&mut self, hidden: &Tensor, read: &[(usize, Option<usize>, usize)]) -> Result<()> {
        let (device, vocabulary) = (self.base.device(), self.base.config().vocab_size);
        for chunk in read.chunks(chunk_rows(vocabulary, device) as usize) {
            let (mut steps, mut flat) = (Vec::new(), Vec::new());
            for (row, &(n, from, _)) in chunk.iter().enumerate() {
                for &token in self.labels.following.get(&from).into_iter().flatten() {
                    steps.push((n, (from, token)));
                    flat.push(row as i64 * vocabulary + i64::from(token));
                }
            }
            let rows: Vec<i64> = chunk.iter().map(|&(_, _, row)| row as i64).collect();
            let rows = hidden.f_index_select(0, &Tensor::from_slice(&rows).to_device(device))?;
            let log_probs = self.base.logits(&rows)?.f_log_softmax(-1, Kind::Float)?.f_view([-1])?;
            let taken = log_probs.f_index_select(0, &Tensor::from_slice(&flat).to_device(device))?;
            let mut values = vec![0_f32; flat.len()];
            taken.f_to_device(tch::Device::Cpu)?.f_copy_data(&mut values, flat.len())?;
            for ((n, step), value) in steps.into_iter().zip(values) {
                self.likely[n].insert(step, f64::from(value));
            }
        }
        Ok(())
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
mod tests;
