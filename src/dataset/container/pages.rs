//! The page headers of a column chunk -> the bytes and values they declare, checked before the decoder uses them.
//!
//! The decoder reserves what a header declares, so one damaged or hostile header could end the process: an
//! allocation that fails aborts and does not unwind. Headers are Thrift compact structs:
//! <https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift>, `PageHeader`.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;

/// LIMIT: bytes that one page may unpack to. Writers aim at 1 MiB. A page holds at least one value, so this bounds
/// a text.
pub(super) const PAGE_BYTES_MAX: u64 = 256 << 20;
/// LIMIT: bytes of a header, which may carry a column's smallest and largest value.
const HEADER_BYTES_MAX: usize = 16 << 20;
const HEADER_BYTES_FIRST: usize = 4 << 10;
/// LIMIT: nesting of structs. Parquet's own headers have three levels.
const DEPTH_MAX: u32 = 8;

/// Sums over the pages of one chunk.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Totals {
    /// Bytes after unpacking.
    pub unpacked_bytes: u64,
    /// Values.
    pub values: u64,
}

/// The use of the length in the header by a codec's decoder in the parquet crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codec {
    /// The decoder stops at the length in the header.
    Bounded,
    /// The decoder reads to the end of the packed data.
    Gzip,
    /// The decoder reads to the end of the packed data.
    Brotli,
}

/// Largest growth of a byte by gzip (RFC 1951: 258 bytes from two bits each).
const GZIP_GROWTH_MAX: u64 = 1032;

/// Checks the pages in `start..end` of `file`, which must lie inside the file.
pub(super) fn check(file: &File, start: u64, end: u64, values: u64, codec: Codec) -> Result<Totals, String> {
    let mut totals = Totals::default();
    let mut at = start;
    while at < end && totals.values < values {
        let (page, header_bytes) = header(file, at, end)?;
        let body = at + header_bytes as u64;
        if page.unpacked_bytes > PAGE_BYTES_MAX {
            return Err(format!("a page unpacks to {} bytes, limit {PAGE_BYTES_MAX}", page.unpacked_bytes));
        }
        if page.packed_bytes > end - body {
            return Err(format!("a page of {} bytes leaves its column chunk", page.packed_bytes));
        }
        if page.dictionary_values > page.unpacked_bytes {
            return Err(format!(
                "a dictionary promises {} values in {} bytes",
                page.dictionary_values, page.unpacked_bytes
            ));
        }
        check_body(file, body, &page, codec)?;
        totals.unpacked_bytes += page.unpacked_bytes;
        totals.values += page.values;
        at = body + page.packed_bytes;
    }
    if totals.values != values {
        return Err(format!("its pages hold {} values, expected {values}", totals.values));
    }
    Ok(totals)
}

/// Unpacks a page whose codec might make more of it than its header declares, and only counts the bytes.
fn check_body(file: &File, at: u64, page: &Page, codec: Codec) -> Result<(), String> {
    let packed = page.packed_bytes.saturating_sub(page.level_bytes);
    let harmless = match codec {
        Codec::Bounded => true,
        Codec::Gzip => packed <= PAGE_BYTES_MAX / GZIP_GROWTH_MAX,
        Codec::Brotli => page.is_plain,
    };
    if harmless || page.is_plain {
        return Ok(());
    }
    let body = Body { file, at: at + page.level_bytes, left: packed };
    let promised = page.unpacked_bytes.saturating_sub(page.level_bytes);
    let count = |reader: &mut dyn Read| std::io::copy(&mut reader.take(promised + 1), &mut std::io::sink());
    let found = match codec {
        Codec::Brotli => count(&mut brotli_decompressor::Decompressor::new(body, 64 << 10)),
        _ => count(&mut flate2::read::MultiGzDecoder::new(std::io::BufReader::new(body))),
    };
    match found {
        Ok(bytes) if bytes > promised => {
            Err(format!("a page unpacks to more than the {} bytes its header promises", page.unpacked_bytes))
        }
        // The decoder describes any other damage better.
        _ => Ok(()),
    }
}

/// A part of a file.
struct Body<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Body<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let most = into.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let bytes = self.file.read_at(&mut into[..most], self.at)?;
        self.at += bytes as u64;
        self.left -= bytes as u64;
        Ok(bytes)
    }
}

#[derive(Debug, Default, PartialEq)]
struct Page {
    unpacked_bytes: u64,
    packed_bytes: u64,
    values: u64,
    dictionary_values: u64,
    /// Version 2: bytes of the levels before the packed values, which are not packed.
    level_bytes: u64,
    /// Version 2: whether nothing in the page is packed.
    is_plain: bool,
}

fn header(file: &File, at: u64, end: u64) -> Result<(Page, usize), String> {
    let mut window = HEADER_BYTES_FIRST;
    loop {
        let bytes_left = usize::try_from(end - at).unwrap_or(usize::MAX);
        let mut bytes = vec![0; window.min(bytes_left)];
        file.read_exact_at(&mut bytes, at).map_err(|error| format!("cannot read a page header: {error}"))?;
        let mut thrift = Thrift { bytes: &bytes, at: 0 };
        match page(&mut thrift) {
            Ok(page) => return Ok((page, thrift.at)),
            Err(Bad::Short) if window < bytes_left && window < HEADER_BYTES_MAX => window *= 4,
            Err(_) => return Err(format!("no page header at byte {at}")),
        }
    }
}

fn page(thrift: &mut Thrift) -> Result<Page, Bad> {
    let mut page = Page::default();
    thrift.structure(0, &mut |thrift, id, kind| {
        match (id, kind) {
            (2, I32) => page.unpacked_bytes = thrift.size()?,
            (3, I32) => page.packed_bytes = thrift.size()?,
            (5 | 7 | 8, STRUCT) => {
                let (mut values, version_2) = (0, id == 8);
                thrift.structure(1, &mut |thrift, id, kind| {
                    match (id, kind) {
                        (1, I32) => values = thrift.size()?,
                        (5 | 6, I32) if version_2 => page.level_bytes += thrift.size()?,
                        (7, FALSE) if version_2 => page.is_plain = true,
                        _ => thrift.skip(kind, 2)?,
                    }
                    Ok(())
                })?;
                *if id == 7 { &mut page.dictionary_values } else { &mut page.values } = values;
            }
            _ => thrift.skip(kind, 1)?,
        }
        Ok(())
    })?;
    Ok(page)
}

/// The reason why a header cannot be read.
pub(super) enum Bad {
    /// The bytes end inside the header.
    Short,
    /// The bytes are not a header.
    Malformed,
}

/// In a struct, the kind of a field is its boolean value.
const FALSE: u8 = 2;
pub(super) const I32: u8 = 5;
pub(super) const LIST: u8 = 9;
pub(super) const STRUCT: u8 = 12;

/// A reader of Thrift's compact protocol, as far as skipping and small integers need it.
pub(super) struct Thrift<'a> {
    /// The bytes.
    pub bytes: &'a [u8],
    /// The position.
    pub at: usize,
}

pub(super) type OnField<'f> = dyn FnMut(&mut Thrift, i64, u8) -> Result<(), Bad> + 'f;

impl Thrift<'_> {
    pub(super) fn structure(&mut self, depth: u32, field: &mut OnField) -> Result<(), Bad> {
        if depth > DEPTH_MAX {
            return Err(Bad::Malformed);
        }
        let mut id = 0;
        loop {
            let head = self.byte()?;
            if head == 0 {
                return Ok(());
            }
            let step = i64::from(head >> 4);
            id = if step == 0 { self.integer()? } else { id + step };
            field(self, id, head & 15)?;
        }
    }

    pub(super) fn skip(&mut self, kind: u8, depth: u32) -> Result<(), Bad> {
        match kind {
            1 | 2 => Ok(()), // in a struct, the kind is the value
            3 => self.pass(1),
            4..=6 => self.varint().map(drop),
            7 => self.pass(8),
            8 => {
                let length = self.varint()?;
                self.pass(length)
            }
            9 | 10 => self.skip_list(depth),
            STRUCT => self.structure(depth, &mut |thrift, _, kind| thrift.skip(kind, depth + 1)),
            _ => Err(Bad::Malformed),
        }
    }

    fn skip_list(&mut self, depth: u32) -> Result<(), Bad> {
        if depth > DEPTH_MAX {
            return Err(Bad::Malformed);
        }
        let (kind, count) = self.list()?;
        for _ in 0..count {
            match kind {
                1 | 2 => self.pass(1)?, // in a list, a boolean is a byte
                kind => self.skip(kind, depth + 1)?,
            }
        }
        Ok(())
    }

    /// Returns the kind and number of a list's items; each item has at least one byte.
    pub(super) fn list(&mut self) -> Result<(u8, u64), Bad> {
        let head = self.byte()?;
        let count = if head >> 4 == 15 { self.varint()? } else { u64::from(head >> 4) };
        if count > (self.bytes.len() - self.at) as u64 {
            return Err(Bad::Short);
        }
        Ok((head & 15, count))
    }

    fn byte(&mut self) -> Result<u8, Bad> {
        let byte = *self.bytes.get(self.at).ok_or(Bad::Short)?;
        self.at += 1;
        Ok(byte)
    }

    fn pass(&mut self, bytes: u64) -> Result<(), Bad> {
        if bytes > HEADER_BYTES_MAX as u64 {
            return Err(Bad::Malformed);
        }
        self.at += bytes as usize;
        if self.at > self.bytes.len() { Err(Bad::Short) } else { Ok(()) }
    }

    fn varint(&mut self) -> Result<u64, Bad> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 127) << shift;
            if byte < 128 {
                return Ok(value);
            }
        }
        Err(Bad::Malformed)
    }

    /// Returns a zigzag number: 0, -1, 1, -2, ...
    fn integer(&mut self) -> Result<i64, Bad> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    pub(super) fn size(&mut self) -> Result<u64, Bad> {
        u64::try_from(self.integer()?).map_err(|_| Bad::Malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn zigzag(value: u64) -> Vec<u8> {
        let mut rest = value << 1;
        let mut bytes = Vec::new();
        while rest > 127 {
            bytes.push(rest as u8 | 128);
            rest >>= 7;
        }
        bytes.push(rest as u8);
        bytes
    }

    /// Returns a data page v1: type, sizes, crc, header {values, three encodings, statistics {min: binary}}, body.
    fn data_page(values: u64, unpacked: u64, body: usize, min: usize) -> Vec<u8> {
        let mut bytes = vec![0x15, 0x00, 0x15];
        bytes.extend(zigzag(unpacked));
        bytes.push(0x15);
        bytes.extend(zigzag(body as u64));
        bytes.extend([0x15, 0x7f, 0x1c, 0x15]); // crc -64; field 5: struct; its field 1
        bytes.extend(zigzag(values));
        bytes.extend([0x15, 0, 0x15, 0, 0x15, 0, 0x1c, 0x18]);
        let length = zigzag(min as u64 / 2); // lengths are plain varints, half of the zigzag
        assert!(min.is_multiple_of(2));
        bytes.extend(if min == 0 { vec![0] } else { varint_of(min as u64, length) });
        bytes.extend(vec![b'x'; min]);
        bytes.extend([0, 0, 0]);
        bytes.extend(vec![7; body]);
        bytes
    }

    fn varint_of(value: u64, mut scratch: Vec<u8>) -> Vec<u8> {
        scratch.clear();
        let mut rest = value;
        while rest > 127 {
            scratch.push(rest as u8 | 128);
            rest >>= 7;
        }
        scratch.push(rest as u8);
        scratch
    }

    fn run(bytes: &[u8], values: u64) -> Result<Totals, String> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        check(&file, 0, bytes.len() as u64, values, Codec::Bounded)
    }

    /// Reads a page of packed zeros under a header that declares `promised` bytes.
    fn lying_page(codec: Codec, zeros: usize, promised: u64) -> Result<Totals, String> {
        let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::none());
        writer.write_all(&vec![0; zeros]).unwrap();
        let packed = writer.finish().unwrap();
        let mut bytes = data_page(3, promised, 0, 0);
        // The body's length follows the declared length.
        let at = 3 + zigzag(promised).len() + 1;
        bytes.splice(at..at + 1, zigzag(packed.len() as u64));
        bytes.extend(packed);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        check(&file, 0, bytes.len() as u64, 3, codec)
    }

    #[test]
    fn a_gzip_page_holds_no_more_than_its_header_promises() {
        // The page is large enough that it might unpack to more than a page may hold.
        let zeros = 1 << 20;
        assert!(lying_page(Codec::Gzip, zeros, 100).unwrap_err().contains("more than the 100 bytes"));
        assert!(lying_page(Codec::Gzip, zeros, zeros as u64 - 1).unwrap_err().contains("more than"));
        assert_eq!(lying_page(Codec::Gzip, zeros, zeros as u64).unwrap().unpacked_bytes, zeros as u64);
        assert!(lying_page(Codec::Gzip, 1000, 100).is_ok(), "too small to do harm: the decoder finds it");
    }

    #[test]
    fn pages_add_up_whatever_their_statistics_weigh() {
        let bytes = [data_page(3, 100, 40, 0), data_page(4, 50, 50, 100_000)].concat();
        assert_eq!(run(&bytes, 7), Ok(Totals { unpacked_bytes: 150, values: 7 }));
    }

    #[test]
    fn what_does_not_add_up_is_named() {
        let page = data_page(3, 100, 40, 0);
        assert!(run(&page, 4).unwrap_err().contains("3 values, expected 4"));
        assert!(run(&page[..page.len() - 1], 3).unwrap_err().contains("leaves its column chunk"));
        assert!(run(&data_page(3, 1 << 30, 40, 0), 3).unwrap_err().contains("limit"));
        assert!(run(&[0xff; 64], 3).unwrap_err().contains("no page header"));
        assert!(run(&[0x1c; 64], 3).unwrap_err().contains("no page header"), "nesting is bounded");
    }
}
