//! Where bytes come from: URLs and paths -> whole, verified local files. Knows no format.

use std::path::PathBuf;
use std::time::Duration;

/// How to fetch. Filled by `plan`.
#[derive(Clone, Debug)]
pub struct Options {
    /// Content-addressed store of finished downloads, and of partial ones to resume.
    pub cache: PathBuf,
    pub connect_timeout: Duration,
    /// Longest silence while a body is read.
    pub read_timeout: Duration,
    /// Longest time for one file, all attempts together.
    pub total_timeout: Duration,
    pub attempts_max: u32,
    pub file_bytes_max: u64,
    /// Extra root certificates (PEM).
    pub ca_file: Option<PathBuf>,
}

/// One thing to fetch, parsed: what the user wrote without its secrets, and its expected digest.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    Url {
        url: url::Url,
        sha256: Option<String>,
    },
    /// A file, a directory, or a glob.
    Path {
        pattern: String,
        sha256: Option<String>,
    },
}

/// A file that is here, whole and hashed.
#[derive(Clone, Debug, PartialEq)]
pub struct File {
    pub path: PathBuf,
    /// As the user named it, without secrets: for messages.
    pub name: String,
    pub bytes: u64,
    /// Lower-case hex.
    pub sha256: String,
}
