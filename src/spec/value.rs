//! A YAML node and the type of its key -> a value. Scalars are read as PyYAML followed by a command line would read
//! them: `2e-4` is a number, `yes` and `on` are booleans, and quotes do not matter.

use super::keys::Type;
use super::yaml::{Content, Node, Place, Refusal};

/// A value of a known type.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// null. It counts as not given, unless the plan gives null a meaning.
    Null,
    /// A boolean.
    Boolean(bool),
    /// An integer.
    Integer(i64),
    /// A number.
    Number(f64),
    /// A text.
    Text(String),
    /// A list.
    List(Vec<Value>),
    /// A map, in the order of its entries.
    Map(Vec<(String, Value)>),
}

impl Value {
    /// Returns the value as JSON.
    pub fn to_json(&self) -> serde_json::Value {
        match self {
            Value::Null => serde_json::Value::Null,
            Value::Boolean(value) => (*value).into(),
            Value::Integer(value) => (*value).into(),
            Value::Number(value) => (*value).into(),
            Value::Text(value) => value.as_str().into(),
            Value::List(items) => items.iter().map(Value::to_json).collect(),
            Value::Map(entries) => serde_json::Value::Object(
                entries.iter().map(|(key, value)| (key.clone(), value.to_json())).collect(),
            ),
        }
    }
}

/// Reads `node` as `kind`. A refusal names the expected type, the found value, and its place.
pub fn read(kind: Type, node: &Node) -> Result<Value, Refusal> {
    if node.is_null() {
        return Ok(Value::Null);
    }
    let wrong = || refuse(node.place, format!("expected {kind}, found {}", found(kind, node)));
    match (kind, &node.content) {
        (Type::Any, _) => Ok(any(node)),
        (Type::Sources, _) => sources(node),
        (Type::Map, Content::Map(entries)) => {
            let number = Type::Number { min: 0.0, max: f64::MAX };
            let read_entry = |entry: &super::yaml::Entry| match read(number, &entry.node)? {
                Value::Null => {
                    let found = entry.node.describe();
                    refuse(entry.node.place, format!("{}: expected {number}, found {found}", entry.key))
                }
                value => Ok((entry.key.clone(), value)),
            };
            Ok(Value::Map(entries.iter().map(read_entry).collect::<Result<_, Refusal>>()?))
        }
        (Type::Texts, Content::List(items)) => list(Type::Text, items),
        (Type::Integers, Content::List(items)) => list(Type::Integer { min: 0 }, items),
        (Type::Integers, Content::Scalar { .. }) => {
            Ok(Value::List(vec![read(Type::Integer { min: 0 }, node)?]))
        }
        (_, Content::Scalar { text, .. }) => scalar(kind, text).map_or_else(wrong, Ok),
        _ => wrong(),
    }
}

/// Returns the value that was found, for a message. If a number or a word was expected, a long text may be a secret in
/// the wrong place and is not shown.
fn found(kind: Type, node: &Node) -> String {
    const SHOWN_CHARACTERS_MAX: usize = 20;
    let short = matches!(kind, Type::Boolean | Type::Integer { .. } | Type::Number { .. } | Type::Choice(_));
    match &node.content {
        Content::Scalar { text, .. } if short && text.chars().count() > SHOWN_CHARACTERS_MAX => {
            format!("a text of {} characters", text.chars().count())
        }
        _ => node.describe(),
    }
}

fn scalar(kind: Type, text: &str) -> Option<Value> {
    match kind {
        Type::Boolean => boolean(text).map(Value::Boolean),
        Type::Integer { min } => integer(text).filter(|value| *value >= min).map(Value::Integer),
        Type::Number { min, max } => {
            number(text).filter(|value| (min..=max).contains(value)).map(Value::Number)
        }
        Type::Choice(words) => {
            let word = words.iter().find(|word| word.eq_ignore_ascii_case(text))?;
            Some(Value::Text(word.to_string()))
        }
        Type::Text | Type::Texts => Some(Value::Text(text.to_string())),
        Type::Path => (!text.is_empty() && !text.contains('\0')).then(|| Value::Text(text.to_string())),
        Type::Sources | Type::Integers | Type::Map | Type::Any => None,
    }
}

/// Reads a boolean by YAML 1.1's words and those of HfArgumentParser.
fn boolean(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "y" | "t" | "1" => Some(true),
        "false" | "no" | "off" | "n" | "f" | "0" => Some(false),
        _ => None,
    }
}

/// Reads a decimal integer, with YAML 1.1's underscores.
fn integer(text: &str) -> Option<i64> {
    if is_octal(text) { None } else { text.replace('_', "").parse().ok() }
}

/// Returns whether a whole number has a leading zero. Such a number is refused, because YAML 1.1 reads it as octal and
/// 1.2 as decimal.
fn is_octal(text: &str) -> bool {
    let digits = text.trim_start_matches(['+', '-']);
    digits.len() > 1 && digits.starts_with('0') && digits.chars().all(|c| c.is_ascii_digit() || c == '_')
}

fn number(text: &str) -> Option<f64> {
    let starts_as_number =
        !is_octal(text) && text.starts_with(|first: char| first.is_ascii_digit() || "+-.".contains(first));
    let value: f64 = starts_as_number.then(|| text.replace('_', "").parse().ok()).flatten()?;
    value.is_finite().then_some(value)
}

fn list(kind: Type, items: &[Node]) -> Result<Value, Refusal> {
    let read_item = |item: &Node| match read(kind, item)? {
        Value::Null => refuse(item.place, format!("expected {kind}, found {}", item.describe())),
        value => Ok(value),
    };
    Ok(Value::List(items.iter().map(read_item).collect::<Result<_, _>>()?))
}

/// Keys that a source in YAML may have besides its address.
const BESIDE: [&str; 5] = ["sha256", "layout", "weight", "limit", "name"];

/// Reads a source or a list of sources. `{url: ..., sha256: ..., weight: 2}` becomes `url#sha256=...&weight=2`.
fn sources(node: &Node) -> Result<Value, Refusal> {
    match &node.content {
        Content::List(items) => Ok(Value::List(items.iter().map(source).collect::<Result<_, _>>()?)),
        _ => Ok(Value::List(vec![source(node)?])),
    }
}

fn source(node: &Node) -> Result<Value, Refusal> {
    let wrong = |place: Place, found: &Node| {
        let found = found.describe();
        refuse(place, format!("expected a URL, a path, or a map of url or path and sha256, found {found}"))
    };
    let place = match &node.content {
        Content::Scalar { text, .. } if !text.is_empty() && !node.is_null() => {
            return Ok(Value::Text(text.clone()));
        }
        Content::Map(entries) => {
            let known = ["url", "path"].into_iter().chain(BESIDE);
            if let Some(entry) = entries.iter().find(|entry| !known.clone().any(|key| key == entry.key)) {
                return refuse(
                    entry.key_place,
                    format!("{} is not a key of a source: url or path, {}", entry.key, BESIDE.join(", ")),
                );
            }
            let given = |key| node.get(key).filter(|node| !node.is_null());
            if let (Some(_), Some(path)) = (given("url"), given("path")) {
                return refuse(path.place, "a source has a url or a path, found both".into());
            }
            given("url").or(given("path"))
        }
        _ => None,
    };
    let Some(Node { content: Content::Scalar { text, .. }, .. }) = place else {
        return wrong(node.place, node);
    };
    let mut words = Vec::new();
    for key in BESIDE {
        match node.get(key).filter(|node| !node.is_null()) {
            None => {}
            Some(Node { content: Content::Scalar { text: word, .. }, .. }) => {
                words.push(format!("{key}={word}"))
            }
            Some(other) => return wrong(other.place, other),
        }
    }
    Ok(Value::Text(if words.is_empty() { text.clone() } else { format!("{text}#{}", words.join("&")) }))
}

/// Returns the value as it was written, which is only shown and compared.
fn any(node: &Node) -> Value {
    match &node.content {
        _ if node.is_null() => Value::Null,
        Content::Scalar { text, .. } => Value::Text(text.clone()),
        Content::List(items) => Value::List(items.iter().map(any).collect()),
        Content::Map(entries) => {
            Value::Map(entries.iter().map(|entry| (entry.key.clone(), any(&entry.node))).collect())
        }
    }
}

fn refuse<T>(place: Place, message: String) -> Result<T, Refusal> {
    Err(Refusal { place, message })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::yaml;
    use expect_test::{Expect, expect};

    fn check(kind: Type, text: &str, expected: Expect) {
        let node = yaml::parse(&format!("key: {text}")).unwrap().unwrap();
        let shown = match read(kind, node.get("key").unwrap()) {
            Ok(value) => value.to_json().to_string(),
            Err(refusal) => format!("{}: {}", refusal.place.column, refusal.message),
        };
        expected.assert_eq(&shown);
    }

    const NUMBER: Type = Type::Number { min: 0.0, max: f64::MAX };
    const INTEGER: Type = Type::Integer { min: 1 };

    #[test]
    fn numbers_as_python_and_a_command_line_read_them() {
        check(NUMBER, "2e-4", expect!["0.0002"]);
        check(NUMBER, "\"2e-4\"", expect!["0.0002"]);
        check(NUMBER, ".5", expect!["0.5"]);
        check(NUMBER, "1_000.5", expect!["1000.5"]);
        check(NUMBER, "3", expect!["3.0"]);
        check(NUMBER, "0.50", expect!["0.5"]);
        check(NUMBER, "010", expect![[r#"6: expected a number from 0, found "010""#]]);
        check(NUMBER, ".inf", expect![[r#"6: expected a number from 0, found ".inf""#]]);
        check(NUMBER, "nan", expect![[r#"6: expected a number from 0, found "nan""#]]);
        check(NUMBER, "-1", expect![[r#"6: expected a number from 0, found "-1""#]]);
        check(NUMBER, "fast", expect![[r#"6: expected a number from 0, found "fast""#]]);
        check(NUMBER, "[1]", expect!["6: expected a number from 0, found a list"]);
        check(INTEGER, "1_000", expect!["1000"]);
        check(INTEGER, "'8'", expect!["8"]);
        check(INTEGER, "8.0", expect![[r#"6: expected a whole number from 1, found "8.0""#]]);
        check(INTEGER, "010", expect![[r#"6: expected a whole number from 1, found "010""#]]);
        check(INTEGER, "0", expect![[r#"6: expected a whole number from 1, found "0""#]]);
        check(
            INTEGER,
            "99999999999999999999",
            expect![[r#"6: expected a whole number from 1, found "99999999999999999999""#]],
        );
    }

    #[test]
    fn booleans_nulls_and_words() {
        for text in ["true", "True", "yes", "on", "'true'", "1"] {
            check(Type::Boolean, text, expect!["true"]);
        }
        for text in ["False", "no", "off", "\"no\""] {
            check(Type::Boolean, text, expect!["false"]);
        }
        for text in ["null", "~", "None", ""] {
            check(Type::Boolean, text, expect!["null"]);
        }
        check(Type::Boolean, "maybe", expect![[r#"6: expected true or false, found "maybe""#]]);
        check(Type::Choice(&["no", "steps"]), "no", expect![[r#""no""#]]);
        check(
            Type::Choice(&["no", "steps"]),
            "best",
            expect![[r#"6: expected one of no, steps, found "best""#]],
        );
        check(Type::Text, "1.0", expect![[r#""1.0""#]]);
    }

    #[test]
    fn lists_maps_and_sources() {
        check(Type::Texts, "query_key_value", expect![[r#""query_key_value""#]]);
        check(Type::Texts, "[a, b]", expect![[r#"["a","b"]"#]]);
        check(Type::Texts, "[a, ~]", expect!["10: expected text, found nothing (null)"]);
        check(Type::Integers, "3", expect!["[3]"]);
        check(Type::Integers, "[0, x]", expect![[r#"10: expected a whole number from 0, found "x""#]]);
        check(Type::Map, "{q_proj: 4}", expect![[r#"{"q_proj":4.0}"#]]);
        check(
            Type::Map,
            "{q_proj: ~}",
            expect!["15: q_proj: expected a number from 0, found nothing (null)"],
        );
        check(Type::Sources, "a.parquet", expect![[r#"["a.parquet"]"#]]);
        check(
            Type::Sources,
            "[a, {url: 'https://h/b', sha256: ff}]",
            expect![[r#"["a","https://h/b#sha256=ff"]"#]],
        );
        check(
            Type::Sources,
            "{url: ~, path: a.csv, layout: ~, weight: null, limit: 2}",
            expect![[r#"["a.csv#limit=2"]"#]],
        );
        check(Type::Sources, "{url: a, path: b}", expect!["21: a source has a url or a path, found both"]);
        check(
            Type::Sources,
            "{uri: a}",
            expect!["7: uri is not a key of a source: url or path, sha256, layout, weight, limit, name"],
        );
        check(
            Type::Sources,
            "[{sha256: ff}]",
            expect!["7: expected a URL, a path, or a map of url or path and sha256, found a map"],
        );
    }
}
