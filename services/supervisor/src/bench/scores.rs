//! What scores over time say of learning and forgetting.

use serde::Serialize;

/// What a score is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// A share of right answers: higher is better.
    Accuracy,
    /// Nats a token: lower is better.
    Nll,
}

/// The scores of one run: `rows[i][j]` on task j after task i was learned, where it was taken.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// What they are.
    pub measure: Measure,
    /// Of the base alone, by task.
    pub base: Vec<f64>,
    /// By task learned, then by task measured.
    pub rows: Vec<Vec<Option<f64>>>,
}

/// The figures that are made of a matrix. Those that compare need tasks that were learned one after another.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Summary {
    /// Mean over all tasks, after the last.
    pub final_average: Option<f64>,
    /// Mean over all tasks, each right after it was learned.
    pub just_learned_average: Option<f64>,
    /// Mean change of earlier tasks from when they were learned to the end, better being positive
    /// (Lopez-Paz and Ranzato 2017).
    pub backward_transfer: Option<f64>,
    /// Mean distance of earlier tasks from their best (Chaudhry et al. 2018).
    pub forgetting: Option<f64>,
    /// Mean of (before - after) / before over earlier tasks of which something was known; for a loss
    /// (after - before) / before.
    pub forgetting_rate: Option<f64>,
    /// Mean over earlier tasks with which something was gained over the base of what was lost, as a share of it.
    pub loss_of_gain: Option<f64>,
}

impl Matrix {
    /// Better as higher, whatever the measure.
    fn good(&self, score: f64) -> f64 {
        match self.measure {
            Measure::Accuracy => score,
            Measure::Nll => -score,
        }
    }

    /// The last score of each task.
    fn ends(&self) -> Vec<Option<f64>> {
        let last = |j: usize| self.rows.iter().rev().find_map(|row| row.get(j).copied().flatten());
        (0..self.base.len()).map(last).collect()
    }

    /// The score of each task right after it was learned, where tasks were learned one after another.
    fn starts(&self) -> Vec<Option<f64>> {
        let start = |j: usize| self.rows.get(j).and_then(|row| row.get(j).copied().flatten());
        let sequence = self.rows.len() == self.base.len();
        (0..self.base.len()).map(|j| start(j).filter(|_| sequence)).collect()
    }

    /// The figures.
    pub fn summary(&self) -> Summary {
        let (starts, ends) = (self.starts(), self.ends());
        // (start, end, best, base) of each task that others were learned and measured after.
        let earlier: Vec<[f64; 4]> = (0..self.base.len().saturating_sub(1))
            .filter_map(|j| {
                let measured_later = self.rows.get(j + 1..)?.iter().any(|row| row[j].is_some());
                let taken = self.rows.iter().filter_map(|row| row[j]);
                let best = taken.max_by(|a, b| self.good(*a).total_cmp(&self.good(*b)))?;
                measured_later.then_some([starts[j]?, ends[j]?, best, self.base[j]])
            })
            .collect();
        let over = |figure: &dyn Fn(&[f64; 4]) -> f64| mean(earlier.iter().map(figure).map(Some));
        let lost = |from: f64, to: f64| self.good(from) - self.good(to);
        let share = |figure: &dyn Fn(&[f64; 4]) -> (f64, f64)| {
            let all = earlier.iter().map(figure).filter(|(_, whole)| *whole > 0.0);
            mean(all.map(|(part, whole)| Some(part / whole)))
        };
        Summary {
            final_average: mean(ends.iter().copied()),
            just_learned_average: mean(starts.iter().copied()),
            backward_transfer: over(&|[start, end, ..]| -lost(*start, *end)),
            forgetting: over(&|[_, end, best, _]| lost(*best, *end)),
            forgetting_rate: share(&|[start, end, ..]| (lost(*start, *end), start.abs())),
            loss_of_gain: share(&|[start, end, _, base]| (lost(*start, *end), lost(*start, *base))),
        }
    }
}

/// The mean of all; none where one is missing.
fn mean(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let values: Vec<f64> = values.collect::<Option<_>>()?;
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// A figure over seeds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// Mean over seeds.
    pub mean: Option<f64>,
    /// Sample standard deviation; none of a single seed.
    pub deviation: Option<f64>,
}

impl Spread {
    /// Of one figure for each seed.
    pub fn of(values: impl IntoIterator<Item = Option<f64>>) -> Self {
        let Some(values) = values.into_iter().collect::<Option<Vec<f64>>>() else {
            return Self { mean: None, deviation: None };
        };
        let average = mean(values.iter().copied().map(Some));
        let deviation = average.filter(|_| values.len() > 1).map(|average| {
            let squares: f64 = values.iter().map(|v| (v - average).powi(2)).sum();
            (squares / (values.len() - 1) as f64).sqrt()
        });
        Self { mean: average, deviation }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is(value: Option<f64>, expected: f64) {
        assert!((value.expect("a figure") - expected).abs() < 1e-12, "{value:?} for {expected}");
    }

    #[test]
    fn accuracies_that_fall_are_forgetting() {
        let rows = vec![
            vec![Some(0.8), None, None],
            vec![Some(0.9), Some(0.6), None],
            vec![Some(0.6), Some(0.6), Some(1.0)],
        ];
        let matrix = Matrix { measure: Measure::Accuracy, base: vec![0.1, 0.1, 0.1], rows };
        let s = matrix.summary();
        is(s.final_average, (0.6 + 0.6 + 1.0) / 3.0);
        is(s.just_learned_average, (0.8 + 0.6 + 1.0) / 3.0);
        is(s.backward_transfer, -0.1);
        is(s.forgetting, 0.15);
        is(s.forgetting_rate, 0.125);
        is(s.loss_of_gain, (0.2 / 0.7) / 2.0);
    }

    #[test]
    fn losses_that_rise_are_forgetting() {
        let rows = vec![vec![Some(2.0), None], vec![Some(2.5), Some(3.0)]];
        let s = Matrix { measure: Measure::Nll, base: vec![4.0, 4.0], rows }.summary();
        is(s.backward_transfer, -0.5);
        is(s.forgetting, 0.5);
        is(s.forgetting_rate, 0.25);
        is(s.loss_of_gain, 0.25);
    }

    #[test]
    fn what_was_not_learned_is_not_forgotten() {
        let rows = vec![
            vec![Some(0.0), None, None],
            vec![Some(0.0), Some(0.5), None],
            vec![Some(0.2), Some(0.4), Some(0.0)],
        ];
        let s =
            Matrix { measure: Measure::Accuracy, base: vec![0.1, 0.1, 0.1], rows: rows.clone() }.summary();
        is(s.forgetting_rate, 0.2);
        is(s.loss_of_gain, 0.25);
        let nothing = rows.into_iter().map(|row| row.into_iter().map(|r| r.map(|_| 0.0)).collect()).collect();
        let s = Matrix { measure: Measure::Accuracy, base: vec![0.1, 0.1, 0.1], rows: nothing }.summary();
        assert_eq!((s.forgetting_rate, s.loss_of_gain), (None, None));
    }

    #[test]
    fn bounds_have_an_average_and_nothing_to_forget() {
        let joint =
            Matrix { measure: Measure::Accuracy, base: vec![0.0; 2], rows: vec![vec![Some(0.5), Some(0.7)]] };
        is(joint.summary().final_average, 0.6);
        assert_eq!(joint.summary().forgetting, None);
        assert_eq!(joint.summary().just_learned_average, None);
        let rows = vec![vec![Some(0.5), None], vec![None, Some(0.7)]];
        let single = Matrix { measure: Measure::Accuracy, base: vec![0.0; 2], rows };
        is(single.summary().final_average, 0.6);
        assert_eq!(single.summary().forgetting, None);
    }

    #[test]
    fn spread_is_the_sample_deviation() {
        let spread = Spread::of([Some(1.0), Some(3.0)]);
        is(spread.mean, 2.0);
        is(spread.deviation, 2_f64.sqrt());
        assert_eq!(Spread::of([Some(1.0)]).deviation, None);
        assert_eq!(Spread::of([Some(1.0), None]).mean, None);
    }
}
