//! What settings take.

use super::Settings;
use anyhow::ensure;
use config::Config;
use std::ops::RangeInclusive;

/// Settings that are one of some words.
pub(super) const WORDS: [(&str, &[&str]); 8] = [
    ("base.device", &["auto", "cpu", "cuda", "mps"]),
    ("base.precision", &["auto", "f32", "bf16", "f16"]),
    ("base.quantisation", &["none", "int8", "nf4"]),
    ("ingest.views", &["verbatim", "chat", "both"]),
    ("replay.strategy", &["reservoir", "importance", "diversity", "hybrid"]),
    ("train.adapters", &["per-domain", "shared"]),
    ("train.products", &["auto", "own", "int8"]),
    ("telemetry.format", &["text", "json"]),
];

/// Refuses other words, and says which there are.
pub(super) fn words(config: &Config) -> anyhow::Result<()> {
    for (key, words) in WORDS {
        let word = config.get_string(key)?;
        if !words.contains(&word.as_str())
            && let Some((last, others)) = words.split_last()
        {
            anyhow::bail!("{key} is {word:?}; it takes {} or {last}", others.join(", "));
        }
    }
    Ok(())
}

impl Settings {
    pub(super) fn validate(&self) -> anyhow::Result<()> {
        let (r, t, c) = (&self.replay, &self.train, &self.consolidate);
        // More threads than a few for each core only wait for each other, and are a slip of the finger.
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        within("base.threads", self.base.threads, 0..=(4 * cores).min(1024))?;
        within("replay.new_data_ratio", r.new_data_ratio, 0.05..=1.0)?;
        within("replay.held_out_share", r.held_out_share, 0.0..=0.5)?;
        within("replay.capacity", r.capacity, 1..=10_000_000)?;
        within("replay.batch_examples", r.batch_examples, 1..=100_000)?;
        within("replay.batch_counted", r.batch_counted, 1..=100_000)?;
        within("replay.anchors", r.anchors, 0..=10_000)?;
        within("replay.anchor_tokens", r.anchor_tokens, 2..=4096)?;
        within("train.rank", t.rank, 1..=1024)?;
        within("train.alpha", t.alpha, 1e-3..=1e5)?;
        within("train.top_layers", t.top_layers, 0..=1024)?;
        within("train.latents_mb_max", t.latents_mb_max, 0..=1 << 20)?;
        within("train.rate", t.rate, 0.0..=1.0)?;
        within("train.answer_rate", t.answer_rate, 0.01..=100.0)?;
        within("train.passes", t.passes, 1..=1000)?;
        within("train.answer_passes_max", t.answer_passes_max, 1..=10_000)?;
        within("train.passage_tokens_max", t.passage_tokens_max, 0..=1 << 30)?;
        within("train.loss_target", t.loss_target, 0.0..=10.0)?;
        within("train.steps_min", t.steps_min, 1..=10_000)?;
        within("train.review_passes", t.review_passes, 0..=1000)?;
        within("train.step_tokens", t.step_tokens, 16..=1_000_000)?;
        within("train.micro_tokens", t.micro_tokens, 16..=1_000_000)?;
        within("train.row_tokens", t.row_tokens, 16..=65_536)?;
        within("train.anchor_share", t.anchor_share, 0.0..=10.0)?;
        within("train.clip", t.clip, 1e-6..=1e6)?;
        within("train.weight_decay", t.weight_decay, 0.0..=10.0)?;
        // Strengths from 3 up were fair while they were of absolute information, and would let nothing be learned now.
        within("train.ewc_lambda", t.ewc_lambda, 0.0..=1.0)?;
        within("train.olora_lambda", t.olora_lambda, 0.0..=1e6)?;
        within("train.olora_parts", t.olora_parts, 1..=512)?;
        ensure!(
            t.olora_lambda == 0.0 || t.olora_parts <= t.rank,
            "train.olora_parts is {}, and train.rank of {} cannot be cut into so many",
            t.olora_parts,
            t.rank
        );
        ensure!(
            t.olora_lambda == 0.0 || t.weight_decay == 0.0,
            "train.weight_decay shrinks what train.olora_lambda has left as it is: set one of them to 0"
        );
        within("train.former_share", t.former_share, 0.0..=0.9)?;
        within("train.former_share_rehearsed", t.former_share_rehearsed, 0.0..=1.0)?;
        within("train.poll_ms", t.poll_ms, 10..=1000)?;
        within("train.share_while_serving", t.share_while_serving, 0.01..=1.0)?;
        within("consolidate.tolerance", c.tolerance, 0.0..=10.0)?;
        within("consolidate.anchor_tolerance", c.anchor_tolerance, 0.0..=10.0)?;
        within("consolidate.attempts_max", c.attempts_max, 1..=10)?;
        within("consolidate.fisher_examples", c.fisher_examples, 1..=10_000)?;
        within("consolidate.fisher_decay", c.fisher_decay, 0.0..=1.0)?;
        crate::telemetry::filter(&self.telemetry.level)?;
        self.validate_doors()
    }

    fn validate_doors(&self) -> anyhow::Result<()> {
        let (g, f, s) = (&self.gateway, &self.filter, &self.supervisor);
        within("gateway.body_bytes_max", g.body_bytes_max, 1024..=1 << 30)?;
        within("gateway.import_bytes_max", g.import_bytes_max, 1024..=1 << 31)?;
        within("gateway.upload_bytes_max", g.upload_bytes_max, 1024..=1 << 31)?;
        within("gateway.document_bytes_max", g.document_bytes_max, 64..=1 << 26)?;
        within("gateway.documents_per_request_max", g.documents_per_request_max, 1..=100_000)?;
        within("gateway.intake_documents_max", g.intake_documents_max, 1..=100_000_000)?;
        within("gateway.prompt_bytes_max", g.prompt_bytes_max, 64..=1 << 28)?;
        within("gateway.requests_per_s", g.requests_per_s, 1..=1_000_000)?;
        within("gateway.burst", g.burst, 1..=1_000_000)?;
        within("gateway.header_seconds_max", g.header_seconds_max, 1..=600)?;
        within("gateway.body_seconds_max", g.body_seconds_max, 1..=600)?;
        within("gateway.generation_seconds_max", g.generation_seconds_max, 1..=86_400)?;
        for key in &g.api_keys {
            let fits = (16..=256).contains(&key.len()) && key.bytes().all(|b| b.is_ascii_graphic());
            ensure!(fits, "gateway.api_keys: each is 16 to 256 visible ASCII characters");
        }
        within("ingest.max_seq_len", self.ingest.max_seq_len, 16..=65_536)?;
        within("ingest.questions", self.ingest.questions, 0..=1000)?;
        within("filter.repetition_max", f.repetition_max, 0.0..=1.0)?;
        within("filter.near_duplicate", f.near_duplicate, 0.1..=1.0)?;
        within("checkpoint.generations_kept", self.checkpoint.generations_kept, 1..=10_000)?;
        within("infer.max_running", self.infer.max_running, 1..=1024)?;
        within("infer.queue_max", self.infer.queue_max, 0..=65_536)?;
        within("infer.cache_mb_max", self.infer.cache_mb_max, 1..=1 << 20)?;
        within("infer.max_tokens_default", self.infer.max_tokens_default, 1..=1 << 20)?;
        within("infer.route_strictness", self.infer.route_strictness, 0.0..=2.0)?;
        within("infer.route_top", self.infer.route_top, 1..=8)?;
        within("supervisor.restart_delay_ms_min", s.restart_delay_ms_min, 1..=60_000)?;
        within("supervisor.restart_delay_ms_max", s.restart_delay_ms_max, s.restart_delay_ms_min..=600_000)?;
        within("supervisor.restarts_max", s.restarts_max, 1..=1000)?;
        within("supervisor.restarts_window_s", s.restarts_window_s, 1..=86_400)?;
        within("supervisor.stop_seconds_max", s.stop_seconds_max, 1..=600)?;
        within("limits.memory_mb_max", self.limits.memory_mb_max, 0..=1 << 24)?;
        within("limits.disk_free_learn_percent", self.limits.disk_free_learn_percent, 0..=90)?;
        within("limits.disk_free_intake_percent", self.limits.disk_free_intake_percent, 0..=90)
    }
}

fn within<T: PartialOrd + std::fmt::Display>(
    key: &str,
    value: T,
    range: RangeInclusive<T>,
) -> anyhow::Result<()> {
    // A value that is not a number is in no range.
    ensure!(range.contains(&value), "{key} is {value}; it takes {} to {}", range.start(), range.end());
    Ok(())
}
