//! The mathematics of Engram: a Llama-style model on libtorch, LoRA adapters, and how they learn.
//!
//! Read in this order: [`hf`] (what a model folder says), [`weights`] (safetensors), [`llama`] (the forward
//! pass), [`quant`] (frozen matrices in 8 and 4 bits), [`lora`] (adapters), [`pack`] and [`loss`] (what is
//! learned), [`optim`], [`ewc`] and [`guard`] (how weights move, and what holds them), [`learner`] (one step). [`tokenizer`], [`chat`],
//! [`generate`], [`sampling`] and [`grammar`] are the way to text and back, [`labels`] chooses between given answers.
//! [`device`], [`mps`], [`footprint`] and [`selftest`] are about where it runs.
//!
//! This crate knows nothing of actors, messages or clocks. It runs on whichever thread calls it, which has
//! to be one that the caller owns: a [`tch::Tensor`] may move between threads, but is never shared.

mod active;
pub mod anchor;
mod base;
pub mod batch;
mod cache;
pub mod chat;
mod conversation;
pub mod cpu;
pub mod device;
pub mod distillation;
pub mod embed;
pub mod ewc;
pub mod footprint;
pub mod fuse;
pub mod generate;
pub mod grammar;
pub mod guard;
pub mod hf;
pub mod labels;
pub mod latent;
pub mod learner;
mod limits;
pub mod llama;
pub mod lora;
pub mod loss;
mod manual;
pub mod merge;
pub mod mps;
pub mod optim;
pub mod orthogonal;
pub mod pack;
pub mod passages;
pub mod peft;
mod pieces;
pub mod pretrain;
pub mod quant;
mod recompute;
pub mod ridge;
pub mod sampling;
pub mod selftest;
pub mod stream;
pub mod tokenizer;
mod voice;
pub mod weights;

#[cfg(test)]
mod golden;
