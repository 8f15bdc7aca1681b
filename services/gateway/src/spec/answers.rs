//! What answers hold, for the description alone.
#![expect(dead_code, reason = "these types describe; answers are written as JSON where they are made")]

use serde::Serialize;
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// Why a request was not answered.
#[derive(Serialize, ToSchema)]
pub(crate) struct Failure {
    error: Reason,
}

#[derive(Serialize, ToSchema)]
struct Reason {
    /// What is wrong, and what to do about it.
    message: String,
    r#type: String,
    /// The field or parameter at fault.
    #[schema(required)]
    param: Option<String>,
    #[schema(required)]
    code: Option<String>,
}

/// An event of a stream.
#[derive(Serialize, ToSchema)]
pub(crate) struct StreamEvent {
    /// A piece of the answer, as JSON, or why it broke off; `[DONE]` in the last one.
    data: String,
}

/// Where a document is on its way.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Stage {
    Accepted,
    Refused,
    Probe,
    Waiting,
    Learned,
    Live,
    SetAside,
}

/// What became of a submission: of its one document, or of each.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Submitted {
    One(Taken),
    Several(TakenList),
}

#[derive(Serialize, ToSchema)]
pub(crate) struct TakenList {
    documents: Vec<Taken>,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct Taken {
    id: String,
    status: Stage,
    domain: String,
    /// Where it lies in the files of an upload.
    place: Option<String>,
}

/// What became of a person's feedback.
#[derive(Serialize, ToSchema)]
pub(crate) struct Heard {
    id: String,
    status: Stage,
    domain: String,
    /// The document that taught the bad answer.
    #[schema(required)]
    forgotten: Option<String>,
}

/// Documents, the newest first.
#[derive(Serialize, ToSchema)]
pub(crate) struct Documents {
    documents: Vec<Shown>,
}

/// Where a document is, and all that happened to it.
#[derive(Serialize, ToSchema)]
pub(crate) struct Shown {
    id: String,
    status: Stage,
    domain: String,
    source: Option<String>,
    derived_from: Option<String>,
    /// Why it was refused or set aside.
    reason: Option<String>,
    /// The generation that learned it.
    generation: Option<String>,
    /// Pieces of it that are held out for the gate.
    held_out: u32,
    trail: Vec<Event>,
    /// Where asked for: what it says, in the form that it was submitted in.
    #[schema(value_type = Option<Object>)]
    content: Option<serde_json::Value>,
}

#[derive(Serialize, ToSchema)]
struct Event {
    event: String,
    /// Milliseconds since 1970.
    at_ms: u64,
    detail: Option<String>,
}

/// What was forgotten with a document.
#[derive(Serialize, ToSchema)]
pub(crate) struct Forgotten {
    id: String,
    derived_documents: u32,
    removed_generations: u32,
    /// The generation that its domain serves now; null is the base.
    #[schema(required)]
    serving: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
}

/// Who answered, how well the question fitted, and what the answers are from.
#[derive(Serialize, ToSchema)]
struct Provenance {
    adapters: Vec<Weighted>,
    #[schema(required)]
    confidence: Option<f32>,
    /// Documents, the likeliest of each choice first; of a stream, those of the choice that ends. None where the model answers
    /// by itself, or with a label that many documents have.
    sources: Vec<Source>,
}

/// A document that an answer is from.
#[derive(Serialize, ToSchema)]
struct Source {
    /// The index of the choice.
    choice: u32,
    /// Its id: see `/v1/documents/{id}`.
    document: String,
    /// Where the document came from, as it was said when it was given.
    #[schema(required)]
    source: Option<String>,
    /// How likely the answer is from there, and neither the model's own nor another document's, 0 to 1.
    likely: f32,
}

#[derive(Serialize, ToSchema)]
struct Weighted {
    domain: String,
    #[schema(required)]
    generation: Option<String>,
    weight: f32,
}

macro_rules! completion {
    ($(#[$doc:meta])* $name:ident of $choice:ident { $($own:tt)* }) => {
        $(#[$doc])*
        #[derive(Serialize, ToSchema)]
        pub(crate) struct $name {
            id: String,
            object: String,
            created: u64,
            model: String,
            system_fingerprint: String,
            choices: Vec<$choice>,
            usage: Usage,
            engram: Provenance,
        }

        #[derive(Serialize, ToSchema)]
        struct $choice {
            index: u32,
            /// `stop`, or `length`.
            #[schema(required)]
            finish_reason: Option<String>,
            #[schema(required, value_type = Option<Object>)]
            logprobs: Option<serde_json::Value>,
            $($own)*
        }
    };
}

completion! {
    /// What the assistant says.
    ChatCompletion of ChatChoice { message: Spoken, }
}

completion! {
    /// How the text goes on.
    TextCompletion of TextChoice { text: String, }
}

#[derive(Serialize, ToSchema)]
struct Spoken {
    role: String,
    content: String,
    #[schema(required)]
    refusal: Option<String>,
}

/// A vector for each text.
#[derive(Serialize, ToSchema)]
pub(crate) struct Embeddings {
    object: String,
    data: Vec<Embedding>,
    model: String,
    usage: InputUsage,
}

#[derive(Serialize, ToSchema)]
struct Embedding {
    object: String,
    index: u32,
    embedding: Vector,
}

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum Vector {
    Float(Vec<f32>),
    Base64(String),
}

#[derive(Serialize, ToSchema)]
struct InputUsage {
    prompt_tokens: u64,
    total_tokens: u64,
}

/// The base, the router, each domain and each generation.
#[derive(Serialize, ToSchema)]
pub(crate) struct Models {
    object: String,
    data: Vec<Model>,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct Model {
    id: String,
    object: String,
    created: u64,
    owned_by: String,
    /// The base.
    root: String,
    /// What it stands on.
    #[schema(required)]
    parent: Option<String>,
    /// The generation that answers.
    #[schema(required)]
    generation: Option<String>,
    max_model_len: u32,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct Tokenized {
    count: u32,
    max_model_len: u32,
    tokens: Vec<u32>,
    #[schema(required)]
    token_strs: Option<Vec<String>>,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct Untokenized {
    prompt: String,
}

/// Where each lineage stands.
#[derive(Serialize, ToSchema)]
pub(crate) struct Adapters {
    adapters: Vec<Adapter>,
}

#[derive(Serialize, ToSchema)]
struct Adapter {
    domain: String,
    /// Null while the base answers alone.
    #[schema(required)]
    generation: Option<String>,
    documents: u64,
    #[schema(required)]
    published_ms: Option<u64>,
    cursor: u64,
    attempt: u32,
    #[schema(value_type = Vec<Object>)]
    set_aside: Vec<serde_json::Value>,
}

/// The generations of a lineage, the current one first.
#[derive(Serialize, ToSchema)]
pub(crate) struct AdapterLog {
    domain: String,
    #[schema(required)]
    current: Option<String>,
    generations: Vec<Generation>,
}

#[derive(Serialize, ToSchema)]
struct Generation {
    generation: String,
    live: bool,
    #[schema(required)]
    parent: Option<String>,
    merged_from: Vec<String>,
    number: u64,
    documents: u64,
    after: u64,
    through: u64,
    published_ms: u64,
    /// What training took.
    #[schema(value_type = Object)]
    report: serde_json::Value,
    /// What the gate measured.
    #[schema(value_type = Object)]
    receipt: serde_json::Value,
    /// What is known of answers beside the adapter; null where nothing is.
    #[schema(required)]
    known_answers: Option<KnownAnswers>,
}

/// Answers that repeat, such as labels, and the prompts that were counted to tell which of them one has; answers that come once; and
/// what texts say.
#[derive(Serialize, ToSchema)]
struct KnownAnswers {
    answers: u64,
    prompts: u64,
    /// Answers that repeat have a say: enough would be found for prompts that were not counted.
    trusted: bool,
    /// Answers that come once, and are remembered with their prompts.
    facts: u64,
    /// Sentences and lines of texts, which are remembered word for word.
    passages: u64,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct RolledBack {
    from: String,
    /// Null is the base.
    #[schema(required)]
    to: Option<String>,
}

/// An adapter in PEFT's form.
#[derive(Serialize, ToSchema)]
pub(crate) struct Exported {
    #[schema(value_type = Object)]
    adapter_config: serde_json::Value,
    /// `adapter_model.safetensors`, in base64.
    adapter_model: String,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct Imported {
    domain: String,
    generation: String,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct Health {
    /// `ok`, or `not ready`.
    status: String,
}

/// How the server is.
#[derive(Serialize, ToSchema)]
pub(crate) struct Status {
    version: String,
    pid: u32,
    ready: bool,
    uptime_s: u64,
    #[schema(value_type = Object)]
    base: serde_json::Value,
    data_dir: String,
    documents: BTreeMap<String, u64>,
    learning: bool,
    /// Whether learning waits for room on the disk.
    disk_full: bool,
    #[schema(required)]
    manifest: Option<u64>,
    manifest_live: u64,
    domains: BTreeMap<String, BTreeMap<String, u64>>,
    adapters: Vec<Adapter>,
}
