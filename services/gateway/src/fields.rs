//! Reading an object field by field, so that every refusal names the field at fault.

use crate::error::{ApiError, Result};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// A whole number, in any of the forms that JSON has for it: `4.0` is one.
pub(crate) fn whole(value: &Value) -> Option<i128> {
    /// Up to here f64 holds every whole number.
    const EXACT_MAX: f64 = 9_007_199_254_740_992.0;
    let exact = value.as_u64().map(i128::from).or_else(|| value.as_i64().map(i128::from));
    let float = || value.as_f64().filter(|x| x.fract() == 0.0 && x.abs() <= EXACT_MAX).map(|x| x as i128);
    exact.or_else(float)
}

/// The fields of one object that were not read yet. What is left at the end is unknown, and refused.
pub(crate) struct Fields {
    path: String,
    left: Map<String, Value>,
}

impl Fields {
    /// The fields of `value`, which is found at `path` in the body; the body itself is at "".
    pub(crate) fn of(value: Value, path: impl Into<String>) -> Result<Self> {
        let path = path.into();
        match value {
            Value::Object(left) => Ok(Self { path, left }),
            _ if path.is_empty() => Err(ApiError::malformed("the body must be a JSON object")),
            _ => Err(ApiError::invalid(path, "must be an object")),
        }
    }

    /// Where the field `key` is in the body, as in `documents[3].importance`.
    pub(crate) fn path(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Whether the field is there, with a value that is not null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.left.get(key).is_some_and(|value| !value.is_null())
    }

    /// The field's value. Null counts as absent, as clients send it for what they leave open.
    pub(crate) fn take(&mut self, key: &str) -> Option<Value> {
        self.left.remove(key).filter(|value| !value.is_null())
    }

    /// The error that this field must be `what`.
    pub(crate) fn must_be(&self, key: &str, what: &str) -> ApiError {
        ApiError::invalid(self.path(key), format!("'{}' must be {what}", self.path(key)))
    }

    pub(crate) fn string(&mut self, key: &str) -> Result<Option<String>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.must_be(key, "a string")),
        }
    }

    pub(crate) fn bool(&mut self, key: &str) -> Result<Option<bool>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(_) => Err(self.must_be(key, "true or false")),
        }
    }

    /// A number in `range`.
    pub(crate) fn number(&mut self, key: &str, range: RangeInclusive<f32>) -> Result<Option<f32>> {
        let Some(value) = self.take(key) else { return Ok(None) };
        // What is above 0 stays so, however small.
        let narrow =
            |number: f64| if number > 0.0 { (number as f32).max(f32::MIN_POSITIVE) } else { number as f32 };
        match value.as_f64().map(narrow) {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => {
                let what = format!("a number from {} to {}", range.start(), range.end());
                Err(self.must_be(key, &what))
            }
        }
    }

    /// A whole number in `range`.
    pub(crate) fn whole(&mut self, key: &str, range: RangeInclusive<u32>) -> Result<Option<u32>> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match whole(&value).and_then(|number| u32::try_from(number).ok()) {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => {
                let what = format!("a whole number from {} to {}", range.start(), range.end());
                Err(self.must_be(key, &what))
            }
        }
    }

    /// An array of 1 to `max` items.
    pub(crate) fn array(&mut self, key: &str, max: usize) -> Result<Option<Vec<Value>>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Array(items)) if (1..=max).contains(&items.len()) => Ok(Some(items)),
            Some(_) => Err(self.must_be(key, &format!("an array of 1 to {max} items"))),
        }
    }

    /// What was not read, with its values.
    pub(crate) fn rest(&self) -> &Map<String, Value> {
        &self.left
    }

    /// The error that nobody knows this field.
    pub(crate) fn unknown(&self, key: &str) -> ApiError {
        // A name comes back in the answer, so a huge one is cut.
        let path = self.path(&key.chars().take(80).collect::<String>());
        let message = format!("unknown field '{path}'");
        ApiError::invalid(path, message)
    }

    /// Refuses what nobody read: a misspelt field must not be taken for one left out.
    pub(crate) fn finish(self) -> Result<()> {
        self.left.keys().next().map_or(Ok(()), |key| Err(self.unknown(key)))
    }
}
