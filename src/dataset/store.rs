//! Examples in the order of their rows -> two flat files, or memory, and back: the tokens, and a line for each row.
//!
//! A token takes four bytes: its id, and whether it is learned in the highest bit. A row's line has the place of its
//! tokens and the findings of encoding. Tokens are read through a memory map. Its pages are given back as reading goes
//! on, so that the process holds a bounded part of them.

use super::Example;
use super::encode::Encoded;
use super::learned::Tally;
use crate::fault::{Fault, Result};
use crate::plain;
use crate::words;
use memmap2::{Advice, Mmap, UncheckedAdvice};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Set in a token that is learned.
const LEARNED: u32 = 1 << 31;
const TOKEN_BYTES: usize = 4;
/// Bytes of a row's line: the offset of its tokens, its row and its group (8 each); tokens, tokens before cutting,
/// learned, note, file (4 each).
const LINE_BYTES: usize = 3 * 8 + 5 * 4;
/// Bytes that one digest stands for. Digests of parts are checked on all cores.
pub(super) const PART_BYTES: usize = 32 << 20;
/// Bytes that are written at once.
const BUFFER_BYTES: usize = 1 << 20;
/// Bytes mapped by reads after which pages are given back.
const TOUCHED_BYTES_MAX: usize = 128 << 20;
/// Bytes that Linux maps around a page that is read, if the file is in its cache (`fault_around_bytes`).
const AROUND_BYTES: usize = 64 << 10;
/// LIMIT: rows of a store; their numbers have four bytes.
const ROWS_MAX: u64 = u32::MAX as u64;

/// The observations of encoding about a row beside the counts of its line. Equal notes are kept once.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) enum Note {
    /// The counts that most rows have at zero.
    Tally(Tally),
    /// The reason why the row cannot be used.
    Refused(String),
}

/// A row's line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Line {
    at: u64,
    /// Counted from 0 in its file.
    pub row: u64,
    /// Number of its tokens; 0: the row has nothing to learn, or cannot be used.
    pub tokens: u32,
    /// Tokens before cutting.
    pub whole: u32,
    learned: u32,
    note: u32,
    /// The number of the row's file.
    pub file: u32,
    /// Digest of its group; 0: it has none.
    group: u64,
}

impl Line {
    fn bytes(&self) -> [u8; LINE_BYTES] {
        let mut bytes = [0; LINE_BYTES];
        bytes[..8].copy_from_slice(&self.at.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.row.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.group.to_le_bytes());
        let numbers = [self.tokens, self.whole, self.learned, self.note, self.file];
        for (place, number) in bytes[24..].chunks_exact_mut(4).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    fn of(bytes: &[u8; LINE_BYTES]) -> Line {
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let short = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        Line {
            at: long(0),
            row: long(8),
            group: long(16),
            tokens: short(24),
            whole: short(28),
            learned: short(32),
            note: short(36),
            file: short(40),
        }
    }

    /// Returns the digest of the row's group, if it has one.
    pub fn group(&self) -> Option<u64> {
        Some(self.group).filter(|group| *group != 0)
    }
}

/// Bytes that go to a file, or stay in memory.
pub(super) enum Drain {
    /// The bytes, in memory.
    Memory(Vec<u8>),
    File(Digested),
}

/// A file that is written from its beginning, with the digest of each part.
pub(super) struct Digested {
    file: File,
    buffer: Vec<u8>,
    part: Sha256,
    in_part: usize,
    digests: Vec<String>,
    bytes: u64,
}

impl Digested {
    /// Creates the file; it must not exist yet.
    pub fn create(path: &Path) -> io::Result<Digested> {
        let file = File::create_new(path)?;
        let buffer = Vec::with_capacity(2 * BUFFER_BYTES);
        Ok(Digested { file, buffer, part: Sha256::new(), in_part: 0, digests: Vec::new(), bytes: 0 })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut rest = buffer.as_slice();
        while !rest.is_empty() {
            let count = rest.len().min(PART_BYTES - self.in_part);
            self.part.update(&rest[..count]);
            self.in_part += count;
            rest = &rest[count..];
            if self.in_part == PART_BYTES {
                self.end_part();
            }
        }
        self.file.write_all(&buffer)?;
        self.bytes += buffer.len() as u64;
        buffer.clear();
        self.buffer = buffer;
        Ok(())
    }

    fn end_part(&mut self) {
        self.digests.push(words::hex(std::mem::take(&mut self.part).finalize()));
        self.in_part = 0;
    }

    /// Writes everything to the disk.
    fn finish(mut self) -> io::Result<Content> {
        self.flush()?;
        if self.in_part > 0 {
            self.end_part();
        }
        self.file.sync_all()?;
        Ok(Content { bytes: self.bytes, digests: self.digests })
    }
}

/// The content of a written file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Content {
    /// Length of the file.
    pub bytes: u64,
    /// SHA-256 of each part of `PART_BYTES` bytes.
    pub digests: Vec<String>,
}

impl Content {
    /// Returns whether the file at `path` holds this; `stop` is asked between parts.
    pub fn is_at(&self, path: &Path, stop: impl Fn() -> bool + Sync) -> io::Result<bool> {
        let file = match plain::open(path) {
            // A pipe or a device in its place.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(false),
            opened => opened?,
        };
        if file.metadata()?.len() != self.bytes
            || self.digests.len() as u64 != self.bytes.div_ceil(PART_BYTES as u64)
        {
            return Ok(false);
        }
        let same = |(number, digest): (usize, &String)| -> io::Result<bool> {
            if stop() {
                return Ok(false);
            }
            let from = (number * PART_BYTES) as u64;
            let (mut hasher, mut at) = (Sha256::new(), from);
            let end = self.bytes.min(from + PART_BYTES as u64);
            let mut buffer = vec![0; BUFFER_BYTES];
            while at < end {
                let count = BUFFER_BYTES.min((end - at) as usize);
                file.read_exact_at(&mut buffer[..count], at)?;
                hasher.update(&buffer[..count]);
                at += count as u64;
            }
            Ok(words::hex(hasher.finalize()) == *digest)
        };
        let parts: Vec<bool> =
            self.digests.par_iter().enumerate().map(same).collect::<io::Result<Vec<bool>>>()?;
        Ok(parts.into_iter().all(|same| same))
    }
}

/// A store that is being filled.
pub(super) struct Writer {
    tokens: Drain,
    lines: Drain,
    notes: HashMap<Note, u32>,
    rows: u64,
    at: u64,
}

/// A store that was filled.
pub(super) struct Written {
    /// Tokens of all rows, one after another.
    pub tokens: Drained,
    /// One line of fixed length for each row.
    pub lines: Drained,
    /// Notes that lines refer to by number.
    pub notes: Vec<Note>,
}

/// The place that bytes went to.
pub(super) enum Drained {
    Memory(Vec<u8>),
    /// A file, with its length and digests.
    File(Content),
}

impl Writer {
    /// Returns an empty store that writes to these two places.
    pub fn new(tokens: Drain, lines: Drain) -> Writer {
        Writer { tokens, lines, notes: HashMap::new(), rows: 0, at: 0 }
    }

    /// Returns the number of bytes so far.
    pub fn bytes(&self) -> u64 {
        self.at * TOKEN_BYTES as u64 + self.rows * LINE_BYTES as u64
    }

    /// Adds the outcome of a row; the error of `found` describes its fault.
    pub fn push(
        &mut self,
        file: u32,
        row: u64,
        group: Option<u64>,
        found: &std::result::Result<Encoded, String>,
    ) -> io::Result<()> {
        if self.rows >= ROWS_MAX {
            return Err(io::Error::other(format!("more than {ROWS_MAX} rows")));
        }
        let group = group.unwrap_or(0);
        let mut line = Line { at: self.at, row, group, tokens: 0, whole: 0, learned: 0, note: 0, file };
        let note = match found {
            Err(problem) => Note::Refused(problem.clone()),
            Ok(found) => {
                line.whole = found.tally.longest as u32;
                line.learned = found.tally.learned as u32;
                if let Some(example) = &found.example {
                    line.tokens = example.ids.len() as u32;
                    drain(&mut self.tokens, &packed(example))?;
                }
                Note::Tally(Tally { rows: 0, tokens: 0, learned: 0, longest: 0, ..found.tally.clone() })
            }
        };
        let next = self.notes.len() as u32;
        line.note = *self.notes.entry(note).or_insert(next);
        self.at += u64::from(line.tokens);
        self.rows += 1;
        drain(&mut self.lines, &line.bytes())
    }

    /// Writes everything to the disk, if the store is on the disk.
    pub fn finish(self) -> io::Result<Written> {
        let drained = |drain: Drain| match drain {
            Drain::Memory(bytes) => Ok(Drained::Memory(bytes)),
            Drain::File(file) => file.finish().map(Drained::File),
        };
        let mut notes: Vec<(Note, u32)> = self.notes.into_iter().collect();
        notes.sort_by_key(|(_, number)| *number);
        Ok(Written {
            tokens: drained(self.tokens)?,
            lines: drained(self.lines)?,
            notes: notes.into_iter().map(|(note, _)| note).collect(),
        })
    }
}

fn drain(drain: &mut Drain, bytes: &[u8]) -> io::Result<()> {
    match drain {
        Drain::Memory(all) => all.extend_from_slice(bytes),
        Drain::File(file) => file.write(bytes)?,
    }
    Ok(())
}

fn packed(example: &Example) -> Vec<u8> {
    let token = |(id, learned): (&u32, &bool)| (id | if *learned { LEARNED } else { 0 }).to_le_bytes();
    example.ids.iter().zip(&example.supervised).flat_map(token).collect()
}

/// Bytes to read from.
pub(super) enum Bytes {
    Memory(Vec<u8>),
    Mapped(Mmap),
}

impl Bytes {
    /// Returns the file's bytes; they stay readable if the file's name goes away.
    pub fn mapped(path: &Path) -> Result<Bytes> {
        let storage = |error: io::Error| Fault::storage("read", path, &error);
        let file = plain::open(path).map_err(storage)?;
        if file.metadata().map_err(storage)?.len() == 0 {
            return Ok(Bytes::Memory(Vec::new()));
        }
        // SAFETY: the mapping is read-only. A finished store is never written again, only removed; if another program
        // shortens the file meanwhile, a read ends the process with SIGBUS, as for any mapping.
        unsafe { Mmap::map(&file) }.map(Bytes::Mapped).map_err(storage)
    }

    fn get(&self) -> &[u8] {
        match self {
            Bytes::Memory(bytes) => bytes,
            Bytes::Mapped(map) => map,
        }
    }

    fn give_back(&self) {
        if let Bytes::Mapped(map) = self {
            // SAFETY: the map is shared and read-only, so that a page which is given back is read from the file again.
            // A failure only keeps the pages.
            let _ = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
        }
    }
}

/// A filled store. Any number of threads may read it.
pub(super) struct Store {
    tokens: Bytes,
    lines: Bytes,
    notes: Vec<Note>,
    /// Bytes mapped since pages were last given back, at most.
    touched: AtomicUsize,
    /// Held as long as the store is read: keeps other processes from removing its files.
    _lock: Option<File>,
}

impl Store {
    /// Opens a store. `None`: the lines do not fit the tokens and the notes.
    pub fn new(tokens: Bytes, lines: Bytes, notes: Vec<Note>) -> Option<Store> {
        let store = Store { tokens, lines, notes, touched: AtomicUsize::new(0), _lock: None };
        let whole = store.lines.get().len().is_multiple_of(LINE_BYTES);
        (whole && store.fits()).then_some(store)
    }

    /// Returns the same store; its files are locked.
    pub fn locked(self, lock: File) -> Store {
        Store { _lock: Some(lock), ..self }
    }

    fn fits(&self) -> bool {
        let tokens = (self.tokens.get().len() / TOKEN_BYTES) as u64;
        let mut at = 0;
        let follows = (0..self.rows()).all(|row| {
            let line = self.line(row);
            let follows = line.at == at && (line.note as usize) < self.notes.len();
            at += u64::from(line.tokens);
            follows
        });
        self.give_back();
        follows && at == tokens
    }

    /// Returns the number of rows.
    pub fn rows(&self) -> u32 {
        (self.lines.get().len() / LINE_BYTES) as u32
    }

    /// Returns the line of a row.
    pub fn line(&self, row: u32) -> Line {
        let at = row as usize * LINE_BYTES;
        let bytes = self.lines.get()[at..].first_chunk().expect("rows are counted from the lines");
        Line::of(bytes)
    }

    /// Returns the counts of a row; the error says why it cannot be used.
    pub fn tally(&self, row: u32) -> std::result::Result<Tally, &str> {
        let line = self.line(row);
        match &self.notes[line.note as usize] {
            Note::Refused(problem) => Err(problem),
            Note::Tally(tally) => Ok(Tally {
                rows: 1,
                tokens: line.tokens.into(),
                learned: line.learned.into(),
                longest: line.whole as usize,
                ..tally.clone()
            }),
        }
    }

    /// Returns the tokens of a row, and which of them carry loss.
    pub fn example(&self, row: u32) -> Example {
        let bytes = self.packed(&self.line(row));
        let mut example = Example {
            ids: Vec::with_capacity(bytes.len() / TOKEN_BYTES),
            supervised: Vec::with_capacity(bytes.len() / TOKEN_BYTES),
        };
        for token in bytes.as_chunks::<TOKEN_BYTES>().0 {
            let token = u32::from_le_bytes(*token);
            example.ids.push(token & !LEARNED);
            example.supervised.push(token & LEARNED != 0);
        }
        // At most this becomes resident for the tokens, and as much as one read for the line.
        let mapped = bytes.len() / AROUND_BYTES * AROUND_BYTES + 3 * AROUND_BYTES;
        if self.touched.fetch_add(mapped, Ordering::Relaxed) > TOUCHED_BYTES_MAX {
            self.give_back();
        }
        example
    }

    /// Begins to read the row's tokens from the disk, without waiting for them.
    pub fn will_need(&self, row: u32) {
        if let Bytes::Mapped(map) = &self.tokens {
            let line = self.line(row);
            let (from, bytes) = (line.at as usize * TOKEN_BYTES, line.tokens as usize * TOKEN_BYTES);
            // It is a hint: without it the tokens are read when they are needed.
            let _ = map.advise_range(Advice::WillNeed, from, bytes);
        }
    }

    fn packed(&self, line: &Line) -> &[u8] {
        let from = line.at as usize * TOKEN_BYTES;
        &self.tokens.get()[from..from + line.tokens as usize * TOKEN_BYTES]
    }

    /// Gives the maps' pages back to the system; the files' pages may stay in its cache.
    pub fn give_back(&self) {
        self.touched.store(0, Ordering::Relaxed);
        self.tokens.give_back();
        self.lines.give_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(ids: &[u32], learned: &[bool]) -> std::result::Result<Encoded, String> {
        let example = Example { ids: ids.to_vec(), supervised: learned.to_vec() };
        let count = learned.iter().filter(|&&learned| learned).count() as u64;
        let tally = Tally {
            rows: 1,
            tokens: ids.len() as u64,
            learned: count,
            longest: ids.len() + 1,
            cut: 1,
            ..Tally::default()
        };
        Ok(Encoded { example: Some(example), tally })
    }

    fn rows() -> Vec<std::result::Result<Encoded, String>> {
        let dropped = Tally { rows: 1, longest: 9, dropped: 1, ..Tally::default() };
        vec![
            encoded(&[1, 2, 3], &[false, true, true]),
            Err("the template refuses it".into()),
            Ok(Encoded { example: None, tally: dropped }),
            encoded(&[LEARNED - 1, 0], &[true, false]),
        ]
    }

    fn filled(tokens: Drain, lines: Drain) -> Written {
        let mut writer = Writer::new(tokens, lines);
        for (row, found) in rows().iter().enumerate() {
            writer.push(7, row as u64 + 10, Some(row as u64).filter(|&group| group > 0), found).unwrap();
        }
        assert_eq!(writer.bytes(), 5 * 4 + 4 * LINE_BYTES as u64);
        writer.finish().unwrap()
    }

    fn check(store: &Store) {
        assert_eq!(store.rows(), 4);
        for (row, found) in rows().into_iter().enumerate() {
            let row = row as u32;
            let line = store.line(row);
            assert_eq!((line.file, line.row), (7, u64::from(row) + 10));
            assert_eq!(line.group(), Some(u64::from(row)).filter(|&group| group > 0));
            match found {
                Err(problem) => assert_eq!(store.tally(row), Err(problem.as_str())),
                Ok(found) => {
                    assert_eq!(store.tally(row).as_ref(), Ok(&found.tally));
                    let none = Example { ids: Vec::new(), supervised: Vec::new() };
                    assert_eq!(store.example(row), found.example.unwrap_or(none));
                }
            }
            store.will_need(row);
        }
    }

    fn memory() -> (Vec<u8>, Vec<u8>, Vec<Note>) {
        let written = filled(Drain::Memory(Vec::new()), Drain::Memory(Vec::new()));
        match (written.tokens, written.lines) {
            (Drained::Memory(tokens), Drained::Memory(lines)) => (tokens, lines, written.notes),
            _ => panic!("it went to memory"),
        }
    }

    #[test]
    fn what_went_in_comes_out_of_memory_and_of_files() {
        let (tokens, lines, notes) = memory();
        check(&Store::new(Bytes::Memory(tokens.clone()), Bytes::Memory(lines.clone()), notes).unwrap());
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let file = |name: &str| Drain::File(Digested::create(&path(name)).unwrap());
        let written = filled(file("tokens"), file("lines"));
        assert_eq!(std::fs::read(path("tokens")).unwrap(), tokens);
        assert_eq!(std::fs::read(path("lines")).unwrap(), lines);
        let mapped = |name: &str| Bytes::mapped(&path(name)).unwrap();
        let store = Store::new(mapped("tokens"), mapped("lines"), written.notes).unwrap();
        check(&store);
        store.give_back();
        check(&store);
    }

    #[test]
    fn digests_of_parts_tell_every_change() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        let mut file = Digested::create(&path).unwrap();
        let all: Vec<u8> = (0..PART_BYTES + 1000).map(|at| ((at * 31) >> 3) as u8).collect();
        all.chunks(999_983).for_each(|some| file.write(some).unwrap());
        let content = file.finish().unwrap();
        assert_eq!((content.bytes, content.digests.len()), (all.len() as u64, 2));
        let holds = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            content.is_at(&path, || false).unwrap()
        };
        assert!(holds(&all));
        assert!(!content.is_at(&path, || true).unwrap(), "a signal ends the check");
        for at in [0, PART_BYTES - 1, PART_BYTES, all.len() - 1] {
            let mut changed = all.clone();
            changed[at] ^= 1;
            assert!(!holds(&changed), "byte {at}");
        }
        assert!(!holds(&all[..all.len() - 1]));
        assert!(!holds(&[all.as_slice(), b"x"].concat()));
    }

    #[test]
    fn lines_that_do_not_fit_are_no_store() {
        let (tokens, lines, notes) = memory();
        let store = |tokens: &[u8], lines: &[u8], notes: &[Note]| {
            Store::new(Bytes::Memory(tokens.to_vec()), Bytes::Memory(lines.to_vec()), notes.to_vec())
        };
        assert!(store(&tokens, &lines, &notes).is_some());
        assert!(store(&tokens[4..], &lines, &notes).is_none());
        assert!(store(&tokens, &lines[1..], &notes).is_none());
        assert!(store(&tokens, &lines[LINE_BYTES..], &notes).is_none());
        assert!(store(&tokens, &lines, &notes[..1]).is_none());
    }
}
