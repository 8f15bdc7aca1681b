//! What a loss makes of the last hidden states: logits in chunks, and in their place their gradient, which goes back through the head.

use anyhow::{Result, ensure};
use half::bf16;
use tch::{Device, Kind, Tensor};

use super::int8::{BaseCodes, More, Rounding};
use super::rows::{Element, Rows, each, with_room};
use super::{Way, kernels};
use crate::cpu::vector::Level;
use crate::distillation::Opinion;
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
    let count = packed.learned_tokens();
    let most = loss::chunk_rows(base.config().vocab_size, base.device()) as usize;
    // All panels of codes are turned for each chunk; and of a logit there are nine bytes here at most, a teacher's and f32, where the
    // footprint has 24.
    let most = if base.codes.is_some() { 3 * most } else { most };
    let above = Tensor::f_zeros([count as i64, hidden.size()[1]], (W::KIND, Device::Cpu))?;
    let nll = Tensor::f_zeros([count as i64], (Kind::Float, Device::Cpu))?;
    let said = |i: &usize| opinion.is_some_and(|opinion| opinion.shares()[*i] != 0.0);
    let (taught, alone): (Vec<usize>, Vec<usize>) = (0..count).partition(said);
    for (rows, opinion) in [(alone, None), (taught, opinion)] {
        for (chunk, rows) in rows.chunks(most).enumerate() {
            let at = Tensor::from_slice(&rows.iter().map(|&row| row as i64).collect::<Vec<_>>());
            let of = |all: &Tensor| all.f_index_select(0, &at);
            let targets = of(&targets)?;
            let mut logits = logits::<W>(base, &of(hidden)?)?;
            if let Some(spared) = packed.spared() {
                let spared = of(&spared.by)?.f_logical_and(&spared.tokens)?;
                logits = logits.f_masked_fill_(&spared, loss::UNSAYABLE)?;
            }
            let said = opinion.map(|opinion| Said::<W>::of(opinion, chunk * most, rows)).transpose()?;
            let found = loss_gradient(&logits, &targets, weight, said.as_ref())?;
            let _ = nll.shallow_clone().f_index_copy_(0, &at, &found)?;
            let below = match &base.codes {
                Some(codes) => below_codes::<W>(base, codes, &logits, &targets)?,
                None => logits.f_matmul(&base.head)?,
            };
            let _ = above.shallow_clone().f_index_copy_(0, &at, &below)?;
        }
    }
    Ok(Above { scores: loss::per_sequence(packed, &nll)?, hidden: above, head: None })
}

/// In the base's own format.
fn logits<W: Element>(base: &Base, hidden: &Tensor) -> Result<Tensor> {
    Ok(match &base.codes {
        Some(codes) => codes.head.product::<W>(Way::Forward, hidden, Rounding::Nearest, More::default())?,
        None => hidden.f_linear(&base.head, None::<&Tensor>)?,
    })
}

/// The gradient of the hidden states [rows, hidden_size] whose logits have the gradient `above`, which is spent.
fn below_codes<W: Element>(
    base: &Base,
    codes: &BaseCodes,
    above: &Tensor,
    targets: &Tensor,
) -> Result<Tensor> {
    // A target's number is as large as all others of its row together, which beside it would round to nothing: it goes its own way.
    // Of the others most are smaller than a step, all the more of what a teacher says: they are right on average.
    let at = targets.f_unsqueeze(1)?;
    let of_targets = above.f_gather(1, &at, false)?;
    let others = above.shallow_clone().f_scatter_value_(1, &at, 0.0)?;
    let below = codes.head.product::<W>(Way::Backward, &others, Rounding::OnAverage, More::default())?;
    Ok(below.f_add(&base.head.f_index_select(0, targets)?.f_mul(&of_targets)?)?)
}

/// Puts in the place of logits [rows, vocabulary] the gradient of `weight` times the loss, which is the NLL's sum but for the share
/// that a teacher has. Returns the NLL of each row.
fn loss_gradient<W: Element>(
    logits: &Tensor,
    targets: &Tensor,
    weight: f64,
    said: Option<&Said<'_, W>>,
) -> Result<Tensor> {
    let (level, vocabulary, weight) = (Level::best(), logits.size()[1], weight as f32);
    let width = vocabulary as usize;
    let targets: Vec<i64> = targets.try_into()?;
    let nll = Tensor::f_zeros([targets.len() as i64], (Kind::Float, Device::Cpu))?;
    let (rows, out) = (Rows::<W>::of(logits, vocabulary)?, Rows::<f32>::of(&nll, 1)?);
    ensure!(
        rows.len() == targets.len() && targets.iter().all(|target| (0..vocabulary).contains(target)),
        "targets do not fit the logits"
    );
    ensure!(said.is_none_or(|said| said.logits.width() == width), "the teacher's vocabulary is another");
    each(targets.len(), |i| {
        // SAFETY: row i is that of this call alone.
        #[allow(unsafe_code)]
        let (row, nll) = unsafe { (rows.get_mut(i), &mut out.get_mut(i)[0]) };
        let target = targets[i] as usize;
        match said {
            Some(said) => with_room(3 * width, |room| {
                let lesson = kernels::Lesson { weight, share: said.share(i), temperature: said.temperature };
                kernels::student(level, row, said.logits.get(i), target, lesson, room, nll);
            }),
            None => with_room(width, |room| kernels::cross_entropy(level, row, target, weight, room, nll)),
        }
    });
    Ok(nll)
}

/// What a teacher says of some rows.
struct Said<'a, W> {
    logits: Rows<W>,
    /// Its share of the loss of all rows of the micro-batch.
    shares: &'a [f32],
    /// Which of them these are.
    rows: &'a [usize],
    temperature: f32,
}

impl<'a, W: Element> Said<'a, W> {
    /// Of `rows`, of which the first is the one numbered `first` of those that it has a say in.
    fn of(opinion: &'a Opinion, first: usize, rows: &'a [usize]) -> Result<Self> {
        let hidden = opinion.hidden().f_narrow(0, first as i64, rows.len() as i64)?;
        let logits = logits::<W>(opinion.base(), &hidden)?;
        let logits = Rows::of(&logits, logits.size()[1])?;
        Ok(Self { logits, shares: opinion.shares(), rows, temperature: opinion.temperature() as f32 })
    }

    fn share(&self, i: usize) -> f32 {
        self.shares[self.rows[i]]
    }
}
