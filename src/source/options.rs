//! Options and results of a download, as plain values.

use std::path::PathBuf;
use std::time::Duration;

use super::pace::Speed;

/// The settings of downloads. `plan` fills them.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder of finished downloads by digest, and of partial ones to resume.
    pub cache: PathBuf,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest silence while a body is read.
    pub read_timeout: Duration,
    /// Least speed. A slower body is requested again, and counts as a failed attempt.
    pub speed: Speed,
    /// Longest time for one file, over all attempts.
    pub total_timeout: Duration,
    /// Most attempts in a row without a new byte.
    pub attempts_max: u32,
    /// Wait before the second attempt. It doubles for each further one, with jitter.
    pub backoff: Duration,
    /// Largest file that is downloaded, in bytes.
    pub file_bytes_max: u64,
    /// Endings of data files by kind, in order of preference. A folder is searched for them.
    pub endings: &'static [&'static [&'static str]],
    /// Extra root certificates (PEM).
    pub ca_file: Option<PathBuf>,
}

/// One thing to fetch, parsed: an address and the digest it must have.
#[derive(Clone, PartialEq)]
pub enum Source {
    /// A URL.
    Url {
        /// The URL, which may hold secrets.
        url: url::Url,
        /// SHA-256 in hex that the file must have.
        sha256: Option<String>,
    },
    /// A file, a directory, or a glob.
    Path {
        /// The path or glob.
        pattern: String,
        /// SHA-256 in hex that the one file must have.
        sha256: Option<String>,
    },
}

/// A local file, whole and hashed.
#[derive(Clone, Debug, PartialEq)]
pub struct File {
    /// The file.
    pub path: PathBuf,
    /// The name that the user gave, without secrets, for messages.
    pub name: String,
    /// Length.
    pub bytes: u64,
    /// SHA-256 in lower-case hex.
    pub sha256: String,
    /// Index of the source that it belongs to, counted from 0.
    pub entry: usize,
}
