//! The gateway over real sockets, on a real ledger, with fakes behind its doors.

mod adapters;
mod admission;
mod arbitrary;
mod bodies;
mod completions;
mod documents;
mod harness;
mod lessons;
mod page;
mod sampling;
mod serving;
mod spec;
mod uploads;
mod vllm;
