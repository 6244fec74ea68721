//! Image -> OCI layout on disk, and back. Blobs are content-addressed; `index.json` is written last.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::image::{Blob, Hashing, Image};
use super::manifest::{Descriptor, MANIFEST_BYTES_MAX, MANIFEST_TYPE, is_digest};
use super::store::Store;
use crate::fault::{Fault, Result};
use crate::plain;
use crate::report::Task;
use crate::whole;

const TAG_ANNOTATION: &str = "org.opencontainers.image.ref.name";
const COPY_BYTES: usize = 256 << 10;

/// Adds the image under the tag. Other tags of an existing layout stay.
///
/// # Errors
/// Config: the folder holds something else. Storage: the disk failed.
pub(super) fn push(image: &Image, folder: &Path, tag: &str, task: &Task) -> Result<()> {
    let blobs = folder.join("blobs/sha256");
    refuse_other_folders(folder)?;
    fs::create_dir_all(&blobs).map_err(|error| Fault::storage("create", &blobs, &error))?;
    // Two pushes into one layout take turns by a lock. On a file system without locks, two pushes at once are not
    // expected.
    let turn = File::open(folder).and_then(|handle| handle.lock().map(|()| handle));
    // Without the lock, another push might be using these files.
    if turn.is_ok() {
        whole::remove_leftovers(folder);
        whole::remove_leftovers(&blobs);
    }
    let index = with_tag(read_index(folder)?, image, tag);
    for blob in [&image.layer, &image.config, &image.manifest] {
        write_blob(blob, &blobs, task)?;
    }
    whole::write(
        &folder.join("oci-layout"),
        json!({ "imageLayoutVersion": "1.0.0" }).to_string().as_bytes(),
    )?;
    whole::write(&folder.join("index.json"), index.to_string().as_bytes())
}

/// A layout to read from.
pub(super) struct Layout<'a> {
    /// Folder of the layout.
    pub folder: &'a Path,
    /// Tag of the image.
    pub tag: &'a str,
}

impl Store for Layout<'_> {
    fn top(&mut self) -> Result<(Vec<u8>, String)> {
        let index = read_index(self.folder)?.ok_or_else(|| {
            Fault::config(format!("{} is not an OCI layout: it has no index.json", self.folder.display()))
                .help("name a folder that an image was pushed to as oci:FOLDER, or write host/repository:tag")
        })?;
        let manifests = index["manifests"].as_array().map(Vec::as_slice).unwrap_or_default();
        let tag_of = |entry: &Value| entry["annotations"][TAG_ANNOTATION].as_str().map(str::to_string);
        let entry =
            manifests.iter().find(|entry| tag_of(entry).as_deref() == Some(self.tag)).ok_or_else(|| {
                let tags: Vec<String> = manifests.iter().filter_map(tag_of).collect();
                Fault::config(format!("{} has no tag `{}`", self.folder.display(), self.tag))
                    .help(format!("it has: {}", tags.join(", ").escape_debug()))
            })?;
        let descriptor: Descriptor = serde_json::from_value(entry.clone())
            .map_err(|error| Fault::data(format!("{}/index.json: {error}", self.folder.display())))?;
        Ok((self.manifest(&descriptor)?, descriptor.digest))
    }

    fn manifest(&mut self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        if descriptor.bytes > MANIFEST_BYTES_MAX {
            return Err(Fault::data(format!(
                "{}: a manifest of {} bytes; at most {MANIFEST_BYTES_MAX}",
                descriptor.digest, descriptor.bytes
            )));
        }
        let mut bytes = Vec::new();
        self.layer(descriptor)?
            .read_to_end(&mut bytes)
            .map_err(|error| Fault::storage("read", &self.blob_path(descriptor), &error))?;
        Ok(bytes)
    }

    fn layer(&mut self, descriptor: &Descriptor) -> Result<File> {
        if !is_digest(&descriptor.digest) {
            return Err(Fault::data(format!(
                "`{}` is not a sha256 digest",
                descriptor.digest.escape_debug()
            )));
        }
        let path = self.blob_path(descriptor);
        let read = || -> io::Result<(File, String, u64)> {
            let mut hashing = Hashing::new(File::open(&path)?);
            io::copy(&mut (&mut hashing).take(descriptor.bytes.saturating_add(1)), &mut io::sink())?;
            let (mut file, digest, bytes) = hashing.finish();
            file.rewind()?;
            Ok((file, digest, bytes))
        };
        let (file, digest, bytes) = read().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Fault::data(format!("{} is missing from the layout", path.display())),
            _ => Fault::storage("read", &path, &error),
        })?;
        if digest != descriptor.digest || bytes != descriptor.bytes {
            return Err(Fault::data(format!(
                "{} is damaged: expected {} bytes with {}, found {bytes} with {digest}",
                path.display(),
                descriptor.bytes,
                descriptor.digest
            )));
        }
        Ok(file)
    }
}

impl Layout<'_> {
    fn blob_path(&self, descriptor: &Descriptor) -> PathBuf {
        self.folder.join("blobs").join(descriptor.digest.replace(':', "/"))
    }
}

pub(super) fn refuse_other_folders(folder: &Path) -> Result<()> {
    let is_layout = folder.join("oci-layout").exists() || folder.join("blobs").exists();
    let mut entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Fault::storage("list", folder, &error)),
    };
    match is_layout || entries.next().is_none() {
        true => Ok(()),
        false => Err(Fault::config(format!("{} is neither empty nor an OCI layout", folder.display()))
            .help("give a new folder: `oci:DIR:tag`")),
    }
}

fn read_index(folder: &Path) -> Result<Option<Value>> {
    let path = folder.join("index.json");
    let text = match plain::small(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Fault::storage("read", &path, &error)),
    };
    match serde_json::from_slice::<Value>(&text) {
        Ok(index) if index["manifests"].is_array() => Ok(Some(index)),
        Ok(_) => Err(Fault::data(format!("{}: has no list `manifests`", path.display()))),
        Err(error) => Err(Fault::data(format!("{}: not JSON: {error}", path.display()))),
    }
}

/// Returns the index with the tag moved to the image. Entries of other tags stay as they are.
fn with_tag(index: Option<Value>, image: &Image, tag: &str) -> Value {
    let mut index = index.unwrap_or_else(|| json!({ "schemaVersion": 2, "manifests": [] }));
    let manifests = index["manifests"].as_array_mut().expect("read_index lets only lists pass");
    manifests.retain(|entry| entry["annotations"][TAG_ANNOTATION] != tag);
    manifests.push(json!({
        "mediaType": MANIFEST_TYPE,
        "digest": image.manifest.digest,
        "size": image.manifest.bytes,
        "annotations": { TAG_ANNOTATION: tag },
    }));
    index
}

fn write_blob(blob: &Blob, blobs: &Path, task: &Task) -> Result<()> {
    let path = blobs.join(blob.digest.trim_start_matches("sha256:"));
    // An existing blob is trusted only if its digest is right; otherwise a damaged blob would be shipped.
    let whole = |path: &Path| -> io::Result<bool> {
        let mut hashing = Hashing::new(File::open(path)?);
        io::copy(&mut hashing, &mut io::sink())?;
        let (_, digest, bytes) = hashing.finish();
        Ok(digest == blob.digest && bytes == blob.bytes)
    };
    if whole(&path).unwrap_or(false) {
        task.advance(blob.bytes);
        return Ok(());
    }
    whole::fill(&path, |file| {
        let mut offset = 0;
        while offset < blob.bytes {
            let chunk = blob.read(offset, COPY_BYTES)?;
            file.write_all(&chunk)?;
            offset += chunk.len() as u64;
            task.advance(chunk.len() as u64);
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Kind;

    #[test]
    fn only_an_empty_folder_or_a_layout_is_written_into() {
        let folder = tempfile::tempdir().unwrap();
        refuse_other_folders(&folder.path().join("new")).unwrap();
        refuse_other_folders(folder.path()).unwrap();
        std::fs::write(folder.path().join("thesis.tex"), "x").unwrap();
        assert_eq!(refuse_other_folders(folder.path()).unwrap_err().kind, Kind::Config);
        // A killed push leaves either of them first.
        for own in ["oci-layout", "blobs"] {
            std::fs::write(folder.path().join(own), "x").unwrap();
            refuse_other_folders(folder.path()).unwrap();
            std::fs::remove_file(folder.path().join(own)).unwrap();
        }
        let below = folder.path().join("thesis.tex").join("layout");
        assert!(refuse_other_folders(&below).unwrap_err().message.starts_with("cannot list "));
    }

    /// A disk may change bytes of a blob that an earlier push wrote. Its name is not proof of its content.
    #[test]
    fn a_damaged_blob_of_the_same_length_is_written_again() {
        let adapter = tempfile::tempdir().unwrap();
        let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let weights = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[7; 8]].concat();
        std::fs::write(adapter.path().join("adapter_model.safetensors"), weights).unwrap();
        std::fs::write(adapter.path().join("adapter_config.json"), r#"{"peft_type":"LORA","r":8}"#).unwrap();
        let image = Image::build(adapter.path(), &crate::registry::ImageFacts::default()).unwrap();
        let layout = tempfile::tempdir().unwrap();
        let report = crate::report::Report::silent();
        let task = report.task(crate::report::Stage::Push, crate::report::Unit::Bytes, "image", None);
        push(&image, layout.path(), "v1", &task).unwrap();
        let name = image.config.digest.trim_start_matches("sha256:");
        let blob = layout.path().join("blobs/sha256").join(name);
        let whole = std::fs::read(&blob).unwrap();
        let mut damaged = whole.clone();
        damaged[10] ^= 1;
        std::fs::write(&blob, damaged).unwrap();
        push(&image, layout.path(), "v2", &task).unwrap();
        assert_eq!(std::fs::read(&blob).unwrap(), whole);
    }

    #[test]
    fn an_index_is_absent_a_list_or_told() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read_index(folder.path()).unwrap().is_none());
        for text in ["{}", "{\"manifests\":{}}", "["] {
            std::fs::write(folder.path().join("index.json"), text).unwrap();
            assert_eq!(read_index(folder.path()).unwrap_err().kind, Kind::Data, "{text}");
        }
        std::fs::write(folder.path().join("index.json"), "{\"manifests\":[]}").unwrap();
        assert!(read_index(folder.path()).unwrap().is_some());
        let fault = read_index(&folder.path().join("index.json")).unwrap_err();
        assert!(fault.message.starts_with("cannot read "), "{fault}");
    }
}
