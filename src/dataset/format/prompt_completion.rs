//! `prompt` and `completion`, both strings or both message lists.

use super::super::{Conversation, Layout};
use super::{Column, Format, Reading, Rows, column, json, messages, not_a_string};
use crate::fault::Result;
use arrow::array::{Array, ArrayRef};
use arrow::datatypes::Field;

/// The format.
pub static FORMAT: Format = Format {
    layout: Layout::PromptCompletion,
    expects: "`prompt` and `completion`: both strings or both lists of {role, content}",
    columns: &[
        Column {
            key: "DatasetConfig.context_column",
            given: |options| options.prompt_column.as_deref(),
            names: &["prompt"],
        },
        Column {
            key: "DatasetConfig.response_column",
            given: |options| options.completion_column.as_deref(),
            names: &["completion"],
        },
    ],
    refuses,
    rows,
};

/// Refuses columns unless both are strings or both are lists of messages.
fn refuses(fields: &[&Field]) -> Option<String> {
    let is_list = |field: &&&Field| column::element(field.data_type()).is_some();
    match fields.iter().filter(is_list).count() {
        0 => fields.iter().find_map(|field| not_a_string(field)),
        1 => Some(format!(
            "`{}` is {} and `{}` is {}; both must be strings, or both lists of {{role, content}}",
            fields[0].name(),
            column::kind(fields[0].data_type()),
            fields[1].name(),
            column::kind(fields[1].data_type())
        )),
        _ => fields.iter().find_map(|field| messages::refuses(field)),
    }
}

fn rows(arrays: &[ArrayRef], reading: &mut Reading) -> Result<Rows> {
    match column::is_string(arrays[0].data_type()) {
        true => texts(arrays),
        false => lists(arrays, reading),
    }
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

fn lists(arrays: &[ArrayRef], reading: &mut Reading) -> Result<Rows> {
    let (prompts, completions) = (json::Column::of(&arrays[0])?, json::Column::of(&arrays[1])?);
    let mut row = |row| {
        let prompt = messages::conversation(prompts.value(row), reading)
            .map_err(|problem| format!("prompt: {problem}"))?;
        let completion = messages::conversation(completions.value(row), reading)
            .map_err(|problem| format!("completion: {problem}"))?;
        Ok(Conversation::Prompt { prompt, completion })
    };
    Ok((0..arrays[0].len()).map(&mut row).collect())
}
