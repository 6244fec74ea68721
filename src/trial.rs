//! An adapter and prompts -> the base's answers and the tuned ones, side by side in a terminal: `hone try`.

use serde_json::{Map, Value as Json, json};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use crate::answers::{self, How, Pair, Question};
use crate::dataset::{Chat, Tokenizer, encode_rows};
use crate::device;
use crate::fault::{Fault, Result};
use crate::generate::Sampling;
use crate::report::{Report, Stage};
use crate::spec::{Environment, Request};
use crate::tuned::{Named, Rows, Split, Tuned};

/// Two columns need a terminal that is so wide.
const WIDE: usize = 100;
/// Characters between the columns.
const GAP: &str = " | ";
/// Before each line of a text.
const INDENT: &str = "  ";
/// A tab would have another width in each column.
const TAB: &str = "    ";

/// The request of `hone try`, apart from the job.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The adapters, which are added.
    pub adapters: Vec<Named>,
    /// Asked in place of rows.
    pub prompts: Vec<String>,
    /// The system turn of every prompt.
    pub system: Option<String>,
    /// Part of the rows; `None`: as the data says.
    pub split: Option<Split>,
    /// Rows to ask if there is no prompt.
    pub rows: usize,
    /// Most tokens of an answer.
    pub tokens_max: usize,
    /// 0 is greedy.
    pub temperature: f32,
    /// Seed of both draws.
    pub seed: u64,
}

/// The result of `hone try`.
pub struct Trial {
    tuned: Tuned,
    rows: Option<Rows>,
    /// Questions with both answers.
    pub pairs: Vec<Pair>,
}

/// Asks the base and the tuned model.
///
/// # Errors
/// As [`Tuned::find`] and [`Tuned::rows`]; Config: a system message without a chat template. Data: a prompt that has
/// no token or does not fit the model.
pub fn run(request: &Request, options: &Options, environment: Environment, report: &Report) -> Result<Trial> {
    let tuned = Tuned::find(&options.adapters, request, environment, report)?;
    let device = device::open(tuned.plan.device, report)?;
    let tokenizer = tuned.tokenizer()?;
    let chat = tuned.chat(&tokenizer)?;
    let rows = match options.prompts.is_empty() {
        true => Some(tuned.rows(options.split, options.rows, &tokenizer, report)?),
        false => None,
    };
    let questions = match &rows {
        Some(rows) => {
            let token_options = answers::token_options(&tuned.plan.tokens);
            let encoded = encode_rows(&rows.records, &tokenizer, &token_options, &Report::silent())?;
            answers::of_rows(&encoded, &rows.records, &tokenizer, Some(options.tokens_max))
        }
        None => {
            if chat.is_none() {
                refuse_system(options)?;
                report.note(
                    Stage::Tokenize,
                    "the model has no chat template: prompts are continued as they are",
                );
            }
            let question = |prompt: &String| question(prompt, options, chat.as_ref(), &tokenizer);
            options.prompts.iter().map(question).collect::<Result<_>>()?
        }
    };
    if questions.is_empty() {
        return Err(Fault::data("no row has a prompt and an answer").help("ask something with --prompt"));
    }
    let defaults = tuned.defaults(&tokenizer, chat.as_ref())?;
    let how = How {
        sampling: Sampling { temperature: options.temperature, seed: options.seed, ..Sampling::greedy() },
        stop_tokens: defaults.stop_tokens,
    };
    let decoder = tuned.decoder(&device, report)?;
    let folders: Vec<_> = tuned.members.iter().map(|member| member.folder.as_path()).collect();
    let strengths: Vec<f64> = tuned.members.iter().map(|member| member.named.strength).collect();
    let engine = answers::engine(decoder, &folders, &questions, report)?;
    let pairs = answers::ask(&engine, questions, &strengths, &how, &tokenizer, report)?;
    Ok(Trial { tuned, rows, pairs })
}

/// Refuses a system message that would be left out.
fn refuse_system(options: &Options) -> Result<()> {
    match options.system {
        None => Ok(()),
        Some(_) => {
            Err(Fault::config("--system: the model has no chat template, which would place the message")
                .help("leave --system out, or write the text into the prompt"))
        }
    }
}

/// A prompt through the chat template, as the training wrote the turn of a user.
fn question(prompt: &str, options: &Options, chat: Option<&Chat>, tokenizer: &Tokenizer) -> Result<Question> {
    let wrong = |what: String| Fault::data(format!("the prompt {prompt:?}: {what}"));
    let ids = match chat {
        Some(chat) => {
            let system = options.system.iter().map(|text| json!({"role": "system", "content": text}));
            let messages: Vec<Json> = system.chain([json!({"role": "user", "content": prompt})]).collect();
            let mut context = Map::new();
            context.insert("messages".into(), messages.into());
            context.insert("add_generation_prompt".into(), true.into());
            tokenizer.encode(&chat.text(context).map_err(wrong)?, false).map_err(wrong)?
        }
        None => tokenizer.encode(prompt, true).map_err(wrong)?,
    };
    match ids.is_empty() {
        true => Err(wrong("it has no token".into())),
        false => Ok(Question {
            place: None,
            shown: prompt.to_owned(),
            prompt: ids,
            reference: None,
            tokens_max: options.tokens_max,
        }),
    }
}

impl Trial {
    /// Returns the text for people, in two columns if a line has room for them. `columns` is the width of a terminal.
    pub fn text(&self, columns: Option<usize>) -> String {
        let mut text = self.tuned.text();
        if let Some(rows) = &self.rows {
            text += &format!("rows:    {}\n", rows.told());
        }
        for pair in &self.pairs {
            text += &shown(pair, columns);
        }
        text
    }

    /// Returns JSON for machines.
    pub fn json(&self) -> Json {
        let mut json = self.tuned.json();
        json["rows"] = self.rows.as_ref().map_or(Json::Null, Rows::json);
        json["pairs"] = self.pairs.iter().map(Pair::json).collect();
        json
    }
}

/// Returns one pair as lines.
pub fn shown(pair: &Pair, columns: Option<usize>) -> String {
    let question = &pair.question;
    let place = question.place.as_ref().map_or(String::new(), |place| format!(" ({place})"));
    let mut text = format!("\nprompt{place}\n{}\n", indented(&question.shown, columns));
    if let Some(reference) = &question.reference {
        text += &format!("reference\n{}\n", indented(reference.trim(), columns));
    }
    let answer = |given: &answers::Given| {
        let end = if given.ended { "" } else { " ..." };
        format!("{}{end}", clean(given.text.trim()))
    };
    let (base, tuned) = (answer(&pair.base), answer(&pair.tuned));
    match columns.filter(|columns| *columns >= WIDE) {
        None => text + &format!("base\n{}\ntuned\n{}\n", indented(&base, columns), indented(&tuned, columns)),
        Some(columns) => {
            let width = (columns - GAP.len()) / 2;
            let heads = (vec!["base".to_owned()], vec!["tuned".to_owned()]);
            let (left, right) = (wrapped(&base, width), wrapped(&tuned, width));
            text += &beside(&heads.0, &heads.1, width);
            text + &beside(&left, &right, width)
        }
    }
}

/// Replaces control characters, which could change the terminal.
fn clean(text: &str) -> String {
    let text = text.replace("\r\n", "\n").replace('\t', TAB);
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// Indented lines, which a terminal of so many columns need not break itself.
fn indented(text: &str, columns: Option<usize>) -> String {
    let text = clean(text);
    let lines = match columns {
        Some(columns) => wrapped(&text, columns.saturating_sub(INDENT.len())),
        None => text.lines().map(str::to_owned).collect(),
    };
    lines.iter().map(|line| format!("{INDENT}{line}")).collect::<Vec<_>>().join("\n")
}

/// Lines of at most `width` columns of the terminal, broken between words if there are any. A letter of Chinese or
/// an emoji takes two columns, an accent of its own none.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for line in text.lines() {
        let mut current = String::new();
        for mut word in line.split_inclusive(' ') {
            if !current.is_empty() && current.width() + word.width() > width {
                lines.push(std::mem::take(&mut current));
            }
            while word.width() > width {
                let (part, rest) = word.split_at(fitting(word, width));
                if rest.is_empty() {
                    break; // one letter that is wider than a line
                }
                lines.push(part.to_owned());
                word = rest;
            }
            current.push_str(word);
        }
        lines.push(current);
    }
    lines
}

/// Bytes of the longest beginning that fits into so many columns; at least one letter.
fn fitting(word: &str, width: usize) -> usize {
    let mut columns = 0;
    let over = word.char_indices().find(|(at, letter)| {
        columns += letter.width().unwrap_or(0);
        *at > 0 && columns > width
    });
    over.map_or(word.len(), |(at, _)| at)
}

fn beside(left: &[String], right: &[String], width: usize) -> String {
    let empty = String::new();
    let line = |at: usize| {
        let (left, right) = (left.get(at).unwrap_or(&empty), right.get(at).unwrap_or(&empty));
        let pad = width.saturating_sub(left.width());
        format!("{left}{}{GAP}{right}", " ".repeat(pad)).trim_end().to_owned() + "\n"
    };
    (0..left.len().max(right.len())).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    fn pair() -> Pair {
        let given = |text: &str, ended| answers::Given { text: text.into(), tokens: 3, ended };
        Pair {
            question: Question {
                place: Some("rows.jsonl:4".into()),
                shown: "My order is late.".into(),
                prompt: vec![1],
                reference: Some("We are sorry.".into()),
                tokens_max: 8,
            },
            base: given("I do not know what an order is, and so I go on and on", false),
            tuned: given("We are sorry.\nIt comes today.\u{1b}[2J", true),
        }
    }

    #[test]
    fn answers_stand_one_below_the_other_or_side_by_side() {
        expect![[r#"

            prompt (rows.jsonl:4)
              My order is late.
            reference
              We are sorry.
            base
              I do not know what an order is, and so I go on and on ...
            tuned
              We are sorry.
              It comes today.�[2J
        "#]]
        .assert_eq(&shown(&pair(), None));
        expect![[r#"

            prompt (rows.jsonl:4)
              My order is late.
            reference
              We are sorry.
            base                                             | tuned
            I do not know what an order is, and so I go on   | We are sorry.
            and on ...                                       | It comes today.�[2J
        "#]]
        .assert_eq(&shown(&pair(), Some(100)));
    }

    #[test]
    fn a_word_longer_than_a_line_is_broken() {
        assert_eq!(wrapped("abcdefgh ij", 3), ["abc", "def", "gh ", "ij"]);
        assert_eq!(wrapped("", 3), Vec::<String>::new());
    }

    #[test]
    fn columns_are_those_of_a_terminal() {
        assert_eq!(wrapped("時間 時間", 5), ["時間 ", "時間"]);
        assert_eq!(wrapped("時間時間", 5), ["時間", "時間"]);
        assert_eq!(wrapped("時", 1), ["時"]);
        assert_eq!(wrapped("e\u{301}e\u{301}", 1), ["e\u{301}", "e\u{301}"]);
        let line = |text: &str| [text.to_owned()];
        assert_eq!(beside(&line("時間"), &line("x"), 6), "時間   | x\n");
        assert_eq!(beside(&line("abcd"), &line("x"), 6), "abcd   | x\n");
    }

    #[test]
    fn a_narrow_terminal_breaks_no_word() {
        let text = shown(&pair(), Some(40));
        assert!(
            text.contains("\n  I do not know what an order is, and \n  so I go on and on ...\n"),
            "{text}"
        );
    }

    #[test]
    fn a_tab_is_blanks_and_a_line_may_end_as_on_windows() {
        assert_eq!(indented("a\tb\r\nc\u{7}", None), "  a    b\n  c\u{fffd}");
    }
}
