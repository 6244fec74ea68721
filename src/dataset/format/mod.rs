//! Schema -> the format that reads it. A format is one file here and one line in `FORMATS`.

mod column;
mod json;
mod sharegpt;
mod fields;
mod messages;
mod prompt_completion;
mod instruction;
mod tokens;
mod text;
mod companions;
mod shape;

use super::{Context, Conversation, Layout, Names, Options};
use crate::fault::{Fault, Result};
use crate::report::{Report, Stage};
use arrow::array::ArrayRef;
use arrow::datatypes::{DataType, Field, Schema};
use companions::Companion;
use std::collections::{BTreeMap, BTreeSet};

/// All formats, in order of preference if a file fits several.
const FORMATS: [&Format; 13] = [
    &messages::FORMAT,
    &prompt_completion::FORMAT,
    &text::FORMAT,
    &instruction::ALPACA,
    &instruction::ALPACA_WITHOUT_INPUT,
    &instruction::QUESTION_ANSWER,
    &instruction::QUESTION_ANSWER_ALONE,
    &tokens::FORMATS[0],
    &tokens::FORMATS[1],
    &tokens::FORMATS[2],
    &tokens::FORMATS[3],
    &tokens::FORMATS[4],
    &tokens::FORMATS[5],
];

/// A layout: the functions that turn one kind of table into conversations.
pub(super) struct Format {
    /// The layout that it reads.
    pub layout: Layout,
    /// The columns it needs, for messages.
    expects: &'static str,
    columns: &'static [Column],
    /// The reason why columns of these types, in the order of `columns`, cannot be read.
    refuses: fn(&[&Field]) -> Option<String>,
    /// The function that reads arrays in the order of `columns`: one conversation for each row, or its fault.
    rows: fn(&[ArrayRef], &mut Reading) -> Result<Rows>,
}

/// A column that a format needs.
struct Column {
    /// The configuration key that names it.
    key: &'static str,
    /// The value of that key.
    given: fn(&Options) -> Option<&str>,
    /// Names that are looked for if the key is not set, in any letter case, the best first.
    names: &'static [&'static str],
}

/// Returns the number of bytes of the texts in these arrays, before any of them is copied.
pub(super) fn text_bytes(arrays: &[ArrayRef]) -> u64 {
    arrays.iter().map(column::text_bytes).sum()
}

type Rows = Vec<std::result::Result<Conversation, String>>;
/// A row's conversation, its context, and the digest of its group.
type Attached = Vec<std::result::Result<(Conversation, Context, Option<u64>), String>>;

/// A format that fits a file, with the columns to read.
pub(super) struct Choice {
    /// The format.
    pub format: &'static Format,
    /// Names of the columns to read: the format's, then the companions', then the group's if it is none of them.
    pub columns: Vec<String>,
    companions: Vec<(Companion, String)>,
    /// Index of the group's column.
    group: Option<usize>,
}

impl Choice {
    /// Reads arrays in the order of `columns`: one conversation for each row, or its fault.
    pub fn rows(&self, arrays: &[ArrayRef], reading: &mut Reading) -> Result<Attached> {
        let (own, beside) = arrays.split_at(self.format.columns.len());
        let beside = companions::Columns::of(&self.companions, beside)?;
        let groups = self.group.map(|index| json::Column::of(&arrays[index])).transpose()?;
        let rows = (self.format.rows)(own, reading)?;
        let attach = |(row, found): (usize, std::result::Result<Conversation, String>)| {
            let (conversation, context) = beside.attach(row, found?, reading)?;
            let group = groups.as_ref().and_then(|column| group(&column.value(row)));
            Ok((conversation, context, group))
        };
        Ok(rows.into_iter().enumerate().map(attach).collect())
    }
}

/// Returns the digest of a group's value; `None` for null.
fn group(value: &serde_json::Value) -> Option<u64> {
    let digest = <sha2::Sha256 as sha2::Digest>::digest(value.to_string().as_bytes());
    let first = digest.first_chunk().expect("a digest has 32 bytes");
    (!value.is_null()).then(|| u64::from_le_bytes(*first).max(1))
}

/// Findings over all files that the user should know. They are reported once at the end.
pub(super) struct Reading<'a> {
    /// Names that the user gave.
    pub names: &'a Names,
    /// Columns that nothing reads, and whether they only identify the row.
    columns: BTreeMap<String, bool>,
    /// Fields of messages that nothing reads, and the number of messages that have them.
    fields: BTreeMap<String, u64>,
    /// Columns for the chat template in rows that use none, and the number of rows.
    idle: BTreeMap<String, u64>,
    /// Messages whose content had several parts.
    pub parts_joined: u64,
    /// Empty turns of the user.
    pub empty_questions: u64,
    /// Names of files without a row, beside files with rows.
    pub empty_files: Vec<String>,
    /// Keys that name columns, and those of them that the layout of some file uses.
    keys: [BTreeSet<&'static str>; 2],
    /// Whether a column `label` that nobody reads says true or false of each answer.
    has_labels: bool,
}

impl<'a> Reading<'a> {
    /// Starts without findings.
    pub fn new(names: &'a Names) -> Reading<'a> {
        let (columns, fields, idle, empty_files) = Default::default();
        let (parts_joined, empty_questions, has_labels, keys) = Default::default();
        Reading { names, columns, fields, idle, parts_joined, empty_questions, empty_files, keys, has_labels }
    }

    fn column_not_read(&mut self, name: &str, names_the_row: bool) {
        self.columns.insert(name.to_owned(), names_the_row);
    }

    fn field_not_read(&mut self, name: &str) {
        *self.fields.entry(name.to_owned()).or_insert(0) += 1;
    }

    fn without_template(&mut self, name: &str) {
        *self.idle.entry(name.to_owned()).or_insert(0) += 1;
    }

    /// Reports the findings, one line for each kind.
    pub fn tell(&self, report: &Report) {
        self.tell_of_columns(report);
        let warn = |text: String| report.warn(Stage::Read, text);
        if !self.empty_files.is_empty() {
            const SHOWN_MAX: usize = 3;
            let count = self.empty_files.len();
            let names: Vec<&str> = self.empty_files.iter().take(SHOWN_MAX).map(String::as_str).collect();
            let more = if count > SHOWN_MAX { ", ..." } else { "" };
            warn(format!("{count} files hold no rows: {}{more}", names.join(", ")));
        }
        if !self.fields.is_empty() {
            let list: Vec<String> =
                self.fields.iter().map(|(name, count)| format!("`{name}` in {count}")).collect();
            warn(format!(
                "fields of messages that are not read, with the number of messages: {}",
                list.join(", ")
            ));
        }
        for (name, rows) in &self.idle {
            warn(format!(
                "`{name}` in {rows} rows has no effect: rows of plain text do not pass a chat template"
            ));
        }
        if self.parts_joined > 0 {
            let count = self.parts_joined;
            warn(format!(
                "{count} messages have a content of several parts: their texts are joined with nothing between"
            ));
        }
        if self.empty_questions > 0 {
            let count = self.empty_questions;
            warn(format!("{count} turns of the user are empty and are shown as such"));
        }
    }

    /// Reports the columns that are not read, and the keys that name none.
    fn tell_of_columns(&self, report: &Report) {
        let names = |about: bool| {
            let list = self.columns.iter().filter(|(_, is_about)| **is_about == about);
            let shown = |name: &str| match name {
                "" => "one without a name".to_owned(),
                name => format!("`{name}`"),
            };
            list.map(|(name, _)| shown(name)).collect::<Vec<_>>().join(", ")
        };
        let (about, others) = (names(true), names(false));
        if !about.is_empty() {
            report.note(Stage::Read, format!("columns that are not read: {about}"));
        }
        let warn = |text: String| report.warn(Stage::Read, text);
        if !others.is_empty() {
            warn(format!("columns that are not read, so that nothing in them is learned: {others}"));
        }
        let [given, used] = &self.keys;
        for key in given.difference(used) {
            warn(format!("{key} has no effect: the layout of the rows has no such column"));
        }
        if self.has_labels {
            warn("if `label` says which answers are wanted (data for KTO), leave the other rows out: every answer is learned".into());
        }
    }
}

/// Returns the first format of the wanted layout whose columns are there with fitting types.
///
/// `layout` is the layout that the file's own entry of `data` names.
pub(super) fn choose(
    schema: &Schema,
    options: &Options,
    layout: Option<Layout>,
    reading: &mut Reading,
) -> Result<Choice> {
    let layout = layout.or(options.layout).or_else(|| layout_of_named_columns(options));
    let wanted: Vec<&'static Format> =
        FORMATS.into_iter().filter(|format| layout.is_none_or(|l| l == format.layout)).collect();
    let (mut problems, mut refused) = (Vec::new(), Vec::new());
    for format in &wanted {
        if refused.contains(&format.layout) {
            continue;
        }
        let columns = resolve(schema, format, options, layout)?;
        // For each layout, the problem of its last, least demanding variant is reported.
        problems.retain(|(layout, _)| *layout != format.layout);
        let columns = match columns {
            Ok(columns) => columns,
            Err(problem) => {
                problems.extend(problem.map(|problem| (format.layout, problem)));
                continue;
            }
        };
        let fields: Vec<&Field> =
            columns.iter().map(|name| schema.field_with_name(name).expect("found there")).collect();
        match (format.refuses)(&fields) {
            Some(problem) => {
                // A less demanding variant would leave the column out, and so learn something else. A column
                // that has only nulls is as good as none.
                if !fields.iter().any(|field| field.data_type().is_null()) {
                    refused.push(format.layout);
                }
                problems.push((format.layout, problem));
            }
            None => return chosen(schema, format, options, columns, reading),
        }
    }
    let mut problems: Vec<String> = problems.into_iter().map(|(_, problem)| problem).collect();
    problems.dedup();
    let fault = unfit(schema, &wanted, &problems);
    Err(match shape::remedy(schema, options) {
        Some(remedy) => fault.help(remedy),
        None => fault,
    })
}

fn chosen(
    schema: &Schema,
    format: &'static Format,
    options: &Options,
    mut columns: Vec<String>,
    reading: &mut Reading,
) -> Result<Choice> {
    let companions = companions::of(schema, options, &columns)?;
    for (companion, name) in &companions {
        if let Some(problem) = companions::refuses(schema, *companion, name) {
            return Err(Fault::data(problem).help("change the column's type, or rename the column"));
        }
    }
    columns.extend(companions.iter().map(|(_, name)| name.clone()));
    let group = options.group_column.as_deref().filter(|_| options.evaluation_from.is_none());
    let group = group.map(|name| named(schema, name, "group_column")).transpose()?;
    let group = group.map(|name| match columns.iter().position(|other| *other == name) {
        Some(index) => index,
        None => {
            columns.push(name);
            columns.len() - 1
        }
    });
    for name in &columns {
        if schema.fields().iter().filter(|field| field.name() == name).count() > 1 {
            return Err(Fault::data(format!("column `{name}` is there more than once"))
                .help("rename or remove one of the two columns"));
        }
    }
    companions::note_others(schema, &columns, reading);
    let [given, used] = &mut reading.keys;
    given.extend(keys_given(options));
    used.extend(format.columns.iter().map(|column| column.key));
    if format.layout == Layout::Text {
        used.insert("DatasetConfig.response_column"); // It may name the text too.
    }
    reading.has_labels |= !columns.iter().any(|name| name == "label")
        && schema.field_with_name("label").is_ok_and(|field| *field.data_type() == DataType::Boolean);
    Ok(Choice { format, columns, companions, group })
}

/// The beginning of the problem of a layout that lacks some of its columns.
const PARTLY: &str = "there is";

/// Returns the columns of a format in this schema. If only some are missing, it returns the problem to report. A
/// column that the configuration names and the schema lacks is a fault.
fn resolve(
    schema: &Schema,
    format: &Format,
    options: &Options,
    layout: Option<Layout>,
) -> Result<std::result::Result<Vec<String>, Option<String>>> {
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    for column in format.columns {
        let name = match (column.given)(options) {
            Some(name) if layout == Some(format.layout) => Some(named(schema, name, column.key)?),
            Some(name) => find(schema, name),
            None => column.names.iter().find_map(|name| find(schema, name)),
        };
        match name {
            Some(name) => found.push(name),
            None => missing.push(column),
        }
    }
    if missing.is_empty() {
        return Ok(Ok(found));
    }
    let lacking = |column: &&Column| format!("`{}` (name it with {})", column.names[0], column.key);
    let lacking: Vec<String> = missing.iter().map(lacking).collect();
    let partly = (!found.is_empty())
        .then(|| format!("{PARTLY} `{}` but no {}", found.join("`, `"), lacking.join(", no ")));
    Ok(Err(partly))
}

/// Finds a column by its name in any letter case; the exact name comes first.
fn find(schema: &Schema, name: &str) -> Option<String> {
    let names = || schema.fields().iter().map(|field| field.name());
    let exact = names().find(|other| *other == name);
    exact.or_else(|| names().find(|other| other.eq_ignore_ascii_case(name))).cloned()
}

/// Finds a column that the configuration names; it must be there.
fn named(schema: &Schema, name: &str, key: &str) -> Result<String> {
    find(schema, name).ok_or_else(|| {
        Fault::data(format!(
            "there is no column `{name}`, which {key} names; columns found: {}",
            listed(schema)
        ))
        .help(format!("correct {key}"))
    })
}

/// Returns the keys with which the user names columns of layouts.
fn keys_given(options: &Options) -> impl Iterator<Item = &'static str> {
    let keys = [
        ("DatasetConfig.messages_column", &options.messages_column),
        ("DatasetConfig.context_column", &options.prompt_column),
        ("DatasetConfig.response_column", &options.completion_column),
        ("TrainingArguments.dataset_text_field", &options.text_column),
        ("question_column", &options.question_column),
    ];
    keys.into_iter().filter(|(_, name)| name.is_some()).map(|(key, _)| key)
}

/// Returns the layout that the columns named by the user imply.
fn layout_of_named_columns(options: &Options) -> Option<Layout> {
    if options.messages_column.is_some() {
        Some(Layout::Messages)
    } else if options.question_column.is_some() {
        Some(Layout::QuestionAnswer)
    } else if options.prompt_column.is_some() || options.completion_column.is_some() {
        Some(Layout::PromptCompletion)
    } else {
        options.text_column.as_ref().map(|_| Layout::Text)
    }
}

/// Returns the reason why a column does not hold text.
fn not_a_string(field: &Field) -> Option<String> {
    let kind = field.data_type();
    (!column::is_string(kind))
        .then(|| format!("`{}` is {}; text is needed", field.name(), column::kind(kind)))
}

/// Lists the columns with their types.
fn listed(schema: &Schema) -> String {
    const COLUMNS_SHOWN_MAX: usize = 20;
    let shown = schema.fields().iter().take(COLUMNS_SHOWN_MAX);
    let mut columns: Vec<String> =
        shown.map(|field| format!("`{}`: {}", field.name(), column::kind(field.data_type()))).collect();
    if schema.fields().len() > COLUMNS_SHOWN_MAX {
        columns.push(format!("and {} more", schema.fields().len() - COLUMNS_SHOWN_MAX));
    }
    if columns.is_empty() { "none".to_string() } else { columns.join(", ") }
}

/// Returns the fault if no format fits. Columns with the right names and wrong types are named; otherwise no column is
/// known.
fn unfit(schema: &Schema, wanted: &[&Format], problems: &[String]) -> Fault {
    let found = listed(schema);
    let mut keys: Vec<&str> = Vec::new();
    for key in wanted.iter().flat_map(|format| format.columns.iter().map(|column| column.key)) {
        if !keys.contains(&key) && key.contains('_') {
            keys.push(key);
        }
    }
    if let (Some(chosen), Some(rejected)) = (find(schema, "chosen"), find(schema, "rejected")) {
        return Fault::data(format!(
            "`{chosen}` and `{rejected}` are pairs of a better and a worse answer, and preferences are not trained; \
             columns found: {found}"
        ))
        .help(format!(
            "to train on the better answers alone, set DatasetConfig.messages_column: {chosen} if they are lists of \
             messages, or DatasetConfig.response_column: {chosen} if they are texts"
        ));
    }
    let rename = format!("rename the columns, or name them with {}", keys.join(", "));
    if !problems.is_empty() {
        let of_types = problems.iter().any(|problem| !problem.starts_with(PARTLY));
        return Fault::data(format!("{}; columns found: {found}", problems.join("; "))).help(
            match of_types {
                true => format!("change the column's type; if another column is meant, {rename}"),
                false => rename,
            },
        );
    }
    let mut expected: Vec<&str> = wanted.iter().map(|format| format.expects).collect();
    expected.dedup();
    Fault::data(format!(
        "no column has a name that is known; columns found: {found}; expected {}",
        expected.join(", or ")
    ))
    .help(rename)
}
