//! A data file -> its rows as arrow batches, so that every layout works with every container. A container is one
//! file here and one line in `CONTAINERS`.
//!
//! A binary container is recognised by its first bytes. Text is recognised by the file's name, or by its beginning
//! if the name says nothing. Each may be packed with gzip or zstd (`packing`).

mod arrow;
mod columns;
mod csv;
mod distinct;
mod json;
mod jsonl;
mod packing;
mod pages;
mod parquet;
mod schema;
mod values;

use crate::fault::{Fault, Result};
use crate::source;
use ::arrow::array::ArrayRef;
use ::arrow::datatypes::Schema;
use packing::{Input, Packing};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// All containers, in order of preference if a folder holds several kinds.
const CONTAINERS: [&Container; 5] =
    [&parquet::CONTAINER, &jsonl::CONTAINER, &json::CONTAINER, &csv::CONTAINER, &arrow::CONTAINER];

/// The functions that recognise and open files of one kind.
pub(super) struct Container {
    /// The value of `DatasetConfig.dataset_extension`.
    name: &'static str,
    /// The name in messages: `a parquet file`.
    title: &'static str,
    /// Endings of file names, without the dot and without that of gzip or zstd.
    endings: &'static [&'static str],
    /// Whether the first bytes can belong to nothing else.
    is: fn(&[u8]) -> bool,
    /// Whether text of this kind may begin so. If several kinds may, the name decides.
    may_begin: fn(&str) -> bool,
    open: fn(Input) -> Result<Box<dyn Rows>>,
}

/// The rows of one file.
pub(super) trait Rows {
    /// Returns the columns and their types.
    fn schema(&self) -> &Arc<Schema>;
    /// Returns the number of rows. `None`: known only after reading.
    fn count(&self) -> Option<u64>;
    /// Passes every batch of the named columns, in the order of `names`, to `each`.
    fn read(&self, names: &[String], each: &mut OnBatch) -> Result<()>;
}

pub(super) use parquet::load as load_parquet;

pub(super) type OnBatch<'a> = dyn FnMut(&[ArrayRef]) -> Result<()> + 'a;

/// Rows per batch.
const BATCH_ROWS: usize = 256;

/// A file whose kind is known and whose head was checked.
pub(super) struct Table {
    /// The columns and their types.
    pub schema: Arc<Schema>,
    /// Number of rows, if known.
    pub rows: Option<u64>,
    inner: Box<dyn Rows>,
    name: String,
}

impl Table {
    /// Passes every batch of the named columns, in the order of `names`, to `each`.
    ///
    /// # Errors
    /// Data: damage, or a column whose values have several types, with the place. Also every fault of `each`.
    pub fn read(&self, names: &[String], mut each: impl FnMut(&[ArrayRef]) -> Result<()>) -> Result<()> {
        columns::refuse_mixed(&self.schema, names).map_err(|fault| fault.at(&self.name))?;
        self.inner.read(names, &mut each)
    }
}

/// Returns the values of `DatasetConfig.dataset_extension`. KAITO also has `webdataset`, which holds no text.
pub fn names() -> impl Iterator<Item = &'static str> {
    CONTAINERS.into_iter().map(|container| container.name)
}

/// Endings of data files for each container, in order of preference. A folder is searched for them.
pub const ENDINGS: &[&[&str]] = &[
    parquet::CONTAINER.endings,
    jsonl::CONTAINER.endings,
    json::CONTAINER.endings,
    csv::CONTAINER.endings,
    arrow::CONTAINER.endings,
];

/// Opens the file as the container `asked`, or as the one that it is.
///
/// # Errors
/// Data: another kind of file, or damage. Storage: it cannot be read.
pub(super) fn open(file: &source::File, asked: Option<&str>) -> Result<Table> {
    let mut input = Input::open(&file.path, &file.name)?;
    let head = input.head()?;
    let container = choose(&file.name, &head, asked, input.packing).map_err(|fault| fault.at(&file.name))?;
    input.title = container.title;
    let inner = (container.open)(input)?;
    Ok(Table { schema: inner.schema().clone(), rows: inner.count(), inner, name: file.name.clone() })
}

fn choose(name: &str, head: &[u8], asked: Option<&str>, packing: Packing) -> Result<&'static Container> {
    let text = leading_text(head);
    let named = ending_of(name).and_then(|ending| {
        CONTAINERS.into_iter().find(|container| container.endings.contains(&ending.as_str()))
    });
    let wanted = asked.and_then(|asked| CONTAINERS.into_iter().find(|container| container.name == asked));
    let by_head = CONTAINERS.into_iter().find(|container| (container.is)(head));
    let other = |wanted: &Container| {
        let inside =
            if packing == Packing::None { String::new() } else { format!(" inside {}", packing.name()) };
        Fault::data(format!("not {} but {}{inside}", wanted.title, kind_of(head)))
            .help(remedy(head).unwrap_or("check the path or URL, and whether it needs a login"))
    };
    match (wanted, by_head, named) {
        // KAITO also uses `json` for JSON lines.
        (Some(wanted), None, _) if wanted.name == "json" && (jsonl::CONTAINER.may_begin)(&text) => {
            Ok(&jsonl::CONTAINER)
        }
        (Some(wanted), found, _) => match found {
            Some(found) if found.name == wanted.name => Ok(wanted),
            None if (wanted.may_begin)(&text) => Ok(wanted),
            _ => Err(other(wanted)),
        },
        (None, Some(found), _) => Ok(found),
        // The first character decides between the kinds of JSON, not the file's ending.
        (None, None, Some(named)) if ["json", "jsonl"].contains(&named.name) => {
            let kinds = [&jsonl::CONTAINER, &json::CONTAINER];
            kinds.into_iter().find(|kind| (kind.may_begin)(&text)).ok_or_else(|| other(named))
        }
        (None, None, Some(named)) if (named.may_begin)(&text) => Ok(named),
        (None, None, Some(named)) => Err(other(named)),
        (None, None, None) => unnamed(head, &text),
    }
}

/// Chooses for a file whose name says nothing: the first character identifies JSON, but not CSV.
fn unnamed(head: &[u8], text: &str) -> Result<&'static Container> {
    let json = [&jsonl::CONTAINER, &json::CONTAINER].into_iter().find(|kind| (kind.may_begin)(text));
    json.ok_or_else(|| {
        let told = format!(
            "expected {}; for a file whose name does not end so, DatasetConfig.dataset_extension names the container; \
             a page instead of data means a login",
            list_of_endings()
        );
        Fault::data(format!("not a data file but {}", kind_of(head)))
            .help(remedy(head).map_or(told, str::to_owned))
    })
}

/// Returns the remedy for data that only needs another form.
fn remedy(head: &[u8]) -> Option<&'static str> {
    let begins = |starts: &[&[u8]]| starts.iter().any(|start| head.starts_with(start));
    if begins(&[b"\xff\xfe", b"\xfe\xff"]) {
        Some("save the file as UTF-8")
    } else if is_spreadsheet(head) {
        Some("save the sheet as CSV in UTF-8, with the names of the columns in its first line")
    } else if begins(&[b"\x1f\x8b", b"\x28\xb5\x2f\xfd"]) {
        Some("unpack it once: it was packed twice")
    } else if begins(&[b"PK\x03\x04", b"\xfd7zXZ", b"BZh"]) || is_tar(head) {
        Some("unpack it, and give the data files inside; a single data file may also be inside gzip or zstd")
    } else if begins(&[b"FEA1"]) {
        Some("write it as version 2, or as parquet")
    } else {
        None
    }
}

/// Returns whether a head is that of a spreadsheet: OpenDocument, Office Open XML, or a file of Excel until 2003. The
/// first file of a ZIP archive says its kind.
fn is_spreadsheet(head: &[u8]) -> bool {
    const NAME_AT: usize = 30;
    let first = head.strip_prefix(b"PK\x03\x04").and_then(|_| head.get(NAME_AT..)).unwrap_or_default();
    let names: [&[u8]; 5] = [
        b"[Content_Types].xml",
        b"docProps/",
        b"_rels/",
        b"xl/",
        b"mimetypeapplication/vnd.oasis.opendocument.spreadsheet",
    ];
    head.starts_with(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1") || names.iter().any(|name| first.starts_with(name))
}

/// Returns whether a head is that of a tar archive.
fn is_tar(head: &[u8]) -> bool {
    const MAGIC_AT: usize = 257;
    head.get(MAGIC_AT..).is_some_and(|rest| rest.starts_with(b"ustar"))
}

fn list_of_endings() -> String {
    let endings: Vec<String> =
        CONTAINERS.iter().map(|container| format!(".{}", container.endings.join(", ."))).collect();
    format!("{}, each also .gz or .zst", endings.join(", "))
}

/// Returns the ending of a file name in lower case, without that of gzip or zstd.
pub(super) fn ending_of(name: &str) -> Option<String> {
    let last = name.rsplit(['/', '\\']).next()?.to_ascii_lowercase();
    let last = packing::ENDINGS.iter().find_map(|ending| last.strip_suffix(ending)).unwrap_or(&last);
    last.rsplit_once('.').map(|(_, ending)| ending.to_owned())
}

/// Returns the head as text without byte order mark and blanks. The reader will report damage in it.
fn leading_text(head: &[u8]) -> String {
    let text = String::from_utf8_lossy(head);
    text.trim_start_matches(['\u{feff}', ' ', '\t', '\r', '\n']).to_owned()
}

/// Returns whether a head is plain text that is neither a web page nor a pointer.
fn is_plain(text: &str) -> bool {
    let lower = text.to_lowercase();
    let foreign = ["<!doctype html", "<html", "<?xml", "<error", "version https://git-lfs"];
    // The head may end inside a character.
    let body = text.trim_end_matches('\u{fffd}');
    !body.is_empty()
        && !foreign.iter().any(|start| lower.starts_with(start))
        && !body.contains(|c: char| c == '\0' || (c.is_control() && !c.is_whitespace()))
}

/// Describes a file that is none of the containers. Most such files are error pages and pointers.
fn kind_of(head: &[u8]) -> String {
    let text = leading_text(head).to_lowercase();
    let begins = |start: &[u8]| head.starts_with(start);
    let known = if head.is_empty() {
        "an empty file"
    } else if text.starts_with("<!doctype html") || text.starts_with("<html") {
        "an HTML page"
    } else if text.is_empty() {
        "a file of blank lines"
    } else if text.starts_with("<?xml") || text.starts_with("<error") {
        "an XML document"
    } else if text.starts_with("version https://git-lfs") {
        "a Git LFS pointer"
    } else if begins(b"PAR1") {
        "a parquet file"
    } else if is_spreadsheet(head) {
        "an office document, perhaps a spreadsheet"
    } else if begins(b"PK\x03\x04") {
        "a ZIP archive"
    } else if is_tar(head) {
        "a tar archive"
    } else if begins(b"\x1f\x8b") {
        "gzip data"
    } else if begins(b"\x28\xb5\x2f\xfd") {
        "zstd data"
    } else if begins(b"\xfd7zXZ") {
        "xz data"
    } else if begins(b"BZh") {
        "bzip2 data"
    } else if begins(b"ARROW1") || begins(b"\xff\xff\xff\xff") {
        "an Arrow IPC file"
    } else if begins(b"FEA1") {
        "a feather file of version 1"
    } else if begins(b"\xff\xfe") || begins(b"\xfe\xff") {
        "text in UTF-16"
    } else if text.starts_with('{') || text.starts_with('[') {
        "JSON"
    } else if !text.contains(|c: char| c == '\u{fffd}' || (c.is_control() && !c.is_whitespace())) {
        let first = text.lines().next().unwrap_or_default();
        if first.contains([',', '\t']) { "text, perhaps CSV" } else { "text" }
    } else {
        "unknown data"
    };
    match head {
        [] => known.to_string(),
        head => format!("{known} (it begins with {})", hex(&head[..head.len().min(8)])),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}

/// Runs decoder code, which panics on some damage. No state of it is used after a panic.
fn guarded<T, E: std::fmt::Display>(
    work: impl FnOnce() -> std::result::Result<T, E>,
) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(text),
        Err(panic) => {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            Err(format!("the decoder gave up: {said}"))
        }
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Returns the indices of `names` among a schema's columns.
fn indices(schema: &Schema, names: &[String]) -> Result<Vec<usize>> {
    let place = |name: &String| {
        schema.index_of(name).map_err(|_| Fault::internal(format!("there is no column `{name}` to read")))
    };
    names.iter().map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_another_kind_is_called_by_its_name() {
        let mut tar = [0; 512];
        tar[..6].copy_from_slice(b"a.json");
        tar[257..262].copy_from_slice(b"ustar");
        let cases: [(&[u8], &str); 14] = [
            (
                b"PK\x03\x04\x14\0\x06\0\x08\0\0\0\x21\0abcdabcdabcd\x13\0\0\0[Content_Types].xml",
                "an office document",
            ),
            (b"PK\x03\x04\x14\0\0\0\0\0\0\0\x21\0abcdabcdabcd\x08\0\0\0a.jsonl", "a ZIP archive"),
            (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document"),
            (b"", "an empty file"),
            (b"\n \n", "a file of blank lines"),
            (&tar, "a tar archive"),
            (b"\n<!DOCTYPE html><html>", "an HTML page"),
            (b"<html>", "an HTML page"),
            (b"{\"messages\": []}", "JSON"),
            (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
            (b"\x1f\x8b\x08\x00", "gzip data"),
            (b"prompt,completion\n1,2", "text, perhaps CSV"),
            (b"hello", "text"),
            (b"\x00\x01\x02\x03", "unknown data"),
        ];
        for (head, name) in cases {
            assert!(kind_of(head).starts_with(name), "{head:?}: {}", kind_of(head));
        }
    }

    #[test]
    fn what_only_needs_another_form_says_which() {
        for (head, words) in [
            (&b"\xff\xfea\0"[..], "UTF-8"),
            (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "as CSV"),
            (b"PK\x03\x04", "give the data files inside"),
            (b"\x1f\x8b\x08", "packed twice"),
            (b"FEA1", "version 2"),
        ] {
            assert!(remedy(head).is_some_and(|remedy| remedy.contains(words)), "{head:?}");
        }
        assert_eq!(remedy(b"hello"), None);
    }

    #[test]
    fn a_container_is_known_by_its_head_and_else_by_its_name() {
        let chosen =
            |name: &str, head: &[u8], asked: Option<&str>| match choose(name, head, asked, Packing::None) {
                Ok(container) => container.name.to_owned(),
                Err(fault) => fault.message,
            };
        let cases: [(&str, &[u8], Option<&str>, &str); 20] = [
            ("blob", b"PAR1....", None, "parquet"),
            ("rows.csv", b"PAR1....", None, "parquet"),
            ("rows.arrow", b"ARROW1\0\0", None, "arrow"),
            ("data-00000-of-00001.arrow", b"\xff\xff\xff\xff\x10\x01\0\0", None, "arrow"),
            ("rows.jsonl", b"{\"a\": 1}\n", None, "jsonl"),
            ("rows.json", b"\xef\xbb\xbf {\"a\": 1}\n", None, "jsonl"),
            ("rows.jsonl", b"[{\"a\": 1}]", None, "json"),
            ("export", b"\n[{\"a\": 1}]", None, "json"),
            ("export", b"{\"a\": 1}", None, "jsonl"),
            ("rows.CSV.gz", b"a,b\n1,2\n", None, "csv"),
            ("rows.tsv", b"a\tb\n", None, "csv"),
            ("export", b"a,b\n1,2\n", Some("csv"), "csv"),
            ("export", b"{\"a\": 1}\n", Some("json"), "jsonl"),
            (
                "rows.jsonl",
                b"PAR1....",
                Some("json"),
                "not a JSON file but a parquet file (it begins with 50 41 52 31 2e 2e 2e 2e)",
            ),
            (
                "export",
                b"a,b\n1,2\n",
                None,
                "not a data file but text, perhaps CSV (it begins with 61 2c 62 0a 31 2c 32 0a)",
            ),
            (
                "rows.parquet",
                b"{\"a\": 1}",
                None,
                "not a parquet file but JSON (it begins with 7b 22 61 22 3a 20 31 7d)",
            ),
            (
                "rows.csv",
                b"<!doctype html>",
                None,
                "not a CSV file but an HTML page (it begins with 3c 21 64 6f 63 74 79 70)",
            ),
            (
                "rows.csv",
                b"{\"a\": 1}",
                None,
                "not a CSV file but JSON (it begins with 7b 22 61 22 3a 20 31 7d)",
            ),
            (
                "rows.jsonl",
                b"a,b",
                None,
                "not a file of JSON lines but text, perhaps CSV (it begins with 61 2c 62)",
            ),
            ("rows.jsonl", b"", None, "not a file of JSON lines but an empty file"),
        ];
        for (name, head, asked, expected) in cases {
            assert_eq!(chosen(name, head, asked), expected, "{name}");
        }
    }

    #[test]
    fn a_panic_becomes_a_message() {
        let result = guarded(|| -> std::result::Result<(), String> { panic!("divide by {}", 0) });
        assert_eq!(result.unwrap_err(), "the decoder gave up: divide by 0");
    }
}
