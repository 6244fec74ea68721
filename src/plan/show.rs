//! A plan -> a table for people, or JSON for machines. URLs are shown without user and query.

use super::Plan;
use crate::report::clean;
use serde_json::{Value as Json, json};

impl Plan {
    /// Returns one line for each value with its origin, then the keys without effect, then the warnings.
    pub fn table(&self) -> String {
        let rows: Vec<[String; 3]> = self
            .values
            .iter()
            .map(|value| [value.name.clone(), text(&redacted(&value.value)), value.origin.to_string()])
            .collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let (names, values) = (width(0), width(1).min(48));
        let mut table = String::new();
        for [name, value, origin] in &rows {
            table += &format!("{name:names$}  {value:values$}  {origin}\n");
        }
        if !self.ignored.is_empty() {
            table += "\nwithout effect here:\n";
        }
        for ignored in &self.ignored {
            table += &format!("  {} ({}): {}\n", ignored.name, ignored.origin, ignored.why);
        }
        if !self.warnings.is_empty() {
            table += "\nwarnings:\n";
        }
        for warning in &self.warnings {
            table += &format!("  {warning}\n");
        }
        table
    }

    /// Returns names and values, as text and without secrets.
    pub fn settings(&self) -> Vec<(String, String)> {
        self.values.iter().map(|value| (value.name.clone(), text(&redacted(&value.value)))).collect()
    }

    /// Returns `{"values": {name: {"value", "origin"}}, "ignored": [...], "warnings": [...]}`.
    pub fn json(&self) -> Json {
        let values: serde_json::Map<String, Json> = self
            .values
            .iter()
            .map(|value| {
                let shown = json!({"value": redacted(&value.value), "origin": value.origin.to_string()});
                (value.name.clone(), shown)
            })
            .collect();
        let ignored: Vec<Json> = self
            .ignored
            .iter()
            .map(|ignored| json!({"name": ignored.name, "origin": ignored.origin.to_string(), "why": ignored.why}))
            .collect();
        json!({"values": values, "ignored": ignored, "warnings": self.warnings})
    }
}

/// Returns the value on one line; texts are shown without JSON's quotes, and whole numbers without a fraction.
fn text(value: &Json) -> String {
    match value {
        Json::String(text) => text.escape_debug().to_string(),
        Json::Array(items) => items.iter().map(text).collect::<Vec<_>>().join(", "),
        Json::Number(number) => match number.as_f64() {
            Some(value) if number.is_f64() && value.fract() == 0.0 && value.abs() < 1e12 => {
                format!("{value:.0}")
            }
            _ => number.to_string(),
        },
        other => other.to_string(),
    }
}

fn redacted(value: &Json) -> Json {
    match value {
        Json::String(text) => without_secrets(text).into(),
        Json::Array(items) => items.iter().map(redacted).collect(),
        other => other.clone(),
    }
}

/// Removes user and query: signed URLs carry their secret in the query, others in the user part. The part of a dataset
/// of the hub and the settings of an entry stay.
pub(super) fn without_secrets(text: &str) -> String {
    if !text.contains("://") {
        return clean::without_secrets(text);
    }
    let Ok(mut url) = url::Url::parse(text) else { return "(not a URL)".into() };
    // `oci:https://...`: an address inside of one.
    if url.cannot_be_a_base() {
        return clean::without_secrets(text);
    }
    let is_hub = url.scheme() == "hf";
    let query = url.query().map(|query| match is_hub && clean::is_of_dataset(query) {
        true => format!("?{query}"),
        false => "?...".to_owned(),
    });
    url.set_query(None);
    // This fails only for URLs that cannot have a user.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    let fragment = url.fragment().filter(|fragment| clean::is_of_entry(fragment)).map(str::to_string);
    url.set_fragment(None);
    let query = query.unwrap_or_default();
    let fragment = fragment.map(|fragment| format!("#{fragment}")).unwrap_or_default();
    format!("{url}{query}{fragment}")
}
