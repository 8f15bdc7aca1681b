//! What decoding remembers: keys and values of the tokens seen so far.

use anyhow::Result;
use tch::Tensor;

use crate::llama::Base;

/// Keys and values of the tokens seen so far, per layer [batch, kv_heads, capacity, head_dim].
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    length: i64,
    /// Where each row's next token goes, i64 [batch, 1, 1, 1], where rows hold different numbers of them.
    places: Option<Tensor>,
}

/// The cache grows by this many positions at a time, so that decoding copies it rarely.
const CACHE_BLOCK: i64 = 256;

impl KvCache {
    /// An empty cache for `batch` rows of `base`.
    pub fn new(base: &Base, batch: i64) -> Self {
        let shape = [batch, base.config.kv_heads, 0, base.config.head_dim];
        let empty = || Tensor::empty(shape, (base.placement.kind(), base.placement.device));
        Self { layers: base.layers.iter().map(|_| (empty(), empty())).collect(), length: 0, places: None }
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

    /// Makes it `rows` of `capacity` positions. What has a place in both stays; what is new is zero, since a position that
    /// nobody sees still takes part in sums, with a weight of zero.
    ///
    /// # Errors
    /// When there is no memory for it: then it stays as it was.
    pub(crate) fn resize(&mut self, rows: i64, capacity: i64) -> Result<()> {
        let other = |store: &Tensor| -> Result<Tensor> {
            let mut shape = store.size();
            let (kept_rows, kept) = (rows.min(shape[0]), capacity.min(shape[2]));
            (shape[0], shape[2]) = (rows, capacity);
            let other = Tensor::f_zeros(&shape, (store.f_kind()?, store.device()))?;
            let part = |store: &Tensor| store.narrow(0, 0, kept_rows).narrow(2, 0, kept);
            part(&other).f_copy_(&part(store))?;
            Ok(other)
        };
        let layers = self.layers.iter().map(|(keys, values)| Ok((other(keys)?, other(values)?)));
        self.layers = layers.collect::<Result<_>>()?;
        Ok(())
    }

    /// Empties one row.
    ///
    /// # Errors
    /// When the device fails.
    pub(crate) fn clear(&mut self, row: i64) -> Result<()> {
        for store in self.layers.iter().flat_map(|(keys, values)| [keys, values]) {
            let _ = store.f_narrow(0, row, 1)?.f_zero_()?;
        }
        Ok(())
    }

    /// One row, of which `held` positions are filled: what is appended is written into this cache. It must not grow.
    pub(crate) fn row(&self, row: i64, held: i64) -> Self {
        self.window(row, 1, held, None)
    }

    /// The first rows, to append one token to each, at `places`, i64 [rows]. All see the first `visible` positions.
    pub(crate) fn first_rows(&self, places: &Tensor, visible: i64) -> Self {
        self.window(0, places.size()[0], visible - 1, Some(places.view([-1, 1, 1, 1])))
    }

    fn window(&self, row: i64, rows: i64, length: i64, places: Option<Tensor>) -> Self {
        let part =
            |(keys, values): &(Tensor, Tensor)| (keys.narrow(0, row, rows), values.narrow(0, row, rows));
        Self { layers: self.layers.iter().map(part).collect(), length, places }
    }

    /// Appends keys and values [batch, kv_heads, n, head_dim] of one layer; returns all of them.
    ///
    /// # Errors
    /// When the device fails, as for want of memory.
    pub(crate) fn append(&mut self, layer: usize, key: &Tensor, value: &Tensor) -> Result<(Tensor, Tensor)> {
        let (added, held) = (key.size()[2], self.length);
        let (keys, values) = &mut self.layers[layer];
        for (store, new) in [(&mut *keys, key), (&mut *values, value)] {
            if let Some(places) = &self.places {
                let _ = store.f_scatter_(2, &places.f_expand_as(new)?, new)?;
                continue;
            }
            if store.size()[2] < held + added {
                let mut shape = store.size();
                shape[2] = (held + added + CACHE_BLOCK - 1) / CACHE_BLOCK * CACHE_BLOCK;
                let larger = Tensor::f_empty(&shape, (store.f_kind()?, store.device()))?;
                larger.f_narrow(2, 0, held)?.f_copy_(&store.f_narrow(2, 0, held)?)?;
                *store = larger;
            }
            store.f_narrow(2, held, added)?.f_copy_(new)?;
        }
        Ok((keys.f_narrow(2, 0, held + added)?, values.f_narrow(2, 0, held + added)?))
    }
}
