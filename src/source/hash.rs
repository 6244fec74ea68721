//! Bytes -> their SHA-256 in lower-case hex.

use std::io::{self, Read};

use sha2::{Digest, Sha256};

use crate::words;

const BUFFER_BYTES: usize = 1 << 20;

/// Reads to the end and calls `each` with the number of bytes of every read. Returns the length and the digest.
pub fn read(mut from: impl Read, mut each: impl FnMut(u64)) -> io::Result<(u64, Sha256)> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut bytes = 0;
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return Ok((bytes, hasher)),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hasher.update(&buffer[..count]);
        bytes += count as u64;
        each(count as u64);
    }
}

/// Returns the digest in lower-case hex.
pub fn hex(hasher: Sha256) -> String {
    words::hex(hasher.finalize())
}

/// Returns the SHA-256 of `bytes` in lower-case hex.
pub fn of(bytes: &[u8]) -> String {
    hex(Sha256::new_with_prefix(bytes))
}
