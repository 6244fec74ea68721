//! The output folder of a run. One process claims it, other runs are kept out, files are written atomically, and
//! KAITO's sentinel is the last.
//!
//! `hone.json` identifies the run that the folder belongs to. It is the first file written, and it alone decides. A
//! restarted run finds its own record and continues; another run is refused. Files of the adapter appear whole, by
//! rename. Links that somebody planted under hone's own names are never followed.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::adapter;
use crate::fault::{Fault, Kind, Result};
use crate::interrupt;
use crate::publish::Published;
use crate::source;
use crate::train::{Checkpoints, Metric, Trained};
use crate::{plain, whole, words};

/// `YYYY-MM-DD-HH-MM-SS`, as KAITO writes it.
const DATE: &str = "%Y-%m-%d-%H-%M-%S";
/// Name of the file that records the run: its arguments and its progress.
pub const RECORD: &str = "hone.json";
const LOCK: &str = ".hone.lock";
/// Name of the file with one JSON line for each logged step and each evaluation.
pub const METRICS: &str = "metrics.jsonl";
const CHECKPOINTS: &str = "checkpoints";
/// The page that explains the run.
pub const REPORT: &str = "report.html";
/// Folder of the trackers' files beside the results: TensorBoard's event files.
pub const TRACKERS: &str = "runs";
/// The beginning of that page, by which hone knows its own.
pub const REPORT_MARK: &str = "<!doctype html>\n<html lang=\"en\" data-hone=\"report\">";
/// The content of that page, for machines.
pub const REPORT_FACTS: &str = "report.json";
/// The beginning of that file, by which hone knows its own.
const REPORT_FACTS_MARK: &str = "{\n  \"hone\": \"";
/// Speed and memory at each logged step. They differ from start to start, so they are no part of `metrics.jsonl`.
pub const TIMELINE: &str = "timeline.jsonl";
/// Answers of base and tuned model to held-out rows at the end of the run, if `answers` is above 0.
pub const ANSWERS: &str = "answers.json";
/// LIMIT: a line has some hundred bytes, so that this is tens of millions of steps.
const METRICS_BYTES_MAX: u64 = 4 << 30;
/// The time that a start waits until another hone leaves the folder. A pod that is being deleted has some seconds left.
const LOCK_WAIT: Duration = Duration::from_secs(20);
const LOCK_POLL: Duration = Duration::from_millis(100);
/// The file that KAITO's pusher waits for.
pub const SENTINEL: &str = "fine_tuning_completed.txt";

/// The folder for another run's results; they go into a folder there, named by the time when that run was started.
const EARLIER: &str = "earlier";
/// Files of a finished run.
const WHOLE: [&str; 3] = [adapter::CONFIG_FILE, adapter::WEIGHTS_FILE, SENTINEL];
/// All files that a run may write.
const OWN: [&str; 12] = [
    adapter::CONFIG_FILE,
    adapter::WEIGHTS_FILE,
    SENTINEL,
    "README.md",
    ANSWERS,
    METRICS,
    CHECKPOINTS,
    REPORT,
    REPORT_FACTS,
    TIMELINE,
    TRACKERS,
    RECORD,
];

/// The treatment of another run's results in the output folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Earlier {
    /// This run does not start.
    #[default]
    Refuse,
    /// The results move to `earlier/` inside the folder. Files that no run of hone wrote stay where they are.
    Move,
}

/// The content of `hone.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Version of hone that started the run.
    pub hone: String,
    /// Hash of model, data and options together.
    pub fingerprint: String,
    /// Time of the first start, in seconds since 1970. Templates that print the date use it, so that a restart
    /// renders the same text.
    pub started: u64,
    /// The files that the run reads its rows from.
    pub data: Vec<DataFile>,
    /// The keys that the run was given. Commands that use its adapter later read them (`plan/asked.rs`).
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub asked: serde_json::Map<String, serde_json::Value>,
    /// The result of training, when it has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trained: Option<serde_json::Value>,
    /// The pushed image, when there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<PushedImage>,
    /// The places that the adapter was sent to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub published: Vec<Published>,
}

/// A file of the dataset.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DataFile {
    /// The file as the user named it, without secrets.
    pub name: String,
    /// Size of the file.
    pub bytes: u64,
    /// Digest of the file in hexadecimal digits.
    pub sha256: String,
}

/// The image that the adapter was pushed as.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PushedImage {
    /// Reference with its tag.
    pub reference: String,
    /// Digest of the manifest.
    pub digest: String,
}

impl Record {
    /// Returns the record of a folder that a run of hone wrote; `None` for any other folder.
    ///
    /// # Errors
    /// Config: there is a hone.json that is no record.
    pub fn of(folder: &Path) -> Result<Option<Record>> {
        read_record(folder)
    }

    /// Returns the time of the run's first start.
    pub fn started(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.started)
    }
}

/// A claimed output folder. The claim ends when the value is dropped.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    record: Option<Record>,
    started: u64,
    earlier: Earlier,
    _lock: File,
}

impl RunFolder {
    /// Creates the folder, or takes over the folder of an earlier start of the same run.
    ///
    /// Config: the folder cannot be used, or holds files that are not hone's. Storage: the disk failed, or another
    /// hone still uses the folder, which ends by itself.
    pub fn claim(path: &Path, earlier: Earlier) -> Result<RunFolder> {
        RunFolder::claim_within(path, earlier, LOCK_WAIT)
    }

    fn claim_within(path: &Path, earlier: Earlier, wait_max: Duration) -> Result<RunFolder> {
        fs::create_dir_all(path).map_err(|error| Fault::storage("create", path, &error))?;
        if earlier == Earlier::Refuse && read_record(path)?.is_none() {
            refuse_foreign(path)?;
        }
        let lock = lock(path, wait_max)?;
        // The record is read again under the lock, because another run may have ended in between.
        let record = read_record(path)?;
        whole::remove_leftovers(path);
        let started = record.as_ref().map_or_else(now, |record| record.started);
        Ok(RunFolder { path: path.to_owned(), record, started, earlier, _lock: lock })
    }

    /// Returns the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the time when this run was first started.
    pub fn started(&self) -> SystemTime {
        UNIX_EPOCH + std::time::Duration::from_secs(self.started)
    }

    /// Ties the folder to a run, or accepts that it already belongs to it. Another run's folder is refused, unless
    /// that run left nothing of value: a user who corrects a mistake may start again in the same folder.
    pub fn belongs_to(&mut self, fingerprint: &str, data: &[source::File]) -> Result<()> {
        match &self.record {
            Some(record) if record.fingerprint == fingerprint => Ok(()),
            Some(_) if self.earlier == Earlier::Refuse && let Some(kept) = self.kept() => Err(Fault::config(format!(
                "the output folder {} holds {kept} of another run, whose model, data or options differ from these",
                self.path.display()
            ))
            .help("use another output folder, remove this one, or set earlier_results: move")),
            _ => {
                if self.kept().is_some() {
                    self.move_away()?;
                }
                self.started = now();
                // This comes before the record is written: afterwards these lines could not be distinguished from the
                // new run's.
                for name in [METRICS, TIMELINE, REPORT_FACTS, REPORT] {
                    self.remove(name)?;
                }
                // A link is not followed: it fails here, and stays.
                let _ = fs::remove_dir_all(self.path.join(TRACKERS));
                let file = |file: &source::File| DataFile {
                    name: file.name.clone(),
                    bytes: file.bytes,
                    sha256: file.sha256.clone(),
                };
                self.save(Record {
                    hone: env!("CARGO_PKG_VERSION").into(),
                    fingerprint: fingerprint.into(),
                    started: self.started,
                    data: data.iter().map(file).collect(),
                    asked: serde_json::Map::new(),
                    trained: None,
                    image: None,
                    published: Vec::new(),
                })
            }
        }
    }

    /// Returns what differs between the run in this folder and one with these keys and files, if the record has it.
    /// LoRA's keys are not in the record.
    pub fn difference(&self, asked: &Map<String, Value>, data: &[source::File]) -> Option<String> {
        const SHOWN_MAX: usize = 3;
        const ELSEWHERE: [&str; 4] = ["cache", "token_cache", "data", "evaluation_data"];
        let record = self.record.as_ref()?;
        let keys: BTreeSet<&String> = record.asked.keys().chain(asked.keys()).collect();
        let keys = keys.into_iter().filter(|key| !ELSEWHERE.contains(&key.as_str()));
        let other = keys.filter(|key| record.asked.get(*key) != asked.get(*key));
        let mut found: Vec<String> = other
            .map(|key| format!("{key} was {} and is {}", shown(record.asked.get(key)), shown(asked.get(key))))
            .collect();
        let before: Vec<&str> = record.data.iter().map(|file| file.sha256.as_str()).collect();
        let new: Vec<&source::File> =
            data.iter().filter(|file| !before.contains(&file.sha256.as_str())).collect();
        match new.first() {
            Some(first) => {
                found.push(format!("{} of {} data files are new: {}", new.len(), data.len(), first.name));
            }
            None if data.len() != before.len() => {
                found.push(format!("the data were {} files and are {}", before.len(), data.len()));
            }
            None => {}
        }
        let more = found.len().saturating_sub(SHOWN_MAX);
        found.truncate(SHOWN_MAX);
        let more = if more > 0 { format!("; and {more} more") } else { String::new() };
        (!found.is_empty()).then(|| found.join("; ") + &more)
    }

    /// Records the keys that the run was given.
    pub fn remember(&mut self, asked: &Map<String, Value>) -> Result<()> {
        match self.record.clone() {
            Some(record) if record.asked != *asked => self.save(Record { asked: asked.clone(), ..record }),
            _ => Ok(()),
        }
    }

    fn remove(&self, name: &str) -> Result<()> {
        let path = self.path.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Fault::storage("remove", &path, &error)),
            _ => Ok(()),
        }
    }

    /// Moves an earlier run's files, each by a rename. If this is interrupted, the next start moves the rest to the
    /// same place.
    fn move_away(&self) -> Result<()> {
        let started = self.record.as_ref().map_or_else(now, |record| record.started);
        let to = self.path.join(EARLIER).join(words::date(UNIX_EPOCH + Duration::from_secs(started), DATE));
        fs::create_dir_all(&to).map_err(|error| Fault::storage("create", &to, &error))?;
        for name in OWN.iter().filter(|name| self.path.join(name).exists()) {
            let place = self.path.join(name);
            fs::rename(&place, to.join(name)).map_err(|error| Fault::storage("move", &place, &error))?;
        }
        Ok(())
    }

    /// Returns the name of a result of value that a run left, if there is one.
    fn kept(&self) -> Option<&'static str> {
        let exists = |name: &str| self.path.join(name).exists();
        let is_whole = |entry: fs::DirEntry| !entry.file_name().to_string_lossy().starts_with('.');
        let checkpoints = || fs::read_dir(self.path.join(CHECKPOINTS)).into_iter().flatten().flatten();
        match () {
            () if WHOLE.iter().any(|name| exists(name)) => Some("the adapter"),
            () if checkpoints().any(is_whole) => Some("a checkpoint"),
            () => None,
        }
    }

    /// Returns the result of training, if an earlier start finished it.
    pub fn trained(&self) -> Option<Trained> {
        let record = self.record.as_ref()?;
        let whole = WHOLE.iter().all(|name| self.path.join(name).exists());
        serde_json::from_value(record.trained.clone()?).ok().filter(|_| whole)
    }

    /// Returns the place of this run's checkpoints; creates the folder.
    pub fn checkpoints(&self) -> Result<Checkpoints> {
        let folder = self.path.join(CHECKPOINTS);
        fs::create_dir_all(&folder).map_err(|error| Fault::storage("create", &folder, &error))?;
        let fingerprint = self.record.as_ref().map_or_else(String::new, |record| record.fingerprint.clone());
        Ok(Checkpoints { folder, fingerprint })
    }

    /// Removes all checkpoints.
    pub fn remove_checkpoints(&self) -> Result<()> {
        let folder = self.path.join(CHECKPOINTS);
        fs::remove_dir_all(&folder).map_err(|error| Fault::storage("remove", &folder, &error))
    }

    /// Opens `metrics.jsonl` to append `next` and later lines. Lines that an interrupted start wrote from there on
    /// are dropped.
    pub fn metrics(&self, next: &Metric) -> Result<Metrics> {
        let next = (next.step(), matches!(next, Metric::Evaluation { .. }));
        let path = self.path.join(METRICS);
        let earlier = match plain::read(&path, METRICS_BYTES_MAX) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(Fault::storage("read", &path, &error));
            }
            read => read.unwrap_or_default(),
        };
        let kept: String = String::from_utf8_lossy(&earlier)
            .lines()
            .filter(|line| place_of(line).is_some_and(|place| place < next))
            .map(|line| format!("{line}\n"))
            .collect();
        self.write(METRICS, kept.as_bytes())?;
        let file = File::options().append(true).custom_flags(libc::O_NOFOLLOW).open(&path);
        Ok(Metrics { file: file.map_err(|error| Fault::storage("write", &path, &error))?, path })
    }

    /// Writes a file atomically: temporary name, sync, rename.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        whole::write(&self.path.join(name), content)
    }

    /// Returns whether no run was here before.
    pub fn is_fresh(&self) -> bool {
        self.record.is_none()
    }

    /// Returns the values that identify the run to which the folder belongs.
    pub fn fingerprint(&self) -> &str {
        self.record.as_ref().map_or("", |record| &record.fingerprint)
    }

    /// Records the end of training, then writes the sentinel.
    pub fn finish(&mut self, trained: &Trained) -> Result<()> {
        let mut record =
            self.record.clone().ok_or_else(|| Fault::internal("a run without a record ended"))?;
        record.trained = Some(serde_json::to_value(trained).expect("numbers"));
        self.save(record)?;
        self.write(
            SENTINEL,
            format!("Fine-Tuning completed at {}\n", words::date(SystemTime::now(), DATE)).as_bytes(),
        )
    }

    /// Records the places that the adapter was sent to.
    pub fn published(&mut self, published: &[Published]) -> Result<()> {
        let mut record =
            self.record.clone().ok_or_else(|| Fault::internal("a run without a record was pushed"))?;
        let image = published.iter().find(|place| place.image);
        if let Some(image) = image {
            record.image = Some(PushedImage {
                reference: image.destination.clone(),
                digest: image.revision.clone().unwrap_or_default(),
            });
        }
        record.published = published.to_vec();
        self.save(record)
    }

    fn save(&mut self, record: Record) -> Result<()> {
        self.write(RECORD, &serde_json::to_vec_pretty(&record).expect("texts and numbers"))?;
        self.record = Some(record);
        Ok(())
    }
}

/// A value of a key for a message.
fn shown(value: Option<&Value>) -> String {
    const LETTERS_MAX: usize = 60;
    let text = value.map_or("unset".to_owned(), Value::to_string);
    match text.char_indices().nth(LETTERS_MAX) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}

/// Writes the run's metrics, one line at a time.
pub struct Metrics {
    file: File,
    path: PathBuf,
}

impl Metrics {
    /// Appends a line.
    pub fn log(&mut self, metric: &Metric) -> Result<()> {
        let line = format!("{}\n", serde_json::to_string(metric).expect("numbers"));
        self.file.write_all(line.as_bytes()).map_err(|error| Fault::storage("write", &self.path, &error))
    }
}

/// Takes the folder's lock. A killed process holds it until the kernel has cleaned up; a process on another node,
/// until that node's lease ends.
fn lock(folder: &Path, wait_max: Duration) -> Result<File> {
    let path = folder.join(LOCK);
    let not_ours = |what: &str| {
        Fault::config(format!("{} is {what}; expected a plain file that hone wrote", path.display()))
            .help("remove it: nothing is lost with it")
    };
    if fs::symlink_metadata(&path).is_ok_and(|found| !found.is_file()) {
        return Err(not_ours("a link, a folder or a pipe"));
    }
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(&path)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::ELOOP) => not_ours("a link"),
            _ => Fault::storage("write in", folder, &error),
        })?;
    let until = Instant::now() + wait_max;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < until => {
                interrupt::check()?;
                std::thread::sleep(LOCK_POLL);
            }
            Err(TryLockError::WouldBlock) => {
                return Err(Fault::new(
                    Kind::Storage,
                    format!("{} is still in use by another hone after {wait_max:?}", folder.display()),
                )
                .help("start it again when the other one has ended, or use another output folder"));
            }
            Err(TryLockError::Error(error)) => return Err(Fault::storage("lock", folder, &error)),
        }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// Returns the step of a line, and whether the line is the step's evaluation, which follows the step's own line.
fn place_of(line: &str) -> Option<(u64, bool)> {
    let line: serde_json::Value = serde_json::from_str(line).ok()?;
    Some((line.get("step")?.as_u64()?, line.get("eval_loss").is_some()))
}

fn read_record(path: &Path) -> Result<Option<Record>> {
    let file = path.join(RECORD);
    // Reading a pipe would never end, and a link leads to a file outside of the folder.
    if fs::symlink_metadata(&file).is_ok_and(|found| !found.is_file()) {
        return Err(Fault::config(format!("{}: not a plain file", file.display()))
            .help("use another output folder, or remove this one"));
    }
    match fs::read(&file) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| {
            Fault::config(format!("{}: not a record of hone: {error}", file.display()))
                .help("use another output folder, or remove this one")
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Fault::storage("read", &file, &error)),
    }
}

/// Returns whether a plain file begins with this text.
fn begins_with(file: &Path, text: &str) -> bool {
    let mut start = vec![0; text.len()];
    let is_plain = fs::symlink_metadata(file).is_ok_and(|found| found.is_file());
    is_plain
        && File::open(file).and_then(|mut file| file.read_exact(&mut start)).is_ok()
        && start == text.as_bytes()
}

/// Refuses a folder with other files. An empty folder may hold what file systems and hone itself leave: hidden files,
/// lost+found, and the empty metrics file that earlier versions wrote before the record.
fn refuse_foreign(path: &Path) -> Result<()> {
    let entries = fs::read_dir(path).map_err(|error| Fault::storage("read", path, &error))?;
    let is_bare = |entry: &fs::DirEntry| {
        entry.file_name() == METRICS
            && entry.metadata().is_ok_and(|found| found.is_file() && found.len() == 0)
    };
    // A start that ended before its record left its report, or what was to become one.
    let reported = begins_with(&path.join(REPORT), REPORT_MARK)
        || begins_with(&path.join(REPORT_FACTS), REPORT_FACTS_MARK);
    let is_report = |entry: &fs::DirEntry| {
        reported && [REPORT, REPORT_FACTS, TIMELINE].iter().any(|name| entry.file_name() == *name)
    };
    let entries = entries.flatten().filter(|entry| !is_bare(entry) && !is_report(entry));
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut foreign: Vec<String> =
        names.filter(|name| !name.starts_with('.') && name != "lost+found").collect();
    foreign.sort();
    match foreign.is_empty() {
        true => Ok(()),
        false => Err(Fault::config(format!(
            "the output folder {} holds files that are not hone's: {}",
            path.display(),
            foreign.iter().take(4).cloned().collect::<Vec<_>>().join(", ")
        ))
        .help("use another output folder: nothing in this one is touched")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trained() -> Trained {
        Trained {
            steps: 3,
            loss: 1.0,
            first_loss: 2.0,
            train_loss: 1.5,
            eval_loss: None,
            tokens: 10,
            seconds: 1.0,
            tokens_per_second: 10.0,
            resumed_at: None,
            best: None,
            restored_step: None,
            stopped_early: false,
            skipped_steps: 0,
        }
    }

    #[test]
    fn a_run_finds_its_folder_again_and_others_are_refused() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("out");
        let mut folder = RunFolder::claim(&path, Earlier::Refuse).unwrap();
        let second = RunFolder::claim_within(&path, Earlier::Refuse, Duration::from_millis(150)).unwrap_err();
        assert!(second.message.contains("in use") && second.kind.retry_helps(), "{second}");
        folder.belongs_to("mistaken", &[]).unwrap();
        folder.belongs_to("a", &[]).unwrap();
        folder.write(crate::adapter::CONFIG_FILE, b"{}").unwrap();
        folder.write(crate::adapter::WEIGHTS_FILE, b"").unwrap();
        folder.finish(&trained()).unwrap();
        drop(folder);
        let mut again = RunFolder::claim(&path, Earlier::Refuse).unwrap();
        assert_eq!(again.trained(), Some(trained()));
        assert!(again.belongs_to("b", &[]).unwrap_err().message.contains("the adapter of another run"));
        drop(again);
        fs::remove_file(path.join(SENTINEL)).unwrap();
        assert_eq!(
            RunFolder::claim(&path, Earlier::Refuse).unwrap().trained(),
            None,
            "without its last file it is not finished"
        );
    }

    #[test]
    fn results_of_another_run_move_when_that_is_asked() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path();
        fs::write(path.join("thesis.tex"), "x").unwrap();
        let mut folder = RunFolder::claim(path, Earlier::Move).unwrap();
        folder.belongs_to("a", &[]).unwrap();
        folder.write(crate::adapter::CONFIG_FILE, b"{}").unwrap();
        folder.write(crate::adapter::WEIGHTS_FILE, b"a").unwrap();
        folder.finish(&trained()).unwrap();
        let started = words::date(folder.started(), DATE);
        drop(folder);
        let mut folder = RunFolder::claim(path, Earlier::Move).unwrap();
        folder.belongs_to("a", &[]).unwrap();
        assert!(folder.trained().is_some(), "the same run finds its results");
        folder.belongs_to("b", &[]).unwrap();
        assert_eq!((folder.trained(), folder.kept()), (None, None));
        let moved = path.join(EARLIER).join(started);
        assert_eq!(fs::read(moved.join(crate::adapter::WEIGHTS_FILE)).unwrap(), b"a");
        assert!(moved.join(SENTINEL).exists() && path.join("thesis.tex").exists());
        assert!(!path.join(SENTINEL).exists(), "no one takes the old adapter for the new one");
    }

    #[test]
    fn a_folder_with_other_files_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("thesis.tex"), "x").unwrap();
        let fault = RunFolder::claim(folder.path(), Earlier::Refuse).unwrap_err();
        assert!(fault.message.contains("hone's: thesis.tex"), "{fault}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_start_that_ended_before_its_record_is_no_foreign_folder() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(METRICS), "").unwrap();
        fs::write(folder.path().join(".tmpAb12Cd"), "{").unwrap();
        fs::write(folder.path().join(REPORT_FACTS), "{\n  \"hone\": \"0.1.0\",\n").unwrap();
        fs::write(folder.path().join(TIMELINE), "").unwrap();
        let mut run = RunFolder::claim(folder.path(), Earlier::Refuse).unwrap();
        assert!(!folder.path().join(".tmpAb12Cd").exists(), "a leftover is collected");
        run.belongs_to("a", &[]).unwrap();
        drop(run);
        fs::remove_file(folder.path().join(RECORD)).unwrap();
        fs::write(folder.path().join(METRICS), "{}").unwrap();
        let fault = RunFolder::claim(folder.path(), Earlier::Refuse).unwrap_err();
        assert!(fault.message.contains("hone's: metrics.jsonl"), "somebody's measurements: {fault}");
    }

    #[test]
    fn the_record_comes_before_anything_else_and_old_metrics_go_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let mut run = RunFolder::claim(folder.path(), Earlier::Refuse).unwrap();
        run.belongs_to("mistaken", &[]).unwrap();
        let names = || fs::read_dir(folder.path()).unwrap().flatten().map(|entry| entry.file_name());
        assert!(names().all(|name| name == RECORD || name == LOCK), "{:?}", names().collect::<Vec<_>>());
        fs::write(folder.path().join(METRICS), "{\"step\":1,\"loss\":9.0}\n").unwrap();
        run.belongs_to("corrected", &[]).unwrap();
        assert!(!folder.path().join(METRICS).exists(), "another run's lines");
    }

    #[test]
    fn what_a_run_was_given_and_where_its_adapter_went_is_remembered() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("out");
        assert!(read_record(&parent.path().join("no folder")).unwrap().is_none());
        let mut run = RunFolder::claim(&path, Earlier::Refuse).unwrap();
        assert!(run.is_fresh());
        run.belongs_to("a", &[]).unwrap();
        let asked = serde_json::json!({"LoraConfig.r": 4}).as_object().unwrap().clone();
        run.remember(&asked).unwrap();
        let inode = || std::os::unix::fs::MetadataExt::ino(&fs::metadata(path.join(RECORD)).unwrap());
        let written = inode();
        run.remember(&asked).unwrap();
        assert_eq!(inode(), written, "what is known is not written again");
        let place = |destination: &str, image| Published {
            destination: destination.into(),
            revision: Some("sha256:1".into()),
            image,
        };
        run.published(&[place("hf://org/a", false), place("host/a:v1", true)]).unwrap();
        drop(run);
        let again = RunFolder::claim(&path, Earlier::Refuse).unwrap();
        assert!(!again.is_fresh());
        let record = Record::of(&path).unwrap().unwrap();
        assert_eq!((record.asked, record.published.len()), (asked, 2));
        let image = record.image.unwrap();
        assert_eq!((image.reference.as_str(), image.digest.as_str()), ("host/a:v1", "sha256:1"));
        let age = SystemTime::now().duration_since(again.started()).unwrap();
        assert!(age < Duration::from_secs(600), "{age:?}");
    }

    #[test]
    fn what_differs_from_the_run_in_the_folder_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let mut run = RunFolder::claim(folder.path(), Earlier::Refuse).unwrap();
        let keys = |value: Value| value.as_object().unwrap().clone();
        let rows = |sha256: &str| source::File {
            path: "rows".into(),
            name: "rows".into(),
            bytes: 1,
            sha256: sha256.into(),
            entry: 0,
        };
        let asked = keys(serde_json::json!({"a": 1, "b": "x", "cache": "/c"}));
        run.belongs_to("f", &[rows("1")]).unwrap();
        run.remember(&asked).unwrap();
        assert_eq!(run.difference(&asked, &[rows("1")]), None);
        let other = keys(serde_json::json!({"a": 2, "c": true, "cache": "/d"}));
        let said = |asked, data: &[source::File]| run.difference(asked, data).unwrap();
        let of_keys = "a was 1 and is 2; b was \"x\" and is unset; c was unset and is true";
        assert_eq!(said(&other, &[rows("1")]), of_keys);
        assert_eq!(said(&other, &[rows("2")]), format!("{of_keys}; and 1 more"));
        assert_eq!(said(&asked, &[rows("2")]), "1 of 1 data files are new: rows");
        assert_eq!(said(&asked, &[]), "the data were 1 files and are 0");
    }

    #[test]
    fn a_folder_that_is_let_go_in_time_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let first = RunFolder::claim(folder.path(), Earlier::Refuse).unwrap();
        std::thread::scope(|scope| {
            let second = scope
                .spawn(|| RunFolder::claim_within(folder.path(), Earlier::Refuse, Duration::from_secs(60)));
            std::thread::sleep(LOCK_POLL * 3);
            drop(first);
            second.join().unwrap().unwrap();
        });
    }

    /// A file that cannot be read or removed is reported, never taken for a missing one.
    #[test]
    fn what_stands_in_the_place_of_an_own_file_is_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(read_record(file.path()).unwrap_err().message.starts_with("cannot read "));
        let folder = tempfile::tempdir().unwrap();
        let mut run = RunFolder::claim(folder.path(), Earlier::Refuse).unwrap();
        let next = Metric::Evaluation {
            step: 2,
            epoch: 1.0,
            eval_loss: 0.5,
            eval_perplexity: 2.0,
            eval_mean_token_accuracy: 0.25,
            sources: Default::default(),
        };
        run.metrics(&next).unwrap();
        fs::remove_file(folder.path().join(METRICS)).unwrap();
        fs::create_dir(folder.path().join(METRICS)).unwrap();
        assert!(run.metrics(&next).map(drop).unwrap_err().message.starts_with("cannot read "));
        assert!(run.belongs_to("a", &[]).unwrap_err().message.starts_with("cannot remove "));
    }

    #[test]
    fn what_somebody_planted_is_never_followed() {
        use std::os::unix::fs::symlink;
        let outside = tempfile::NamedTempFile::new().unwrap();
        fs::write(outside.path(), "precious").unwrap();
        let parent = tempfile::tempdir().unwrap();
        let new = |name: &str| {
            let folder = parent.path().join(name);
            fs::create_dir(&folder).unwrap();
            folder
        };
        let locked = new("lock");
        symlink(outside.path(), locked.join(LOCK)).unwrap();
        assert_eq!(RunFolder::claim(&locked, Earlier::Refuse).unwrap_err().kind, Kind::Config);
        let record = new("record");
        symlink(outside.path(), record.join(RECORD)).unwrap();
        assert_eq!(RunFolder::claim(&record, Earlier::Refuse).unwrap_err().kind, Kind::Config);
        let later = new("later");
        let mut run = RunFolder::claim(&later, Earlier::Refuse).unwrap();
        symlink(outside.path(), later.join(RECORD)).unwrap();
        run.belongs_to("a", &[]).unwrap();
        assert!(fs::symlink_metadata(later.join(RECORD)).unwrap().is_file());
        assert_eq!(fs::read_to_string(outside.path()).unwrap(), "precious");
    }

    /// A whole checkpoint is of value; an unfinished one is not.
    #[test]
    fn checkpoints_of_another_run_are_kept_and_unfinished_ones_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let mut run = RunFolder::claim(folder.path(), Earlier::Refuse).unwrap();
        run.belongs_to("a", &[]).unwrap();
        let place = run.checkpoints().unwrap().folder;
        fs::create_dir(place.join(".step-1.partial")).unwrap();
        run.belongs_to("b", &[]).unwrap();
        fs::create_dir(place.join("step-1")).unwrap();
        let fault = run.belongs_to("c", &[]).unwrap_err();
        assert!(fault.message.contains("holds a checkpoint of another run"), "{fault}");
        assert_eq!((run.fingerprint(), run.checkpoints().unwrap().fingerprint.as_str()), ("b", "b"));
        run.remove_checkpoints().unwrap();
        assert!(!place.exists());
        run.belongs_to("c", &[]).unwrap();
    }

    /// Only hone's own names may be empty files or hidden in a folder that is no run's.
    #[test]
    fn an_empty_file_of_another_name_and_a_folder_of_hones_are_foreign() {
        for (name, is_folder) in [("thesis.tex", false), (METRICS, true), (REPORT, false)] {
            let folder = tempfile::tempdir().unwrap();
            match is_folder {
                true => fs::create_dir(folder.path().join(name)).unwrap(),
                false => fs::write(folder.path().join(name), "").unwrap(),
            }
            let fault = RunFolder::claim(folder.path(), Earlier::Refuse).unwrap_err();
            assert!(fault.message.contains(&format!("hone's: {name}")), "{name}: {fault}");
        }
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("lost+found")).unwrap();
        fs::write(folder.path().join(REPORT), format!("{REPORT_MARK}...")).unwrap();
        RunFolder::claim(folder.path(), Earlier::Refuse).unwrap();
        // Files beside hone's own report, and a report of somebody else's.
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(REPORT), format!("{REPORT_MARK}...")).unwrap();
        fs::write(folder.path().join("thesis.tex"), "").unwrap();
        let fault = RunFolder::claim(folder.path(), Earlier::Refuse).unwrap_err();
        assert!(fault.message.contains("hone's: thesis.tex"), "{fault}");
        fs::remove_file(folder.path().join("thesis.tex")).unwrap();
        fs::write(folder.path().join(REPORT), "a".repeat(2 * REPORT_MARK.len())).unwrap();
        let fault = RunFolder::claim(folder.path(), Earlier::Refuse).unwrap_err();
        assert!(fault.message.contains("hone's: report.html"), "{fault}");
    }

    #[test]
    fn an_output_that_is_a_file_is_a_mistake_of_the_configuration() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(RunFolder::claim(file.path(), Earlier::Refuse).unwrap_err().kind, Kind::Config);
    }

    #[test]
    fn metrics_after_the_resumed_step_are_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunFolder::claim(folder.path(), Earlier::Refuse).unwrap();
        let before = "{\"step\":1}\n{\"step\":2}\n{\"step\":2,\"eval_loss\":9.0}\n{\"step\":3";
        fs::write(folder.path().join(METRICS), before).unwrap();
        let (eval_perplexity, eval_mean_token_accuracy) = (2.0, 0.25);
        let next = Metric::Evaluation {
            step: 2,
            epoch: 1.0,
            eval_loss: 0.5,
            eval_perplexity,
            eval_mean_token_accuracy,
            sources: Default::default(),
        };
        run.metrics(&next).unwrap().log(&next).unwrap();
        let text = fs::read_to_string(folder.path().join(METRICS)).unwrap();
        assert_eq!(
            text,
            "{\"step\":1}\n{\"step\":2}\n{\"step\":2,\"epoch\":1.0,\"eval_loss\":0.5,\"eval_perplexity\":2.0,\"eval_mean_token_accuracy\":0.25}\n"
        );
    }
}
