//! The bytes of a text file -> its JSON values one after the other, each with line and column, and the rows made
//! from them.
//!
//! A file is read twice: once for the types of all rows, so that no row in the middle has an unexpected type, and
//! once for the values.

use super::columns::{Columns, Shape};
use super::distinct;
use super::packing::Input;
use super::{BATCH_ROWS, OnBatch, Rows, indices};
use crate::fault::{Fault, Result};
use crate::interrupt;
use arrow::datatypes::Schema;
use serde_json::Value;
use std::io::BufRead;
use std::sync::Arc;

/// LIMIT: bytes of one row's text. It bounds the memory for a row that does not end.
const ROW_BYTES_MAX: usize = 256 << 20;
/// Bytes after which a batch is passed on before it has `BATCH_ROWS` rows.
const BATCH_BYTES: usize = 32 << 20;

/// The division of a file into values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Division {
    /// One value per line.
    Lines,
    /// Values one after the other, with any white space between and inside them.
    Sequence,
    /// One array that contains the values.
    Array,
}

/// The text of one value.
struct Piece<'a> {
    bytes: &'a [u8],
    /// Line and column, both counted from 1.
    line: u64,
    column: u64,
}

type OnPiece<'a> = dyn FnMut(Piece) -> Result<()> + 'a;

/// A file of JSON objects.
pub(super) struct Objects {
    input: Input,
    division: Division,
    schema: Arc<Schema>,
    shape: Shape,
    count: u64,
}

impl Objects {
    /// Reads the file once for the types of its rows.
    pub fn open(input: Input, division: Division) -> Result<Objects> {
        let mut shape = Shape::default();
        let mut count = 0;
        each_object(&input, division, &mut |object, line, _| {
            shape.add(&object, line);
            count += 1;
            Ok(())
        })?;
        let schema = shape.schema().map_err(|problem| Fault::data(format!("{}: {problem}", input.name)))?;
        Ok(Objects { input, division, schema: Arc::new(schema), shape, count })
    }
}

impl Rows for Objects {
    fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    fn count(&self) -> Option<u64> {
        Some(self.count)
    }

    fn read(&self, names: &[String], each: &mut OnBatch) -> Result<()> {
        let mut columns = Columns::new(&self.shape, &indices(&self.schema, names)?);
        let mut bytes_held = 0;
        each_object(&self.input, self.division, &mut |object, line, bytes| {
            let place = || format!("{}: line {line}", self.input.name);
            columns.push(&object).map_err(|problem| Fault::data(problem).at(place()))?;
            bytes_held += bytes;
            if columns.rows() == BATCH_ROWS || bytes_held > BATCH_BYTES {
                bytes_held = 0;
                return each(&columns.take()).map_err(|fault| fault.at(place()));
            }
            Ok(())
        })?;
        match columns.rows() {
            0 => Ok(()),
            _ => each(&columns.take()).map_err(|fault| fault.at(&self.input.name)),
        }
    }
}

/// Returns whether the first line with text on it is a whole JSON value: else a value takes several lines.
pub(super) fn first_line_is_whole(input: &Input) -> Result<bool> {
    let mut whole = true;
    let mut first = |piece: Piece| {
        let read = serde_json::from_slice::<serde::de::IgnoredAny>(piece.bytes);
        whole = !read.is_err_and(|error| error.is_eof());
        Err(Fault::internal("one is enough"))
    };
    match lines(input, &mut first) {
        Err(fault) if fault.kind != crate::fault::Kind::Internal => Err(fault),
        _ => Ok(whole),
    }
}

/// Passes on every row with its line and the length of its text.
fn each_object(
    input: &Input,
    division: Division,
    each: &mut dyn FnMut(Value, u64, usize) -> Result<()>,
) -> Result<()> {
    let mut count = 0_u64;
    let mut on_piece = |piece: Piece| {
        count += 1;
        if count.is_multiple_of(1024) {
            interrupt::check()?;
        }
        let value = distinct::read(piece.bytes).map_err(|error| not_json(input, &piece, &error))?;
        if !value.is_object() {
            return Err(Fault::data(format!(
                "{}: line {}, column {}: expected a row as an object of column names and values, found {}",
                input.name,
                piece.line,
                piece.column,
                super::columns::describe(&value)
            ))
            .help(r#"write each row as {"messages": [...]} or {"prompt": "...", "completion": "..."}"#));
        }
        each(value, piece.line, piece.bytes.len())
    };
    match division {
        Division::Lines => lines(input, &mut on_piece),
        Division::Sequence => scan(input, false, &mut on_piece),
        Division::Array => scan(input, true, &mut on_piece),
    }
}

fn not_json(input: &Input, piece: &Piece, error: &serde_json::Error) -> Fault {
    let told = error.to_string();
    let told = told.rsplit_once(" at line ").map_or(told.as_str(), |(told, _)| told);
    let line = piece.line + (error.line() as u64).saturating_sub(1);
    let column = match error.line() {
        0 | 1 => piece.column + (error.column() as u64).saturating_sub(1),
        _ => error.column() as u64,
    };
    let (found, help) = match std::str::from_utf8(piece.bytes) {
        Err(problem) => {
            (format!("not UTF-8 text (byte {} of the row)", problem.valid_up_to()), "save the file as UTF-8")
        }
        Ok(text) => (format!("not valid JSON: {told}"), remedy(text, error, told)),
    };
    Fault::data(format!("{}: line {line}, column {column}: {found}", input.name)).help(help)
}

/// Returns the remedy for values that Python's `json` writes and JSON does not have, or for any other mistake.
fn remedy(text: &str, error: &serde_json::Error, told: &str) -> &'static str {
    let line = text.lines().nth(error.line().saturating_sub(1)).unwrap_or_default();
    let from = error.column().saturating_sub(2);
    let near = line.get(from..).unwrap_or_default();
    if ["NaN", "Infinity"].iter().any(|word| near.find(word).is_some_and(|at| at < 3)) {
        "JSON has no NaN and no Infinity, which Python's json writes unless told allow_nan=False: write null"
    } else if told.contains("surrogate") || told.contains("hex escape") {
        "an escape from \\ud800 to \\udfff is half a character: the text was cut in the middle of one"
    } else if told.ends_with("is there twice") {
        "keep one of the two values"
    } else {
        "correct this place, or export the file again"
    }
}

fn too_long(input: &Input, line: u64) -> Fault {
    Fault::data(format!("{}: line {line}: a row of more than {ROW_BYTES_MAX} bytes", input.name))
        .help("each row is one example; divide it, or check the file's quotes and brackets")
}

/// Passes on all lines that are not empty.
fn lines(input: &Input, each: &mut OnPiece) -> Result<()> {
    let mut reader = input.reader()?;
    let (mut text, mut line) = (Vec::new(), 0);
    loop {
        text.clear();
        line += 1;
        let ended = read_line(input, &mut reader, &mut text, line)?;
        if text.is_empty() && ended {
            return Ok(());
        }
        let start = if line == 1 && text.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
        let bytes = text[start..].trim_ascii();
        if !bytes.is_empty() {
            let blanks = text[start..].len() - text[start..].trim_ascii_start().len();
            each(Piece { bytes, line, column: blanks as u64 + 1 })?;
        }
        if ended {
            return Ok(());
        }
    }
}

/// Reads one line without its end. Returns whether the file ends with it.
pub(super) fn read_line(
    input: &Input,
    reader: &mut dyn BufRead,
    text: &mut Vec<u8>,
    line: u64,
) -> Result<bool> {
    loop {
        let part = reader.fill_buf().map_err(|error| input.failed_in_line(line, &error))?;
        if part.is_empty() {
            return Ok(true);
        }
        let end = part.iter().position(|&byte| byte == b'\n');
        let taken = end.map_or(part.len(), |end| end + 1);
        text.extend_from_slice(&part[..end.unwrap_or(part.len())]);
        reader.consume(taken);
        if text.len() > ROW_BYTES_MAX {
            return Err(too_long(input, line));
        }
        if end.is_some() {
            return Ok(false);
        }
    }
}

/// The characters that a scan expects next.
#[derive(Clone, Copy, PartialEq)]
enum Next {
    /// The `[` of the array.
    Open,
    /// A value; with `true`, the array's end is also possible.
    Value(bool),
    /// A comma or the array's end.
    Comma,
    /// White space only.
    End,
}

/// Finds where values end without parsing them: strings and brackets are enough for that.
struct Scan<'a> {
    input: &'a Input,
    next: Next,
    is_array: bool,
    value: Vec<u8>,
    depth: u32,
    in_text: bool,
    escaped: bool,
    line: u64,
    column: u64,
    /// The place where the value began.
    from: (u64, u64),
}

fn scan(input: &Input, is_array: bool, each: &mut OnPiece) -> Result<()> {
    let next = if is_array { Next::Open } else { Next::Value(true) };
    let (value, from) = (Vec::new(), (1, 1));
    let (depth, in_text, escaped, line, column) = (0, false, false, 1, 0);
    let mut scan = Scan { input, next, is_array, value, depth, in_text, escaped, line, column, from };
    let mut reader = input.reader()?;
    let mut is_first = true;
    loop {
        let part = reader.fill_buf().map_err(|error| input.failed(&error))?;
        if part.is_empty() {
            return scan.finish(each);
        }
        let start = if is_first && part.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
        is_first = false;
        for &byte in &part[start..] {
            scan.byte(byte, each)?;
        }
        let count = part.len();
        reader.consume(count);
    }
}

impl Scan<'_> {
    fn byte(&mut self, byte: u8, each: &mut OnPiece) -> Result<()> {
        match byte {
            b'\n' => (self.line, self.column) = (self.line + 1, 0),
            _ => self.column += 1,
        }
        if self.value.is_empty() { self.between(byte) } else { self.inside(byte, each) }
    }

    fn between(&mut self, byte: u8) -> Result<()> {
        match (self.next, byte) {
            (_, b' ' | b'\t' | b'\r' | b'\n') => {}
            (Next::Open, b'[') => self.next = Next::Value(true),
            (Next::Value(true) | Next::Comma, b']') if self.is_array => self.next = Next::End,
            (Next::Comma, b',') => self.next = Next::Value(false),
            (Next::Value(_), b'{' | b'[') => {
                (self.depth, self.from) = (1, (self.line, self.column));
                self.value.push(byte);
            }
            (next, _) => return Err(self.unexpected(next, byte)),
        }
        Ok(())
    }

    fn inside(&mut self, byte: u8, each: &mut OnPiece) -> Result<()> {
        self.value.push(byte);
        match byte {
            _ if self.escaped => self.escaped = false,
            b'\\' if self.in_text => self.escaped = true,
            b'"' => self.in_text = !self.in_text,
            _ if self.in_text => {}
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth -= 1,
            _ => {}
        }
        if self.depth == 0 {
            let (line, column) = self.from;
            each(Piece { bytes: &self.value, line, column })?;
            self.value.clear();
            self.next = if self.is_array { Next::Comma } else { Next::Value(true) };
        } else if self.value.len() > ROW_BYTES_MAX {
            return Err(too_long(self.input, self.from.0));
        }
        Ok(())
    }

    /// Passes on an incomplete value at the end, so that the parser's message says what is missing.
    fn finish(&mut self, each: &mut OnPiece) -> Result<()> {
        if !self.value.is_empty() {
            let (line, column) = self.from;
            return each(Piece { bytes: &self.value, line, column });
        }
        match self.next {
            Next::End => Ok(()),
            Next::Value(true) if !self.is_array => Ok(()),
            _ => Err(Fault::data(format!(
                "{}: line {}: the array of rows has no end: the file is cut off",
                self.input.name, self.line
            ))
            .help("fetch or export the file again")),
        }
    }

    fn unexpected(&self, next: Next, byte: u8) -> Fault {
        let wanted = match next {
            Next::Open => "`[`, the array of rows",
            Next::Value(_) => "a row as an object `{...}`",
            Next::Comma => "`,` or `]` behind a row",
            Next::End => "nothing behind the array of rows",
        };
        let found = char::from(byte).escape_default();
        Fault::data(format!(
            "{}: line {}, column {}: expected {wanted}, found `{found}`",
            self.input.name, self.line, self.column
        ))
        .help("correct this place, or export the file again")
    }
}
