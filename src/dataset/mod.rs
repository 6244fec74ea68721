//! Files -> conversations -> token examples. Knows no model and no training.

mod problems;
mod container;
mod format;
mod footer;
mod budget;
mod split;
mod mix;
mod stream;
mod template;
mod harm;
mod words;
mod tokenizer;
mod marks;
mod mask;
mod learned;
mod encode;
mod chat;
mod store;
mod cache;
mod prepare;

use crate::fault::Result;
use crate::report::{Report, Stage};
use crate::source;
use std::sync::Arc;

pub use chat::Chat;
pub use container::{ENDINGS, names as containers};
pub use encode::{EncodedRow, check_template, encode, encode_rows};
pub use footer::{Footers, footers};
pub use mask::show;
pub use mix::Share;
pub use prepare::{Examples, Prepared, Set, TokenCache, prepare};
pub use tokenizer::Tokenizer;

/// How rows are read. Filled by `plan`.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// `None`: detected from the schema.
    pub layout: Option<Layout>,
    /// Column names that differ from the layout's own (KAITO: `messages_column`, `context_column`, `response_column`).
    pub messages_column: Option<String>,
    /// Column with the prompt, or the context of a question.
    pub prompt_column: Option<String>,
    /// Column with the completion or the answer.
    pub completion_column: Option<String>,
    /// Column of the text layout.
    pub text_column: Option<String>,
    /// Column with the question or instruction.
    pub question_column: Option<String>,
    /// What each entry of `data` says for itself; empty: nothing.
    pub shares: Vec<Share>,
    /// The container of every file, by its name in `containers`; `None`: recognised file by file.
    pub container: Option<String>,
    /// Names that the file has for what hone calls otherwise.
    pub names: Names,
    /// What happens to rows that cannot be used.
    pub bad_rows: BadRows,
    /// Shuffle before the split.
    pub shuffle: bool,
    /// Seed of shuffle, limits and weights.
    pub seed: u64,
    /// Share of rows that train, in (0, 1]; the rest is for evaluation.
    pub train_share: f64,
}

/// Names in a file that the user tells, beside those that are known.
#[derive(Clone, Debug, PartialEq)]
pub struct Names {
    /// Field of a message that says who speaks.
    pub role_field: Option<String>,
    /// Field of a message that holds what is said.
    pub content_field: Option<String>,
    /// Column with the system turn of each row.
    pub system_column: Option<String>,
    /// Column with the tools of each row.
    pub tools_column: Option<String>,
    /// Further words for the user, in any letter case.
    pub user: Vec<String>,
    /// Further words for the assistant, in any letter case.
    pub assistant: Vec<String>,
}

impl Names {
    /// No name beside those that are known.
    pub const KNOWN: Names = Names {
        role_field: None,
        content_field: None,
        system_column: None,
        tools_column: None,
        user: Vec::new(),
        assistant: Vec::new(),
    };
}

/// What happens to rows that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum BadRows {
    /// The run ends, with each kind of problem counted and its first places named.
    Refuse,
    /// They are left out and told; above this share of all rows the run ends all the same.
    Drop { share_max: f64 },
}

/// What a row holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Messages,
    PromptCompletion,
    Alpaca,
    QuestionAnswer,
    /// Tokenised already.
    Tokens,
    Text,
}

impl Layout {
    /// As the keys say it, in the order of the table.
    pub const KEYS: [(&'static str, Layout); 6] = [
        ("messages", Layout::Messages),
        ("prompt_completion", Layout::PromptCompletion),
        ("alpaca", Layout::Alpaca),
        ("question_answer", Layout::QuestionAnswer),
        ("tokens", Layout::Tokens),
        ("text", Layout::Text),
    ];

    /// The layout of this key.
    pub fn of_key(key: &str) -> Option<Layout> {
        Layout::KEYS.iter().find(|(name, _)| *name == key).map(|(_, layout)| *layout)
    }

    /// The key of this layout.
    pub fn key(self) -> &'static str {
        Layout::KEYS.iter().find(|(_, layout)| *layout == self).map_or("", |(key, _)| key)
    }

    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Messages => "messages",
            Layout::PromptCompletion => "prompt and completion",
            Layout::Alpaca => "instruction and output",
            Layout::QuestionAnswer => "question and answer",
            Layout::Tokens => "tokens",
            Layout::Text => "text",
        }
    }
}

/// How conversations become tokens. Filled by `plan`.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenOptions {
    /// Longer examples are cut on the right; counted and reported.
    pub tokens_max: usize,
    /// Which tokens are learned.
    pub loss: LossOn,
    /// Jinja text that replaces the model's own chat template, or the name of one of the model's.
    pub chat_template: Option<String>,
    /// What happens to rows that the template refuses.
    pub bad_rows: BadRows,
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
    /// Token ids.
    pub ids: Vec<u32>,
    /// Same length as `ids`; the first token is never a target of a shifted loss, whatever stands here.
    pub supervised: Vec<bool>,
}

/// All rows of all files, in training order.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    /// Rows to train on.
    pub train: Vec<Record>,
    /// Rows to evaluate on.
    pub evaluation: Vec<Record>,
    /// What the rows of the last entry hold.
    pub layout: Layout,
}

/// A row and where it stands, so that later stages can name it.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// What the row says.
    pub conversation: Conversation,
    /// What the chat template sees beside the messages.
    pub context: Context,
    /// The file's name as the user wrote it.
    pub file: Arc<str>,
    /// Counted from 0 in its file.
    pub row: u64,
    /// The entry of `data` that its file belongs to.
    pub entry: usize,
}

/// What a row says.
#[derive(Clone, Debug, PartialEq)]
pub enum Conversation {
    Messages(Vec<Message>),
    Prompt {
        prompt: Vec<Message>,
        completion: Vec<Message>,
    },
    PromptText {
        prompt: String,
        completion: String,
    },
    /// Tokenised already, padding taken out.
    Tokens {
        ids: Vec<u32>,
        supervised: Vec<bool>,
    },
    Text(String),
}

/// What a chat template sees beside the messages; most rows have nothing of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Context {
    /// Descriptions of the tools that the assistant may call.
    pub tools: Option<Arc<serde_json::Value>>,
    /// Documents to answer from.
    pub documents: Option<Arc<serde_json::Value>>,
    /// Further variables of the template (`chat_template_kwargs`), such as `enable_thinking`.
    pub variables: Option<Arc<serde_json::Map<String, serde_json::Value>>>,
}

/// One turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// One of `format::ROLES`.
    pub role: String,
    /// `None`: null in the file.
    pub content: Option<String>,
    /// Further fields that templates know (`format::fields`), except nulls.
    pub extra: Vec<(&'static str, serde_json::Value)>,
    /// Whether an answer is learned; false if the file says `weight: 0` or `train: false`.
    pub learned: bool,
}

impl Message {
    /// A turn of text, learned if it is the assistant's.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: Some(content.into()), extra: Vec::new(), learned: true }
    }

    /// What is said; nothing if the content is null.
    pub fn text(&self) -> &str {
        self.content.as_deref().unwrap_or_default()
    }
}

/// Reads every file into memory, checks every row, shuffles and splits. [`prepare`] does the same for data of any size.
///
/// # Errors
/// Data: files and rows that cannot be used; all bad rows are collected first. Config: a split that leaves a side empty.
/// Capacity: more text than the memory holds.
pub fn read(files: &[source::File], options: &Options, report: &Report) -> Result<Dataset> {
    let mut records = Vec::new();
    let budget = budget::Budget::of(files);
    let found = stream::stream(files, options, budget, report, &mut |part| {
        records.extend(part.records);
        Ok(())
    })?;
    let records = mix::limit(records, |record: &Record| record.entry, options);
    let rows = records.len() as u64 + found.problems.rows();
    found.problems.settle(rows, options.bad_rows, "correct these rows", Stage::Read, report)?;
    found.reading.tell(report);
    let Some(format) = found.format.filter(|_| rows > 0) else { return Err(stream::no_rows(files)) };
    let rows = records.len();
    let (train, evaluation) = split::split(records, options)?;
    let train = mix::weigh(train, |record| record.entry, options);
    report
        .note(Stage::Read, rows_read(rows, format.layout.name(), files.len(), train.len(), evaluation.len()));
    Ok(Dataset { train, evaluation, layout: format.layout })
}

fn rows_read(rows: usize, layout: &str, files: usize, train: usize, evaluation: usize) -> String {
    format!("{rows} rows of {layout} from {files} file(s): {train} to train on, {evaluation} to evaluate on")
}
