//! Loops over numbers that the compiler turns into vector instructions, for each instruction set the processor may
//! have.

use std::sync::OnceLock;

use half::{bf16, f16};

/// What the processor computes with, chosen once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// What every processor of its kind has; on ARM that is NEON.
    Plain,
    /// AVX2, with fused multiplication and addition, and with f16.
    Avx2,
    /// AVX-512.
    Avx512,
    /// AVX-512 with products of 16-bit integers.
    Avx512Vnni,
    /// The same with products of bf16.
    Avx512Bf16,
    /// The same with tiles of bf16.
    Amx,
}

impl Level {
    /// The best of this processor.
    pub fn best() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(Self::find)
    }

    #[cfg(target_arch = "x86_64")]
    fn find() -> Self {
        let narrow = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let wide = narrow
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq");
        let integers = wide && is_x86_feature_detected!("avx512vnni");
        let pairs = integers && is_x86_feature_detected!("avx512bf16");
        if pairs && super::amx::is_there() {
            Self::Amx
        } else if pairs {
            Self::Avx512Bf16
        } else if integers {
            Self::Avx512Vnni
        } else if wide {
            Self::Avx512
        } else if narrow {
            Self::Avx2
        } else {
            Self::Plain
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn find() -> Self {
        Self::Plain
    }
}

/// All of them, the least first.
#[cfg(test)]
pub(crate) const LEVELS: [Level; 6] =
    [Level::Plain, Level::Avx2, Level::Avx512, Level::Avx512Vnni, Level::Avx512Bf16, Level::Amx];

/// Whether a multiplication and an addition are one instruction without asking.
pub(crate) const FUSED: bool = cfg!(target_arch = "aarch64");

/// A function that is compiled once for each [`Level`] and takes the level as its first argument. Its body can use
/// the constant `F`: whether multiplication and addition are fused. It is never compiled into its caller, so that it has all
/// registers.
macro_rules! vectorised {
    (
        $(#[$attribute:meta])*
        fn $name:ident [$($generic:tt)*] [$($given:ident),*]
        ($($arg:ident: $type:ty),* $(,)?) $body:block
    ) => {
        $(#[$attribute])*
        pub(crate) fn $name<$($generic)*>(level: $crate::cpu::vector::Level, $($arg: $type),*) {
            #[inline(always)]
            fn body<const F: bool, $($generic)*>($($arg: $type),*) $body

            #[inline(never)]
            fn plain<$($generic)*>($($arg: $type),*) {
                body::<{ $crate::cpu::vector::FUSED }, $($given),*>($($arg),*);
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[inline(never)]
            fn avx2<$($generic)*>($($arg: $type),*) {
                body::<true, $($given),*>($($arg),*);
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
            #[inline(never)]
            fn avx512<$($generic)*>($($arg: $type),*) {
                body::<true, $($given),*>($($arg),*);
            }

            match level {
                // SAFETY: a level is only ever what `Level::best` found, or less.
                #[cfg(target_arch = "x86_64")]
                #[allow(unsafe_code)]
                $crate::cpu::vector::Level::Amx
                | $crate::cpu::vector::Level::Avx512Bf16
                | $crate::cpu::vector::Level::Avx512Vnni
                | $crate::cpu::vector::Level::Avx512 => unsafe {
                    avx512::<$($given),*>($($arg),*);
                },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                #[allow(unsafe_code)]
                $crate::cpu::vector::Level::Avx2 => unsafe {
                    avx2::<$($given),*>($($arg),*);
                },
                _ => plain::<$($given),*>($($arg),*),
            }
        }
    };
}
pub(crate) use vectorised;

/// A number format of weights.
pub(crate) trait Number: Copy + Send + Sync + 'static {
    /// As f32.
    fn wide(self) -> f32;
}

impl Number for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Number for f16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self.to_f32()
    }
}

/// The nearest bf16, without the branches that keep a loop from being vectorised.
#[inline(always)]
pub(crate) fn narrow(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    bf16::from_bits(if x.is_nan() { 0x7fc0 } else { rounded as u16 })
}

/// `a * b + c`.
#[inline(always)]
pub(crate) fn fma<const F: bool>(a: f32, b: f32, c: f32) -> f32 {
    if F { a.mul_add(b, c) } else { a * b + c }
}

/// Where [`exp`] ends: at 8e-20.
const LEAST: f32 = -44.0;

/// `e^x` to a relative error of 2e-7: Cody and Waite's reduction, and the polynomial of the Cephes library. Above 88 it is the
/// largest power of e that f32 holds, and below [`LEAST`] nothing: no sum with a one in it would feel that, but its products with
/// gradients would be subnormal, for each of which some processors take many times as long.
#[inline(always)]
pub(crate) fn exp<const F: bool>(x: f32) -> f32 {
    /// Adding this leaves the nearest integer in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let nothing = x < LEAST;
    let x = x.clamp(LEAST, 88.0);
    let shifted = fma::<F>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<F>(n, -0.693_359_4, x);
    let r = fma::<F>(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_2e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = fma::<F>(p, r, c);
    }
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if nothing { 0.0 } else { fma::<F>(p * r, r, r + 1.0) * power }
}

/// The sum of sixteen numbers, in an order of its own.
#[inline(always)]
pub(crate) fn sum(x: [f32; 16]) -> f32 {
    let mut half: [f32; 8] = std::array::from_fn(|i| x[i] + x[i + 8]);
    for width in [4, 2, 1] {
        for i in 0..width {
            half[i] += half[i + width];
        }
    }
    half[0]
}

vectorised! {
    /// bf16 of f32.
    fn to_bf16 [] [] (from: &[f32], to: &mut [bf16]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = narrow(*from);
        }
    }
}

vectorised! {
    /// `x / rms(x) * weight` (arXiv 1910.07467).
    fn rms_norm [] [] (x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        let mut squares = [0f32; 16];
        let (chunks, rest) = x.as_chunks::<16>();
        for chunk in chunks {
            for (sum, x) in squares.iter_mut().zip(chunk) {
                *sum = fma::<F>(*x, *x, *sum);
            }
        }
        for (sum, x) in squares.iter_mut().zip(rest) {
            *sum = fma::<F>(*x, *x, *sum);
        }
        let inverse = 1.0 / (sum(squares) / x.len() as f32 + epsilon).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * inverse * weight;
        }
    }
}

vectorised! {
    /// Rotary embedding of one head (arXiv 2104.09864) in Hugging Face's layout, where coordinate i turns with
    /// i + head_dim / 2; times `scale`.
    fn rotate [] [] (head: &mut [f32], cos: &[f32], sin: &[f32], scale: f32) {
        let (early, late) = head.split_at_mut(cos.len());
        for (((x, y), cos), sin) in early.iter_mut().zip(late).zip(cos).zip(sin) {
            (*x, *y) = ((*x * cos - *y * sin) * scale, (*y * cos + *x * sin) * scale);
        }
    }
}

vectorised! {
    /// `e^((x - best) / temperature)`.
    fn masses [] [] (x: &[f32], best: f32, temperature: f32, out: &mut [f32]) {
        let inverse = 1.0 / temperature;
        for (out, x) in out.iter_mut().zip(x) {
            *out = exp::<F>((*x - best) * inverse);
        }
    }
}

vectorised! {
    /// `gate = silu(gate) * up`.
    fn silu_times [] [] (gate: &mut [f32], up: &[f32]) {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = *gate / (1.0 + exp::<F>(-*gate)) * up;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_near_the_libraries() {
        for i in -4400..8800 {
            let x = i as f32 / 100.0;
            for y in [exp::<false>(x), exp::<true>(x)] {
                assert!((f64::from(y) / f64::from(x).exp() - 1.0).abs() < 3e-7, "{x}");
            }
        }
        for x in [LEAST - 0.01, -60.0, f32::MIN, f32::NEG_INFINITY] {
            assert_eq!([exp::<false>(x), exp::<true>(x)], [0.0, 0.0]);
        }
        assert!(exp::<false>(f32::NAN).is_nan() && exp::<true>(f32::NAN).is_nan());
    }

    #[test]
    fn narrowing_is_that_of_the_library() {
        for i in 0..200_000u32 {
            let x = f32::from_bits(i.wrapping_mul(2_654_435_761));
            let (ours, theirs) = (narrow(x), bf16::from_f32(x));
            assert!(ours == theirs || x.is_nan() && ours.is_nan(), "{x}");
            assert!(ours.is_nan() || ours.wide() == theirs.to_f32());
        }
    }

    #[test]
    fn all_levels_of_this_processor_agree() {
        let x: Vec<f32> = (0..83).map(|i| (i as f32 * 0.7).sin()).collect();
        let weight: Vec<f32> = (0..83).map(|i| 1.0 + i as f32 / 83.0).collect();
        let run = |level| {
            let (mut normed, mut gated) = (vec![0.0; 83], x.clone());
            rms_norm(level, &x, &weight, 1e-5, &mut normed);
            silu_times(level, &mut gated, &weight);
            [normed, gated].concat()
        };
        let plain = run(Level::Plain);
        for level in LEVELS.into_iter().filter(|&level| level <= Level::best()) {
            let apart = plain.iter().zip(run(level)).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            assert!(apart < 1e-5, "{level:?}: {apart}");
        }
    }
}
