//! A parquet file -> its schema and columns, one batch at a time. Damage is a `Data` fault with the place.
//!
//! The parquet decoder can panic on damaged files, and it can allocate whatever a header declares. Therefore the
//! footer and the page headers are checked first, and all decoding runs behind `catch_unwind`. Damage that cannot
//! be seen here (a flipped bit in a text) is found by the SHA-256 of `source`.

use super::packing::Input;
use super::pages::Codec;
use super::{BATCH_ROWS, Container, OnBatch, Rows, guarded, hex, kind_of, pages, schema, text};
use crate::bounds::Bounds;
use crate::fault::{Fault, Kind, Result};
use crate::interrupt;
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
use std::sync::Arc;

/// The container.
pub static CONTAINER: Container = Container {
    name: "parquet",
    title: "a parquet file",
    endings: &["parquet", "pq"],
    is: |head| head.starts_with(MAGIC),
    may_begin: |_| false,
    open: |input| Ok(Box::new(open(input)?)),
};

const MAGIC: &[u8] = b"PAR1";

/// LIMIT: unpacked bytes of the chosen columns of one row group. It is decoded in parts, so memory stays below.
const GROUP_BYTES_MAX: u64 = 16 << 30;
/// LIMIT: values (mostly messages) in one column of a row group. A null takes no bytes in the file but some in
/// memory.
const GROUP_VALUES_MAX: u64 = 100_000_000;
const COLUMNS_MAX: usize = 10_000;
/// LIMIT: memory for the footer, or for one batch of rows in addition to the reader's pages and dictionaries.
const DECODER_BYTES_MAX: usize = 1 << 30;

/// A file whose footer was checked.
struct Table {
    schema: Arc<Schema>,
    rows: u64,
    file: File,
    name: String,
    metadata: ArrowReaderMetadata,
    bounds: Bounds,
}

/// Opens the file and checks its footer. Errors: `Data`, or `Storage` if it cannot be read at all.
fn open(input: Input) -> Result<Table> {
    let Input { file, bytes, name, .. } = input.seekable()?;
    refuse_other_kinds(&file, bytes).map_err(|fault| fault.at(&name))?;
    let metadata = load(&file, bytes, &name).map_err(|problem| damaged(&name, "footer", &problem))?;
    let rows = guarded(|| Ok::<_, String>(check_footer(&metadata, bytes)))
        .and_then(|checked| checked)
        .map_err(|problem| damaged(&name, "footer", &problem))?;
    let bounds = bounds(&name);
    Ok(Table { schema: metadata.schema().clone(), rows, file, name, metadata, bounds })
}

fn bounds(name: &str) -> Bounds {
    Bounds::new(Kind::Data, format!("{name}: the parquet data"), DECODER_BYTES_MAX)
}

/// Reads a footer that is safe to parse. Strings become views, so that a text that a dictionary holds once stays one
/// text even if a million rows name it. The schema that Arrow's writers add to parquet's own is not needed. The error
/// says what is wrong with the footer.
pub fn load(file: &File, bytes: u64, name: &str) -> std::result::Result<ArrowReaderMetadata, String> {
    schema::check(file, bytes)?;
    let options = ArrowReaderOptions::new;
    let parse = || {
        let own = ArrowReaderMetadata::load(file, options().with_skip_arrow_metadata(true))?;
        let views = Schema::new(own.schema().fields().iter().map(viewed).collect::<Vec<_>>());
        ArrowReaderMetadata::try_new(own.metadata().clone(), options().with_schema(Arc::new(views)))
    };
    bounds(name).within(|| guarded(parse))
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

impl Rows for Table {
    fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    fn count(&self) -> Option<u64> {
        Some(self.rows)
    }

    fn read(&self, names: &[String], each: &mut OnBatch) -> Result<()> {
        let roots = names.iter().filter_map(|name| self.schema.index_of(name).ok());
        let mask = ProjectionMask::roots(self.metadata.parquet_schema(), roots);
        for (index, group) in self.metadata.metadata().row_groups().iter().enumerate() {
            interrupt::check()?;
            let place = format!("row group {index}");
            guarded(|| self.check_group(group, &mask))
                .map_err(|problem| damaged(&self.name, &place, &problem))?;
            // Faults of `each` pass through the guard as values.
            let read = guarded(|| self.read_group(index, &mask, names, each));
            match read {
                Err(problem) => return Err(damaged(&self.name, &place, &problem)),
                Ok(Err(fault)) => return Err(fault.at(format!("{}: {place}", self.name))),
                Ok(Ok(())) => {}
            }
        }
        Ok(())
    }
}

impl Table {
    fn read_group(
        &self,
        index: usize,
        mask: &ProjectionMask,
        names: &[String],
        each: &mut OnBatch,
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

/// Checks that ranges lie inside the file and that counts agree. Returns the number of rows.
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

/// Describes a file that is not parquet. Most such files are error pages and pointers.
fn refuse_other_kinds(file: &File, bytes: u64) -> Result<()> {
    let mut head = vec![0; bytes.min(512) as usize];
    let mut tail = vec![0; bytes.min(4) as usize];
    file.read_exact_at(&mut head, 0)
        .and_then(|()| file.read_exact_at(&mut tail, bytes - bytes.min(4)))
        .map_err(|error| Fault::new(crate::fault::Kind::Storage, format!("cannot read it: {error}")))?;
    if tail == b"PARE" {
        return Err(Fault::data("an encrypted parquet file, which is not supported")
            .help("write it without encryption"));
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

fn damaged(file: &str, place: &str, problem: &str) -> Fault {
    Fault::data(format!("{file}: {place}: the parquet data is damaged or not supported: {problem}"))
        .help("check the file against its SHA-256, or export it again")
        .or_machines()
}
