//! Strict JSON: refuses what `serde_json` lets pass and a door must not, and says where it is.

use crate::error::{ApiError, Result};
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::cell::{Cell, RefCell};
use std::fmt;

/// Values in one body. A value takes up to 40 times its text in memory, so bytes alone do not
/// bound it.
const VALUES_MAX: usize = 100_000;

/// Reads one JSON text. Refused, with the place: invalid UTF-8, NUL characters, keys that occur
/// twice, numbers out of range, nesting over 127 levels, anything after the end.
pub(crate) fn parse(bytes: &[u8]) -> Result<Value> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        ApiError::malformed(format!("the body is not valid UTF-8 (byte {at})"))
    })?;
    let strict = Strict::default();
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = (&strict).deserialize(&mut deserializer);
    let value = value.and_then(|value| deserializer.end().map(|()| value));
    value.map_err(|error| {
        let mut steps = strict.steps.into_inner();
        steps.reverse();
        let place = steps.concat();
        let message = format!("the body is not acceptable JSON: {error}");
        match place.trim_start_matches('.') {
            "" => ApiError::malformed(message),
            place => ApiError::invalid(place, message),
        }
    })
}

#[derive(Default)]
struct Strict {
    values: Cell<usize>,
    /// Where it failed, innermost step first: each level adds its own on the way out.
    steps: RefCell<Vec<String>>,
}

impl Strict {
    fn text<E: Error>(&self, text: &str) -> std::result::Result<(), E> {
        if text.contains('\0') { Err(E::custom("a NUL character is not text")) } else { Ok(()) }
    }

    fn step<E>(&self, step: impl FnOnce() -> String) -> impl FnOnce(E) -> E {
        move |error| {
            self.steps.borrow_mut().push(step());
            error
        }
    }
}

impl<'de> DeserializeSeed<'de> for &Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> std::result::Result<Value, D::Error> {
        self.values.set(self.values.get() + 1);
        if self.values.get() > VALUES_MAX {
            return Err(D::Error::custom(format!("more than {VALUES_MAX} values")));
        }
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> std::result::Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> std::result::Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> std::result::Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> std::result::Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> std::result::Result<Value, E> {
        let number = Number::from_f64(value).ok_or_else(|| E::custom("number out of range"))?;
        Ok(Value::Number(number))
    }

    fn visit_str<E: Error>(self, text: &str) -> std::result::Result<Value, E> {
        self.text(text)?;
        Ok(Value::String(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Value, A::Error> {
        let mut items = Vec::new();
        loop {
            let step = self.step(|| format!("[{}]", items.len()));
            match seq.next_element_seed(self).map_err(step)? {
                Some(item) => items.push(item),
                None => return Ok(Value::Array(items)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            self.text(&key)?;
            // A name comes back in the answer, so a huge one is cut.
            let step = || format!(".{}", key.chars().take(80).collect::<String>());
            if fields.contains_key(&key) {
                return Err(self.step(step)(A::Error::custom("this field occurs twice")));
            }
            let value = map.next_value_seed(self).map_err(self.step(step))?;
            fields.insert(key, value);
        }
        Ok(Value::Object(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn refusal(text: impl AsRef<[u8]>) -> (String, Value) {
        let body = parse(text.as_ref()).expect_err("must be refused").body();
        (body["error"]["message"].to_string(), body["error"]["param"].clone())
    }

    #[test]
    fn good_json_keeps_its_values() {
        let value = parse(br#" {"a":[1,-2,0.5,null,true],"b":"\u00e9"} "#).expect("valid");
        assert_eq!(value, json!({"a": [1, -2, 0.5, null, true], "b": "é"}));
    }

    #[test]
    fn what_is_refused_is_named() {
        for (text, word, param) in [
            (r#"{"a":1,"a":2}"#, "twice", json!("a")),
            (r#"{"a":[{"b":1,"b":1}]}"#, "twice", json!("a[0].b")),
            (r#"{"a":[0,"\u0000"]}"#, "NUL", json!("a[1]")),
            (r#"{"temperature":1e400}"#, "out of range", json!("temperature")),
            (r#"{"temperature":NaN}"#, "expected value", json!("temperature")),
            (r#"{} {}"#, "trailing", Value::Null),
            (r#"{"a":"#, "EOF", json!("a")),
            ("", "EOF", Value::Null),
            (r#"["\ud800"]"#, "surrogate|end of hex escape", json!("[0]")),
        ] {
            let (message, place) = refusal(text);
            assert!(word.split('|').any(|word| message.contains(word)), "{text}: {message}");
            assert_eq!(place, param, "{text}");
        }
        assert!(refusal([b'"', 0xff, b'"']).0.contains("byte 1"));
    }

    #[test]
    fn depth_and_count_are_bounded() {
        assert!(refusal("[".repeat(10_000)).0.contains("recursion limit"));
        assert!(refusal(format!("[{}0]", "0,".repeat(VALUES_MAX))).0.contains("more than"));
    }
}
