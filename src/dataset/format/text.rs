//! `text`: one string per row, all of it learned.

use super::super::{Conversation, Layout};
use super::{Column, Format, Reading, Rows, column};
use crate::fault::Result;
use arrow::array::{Array, ArrayRef};

/// The format.
pub static FORMAT: Format = Format {
    layout: Layout::Text,
    expects: "`text`: a string",
    columns: &[Column {
        key: "TrainingArguments.dataset_text_field",
        given: |options| options.text_column.as_deref(),
        names: &["text"],
    }],
    refuses: |fields| fields.iter().find_map(|field| super::not_a_string(field)),
    rows,
};

fn rows(arrays: &[ArrayRef], _: &mut Reading) -> Result<Rows> {
    let texts = column::strings(&arrays[0])?;
    let row = |row| match column::value(&texts, row) {
        None => Err("the text is null".to_string()),
        Some(text) if text.trim().is_empty() => Err("the text is empty".to_string()),
        Some(text) => Ok(Conversation::Text(text.to_string())),
    };
    Ok((0..texts.len()).map(row).collect())
}
