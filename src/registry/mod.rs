//! PEFT folder -> OCI image -> push; and pull. The only place that knows OCI.

mod credentials;
mod distribution;
mod image;
mod layout;
mod login;
mod manifest;
mod parts;
mod pull;
mod reference;
mod remote;
mod trouble;
mod unpack;
mod upload;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use image::{Blob, Image, ImageFacts};
pub use parts::{Part, Parts, download, list, pinned, unpack};
pub use pull::STAGE_PREFIX;

use crate::fault::{Fault, Result};
use crate::report::{Report, Stage, Unit};

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
    /// Extra root certificates (PEM); also a server certificate that is its own root.
    pub ca_file: Option<PathBuf>,
    /// Talk plain HTTP. Only when asked.
    pub plain_http: bool,
    pub attempts_max: u32,
    pub connect_timeout: std::time::Duration,
    pub read_timeout: std::time::Duration,
}

/// An image that is where it should be.
#[derive(Clone, Debug, PartialEq)]
pub struct Pushed {
    /// With its tag.
    pub reference: String,
    /// Of the manifest, `sha256:...`.
    pub digest: String,
    /// Layer, config and manifest together.
    pub bytes: u64,
}

/// An image whose files are on disk.
#[derive(Clone, Debug, PartialEq)]
pub struct Pulled {
    pub reference: String,
    /// Of the manifest that was used (of linux/amd64, if the image has several).
    pub digest: String,
    /// Of all files together.
    pub bytes: u64,
}

/// Finds, before hours of training, what would stop a push without asking the network.
///
/// # Errors
/// Config: the layout's folder is the adapter's own or holds something else; the credentials' file is not there.
pub fn check(target: &Target, adapter: &Path, options: &Options) -> Result<()> {
    if let Target::Layout { folder, .. } = target {
        let same = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        if same(folder) == same(adapter) {
            return Err(Fault::config(format!(
                "the image and the adapter would both go to {}",
                folder.display()
            ))
            .help("push to another folder: oci:DIR"));
        }
        layout::refuse_other_folders(folder)?;
    }
    match &options.docker_config {
        Some(file) if matches!(target, Target::Registry(_)) && !file.exists() => {
            Err(Fault::config(format!("docker_config: there is no {}", file.display()))
                .help("give a docker config.json, or the folder that holds it"))
        }
        _ => Ok(()),
    }
}

/// Packs the adapter in `folder` and pushes it. Pushing the same adapter again changes nothing and sends little.
///
/// # Errors
/// Config, Model: the folder is no whole adapter. Auth: 401, 403, unusable credentials. Config: the registry refused for
/// good. Push: not reachable in `attempts_max` attempts; the adapter stays in `folder`. Storage: the disk failed.
pub fn push(
    folder: &Path,
    target: &Target,
    facts: &ImageFacts,
    options: &Options,
    report: &Report,
) -> Result<Pushed> {
    // A bad reference is told before the work.
    let reference = match target {
        Target::Registry(text) => Some(reference::parse_reference(text)?),
        Target::Layout { .. } => None,
    };
    if reference.as_ref().is_some_and(|reference| reference.digest().is_some()) {
        return Err(Fault::config(format!("cannot push to `{target}`: a digest names what already exists"))
            .help("give a tag: `registry.example.com/team/adapter:v1`"));
    }
    let image = Image::build(folder, facts)?;
    let pushed =
        Pushed { reference: target.to_string(), digest: image.digest().into(), bytes: image.bytes() };
    let task = report.task(Stage::Push, Unit::Bytes, target.to_string(), Some(image.bytes()));
    match (target, reference) {
        (Target::Layout { folder, tag }, _) => layout::push(&image, folder, tag, &task)?,
        (Target::Registry(_), Some(reference)) => {
            remote::push(&image, folder, reference, options, report, task)?
        }
        (Target::Registry(_), None) => unreachable!("a registry has a reference"),
    }
    report
        .note(Stage::Push, format!("{}: {} bytes, digest {}", pushed.reference, pushed.bytes, pushed.digest));
    Ok(pushed)
}

/// Asks what a target names now: the digest of its manifest, and the manifest's annotations.
///
/// # Errors
/// As [`pull()`].
pub fn look(
    target: &Target,
    options: &Options,
    report: &Report,
) -> Result<(String, BTreeMap<String, String>)> {
    let name = target.to_string();
    let found = match target {
        Target::Layout { folder, tag } => pull::resolve(&mut layout::Layout { folder, tag }, &name)?,
        Target::Registry(text) => {
            let reference = reference::parse_reference(text)?;
            let mut registry = remote::Registry::source(reference, options, Path::new("."), report)?;
            pull::resolve(&mut registry, &name)?
        }
    };
    Ok((found.digest, found.annotations))
}

/// Puts the files under an image's `data/` into `folder`: new, empty, or holding (part of) the same files already.
///
/// # Errors
/// Config: no such image, or `folder` holds something else. Auth: 401, 403. Data: damaged, hostile or too large. Network:
/// not reachable in `attempts_max` attempts. Storage: the disk failed.
pub fn pull(target: &Target, folder: &Path, options: &Options, report: &Report) -> Result<Pulled> {
    match target {
        Target::Layout { folder: layout, tag } => {
            pull::pull(&mut layout::Layout { folder: layout, tag }, target, folder, report)
        }
        Target::Registry(text) => {
            let reference = reference::parse_reference(text)?;
            let scratch = folder.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("."));
            pull::pull(
                &mut remote::Registry::source(reference, options, scratch, report)?,
                target,
                folder,
                report,
            )
        }
    }
}
