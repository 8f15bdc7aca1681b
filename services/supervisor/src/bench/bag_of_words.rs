//! What counting words reaches: TF-IDF of one and two words, and multinomial logistic regression.
//!
//! The same as scikit-learn's `TfidfVectorizer` and `LogisticRegression(C=10)`, but for two-word features and a bound
//! on how many there are.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

/// Weights at most, labels times features: more would only be words that are seen once or twice.
const WEIGHTS_MAX: usize = 10_000_000;
/// The sum of losses is weighed by this against half the squared weights.
const STRENGTH: f64 = 10.0;
/// Steps at most, and the share of the first gradient under which the last one has to fall.
const STEPS_MAX: usize = 100;
const GRADIENT_SHARE: f64 = 1e-4;
/// Steps that the curvature is known from.
const HISTORY: usize = 6;
/// Halvings of a step at most, and the share of the promised fall that is enough.
const HALVINGS_MAX: usize = 30;
const ENOUGH: f64 = 1e-4;

/// A text as its features and how much each counts.
type Row = Vec<(usize, f32)>;

/// A trained classifier.
pub struct BagOfWords<'a> {
    labels: Vec<&'a str>,
    /// The place of each feature, and how much its occurrence counts.
    features: HashMap<String, (usize, f32)>,
    /// By feature, then by label; the last row is of what every text has.
    weights: Vec<f32>,
}

impl<'a> BagOfWords<'a> {
    /// Learns from texts with their labels.
    pub fn train(examples: &[(&str, &'a str)]) -> Self {
        let labels: BTreeSet<&str> = examples.iter().map(|(_, label)| *label).collect();
        let labels: Vec<&str> = labels.into_iter().collect();
        let texts: Vec<&str> = examples.iter().map(|(text, _)| *text).collect();
        let features = vocabulary(&texts, WEIGHTS_MAX / labels.len().max(1));
        let mut model = Self { labels, features, weights: Vec::new() };
        let problem = Problem {
            rows: texts.iter().map(|text| model.row(text)).collect(),
            truths: examples
                .iter()
                .map(|(_, label)| model.labels.partition_point(|known| known < label))
                .collect(),
            labels: model.labels.len(),
            features: model.features.len(),
        };
        model.weights = problem.solve();
        model
    }

    /// The likeliest label of a text; none where nothing was learned.
    pub fn label(&self, text: &str) -> Option<&'a str> {
        let scores = scores(&self.weights, self.labels.len(), self.features.len(), &self.row(text));
        let best = scores.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1))?;
        self.labels.get(best.0).copied()
    }

    /// The known features of a text, together of length one.
    fn row(&self, text: &str) -> Row {
        let mut counts: BTreeMap<usize, f32> = BTreeMap::new();
        for (place, weight) in grams(text).iter().filter_map(|gram| self.features.get(gram)) {
            *counts.entry(*place).or_default() += weight;
        }
        let length = counts.values().map(|v| v * v).sum::<f32>().sqrt();
        counts.into_iter().map(|(place, value)| (place, value / length)).collect()
    }
}

/// Words of two letters or more and pairs of them, in lower case.
fn grams(text: &str) -> Vec<String> {
    let text = text.to_lowercase();
    let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
    let words: Vec<&str> = words.filter(|word| word.chars().nth(1).is_some()).collect();
    let pairs = words.windows(2).map(|pair| pair.join(" "));
    words.iter().map(ToString::to_string).chain(pairs).collect()
}

/// The features that most texts have, at most `limit`, with their inverse document frequencies.
fn vocabulary(texts: &[&str], limit: usize) -> HashMap<String, (usize, f32)> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for text in texts {
        for gram in grams(text).into_iter().collect::<BTreeSet<_>>() {
            *counts.entry(gram).or_default() += 1;
        }
    }
    let mut counts: Vec<(String, usize)> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    counts.truncate(limit);
    let rarity = |count: usize| ((1.0 + texts.len() as f32) / (1.0 + count as f32)).ln() + 1.0;
    let numbered = counts.into_iter().enumerate();
    numbered.map(|(place, (gram, count))| (gram, (place, rarity(count)))).collect()
}

/// What each label scores on a row.
fn scores(weights: &[f32], labels: usize, features: usize, row: &Row) -> Vec<f32> {
    let of = |feature: usize| weights.get(feature * labels..(feature + 1) * labels).unwrap_or_default();
    let mut scores = of(features).to_vec();
    for (feature, value) in row {
        scores.iter_mut().zip(of(*feature)).for_each(|(score, weight)| *score += value * weight);
    }
    scores
}

/// Weights to be found.
struct Problem {
    rows: Vec<Row>,
    truths: Vec<usize>,
    labels: usize,
    features: usize,
}

impl Problem {
    /// The regularised loss, and its gradient.
    fn loss(&self, weights: &[f32]) -> (f64, Vec<f32>) {
        // What every text has is not held back.
        let held = self.features * self.labels;
        let mut gradient = weights.to_vec();
        gradient[held..].fill(0.0);
        let mut loss = 0.5 * dot(&gradient, &gradient);
        for (row, &truth) in self.rows.iter().zip(&self.truths) {
            let mut scores = scores(weights, self.labels, self.features, row);
            let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let own = scores[truth] - top;
            scores.iter_mut().for_each(|score| *score = (*score - top).exp());
            let sum: f32 = scores.iter().sum();
            loss += STRENGTH * f64::from(sum.ln() - own);
            scores.iter_mut().for_each(|score| *score *= STRENGTH as f32 / sum);
            scores[truth] -= STRENGTH as f32;
            for (feature, value) in row.iter().copied().chain([(self.features, 1.0)]) {
                let part = &mut gradient[feature * self.labels..(feature + 1) * self.labels];
                part.iter_mut().zip(&scores).for_each(|(slope, error)| *slope += value * error);
            }
        }
        (loss, gradient)
    }

    /// The best weights, by L-BFGS with steps that are halved until the loss falls.
    fn solve(&self) -> Vec<f32> {
        let mut weights = vec![0.0; (self.features + 1) * self.labels];
        let (mut loss, mut gradient) = self.loss(&weights);
        let enough = GRADIENT_SHARE * dot(&gradient, &gradient).sqrt();
        let mut history = VecDeque::new();
        for _ in 0..STEPS_MAX {
            let size = dot(&gradient, &gradient).sqrt();
            if size <= enough {
                break;
            }
            let direction = direction(&gradient, &history);
            let slope = dot(&gradient, &direction);
            // Without a known curvature, a step of length one.
            let mut step = if history.is_empty() { 1.0 / size } else { 1.0 };
            let mut next = None;
            for _ in 0..HALVINGS_MAX {
                let tried: Vec<f32> =
                    weights.iter().zip(&direction).map(|(w, d)| w + step as f32 * d).collect();
                let (tried_loss, tried_gradient) = self.loss(&tried);
                if tried_loss <= loss + ENOUGH * step * slope {
                    next = Some((tried, tried_loss, tried_gradient));
                    break;
                }
                step /= 2.0;
            }
            let Some((next, next_loss, next_gradient)) = next else { break };
            let moved = difference(&next, &weights);
            let turned = difference(&next_gradient, &gradient);
            (weights, loss, gradient) = (next, next_loss, next_gradient);
            let curvature = dot(&moved, &turned);
            if curvature > 0.0 {
                history.push_back((moved, turned, curvature));
            }
            if history.len() > HISTORY {
                history.pop_front();
            }
        }
        weights
    }
}

/// Against the gradient, as the curvature of the last steps bends it (Nocedal and Wright, algorithm 7.4).
fn direction(gradient: &[f32], history: &VecDeque<(Vec<f32>, Vec<f32>, f64)>) -> Vec<f32> {
    let mut direction: Vec<f32> = gradient.iter().map(|slope| -slope).collect();
    let mut shares = Vec::with_capacity(history.len());
    for (moved, turned, curvature) in history.iter().rev() {
        let share = dot(moved, &direction) / curvature;
        add(&mut direction, turned, -share);
        shares.push(share);
    }
    if let Some((_, turned, curvature)) = history.back() {
        let scale = (curvature / dot(turned, turned)) as f32;
        direction.iter_mut().for_each(|d| *d *= scale);
    }
    for ((moved, turned, curvature), share) in history.iter().zip(shares.into_iter().rev()) {
        let back = dot(turned, &direction) / curvature;
        add(&mut direction, moved, share - back);
    }
    direction
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn difference(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

fn add(to: &mut [f32], what: &[f32], share: f64) {
    to.iter_mut().zip(what).for_each(|(to, what)| *to += share as f32 * what);
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLES: [(&str, &str); 6] = [
        ("move money to my savings", "transfer"),
        ("send money to a friend", "transfer"),
        ("what is my balance", "balance"),
        ("how much money have I got", "balance"),
        ("block my card", "block"),
        ("my card was stolen, block it", "block"),
    ];

    #[test]
    fn words_decide_and_the_unknown_gets_a_label_too() {
        let model = BagOfWords::train(&EXAMPLES);
        for (text, label) in EXAMPLES {
            assert_eq!(model.label(text), Some(label), "{text}");
        }
        assert_eq!(model.label("please block the card"), Some("block"));
        assert_eq!(model.label("send it to savings"), Some("transfer"));
        assert!(model.label("zebra").is_some());
        assert_eq!(BagOfWords::train(&[]).label("anything"), None);
    }

    #[test]
    fn a_label_that_is_seen_more_often_is_the_guess() {
        let model = BagOfWords::train(&[("aa", "rare"), ("bb", "often"), ("cc", "often"), ("dd", "often")]);
        assert_eq!(model.label("zz"), Some("often"));
    }

    #[test]
    fn features_are_words_and_pairs_of_length_one_in_all() {
        assert_eq!(grams("I paid, twice Now"), ["paid", "twice", "now", "paid twice", "twice now"]);
        assert_eq!(vocabulary(&["aa bb", "aa cc", "aa"], 1).into_keys().collect::<Vec<_>>(), ["aa"]);
        let model = BagOfWords::train(&EXAMPLES);
        let length: f32 = model.row("block my card card").iter().map(|(_, value)| value * value).sum();
        assert!((length - 1.0).abs() < 1e-5, "{length}");
    }

    #[test]
    fn the_gradient_is_that_of_the_loss_and_vanishes_at_the_end() {
        let texts: Vec<&str> = EXAMPLES.iter().map(|(text, _)| *text).collect();
        let model = BagOfWords::train(&EXAMPLES);
        let problem = Problem {
            rows: texts.iter().map(|text| model.row(text)).collect(),
            truths: vec![2, 2, 0, 0, 1, 1],
            labels: 3,
            features: model.features.len(),
        };
        let start = vec![0.1; model.weights.len()];
        let (_, gradient) = problem.loss(&start);
        for place in [0, 7, gradient.len() - 1] {
            let moved = |by: f32| {
                let mut weights = start.clone();
                weights[place] += by;
                problem.loss(&weights).0
            };
            let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            assert!((slope - f64::from(gradient[place])).abs() < 1e-3, "{slope} {}", gradient[place]);
        }
        let (_, end) = problem.loss(&model.weights);
        let (_, first) = problem.loss(&vec![0.0; end.len()]);
        assert!(dot(&end, &end) < GRADIENT_SHARE.powi(2) * dot(&first, &first), "{end:?}");
    }
}
