//! Alpaca's `instruction`, `input` and `output`, and pairs of question and answer with or without a context -> a
//! turn of the user and a turn of the assistant, which the chat template then writes.
//!
//! A context is placed before its question and an input after its instruction, with an empty line between them.

use super::super::{Conversation, Layout, Message, Options};
use super::{Column, Format, Rows, column, not_a_string};
use crate::fault::Result;
use arrow::array::{Array, ArrayRef, StringViewArray};

const INSTRUCTION: Column = Column { key: "question_column", given: question, names: &["instruction"] };
const INPUT: Column = Column {
    key: "DatasetConfig.context_column",
    given: |options| options.prompt_column.as_deref(),
    names: &["input", "context"],
};
const OUTPUT: Column = Column {
    key: "DatasetConfig.response_column",
    given: |options| options.completion_column.as_deref(),
    names: &["output", "response"],
};
const QUESTION: Column = Column { key: "question_column", given: question, names: &["question", "query"] };
const CONTEXT: Column = Column {
    key: "DatasetConfig.context_column",
    given: |options| options.prompt_column.as_deref(),
    names: &["context", "passage"],
};
const ANSWER: Column = Column {
    key: "DatasetConfig.response_column",
    given: |options| options.completion_column.as_deref(),
    names: &["answer", "response"],
};

/// Alpaca with an input.
pub static ALPACA: Format = Format {
    layout: Layout::Alpaca,
    expects: "`instruction` and `output`, perhaps `input`: strings",
    columns: &[INSTRUCTION, OUTPUT, INPUT],
    refuses: |fields| fields.iter().find_map(|field| not_a_string(field)),
    rows: |arrays, _| turns(arrays, ["instruction", "output"], true),
};

/// Alpaca without an input.
pub static ALPACA_WITHOUT_INPUT: Format = Format { columns: &[INSTRUCTION, OUTPUT], ..copy(&ALPACA) };

/// Question and answer with a context.
pub static QUESTION_ANSWER: Format = Format {
    layout: Layout::QuestionAnswer,
    expects: "`question` and `answer`, perhaps `context`: strings",
    columns: &[QUESTION, ANSWER, CONTEXT],
    refuses: |fields| fields.iter().find_map(|field| not_a_string(field)),
    rows: |arrays, _| turns(arrays, ["question", "answer"], false),
};

/// Question and answer without a context.
pub static QUESTION_ANSWER_ALONE: Format = Format { columns: &[QUESTION, ANSWER], ..copy(&QUESTION_ANSWER) };

const fn copy(format: &Format) -> Format {
    Format {
        layout: format.layout,
        expects: format.expects,
        columns: format.columns,
        refuses: format.refuses,
        rows: format.rows,
    }
}

fn question(options: &Options) -> Option<&str> {
    options.question_column.as_deref()
}

/// Makes the turns. `arrays` holds the questions, the answers, and possibly the text that belongs to each question;
/// `behind` places that text after the question.
fn turns(arrays: &[ArrayRef], names: [&str; 2], behind: bool) -> Result<Rows> {
    let (asked, answered) = (column::strings(&arrays[0])?, column::strings(&arrays[1])?);
    let beside = arrays.get(2).map(column::strings).transpose()?;
    let text = |array: &StringViewArray, row, name: &str| match column::value(array, row) {
        None => Err(format!("the {name} is null")),
        Some(text) if text.trim().is_empty() => Err(format!("the {name} is empty")),
        Some(text) => Ok(text.to_owned()),
    };
    let row = |row| {
        let question = text(&asked, row, names[0])?;
        let answer = text(&answered, row, names[1])?;
        let beside = beside.as_ref().and_then(|array| column::value(array, row));
        let question = match beside.filter(|beside| !beside.trim().is_empty()) {
            None => question,
            Some(input) if behind => format!("{question}\n\n{input}"),
            Some(context) => format!("{context}\n\n{question}"),
        };
        Ok(Conversation::Messages(vec![Message::new("user", question), Message::new("assistant", answer)]))
    };
    Ok((0..asked.len()).map(row).collect())
}
