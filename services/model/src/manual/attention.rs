//! Attention within each sequence of a packed batch, forward and backward.
//!
//! libtorch's kernel sees rows: of what lies in them side by side it multiplies everything with everything and masks most of
//! it away, and it sets up a product of its own for each block of each head. Here a sequence is its own block, of which
//! only the part that is seen is computed, and the gradient takes the forward pass's log-sums in place of its weights
//! (FlashAttention, arXiv 2205.14135).

use std::ops::Range;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::kernels::{LANES, Real};
use super::rows::{Element, Rows, each_alone};
use super::tiles::{Matrix, TILE, tile, tile_of_transposed};
use crate::cpu::team;
use crate::cpu::vector::{Level, exp, fma, sum, vectorised};
use crate::hf::ModelConfig;

/// Where a sequence lies in the rows of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub start: usize,
    pub tokens: usize,
}

/// What attention gives, and what its gradient needs. Rows are tokens.
pub(super) struct Attended {
    /// [rows, heads * head_dim].
    pub mixed: Tensor,
    /// The logarithm of what each head's weights were divided by, f32 [rows, heads].
    log_sums: Tensor,
}

/// How queries, keys and values lie in a row.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    level: Level,
    heads: usize,
    /// Queries' heads that share one of keys and values.
    group: usize,
    head_dim: usize,
    scale: f32,
}

impl Shape {
    fn of(level: Level, config: &ModelConfig) -> Self {
        let (heads, kv_heads) = (config.heads as usize, config.kv_heads as usize);
        let head_dim = config.head_dim as usize;
        Self { level, heads, group: heads / kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() }
    }

    fn kv_heads(&self) -> usize {
        self.heads / self.group
    }

    /// The first column of a head of keys, and of the same head of values.
    fn key_value(&self, kv_head: usize) -> (usize, usize) {
        ((self.heads + kv_head) * self.head_dim, (self.heads + self.kv_heads() + kv_head) * self.head_dim)
    }
}

/// What is worked on at a time: heads of one sequence that share one of keys and values.
pub(crate) struct Part {
    span: Span,
    kv_head: usize,
    heads: Range<usize>,
}

/// All of them, `together` heads at a time, those of long sequences first, so that no thread begins one when the others end.
fn parts(spans: &[Span], shape: Shape, together: usize) -> Vec<Part> {
    let of_span = |&span: &Span| {
        (0..shape.heads).step_by(together).map(move |head| Part {
            span,
            kv_head: head / shape.group,
            heads: head..head + together,
        })
    };
    let mut parts: Vec<Part> = spans.iter().flat_map(of_span).collect();
    parts.sort_by_key(|part| std::cmp::Reverse(part.span.tokens));
    parts
}

/// What each token takes of those before it in its sequence, and of itself (arXiv 2305.13245). `qkv` holds turned queries and
/// keys, and values, [rows, (heads + 2 * kv_heads) * head_dim].
pub(super) fn attend<W: Element>(
    level: Level,
    config: &ModelConfig,
    spans: &[Span],
    qkv: &Tensor,
) -> Result<Attended> {
    let (shape, rows) = (Shape::of(level, config), qkv.size()[0]);
    let width = (shape.heads * shape.head_dim) as i64;
    let mixed = Tensor::f_empty([rows, width], (W::KIND, Device::Cpu))?;
    clear_rest(&mixed, spans)?;
    // Few long sequences are shared out by heads of queries, for which keys and values are read more than once.
    let busy = spans.len() * shape.kv_heads() >= 4 * team::threads();
    let together = if busy { shape.group } else { 1 };
    let log_sums = Tensor::f_empty([rows, config.heads], (Kind::Float, Device::Cpu))?;
    {
        let (parts, from) = (parts(spans, shape, together), Rows::<W>::of(qkv, qkv.size()[1])?);
        let (out, log_sums) = (Rows::<W>::of(&mixed, width)?, Rows::<f32>::of(&log_sums, config.heads)?);
        each_alone(parts.len(), |i| forward(shape.level, shape, &parts[i], &from, &out, &log_sums));
    }
    Ok(Attended { mixed, log_sums })
}

/// The gradient of `qkv`, where `above` is that of what was mixed.
pub(super) fn attend_backward<W: Element>(
    level: Level,
    config: &ModelConfig,
    spans: &[Span],
    qkv: &Tensor,
    attended: &Attended,
    above: &Tensor,
) -> Result<Tensor> {
    let (shape, out) = (Shape::of(level, config), qkv.f_empty_like()?);
    let width = (shape.heads * shape.head_dim) as i64;
    let parts = parts(spans, shape, shape.group);
    let given = Given {
        qkv: Rows::<W>::of(qkv, qkv.size()[1])?,
        mixed: Rows::of(&attended.mixed, width)?,
        log_sums: Rows::of(&attended.log_sums, config.heads)?,
        above: Rows::of(above, width)?,
    };
    clear_rest(&out, spans)?;
    let of_qkv = Rows::<W>::of(&out, qkv.size()[1])?;
    each_alone(parts.len(), |i| backward(shape.level, shape, &parts[i], &given, &of_qkv));
    Ok(out)
}

/// Rows behind the last sequence are nothing.
fn clear_rest(rows: &Tensor, spans: &[Span]) -> Result<()> {
    let end = spans.last().map_or(0, |span| (span.start + span.tokens) as i64);
    let _ = rows.f_narrow(0, end, rows.size()[0] - end)?.f_zero_()?;
    Ok(())
}

/// What the backward pass is given.
pub(crate) struct Given<W> {
    qkv: Rows<W>,
    mixed: Rows<W>,
    log_sums: Rows<f32>,
    above: Rows<W>,
}

/// Queries whose weights exist at once in the backward pass.
const BLOCK: usize = 8 * TILE;

/// The scores of a tile of queries, from `row` of `queries`, with the first `seen` keys.
#[inline(always)]
fn scores(
    level: Level,

    queries: &Matrix,
    row: usize,
    keys: &Matrix,
    seen: usize,
    d: usize,
    out: &mut Matrix,
) {
    for column in (0..seen).step_by(LANES) {
        out.put_tile(row, column, &tile(level, queries.view(), (row, 0), keys.view(), column, d));
    }
}

vectorised! {
    fn forward [W: Element] [W] (
        shape: Shape,
        part: &Part,
        qkv: &Rows<W>,
        out: &Rows<W>,
        log_sums: &Rows<f32>,
    ) {
        let (Span { start, tokens }, d) = (part.span, shape.head_dim);
        let (of_key, of_value) = shape.key_value(part.kv_head);
        let (mut keys, mut values) = (Matrix::zeros(d, tokens), Matrix::zeros(tokens, d));
        for i in 0..tokens {
            let row = qkv.get(start + i);
            keys.put_column(i, &row[of_key..of_key + d]);
            values.put(i, &row[of_value..of_value + d], 1.0);
        }
        let (mut queries, mut weights) = (Matrix::zeros(TILE, d), Matrix::zeros(TILE, tokens));
        for head in part.heads.clone() {
            for first in (0..tokens).step_by(TILE) {
                let count = TILE.min(tokens - first);
                for i in 0..count {
                    queries.put(i, &qkv.get(start + first + i)[head * d..(head + 1) * d], shape.scale);
                }
                let seen = first + count;
                scores(shape.level, &queries, 0, &keys, seen, d, &mut weights);
                let mut inverses = [0f32; TILE];
                for (i, inverse) in inverses.iter_mut().enumerate().take(count) {
                    let (row, beyond) = weights.row_mut(i)[..seen].split_at_mut(first + i + 1);
                    beyond.fill(0.0);
                    let (most, total) = softmax_masses::<F>(row);
                    *inverse = 1.0 / total;
                    // SAFETY: this head of these tokens is that of this part alone.
                    #[allow(unsafe_code)]
                    let log_sum = unsafe { log_sums.columns_mut(start + first + i, head, 1) };
                    log_sum[0] = most + total.ln();
                }
                for column in (0..d).step_by(LANES) {
                    let sums = tile(shape.level, weights.view(), (0, 0), values.view(), column, seen);
                    let width = LANES.min(d - column);
                    for (i, (sums, inverse)) in sums.iter().zip(inverses).enumerate().take(count) {
                        // SAFETY: as above.
                        #[allow(unsafe_code)]
                        let out = unsafe { out.columns_mut(start + first + i, head * d + column, width) };
                        for (out, sum) in out.iter_mut().zip(sums) {
                            *out = W::of(sum * inverse);
                        }
                    }
                }
            }
        }
    }
}

/// Puts `e^(x - most)` in the place of scores; returns the most and the sum.
#[inline(always)]
fn softmax_masses<const F: bool>(row: &mut [f32]) -> (f32, f32) {
    let mut most = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (most, x) in most.iter_mut().zip(chunk) {
            *most = if *x > *most { *x } else { *most };
        }
    }
    let best = rest.iter().copied().chain(most).fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0f32; LANES];
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (x, sum) in chunk.iter_mut().zip(&mut sums) {
            *x = exp::<F>(*x - best);
            *sum += *x;
        }
    }
    let mut total = 0.0;
    for x in rest {
        *x = exp::<F>(*x - best);
        total += *x;
    }
    (best, total + sum(sums))
}

/// What one block of queries needs, and what comes of it.
struct Block {
    queries: Matrix,
    above: Matrix,
    /// Of each query what it takes of each key.
    weights: Matrix,
    /// The gradient of the scores.
    of_scores: Matrix,
}

vectorised! {
    fn backward [W: Element] [W] (shape: Shape, part: &Part, given: &Given<W>, out: &Rows<W>) {
        let (Span { start, tokens }, d) = (part.span, shape.head_dim);
        let (of_key, of_value) = shape.key_value(part.kv_head);
        let (mut keys, mut by_place) = (Matrix::zeros(d, tokens), Matrix::zeros(tokens, d));
        let mut values = Matrix::zeros(d, tokens);
        for i in 0..tokens {
            let row = given.qkv.get(start + i);
            keys.put_column(i, &row[of_key..of_key + d]);
            by_place.put(i, &row[of_key..of_key + d], 1.0);
            values.put_column(i, &row[of_value..of_value + d]);
        }
        let (mut of_keys, mut of_values) = (Matrix::zeros(tokens, d), Matrix::zeros(tokens, d));
        let rows = BLOCK.min(tokens);
        let mut block = Block {
            queries: Matrix::zeros(rows, d),
            above: Matrix::zeros(rows, d),
            weights: Matrix::loose(rows, tokens),
            of_scores: Matrix::loose(rows, tokens),
        };
        for head in part.heads.clone() {
            for first in (0..tokens).step_by(BLOCK) {
                let count = BLOCK.min(tokens - first);
                for i in 0..count {
                    let (token, columns) = (start + first + i, head * d..(head + 1) * d);
                    block.queries.put(i, &given.qkv.get(token)[columns.clone()], shape.scale);
                    block.above.put(i, &given.above.get(token)[columns], 1.0);
                }
                for row in (0..count).step_by(TILE) {
                    let seen = first + count.min(row + TILE);
                    scores(shape.level, &block.queries, row, &keys, seen, d, &mut block.weights);
                    scores(shape.level, &block.above, row, &values, seen, d, &mut block.of_scores);
                    for i in row..count.min(row + TILE) {
                        let token = start + first + i;
                        let mixed = &given.mixed.get(token)[head * d..(head + 1) * d];
                        let mean = dot::<F, W>(block.above.row(i), mixed);
                        let log_sum = given.log_sums.get(token)[head];
                        let (weights, slopes) = (block.weights.row_mut(i), block.of_scores.row_mut(i));
                        slope::<F>(weights, slopes, first + i + 1, log_sum, mean);
                    }
                    for column in (0..d).step_by(LANES) {
                        let sums = tile(shape.level, block.of_scores.view(), (row, 0), by_place.view(), column, seen);
                        let width = LANES.min(d - column);
                        for i in row..count.min(row + TILE) {
                            let (token, column) = (start + first + i, head * d + column);
                            // SAFETY: this head of these tokens is that of this part alone.
                            #[allow(unsafe_code)]
                            let out = unsafe { out.columns_mut(token, column, width) };
                            for (out, sum) in out.iter_mut().zip(sums[i - row]) {
                                *out = W::of(sum * shape.scale);
                            }
                        }
                    }
                }
                for key in (0..first + count).step_by(TILE) {
                    // Queries before a key do not see it.
                    let inner = key.saturating_sub(first)..count;
                    gather(shape.level, &block.of_scores, key, &block.queries, inner.clone(), d, &mut of_keys);
                    gather(shape.level, &block.weights, key, &block.above, inner, d, &mut of_values);
                }
            }
        }
        for i in 0..tokens {
            for (from, first) in [(&of_keys, of_key), (&of_values, of_value)] {
                // SAFETY: these heads of these tokens are those of this part alone.
                #[allow(unsafe_code)]
                let out = unsafe { out.columns_mut(start + i, first, d) };
                for (out, from) in out.iter_mut().zip(from.row(i)) {
                    *out = W::of(*from);
                }
            }
        }
    }
}

/// Adds to a tile of rows of `to` what comes to keys from queries.
#[inline(always)]
fn gather(
    level: Level,
    a: &Matrix,
    key: usize,
    b: &Matrix,
    queries: Range<usize>,
    d: usize,
    to: &mut Matrix,
) {
    for column in (0..d).step_by(LANES) {
        let sums = tile_of_transposed(level, a.view(), key, b.view(), column, queries.clone());
        for (i, sums) in sums.iter().enumerate() {
            for (to, sum) in to.row_mut(key + i)[column..column + LANES].iter_mut().zip(sums) {
                *to += sum;
            }
        }
    }
}

/// Puts weights in the place of the scores of the first `seen` keys, and the gradient of the scores in the place of that of the
/// weights, of which `mean` is the mean by weight. Nothing is taken of later keys.
#[inline(always)]
fn slope<const F: bool>(weights: &mut [f32], slopes: &mut [f32], seen: usize, log_sum: f32, mean: f32) {
    weights[seen..].fill(0.0);
    slopes[seen..].fill(0.0);
    for (weight, slope) in weights[..seen].iter_mut().zip(&mut slopes[..seen]) {
        *weight = exp::<F>(*weight - log_sum);
        *slope = *weight * (*slope - mean);
    }
}

#[inline(always)]
fn dot<const F: bool, W: Real>(x: &[f32], y: &[W]) -> f32 {
    let mut sums = [0f32; LANES];
    for (x, y) in x.chunks(LANES).zip(y.chunks(LANES)) {
        for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
            *sum = fma::<F>(*x, y.wide(), *sum);
        }
    }
    sum(sums)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::vector::LEVELS;
    use crate::golden;

    const ROWS: i64 = 160;
    /// A sequence of several blocks, one of a single token, one of some, and rows of none.
    const SPANS: [Span; 3] =
        [Span { start: 0, tokens: 130 }, Span { start: 130, tokens: 1 }, Span { start: 131, tokens: 17 }];

    /// Two heads share keys and values, and a head is no whole number of tiles.
    fn config() -> ModelConfig {
        let config = golden::base("llama").config().clone();
        ModelConfig { heads: 4, kv_heads: 2, head_dim: 20, ..config }
    }

    fn numbers(columns: i64, pitch: f64) -> Tensor {
        let numbers = Tensor::arange(ROWS * columns, (Kind::Float, Device::Cpu)).view([ROWS, columns]);
        (numbers * pitch).sin() * 2.0
    }

    /// libtorch's attention of each sequence by itself; rows of none are nothing.
    fn expected(qkv: &Tensor) -> Tensor {
        let heads = |x: Tensor| x.view([x.size()[0], -1, 20]).transpose(0, 1);
        let mut mixed = Vec::new();
        for span in SPANS {
            let rows = qkv.narrow(0, span.start as i64, span.tokens as i64);
            let [q, k, v] =
                [(0, 80), (80, 40), (120, 40)].map(|(from, width)| heads(rows.narrow(1, from, width)));
            let (k, v) = (k.repeat_interleave_self_int(2, 0, None), v.repeat_interleave_self_int(2, 0, None));
            let of_heads =
                Tensor::scaled_dot_product_attention(&q, &k, &v, None::<Tensor>, 0.0, true, None, false);
            mixed.push(of_heads.transpose(0, 1).reshape([-1, 80]));
        }
        mixed.push(Tensor::zeros([ROWS - 148, 80], (Kind::Float, Device::Cpu)));
        Tensor::cat(&mixed, 0)
    }

    #[test]
    fn a_sequence_sees_itself_and_its_gradient_is_that_of_autograd() {
        let (config, above) = (config(), numbers(80, 0.71));
        let qkv = numbers(160, 0.37).set_requires_grad(true);
        let mixed = expected(&qkv);
        let gradient = Tensor::run_backward(&[(&mixed * &above).sum(Kind::Float)], &[&qkv], false, false);
        let qkv = qkv.detach();
        for level in LEVELS.into_iter().filter(|&level| level <= Level::best()) {
            let found = attend::<f32>(level, &config, &SPANS, &qkv).unwrap();
            assert!(golden::distance(&found.mixed, &mixed) < 1e-5);
            // So few that each head of queries is a task.
            let alone = attend::<f32>(level, &config, &SPANS[..1], &qkv).unwrap().mixed;
            assert!(golden::distance(&alone.narrow(0, 0, 130), &mixed.narrow(0, 0, 130)) < 1e-5);
            assert!(alone.narrow(0, 130, ROWS - 130).eq(0).all().int64_value(&[]) == 1);
            let of_qkv = attend_backward::<f32>(level, &config, &SPANS, &qkv, &found, &above).unwrap();
            assert!(golden::distance(&of_qkv, &gradient[0]) < 1e-4);
        }
    }

    #[test]
    fn what_is_no_number_is_none_afterwards() {
        let qkv = numbers(160, 0.37);
        let _ = qkv.get(3).narrow(0, 85, 1).fill_(f64::NAN);
        let mixed = attend::<f32>(Level::best(), &config(), &SPANS, &qkv).unwrap().mixed;
        assert!(mixed.get(3).isfinite().all().int64_value(&[]) == 0);
        assert!(mixed.get(2).isfinite().all().int64_value(&[]) == 1);
    }
}
