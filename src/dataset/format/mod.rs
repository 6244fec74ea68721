//! Schema -> the format that reads it. A format is one file here and one line in `FORMATS`.

mod column;
mod messages;
mod prompt_completion;
mod sharegpt;
mod text;

use super::{Conversation, Layout, Options};
use crate::fault::{Fault, Result};
use arrow::array::ArrayRef;
use arrow::datatypes::{Field, Schema};

/// In order of preference when a file fits several.
const FORMATS: [&Format; 4] =
    [&messages::FORMAT, &sharegpt::FORMAT, &prompt_completion::FORMAT, &text::FORMAT];

/// Roles that chat templates know.
pub(super) const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// Fields of a message beside role and content that templates read.
pub(super) const EXTRA_FIELDS: [&str; 4] = ["name", "reasoning_content", "thinking", "tool_call_id"];

/// How one kind of table becomes conversations.
pub(super) struct Format {
    pub layout: Layout,
    /// The columns it wants, for messages.
    expects: &'static str,
    /// The columns' names: the user's, else the format's own.
    columns: fn(&Options) -> Vec<&str>,
    /// Whether columns of these names have types it can read.
    accepts: fn(&[&Field]) -> bool,
    /// Arrays in the order of `columns` -> one conversation a row, or what is wrong with the row.
    pub rows: fn(&[ArrayRef]) -> Result<Rows>,
}

/// Bytes of the texts in these arrays, before any of them is copied.
pub(super) fn text_bytes(arrays: &[ArrayRef]) -> u64 {
    arrays.iter().map(column::text_bytes).sum()
}

type Rows = Vec<std::result::Result<Conversation, String>>;

pub(super) struct Choice {
    pub format: &'static Format,
    /// Names of the columns to read, in the order `rows` wants.
    pub columns: Vec<String>,
}

/// The first format of the wanted layout whose columns are there with fitting types.
pub(super) fn choose(schema: &Schema, options: &Options) -> Result<Choice> {
    let layout = options.layout.or_else(|| layout_of_named_columns(options));
    let wanted: Vec<_> =
        FORMATS.into_iter().filter(|format| layout.is_none_or(|l| l == format.layout)).collect();
    for name in named_columns(options, layout) {
        if schema.index_of(name).is_err() {
            return Err(unfit(schema, &wanted, &format!("there is no column `{name}`")));
        }
    }
    for format in &wanted {
        let columns = (format.columns)(options);
        let fields: Vec<&Field> =
            columns.iter().filter_map(|name| schema.field_with_name(name).ok()).collect();
        if fields.len() == columns.len() && (format.accepts)(&fields) {
            for name in &columns {
                if schema.fields().iter().filter(|field| field.name() == name).count() > 1 {
                    return Err(Fault::data(format!("column `{name}` is there more than once")));
                }
            }
            return Ok(Choice { format, columns: columns.into_iter().map(String::from).collect() });
        }
    }
    Err(unfit(schema, &wanted, "no columns to train on"))
}

/// A column that the user names tells the layout too.
fn layout_of_named_columns(options: &Options) -> Option<Layout> {
    if options.messages_column.is_some() {
        Some(Layout::Messages)
    } else if options.prompt_column.is_some() || options.completion_column.is_some() {
        Some(Layout::PromptCompletion)
    } else {
        options.text_column.as_ref().map(|_| Layout::Text)
    }
}

/// The names the user gave for this layout.
fn named_columns(options: &Options, layout: Option<Layout>) -> impl Iterator<Item = &String> {
    let names = match layout {
        Some(Layout::Messages) => [&options.messages_column, &None],
        Some(Layout::PromptCompletion) => [&options.prompt_column, &options.completion_column],
        Some(Layout::Text) => [&options.text_column, &None],
        None => [&None, &None],
    };
    names.into_iter().flatten()
}

fn unfit(schema: &Schema, wanted: &[&Format], what: &str) -> Fault {
    const COLUMNS_SHOWN_MAX: usize = 20;
    const TYPE_CHARS_MAX: usize = 120;
    let mut columns: Vec<String> = schema
        .fields()
        .iter()
        .take(COLUMNS_SHOWN_MAX)
        .map(|field| {
            let kind: String = field.data_type().to_string().chars().take(TYPE_CHARS_MAX).collect();
            format!("`{}`: {kind}", field.name())
        })
        .collect();
    if schema.fields().len() > COLUMNS_SHOWN_MAX {
        columns.push(format!("and {} more", schema.fields().len() - COLUMNS_SHOWN_MAX));
    }
    let expected: Vec<&str> = wanted.iter().map(|format| format.expects).collect();
    let found = if columns.is_empty() { "none".to_string() } else { columns.join(", ") };
    Fault::data(format!("{what}; columns found: {found}; expected {}", expected.join(", or ")))
        .help("rename the columns, or name them in the configuration")
}
