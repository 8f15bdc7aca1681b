//! Where what the base makes of a sequence below the adapters is kept: of examples on disk, so that it is there when they
//! are rehearsed; of anchors, which belong to no document, in memory.

use kit::latents::Latents;
use model::pack::Sequence;
use proto::ExampleId;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

/// Hidden states that are kept over batches.
pub struct Recall {
    latents: Arc<Latents>,
    /// What all of them depend on: the base and its form.
    base: String,
    anchors: Anchors,
}

/// The hidden states of anchors by their tokens, once they are computed.
type Anchors = Rc<RefCell<HashMap<Vec<u32>, Option<Vec<u8>>>>>;

impl Recall {
    /// Of a base that `base` tells from every other, and from itself in another precision.
    pub fn new(latents: Arc<Latents>, base: String, anchors: &[Sequence]) -> Self {
        let anchors = anchors.iter().map(|anchor| (anchor.tokens.clone(), None)).collect();
        Self { latents, base, anchors: Rc::new(RefCell::new(anchors)) }
    }

    /// For a learner of these examples, each with its tokens.
    pub fn of(&self, examples: impl Iterator<Item = (Vec<u32>, ExampleId)>) -> Known {
        let (latents, base) = (Arc::clone(&self.latents), self.base.clone());
        Known { latents, base, anchors: Rc::clone(&self.anchors), examples: examples.collect() }
    }
}

/// The examples of one batch, and the anchors.
pub struct Known {
    latents: Arc<Latents>,
    base: String,
    anchors: Anchors,
    examples: HashMap<Vec<u32>, ExampleId>,
}

impl Known {
    /// A hash of all that a hidden state depends on.
    fn from(&self, layer: usize, tokens: &[u32]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.base.as_bytes()).update(&(layer as u64).to_le_bytes());
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        hasher.finalize().into()
    }
}

impl model::latent::Latents for Known {
    fn get(&self, layer: usize, tokens: &[u32]) -> Option<Vec<u8>> {
        let kept = match self.examples.get(tokens) {
            Some(id) => self.latents.get(*id, &self.from(layer, tokens)),
            None => self.anchors.borrow().get(tokens).cloned().flatten(),
        };
        let outcome = if kept.is_some() { "hit" } else { "miss" };
        metrics::counter!("engram:train_latents_total", "outcome" => outcome).increment(1);
        kept
    }

    fn put(&self, layer: usize, tokens: &[u32], state: &[u8]) {
        let Some(id) = self.examples.get(tokens) else {
            if let Some(anchor) = self.anchors.borrow_mut().get_mut(tokens) {
                *anchor = Some(state.to_vec());
            }
            return;
        };
        // Without it the state is computed again, which costs time and nothing else.
        if let Err(error) = self.latents.put(*id, &self.from(layer, tokens), state) {
            tracing::warn!(error = format!("{error:#}"), "hidden states of an example are not kept");
        }
    }
}
