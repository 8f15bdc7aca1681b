//! What is expected of an answer before the model says it.

use std::collections::BTreeMap;

use crate::passages::Found;

/// Known answers, each with its probability; what is left to 1 is the model's own.
///
/// The answer is drawn from `rest * p_model + sum of known`: as a mixture of whole answers, and not of tokens. So its next
/// token has `(rest * p_model(token | so far) + sum of known that go on with it)`, divided by what is left of both, where
/// `rest` shrinks by what the model gives to each token that was said.
#[derive(Clone, Debug, PartialEq)]
pub struct Prior {
    /// What is left for what the model says.
    rest: f64,
    /// Answers that begin as what was said.
    known: Vec<Path>,
    /// Tokens that were said.
    said: usize,
    /// The model's own log-probability of each token that a known answer goes on with.
    next: BTreeMap<u32, f64>,
    /// Documents whose known answers were said to their end.
    told: BTreeMap<u64, f64>,
}

/// A document that what was said is from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Source {
    /// Which.
    pub document: u64,
    /// How likely it is from there, and not the model's own or another document's, 0 to 1.
    pub likely: f64,
}

/// What is less likely is no source.
const SOURCE_MIN: f64 = 0.05;

/// An answer as tokens.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Path {
    pub tokens: Vec<u32>,
    pub likely: f64,
    /// The document that says so, where it is one.
    pub document: Option<u64>,
}

impl Default for Prior {
    /// Nothing known: all is the model's.
    fn default() -> Self {
        Self::new(Vec::new())
    }
}

impl Prior {
    pub(super) fn new(mut known: Vec<Path>) -> Self {
        known.retain(|path| path.likely > 0.0 && !path.tokens.is_empty());
        let rest = (1.0 - known.iter().map(|path| path.likely).sum::<f64>()).max(0.0);
        Self { rest, known, said: 0, next: BTreeMap::new(), told: BTreeMap::new() }
    }

    /// With what was `found`, which shares what was left for the model with it.
    #[must_use]
    pub fn beside(mut self, found: impl IntoIterator<Item = Found>) -> Self {
        let of_rest =
            |Found { tokens, likely, document }| Path { tokens, likely: self.rest * likely, document };
        self.known.extend(found.into_iter().map(of_rest));
        Self::new(self.known)
    }

    /// What is left for what the model says.
    pub fn rest(&self) -> f64 {
        self.rest
    }

    /// The probability of an answer that is known, or with which one begins, before anything was said.
    pub fn of(&self, answer: &[u32]) -> f64 {
        self.known.iter().filter(|path| path.tokens.starts_with(answer)).map(|path| path.likely).sum()
    }

    /// Whether an answer is the likeliest, where the model gives it `log_likelihood` and by itself would say it or not.
    pub fn says(&self, answer: &[u32], log_likelihood: f64, by_model: bool) -> bool {
        let of = self.of(answer);
        let others =
            self.known.iter().filter(|path| !path.tokens.starts_with(answer)).map(|path| path.likely);
        of + self.rest * log_likelihood.exp() >= others.fold(0.0, f64::max) && (by_model || of >= self.rest)
    }

    /// Whether an answer is the likeliest, whatever the model makes of it.
    pub fn knows(&self, answer: &[u32]) -> bool {
        self.says(answer, f64::NEG_INFINITY, false)
    }

    /// Whether a known answer is said, or is not, whatever the model makes of it: to learn it by heart would be in vain. One that is
    /// not known is the model's to say, now or when there is more to go by.
    pub fn decides(&self, answer: &[u32]) -> bool {
        self.knows(answer) || (self.of(answer) > 0.0 && !self.says(answer, 0.0, true))
    }

    /// Whether it still has a say.
    pub(crate) fn speaks(&self) -> bool {
        !self.known.is_empty()
    }

    /// Turns the model's logits of the next token into log-probabilities of the mixture.
    pub(crate) fn mix(&mut self, logits: &mut [f32]) {
        let Some(best) = logits.iter().copied().reduce(f32::max).filter(|best| best.is_finite()) else {
            return;
        };
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit - best).exp()).sum();
        let log_sum = f64::from(best) + sum.ln();
        let mut masses: BTreeMap<u32, f64> = BTreeMap::new();
        for Path { tokens, likely, .. } in &self.known {
            *masses.entry(tokens[self.said]).or_default() += likely;
        }
        let of_model = |logit: f32| f64::from(logit) - log_sum;
        let likely = |id: &u32| logits.get(*id as usize).map(|&logit| (*id, of_model(logit)));
        self.next = masses.keys().filter_map(likely).collect();
        let whole = self.rest + masses.values().sum::<f64>();
        // Where nothing is left for the model, its tokens are as unlikely as can be said in f32.
        let share = (self.rest / whole).max(f64::MIN_POSITIVE).ln();
        logits.iter_mut().for_each(|logit| *logit = (of_model(*logit) + share) as f32);
        for (id, mass) in masses {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = ((f64::from(*logit)).exp() + mass / whole).ln() as f32;
            }
        }
    }

    /// Goes on to what follows `token`, whose logit was mixed.
    pub(crate) fn accept(&mut self, token: u32) {
        let said = self.said;
        self.known.retain(|path| path.tokens[said] == token);
        self.rest *= self.next.get(&token).map_or(0.0, |log| log.exp());
        self.said += 1;
        self.share();
        let ends = |path: &mut Path| path.tokens.len() == said + 1;
        for Path { likely, document, .. } in self.known.extract_if(.., ends) {
            document.into_iter().for_each(|document| *self.told.entry(document).or_default() += likely);
        }
        self.share();
    }

    /// As shares again: a long answer's probability gets too small for any float.
    fn share(&mut self) {
        let whole = self.rest + self.known.iter().map(|path| path.likely).sum::<f64>();
        if whole > 0.0 {
            self.rest /= whole;
            self.known.iter_mut().for_each(|path| path.likely /= whole);
        }
    }

    /// Which documents what was said is from, as far as it was said because of them; the likeliest first.
    pub fn sources(&self) -> Vec<Source> {
        let mut told = self.told.clone();
        for path in self.known.iter().filter(|_| self.said > 0) {
            path.document.into_iter().for_each(|document| *told.entry(document).or_default() += path.likely);
        }
        told.retain(|_, likely| *likely >= SOURCE_MIN);
        let source = |(document, likely): (u64, f64)| Source { document, likely: likely.min(1.0) };
        let mut sources: Vec<Source> = told.into_iter().map(source).collect();
        sources.sort_by(|a, b| b.likely.total_cmp(&a.likely));
        sources
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prior(known: &[(&[u32], f64)]) -> Prior {
        let path =
            |&(tokens, likely): &(&[u32], f64)| Path { tokens: tokens.to_vec(), likely, document: None };
        Prior::new(known.iter().map(path).collect())
    }

    /// A model whose next token depends on what was said.
    fn model(said: &[u32]) -> Vec<f32> {
        let sum: u32 = said.iter().map(|token| token * 3 + 1).sum();
        (0..6).map(|id| ((sum * 7 + id * 5) % 11) as f32 * 0.4).collect()
    }

    fn log_softmax(logits: &[f32]) -> Vec<f64> {
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        logits.iter().map(|&logit| f64::from(logit) - sum.ln()).collect()
    }

    /// The probability of an answer, token by token.
    fn said(mut prior: Prior, answer: &[u32]) -> f64 {
        let mut log = 0.0;
        for (n, &token) in answer.iter().enumerate() {
            let mut logits = model(&answer[..n]);
            if prior.speaks() {
                prior.mix(&mut logits);
                prior.accept(token);
            }
            log += log_softmax(&logits)[token as usize];
        }
        log.exp()
    }

    fn by_model(answer: &[u32]) -> f64 {
        let step = |n: usize| log_softmax(&model(&answer[..n]))[answer[n] as usize];
        (0..answer.len()).map(step).sum::<f64>().exp()
    }

    #[test]
    fn token_by_token_is_the_mixture_of_whole_answers() {
        let known: [(&[u32], f64); 3] = [(&[1, 2, 0], 0.5), (&[1, 3, 0], 0.2), (&[4, 0], 0.1)];
        let prior = prior(&known);
        assert!((prior.rest() - 0.2).abs() < 1e-12);
        for (answer, likely) in known {
            let expected = likely + 0.2 * by_model(answer);
            assert!((said(prior.clone(), answer) / expected - 1.0).abs() < 1e-5, "{answer:?}");
            assert_eq!(prior.of(answer), likely);
        }
        for answer in [&[5, 0][..], &[1, 5, 0], &[1, 2, 3, 0]] {
            let expected = 0.2 * by_model(answer);
            assert!((said(prior.clone(), answer) / expected - 1.0).abs() < 1e-5, "{answer:?}");
            assert_eq!(prior.of(answer), 0.0);
        }
    }

    #[test]
    fn an_answer_is_said_where_neither_another_one_nor_the_model_is_likelier() {
        let prior = prior(&[(&[1, 0], 0.6), (&[4, 0], 0.1)]);
        assert!(prior.says(&[1, 0], -20.0, false));
        assert!(!prior.says(&[4, 0], 0.0, true), "0.1 and 0.3 are less than 0.6");
        assert!(!prior.says(&[5, 0], 0.0, true));
        assert!(prior.knows(&[1, 0]) && !prior.knows(&[4, 0]) && !prior.knows(&[5, 0]));
        assert!(prior.decides(&[1, 0]) && prior.decides(&[4, 0]) && !prior.decides(&[5, 0]));
        let unsure = Prior::new(vec![Path { tokens: vec![1, 0], likely: 0.2, document: None }]);
        assert!(unsure.says(&[5, 0], -0.5, true) && unsure.says(&[1, 0], -0.5, true));
        assert!(!unsure.says(&[1, 0], -20.0, false), "the model's own answer is likelier");
        let nothing = Prior::default();
        assert!(!unsure.knows(&[1, 0]) && !nothing.knows(&[7]));
        assert!(!unsure.decides(&[1, 0]) && !nothing.decides(&[7]), "what the model learns has a say");
        assert!(
            nothing.says(&[7], -9.0, true) && !nothing.says(&[7], -9.0, false),
            "the model alone decides"
        );
    }

    #[test]
    fn what_was_said_is_from_the_documents_that_said_it() {
        let path = |tokens: &[u32], likely, document| Path { tokens: tokens.to_vec(), likely, document };
        let known = || {
            let of_two = path(&[1, 2, 0], 0.4, Some(7));
            Prior::new(vec![
                of_two,
                path(&[1, 2], 0.2, Some(8)),
                path(&[1, 3, 0], 0.2, Some(9)),
                path(&[4, 0], 0.1, None),
            ])
        };
        let said = |answer: &[u32]| {
            let mut prior = known();
            for (n, &token) in answer.iter().enumerate() {
                prior.mix(&mut model(&answer[..n]));
                prior.accept(token);
            }
            prior.sources()
        };
        let of = |sources: Vec<Source>| sources.iter().map(|source| source.document).collect::<Vec<u64>>();
        assert_eq!(of(said(&[])), [0; 0], "before the first token nothing is from anywhere");
        assert_eq!(of(said(&[1])), [7, 8, 9], "as far as it was said");
        assert_eq!(of(said(&[1, 2, 0])), [7, 8], "one goes on, the other one was said to its end");
        assert_eq!(of(said(&[1, 3, 0])), [9]);
        assert_eq!(of(said(&[4, 0])), [0; 0], "of many documents");
        assert_eq!(of(said(&[5, 5])), [0; 0], "the model's own");
        // By Bayes: 0.2 of the known answers, and of the model's own tenth what it gives to these tokens.
        let alone = 0.2 / (0.2 + 0.1 * by_model(&[1, 3, 0]));
        assert!((said(&[1, 3, 0])[0].likely - alone).abs() < 1e-6);
        assert_eq!(of(said(&[1, 2, 5])), [8], "beyond its end");
    }

    #[test]
    fn mixed_logits_are_log_probabilities() {
        let mut prior = prior(&[(&[1, 0], 0.9)]);
        let mut logits = model(&[]);
        prior.mix(&mut logits);
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        assert!(f64::from(logits[1]).exp() > 0.9);
        prior.accept(3);
        assert!(!prior.speaks(), "what was said is no known answer");
    }

    #[test]
    fn nothing_known_changes_nothing_and_certainty_stays_finite() {
        assert!(!Prior::default().speaks() && !prior(&[(&[], 0.5), (&[1], 0.0)]).speaks());
        let mut prior = prior(&[(&[1, 0], 1.0), (&[9, 0], 0.0)]);
        let mut logits = model(&[]);
        prior.mix(&mut logits);
        assert!(logits.iter().all(|logit| logit.is_finite()) && logits[1].abs() < 1e-5);
        let mut broken = vec![f32::NAN; 6];
        prior.mix(&mut broken);
        assert!(broken.iter().all(|logit| logit.is_nan()), "the choice refuses them, as before");
    }
}
