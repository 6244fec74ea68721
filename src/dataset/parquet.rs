//! A parquet file -> its schema and columns, a batch at a time. Damage is a `Data` fault with the place.
//!
//! The decoder is trusted neither to return (it panics on some damage) nor to be modest (it reserves what a
//! header declares): the footer and page headers are checked first, and all of it runs behind `catch_unwind`.
//! What damage cannot be seen here (a flipped bit in a text) is what the SHA-256 of `source` is for.

use super::footer;
use super::pages::{self, Codec};
use crate::bounds::Bounds;
use crate::fault::{Fault, Kind, Result};
use crate::interrupt;
use crate::source;
use ::parquet::arrow::ProjectionMask;
use ::parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder,
};
use ::parquet::basic::Compression;
use ::parquet::file::metadata::RowGroupMetaData;
use arrow::array::ArrayRef;
use arrow::datatypes::{DataType, Field, FieldRef, Schema};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// LIMIT: what the chosen columns of one row group may unpack to; it is decoded in parts, so memory stays below.
const GROUP_BYTES_MAX: u64 = 16 << 30;
/// LIMIT: values (messages, mostly) in one column of a row group. A null costs no bytes in the file but some in memory.
const GROUP_VALUES_MAX: u64 = 100_000_000;
const COLUMNS_MAX: usize = 10_000;
const BATCH_ROWS: usize = 256;
/// LIMIT: memory for the footer, or for one batch of rows beside what the reader keeps: pages and their dictionaries.
const DECODER_BYTES_MAX: usize = 1 << 30;

/// A file whose footer is sound.
pub(super) struct Table {
    pub schema: Arc<Schema>,
    pub rows: u64,
    file: File,
    name: String,
    metadata: ArrowReaderMetadata,
    bounds: Bounds,
}

/// Opens the file and checks its footer. Errors: `Data`, or `Storage` when it cannot be read at all.
pub(super) fn open(source: &source::File) -> Result<Table> {
    let storage = |error| Fault::storage("read", &source.path, &error);
    let file = File::open(&source.path).map_err(storage)?;
    let bytes = file.metadata().map_err(storage)?.len();
    refuse_other_kinds(&file, bytes).map_err(|fault| fault.at(&source.name))?;
    footer::check(&file, bytes).map_err(|problem| damaged(&source.name, "footer", &problem))?;
    let bounds = Bounds::new(Kind::Data, format!("{}: the parquet data", source.name), DECODER_BYTES_MAX);
    let metadata = bounds
        .within(|| guarded(|| load(&file)))
        .map_err(|problem| damaged(&source.name, "footer", &problem))?;
    let rows = guarded(|| Ok::<_, String>(check_footer(&metadata, bytes)))
        .and_then(|checked| checked)
        .map_err(|problem| damaged(&source.name, "footer", &problem))?;
    Ok(Table { schema: metadata.schema().clone(), rows, file, name: source.name.clone(), metadata, bounds })
}

/// The footer, with strings as views: a text that a dictionary holds once and a million rows name stays one text.
/// The schema that Arrow's writers put beside parquet's own is not needed.
fn load(file: &File) -> ::parquet::errors::Result<ArrowReaderMetadata> {
    let own = ArrowReaderMetadata::load(file, ArrowReaderOptions::new().with_skip_arrow_metadata(true))?;
    let views = Schema::new(own.schema().fields().iter().map(|field| viewed(field)).collect::<Vec<_>>());
    ArrowReaderMetadata::try_new(
        own.metadata().clone(),
        ArrowReaderOptions::new().with_schema(Arc::new(views)),
    )
}

fn viewed(field: &FieldRef) -> FieldRef {
    let kind = match field.data_type() {
        DataType::Utf8 => DataType::Utf8View,
        DataType::Binary => DataType::BinaryView,
        DataType::List(item) => DataType::List(viewed(item)),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(viewed).collect()),
        _ => return field.clone(),
    };
    Arc::new(Field::clone(field).with_data_type(kind))
}

impl Table {
    /// Hands every batch of the named columns, in the order of `names`, to `each`.
    pub fn read(&self, names: &[String], mut each: impl FnMut(&[ArrayRef]) -> Result<()>) -> Result<()> {
        let roots = names.iter().filter_map(|name| self.schema.index_of(name).ok());
        let mask = ProjectionMask::roots(self.metadata.parquet_schema(), roots);
        for (index, group) in self.metadata.metadata().row_groups().iter().enumerate() {
            interrupt::check()?;
            let place = format!("row group {index}");
            guarded(|| self.check_group(group, &mask))
                .map_err(|problem| damaged(&self.name, &place, &problem))?;
            // Faults of `each` pass through the guard as values.
            let read = guarded(|| self.read_group(index, &mask, names, &mut each));
            match read {
                Err(problem) => return Err(damaged(&self.name, &place, &problem)),
                Ok(Err(fault)) => return Err(fault.at(format!("{}: {place}", self.name))),
                Ok(Ok(())) => {}
            }
        }
        Ok(())
    }

    fn read_group(
        &self,
        index: usize,
        mask: &ProjectionMask,
        names: &[String],
        each: &mut impl FnMut(&[ArrayRef]) -> Result<()>,
    ) -> std::result::Result<Result<()>, String> {
        let file = self.file.try_clone().map_err(text)?;
        let mut reader = ParquetRecordBatchReaderBuilder::new_with_metadata(file, self.metadata.clone())
            .with_row_groups(vec![index])
            .with_projection(mask.clone())
            .with_batch_size(BATCH_ROWS)
            .build()
            .map_err(text)?;
        let expected = self.metadata.metadata().row_group(index).num_rows();
        let mut rows = 0;
        while let Some(batch) = self.bounds.within(|| reader.next()) {
            let batch = batch.map_err(text)?;
            rows += batch.num_rows() as i64;
            let column = |name: &String| batch.column_by_name(name).cloned();
            let arrays: Option<Vec<ArrayRef>> = names.iter().map(column).collect();
            if let Err(fault) = each(&arrays.ok_or("a column is missing")?) {
                return Ok(Err(fault));
            }
        }
        if rows != expected {
            return Err(format!("it holds {rows} rows, its header says {expected}"));
        }
        Ok(Ok(()))
    }

    fn check_group(
        &self,
        group: &RowGroupMetaData,
        mask: &ProjectionMask,
    ) -> std::result::Result<(), String> {
        let mut unpacked = 0;
        for (index, column) in group.columns().iter().enumerate() {
            if !mask.leaf_included(index) {
                continue;
            }
            let (start, bytes) = column.byte_range();
            let values = column.num_values() as u64;
            let codec = match column.compression() {
                Compression::GZIP(_) => Codec::Gzip,
                Compression::BROTLI(_) => Codec::Brotli,
                _ => Codec::Bounded,
            };
            let totals = pages::check(&self.file, start, start + bytes, values, codec)
                .map_err(|problem| format!("column {}: {problem}", column.column_path()))?;
            unpacked += totals.unpacked_bytes;
        }
        if unpacked > GROUP_BYTES_MAX {
            return Err(format!("it unpacks to {unpacked} bytes, limit {GROUP_BYTES_MAX}"));
        }
        Ok(())
    }
}

/// Ranges inside the file, counts that agree. Gives the number of rows.
fn check_footer(metadata: &ArrowReaderMetadata, file_bytes: u64) -> std::result::Result<u64, String> {
    let metadata = metadata.metadata();
    let columns = metadata.file_metadata().schema_descr().num_columns();
    if columns > COLUMNS_MAX {
        return Err(format!("{columns} columns, limit {COLUMNS_MAX}"));
    }
    let mut rows: i64 = 0;
    for (index, group) in metadata.row_groups().iter().enumerate() {
        let count = group.num_rows();
        rows = rows
            .checked_add(count)
            .filter(|_| count >= 0)
            .ok_or_else(|| format!("row group {index}: {count} rows"))?;
        for column in group.columns() {
            let name = column.column_path();
            let (start, bytes) = column.byte_range();
            if start.checked_add(bytes).is_none_or(|end| end > file_bytes) {
                return Err(format!(
                    "row group {index}: column {name}: its {bytes} bytes end after the file's"
                ));
            }
            let values = column.num_values();
            if values < 0 || values as u64 > GROUP_VALUES_MAX {
                return Err(format!(
                    "row group {index}: column {name}: {values} values, limit {GROUP_VALUES_MAX}"
                ));
            }
        }
    }
    let declared = metadata.file_metadata().num_rows();
    if declared != rows {
        return Err(format!("it declares {declared} rows, its row groups hold {rows}"));
    }
    Ok(rows as u64)
}

/// Says what a file that is not parquet seems to be: most such files are error pages and pointers.
fn refuse_other_kinds(file: &File, bytes: u64) -> Result<()> {
    const MAGIC: &[u8] = b"PAR1";
    let mut head = vec![0; bytes.min(512) as usize];
    let mut tail = vec![0; bytes.min(4) as usize];
    file.read_exact_at(&mut head, 0)
        .and_then(|()| file.read_exact_at(&mut tail, bytes - bytes.min(4)))
        .map_err(|error| Fault::new(crate::fault::Kind::Storage, format!("cannot read it: {error}")))?;
    if tail == b"PARE" {
        return Err(Fault::data("an encrypted parquet file, which is not supported"));
    }
    if !head.starts_with(MAGIC) {
        return Err(Fault::data(format!("not a parquet file but {}", kind_of(&head)))
            .help("check the path or URL, and whether it needs a login"));
    }
    if tail != MAGIC || bytes < 12 {
        return Err(Fault::data(format!(
            "a truncated parquet file: {bytes} bytes that do not end with PAR1 but with {}",
            hex(&tail)
        ))
        .help("fetch or export the file again"));
    }
    Ok(())
}

fn kind_of(head: &[u8]) -> String {
    let text =
        String::from_utf8_lossy(head).trim_start_matches(['\u{feff}', ' ', '\t', '\r', '\n']).to_lowercase();
    let begins = |start: &[u8]| head.starts_with(start);
    let known = if head.is_empty() {
        "an empty file"
    } else if text.starts_with("<!doctype html") || text.starts_with("<html") {
        "an HTML page"
    } else if text.starts_with("<?xml") || text.starts_with("<error") {
        "an XML document"
    } else if text.starts_with("version https://git-lfs") {
        "a Git LFS pointer"
    } else if begins(b"\x1f\x8b") {
        "gzip data"
    } else if begins(b"PK\x03\x04") {
        "a ZIP archive"
    } else if begins(b"\x28\xb5\x2f\xfd") {
        "zstd data"
    } else if begins(b"ARROW1") {
        "an Arrow IPC file"
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

fn damaged(file: &str, place: &str, problem: &str) -> Fault {
    Fault::data(format!("{file}: {place}: the parquet data is damaged or not supported: {problem}"))
        .help("check the file against its SHA-256, or export it again")
}

/// Runs decoder code, which panics on some damage. Nothing of it outlives a panic.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_another_kind_is_called_by_its_name() {
        let cases: [(&[u8], &str); 9] = [
            (b"", "an empty file"),
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
    fn a_panic_becomes_a_message() {
        let result = guarded(|| -> std::result::Result<(), String> { panic!("divide by {}", 0) });
        assert_eq!(result.unwrap_err(), "the decoder gave up: divide by 0");
    }
}
