//! Running the conversion, which may crash, hang or grow, in a process that may not harm anyone.

use super::convert::{Converted, MEMORY_BYTES_MAX, SECONDS_MAX, TEXT_BYTES_MAX, Unusable};
use super::{Form, Reader};
use anyhow::{Context, Result, anyhow};
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const TIME_MAX: Duration = Duration::from_secs(SECONDS_MAX);
const POLL: Duration = Duration::from_millis(5);

/// The text of `file`.
///
/// # Errors
/// When nothing comes of it, in a line that names it and says why.
pub(super) fn run(reader: &Reader, form: Form, file: File, name: &str) -> Result<Converted> {
    let out = tempfile::NamedTempFile::new_in(&reader.scratch)
        .with_context(|| format!("{} takes no file for the text of {name}", reader.scratch.display()))?;
    let mut command = Command::new(&reader.program);
    command.arg("convert").arg(form.as_str()).arg(out.path());
    command.stdin(file).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().with_context(|| format!("{} cannot be run", reader.program.display()))?;
    let Some(status) = ended(&mut child)? else {
        return Err(anyhow!("{name} took over {SECONDS_MAX} s to read, and was left out"));
    };
    if !status.success() {
        return Err(reason(form, status, name));
    }
    let written = std::fs::read(out.path()).with_context(|| format!("the text of {name} is gone"))?;
    serde_json::from_slice(&written).with_context(|| format!("the text of {name} is damaged"))
}

/// How it ended; none when it had to be ended.
fn ended(child: &mut Child) -> Result<Option<ExitStatus>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() > TIME_MAX {
            // One that ended just now cannot be killed, and need not be.
            let _ = child.kill();
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(POLL);
    }
}

fn reason(form: Form, status: ExitStatus, name: &str) -> anyhow::Error {
    let upper = form.as_str().to_ascii_uppercase();
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    if code == Some(Unusable::Locked as u8) {
        return anyhow!("{name} is protected by a password: save a copy without one");
    }
    if code == Some(Unusable::Blank as u8) {
        return match form {
            Form::Pdf => {
                anyhow!("{name} holds no text: its pages may be pictures, which take text recognition")
            }
            Form::Html => anyhow!("{name} holds no text"),
        };
    }
    if let Some(signal) = status.signal() {
        let (mib, text) = (MEMORY_BYTES_MAX >> 20, TEXT_BYTES_MAX >> 20);
        return anyhow!(
            "{name} took more than the {mib} MiB of memory, {SECONDS_MAX} s or {text} MiB of text that one {upper} \
             file may take (signal {signal})"
        );
    }
    let else_what = match form {
        Form::Html => "not in UTF-8",
        Form::Pdf => "something else",
    };
    anyhow!("{name} cannot be read as {upper}: it is damaged, or {else_what}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_with(program: &str) -> String {
        let file = tempfile::tempfile().expect("a file");
        let reader =
            Reader { program: program.into(), scratch: std::env::temp_dir(), document_bytes_max: 1024 };
        format!("{:#}", run(&reader, Form::Pdf, file, "a.pdf").expect_err("no converter"))
    }

    #[test]
    fn a_converter_that_is_not_there_or_says_nothing_is_told() {
        assert!(run_with("/nowhere").contains("/nowhere"));
        assert!(run_with("/bin/false").contains("a.pdf"));
        assert!(run_with("/bin/true").contains("damaged"));
    }

    #[test]
    fn each_end_has_a_reason_of_its_own() {
        let of = |raw: i32| reason(Form::Pdf, ExitStatus::from_raw(raw), "a.pdf").to_string();
        assert!(of(11 << 8).contains("password"), "{}", of(11 << 8));
        assert!(of(12 << 8).contains("text recognition"));
        assert!(of(10 << 8).contains("damaged"));
        assert!(of(6).contains("1024 MiB"), "{}", of(6));
    }
}
