//! One folder of the cache that is filled once: its lock, the record of what belongs into it, files that appear whole.
//!
//! The record is written before the first file and says at the end that all are there. A process that is killed leaves
//! whole files and beginnings; the next one goes on with the same revision. Whoever holds the lock may change the folder;
//! whoever finds it whole needs no lock.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::fault::{Fault, Result};
use crate::interrupt;
use crate::report::{Report, Stage};
use crate::whole;

const RECORD: &str = ".hone-model.json";
const LOCK: &str = ".hone.lock";
const LOCK_POLL: Duration = Duration::from_millis(100);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub address: String,
    /// The hub's commit, or the manifest's digest.
    pub revision: String,
    pub items: Vec<Item>,
    pub whole: bool,
}

/// A file that belongs into the folder, or an archive of such files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Item {
    pub name: String,
    pub bytes: u64,
    /// In hex; the hub tells none of small files.
    pub sha256: Option<String>,
    pub archive: bool,
}

pub struct Folder {
    pub path: PathBuf,
    _lock: File,
}

/// The record, if the folder was made here.
pub fn read(folder: &Path) -> Option<Record> {
    serde_json::from_slice(&fs::read(folder.join(RECORD)).ok()?).ok()
}

impl Folder {
    /// Creates it, and waits until no other process fills it.
    ///
    /// # Errors
    /// Network: another process did not end within `wait_max`. Storage, Config: the folder cannot be written.
    pub fn open(path: &Path, wait_max: Duration, report: &Report) -> Result<Folder> {
        fs::create_dir_all(path).map_err(|error| Fault::storage("create", path, &error))?;
        let file = path.join(LOCK);
        let lock = File::create(&file).map_err(|error| Fault::storage("create", &file, &error))?;
        let (start, mut told) = (Instant::now(), false);
        loop {
            match lock.try_lock() {
                Ok(()) => {
                    whole::remove_leftovers(path);
                    return Ok(Folder { path: path.to_owned(), _lock: lock });
                }
                Err(TryLockError::WouldBlock) if start.elapsed() < wait_max => {
                    if !std::mem::replace(&mut told, true) {
                        let text = format!("another process fills {}: waiting for it", path.display());
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

    pub fn record(&self) -> Option<Record> {
        read(&self.path)
    }

    pub fn save(&self, record: &Record) -> Result<()> {
        let text = serde_json::to_vec_pretty(record).expect("texts and numbers");
        whole::write(&self.path.join(RECORD), &text)
    }

    /// A file is only ever moved here whole and verified; its length guards against other programs.
    pub fn has(&self, item: &Item) -> bool {
        !item.archive && fs::metadata(self.path.join(&item.name)).is_ok_and(|data| data.len() == item.bytes)
    }

    /// Moves a whole file to its name.
    pub fn take(&self, file: &Path, name: &str) -> Result<()> {
        let target = self.path.join(name);
        fs::rename(file, &target).map_err(|error| Fault::storage("move a download to", &target, &error))
    }
}
