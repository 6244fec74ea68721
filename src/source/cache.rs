//! The cache of downloads: `sha256/<hex>` holds whole files, `url/<key>/` the record of one URL.
//!
//! A key is the digest of the whole URL. Two signatures of one object are therefore two keys, and no query is ever
//! written to disk. A process may change a key's folder only while it holds the key's lock.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use url::Url;

use super::hash;
use super::http::Validators;
use super::parse::is_sha256;
use super::partial::{Partial, json};
use crate::fault::{Fault, Result};
use crate::report::{Report, Stage};
use crate::{plain, whole, words};

const LOCK_POLL: Duration = Duration::from_millis(100);
/// The partial file in a slot.
const PART: &str = "part";

/// A cache folder.
pub struct Cache {
    folder: PathBuf,
}

/// A whole file of the cache whose digest was just verified.
#[derive(Clone, Debug)]
pub struct Blob {
    /// The file.
    pub path: PathBuf,
    /// The file's length.
    pub bytes: u64,
    /// The file's digest in hex.
    pub sha256: String,
}

/// The last result of a URL.
#[derive(Debug, Serialize, Deserialize)]
pub struct Entry {
    /// The version on the server.
    pub validators: Validators,
    /// The file's length.
    pub bytes: u64,
    /// The file's digest in hex.
    pub sha256: String,
}

/// The folder of one URL. It is locked against other processes until this value is dropped.
pub struct Slot {
    folder: PathBuf,
    _lock: fs::File,
}

impl Cache {
    /// Returns the cache in `folder`, which need not exist yet.
    pub fn new(folder: &Path) -> Cache {
        Cache { folder: folder.to_owned() }
    }

    /// Returns the file of this digest, if it is there and has that digest. A damaged file is removed with a
    /// warning.
    pub fn find(&self, sha256: &str, report: &Report) -> Result<Option<Blob>> {
        if !is_sha256(sha256) {
            return Ok(None);
        }
        let path = self.blob_path(sha256);
        match plain::open(&path) {
            Ok(file) => {
                let (bytes, hasher) =
                    hash::read(file, |_| ()).map_err(|error| Fault::storage("read", &path, &error))?;
                let sha256 = sha256.to_owned();
                if hash::hex(hasher) == sha256 {
                    return Ok(Some(Blob { path, bytes, sha256 }));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            // A pipe or a device in its place.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
            Err(error) => return Err(Fault::storage("open", &path, &error)),
        }
        let text = format!("{} was damaged on disk and has been removed", path.display());
        report.warn(Stage::Download, text);
        fs::remove_file(&path).map_err(|error| Fault::storage("remove", &path, &error))?;
        Ok(None)
    }

    /// Returns the URL's folder when no other process holds it. A wait beyond `deadline` is a network fault.
    pub async fn slot(&self, url: &Url, name: &str, deadline: Instant) -> Result<Slot> {
        let folder = self.slot_path(url);
        create_folder(&folder)?;
        let path = folder.join("lock");
        let lock = plain::own(&path).map_err(|error| Fault::storage("create", &path, &error))?;
        loop {
            match lock.try_lock() {
                Ok(()) => {
                    whole::remove_leftovers(&folder);
                    return Ok(Slot { folder, _lock: lock });
                }
                Err(fs::TryLockError::WouldBlock) if Instant::now() < deadline => {
                    tokio::time::sleep(LOCK_POLL).await;
                }
                Err(fs::TryLockError::WouldBlock) => {
                    return Err(Fault::network(format!(
                        "{name}: another process was still downloading it when the allowed time was over"
                    )));
                }
                Err(fs::TryLockError::Error(error)) => {
                    return Err(Fault::storage("lock", &path, &error)
                        .help("put the cache on a file system that supports locks"));
                }
            }
        }
    }

    /// Removes the temporary files that killed processes left in the folders of URLs. A folder that is in use stays as
    /// it is. Otherwise a URL that is no longer requested would keep them permanently.
    pub fn collect(&self) {
        for entry in fs::read_dir(self.folder.join("url")).into_iter().flatten().flatten() {
            let lock = plain::open(&entry.path().join("lock"));
            if lock.is_ok_and(|lock| lock.try_lock().is_ok()) {
                whole::remove_leftovers(&entry.path());
            }
        }
    }

    /// Moves a whole download to its final name and records it as the result of the slot's URL.
    pub fn keep(&self, slot: &Slot, mut partial: Partial, sha256: &str) -> Result<Blob> {
        let path = self.blob_path(sha256);
        create_folder(path.parent().expect("a blob lies in a folder"))?;
        let bytes = partial.bytes();
        partial.sync()?;
        let from = slot.partial_path();
        fs::rename(&from, &path).map_err(|error| Fault::storage("move a download to", &path, &error))?;
        whole::sync_folder(path.parent().expect("a blob lies in a folder"))?;
        let entry = Entry { validators: partial.validators().clone(), bytes, sha256: sha256.to_owned() };
        whole::write(&slot.entry_path(), &json(&entry))?;
        Ok(Blob { path, bytes, sha256: entry.sha256 })
    }

    /// Checks that the cache's volume has `bytes` free.
    ///
    /// # Errors
    /// Capacity: fewer than `bytes` are free.
    pub fn check_space(&self, name: &str, bytes: u64) -> Result<()> {
        require_space(&self.folder, name, bytes)
    }

    /// Returns the number of bytes of the URL's file that are in the cache: the whole file if its digest is known, else
    /// the partial one.
    pub fn held(&self, url: &Url, sha256: Option<&str>) -> u64 {
        let whole = sha256.filter(|sha256| is_sha256(sha256)).map(|sha256| self.blob_path(sha256));
        let bytes = |path: PathBuf| fs::metadata(path).ok().map(|data| data.len());
        whole.and_then(bytes).or_else(|| bytes(self.slot_path(url).join(PART))).unwrap_or(0)
    }

    fn slot_path(&self, url: &Url) -> PathBuf {
        self.folder.join("url").join(hash::of(url.as_str().as_bytes()))
    }

    fn blob_path(&self, sha256: &str) -> PathBuf {
        self.folder.join("sha256").join(sha256)
    }
}

impl Slot {
    /// Returns the URL's last result. `None`: there is none, or its record is unreadable.
    pub fn entry(&self) -> Option<Entry> {
        serde_json::from_slice(&plain::small(&self.entry_path()).ok()?).ok()
    }

    /// Opens the partial file.
    pub fn partial(&self) -> Result<Partial> {
        Partial::open(&self.partial_path(), &self.folder.join("part.json"))
    }

    fn partial_path(&self) -> PathBuf {
        self.folder.join(PART)
    }

    fn entry_path(&self) -> PathBuf {
        self.folder.join("entry.json")
    }
}

/// Returns the free bytes on the volume of a folder.
pub fn free_bytes(folder: &Path) -> Result<u64> {
    fs4::available_space(folder).map_err(|error| Fault::storage("ask for the free space of", folder, &error))
}

/// Checks that the volume of `folder` has `bytes` free.
///
/// # Errors
/// Capacity: fewer than `bytes` are free.
pub fn require_space(folder: &Path, name: &str, bytes: u64) -> Result<()> {
    let free = free_bytes(folder)?;
    if bytes <= free {
        return Ok(());
    }
    Err(Fault::capacity(format!(
        "{name}: {} more are needed, but {} has {} free",
        words::size(bytes),
        folder.display(),
        words::size(free)
    ))
    .help("give the cache a larger volume"))
}

fn create_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|error| Fault::storage("create", folder, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record that was damaged or planted names any file.
    #[test]
    fn a_digest_that_is_a_path_is_no_file_of_the_cache() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::new(&home.path().join("cache"));
        let precious = home.path().join("precious");
        fs::create_dir_all(home.path().join("cache/sha256")).unwrap();
        fs::write(&precious, "x").unwrap();
        let digest = hash::of(b"x");
        for name in ["../../precious", precious.to_str().unwrap(), "", &digest[..63], &digest.to_uppercase()]
        {
            assert!(cache.find(name, &Report::silent()).unwrap().is_none(), "{name}");
        }
        assert!(precious.exists(), "it is not removed as a damaged file of the cache");
    }

    #[test]
    fn what_is_held_of_a_url_is_its_whole_file_or_its_beginning() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::new(home.path());
        let url = Url::parse("https://host/a").unwrap();
        let digest = hash::of(b"whole");
        assert_eq!(cache.held(&url, Some(&digest)), 0);
        let slot = cache.slot_path(&url);
        fs::create_dir_all(&slot).unwrap();
        fs::write(slot.join(PART), "beg").unwrap();
        assert_eq!((cache.held(&url, None), cache.held(&url, Some(&digest))), (3, 3));
        create_folder(&home.path().join("sha256")).unwrap();
        fs::write(cache.blob_path(&digest), "whole").unwrap();
        assert_eq!((cache.held(&url, None), cache.held(&url, Some(&digest))), (3, 5));
        assert_eq!(cache.held(&url, Some("../../x")), 3);
    }

    #[test]
    fn what_stands_in_the_place_of_a_file_is_removed_and_a_folder_that_is_none_is_told() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::new(home.path());
        let digest = hash::of(b"x");
        let find = || cache.find(&digest, &Report::silent());
        assert!(find().unwrap().is_none());
        create_folder(&home.path().join("sha256")).unwrap();
        let place = cache.blob_path(&digest);
        assert!(std::process::Command::new("mkfifo").arg(&place).status().unwrap().success());
        assert!(find().unwrap().is_none());
        assert!(fs::symlink_metadata(&place).is_err(), "the pipe is gone");
        fs::remove_dir(home.path().join("sha256")).unwrap();
        fs::write(home.path().join("sha256"), "a file").unwrap();
        assert!(find().map(drop).unwrap_err().message.starts_with("cannot open "));
    }

    #[test]
    fn a_folder_of_a_url_that_another_process_holds_is_waited_for_until_the_time_is_over() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::new(home.path());
        let url = Url::parse("https://host/a").unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let slot =
            |most| runtime.block_on(cache.slot(&url, "a", Instant::now() + Duration::from_millis(most)));
        let first = slot(60_000).unwrap();
        fs::write(first.folder.join(".tmpAb12Cd"), "x").unwrap();
        cache.collect();
        assert!(first.folder.join(".tmpAb12Cd").exists(), "somebody may be writing it");
        let fault = slot(300).map(drop).unwrap_err();
        assert!(
            fault.kind == crate::fault::Kind::Network && fault.message.contains("another process"),
            "{fault}"
        );
        let folder = first.folder.clone();
        drop(first);
        cache.collect();
        assert!(!folder.join(".tmpAb12Cd").exists());
        fs::write(folder.join(".tmpAb12Cd"), "x").unwrap();
        slot(60_000).unwrap();
        assert!(!folder.join(".tmpAb12Cd").exists());
    }

    #[test]
    fn leftovers_go_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        for name in [".tmpAb12Cd", ".tmp", ".tmpAb12Cde", ".tmp_b12Cd", "part", ".hone.lock"] {
            fs::write(folder.path().join(name), "x").unwrap();
        }
        fs::create_dir(folder.path().join(".tmpFolder")).unwrap();
        whole::remove_leftovers(folder.path());
        let mut names: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [".hone.lock", ".tmp", ".tmpAb12Cde", ".tmpFolder", ".tmp_b12Cd", "part"]);
    }
}
