//! Options and results of work with a registry, as plain values.

use std::path::PathBuf;

/// The place that an image is pushed to or pulled from.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// `host/repository:tag`, normalised as Docker does.
    Registry(String),
    /// `oci:DIR` or `oci:DIR:tag`: an OCI layout on disk.
    Layout {
        /// Folder of the layout.
        folder: PathBuf,
        /// Tag in the layout.
        tag: String,
    },
}

/// Options of connections to a registry. `plan` fills them.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder or file with docker credentials. `None`: `DOCKER_CONFIG`, then the usual places.
    pub docker_config: Option<PathBuf>,
    /// Extra root certificates (PEM). A server certificate that is its own root is accepted too.
    pub ca_file: Option<PathBuf>,
    /// True if plain HTTP is used, which only the user can request.
    pub plain_http: bool,
    /// The number of attempts of a request in all.
    pub attempts_max: u32,
    /// Time limit for making a connection.
    pub connect_timeout: std::time::Duration,
    /// Longest time without an answer or a byte.
    pub read_timeout: std::time::Duration,
}

/// An image that was pushed.
#[derive(Clone, Debug, PartialEq)]
pub struct Pushed {
    /// Reference of the image, with its tag.
    pub reference: String,
    /// Digest of the manifest, `sha256:...`.
    pub digest: String,
    /// Size of layer, config and manifest together.
    pub bytes: u64,
}

/// An image whose files are on disk.
#[derive(Clone, Debug, PartialEq)]
pub struct Pulled {
    /// The place that was pulled from, with its tag or digest.
    pub reference: String,
    /// Digest of the manifest that was used. If the image has several, this is the one for linux/amd64.
    pub digest: String,
    /// Size of all files together.
    pub bytes: u64,
}
