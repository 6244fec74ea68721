//! Data files for tests that read them in this process.

// Each test program uses a part of it.
#![allow(dead_code)]

use std::path::Path;

use hone::dataset::Options;
use hone::source;

/// Options that name nothing: everything is recognised.
pub const OPTIONS: Options = Options::RECOGNISED;

/// Writes a file of this name in messages, under the name that the cache gives to downloads.
pub fn written(folder: &Path, name: &str, content: &[u8]) -> source::File {
    let path = folder.join("blob");
    std::fs::write(&path, content).unwrap();
    let bytes = content.len() as u64;
    source::File { path, name: name.into(), bytes, sha256: String::new(), entry: 0 }
}
