//! `conversations: list<struct<from, value>>`, as ShareGPT dumps write conversations.

use super::super::{Conversation, Layout};
use super::{Format, Rows, column};
use crate::fault::Result;
use arrow::array::ArrayRef;

pub static FORMAT: Format = Format {
    layout: Layout::Messages,
    expects: "`conversations`: a list of {from, value}",
    columns: |options| vec![options.messages_column.as_deref().unwrap_or("conversations")],
    accepts: |fields| column::is_messages(fields[0].data_type(), &KEYS),
    rows,
};

const KEYS: column::Keys = column::Keys { role: "from", content: "value", rename: role };

fn role(from: &str) -> &str {
    match from {
        "human" => "user",
        "gpt" => "assistant",
        other => other,
    }
}

fn rows(arrays: &[ArrayRef]) -> Result<Rows> {
    let messages = column::messages(&arrays[0], &KEYS)?;
    Ok(messages.into_iter().map(|row| row.map(Conversation::Messages)).collect())
}
