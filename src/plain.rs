//! A path that somebody gave -> the content of a plain file of a plausible size.
//!
//! A pipe without a writer never opens, `/dev/zero` never ends, and a file of gigabytes takes the memory. A link to a
//! plain file is fine: caches and Kubernetes' mounts are made of them.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// LIMIT: bytes of a small file: a configuration, certificates, credentials, an index, a record.
pub const SMALL_BYTES_MAX: u64 = 64 << 20;

/// Opens a plain file to read it. Does not wait for a pipe's writer.
///
/// # Errors
/// The path is missing, may not be read, or leads to something else.
pub fn open(path: &Path) -> Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(refused("not a plain file")),
    }
}

/// Opens a file of hone's own to read it and to add to it, and creates it if it is not there. A link, a pipe or a
/// device in its place, which only somebody else can have put there, is removed and never followed.
///
/// # Errors
/// The path may not be written, or is a folder.
pub fn own(path: &Path) -> Result<File> {
    let is_ours = |found: &std::fs::Metadata| found.is_file() || found.is_dir();
    if std::fs::symlink_metadata(path).is_ok_and(|found| !is_ours(&found)) {
        std::fs::remove_file(path)?;
    }
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = File::options().read(true).append(true).create(true).custom_flags(flags).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(refused("not a plain file")),
    }
}

/// Reads a plain file of at most `bytes_max` bytes.
///
/// # Errors
/// As [`open()`], and if the file is larger.
pub fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    open(path)?.take(bytes_max + 1).read_to_end(&mut content)?;
    match content.len() as u64 <= bytes_max {
        true => Ok(content),
        false => Err(refused(&format!("it has more than {bytes_max} bytes"))),
    }
}

/// Reads a small plain file.
///
/// # Errors
/// As [`read()`].
pub fn small(path: &Path) -> Result<Vec<u8>> {
    read(path, SMALL_BYTES_MAX)
}

/// Reads a small plain file of text.
///
/// # Errors
/// As [`read()`], and if it is not UTF-8.
pub fn text(path: &Path) -> Result<String> {
    String::from_utf8(small(path)?).map_err(|_| refused("it is not UTF-8"))
}

/// Returns the error for a path that somebody must correct; a retry does not help.
fn refused(what: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_in_the_place_of_an_own_file_is_not_followed() {
        use std::io::Write;
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("precious"), "x").unwrap();
        std::os::unix::fs::symlink(path("precious"), path("link")).unwrap();
        std::os::unix::fs::symlink(path("nowhere"), path("dangling")).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(path("pipe")).status().unwrap().success());
        for name in ["link", "dangling", "pipe", "new", "new"] {
            own(&path(name)).unwrap().write_all(b"y").unwrap();
            assert!(std::fs::symlink_metadata(path(name)).unwrap().is_file(), "{name}");
        }
        assert_eq!(std::fs::read(path("new")).unwrap(), b"yy", "what is there stays");
        assert_eq!(std::fs::read(path("precious")).unwrap(), b"x");
        assert!(!path("nowhere").exists() && own(folder.path()).is_err());
    }

    #[test]
    fn pipes_devices_folders_and_large_files_are_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("a"), "12345").unwrap();
        std::os::unix::fs::symlink(path("a"), path("link")).unwrap();
        assert_eq!(read(&path("link"), 5).unwrap(), b"12345", "a link to a plain file");
        assert!(read(&path("a"), 4).unwrap_err().to_string().contains("more than 4 bytes"));
        let made = std::process::Command::new("mkfifo").arg(path("pipe")).status().unwrap();
        assert!(made.success());
        for odd in [path("pipe"), path(""), "/dev/zero".into()] {
            assert!(small(&odd).unwrap_err().to_string().contains("not a plain file"), "{}", odd.display());
        }
        assert_eq!(small(&path("none")).unwrap_err().kind(), std::io::ErrorKind::NotFound);
        std::fs::write(path("a"), [0xff]).unwrap();
        assert!(text(&path("a")).unwrap_err().to_string().contains("UTF-8"));
    }
}
