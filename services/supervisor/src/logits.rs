//! `engram logits`: what a base, or a base with an adapter, computes. Needs no server.

use crate::base;
use anyhow::{Context, Result, bail, ensure};
use model::device::{DeviceChoice, Placement, PrecisionChoice};
use model::llama::{Base, Input};
use model::lora::Adapter;
use model::quant::Quantisation;
use model::weights;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  engram logits --base ./stories --ids ids.safetensors --out logits.safetensors
  engram logits --base ./stories --adapter ./medical --ids ids.safetensors --out logits.safetensors";

/// Which model is looked at, and how it is computed.
#[derive(Debug, clap::Args)]
pub struct ModelArgs {
    /// The base: a folder in the Hugging Face form, org/name on the Hugging Face hub, or `nano`.
    #[arg(long, value_name = "DIR|ORG/NAME")]
    base: String,
    /// An adapter for it: a folder in the PEFT form.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// auto, cpu, cuda or mps.
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// auto, f32, bf16 or f16; f32 unless said otherwise, so that figures compare across machines.
    #[arg(long, default_value = "f32")]
    precision: PrecisionChoice,
    /// How the base's matrices are stored: none (in its precision), int8 or nf4.
    #[arg(long, default_value = "none")]
    quantisation: Quantisation,
}

impl ModelArgs {
    /// The folder of the base; one on the hub is downloaded when it is not there.
    pub fn base_dir(&self) -> Result<PathBuf> {
        base::find(&self.base, &base::data_dir()?)
    }

    /// Loads the base in this folder, and the adapter if there is one.
    pub fn load(&self, base_dir: &Path) -> Result<(Base, Option<Adapter>)> {
        let placement = Placement::resolve(self.device, self.precision, self.quantisation)?;
        let base = Base::load(base_dir, &placement)?;
        let adapter = match &self.adapter {
            Some(dir) => Some(Adapter::read_peft(dir, base.config())?),
            None => None,
        };
        Ok((base, adapter))
    }
}

/// What `engram logits` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Holds `input_ids`: int64 [batch, length].
    #[arg(long, value_name = "FILE")]
    ids: PathBuf,
    /// Gets `logits`: float32 [batch, length, vocabulary].
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Writes the logits of each position.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let (base, adapter) = args.model.load(&args.model.base_dir()?)?;
    let mut tensors = weights::read_tensors(&args.ids)?;
    let name = args.ids.display();
    let ids = tensors.remove("input_ids").with_context(|| format!("{name} has no tensor input_ids"))?;
    let (batch, length) = match ids.size()[..] {
        [batch, length] if batch > 0 && length > 0 => (batch, length),
        _ => bail!("input_ids in {name} has to be [batch, length], and not empty"),
    };
    let vocabulary = base.config().vocab_size;
    let (least, most) = (ids.f_min()?.f_int64_value(&[])?, ids.f_max()?.f_int64_value(&[])?);
    ensure!(
        0 <= least && most < vocabulary,
        "input_ids in {name} has ids beyond the vocabulary of {vocabulary}"
    );
    let active: Vec<_> = adapter.iter().map(|adapter| (adapter, 1.0)).collect();
    let active = base.activate(&active)?;
    let hidden = base.forward(&Input::rows(ids.f_to(base.device())?, 0), &active, None)?;
    let logits = base.logits(&hidden)?.f_view([batch, length, vocabulary])?;
    let bytes = weights::to_bytes(&[("logits".to_owned(), logits)], "format", "pt")?;
    fs::write(&args.out, bytes).with_context(|| format!("{} cannot be written", args.out.display()))?;
    writeln!(out, "{}: {batch} x {length} x {vocabulary}", args.out.display())?;
    Ok(())
}
