//! What decoding remembers: keys and values of the tokens seen so far.

use tch::Tensor;

use crate::llama::Base;

/// Keys and values of the tokens seen so far, per layer [batch, kv_heads, capacity, head_dim].
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    length: i64,
}

/// The cache grows by this many positions at a time, so that decoding copies it rarely.
const CACHE_BLOCK: i64 = 256;

impl KvCache {
    /// An empty cache for `batch` rows of `base`.
    pub fn new(base: &Base, batch: i64) -> Self {
        let shape = [batch, base.config.kv_heads, 0, base.config.head_dim];
        let empty = || Tensor::empty(shape, (base.placement.kind(), base.placement.device));
        Self { layers: base.layers.iter().map(|_| (empty(), empty())).collect(), length: 0 }
    }

    /// Number of positions held.
    pub fn len(&self) -> i64 {
        self.length
    }

    /// Counts `added` positions, once every layer has appended them.
    pub(crate) fn advance(&mut self, added: i64) {
        self.length += added;
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Appends keys and values [batch, kv_heads, n, head_dim] of one layer; returns all of them.
    pub(crate) fn append(&mut self, layer: usize, key: &Tensor, value: &Tensor) -> (Tensor, Tensor) {
        let (added, held) = (key.size()[2], self.length);
        let (keys, values) = &mut self.layers[layer];
        for (store, new) in [(&mut *keys, key), (&mut *values, value)] {
            if store.size()[2] < held + added {
                let mut shape = store.size();
                shape[2] = (held + added + CACHE_BLOCK - 1) / CACHE_BLOCK * CACHE_BLOCK;
                let larger = Tensor::empty(&shape, (store.kind(), store.device()));
                larger.narrow(2, 0, held).copy_(&store.narrow(2, 0, held));
                *store = larger;
            }
            store.narrow(2, held, added).copy_(new);
        }
        (keys.narrow(2, 0, held + added), values.narrow(2, 0, held + added))
    }
}
