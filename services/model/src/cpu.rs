//! The forward pass of answers on a CPU: many answers at once, whatever their lengths and adapters.
//!
//! Decoding reads every weight for a few rows, so that reading is all there is to do; libtorch spends its time on
//! the hundreds of small operations around it, and on products that are slow for single rows. Here a pass is a loop
//! over layers with about ten parts each, shared out among some threads, and the products are ours. Activations are
//! f32; rows are rounded to what a product takes.
//!
//! What is computed for a token depends on the tokens before it and on its adapters alone, to the last bit: not on
//! what else is in the batch, on how a prompt was cut, or on how many threads there are.

mod adapters;
#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod dot;
mod frozen;
mod huge;
mod pages;
mod prefixes;
mod product;
pub(crate) mod team;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod trust;
pub(crate) mod vector;

pub use adapters::CpuAdapters;
pub use pages::{PAGE_TOKENS, Page, Pages};
pub use prefixes::Prefixes;

use anyhow::{Context, Result, ensure};
use std::ops::Range;
use std::sync::Arc;
use tch::{Device, Kind};

use crate::generate::to_vec;
use crate::hf::ModelConfig;
use crate::llama::Base;
use crate::lora::{Adapter, Group};
use crate::quant::{BLOCK, Matrix, Quantisation};
use adapters::LowRank;
use attention::attend;
use frozen::Frozen;
use pages::PageShape;
use product::{Formats, Operand, Weight};
use team::Team;
use vector::{Level, rms_norm, rotate, silu_times};

/// The weights of one block.
struct Layer {
    attention_norm: Frozen<f32>,
    qkv: Weight,
    qkv_bias: Option<Vec<f32>>,
    qk_norm: Option<[Frozen<f32>; 2]>,
    o: Weight,
    mlp_norm: Frozen<f32>,
    gate_up: Weight,
    down: Weight,
}

/// What one answer brings to a pass: some tokens after those it has had.
pub struct Span<'a> {
    /// The tokens, at least one.
    pub ids: &'a [u32],
    /// What is added to the base.
    pub adapters: &'a Arc<CpuAdapters>,
    /// Its tokens so far; these are added.
    pub pages: &'a mut Pages,
    /// Whether the logits after its last token are wanted.
    pub speaks: bool,
}

/// A base, ready for passes on the CPU.
pub struct Cpu {
    config: ModelConfig,
    level: Level,
    team: Team,
    pages: PageShape,
    embedding: Weight,
    head: Weight,
    norm: Frozen<f32>,
    layers: Vec<Layer>,
    frequencies: Frozen<f32>,
    /// What the products of blocks need of their rows.
    formats: Formats,
    room: Room,
}

/// Where a pass keeps its numbers; kept from pass to pass.
#[derive(Default)]
struct Room {
    /// The residual stream, [rows, hidden_size].
    x: Vec<f32>,
    normed: Operand,
    qkv: Vec<f32>,
    mixed: Operand,
    gate_up: Vec<f32>,
    inner: Operand,
    /// What a block adds to the stream.
    added: Vec<f32>,
    /// `x A^T` of each group of rows.
    low: Vec<Vec<f32>>,
}

/// What all layers of one pass share.
struct Pass<'a> {
    rows: Vec<Row>,
    /// Cosines and sines of each row's position, [rows, head_dim].
    turns: Vec<f32>,
    alike: Vec<Alike<'a>>,
    formats: Formats,
}

/// Rows with the same adapters.
struct Alike<'a> {
    rows: Range<usize>,
    adapters: &'a CpuAdapters,
}

/// Where a row of the batch belongs.
#[derive(Clone, Copy)]
struct Row {
    span: usize,
    position: usize,
}

impl Cpu {
    /// Takes up a base; none when it is not on the CPU.
    ///
    /// # Errors
    /// When its weights are not as a base has them.
    pub fn new(base: &Base) -> Result<Option<Self>> {
        Self::build(base, false)
    }

    /// The same with a copy in bf16 of each f32 matrix that has the same numbers in it, as those of most checkpoints
    /// do: the sums stay what they are to the last bit, and half as many bytes are read for them.
    ///
    /// # Errors
    /// As for [`Cpu::new`].
    pub fn narrow(base: &Base) -> Result<Option<Self>> {
        Self::build(base, true)
    }

    fn build(base: &Base, narrow: bool) -> Result<Option<Self>> {
        if base.device() != Device::Cpu {
            return Ok(None);
        }
        let _guard = tch::no_grad_guard();
        let (config, level) = (base.config().clone(), trust::level()?);
        // Where there are products of pairs of bf16, rows would be rounded for them.
        let narrow = narrow && level >= Level::Avx2 && level < Level::Avx512Bf16;
        let view = |matrix: &Matrix| view(matrix, narrow);
        let layer = |layer: &crate::base::Layer| -> Result<Layer> {
            let qk_norm = match &layer.qk_norm {
                Some([query, key]) => Some([Frozen::new(query)?, Frozen::new(key)?]),
                None => None,
            };
            Ok(Layer {
                attention_norm: Frozen::new(&layer.attention_norm)?,
                qkv: view(&layer.qkv)?,
                qkv_bias: match &layer.qkv_bias {
                    Some(bias) => Some(to_vec(&bias.f_to_kind(Kind::Float)?)?),
                    None => None,
                },
                qk_norm,
                o: view(&layer.o)?,
                mlp_norm: Frozen::new(&layer.mlp_norm)?,
                gate_up: view(&layer.gate_up)?,
                down: view(&layer.down)?,
            })
        };
        let layers: Vec<Layer> = base.layers.iter().map(layer).collect::<Result<_>>()?;
        let matrices = layers.iter().flat_map(|l| [&l.qkv, &l.o, &l.gate_up, &l.down]);
        let formats = matrices.clone().map(|matrix| matrix.formats(level));
        let formats = formats.fold(Formats::default(), Formats::and);
        let head = view(&head(base, level)?)?;
        huge::gather(matrices.chain([&head]).flat_map(Weight::memory));
        Ok(Some(Self {
            pages: PageShape {
                layers: config.layers as usize,
                kv_heads: config.kv_heads as usize,
                head_dim: config.head_dim as usize,
                half: base.placement().kind() != Kind::Float,
            },
            team: Team::new(tch::get_num_threads().max(1) as usize),
            embedding: Weight::of(&base.embedding)?,
            head,
            norm: Frozen::new(&base.norm)?,
            frequencies: Frozen::new(&base.frequencies)?,
            room: Room::default(),
            config,
            level,
            layers,
            formats,
        }))
    }

    /// Computes as on a lesser processor.
    #[cfg(test)]
    fn set_level(&mut self, level: Level) {
        self.level = level;
        let matrices = self.layers.iter().flat_map(|l| [&l.qkv, &l.o, &l.gate_up, &l.down]);
        self.formats = matrices.map(|matrix| matrix.formats(level)).fold(Formats::default(), Formats::and);
    }

    /// Bytes that [`PAGE_TOKENS`] tokens of an answer take.
    pub fn page_bytes(&self) -> usize {
        self.pages.bytes_len()
    }

    /// An answer that begins with these full pages of another one.
    pub fn begin(&self, begun: Vec<Arc<Page>>) -> Pages {
        Pages::new(self.pages, begun)
    }

    /// Makes adapters ready for passes on this base.
    ///
    /// # Errors
    /// As [`Base::activate`].
    pub fn activate(base: &Base, adapters: &[(&Adapter, f64)]) -> Result<CpuAdapters> {
        let c = base.config();
        let (gate_up, hidden) = ([c.intermediate_size; 2], [c.hidden_size]);
        CpuAdapters::new(&base.activate(adapters)?, &[&c.qkv_rows(), &hidden, &gate_up, &hidden])
    }

    /// Reads the tokens of all spans; gives the logits of those that speak, one for each token of the vocabulary.
    ///
    /// # Errors
    /// When a token is beyond the vocabulary.
    pub fn forward(&mut self, spans: &mut [Span<'_>]) -> Result<Vec<Option<Vec<f32>>>> {
        let vocabulary = self.config.vocab_size;
        let known = spans.iter().flat_map(|span| span.ids).all(|&id| i64::from(id) < vocabulary);
        ensure!(known, "there are ids beyond the vocabulary");
        let mut rows = Vec::new();
        for (span, s) in spans.iter_mut().enumerate() {
            rows.extend((0..s.ids.len()).map(|i| Row { span, position: s.pages.len() + i }));
            s.pages.make_room(s.ids.len());
        }
        let alike = alike(spans);
        let formats = alike.iter().map(|a| a.adapters.formats(self.level)).fold(self.formats, Formats::and);
        let pass = Pass { turns: self.turns(&rows), rows, alike, formats };
        self.embed(spans);
        for i in 0..self.layers.len() {
            self.attention(i, spans, &pass);
            self.feed_forward(i, &pass);
        }
        for span in spans.iter_mut() {
            span.pages.advance(span.ids.len());
        }
        self.speak(spans)
    }

    /// As [`Pass::turns`].
    fn turns(&self, rows: &[Row]) -> Vec<f32> {
        let turn = |row: &Row| {
            let angles = self.frequencies.iter().map(|f| row.position as f32 * f);
            let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|angle| (angle.cos(), angle.sin())).unzip();
            [cos, sin].concat()
        };
        rows.iter().flat_map(turn).collect()
    }

    fn embed(&mut self, spans: &[Span<'_>]) {
        let hidden = self.config.hidden_size as usize;
        let rows = spans.iter().map(|span| span.ids.len()).sum::<usize>();
        self.room.x.resize(rows * hidden, 0.0);
        let ids = spans.iter().flat_map(|span| span.ids);
        for (id, out) in ids.zip(self.room.x.chunks_mut(hidden)) {
            self.embedding.row(*id as usize, out);
        }
    }

    /// The first half of block `i`.
    fn attention(&mut self, i: usize, spans: &mut [Span<'_>], pass: &Pass<'_>) {
        let Pass { rows, turns, alike, formats } = pass;
        let Self { config: c, level, team, pages: shape, layers, room, .. } = self;
        let (layer, level, shape) = (&layers[i], *level, *shape);
        let (width, epsilon) = (shape.head_dim, c.rms_norm_eps as f32);
        let [q, k, v] = c.qkv_rows().map(|n| n as usize);
        norm(team, level, &room.x, &layer.attention_norm, epsilon, &mut room.normed);
        room.normed.convert(team, level, *formats);
        let added = Added { alike, layer: i, group: Group::Qkv };
        added.project(team, level, &layer.qkv, &room.normed, &mut room.low, &mut room.qkv);
        let scale = 1.0 / (width as f32).sqrt();
        team.parts(&mut room.qkv, q + k + v, |row, qkv| {
            if let Some(bias) = &layer.qkv_bias {
                qkv.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
            }
            let (cos, sin) = turns[row * width..(row + 1) * width].split_at(width / 2);
            for (at, head) in qkv[..q + k].chunks_mut(width).enumerate() {
                if let Some(norms) = &layer.qk_norm {
                    let x = head.to_vec();
                    rms_norm(level, &x, &norms[usize::from(at * width >= q)], epsilon, head);
                }
                rotate(level, head, cos, sin, if at * width < q { scale } else { 1.0 });
            }
        });
        for (row, qkv) in rows.iter().zip(room.qkv.chunks(q + k + v)) {
            spans[row.span].pages.write(i, row.position, &qkv[q..q + k], &qkv[q + k..]);
        }
        let (of_group, spans) = (q / shape.kv_heads, &*spans);
        room.mixed.make_room(rows.len(), q);
        let qkv = &room.qkv;
        team.parts(&mut room.mixed.values, of_group, |part, out| {
            let (row, head) = (part / shape.kv_heads, part % shape.kv_heads);
            let Row { span, position } = rows[row];
            let queries = &qkv[row * (q + k + v) + head * of_group..][..of_group];
            attend(level, spans[span].pages.all(), shape, (i, head), position + 1, queries, out);
        });
        room.mixed.convert(team, level, *formats);
        let added = Added { group: Group::O, ..added };
        added.project(team, level, &layer.o, &room.mixed, &mut room.low, &mut room.added);
        room.x.iter_mut().zip(&room.added).for_each(|(x, added)| *x += added);
    }

    /// The second half of block `i`.
    fn feed_forward(&mut self, i: usize, pass: &Pass<'_>) {
        let Pass { alike, formats, .. } = pass;
        let Self { config: c, level, team, layers, room, .. } = self;
        let (layer, level, inner) = (&layers[i], *level, c.intermediate_size as usize);
        norm(team, level, &room.x, &layer.mlp_norm, c.rms_norm_eps as f32, &mut room.normed);
        room.normed.convert(team, level, *formats);
        let added = Added { alike, layer: i, group: Group::GateUp };
        added.project(team, level, &layer.gate_up, &room.normed, &mut room.low, &mut room.gate_up);
        room.inner.make_room(room.normed.rows(), inner);
        let gate_up = &room.gate_up;
        team.parts(&mut room.inner.values, inner, |row, out| {
            let (gate, up) = gate_up[row * 2 * inner..(row + 1) * 2 * inner].split_at(inner);
            out.copy_from_slice(gate);
            silu_times(level, out, up);
        });
        room.inner.convert(team, level, *formats);
        let added = Added { group: Group::Down, ..added };
        added.project(team, level, &layer.down, &room.inner, &mut room.low, &mut room.added);
        room.x.iter_mut().zip(&room.added).for_each(|(x, added)| *x += added);
    }

    /// The logits after the last token of each span that speaks.
    fn speak(&mut self, spans: &[Span<'_>]) -> Result<Vec<Option<Vec<f32>>>> {
        let Self { config: c, level, team, room, norm, head, .. } = self;
        let (level, hidden, epsilon) = (*level, c.hidden_size as usize, c.rms_norm_eps as f32);
        let speaking = spans.iter().filter(|span| span.speaks).count();
        room.normed.make_room(speaking, hidden);
        let (mut end, mut outs) = (0, room.normed.values.chunks_mut(hidden));
        for span in spans {
            end += span.ids.len();
            if span.speaks {
                let out = outs.next().context("a row for each that speaks")?;
                rms_norm(level, &room.x[(end - 1) * hidden..end * hidden], norm, epsilon, out);
            }
        }
        room.normed.convert(team, level, head.formats(level));
        let mut logits = vec![0.0; speaking * head.outputs];
        let band = band(team, head.outputs);
        team.bands(&mut logits, head.outputs, band, |band| head.product(level, &room.normed, 0, band));
        let mut logits = logits.chunks(head.outputs).map(<[f32]>::to_vec);
        Ok(spans.iter().map(|span| if span.speaks { logits.next() } else { None }).collect())
    }
}

/// A view of a base's matrix, or with `narrow` of a copy in bf16, where that has the same numbers.
fn view(matrix: &Matrix, narrow: bool) -> Result<Weight> {
    if let Matrix::Dense(wide) = matrix
        && narrow
        && wide.f_kind()? == Kind::Float
    {
        let half = wide.f_to_kind(Kind::BFloat16)?;
        if half.f_to_kind(Kind::Float)?.f_equal(wide)? {
            return Weight::of(&half);
        }
    }
    Weight::of_matrix(matrix)
}

/// The head that answers are decoded with: in 8 bits where the rest of the base is quantised, for it is the largest
/// matrix of a small base, and is read for every token. Learning keeps the head as it is.
fn head(base: &Base, level: Level) -> Result<Matrix> {
    let fits = level >= Level::Avx2 && base.config().hidden_size % BLOCK == 0;
    let quantisation = if base.is_quantised() && fits { Quantisation::Int8 } else { Quantisation::None };
    Matrix::new(base.head.shallow_clone(), quantisation)
}

/// Spans next to each other with the same adapters.
fn alike<'a>(spans: &[Span<'a>]) -> Vec<Alike<'a>> {
    let mut row = 0;
    let mut alike = Vec::new();
    for spans in spans.chunk_by(|x, y| Arc::ptr_eq(x.adapters, y.adapters)) {
        let rows = row..row + spans.iter().map(|span| span.ids.len()).sum::<usize>();
        row = rows.end;
        alike.push(Alike { rows, adapters: spans[0].adapters });
    }
    alike
}

/// What adapters add to one matrix.
#[derive(Clone, Copy)]
struct Added<'a> {
    alike: &'a [Alike<'a>],
    layer: usize,
    group: Group,
}

impl Added<'_> {
    /// The product of `x` with `weight` and what the adapters of each row add to it.
    fn project(
        self,
        team: &mut Team,
        level: Level,
        weight: &Weight,
        x: &Operand,
        low: &mut Vec<Vec<f32>>,
        out: &mut Vec<f32>,
    ) {
        let with = self.alike.iter().filter_map(|alike| {
            alike.adapters.get(self.layer, self.group).map(|low_rank| (alike.rows.clone(), low_rank))
        });
        let with: Vec<(Range<usize>, &LowRank)> = with.collect();
        low.resize_with(low.len().max(with.len()), Vec::new);
        for ((rows, low_rank), low) in with.iter().zip(&mut *low) {
            let ranks = low_rank.a.outputs;
            low.resize(rows.len() * ranks, 0.0);
            let band = band(team, ranks);
            team.bands(low, ranks, band, |band| low_rank.a.product(level, x, rows.start, band));
        }
        let (low, width) = (&*low, weight.outputs);
        out.resize(x.rows() * width, 0.0);
        let band = band(team, width);
        team.bands(out, width, band, |band| {
            weight.product(level, x, 0, band);
            for ((rows, low_rank), low) in with.iter().zip(low) {
                for (row, low) in rows.clone().zip(low.chunks(low_rank.a.outputs)) {
                    for part in &low_rank.parts {
                        let start = band.first.max(part.first);
                        let end = (band.first + band.count).min(part.first + part.b.inputs);
                        if start < end {
                            let (low, first) = (&low[part.low..][..part.b.outputs], band.first);
                            let out = &mut band.row(row)[start - first..end - first];
                            part.b.add_low_rank(level, low, start - part.first, out);
                        }
                    }
                }
            }
        });
    }
}

/// Columns that one thread takes at a time: several bands for each, and no more weights than stay near.
fn band(team: &Team, width: usize) -> usize {
    (width / (8 * team.threads())).next_multiple_of(16).clamp(16, 128)
}

fn norm(team: &mut Team, level: Level, x: &[f32], weight: &[f32], epsilon: f32, out: &mut Operand) {
    let width = weight.len();
    out.make_room(x.len() / width, width);
    team.parts(&mut out.values, width, |row, out| {
        rms_norm(level, &x[row * width..(row + 1) * width], weight, epsilon, out);
    });
}

#[cfg(test)]
mod tests;
