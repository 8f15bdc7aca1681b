//! The blocks' forward pass, in which each part between two products is one pass over the numbers, and nothing is computed for
//! what rows lack.

use std::marker::PhantomData;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::attention::{Attended, Span, attend};
use super::kernels;
use super::rows::{Element, Rows, each};
use crate::active::{ActiveAdapters, Delta};
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
}

/// Packed sequences on their way through a base with adapters.
pub(super) struct Forward<'a, W> {
    pub base: &'a Base,
    active: &'a ActiveAdapters,
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
    pub fn new(base: &'a Base, active: &'a ActiveAdapters, packed: &Packed) -> Result<(Self, Tensor)> {
        let input = packed.input(Device::Cpu);
        let angles = input.positions.f_to_kind(Kind::Float)?.f_view([-1, 1])?.f_mul(&base.frequencies)?;
        let turns = Tensor::f_cat(&[angles.f_cos()?, angles.f_sin()?], 1)?;
        let ((from, x), places) = (base.enter(&input)?, packed.targets(Device::Cpu).0);
        let (mut spans, mut taken) = (Vec::new(), Vec::new());
        let mut rows = vec![0i64; x.size()[0] as usize];
        for (first, tokens) in packed.spans() {
            spans.push(Span { start: taken.len(), tokens });
            for token in first..first + tokens {
                rows[token] = taken.len() as i64;
                taken.push(token as i64);
            }
        }
        let taken = Tensor::from_slice(&taken);
        let forward = Self {
            base,
            active,
            level: Level::best(),
            spans,
            from,
            turns: turns.f_index_select(0, &taken)?,
            places: Tensor::from_slice(&rows).f_index_select(0, &places)?,
            format: PhantomData,
        };
        Ok((forward, x.f_index_select(0, &taken)?))
    }

    /// What the last norm makes of the rows that predict learned tokens.
    pub fn top(&self, x: &Tensor) -> Result<Normed> {
        self.norm(x.f_index_select(0, &self.places)?, &self.base.norm)
    }

    /// What block `i` makes of `x`, and what has to be kept of it.
    pub fn block(&self, i: usize, x: Tensor) -> Result<(Tensor, Kept)> {
        let (c, layer) = (&self.base.config, &self.base.layers[i]);
        let attention_norm = self.norm(x, &layer.attention_norm)?;
        let mut qkv = layer.qkv.product(&attention_norm.out, layer.qkv_bias.as_ref())?;
        let low_qkv = self.add_low_rank(i, Group::Qkv, &attention_norm.out, &mut qkv, &c.qkv_rows())?;
        self.turn(&qkv, 1.0)?;
        let attended = attend::<W>(self.level, c, &self.spans, &qkv)?;
        let mut middle = attention_norm.x.f_addmm(&attended.mixed, &layer.o.dense()?.f_tr()?)?;
        let low_o = self.add_low_rank(i, Group::O, &attended.mixed, &mut middle, &[c.hidden_size])?;
        let mlp_norm = self.norm(middle, &layer.mlp_norm)?;
        let mut gate_up = layer.gate_up.product(&mlp_norm.out, None)?;
        let widths = [c.intermediate_size; 2];
        let low_gate_up = self.add_low_rank(i, Group::GateUp, &mlp_norm.out, &mut gate_up, &widths)?;
        let inner = self.gate(&gate_up)?;
        let mut out = mlp_norm.x.f_addmm(&inner, &layer.down.dense()?.f_tr()?)?;
        self.add_low_rank(i, Group::Down, &inner, &mut out, &[c.hidden_size])?;
        let kept = Kept { attention_norm, qkv, low_qkv, attended, low_o, mlp_norm, gate_up, low_gate_up };
        Ok((out, kept))
    }

    /// What the adapter adds to one matrix, where there is one adapter.
    pub fn delta(&self, layer: usize, group: Group) -> Option<&Delta> {
        self.active.deltas(layer, group).first()
    }

    /// Adds to `product`, in place, what adapters add to it; returns `x A^T` of the last one.
    fn add_low_rank(
        &self,
        layer: usize,
        group: Group,
        x: &Tensor,
        product: &mut Tensor,
        widths: &[i64],
    ) -> Result<Option<Tensor>> {
        let mut last = None;
        for delta in self.active.deltas(layer, group) {
            let low = x.f_linear(&delta.a, None::<&Tensor>)?;
            for part in parts(delta, widths) {
                let of_part = low.f_narrow(1, part.rank, part.ranks)?;
                let _ =
                    product.f_narrow(1, part.column, part.columns)?.f_addmm_(&of_part, &part.b.f_tr()?)?;
            }
            last = Some(low);
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

/// One B of a merged matrix, and where it applies.
pub(super) struct Part<'a> {
    pub rank: i64,
    pub ranks: i64,
    pub column: i64,
    pub columns: i64,
    pub b: &'a Tensor,
}

pub(super) fn parts<'a>(delta: &'a Delta, widths: &'a [i64]) -> impl Iterator<Item = Part<'a>> {
    let mut rank = 0;
    delta.ranks.iter().zip(&delta.parts).map(move |(&ranks, (slice, b))| {
        let column = widths[..*slice].iter().sum();
        let part = Part { rank, ranks, column, columns: widths[*slice], b };
        rank += ranks;
        part
    })
}
