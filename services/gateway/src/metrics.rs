//! What the gateway counts, under vLLM's names with our prefix, and the page that Prometheus reads.

use anyhow::Context;
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
        Ok(Self(builder.install_recorder().context("metrics are recorded elsewhere already")?))
    }

    /// The page, in Prometheus' text format.
    pub(crate) fn page(&self) -> String {
        self.0.render()
    }

    /// Keeps the samples from piling up, for ever.
    pub(crate) async fn upkeep(self) {
        loop {
            tokio::time::sleep(UPKEEP_EVERY).await;
            self.0.run_upkeep();
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
    first_token: bool,
}

impl Running {
    pub(crate) fn start() -> Self {
        metrics::gauge!(RUNNING).increment(1.0);
        Self { start: Instant::now(), first_token: false }
    }

    /// A piece of text came.
    pub(crate) fn piece(&mut self) {
        if !std::mem::replace(&mut self.first_token, true) {
            metrics::histogram!(FIRST_TOKEN).record(self.start.elapsed().as_secs_f64());
        }
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
