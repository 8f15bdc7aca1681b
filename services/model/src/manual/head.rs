//! What a loss makes of the last hidden states: logits in chunks, and in their place their gradient, which goes back through the head.

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, ensure};
use half::bf16;
use tch::{Device, Kind, Tensor};

use super::int8::More;
use super::rows::{Element, Rows, each, with_room};
use super::{Way, kernels};
use crate::cpu::vector::Level;
use crate::distillation::{Heard, Opinion};
use crate::llama::Base;
use crate::loss::{self, Above};
use crate::pack::Packed;

/// As [`loss::above`], with each chunk's logits turned into their gradient in one pass over them.
pub(crate) fn above_in_place(
    base: &Base,
    hidden: &Tensor,
    packed: &Packed,
    weight: f64,
    opinion: Option<&Opinion>,
) -> Result<Above> {
    match hidden.f_kind()? {
        Kind::BFloat16 => above_in::<bf16>(base, hidden, packed, weight, opinion),
        _ => above_in::<f32>(base, hidden, packed, weight, opinion),
    }
}

fn above_in<W: Element>(
    base: &Base,
    hidden: &Tensor,
    packed: &Packed,
    weight: f64,
    opinion: Option<&Opinion>,
) -> Result<Above> {
    let targets = packed.targets(base.device()).1.f_flatten(0, -1)?;
    let (total, rows) =
        (packed.learned_tokens() as i64, loss::chunk_rows(base.config().vocab_size, base.device()));
    // All panels of codes are turned for each chunk; and of a logit there are five bytes here at most, where the footprint has 24.
    let rows = if base.codes.is_some() { 3 * rows } else { rows };
    let (mut chunks, mut nll) = (Vec::new(), Vec::new());
    for start in (0..total).step_by(rows as usize) {
        let count = rows.min(total - start);
        let targets = targets.f_narrow(0, start, count)?;
        let mut logits = logits::<W>(base, &hidden.f_narrow(0, start, count)?)?;
        if let Some(spared) = packed.spared() {
            let spared = spared.by.f_narrow(0, start, count)?.f_logical_and(&spared.tokens)?;
            logits = logits.f_masked_fill_(&spared, loss::UNSAYABLE)?;
        }
        let heard = opinion.map(|opinion| opinion.heard(start, count)).transpose()?.flatten();
        let found = loss_gradient::<W>(&logits, &targets, weight, heard)?;
        nll.push(found.nll);
        chunks.push(below_head::<W>(base, &logits, &found.largest)?);
    }
    let scores = loss::per_sequence(packed, &Tensor::f_cat(&nll, 0)?)?;
    Ok(Above { scores, hidden: Tensor::f_cat(&chunks, 0)?, head: None })
}

/// In the base's own format.
fn logits<W: Element>(base: &Base, hidden: &Tensor) -> Result<Tensor> {
    Ok(match &base.codes {
        Some(codes) => codes.head.product::<W>(Way::Forward, hidden, More::default())?,
        None => hidden.f_linear(&base.head, None::<&Tensor>)?,
    })
}

/// The gradient of the hidden states [rows, hidden_size] whose logits have the gradient `above`, which is spent. `largest` says which
/// number of each row that is.
fn below_head<W: Element>(base: &Base, above: &Tensor, largest: &Tensor) -> Result<Tensor> {
    let Some(codes) = &base.codes else { return Ok(above.f_matmul(&base.head)?) };
    // The largest number of a row, the target's as a rule, is as large as all others together, which beside it would round to
    // nothing: it goes its own way.
    let at = largest.f_unsqueeze(1)?;
    let of_largest = above.f_gather(1, &at, false)?;
    let others = above.shallow_clone().f_scatter_value_(1, &at, 0.0)?;
    let below = codes.head.product::<W>(Way::Backward, &others, More::default())?;
    Ok(below.f_add(&base.head.f_index_select(0, largest)?.f_mul(&of_largest)?)?)
}

/// What is known of rows whose logits have become gradients.
struct Found {
    /// f32 [rows].
    nll: Tensor,
    /// Where a row's largest number is, [rows].
    largest: Tensor,
}

/// Puts in the place of logits [rows, vocabulary] the gradient of `weight` times the loss, which is the NLL's sum but for the share
/// that a teacher has.
fn loss_gradient<W: Element>(
    logits: &Tensor,
    targets: &Tensor,
    weight: f64,
    heard: Option<Heard>,
) -> Result<Found> {
    let (level, vocabulary, weight) = (Level::best(), logits.size()[1], weight as f32);
    let width = vocabulary as usize;
    let targets: Vec<i64> = targets.try_into()?;
    let nll = Tensor::f_zeros([targets.len() as i64], (Kind::Float, Device::Cpu))?;
    let (rows, out) = (Rows::<W>::of(logits, vocabulary)?, Rows::<f32>::of(&nll, 1)?);
    ensure!(
        rows.len() == targets.len() && targets.iter().all(|target| (0..vocabulary).contains(target)),
        "targets do not fit the logits"
    );
    let said = heard.map(|heard| Said::<W>::of(&heard, vocabulary)).transpose()?;
    let largest: Vec<AtomicUsize> = targets.iter().map(|&target| AtomicUsize::new(target as usize)).collect();
    each(targets.len(), |i| {
        // SAFETY: row i is that of this call alone.
        #[allow(unsafe_code)]
        let (row, nll) = unsafe { (rows.get_mut(i), &mut out.get_mut(i)[0]) };
        let target = targets[i] as usize;
        match said.as_ref().and_then(|said| said.of_row(i, weight)) {
            Some((teacher, lesson)) => with_room(3 * width, |room| {
                let mut at = target;
                kernels::student(level, row, teacher, target, lesson, room, nll, &mut at);
                largest[i].store(at, Ordering::Relaxed);
            }),
            None => with_room(width, |room| kernels::cross_entropy(level, row, target, weight, room, nll)),
        }
    });
    let largest: Vec<i64> = largest.into_iter().map(|at| at.into_inner() as i64).collect();
    Ok(Found { nll, largest: Tensor::from_slice(&largest) })
}

/// A teacher's logits of those rows that it has a say in.
struct Said<'a, W> {
    logits: Rows<W>,
    /// Its share of each row's loss, 0 where it has none.
    shares: &'a [f32],
    /// How many rows before each it has a say in.
    before: Vec<usize>,
    temperature: f32,
}

impl<'a, W: Element> Said<'a, W> {
    fn of(heard: &Heard<'a>, vocabulary: i64) -> Result<Self> {
        let logits = logits::<W>(heard.base, &heard.hidden)?;
        ensure!(logits.size()[1] == vocabulary, "the teacher's vocabulary is another");
        let before = heard.shares.iter().scan(0, |said, &share| {
            let before = *said;
            *said += usize::from(share != 0.0);
            Some(before)
        });
        let (shares, temperature) = (heard.shares, heard.temperature as f32);
        Ok(Self { logits: Rows::of(&logits, vocabulary)?, shares, before: before.collect(), temperature })
    }

    fn of_row(&self, i: usize, weight: f32) -> Option<(&[W], kernels::Lesson)> {
        let (share, temperature) = (self.shares[i], self.temperature);
        let lesson = kernels::Lesson { weight, share, temperature };
        (share != 0.0).then(|| (self.logits.get(self.before[i]), lesson))
    }
}
