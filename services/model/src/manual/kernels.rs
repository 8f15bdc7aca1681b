//! The parts of a training step that are no products, each as one pass over the numbers, forward and backward.

use half::bf16;

use crate::cpu::vector::{Number, exp, fma, narrow, sum, vectorised};

/// A format that a step computes in on the CPU.
pub(super) trait Real: Number {
    /// The nearest number of this format.
    fn of(x: f32) -> Self;
}

impl Real for f32 {
    #[inline(always)]
    fn of(x: f32) -> Self {
        x
    }
}

impl Real for bf16 {
    #[inline(always)]
    fn of(x: f32) -> Self {
        narrow(x)
    }
}

/// Numbers that go on side by side.
pub(super) const LANES: usize = 16;

/// The sum of `term(i)` over a row.
#[inline(always)]
fn sum_of(len: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut sums = [0f32; LANES];
    let whole = len / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += term(start + lane);
        }
    }
    (whole..len).map(term).sum::<f32>() + sum(sums)
}

/// The largest number of a row.
#[inline(always)]
fn largest<W: Real>(row: &[W]) -> f32 {
    let mut most = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (most, x) in most.iter_mut().zip(chunk) {
            *most = if x.wide() > *most { x.wide() } else { *most };
        }
    }
    rest.iter().map(|x| x.wide()).chain(most).fold(f32::NEG_INFINITY, f32::max)
}

vectorised! {
    /// `out = x * inverse * weight`, where `inverse` is one over the root of the mean square (arXiv 1910.07467).
    fn norm [W: Real] [W] (x: &[W], weight: &[f32], epsilon: f32, out: &mut [W], inverse: &mut f32) {
        let (len, weight) = (x.len(), &weight[..x.len()]);
        *inverse = 1.0 / (sum_of(len, |i| x[i].wide() * x[i].wide()) / len as f32 + epsilon).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = W::of(x.wide() * *inverse * weight);
        }
    }
}

vectorised! {
    /// Adds to `into` the gradient of [`norm`]'s input, where `above` is that of its output:
    /// `inverse * (weight * above - x * inverse^2 * mean(weight * above * x))`.
    fn norm_backward [W: Real] [W] (x: &[W], weight: &[f32], inverse: f32, above: &[W], into: &mut [W]) {
        let len = x.len();
        let (weight, above, into) = (&weight[..len], &above[..len], &mut into[..len]);
        let mean = sum_of(len, |i| weight[i] * above[i].wide() * x[i].wide()) / len as f32;
        let shift = mean * inverse * inverse;
        for (((into, x), weight), above) in into.iter_mut().zip(x).zip(weight).zip(above) {
            *into = W::of(into.wide() + inverse * (weight * above.wide() - x.wide() * shift));
        }
    }
}

vectorised! {
    /// Turns a head as [`crate::cpu::vector::rotate`]; with negative `sin` back again, which is also its gradient.
    fn turn [W: Real] [W] (head: &mut [W], cos: &[f32], sin: &[f32], sign: f32) {
        let (early, late) = head.split_at_mut(cos.len());
        for (((a, b), cos), sin) in early.iter_mut().zip(late).zip(cos).zip(sin) {
            let (x, y, sin) = (a.wide(), b.wide(), sign * sin);
            (*a, *b) = (W::of(x * cos - y * sin), W::of(y * cos + x * sin));
        }
    }
}

vectorised! {
    /// `out = silu(gate) * up`, of a row that holds both.
    fn gate [W: Real] [W] (gate_up: &[W], out: &mut [W]) {
        let (gate, up) = gate_up.split_at(out.len());
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            let gate = gate.wide();
            *out = W::of(gate / (1.0 + exp::<F>(-gate)) * up.wide());
        }
    }
}

vectorised! {
    /// Puts in the place of a row that holds gate and up their gradients, where `above` is that of [`gate`]'s output.
    fn gate_backward [W: Real] [W] (gate_up: &mut [W], above: &[W]) {
        let (gate, up) = gate_up.split_at_mut(above.len());
        for ((g, u), above) in gate.iter_mut().zip(up).zip(above) {
            let (x, up, above) = (g.wide(), u.wide(), above.wide());
            let s = 1.0 / (1.0 + exp::<F>(-x));
            let slope = s * fma::<F>(x, 1.0 - s, 1.0);
            (*g, *u) = (W::of(above * up * slope), W::of(above * x * s));
        }
    }
}

vectorised! {
    /// Puts in the place of a row of logits `weight * (softmax - 1 at the target)`, the gradient of cross-entropy, and says
    /// how unlikely the target was, in nats. `room` is as long as the row.
    fn cross_entropy [W: Real] [W] (logits: &mut [W], target: usize, weight: f32, room: &mut [f32], nll: &mut f32) {
        let (len, of_target) = (logits.len(), logits[target].wide());
        let (room, best) = (&mut room[..len], largest(logits));
        for (room, x) in room.iter_mut().zip(&*logits) {
            *room = exp::<F>(x.wide() - best);
        }
        let total = sum_of(len, |i| room[i]);
        let scale = weight / total;
        for (x, room) in logits.iter_mut().zip(&*room) {
            *x = W::of(room * scale);
        }
        logits[target] = W::of(room[target] * scale - weight);
        *nll = total.ln() + best - of_target;
    }
}

/// How a student learns a token.
#[derive(Clone, Copy)]
pub(crate) struct Lesson {
    /// What the loss is multiplied by.
    pub weight: f32,
    /// The teacher's share of it.
    pub share: f32,
    /// What logits are divided by, where the two are compared.
    pub temperature: f32,
}

vectorised! {
    /// As [`cross_entropy`], of a student's loss: see [`crate::distillation`]. `teacher` has that one's logits; `room` is three times as
    /// long as the row.
    fn student [W: Real] [W] (
        logits: &mut [W],
        teacher: &[W],
        target: usize,
        lesson: Lesson,
        room: &mut [f32],
        nll: &mut f32,
    ) {
        let (len, of_target) = (logits.len(), logits[target].wide());
        let Lesson { weight, share, temperature } = lesson;
        let (own, rest) = room.split_at_mut(len);
        let (soft, softer) = rest.split_at_mut(len);
        let (teacher, softer) = (&teacher[..len], &mut softer[..len]);
        let (best, of_teacher, divide) = (largest(logits), largest(teacher), 1.0 / temperature);
        let terms = own.iter_mut().zip(&mut *soft).zip(&mut *softer).zip(&*logits).zip(teacher);
        for ((((own, soft), softer), x), y) in terms {
            *own = exp::<F>(x.wide() - best);
            *soft = exp::<F>((x.wide() - best) * divide);
            *softer = exp::<F>((y.wide() - of_teacher) * divide);
        }
        let total = sum_of(len, |i| own[i]);
        let of_text = weight * (1.0 - share);
        let apart = weight * share * temperature;
        let (of_own, of_soft, of_softer) =
            (of_text / total, apart / sum_of(len, |i| soft[i]), apart / sum_of(len, |i| softer[i]));
        for ((own, soft), softer) in own.iter_mut().zip(&*soft).zip(&*softer) {
            *own = *own * of_own + (*soft * of_soft - *softer * of_softer);
        }
        own[target] -= of_text;
        for (x, gradient) in logits.iter_mut().zip(&*own) {
            *x = W::of(*gradient);
        }
        *nll = total.ln() + best - of_target;
    }
}

/// What one step of AdamW takes of everything.
#[derive(Clone, Copy)]
pub(crate) struct Taken {
    /// Of the weights, which decay.
    pub keep: f32,
    /// Of the gradient, for the mean, and of its square.
    pub first: f32,
    pub second: f32,
    /// Minus the rate, over what a mean of so few steps lacks.
    pub scale: f32,
    /// What the root of the mean square lacks.
    pub root: f32,
    pub eps: f32,
}

vectorised! {
    /// A step of AdamW (arXiv 1711.05101).
    fn adamw [] [] (weights: &mut [f32], gradient: &[f32], mean: &mut [f32], square: &mut [f32], taken: Taken) {
        let Taken { keep, first, second, scale, root, eps } = taken;
        for (((weight, gradient), mean), square) in weights.iter_mut().zip(gradient).zip(mean).zip(square) {
            *mean += first * (gradient - *mean);
            *square += second * (gradient * gradient - *square);
            *weight = *weight * keep + scale * (*mean / (square.sqrt() / root + eps));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::vector::Level;

    fn row(len: usize, pitch: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * pitch).sin() * 2.0).collect()
    }

    /// How fast `loss` grows with each number of `x`, by differences.
    fn slopes(x: &[f32], loss: impl Fn(&[f32]) -> f64) -> Vec<f64> {
        let at = |i: usize, step: f32| {
            let mut x = x.to_vec();
            x[i] += step;
            loss(&x)
        };
        (0..x.len()).map(|i| (at(i, 1e-2) - at(i, -1e-2)) / 2e-2).collect()
    }

    fn near(found: &[f32], expected: &[f64]) {
        for (found, expected) in found.iter().zip(expected) {
            assert!(
                (f64::from(*found) - expected).abs() < 2e-3 * (1.0 + expected.abs()),
                "{found} {expected}"
            );
        }
    }

    fn weighed(out: &[f32], above: &[f32]) -> f64 {
        out.iter().zip(above).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
    }

    /// A student's loss as [`crate::distillation`] has it.
    fn taught(x: &[f32], teacher: &[f32], target: usize, lesson: Lesson) -> f32 {
        let log_softmax = |row: &[f32], divide: f32| {
            let sum: f32 = row.iter().map(|x| (x / divide).exp()).sum();
            row.iter().map(|x| x / divide - sum.ln()).collect::<Vec<_>>()
        };
        let Lesson { weight, share, temperature } = lesson;
        let (p, q) = (log_softmax(x, temperature), log_softmax(teacher, temperature));
        let divergence: f32 = p.iter().zip(&q).map(|(p, q)| q.exp() * (q - p)).sum();
        let came = -log_softmax(x, 1.0)[target];
        weight * (share * temperature * temperature * divergence + (1.0 - share) * came)
    }

    #[test]
    fn gradients_are_those_of_the_forward_parts() {
        for level in [Level::Plain, Level::best()] {
            let (x, weight, above) = (row(37, 0.7), row(37, 0.3), row(37, 1.1));
            let normed = |x: &[f32]| {
                let (mut out, mut inverse) = (vec![0.0; 37], 0.0);
                norm(level, x, &weight, 1e-5, &mut out, &mut inverse);
                (out, inverse)
            };
            let mut into = vec![1.0; 37];
            norm_backward(level, &x, &weight, normed(&x).1, &above, &mut into);
            let expected = slopes(&x, |x| weighed(&normed(x).0, &above));
            near(&into, &expected.iter().map(|slope| slope + 1.0).collect::<Vec<_>>());

            let gated = |x: &[f32]| {
                let mut out = vec![0.0; 18];
                gate(level, &x[..36], &mut out);
                out
            };
            let mut gradient = x[..36].to_vec();
            gate_backward(level, &mut gradient, &above[..18]);
            near(&gradient, &slopes(&x[..36], |x| weighed(&gated(x), &above[..18])));

            let unlikely = |x: &[f32]| {
                let (mut x, mut nll) = (x.to_vec(), 0.0);
                cross_entropy(level, &mut x, 5, 0.5, &mut [0.0; 37], &mut nll);
                (x, nll)
            };
            near(&unlikely(&x).0, &slopes(&x, |x| 0.5 * f64::from(unlikely(x).1)));

            for share in [0.0, 0.3, 1.0] {
                let lesson = Lesson { weight: 0.5, share, temperature: 2.0 };
                let (mut gradient, mut nll) = (x.clone(), 0.0);
                student(level, &mut gradient, &above, 5, lesson, &mut [0.0; 3 * 37], &mut nll);
                near(&gradient, &slopes(&x, |x| f64::from(taught(x, &above, 5, lesson))));
                assert!((nll - unlikely(&x).1).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn turning_back_is_the_inverse() {
        let (cos, sin): (Vec<f32>, Vec<f32>) = row(8, 0.9).into_iter().map(|a| (a.cos(), a.sin())).unzip();
        let mut head = row(16, 0.4);
        turn(Level::best(), &mut head, &cos, &sin, 1.0);
        assert!((head[0] - row(16, 0.4)[0]).abs() + (head[3] - row(16, 0.4)[3]).abs() > 0.1);
        turn(Level::best(), &mut head, &cos, &sin, -1.0);
        assert!(head.iter().zip(row(16, 0.4)).all(|(x, y)| (x - y).abs() < 1e-6));
    }

    #[test]
    fn logits_that_are_not_finite_are_told() {
        for bad in [f32::NAN, f32::INFINITY] {
            let (mut logits, mut nll) = (row(20, 0.7), 0.0);
            logits[7] = bad;
            cross_entropy(Level::best(), &mut logits, 5, 1.0, &mut [0.0; 20], &mut nll);
            assert!(!nll.is_finite());
        }
    }
}
