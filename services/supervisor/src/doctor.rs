//! `engram doctor`: what this machine offers, and what is amiss.

use crate::report;
use crate::up::{self, Plan};
use anyhow::{Context, Result, bail};
use model::device::{DeviceChoice, Placement, Precision, PrecisionChoice};
use model::hf::ModelConfig;
use model::selftest;
use serde_json::json;
use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;
use tch::Device;

const EXAMPLES: &str = "\
Examples:
  engram doctor
  engram doctor --full > report.md     compare the device with the CPU, in about 30 s
  engram doctor --full --set base.device=mps --set base.precision=bf16
  engram doctor --base ./smollm --data /mnt/engram --listen 127.0.0.1:9000";

/// Time that the fastest product is sought for.
const PRODUCTS_TIME: Duration = Duration::from_millis(100);
/// The version that `tch` binds; a build against any other fails.
pub const LIBTORCH_VERSION: &str = "2.11.0";

/// What `engram doctor` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
// Two groups of the same name, this one and that of `up`, are one too many for clap.
#[group(skip)]
pub struct Args {
    #[command(flatten)]
    up: up::Args,
    /// Print the findings as JSON.
    #[arg(long)]
    json: bool,
    /// Compare the device with the CPU: results, ten training steps, speed. Prints a report in Markdown.
    #[arg(long)]
    full: bool,
    /// How long `--full` measures speed, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 24, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
}

type Finding = (&'static str, Result<String>);

/// Prints one line a finding.
///
/// # Errors
/// When something would keep `engram up` from working.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    if args.full {
        return report::run(&up::plan(&args.up)?.settings, Duration::from_secs(args.seconds), args.json, out);
    }
    let mut amiss = 0;
    for (name, found) in findings(&args.up) {
        let (good, text) = match found {
            Ok(text) => (true, text),
            Err(error) => (false, format!("{error:#}")),
        };
        amiss += usize::from(!good);
        if args.json {
            writeln!(out, "{}", json!({"check": name, "ok": good, "found": text}))?;
        } else {
            writeln!(out, "{} {name:9}  {text}", if good { "ok  " } else { "FAIL" })?;
        }
    }
    if amiss > 0 {
        bail!("{amiss} of these checks failed: 'engram up' needs them mended");
    }
    if !args.json {
        writeln!(out, "all is well: 'engram up' will start")?;
    }
    Ok(())
}

fn findings(args: &up::Args) -> Vec<Finding> {
    let plan = match up::plan(args) {
        Ok(plan) => plan,
        Err(error) => return vec![("settings", Err(error))],
    };
    let placement = plan.placement();
    let speed = placement.as_ref().map_err(|_| anyhow::anyhow!("not measured")).and_then(speed);
    let base_dir = plan.base_dir();
    // What is wrong with the base or the device is told once.
    let memory = match (&base_dir, &placement) {
        (Ok(dir), Ok(placement)) => Some(("memory", memory(&plan, dir, placement))),
        _ => None,
    };
    let checks = [
        ("settings", Ok("each is known and in its range".to_owned())),
        ("libtorch", Ok(format!("{LIBTORCH_VERSION} is here, and computes"))),
        ("cores", Ok(report::threads(plan.settings.base.threads))),
        ("bf16", placement.as_ref().map_err(|_| anyhow::anyhow!("not tried")).map(bf16)),
        ("device", placement.map(|placement| device(&placement))),
        ("speed", speed),
        ("base", base_dir.and_then(|dir| base(&dir))),
        ("data", plan.make_data_dir().map(|()| format!("everything is kept in {}", plan.data_dir.display()))),
        ("disk", disk(&plan)),
        ("address", address(&plan)),
    ];
    checks.into_iter().chain(memory).collect()
}

fn memory(plan: &Plan, base_dir: &Path, placement: &Placement) -> Result<String> {
    crate::memory::told(&plan.settings, &ModelConfig::load(base_dir)?, placement)
}

fn device(placement: &Placement) -> String {
    match placement.device {
        Device::Cpu => format!("the processor ({placement}); no GPU is used"),
        _ => format!("the GPU ({placement})"),
    }
}

/// Whether 16-bit numbers can be computed with, and whether it pays.
fn bf16(placement: &Placement) -> String {
    let on = |precision| {
        let choice = if placement.device == Device::Cpu { DeviceChoice::Cpu } else { DeviceChoice::Auto };
        Placement::resolve(choice, precision, placement.quantisation).map(|found| found.precision)
    };
    let native = on(PrecisionChoice::Auto).is_ok_and(|precision| precision == Precision::Bf16);
    match (native, on(PrecisionChoice::Bf16)) {
        (true, _) => "this device has it: half the memory of f32, and faster".to_owned(),
        (false, Ok(_)) => {
            "it works and is not faster here: f32 is used, unless base.precision says bf16".to_owned()
        }
        (false, Err(error)) => format!("this device cannot be trusted with it ({error:#}): f32 is used"),
    }
}

fn base(dir: &Path) -> Result<String> {
    let config = ModelConfig::load(dir)?;
    let (millions, context) = (config.parameter_count() as f64 / 1e6, config.max_positions);
    Ok(format!("{millions:.1} M parameters, context of {context} tokens, in {}", dir.display()))
}

fn speed(placement: &Placement) -> Result<String> {
    let (side, speed) =
        (selftest::product_side(placement.device), selftest::products(placement, PRODUCTS_TIME)?);
    Ok(format!("{speed:.0} GFLOP/s in products of {side} x {side} matrices"))
}

fn disk(plan: &Plan) -> Result<String> {
    let (free, limits) = (kit::disk::free_percent(&plan.data_dir)?, &plan.settings.limits);
    let (learn, intake) = (limits.disk_free_learn_percent, limits.disk_free_intake_percent);
    let told = match kit::disk::free_bytes(&plan.data_dir)? >> 30 {
        0 => "less than 1 GiB is free".to_owned(),
        gib => format!("{gib} GiB are free"),
    };
    if free < f64::from(learn) {
        bail!(
            "{told}: nothing is learned under {learn} % of the disk (of 64 GiB of a larger one), nothing accepted \
             under {intake} %; make room, or give --data on another disk"
        );
    }
    Ok(told)
}

fn address(plan: &Plan) -> Result<String> {
    let listen = plan.listen();
    TcpListener::bind(listen).with_context(|| {
        format!("{listen} cannot be listened on: stop what does, or give another with --listen")
    })?;
    Ok(format!("{listen} is free"))
}
