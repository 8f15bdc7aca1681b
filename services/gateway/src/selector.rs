//! What `model` says: `base`, `auto`, or adapters such as `python`, `a+b`, `a:0.7+b:0.3` and
//! `python@0123456789abcdef`.

use crate::error::{ApiError, Result};
use proto::{Adapters, Domain, GenerationId, Weighted};

/// The longest `model` that is looked at, in bytes.
const MODEL_BYTES_MAX: usize = 1024;
/// Adapters in one sum: each adds its share of work to every token.
const ADAPTERS_MAX: usize = 8;
/// The largest weight of one adapter; beyond it the text is noise.
const WEIGHT_MAX: f32 = 10.0;

/// Reads `model`. Whether the adapters exist is not looked at here.
pub(crate) fn parse(model: &str) -> Result<Adapters> {
    match model {
        "base" => return Ok(Adapters::Base),
        "auto" => return Ok(Adapters::Auto),
        _ if model.len() > MODEL_BYTES_MAX => {
            return Err(invalid(format!("a model name takes at most {MODEL_BYTES_MAX} bytes")));
        }
        _ => {}
    }
    let mut sum: Vec<Weighted> = Vec::new();
    for term in model.split('+') {
        let adapter = adapter(term)?;
        if sum.iter().any(|other| other.domain == adapter.domain) {
            return Err(invalid(format!("'{}' is named twice", adapter.domain)));
        }
        sum.push(adapter);
    }
    if sum.len() > ADAPTERS_MAX {
        return Err(invalid(format!("a model sums at most {ADAPTERS_MAX} adapters")));
    }
    Ok(Adapters::Fixed(sum))
}

fn adapter(term: &str) -> Result<Weighted> {
    let (name, weight) = match term.split_once(':') {
        Some((name, text)) => (name, weight(text)?),
        None => (term, 1.0),
    };
    let (name, generation) = match name.split_once('@') {
        Some((name, id)) => (name, Some(GenerationId::new(id).map_err(no_such_model)?)),
        None => (name, None),
    };
    Ok(Weighted { domain: Domain::new(name).map_err(no_such_model)?, generation, weight })
}

fn weight(text: &str) -> Result<f32> {
    match text.parse() {
        Ok(weight) if weight > 0.0 && weight <= WEIGHT_MAX => Ok(weight),
        _ => Err(invalid(format!("a weight is a number above 0, up to {WEIGHT_MAX}"))),
    }
}

fn invalid(message: String) -> ApiError {
    ApiError::invalid("model", message)
}

/// A name that no adapter can have is the name of a model that is not here, such as `gpt-4.1`.
fn no_such_model(error: proto::IdError) -> ApiError {
    ApiError::model_not_found(format!("there is no such model: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use actix_web::ResponseError;

    fn terms(model: &str) -> Vec<(String, Option<String>, f32)> {
        let Ok(Adapters::Fixed(sum)) = parse(model) else { panic!("{model} names adapters") };
        let term = |w: Weighted| (w.domain.to_string(), w.generation.map(String::from), w.weight);
        sum.into_iter().map(term).collect()
    }

    #[test]
    fn every_form_is_read() {
        assert_eq!(parse("base").expect("base"), Adapters::Base);
        assert_eq!(parse("auto").expect("auto"), Adapters::Auto);
        assert_eq!(terms("python"), [("python".into(), None, 1.0)]);
        assert_eq!(terms("a+b"), [("a".into(), None, 1.0), ("b".into(), None, 1.0)]);
        assert_eq!(terms("a:0.7+b:.3"), [("a".into(), None, 0.7), ("b".into(), None, 0.3)]);
        let id = "0123456789abcdef";
        assert_eq!(terms(&format!("a@{id}:2")), [("a".into(), Some(id.into()), 2.0)]);
    }

    #[test]
    fn what_is_refused_says_whose_fault_it_is() {
        for model in ["", "gpt-4.1", "a+", "+", "base+a", "auto:0.5", "a@b", "a@", "Ünï", "../a"] {
            let error = parse(model).expect_err(model);
            assert_eq!(error.status_code(), 404, "{model}");
            assert_eq!(error.body()["error"]["code"], "model_not_found", "{model}");
        }
        let long = "a".repeat(5_000);
        let many = "abcdefghi".split("").filter(|s| !s.is_empty()).collect::<Vec<_>>().join("+");
        for model in ["a:", "a:x", "a:nan", "a:inf", "a:-1", "a:0", "a:11", "a+a", &long, &many] {
            let error = parse(model).expect_err(model);
            assert_eq!(error.status_code(), 400, "{model}");
            assert_eq!(error.body()["error"]["param"], "model", "{model}");
        }
    }
}
