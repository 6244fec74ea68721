//! `prompt` and `completion`, both strings or both message lists.

use super::super::{Conversation, Layout};
use super::messages::KEYS;
use super::{Format, Rows, column};
use crate::fault::Result;
use arrow::array::ArrayRef;
use arrow::datatypes::Field;

pub static FORMAT: Format = Format {
    layout: Layout::PromptCompletion,
    expects: "`prompt` and `completion`: both strings or both lists of {role, content}",
    columns: |options| {
        let prompt = options.prompt_column.as_deref().unwrap_or("prompt");
        vec![prompt, options.completion_column.as_deref().unwrap_or("completion")]
    },
    accepts,
    rows,
};

fn accepts(fields: &[&Field]) -> bool {
    fields.iter().all(|field| column::is_string(field.data_type()))
        || fields.iter().all(|field| column::is_messages(field.data_type(), &KEYS))
}

fn rows(arrays: &[ArrayRef]) -> Result<Rows> {
    if column::is_string(arrays[0].data_type()) { texts(arrays) } else { messages(arrays) }
}

fn texts(arrays: &[ArrayRef]) -> Result<Rows> {
    let (prompts, completions) = (column::strings(&arrays[0])?, column::strings(&arrays[1])?);
    let row = |row| {
        let prompt = column::value(&prompts, row).ok_or("the prompt is null")?;
        let completion = column::value(&completions, row).ok_or("the completion is null")?;
        if completion.trim().is_empty() {
            return Err("the completion is empty".to_string());
        }
        if prompt.trim().is_empty() {
            return Err("the prompt is empty".to_string());
        }
        Ok(Conversation::PromptText { prompt: prompt.to_string(), completion: completion.to_string() })
    };
    Ok((0..arrays[0].len()).map(row).collect())
}

fn messages(arrays: &[ArrayRef]) -> Result<Rows> {
    let (prompts, completions) = (column::messages(&arrays[0], &KEYS)?, column::messages(&arrays[1], &KEYS)?);
    let pair = |(prompt, completion): (std::result::Result<_, String>, std::result::Result<_, String>)| {
        let prompt = prompt.map_err(|problem| format!("prompt: {problem}"))?;
        let completion = completion.map_err(|problem| format!("completion: {problem}"))?;
        Ok(Conversation::Prompt { prompt, completion })
    };
    Ok(prompts.into_iter().zip(completions).map(pair).collect())
}
