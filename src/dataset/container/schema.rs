//! The footer of a parquet file -> whether its schema and lists are safe for a parser.
//!
//! The parquet crate builds the schema by recursion as deep as the file declares, and reserves as many children as
//! a group declares: 80 kB of nested groups overflow any stack, and 39 bytes reserve 17 GB. Neither can be caught.
//! Therefore the footer (Thrift compact, `FileMetaData`) is checked here first, with a loop and a count.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::pages::{Bad, I32, LIST, STRUCT, Thrift};

/// LIMIT: bytes of a footer, which has some hundred bytes per column of each row group.
const FOOTER_BYTES_MAX: u64 = 128 << 20;
/// LIMIT: nested groups. A list of structs has three levels.
const SCHEMA_DEPTH_MAX: usize = 64;
/// LIMIT: columns and groups together.
const SCHEMA_ELEMENTS_MAX: u64 = 40_000;
/// Length and magic at the end of the file.
const TAIL_BYTES: u64 = 8;

/// Checks the footer of a parquet file. Error: its fault, or that it is no parquet file.
pub(super) fn check(file: &File, file_bytes: u64) -> Result<(), String> {
    let mut tail = [0; TAIL_BYTES as usize];
    let unreadable = |error: std::io::Error| format!("cannot read it: {error}");
    let Some(from) = file_bytes.checked_sub(TAIL_BYTES) else {
        return Err(format!("the file has {file_bytes} bytes"));
    };
    file.read_exact_at(&mut tail, from).map_err(unreadable)?;
    let [a, b, c, d, magic @ ..] = tail;
    if magic != *b"PAR1" {
        return Err("the file does not end with PAR1".into());
    }
    let bytes = u64::from(u32::from_le_bytes([a, b, c, d]));
    if bytes > file_bytes - TAIL_BYTES {
        return Err(format!("it promises {bytes} bytes, the file has {file_bytes}"));
    }
    if bytes > FOOTER_BYTES_MAX {
        return Err(format!("{bytes} bytes, limit {FOOTER_BYTES_MAX}"));
    }
    let mut footer = vec![0; bytes as usize];
    file.read_exact_at(&mut footer, file_bytes - TAIL_BYTES - bytes).map_err(unreadable)?;
    let mut schema = Schema::default();
    let walked = metadata(&mut Thrift { bytes: &footer, at: 0 }, &mut schema);
    match (schema.problem.take(), walked) {
        (Some(problem), _) => Err(problem),
        (None, Err(_)) => Err("its structure is malformed".into()),
        (None, Ok(())) => schema.finish(),
    }
}

/// Walks `FileMetaData`. Its second field is the schema, a list of elements, each with its number of children.
fn metadata(thrift: &mut Thrift, schema: &mut Schema) -> Result<(), Bad> {
    thrift.structure(0, &mut |thrift, id, kind| match (id, kind) {
        (2, LIST) => {
            let (kind, count) = thrift.list()?;
            schema.begin(count);
            for _ in 0..count {
                if kind != STRUCT || schema.problem.is_some() {
                    return Err(Bad::Malformed);
                }
                let mut children = 0;
                thrift.structure(1, &mut |thrift, id, kind| match (id, kind) {
                    (5, I32) => {
                        children = thrift.size()?;
                        Ok(())
                    }
                    _ => thrift.skip(kind, 2),
                })?;
                schema.element(children);
            }
            Ok(())
        }
        _ => thrift.skip(kind, 1),
    })
}

/// The tree of groups, as far as it has been read.
#[derive(Default)]
struct Schema {
    elements_left: u64,
    /// For each open group, the number of children still to come.
    open: Vec<u64>,
    problem: Option<String>,
}

impl Schema {
    fn begin(&mut self, elements: u64) {
        self.elements_left = elements;
        if elements > SCHEMA_ELEMENTS_MAX {
            self.problem = Some(format!("its schema has {elements} elements, limit {SCHEMA_ELEMENTS_MAX}"));
        }
    }

    fn element(&mut self, children: u64) {
        self.elements_left = self.elements_left.saturating_sub(1);
        if let Some(waiting) = self.open.last_mut() {
            *waiting -= 1;
        }
        if children > self.elements_left {
            let left = self.elements_left;
            self.problem = Some(format!("its schema promises {children} children, {left} elements are left"));
        } else if children > 0 {
            self.open.push(children);
        }
        while self.open.last() == Some(&0) {
            self.open.pop();
        }
        if self.open.len() > SCHEMA_DEPTH_MAX {
            self.problem = Some(format!("its schema is more than {SCHEMA_DEPTH_MAX} groups deep"));
        }
    }

    fn finish(self) -> Result<(), String> {
        match self.open.is_empty() {
            true => Ok(()),
            false => Err("its schema ends inside a group".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// Checks a file whose schema's elements have so many children each.
    fn of(children: &[u32]) -> Result<(), String> {
        let varint = |value: u32| {
            let (mut rest, mut bytes) = (value, Vec::new());
            while rest > 127 {
                bytes.push(rest as u8 | 128);
                rest >>= 7;
            }
            bytes.push(rest as u8);
            bytes
        };
        let mut footer = vec![0x15, 0x02, 0x19, 0xfc]; // version 1; schema: a list of structs
        footer.extend(varint(children.len() as u32));
        for &children in children {
            footer.extend([0x48, 1, b'x', 0x15]); // name; number of children
            footer.extend(varint(children << 1));
            footer.push(0);
        }
        footer.push(0);
        let mut bytes = b"PAR1".to_vec();
        bytes.extend(&footer);
        bytes.extend((footer.len() as u32).to_le_bytes());
        bytes.extend(b"PAR1");
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        check(&file, bytes.len() as u64)
    }

    #[test]
    fn a_schema_is_as_deep_and_as_wide_as_it_may_be() {
        let deep = |groups: usize| of(&[vec![1; groups], vec![0]].concat());
        assert_eq!(deep(SCHEMA_DEPTH_MAX), Ok(()));
        assert!(deep(SCHEMA_DEPTH_MAX + 1).unwrap_err().contains("groups deep"));
        assert!(deep(10_000).unwrap_err().contains("groups deep"));
        assert_eq!(of(&[3, 2, 0, 0, 0, 0]), Ok(()), "a root of a group of two and two columns");
        assert!(of(&[2, 0]).unwrap_err().contains("promises 2 children"));
        assert!(of(&[(1 << 30) - 1]).unwrap_err().contains("promises"));
        let wide = |columns: u32| of(&[vec![columns], vec![0; columns as usize]].concat());
        assert_eq!(wide(10_000), Ok(()));
        assert!(wide(SCHEMA_ELEMENTS_MAX as u32).unwrap_err().contains("elements"));
    }

    #[test]
    fn a_footer_that_lies_about_itself_is_refused() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"PAR1\xff\xff\xff\x7fPAR1").unwrap();
        assert!(check(&file, 12).unwrap_err().contains("promises"));
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"PAR1\x19\xfc\xff\xff\xff\x0f\x06\x00\x00\x00PAR1").unwrap();
        assert!(check(&file, 18).unwrap_err().contains("malformed"));
    }
}
