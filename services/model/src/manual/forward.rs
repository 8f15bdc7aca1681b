//! The blocks' forward pass, in which each part between two products is one pass over the numbers, and nothing is computed for
//! what rows lack.

use std::marker::PhantomData;
use std::sync::OnceLock;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::attention::{Attended, Span, attend};
use super::int8::{More, Rounding};
use super::low_rank::{LowRank, Source};
use super::rows::{Element, Rows, each, each_alone};
use super::{Way, kernels};
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

/// What adapters add in one layer, by group.
type OfLayer = [Vec<Box<dyn LowRank>>; 4];

/// Packed sequences on their way through a base with adapters.
pub(super) struct Forward<'a, W> {
    pub base: &'a Base,
    /// What adapters add, by layer and group.
    factors: Vec<OfLayer>,
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
        let (mut qkv, low_qkv) = self.times(Way::Forward, (i, Group::Qkv), &attention_norm.out, None)?;
        if let Some(bias) = &layer.qkv_bias {
            qkv = qkv.f_add_(bias)?;
        }
        self.turn(&qkv, 1.0)?;
        let attended = attend::<W>(self.level, c, &self.spans, &qkv)?;
        let (middle, low_o) =
            self.times(Way::Forward, (i, Group::O), &attended.mixed, Some(&attention_norm.x))?;
        let mlp_norm = self.norm(middle, &layer.mlp_norm)?;
        let (gate_up, low_gate_up) = self.times(Way::Forward, (i, Group::GateUp), &mlp_norm.out, None)?;
        let inner = self.gate(&gate_up)?;
        let (out, low_down) = self.times(Way::Forward, (i, Group::Down), &inner, Some(&mlp_norm.x))?;
        let kept =
            Kept { attention_norm, qkv, low_qkv, attended, low_o, mlp_norm, gate_up, low_gate_up, low_down };
        Ok((out, kept))
    }

    /// `x W^T` for a matrix of a block, or on the way back `x W`: the gradient of what it multiplies, where `x` is that of the product.
    /// With what adapters add to it, and `more`. Returns also what `x` comes down to in the
    /// last adapter: a gradient is that of one alone.
    pub fn times(
        &self,
        way: Way,
        (layer, group): (usize, Group),
        x: &Tensor,
        more: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let factors = self.factors(layer, group);
        let mut low: Vec<Tensor> = factors.iter().map(|of| of.down(way, x)).collect::<Result<_>>()?;
        let (product, mut added) = match &self.base.codes {
            Some(codes) => {
                let of_low = factors.iter().zip(&low).map_while(|(of, low)| Some((of.panels(way)?, low)));
                let of_low = of_low.map(|(panels, low)| Ok((panels, Rows::of(low, low.size()[1])?)));
                let rows = more.map(|more| Rows::of(more, more.size()[1])).transpose()?;
                let more = More { rows, low: of_low.collect::<Result<Vec<_>>>()? };
                let added = more.low.len();
                (codes.layers[layer][group as usize].product::<W>(way, x, Rounding::Nearest, more)?, added)
            }
            None => (self.own_times(way, (layer, group), x, more)?, 0),
        };
        while added < factors.len() {
            factors[added].up(way, &low[added], &product)?;
            added += 1;
        }
        Ok((product, low.pop()))
    }

    /// The same of the base's own weights alone.
    fn own_times(
        &self,
        way: Way,
        (layer, group): (usize, Group),
        x: &Tensor,
        more: Option<&Tensor>,
    ) -> Result<Tensor> {
        let weight = self.base.layers[layer].matrices()[group as usize].dense()?;
        let weight = match way {
            Way::Forward => weight.f_tr()?,
            Way::Backward => weight,
        };
        Ok(match more {
            Some(more) => more.f_addmm(x, &weight)?,
            None => x.f_mm(&weight)?,
        })
    }

    /// What adapters add to one matrix.
    pub fn factors(&self, layer: usize, group: Group) -> &[Box<dyn LowRank>] {
        &self.factors[layer][group as usize]
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
fn factors<W: Element>(base: &Base, active: &ActiveAdapters, from: usize) -> Result<Vec<OfLayer>> {
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
    let made: Vec<OnceLock<Box<dyn LowRank>>> = sources.iter().map(|_| OnceLock::new()).collect();
    each_alone(sources.len(), |i| drop(made[i].set(sources[i].read(Level::best()))));
    let mut factors: Vec<OfLayer> = (0..base.layers.len()).map(|_| Default::default()).collect();
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
