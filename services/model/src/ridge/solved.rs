//! Facts as they are served.
//!
//! Each has a regression of its own, of a number that is 1 for its prompt `x` and 0 for all else, in lengths of what it says of `x`, which is so 1:
//! `w = M x / h` with `M = (P + A + r I)^-1` and `h = x^T M x`. Few are kept as they are. Of many, `M`, which is the same for all, is applied to
//! what is asked instead, `w^T q = x^T (M q) / h`: then a fact is its prompt's whole numbers, half as large, and a batch has only
//! to solve for `h`.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use half::f16;
use tch::{Device, Kind, Tensor};

use super::FEATURES;
use super::facts::Told;
use super::products::Factor;
use crate::cpu::vector::{Level, fma, sum, vectorised};
use crate::quant::slice_mut;
use crate::weights;

/// Facts that are kept as regressions, at most: 5 kB each, 10 in memory. `M` takes 6 MB, 25 in memory, and a fact beside it 2,500 bytes.
const EACH_MAX: usize = 2048;
/// Facts that are looked at together.
const FACTS_AT_ONCE: usize = 1024;
/// Prompts that are looked at together.
const PROMPTS_AT_ONCE: i64 = 128;
/// Fewer prompts are multiplied with whole numbers as these lie there.
const PROMPTS_FEW: usize = 8;

/// A prompt that is so like a fact's own has its answer as likely as not. Of invented facts among 100 to 6,000 of the same six kinds the
/// same question in other words comes to 0.6 to 0.7 in the mean (a tenth is below 0.43 to 0.51), and is like no other one more in 99 of 100; the
/// nearest to a question of that kind about something unknown to 0.3 to 0.37, to one of another kind to 0.2 to 0.3.
const LIKE: f64 = 0.45;
/// How sure that is: the odds are `exp(SURENESS * (likeness - LIKE))`.
const SURENESS: f64 = 30.0;
/// What is less like a prompt has no say.
const LIKE_MIN: f64 = 0.25;

/// What a prompt says of itself is taken to be no less, so that a share of it is a number.
const OWN_MIN: f32 = 1e-12;

const SIZE: usize = FEATURES as usize;
/// Names of what is written of few facts, and of many.
const EACH: &str = "facts";
const INVERSE: &str = "facts_inverse";
const OWN: &str = "facts_own";
const ROWS: &str = "facts_rows";

/// Facts as they are served.
#[derive(Debug)]
pub(super) struct Solved {
    regressions: Regressions,
    answers: Vec<Told>,
}

#[derive(Debug)]
enum Regressions {
    /// f32 [facts, FEATURES], of f16.
    Each(Tensor),
    Together(Together),
}

#[derive(Debug)]
struct Together {
    /// `r M`, f32 [FEATURES, FEATURES] of f16.
    inverse: Tensor,
    /// `r h` of each.
    own: Vec<f32>,
    /// `x` of each, FEATURES bytes.
    rows: Vec<u8>,
}

/// What facts say of a prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Likely {
    /// How likely the prompt is one of theirs.
    pub all: f64,
    /// How likely that is each one, by its place; those that are like it.
    pub each: Vec<(usize, f64)>,
}

impl Solved {
    /// Of facts whose prompts `rows` describe, FEATURES bytes each.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn new(factor: &Factor, rows: &[u8], answers: Vec<Told>) -> Result<Self> {
        let regressions = match answers.len() {
            0..=EACH_MAX => Regressions::each(factor, rows)?,
            _ => Regressions::Together(Together::new(factor, rows)?),
        };
        Ok(Self { regressions, answers })
    }

    /// None.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn none() -> Result<Self> {
        let weights = Tensor::f_zeros([0, FEATURES], (Kind::Float, Device::Cpu))?;
        Ok(Self { regressions: Regressions::Each(weights), answers: Vec::new() })
    }

    pub fn answers(&self) -> &[Told] {
        &self.answers
    }

    /// As tensors with names.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let named = |name: &str, tensor| (name.to_owned(), tensor);
        Ok(match &self.regressions {
            Regressions::Each(weights) => vec![named(EACH, weights.f_to_kind(Kind::Half)?)],
            Regressions::Together(Together { inverse, own, rows }) => vec![
                named(INVERSE, lower_half(inverse)?),
                named(OWN, Tensor::from_slice(own)),
                named(ROWS, Tensor::from_slice(rows).f_view([-1, FEATURES])?),
            ],
        })
    }

    /// Takes them out of named tensors; none are there where an earlier version wrote those.
    ///
    /// # Errors
    /// When they do not belong together.
    pub fn from_tensors(tensors: &mut BTreeMap<String, Tensor>, answers: Vec<Told>) -> Result<Self> {
        let regressions = match (tensors.remove(EACH), tensors.remove(INVERSE)) {
            (Some(weights), _) => {
                ensure!(weights.f_kind()? == Kind::Half, "the regression on facts is not f16");
                Regressions::Each(weights.f_to_kind(Kind::Float)?)
            }
            (None, Some(half)) => {
                let mut take = |name| tensors.remove(name).with_context(|| format!("{name} are missing"));
                Regressions::Together(Together::read(&half, &take(OWN)?, &take(ROWS)?)?)
            }
            (None, None) if answers.is_empty() => return Self::none(),
            (None, None) => bail!("the regression on facts is missing"),
        };
        ensure!(regressions.fits(answers.len())?, "facts and the regression on them do not belong together");
        Ok(Self { regressions, answers })
    }

    /// How likely prompts, which `features` describe, are those of facts, where what else is said of each is as like it as `against` says.
    ///
    /// # Errors
    /// When features are not what it takes.
    pub fn likely(&self, features: &Tensor, against: &[f64]) -> Result<Vec<Likely>> {
        ensure!(
            features.size() == [against.len() as i64, FEATURES],
            "prompts and what is said of them differ in number"
        );
        if self.answers.is_empty() {
            return Ok(vec![Likely::default(); against.len()]);
        }
        let mut all = Vec::with_capacity(against.len());
        for first in (0..features.size()[0]).step_by(PROMPTS_AT_ONCE as usize) {
            let some = features.f_slice(0, first, first + PROMPTS_AT_ONCE, 1)?;
            let like = match &self.regressions {
                Regressions::Each(weights) => rows_of(&some.f_linear(weights, None::<&Tensor>)?)?,
                Regressions::Together(together) => together.like(&some)?,
            };
            let against = &against[first as usize..];
            all.extend(like.iter().zip(against).map(|(like, &against)| likely(like, against)));
        }
        Ok(all)
    }
}

impl Regressions {
    fn each(factor: &Factor, rows: &[u8]) -> Result<Self> {
        let mut weights = vec![Tensor::f_zeros([0, FEATURES], (Kind::Half, Device::Cpu))?];
        for rows in parts(rows) {
            let x = rows?.f_to_kind(Kind::Double)?;
            let solved = factor.solve(&x)?;
            let own = x.f_mul(&solved)?.f_sum_dim_intlist(&[1_i64][..], true, Kind::Double)?;
            weights.push(solved.f_div(&own.f_clamp_min(f64::from(OWN_MIN))?)?.f_to_kind(Kind::Half)?);
        }
        // What is served is what will be read back.
        Ok(Self::Each(Tensor::f_cat(&weights, 0)?.f_to_kind(Kind::Float)?))
    }

    /// Whether they are the regressions of so many facts.
    fn fits(&self, facts: usize) -> Result<bool> {
        Ok(match self {
            Self::Each(weights) => {
                weights.size() == [facts as i64, FEATURES] && (facts == 0 || weights::is_finite(weights)?)
            }
            Self::Together(Together { inverse, own, rows }) => {
                own.len() == facts
                    && rows.len() == facts * SIZE
                    && own.iter().all(|own| own.is_finite() && *own > 0.0)
                    && weights::is_finite(inverse)?
            }
        })
    }
}

impl Together {
    fn new(factor: &Factor, rows: &[u8]) -> Result<Self> {
        // What is served is what will be read back.
        let inverse = whole(&lower_half(&factor.inverse()?)?)?;
        let own = factor.lengths(parts(rows))?.into_iter().map(|own| own.max(OWN_MIN)).collect();
        Ok(Self { inverse, own, rows: rows.to_vec() })
    }

    fn read(half: &Tensor, own: &Tensor, rows: &Tensor) -> Result<Self> {
        ensure!(
            half.f_kind()? == Kind::Half && own.f_kind()? == Kind::Float && rows.f_kind()? == Kind::Uint8,
            "the regression on facts is of other numbers"
        );
        let rows = Vec::<u8>::try_from(rows.f_reshape([-1])?)?;
        Ok(Self { inverse: whole(half)?, own: Vec::<f32>::try_from(own)?, rows })
    }

    /// How like each fact's prompt each of those is that `features` describe.
    fn like(&self, features: &Tensor) -> Result<Vec<Vec<f64>>> {
        let asked = features.f_matmul(&self.inverse)?;
        if features.size()[0] as usize >= PROMPTS_FEW {
            return self.like_many(&asked);
        }
        let asked = Vec::<Vec<f32>>::try_from(asked)?;
        let of_one = |asked: &Vec<f32>| {
            let mut products = vec![0.0; self.own.len()];
            times(Level::best(), &self.rows, asked, &mut products);
            products.iter().zip(&self.own).map(|(product, own)| f64::from(product / own)).collect()
        };
        Ok(asked.iter().map(of_one).collect())
    }

    fn like_many(&self, asked: &Tensor) -> Result<Vec<Vec<f64>>> {
        let mut products = Vec::new();
        for rows in parts(&self.rows) {
            products.push(asked.f_linear(&rows?, None::<&Tensor>)?);
        }
        rows_of(&Tensor::f_cat(&products, 1)?.f_div(&Tensor::from_slice(&self.own))?)
    }
}

vectorised! {
    /// Rows of whole numbers times other ones.
    fn times[][](rows: &[u8], with: &[f32], out: &mut [f32]) {
        const LANES: usize = 16;
        for (out, row) in out.iter_mut().zip(rows.chunks_exact(with.len())) {
            let (mut sums, mut rest) = ([0.0; LANES], 0.0);
            let (lanes, others) = (row.chunks_exact(LANES), with.chunks_exact(LANES));
            for (number, other) in lanes.remainder().iter().zip(others.remainder()) {
                rest = fma::<F>(f32::from(*number), *other, rest);
            }
            for (numbers, others) in lanes.zip(others) {
                for lane in 0..LANES {
                    sums[lane] = fma::<F>(f32::from(numbers[lane]), others[lane], sums[lane]);
                }
            }
            *out = sum(sums) + rest;
        }
    }
}

/// Some rows at a time, f32 [n, FEATURES].
fn parts(rows: &[u8]) -> impl Iterator<Item = Result<Tensor>> {
    let part = |rows| Ok(Tensor::from_slice(rows).f_view([-1, FEATURES])?.f_to_kind(Kind::Float)?);
    rows.chunks(FACTS_AT_ONCE * SIZE).map(part)
}

fn rows_of(tensor: &Tensor) -> Result<Vec<Vec<f64>>> {
    Vec::<Vec<f64>>::try_from(tensor.f_to_kind(Kind::Double)?).context("what facts say of prompts")
}

/// The lower half of a symmetric matrix, f16 [FEATURES (FEATURES + 1) / 2].
fn lower_half(matrix: &Tensor) -> Result<Tensor> {
    let numbers = Vec::<f32>::try_from(matrix.f_to_kind(Kind::Float)?.f_reshape([-1])?)?;
    let rows = numbers.chunks_exact(SIZE).enumerate();
    let half: Vec<f16> = rows.flat_map(|(n, row)| row[..=n].iter().map(|&x| f16::from_f32(x))).collect();
    Ok(Tensor::from_slice(&half))
}

/// The matrix that a lower half is of, f32 [FEATURES, FEATURES].
fn whole(half: &Tensor) -> Result<Tensor> {
    ensure!(
        half.size() == [(SIZE * (SIZE + 1) / 2) as i64],
        "the regression on facts is no half of a matrix"
    );
    let half = Vec::<f32>::try_from(half.f_to_kind(Kind::Float)?)?;
    let mut matrix = Tensor::f_zeros([FEATURES, FEATURES], (Kind::Float, Device::Cpu))?;
    let mut start = 0;
    for (n, row) in slice_mut::<f32>(&mut matrix)?.chunks_exact_mut(SIZE).enumerate() {
        row[..=n].copy_from_slice(&half[start..=start + n]);
        start += n + 1;
    }
    Ok(matrix.f_add(&matrix.f_tril(-1)?.f_tr()?)?)
}

fn likely(like: &[f64], against: f64) -> Likely {
    let most = like.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let heard = (0..).zip(like).filter(|(_, like)| **like >= LIKE_MIN);
    let odds: Vec<(usize, f64)> = heard.map(|(n, like)| (n, (SURENESS * (like - most)).exp())).collect();
    if odds.is_empty() {
        return Likely::default();
    }
    let all = 1.0 / (1.0 + (SURENESS * (against.max(LIKE) - most)).exp());
    let whole: f64 = odds.iter().map(|(_, odds)| odds).sum();
    Likely { all, each: odds.into_iter().map(|(n, odds)| (n, all * odds / whole)).collect() }
}

#[cfg(test)]
mod tests {
    use super::super::Answer;
    use super::super::products::{Products, System};
    use super::*;

    fn told(facts: usize) -> Vec<Told> {
        let answer = |n: usize| Answer { text: n.to_string(), forms: Vec::new() };
        (0..facts).map(|n| Told { answer: answer(n), document: None }).collect()
    }

    /// What describes prompts that have much in common.
    fn rows(facts: usize) -> Vec<u8> {
        let number = |n: usize, place: usize| {
            let own = (n * 7919 + place * 104_729) % 65_521 % 97;
            if own < 40 { own } else { place % 23 }
        };
        (0..facts * SIZE).map(|at| number(at / SIZE, at % SIZE) as u8).collect()
    }

    fn factor(rows: &[u8]) -> Factor {
        let mut products = Products::default();
        assert!(parts(rows).all(|rows| products.add(&rows.unwrap()).unwrap()));
        let mut system = System::new().unwrap();
        system.add(&products).unwrap();
        let ridge = 0.01 * system.mean().unwrap();
        system.factor(ridge).unwrap()
    }

    /// The same facts as few and as many.
    fn both(facts: usize) -> (Vec<u8>, [Solved; 2]) {
        let rows = rows(facts);
        let factor = factor(&rows);
        let few = Regressions::each(&factor, &rows).unwrap();
        let many = Regressions::Together(Together::new(&factor, &rows).unwrap());
        (rows, [few, many].map(|regressions| Solved { regressions, answers: told(facts) }))
    }

    #[test]
    fn many_say_what_few_do_of_one_prompt_and_of_several() {
        let (rows, [few, many]) = both(600);
        let mut asked: Vec<u8> = rows[..20 * SIZE].to_vec();
        // Half of a fact's prompt, and half of another one's.
        asked[..SIZE / 2].copy_from_slice(&rows[50 * SIZE..50 * SIZE + SIZE / 2]);
        let asked = Tensor::cat(&parts(&asked).map(Result::unwrap).collect::<Vec<_>>(), 0);
        let (Regressions::Each(weights), Regressions::Together(together)) =
            (&few.regressions, &many.regressions)
        else {
            panic!("of both kinds")
        };
        let expected = rows_of(&asked.linear(weights, None::<&Tensor>)).unwrap();
        let alone: Vec<Vec<f64>> =
            (0..20).flat_map(|n| together.like(&asked.narrow(0, n, 1)).unwrap()).collect();
        let mut furthest = 0.0_f64;
        for like in [together.like(&asked).unwrap(), alone] {
            assert_eq!((like.len(), like[0].len()), (20, 600));
            for (n, like) in like.iter().enumerate().skip(1) {
                assert!((like[n] - 1.0).abs() < 0.01, "{n}: {}", like[n]);
            }
            for (like, expected) in like.iter().flatten().zip(expected.iter().flatten()) {
                furthest = furthest.max((like - expected).abs());
            }
        }
        assert!(furthest < 0.01, "{furthest}");
        assert!((0.2..0.8).contains(&expected[0][50]) && (0.2..0.8).contains(&expected[0][0]));
        let against = vec![0.0; 20];
        let [few, many] = [few, many].map(|solved| solved.likely(&asked, &against).unwrap());
        assert!(few.iter().zip(&many).all(|(few, many)| (few.all - many.all).abs() < 0.02));
        assert!((1..20).all(|n| many[n].each.iter().any(|&(fact, likely)| fact == n && likely > 0.99)));
    }

    #[test]
    fn how_many_there_are_says_what_is_kept_of_them() {
        let rows = rows(EACH_MAX + 1);
        let factor = factor(&rows[..3 * SIZE]);
        for (facts, together) in [(0, false), (EACH_MAX, false), (EACH_MAX + 1, true)] {
            let solved = Solved::new(&factor, &rows[..facts * SIZE], told(facts)).unwrap();
            assert_eq!(matches!(solved.regressions, Regressions::Together(_)), together, "{facts}");
        }
    }

    #[test]
    fn what_was_written_is_what_is_served_and_what_does_not_fit_together_is_refused() {
        let (_, [few, many]) = both(5);
        let asked = Tensor::cat(&parts(&rows(9)).map(Result::unwrap).collect::<Vec<_>>(), 0);
        let against = vec![0.0; 9];
        let read = |tensors: &[(String, Tensor)], facts: usize| {
            let mut tensors =
                tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
            Solved::from_tensors(&mut tensors, told(facts))
        };
        for solved in [few, many] {
            let tensors = solved.tensors().unwrap();
            let again = read(&tensors, 5).unwrap();
            assert_eq!(again.likely(&asked, &against).unwrap(), solved.likely(&asked, &against).unwrap());
            assert!(read(&tensors, 6).is_err(), "of other facts");
            for at in 0..tensors.len() {
                let mut damaged: Vec<_> =
                    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
                let tensor = &damaged[at].1;
                damaged[at].1 = tensor.narrow(0, 0, tensor.size()[0] - 1);
                assert!(read(&damaged, 5).is_err(), "{}", damaged[at].0);
                let _ = damaged.remove(at);
                assert!(damaged.is_empty() || read(&damaged, 5).is_err());
            }
        }
        assert_eq!(read(&[], 0).unwrap().answers(), [], "an earlier version wrote none");
        assert!(
            read(&[("facts".to_owned(), Tensor::zeros([1, FEATURES], (Kind::Float, Device::Cpu)))], 1)
                .is_err()
        );
    }

    #[test]
    fn what_else_is_said_of_a_prompt_has_to_be_less_sure() {
        let alone = likely(&[0.8, 0.3, 0.1], f64::NEG_INFINITY);
        assert!(alone.all > 0.99 && alone.each.len() == 2 && alone.each[0].1 > 0.99);
        assert!((likely(&[0.8], 0.8).all - 0.5).abs() < 1e-9 && likely(&[0.8], 0.9).all < 0.05);
        assert!((likely(&[LIKE], 0.1).all - 0.5).abs() < 1e-9);
        assert_eq!(likely(&[0.2, -0.4], 0.0), Likely::default());
    }
}
