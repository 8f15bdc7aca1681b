//! Reading the part of an address after `?`, as strictly as a body.

use crate::error::{ApiError, Result};
use actix_web::{HttpRequest, web};
use proto::IdError;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// The parameters that were not read yet. What is left at the end is unknown, and refused.
pub(crate) struct Query(BTreeMap<String, String>);

impl Query {
    pub(crate) fn of(request: &HttpRequest) -> Result<Self> {
        let pairs = web::Query::<Vec<(String, String)>>::from_query(request.query_string());
        let pairs = pairs.map_err(|_| ApiError::malformed("the part after '?' cannot be read"))?;
        let mut query = BTreeMap::new();
        for (name, value) in pairs.into_inner() {
            let name: String = name.chars().take(80).collect();
            if query.insert(name.clone(), value).is_some() {
                return Err(ApiError::invalid(&name, format!("'{name}' is given twice")));
            }
        }
        Ok(Self(query))
    }

    /// A name, checked by `new`.
    pub(crate) fn name<T>(
        &mut self,
        key: &str,
        new: impl FnOnce(String) -> std::result::Result<T, IdError>,
    ) -> Result<Option<T>> {
        let name = self.0.remove(key).map(new).transpose();
        name.map_err(|error| ApiError::bad_name(key, &error))
    }

    /// Some words, of so many characters at most.
    pub(crate) fn text(&mut self, key: &str, chars_max: usize) -> Result<Option<String>> {
        let Some(text) = self.0.remove(key) else { return Ok(None) };
        if text.trim().is_empty() || text.chars().count() > chars_max {
            return Err(ApiError::invalid(
                key,
                format!("'{key}' must be a text of 1 to {chars_max} characters"),
            ));
        }
        Ok(Some(text))
    }

    /// A whole number in `range`.
    pub(crate) fn whole(&mut self, key: &str, range: RangeInclusive<u32>) -> Result<Option<u32>> {
        let Some(text) = self.0.remove(key) else { return Ok(None) };
        match text.parse() {
            Ok(number) if range.contains(&number) => Ok(Some(number)),
            _ => {
                let (min, max) = (range.start(), range.end());
                Err(ApiError::invalid(key, format!("'{key}' must be a whole number from {min} to {max}")))
            }
        }
    }

    /// Whether it is `true`; left out, it is not.
    pub(crate) fn flag(&mut self, key: &str) -> Result<bool> {
        let Some(text) = self.0.remove(key) else { return Ok(false) };
        text.parse().map_err(|_| ApiError::invalid(key, format!("'{key}' must be true or false")))
    }

    pub(crate) fn finish(self) -> Result<()> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => Err(ApiError::invalid(name, format!("unknown parameter '{name}'"))),
        }
    }
}
