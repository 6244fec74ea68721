//! A tag or digest -> the manifest's layers as files to bring, and each of them whole on disk; archives unpacked.
//!
//! For what is too large to be pulled at once: a file that is cut off stays and is continued, also by another process.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use super::image::Hashing;
use super::manifest::Descriptor;
use super::pull;
use super::reference::parse_reference;
use super::remote::Registry;
use super::unpack::{Choice, Limits, Unpacker};
use super::{Options, Target};
use crate::fault::{Fault, Result};
use crate::report::Report;

/// What oras writes beside a layer: the file's path, and whether it is an archive of a folder of that name.
const TITLE: &str = "org.opencontainers.image.title";
const UNPACK: &str = "io.deis.oras.content.unpack";

/// The parts of an image or artifact, first to last.
#[derive(Clone, Debug, PartialEq)]
pub struct Parts {
    /// Of the manifest.
    pub digest: String,
    pub list: Vec<Part>,
}

/// One layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// `sha256:...`
    pub digest: String,
    pub bytes: u64,
    /// The path it is to have, by whoever pushed it: not to be trusted. `None` in an image.
    pub title: Option<String>,
    /// Of an artifact's archive; an image's layers are archives without a word.
    pub unpack: bool,
}

/// Asks what a reference leads to.
///
/// # Errors
/// As [`super::pull()`].
pub fn list(image: &str, options: &Options, report: &Report) -> Result<Parts> {
    let pull::Resolved { digest, layers, .. } = pull::resolve(&mut open(image, options, report)?, image)?;
    let part = |layer: Descriptor| {
        let told = layer.annotations.unwrap_or_default();
        let unpack = told.get(UNPACK).is_some_and(|value| value == "true");
        Part { title: told.get(TITLE).cloned(), unpack, digest: layer.digest, bytes: layer.bytes }
    };
    Ok(Parts { digest, list: layers.into_iter().map(part).collect() })
}

/// Brings parts one after the other, each to a path that may hold a beginning of it. `arrived` takes a whole one.
///
/// # Errors
/// As [`super::pull()`]; what came stays. Model: twice the bytes were not those of the digest.
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

/// Puts the files of an archive that `wanted` takes by name below `folder`, over those of earlier layers; nothing else.
///
/// # Errors
/// Data: damaged, hostile, or more than `bytes_max` of such files. Storage: the disk failed.
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

/// The same repository by digest: a tag may move between two requests.
pub fn pinned(image: &str, digest: &str) -> Result<Target> {
    let reference = parse_reference(image)?;
    Ok(Target::Registry(format!("{}/{}@{digest}", reference.registry(), reference.repository())))
}

fn open<'a>(image: &str, options: &'a Options, report: &'a Report) -> Result<Registry<'a>> {
    Registry::source(parse_reference(image)?, options, Path::new("."), report)
}

/// A file that grows to a part, hashed as it does.
pub(super) struct Growing<'a> {
    path: &'a Path,
    file: Hashing<File>,
}

impl<'a> Growing<'a> {
    /// Reads what is there already.
    pub(super) fn open(path: &'a Path) -> Result<Growing<'a>> {
        let file = OpenOptions::new().create(true).read(true).append(true).open(path);
        let mut file = Hashing::new(file.map_err(|error| Fault::storage("open", path, &error))?);
        io::copy(&mut file, &mut io::sink()).map_err(|error| Fault::storage("read", path, &error))?;
        Ok(Growing { path, file })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.file.bytes()
    }

    pub(super) fn append(&mut self, piece: &[u8]) -> Result<()> {
        self.file.write_all(piece).map_err(|error| {
            Fault::storage("write", self.path, &error)
                .help("what came so far is kept: start it again when there is room")
        })
    }

    pub(super) fn empty(&mut self) -> Result<()> {
        let file = File::create(self.path).map_err(|error| Fault::storage("empty", self.path, &error))?;
        self.file = Hashing::new(file);
        Ok(())
    }

    /// The digest of what is there, which is then on disk for good.
    pub(super) fn digest(&mut self) -> Result<String> {
        let empty = File::open(self.path).map_err(|error| Fault::storage("open", self.path, &error))?;
        let (file, digest, _) = std::mem::replace(&mut self.file, Hashing::new(empty)).finish();
        file.sync_all().map_err(|error| Fault::storage("sync", self.path, &error))?;
        Ok(digest)
    }
}
