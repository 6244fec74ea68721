//! Python's methods and functions that chat templates call -> the results of Python.

use std::fmt::Write;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use minijinja::value::{Kwargs, Value};
use minijinja::{Error, ErrorKind};
use minijinja_contrib::pycompat;

/// LIMIT: bytes that a method may make of a text.
const METHOD_BYTES_MAX: usize = 64 << 20;
/// LIMIT: the width that a method may pad a text to.
const WIDTH_MAX: usize = 4096;
/// LIMIT: the indent of JSON.
const INDENT_MAX: usize = 64;
/// LIMIT: bytes of the format that `strftime_now` takes.
const FORMAT_BYTES_MAX: usize = 4096;

/// Calls one of Python's methods. The fuel does not count their work, so a call that would make too much text is
/// refused.
pub(super) fn method(
    state: &mut minijinja::State,
    value: &Value,
    name: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        let bytes = |index: usize| arguments.get(index).and_then(Value::as_str).map_or(0, str::len);
        let made = match name {
            "replace" if bytes(0) == 0 => text.chars().count().saturating_add(1).saturating_mul(bytes(1)),
            "replace" => (text.len() / bytes(0)).saturating_mul(bytes(1)),
            "split" => text.len().saturating_mul(SPLIT_GROWTH),
            "format" => widest_number(text).saturating_mul(METHOD_BYTES_MAX / WIDTH_MAX),
            _ => 0,
        };
        if made > METHOD_BYTES_MAX {
            let message = format!("{name} would make more than {METHOD_BYTES_MAX} bytes");
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
    }
    pycompat::unknown_method_callback(state, value, name, arguments)
}

/// Bytes of memory per part beside its text, for a list of single letters.
const SPLIT_GROWTH: usize = 32;

/// Returns the largest number in a format such as `{:>80}`.
fn widest_number(format: &str) -> usize {
    let digits = format.split(|letter: char| !letter.is_ascii_digit()).filter(|digits| !digits.is_empty());
    digits.map(|digits| digits.parse().unwrap_or(usize::MAX)).max().unwrap_or(0)
}

/// Writes JSON as `json.dumps` with `ensure_ascii=False`, which is transformers' default.
pub(super) fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    if indent.is_some_and(|indent| indent > INDENT_MAX) {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("tojson's indent is more than {INDENT_MAX}"),
        ));
    }
    let separators: Option<Vec<String>> = options.get("separators")?;
    let comma = if indent.is_some() { "," } else { ", " };
    let (comma, colon) = match separators.as_deref() {
        Some([comma, colon]) => (comma.as_str(), colon.as_str()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson wants two separators")),
        None => (comma, ": "),
    };
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let value = serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    let mut json = Json { out: String::new(), indent, comma, colon, ascii, sort };
    json.value(&value, 0);
    Ok(json.out)
}

struct Json<'a> {
    out: String,
    indent: Option<usize>,
    comma: &'a str,
    colon: &'a str,
    ascii: bool,
    sort: bool,
}

impl Json<'_> {
    fn value(&mut self, value: &serde_json::Value, depth: usize) {
        match value {
            serde_json::Value::Array(items) => {
                self.items('[', ']', depth, items, |json, item| json.value(item, depth + 1))
            }
            serde_json::Value::Object(map) => {
                let mut entries: Vec<_> = map.iter().collect();
                if self.sort {
                    entries.sort_by_key(|(key, _)| *key);
                }
                self.items('{', '}', depth, &entries, |json, (key, value)| {
                    json.string(key);
                    json.out.push_str(json.colon);
                    json.value(value, depth + 1);
                });
            }
            serde_json::Value::String(text) => self.string(text),
            serde_json::Value::Number(number) if number.is_f64() => {
                self.out.push_str(&float(number.as_f64().expect("just asked")));
            }
            plain => self.out.push_str(&plain.to_string()),
        }
    }

    fn items<T>(&mut self, open: char, close: char, depth: usize, items: &[T], each: impl Fn(&mut Self, &T)) {
        self.out.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                self.out.push_str(self.comma);
            }
            self.line(depth + 1);
            each(self, item);
        }
        if !items.is_empty() {
            self.line(depth);
        }
        self.out.push(close);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&mut self, text: &str) {
        let quoted = serde_json::Value::from(text).to_string();
        for character in quoted.chars() {
            if character.is_ascii() || !self.ascii {
                self.out.push(character);
            } else {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    let _ = write!(self.out, "\\u{unit:04x}");
                }
            }
        }
    }
}

/// Returns a float as Python writes it: with an exponent from 1e16 and below 1e-4, with a sign and two digits.
pub(super) fn float(value: f64) -> String {
    let text = format!("{value:e}");
    let (digits, exponent) = text.split_once('e').expect("Rust writes an exponent");
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{value:?}"),
    }
}

/// Formats a time as Python's `strftime_now` does in UTC and English: C's conversions, and glibc's `%-d` without
/// leading zeros.
pub(super) fn strftime(format: &str, time: Timestamp) -> Result<String, Error> {
    let refuse = |message: String| Error::new(ErrorKind::InvalidOperation, message);
    if format.len() > FORMAT_BYTES_MAX {
        return Err(refuse(format!(
            "strftime_now is given {} bytes, limit {FORMAT_BYTES_MAX}",
            format.len()
        )));
    }
    jiff::fmt::strtime::format(format, &time.to_zoned(TimeZone::UTC))
        .map_err(|error| refuse(format!("strftime_now does not know all of {format:?}: {error}")))
}
