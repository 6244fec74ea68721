//! Sources of bytes: URLs and paths -> whole, verified local files. This module knows no file format.
//!
//! `parse` parses the user's text, `local` finds files on disk, `download` fetches a URL into `cache` by one `http`
//! attempt after another. `partial` is the file that grows between attempts. `hub` holds the rules of the Hugging
//! Face hub, `scheme` those of object stores.

mod address;
mod cache;
pub mod call;
pub mod send;
mod describe;
mod download;
mod failure;
mod hash;
mod html;
mod http;
mod hub;
mod local;
mod missing;
mod options;
mod pace;
mod parse;
mod partial;
mod redirect;
mod statement;
pub mod split;
mod scheme;
mod tls;

pub use hash::of as digest;
pub use local::find;

use std::path::Path;

pub use address::{Resolver, forbidden_host};
pub use cache::{free_bytes, require_space};
pub use html::looks_like_html;
pub use hub::Hub;
pub use local::{matching, of_first_kind};
pub use options::{File, Options, Source};
pub use pace::{Pace, Speed};
pub use redirect::redirects;
pub use scheme::Object;
pub use tls::{client_builder, install_crypto};

use crate::fault::{Fault, Result};
use crate::interrupt;
use crate::report::Report;

/// Removes files that killed processes left in a cache folder, except those of a process at work. A file that cannot be
/// removed does no harm.
pub fn collect(cache: &std::path::Path) {
    cache::Cache::new(cache).collect();
}

/// Returns the number of bytes of a URL's file that an earlier `fetch` left in the cache, whole or not.
pub fn held(source: &Source, cache: &Path) -> u64 {
    match source {
        Source::Url { url, sha256 } => cache::Cache::new(cache).held(url, sha256.as_deref()),
        Source::Path { .. } => 0,
    }
}

/// Fetches every source, in the order given. A directory or glob becomes its files, sorted by name. Paths are
/// checked first, so that a misspelt one is reported before the first long download.
///
/// This function runs its own single-threaded runtime. Call it from plain code, not from inside tokio.
///
/// # Errors
/// The first file that cannot be fetched, by who must act: data (missing, damaged, not a file), auth, capacity,
/// config, or network if all attempts failed. A failing disk of the cache is a storage fault.
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

/// Lists every object below an address of an object store, sorted by name.
///
/// # Errors
/// Config: not an address of an object store. Auth, data and network as in [`fetch`].
pub fn objects(url: &url::Url, options: &Options) -> Result<Vec<Object>> {
    on_network(async { scheme::Stores::new(options)?.list(url).await })
}

/// Writes files of this machine to an object store, below `url`, one after the other: (its name there, the file).
/// An object appears whole. Returns the version of the last, if the store has versions.
///
/// # Errors
/// Auth, Config: as [`fetch`] for object stores. Push: the store did not take a file in `attempts_max` attempts.
pub fn upload(
    url: &url::Url,
    files: &[(&str, &Path)],
    options: &Options,
    report: &Report,
) -> Result<Option<String>> {
    on_network(scheme::upload(url, files, options, report))
}

/// Returns whether an address is an object store's.
pub fn is_object_store(url: &url::Url) -> bool {
    scheme::of(url).is_some()
}

/// Runs network code on a runtime of its own, until it ends or a signal comes.
fn on_network<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Fault::machine("start the network runtime", &error))?;
    let done = runtime.block_on(interrupt::or_stopped(work, interrupt::stopped));
    // A name lookup that hangs in the C library must not keep the process alive.
    runtime.shutdown_background();
    done
}
