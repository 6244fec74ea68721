//! Arrow arrays of any string kind -> strings.

use crate::fault::{Fault, Result};
use arrow::array::{Array, ArrayRef, AsArray, LargeStringArray};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Field};
use std::sync::Arc;

pub fn is_string(kind: &DataType) -> bool {
    use DataType::*;
    match kind {
        Utf8 | LargeUtf8 | Utf8View | Binary | LargeBinary | BinaryView => true,
        Dictionary(_, value) => is_string(value),
        _ => false,
    }
}

/// Every string kind as one; bytes are checked to be UTF-8.
pub fn strings(array: &ArrayRef) -> Result<LargeStringArray> {
    Ok(cast(array, &DataType::LargeUtf8)?.as_string::<i64>().clone())
}

pub fn value(array: &LargeStringArray, index: usize) -> Option<&str> {
    (!array.is_null(index)).then(|| array.value(index))
}

/// What a list holds.
pub fn element(kind: &DataType) -> Option<&Arc<Field>> {
    use DataType::*;
    match kind {
        List(field) | LargeList(field) | ListView(field) | LargeListView(field) | FixedSizeList(field, _) => {
            Some(field)
        }
        _ => None,
    }
}

/// A type in a few words of a message.
pub fn kind(kind: &DataType) -> String {
    const CHARS_MAX: usize = 120;
    let text = kind.to_string();
    match text.char_indices().nth(CHARS_MAX) {
        Some((at, _)) => text[..at].to_owned() + "...",
        None => text,
    }
}

pub fn cast(array: &ArrayRef, to: &DataType) -> Result<ArrayRef> {
    let strict = CastOptions { safe: false, ..CastOptions::default() };
    cast_with_options(array, to, &strict)
        .map_err(|error| Fault::data(format!("cannot read it as text: {error}")))
}
