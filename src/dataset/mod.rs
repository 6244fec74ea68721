//! Files -> conversations -> token examples. This module knows no model and no training.

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
mod letters;
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

/// Options of reading rows. `plan` fills them.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The layout of all files. `None`: detected from the schema.
    pub layout: Option<Layout>,
    /// Name of the column with messages, if it is not the layout's own (KAITO: `messages_column`).
    pub messages_column: Option<String>,
    /// Name of the column with prompts (KAITO: `context_column`).
    pub prompt_column: Option<String>,
    /// Name of the column with completions (KAITO: `response_column`).
    pub completion_column: Option<String>,
    /// Name of the column with plain text.
    pub text_column: Option<String>,
    /// Name of the column with the question or instruction.
    pub question_column: Option<String>,
    /// The settings of each entry of `data`; empty if there are none.
    pub shares: Vec<Share>,
    /// The container of every file, by its name in `containers`. `None`: each file's is recognised.
    pub container: Option<String>,
    /// Names in the files that the user gave.
    pub names: Names,
    /// The treatment of rows that cannot be used.
    pub bad_rows: BadRows,
    /// Whether rows are shuffled before the split.
    pub shuffle: bool,
    /// Seed of shuffling, limits and weights.
    pub seed: u64,
    /// Share of rows to train on, in (0, 1]. The rest is for evaluation.
    pub train_share: f64,
    /// Entries from this index on are evaluated on and never trained on; all rows of the others are trained on.
    /// `None`: `train_share` splits the rows.
    pub evaluation_from: Option<usize>,
    /// Column whose equal values stay on one side of the split.
    pub group_column: Option<String>,
}

impl Options {
    /// Options that name nothing: layouts and containers are recognised, and all rows train, in the order of their
    /// files. A row that cannot be used ends the reading.
    pub const RECOGNISED: Options = Options {
        layout: None,
        messages_column: None,
        prompt_column: None,
        completion_column: None,
        text_column: None,
        question_column: None,
        shares: Vec::new(),
        container: None,
        names: Names::KNOWN,
        bad_rows: BadRows::Refuse,
        shuffle: false,
        seed: 0,
        train_share: 1.0,
        evaluation_from: None,
        group_column: None,
    };
}

/// Names that the user gave in addition to the known ones.
#[derive(Clone, Debug, PartialEq)]
pub struct Names {
    /// Field of a message that holds the role.
    pub role_field: Option<String>,
    /// Field of a message that holds the content.
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
    /// The known names only.
    pub const KNOWN: Names = Names {
        role_field: None,
        content_field: None,
        system_column: None,
        tools_column: None,
        user: Vec::new(),
        assistant: Vec::new(),
    };
}

/// The treatment of rows that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum BadRows {
    /// The run ends. The fault counts each kind of problem and names its first places.
    Refuse,
    /// They are left out with a warning. If they are more than this share of all rows, the run ends.
    Drop {
        /// The share.
        share_max: f64,
    },
}

/// The content of a row's columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// A list of messages.
    Messages,
    /// A prompt and a completion, as texts or as lists of messages.
    PromptCompletion,
    /// An instruction, possibly an input, and an output.
    Alpaca,
    /// A question and an answer, possibly a context.
    QuestionAnswer,
    /// Token ids.
    Tokens,
    /// Plain text, all of it learned.
    Text,
}

impl Layout {
    /// The values of the key, in the order of the table.
    pub const KEYS: [(&'static str, Layout); 6] = [
        ("messages", Layout::Messages),
        ("prompt_completion", Layout::PromptCompletion),
        ("alpaca", Layout::Alpaca),
        ("question_answer", Layout::QuestionAnswer),
        ("tokens", Layout::Tokens),
        ("text", Layout::Text),
    ];

    /// Returns the layout with this key.
    pub fn of_key(key: &str) -> Option<Layout> {
        Layout::KEYS.iter().find(|(name, _)| *name == key).map(|(_, layout)| *layout)
    }

    /// Returns the key of this layout.
    pub fn key(self) -> &'static str {
        Layout::KEYS.iter().find(|(_, layout)| *layout == self).map_or("", |(key, _)| key)
    }

    /// Returns the name in messages.
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

/// Options of turning conversations into tokens. `plan` fills them.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenOptions {
    /// Most tokens per example. Longer ones are cut on the right, counted and reported.
    pub tokens_max: usize,
    /// The tokens that are learned.
    pub loss: LossOn,
    /// Jinja text that replaces the model's own chat template, or the name of one of the model's.
    pub chat_template: Option<String>,
    /// The treatment of rows that the template refuses.
    pub bad_rows: BadRows,
}

/// The tokens that carry loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossOn {
    /// The assistant's turns of conversations, the completions of prompts, and all of plain text.
    Answers,
    /// All tokens.
    Everything,
}

/// One training example: token ids and, for each, whether it is a target.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// One flag per token. The first token is never a target of a shifted loss, even if its flag is set.
    pub supervised: Vec<bool>,
}

/// All rows of all files, in training order.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    /// Rows to train on.
    pub train: Vec<Record>,
    /// Rows to evaluate on.
    pub evaluation: Vec<Record>,
    /// The layout of the first file.
    pub layout: Layout,
}

/// A row with its place, so that later stages can name it.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// The content of the row.
    pub conversation: Conversation,
    /// The chat template's inputs beside the messages.
    pub context: Context,
    /// The file's name as the user wrote it.
    pub file: Arc<str>,
    /// The row in its file, counted from 0.
    pub row: u64,
    /// Index of the entry of `data` that the file belongs to.
    pub entry: usize,
    /// Digest of the value in `group_column`; `None` if there is no such column or the value is null.
    pub group: Option<u64>,
}

/// The content of a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Conversation {
    /// A conversation whose answers are learned.
    Messages(Vec<Message>),
    /// A conversation whose last part is learned.
    Prompt {
        /// The turns before, which are not learned.
        prompt: Vec<Message>,
        /// The turns whose answers are learned.
        completion: Vec<Message>,
    },
    /// Two texts; the completion is learned.
    PromptText {
        /// The text before.
        prompt: String,
        /// The text that is learned.
        completion: String,
    },
    /// A row that was tokenized already; padding is removed.
    Tokens {
        /// Token ids.
        ids: Vec<u32>,
        /// Whether each token is learned.
        supervised: Vec<bool>,
    },
    /// Plain text, all of it learned.
    Text(String),
}

/// The inputs of a chat template beside the messages. Most rows have none.
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
    /// One of the roles that templates know.
    pub role: String,
    /// The text of the turn. `None`: null in the file.
    pub content: Option<String>,
    /// Further fields that templates know (`format::fields`), if they are not null.
    pub extra: Vec<(&'static str, serde_json::Value)>,
    /// Whether an answer is learned; false if the file says `weight: 0` or `train: false`.
    pub learned: bool,
}

impl Message {
    /// Returns a turn of text. It is learned if it is the assistant's.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: Some(content.into()), extra: Vec::new(), learned: true }
    }

    /// Returns the text of the turn; empty if the content is null.
    pub fn text(&self) -> &str {
        self.content.as_deref().unwrap_or_default()
    }
}

/// Reads every file into memory, checks every row, shuffles and splits. [`prepare()`] does the same for data of any
/// size.
///
/// # Errors
/// Data: files and rows that cannot be used; all bad rows are collected first. Config: a split that leaves a side
/// empty. Capacity: more text than the memory holds.
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
    let of = |record: &Record| (record.entry, record.group);
    let (train, evaluation) = split::split(records, of, options)?;
    let train = mix::weigh(train, |record| record.entry, options);
    report
        .note(Stage::Read, rows_read(rows, format.layout.name(), files.len(), train.len(), evaluation.len()));
    Ok(Dataset { train, evaluation, layout: format.layout })
}

fn rows_read(rows: usize, layout: &str, files: usize, train: usize, evaluation: usize) -> String {
    format!("{rows} rows of {layout} from {files} file(s): {train} to train on, {evaluation} to evaluate on")
}
