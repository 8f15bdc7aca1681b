//! `engram watch`: a folder whose content a running server knows, and keeps knowing.
//!
//! What counts is what lies in the folder: events only say when to look. So an event that is lost costs time, and no
//! truth. What was learned from which file stands in a state file, written before the server is told anything, so
//! that a watcher that was killed at any point goes on where it was.

mod apply;
mod scan;
mod state;

use crate::client::{Client, ServerArgs};
use crate::{base, corpus};
use anyhow::{Context, Result, bail, ensure};
use apply::Applying;
use notify::{RecursiveMode, Watcher};
use state::State;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

const EXAMPLES: &str = "\
Examples:
  engram watch notes/ --domain notes       learn what is there and what changes; forget what goes
  engram watch notes/ --dry-run            say what would be done, and do nothing
  engram watch src/ --once                 bring the server up to date, and end, as in a git hook

It learns what 'engram learn' would: what git ignores and what is hidden is left out. A file that \
was renamed is neither forgotten nor learned again. What was learned from which file stands in a \
state file in the data folder; it can be stopped and started at any time. The folder is read anew at \
the start and every --rescan seconds.";

/// A burst of changes is over when nothing has changed for so long.
const QUIET: Duration = Duration::from_millis(500);
/// Changes that never end are looked at this often.
const BURST_MAX: Duration = Duration::from_secs(5);
/// How long a full or restarting server is waited for before it is tried again later.
const PATIENCE: Duration = Duration::from_secs(60);
/// After a failure, the next attempt.
const RETRY: Duration = Duration::from_secs(5);

/// What `engram watch` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The folder.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// The body of knowledge its files belong to.
    #[arg(long)]
    domain: Option<String>,
    /// How much it matters that they stay, 0 to 1.
    #[arg(long, value_name = "X")]
    importance: Option<f32>,
    /// Say what would be learned and forgotten, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// Bring the server up to date, and end.
    #[arg(long)]
    once: bool,
    /// Read every file anew after so many seconds, whatever the system says of changes.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    rescan: u64,
    /// Forget everything when the folder is found empty. Without this it is taken for a disk that is not there.
    #[arg(long)]
    allow_empty: bool,
    /// Where what was learned is written down; a file in the data folder, if none is given.
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    #[command(flatten)]
    server: ServerArgs,
}

/// Watches until it is stopped, or once.
///
/// # Errors
/// At the start, when the folder or the server is not there; later only when the state cannot be written.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    if args.importance.is_some_and(|importance| !(0.0..=1.0).contains(&importance)) {
        bail!("--importance is a number from 0 to 1");
    }
    let dir =
        args.dir.canonicalize().with_context(|| format!("there is no folder {}", args.dir.display()))?;
    ensure!(dir.is_dir(), "{} is no folder; 'engram learn' takes files", dir.display());
    let file = match &args.state {
        Some(file) => file.clone(),
        None => state_file(&dir, args)?,
    };
    let (state, _lock) = State::open(&file)?;
    if args.dry_run {
        return dry_run(&dir, &state, args, out);
    }
    let client = Client::new(&args.server)?.patient(PATIENCE);
    client.get("/v1/status")?;
    let about = apply::About { domain: args.domain.clone(), importance: args.importance };
    let mut applying = Applying { client: &client, reader: corpus::reader()?, about, state, out };
    applying.reconcile()?;
    if args.once {
        return round(&dir, &mut applying, true, args.allow_empty);
    }
    watch(&dir, args, &mut applying)
}

/// One for each folder, domain and server. It is in the data folder, since a watched one may be read-only.
fn state_file(dir: &Path, args: &Args) -> Result<PathBuf> {
    let mut hasher = blake3::Hasher::new();
    let dir = dir.to_string_lossy();
    for part in [&dir, args.domain.as_deref().unwrap_or_default(), args.server.server.trim_end_matches('/')] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    let data = std::env::var_os("ENGRAM_DATA").map_or_else(base::data_dir, |dir| Ok(dir.into()))?;
    Ok(data.join("watch").join(format!("{}.json", &hasher.finalize().to_hex()[..16])))
}

fn watch(dir: &Path, args: &Args, applying: &mut Applying<'_>) -> Result<()> {
    let (tell, told) = channel();
    let watcher = notify::recommended_watcher(tell).and_then(|mut watcher| {
        watcher.watch(dir, RecursiveMode::Recursive)?;
        Ok(watcher)
    });
    if let Err(error) = &watcher {
        eprintln!("engram: the system tells nothing of changes ({error}); looking every {} s", args.rescan);
    }
    let rescan = Duration::from_secs(args.rescan);
    let mut last_full = Instant::now();
    let mut failed = attempt(dir, applying, true, args.allow_empty)?;
    writeln!(applying.out, "watching   {}", dir.display())?;
    applying.out.flush()?;
    loop {
        let until_full = rescan.saturating_sub(last_full.elapsed());
        let changed = burst(&told, if failed { until_full.min(RETRY) } else { until_full });
        let full = last_full.elapsed() >= rescan;
        if full {
            last_full = Instant::now();
        }
        if changed || full || failed {
            failed = attempt(dir, applying, full, args.allow_empty)?;
        }
    }
}

/// Waits for a change, and for the end of the burst that it begins; whether there was one.
fn burst(told: &Receiver<notify::Result<notify::Event>>, patience: Duration) -> bool {
    match told.recv_timeout(patience) {
        // A read is no change, and our own reading would never end otherwise.
        Ok(Ok(event)) if event.kind.is_access() => return false,
        // What the watcher could not tell is found by looking.
        Ok(_) => {}
        Err(RecvTimeoutError::Timeout) => return false,
        Err(RecvTimeoutError::Disconnected) => {
            std::thread::sleep(patience);
            return false;
        }
    }
    let start = Instant::now();
    while start.elapsed() < BURST_MAX && told.recv_timeout(QUIET).is_ok() {}
    true
}

/// A round that may fail for reasons that pass; whether it did. A state that cannot be written is none of them.
fn attempt(dir: &Path, applying: &mut Applying<'_>, full: bool, allow_empty: bool) -> Result<bool> {
    match round(dir, applying, full, allow_empty) {
        Ok(()) => Ok(false),
        Err(error) if error.is::<state::NotKept>() => Err(error),
        Err(error) => {
            eprintln!("engram: {error:#}; trying again");
            Ok(true)
        }
    }
}

/// Brings the server up to what lies in the folder.
fn round(dir: &Path, applying: &mut Applying<'_>, full: bool, allow_empty: bool) -> Result<()> {
    let found = scan::scan(dir, &applying.state, full)?;
    if found.files.is_empty() && !applying.state.files.is_empty() && !allow_empty {
        bail!(
            "{} is empty: nothing is forgotten until something is there again; --allow-empty forgets all of it",
            dir.display()
        );
    }
    for change in scan::changes(&applying.state, &found) {
        applying.apply(&change, &found)?;
    }
    applying.forget_stale()
}

fn dry_run(dir: &Path, state: &State, args: &Args, out: &mut dyn Write) -> Result<()> {
    let found = scan::scan(dir, state, true)?;
    if found.files.is_empty() && !state.files.is_empty() && !args.allow_empty {
        bail!("{} is empty: nothing would be done without --allow-empty", dir.display());
    }
    let changes = scan::changes(state, &found);
    for change in &changes {
        writeln!(out, "would {change}")?;
    }
    if changes.is_empty() {
        writeln!(out, "nothing has changed")?;
    }
    Ok(())
}
