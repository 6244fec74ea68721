//! PEFT folder -> OCI image -> push; and pull. This is the only module that knows OCI, apart from the image names
//! that users write.

mod credentials;
mod distribution;
mod growing;
mod image;
mod layout;
mod login;
mod manifest;
mod options;
mod parts;
mod pull;
mod reference;
mod remote;
mod store;
mod trouble;
mod unpack;
mod upload;

use std::collections::BTreeMap;
use std::path::Path;

pub use growing::Part;
pub use image::{Blob, Image, ImageFacts};
pub use options::{Options, Pulled, Pushed, Target};
pub use parts::{Parts, download, list, pinned, unpack};
pub use pull::STAGE_PREFIX;

use crate::fault::{Fault, Result};
use crate::report::{Report, Stage, Unit};

/// Checks, before hours of training, whether anything would stop a push. It asks no network.
///
/// Config: the layout's folder is the adapter's own or holds something else; the file of the credentials does not
/// exist.
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
            Err(Fault::config(format!("docker_config: {} does not exist", file.display()))
                .help("give a docker config.json, or the folder that holds it"))
        }
        _ => Ok(()),
    }
}

/// Packs the adapter in `folder` and pushes it. Pushing the same adapter again changes nothing and sends little.
///
/// Config, Model: the folder holds no complete adapter. Auth: 401, 403, unusable credentials. Config: the registry
/// refused the push permanently. Push: the registry could not be reached in `attempts_max` attempts; the adapter stays
/// in `folder`. Storage: the disk failed.
pub fn push(
    folder: &Path,
    target: &Target,
    facts: &ImageFacts,
    options: &Options,
    report: &Report,
) -> Result<Pushed> {
    // A bad reference is reported before any work.
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

/// Resolves a target: the digest of its manifest now, and the manifest's annotations.
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

/// Writes the files under an image's `data/` to `folder`. The folder may be new, empty, or hold (some of) the same
/// files already.
///
/// Config: there is no such image, or `folder` holds something else. Auth: 401, 403. Data: the image is damaged,
/// hostile or too large. Network: the registry could not be reached in `attempts_max` attempts. Storage: the disk
/// failed.
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
