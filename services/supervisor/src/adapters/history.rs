//! What was learned when: `engram adapters log` and `diff`.

use super::folder;
use crate::client::{Client, segment};
use crate::status::{plain, show};
use anyhow::{Context, Result};
use proto::TrainReport;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::time::{Duration, UNIX_EPOCH};

/// Documents are listed so many at a time.
const PAGE: usize = 1000;
/// The longest bar.
const BAR: f64 = 40.0;

/// Each generation with what it learned, and with its retention receipt: by how much the loss on what
/// was known before has risen.
pub fn log(answer: &Value, oneline: bool, json: bool, out: &mut dyn Write) -> Result<()> {
    let generations = match answer["generations"].as_array() {
        Some(generations) if !json => generations,
        _ => return show(answer, json, out),
    };
    for (place, generation) in generations.iter().enumerate() {
        let (report, of) = (&generation["report"], |name: &str| plain(&generation[name]));
        let live = if generation["live"] == true { " (live)" } else { "" };
        let learned = learned(report);
        if oneline {
            let many = if generation["documents"] == 1 { "" } else { "s" };
            let (name, documents) = (of("generation"), of("documents"));
            writeln!(out, "{name}{live} {documents} document{many}, {learned}")?;
            continue;
        }
        let blank = if place > 0 { "\n" } else { "" };
        writeln!(out, "{blank}generation {}{live}", of("generation"))?;
        let merged = generation["merged_from"].as_array().filter(|parts| !parts.is_empty());
        match merged {
            Some(parts) => {
                writeln!(out, "Merge:     {}", parts.iter().map(plain).collect::<Vec<_>>().join(" "))?
            }
            None => writeln!(out, "Parent:    {}", of("parent"))?,
        }
        writeln!(out, "Date:      {}", date(&generation["published_ms"]))?;
        writeln!(out, "Documents: {}\n", of("documents"))?;
        let [steps, seconds] = ["steps", "seconds"].map(|name| plain(&report[name]));
        let trained = report["steps"].as_u64().is_some_and(|steps| steps > 0);
        let many = if steps == "1" { "" } else { "s" };
        let learning = if trained { format!("{learned}, {steps} step{many}, {seconds} s") } else { learned };
        let lines = [("learning".to_owned(), learning)].into_iter().chain(receipt(&generation["receipt"]));
        let known = &generation["known_answers"];
        let lines = lines.chain(known_answers(known).map(|told| ("answers".to_owned(), told)));
        let lines = lines.chain(passages(known).map(|told| ("texts".to_owned(), told)));
        columns(&lines.collect::<Vec<_>>(), out)?;
    }
    Ok(())
}

/// What became of what a generation learned, in words.
fn learned(report: &Value) -> String {
    let report = TrainReport::deserialize(report).unwrap_or_default();
    if report.steps > 0 { report.in_words() } else { "imported or merged, not trained here".to_owned() }
}

/// What each probe measured, by its name.
fn receipt(receipt: &Value) -> impl Iterator<Item = (String, String)> {
    let probes = receipt["probes"].as_array().map(Vec::as_slice).unwrap_or_default();
    probes.iter().filter(|probe| probe["measure"]["examples"] != 0).map(|probe| {
        let [best, after, examples] =
            ["best", "after", "examples"].map(|name| plain(&probe["measure"][name]));
        let name = plain(&probe["probe"]).replace('_', " ");
        let recited = match &probe["measure"]["recited"] {
            Value::Object(said) => {
                format!(", {} to {} said to the letter", plain(&said["best"]), plain(&said["after"]))
            }
            _ => String::new(),
        };
        (name, format!("{best} to {after} nats a token, {examples} examples{recited}"))
    })
}

/// What an exported adapter leaves behind: that of a generation, or of the current one.
pub fn left_behind(answer: &Value, generation: Option<&str>) -> Option<String> {
    let generations = answer["generations"].as_array()?;
    let exported = |of: &&Value| match generation {
        Some(id) => of["generation"] == id,
        None => of["live"] == true,
    };
    let known = &generations.iter().find(exported)?["known_answers"];
    let answers = known_answers(known).map(|known| {
        format!(
            "answers beside the adapter stay behind ({known}); one that learns with train.repeat_counted=true says them by itself"
        )
    });
    let texts = passages(known).map(|known| format!("what texts say stays behind ({known})"));
    let told: Vec<String> = answers.into_iter().chain(texts).collect();
    (!told.is_empty()).then(|| told.join("; "))
}

/// What is remembered of texts beside the adapter.
fn passages(known: &Value) -> Option<String> {
    let passages = known["passages"].as_u64().filter(|passages| *passages > 0);
    passages.map(|passages| format!("{passages} sentences of texts are remembered word for word"))
}

/// What is known of answers beside the adapter.
fn known_answers(known: &Value) -> Option<String> {
    let of = |name: &str| plain(&known[name]);
    // Prompts do not tell those apart that are not trusted, and what they say is left to the adapter.
    let repeat = (known["trusted"] == true)
        .then(|| format!("{} that repeat are known, from {} prompts", of("answers"), of("prompts")));
    let facts = known["facts"].as_u64().filter(|facts| *facts > 0);
    let facts = facts.map(|facts| format!("{facts} that come once are remembered with their prompts"));
    let told: Vec<String> = repeat.into_iter().chain(facts).collect();
    (!told.is_empty()).then(|| told.join("; "))
}

fn columns(lines: &[(String, String)], out: &mut dyn Write) -> Result<()> {
    let width = lines.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    for (name, value) in lines {
        writeln!(out, "    {name:width$}  {value}")?;
    }
    Ok(())
}

fn date(ms: &Value) -> String {
    let since = ms.as_u64().map(Duration::from_millis);
    since.map_or_else(|| "-".into(), |since| httpdate::fmt_http_date(UNIX_EPOCH + since))
}

/// A generation of a domain.
struct Side {
    domain: String,
    generation: String,
    /// It and those before it; none of one that was rolled back.
    chain: BTreeSet<String>,
}

impl Side {
    fn find(client: &Client, name: &str) -> Result<Self> {
        let (domain, generation) = match name.split_once('@') {
            Some((domain, generation)) => (domain, Some(generation)),
            None => (name, None),
        };
        let log = client.get(&format!("/v1/adapters/{}/log", segment(domain)))?;
        let current = log["current"].as_str();
        let generation = generation.or(current);
        let generation =
            generation.with_context(|| format!("{domain} serves the base: it has no generation"))?;
        let kept: Vec<&str> = log["generations"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|entry| entry["generation"].as_str())
            .skip_while(|id| *id != generation)
            .collect();
        let chain = kept.into_iter().map(str::to_owned).collect();
        Ok(Self { domain: domain.to_owned(), generation: generation.to_owned(), chain })
    }

    fn name(&self) -> String {
        format!("{}@{}", self.domain, self.generation)
    }
}

/// What `b` has learned and `a` has not, and the other way round; and how far apart their weights are.
pub fn diff(
    client: &Client,
    (a, b): (&str, &str),
    base: &str,
    json: bool,
    out: &mut dyn Write,
) -> Result<()> {
    let (a, b) = (Side::find(client, a)?, Side::find(client, b)?);
    let (mut added, mut removed) = (Vec::new(), Vec::new());
    for domain in BTreeSet::from([&a.domain, &b.domain]) {
        for document in documents(client, domain)? {
            let Some(generation) = document["generation"].as_str() else { continue };
            match (a.chain.contains(generation), b.chain.contains(generation)) {
                (false, true) => added.push(document),
                (true, false) => removed.push(document),
                _ => {}
            }
        }
    }
    let distances = distances(client, &a, &b, base);
    if json {
        let weights = distances.as_ref().ok();
        let answer =
            json!({"a": a.name(), "b": b.name(), "added": added, "removed": removed, "weights": weights});
        return show(&answer, true, out);
    }
    writeln!(out, "diff {} {}", a.name(), b.name())?;
    for side in [&a, &b].into_iter().filter(|side| side.chain.is_empty()) {
        writeln!(out, "{} was rolled back: its documents are not told apart", side.name())?;
    }
    for (sign, documents) in [('-', &removed), ('+', &added)] {
        for document in documents {
            let source = document["source"].as_str().unwrap_or_default();
            let line = format!("{sign} {}  {source}", plain(&document["id"]));
            writeln!(out, "{}", line.trim_end())?;
        }
    }
    let documents = if added.len() == 1 { "document" } else { "documents" };
    writeln!(out, "{} {documents} added, {} removed", added.len(), removed.len())?;
    match distances {
        Ok(distances) => stat(&distances, out),
        Err(error) => Ok(writeln!(out, "weights are not compared: {error:#}")?),
    }
}

fn stat(distances: &BTreeMap<String, f64>, out: &mut dyn Write) -> Result<()> {
    let width = distances.keys().map(String::len).max().unwrap_or(0);
    for (target, share) in distances {
        let bar = "+".repeat((share.min(1.0) * BAR).round() as usize);
        writeln!(out, " {target:width$} | {:5.1} % {bar}", share * 100.0)?;
    }
    Ok(())
}

fn documents(client: &Client, domain: &str) -> Result<Vec<Value>> {
    let (mut all, mut before) = (Vec::new(), String::new());
    loop {
        let page = client.get(&format!("/v1/documents?limit={PAGE}&domain={}{before}", segment(domain)))?;
        let page = page["documents"].as_array().cloned().unwrap_or_default();
        match page.last().and_then(|last| last["id"].as_str()) {
            Some(last) => before = format!("&before={}", segment(last)),
            None => break,
        }
        all.extend(page);
    }
    // The order of learning; the server lists the newest first.
    all.reverse();
    Ok(all)
}

/// By kind of matrix: how much of what the larger of the two changes in the base they differ by.
fn distances(client: &Client, a: &Side, b: &Side, base: &str) -> Result<BTreeMap<String, f64>> {
    let base = folder::base_of(client, base)?;
    let changes = |side: &Side| -> Result<BTreeMap<String, tch::Tensor>> {
        let adapter = folder::fetch(client, &side.domain, Some(&side.generation))?;
        Ok(folder::loaded(&adapter, &base)?.changes()?.into_iter().collect())
    };
    let (a, b) = (changes(a)?, changes(b)?);
    let square = |tensor: &tch::Tensor| -> Result<f64> {
        Ok(tensor.f_square()?.f_sum(tch::Kind::Double)?.f_double_value(&[])?)
    };
    let mut sums: BTreeMap<String, [f64; 3]> = BTreeMap::new();
    for module in a.keys().chain(b.keys()).collect::<BTreeSet<_>>() {
        let sums = sums.entry(module.rsplit('.').next().unwrap_or(module).to_owned()).or_default();
        let apart = match (a.get(module), b.get(module)) {
            (Some(x), Some(y)) => square(&x.f_sub(y)?)?,
            (Some(only), None) | (None, Some(only)) => square(only)?,
            (None, None) => 0.0,
        };
        let of = |side: &BTreeMap<String, tch::Tensor>| side.get(module).map_or(Ok(0.0), square);
        for (sum, more) in sums.iter_mut().zip([apart, of(&a)?, of(&b)?]) {
            *sum += more;
        }
    }
    let share = |[apart, x, y]: [f64; 3]| if apart > 0.0 { (apart / x.max(y)).sqrt() } else { 0.0 };
    Ok(sums.into_iter().map(|(target, sums)| (target, share(sums))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(oneline: bool) -> String {
        let measure = json!({"best": 2.5, "after": 2.75, "examples": 32});
        let mut answers = measure.clone();
        answers["recited"] = json!({"best": 31, "before": 30, "after": 29, "fewer_allowed": 1});
        let probes = [
            json!({"probe": "anchor", "measure": measure}),
            json!({"probe": "memory_answers", "measure": answers}),
        ];
        let answer = json!({"generations": [
            {"generation": "bb", "live": true, "parent": "aa", "documents": 3, "published_ms": 1_700_000_000_000u64,
             "report": {"first_loss": 6.5, "last_loss": 0.5, "steps": 19, "seconds": 0.25},
             "receipt": {"probes": probes}, "known_answers": {"answers": 15, "prompts": 1500, "trusted": true, "facts": 30}},
            {"generation": "aa", "live": false, "parent": null, "merged_from": ["x", "y"], "documents": 1},
        ]});
        let mut out = Vec::new();
        log(&answer, oneline, false, &mut out).expect("shown");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn what_stays_behind_is_that_of_the_generation_that_is_exported() {
        let known = json!({"answers": 2, "prompts": 9, "trusted": false, "facts": 3});
        let log = json!({"generations": [
            {"generation": "bb", "live": true, "known_answers": known},
            {"generation": "aa", "live": false, "known_answers": null},
        ]});
        let told = left_behind(&log, None).expect("facts");
        assert!(told.contains("(3 that come once are remembered with their prompts)"), "{told}");
        assert_eq!((left_behind(&log, Some("bb")), left_behind(&log, Some("aa"))), (Some(told), None));
        let texts = json!({"answers": 0, "prompts": 0, "trusted": false, "facts": 0, "passages": 7});
        let log = json!({"generations": [{"generation": "bb", "live": true, "known_answers": texts}]});
        let told = left_behind(&log, None).expect("texts");
        assert_eq!(told, "what texts say stays behind (7 sentences of texts are remembered word for word)");
    }

    #[test]
    fn a_log_reads_like_that_of_git() {
        let full = told(false);
        let expected = "generation bb (live)\nParent:    aa\nDate:      Tue, 14 Nov 2023 22:13:20 GMT\nDocuments: 3\n\n    \
            learning        6.500 to 0.500 nats a token, 19 steps, 0.2500 s\n    \
            anchor          2.5000 to 2.7500 nats a token, 32 examples\n    \
            memory answers  2.5000 to 2.7500 nats a token, 32 examples, 31 to 29 said to the letter\n    \
            answers         15 that repeat are known, from 1500 prompts; 30 that come once are remembered with their prompts\n\ngeneration aa\nMerge:     x y\n";
        assert!(full.starts_with(expected), "{full}");
        assert!(full.ends_with("learning  imported or merged, not trained here\n"), "{full}");
        assert_eq!(told(true).lines().next(), Some("bb (live) 3 documents, 6.500 to 0.500 nats a token"));
    }
}
