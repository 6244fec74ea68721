//! An open file -> its bytes from the start, without gzip or zstd. If a container must be able to seek, the bytes
//! are written to a temporary file.

use crate::fault::{Fault, Result};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// LIMIT: bytes that a packed file may unpack to. Text is read as a stream, so this bounds time and not memory.
const UNPACKED_BYTES_MAX: u64 = 1 << 40;
/// LIMIT: unpacked bytes of a file that must be on disk to be read.
const SPILLED_BYTES_MAX: u64 = 64 << 30;
/// LIMIT: memory that a zstd stream may ask for (2^27 bytes), which is the limit of its own command line.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
const BUFFER_BYTES: usize = 1 << 20;
/// Bytes that are enough to recognise every kind of file.
const HEAD_BYTES: u64 = 512;

/// Endings of packed files' names.
pub(super) const ENDINGS: [&str; 4] = [".gz", ".gzip", ".zst", ".zstd"];

/// The compression around a container.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Packing {
    /// None.
    None,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

impl Packing {
    fn of(head: &[u8]) -> Packing {
        if head.starts_with(b"\x1f\x8b") {
            Packing::Gzip
        } else if head.starts_with(b"\x28\xb5\x2f\xfd") {
            Packing::Zstd
        } else {
            Packing::None
        }
    }

    /// Returns the name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Packing::None => "nothing",
            Packing::Gzip => "gzip",
            Packing::Zstd => "zstd",
        }
    }
}

/// A file that is about to be read.
pub(super) struct Input {
    /// The file.
    pub file: File,
    /// Length of the file as it is stored.
    pub bytes: u64,
    /// The name in messages.
    pub name: String,
    /// The compression of the input.
    pub packing: Packing,
    /// The name of its container.
    pub title: &'static str,
}

impl Input {
    /// Opens a file and recognises its compression.
    pub fn open(path: &Path, name: &str) -> Result<Input> {
        let storage = |error| Fault::storage("read", path, &error);
        let file = File::open(path).map_err(storage)?;
        let bytes = file.metadata().map_err(storage)?.len();
        let mut head = vec![0; bytes.min(4) as usize];
        file.read_exact_at(&mut head, 0).map_err(storage)?;
        Ok(Input { file, bytes, name: name.to_owned(), packing: Packing::of(&head), title: "a data file" })
    }

    /// Returns the first bytes, unpacked.
    pub fn head(&self) -> Result<Vec<u8>> {
        let mut head = Vec::new();
        self.reader()?.take(HEAD_BYTES).read_to_end(&mut head).map_err(|error| self.failed(&error))?;
        Ok(head)
    }

    /// Returns the bytes from the start, unpacked. Any number of readers may be in use.
    pub fn reader(&self) -> Result<Box<dyn BufRead + '_>> {
        let whole = BufReader::with_capacity(BUFFER_BYTES, At { file: &self.file, at: 0 });
        let limited = |reader| Limited { reader, left: UNPACKED_BYTES_MAX };
        Ok(match self.packing {
            Packing::None => Box::new(whole),
            Packing::Gzip => {
                let unpacked: Box<dyn Read> = Box::new(flate2::bufread::MultiGzDecoder::new(whole));
                Box::new(BufReader::with_capacity(BUFFER_BYTES, limited(unpacked)))
            }
            Packing::Zstd => {
                let decoder = zstd::stream::read::Decoder::with_buffer(whole);
                let mut decoder = decoder.map_err(|error| self.failed(&error))?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(|error| self.failed(&error))?;
                let unpacked: Box<dyn Read> = Box::new(decoder);
                Box::new(BufReader::with_capacity(BUFFER_BYTES, limited(unpacked)))
            }
        })
    }

    /// Returns the same file, unpacked and readable at any place. A packed file is written to a temporary file without
    /// a name.
    pub fn seekable(self) -> Result<Input> {
        if self.packing == Packing::None {
            return Ok(self);
        }
        let folder = std::env::temp_dir();
        let storage = |error: io::Error| Fault::storage("unpack to", &folder, &error);
        let mut file = tempfile::tempfile_in(&folder).map_err(storage)?;
        let mut reader = self.reader()?;
        let mut bytes = 0;
        loop {
            crate::interrupt::check()?;
            let part = reader.fill_buf().map_err(|error| self.failed(&error))?;
            if part.is_empty() {
                break;
            }
            bytes += part.len() as u64;
            if bytes > SPILLED_BYTES_MAX {
                return Err(Fault::data(format!(
                    "{}: {} that unpacks to more than {SPILLED_BYTES_MAX} bytes, the limit inside {}",
                    self.name,
                    self.title,
                    self.packing.name()
                ))
                .help("give the file unpacked"));
            }
            file.write_all(part).map_err(storage)?;
            let count = part.len();
            reader.consume(count);
        }
        drop(reader);
        Ok(Input { file, bytes, name: self.name, packing: Packing::None, title: self.title })
    }

    /// Returns the fault for a failed read: data if the compressed data may be damaged, otherwise storage.
    pub fn failed(&self, error: &io::Error) -> Fault {
        self.failed_at(&self.name, error)
    }

    /// The same for a read that fails in a line.
    pub fn failed_in_line(&self, line: u64, error: &io::Error) -> Fault {
        self.failed_at(&format!("{}: line {line}", self.name), error)
    }

    fn failed_at(&self, place: &str, error: &io::Error) -> Fault {
        match self.packing {
            Packing::None => {
                Fault::new(crate::fault::Kind::Storage, format!("{place}: cannot read it: {error}"))
            }
            packing => Fault::data(format!(
                "{place}: the {} data is damaged, cut off or too large: {error}",
                packing.name()
            ))
            .help("check the file against its SHA-256, or export it again")
            .or_machines(),
        }
    }
}

/// Reads a file from a position of its own, independent of other readers.
struct At<'a> {
    file: &'a File,
    at: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// Fails if more bytes come than any honest file has.
struct Limited<'a> {
    reader: Box<dyn Read + 'a>,
    left: u64,
}

impl Read for Limited<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        self.left = self
            .left
            .checked_sub(count as u64)
            .ok_or_else(|| io::Error::other(format!("it unpacks to more than {UNPACKED_BYTES_MAX} bytes")))?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(content: &[u8]) -> (tempfile::NamedTempFile, Result<Vec<u8>>) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        let input = Input::open(file.path(), "rows").unwrap();
        let mut all = Vec::new();
        let read = input.reader().and_then(|mut reader| {
            reader.read_to_end(&mut all).map_err(|error| input.failed(&error)).map(|_| ())
        });
        (file, read.map(|()| all))
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn every_packing_gives_the_same_bytes_also_in_several_members() {
        let content = b"one\ntwo\n".repeat(1000);
        let zstd = zstd::stream::encode_all(&content[..], 1).unwrap();
        for bytes in [content.clone(), gzip(&content), zstd.clone()] {
            assert!(packed(&bytes).1.unwrap() == content);
        }
        assert!(packed(&[gzip(b"a"), gzip(b"b")].concat()).1.unwrap() == b"ab");
        assert!(packed(&[zstd.clone(), zstd].concat()).1.unwrap().len() == 2 * content.len());
    }

    #[test]
    fn damage_is_the_datas_fault() {
        let whole = gzip(&b"0123456789".repeat(100));
        let fault = packed(&whole[..whole.len() - 9]).1.unwrap_err();
        assert!(
            fault.kind == crate::fault::Kind::Data && fault.message.contains("gzip data is damaged"),
            "{fault}"
        );
        let zstd = zstd::stream::encode_all(&b"0123456789".repeat(100)[..], 1).unwrap();
        assert!(packed(&zstd[..zstd.len() - 3]).1.unwrap_err().message.contains("zstd data"));
    }

    #[test]
    fn a_packed_file_can_be_made_seekable() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&gzip(b"hello")).unwrap();
        let input = Input::open(file.path(), "rows").unwrap().seekable().unwrap();
        let mut bytes = [0; 5];
        input.file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!((&bytes, input.bytes, input.packing), (b"hello", 5, Packing::None));
    }
}
