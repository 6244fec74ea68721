//! An adapter's folder -> the places that it is sent to: images, repositories of the hub, object stores, folders.

mod folder;
mod hub;

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use url::Url;

use crate::adapter::{CONFIG_FILE, WEIGHTS_FILE};
use crate::fault::{Fault, Result};
use crate::registry::{self, ImageFacts, Target};
use crate::report::clean::clean;
use crate::report::{Report, Stage};
use crate::source;

pub use hub::Repository;

const HUB: &str = "hf://";
const FOLDER: &str = "file:";
/// The card that stands beside an adapter.
const CARD_FILE: &str = "README.md";

/// A place that an adapter is sent to.
#[derive(Clone, Debug, PartialEq)]
pub enum Destination {
    /// An image of a registry, or an image layout on disk.
    Image(Target),
    /// A repository of the Hugging Face hub.
    Hub(Repository),
    /// A folder of an object store: `s3://BUCKET/FOLDER`.
    Objects(Url),
    /// A folder of this machine, such as a mounted volume.
    Folder(PathBuf),
}

impl Destination {
    /// Parses `hf://OWNER/NAME[@REVISION]`, `s3://BUCKET/FOLDER` (`gs://`, `az://`), `file:FOLDER`, or an image:
    /// `host/repository:tag`, `oci:FOLDER`.
    ///
    /// # Errors
    /// Config: an address that names no place.
    pub fn parse(text: &str) -> Result<Destination> {
        let text = text.trim();
        if let Some(rest) = text.strip_prefix(HUB) {
            return Repository::parse(rest).map(Destination::Hub);
        }
        if let Some(folder) = text.strip_prefix(FOLDER) {
            let folder = folder.strip_prefix("//").unwrap_or(folder);
            return match folder.is_empty() {
                false => Ok(Destination::Folder(folder.into())),
                true => Err(Fault::config("file: names no folder").help("write file:FOLDER")),
            };
        }
        match Url::parse(text) {
            Ok(url) if source::is_object_store(&url) => objects(url).map(Destination::Objects),
            _ => Target::parse(text).map(Destination::Image),
        }
    }
}

fn objects(url: Url) -> Result<Url> {
    let named = url.host_str().is_some_and(|bucket| !bucket.is_empty()) && url.path().len() > 1;
    match named && url.query().is_none() && url.fragment().is_none() {
        true => Ok(url),
        false => Err(Fault::config(format!("{}: not a folder of a bucket", url.scheme()))
            .help(format!("write {}://BUCKET/FOLDER", url.scheme()))),
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Destination::Image(target) => target.fmt(f),
            Destination::Hub(repository) => write!(f, "{HUB}{repository}"),
            Destination::Objects(url) => url.fmt(f),
            Destination::Folder(folder) => write!(f, "{FOLDER}{}", folder.display()),
        }
    }
}

/// LIMIT: letters of a place's name for a received version; a digest has 71.
const REVISION_LETTERS_MAX: usize = 200;

/// Settings to reach the places, and the description of the adapter that is written there.
pub struct Options<'a> {
    /// Options of connections to registries.
    pub registry: &'a registry::Options,
    /// Options of connections to the hub and object stores.
    pub source: &'a source::Options,
    /// The image's annotations.
    pub facts: &'a ImageFacts,
    /// The first line of the hub's commit.
    pub message: &'a str,
}

/// The content that was sent to a place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Published {
    /// The place.
    pub destination: String,
    /// The image's digest, the hub's commit, or a store's version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Whether it is an image.
    #[serde(default)]
    pub image: bool,
}

/// Checks, before hours of training, whether anything would stop sending. It asks no network.
///
/// # Errors
/// Config: a folder that is the adapter's own or holds something else, a file of credentials that does not exist.
/// Auth: no token for the hub.
pub fn check(destination: &Destination, adapter: &Path, options: &registry::Options) -> Result<()> {
    match destination {
        Destination::Image(target) => registry::check(target, adapter, options),
        Destination::Hub(repository) => hub::check(repository),
        Destination::Folder(folder) => folder::check(folder, adapter),
        Destination::Objects(_) => Ok(()),
    }
}

/// Sends the adapter in `folder` to one place. Sending the same adapter again changes nothing and sends little.
///
/// # Errors
/// Config, Model: the folder holds no complete adapter, or the place refuses it permanently. Auth: the credentials are
/// missing or refused. Push: the place could not be reached. Storage: a disk failed.
pub fn publish(
    folder: &Path,
    destination: &Destination,
    options: &Options,
    report: &Report,
) -> Result<Published> {
    let revision = match destination {
        Destination::Image(target) => {
            Some(registry::push(folder, target, options.facts, options.registry, report)?.digest)
        }
        Destination::Hub(repository) => {
            Some(hub::publish(repository, &files(folder)?, options.message, options.source, report)?)
        }
        Destination::Objects(url) => {
            let files = files(folder)?;
            let named: Vec<(&str, &Path)> =
                files.iter().map(|(name, path)| (*name, path.as_path())).collect();
            source::upload(url, &named, options.source, report)?
        }
        Destination::Folder(to) => {
            folder::publish(&files(folder)?, folder, to)?;
            None
        }
    };
    let image = matches!(destination, Destination::Image(_));
    let revision = revision.as_deref().map(shown);
    let published = Published { destination: destination.to_string(), revision, image };
    if !image {
        let version = published.revision.as_deref().map_or(String::new(), |version| format!(", {version}"));
        report.note(Stage::Push, format!("{destination}: the adapter is there{version}"));
    }
    Ok(published)
}

/// Returns a place's own name for the received version, as text that is safe in a terminal and in a file of lines.
fn shown(revision: &str) -> String {
    clean(revision, REVISION_LETTERS_MAX)
}

/// Returns the files that are sent, the configuration last: if it is there, the adapter is complete.
fn files(folder: &Path) -> Result<Vec<(&'static str, PathBuf)>> {
    let mut files = Vec::new();
    for (name, needed) in [(CARD_FILE, false), (WEIGHTS_FILE, true), (CONFIG_FILE, true)] {
        let path = folder.join(name);
        match path.is_file() {
            true => files.push((name, path)),
            false if needed => {
                return Err(Fault::config(format!("{} holds no {name}", folder.display()))
                    .help("name the folder of an adapter as PEFT saves it"));
            }
            false => {}
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Kind;

    #[test]
    fn what_a_place_calls_a_version_moves_no_cursor() {
        assert_eq!(shown("0123abcd\u{1b}[2J\nhf://other"), "0123abcd\\u{1b}[2J\\nhf://other");
        let digest = format!("sha256:{}", "a".repeat(64));
        assert_eq!((shown(&digest), shown("\"etag\"")), (digest, "\"etag\"".into()));
        assert!(shown(&"x".repeat(10_000)).len() < 300);
    }

    #[test]
    fn every_kind_of_place_is_read_and_shown() {
        for (text, shown) in [
            ("hf://org/name", "hf://org/name"),
            ("hf://org/name@v2", "hf://org/name@v2"),
            ("hf://name", "hf://name"),
            ("s3://bucket/a/b/", "s3://bucket/a/b/"),
            ("file:/mnt/results", "file:/mnt/results"),
            ("file:///mnt/results", "file:/mnt/results"),
            ("oci:layout:v1", "oci:layout:v1"),
            ("host:5000/team/a:1", "host:5000/team/a:1"),
        ] {
            assert_eq!(Destination::parse(text).unwrap().to_string(), shown, "{text}");
        }
        for text in
            ["hf://", "hf://a/b/c", "hf://a/..", "hf://a/b@", "s3://bucket", "s3://bucket/", "file:", "a b"]
        {
            assert_eq!(Destination::parse(text).unwrap_err().kind, Kind::Config, "{text}");
        }
    }
}
