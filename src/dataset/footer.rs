//! Footers of parquet files -> the number of rows and the amount of text, without reading a row.

use super::{Layout, Options, container, format};
use crate::fault::Result;
use ::parquet::arrow::ProjectionMask;
use std::fs::File;
use std::path::PathBuf;

/// Sums over the footers of a dataset.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Footers {
    /// Rows, with limits and weights applied.
    pub rows: u64,
    /// Bytes of the columns that are read, unpacked.
    pub text_bytes: u64,
}

/// Adds up the footers of the files of each entry of `data`, with the entry's limit and weight. Returns `None` if a
/// file is not parquet or is damaged; a run then says what is wrong with it.
///
/// # Errors
/// Data: no layout can read the columns.
pub fn footers(entries: &[Vec<PathBuf>], options: &Options) -> Result<Option<Footers>> {
    let mut sum = Footers::default();
    for (entry, files) in entries.iter().enumerate() {
        let share = options.shares.get(entry).cloned().unwrap_or_default();
        let Some(mut found) = of_entry(files, share.layout, options)? else { return Ok(None) };
        let rows = found.rows.min(share.limit.map_or(u64::MAX, |limit| limit as u64)) as f64
            * share.weight.unwrap_or(1.0);
        found.text_bytes = (found.text_bytes as f64 * rows / found.rows.max(1) as f64) as u64;
        found.rows = rows as u64;
        sum.rows += found.rows;
        sum.text_bytes += found.text_bytes;
    }
    Ok(Some(sum))
}

/// Adds up the footers of one entry of `data`, without its limit and weight.
fn of_entry(files: &[PathBuf], layout: Option<Layout>, options: &Options) -> Result<Option<Footers>> {
    let mut sum = Footers::default();
    let mut reading = format::Reading::new(&options.names);
    for path in files {
        let Ok(file) = File::open(path) else { return Ok(None) };
        let bytes = file.metadata().map_or(0, |found| found.len());
        let Ok(metadata) = container::load_parquet(&file, bytes, &path.display().to_string()) else {
            return Ok(None);
        };
        let chosen = format::choose(metadata.schema(), options, layout, &mut reading)
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
