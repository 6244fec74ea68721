//! Arrow arrays of any string kind -> strings.

use crate::fault::{Fault, Result};
use arrow::array::{Array, ArrayRef, AsArray, StringViewArray};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Field};
use std::sync::Arc;

/// Returns whether a type holds text: any kind of string, bytes, or a dictionary of them.
pub fn is_string(kind: &DataType) -> bool {
    use DataType::*;
    match kind {
        Utf8 | LargeUtf8 | Utf8View | Binary | LargeBinary | BinaryView => true,
        Dictionary(_, value) => is_string(value),
        _ => false,
    }
}

/// Converts any kind of string array to one kind, without copying a text. Bytes are checked to be UTF-8.
pub fn strings(array: &ArrayRef) -> Result<StringViewArray> {
    Ok(cast(array, &DataType::Utf8View)?.as_string_view().clone())
}

/// Returns the number of bytes of all texts in an array; a text counts as often as rows name it.
pub fn text_bytes(array: &ArrayRef) -> u64 {
    // The length of a text is the lower half of its view's first 8 bytes.
    let lengths = |views: &[u128]| views.iter().map(|view| u64::from(*view as u32)).sum();
    match array.data_type() {
        DataType::Utf8View => lengths(array.as_string_view().views()),
        DataType::BinaryView => lengths(array.as_binary_view().views()),
        DataType::List(_) => text_bytes(array.as_list::<i32>().values()),
        DataType::LargeList(_) => text_bytes(array.as_list::<i64>().values()),
        DataType::Struct(_) => array.as_struct().columns().iter().map(text_bytes).sum(),
        _ => array.get_buffer_memory_size() as u64,
    }
}

/// Returns the text at `index`, or `None` if it is null.
pub fn value(array: &StringViewArray, index: usize) -> Option<&str> {
    (!array.is_null(index)).then(|| array.value(index))
}

/// Returns the type of a list's items.
pub fn element(kind: &DataType) -> Option<&Arc<Field>> {
    use DataType::*;
    match kind {
        List(field) | LargeList(field) | ListView(field) | LargeListView(field) | FixedSizeList(field, _) => {
            Some(field)
        }
        _ => None,
    }
}

/// Describes a type in a few words for a message.
pub fn kind(kind: &DataType) -> String {
    const CHARS_MAX: usize = 120;
    // Files are read as views of their texts, but people know the plain names.
    let text = kind.to_string().replace("Utf8View", "Utf8").replace("BinaryView", "Binary");
    match text.char_indices().nth(CHARS_MAX) {
        Some((at, _)) => text[..at].to_owned() + "...",
        None => text,
    }
}

/// Casts an array and refuses values that do not fit.
pub fn cast(array: &ArrayRef, to: &DataType) -> Result<ArrayRef> {
    let strict = CastOptions { safe: false, ..CastOptions::default() };
    cast_with_options(array, to, &strict)
        .map_err(|error| Fault::data(format!("cannot read it as text: {error}")))
}
