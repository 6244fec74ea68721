//! Files -> conversations -> token examples. Knows no model and no training.

mod problems;
mod parquet;
mod pages;
mod footer;
mod budget;
mod format;
mod split;
mod template;
mod harm;
mod tokenizer;
mod mask;
mod encode;

use crate::fault::{Fault, Result};
use crate::report::{Report, Stage, Unit};
use crate::source;
use std::sync::Arc;

pub use encode::encode;
pub use mask::show;
pub use tokenizer::Tokenizer;

/// How rows are read. Filled by `plan`.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// `None`: detected from the schema.
    pub layout: Option<Layout>,
    /// Column names that differ from the layout's own (KAITO: `messages_column`, `context_column`, `response_column`).
    pub messages_column: Option<String>,
    pub prompt_column: Option<String>,
    pub completion_column: Option<String>,
    pub text_column: Option<String>,
    /// Shuffle before the split.
    pub shuffle: bool,
    pub seed: u64,
    /// Share of rows that train, in (0, 1]; the rest is for evaluation.
    pub train_share: f64,
}

/// What a row holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Messages,
    PromptCompletion,
    Text,
}

impl Layout {
    pub fn name(self) -> &'static str {
        match self {
            Layout::Messages => "messages",
            Layout::PromptCompletion => "prompt and completion",
            Layout::Text => "text",
        }
    }
}

/// How conversations become tokens. Filled by `plan`.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenOptions {
    /// Longer examples are cut on the right; counted and reported.
    pub tokens_max: usize,
    pub loss: LossOn,
    /// Jinja text that replaces the model's own chat template.
    pub chat_template: Option<String>,
}

/// Which tokens carry loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossOn {
    /// Assistant turns of conversations, completions of prompt/completion rows, all of plain text.
    Answers,
    Everything,
}

/// One training example: token ids and, for each, whether it is a target.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    pub ids: Vec<u32>,
    /// Same length as `ids`; the first token is never a target of a shifted loss, whatever stands here.
    pub supervised: Vec<bool>,
}

/// All rows of all files, in training order.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    pub train: Vec<Record>,
    pub evaluation: Vec<Record>,
    pub layout: Layout,
}

/// A row and where it stands, so that later stages can name it.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    pub conversation: Conversation,
    /// The file's name as the user wrote it.
    pub file: Arc<str>,
    /// Counted from 0 in its file.
    pub row: u64,
}

/// What a row says.
#[derive(Clone, Debug, PartialEq)]
pub enum Conversation {
    Messages(Vec<Message>),
    Prompt { prompt: Vec<Message>, completion: Vec<Message> },
    PromptText { prompt: String, completion: String },
    Text(String),
}

/// One turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// One of `format::ROLES`.
    pub role: String,
    pub content: String,
    /// Further string fields that templates know (`format::EXTRA_FIELDS`), where not null.
    pub extra: Vec<(&'static str, String)>,
}

/// Reads every file, checks every row, shuffles and splits.
///
/// Errors: `Data` for files and rows that cannot be used (all bad rows of a file set are collected first),
/// `Config` for a split that leaves a side empty.
pub fn read(files: &[source::File], options: &Options, report: &Report) -> Result<Dataset> {
    let mut records = Vec::new();
    let mut problems = problems::Problems::default();
    let mut first: Option<(&'static format::Format, &source::File)> = None;
    let mut budget = budget::Budget::of(files);
    for file in files {
        let table = parquet::open(file)?;
        let chosen = format::choose(&table.schema, options).map_err(|fault| fault.at(&file.name))?;
        match first {
            Some((format, other)) if format.layout != chosen.format.layout => {
                return Err(layouts_differ(format, &other.name, chosen.format, &file.name));
            }
            _ => first = first.or(Some((chosen.format, file))),
        }
        let task = report.task(Stage::Read, Unit::Rows, &file.name, Some(table.rows));
        let name: Arc<str> = file.name.as_str().into();
        let mut row = 0;
        table.read(&chosen.columns, |arrays| {
            budget.spend(format::text_bytes(arrays))?;
            let batch = (chosen.format.rows)(arrays)?;
            task.advance(batch.len() as u64);
            for found in batch {
                match found {
                    Ok(conversation) => records.push(Record { conversation, file: name.clone(), row }),
                    Err(problem) => problems.add(problem, &name, row),
                }
                row += 1;
            }
            Ok(())
        })?;
    }
    let rows = records.len() as u64 + problems.rows();
    problems.into_result(rows, "correct or remove these rows")?;
    let Some((format, _)) = first.filter(|_| rows > 0) else {
        let names: Vec<&str> = files.iter().take(3).map(|file| file.name.as_str()).collect();
        return Err(Fault::data(format!(
            "the dataset has 0 rows in {} file(s): {}",
            files.len(),
            names.join(", ")
        ))
        .help("check the export that wrote the files, and the path or URL they were taken from"));
    };
    let (train, evaluation) = split::split(records, options)?;
    report.note(
        Stage::Read,
        format!(
            "{rows} rows of {} from {} file(s): {} to train on, {} to evaluate on",
            format.layout.name(),
            files.len(),
            train.len(),
            evaluation.len()
        ),
    );
    Ok(Dataset { train, evaluation, layout: format.layout })
}

fn layouts_differ(a: &format::Format, a_name: &str, b: &format::Format, b_name: &str) -> Fault {
    Fault::data(format!(
        "the files do not have one layout: {a_name} holds {}, {b_name} holds {}",
        a.layout.name(),
        b.layout.name()
    ))
    .help("train on files of one layout, or rewrite one of them")
}
