//! The blocks' forward pass, in which each part between two products is one pass over the numbers, and nothing is computed for
//! what rows lack.

use std::marker::PhantomData;
use std::sync::OnceLock;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::attention::{Attended, Span, attend};
use super::kernels;
use super::low_rank::{Factors, Source};
use super::rows::{Element, Rows, each, each_alone};
use crate::active::ActiveAdapters;
use crate::cpu::vector::Level;
use crate::llama::Base;
use crate::lora::Group;
use crate::pack::Packed;

/// A norm's output, and what its gradient needs.
pub(super) struct Normed {
    pub x: Tensor,
    pub out: Tensor,
    /// f32 [rows].
    pub inverse: Tensor,
}

/// What the forward pass of one block leaves for its backward pass. Rows are tokens.
pub(super) struct Kept {
    pub attention_norm: Normed,
    /// Queries and keys turned, [rows, query rows + key rows + value rows].
    pub qkv: Tensor,
    pub low_qkv: Option<Tensor>,
    pub attended: Attended,
    pub low_o: Option<Tensor>,
    pub mlp_norm: Normed,
    pub gate_up: Tensor,
    pub low_gate_up: Option<Tensor>,
    pub low_down: Option<Tensor>,
}

/// Packed sequences on their way through a base with adapters.
pub(super) struct Forward<'a, W> {
    pub base: &'a Base,
    /// What adapters add, by layer and group.
    factors: Vec<[Vec<Factors>; 4]>,
    pub level: Level,
    pub spans: Vec<Span>,
    /// Where the blocks are entered.
    pub from: usize,
    /// Cosines, then sines of each token's angles, f32 [rows, head_dim].
    turns: Tensor,
    /// The row that predicts each learned token.
    pub places: Tensor,
    format: PhantomData<W>,
}

impl<'a, W: Element> Forward<'a, W> {
    /// With what enters the first block, [rows, hidden_size]. Rows are the tokens of sequences, without what fills up the packed
    /// rows.
    pub fn new(base: &'a Base, active: &ActiveAdapters, packed: &Packed) -> Result<(Self, Tensor)> {
        let input = packed.unmasked(Device::Cpu);
        let angles = input.positions.f_to_kind(Kind::Float)?.f_view([-1, 1])?.f_mul(&base.frequencies)?;
        let turns = Tensor::f_cat(&[angles.f_cos()?, angles.f_sin()?], 1)?;
        let ((from, x), places) = (base.enter(&input)?, packed.targets(Device::Cpu).0);
        let (mut spans, mut taken) = (Vec::new(), Vec::new());
        let mut rows = vec![0i64; x.size()[0] as usize];
        for (first, tokens) in packed.spans() {
            spans.push(Span { start: taken.len(), tokens });
            for (token, row) in rows.iter_mut().enumerate().skip(first).take(tokens) {
                *row = taken.len() as i64;
                taken.push(token as i64);
            }
        }
        let taken = Tensor::from_slice(&taken);
        let round = if base.codes.is_none() && W::KIND == Kind::BFloat16 { ROUND } else { 1 };
        let rounded = |rows: &Tensor| rounded_up(&rows.f_index_select(0, &taken)?, round);
        let forward = Self {
            base,
            factors: factors::<W>(base, active, from)?,
            level: Level::best(),
            spans,
            from,
            turns: rounded(&turns)?,
            places: Tensor::from_slice(&rows).f_index_select(0, &places)?,
            format: PhantomData,
        };
        Ok((forward, rounded(&x)?))
    }

    /// What the last norm makes of the rows that predict learned tokens.
    pub fn top(&self, x: &Tensor) -> Result<Normed> {
        self.norm(x.f_index_select(0, &self.places)?, &self.base.norm)
    }

    /// What block `i` makes of `x`, and what has to be kept of it.
    pub fn block(&self, i: usize, x: Tensor) -> Result<(Tensor, Kept)> {
        let (c, layer) = (&self.base.config, &self.base.layers[i]);
        let attention_norm = self.norm(x, &layer.attention_norm)?;
        let mut qkv = self.times(i, Group::Qkv, &attention_norm.out, None)?;
        if let Some(bias) = &layer.qkv_bias {
            qkv = qkv.f_add_(bias)?;
        }
        let low_qkv = self.add_low_rank(i, Group::Qkv, &attention_norm.out, &qkv)?;
        self.turn(&qkv, 1.0)?;
        let attended = attend::<W>(self.level, c, &self.spans, &qkv)?;
        let middle = self.times(i, Group::O, &attended.mixed, Some(&attention_norm.x))?;
        let low_o = self.add_low_rank(i, Group::O, &attended.mixed, &middle)?;
        let mlp_norm = self.norm(middle, &layer.mlp_norm)?;
        let gate_up = self.times(i, Group::GateUp, &mlp_norm.out, None)?;
        let low_gate_up = self.add_low_rank(i, Group::GateUp, &mlp_norm.out, &gate_up)?;
        let inner = self.gate(&gate_up)?;
        let out = self.times(i, Group::Down, &inner, Some(&mlp_norm.x))?;
        let low_down = self.add_low_rank(i, Group::Down, &inner, &out)?;
        let kept =
            Kept { attention_norm, qkv, low_qkv, attended, low_o, mlp_norm, gate_up, low_gate_up, low_down };
        Ok((out, kept))
    }

    /// `x W^T` for a matrix of block `i`, and `more` added to it.
    fn times(&self, i: usize, group: Group, x: &Tensor, more: Option<&Tensor>) -> Result<Tensor> {
        if let Some(codes) = &self.base.codes {
            return codes.layers[i][group as usize].product::<W>(x, more);
        }
        let transposed = self.base.layers[i].matrices()[group as usize].dense()?.f_tr()?;
        Ok(match more {
            Some(more) => more.f_addmm(x, &transposed)?,
            None => x.f_mm(&transposed)?,
        })
    }

    /// `above W` for a matrix of block `i`: the gradient of what it multiplies, where `above` is that of the product.
    pub fn times_backward(&self, i: usize, group: Group, above: &Tensor) -> Result<Tensor> {
        if let Some(codes) = &self.base.codes {
            return codes.layers[i][group as usize].product_backward::<W>(above);
        }
        Ok(above.f_mm(&self.base.layers[i].matrices()[group as usize].dense()?)?)
    }

    /// What the adapter adds to one matrix, where there is one adapter.
    pub fn factors(&self, layer: usize, group: Group) -> Option<&Factors> {
        self.factors[layer][group as usize].first()
    }

    /// Adds to `product`, in place, what adapters add to it; returns `x A^T` of the last one.
    fn add_low_rank(
        &self,
        layer: usize,
        group: Group,
        x: &Tensor,
        product: &Tensor,
    ) -> Result<Option<Tensor>> {
        let mut last = None;
        for factors in &self.factors[layer][group as usize] {
            last = Some(factors.add_to::<W>(x, product)?);
        }
        Ok(last)
    }

    fn norm(&self, x: Tensor, weight: &Tensor) -> Result<Normed> {
        let (width, epsilon) = (x.size()[1], self.base.config.rms_norm_eps as f32);
        let (x, out) = (x.f_contiguous()?, x.f_empty_like()?);
        let inverse = Tensor::f_empty([x.size()[0]], (Kind::Float, Device::Cpu))?;
        let (rows, outs) = (Rows::<W>::of(&x, width)?, Rows::<W>::of(&out, width)?);
        let (inverses, weights) = (Rows::<f32>::of(&inverse, 1)?, Rows::<f32>::of(weight, width)?);
        let level = self.level;
        each(rows.len(), |i| {
            // SAFETY: row i is that of this call alone.
            #[allow(unsafe_code)]
            let (out, inverse) = unsafe { (outs.get_mut(i), inverses.get_mut(i)) };
            kernels::norm(level, rows.get(i), weights.get(0), epsilon, out, &mut inverse[0]);
        });
        Ok(Normed { x, out, inverse })
    }

    /// Turns queries and keys in place to their positions, or with a negative `sign` back.
    pub fn turn(&self, qkv: &Tensor, sign: f32) -> Result<()> {
        let (c, [q, k, v]) = (&self.base.config, self.base.config.qkv_rows());
        let width = c.head_dim as usize;
        let (rows, turns) = (Rows::<W>::of(qkv, q + k + v)?, Rows::<f32>::of(&self.turns, c.head_dim)?);
        let level = self.level;
        each(rows.len(), |i| {
            // SAFETY: row i is that of this call alone.
            #[allow(unsafe_code)]
            let row = unsafe { rows.get_mut(i) };
            let (cos, sin) = turns.get(i).split_at(width / 2);
            for head in row[..(q + k) as usize].chunks_exact_mut(width) {
                kernels::turn(level, head, cos, sin, sign);
            }
        });
        Ok(())
    }

    pub fn gate(&self, gate_up: &Tensor) -> Result<Tensor> {
        let (rows, width) = (gate_up.size()[0], self.base.config.intermediate_size);
        let out = Tensor::f_empty([rows, width], (W::KIND, Device::Cpu))?;
        let (rows, outs) = (Rows::<W>::of(gate_up, 2 * width)?, Rows::<W>::of(&out, width)?);
        let level = self.level;
        each(rows.len(), |i| {
            // SAFETY: row i is that of this call alone.
            #[allow(unsafe_code)]
            let out = unsafe { outs.get_mut(i) };
            kernels::gate(level, rows.get(i), out);
        });
        Ok(out)
    }
}

/// What adapters add in the layers from `from` on, by layer and group.
fn factors<W: Element>(base: &Base, active: &ActiveAdapters, from: usize) -> Result<Vec<[Vec<Factors>; 4]>> {
    let c = &base.config;
    let groups = [
        (Group::Qkv, c.qkv_rows().to_vec()),
        (Group::O, vec![c.hidden_size]),
        (Group::GateUp, vec![c.intermediate_size; 2]),
        (Group::Down, vec![c.hidden_size]),
    ];
    let (mut places, mut sources) = (Vec::new(), Vec::new());
    for layer in from..base.layers.len() {
        for (group, widths) in &groups {
            for delta in active.deltas(layer, *group) {
                places.push((layer, *group));
                sources.push(Source::<W>::of(delta, widths)?);
            }
        }
    }
    let made: Vec<OnceLock<Factors>> = sources.iter().map(|_| OnceLock::new()).collect();
    each_alone(sources.len(), |i| drop(made[i].set(sources[i].read(Level::best()))));
    let mut factors: Vec<[Vec<Factors>; 4]> = (0..base.layers.len()).map(|_| Default::default()).collect();
    for ((layer, group), made) in places.into_iter().zip(made) {
        factors[layer][group as usize].extend(made.into_inner());
    }
    Ok(factors)
}

/// oneDNN, which multiplies bf16, compiles a product anew for each number of rows: so there are few numbers of rows.
const ROUND: i64 = 16;

/// With rows of zeros at the end up to a multiple of `round`.
fn rounded_up(rows: &Tensor, round: i64) -> Result<Tensor> {
    let lacking = (-rows.size()[0]).rem_euclid(round);
    Ok(rows.f_constant_pad_nd([0, 0, 0, lacking])?)
}
