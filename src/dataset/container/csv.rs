//! CSV and TSV: a header with the columns' names, then one record per row; every value is text.
//!
//! Quotes are those of RFC 4180. An empty value without quotes is null, because CSV has no other way to write it.
//! Mistakes that a loose reader skips are refused with their line: a record of another length, or a quote that is
//! never closed.

use super::packing::Input;
use super::values::read_line;
use super::{BATCH_ROWS, Container, OnBatch, Rows, ending_of, indices, is_plain};
use crate::fault::{Fault, Result};
use crate::interrupt;
use arrow::array::{ArrayRef, StringBuilder};
use arrow::datatypes::{DataType, Field, Schema};
use std::io::BufRead;
use std::sync::Arc;

/// LIMIT: columns of a file.
const COLUMNS_MAX: usize = 10_000;
/// LIMIT: bytes of a record. A quote that is never closed would take the rest of the file.
const RECORD_BYTES_MAX: usize = 256 << 20;
/// Bytes after which a batch is passed on before it has `BATCH_ROWS` records.
const BATCH_BYTES: usize = 32 << 20;
const DELIMITERS: [u8; 3] = [b',', b'\t', b';'];
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The container.
pub static CONTAINER: Container = Container {
    name: "csv",
    title: "a CSV file",
    endings: &["csv", "tsv"],
    is: |_| false,
    may_begin: |text| is_plain(text) && !text.starts_with('{') && !text.starts_with('['),
    open: |input| Ok(Box::new(Records::open(input)?)),
};

struct Records {
    input: Input,
    schema: Arc<Schema>,
    form: Form,
}

/// The form of a file.
#[derive(Clone, Copy)]
struct Form {
    delimiter: u8,
    /// Whether a line `sep=;` stands before the header and names the delimiter.
    is_told: bool,
}

impl Records {
    fn open(input: Input) -> Result<Records> {
        let mut reader = input.reader()?;
        let mut first = Vec::new();
        read_line(&input, &mut reader, &mut first, 1)?;
        let told = told_delimiter(&first);
        if told.is_some() {
            first.clear();
            read_line(&input, &mut reader, &mut first, 2)?;
        }
        drop(reader);
        refuse_lone_returns(&input, &first)?;
        let tabs = ending_of(&input.name).is_some_and(|ending| ending == "tsv");
        let used = DELIMITERS.into_iter().find(|delimiter| first.contains(delimiter));
        let delimiter = told.unwrap_or(if tabs { b'\t' } else { used.unwrap_or(b',') });
        let form = Form { delimiter, is_told: told.is_some() };
        let mut parser = Parser::new(&input, form)?;
        let mut record = Record::default();
        if !parser.next(&mut record)? {
            return Err(Fault::data(format!("{}: it holds no header", input.name))
                .help("write the names of the columns in the first line"));
        }
        let names: Vec<String> = (0..record.ends.len())
            .map(|index| parser.text(&record, index).map(|text| text.unwrap_or_default().trim().to_owned()))
            .collect::<Result<_>>()?;
        drop(parser);
        if names.len() > COLUMNS_MAX {
            return Err(Fault::data(format!("{}: {} columns, limit {COLUMNS_MAX}", input.name, names.len())));
        }
        let fields: Vec<Field> = names.iter().map(|name| Field::new(name, DataType::Utf8, true)).collect();
        Ok(Records { input, schema: Arc::new(Schema::new(fields)), form })
    }
}

impl Rows for Records {
    fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    fn count(&self) -> Option<u64> {
        None
    }

    fn read(&self, names: &[String], each: &mut OnBatch) -> Result<()> {
        let places = indices(&self.schema, names)?;
        let mut parser = Parser::new(&self.input, self.form)?;
        let mut record = Record::default();
        parser.next(&mut record)?; // the header
        let mut columns: Vec<StringBuilder> = places.iter().map(|_| StringBuilder::new()).collect();
        let (mut rows, mut bytes) = (0, 0);
        while parser.next(&mut record)? {
            self.check_length(&record)?;
            for (&place, column) in places.iter().zip(&mut columns) {
                column.append_option(parser.text(&record, place)?);
            }
            rows += 1;
            bytes += record.bytes.len();
            if rows == BATCH_ROWS || bytes > BATCH_BYTES {
                interrupt::check()?;
                self.hand_on(&mut columns, &record, each)?;
                (rows, bytes) = (0, 0);
            }
        }
        if rows > 0 { self.hand_on(&mut columns, &record, each) } else { Ok(()) }
    }
}

impl Records {
    fn hand_on(&self, columns: &mut [StringBuilder], record: &Record, each: &mut OnBatch) -> Result<()> {
        let arrays: Vec<ArrayRef> =
            columns.iter_mut().map(|column| Arc::new(column.finish()) as ArrayRef).collect();
        each(&arrays).map_err(|fault| fault.at(format!("{}: up to line {}", self.input.name, record.line)))
    }

    fn check_length(&self, record: &Record) -> Result<()> {
        let (found, expected) = (record.ends.len(), self.schema.fields().len());
        if found == expected {
            return Ok(());
        }
        Err(Fault::data(format!(
            "{}: line {}: {found} values, the header names {expected} columns",
            self.input.name, record.line
        ))
        .help("values that hold the delimiter or a line break need quotes"))
    }
}

/// The delimiter in a first line `sep=;`, which programs write for Excel. It names one byte and is no header.
fn told_delimiter(first: &[u8]) -> Option<u8> {
    let line = first.strip_prefix(BYTE_ORDER_MARK).unwrap_or(first);
    match line.trim_ascii_end().strip_prefix(b"sep=")? {
        // A tab is white space at the end of the line.
        [] if line.starts_with(b"sep=\t") => Some(b'\t'),
        [delimiter] if !matches!(delimiter, b'"' | b'\r' | b'\n') => Some(*delimiter),
        _ => None,
    }
}

/// Refuses a file whose lines end with a carriage return alone: it would be one line, and its rows would be columns.
fn refuse_lone_returns(input: &Input, header: &[u8]) -> Result<()> {
    let header = header.strip_suffix(b"\r").unwrap_or(header);
    // Every second part between quotes is outside of them.
    if !header.split(|&byte| byte == b'"').step_by(2).any(|part| part.contains(&b'\r')) {
        return Ok(());
    }
    Err(Fault::data(format!(
        "{}: line 1: carriage returns without line feeds; expected lines that end with \\n or \\r\\n",
        input.name
    ))
    .help("save the file with the line ends of Unix or Windows"))
}

/// One record: the bytes of its values one after the other, without quotes.
#[derive(Default)]
struct Record {
    bytes: Vec<u8>,
    /// The end of each value, and whether it was in quotes.
    ends: Vec<(usize, bool)>,
    /// The record's first line, counted from 1.
    line: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    /// The place before a value.
    Start,
    Plain,
    Quoted,
    /// The place after a quote inside quotes. The quote is either the end, or the first of two.
    Quote,
}

struct Parser<'a> {
    input: &'a Input,
    reader: Box<dyn BufRead + 'a>,
    delimiter: u8,
    line: u64,
    column: u64,
    /// The place where the quotes were opened.
    opened: (u64, u64),
}

impl<'a> Parser<'a> {
    fn new(input: &'a Input, form: Form) -> Result<Parser<'a>> {
        let mut reader = input.reader()?;
        let mut line = 1;
        if form.is_told {
            read_line(input, &mut reader, &mut Vec::new(), line)?;
            line += 1;
        } else if reader.fill_buf().map_err(|error| input.failed(&error))?.starts_with(BYTE_ORDER_MARK) {
            reader.consume(BYTE_ORDER_MARK.len());
        }
        Ok(Parser { input, reader, delimiter: form.delimiter, line, column: 0, opened: (0, 0) })
    }

    /// Reads the next record that is not an empty line. Returns false at the end.
    fn next(&mut self, record: &mut Record) -> Result<bool> {
        loop {
            record.bytes.clear();
            record.ends.clear();
            record.line = self.line;
            let ended = self.record(record)?;
            let is_blank = record.ends == [(0, false)];
            if !is_blank && !record.ends.is_empty() {
                return Ok(true);
            }
            if ended {
                return Ok(false);
            }
        }
    }

    /// Reads one record and returns whether the file ended. An empty record at the end has no values.
    fn record(&mut self, record: &mut Record) -> Result<bool> {
        let mut state = State::Start;
        loop {
            let (mut taken, mut ended) = (0, false);
            let part = self.reader.fill_buf().map_err(|error| self.input.failed(&error))?;
            if part.is_empty() {
                return self.end_of_file(state, record).map(|()| true);
            }
            // A record ends at a line break at the latest, and the buffer is far longer than most records.
            let line = part.iter().position(|&byte| byte == b'\n').map_or(part.len(), |end| end + 1);
            let part = part[..line].to_vec();
            for &byte in &part {
                taken += 1;
                self.column += 1;
                state = self.byte(state, byte, record)?;
                if byte == b'\n' {
                    (self.line, self.column) = (self.line + 1, 0);
                    if state == State::Start {
                        ended = true;
                        break;
                    }
                }
            }
            self.reader.consume(taken);
            if ended {
                return Ok(false);
            }
            if record.bytes.len() > RECORD_BYTES_MAX {
                return Err(Fault::data(format!(
                    "{}: line {}: a record of more than {RECORD_BYTES_MAX} bytes",
                    self.input.name, record.line
                ))
                .help("check the quotes: one that is not closed takes in everything behind it"));
            }
        }
    }

    /// Handles one byte. A line break outside quotes ends in `Start`.
    fn byte(&mut self, state: State, byte: u8, record: &mut Record) -> Result<State> {
        let is_quoted = state == State::Quote;
        Ok(match (state, byte) {
            (State::Quoted, b'"') => State::Quote,
            (State::Quoted, _) => keep(record, byte, State::Quoted),
            (State::Quote, b'"') => keep(record, byte, State::Quoted),
            (State::Start, b'"') => {
                self.opened = (self.line, self.column);
                State::Quoted
            }
            (_, byte) if byte == self.delimiter => {
                record.ends.push((record.bytes.len(), is_quoted));
                State::Start
            }
            (_, b'\n') => {
                let from = record.ends.last().map_or(0, |&(end, _)| end);
                if !is_quoted && record.bytes.len() > from && record.bytes.ends_with(b"\r") {
                    record.bytes.pop();
                }
                record.ends.push((record.bytes.len(), is_quoted));
                State::Start
            }
            (State::Quote, b'\r') => State::Quote,
            (State::Quote, _) => {
                return Err(Fault::data(format!(
                    "{}: line {}, column {}: text behind a closing quote",
                    self.input.name, self.line, self.column
                ))
                .help("a quote inside a quoted value is written twice"));
            }
            (State::Start | State::Plain, byte) => keep(record, byte, State::Plain),
        })
    }

    fn end_of_file(&self, state: State, record: &mut Record) -> Result<()> {
        match state {
            State::Quoted => Err(Fault::data(format!(
                "{}: line {}, column {}: a quote that is never closed",
                self.input.name, self.opened.0, self.opened.1
            ))
            .help("a quote inside a quoted value is written twice; or the file is cut off")),
            State::Start if record.ends.is_empty() => Ok(()),
            state => {
                record.ends.push((record.bytes.len(), state == State::Quote));
                Ok(())
            }
        }
    }

    fn text<'r>(&self, record: &'r Record, index: usize) -> Result<Option<&'r str>> {
        let from = index.checked_sub(1).map_or(0, |before| record.ends[before].0);
        let (end, quoted) = record.ends[index];
        let text = std::str::from_utf8(&record.bytes[from..end]).map_err(|_| {
            Fault::data(format!(
                "{}: line {}: value {} is not UTF-8 text",
                self.input.name,
                record.line,
                index + 1
            ))
            .help("save the file as UTF-8")
        })?;
        Ok(Some(text).filter(|text| quoted || !text.is_empty()))
    }
}

fn keep(record: &mut Record, byte: u8, state: State) -> State {
    record.bytes.push(byte);
    state
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Array, AsArray};
    use expect_test::{Expect, expect};
    use std::io::Write;

    fn shown(name: &str, content: &[u8]) -> Result<String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        let records = Records::open(Input::open(file.path(), name)?)?;
        let names: Vec<String> = records.schema.fields().iter().map(|field| field.name().clone()).collect();
        let mut shown = format!("{names:?}\n");
        records.read(&names, &mut |arrays| {
            for row in 0..arrays[0].len() {
                let value = |array: &ArrayRef| {
                    let array = array.as_string::<i32>();
                    if array.is_null(row) { "null".into() } else { format!("{:?}", array.value(row)) }
                };
                shown += &(arrays.iter().map(value).collect::<Vec<_>>().join(" ") + "\n");
            }
            Ok(())
        })?;
        Ok(shown)
    }

    fn check(name: &str, content: &str, expected: Expect) {
        expected.assert_eq(&shown(name, content.as_bytes()).unwrap_or_else(|fault| fault.to_string()));
    }

    #[test]
    fn quotes_line_breaks_and_delimiters() {
        check(
            "a.csv",
            "\u{feff}prompt,completion\r\n\"a, \"\"b\"\"\nc\",1\r\n,\"\"\r\n\r\n5\" tall,x",
            expect![[r#"
                ["prompt", "completion"]
                "a, \"b\"\nc" "1"
                null ""
                "5\" tall" "x"
            "#]],
        );
        check(
            "a.tsv",
            "a\tb,c\n1,2\t3\n",
            expect![[r#"
            ["a", "b,c"]
            "1,2" "3"
        "#]],
        );
        check(
            "a.csv",
            "a;b\n1;2\n",
            expect![[r#"
            ["a", "b"]
            "1" "2"
        "#]],
        );
        check(
            "a.csv",
            "text\none\n\ntwo\n",
            expect![[r#"
            ["text"]
            "one"
            "two"
        "#]],
        );
    }

    #[test]
    fn a_first_line_for_excel_names_the_delimiter() {
        check(
            "a.csv",
            "\u{feff}sep=|\r\na|b\r\n\"1|2\"|3\r\n",
            expect![[r#"
            ["a", "b"]
            "1|2" "3"
        "#]],
        );
        check(
            "a.csv",
            "sep=\t\na\tb\n1,2\t3\n",
            expect![[r#"
            ["a", "b"]
            "1,2" "3"
        "#]],
        );
        check(
            "a.csv",
            "sep=x,b\n1,2\n",
            expect![[r#"
            ["sep=x", "b"]
            "1" "2"
        "#]],
        );
        check(
            "a.csv",
            "\"a\rb\",c\r\n1,2\r\n",
            expect![[r#"
            ["a\rb", "c"]
            "1" "2"
        "#]],
        );
    }

    #[test]
    fn what_a_loose_reader_passes_over_is_told_with_its_line() {
        check(
            "a.csv",
            "a,b\n1,2\n1,2,3\n",
            expect![[r#"
            a.csv: line 3: 3 values, the header names 2 columns
              help: values that hold the delimiter or a line break need quotes"#]],
        );
        check(
            "a.csv",
            "a,b\n1,2\n3,\"4\n5,6\n",
            expect![[r#"
            a.csv: line 3, column 3: a quote that is never closed
              help: a quote inside a quoted value is written twice; or the file is cut off"#]],
        );
        check(
            "a.csv",
            "a,b\n\"1\"x,2\n",
            expect![[r#"
            a.csv: line 2, column 4: text behind a closing quote
              help: a quote inside a quoted value is written twice"#]],
        );
        check(
            "a.csv",
            "a,b\r1,2\r3,4\r",
            expect![[r#"
            a.csv: line 1: carriage returns without line feeds; expected lines that end with \n or \r\n
              help: save the file with the line ends of Unix or Windows"#]],
        );
        check(
            "a.csv",
            "a,b\r\"1, 2\",3\r\"4\",5\r",
            expect![[r#"
            a.csv: line 1: carriage returns without line feeds; expected lines that end with \n or \r\n
              help: save the file with the line ends of Unix or Windows"#]],
        );
        check(
            "a.csv",
            "sep=;\na;b\n1;2;3\n",
            expect![[r#"
            a.csv: line 3: 3 values, the header names 2 columns
              help: values that hold the delimiter or a line break need quotes"#]],
        );
        let fault = shown("a.csv", b"a,b\n1,\xff\n").unwrap_err();
        assert_eq!(fault.message, "a.csv: line 2: value 2 is not UTF-8 text");
    }
}
