//! Rows that are tokenized already: `input_ids`, with `labels` or a mask of learned tokens, and possibly an
//! `attention_mask` that marks padding.
//!
//! A mask holds 0 and 1, or false and true. Labels are those of transformers: -100 is not learned, and any other
//! value repeats the token at its own place.

use super::super::{Conversation, Layout};
use super::{Column, Format, Reading, Rows, column, json};
use crate::fault::Result;
use arrow::array::{Array, ArrayRef};
use arrow::datatypes::{DataType, Field};
use serde_json::Value;

const NOT_LEARNED: i64 = -100;
const IDS: Column = named(&["input_ids"]);
const LABELS: Column = named(&["labels"]);
const MASK: Column = named(&["completion_mask", "assistant_masks", "assistant_mask", "loss_mask"]);
const ATTENTION: Column = named(&["attention_mask"]);

const fn named(names: &'static [&'static str]) -> Column {
    Column { key: "its usual name", given: |_| None, names }
}

/// The formats in order of preference; those with the most information come first.
pub static FORMATS: [Format; 6] = [
    format(&[IDS, LABELS, ATTENTION], |arrays, _| rows(arrays, Some(labels), true)),
    format(&[IDS, LABELS], |arrays, _| rows(arrays, Some(labels), false)),
    format(&[IDS, MASK, ATTENTION], |arrays, _| rows(arrays, Some(mask), true)),
    format(&[IDS, MASK], |arrays, _| rows(arrays, Some(mask), false)),
    format(&[IDS, ATTENTION], |arrays, _| rows(arrays, None, true)),
    format(&[IDS], |arrays, _| rows(arrays, None, false)),
];

const fn format(columns: &'static [Column], rows: fn(&[ArrayRef], &mut Reading) -> Result<Rows>) -> Format {
    Format {
        layout: Layout::Tokens,
        expects: "`input_ids`, perhaps with `labels` or `completion_mask`: lists of whole numbers",
        columns,
        refuses,
        rows,
    }
}

fn refuses(fields: &[&Field]) -> Option<String> {
    let is_mask = |field: &Field| {
        let name = field.name();
        [&MASK, &ATTENTION].iter().any(|mask| mask.names.iter().any(|known| name.eq_ignore_ascii_case(known)))
    };
    let wrong = |field: &&&Field| {
        let item = column::element(field.data_type()).map(|item| item.data_type());
        let fits = |kind: &DataType| {
            kind.is_integer() || kind.is_null() || (is_mask(field) && *kind == DataType::Boolean)
        };
        !column::is_string(field.data_type()) && !item.is_some_and(fits)
    };
    let field = fields.iter().find(wrong)?;
    let kind = column::kind(field.data_type());
    Some(format!("`{}` is {kind}; a list of whole numbers is needed", field.name()))
}

/// A function that decides whether a token is learned, by its label or flag. The error says why the value is invalid.
type Learned = fn(token: i64, value: i64) -> std::result::Result<bool, String>;

fn labels(token: i64, label: i64) -> std::result::Result<bool, String> {
    match label {
        NOT_LEARNED => Ok(false),
        label if label == token => Ok(true),
        _ => Err("a label is neither -100 nor the token at its place".into()),
    }
}

fn mask(_: i64, flag: i64) -> std::result::Result<bool, String> {
    match flag {
        0 | 1 => Ok(flag == 1),
        _ => Err("a mask holds something else than 0 and 1".into()),
    }
}

fn rows(arrays: &[ArrayRef], learned: Option<Learned>, has_attention: bool) -> Result<Rows> {
    let columns: Vec<json::Column> = arrays.iter().map(json::Column::of).collect::<Result<_>>()?;
    let row = |row| {
        let ids = numbers(columns[0].value(row), "input_ids")?;
        if ids.is_empty() {
            return Err("input_ids is empty".to_string());
        }
        let beside = |index: usize, name: &str| {
            let values = numbers(columns[index].value(row), name)?;
            match values.len() == ids.len() {
                true => Ok(values),
                false => Err(format!("{name} and input_ids have different lengths")),
            }
        };
        let values =
            learned.map(|learned| Ok::<_, String>((learned, beside(1, "labels or mask")?))).transpose()?;
        let attention = has_attention.then(|| beside(columns.len() - 1, "attention_mask")).transpose()?;
        let (mut tokens, mut supervised) = (Vec::with_capacity(ids.len()), Vec::with_capacity(ids.len()));
        for (place, &id) in ids.iter().enumerate() {
            if attention.as_ref().is_some_and(|attention| attention[place] == 0) {
                continue; // padding
            }
            tokens.push(u32::try_from(id).map_err(|_| format!("{id} is no token id"))?);
            supervised.push(match &values {
                Some((learned, values)) => learned(id, values[place])?,
                None => true,
            });
        }
        Ok(Conversation::Tokens { ids: tokens, supervised })
    };
    Ok((0..arrays[0].len()).map(row).collect())
}

/// Reads a list of whole numbers, or JSON text of one.
fn numbers(value: Value, name: &str) -> std::result::Result<Vec<i64>, String> {
    let value = match value {
        Value::String(text) => {
            json::of_text(&text).map_err(|problem| format!("{name} is a text that is {problem}"))?
        }
        value => value,
    };
    let Value::Array(items) = value else { return Err(format!("{name} is null or no list")) };
    let number = |item: &Value| match item.as_bool() {
        Some(flag) if name != "input_ids" => Ok(i64::from(flag)),
        _ => item.as_i64().ok_or_else(|| format!("{name} holds something else than whole numbers")),
    };
    items.iter().map(number).collect()
}
