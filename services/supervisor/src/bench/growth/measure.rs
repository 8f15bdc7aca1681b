//! The measurements behind the curves.

use super::curve::Curve;
use super::words;
use crate::bench::full_buffer::FullBuffer;
use crate::bench::subject::{Subject, SubjectArgs, median};
use crate::bench::system::{self, System};
use crate::bench::together::Together;
use crate::bench::update;
use anyhow::{Context, Result, ensure};
use infer::{ByBase, Router};
use kit::ledger::Ledger;
use kit::manifests::Registry;
use kit::status::document_status;
use proto::{Content, Document, Domain, Stage};
use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Instant;

/// Examples in an optimiser step, new and rehearsed.
const BATCH: usize = 16;
/// Times that what takes a moment is done, and what may take more than one; the median counts.
const TIMES: u64 = 15;
const FEW_TIMES: u64 = 3;
/// Examples that are rehearsed, or offered to the buffer, at once.
const AT_ONCE: usize = 64;
/// Answers at the same time, with tokens of each prompt and answer.
const STREAMS: usize = 16;
const PROMPT: usize = 16;
const ANSWER: usize = 16;
/// Documents that a domain has learned, with words of each.
const DOCUMENTS: u64 = 16;
const WORDS: usize = 60;
/// Documents in a submission, and submissions that are timed.
const SUBMISSION: u64 = 100;
const SUBMISSIONS: usize = 5;

/// The time of an update with so many new examples of so many tokens, beside as many rehearsed ones.
pub fn examples(subject: &Subject, counts: &[u64], tokens: usize, repeats: u64) -> Result<Curve> {
    let mut points = Vec::new();
    for &count in counts {
        points.push((count as f64, learned(subject, count, tokens, repeats)?.seconds));
        eprintln!("{count} new examples: measured");
    }
    Ok(Curve {
        name: "examples",
        grows: "new examples",
        takes: "seconds for one pass",
        expected: 1.0,
        points,
    })
}

fn learned(subject: &Subject, new: u64, tokens: usize, repeats: u64) -> Result<update::Run> {
    let new = usize::try_from(new)?;
    let work = update::Work::new(update::random(subject, 2 * new, tokens)?, new, BATCH);
    let runs = (0..repeats).map(|_| update::measure(subject, &work)).collect::<Result<Vec<_>>>()?;
    update::median(runs).context("nothing was measured")
}

/// The time of an update on other bases, a thousand tokens each.
pub fn models(args: &SubjectArgs, names: &[String], tokens: usize, repeats: u64) -> Result<Curve> {
    let mut points = Vec::new();
    for name in names {
        let subject = Subject::load(&args.of(name))?;
        let run = learned(&subject, BATCH as u64, tokens, repeats)?;
        let weights = subject.base.parameter_count() as f64 / 1e6;
        points.push((weights, run.seconds * 1000.0 / run.tokens as f64));
        eprintln!("{name}: measured");
    }
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    Ok(Curve {
        name: "models",
        grows: "million weights of the base",
        takes: "seconds for 1,000 tokens learned",
        expected: 1.0,
        points,
    })
}

/// What the buffer of examples that are rehearsed takes as it grows: to draw and read some, to take in new ones where
/// it is full, and the digest that each batch carries.
pub fn rehearsal(subject: &Subject, capacities: &[u64], tokens: usize) -> Result<Vec<Curve>> {
    let vocabulary = u32::try_from(subject.base.config().vocab_size)?;
    let (mut drawing, mut taking, mut digest) = (Vec::new(), Vec::new(), Vec::new());
    for &capacity in capacities {
        let mut full = FullBuffer::new(&subject.settings, usize::try_from(capacity)?, tokens, vocabulary)?;
        drawing.push((capacity as f64, moments(TIMES, |n| full.draw(AT_ONCE, n).map(drop))?));
        digest.push((capacity as f64, moments(FEW_TIMES, |_| full.digest().map(drop))?));
        taking.push((capacity as f64, moments(FEW_TIMES, |_| full.take_in(AT_ONCE))?));
        eprintln!("{capacity} examples kept: measured");
    }
    let curve = |name, takes, points| Curve { name, grows: "examples kept", takes, expected: 1.0, points };
    Ok(vec![
        curve("rehearsal", "ms to draw and read 64 examples", drawing),
        curve("rehearsal-takes-in", "ms to take in 64 new examples", taking),
        curve("rehearsal-digest", "ms for the digest of all rows", digest),
    ])
}

/// The time in which `auto` finds whose a prompt is.
pub fn routing(subject: &Subject, counts: &[u64]) -> Result<Curve> {
    let tokenizer = subject.text()?.language().tokenizer.clone();
    let mut router = Router::new(tokenizer, subject.settings.infer.route_strictness);
    let (mut points, mut known) = (Vec::new(), 0);
    for &count in counts {
        for domain in known..count {
            let name = Domain::new(format!("bench{domain}"))?;
            for document in 0..DOCUMENTS {
                router.add(&name, &words::text(domain, document, WORDS), [])?;
            }
        }
        known = count;
        router.calibrate();
        // Prompts that nobody has learned word for word.
        let ask = |n: u64| {
            router.route(&words::text(n % count, DOCUMENTS + n, WORDS / 3), &ByBase::default()).map(drop)
        };
        points.push((count as f64, moments(TIMES, ask)?));
        eprintln!("{count} domains: measured");
    }
    Ok(Curve {
        name: "routing",
        grows: "domains",
        takes: "ms to choose adapters for a prompt",
        expected: 1.0,
        points,
    })
}

/// The time from a document to its update, of a domain of its own, where so many others have an adapter; none where the weights are
/// random, which no service loads.
pub fn updates(subject: &Subject, counts: &[u64]) -> Result<Option<Curve>> {
    let Some(dir) = subject.folder() else {
        eprintln!("updates: left out, since a service needs a base that lies in a folder");
        return Ok(None);
    };
    let points = system::with(subject.settings.clone(), dir, async |system| {
        let (mut points, mut known) = (Vec::new(), 0);
        for &count in counts {
            teach(system, known..count).await?;
            // The domains that were timed before are there, too.
            known = known.max(count);
            let (there, mut times) = (known, Vec::new());
            for _ in 0..FEW_TIMES {
                times.push(teach(system, known..known + 1).await?);
                known += 1;
            }
            points.push((there as f64, median(&times)));
            eprintln!("updates with {there} domains: measured");
        }
        Ok(points)
    })?;
    Ok(Some(Curve {
        name: "updates",
        grows: "domains that have an adapter",
        takes: "seconds from a document to its update",
        expected: 0.0,
        points,
    }))
}

/// Has each of these domains learn a document; gives the seconds that it took.
async fn teach(system: &System, domains: Range<u64>) -> Result<f64> {
    let document = |n: u64| Ok((Domain::new(format!("bench{n}"))?, Content::Text(words::text(n, 0, WORDS))));
    let documents = domains.map(document).collect::<Result<Vec<_>>>()?;
    if documents.is_empty() {
        return Ok(0.0);
    }
    let taught = system.teach(&documents).await?;
    ensure!(taught.live == documents.len(), "not all documents were learned: {taught:?}");
    Ok(taught.seconds)
}

/// The time of a pass in which 16 answers decode a token each, over so many adapters.
pub fn adapters(subject: &Subject, counts: &[u64]) -> Result<Curve> {
    let cache_bytes = subject.settings.infer.cache_mb_max << 20;
    let mut points = Vec::new();
    for &count in counts {
        let mut together = Together::new(subject, cache_bytes, count)?;
        // The first answers set things up.
        together.answer(STREAMS, PROMPT, 2)?;
        let passes = together.answer(STREAMS, PROMPT, ANSWER)?;
        points.push((count as f64, 1000.0 * median(&passes)));
        eprintln!("{count} adapters: measured");
    }
    Ok(Curve {
        name: "adapters",
        grows: "adapters that 16 answers are spread over",
        takes: "ms for a token of each",
        expected: 1.0,
        points,
    })
}

/// The time that 100 documents take to be accepted, by the number of those that are there already.
pub fn intake(sizes: &[u64]) -> Result<Curve> {
    let folder = tempfile::tempdir().context("no folder for a ledger")?;
    let door = Door {
        ledger: Ledger::open(&folder.path().join("ledger"))?,
        registry: Registry::open(&folder.path().join("lineages"))?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut points = Vec::new();
    for &size in sizes {
        while door.ledger.head() < size {
            runtime.block_on(door.submit(SUBMISSION.min(size - door.ledger.head())))?;
        }
        let (there, mut times) = (door.ledger.head(), Vec::new());
        for _ in 0..SUBMISSIONS {
            let started = Instant::now();
            runtime.block_on(door.submit(SUBMISSION))?;
            times.push(1000.0 * started.elapsed().as_secs_f64());
        }
        points.push((there as f64, median(&times)));
        eprintln!("{there} documents: measured");
    }
    Ok(Curve {
        name: "intake",
        grows: "documents in the ledger",
        takes: "ms to accept 100 documents",
        expected: 0.0,
        points,
    })
}

/// A ledger that documents are submitted to, as the gateway does it.
struct Door {
    ledger: Ledger,
    registry: Registry,
}

impl Door {
    /// Submits so many new documents at once.
    async fn submit(&self, count: u64) -> Result<()> {
        let before = self.ledger.head();
        let documents: Vec<Document> = (0..count).map(|n| document(before + n)).collect();
        // What was put aside and comes again is to be learned after all; so each is looked for.
        let mut again = BTreeSet::new();
        for document in &documents {
            let status = document_status(&self.ledger, &self.registry, self.registry.live(), &document.id)?;
            again.extend(status.filter(|status| status.status == Stage::SetAside).map(|status| status.id));
        }
        self.ledger.append_again(documents, again).await?;
        Ok(())
    }
}

fn document(number: u64) -> Document {
    let (domain, content) = (Domain::general(), Content::Text(words::text(0, number, WORDS)));
    Document {
        id: Document::content_id(&domain, &content),
        domain,
        content,
        importance: None,
        source: None,
        submitted_ms: 0,
        derived_from: None,
    }
}

/// Milliseconds that something takes, as the median of several times.
fn moments(times: u64, mut work: impl FnMut(u64) -> Result<()>) -> Result<f64> {
    let mut taken = Vec::new();
    for n in 0..times {
        let started = Instant::now();
        work(n)?;
        taken.push(1000.0 * started.elapsed().as_secs_f64());
    }
    Ok(median(&taken))
}
