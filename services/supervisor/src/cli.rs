//! The command line: what can be asked, and how failures are told.

use crate::client::NoServer;
use crate::{
    adapters, ask, bench, chat, distill, doctor, documents, eval, learn, logits, pretrain, status, up, watch,
};
use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind};
use clap_complete::Shell;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{ExitCode, exit};

const EXAMPLES: &str = "\
Examples:
  engram up                                serve on this machine, with the built-in base
  engram learn notes/ facts.jsonl --wait   teach it files, and wait until it knows them
  engram generate 'Where is the key?'      ask what it has learned
  engram chat                              talk with it
  engram status                            see what it is doing

Ends with 0 when all was done, 1 when it failed, 2 when the command line is wrong, 3 when no server \
answers, and 4 when only a part could be done, as when some of many files cannot be read.";

#[derive(Debug, Parser)]
#[command(
    name = "engram",
    bin_name = "engram",
    version,
    about = "A small language model that keeps learning from what you give it, and does not forget.",
    after_help = EXAMPLES
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve and learn, until stopped.
    Up(up::Args),
    /// Teach a running server files and folders.
    Learn(learn::Args),
    /// Keep a running server up to date with a folder: learn what changes, forget what is deleted.
    Watch(watch::Args),
    /// Let a larger model teach a running server.
    Distill(distill::Args),
    /// Let a running server continue a prompt.
    Generate(ask::Args),
    /// Talk with a running server.
    Chat(chat::Args),
    /// Show what a running server is doing.
    Status(status::Args),
    /// List, show or forget documents.
    Documents(documents::Args),
    /// List, inspect, roll back, export or import adapters.
    Adapters(adapters::Args),
    /// Train a base from scratch. Needs no server.
    Pretrain(pretrain::Args),
    /// Measure a base, or a base with an adapter, on a file. Needs no server.
    Eval(eval::Args),
    /// Measure learning and forgetting. Needs no server.
    Bench(bench::Args),
    /// Compute the logits of given token ids. Needs no server.
    Logits(logits::Args),
    /// Check this machine and say what is amiss.
    Doctor(doctor::Args),
    /// Print a script with which a shell completes commands and flags.
    Completions(Completions),
    /// What `up` keeps alive: not for people.
    #[command(hide = true)]
    Worker,
    /// What turns HTML and PDF into text: not for people.
    #[command(hide = true)]
    Convert { form: ingest::read::Form, to: PathBuf },
}

/// What `engram completions` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  source <(engram completions bash)                        for this shell
  engram completions bash > ~/.local/share/bash-completion/completions/engram
  engram completions zsh > ~/.zfunc/_engram                with ~/.zfunc in fpath
  engram completions fish > ~/.config/fish/completions/engram.fish")]
struct Completions {
    /// The shell.
    shell: Shell,
}

/// A command that did a part of what it was to do, as it has told already.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Partly(pub String);

/// Runs the command line of this process.
///
/// Every failure is one line on stderr that starts with `engram:` and says what to do.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let mut out = io::stdout().lock();
    let result = run(cli.command, &mut out).and_then(|()| Ok(out.flush()?));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // `engram documents list | head` has got what it wanted.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            fail(&format!("{error:#}"));
            code(&error)
        }
    }
}

/// What the program ends with, for scripts to go by.
fn code(error: &anyhow::Error) -> ExitCode {
    if error.is::<NoServer>() {
        ExitCode::from(3)
    } else if error.is::<Partly>() {
        ExitCode::from(4)
    } else {
        ExitCode::FAILURE
    }
}

fn run(command: Command, out: &mut dyn Write) -> anyhow::Result<()> {
    match command {
        Command::Up(args) => up::run(&args, out),
        Command::Learn(args) => learn::run(&args, out),
        Command::Watch(args) => watch::run(&args, out),
        Command::Distill(args) => distill::run(&args, out),
        Command::Generate(args) => ask::run(&args, out),
        Command::Chat(args) => chat::run(&args, out),
        Command::Status(args) => status::run(&args, out),
        Command::Documents(args) => documents::run(&args, out),
        Command::Adapters(args) => adapters::run(&args, out),
        Command::Pretrain(args) => pretrain::run(&args, out),
        Command::Eval(args) => eval::run(&args, out),
        Command::Bench(args) => bench::run(&args, out),
        Command::Logits(args) => logits::run(&args, out),
        Command::Doctor(args) => doctor::run(&args, out),
        Command::Completions(Completions { shell }) => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "engram", &mut script);
            Ok(out.write_all(&script)?)
        }
        Command::Worker => up::worker(),
        // What it ends with says what came of it.
        Command::Convert { form, to } => exit(i32::from(ingest::read::convert(form, &to)?)),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

fn fail(message: &str) {
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    // Nobody is left to be told when stderr is closed too.
    let _ = writeln!(io::stderr(), "engram: {line}");
}

/// Help goes out as it is; a mistake becomes one line, with clap's hint when it has one.
fn usage(error: &clap::Error) -> ExitCode {
    let wanted = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    if wanted || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
        return if wanted { ExitCode::SUCCESS } else { ExitCode::from(2) };
    }
    let text = error.to_string();
    let paragraphs = text.trim_start_matches("error: ").split("\n\n");
    let told: Vec<&str> = paragraphs
        .enumerate()
        .filter(|(place, text)| *place == 0 || text.trim_start().starts_with("tip:"))
        .map(|(_, text)| text.trim())
        .collect();
    let usage = text.split("Usage: ").nth(1).unwrap_or("engram").split_whitespace();
    let command: Vec<&str> = usage.take_while(|word| !word.starts_with(['[', '<', '-'])).collect();
    fail(&format!("{}; '{} --help' shows what there is", told.join("; "), command.join(" ")));
    ExitCode::from(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn each_command_shows_an_example() {
        for command in Cli::command().get_subcommands().filter(|c| !c.is_hide_set()) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("engram "), "{} has no example", command.get_name());
        }
    }

    fn help_is_wrapped(command: &clap::Command) {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        for paragraph in help.split("\n\n") {
            for (n, line) in paragraph.lines().enumerate() {
                // Examples stand as they are written; what is told besides is one line, which clap breaks where the
                // terminal ends.
                let fits = line.starts_with(' ') && line.len() <= 100;
                assert!(n == 0 || fits, "{}: {line}", command.get_name());
            }
        }
        command.get_subcommands().for_each(help_is_wrapped);
    }

    #[test]
    fn help_breaks_no_line_where_it_should_not() {
        help_is_wrapped(&Cli::command());
    }
}
