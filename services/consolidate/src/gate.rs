//! The gate's arithmetic.

use proto::{Measure, Recited};

/// One-sided 95 % quantile of the normal distribution.
pub const Z95: f32 = 1.645;
/// Of few texts that are others each time the bound refuses clean batches, three of 22 by trial. So their mean alone is
/// asked.
pub const NO_BOUND: f32 = 0.0;
/// What a domain counts as having gained at least, as a share of its loss: with nothing gained, nothing could be
/// allowed, and chance alone would refuse every candidate.
const GAIN_MIN: f32 = 0.25;

/// Compares losses of the same examples, in nats a token: with their best published score, with the
/// parent, and with the candidate. The bound is that of the mean of paired differences,
/// `mean + z s / sqrt(n)`; `rise_allowed` is what it may be.
pub fn measure(best: &[f32], before: &[f32], after: &[f32], rise_allowed: f32, z: f32) -> Measure {
    let n = best.len() as f32;
    let rises: Vec<f32> = after.iter().zip(best).map(|(a, b)| a - b).collect();
    let rise = mean(&rises);
    let variance = rises.iter().map(|r| (r - rise).powi(2)).sum::<f32>() / (n - 1.0).max(1.0);
    Measure {
        examples: best.len() as u32,
        best: mean(best),
        before: mean(before),
        after: mean(after),
        rise_upper: rise + z * (variance / n.max(1.0)).sqrt(),
        rise_allowed,
        recited: None,
    }
}

/// The rise that is a share `tolerance` of what was gained: of the mean loss of the base, less the best.
///
/// A share of the loss itself would mean something else for each domain: what is known by heart has a loss near zero,
/// of which any change is a multiple, and of what is hard to predict a hundredth is much of all that was learned.
pub fn share_of_gain(base: &[f32], best: &[f32], tolerance: f32) -> f32 {
    tolerance * (mean(base) - mean(best)).max(GAIN_MIN * mean(best))
}

/// Counts answers that are said to the letter, for each of the same three. Of those that were known a share of
/// `tolerance` may be missing, and one may be in any case.
///
/// The loss does not see them: where an answer has to be exact, the few nats that make it another one are less than a
/// small share of what it had gained. A count is compared as it is, since the bound of a mean would let none of
/// so few be missing.
pub fn recited(best: &[bool], before: &[bool], after: &[bool], tolerance: f32) -> Recited {
    let count = |said: &[bool]| said.iter().filter(|said| **said).count() as u32;
    let best = count(best);
    let fewer_allowed = ((best as f32 * tolerance) as u32).max(1);
    Recited { best, before: count(before), after: count(after), fewer_allowed }
}

/// The mean, and 0 of nothing.
pub fn mean(values: &[f32]) -> f32 {
    values.iter().sum::<f32>() / values.len().max(1) as f32
}

/// Whether a measure lets a candidate through. A loss that is not a number does not. Of fewer than
/// `examples_min` examples the bound says nothing, and none is asked for.
pub fn passes(measure: &Measure, examples_min: u32) -> bool {
    let said = measure.recited.is_none_or(says_as_many);
    measure.examples == 0
        || measure.examples < examples_min
        || (measure.rise_upper <= measure.rise_allowed && said)
}

/// Whether no more answers are missing than may be.
pub fn says_as_many(recited: Recited) -> bool {
    recited.after.saturating_add(recited.fewer_allowed) >= recited.best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rise_beyond_what_is_allowed_is_refused_and_a_fall_is_not() {
        let best = vec![2.0; 64];
        let risen = |by: f32| best.iter().map(|b| b + by).collect::<Vec<_>>();
        assert!(passes(&measure(&best, &best, &risen(0.019), 0.02, Z95), 0));
        assert!(!passes(&measure(&best, &best, &risen(0.021), 0.02, Z95), 0));
        assert!(passes(&measure(&best, &best, &risen(-0.5), 0.02, Z95), 0));
    }

    #[test]
    fn an_uncertain_rise_is_refused_too() {
        let best = vec![2.0; 16];
        let after: Vec<f32> = (0..16).map(|n| if n % 2 == 0 { 2.3 } else { 1.7 }).collect();
        let measured = measure(&best, &best, &after, 0.02, Z95);
        assert!((measured.after - 2.0).abs() < 1e-5, "no rise in the mean");
        assert!(!passes(&measured, 0), "but it may well be one: {measured:?}");
        assert!(passes(&measure(&best, &best, &after, 0.02, NO_BOUND), 0), "where the mean alone is asked");
    }

    #[test]
    fn what_is_allowed_is_a_share_of_what_was_gained() {
        let close = |value: f32, expected: f32| assert!((value - expected).abs() < 1e-6, "{value}");
        close(share_of_gain(&[6.0; 20], &[0.0; 20], 0.02), 0.12);
        close(share_of_gain(&[4.0, 5.0], &[2.0, 3.0], 0.02), 0.04);
        close(share_of_gain(&[4.0], &[4.0], 0.02), 0.02);
        close(share_of_gain(&[], &[], 0.02), 0.0);
    }

    #[test]
    fn a_loss_that_is_not_a_number_is_refused() {
        assert!(!passes(&measure(&[1.0; 2], &[1.0; 2], &[1.0, f32::NAN], 0.01, Z95), 0));
        assert!(!passes(&measure(&[1.0; 2], &[1.0; 2], &[1.0, f32::INFINITY], 0.01, Z95), 0));
    }

    #[test]
    fn too_few_to_tell_are_not_asked() {
        let measured = measure(&[2.0; 5], &[2.0; 5], &[4.0, 1.0, 1.0, 1.0, 1.0], 0.02, Z95);
        assert!(!passes(&measured, 5) && passes(&measured, 6));
    }

    #[test]
    fn answers_that_are_no_longer_said_are_counted() {
        let said = |known: usize, of: usize| (0..of).map(|n| n < known).collect::<Vec<_>>();
        let measured = |best, after, of, tolerance| {
            let same = vec![1.0; of];
            let recited = recited(&said(best, of), &said(best, of), &said(after, of), tolerance);
            Measure { recited: Some(recited), ..measure(&same, &same, &same, 0.02, Z95) }
        };
        assert!(passes(&measured(39, 38, 40, 0.02), 0), "one of few may be missing");
        assert!(!passes(&measured(39, 37, 40, 0.02), 0));
        assert!(passes(&measured(200, 196, 200, 0.02), 0) && !passes(&measured(200, 195, 200, 0.02), 0));
        assert!(passes(&measured(0, 0, 40, 0.02), 0), "none is missing where none was known");
        assert!(passes(&measured(10, 12, 40, 0.02), 0), "others for them are as good");
        assert!(passes(&measured(39, 0, 40, f32::MAX), 0) && passes(&measured(39, 0, 40, 0.02), 41));
    }

    #[test]
    fn nothing_to_measure_lets_through() {
        assert!(passes(&measure(&[], &[], &[], 0.0, Z95), 0));
    }
}
