//! The gate's arithmetic.

use proto::Measure;

/// One-sided 95 % quantile of the normal distribution.
const Z95: f32 = 1.645;
/// Compares losses of the same examples, in nats a token: with their best published score, with the
/// parent, and with the candidate. The bound is that of the mean of paired differences,
/// `mean + z s / sqrt(n)`.
///
/// The rise is judged against the mean of `untaught`, the losses before anything was learned: what is
/// known by heart has a loss near zero, of which any change is a multiple, and the question is which
/// share of what was learned is lost.
pub fn measure(untaught: &[f32], best: &[f32], before: &[f32], after: &[f32], tolerance: f32) -> Measure {
    let n = best.len() as f32;
    let mean = |values: &[f32]| values.iter().sum::<f32>() / n.max(1.0);
    let rises: Vec<f32> = after.iter().zip(best).map(|(a, b)| a - b).collect();
    let rise = mean(&rises);
    let variance = rises.iter().map(|r| (r - rise).powi(2)).sum::<f32>() / (n - 1.0).max(1.0);
    Measure {
        examples: best.len() as u32,
        best: mean(best),
        before: mean(before),
        after: mean(after),
        rise_upper: rise + Z95 * (variance / n.max(1.0)).sqrt(),
        rise_allowed: tolerance * mean(untaught).max(mean(best)),
    }
}

/// Whether a measure lets a candidate through. A loss that is not a number does not. Of fewer than
/// `examples_min` examples the bound says nothing, and none is asked for.
pub fn passes(measure: &Measure, examples_min: u32) -> bool {
    measure.examples == 0 || measure.examples < examples_min || measure.rise_upper <= measure.rise_allowed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rise_beyond_the_tolerance_is_refused_and_a_fall_is_not() {
        let best = vec![2.0; 64];
        let risen = |by: f32| best.iter().map(|b| b + by).collect::<Vec<_>>();
        assert!(passes(&measure(&best, &best, &best, &risen(0.019), 0.01), 0));
        assert!(!passes(&measure(&best, &best, &best, &risen(0.021), 0.01), 0));
        assert!(passes(&measure(&best, &best, &best, &risen(-0.5), 0.01), 0));
    }

    #[test]
    fn an_uncertain_rise_is_refused_too() {
        let best = vec![2.0; 16];
        let after: Vec<f32> = (0..16).map(|n| if n % 2 == 0 { 2.3 } else { 1.7 }).collect();
        let measured = measure(&best, &best, &best, &after, 0.01);
        assert!((measured.after - 2.0).abs() < 1e-5, "no rise in the mean");
        assert!(!passes(&measured, 0), "but it may well be one: {measured:?}");
    }

    #[test]
    fn what_is_known_by_heart_may_lose_a_hundredth_of_what_was_learned() {
        let best = vec![0.01; 20];
        let untaught = vec![6.0; 20];
        assert!(passes(&measure(&untaught, &best, &best, &[0.065; 20], 0.01), 0));
        assert!(!passes(&measure(&untaught, &best, &best, &[0.075; 20], 0.01), 0));
    }

    #[test]
    fn a_loss_that_is_not_a_number_is_refused() {
        assert!(!passes(&measure(&[1.0; 2], &[1.0; 2], &[1.0; 2], &[1.0, f32::NAN], 0.01), 0));
        assert!(!passes(&measure(&[1.0; 2], &[1.0; 2], &[1.0; 2], &[1.0, f32::INFINITY], 0.01), 0));
    }

    #[test]
    fn too_few_to_tell_are_not_asked() {
        let measured = measure(&[2.0; 5], &[2.0; 5], &[2.0; 5], &[4.0, 1.0, 1.0, 1.0, 1.0], 0.01);
        assert!(!passes(&measured, 5) && passes(&measured, 6));
    }

    #[test]
    fn nothing_to_measure_lets_through() {
        assert!(passes(&measure(&[], &[], &[], &[], 0.01), 0));
    }
}
