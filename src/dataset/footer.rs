//! Parquet files' footers -> how many rows they hold and how much text, without reading a row.

use super::{Options, format};
use crate::fault::Result;
use ::parquet::arrow::ProjectionMask;
use ::parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

/// What footers say of a dataset.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Footers {
    pub rows: u64,
    /// Bytes of the columns that are read, unpacked.
    pub text_bytes: u64,
}

/// Adds up the files' footers; `None` where a file is none of parquet, or is damaged: a run says what is wrong with it.
///
/// # Errors
/// Data: columns that no layout can read.
pub fn footers(files: &[PathBuf], options: &Options) -> Result<Option<Footers>> {
    let mut sum = Footers::default();
    let mut reading = format::Reading::new(&options.names);
    for path in files {
        // The decoder panics on some damage.
        let load = || ArrowReaderMetadata::load(&File::open(path).ok()?, ArrowReaderOptions::new()).ok();
        let Ok(Some(metadata)) = catch_unwind(AssertUnwindSafe(load)) else { return Ok(None) };
        let chosen = format::choose(metadata.schema(), options, &mut reading)
            .map_err(|fault| fault.at(path.display().to_string()))?;
        let roots = chosen.columns.iter().filter_map(|name| metadata.schema().index_of(name).ok());
        let mask = ProjectionMask::roots(metadata.parquet_schema(), roots);
        for group in metadata.metadata().row_groups() {
            sum.rows += group.num_rows().max(0) as u64;
            let read = group.columns().iter().enumerate().filter(|(leaf, _)| mask.leaf_included(*leaf));
            sum.text_bytes += read.map(|(_, column)| column.uncompressed_size().max(0) as u64).sum::<u64>();
        }
    }
    Ok(Some(sum))
}
