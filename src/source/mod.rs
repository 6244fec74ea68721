//! Where bytes come from: URLs and paths -> whole, verified local files. Knows no format.
//!
//! `parse` reads what the user wrote, `local` finds files on disk, `download` brings a URL into `cache`, one
//! `http` attempt after the other; `partial` is the file that grows between them; `hub` is what the Hugging Face
//! hub wants, `scheme` what object stores do.

mod address;
mod cache;
mod describe;
mod download;
mod hash;
mod html;
mod http;
mod hub;
mod local;
mod pace;
mod parse;
mod partial;
mod scheme;
mod tls;

pub use hash::of as digest;
pub use local::find;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use address::{Resolver, forbidden_host};
pub use cache::{free_bytes, require_space};
pub use html::looks_like_html;
pub use http::redirects;
pub use hub::Hub;
pub use local::{matching, of_first_kind};
pub use pace::{Pace, Speed};
pub use scheme::Object;
pub use tls::{client_builder, install_crypto};

use crate::fault::{Fault, Result};
use crate::interrupt;
use crate::report::Report;

/// How to fetch. Filled by `plan`.
#[derive(Clone, Debug)]
pub struct Options {
    /// Content-addressed store of finished downloads, and of partial ones to resume.
    pub cache: PathBuf,
    pub connect_timeout: Duration,
    /// Longest silence while a body is read.
    pub read_timeout: Duration,
    /// A body that comes more slowly is begun again, and given up like one that does not come.
    pub speed: Speed,
    /// Longest time for one file, all attempts together.
    pub total_timeout: Duration,
    /// Attempts in a row that bring no new byte.
    pub attempts_max: u32,
    /// Wait before the second attempt; doubled for each further one, with jitter.
    pub backoff: Duration,
    pub file_bytes_max: u64,
    /// Endings of data files, kind by kind in order of preference: what a folder is searched for.
    pub endings: &'static [&'static [&'static str]],
    /// Extra root certificates (PEM).
    pub ca_file: Option<PathBuf>,
}

/// One thing to fetch, parsed: what the user wrote without its secrets, and its expected digest.
#[derive(Clone, PartialEq)]
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
    /// Which of the sources asked for it belongs to, counted from 0.
    pub entry: usize,
}

/// Bytes of a URL's file that an earlier `fetch` left in the cache, whole or not.
pub fn held(source: &Source, cache: &Path) -> u64 {
    match source {
        Source::Url { url, sha256 } => cache::Cache::new(cache).held(url, sha256.as_deref()),
        Source::Path { .. } => 0,
    }
}

/// Brings every source here, in the order given; a directory or glob becomes its files, sorted by name.
/// Paths are looked at first, so that a misspelt one is known before the first long download.
///
/// Runs its own single-threaded runtime: call it from plain code, not from inside tokio.
///
/// # Errors
/// The first file that cannot be had, by who must act: data (missing, damaged, not a file), auth, capacity,
/// config, or, when all attempts are used up, network; a failing cache disk is storage.
pub fn fetch(sources: &[Source], options: &Options, report: &Report) -> Result<Vec<File>> {
    let find = |source| local::find(source, options.endings, report);
    let found = sources.iter().map(find).collect::<Result<Vec<_>>>()?;
    let work = async {
        let downloads = download::Downloads::new(options, report);
        let mut files: Vec<File> = Vec::new();
        for (entry, (source, paths)) in sources.iter().zip(found).enumerate() {
            let before = files.len();
            match source {
                Source::Url { url, sha256 } => {
                    for (url, name) in downloads.expand(url, &source.name(), sha256.as_deref()).await? {
                        files.push(downloads.file(&url, &name, sha256.as_deref()).await?);
                    }
                }
                Source::Path { sha256, .. } => {
                    for path in paths {
                        files.push(local::verify(path, sha256.as_deref(), report)?);
                    }
                }
            }
            files[before..].iter_mut().for_each(|file| file.entry = entry);
        }
        Ok(files)
    };
    on_network(work)
}

/// Every object below an address of an object store, sorted by name.
///
/// # Errors
/// Config: another address. Auth, data and network as in [`fetch`].
pub fn objects(url: &url::Url, options: &Options) -> Result<Vec<Object>> {
    on_network(async { scheme::Stores::new(options)?.list(url).await })
}

/// Whether an address is an object store's.
pub fn is_object_store(url: &url::Url) -> bool {
    scheme::of(url).is_some()
}

/// Runs what asks the network on a runtime of its own, until it ends or a signal comes.
fn on_network<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Fault::internal(format!("cannot start the network runtime: {error}")))?;
    let done = runtime.block_on(interrupt::or_stopped(work, interrupt::before_training));
    // A name lookup that hangs in the C library must not keep the process.
    runtime.shutdown_background();
    done
}
