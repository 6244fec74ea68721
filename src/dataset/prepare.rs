//! Data files of any size -> examples to train on and to evaluate on, through the token cache.
//!
//! Rows are read in the order of their files, become tokens on all cores, and go to the store as they come; memory
//! holds a few parts of them. Limits, shuffle, split and weights then work on the rows' numbers, by the same code as
//! for records in memory, so that the examples and their order are the same as if all rows had been in memory.

use super::budget::Budget;
use super::cache::{self, Cache, Ours, Place, Whole};
use super::encode::{Encoded, Outcome, Workers};
use super::store::{Bytes, Content, Digested, Drain, Drained, Note, Store, Writer, Written};
use super::stream::{self, Found, Part};
use super::{
    BadRows, Example, Layout, Options, Record, Share, TokenOptions, Tokenizer, footer, mix, rows_read, split,
};
use crate::fault::{Fault, Kind, Result};
use crate::interrupt;
use crate::machine;
use crate::report::{Event, Progress, Report, Sink, Stage, Task, Unit};
use crate::source;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

/// Format of the store and of its record.
const VERSION: u32 = 2;
/// Digest of the source that makes tokens (`build.rs`): another program does not use this one's tokens.
const CODE: &str = env!("HONE_DATA_CODE");
/// The amount of text that becomes tokens at once, and the largest number of its rows.
const PART_BYTES: u64 = 8 << 20;
const PART_ROWS: usize = 8192;
/// Parts that are read ahead.
const PARTS_AHEAD: usize = 1;
/// Bytes of the store between two looks at the free space.
const LOOK_BYTES: u64 = 64 << 20;
/// Share of the memory that is free at the start: without a cache, tokens may take so much of it.
const FREE_SHARE: f64 = 0.8;
/// A token stands for fewer bytes of text than this, except in hostile data. Data that surely does not fit is refused
/// early.
const TOKEN_TEXT_BYTES_MAX: u64 = 16;

/// The place where the tokens of a dataset are kept.
#[derive(Clone, Debug, PartialEq)]
pub enum TokenCache {
    /// In memory, for this run.
    Off,
    /// In a folder, for this run and later ones.
    Folder {
        /// The folder, which is created if it does not exist.
        path: PathBuf,
        /// Whether the user named it. If so, it must be usable; if not, memory replaces it, with a warning.
        named: bool,
    },
}

/// A dataset as tokens.
pub struct Prepared {
    /// The examples to train on, in training order before the epochs' own shuffle.
    pub train: Set,
    /// The examples to evaluate on, in the order of evaluation.
    pub evaluation: Set,
    /// The content of the last entry's rows.
    pub layout: Layout,
    /// Rows that could be read, before any was dropped; a weight repeats them.
    pub rows: usize,
}

/// Examples in their order, which are read as they are needed.
#[derive(Clone)]
pub struct Set {
    store: Arc<Store>,
    files: Arc<[Arc<str>]>,
    /// The entry of `data` that each file belongs to.
    entries: Arc<[usize]>,
    rows: Vec<u32>,
}

impl Set {
    /// Returns the number of examples.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Returns whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Returns the number of tokens of an example.
    pub fn tokens(&self, index: usize) -> usize {
        self.store.line(self.rows[index]).tokens as usize
    }

    /// Returns the number of tokens of an example before it was cut.
    pub fn whole(&self, index: usize) -> usize {
        self.store.line(self.rows[index]).whole as usize
    }

    /// Returns the number of learned tokens of an example, without the first, which nothing predicts.
    pub fn learned(&self, index: usize) -> u64 {
        self.store.tally(self.rows[index]).map_or(0, |tally| tally.learned)
    }

    /// Returns an example's tokens.
    pub fn example(&self, index: usize) -> Example {
        self.store.example(self.rows[index])
    }

    /// Returns the examples of one entry of `data`.
    pub fn of_entry(&self, entry: usize) -> Set {
        let of = |row: &&u32| self.entries[self.store.line(**row).file as usize] == entry;
        Set { rows: self.rows.iter().filter(of).copied().collect(), ..self.clone() }
    }

    /// Returns the place of an example as messages name it: FILE:ROW, counted from 0.
    pub fn place(&self, index: usize) -> String {
        let line = self.store.line(self.rows[index]);
        format!("{}:{}", self.files[line.file as usize], line.row)
    }
}

/// Examples in memory, or in a store.
#[derive(Clone, Copy)]
pub enum Examples<'a> {
    /// A plain list.
    Memory(&'a [Example]),
    /// Examples of a store.
    Stored(&'a Set),
}

impl<'a> Examples<'a> {
    /// Returns the number of examples.
    pub fn len(self) -> usize {
        match self {
            Examples::Memory(list) => list.len(),
            Examples::Stored(set) => set.len(),
        }
    }

    /// Returns whether there is none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Returns the number of tokens of an example.
    pub fn tokens(self, index: usize) -> usize {
        match self {
            Examples::Memory(list) => list[index].ids.len(),
            Examples::Stored(set) => set.tokens(index),
        }
    }

    /// Returns an example.
    pub fn get(self, index: usize) -> Cow<'a, Example> {
        match self {
            Examples::Memory(list) => Cow::Borrowed(&list[index]),
            Examples::Stored(set) => Cow::Owned(set.example(index)),
        }
    }

    /// Begins to read an example from the disk, without waiting for it.
    pub fn will_need(self, index: usize) {
        if let Examples::Stored(set) = self {
            set.store.will_need(set.rows[index]);
        }
    }
}

impl<'a> From<&'a [Example]> for Examples<'a> {
    fn from(list: &'a [Example]) -> Examples<'a> {
        Examples::Memory(list)
    }
}

impl<'a> From<&'a Vec<Example>> for Examples<'a> {
    fn from(list: &'a Vec<Example>) -> Examples<'a> {
        Examples::Memory(list)
    }
}

impl<'a> From<&'a Set> for Examples<'a> {
    fn from(set: &'a Set) -> Examples<'a> {
        Examples::Stored(set)
    }
}

/// Makes tokens of all files, or takes them from the cache, and puts them in order. The result and the reports are
/// those of [`super::read`] and [`super::encode()`].
///
/// # Errors
/// Data: files and rows that cannot be used, or nothing is left to learn. Config: a split that leaves a side empty, no
/// chat template, a cache folder that cannot be used. Capacity: too little space or memory. Storage: the disk fails.
pub fn prepare(
    files: &[source::File],
    options: &Options,
    tokens: &TokenOptions,
    tokenizer: &Tokenizer,
    cache: &TokenCache,
    report: &Report,
) -> Result<Prepared> {
    let work = Work { files, options, tokens, tokenizer, report };
    let (store, told) = work.store(cache)?;
    if told.good + told.bad == 0 {
        return Err(stream::no_rows(files));
    }
    let store = Arc::new(store);
    let rows: Vec<u32> = (0..store.rows()).collect();
    let entry = |row: &u32| files[store.line(*row).file as usize].entry;
    let all = rows.len();
    let of = |row: &u32| (entry(row), store.line(*row).group());
    let (train, evaluation) = split::split(rows, of, options)?;
    let train = mix::weigh(train, entry, options);
    let layout = Layout::of_key(&told.layout)
        .ok_or_else(|| Fault::internal(format!("the token cache names a layout {:?}", told.layout)))?;
    let summary = rows_read(all, layout.name(), files.len(), train.len(), evaluation.len());
    report.note(Stage::Read, summary);
    tell_of_both(files, options, report);
    let rows = train.len() + evaluation.len();
    let set = |rows| work.settled(&store, rows);
    let prepared = Prepared { train: set(train)?, evaluation: set(evaluation)?, layout, rows };
    store.give_back();
    Ok(prepared)
}

/// Warns about files that train and evaluate: such an evaluation says nothing about new rows.
fn tell_of_both(files: &[source::File], options: &Options, report: &Report) {
    let Some(from) = options.evaluation_from else { return };
    let (evaluation, train): (Vec<_>, Vec<_>) = files.iter().partition(|file| file.entry >= from);
    let trains = |file: &&&source::File| train.iter().any(|other| other.sha256 == file.sha256);
    let both: Vec<&str> = evaluation.iter().filter(trains).map(|file| file.name.as_str()).collect();
    if let Some(first) = both.first() {
        report.warn(
            Stage::Read,
            format!(
                "{} of {} files of evaluation_data are in data too ({first}), so that their rows are trained on and say \
                 nothing about new ones; leave them out of data",
                both.len(),
                evaluation.len()
            ),
        );
    }
}

/// The inputs that tokens are made of.
#[derive(Clone, Copy)]
struct Work<'a> {
    files: &'a [source::File],
    options: &'a Options,
    tokens: &'a TokenOptions,
    tokenizer: &'a Tokenizer,
    report: &'a Report,
}

/// The observations of reading beside the rows. A later start that takes the tokens from the cache reports the same
/// again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Told {
    /// The layout's key.
    layout: String,
    good: u64,
    bad: u64,
    /// Names of the files.
    names: Vec<String>,
    /// Notes, and warnings (true).
    said: Vec<(bool, String)>,
}

/// The content of `record`.
#[derive(Serialize, Deserialize)]
struct Contents {
    version: u32,
    tokens: Content,
    lines: Content,
    notes: Vec<Note>,
    told: Told,
}

/// A whole store of the cache, or the reason why it is not usable.
enum Kept {
    Sound(Box<(Store, Told)>),
    Damaged,
}

impl Work<'_> {
    fn store(&self, cache: &TokenCache) -> Result<(Store, Told)> {
        let TokenCache::Folder { path, named } = cache else { return self.in_memory() };
        let cache = match Cache::open(path) {
            Ok(cache) => cache,
            Err(fault) if *named || interrupt::requested() => return Err(fault),
            Err(fault) => {
                let why = fault.message;
                self.report.warn(
                    Stage::Tokenize,
                    format!("the token cache cannot be used, so that tokens are kept in memory: {why}"),
                );
                return self.in_memory();
            }
        };
        loop {
            match cache.claim(&self.key(), self.report)? {
                Place::Ours(ours) => return self.fill(&cache, ours),
                Place::Whole(whole) => {
                    if let Kept::Sound(found) = self.kept(&whole)? {
                        let (store, told) = *found;
                        return Ok((store.locked(whole.lock), told));
                    }
                    self.report.warn(
                        Stage::Tokenize,
                        format!(
                            "{}: the token cache is damaged; it is removed and made again",
                            whole.folder.display()
                        ),
                    );
                    cache.discard(whole)?;
                }
            }
        }
    }

    /// Returns the key of the store. Equal keys mean equal stores.
    fn key(&self) -> String {
        let mut options = Options { train_share: 1.0, evaluation_from: None, ..self.options.clone() };
        options.shares.iter_mut().for_each(|share| (share.weight, share.name) = (None, None));
        if self.options.evaluation_from.is_some() {
            options.group_column = None; // It is not read.
        }
        if options.shares.iter().all(|share| *share == Share::default()) {
            options.shares.clear();
        }
        if options.shares.iter().all(|share| share.limit.is_none()) {
            (options.shuffle, options.seed) = (false, 0); // They choose no rows.
        }
        let mut parts = vec![
            format!("{VERSION} {CODE}"),
            format!("{options:?}"),
            format!("{:?}", self.tokens),
            self.tokenizer.digest().to_owned(),
        ];
        let given = self.tokens.chat_template.as_deref();
        for template in self.tokenizer.template_texts().chain(given) {
            parts.extend(super::template::dates(template, self.tokenizer.now()));
        }
        for file in self.files {
            // The ending of a name chooses the container.
            let ending = super::container::ending_of(&file.name);
            parts.push(format!("{} {} {ending:?}", file.sha256, file.entry));
        }
        source::digest(parts.join("\n").as_bytes())
    }

    fn in_memory(&self) -> Result<(Store, Told)> {
        let writer = Writer::new(Drain::Memory(Vec::new()), Drain::Memory(Vec::new()));
        let free = machine::memory_available().map_or(u64::MAX, |bytes| (bytes as f64 * FREE_SHARE) as u64);
        let room = |bytes: u64| {
            match bytes <= free {
            true => Ok(()),
            false => Err(Fault::capacity(format!(
                "the tokens take more than {} MB, {FREE_SHARE} of the memory that was free",
                free >> 20
            ))
            .help("name a folder for them with `token_cache`, train on fewer rows, or take a machine with more memory")),
        }
        };
        let (written, told) = self.write(writer, &room)?;
        let bytes = |drained| match drained {
            Drained::Memory(bytes) => Ok(Bytes::Memory(bytes)),
            Drained::File(_) => Err(Fault::internal("tokens in memory went to a file")),
        };
        let store = Store::new(bytes(written.tokens)?, bytes(written.lines)?, written.notes);
        Ok((store.ok_or_else(torn)?, told))
    }

    fn fill(&self, cache: &Cache, ours: Ours) -> Result<(Store, Told)> {
        self.check_space(cache)?;
        let [tokens, lines] = [cache::TOKENS, cache::LINES].map(|name| ours.path(name));
        let create = |path: &Path| Digested::create(path).map_err(|error| unwritable(path, &error));
        let writer = Writer::new(Drain::File(create(&tokens)?), Drain::File(create(&lines)?));
        let looked_at = Mutex::new(0);
        let room = |bytes: u64| {
            let mut last = looked_at.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if bytes < *last + LOOK_BYTES {
                return Ok(());
            }
            *last = bytes;
            cache.make_room(LOOK_BYTES, self.report)
        };
        let (written, told) = self.write(writer, &room)?;
        let content = |drained| match drained {
            Drained::File(content) => Ok(content),
            Drained::Memory(_) => Err(Fault::internal("tokens of the cache stayed in memory")),
        };
        let contents = Contents {
            version: VERSION,
            tokens: content(written.tokens)?,
            lines: content(written.lines)?,
            notes: written.notes,
            told,
        };
        let record = serde_json::to_vec(&contents).expect("plain fields become JSON");
        let (folder, lock) = cache.keep(ours, &record)?;
        let store = mapped(&folder, contents.notes)?.ok_or_else(torn)?;
        Ok((store.locked(lock), contents.told))
    }

    /// Refuses a dataset that surely does not fit, before the work begins. Only parquet's footers show that.
    fn check_space(&self, cache: &Cache) -> Result<()> {
        let entries = self.files.iter().map(|file| file.entry + 1).max().unwrap_or(0);
        let mut paths = vec![Vec::new(); entries];
        self.files.iter().for_each(|file| paths[file.entry].push(file.path.clone()));
        let mut options = self.options.clone();
        options.shares.iter_mut().for_each(|share| share.weight = None);
        // Files and columns that cannot be read are reported when they are read.
        let Ok(Some(found)) = footer::footers(&paths, &options) else { return Ok(()) };
        let most = found.rows.saturating_mul(self.tokens.tokens_max as u64);
        let tokens = (found.text_bytes / TOKEN_TEXT_BYTES_MAX).min(most);
        match tokens.saturating_mul(4) {
            0..LOOK_BYTES => Ok(()),
            bytes => cache.make_room(bytes, self.report),
        }
    }

    /// Verifies a store of the cache and repeats the reports of the time when it was made.
    fn kept(&self, whole: &Whole) -> Result<Kept> {
        let Ok(contents) = serde_json::from_slice::<Contents>(&whole.record) else {
            return Ok(Kept::Damaged);
        };
        if contents.version != VERSION || contents.told.names.len() != self.files.len() {
            return Ok(Kept::Damaged);
        }
        for (name, content) in [(cache::TOKENS, &contents.tokens), (cache::LINES, &contents.lines)] {
            let path = whole.folder.join(name);
            match content.is_at(&path, interrupt::requested) {
                Ok(true) => {}
                _ if interrupt::requested() => return Err(interrupt::stopped()),
                Ok(false) => return Ok(Kept::Damaged),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Kept::Damaged),
                Err(error) => return Err(Fault::storage("read", &path, &error)),
            }
        }
        let Some(store) = mapped(&whole.folder, contents.notes)? else { return Ok(Kept::Damaged) };
        let mut told = contents.told;
        self.renamed(&mut told);
        for (warns, text) in &told.said {
            match warns {
                true => self.report.warn(Stage::Read, text.as_str()),
                false => self.report.note(Stage::Read, text.as_str()),
            }
        }
        let rows = store.rows();
        self.report.note(
            Stage::Tokenize,
            format!("the tokens of {rows} rows are taken from {}", whole.folder.display()),
        );
        Ok(Kept::Sound(Box::new((store, told))))
    }

    /// Replaces the files' names, since the same bytes may have another name by now.
    fn renamed(&self, told: &mut Told) {
        for (file, name) in self.files.iter().zip(&told.names).filter(|(file, name)| file.name != **name) {
            for (_, text) in &mut told.said {
                *text = text.replace(&format!("{name}:"), &format!("{}:", file.name));
            }
        }
    }

    /// Reads rows, makes tokens and writes them, in parallel. `room` receives the bytes written so far and may end the
    /// work.
    fn write(&self, writer: Writer, room: &(dyn Fn(u64) -> Result<()> + Sync)) -> Result<(Written, Told)> {
        let chosen = self.chosen()?;
        let left = chosen.as_ref().map(|numbers| numbers.len() as u64);
        let (send, receive) = sync_channel::<Vec<Record>>(PARTS_AHEAD);
        let task = self.report.task(Stage::Tokenize, Unit::Rows, "rows", None);
        let (read, written) = std::thread::scope(|scope| {
            let task = &task;
            let write = std::thread::Builder::new()
                .name("tokens".into())
                .spawn_scoped(scope, move || self.encode(receive, writer, room, task));
            let write = match write {
                Ok(write) => write,
                Err(error) => {
                    let fault = Fault::machine("start a thread to make tokens in", &error);
                    return (Err(fault.clone()), Err(fault));
                }
            };
            let read = self.read(chosen, send);
            let written = write.join();
            (read, written.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        drop(task);
        interrupt::check()?;
        // If the writer failed, the reader only found that nobody receives.
        let written = match (read, written) {
            (Ok(found), Ok(written)) => (found, written),
            (_, Err(fault)) | (Err(fault), Ok(_)) => return Err(fault),
        };
        let (found, written) = written;
        Ok((written, self.told(found, left)?))
    }

    /// Returns numbers of the rows that limits leave, among all that can be used; `None` without limits. They need a
    /// reading of their own, since they are chosen among the rows of a whole entry.
    fn chosen(&self) -> Result<Option<Vec<u32>>> {
        if self.options.shares.iter().all(|share| share.limit.is_none()) {
            return Ok(None);
        }
        let mut entries: Vec<(u32, usize)> = Vec::new();
        let budget = Budget::streamed(self.files);
        stream::stream(self.files, self.options, budget, &Report::silent(), &mut |part| {
            let from = entries.len() as u32;
            let numbered = part.records.iter().zip(from..).map(|(record, number)| (number, record.entry));
            entries.extend(numbered);
            interrupt::check()
        })?;
        let kept = mix::limit(entries, |(_, entry)| *entry, self.options);
        Ok(Some(kept.into_iter().map(|(number, _)| number).collect()))
    }

    /// Hands on the records in parts of some megabytes.
    fn read(&self, chosen: Option<Vec<u32>>, send: SyncSender<Vec<Record>>) -> Result<Found<'_>> {
        let mut chosen = chosen.map(|numbers| numbers.into_iter().peekable());
        let (mut records, mut bytes, mut number) = (Vec::new(), 0, 0_u32);
        let budget = Budget::streamed(self.files);
        let hand_on = |records: &mut Vec<Record>| {
            send.send(std::mem::take(records)).map_err(|_| Fault::internal("nobody makes tokens of the rows"))
        };
        let found = stream::stream(self.files, self.options, budget, self.report, &mut |part: Part| {
            interrupt::check()?;
            if part.bad > 0 && self.options.bad_rows == BadRows::Refuse {
                records.clear(); // The run will be refused; only the counts are still wanted.
                return Ok(());
            }
            bytes += part.bytes;
            for record in part.records {
                let wanted = chosen.as_mut().is_none_or(|chosen| chosen.next_if_eq(&number).is_some());
                number = number.saturating_add(1);
                records.extend(wanted.then_some(record));
            }
            if bytes >= PART_BYTES || records.len() >= PART_ROWS {
                bytes = 0;
                hand_on(&mut records)?;
            }
            Ok(())
        })?;
        hand_on(&mut records)?;
        Ok(found)
    }

    fn encode(
        &self,
        receive: Receiver<Vec<Record>>,
        mut writer: Writer,
        room: &(dyn Fn(u64) -> Result<()> + Sync),
        task: &Task,
    ) -> Result<Written> {
        let mut workers = Workers::new(self.tokenizer, self.tokens)?;
        for records in receive {
            let encoded = workers.encode(&records, &|rows| task.advance(rows))?;
            interrupt::check()?;
            for (record, found) in records.iter().zip(&encoded) {
                self.push(&mut writer, record, found)?;
            }
            room(writer.bytes())?;
        }
        writer.finish().map_err(|error| unwritten(&error))
    }

    fn push(
        &self,
        writer: &mut Writer,
        record: &Record,
        found: &std::result::Result<Encoded, String>,
    ) -> Result<()> {
        // Files are few, and rows of one file stand together.
        let same = |file: &source::File| file.entry == record.entry && *file.name == *record.file;
        let file = self.files.iter().position(same).expect("the record was read from one of them");
        writer.push(file as u32, record.row, record.group, found).map_err(|error| unwritten(&error))
    }

    /// Settles the rows that could not be read, and keeps the reports that this makes. `left`: the number of rows that
    /// limits leave.
    fn told(&self, found: Found, left: Option<u64>) -> Result<Told> {
        let heard = Arc::new(Heard { inner: self.report.clone(), said: Mutex::default() });
        let report = Report::new(heard.clone());
        let (good, bad) = (left.unwrap_or(found.good), found.problems.rows());
        let advice = "correct these rows";
        found.problems.settle(good + bad, self.options.bad_rows, advice, Stage::Read, &report)?;
        found.reading.tell(&report);
        let said = heard.said.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        let layout = found.format.map_or(String::new(), |format| format.layout.key().to_owned());
        let names = self.files.iter().map(|file| file.name.clone()).collect();
        Ok(Told { layout, good, bad, names, said })
    }

    /// Reports counts, warnings and refusals of a set. Returns its remaining examples.
    fn settled(&self, store: &Arc<Store>, mut rows: Vec<u32>) -> Result<Set> {
        let files: Arc<[Arc<str>]> = self.files.iter().map(|file| Arc::from(file.name.as_str())).collect();
        let mut outcome = Outcome::default();
        for &row in &rows {
            match store.tally(row) {
                Ok(tally) => outcome.add(&tally),
                Err(problem) => {
                    let line = store.line(row);
                    outcome.refuse(&files[line.file as usize], line.row, problem.to_owned());
                }
            }
        }
        outcome.settle(self.tokens, self.tokenizer, self.report)?;
        rows.retain(|&row| store.line(row).tokens > 0);
        let entries = self.files.iter().map(|file| file.entry).collect();
        Ok(Set { store: store.clone(), files, entries, rows })
    }
}

/// Passes events on and keeps notes and warnings.
struct Heard {
    inner: Report,
    said: Mutex<Vec<(bool, String)>>,
}

impl Sink for Heard {
    fn event(&self, event: &Event) {
        let said = match event {
            Event::Warning { text, .. } => Some((true, text.clone())),
            Event::Note { text, .. } => Some((false, text.clone())),
            _ => None,
        };
        self.said.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).extend(said);
        self.inner.say(event.clone());
    }

    fn progress(&self, _: &Progress) {}
}

fn mapped(folder: &Path, notes: Vec<Note>) -> Result<Option<Store>> {
    let bytes = |name: &str| Bytes::mapped(&folder.join(name));
    Ok(Store::new(bytes(cache::TOKENS)?, bytes(cache::LINES)?, notes))
}

fn torn() -> Fault {
    Fault::internal("the tokens that were just written do not fit their rows")
}

fn unwritable(path: &Path, error: &io::Error) -> Fault {
    Fault::storage("create", path, error).help(cache::ELSEWHERE)
}

fn unwritten(error: &io::Error) -> Fault {
    Fault::new(Kind::Storage, format!("cannot write the token cache: {error}")).help(cache::ELSEWHERE)
}
