//! Headers of an answer -> the digest that the server itself states for the whole file, and whether a file has it.
//!
//! Servers state digests in many headers: `Repr-Digest` and `Content-Digest` (RFC 9530), `Digest` (RFC 3230),
//! `Content-MD5`, the hub's `X-Linked-ETag`, and those of the clouds' object stores. Of several the strongest is
//! taken.

use std::fmt;
use std::io::{self, Read};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use crc_fast::CrcAlgorithm::{Crc32Iscsi, Crc64Nvme};
use md5::Md5;
use reqwest::header::HeaderMap;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::words;

const BUFFER_BYTES: usize = 1 << 20;

/// A function from bytes to a digest, the strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// SHA-256, 32 bytes.
    Sha256,
    /// MD5, 16 bytes.
    Md5,
    /// CRC-64/NVME, 8 bytes, the highest first.
    Crc64Nvme,
    /// CRC-32C (Castagnoli), 4 bytes, the highest first.
    Crc32C,
}

/// A digest of the whole file, as its server states it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statement {
    /// The algorithm of the digest.
    pub algorithm: Algorithm,
    /// The digest, in lower-case hex.
    pub hex: String,
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Algorithm::Sha256 => "SHA-256",
            Algorithm::Md5 => "MD5",
            Algorithm::Crc64Nvme => "CRC-64",
            Algorithm::Crc32C => "CRC-32C",
        })
    }
}

impl Statement {
    /// Returns the strongest digest of the whole file in an answer's headers. `is_whole`: the answer's body is the
    /// whole file, so that digests of the body count too.
    pub fn of(headers: &HeaderMap, is_whole: bool) -> Option<Statement> {
        let mut found = Vec::new();
        for (name, is_of_body) in FIELDS {
            if is_of_body && !is_whole {
                continue;
            }
            let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
            values.for_each(|value| found.extend(members(name, value)));
        }
        // The digest is that of the stored file, but the store unpacks the file when it sends it.
        if headers.get("x-goog-stored-content-encoding").is_some_and(|encoding| encoding != "identity") {
            found.retain(|(name, _)| *name != GOOGLE);
        }
        found.into_iter().map(|(_, statement)| statement).min_by_key(|statement| statement.algorithm as u8)
    }

    /// Returns whether content has this digest.
    pub fn holds(&self, mut content: impl Read) -> io::Result<bool> {
        let found = match self.algorithm {
            Algorithm::Sha256 => hashed::<Sha256>(&mut content)?,
            Algorithm::Md5 => hashed::<Md5>(&mut content)?,
            Algorithm::Crc64Nvme => format!("{:016x}", checked(Crc64Nvme, &mut content)?),
            Algorithm::Crc32C => format!("{:08x}", checked(Crc32Iscsi, &mut content)?),
        };
        Ok(found == self.hex)
    }
}

const GOOGLE: &str = "x-goog-hash";

/// Headers that state digests, and whether the digest is one of the body sent, which may be a part of the file.
const FIELDS: [(&str, bool); 10] = [
    ("repr-digest", false),
    ("content-digest", true),
    ("digest", false),
    ("x-linked-etag", false),
    ("x-amz-checksum-sha256", true),
    ("x-amz-checksum-crc64nvme", true),
    ("x-amz-checksum-crc32c", true),
    ("x-ms-blob-content-md5", false),
    ("content-md5", true),
    (GOOGLE, false),
];

/// Returns the statements in one header. A malformed statement, or one of an unknown algorithm, is left out.
fn members(field: &'static str, value: &str) -> Vec<(&'static str, Statement)> {
    let of =
        |algorithm, text: &str| Some((field, Statement { algorithm, hex: from_base64(algorithm, text)? }));
    let named = |pair: &str| {
        let (name, text) = pair.trim().split_once('=')?;
        let algorithm = match name.to_ascii_lowercase().as_str() {
            "sha-256" => Algorithm::Sha256,
            "md5" => Algorithm::Md5,
            "crc32c" => Algorithm::Crc32C,
            _ => return None,
        };
        of(algorithm, text.trim().trim_matches(':'))
    };
    match field {
        "repr-digest" | "content-digest" | "digest" | GOOGLE => value.split(',').filter_map(named).collect(),
        "x-linked-etag" => Vec::from_iter(from_etag(value).map(|statement| (field, statement))),
        "x-amz-checksum-sha256" => Vec::from_iter(of(Algorithm::Sha256, value)),
        "x-amz-checksum-crc64nvme" => Vec::from_iter(of(Algorithm::Crc64Nvme, value)),
        "x-amz-checksum-crc32c" => Vec::from_iter(of(Algorithm::Crc32C, value)),
        _ => Vec::from_iter(of(Algorithm::Md5, value)),
    }
}

/// Reads the hub's entity tag. For a large file it is the SHA-256, for a small one something else.
fn from_etag(value: &str) -> Option<Statement> {
    let hex = value.trim().trim_matches('"').to_ascii_lowercase();
    let is_sha256 = hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_sha256.then_some(Statement { algorithm: Algorithm::Sha256, hex })
}

/// Returns a digest of the algorithm's length. S3's digests of parts have a dash and are no base64.
fn from_base64(algorithm: Algorithm, text: &str) -> Option<String> {
    let length = match algorithm {
        Algorithm::Sha256 => 32,
        Algorithm::Md5 => 16,
        Algorithm::Crc64Nvme => 8,
        Algorithm::Crc32C => 4,
    };
    STANDARD.decode(text.trim()).ok().filter(|bytes| bytes.len() == length).map(words::hex)
}

fn hashed<D: Digest>(content: &mut impl Read) -> io::Result<String> {
    let mut hasher = D::new();
    in_pieces(content, |piece| hasher.update(piece))?;
    Ok(words::hex(&hasher.finalize()[..]))
}

fn checked(algorithm: crc_fast::CrcAlgorithm, content: &mut impl Read) -> io::Result<u64> {
    let mut digest = crc_fast::Digest::new(algorithm);
    in_pieces(content, |piece| digest.update(piece))?;
    Ok(digest.finalize())
}

fn in_pieces(content: &mut impl Read, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match content.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => each(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The digests of "123456789": the check values of the CRC catalogue, and openssl's.
    const SHA256: &str = "FeKw08M4keuw8e9gnsQZQgwg4yDOlMZfvIwzEkSOsiU=";
    const MD5: &str = "JfnnlDI7RTiF9RgfG2JNCw==";
    const CRC32C: &str = "4waSgw==";
    const CRC64: &str = "rosUhgp5mIg=";

    fn stated(headers: &[(&'static str, &str)], is_whole: bool) -> Option<Statement> {
        let mut map = HeaderMap::new();
        headers.iter().for_each(|(name, value)| _ = map.append(*name, value.parse().unwrap()));
        Statement::of(&map, is_whole)
    }

    /// Content whose first read is interrupted by a signal, or fails.
    struct Disturbed<'a>(Option<io::Error>, &'a [u8]);

    impl Read for Disturbed<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.take().map_or_else(|| self.1.read(buffer), Err)
        }
    }

    #[test]
    fn a_signal_does_not_end_the_comparison_and_a_failing_disk_does() {
        let statement = stated(&[("content-md5", MD5)], true).unwrap();
        let holds = |error: io::Error| statement.holds(Disturbed(Some(error), b"123456789"));
        assert!(holds(io::ErrorKind::Interrupted.into()).unwrap());
        assert_eq!(
            holds(io::Error::from_raw_os_error(libc::EIO)).unwrap_err().raw_os_error(),
            Some(libc::EIO)
        );
    }

    #[test]
    fn every_servers_way_of_stating_a_digest_is_understood() {
        let of_body = |field: &'static str, value: &str| {
            assert_eq!(stated(&[(field, value)], false), None, "{field} of a part");
            stated(&[(field, value)], true)
        };
        let found = [
            stated(&[("repr-digest", &format!("sha-256=:{SHA256}:"))], false),
            stated(&[("repr-digest", &format!("sha-512=:AAAA:, sha-256=:{SHA256}:"))], false),
            of_body("content-digest", &format!("sha-256=:{SHA256}:")),
            stated(&[("digest", &format!("SHA-256={SHA256}"))], false),
            of_body("x-amz-checksum-sha256", SHA256),
            of_body("x-amz-checksum-crc64nvme", CRC64),
            of_body("x-amz-checksum-crc32c", CRC32C),
            of_body("content-md5", MD5),
            stated(&[("x-ms-blob-content-md5", MD5)], false),
            stated(
                &[("x-goog-hash", &format!("crc32c={CRC32C}")), ("x-goog-hash", &format!("md5={MD5}"))],
                false,
            ),
            stated(&[("x-goog-hash", &format!("crc32c={CRC32C}"))], false),
            stated(
                &[("x-linked-etag", "\"15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225\"")],
                false,
            ),
        ];
        for (index, statement) in found.into_iter().enumerate() {
            let statement = statement.unwrap_or_else(|| panic!("no statement in case {index}"));
            assert!(statement.holds(&b"123456789"[..]).unwrap(), "case {index}");
            assert!(!statement.holds(&b"123456780"[..]).unwrap(), "case {index}");
        }
    }

    #[test]
    fn what_is_no_digest_of_the_file_is_no_statement() {
        for (field, value) in [
            ("x-amz-checksum-sha256", "FeKw08M4keuw8e9gnsQZQgwg4yDOlMZfvIwzEkSOsiU=-12"),
            ("repr-digest", "sha-256=:AAAA:"),
            ("repr-digest", "sha-256"),
            ("x-linked-etag", "\"3f786850e387550fdab836ed7e6dc881de23001b\""),
            ("content-md5", "not base64"),
        ] {
            assert_eq!(stated(&[(field, value)], true), None, "{field}: {value}");
        }
        let packed = [("x-goog-hash", "crc32c=4waSgw=="), ("x-goog-stored-content-encoding", "gzip")];
        assert_eq!(stated(&packed, true), None, "of what the store holds, not of what it sends");
    }
}
