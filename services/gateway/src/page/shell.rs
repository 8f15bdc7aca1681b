//! The frame of the page: everything that does not change while it is open.

use super::Regions;
use crate::state::State;
use maud::{DOCTYPE, Markup, PreEscaped, html};

/// The page. Regions that are not there yet are empty, and filled by the first events.
pub(super) fn page(state: &State, regions: &Regions, keys: bool) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { "Engram" }
                link rel="icon" href="/assets/icon.svg" type="image/svg+xml";
                link rel="stylesheet" href="/assets/page.css";
                script type="module" src="/assets/page.js" {}
            }
            body data-keys[keys] {
                a.skip href="#teach" { "Skip to the page" }
                (heading(state, regions, keys))
                noscript { p.banner { "Live figures, teaching and asking need JavaScript; `engram status` and `engram chat` do without." } }
                p #trouble .banner role="alert" hidden {}
                main {
                    div.columns { (teach(regions)) (ask(regions)) }
                    section aria-labelledby="h-documents" {
                        h2 #h-documents { "Documents" }
                        ul #stages .stages data-live { (region(regions, "stages")) }
                        form #find role="search" {
                            label.hidden for="says" { "Find documents by what they say" }
                            input #says type="search" maxlength="1000" autocomplete="off" placeholder="Find by what they say";
                        }
                        div #documents data-live { (region(regions, "documents")) }
                    }
                    div.columns {
                        section aria-labelledby="h-learning" {
                            h2 #h-learning { "Learning now" }
                            div #learning data-live { (region(regions, "learning")) }
                        }
                        (retention(regions))
                    }
                    section aria-labelledby="h-adapters" {
                        h2 #h-adapters { "Adapters" }
                        p.note { "One for each domain. Open a generation to see the receipt of its measurements." }
                        div #adapters data-live { (region(regions, "adapters")) }
                    }
                }
                footer { p { a href="/docs" { "the API" } " · " a href="/v1/status" { "status" } " · " a href="/metrics" { "metrics" } } }
                (dialogs())
                div #drop hidden aria-hidden="true" { p { "Drop files to teach them" } }
            }
        }
    }
}

fn region(regions: &Regions, name: &str) -> Markup {
    PreEscaped(regions.get(name).cloned().unwrap_or_default())
}

fn heading(state: &State, regions: &Regions, keys: bool) -> Markup {
    let info = &state.gateway.info;
    html! {
        header.top {
            img src="/assets/icon.svg" alt="" width="36" height="36";
            div {
                h1 { "Engram" }
                // Whoever has shown no key is not told what runs here.
                @if !keys {
                    p { (info.base_name) ", " (millions(info.parameters)) " parameters, on " (info.device) " in " (info.precision) }
                }
            }
            p #state role="status" data-live { (region(regions, "state")) }
        }
    }
}

fn millions(parameters: u64) -> String {
    format!("{:.1} million", parameters as f64 / 1e6)
}

fn teach(regions: &Regions) -> Markup {
    html! {
        section #teach aria-labelledby="h-teach" tabindex="-1" {
            h2 #h-teach { "Teach" }
            form #submit {
                fieldset.kinds {
                    legend.hidden { "What to teach" }
                    label { input type="radio" name="kind" value="pair" checked; " A question and its answer" }
                    label { input type="radio" name="kind" value="text"; " A text" }
                }
                div #pair {
                    label for="prompt" { "Question" }
                    input #prompt type="text" autocomplete="off" placeholder="Where is the spare key?";
                    label for="completion" { "Answer" }
                    textarea #completion rows="4" placeholder="Under the third flower pot." {}
                }
                div #plain hidden {
                    label for="text" { "Text" }
                    textarea #text rows="6" {}
                }
                div.row {
                    label for="domain" { "Domain" }
                    input #domain type="text" list="domains" value="general" autocomplete="off" spellcheck="false";
                    datalist #domains data-live { (region(regions, "domains")) }
                    button type="submit" { "Learn" }
                }
                p.note {
                    label.file for="files" { "Or choose files" }
                    input #files .hidden type="file" multiple accept=".txt,.md,.jsonl,.ndjson,.html,.pdf,.rs,.py,.toml,text/*";
                    ", or drop them anywhere: text, code, HTML, PDF, or JSONL with a document a line"
                }
            }
            p #taught role="status" {}
        }
    }
}

fn ask(regions: &Regions) -> Markup {
    html! {
        section #ask aria-labelledby="h-ask" {
            h2 #h-ask { "Ask" }
            div #talk role="log" aria-label="Conversation" tabindex="0" {
                p.empty { "Ask what you have taught. Each answer says which adapter gave it, and which documents it is from." }
            }
            form #chat {
                label.hidden for="question" { "Your question" }
                div.row.say {
                    textarea #question rows="2" placeholder="Ask something" {}
                    button #send type="submit" { "Ask" }
                }
                div.row {
                    span.field.wide {
                        label for="model" { "Model" }
                        select #model data-live { (region(regions, "model")) }
                    }
                    span.field {
                        label for="temperature" { "Temperature" }
                        input #temperature type="number" min="0" max="2" step="0.1" value="0";
                    }
                    button #fresh .quiet type="button" { "New chat" }
                }
            }
        }
    }
}

fn retention(regions: &Regions) -> Markup {
    html! {
        section aria-labelledby="h-retention" {
            h2 #h-retention { "Retention" }
            p.note {
                "Loss on what was known, by probe, for each generation from left to right. "
                span.key.kept { "teal" } " as good as ever, " span.key.limit { "pale" } " what the gate just lets through, "
                span.key.lost { "red" } " beyond it."
            }
            div #retention data-live { (region(regions, "retention")) }
        }
    }
}

fn dialogs() -> Markup {
    html! {
        dialog #confirm aria-labelledby="h-confirm" aria-describedby="confirm-what" {
            form method="dialog" {
                h2 #h-confirm {}
                p #confirm-what {}
                div.row {
                    button.quiet value="no" autofocus { "Cancel" }
                    button #confirm-yes .danger value="yes" {}
                }
            }
        }
        dialog #login aria-labelledby="h-login" {
            form method="dialog" {
                h2 #h-login { "This server asks for a key" }
                p #login-why { "One of those in `gateway.api_keys`. It is kept until this tab is closed, and sent to this server only." }
                label for="key" { "Key" }
                input #key type="password" autocomplete="current-password" required;
                div.row { button value="yes" { "Open" } }
            }
        }
    }
}
