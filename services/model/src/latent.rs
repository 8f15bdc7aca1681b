//! Latent replay (Pellegrini et al., arXiv 1912.01100): an adapter of the upper layers alone leaves the hidden states
//! below it as the base makes them, so that they are computed once for each sequence and kept.
//!
//! They are kept in the base's precision. So what is learned is what would be learned without: only the sums within a
//! row of another packing are rounded differently.
//! Where a learner multiplies with a base's codes ([`Base::with_codes`]), what is kept is of the base's own weights all the same,
//! and so nearer to what is served than what is computed without.

use anyhow::Result;
use tch::{Device, Tensor};

use crate::llama::{Base, Entry};
use crate::pack::{Packed, Sequence, pack};

/// Keeps hidden states for a learner. It keeps those it wants to; the others are computed again.
pub trait Latents {
    /// What was put for a sequence of these tokens, entering this layer.
    fn get(&self, layer: usize, tokens: &[u32]) -> Option<Vec<u8>>;

    /// Offers what enters layer `layer` for a sequence of these tokens.
    fn put(&self, layer: usize, tokens: &[u32], state: &[u8]);
}

/// Computes what is not kept yet of sequences, and offers it to be kept.
///
/// # Errors
/// When a sequence does not fit the model.
pub fn fill(
    base: &Base,
    layer: usize,
    sequences: &[Sequence],
    latents: &dyn Latents,
    row_tokens: usize,
) -> Result<()> {
    enter(base, layer, sequences, pack(base, sequences, row_tokens)?, latents, row_tokens).map(drop)
}

/// Packed sequences that enter the blocks at layer `layer`, with what is kept of them; the rest is computed.
pub(crate) fn enter(
    base: &Base,
    layer: usize,
    sequences: &[Sequence],
    packed: Packed,
    latents: &dyn Latents,
    row_tokens: usize,
) -> Result<Packed> {
    let _guard = tch::no_grad_guard();
    let (rows, length) = packed.shape();
    let options = (base.placement().kind(), base.device());
    let x = Tensor::f_zeros([rows * length, base.config().hidden_size], options)?;
    let place = |i: usize, state: &Tensor| -> Result<()> {
        x.f_narrow(0, packed.start(i), state.size()[0])?.f_copy_(state)?;
        Ok(())
    };
    let mut missing = Vec::new();
    for (i, sequence) in sequences.iter().enumerate().filter(|(_, sequence)| !sequence.tokens.is_empty()) {
        let kept = latents.get(layer, &sequence.tokens);
        match kept.map(|bytes| read(base, &bytes, sequence.tokens.len())).transpose()?.flatten() {
            Some(state) => place(i, &state)?,
            None => missing.push(i),
        }
    }
    let unknown: Vec<Sequence> = missing.iter().map(|&i| sequences[i].clone()).collect();
    if !unknown.is_empty() {
        let apart = pack(base, &unknown, row_tokens)?;
        let states = base.streams(&apart.input(base.device()), &[layer])?.remove(0);
        for (n, (sequence, &i)) in unknown.iter().zip(&missing).enumerate() {
            let state = states.f_narrow(0, apart.start(n), sequence.tokens.len() as i64)?;
            latents.put(layer, &sequence.tokens, &bytes(&state)?);
            place(i, &state)?;
        }
    }
    Ok(packed.entering(Entry { layer, x }))
}

fn bytes(state: &Tensor) -> Result<Vec<u8>> {
    let state = state.f_contiguous()?.f_to_device(Device::Cpu)?;
    let mut bytes = vec![0; state.numel() * state.f_kind()?.elt_size_in_bytes()];
    state.f_copy_data_u8(&mut bytes, state.numel())?;
    Ok(bytes)
}

/// None where there are too few bytes or too many.
fn read(base: &Base, bytes: &[u8], tokens: usize) -> Result<Option<Tensor>> {
    let (kind, width) = (base.placement().kind(), base.config().hidden_size);
    if bytes.len() != tokens * width as usize * kind.elt_size_in_bytes() {
        return Ok(None);
    }
    Ok(Some(Tensor::f_from_data_size(bytes, &[tokens as i64, width], kind)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};
    use std::collections::HashMap;
    use std::ops::ControlFlow;
    use std::rc::Rc;

    use crate::device::{Placement, Precision};
    use crate::golden;
    use crate::guard::{Former, FormerShares};
    use crate::learner::{Learner, LearnerConfig};
    use crate::lora::{Adapter, LoraConfig};
    use crate::quant::Quantisation;

    #[derive(Clone, Default)]
    struct Kept {
        states: Rc<RefCell<HashMap<Vec<u32>, Vec<u8>>>>,
        hits: Rc<Cell<usize>>,
    }

    impl Latents for Kept {
        fn get(&self, _: usize, tokens: &[u32]) -> Option<Vec<u8>> {
            let state = self.states.borrow().get(tokens).cloned();
            self.hits.set(self.hits.get() + usize::from(state.is_some()));
            state
        }
        fn put(&self, _: usize, tokens: &[u32], state: &[u8]) {
            self.states.borrow_mut().insert(tokens.to_vec(), state.to_vec());
        }
    }

    fn sequences() -> Vec<Sequence> {
        let sequence = |n: u32| Sequence {
            rehearsed: n.is_multiple_of(2),
            ..Sequence::whole((0..5 + 3 * n).map(|i| (i * i * 7 + n * 31) % 128).collect())
        };
        (0..7).map(sequence).collect()
    }

    /// The losses of some steps, and the adapter's distance from the one that was learned without.
    fn compare(placement: Placement) -> (Vec<[f64; 2]>, f64, Kept) {
        let base = Base::load(&golden::dir("llama"), &placement).unwrap();
        let config = LoraConfig::default().in_top_layers(1, base.config()).unwrap();
        let adapter = Adapter::new(config, base.config(), 3).unwrap();
        let shares = FormerShares { fresh: 0.0, rehearsed: 0.5 };
        let kept = Kept::default();
        let mut learners = [false, true].map(|keeps| {
            let config = LearnerConfig { row_tokens: 40, ..LearnerConfig::default() };
            let mut learner = Learner::new(base.share(), &adapter, None, config).unwrap();
            learner.hold_to(Former::new(&base, &adapter, shares).unwrap());
            if keeps {
                learner.remember_in(kept.clone());
            }
            learner
        });
        let batches = [sequences()[..3].to_vec(), sequences(), sequences()];
        let mut losses = Vec::new();
        for batch in batches {
            losses.push(learners.each_mut().map(|learner| {
                let mut go = || ControlFlow::Continue(());
                learner.step(std::slice::from_ref(&batch), 1e-2, &mut go).unwrap().loss
            }));
        }
        let [plain, latent] = learners;
        (losses, golden::distance(plain.adapter().flat(), latent.adapter().flat()), kept)
    }

    #[test]
    fn what_is_learned_is_the_same_and_each_sequence_is_computed_once() {
        for quantisation in [Quantisation::None, Quantisation::Int8] {
            let (losses, distance, kept) = compare(Placement { quantisation, ..Placement::CPU_F32 });
            assert!(losses.iter().all(|[plain, latent]| (plain - latent).abs() < 1e-4), "{losses:?}");
            assert!(losses[2][0] < losses[1][0] && distance < 1e-3, "{losses:?} {distance}");
            assert_eq!((kept.states.borrow().len(), kept.hits.get()), (7, 3 + 7));
        }
    }

    #[test]
    fn in_sixteen_bits_it_stays_near() {
        let (losses, ..) = compare(Placement { precision: Precision::Bf16, ..Placement::CPU_F32 });
        assert!(losses.iter().all(|[plain, latent]| (plain - latent).abs() < 0.02), "{losses:?}");
    }

    #[test]
    fn what_does_not_fit_is_computed_again() {
        let base = golden::base("llama");
        let (kept, sequences) = (Kept::default(), sequences());
        let enter = || {
            let packed = pack(&base, &sequences, 40).unwrap();
            enter(&base, 1, &sequences, packed, &kept, 40).unwrap().input(base.device()).entry.unwrap().x
        };
        let whole = enter();
        kept.states.borrow_mut().values_mut().for_each(|state| state.truncate(8));
        assert!(golden::distance(&whole, &enter()) < 1e-6);
    }

    #[test]
    fn an_adapter_of_all_layers_keeps_nothing() {
        let base = golden::base("llama");
        let mut learner =
            Learner::new(base.share(), &golden::initial(), None, LearnerConfig::default()).unwrap();
        let kept = Kept::default();
        learner.remember_in(kept.clone());
        learner.step(&[sequences()], 1e-2, &mut || ControlFlow::Continue(())).unwrap();
        assert!(kept.states.borrow().is_empty());
    }
}
