//! A JSON object -> its fields, each of the type and in the range that was expected, or an error that names it.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::{Error, Result};

/// The fields of a request; null is the same as none.
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// `generate_kwargs.` and the like, for messages.
    prefix: &'static str,
}

impl<'a> Fields<'a> {
    /// Returns the fields of an object. `prefix` stands before their names in messages.
    pub fn new(map: &'a Map<String, Value>, prefix: &'static str) -> Fields<'a> {
        Fields { map, prefix }
    }

    /// Returns the field, unless it is missing or null.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    fn wrong(&self, name: &str, expected: &str) -> Error {
        let found = self.map.get(name).map_or("nothing".into(), shown);
        let name = format!("{}{name}", self.prefix);
        Error::field(&name, format!("{name}: found {found}, expected {expected}"))
    }

    /// Returns the field as a string.
    pub fn text(&self, name: &str) -> Result<Option<&'a str>> {
        let read = |value: &'a Value| value.as_str().ok_or_else(|| self.wrong(name, "a string"));
        self.get(name).map(read).transpose()
    }

    /// Returns the field as true or false.
    pub fn flag(&self, name: &str) -> Result<Option<bool>> {
        let read = |value: &Value| value.as_bool().ok_or_else(|| self.wrong(name, "true or false"));
        self.get(name).map(read).transpose()
    }

    /// Returns the field as a number in the range.
    pub fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>> {
        let expected = || self.wrong(name, &format!("a number from {} to {}", range.start(), range.end()));
        let read = |value: &Value| {
            value.as_f64().filter(|number| range.contains(number)).map(|n| n as f32).ok_or_else(expected)
        };
        self.get(name).map(read).transpose()
    }

    /// Returns the field as a whole number in the range.
    pub fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>> {
        let expected =
            || self.wrong(name, &format!("a whole number from {} to {}", range.start(), range.end()));
        let read = |value: &Value| whole(value).filter(|number| range.contains(number)).ok_or_else(expected);
        self.get(name).map(read).transpose()
    }

    /// Returns the field as a whole number in the range, which must not be negative.
    pub fn size(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<usize>> {
        Ok(self.integer(name, range)?.map(|number| number as usize))
    }

    /// Returns the field as an object.
    pub fn object(&self, name: &str) -> Result<Option<&'a Map<String, Value>>> {
        let read = |value: &'a Value| value.as_object().ok_or_else(|| self.wrong(name, "an object"));
        self.get(name).map(read).transpose()
    }

    /// Returns the field as a list.
    pub fn list(&self, name: &str) -> Result<Option<&'a Vec<Value>>> {
        let read = |value: &'a Value| value.as_array().ok_or_else(|| self.wrong(name, "a list"));
        self.get(name).map(read).transpose()
    }

    /// Returns the field as a list of token ids.
    pub fn tokens(&self, name: &str) -> Result<Option<Vec<u32>>> {
        let Some(list) = self.list(name)? else { return Ok(None) };
        let wrong = || self.wrong(name, "a list of token ids");
        list.iter().map(|value| token(value).ok_or_else(wrong)).collect::<Result<_>>().map(Some)
    }

    /// One token id or a list of them.
    pub fn token_or_tokens(&self, name: &str) -> Result<Option<Vec<u32>>> {
        match self.get(name) {
            Some(value) if !value.is_array() => {
                let id = token(value).ok_or_else(|| self.wrong(name, "a token id or a list of them"))?;
                Ok(Some(vec![id]))
            }
            _ => self.tokens(name),
        }
    }

    /// One string or a list of them.
    pub fn texts(&self, name: &str, most: usize) -> Result<Vec<String>> {
        let texts: Option<Vec<String>> = match self.get(name) {
            None => Some(Vec::new()),
            Some(Value::String(text)) => Some(vec![text.clone()]),
            Some(Value::Array(list)) => list.iter().map(|text| text.as_str().map(String::from)).collect(),
            Some(_) => None,
        };
        match texts {
            Some(texts) if texts.len() <= most && texts.iter().all(|text| !text.is_empty()) => Ok(texts),
            _ => Err(self.wrong(name, &format!("a string or up to {most} of them, none of them empty"))),
        }
    }

    /// Refuses a field that would change the answer and has no meaning here, unless it says the usual.
    pub fn refuse(&self, name: &str, usual: &[Value], why: &str) -> Result<()> {
        match self.get(name) {
            Some(value) if !usual.contains(value) => {
                let name = format!("{}{name}", self.prefix);
                Err(Error::field(&name, format!("{name} is not supported: {why}"))
                    .code("unsupported_parameter"))
            }
            _ => Ok(()),
        }
    }

    /// Returns the names of fields that are not known and have a value.
    pub fn unknown(&self, known: &[&str]) -> Vec<String> {
        let said = self.map.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name);
        said.filter(|name| !known.contains(&name.as_str())).cloned().collect()
    }
}

/// Returns a token id.
pub fn token(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

fn whole(value: &Value) -> Option<i64> {
    let float = || value.as_f64().filter(|number| number.fract() == 0.0 && number.abs() < 1e15);
    value.as_i64().or_else(|| float().map(|number| number as i64))
}

/// Returns a value for a message, cut if it is long.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}
