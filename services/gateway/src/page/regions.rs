//! The live parts of the page. Each is written whole, and sent again when it has changed.

use super::charts;
use super::look::{Adapter, Look, Row};
use super::pulse;
use maud::{Markup, html};
use proto::{Generation, Stage};
use std::time::{Duration, UNIX_EPOCH};

/// Every region by the name of its place.
pub(super) fn all(look: &Look) -> [(&'static str, Markup); 8] {
    [
        ("state", state(look)),
        ("stages", stages(look)),
        (
            "documents",
            documents(&look.rows, "Nothing yet. Write something above, or drop a file on the page."),
        ),
        ("learning", learning(look)),
        ("retention", retention(look)),
        ("adapters", adapters(look)),
        ("model", models(look)),
        ("domains", domains(look)),
    ]
}

fn state(look: &Look) -> Markup {
    let learning = pulse::now(&look.beats, look.now_ms);
    html! {
        @if !look.ready {
            span.dot.off aria-hidden="true" {} "not ready"
        } @else if let Some(beat) = learning {
            span.dot.busy aria-hidden="true" {} "answers, and learns " (beat.lineage)
        } @else {
            span.dot aria-hidden="true" {} "ready"
        }
    }
}

fn stages(look: &Look) -> Markup {
    let tally = &look.tally;
    let tiles = [
        ("accepted", tally.judging, "being judged", "on disk, not judged yet"),
        ("waiting", tally.waiting(), "waiting", "kept, next to be learned"),
        ("live", tally.live, "live", "learned, and served"),
        ("refused", tally.refused(), "refused", "will not be learned"),
        ("set_aside", tally.aside(), "set aside", "kept, in no served generation"),
    ];
    html! {
        @for (stage, count, name, meaning) in tiles {
            li class={ "tile " (stage) } title=(meaning) {
                strong { (count) } " " span { (name) }
            }
        }
    }
}

/// Documents, or what is said where there is none.
pub(super) fn documents(rows: &[Row], none: &str) -> Markup {
    if rows.is_empty() {
        return html! { p.empty { (none) } };
    }
    html! {
        table {
            caption.hidden { "The newest documents, and where each is" }
            thead { tr { th scope="col" { "Document" } th scope="col" { "Domain" } th scope="col" { "Where it is" }
                th scope="col" { "Given" } th scope="col" { span.hidden { "Forget" } } } }
            tbody { @for row in rows { (document(row)) } }
        }
    }
}

fn document(row: &Row) -> Markup {
    let (status, id) = (&row.status, &row.status.id);
    html! {
        tr id={ "document-" (id) } data-stage=(stage(status.status).0) {
            td {
                span.excerpt { (row.excerpt) }
                small { code title="the document's id" { (id) } @if let Some(source) = &status.source { " from " (source) } }
            }
            td data-label="Domain" { (status.domain) }
            td data-label="Where it is" {
                span class={ "stage " (stage(status.status).0) } { (stage(status.status).1) }
                @if let Some(reason) = &status.reason { small { (reason) } }
                @if let Some(generation) = &status.generation { small { "generation " code { (short(generation.as_str())) } } }
            }
            td data-label="Given" { (time(row.submitted_ms)) }
            td {
                button.quiet type="button" data-act="forget" data-id=(id) data-what=(row.excerpt) id={ "forget-" (id) } {
                    "Forget" span.hidden { " " (row.excerpt) }
                }
            }
        }
    }
}

/// A stage's class, and what it is called.
fn stage(stage: Stage) -> (&'static str, &'static str) {
    match stage {
        Stage::Accepted => ("accepted", "being judged"),
        Stage::Refused => ("refused", "refused"),
        Stage::Probe => ("probe", "held out for the gate"),
        Stage::Waiting => ("waiting", "waiting to be learned"),
        Stage::Learned => ("learned", "learned, about to be live"),
        Stage::Live => ("live", "live"),
        Stage::SetAside => ("set_aside", "set aside"),
    }
}

/// Why nothing is being learned.
fn idle(look: &Look) -> &'static str {
    match (look.learning, look.disk_full) {
        (false, _) => "switched off",
        (true, true) => "waits for room on the disk",
        (true, false) => "nothing just now",
    }
}

fn learning(look: &Look) -> Markup {
    let queue: Vec<(&str, u64)> =
        look.lineages.iter().filter(|a| a.waiting > 0).map(|a| (a.domain.as_str(), a.waiting)).collect();
    let now = pulse::now(&look.beats, look.now_ms);
    let latest = look.lineages.iter().filter_map(|adapter| adapter.generations.first());
    let latest = latest.max_by_key(|generation| generation.manifest);
    html! {
        dl.figures {
            @if let Some(beat) = now {
                div { dt { "learning" } dd { (beat.lineage) } }
                div { dt { "loss, nats a token" } dd { (format!("{:.3}", beat.loss)) } }
                div { dt { "tokens a second" } dd { (grouped(beat.tokens_per_s)) } }
            } @else {
                div { dt { "learning" } dd { (idle(look)) } }
            }
            div { dt { "queue" } dd {
                @if queue.is_empty() { (look.tally.waiting()) }
                @for (n, (domain, count)) in queue.iter().enumerate() {
                    @if n > 0 { ", " } (count) " in " (domain)
                }
            } }
        }
        @if !look.beats.is_empty() {
            figure {
                div.chart role="img" aria-label=(described(look)) { (charts::loss(&look.beats, look.now_ms)) }
                figcaption { "Loss while it learned, nats a token. " (legend(look)) }
            }
        }
        @if let Some(generation) = latest { p.note { "The last batch: " (batch(generation)) } }
    }
}

/// The names of the lines of the chart, by their colours.
fn legend(look: &Look) -> Markup {
    let mut names: Vec<&str> = look.beats.iter().map(|beat| beat.lineage.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    html! { @for (n, name) in names.iter().enumerate() { span class={ "line line-" (n % charts::LINES.len()) } { (name) } " " } }
}

fn described(look: &Look) -> String {
    let (first, last) = (look.beats.first(), look.beats.last());
    let loss = |beat: Option<&pulse::Beat>| beat.map_or(f64::NAN, |beat| beat.loss);
    format!(
        "Loss over the last minutes of learning, from {:.2} to {:.2} nats a token",
        loss(first),
        loss(last)
    )
}

fn batch(generation: &Generation) -> Markup {
    let report = &generation.report;
    let speed = report.tokens as f64 / f64::from(report.seconds.max(1e-3));
    html! {
        (documents_of(generation.documents)) " in " (generation.lineage) ", "
        (format!("{}, {} {} in {:.1} s, {} tokens a second", report.in_words(), report.steps,
            if report.steps == 1 { "step" } else { "steps" }, report.seconds, grouped(speed)))
    }
}

fn retention(look: &Look) -> Markup {
    let measured: Vec<&Adapter> =
        look.lineages.iter().filter(|adapter| !charts::probes(adapter).is_empty()).collect();
    html! {
        @if measured.is_empty() {
            p.empty { "Once something is learned, this shows what each new generation cost of what was known before." }
        }
        @for adapter in &measured {
            figure.heat {
                figcaption { h3 { (adapter.domain) } }
                div.scroll tabindex="0" role="region" aria-label={ "Retention of " (adapter.domain) } {
                    div.chart.fixed aria-hidden="true" { (charts::retention(adapter)) }
                }
                details id={ "matrix-" (adapter.domain) } {
                    summary { "As a table" }
                    div.scroll tabindex="0" role="region" aria-label={ "Retention of " (adapter.domain) ", as a table" } {
                        (matrix(adapter))
                    }
                }
            }
        }
    }
}

fn matrix(adapter: &Adapter) -> Markup {
    html! {
        table.matrix {
            caption.hidden { "Loss of " (adapter.domain) " in nats a token, by probe and generation" }
            thead { tr { th scope="col" { "Probe" }
                @for generation in adapter.generations.iter().rev() { th scope="col" { (generation.number) } } } }
            tbody {
                @for probe in charts::probes(adapter) {
                    tr {
                        th scope="row" { (charts::name(probe)) }
                        @for generation in adapter.generations.iter().rev() {
                            td { @match charts::measured(generation, probe) {
                                Some(measure) => { (format!("{:.3}", measure.after)) }
                                None => { "–" }
                            } }
                        }
                    }
                }
            }
        }
    }
}

fn adapters(look: &Look) -> Markup {
    html! {
        @if look.lineages.is_empty() { p.empty { "No adapter yet: the base answers alone." } }
        @for adapter in &look.lineages {
            article.adapter aria-labelledby={ "adapter-" (adapter.domain) } {
                header {
                    h3 id={ "adapter-" (adapter.domain) } { (adapter.domain) }
                    p {
                        (documents_of(adapter.lineage.documents)) " learned"
                        @if adapter.waiting > 0 { ", " (adapter.waiting) " waiting" }
                        @if adapter.lineage.attempt > 0 { ", attempt " (adapter.lineage.attempt + 1) }
                    }
                }
                @if adapter.generations.is_empty() { p.note { "No generation is served: the base answers." } }
                ol.generations {
                    @for (n, generation) in adapter.generations.iter().enumerate() {
                        (entry(adapter, generation, n, look.kept))
                    }
                }
            }
        }
    }
}

/// The `n`th generation before the current one, of which `kept` can be served.
fn entry(adapter: &Adapter, generation: &Generation, n: usize, kept: usize) -> Markup {
    let current = adapter.generations.first().map(|generation| generation.id.as_str());
    let parent = generation.parent.as_ref().map(|id| id.as_str());
    // What the button leads back to: from the current one to its parent, and to each one before.
    let to = if n == 0 { parent } else { Some(generation.id.as_str()) };
    let there = to.is_none() || n.max(1) < kept;
    html! {
        li.live[n == 0] {
            details id={ "receipt-" (generation.id) } {
                summary {
                    code { (short(generation.id.as_str())) } " "
                    @if n == 0 { span.stage.live { "served" } " " }
                    span.when { (documents_of(generation.documents)) ", " (time(generation.published_ms)) }
                }
                (receipt(generation))
            }
            @if there {
                button.quiet type="button" data-act="rollback" data-domain=(adapter.domain) data-from=[current]
                    data-to=[to] id={ "rollback-" (generation.id) } {
                    @if n == 0 { "Roll back" } @else { "Serve this" }
                    span.hidden { " " (adapter.domain) " to " (to.map_or("the base", short)) }
                }
            }
        }
    }
}

fn receipt(generation: &Generation) -> Markup {
    let measured = generation.receipt.probes.iter().filter(|row| row.measure.examples > 0);
    html! {
        p.note { @if generation.report.steps > 0 { (batch(generation)) } @else { "Imported or merged, not trained here." } }
        @if let Some(head) = &generation.answer_head {
            @if head.trusted { p.note { "Knows " (head.answers) " answers that repeat, from " (head.prompts) " prompts." } }
            @if head.facts > 0 { p.note { "Remembers " (head.facts) " answers that come once, each with its prompt." } }
            @if head.passages > 0 { p.note { "Remembers " (head.passages) " sentences of texts, word for word." } }
        }
        div.scroll tabindex="0" role="region" aria-label={ "Receipt of generation " (short(generation.id.as_str())) } {
            table.receipt {
                caption { "Retention receipt, nats a token" }
                thead { tr { th scope="col" { "Probe" } th scope="col" { "Examples" } th scope="col" { "Best" }
                    th scope="col" { "Before" } th scope="col" { "After" } th scope="col" { "Rise, at most" }
                    th scope="col" { "Allowed" } th scope="col" { "To the letter" } } }
                tbody {
                    @for row in measured {
                        @let measure = &row.measure;
                        tr {
                            th scope="row" { (charts::name(&row.probe)) }
                            td { (measure.examples) }
                            @for figure in [measure.best, measure.before, measure.after, measure.rise_upper, measure.rise_allowed] {
                                td { (format!("{figure:.4}")) }
                            }
                            td { (measure.recited.map(|said| format!("{} to {}", said.best, said.after)).unwrap_or_default()) }
                        }
                    }
                }
            }
        }
    }
}

fn models(look: &Look) -> Markup {
    html! {
        option value="auto" { "auto: whoever fits" }
        option value="base" { "base: " (look.base_name) }
        @for adapter in &look.lineages { option value=(adapter.domain) { (adapter.domain) } }
    }
}

fn domains(look: &Look) -> Markup {
    html! { @for adapter in &look.lineages { option value=(adapter.domain) {} } }
}

/// A moment; the page's script writes it as its reader would.
fn time(at_ms: u64) -> Markup {
    let date = httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_millis(at_ms.min(253_402_300_799_000)));
    html! { time data-ms=(at_ms) { (date) } }
}

fn documents_of(count: u64) -> String {
    if count == 1 { "1 document".to_owned() } else { format!("{count} documents") }
}

/// The beginning of a long name.
fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

/// A whole number, its thousands apart.
fn grouped(number: f64) -> String {
    let digits = format!("{:.0}", number.max(0.0));
    let mut grouped = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        assert_eq!([0.4, 999.0, 1_000.0, 1_234_567.0].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }
}
