//! What prompts of nobody look like.

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use super::products::Products;
use super::{FEATURES, Features};

/// Prompts that are taken at most, so that sums over them are exact in f32.
const PROMPTS_MAX: usize = 1000;

/// Sums over what the base says of its own accord: of a kind that no document belongs to, so that a regression on prompts
/// that were learned also learns what they are unlike. They are added when it is solved and not counted with prompts, for they are
/// the base's and no document's.
#[derive(Debug)]
pub struct Anchors {
    pub(super) count: u64,
    /// Sum of `x x^T`.
    pub(super) products: Products,
    /// Sum of `x`, f32 [1, FEATURES].
    pub(super) sum: Tensor,
}

impl Anchors {
    /// Of nothing.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub fn none() -> Result<Self> {
        let sum = Tensor::f_zeros([1, FEATURES], (Kind::Float, Device::Cpu))?;
        Ok(Self { count: 0, products: Products::default(), sum })
    }

    /// Of such prompts, which may be none.
    ///
    /// # Errors
    /// When there are more than 1,000, or one is empty.
    pub fn new(features: &Features, prompts: &[&[u32]]) -> Result<Self> {
        ensure!(prompts.len() <= PROMPTS_MAX, "more than {PROMPTS_MAX} anchors");
        if prompts.is_empty() {
            return Self::none();
        }
        let (rows, mut products) = (features.of(prompts)?, Products::default());
        ensure!(products.add(&rows)?, "the sums over anchors do not fit");
        Ok(Self {
            count: prompts.len() as u64,
            products,
            sum: rows.f_sum_dim_intlist(&[0_i64][..], true, Kind::Float)?,
        })
    }
}
