//! A key -> the token cache's folder of it: whole, or ours to fill.
//!
//! `FOLDER/KEY` holds a whole store: its tokens, its lines, and `record`, which has the digests of both and of itself.
//! `KEY.part` is a store that a process fills; the process holds the lock of the file inside it, and renames the folder
//! at the end. A folder of parts without its process is litter. `FOLDER/lock` is held for moments only, while folders
//! are looked at, made, renamed or removed.

use crate::fault::{Fault, Kind, Result};
use crate::interrupt;
use crate::plain;
use crate::report::{Report, Stage};
use crate::source;
use crate::whole;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

pub(super) const TOKENS: &str = "tokens";
pub(super) const LINES: &str = "lines";
const RECORD: &str = "record";
const LOCK: &str = "lock";
const PART: &str = ".part";
const LOCK_POLL: Duration = Duration::from_millis(100);
/// The time after which an unused store is removed.
const UNUSED_MAX: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// Free space that filling a store leaves on its volume, for checkpoints and others.
const RESERVE_BYTES: u64 = 512 << 20;

/// The folder of all stores.
pub(super) struct Cache {
    folder: PathBuf,
}

/// The entry for a key.
pub(super) enum Place {
    /// A whole store with its record.
    Whole(Whole),
    /// Nothing: this process fills it.
    Ours(Ours),
}

/// A folder that was finished. Its content must still be verified.
pub(super) struct Whole {
    /// Folder of the store.
    pub folder: PathBuf,
    /// Contents of its record, as they are on the disk.
    pub record: Vec<u8>,
    /// Shared: while it is held, nobody removes the folder to make room.
    pub lock: File,
}

/// A folder that this process fills. It goes away if it is not finished.
pub(super) struct Ours {
    folder: PathBuf,
    key: String,
    finished: bool,
    /// Exclusive: while it is held, nobody takes the folder for litter.
    lock: Option<File>,
}

impl Cache {
    /// Opens the cache, and creates its folder if it is missing.
    ///
    /// # Errors
    /// Config: the folder cannot be made or written. Storage: the disk fails.
    pub fn open(folder: &Path) -> Result<Cache> {
        fs::create_dir_all(folder).map_err(|error| Fault::storage("create", folder, &error))?;
        let cache = Cache { folder: folder.to_owned() };
        cache.locked(|| Ok(()))?; // A folder that cannot be written is found before the work.
        Ok(cache)
    }

    /// Returns the key's store. If another process fills it, this one waits.
    ///
    /// # Errors
    /// Storage, Config: the folder cannot be used. Interrupted: a signal came while waiting.
    pub fn claim(&self, key: &str, report: &Report) -> Result<Place> {
        let mut told = false;
        loop {
            if let Some(place) = self.locked(|| self.look(key))? {
                return Ok(place);
            }
            if !std::mem::replace(&mut told, true) {
                report.note(Stage::Tokenize, "another process makes the same tokens: waiting for it");
            }
            interrupt::check()?;
            std::thread::sleep(LOCK_POLL);
        }
    }

    /// Returns the place of the key's store. `None`: another process is at work on it.
    fn look(&self, key: &str) -> Result<Option<Place>> {
        self.remove_litter(key);
        let whole = self.folder.join(key);
        if let Some(place) = opened(&whole)? {
            return Ok(Some(Place::Whole(place)));
        }
        let part = self.folder.join(format!("{key}{PART}"));
        if part.exists() {
            if held(&part) {
                return Ok(None);
            }
            remove(&part)?;
        }
        fs::create_dir(&part).map_err(|error| Fault::storage("create", &part, &error))?;
        let path = part.join(LOCK);
        let lock = opened_lock(&path, true).map_err(|error| Fault::storage("create", &path, &error))?;
        lock.try_lock().map_err(|error| no_lock(&path, error))?;
        let (key, lock) = (key.to_owned(), Some(lock));
        Ok(Some(Place::Ours(Ours { folder: part, key, finished: false, lock })))
    }

    /// Gives a filled folder its name. Returns the folder, and a lock that keeps others from removing it.
    ///
    /// # Errors
    /// Storage: the disk fails.
    pub fn keep(&self, mut ours: Ours, record: &[u8]) -> Result<(PathBuf, File)> {
        whole::write(&ours.folder.join(RECORD), &sealed(record))?;
        let folder = self.folder.join(&ours.key);
        let lock = ours.lock.take().expect("taken here only");
        self.locked(|| {
            remove(&folder)?; // It was found damaged.
            fs::rename(&ours.folder, &folder)
                .map_err(|error| Fault::storage("move a token cache to", &folder, &error))?;
            ours.finished = true;
            // Nobody else takes it in between: that needs the lock of all folders.
            lock.unlock().map_err(|error| Fault::storage("unlock", &folder, &error))?;
            lock.try_lock_shared().map_err(|error| no_lock(&folder, error))?;
            whole::sync_folder(&self.folder)
        })?;
        Ok((folder, lock))
    }

    /// Removes a store that is damaged.
    pub fn discard(&self, whole: Whole) -> Result<()> {
        let folder = whole.folder.clone();
        drop(whole);
        self.locked(|| remove(&folder))
    }

    /// Makes room for `bytes` more by removing stores that nobody uses, the longest unused first.
    ///
    /// # Errors
    /// Capacity: there is less room all the same.
    pub fn make_room(&self, bytes: u64, report: &Report) -> Result<()> {
        let needed = bytes.saturating_add(RESERVE_BYTES);
        if source::free_bytes(&self.folder)? >= needed {
            return Ok(());
        }
        let removed = self.locked(|| {
            let mut removed = 0;
            for (_, folder) in self.unused(Duration::ZERO) {
                if source::free_bytes(&self.folder)? >= needed {
                    break;
                }
                remove(&folder)?;
                removed += 1;
            }
            Ok(removed)
        })?;
        if removed > 0 {
            report.note(Stage::Tokenize, format!("{removed} older token caches were removed to make room"));
        }
        let free = source::free_bytes(&self.folder)?;
        match free >= needed {
            true => Ok(()),
            false => Err(Fault::capacity(format!(
                "the token cache needs {} MB more and leaves {} MB free for others, but {} has {} MB free",
                bytes.div_ceil(1 << 20),
                RESERVE_BYTES >> 20,
                self.folder.display(),
                free >> 20
            ))
            .help(ELSEWHERE)),
        }
    }

    /// Removes folders that killed processes left, and stores that nobody used for a month. The key's own store is left
    /// alone.
    fn remove_litter(&self, key: &str) {
        let parts = folders(&self.folder).filter(|path| has_ending(path, PART) && !held(path));
        let old = self.unused(UNUSED_MAX).into_iter().map(|(_, folder)| folder);
        for folder in parts.chain(old).filter(|folder| !folder.ends_with(key)) {
            // A file that cannot be removed does no harm.
            let _ = fs::remove_dir_all(folder);
        }
    }

    /// Returns the whole stores that no process uses, unused for at least so long; the longest first.
    fn unused(&self, least: Duration) -> Vec<(SystemTime, PathBuf)> {
        let age = |used: SystemTime| SystemTime::now().duration_since(used).unwrap_or_default();
        let used = |folder: PathBuf| Some((fs::metadata(folder.join(RECORD)).ok()?.modified().ok()?, folder));
        let whole = folders(&self.folder).filter(|path| !has_ending(path, PART) && !held(path));
        let mut list: Vec<_> = whole.filter_map(used).filter(|(used, _)| age(*used) >= least).collect();
        list.sort();
        list
    }

    /// Runs `work` while no other process looks at the folders or changes them.
    fn locked<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let path = self.folder.join(LOCK);
        let lock = opened_lock(&path, true).map_err(|error| Fault::storage("create", &path, &error))?;
        loop {
            match lock.try_lock() {
                Ok(()) => return work(),
                Err(TryLockError::WouldBlock) => {
                    interrupt::check()?;
                    std::thread::sleep(LOCK_POLL);
                }
                Err(error) => return Err(no_lock(&path, error)),
            }
        }
    }
}

/// The remedy if the volume is too small.
pub(super) const ELSEWHERE: &str = "name a folder on a larger volume with `token_cache`, or keep the tokens in memory with `token_cache: off`";

impl Ours {
    /// Returns the path of a file inside it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        if !self.finished {
            // A later start removes what cannot be removed now.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// Returns the store at `folder`, marked as used now; `None` if there is none or its record is damaged.
fn opened(folder: &Path) -> Result<Option<Whole>> {
    let path = folder.join(RECORD);
    let content = match plain::small(&path) {
        Ok(content) => content,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => {
            return Ok(None);
        }
        Err(error) => return Err(Fault::storage("read", &path, &error)),
    };
    let Some(record) = unsealed(&content) else { return Ok(None) };
    let lock = folder.join(LOCK);
    let Ok(file) = opened_lock(&lock, false) else { return Ok(None) };
    file.try_lock_shared().map_err(|error| no_lock(&lock, error))?;
    // A volume that is mounted read-only keeps the older time.
    let _ = File::options().append(true).open(&path).and_then(|file| file.set_modified(SystemTime::now()));
    Ok(Some(Whole { folder: folder.to_owned(), record: record.to_vec(), lock: file }))
}

fn sealed(record: &[u8]) -> Vec<u8> {
    [source::digest(record).as_bytes(), b"\n", record].concat()
}

/// Returns the record, if the digest before it is its own.
fn unsealed(content: &[u8]) -> Option<&[u8]> {
    let end = content.iter().position(|&byte| byte == b'\n')?;
    let (digest, record) = (&content[..end], &content[end + 1..]);
    (digest == source::digest(record).as_bytes()).then_some(record)
}

/// Returns a file to lock. Network file systems lock only files that are open for both reading and writing.
fn opened_lock(path: &Path, create: bool) -> io::Result<File> {
    match create {
        true => plain::own(path),
        false => File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path),
    }
}

/// Returns whether a process holds the folder; true if that cannot be known.
fn held(folder: &Path) -> bool {
    match opened_lock(&folder.join(LOCK), false) {
        Err(error) => error.kind() != io::ErrorKind::NotFound,
        Ok(lock) => lock.try_lock().is_err(),
    }
}

/// Removes a folder, if it is there.
fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Fault::storage("remove", folder, &error))
        }
        _ => Ok(()),
    }
}

fn folders(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}

fn has_ending(path: &Path, ending: &str) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(ending))
}

fn no_lock(path: &Path, error: TryLockError) -> Fault {
    Fault::new(Kind::Storage, format!("cannot lock {}: {error}", path.display()))
        .help("put the token cache on a file system that supports locks, or set `token_cache: off`")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(cache: &Cache, key: &str) -> Place {
        cache.claim(key, &Report::silent()).unwrap()
    }

    fn fill(cache: &Cache, key: &str) -> PathBuf {
        let Place::Ours(ours) = claim(cache, key) else { panic!("there is none yet") };
        fs::write(ours.path(TOKENS), "tokens").unwrap();
        cache.keep(ours, b"record").unwrap().0
    }

    fn names(cache: &Cache) -> Vec<String> {
        let entries = fs::read_dir(&cache.folder).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_store_is_whole_or_absent() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(&folder.path().join("a/b")).unwrap();
        let Place::Ours(ours) = claim(&cache, "k") else { panic!("there is none yet") };
        fs::write(ours.path(TOKENS), "half").unwrap();
        assert_eq!(names(&cache), ["k.part", "lock"]);
        drop(ours);
        assert_eq!(names(&cache), ["lock"], "what is not finished goes away");
        let whole = fill(&cache, "k");
        assert_eq!(names(&cache), ["k", "lock"]);
        let Place::Whole(found) = claim(&cache, "k") else { panic!("it is whole") };
        assert_eq!((found.folder.as_path(), found.record.as_slice()), (whole.as_path(), &b"record"[..]));
        for damage in ["", "no line", "0000\nrecord", &format!("{}\nrecorD", source::digest(b"record"))] {
            fs::write(whole.join(RECORD), damage).unwrap();
            assert!(matches!(claim(&cache, "k"), Place::Ours(_)), "{damage}");
        }
        fill(&cache, "k");
        let Place::Whole(found) = claim(&cache, "k") else { panic!("it is whole again") };
        cache.discard(found).unwrap();
        assert!(matches!(claim(&cache, "k"), Place::Ours(_)));
    }

    #[test]
    fn litter_goes_and_work_in_progress_stays() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        let (ours, _dead) = (claim(&cache, "living"), fs::create_dir(folder.path().join("dead.part")));
        fs::write(folder.path().join("dead.part/tokens"), "half").unwrap();
        let old = fill(&cache, "old");
        let long_ago = SystemTime::now() - UNUSED_MAX - Duration::from_secs(9);
        File::options().append(true).open(old.join(RECORD)).unwrap().set_modified(long_ago).unwrap();
        fill(&cache, "new");
        assert_eq!(names(&cache), ["living.part", "lock", "new"]);
        assert!(cache.look("living").unwrap().is_none(), "another one waits");
        drop(ours);
        assert!(cache.look("living").unwrap().is_some());
    }

    #[test]
    fn room_is_made_by_what_is_longest_unused_and_never_by_what_is_in_use() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        fill(&cache, "used");
        fill(&cache, "unused");
        let Place::Whole(_in_use) = claim(&cache, "used") else { panic!("it is whole") };
        cache.make_room(1, &Report::silent()).unwrap();
        assert_eq!(names(&cache), ["lock", "unused", "used"]);
        let fault = cache.make_room(1 << 60, &Report::silent()).unwrap_err();
        assert_eq!((fault.kind, names(&cache)), (Kind::Capacity, vec!["lock".to_owned(), "used".to_owned()]));
        assert!(fault.help.unwrap().contains("token_cache"));
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let fault = Cache::open(&file.path().join("tokens")).err().unwrap();
        assert_eq!(fault.kind, Kind::Config, "{fault}");
    }
}
