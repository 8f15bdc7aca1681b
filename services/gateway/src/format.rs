//! `response_format`: whether an answer is any text, or JSON.

use crate::error::{ApiError, Result};
use crate::fields::Fields;
use serde_json::{Value, json};

/// The largest schema, as JSON.
const SCHEMA_BYTES_MAX: usize = 64 << 10;
/// The longest name of a schema, as at OpenAI.
const NAME_CHARS_MAX: usize = 64;

/// Reads `response_format`; gives the schema that the answer follows, if any.
pub(crate) fn read(fields: &mut Fields) -> Result<Option<String>> {
    let Some(format) = fields.take("response_format") else { return Ok(None) };
    let mut format = Fields::of(format, fields.path("response_format"))?;
    let schema = match format.string("type")?.as_deref() {
        Some("text") => None,
        Some("json_object") => Some(json!({"type": "object"}).to_string()),
        Some("json_schema") => Some(named(&mut format)?),
        _ => return Err(format.must_be("type", "'text', 'json_object' or 'json_schema'")),
    };
    format.finish()?;
    Ok(schema)
}

/// Reads `json_schema`. Its name and description are for people, and an answer follows it, strict or not.
fn named(format: &mut Fields) -> Result<String> {
    let what = "an object with a 'name' and a 'schema'";
    let named = format.take("json_schema").ok_or_else(|| format.must_be("json_schema", what))?;
    let mut named = Fields::of(named, format.path("json_schema"))?;
    let name = named.string("name")?;
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    if !name.is_some_and(|name| (1..=NAME_CHARS_MAX).contains(&name.len()) && name.bytes().all(letter)) {
        let what = format!("1 to {NAME_CHARS_MAX} letters, digits, '_' and '-'");
        return Err(named.must_be("name", &what));
    }
    named.string("description")?;
    named.bool("strict")?;
    let schema = match named.take("schema") {
        Some(schema @ Value::Object(_)) => schema.to_string(),
        _ => return Err(named.must_be("schema", "an object, a JSON Schema")),
    };
    if schema.len() > SCHEMA_BYTES_MAX {
        let (path, bytes) = (named.path("schema"), schema.len());
        let message = format!("'{path}' has {bytes} bytes, and {SCHEMA_BYTES_MAX} are read: simplify it");
        return Err(ApiError::too_large(message).param(path));
    }
    named.finish()?;
    Ok(schema)
}

#[cfg(test)]
mod tests {
    use super::*;
    use actix_web::ResponseError;

    fn format(format: Value) -> Result<Option<String>> {
        read(&mut Fields::of(json!({"response_format": format}), "")?)
    }

    #[test]
    fn a_schema_keeps_the_order_of_its_fields() {
        assert_eq!(format(json!(null)).expect("valid"), None);
        assert_eq!(format(json!({"type": "text"})).expect("valid"), None);
        assert_eq!(
            format(json!({"type": "json_object"})).expect("valid"),
            Some(r#"{"type":"object"}"#.into())
        );
        let schema = r#"{"type":"object","properties":{"z":{"type":"null"},"a":{"type":"null"}}}"#;
        let given = serde_json::from_str::<Value>(schema).expect("JSON");
        let named = json!({"name": "z_a-1", "description": "d", "schema": given, "strict": true});
        let read = format(json!({"type": "json_schema", "json_schema": named})).expect("valid");
        assert_eq!(read.as_deref(), Some(schema));
    }

    #[test]
    fn a_refusal_names_the_field() {
        let named = |named: Value| json!({"type": "json_schema", "json_schema": named});
        let large = json!({"enum": ["x".repeat(SCHEMA_BYTES_MAX)]});
        for (given, param, status) in [
            (json!("json_object"), "", 400),
            (json!({}), ".type", 400),
            (json!({"type": "xml"}), ".type", 400),
            (json!({"type": "text", "json_schema": {}}), ".json_schema", 400),
            (json!({"type": "json_schema"}), ".json_schema", 400),
            (named(json!([])), ".json_schema", 400),
            (named(json!({"schema": {}})), ".json_schema.name", 400),
            (named(json!({"name": "a b", "schema": {}})), ".json_schema.name", 400),
            (named(json!({"name": "a".repeat(65), "schema": {}})), ".json_schema.name", 400),
            (named(json!({"name": "a"})), ".json_schema.schema", 400),
            (named(json!({"name": "a", "schema": "{}"})), ".json_schema.schema", 400),
            (named(json!({"name": "a", "schema": {}, "strict": 1})), ".json_schema.strict", 400),
            (named(json!({"name": "a", "schema": {}, "more": 1})), ".json_schema.more", 400),
            (named(json!({"name": "a", "schema": large})), ".json_schema.schema", 413),
        ] {
            let error = format(given.clone()).expect_err("must be refused");
            assert_eq!(error.status_code().as_u16(), status, "{given}");
            assert_eq!(error.body()["error"]["param"], format!("response_format{param}"), "{given}");
        }
    }
}
