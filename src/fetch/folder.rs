//! One folder of the cache that is filled once: its lock, the record of its files, and files that appear whole.
//!
//! The record is written before the first file. At the end it is marked as whole. A killed process leaves whole
//! files and partial downloads; the next process continues with the same revision. A process needs the lock to
//! change the folder, but not to read a whole one.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::fault::{Fault, Result};
use crate::interrupt;
use crate::report::{Report, Stage};
use crate::{plain, whole};

const RECORD: &str = ".hone-model.json";
const LOCK: &str = ".hone.lock";
const LOCK_POLL: Duration = Duration::from_millis(100);

/// The record of a folder of the cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The address that it was fetched from.
    pub address: String,
    /// The hub's commit, the manifest's digest, or a digest of an object store's listing.
    pub revision: String,
    /// The files, or the archives that hold them.
    pub items: Vec<Item>,
    /// Whether all files are there.
    pub whole: bool,
}

/// A file that belongs into the folder, or an archive of such files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Item {
    /// File name; for an archive, its digest.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256 in hex. The hub does not give it for small files.
    pub sha256: Option<String>,
    /// Whether it is an archive.
    pub archive: bool,
}

/// A folder of the cache whose lock this process holds.
pub struct Folder {
    /// The path.
    pub path: PathBuf,
    _lock: File,
}

/// Reads a folder's record. `None`: the folder was not made by hone.
///
/// # Errors
/// Storage: there is a record, and it cannot be read. The folder must not be taken for another one then.
pub fn read(folder: &Path) -> Result<Option<Record>> {
    let file = folder.join(RECORD);
    match plain::small(&file) {
        Ok(text) => Ok(serde_json::from_slice(&text).ok()),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(Fault::storage("read", &file, &error)),
    }
}

impl Folder {
    /// Creates the folder and takes its lock, waiting for another process that fills it.
    ///
    /// # Errors
    /// Network: another process did not finish within `wait_max`. Storage, Config: the folder cannot be written.
    pub fn open(path: &Path, wait_max: Duration, report: &Report) -> Result<Folder> {
        fs::create_dir_all(path).map_err(|error| Fault::storage("create", path, &error))?;
        let file = path.join(LOCK);
        let lock = plain::own(&file).map_err(|error| Fault::storage("create", &file, &error))?;
        let (start, mut told) = (Instant::now(), false);
        loop {
            match lock.try_lock() {
                Ok(()) => {
                    whole::remove_leftovers(path);
                    return Ok(Folder { path: path.to_owned(), _lock: lock });
                }
                Err(TryLockError::WouldBlock) if start.elapsed() < wait_max => {
                    if !std::mem::replace(&mut told, true) {
                        let text = format!("another process is filling {}; waiting for it", path.display());
                        report.note(Stage::Download, text);
                    }
                    interrupt::check()?;
                    std::thread::sleep(LOCK_POLL);
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(Fault::network(format!(
                        "{}: another process has been filling it for {wait_max:?}",
                        path.display()
                    )));
                }
                Err(TryLockError::Error(error)) => {
                    return Err(Fault::storage("lock", &file, &error)
                        .help("put the cache on a file system that supports locks"));
                }
            }
        }
    }

    /// Returns the folder's record, if it has one.
    pub fn record(&self) -> Result<Option<Record>> {
        read(&self.path)
    }

    /// Writes the record.
    pub fn save(&self, record: &Record) -> Result<()> {
        let text = serde_json::to_vec_pretty(record).expect("texts and numbers");
        whole::write(&self.path.join(RECORD), &text)
    }

    /// Returns whether a file is there with the right length. Files are moved here only whole and verified, so the
    /// length only guards against other programs.
    pub fn has(&self, item: &Item) -> bool {
        !item.archive && fs::metadata(self.path.join(&item.name)).is_ok_and(|data| data.len() == item.bytes)
    }

    /// Moves a whole file to its name in the folder.
    pub fn take(&self, file: &Path, name: &str) -> Result<()> {
        let target = self.path.join(name);
        fs::rename(file, &target).map_err(|error| Fault::storage("move a download to", &target, &error))
    }
}
