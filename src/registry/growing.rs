//! A layer that is too large for one attempt -> a file that grows to it, over several starts.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use super::image::Hashing;
use crate::fault::{Fault, Result};
use crate::plain;

/// One layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Digest of the layer, `sha256:...`.
    pub digest: String,
    /// Size of the layer.
    pub bytes: u64,
    /// The path that the pusher gave the file; it must not be trusted. `None` in an image.
    pub title: Option<String>,
    /// Whether the layer of an artifact is an archive. Layers of images are always archives and do not say so.
    pub unpack: bool,
}

/// A file that grows to a whole part and is hashed as it grows.
pub(super) struct Growing<'a> {
    path: &'a Path,
    file: Hashing<File>,
}

impl<'a> Growing<'a> {
    /// Opens the file and hashes the bytes that it already has.
    pub(super) fn open(path: &'a Path) -> Result<Growing<'a>> {
        let file = plain::own(path).map_err(|error| Fault::storage("open", path, &error))?;
        let mut file = Hashing::new(file);
        io::copy(&mut file, &mut io::sink()).map_err(|error| Fault::storage("read", path, &error))?;
        Ok(Growing { path, file })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.file.bytes()
    }

    pub(super) fn append(&mut self, piece: &[u8]) -> Result<()> {
        self.file.write_all(piece).map_err(|error| {
            Fault::storage("write", self.path, &error)
                .help("the bytes received so far are kept: free some space, then start it again")
        })
    }

    pub(super) fn empty(&mut self) -> Result<()> {
        let file = File::create(self.path).map_err(|error| Fault::storage("empty", self.path, &error))?;
        self.file = Hashing::new(file);
        Ok(())
    }

    /// Syncs the file to disk and returns its digest.
    pub(super) fn digest(&mut self) -> Result<String> {
        let empty = File::open(self.path).map_err(|error| Fault::storage("open", self.path, &error))?;
        let (file, digest, _) = std::mem::replace(&mut self.file, Hashing::new(empty)).finish();
        file.sync_all().map_err(|error| Fault::storage("sync", self.path, &error))?;
        Ok(digest)
    }
}
