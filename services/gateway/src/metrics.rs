//! What the gateway counts, under vLLM's names with our prefix, and the page that Prometheus reads.

use crate::tally::Tally;
use anyhow::Context;
use kit::manifests::Registry;
use kit::telemetry::names;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use proto::{FinishReason, Usage};
use std::time::{Duration, Instant};

/// Upper bounds of histograms of seconds: from one token of a small model to a long answer.
const SECONDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0];
/// Samples pile up until somebody reads them, or until they are folded into their histograms.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);

const RUNNING: &str = "engram:num_requests_running";
const LATENCY: &str = "engram:e2e_request_latency_seconds";
const FIRST_TOKEN: &str = "engram:time_to_first_token_seconds";
const PROMPT_TOKENS: &str = "engram:prompt_tokens_total";
const ANSWER_TOKENS: &str = "engram:generation_tokens_total";
const SUCCESS: &str = "engram:request_success_total";
const HTTP: &str = "engram:http_requests_total";
const DOCUMENTS: &str = "engram:documents_accepted_total";
const BETWEEN_TOKENS: &str = "engram:inter_token_latency_seconds";
const JUDGING: &str = "engram:documents_judging";
const WAITING: &str = "engram:documents_waiting";
const REFUSED: &str = "engram:documents_refused";
const LIVE: &str = "engram:documents_live";
const RETENTION: &str = "engram:retention_loss";
const RETENTION_BEST: &str = "engram:retention_best_loss";

/// What each metric of this process means, those of the other services among them: what is not here
/// has no help on the page, which promtool complains of.
const HELP: [(&str, &str); 28] = [
    (RUNNING, "Requests for text that are being answered."),
    ("engram:num_requests_waiting", "Requests for text that wait for a place."),
    (LATENCY, "From a request for text to the end of its answer, seconds."),
    (FIRST_TOKEN, "From a request for text to its first token, seconds."),
    (BETWEEN_TOKENS, "Between two pieces of an answer, seconds."),
    (PROMPT_TOKENS, "Tokens in prompts."),
    (ANSWER_TOKENS, "Tokens in answers."),
    (SUCCESS, "Answers that came to an end, by its reason."),
    (HTTP, "HTTP requests by route and status."),
    ("engram:requests_routed_total", "Requests that `auto` routed, by the adapter that fitted best."),
    ("engram:route_confidence", "How well prompts fitted what `auto` chose, 0 to 1."),
    (
        "engram:lineages_told_apart",
        "Lineages among which `auto` chooses by what all of them counted, too, beside the words of a prompt.",
    ),
    (DOCUMENTS, "Documents that were accepted."),
    (JUDGING, "Documents that are accepted and not judged yet."),
    (WAITING, "Documents that wait to be learned, by domain."),
    (REFUSED, "Documents that will not be learned, by domain."),
    (LIVE, "Documents that are learned and served, by domain."),
    ("engram:documents_learned_total", "Documents that were learned in a published generation."),
    ("engram:generations_published_total", "Generations that were published."),
    ("engram:gate_refusals_total", "Candidates that the gate refused, by what came of it."),
    ("engram:train_loss", "Mean loss of what was learned last, nats a token, by lineage."),
    ("engram:train_tokens_total", "Tokens that were trained on, by lineage."),
    (
        "engram:train_latents_total",
        "Sequences that entered above the lowest adapted layer, by whether that was kept.",
    ),
    (RETENTION, "Loss of the current generation on what was known, nats a token, by domain and probe."),
    (RETENTION_BEST, "The best loss of any generation on it, nats a token, by domain and probe."),
    (names::MESSAGES, "Messages between services, by outcome."),
    (names::MESSAGE_SECONDS, "How long a message took to be settled, seconds."),
    (names::LANE_RESTARTS, "Times a lane was built anew."),
];

/// Where all metrics of this process are kept.
#[derive(Clone)]
pub struct Recorder(PrometheusHandle);

impl Recorder {
    /// Makes every metric of this process go to the page at `/metrics`. Once a process.
    ///
    /// # Errors
    /// When a recorder is installed already.
    pub fn install() -> anyhow::Result<Self> {
        let builder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)
            .context("the buckets of histograms")?;
        let handle = builder.install_recorder().context("metrics are recorded elsewhere already")?;
        for (name, help) in HELP {
            // The page takes the type from how a metric is used, so any of the three says as much.
            metrics::describe_gauge!(name, help);
        }
        handle.run_upkeep();
        Ok(Self(handle))
    }

    /// The page, in Prometheus' text format.
    pub(crate) fn page(&self) -> String {
        self.0.render()
    }

    /// The values of a metric that has one label, by the label's value.
    pub(crate) fn values(&self, name: &str) -> Vec<(String, f64)> {
        values(&self.page(), name)
    }

    /// Keeps the samples from piling up, for ever.
    pub(crate) async fn upkeep(self) {
        loop {
            tokio::time::sleep(UPKEEP_EVERY).await;
            self.0.run_upkeep();
        }
    }
}

fn values(page: &str, name: &str) -> Vec<(String, f64)> {
    let value = |line: &str| {
        let (label, value) = line.strip_prefix(name)?.strip_prefix('{')?.split_once("\"} ")?;
        let (_, label) = label.split_once("=\"")?;
        Some((label.to_owned(), value.parse().ok()?))
    };
    page.lines().filter_map(value).collect()
}

/// Sets what is counted only when somebody asks.
pub(crate) fn refresh(tally: &Tally, registry: &Registry) {
    metrics::gauge!(JUDGING).set(tally.judging as f64);
    for (domain, of) in &tally.domains {
        for (name, count) in [(WAITING, of.waiting), (REFUSED, of.refused)] {
            metrics::gauge!(name, "domain" => domain.to_string()).set(count as f64);
        }
    }
    for (domain, lineage) in registry.try_manifest().iter().flat_map(|manifest| &manifest.lineages) {
        metrics::gauge!(LIVE, "domain" => domain.to_string()).set(lineage.documents as f64);
        let current = lineage.current.as_ref().and_then(|id| registry.generation(id));
        let rows = current.iter().flat_map(|generation| &generation.receipt.probes);
        // Of texts that rest there is another sample each time, or none.
        for row in rows.filter(|row| row.probe != "rested_text") {
            let labels = [("domain", domain.to_string()), ("probe", row.probe.clone())];
            metrics::gauge!(RETENTION, &labels).set(f64::from(row.measure.after));
            metrics::gauge!(RETENTION_BEST, &labels).set(f64::from(row.measure.best));
        }
    }
}

pub(crate) fn http_request(route: Option<String>, status: u16) {
    let route = route.unwrap_or_else(|| "none".to_owned());
    metrics::counter!(HTTP, "route" => route, "status" => status.to_string()).increment(1);
}

pub(crate) fn documents_accepted(count: u64) {
    metrics::counter!(DOCUMENTS).increment(count);
}

/// A request for text that is being answered; counted as running until this is dropped.
pub(crate) struct Running {
    start: Instant,
    /// When the last piece came.
    last: Option<Instant>,
}

impl Running {
    pub(crate) fn start() -> Self {
        metrics::gauge!(RUNNING).increment(1.0);
        Self { start: Instant::now(), last: None }
    }

    /// A piece of text came.
    pub(crate) fn piece(&mut self) {
        let (metric, since) = match self.last {
            None => (FIRST_TOKEN, self.start),
            Some(last) => (BETWEEN_TOKENS, last),
        };
        metrics::histogram!(metric).record(since.elapsed().as_secs_f64());
        self.last = Some(Instant::now());
    }

    /// One of its choices is whole.
    pub(crate) fn choice_finished(&self, reason: FinishReason) {
        let reason = match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        };
        metrics::counter!(SUCCESS, "finished_reason" => reason).increment(1);
    }

    /// All its choices are.
    pub(crate) fn finished(&self, usage: Usage) {
        metrics::histogram!(LATENCY).record(self.start.elapsed().as_secs_f64());
        metrics::counter!(PROMPT_TOKENS).increment(u64::from(usage.prompt_tokens));
        metrics::counter!(ANSWER_TOKENS).increment(u64::from(usage.completion_tokens));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        metrics::gauge!(RUNNING).decrement(1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_read_from_the_page_by_its_label() {
        let page = "# TYPE engram:loss gauge\nengram:loss{lineage=\"a\"} 1.5\nengram:loss{lineage=\"b-c\"} 0\n\
                    engram:loss_other{lineage=\"a\"} 9\nengram:plain 3\n";
        assert_eq!(values(page, "engram:loss"), [("a".to_owned(), 1.5), ("b-c".to_owned(), 0.0)]);
        assert_eq!(values(page, "engram:plain"), []);
    }
}
