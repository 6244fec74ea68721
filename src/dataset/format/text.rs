//! `text`: one string a row, all of it learned.

use super::super::{Conversation, Layout};
use super::{Format, Rows, column};
use crate::fault::Result;
use arrow::array::{Array, ArrayRef};

pub static FORMAT: Format = Format {
    layout: Layout::Text,
    expects: "`text`: a string",
    columns: |options| vec![options.text_column.as_deref().unwrap_or("text")],
    accepts: |fields| column::is_string(fields[0].data_type()),
    rows,
};

fn rows(arrays: &[ArrayRef]) -> Result<Rows> {
    let texts = column::strings(&arrays[0])?;
    let row = |row| match column::value(&texts, row) {
        None => Err("the text is null".to_string()),
        Some(text) if text.trim().is_empty() => Err("the text is empty".to_string()),
        Some(text) => Ok(Conversation::Text(text.to_string())),
    };
    Ok((0..texts.len()).map(row).collect())
}
