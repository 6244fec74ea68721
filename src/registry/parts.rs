//! A tag or digest -> the manifest's layers as whole files on disk; archives unpacked.
//!
//! This is for content that is too large to pull in one go. A partial file stays, and this or another process
//! continues it.

use std::fs::File;
use std::path::Path;

use super::growing::Part;
use super::manifest::Descriptor;
use super::options::{Options, Target};
use super::pull;
use super::reference::parse_reference;
use super::remote::Registry;
use super::unpack::{Choice, Limits, Unpacker};
use crate::fault::{Fault, Result};
use crate::report::Report;

/// Annotations that oras adds to a layer: the file's path, and whether it is an archive of a folder of that name.
const TITLE: &str = "org.opencontainers.image.title";
const UNPACK: &str = "io.deis.oras.content.unpack";

/// The parts of an image or artifact, first to last.
#[derive(Clone, Debug, PartialEq)]
pub struct Parts {
    /// Digest of the manifest.
    pub digest: String,
    /// The layers, first to last.
    pub list: Vec<Part>,
}

/// Requests the parts that a reference leads to.
///
/// The same as of [`super::pull()`].
pub fn list(image: &str, options: &Options, report: &Report) -> Result<Parts> {
    let pull::Resolved { digest, layers, .. } = pull::resolve(&mut open(image, options, report)?, image)?;
    let part = |layer: Descriptor| {
        let told = layer.annotations.unwrap_or_default();
        let unpack = told.get(UNPACK).is_some_and(|value| value == "true");
        Part { title: told.get(TITLE).cloned(), unpack, digest: layer.digest, bytes: layer.bytes }
    };
    Ok(Parts { digest, list: layers.into_iter().map(part).collect() })
}

/// Downloads parts one after the other, each to a path that may already hold its beginning. `arrived` is called with
/// each whole part.
///
/// The same as of [`super::pull()`]; the bytes received stay on disk. Model: the bytes had the wrong digest twice.
pub fn download<'a>(
    image: &str,
    parts: impl Iterator<Item = (&'a Part, &'a Path)>,
    options: &Options,
    report: &Report,
    mut arrived: impl FnMut(&Part, &Path) -> Result<()>,
) -> Result<()> {
    let mut registry = open(image, options, report)?;
    for (part, path) in parts {
        registry.complete(part, path)?;
        arrived(part, path)?;
    }
    Ok(())
}

/// Unpacks archives, first to last, into `folder`. Only files whose names `wanted` accepts are written, over those of
/// earlier layers.
///
/// Data: an archive is damaged or hostile, or has more than `bytes_max` of such files. Storage: the disk failed.
pub fn unpack(
    archives: &[&Path],
    folder: &Path,
    wanted: fn(&str) -> bool,
    bytes_max: u64,
    name: &str,
) -> Result<()> {
    let limits =
        Limits { extracted_bytes_max: bytes_max, expanded_bytes_max: u64::MAX / 2, ..Limits::default() };
    let mut unpacker = Unpacker::choosing(folder, limits, Choice::Named(wanted));
    for archive in archives {
        let file = File::open(archive).map_err(|error| Fault::storage("open", archive, &error))?;
        unpacker.layer(file, name)?;
    }
    Ok(())
}

/// Returns the same repository by digest, because a tag may move between two requests.
pub fn pinned(image: &str, digest: &str) -> Result<Target> {
    let reference = parse_reference(image)?;
    Ok(Target::Registry(format!("{}/{}@{digest}", reference.registry(), reference.repository())))
}

fn open<'a>(image: &str, options: &'a Options, report: &'a Report) -> Result<Registry<'a>> {
    Registry::source(parse_reference(image)?, options, Path::new("."), report)
}
