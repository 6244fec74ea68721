//! An unfinished download: its bytes so far, their running digest, and the version that they belong to.
//!
//! `part` only grows, or is emptied. `part.json` names the version and is written before the first byte of it. A
//! killed process therefore leaves a prefix of that version, because file systems extend a file's length only after
//! its data.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::hash;
use super::http::Validators;
use super::statement::{Algorithm, Statement};
use crate::fault::{Fault, Result};
use crate::{plain, whole};

/// An unfinished download.
pub struct Partial {
    path: PathBuf,
    version_path: PathBuf,
    file: fs::File,
    bytes: u64,
    hasher: Sha256,
    version: Version,
}

#[derive(Default, Serialize, Deserialize)]
struct Version {
    validators: Validators,
    total: Option<u64>,
    /// The digest that the server stated when it began to send this version.
    #[serde(default)]
    statement: Option<Statement>,
}

impl Partial {
    /// Opens the file that an earlier attempt left, or an empty file if nothing can be resumed.
    pub fn open(path: &Path, version_path: &Path) -> Result<Partial> {
        let mut file = plain::own(path).map_err(|error| Fault::storage("open", path, &error))?;
        let (bytes, hasher) =
            hash::read(&mut file, |_| ()).map_err(|error| Fault::storage("read", path, &error))?;
        let version: Version = plain::small(version_path)
            .ok()
            .and_then(|content| serde_json::from_slice(&content).ok())
            .unwrap_or_default();
        let usable =
            version.validators.for_range().is_some() && version.total.is_none_or(|total| bytes <= total);
        let (path, version_path) = (path.to_owned(), version_path.to_owned());
        let mut partial = Partial { path, version_path, file, bytes, hasher, version };
        if !usable {
            partial.discard()?;
        }
        Ok(partial)
    }

    /// Returns the number of bytes that are here.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the length of the whole file, if known.
    pub fn total(&self) -> Option<u64> {
        self.version.total
    }

    /// Returns the version that the bytes belong to.
    pub fn validators(&self) -> &Validators {
        &self.version.validators
    }

    /// Returns whether the length is known and all bytes are here.
    pub fn is_whole(&self) -> bool {
        self.bytes > 0 && self.version.total == Some(self.bytes)
    }

    /// Empties the file and begins this version.
    pub fn restart(
        &mut self,
        validators: &Validators,
        total: Option<u64>,
        statement: Option<Statement>,
    ) -> Result<()> {
        self.discard()?;
        self.version = Version { validators: validators.clone(), total, statement };
        whole::write(&self.version_path, &json(&self.version))
    }

    /// Appends bytes.
    pub fn append(&mut self, content: &[u8]) -> Result<()> {
        self.file.write_all(content).map_err(|error| {
            Fault::storage("write", &self.path, &error).help("the bytes received so far are kept")
        })?;
        self.hasher.update(content);
        self.bytes += content.len() as u64;
        Ok(())
    }

    /// Empties the file, so that nothing is resumed.
    pub fn discard(&mut self) -> Result<()> {
        if self.bytes > 0 {
            self.file.set_len(0).map_err(|error| Fault::storage("empty", &self.path, &error))?;
        }
        self.bytes = 0;
        self.hasher = Sha256::new();
        self.version = Version::default();
        Ok(())
    }

    /// Returns the first bytes, at most `bytes_max`.
    pub fn head(&mut self, bytes_max: u64) -> Result<Vec<u8>> {
        let mut head = Vec::new();
        self.file
            .seek(SeekFrom::Start(0))
            .and_then(|_| (&self.file).take(bytes_max).read_to_end(&mut head))
            .map_err(|error| Fault::storage("read", &self.path, &error))?;
        Ok(head)
    }

    /// Returns the digest of the bytes so far, in hex.
    pub fn sha256(&self) -> String {
        hash::hex(self.hasher.clone())
    }

    /// Compares the bytes with the digest that the server stated for this version: its algorithm and whether they
    /// agree.
    pub fn check(&self) -> Result<Option<(Algorithm, bool)>> {
        let Some(statement) = &self.version.statement else { return Ok(None) };
        let holds = fs::File::open(&self.path).and_then(|file| statement.holds(file));
        let holds = holds.map_err(|error| Fault::storage("read", &self.path, &error))?;
        Ok(Some((statement.algorithm, holds)))
    }

    /// Waits until the bytes are on disk.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_all().map_err(|error| Fault::storage("sync", &self.path, &error))
    }
}

/// Serialises a value as JSON.
pub fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain fields become JSON")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Kind;

    fn open(folder: &Path) -> Result<Partial> {
        Partial::open(&folder.join("part"), &folder.join("part.json"))
    }

    fn tagged(etag: &str) -> Validators {
        Validators { etag: Some(etag.to_owned()), ..Validators::default() }
    }

    #[test]
    fn reopening_continues_bytes_and_digest() {
        let folder = tempfile::tempdir().unwrap();
        let mut partial = open(folder.path()).unwrap();
        partial.restart(&tagged("\"v1\""), Some(6), None).unwrap();
        partial.append(b"abc").unwrap();
        drop(partial);

        let mut partial = open(folder.path()).unwrap();
        assert_eq!((partial.bytes(), partial.total(), partial.is_whole()), (3, Some(6), false));
        partial.append(b"def").unwrap();
        assert!(partial.is_whole());
        assert_eq!(partial.sha256(), hash::of(b"abcdef"));
        assert_eq!(partial.head(4).unwrap(), b"abcd");
    }

    /// No server has said that an empty file is the whole one before it was asked.
    #[test]
    fn nothing_is_never_a_whole_file() {
        let folder = tempfile::tempdir().unwrap();
        let mut partial = open(folder.path()).unwrap();
        partial.restart(&tagged("\"v1\""), Some(0), None).unwrap();
        assert!(!partial.is_whole());
    }

    /// The kernel refuses to sync a file of /proc.
    #[test]
    fn a_file_that_cannot_be_synced_is_a_fault() {
        let folder = tempfile::tempdir().unwrap();
        let mut partial = open(folder.path()).unwrap();
        partial.sync().unwrap();
        partial.file = fs::File::open("/proc/self/stat").unwrap();
        assert!(partial.sync().unwrap_err().message.starts_with("cannot sync "));
    }

    #[test]
    fn bytes_of_no_known_version_are_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let part = folder.path().join("part");
        for version in [
            "",
            "{",
            r#"{"validators":{"etag":"W/\"weak\"","last_modified":null,"last_modified_is_strong":false},"total":9}"#,
            r#"{"validators":{"etag":"\"v\"","last_modified":null,"last_modified_is_strong":false},"total":2}"#,
        ] {
            fs::write(&part, "abc").unwrap();
            fs::write(folder.path().join("part.json"), version).unwrap();
            assert_eq!(open(folder.path()).unwrap().bytes(), 0, "{version}");
            assert_eq!(fs::read(&part).unwrap(), b"", "{version}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_a_storage_fault() {
        let folder = tempfile::tempdir().unwrap();
        let mut partial = open(folder.path()).unwrap();
        partial.file = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let fault = partial.append(b"abc").unwrap_err();
        assert_eq!(fault.kind, Kind::Storage);
        assert!(fault.message.contains("No space left"), "{fault}");
        assert_eq!(partial.bytes(), 0);
    }
}
