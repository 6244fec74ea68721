//! Files that belong together -> a folder that is there whole or not at all.
//!
//! They are written into a hidden folder beside the final one, which one rename puts in its place. A folder that is
//! there already and empty may be the root of a volume or a link to one. Its files are written inside of it, where
//! their space is, and moved up at the end.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::fault::{Fault, Kind, Result};
use crate::interrupt::{self, Unfinished};
use crate::{plain, whole, words};

const LOCK: &str = ".lock";
/// The hidden folder inside a folder that was there.
const INSIDE: &str = ".partial";
/// A new volume of ext4 has it.
const OF_VOLUME: &str = "lost+found";
/// Without it no program takes the files of a folder for a model.
const LAST: &str = "config.json";
/// LIMIT: free space that is left beside the files.
const SPARE_BYTES: u64 = 64 << 20;

/// A folder that is being filled. Dropped before its end it leaves nothing.
#[derive(Debug)]
pub struct Folder {
    to: PathBuf,
    work: PathBuf,
    inside: bool,
    done: bool,
    unfinished: Option<Unfinished>,
    _lock: File,
}

impl Folder {
    /// Begins a folder that will be `to`.
    ///
    /// # Errors
    /// Config: `to` holds something already or cannot be written. Storage: another hone fills it, or the disk failed.
    pub fn begin(to: &Path) -> Result<Folder> {
        let entries = match fs::read_dir(to) {
            Ok(entries) => entries.flatten().filter(|entry| !may_be_there(&entry.file_name())).count(),
            Err(error) if error.kind() == ErrorKind::NotFound && to.is_symlink() => {
                return Err(Fault::config(format!("{} is a link to nothing", to.display()))
                    .help("name a new folder, or create the folder that the link names"));
            }
            Err(error) if error.kind() == ErrorKind::NotFound => 0,
            Err(error) => return Err(Fault::storage("read", to, &error)),
        };
        if entries > 0 {
            return Err(Fault::config(format!("{} holds {entries} files or folders already", to.display()))
                .help("name a new folder: nothing is overwritten"));
        }
        let to = std::path::absolute(to).map_err(|error| Fault::storage("find", to, &error))?;
        let inside = to.is_dir();
        let work = match (inside, to.parent(), to.file_name()) {
            (true, ..) => to.join(INSIDE),
            (false, Some(parent), Some(name)) => parent.join(format!(".{}.partial", name.to_string_lossy())),
            _ => return Err(Fault::config(format!("{} is no place for a new folder", to.display()))),
        };
        fs::create_dir_all(&work).map_err(|error| Fault::storage("create", &work, &error))?;
        let lock = plain::own(&work.join(LOCK)).map_err(|error| Fault::storage("write in", &work, &error))?;
        if lock.try_lock().is_err() {
            return Err(Fault::new(Kind::Storage, format!("another hone is filling {}", to.display()))
                .help("wait for it, or name another folder"));
        }
        let unfinished = Some(interrupt::unfinished(&work));
        let folder = Folder { to, work, inside, done: false, unfinished, _lock: lock };
        folder.clear()?;
        Ok(folder)
    }

    /// Removes files that a killed process left.
    fn clear(&self) -> Result<()> {
        let wrong = |error: io::Error| Fault::storage("clear", &self.work, &error);
        for entry in fs::read_dir(&self.work).map_err(wrong)?.flatten().filter(|e| e.file_name() != LOCK) {
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let path = entry.path();
            if is_folder { fs::remove_dir_all(path) } else { fs::remove_file(path) }.map_err(wrong)?;
        }
        Ok(())
    }

    /// Returns the place of the files until the end.
    pub fn work(&self) -> &Path {
        &self.work
    }

    /// Checks that the disk has room for so many bytes.
    ///
    /// # Errors
    /// Capacity: the volume has fewer bytes free than the files will take.
    pub fn require(&self, bytes: u64) -> Result<()> {
        let free = fs4::available_space(&self.work)
            .map_err(|error| Fault::storage("ask for the free space of", &self.work, &error))?;
        match bytes.saturating_add(SPARE_BYTES) <= free {
            true => Ok(()),
            false => Err(Fault::capacity(format!(
                "{} will be written to {}, and {} stay free beside it; its volume has {} free",
                words::size(bytes),
                self.to.display(),
                words::size(SPARE_BYTES),
                words::size(free)
            ))
            .help("name a folder on a larger volume, or write a smaller type")),
        }
    }

    /// Opens a new file for writing.
    pub fn create(&self, name: &str) -> Result<Writer> {
        let path = self.work.join(name);
        let file = File::create(&path).map_err(|error| Fault::storage("write", &path, &error))?;
        Ok(Writer { file: io::BufWriter::with_capacity(1 << 20, file), path, bytes: 0 })
    }

    /// Writes a small file.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        let mut writer = self.create(name)?;
        writer.write(content)?;
        writer.finish()
    }

    /// Puts the folder under its name.
    pub fn finish(mut self) -> Result<PathBuf> {
        let lock = self.work.join(LOCK);
        fs::remove_file(&lock).map_err(|error| Fault::storage("remove", &lock, &error))?;
        whole::sync_folder(&self.work)?;
        self.unfinished = None; // a signal that comes now finds a finished folder
        let wrong = |error: io::Error| Fault::storage("move the files to", &self.to, &error);
        let changed = match self.inside {
            true => self.move_up().map(|()| Some(self.to.as_path())),
            false => fs::rename(&self.work, &self.to).map(|()| self.to.parent()),
        };
        let changed = changed.map_err(wrong)?.map(Path::to_owned);
        self.done = true;
        changed.as_deref().map_or(Ok(()), whole::sync_folder)?;
        Ok(self.to.clone())
    }

    /// Moves the files out of the hidden folder into the one that it lies in.
    fn move_up(&self) -> io::Result<()> {
        let entries = fs::read_dir(&self.work)?;
        let mut names = entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<OsString>>>()?;
        names.sort_by_key(|name| name == LAST);
        for name in &names {
            fs::rename(self.work.join(name), self.to.join(name))?;
        }
        fs::remove_dir(&self.work)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.done {
            // A file that cannot be removed now is removed by the next start.
            let _ = fs::remove_dir_all(&self.work);
        }
    }
}

/// Returns whether an entry of a folder is none of somebody's files.
fn may_be_there(name: &std::ffi::OsStr) -> bool {
    name == INSIDE || name == OF_VOLUME
}

/// A file that is being written.
pub struct Writer {
    file: io::BufWriter<File>,
    path: PathBuf,
    bytes: u64,
}

impl Writer {
    /// Appends bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes).map_err(|error| Fault::storage("write", &self.path, &error))
    }

    /// Returns the number of bytes so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes everything to the disk and closes the file.
    pub fn finish(self) -> Result<()> {
        let path = self.path;
        let file = self.file.into_inner().map_err(|error| Fault::storage("write", &path, error.error()))?;
        file.sync_all().map_err(|error| Fault::storage("write", &path, &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().flatten();
        let mut names: Vec<String> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_is_there_whole_or_not_at_all() {
        let parent = tempfile::tempdir().unwrap();
        let to = parent.path().join("new");
        let folder = Folder::begin(&to).unwrap();
        folder.write("a", b"1").unwrap();
        assert!(!to.exists());
        drop(folder);
        assert_eq!(names(parent.path()), Vec::<String>::new());
        let folder = Folder::begin(&to).unwrap();
        folder.write("a", b"1").unwrap();
        assert_eq!(Folder::begin(&to).unwrap_err().kind, Kind::Storage, "one at a time");
        folder.finish().unwrap();
        assert_eq!((names(parent.path()), names(&to)), (vec!["new".into()], vec!["a".into()]));
        assert!(Folder::begin(&to).unwrap_err().message.contains("holds 1 files"));
    }

    #[test]
    fn what_a_killed_process_left_does_not_get_into_the_folder() {
        let parent = tempfile::tempdir().unwrap();
        let to = parent.path().join("new");
        for (left, is_there) in [(".new.partial", false), ("new/.partial", true)] {
            fs::create_dir_all(parent.path().join(left)).unwrap();
            fs::write(parent.path().join(left).join("old"), "x").unwrap();
            assert_eq!(to.exists(), is_there);
            let folder = Folder::begin(&to).unwrap();
            folder.write("a", b"1").unwrap();
            folder.finish().unwrap();
            assert_eq!((names(parent.path()), names(&to)), (vec!["new".into()], vec!["a".into()]));
            fs::remove_dir_all(&to).unwrap();
        }
    }

    /// A volume's root can be neither renamed nor replaced, and its space is not that of the folder above.
    #[test]
    fn an_empty_folder_that_is_there_is_filled_inside() {
        let parent = tempfile::tempdir().unwrap();
        let volume = parent.path().join("volume");
        fs::create_dir_all(volume.join("lost+found")).unwrap();
        let link = parent.path().join("link");
        std::os::unix::fs::symlink(&volume, &link).unwrap();
        let folder = Folder::begin(&link).unwrap();
        assert!(folder.work().starts_with(&link));
        for name in ["config.json", "weights"] {
            folder.write(name, b"1").unwrap();
        }
        assert_eq!(names(&volume), [".partial", "lost+found"]);
        drop(folder);
        assert_eq!(names(&volume), ["lost+found"]);
        let folder = Folder::begin(&link).unwrap();
        for name in ["config.json", "weights"] {
            folder.write(name, b"1").unwrap();
        }
        folder.finish().unwrap();
        assert_eq!(names(&volume), ["config.json", "lost+found", "weights"]);
        assert!(Folder::begin(&link).unwrap_err().message.contains("holds 2 files"));
        std::os::unix::fs::symlink("nothing", parent.path().join("loose")).unwrap();
        let fault = Folder::begin(&parent.path().join("loose")).unwrap_err();
        assert!(fault.kind == Kind::Config && fault.message.contains("a link to nothing"), "{fault}");
    }

    #[test]
    fn a_volume_that_is_too_small_is_told_before_anything_is_written() {
        let parent = tempfile::tempdir().unwrap();
        let folder = Folder::begin(&parent.path().join("new")).unwrap();
        assert_eq!(folder.require(u64::MAX / 2).unwrap_err().kind, Kind::Capacity);
        folder.require(1000).unwrap();
    }
}
