//! The reason why one attempt of a download failed, and whether another can help.

use std::time::Duration;

use crate::fault::Fault;

/// The reason why an attempt received no more bytes.
pub enum Failure {
    /// A retry can help.
    Retry {
        /// The reason why the attempt failed.
        cause: String,
        /// The earliest time for a retry, if the server named one.
        after: Option<Duration>,
        /// Whether the retry must begin with the first byte.
        from_start: bool,
    },
    /// A retry cannot help.
    Fatal(Fault),
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Failure {
        Failure::Fatal(fault)
    }
}

impl Failure {
    /// Returns a failure after which the download can be resumed.
    pub fn retry(cause: impl Into<String>) -> Failure {
        Failure::Retry { cause: cause.into(), after: None, from_start: false }
    }

    /// Returns a failure after which the download must begin again.
    pub fn from_start(cause: impl Into<String>) -> Failure {
        Failure::Retry { cause: cause.into(), after: None, from_start: true }
    }
}
