//! Data files -> their rows as records, a batch at a time, in the files' order.

use super::budget::Budget;
use super::format::{self, Format, Reading};
use super::problems::Problems;
use super::{Options, Record, container};
use crate::fault::{Fault, Result};
use crate::report::{Report, Stage, Unit};
use crate::source;
use std::sync::Arc;

/// Records of neighbouring rows, and the columns and fields read so far.
pub(super) struct Part {
    /// Records of rows that can be used.
    pub records: Vec<Record>,
    /// Bytes of their texts.
    pub bytes: u64,
    /// Rows so far that cannot be used.
    pub bad: u64,
}

/// The observations of reading all files beside the records.
pub(super) struct Found<'a> {
    /// Rows that cannot be used.
    pub problems: Problems,
    /// The columns and fields that were read, and their use.
    pub reading: Reading<'a>,
    /// The format of the last entry's first file; `None` if there is no file.
    pub format: Option<&'static Format>,
    /// Rows that can be used.
    pub good: u64,
}

/// Hands the records of all files to `each`, in the order of files and rows.
///
/// # Errors
/// Data: damage, layouts that differ, more text than such files hold. Capacity: more text than fits, if `budget` counts
/// memory. Errors of `each`.
pub(super) fn stream<'a>(
    files: &[source::File],
    options: &'a Options,
    mut budget: Budget,
    report: &Report,
    each: &mut dyn FnMut(Part) -> Result<()>,
) -> Result<Found<'a>> {
    let mut problems = Problems::default();
    let mut reading = Reading::new(&options.names);
    let mut first: Option<(&'static Format, &source::File)> = None;
    let mut good = 0;
    for file in files {
        let share = options.shares.get(file.entry).cloned().unwrap_or_default();
        let table = container::open(file, options.container.as_deref())?;
        if table.rows == Some(0) && table.schema.fields().is_empty() {
            reading.empty_files.push(file.name.clone()); // `[]`: nothing says what its columns would be.
            continue;
        }
        let chosen = format::choose(&table.schema, options, share.layout, &mut reading)
            .map_err(|fault| fault.at(&file.name))?;
        match first {
            // Entries of `data` may differ; the files of one entry may not.
            Some((format, other)) if format.layout != chosen.format.layout && other.entry == file.entry => {
                return Err(layouts_differ(format, &other.name, chosen.format, &file.name));
            }
            Some((_, other)) if other.entry == file.entry => {}
            _ => first = Some((chosen.format, file)),
        }
        let task = report.task(Stage::Read, Unit::Rows, &file.name, table.rows);
        let name: Arc<str> = file.name.as_str().into();
        let mut row = 0;
        table.read(&chosen.columns, |arrays| {
            let bytes = format::text_bytes(arrays);
            budget.spend(bytes)?;
            let batch = chosen.rows(arrays, &mut reading)?;
            task.advance(batch.len() as u64);
            let mut records = Vec::with_capacity(batch.len());
            for found in batch {
                match found {
                    Ok((conversation, context, group)) => {
                        let (file, entry) = (name.clone(), file.entry);
                        records.push(Record { conversation, context, file, row, entry, group })
                    }
                    Err(problem) => problems.add(problem, &name, row),
                }
                row += 1;
            }
            good += records.len() as u64;
            each(Part { records, bytes, bad: problems.rows() })
        })?;
        if row == 0 {
            reading.empty_files.push(file.name.clone());
        }
    }
    if good + problems.rows() == 0 {
        reading.empty_files.clear(); // A dataset without any row is refused instead.
    }
    Ok(Found { problems, reading, format: first.map(|(format, _)| format), good })
}

fn layouts_differ(a: &Format, a_name: &str, b: &Format, b_name: &str) -> Fault {
    Fault::data(format!(
        "the files do not have one layout: {a_name} holds {}, {b_name} holds {}",
        a.layout.name(),
        b.layout.name()
    ))
    .help("train on files of one layout, or rewrite one of them")
}

/// Returns the fault of a dataset without a row.
pub(super) fn no_rows(files: &[source::File]) -> Fault {
    let names: Vec<&str> = files.iter().take(3).map(|file| file.name.as_str()).collect();
    Fault::data(format!("the dataset has 0 rows in {} file(s): {}", files.len(), names.join(", ")))
        .help("check the export that wrote the files, and the path or URL they were taken from")
}
