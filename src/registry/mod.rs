//! PEFT folder -> OCI image -> push; and pull. The only place that knows OCI.

use std::path::PathBuf;

/// Where an image goes or comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// `host/repository:tag`, normalised as Docker does.
    Registry(String),
    /// `oci:DIR` or `oci:DIR:tag`: an OCI layout on disk.
    Layout { folder: PathBuf, tag: String },
}

/// How to talk to a registry. Filled by `plan`.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder or file with docker credentials; `None`: `DOCKER_CONFIG`, then the usual places.
    pub docker_config: Option<PathBuf>,
    /// Extra root certificates (PEM).
    pub ca_file: Option<PathBuf>,
    /// Talk plain HTTP. Only when asked.
    pub plain_http: bool,
    pub attempts_max: u32,
    pub connect_timeout: std::time::Duration,
    pub read_timeout: std::time::Duration,
}
