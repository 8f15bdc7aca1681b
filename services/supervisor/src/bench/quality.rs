//! `engram bench quality`: how good what was learned is, beside what counting words reaches.

use super::bag_of_words::BagOfWords;
use super::panel::{Panel, Pick};
use super::report;
use super::system::{self, System, Taught};
use super::tasks::{self, Labelled};
use crate::base;
use crate::judge::{LabelBy, answer};
use anyhow::{Context, Result, ensure};
use clap::value_parser;
use kit::settings::{AdapterScope, Settings};
use proto::{Content, Domain};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

const EXAMPLES: &str = "\
Examples:
  engram bench quality --data ./clinc150 --json result.json
  engram bench quality --data ./clinc150/banking --examples 500
  engram bench quality --data ./clinc150 --set train.adapters=shared
  engram bench quality --data ./mine --published 0.85 --source 'who measured it, and where'

DIR holds train.jsonl and test.jsonl, whose lines are {\"text\",\"label\"}, or folders that do: then \
each is a domain. The examples are learned by the services themselves, shuffled and handed in at \
once. Of all labels the likeliest is the answer, from the adapter that the content decides for, as \
for the model 'auto', where there are several domains with an adapter each. Beside it stands TF-IDF \
of one and two words with logistic regression, trained on the same examples, those included that the \
filter refused or the gate set aside.";

/// Labelled examples at most: the promise is about learning from few.
const EXAMPLES_MAX: u64 = 10_000;

/// What `engram bench quality` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The frozen base: `nano`, a folder in the Hugging Face form, or org/name on the Hugging Face hub.
    #[arg(long, value_name = "NAME|DIR|ORG/NAME", default_value = base::BUILT_IN)]
    base: String,
    /// A folder with train.jsonl and test.jsonl, or of such folders.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Examples to learn at most, evenly over all files.
    #[arg(long, value_name = "N", default_value_t = EXAMPLES_MAX, value_parser = value_parser!(u64).range(1..=EXAMPLES_MAX))]
    examples: u64,
    /// What makes a label the likeliest: its log-likelihood as a whole, or the mean of its tokens.
    #[arg(long, value_name = "RULE", default_value = "sum")]
    label_by: LabelBy,
    /// The accuracy that is published of a larger model, 0 to 1, to stand beside.
    #[arg(long, value_name = "0.XX", requires = "source", value_parser = share)]
    published: Option<f64>,
    /// Where that is published, and of what.
    #[arg(long, value_name = "TEXT", requires = "published")]
    source: Option<String>,
    /// Write all figures as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Settings that differ from the built-in ones, in TOML.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A setting, as section.key=value; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse::<f64>().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "an accuracy is a number from 0 to 1, such as 0.85".to_owned())
}

/// Learns, measures and reports.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let data = tasks::labelled(&args.data)?;
    let base_dir = base::resolve(&args.base, &base::data_dir()?)?;
    let settings = Settings::load(args.config.as_deref(), &args.set)?;
    let lessons = Lessons::new(&data, usize::try_from(args.examples)?, &settings)?;
    let right = |label: Option<&str>, (_, truth): &(String, String)| usize::from(label == Some(truth));
    let asked = || data.iter().flat_map(|domain| &domain.measured);

    let counted: Vec<(&str, &str)> = lessons.examples.iter().map(|e| (e.text, e.label)).collect();
    let bag = BagOfWords::train(&counted);
    let tfidf = asked().map(|line| right(bag.label(&line.0), line)).sum::<usize>();
    drop(bag);
    eprintln!("{} examples to learn, {} texts to label", counted.len(), asked().count());

    let labels: Vec<&str> = lessons.labels.iter().copied().collect();
    let texts: Vec<&str> = asked().map(|(text, _)| text.as_str()).collect();
    let answered = system::with(settings.clone(), &base_dir, async |system| {
        lessons.learn_and_answer(system, &settings, &base_dir, &texts, &labels, args.label_by).await
    })?;
    let chosen = answered.chosen.iter().map(|&place| labels.get(place).copied());
    let engram = chosen.zip(asked()).map(|(label, line)| right(label, line)).sum::<usize>();

    let of_all = |count: usize| count as f64 / texts.len() as f64;
    let result = Figures {
        base: &args.base,
        examples: counted.len(),
        asked: texts.len(),
        labels: labels.len(),
        routed: lessons.routed,
        accuracy: of_all(engram),
        tfidf_accuracy: of_all(tfidf),
        published: args.published.zip(args.source.as_deref()),
        ms_per_answer: 1000.0 * answered.seconds / texts.len() as f64,
        taught: answered.taught,
        settings: &settings,
    };
    result.print(out)?;
    report::store(args.json.as_deref(), &result.json()?)
}

struct Example<'a> {
    domain: Domain,
    text: &'a str,
    label: &'a str,
}

/// What is learned, and who answers then.
struct Lessons<'a> {
    examples: Vec<Example<'a>>,
    /// All in the files, whatever a limit leaves out: fewer to choose from would be easier.
    labels: BTreeSet<&'a str>,
    /// Whether the content decides who answers.
    routed: bool,
}

/// What came of it.
struct Answered {
    taught: Taught,
    /// By text, the place of its label.
    chosen: Vec<usize>,
    /// Of answering all.
    seconds: f64,
}

impl<'a> Lessons<'a> {
    fn new(data: &'a [Labelled], limit: usize, settings: &Settings) -> Result<Self> {
        let routed = data.len() > 1 && settings.train.adapters == AdapterScope::PerDomain;
        let mut examples = Vec::new();
        for Labelled { name, learned, .. } in data {
            let domain = if routed {
                Domain::new(name).with_context(|| format!("{name} cannot be the name of a domain"))?
            } else {
                Domain::general()
            };
            examples.extend(learned.iter().map(|(text, label)| Example {
                domain: domain.clone(),
                text,
                label,
            }));
        }
        let mut examples = tasks::thinned(examples, Some(limit));
        // Files are often sorted by label, and a batch of few labels teaches to say those.
        examples.shuffle(&mut rand_chacha::ChaCha8Rng::seed_from_u64(settings.replay.seed));
        let all = data.iter().flat_map(|domain| domain.learned.iter().chain(&domain.measured));
        let labels: BTreeSet<&str> = all.map(|(_, label)| label.as_str()).collect();
        ensure!(labels.len() > 1, "there is one label only, which is always right");
        Ok(Self { examples, labels, routed })
    }

    async fn learn_and_answer(
        &self,
        system: &System,
        settings: &Settings,
        base_dir: &Path,
        texts: &[&str],
        labels: &[&str],
        by: LabelBy,
    ) -> Result<Answered> {
        let document = |e: &Example<'_>| {
            let content = Content::Completion { prompt: e.text.to_owned(), completion: answer(e.label) };
            (e.domain.clone(), content)
        };
        let documents: Vec<(Domain, Content)> = self.examples.iter().map(document).collect();
        let taught = system.teach(&documents).await?;
        eprintln!("{}", report::told(&taught));
        let mut panel = Panel::new(system, settings, base_dir)?;
        panel.follow(system)?;
        let general = Domain::general();
        let pick = if self.routed { Pick::Auto } else { Pick::Fixed(&general) };
        let started = Instant::now();
        let all = [(0..labels.len()).collect()];
        let chosen = panel.label(texts, labels, &all, pick, by)?.into_iter().flatten().collect();
        Ok(Answered { taught, chosen, seconds: started.elapsed().as_secs_f64() })
    }
}

/// What is printed and stored.
struct Figures<'a> {
    base: &'a str,
    examples: usize,
    asked: usize,
    labels: usize,
    routed: bool,
    accuracy: f64,
    tfidf_accuracy: f64,
    published: Option<(f64, &'a str)>,
    ms_per_answer: f64,
    taught: Taught,
    settings: &'a Settings,
}

impl Figures<'_> {
    fn print(&self, out: &mut dyn Write) -> Result<()> {
        let who = if self.routed { "adapters chosen by content" } else { "one adapter" };
        writeln!(out, "share of right labels, among {} labels, of {} texts:", self.labels, self.asked)?;
        let mut rows = vec![
            ("engram", self.accuracy, format!("{}, {who}", self.base)),
            ("TF-IDF", self.tfidf_accuracy, "logistic regression on the same examples".to_owned()),
        ];
        rows.extend(self.published.map(|(accuracy, source)| ("published", accuracy, source.to_owned())));
        for (name, accuracy, what) in rows {
            writeln!(out, "  {name:9}  {accuracy:.3}  {what}")?;
        }
        writeln!(out, "examples       {}", self.examples)?;
        writeln!(out, "documents      {}", report::told(&self.taught))?;
        writeln!(out, "ms per answer  {:.2}", self.ms_per_answer)?;
        Ok(())
    }

    fn json(&self) -> Result<Value> {
        let published = self.published.map(|(accuracy, source)| {
            json!({
                "accuracy": accuracy,
                "source": source,
            })
        });
        Ok(json!({
            "examples": self.examples,
            "asked": self.asked,
            "labels": self.labels,
            "routed": self.routed,
            "accuracy": self.accuracy,
            "tfidf_accuracy": self.tfidf_accuracy,
            "published": published,
            "seconds": self.taught.seconds,
            "ms_per_answer": self.ms_per_answer,
            "documents": serde_json::to_value(&self.taught)?,
            "settings": serde_json::to_value(self.settings)?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(name: &str, labels: [&str; 2]) -> Labelled {
        let lines = |count: usize| (0..count).map(|n| (format!("{name} {n}"), labels[n % 2].to_owned()));
        Labelled { name: name.into(), learned: lines(6).collect(), measured: lines(2).collect() }
    }

    #[test]
    fn a_limit_is_for_all_domains_together_and_leaves_all_labels() {
        let settings = Settings::load(None, &["train.adapters=per-domain".into()]).expect("settings");
        let data = [domain("one", ["a", "b"]), domain("two", ["c", "d"])];
        let lessons = Lessons::new(&data, 4, &settings).expect("lessons");
        let of = |name: &str| lessons.examples.iter().filter(|e| e.domain.as_str() == name).count();
        assert_eq!((lessons.examples.len(), of("one"), of("two"), lessons.labels.len()), (4, 2, 2, 4));
        assert!(lessons.routed);
        let single = Lessons::new(&data[..1], 100, &settings).expect("lessons");
        assert!(!single.routed && single.examples.iter().all(|e| e.domain == Domain::general()));
    }

    #[test]
    fn an_accuracy_is_a_share() {
        assert_eq!(share("0.85"), Ok(0.85));
        for wrong in ["85", "-0.1", "NaN", "85%"] {
            assert!(share(wrong).is_err(), "{wrong}");
        }
    }
}
