//! Attention of one token's query heads over the pages of its answer.

use super::pages::{PAGE_TOKENS, Page, PageShape, Stored};
use super::vector::{Level, Number, exp, fma, vectorised};
use std::sync::Arc;

/// What the query heads of one group, which share keys and values, make of the first `seen` positions: [heads,
/// head_dim], for queries of the same shape that are scaled already.
pub(super) fn attend(
    level: Level,
    pages: &[Arc<Page>],
    shape: PageShape,
    (layer, kv_head): (usize, usize),
    seen: usize,
    queries: &[f32],
    out: &mut [f32],
) {
    let (size, width) = (shape.head_dim * PAGE_TOKENS, shape.head_dim);
    let start = (layer * shape.kv_heads + kv_head) * size;
    let heads = queries.len() / width;
    let padded = seen.next_multiple_of(PAGE_TOKENS);
    let mut scores = vec![0f32; heads * padded];
    for (i, page) in pages[..padded / PAGE_TOKENS].iter().enumerate() {
        let scores = &mut scores[i * PAGE_TOKENS..];
        match &page.keys {
            Stored::F32(keys) => score(level, &keys[start..start + size], queries, padded, scores),
            Stored::Bf16(keys) => score(level, &keys[start..start + size], queries, padded, scores),
        }
    }
    for (scores, out) in scores.chunks_mut(padded).zip(out.chunks_mut(width)) {
        soften(level, &mut scores[..seen]);
        out.fill(0.0);
        for (scores, page) in scores[..seen].chunks(PAGE_TOKENS).zip(pages) {
            match &page.values {
                Stored::F32(values) => mix(level, &values[start..start + size], scores, out),
                Stored::Bf16(values) => mix(level, &values[start..start + size], scores, out),
            }
        }
    }
}

vectorised! {
    /// The products of each query with the keys of a page, [head_dim, positions]; one query's scores are `stride`
    /// after the other's.
    fn score [W: Number] [W] (keys: &[W], queries: &[f32], stride: usize, scores: &mut [f32]) {
        let keys = keys.as_chunks::<PAGE_TOKENS>().0;
        for (head, query) in queries.chunks_exact(keys.len()).enumerate() {
            let mut sums = [0f32; PAGE_TOKENS];
            for (keys, x) in keys.iter().zip(query) {
                for (sum, key) in sums.iter_mut().zip(keys) {
                    *sum = fma::<F>(*x, key.wide(), *sum);
                }
            }
            scores[head * stride..][..PAGE_TOKENS].copy_from_slice(&sums);
        }
    }
}

vectorised! {
    /// Softmax.
    fn soften [] [] (scores: &mut [f32]) {
        let mut largest = [f32::NEG_INFINITY; 16];
        for chunk in scores.chunks(16) {
            for (largest, score) in largest.iter_mut().zip(chunk) {
                *largest = if *score > *largest { *score } else { *largest };
            }
        }
        let largest = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
        let mut sums = [0f32; 16];
        for chunk in scores.chunks_mut(16) {
            for (score, sum) in chunk.iter_mut().zip(&mut sums) {
                *score = exp::<F>(*score - largest);
                *sum += *score;
            }
        }
        let inverse = 1.0 / super::vector::sum(sums);
        for score in scores {
            *score *= inverse;
        }
    }
}

vectorised! {
    /// Adds the values of a page, [positions, head_dim], each times its score.
    fn mix [W: Number] [W] (values: &[W], scores: &[f32], out: &mut [f32]) {
        let width = out.len();
        let (chunks, rest) = out.as_chunks_mut::<64>();
        let done = 64 * chunks.len();
        for (i, out) in chunks.iter_mut().enumerate() {
            let mut sums = *out;
            for (score, values) in scores.iter().zip(values.chunks_exact(width)) {
                for (sum, value) in sums.iter_mut().zip(&values[64 * i..64 * (i + 1)]) {
                    *sum = fma::<F>(*score, value.wide(), *sum);
                }
            }
            *out = sums;
        }
        if !rest.is_empty() {
            for (score, values) in scores.iter().zip(values.chunks_exact(width)) {
                for (sum, value) in rest.iter_mut().zip(&values[done..]) {
                    *sum = fma::<F>(*score, value.wide(), *sum);
                }
            }
        }
    }
}
