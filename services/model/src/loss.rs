//! Cross-entropy at the learned tokens only, in chunks, so that the full matrix of logits never exists.
//!
//! The gradient of softmax cross-entropy with respect to the logits is `p - onehot`. Taking it in closed form,
//! a chunk's logits are gone before the next chunk's are made, and autograd only sees the blocks below.

use anyhow::{Context, Result, ensure};
use rand::Rng;
use tch::{Device, Kind, Tensor};

use crate::active::ActiveAdapters;
use crate::distillation::{Opinion, Teacher};
use crate::llama::Base;
use crate::lora::Adapter;
use crate::manual;
use crate::pack::{Packed, Sequence, pack};
use crate::recompute;

/// Rows of logits that exist at once on `device`, of a vocabulary of so many tokens: fewer would make small products, more
/// would be most of what learning takes. Of a student and its teacher there are some copies.
pub fn chunk_rows(vocabulary: i64, device: Device) -> i64 {
    // A GPU of NVIDIA's needs more of them to be busy, and has the memory.
    let (logits, rows) = if device.is_cuda() { (1 << 26, 4096) } else { (1 << 22, 256) };
    (logits / vocabulary.max(1)).clamp(32, rows)
}

/// The logit of a token that has no part in a loss: its probability is nothing, and its logarithm a number.
pub(crate) const UNSAYABLE: f64 = -1e4;

/// Tokens of one forward pass when scoring.
const SCORE_TOKENS: usize = 4096;

/// What one sequence scored.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SequenceScore {
    /// Sum of the negative log-likelihoods of its learned tokens, in nats.
    pub nll_sum: f64,
    /// Number of learned tokens.
    pub tokens: usize,
}

impl SequenceScore {
    /// Mean negative log-likelihood per learned token, in nats; 0 where nothing was learned.
    pub fn mean(&self) -> f64 {
        if self.tokens == 0 { 0.0 } else { self.nll_sum / self.tokens as f64 }
    }
}

/// The score of each sequence under the base with `adapters`, in the order given, without gradients.
///
/// # Errors
/// When a sequence or an adapter does not fit the model.
pub fn score(
    base: &Base,
    adapters: &[(&Adapter, f64)],
    sequences: &[Sequence],
    row_tokens: usize,
) -> Result<Vec<SequenceScore>> {
    let mut scores = Vec::with_capacity(sequences.len());
    each_group(base, adapters, sequences, row_tokens, |packed, hidden| {
        let nll = each_chunk(base, hidden, packed, |_, _, _| Ok(()))?;
        scores.extend(per_sequence(packed, &nll)?);
        Ok(())
    })?;
    Ok(scores)
}

/// As [`score`], and whether the model says what each sequence has learned to the letter: every learned token is
/// the likeliest after those before it, so that an answer without chance in it would be this one.
///
/// # Errors
/// Those of [`score`].
pub fn recite(
    base: &Base,
    adapters: &[(&Adapter, f64)],
    sequences: &[Sequence],
    row_tokens: usize,
) -> Result<Vec<(SequenceScore, bool)>> {
    let mut scores = Vec::with_capacity(sequences.len());
    each_group(base, adapters, sequences, row_tokens, |packed, hidden| {
        let mut likeliest = Vec::with_capacity(packed.learned_tokens());
        let nll = each_chunk(base, hidden, packed, |_, log_probs, targets| {
            let found = log_probs.f_gather(1, targets, false)?.f_ge_tensor(&log_probs.f_amax(-1, true)?)?;
            likeliest.extend(Vec::<bool>::try_from(found.f_squeeze_dim(1)?)?);
            Ok(())
        })?;
        let mut said = vec![true; packed.sequences()];
        packed.owners().zip(likeliest).for_each(|(owner, likeliest)| said[owner] &= likeliest);
        scores.extend(per_sequence(packed, &nll)?.into_iter().zip(said));
        Ok(())
    })?;
    Ok(scores)
}

/// Gives `visit` the packed sequences and the hidden states of their learned tokens, some sequences at a time and in
/// the order given, without gradients.
fn each_group(
    base: &Base,
    adapters: &[(&Adapter, f64)],
    sequences: &[Sequence],
    row_tokens: usize,
    mut visit: impl FnMut(&Packed, &Tensor) -> Result<()>,
) -> Result<()> {
    let _guard = tch::no_grad_guard();
    let active = base.activate(adapters)?;
    for group in groups(sequences, SCORE_TOKENS) {
        let packed = pack(base, group, row_tokens)?;
        visit(&packed, &learned_hidden(base, &active, &packed)?)?;
    }
    Ok(())
}

/// Cuts a list into runs of about `tokens` tokens, of at least one sequence each.
fn groups(sequences: &[Sequence], tokens: usize) -> impl Iterator<Item = &[Sequence]> {
    let mut rest = sequences;
    std::iter::from_fn(move || {
        let mut total = 0;
        let fits = rest.iter().take_while(|sequence| {
            total += sequence.tokens.len();
            total <= tokens
        });
        let count = fits.count().max(1).min(rest.len());
        let (group, after) = rest.split_at(count);
        rest = after;
        (!group.is_empty()).then_some(group)
    })
}

/// Loss and gradient of one micro-batch.
pub struct Gradient {
    /// By sequence.
    pub scores: Vec<SequenceScore>,
    /// The gradient of `weight * sum of NLL`, for each tensor asked for.
    pub gradients: Vec<Tensor>,
}

/// Runs the model forward and backward over packed sequences.
///
/// `weight` scales each learned token's loss: one over the number of tokens for a mean, times the loss scale in
/// f16. `parameters` are leaves that require gradients: an adapter's flat vector, or weights of the base.
///
/// # Errors
/// When there is nothing to learn, or a parameter takes no part in the loss.
pub fn gradient(
    base: &Base,
    adapters: &ActiveAdapters,
    packed: &Packed,
    weight: f64,
    parameters: &[&Tensor],
) -> Result<Gradient> {
    taught_gradient(base, adapters, packed, weight, parameters, None)
}

/// As [`gradient`], of the loss of a student where there is a teacher. Scores are NLL all the same.
///
/// # Errors
/// Those of [`gradient`], and when the teacher's vocabulary is another.
pub fn taught_gradient(
    base: &Base,
    adapters: &ActiveAdapters,
    packed: &Packed,
    weight: f64,
    parameters: &[&Tensor],
    teacher: Option<&Teacher>,
) -> Result<Gradient> {
    let hidden = recorded_hidden(base, adapters, packed)?;
    let opinion = teacher.map(|teacher| teacher.opinion(packed)).transpose()?.flatten();
    let above = above(base, &hidden.detach(), packed, weight, opinion.as_ref())?;
    // A scalar whose gradients are the ones just found, so that autograd carries on from there. A head that is
    // tied to the embedding gets both of its shares this way.
    let mut carrier = hidden.f_mul(&above.hidden)?.f_sum(Kind::Float)?;
    if let Some(gradient) = &above.head {
        carrier = carrier.f_add(&base.head.f_mul(gradient)?.f_sum(Kind::Float)?)?;
    }
    let gradients = Tensor::f_run_backward(&[carrier], parameters, false, false)?;
    ensure!(gradients.iter().all(Tensor::defined), "a parameter takes no part in the loss");
    Ok(Gradient { scores: above.scores, gradients })
}

/// Loss, and gradient of an adapter's flat vector, of one micro-batch. `weight` is that of [`gradient`].
///
/// # Errors
/// When there is nothing to learn, or the adapter does not fit the base.
pub fn adapter_gradient(
    base: &Base,
    adapter: &Adapter,
    packed: &Packed,
    weight: f64,
    teacher: Option<&Teacher>,
) -> Result<(Vec<SequenceScore>, Tensor)> {
    if manual::applies(base) {
        return manual::adapter_gradient(base, adapter, packed, weight, teacher);
    }
    if base.is_quantised() {
        // Autograd would keep the dense copy of every block until its backward pass.
        return recompute::adapter_gradient(base, adapter, packed, weight, teacher);
    }
    let leaf = adapter.flat().f_detach()?.f_set_requires_grad(true)?;
    let adapter = adapter.with_flat(leaf.shallow_clone())?;
    let active = base.activate(&[(&adapter, 1.0)])?;
    let mut result = taught_gradient(base, &active, packed, weight, &[&leaf], teacher)?;
    let gradient = result.gradients.pop().context("no gradient")?;
    Ok((result.scores, gradient))
}

/// For each learned token one that the model would have said in its place, drawn from its distribution.
pub(crate) fn drawn(base: &Base, adapter: &Adapter, packed: &Packed, rng: &mut impl Rng) -> Result<Vec<i64>> {
    let _guard = tch::no_grad_guard();
    let hidden = learned_hidden(base, &base.activate(&[(adapter, 1.0)])?, packed)?;
    let mut drawn: Vec<i64> = Vec::with_capacity(packed.learned_tokens());
    let _ = each_chunk(base, &hidden, packed, |rows, log_probs, _| {
        // The first token up to which they sum to more than a number between 0 and 1: on the CPU, for f64 is not everywhere.
        let sums = log_probs.f_exp()?.f_to_device(Device::Cpu)?.f_cumsum(-1, Kind::Double)?;
        let numbers: Vec<f64> = (0..rows.size()[0]).map(|_| rng.random()).collect();
        let below = sums.f_le_tensor(&Tensor::from_slice(&numbers).f_unsqueeze(1)?)?;
        let first = below.f_sum_dim_intlist(-1i64, false, Kind::Int64)?;
        drawn.extend(Vec::<i64>::try_from(first.f_clamp_max(base.config().vocab_size - 1)?)?);
        Ok(())
    })?;
    Ok(drawn)
}

/// What lies above the blocks: the scores, and the gradients that come down from the head.
pub(crate) struct Above {
    /// By sequence.
    pub scores: Vec<SequenceScore>,
    /// With respect to the learned hidden states, [learned tokens, hidden_size].
    pub hidden: Tensor,
    /// With respect to the head, where it is trained.
    pub head: Option<Tensor>,
}

/// Scores and gradients of `weight * sum of NLL` for hidden states of the learned tokens.
pub(crate) fn above(
    base: &Base,
    hidden: &Tensor,
    packed: &Packed,
    weight: f64,
    opinion: Option<&Opinion>,
) -> Result<Above> {
    ensure!(packed.learned_tokens() > 0, "nothing to learn: no sequence has a learned token");
    let _guard = tch::no_grad_guard();
    let alike = |other: &Base| manual::applies(other) && other.placement().kind() == base.placement().kind();
    let by_hand = manual::applies(base) && opinion.is_none_or(|opinion| alike(opinion.base()));
    if by_hand && !base.head.requires_grad() {
        return manual::above_in_place(base, hidden, packed, weight, opinion);
    }
    let mut chunks = Vec::new();
    let mut head: Option<Tensor> = None;
    let mut start = 0;
    let nll = each_chunk(base, hidden, packed, |rows, log_probs, targets| {
        let mut above = match opinion {
            Some(opinion) => opinion.gradient(start, log_probs, targets)?,
            None => {
                let ones = Tensor::f_full(targets.size(), -1.0, (Kind::Float, targets.device()))?;
                log_probs.f_exp_()?.f_scatter_add_(1, targets, &ones)?
            }
        };
        start += rows.size()[0];
        let above = above.f_mul_scalar_(weight)?;
        let above = above.f_to_kind(base.placement().kind())?;
        chunks.push(above.f_matmul(&base.head)?);
        if base.head.requires_grad() {
            let part = above.f_tr()?.f_matmul(rows)?.f_to_kind(Kind::Float)?;
            head = Some(match head.take() {
                Some(sum) => sum.f_add(&part)?,
                None => part,
            });
        }
        Ok(())
    })?;
    Ok(Above { scores: per_sequence(packed, &nll)?, hidden: Tensor::f_cat(&chunks, 0)?, head })
}

/// As [`recorded_hidden`], without gradients.
pub(crate) fn learned_hidden(base: &Base, adapters: &ActiveAdapters, packed: &Packed) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    if manual::applies(base) && packed.learned_tokens() > 0 {
        return manual::learned_hidden(base, adapters, packed);
    }
    recorded_hidden(base, adapters, packed)
}

/// The hidden states that predict learned tokens, [learned tokens, hidden_size].
pub(crate) fn recorded_hidden(base: &Base, adapters: &ActiveAdapters, packed: &Packed) -> Result<Tensor> {
    if packed.learned_tokens() == 0 {
        return Ok(Tensor::f_zeros(
            [0, base.config().hidden_size],
            (base.placement().kind(), base.device()),
        )?);
    }
    let hidden = base.forward(&packed.input(base.device()), adapters, None)?;
    Ok(hidden.f_index_select(0, &packed.targets(base.device()).0)?)
}

/// Gives `visit` the hidden rows, log-probabilities and targets [rows, 1] of one chunk after the other; returns
/// the NLL of every learned token, f32 on the base's device.
fn each_chunk(
    base: &Base,
    hidden: &Tensor,
    packed: &Packed,
    mut visit: impl FnMut(&Tensor, &mut Tensor, &Tensor) -> Result<()>,
) -> Result<Tensor> {
    let targets = packed.targets(base.device()).1.f_unsqueeze(1)?;
    let total = packed.learned_tokens() as i64;
    let mut nll = vec![Tensor::f_zeros([0], (Kind::Float, base.device()))?];
    let rows = chunk_rows(base.config().vocab_size, base.device());
    for start in (0..total).step_by(rows as usize) {
        let count = rows.min(total - start);
        let (rows, targets) = (hidden.f_narrow(0, start, count)?, targets.f_narrow(0, start, count)?);
        let mut logits = base.logits(&rows)?;
        if let Some(spared) = packed.spared() {
            let spared = spared.by.f_narrow(0, start, count)?.f_logical_and(&spared.tokens)?;
            logits = logits.f_masked_fill_(&spared, UNSAYABLE)?;
        }
        let mut log_probs = logits.f_log_softmax(-1, Kind::Float)?;
        nll.push(log_probs.f_gather(1, &targets, false)?.f_squeeze_dim(1)?.f_neg()?);
        visit(&rows, &mut log_probs, &targets)?;
    }
    Ok(Tensor::f_cat(&nll, 0)?)
}

pub(crate) fn per_sequence(packed: &Packed, nll: &Tensor) -> Result<Vec<SequenceScore>> {
    let mut values = vec![0f32; packed.learned_tokens()];
    nll.f_to_device(Device::Cpu)?.f_copy_data(&mut values, packed.learned_tokens())?;
    let mut scores = vec![SequenceScore::default(); packed.sequences()];
    for (owner, value) in packed.owners().zip(values) {
        scores[owner].nll_sum += f64::from(value);
        scores[owner].tokens += 1;
    }
    Ok(scores)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    fn sequences() -> Vec<Sequence> {
        let make = |length: u32, seed: u32| {
            Sequence::whole((0..length).map(|i| (i * i * 7 + seed * 31) % 128).collect())
        };
        let mut all = vec![make(5, 1), make(40, 2), make(17, 3), make(1, 4), make(0, 5), make(23, 6)];
        all[2].learned = vec![(3, 9), (12, 17)];
        all
    }

    #[test]
    fn packed_loss_equals_unpacked() {
        let base = golden::base("llama");
        let adapter = golden::adapter("peft-r8");
        let adapters = [(&adapter, 1.0)];
        let alone: Vec<_> = sequences()
            .iter()
            .map(|s| score(&base, &adapters, std::slice::from_ref(s), 1).unwrap()[0])
            .collect();
        for row_tokens in [1, 40, 64, 256] {
            for (one, packed) in alone.iter().zip(score(&base, &adapters, &sequences(), row_tokens).unwrap())
            {
                assert_eq!(one.tokens, packed.tokens);
                assert!((one.nll_sum - packed.nll_sum).abs() < 1e-3, "{one:?} {packed:?}");
            }
        }
    }

    #[test]
    fn what_is_recited_is_what_the_model_would_say() {
        let base = golden::base("llama");
        let adapter = golden::adapter("peft-r8");
        let adapters = [(&adapter, 1.0)];
        let active = base.activate(&adapters).unwrap();
        let next = |tokens: &[u32]| {
            let ids =
                Tensor::from_slice(&tokens.iter().map(|&t| i64::from(t)).collect::<Vec<_>>()).unsqueeze(0);
            let last = golden::logits(&base, &active, &ids).select(1, tokens.len() as i64 - 1);
            last.argmax(-1, false).int64_value(&[0]) as u32
        };
        let mut tokens = vec![3, 1, 4, 1, 5];
        while tokens.len() < 9 {
            tokens.push(next(&tokens));
        }
        let answer = |tokens: &[u32]| Sequence { learned: vec![(5, 9)], ..Sequence::whole(tokens.to_vec()) };
        let mut all = vec![answer(&tokens)];
        for place in 5..9 {
            let mut other = tokens.clone();
            other[place] = (other[place] + 1) % 128;
            all.push(answer(&other));
        }
        let recited = recite(&base, &adapters, &all, 64).unwrap();
        assert_eq!(
            recited.iter().map(|(_, said)| *said).collect::<Vec<_>>(),
            [true, false, false, false, false]
        );
        let scores = score(&base, &adapters, &all, 64).unwrap();
        assert_eq!(recited.into_iter().map(|(score, _)| score).collect::<Vec<_>>(), scores);
    }

    #[test]
    fn chunked_gradient_equals_autograd() {
        let base = golden::base("llama");
        let adapter = golden::adapter("peft-r8");
        let flat = adapter.flat().copy().set_requires_grad(true);
        let adapter = adapter.with_flat(flat.shallow_clone()).unwrap();
        // More learned tokens than one chunk holds.
        let many: Vec<Sequence> = (0..5).flat_map(|_| sequences()).collect();
        let packed = pack(&base, &many, 64).unwrap();
        assert!(packed.learned_tokens() as i64 > chunk_rows(base.config().vocab_size, base.device()));
        let active = base.activate(&[(&adapter, 1.0)]).unwrap();
        let ours = gradient(&base, &active, &packed, 0.01, &[&flat]).unwrap();

        let active = base.activate(&[(&adapter, 1.0)]).unwrap();
        let hidden = recorded_hidden(&base, &active, &packed).unwrap();
        let targets = packed.targets(base.device()).1;
        let loss = base.logits(&hidden).unwrap().cross_entropy_loss(
            &targets,
            None::<Tensor>,
            tch::Reduction::Sum,
            -100,
            0.0,
        ) * 0.01;
        let theirs = Tensor::run_backward(&[&loss], &[&flat], false, false);
        let size = theirs[0].abs().max().double_value(&[]);
        assert!(golden::distance(&ours.gradients[0], &theirs[0]) < 1e-5 * size);
        let sum: f64 = ours.scores.iter().map(|s| s.nll_sum).sum();
        assert!((sum * 0.01 - loss.double_value(&[])).abs() < 1e-4);
    }

    #[test]
    fn spared_tokens_have_no_part_in_the_loss_of_those_who_do_not_say_them() {
        let base = golden::base("llama");
        let adapter = golden::adapter("peft-r8");
        let say = |tokens: [u32; 4]| Sequence { learned: vec![(2, 4)], ..Sequence::whole(tokens.to_vec()) };
        let sequences = [say([1, 2, 3, 4]), say([1, 2, 3, 50]), say([50, 51, 3, 4])];
        let spared: Vec<bool> = (0..128).map(|token| token == 50 || token == 51).collect();
        let packed = pack(&base, &sequences, 4).unwrap().sparing(&spared, base.device());
        let flat = adapter.flat().copy().set_requires_grad(true);
        let adapter = adapter.with_flat(flat.shallow_clone()).unwrap();
        let ours =
            gradient(&base, &base.activate(&[(&adapter, 1.0)]).unwrap(), &packed, 1.0, &[&flat]).unwrap();

        let hidden = recorded_hidden(&base, &base.activate(&[(&adapter, 1.0)]).unwrap(), &packed).unwrap();
        // The second sequence says 50, and so makes 51 less likely; the others have both only in their prompts.
        let saying: Vec<bool> = packed.owners().map(|owner| owner == 1).collect();
        let others = Tensor::from_slice(&saying).logical_not().unsqueeze(1);
        let left_out = others.logical_and(&Tensor::from_slice(&spared).unsqueeze(0));
        let logits = base.logits(&hidden).unwrap().masked_fill(&left_out, f64::NEG_INFINITY);
        let targets = packed.targets(base.device()).1;
        let loss = logits.cross_entropy_loss(&targets, None::<Tensor>, tch::Reduction::Sum, -100, 0.0);
        let theirs = Tensor::run_backward(&[&loss], &[&flat], false, false);
        let size = theirs[0].abs().max().double_value(&[]);
        assert!(golden::distance(&ours.gradients[0], &theirs[0]) < 1e-5 * size);
        let sum: f64 = ours.scores.iter().map(|s| s.nll_sum).sum();
        assert!((sum - loss.double_value(&[])).abs() < 1e-4);
    }

    #[test]
    fn tokens_are_drawn_as_often_as_the_model_would_say_them() {
        let base = golden::base("llama");
        let adapter = golden::adapter("peft-r8");
        let sequence = Sequence { learned: vec![(3, 4)], ..Sequence::whole(vec![1, 2, 3, 4]) };
        // The same place 4000 times.
        let packed = pack(&base, &vec![sequence; 4000], 64).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let drawn = drawn(&base, &adapter, &packed, &mut rng).unwrap();
        let ids = Tensor::from_slice(&[1i64, 2, 3]).view([1, 3]);
        let logits = golden::logits(&base, &base.activate(&[(&adapter, 1.0)]).unwrap(), &ids);
        let likely = Vec::<f64>::try_from(logits.select(1, 2).softmax(-1, Kind::Double).view([-1])).unwrap();
        let mut counts = vec![0.0; likely.len()];
        drawn.iter().for_each(|&token| counts[token as usize] += 1.0);
        let chi_square: f64 =
            counts.iter().zip(&likely).map(|(count, p)| (count - 4000.0 * p).powi(2) / (4000.0 * p)).sum();
        // Of 127 degrees of freedom: 127 and sixteen in the mean, and five deviations.
        assert!(chi_square < 127.0 + 5.0 * 16.0, "{chi_square}");
    }

    #[test]
    fn nothing_to_learn_is_an_error_and_scores_zero() {
        let base = golden::base("llama");
        let empty = Sequence { tokens: vec![1, 2, 3], ..Sequence::default() };
        assert_eq!(score(&base, &[], std::slice::from_ref(&empty), 8).unwrap()[0], SequenceScore::default());
        let packed = pack(&base, &[empty], 8).unwrap();
        assert!(gradient(&base, &ActiveAdapters::none(), &packed, 1.0, &[]).is_err());
    }
}
