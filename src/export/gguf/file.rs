//! GGUF version 3: metadata and tensors' descriptions -> the bytes in front of the tensors; and such a file -> both.
//!
//! Little endian. Dimensions stand from the fastest to the slowest. Each tensor begins at a multiple of the alignment.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::export::{Q8_BLOCK, Stored};
use crate::fault::{Fault, Result};

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
/// The format's default, which a file need not name.
pub const ALIGNMENT: u64 = 32;
/// LIMIT: bytes of a file's header, which is mostly its vocabulary.
const HEADER_BYTES_MAX: u64 = 128 << 20;
/// LIMIT: dimensions of a tensor, by the format.
const DIMENSIONS_MAX: u32 = 4;

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A count or an id.
    U32(u32),
    /// A signed number.
    I32(i32),
    /// A number.
    F32(f32),
    /// Yes or no.
    Bool(bool),
    /// UTF-8.
    Text(String),
    /// A list of texts.
    Texts(Vec<String>),
    /// A list of numbers.
    F32s(Vec<f32>),
    /// A list of signed numbers.
    I32s(Vec<i32>),
}

/// ggml's type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// f32.
    F32 = 0,
    /// f16.
    F16 = 1,
    /// Blocks of 32 bytes with an f16 scale.
    Q8 = 8,
    /// bf16.
    Bf16 = 30,
}

impl Kind {
    /// Vectors stay f32; rows that are no whole blocks of q8_0 are f16, as llama.cpp's converter has them.
    pub fn of(shape: &[usize], stored: Stored) -> Kind {
        match (shape, stored) {
            ([_], _) => Kind::F32,
            ([.., cols], Stored::Q8) if !cols.is_multiple_of(Q8_BLOCK) => Kind::F16,
            (_, stored) => Kind::plain(stored),
        }
    }

    /// Returns the type of a matrix.
    pub fn plain(stored: Stored) -> Kind {
        match stored {
            Stored::F32 => Kind::F32,
            Stored::F16 => Kind::F16,
            Stored::Bf16 => Kind::Bf16,
            Stored::Q8 => Kind::Q8,
        }
    }

    /// Returns the form of the values.
    pub fn stored(self) -> Stored {
        match self {
            Kind::F32 => Stored::F32,
            Kind::F16 => Stored::F16,
            Kind::Bf16 => Stored::Bf16,
            Kind::Q8 => Stored::Q8,
        }
    }

    fn numbered(number: u32) -> Option<Kind> {
        [Kind::F32, Kind::F16, Kind::Q8, Kind::Bf16].into_iter().find(|kind| *kind as u32 == number)
    }

    /// Returns the number of bytes of so many values.
    pub fn bytes(self, values: usize) -> usize {
        self.stored().bytes(values)
    }
}

/// A tensor's description. The shape is [rows, cols], as everywhere in hone.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Name in the file.
    pub name: String,
    /// [rows, cols], or one length.
    pub shape: Vec<usize>,
    /// Type of the values.
    pub kind: Kind,
}

impl Tensor {
    /// Returns the number of bytes in the file.
    pub fn bytes(&self) -> usize {
        self.kind.bytes(self.shape.iter().product())
    }
}

/// Returns everything in front of the tensors, which follow in this order, each filled up to the alignment.
pub fn header(metadata: &[(String, Value)], tensors: &[Tensor]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(tensors.len() as u64).to_le_bytes());
    out.extend_from_slice(&(metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut out, key);
        put_value(&mut out, value);
    }
    let mut offset = 0u64;
    for tensor in tensors {
        put_text(&mut out, &tensor.name);
        out.extend_from_slice(&(tensor.shape.len() as u32).to_le_bytes());
        for dimension in tensor.shape.iter().rev() {
            out.extend_from_slice(&(*dimension as u64).to_le_bytes());
        }
        out.extend_from_slice(&(tensor.kind as u32).to_le_bytes());
        out.extend_from_slice(&offset.to_le_bytes());
        offset += (tensor.bytes() as u64).next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    out
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Numbers of the format's types of values.
mod number {
    /// A 32-bit unsigned integer.
    pub const U32: u32 = 4;
    /// A 32-bit signed integer.
    pub const I32: u32 = 5;
    /// A 32-bit float.
    pub const F32: u32 = 6;
    /// One byte, 0 or 1.
    pub const BOOL: u32 = 7;
    /// A length and UTF-8 bytes.
    pub const TEXT: u32 = 8;
    /// A type, a count, and as many values.
    pub const LIST: u32 = 9;
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    let put = |out: &mut Vec<u8>, number: u32| out.extend_from_slice(&number.to_le_bytes());
    let list = |out: &mut Vec<u8>, number: u32, length: usize| {
        put(out, number::LIST);
        put(out, number);
        out.extend_from_slice(&(length as u64).to_le_bytes());
    };
    match value {
        Value::U32(value) => {
            put(out, number::U32);
            out.extend_from_slice(&value.to_le_bytes());
        }
        Value::I32(value) => {
            put(out, number::I32);
            out.extend_from_slice(&value.to_le_bytes());
        }
        Value::F32(value) => {
            put(out, number::F32);
            out.extend_from_slice(&value.to_le_bytes());
        }
        Value::Bool(value) => {
            put(out, number::BOOL);
            out.push(u8::from(*value));
        }
        Value::Text(text) => {
            put(out, number::TEXT);
            put_text(out, text);
        }
        Value::Texts(texts) => {
            list(out, number::TEXT, texts.len());
            texts.iter().for_each(|text| put_text(out, text));
        }
        Value::F32s(values) => {
            list(out, number::F32, values.len());
            values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
        }
        Value::I32s(values) => {
            list(out, number::I32, values.len());
            values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
        }
    }
}

/// An open file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    file: File,
    /// Keys and values.
    pub metadata: Vec<(String, Value)>,
    /// The tensors, with the first byte of each in the file.
    pub tensors: Vec<(Tensor, u64)>,
}

impl Gguf {
    /// Reads everything in front of the tensors.
    ///
    /// # Errors
    /// Model: no GGUF of this version, cut short, or with types that hone does not write.
    pub fn open(path: &Path) -> Result<Gguf> {
        let file = File::open(path).map_err(|error| Fault::storage("read", path, &error))?;
        let bytes = file.metadata().map_err(|error| Fault::storage("read", path, &error))?.len();
        let mut head = vec![0; bytes.min(HEADER_BYTES_MAX) as usize];
        file.read_exact_at(&mut head, 0).map_err(|error| Fault::storage("read", path, &error))?;
        let mut reader = Reader { bytes: &head, at: 0 };
        let parsed = reader.header().ok_or_else(|| {
            let at = reader.at;
            Fault::model(format!("{}: no GGUF that hone writes, at byte {at}", path.display()))
        });
        let (metadata, tensors) = parsed?;
        let gguf = Gguf { path: path.to_owned(), file, metadata, tensors };
        for (tensor, from) in &gguf.tensors {
            if from.checked_add(tensor.bytes() as u64).is_none_or(|end| end > bytes) {
                return Err(Fault::model(format!("{}: {} is cut short", path.display(), tensor.name)));
            }
        }
        Ok(gguf)
    }

    /// Returns a value by its key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.iter().find(|(other, _)| other == key).map(|(_, value)| value)
    }

    /// Returns a tensor's description and values.
    pub fn values(&self, name: &str) -> Result<Option<(&Tensor, Vec<f32>)>> {
        let Some((tensor, from)) = self.tensors.iter().find(|(tensor, _)| tensor.name == name) else {
            return Ok(None);
        };
        let mut bytes = vec![0; tensor.bytes()];
        self.file
            .read_exact_at(&mut bytes, *from)
            .map_err(|error| Fault::storage("read", &self.path, &error))?;
        Ok(Some((tensor, tensor.kind.stored().decode(&bytes))))
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

type Header = (Vec<(String, Value)>, Vec<(Tensor, u64)>);

impl Reader<'_> {
    fn take(&mut self, count: usize) -> Option<&[u8]> {
        let found = self.bytes.get(self.at..self.at.checked_add(count)?)?;
        self.at += count;
        Some(found)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    /// Returns a length, which the rest of the file bounds.
    fn length(&mut self) -> Option<usize> {
        let length = usize::try_from(self.u64()?).ok()?;
        (length <= self.bytes.len()).then_some(length)
    }

    fn text(&mut self) -> Option<String> {
        let length = self.length()?;
        String::from_utf8(self.take(length)?.to_vec()).ok()
    }

    fn header(&mut self) -> Option<Header> {
        if self.take(4)? != MAGIC || self.u32()? != VERSION {
            return None;
        }
        let (tensors, keys) = (self.length()?, self.length()?);
        let metadata = (0..keys).map(|_| Some((self.text()?, self.value()?))).collect::<Option<Vec<_>>>()?;
        let described = (0..tensors).map(|_| self.tensor()).collect::<Option<Vec<_>>>()?;
        let data = (self.at as u64).next_multiple_of(ALIGNMENT);
        let placed = described.into_iter().map(|(tensor, offset)| Some((tensor, data.checked_add(offset)?)));
        Some((metadata, placed.collect::<Option<Vec<_>>>()?))
    }

    fn tensor(&mut self) -> Option<(Tensor, u64)> {
        let name = self.text()?;
        let count = self.u32().filter(|count| (1..=DIMENSIONS_MAX).contains(count))?;
        let mut shape = (0..count).map(|_| usize::try_from(self.u64()?).ok()).collect::<Option<Vec<_>>>()?;
        shape.reverse();
        shape.iter().try_fold(1usize, |all, size| all.checked_mul(*size)).filter(|all| *all < 1 << 48)?;
        let kind = Kind::numbered(self.u32()?)?;
        let whole_blocks = kind != Kind::Q8 || shape.last().is_some_and(|cols| cols.is_multiple_of(Q8_BLOCK));
        whole_blocks.then_some(())?;
        Some((Tensor { name, shape, kind }, self.u64()?))
    }

    fn value(&mut self) -> Option<Value> {
        match self.u32()? {
            number::U32 => Some(Value::U32(self.u32()?)),
            number::I32 => Some(Value::I32(self.u32()?.cast_signed())),
            number::F32 => Some(Value::F32(f32::from_bits(self.u32()?))),
            number::BOOL => Some(Value::Bool(self.take(1)?[0] != 0)),
            number::TEXT => Some(Value::Text(self.text()?)),
            number::LIST => {
                let (kind, length) = (self.u32()?, self.length()?);
                match kind {
                    number::TEXT => {
                        Some(Value::Texts((0..length).map(|_| self.text()).collect::<Option<_>>()?))
                    }
                    number::F32 => {
                        let values = (0..length).map(|_| Some(f32::from_bits(self.u32()?)));
                        Some(Value::F32s(values.collect::<Option<_>>()?))
                    }
                    number::I32 => {
                        let values = (0..length).map(|_| Some(self.u32()?.cast_signed()));
                        Some(Value::I32s(values.collect::<Option<_>>()?))
                    }
                    _ => None,
                }
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(cut: Option<usize>) -> (tempfile::NamedTempFile, Vec<(String, Value)>, Vec<Tensor>) {
        let metadata = vec![
            ("a".to_owned(), Value::Text("x".into())),
            ("b".into(), Value::Texts(vec!["y".into(), String::new()])),
            ("c".into(), Value::F32s(vec![1.5])),
            ("d".into(), Value::I32s(vec![-1])),
            ("e".into(), Value::Bool(true)),
            ("f".into(), Value::U32(7)),
            ("g".into(), Value::I32(-7)),
            ("h".into(), Value::F32(0.25)),
        ];
        let tensor =
            |name: &str, shape: &[usize], kind| Tensor { name: name.into(), shape: shape.into(), kind };
        let tensors = vec![tensor("v", &[3], Kind::F32), tensor("m", &[2, 32], Kind::Q8)];
        let mut bytes = header(&metadata, &tensors);
        bytes.extend(Stored::F32.encode("v", &[1.0, 2.0, 3.0]).unwrap());
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(Stored::Q8.encode("m", &[127.0; 64]).unwrap());
        bytes.truncate(cut.unwrap_or(bytes.len()));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        (file, metadata, tensors)
    }

    #[test]
    fn a_file_is_read_as_it_was_written() {
        let (file, metadata, tensors) = written(None);
        let gguf = Gguf::open(file.path()).unwrap();
        assert_eq!(gguf.metadata, metadata);
        assert_eq!(gguf.tensors.iter().map(|(tensor, _)| tensor.clone()).collect::<Vec<_>>(), tensors);
        assert!(gguf.tensors.iter().all(|(_, from)| from % ALIGNMENT == 0));
        assert_eq!(gguf.values("v").unwrap().unwrap().1, [1.0, 2.0, 3.0]);
        assert_eq!(gguf.values("m").unwrap().unwrap().1, [127.0; 64]);
        assert!(gguf.values("n").unwrap().is_none());
    }

    /// Bytes of the header are flipped, and numbers of it replaced by absurd ones: the file is read or refused.
    #[test]
    fn no_header_breaks_the_reader() {
        let (file, ..) = written(None);
        let whole = std::fs::read(file.path()).unwrap();
        let check = |bytes: &[u8]| {
            std::fs::write(file.path(), bytes).unwrap();
            let Ok(gguf) = Gguf::open(file.path()) else { return false };
            gguf.tensors.iter().all(|(tensor, _)| gguf.values(&tensor.name).unwrap().is_some())
        };
        let header = whole.len() - 3 * 32 - 36;
        let mut refused = 0;
        for at in 0..header {
            for bit in [0, 3, 7] {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                refused += usize::from(!check(&bytes));
            }
            for number in [0, u64::MAX, 1 << 47, u64::MAX - 31] {
                let mut bytes = whole.clone();
                bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
                refused += usize::from(!check(&bytes));
            }
        }
        assert!(refused > header / 2, "{refused} of {header} x 7");
        let tensor = Tensor { name: "a".into(), shape: Vec::new(), kind: Kind::F32 };
        assert!(!check(&header_and(tensor.clone())), "it has no dimension");
        assert!(!check(&header_and(Tensor { shape: vec![1; 5], ..tensor.clone() })), "it has five");
        assert!(!check(&header_and(Tensor { shape: vec![2, 33], kind: Kind::Q8, ..tensor })), "half a block");
    }

    /// Returns a file with one tensor of zeros.
    fn header_and(tensor: Tensor) -> Vec<u8> {
        [header(&[], &[tensor]), vec![0; 512]].concat()
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let whole = std::fs::metadata(written(None).0.path()).unwrap().len() as usize;
        for bytes in (0..whole).step_by(7).chain([whole - 1]) {
            let (file, ..) = written(Some(bytes));
            assert_eq!(Gguf::open(file.path()).unwrap_err().kind, crate::fault::Kind::Model, "{bytes}");
        }
    }
}
