//! The replay buffer: what was learned and is rehearsed, and the batches in which fresh examples
//! are mixed with it.
//!
//! Two halves: [`Settle`] ends the intake lane, by handing a judged document's examples to
//! the ledger; [`Mixer`] starts the learn lane, by reading them from there.

mod answers;
mod buffer;
mod mixer;
mod settle;

pub use buffer::{Buffer, Changes, Row, Strategy};
pub use mixer::{Mixer, Mixing};
pub use settle::{HoldOut, Settle, Settled};
