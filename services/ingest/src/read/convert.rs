//! From HTML and PDF to text, in a process that has nothing to lose.

use super::Form;
use anyhow::{Context, Result};
use htmd::element_handler::{HandlerResult, Handlers};
use htmd::{Element, HtmlToMarkdown};
use pdf_extract::{Document, PlainTextOutput, output_doc_page};
use rustix::process::{Resource, Rlimit, setrlimit};
use serde::{Deserialize, Serialize};
use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::thread;

/// Memory that a conversion may take, bytes.
pub(super) const MEMORY_BYTES_MAX: u64 = 1 << 30;
/// Text that it may write, bytes.
pub(super) const TEXT_BYTES_MAX: u64 = 64 << 20;
/// Processor time that it may take, seconds.
pub(super) const SECONDS_MAX: u64 = 60;
/// Pages of the web nest deeply, and are walked by recursion, bytes.
const STACK_BYTES: usize = 128 << 20;
/// What a reader of a page does not see.
const NOT_SHOWN: [&str; 8] = ["script", "style", "template", "noscript", "iframe", "svg", "canvas", "object"];

/// What came of a file.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Converted {
    /// Its text; HTML becomes Markdown.
    pub text: String,
    /// Pages that could not be read, counted from 1.
    pub lost: Vec<u32>,
}

/// Why nothing came of it. The number is what the process ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Unusable {
    /// It is not in the form that it claims, or damaged beyond reading.
    Damaged = 10,
    /// It takes a password to read.
    Locked = 11,
    /// It is whole, and there is no text in it.
    Blank = 12,
}

/// Converts standard input, and writes what came of it to `out`; what the process should end with. It puts
/// limits on this whole process, so it is for one that does nothing else.
///
/// # Errors
/// When the limits cannot be set, or the result not be written.
pub fn convert(form: Form, out: &Path) -> Result<u8> {
    for (resource, most) in [
        (Resource::Data, MEMORY_BYTES_MAX),
        (Resource::Cpu, SECONDS_MAX),
        (Resource::Fsize, TEXT_BYTES_MAX),
        (Resource::Core, 0),
    ] {
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        setrlimit(resource, limit).with_context(|| format!("the limit {resource:?} cannot be set"))?;
    }
    let work = move || -> Result<std::result::Result<Converted, Unusable>> {
        let mut bytes = Vec::new();
        io::stdin().lock().read_to_end(&mut bytes)?;
        Ok(match form {
            Form::Html => html(&bytes),
            Form::Pdf => pdf(&bytes),
        })
    };
    let thread = thread::Builder::new().stack_size(STACK_BYTES).spawn(work)?;
    // A panic on bytes from elsewhere says that they are damaged.
    match thread.join().unwrap_or(Ok(Err(Unusable::Damaged)))? {
        Ok(converted) => {
            std::fs::write(out, serde_json::to_vec(&converted)?)?;
            Ok(0)
        }
        Err(unusable) => Ok(unusable as u8),
    }
}

fn html(bytes: &[u8]) -> std::result::Result<Converted, Unusable> {
    let text = str::from_utf8(bytes).map_err(|_| Unusable::Damaged)?;
    let converter = HtmlToMarkdown::builder().skip_tags(NOT_SHOWN.to_vec()).add_handler(vec!["a"], named);
    let text = converter.build().convert(text).map_err(|_| Unusable::Damaged)?;
    if text.trim().is_empty() { Err(Unusable::Blank) } else { Ok(Converted { text, lost: Vec::new() }) }
}

/// Where a link leads is not said on the page; what it is called is.
fn named(handlers: &dyn Handlers, element: Element) -> Option<HandlerResult> {
    Some(handlers.walk_children(element.node))
}

fn pdf(bytes: &[u8]) -> std::result::Result<Converted, Unusable> {
    let mut document = Document::load_mem(bytes).map_err(|_| Unusable::Damaged)?;
    // Most protected files only forbid printing or the like: those open without a password.
    if document.is_encrypted() && document.decrypt("").is_err() {
        return Err(Unusable::Locked);
    }
    let (mut pages, mut lost) = (Vec::new(), Vec::new());
    for page in document.get_pages().into_keys() {
        let mut text = String::new();
        let read = || output_doc_page(&document, &mut PlainTextOutput::new(&mut text), page).is_ok();
        match catch_unwind(AssertUnwindSafe(read)) {
            Ok(true) => pages.push(tidied(&text)),
            _ => lost.push(page),
        }
    }
    let text = pages.iter().filter(|page| !page.is_empty()).cloned().collect::<Vec<_>>().join("\n\n");
    match (text.is_empty(), pages.is_empty()) {
        (false, _) => Ok(Converted { text, lost }),
        (true, true) => Err(Unusable::Damaged),
        (true, false) => Err(Unusable::Blank),
    }
}

/// A page without what laying it out left behind: space at the ends of lines, and many blank lines.
fn tidied(page: &str) -> String {
    let mut text = String::new();
    let mut blank = 0;
    for line in page.lines().map(str::trim_end) {
        blank = if line.is_empty() { blank + 1 } else { 0 };
        if blank < 2 {
            text.push_str(line);
            text.push('\n');
        }
    }
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_the_web_keeps_its_structure_and_loses_its_scripts() {
        let page = "<!doctype html><html><head><title>T</title><style>p {}</style></head><body>\
            <h1>Bees</h1><p>They <b>sleep</b> in <a href='http://x/'>hives</a>.</p>\
            <script>alert('x')</script><ul><li>one</li><li>two</li></ul>\
            <pre><code>let x = 1;</code></pre><table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>";
        let text = html(page.as_bytes()).expect("text").text;
        assert!(text.contains("# Bees\n") && text.contains("They **sleep** in hives."), "{text}");
        assert!(text.contains("*   one\n*   two") && text.contains("```\nlet x = 1;\n```"), "{text}");
        assert!(text.contains("| 1") && !text.contains("alert") && !text.contains("p {}"), "{text}");
        assert_eq!(html(b"<script>1</script>"), Err(Unusable::Blank));
        assert_eq!(html(b"caf\xe9"), Err(Unusable::Damaged));
    }

    #[test]
    fn laying_out_leaves_nothing_behind() {
        assert_eq!(tidied("\n\n a  \n\n\n\nb\n\n"), "a\n\nb");
    }

    #[test]
    fn what_is_no_pdf_is_damaged() {
        for bytes in [&b""[..], b"%PDF-1.7", b"hello", &[0; 4096]] {
            assert_eq!(pdf(bytes), Err(Unusable::Damaged));
        }
    }
}
