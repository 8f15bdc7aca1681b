//! What requests hold, for the description alone.
#![expect(dead_code, reason = "these types describe; nothing is read into them")]

use serde::Deserialize;
use std::collections::BTreeMap;
use utoipa::ToSchema;
use utoipa::openapi::schema::{Object, ObjectBuilder, SchemaType, Type};

/// One document, or several.
#[derive(Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Submission {
    /// One document.
    One(Document),
    /// Several, accepted together or not at all.
    Several(DocumentList),
}

/// Several documents.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DocumentList {
    #[schema(min_items = 1)]
    documents: Vec<Document>,
}

/// Something to learn: exactly one of `text`, `prompt` with `completion`, and `messages`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Document {
    /// Raw text: all of it is learned.
    text: Option<String>,
    /// A question.
    prompt: Option<String>,
    /// Its answer, which is what is learned.
    completion: Option<String>,
    /// A conversation; what the assistant says is learned.
    #[schema(min_items = 1, max_items = 4096)]
    messages: Option<Vec<Message>>,
    /// The body of knowledge it belongs to; `general` where left out.
    #[schema(pattern = "^[a-z][a-z0-9_-]{0,63}$")]
    domain: Option<String>,
    /// 1 is never evicted first, and never held out.
    #[schema(minimum = 0, maximum = 1)]
    importance: Option<f32>,
    /// Where it came from.
    source: Option<String>,
    /// The id of a document that it is forgotten with, or the name of a file.
    derived_from: Option<String>,
}

/// Whether something is learned, and where.
#[derive(Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Learn {
    Whether(bool),
    Domain(String),
}

/// Files to learn, as a form. Further fields with a file name are files too.
#[derive(Deserialize, ToSchema)]
pub(crate) struct Upload {
    /// Text, Markdown, source code, JSONL, HTML or PDF.
    #[schema(format = Binary)]
    file: String,
    /// The body of knowledge that all of it belongs to; `general` where left out.
    domain: Option<String>,
    /// From 0 to 1, for all of it.
    importance: Option<f32>,
}

/// What a person says of an exchange: `messages` that end in the answer, or `prompt` with `completion`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct FeedbackRequest {
    rating: Rating,
    /// What a bad answer should have been.
    correction: Option<String>,
    /// The document that a bad answer is from, as its `sources` say: forgotten where it gives this very answer.
    #[schema(pattern = "^[A-Za-z0-9._:-]{1,128}$")]
    document: Option<String>,
    #[schema(min_items = 1, max_items = 4096)]
    messages: Option<Vec<Message>>,
    prompt: Option<String>,
    completion: Option<String>,
    /// The body of knowledge that learns it; `general` where left out.
    #[schema(pattern = "^[a-z][a-z0-9_-]{0,63}$")]
    domain: Option<String>,
    /// 1 is never evicted first, and never held out.
    #[schema(minimum = 0, maximum = 1)]
    importance: Option<f32>,
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Rating {
    Bad,
    Good,
}

/// What somebody says.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Message {
    role: Role,
    content: Said,
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Role {
    System,
    Developer,
    User,
    Assistant,
}

/// A text, or its parts.
#[derive(Deserialize, ToSchema)]
#[serde(untagged)]
enum Said {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Part {
    #[schema(pattern = "^text$")]
    r#type: String,
    text: String,
}

/// One text, or several.
#[derive(Deserialize, ToSchema)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    /// Whether a last event counts the tokens.
    include_usage: Option<bool>,
}

/// Whether an answer is any text, or JSON.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ResponseFormat {
    r#type: Format,
    /// What `json_schema` answers follow.
    json_schema: Option<NamedSchema>,
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Format {
    Text,
    JsonObject,
    JsonSchema,
}

/// A JSON Schema with its name.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NamedSchema {
    /// Has no effect.
    #[schema(pattern = "^[A-Za-z0-9_-]{1,64}$")]
    name: String,
    /// Has no effect.
    description: Option<String>,
    /// A JSON Schema of up to 64 KiB. What cannot be held to is refused.
    #[schema(value_type = Object)]
    schema: serde_json::Value,
    /// Has no effect: an answer follows the schema in any case.
    strict: Option<bool>,
}

/// With a sign or without, which no format of OpenAPI's is.
fn seed() -> Object {
    let types = SchemaType::from_iter([Type::Integer, Type::Null]);
    let told = "Equal seeds give equal text. A whole number of 64 bits.";
    ObjectBuilder::new().schema_type(types).description(Some(told)).build()
}

/// What both ways of asking for text have.
macro_rules! request {
    ($(#[$doc:meta])* $name:ident { $($own:tt)* }) => {
        $(#[$doc])*
        #[derive(Deserialize, ToSchema)]
        #[serde(deny_unknown_fields)]
        pub(crate) struct $name {
            /// `auto`, `base`, a domain, `domain@generation`, or a sum such as `a:0.7+b:0.3`; `auto` where left out.
            model: Option<String>,
            /// Whether the answer comes as server-sent events.
            stream: Option<bool>,
            /// With `stream` alone.
            stream_options: Option<StreamOptions>,
            #[schema(minimum = 1, maximum = 1_048_576)]
            max_tokens: Option<u32>,
            #[schema(minimum = 0, maximum = 2)]
            temperature: Option<f32>,
            #[schema(exclusive_minimum = 0, maximum = 1)]
            top_p: Option<f32>,
            #[schema(minimum = 0, maximum = 4_294_967_295i64)]
            top_k: Option<u32>,
            #[schema(minimum = 0, maximum = 1)]
            min_p: Option<f32>,
            /// Answers wanted, of following seeds.
            #[schema(minimum = 1, maximum = 16)]
            n: Option<u32>,
            /// Up to four texts that end the answer.
            stop: Option<OneOrMore>,
            #[schema(schema_with = seed)]
            seed: Option<u64>,
            /// Added to the logits of tokens, by id.
            logit_bias: Option<BTreeMap<String, f32>>,
            #[schema(minimum = -2, maximum = 2)]
            presence_penalty: Option<f32>,
            #[schema(minimum = -2, maximum = 2)]
            frequency_penalty: Option<f32>,
            #[schema(minimum = 0.1, maximum = 10)]
            repetition_penalty: Option<f32>,
            /// Has no effect.
            user: Option<String>,
            $($own)*
        }
    };
}

request! {
    /// A conversation to go on with.
    ChatRequest {
        #[schema(min_items = 1, max_items = 4096)]
        messages: Vec<Message>,
        /// The newer name of `max_tokens`.
        #[schema(minimum = 1, maximum = 1_048_576)]
        max_completion_tokens: Option<u32>,
        /// Whether tokens are told with their log-probabilities.
        logprobs: Option<bool>,
        /// Alternatives told for each token, with `logprobs`.
        #[schema(minimum = 0, maximum = 20)]
        top_logprobs: Option<u32>,
        /// The form of the answer; it is cut off where it has more than `max_tokens`.
        response_format: Option<ResponseFormat>,
        /// Whether the exchange becomes a document to learn: true, or the domain that learns it.
        learn: Option<Learn>,
    }
}

request! {
    /// A text to continue.
    CompletionRequest {
        prompt: OneOrMore,
        /// Tells tokens with their log-probabilities, and those of this many alternatives.
        #[schema(minimum = 0, maximum = 20)]
        logprobs: Option<u32>,
        /// Equal to `n`: all answers are given.
        #[schema(minimum = 1, maximum = 16)]
        best_of: Option<u32>,
    }
}

/// Texts to give as vectors.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct EmbeddingRequest {
    /// `base` where left out. Not `auto`: vectors of different adapters do not compare.
    model: Option<String>,
    /// Up to 256 texts.
    input: OneOrMore,
    encoding_format: Option<EncodingFormat>,
    /// Has no effect.
    user: Option<String>,
}

/// As numbers, or as their bytes: `f32`, little-endian, in base64.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum EncodingFormat {
    Float,
    Base64,
}

/// A text or a conversation to cut into tokens.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Tokenize {
    model: Option<String>,
    prompt: Option<String>,
    #[schema(min_items = 1, max_items = 4096)]
    messages: Option<Vec<Message>>,
    /// For a prompt: whether the tokens that begin a text are put before it; true where left out.
    add_special_tokens: Option<bool>,
    /// For messages: whether they end where the assistant speaks next; true where left out.
    add_generation_prompt: Option<bool>,
    /// Whether the tokens are spelled out too.
    return_token_strs: Option<bool>,
}

/// Tokens to put together.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Detokenize {
    model: Option<String>,
    #[schema(max_items = 262_144)]
    tokens: Vec<u32>,
}

/// Where to go back to.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RollbackRequest {
    /// A generation before the current one; its parent where left out, the base for the first.
    #[schema(pattern = "^[0-9a-f]{16}$")]
    to: Option<String>,
    /// Refused with 409 when another one is current.
    #[schema(pattern = "^[0-9a-f]{16}$")]
    expected_generation: Option<String>,
}

/// An adapter in PEFT's form.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ImportRequest {
    /// The content of `adapter_config.json`.
    #[schema(value_type = Object)]
    adapter_config: serde_json::Value,
    /// The bytes of `adapter_model.safetensors`, in base64.
    adapter_model: String,
    /// Refused with 409 when another one is current.
    #[schema(pattern = "^[0-9a-f]{16}$")]
    expected_generation: Option<String>,
}

/// Adapters to make one of.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MergeRequest {
    /// Such as `a:0.7+b:0.3`.
    #[schema(pattern = "^[a-z]")]
    from: String,
    /// `linear` where left out, which is exact.
    method: Option<MergeMethod>,
    #[schema(minimum = 1, maximum = 4_294_967_295i64)]
    rank: Option<u32>,
    #[schema(minimum = 0, maximum = 1)]
    density: Option<f32>,
    #[schema(minimum = 0, maximum = 4_294_967_295i64)]
    seed: Option<u32>,
    /// Refused with 409 when another one is current.
    #[schema(pattern = "^[0-9a-f]{16}$")]
    expected_generation: Option<String>,
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum MergeMethod {
    Linear,
    Svd,
    Ties,
    Dare,
}

/// An adapter in the folder `imports` of the data folder.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct LoadLora {
    /// The domain that it answers as.
    #[schema(pattern = "^[a-z][a-z0-9_-]{0,63}$")]
    lora_name: String,
    /// The name of its folder.
    #[schema(min_length = 1)]
    lora_path: String,
    /// Whether it may take the place of an adapter of this name.
    load_inplace: Option<bool>,
}

/// An adapter that was loaded.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct UnloadLora {
    #[schema(pattern = "^[a-z][a-z0-9_-]{0,63}$")]
    lora_name: String,
    /// Has no effect: the name says which it is.
    #[schema(minimum = 0, maximum = 4_294_967_295i64)]
    lora_int_id: Option<u32>,
}
