//! Keys and values of the tokens seen so far, in pages that several answers may share.

use half::bf16;
use std::sync::Arc;

/// Positions of a page.
pub const PAGE_TOKENS: usize = 32;

/// How much a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageShape {
    pub layers: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// In bf16, else in f32.
    pub half: bool,
}

impl PageShape {
    /// Keys, or values, of all layers.
    fn len(self) -> usize {
        self.layers * self.kv_heads * self.head_dim * PAGE_TOKENS
    }

    /// Bytes of a page.
    pub fn bytes_len(self) -> usize {
        2 * self.len() * if self.half { 2 } else { 4 }
    }
}

/// Numbers of a page.
pub(super) enum Stored {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

/// Keys and values of [`PAGE_TOKENS`] positions in all layers. A full page is never written to again.
pub struct Page {
    /// [layers, kv_heads, head_dim, positions]: positions side by side, since scores are sums over the others.
    pub(super) keys: Stored,
    /// [layers, kv_heads, positions, head_dim].
    pub(super) values: Stored,
}

impl Page {
    pub(super) fn new(shape: PageShape) -> Self {
        let stored = || {
            if shape.half {
                Stored::Bf16(vec![bf16::ZERO; shape.len()])
            } else {
                Stored::F32(vec![0.0; shape.len()])
            }
        };
        Self { keys: stored(), values: stored() }
    }
}

/// The pages of one answer: those full at the beginning may be shared, the last one is its own.
pub struct Pages {
    shape: PageShape,
    pages: Vec<Arc<Page>>,
    len: usize,
}

impl Pages {
    /// Of an answer that begins with pages of another one, all of them full.
    pub(super) fn new(shape: PageShape, begun: Vec<Arc<Page>>) -> Self {
        Self { shape, len: begun.len() * PAGE_TOKENS, pages: begun }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pages that are full, from the first on.
    pub fn full(&self) -> &[Arc<Page>] {
        &self.pages[..self.len / PAGE_TOKENS]
    }

    pub(super) fn all(&self) -> &[Arc<Page>] {
        &self.pages
    }

    /// Has pages for `added` positions more.
    pub(super) fn make_room(&mut self, added: usize) {
        while self.pages.len() * PAGE_TOKENS < self.len + added {
            self.pages.push(Arc::new(Page::new(self.shape)));
        }
    }

    /// Counts `added` positions, once every layer has written them.
    pub(super) fn advance(&mut self, added: usize) {
        self.len += added;
    }

    /// Writes the keys and values [kv_heads, head_dim] of one layer at a position not yet counted.
    pub(super) fn write(&mut self, layer: usize, position: usize, keys: &[f32], values: &[f32]) {
        let PageShape { kv_heads, head_dim, .. } = self.shape;
        let at = position % PAGE_TOKENS;
        let of_layer = layer * kv_heads * head_dim * PAGE_TOKENS;
        let page = Arc::get_mut(&mut self.pages[position / PAGE_TOKENS]);
        let page = page.expect("a page that is not full belongs to one answer");
        let key_at = |i: usize| of_layer + i * PAGE_TOKENS + at;
        match &mut page.keys {
            Stored::F32(store) => keys.iter().enumerate().for_each(|(i, x)| store[key_at(i)] = *x),
            Stored::Bf16(store) => {
                keys.iter().enumerate().for_each(|(i, x)| store[key_at(i)] = super::vector::narrow(*x));
            }
        }
        for (head, values) in values.chunks(head_dim).enumerate() {
            let start = of_layer + (head * PAGE_TOKENS + at) * head_dim;
            match &mut page.values {
                Stored::F32(store) => store[start..start + head_dim].copy_from_slice(values),
                Stored::Bf16(store) => {
                    let store = &mut store[start..start + head_dim];
                    store.iter_mut().zip(values).for_each(|(to, x)| *to = super::vector::narrow(*x));
                }
            }
        }
    }
}
