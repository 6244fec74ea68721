//! Content -> a file that is there whole or not at all, after a kill or a power loss too.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::NamedTempFile;

use crate::fault::{Fault, Result};

/// A file's mode: a temporary file is private, results are for everybody to read.
const MODE: u32 = 0o644;

/// Writes `content` to `path`: under a temporary name beside it, synced, then renamed. A link or pipe that somebody
/// planted under either name is replaced and never followed.
pub fn write(path: &Path, content: &[u8]) -> Result<()> {
    fill(path, |file| file.write_all(content))
}

/// Like [`write()`], with content that `fill` writes piece by piece.
pub fn fill(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> Result<()> {
    let write = || -> io::Result<()> {
        let mut file = NamedTempFile::new_in(folder_of(path))?;
        fill(file.as_file_mut())?;
        file.as_file().set_permissions(fs::Permissions::from_mode(MODE))?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        sync(folder_of(path))
    };
    write().map_err(|error| Fault::storage("write", path, &error))
}

/// Writes `content` to a file that the user named. A link is followed; a device or a pipe gets the content.
///
/// # Errors
/// As [`may_be_written`], and as [`write()`].
pub fn write_named(path: &Path, content: &[u8]) -> Result<()> {
    may_be_written(path)?;
    let wrong = |error: io::Error| Fault::storage("write", path, &error);
    match fs::metadata(path) {
        Ok(data) if data.is_file() => write(&fs::canonicalize(path).map_err(wrong)?, content),
        Ok(_) => fs::write(path, content).map_err(wrong),
        Err(_) => write(path, content),
    }
}

/// Checks the place of a file that the user named, for commands that write it after long work.
///
/// # Errors
/// Config: the file's folder is not there.
pub fn may_be_written(path: &Path) -> Result<()> {
    let folder = folder_of(path);
    match folder.is_dir() {
        true => Ok(()),
        false => Err(Fault::config(format!(
            "cannot write {}: there is no folder {}",
            path.display(),
            folder.display()
        ))
        .help("create the folder, or name a file in a folder that is there")),
    }
}

/// Makes renames in a folder last through a power loss. Some network file systems have no such call, and need none.
pub fn sync_folder(folder: &Path) -> Result<()> {
    sync(folder).map_err(|error| Fault::storage("sync", folder, &error))
}

/// Removes the temporary files that killed processes left in a folder. The caller holds the folder's lock, so that no
/// living process owns one of them. A file that cannot be removed does no harm.
pub fn remove_leftovers(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let plain = entry.file_type().is_ok_and(|kind| !kind.is_dir());
        if plain && is_temporary(&entry.file_name().to_string_lossy()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Returns whether a file has a temporary name: `.tmp` and six letters or digits, as the `tempfile` crate names them.
pub fn is_temporary(name: &str) -> bool {
    name.strip_prefix(".tmp")
        .is_some_and(|rest| rest.len() == 6 && rest.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

fn sync(folder: &Path) -> io::Result<()> {
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {
            Err(error)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Kind;

    #[test]
    fn a_file_is_replaced_whole_and_readable_by_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write(&path, b"old").unwrap();
        write(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, MODE);
        let failed = fill(&path, |file| {
            file.write_all(b"half")?;
            Err(io::Error::other("the disk is gone"))
        });
        assert!(failed.unwrap_err().message.contains("the disk is gone"));
        assert_eq!(fs::read(&path).unwrap(), b"new", "a failed write changes nothing");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nor leaves anything");
    }

    #[test]
    fn a_file_that_the_user_named_is_written_where_it_leads() {
        let folder = tempfile::tempdir().unwrap();
        let (page, link) = (folder.path().join("page.html"), folder.path().join("link"));
        write_named(&page, b"old").unwrap();
        std::os::unix::fs::symlink(&page, &link).unwrap();
        write_named(&link, b"new").unwrap();
        assert_eq!(fs::read(&page).unwrap(), b"new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        write_named(Path::new("/dev/null"), b"x").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
        assert_eq!(write_named(folder.path(), b"x").unwrap_err().kind, Kind::Config);
        let fault = write_named(&folder.path().join("none/page.html"), b"x").unwrap_err();
        assert!(fault.kind == Kind::Config && fault.message.contains("there is no folder"), "{fault}");
    }

    #[test]
    fn a_planted_link_is_replaced_and_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (precious, link) = (folder.path().join("precious"), folder.path().join("a.json"));
        fs::write(&precious, "precious").unwrap();
        std::os::unix::fs::symlink(&precious, &link).unwrap();
        write(&link, b"ours").unwrap();
        assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
        assert!(fs::symlink_metadata(&link).unwrap().is_file());
    }

    /// /proc stands for file systems that know no such call.
    #[test]
    fn a_folder_that_cannot_be_synced_is_a_fault_unless_its_file_system_needs_none() {
        let folder = tempfile::tempdir().unwrap();
        sync_folder(folder.path()).unwrap();
        sync_folder(Path::new("/proc")).unwrap();
        let fault = sync_folder(&folder.path().join("gone")).unwrap_err();
        assert!(fault.message.starts_with("cannot sync "), "{fault}");
    }

    #[test]
    fn a_bare_name_lies_in_the_current_folder() {
        assert_eq!(
            ["a.json", "b/a.json"].map(|path| folder_of(Path::new(path))),
            [Path::new("."), Path::new("b")]
        );
    }

    #[test]
    fn only_temporary_names_are_leftovers() {
        let folder = tempfile::tempdir().unwrap();
        for name in [".tmpAb12Cd", ".tmpAb12C", "x.tmpAb12Cd", ".tmp-12345", "kept"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        fs::create_dir(folder.path().join(".tmpFolder")).unwrap();
        remove_leftovers(folder.path());
        assert!(!folder.path().join(".tmpAb12Cd").exists());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 5);
    }
}
