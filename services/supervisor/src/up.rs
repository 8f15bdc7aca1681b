//! `engram up`: checks what it was given, then keeps a worker alive.

use crate::child;
use crate::lifeline::Orders;
use crate::{base, memory, worker};
use anyhow::{Context, Result, anyhow, bail};
use kit::settings::Settings;
use model::device::{DeviceChoice, Placement, set_threads};
use std::fs::{DirBuilder, File, TryLockError};
use std::io::{Read, Seek, Write};
use std::net::TcpListener;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  engram up                                        the built-in base, on 127.0.0.1:8420
  engram up --base ./smollm --data ./knowledge     a base of your own, and a place of your own
  engram up --base HuggingFaceTB/SmolLM2-135M      a base from the hub; @REVISION may follow
  engram up --listen 0.0.0.0:8420 --config my.toml for others: needs a key in the settings
  engram up --set replay.capacity=20000            one setting, as ENGRAM__REPLAY__CAPACITY does

Flags win over the environment, the environment over the file, and the file over what is built in. A \
base from the hub is kept where Python's huggingface_hub keeps it, and its variables are followed: \
HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, and HF_HUB_OFFLINE=1 to use only what is there.";

/// What `engram up` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Settings that differ from the built-in ones, in TOML.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The frozen base: `nano`, a folder in the Hugging Face form, or org/name on the Hugging Face hub.
    #[arg(long, value_name = "NAME|DIR|ORG/NAME")]
    base: Option<String>,
    /// Where everything is kept.
    #[arg(long, value_name = "DIR", env = "ENGRAM_DATA")]
    data: Option<PathBuf>,
    /// Address and port to listen on.
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// A setting, as section.key=value; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// What `engram up` would do.
pub struct Plan {
    /// All of them, checked.
    pub settings: Settings,
    base: String,
    /// Where everything is kept.
    pub data_dir: PathBuf,
}

/// Puts settings together from what is built in, the file, the environment and the flags.
///
/// # Errors
/// When one is unknown or out of its range.
pub fn plan(args: &Args) -> Result<Plan> {
    let mut flags = args.set.clone();
    flags.extend(args.listen.as_ref().map(|listen| format!("gateway.listen={listen}")));
    let settings = Settings::load(args.config.as_deref(), &flags)?;
    filter::check_languages(&settings.filter.languages)?;
    let data_dir = match &args.data {
        Some(dir) => dir.clone(),
        None => base::data_dir()?,
    };
    let base = args.base.clone().unwrap_or_else(|| base::BUILT_IN.to_owned());
    Ok(Plan { settings, base, data_dir })
}

impl Plan {
    /// The folder of the base; the built-in one is unpacked, and one on the hub is downloaded, when it
    /// is not there.
    pub fn base_dir(&self) -> Result<PathBuf> {
        base::resolve(&self.base, &self.data_dir)
    }

    /// Makes the data folder, for its owner's eyes only.
    pub fn make_data_dir(&self) -> Result<()> {
        let dir = &self.data_dir;
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700).create(dir).with_context(|| {
            format!("the data folder {} cannot be made; give another with --data", dir.display())
        })
    }

    /// Device, precision and quantisation.
    pub fn placement(&self) -> Result<Placement> {
        placement(&self.settings)
    }

    /// Address and port to listen on.
    pub fn listen(&self) -> &str {
        &self.settings.gateway.listen
    }
}

/// Device, precision and quantisation as the settings ask for them; the calling thread computes with as many
/// threads as they say.
pub fn placement(settings: &Settings) -> Result<Placement> {
    let base = &settings.base;
    if base.threads > 0 {
        // As on every compute thread, so that what is printed is what computes.
        set_threads(base.threads);
    }
    Placement::resolve(base.device.parse()?, base.precision.parse()?, base.quantisation.parse()?)
}

/// Serves until a signal ends it.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let plan = plan(args)?;
    // A worker could only die, again and again, of a device that is not there, an address that it may not have, or for want of
    // memory; here each is one clear line.
    plan.settings.base.device.parse::<DeviceChoice>()?.check()?;
    plan.make_data_dir()?;
    let _lock = lock(&plan.data_dir)?;
    let base = plan.base_dir()?;
    let listen = plan.listen();
    gateway::allowed(listen, &plan.settings.gateway.api_keys)?;
    memory::check(&plan.settings, &base)?;
    TcpListener::bind(listen).with_context(|| {
        format!("{listen} cannot be listened on; stop what does, or give another with --listen")
    })?;
    writeln!(
        out,
        "data    {}\nbase    {}\nserver  http://{listen}",
        plan.data_dir.display(),
        base.display()
    )?;
    out.flush()?;
    kit::telemetry::start(&plan.settings.telemetry)?;
    let orders = Orders { settings: plan.settings, data_dir: plan.data_dir, base_dir: base, degraded: false };
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(child::keep_alive(orders))
}

/// The worker that [`run`] keeps alive.
pub fn worker() -> Result<()> {
    let orders = Orders::read()?;
    kit::telemetry::start(&orders.settings.telemetry)?;
    worker::run(orders.settings, &orders.data_dir, &orders.base_dir, orders.degraded)
}

/// Two programs that write to one folder would ruin it. The lock ends with the process, however it
/// ends, so that there is never a stale one to delete.
fn lock(data_dir: &Path) -> Result<File> {
    let path = data_dir.join("lock");
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
    match file.try_lock() {
        Ok(()) => {
            file.set_len(0)?;
            file.rewind()?;
            write!(file, "{}", std::process::id())?;
            Ok(file)
        }
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            file.read_to_string(&mut pid)?;
            bail!(
                "{} is in use by the engram with process id {pid}: stop that one, or give another folder with --data",
                data_dir.display()
            )
        }
        Err(TryLockError::Error(error)) => {
            Err(anyhow!(error).context(format!("{} cannot be locked", path.display())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_for_one_at_a_time_and_the_refusal_names_the_other() {
        let folder = tempfile::tempdir().expect("a folder");
        let held = lock(folder.path()).expect("locked");
        let error = lock(folder.path()).expect_err("refused").to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(held);
        lock(folder.path()).expect("free again");
    }
}
