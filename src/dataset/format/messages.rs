//! `messages: list<struct<role, content>>`, as OpenAI and HF write conversations.

use super::super::{Conversation, Layout};
use super::{Format, Rows, column};
use crate::fault::Result;
use arrow::array::ArrayRef;

pub static FORMAT: Format = Format {
    layout: Layout::Messages,
    expects: "`messages`: a list of {role, content}",
    columns: |options| vec![options.messages_column.as_deref().unwrap_or("messages")],
    accepts: |fields| column::is_messages(fields[0].data_type(), &KEYS),
    rows,
};

pub const KEYS: column::Keys = column::Keys { role: "role", content: "content", rename: |role| role };

fn rows(arrays: &[ArrayRef]) -> Result<Rows> {
    let messages = column::messages(&arrays[0], &KEYS)?;
    Ok(messages.into_iter().map(|row| row.map(Conversation::Messages)).collect())
}
