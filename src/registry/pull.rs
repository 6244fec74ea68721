//! Image (layout or registry) -> the files of its `data/` in a folder: all of them or none.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::manifest::{self, Descriptor, Document};
use super::options::{Pulled, Target};
use super::store::Store;
use super::unpack::{Limits, Unpacker};
use crate::fault::{Fault, Result};
use crate::report::{Report, Stage};

/// LIMIT: an index points at a manifest, or at one more index.
const INDEX_DEPTH_MAX: usize = 2;
/// LIMIT: compressed size of one layer.
const LAYER_BYTES_MAX: u64 = 16 << 30;
/// Prefix of the folders where an image is assembled. A killed pull leaves such a folder.
pub const STAGE_PREFIX: &str = ".hone-pull-";

/// The manifest that a tag or digest leads to.
pub(super) struct Resolved {
    /// The digest of the image's manifest.
    pub digest: String,
    /// First to last.
    pub layers: Vec<Descriptor>,
    /// Annotations of the manifest.
    pub annotations: BTreeMap<String, String>,
}

/// Follows a tag, and an index, to the image's manifest.
pub(super) fn resolve(store: &mut dyn Store, name: &str) -> Result<Resolved> {
    let (mut bytes, mut digest) = store.top()?;
    for _ in 0..=INDEX_DEPTH_MAX {
        match manifest::parse(&bytes, name)? {
            Document::Layers(layers) => {
                let annotations = manifest::annotations(&bytes);
                return Ok(Resolved { digest, layers, annotations });
            }
            Document::Index(chosen) => {
                bytes = store.manifest(&chosen)?;
                digest = chosen.digest;
            }
        }
    }
    Err(Fault::data(format!("{name}: indexes nested deeper than {INDEX_DEPTH_MAX}")))
}

pub(super) fn pull(store: &mut dyn Store, target: &Target, folder: &Path, report: &Report) -> Result<Pulled> {
    let name = target.to_string();
    let Resolved { digest, layers, .. } = resolve(store, &name)?;
    let stage = Stagehouse::beside(folder)?;
    let mut unpacker = Unpacker::new(&stage.data, Limits::default());
    for layer in &layers {
        if layer.bytes > LAYER_BYTES_MAX {
            return Err(Fault::data(format!(
                "{name}: layer {} has {} bytes; at most {LAYER_BYTES_MAX}",
                layer.digest, layer.bytes
            )));
        }
        unpacker.layer(store.layer(layer)?, &format!("{name}: layer {}", layer.digest))?;
    }
    let bytes = unpacker.extracted_bytes;
    if files_below(&stage.data)?.is_empty() {
        return Err(Fault::data(format!("{name}: the image has no files under `data/`"))
            .help("expected an image with files in /data: an adapter's two, or the files of a dataset"));
    }
    stage.publish(folder)?;
    report.note(Stage::Pull, format!("{name}: {bytes} bytes to {}, digest {digest}", folder.display()));
    Ok(Pulled { reference: name, digest, bytes })
}

/// A temporary folder on the target's volume where the image is assembled; it is removed when dropped.
struct Stagehouse {
    _owner: tempfile::TempDir,
    data: PathBuf,
}

impl Stagehouse {
    /// Creates it inside the folder if that exists (it may be the root of a volume), or else beside it.
    fn beside(folder: &Path) -> Result<Stagehouse> {
        let home = match folder.is_dir() {
            true => folder,
            false => {
                folder.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
            }
        };
        let storage = |error: io::Error| Fault::storage("create a folder in", home, &error);
        fs::create_dir_all(home).map_err(storage)?;
        let owner = tempfile::Builder::new().prefix(STAGE_PREFIX).tempdir_in(home).map_err(storage)?;
        let data = owner.path().join("data");
        fs::create_dir(&data).map_err(storage)?;
        Ok(Stagehouse { _owner: owner, data })
    }

    /// Moves the files to the folder: by one rename if the folder is new. An existing folder may only hold files of
    /// this very image, so that an interrupted pull is completed; any other file is refused.
    fn publish(&self, folder: &Path) -> Result<()> {
        if !folder.exists() {
            return fs::rename(&self.data, folder).map_err(|error| Fault::storage("create", folder, &error));
        }
        let theirs = files_below(folder)?;
        let ours = files_below(&self.data)?;
        for file in &theirs {
            if !ours.contains(file) || !same_content(&folder.join(file), &self.data.join(file))? {
                return Err(Fault::config(format!(
                    "{} is not empty: {} is not of this image",
                    folder.display(),
                    file.display()
                ))
                .help("pull into a new folder, or remove this one"));
            }
        }
        for file in ours.iter().filter(|file| !theirs.contains(file)) {
            let target = folder.join(file);
            let parent = target.parent().expect("a path inside the folder has a parent");
            fs::create_dir_all(parent)
                .and_then(|()| fs::rename(self.data.join(file), &target))
                .map_err(|error| Fault::storage("create", &target, &error))?;
        }
        Ok(())
    }
}

/// Returns the relative paths of everything that is not a folder, sorted. Temporary folders of earlier pulls are left
/// out.
fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let (mut files, mut open) = (Vec::new(), vec![PathBuf::new()]);
    while let Some(inner) = open.pop() {
        let path = folder.join(&inner);
        let storage = |error: io::Error| Fault::storage("list", &path, &error);
        for entry in fs::read_dir(&path).map_err(storage)? {
            let entry = entry.map_err(storage)?;
            let name = inner.join(entry.file_name());
            match entry.file_type().map_err(storage)?.is_dir() {
                true if name.to_string_lossy().starts_with(STAGE_PREFIX) => {}
                true => open.push(name),
                false => files.push(name),
            }
        }
    }
    files.sort();
    Ok(files)
}

fn same_content(one: &Path, two: &Path) -> Result<bool> {
    let hash = |path: &Path| {
        let read = || {
            let mut hashing = super::image::Hashing::new(File::open(path)?);
            io::copy(&mut hashing, &mut io::sink())?;
            Ok(hashing.finish().1)
        };
        read().map_err(|error| Fault::storage("read", path, &error))
    };
    Ok(one.is_file() && hash(one)? == hash(two)?)
}
