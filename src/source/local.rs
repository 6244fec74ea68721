//! A path, directory or glob -> its data files, sorted; each is read once and hashed.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::hash;
use super::missing;
use super::options::{File, Source};
use super::split;
use crate::fault::{Fault, Kind, Result};
use crate::plain;
use crate::report::{Report, Stage, Unit};
use crate::words;

/// LIMIT: directory levels. A directory that leads to itself through a link ends here.
const DEPTH_MAX: usize = 32;
const FILES_MAX: usize = 100_000;
const GLOB: glob::MatchOptions = glob::MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: true,
};

/// Endings of data files, kind by kind.
type Endings = &'static [&'static [&'static str]];

/// Files next to data that have a data file's ending: `datasets` and the hub write them about a dataset.
const ABOUT_DATA: [&str; 4] = ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"];
/// Endings of compression that may follow a data file's own.
const PACKINGS: [&str; 4] = [".gz", ".gzip", ".zst", ".zstd"];

/// Returns the files that a path source names; none for a URL.
///
/// # Errors
/// Data: nothing is there, or it holds no data file. Config: an invalid glob, or one digest for several files.
pub fn find(source: &Source, endings: Endings, report: &Report) -> Result<Vec<PathBuf>> {
    let Source::Path { pattern, sha256 } = source else { return Ok(Vec::new()) };
    let files = expand(pattern, &Search { endings, report })?;
    match sha256 {
        Some(_) if files.len() > 1 => {
            Err(Fault::config(format!("{pattern}: one sha256 is given, but {} files are found", files.len()))
                .help("name each file with its own digest"))
        }
        _ => Ok(files),
    }
}

/// Reads a whole file and returns its length and digest, which is compared with the expected one.
///
/// # Errors
/// Data: the file cannot be read, or has another digest.
pub fn verify(path: PathBuf, expected: Option<&str>, report: &Report) -> Result<File> {
    let name = path.display().to_string();
    let unreadable = |error: io::Error| unreadable(&path, &error);
    let file = plain::open(&path).map_err(unreadable)?;
    let total = file.metadata().map_err(unreadable)?.len();
    let task = report.task(Stage::Download, Unit::Bytes, &name, Some(total));
    let (bytes, hasher) = hash::read(file, |bytes| task.advance(bytes)).map_err(unreadable)?;
    let sha256 = hash::hex(hasher);
    if expected.is_some_and(|expected| expected != sha256) {
        return Err(mismatch(&name, expected.unwrap_or_default(), &sha256));
    }
    report.note(Stage::Download, format!("{name}: {}, sha256 {}, local", words::size(bytes), &sha256[..12]));
    Ok(File { path, name, bytes, sha256, entry: 0 })
}

/// Returns the data fault for a file with another digest than expected.
pub fn mismatch(name: &str, expected: &str, found: &str) -> Fault {
    Fault::data(format!("{name}: sha256 is {found}, expected {expected}"))
        .help("the file was changed or damaged, or the digest belongs to another version")
}

/// Expands a path to its files. If the exact name exists, it is meant, so a file may have `[` in its name.
/// Otherwise it is a glob.
fn expand(pattern: &str, search: &Search) -> Result<Vec<PathBuf>> {
    let path = Path::new(pattern);
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => search.directory(path),
        Ok(_) => Ok(vec![path.to_owned()]),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(unreadable(path, &error)),
        Err(_) if pattern.contains(['*', '?', '[']) => matches(pattern, search),
        Err(_) => {
            Err(Fault::data(format!("{pattern}: no such file or folder")).help(missing::remedy(pattern)))
        }
    }
}

/// The endings that a folder is searched for, and the report for warnings.
struct Search<'a> {
    endings: Endings,
    report: &'a Report,
}

impl Search<'_> {
    /// Returns all data files below a folder that are of the first kind found. Datasets are often one or two levels
    /// down (`data/data/*.parquet`).
    fn directory(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        walk(folder, 0, &mut files)?;
        files.sort();
        let name = |file: &PathBuf| file.to_string_lossy().into_owned();
        let shown = folder.display().to_string();
        let files = of_first_kind(files, name, &shown, self.endings, self.report)?;
        let below = files.iter().filter_map(|file| file.strip_prefix(folder).ok()?.to_str());
        split::tell_of_others(&shown, below, self.report);
        Ok(files)
    }
}

/// Returns those of the files below a folder that are of the first kind of data found, in their order. A warning
/// names files of other kinds, which may hold the same rows again.
///
/// # Errors
/// Data: none of them is a data file.
pub fn of_first_kind<T>(
    files: Vec<T>,
    name: impl Fn(&T) -> String,
    folder: &str,
    endings: Endings,
    report: &Report,
) -> Result<Vec<T>> {
    let kind = |file: &T| endings.iter().position(|endings| ends_with(Path::new(&name(file)), endings));
    let names = |files: &[T]| files.iter().map(|file| PathBuf::from(name(file))).collect::<Vec<_>>();
    let Some(first) = files.iter().filter_map(kind).min() else {
        let endings: Vec<String> =
            endings.iter().flat_map(|kind| kind.iter()).map(|e| format!(".{e}")).collect();
        return Err(Fault::data(format!(
            "{folder}: the folder contains no data file: {}",
            summary(&names(&files))
        ))
        .help(format!(
            "give a file, or a folder that contains data files at any depth: {}",
            endings.join(", ")
        )));
    };
    let (data, other): (Vec<_>, Vec<_>) = files.into_iter().partition(|file| kind(file) == Some(first));
    let left: Vec<T> = other.into_iter().filter(|file| kind(file).is_some()).collect();
    if !left.is_empty() {
        let (count, left) = (data.len(), summary(&names(&left)));
        let text = format!(
            "{folder}: {count} data file(s) of one kind are read and {left} left aside; name these to read them"
        );
        report.warn(Stage::Read, text);
    }
    Ok(data)
}

/// Returns the files whose names match a glob, in their order.
///
/// # Errors
/// Config: an invalid glob. Data: no file matches.
pub fn matching<T>(files: Vec<T>, pattern: &str, name: impl Fn(&T) -> String) -> Result<Vec<T>> {
    let glob = glob::Pattern::new(pattern).map_err(|error| invalid_glob(pattern, &error))?;
    let fits = |file: &T| glob.matches_with(name(file).trim_start_matches('/'), GLOB);
    let found: Vec<T> = files.into_iter().filter(fits).collect();
    match found.is_empty() {
        true => Err(Fault::data(format!("{pattern}: no file matches"))
            .help("correct the pattern: * stands for letters of one name, ** for folders")),
        false => Ok(found),
    }
}

/// Returns whether the name has one of the endings, compressed or not, and is not a file about a dataset.
fn ends_with(file: &Path, endings: &[&str]) -> bool {
    let Some(name) = file.file_name().and_then(OsStr::to_str).map(str::to_ascii_lowercase) else {
        return false;
    };
    let bare = PACKINGS.iter().find_map(|packing| name.strip_suffix(packing)).unwrap_or(&name);
    !ABOUT_DATA.contains(&bare)
        && endings.iter().any(|ending| bare.strip_suffix(ending).is_some_and(|stem| stem.ends_with('.')))
}

fn invalid_glob(pattern: &str, error: &glob::PatternError) -> Fault {
    Fault::config(format!("{pattern}: not a valid glob: {}", error.msg)).help(
        "* stands for letters of one name, ** between two / for folders, [ab] for a or b, [[] for a bracket",
    )
}

fn matches(pattern: &str, search: &Search) -> Result<Vec<PathBuf>> {
    let found = glob::glob_with(pattern, GLOB).map_err(|error| invalid_glob(pattern, &error))?;
    let mut files = Vec::new();
    for path in found {
        let path = path.map_err(|error| unreadable(error.path(), error.error()))?;
        if is_hidden(&path) {
            continue;
        }
        match fs::metadata(&path).map_err(|error| unreadable(&path, &error))?.is_dir() {
            true => files.extend(search.directory(&path)?),
            false => files.push(path),
        }
    }
    if files.is_empty() {
        return Err(Fault::data(format!("{pattern}: no file matches")).help(missing::LOOK));
    }
    files.sort();
    // `**` finds a directory and then its files once more.
    files.dedup();
    Ok(files)
}

fn walk(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<()> {
    if depth > DEPTH_MAX || files.len() > FILES_MAX {
        return Err(Fault::data(format!(
            "{}: the folder has more than {DEPTH_MAX} levels or {FILES_MAX} files",
            folder.display()
        ))
        .help("give the directory that contains the data files"));
    }
    let failed = |error: io::Error| unreadable(folder, &error);
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if is_hidden(&path) {
            continue;
        }
        // Links are followed, because mounted volumes consist of them.
        match fs::metadata(&path).map_err(|error| unreadable(&path, &error))?.is_dir() {
            true => walk(&path, depth + 1, files)?,
            false => files.push(path),
        }
    }
    Ok(())
}

/// Returns whether a file is hidden: `.hidden`, and Spark's `_SUCCESS`, `_temporary`, `_metadata`.
fn is_hidden(path: &Path) -> bool {
    path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with(['.', '_']))
}

/// Describes files: `12 files: 9 .json, 2 .txt, 1 without extension`, or `it is empty`.
fn summary(files: &[PathBuf]) -> String {
    if files.is_empty() {
        return "it is empty".to_owned();
    }
    let mut counts = BTreeMap::<String, usize>::new();
    for file in files {
        let kind = match file.extension() {
            Some(extension) => format!(".{}", extension.to_string_lossy()),
            None => "without extension".to_owned(),
        };
        *counts.entry(kind).or_default() += 1;
    }
    let kinds: Vec<String> = counts.iter().take(8).map(|(kind, count)| format!("{count} {kind}")).collect();
    format!("{} files: {}", files.len(), kinds.join(", "))
}

fn unreadable(path: &Path, error: &io::Error) -> Fault {
    Fault::unread(Kind::Data, format!("{}: cannot be read: {error}", path.display()), error)
}
