//! A registry or a layout that holds an image -> its manifests and layers.

use std::fs::File;

use super::manifest::Descriptor;
use crate::fault::Result;

/// A source of an image's parts. It verifies the digest of everything it returns.
pub(super) trait Store {
    /// Returns the manifest or index of the target's own tag or digest, and its digest.
    fn top(&mut self) -> Result<(Vec<u8>, String)>;
    /// Returns the manifest with this digest.
    fn manifest(&mut self, descriptor: &Descriptor) -> Result<Vec<u8>>;
    /// Returns a layer, as a file positioned at its start.
    fn layer(&mut self, descriptor: &Descriptor) -> Result<File>;
}
