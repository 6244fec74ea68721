//! PEFT folder + facts -> OCI image: one gzipped tar layer, config, manifest. The same folder gives the same bytes.
//!
//! The layer holds `data/`, as KAITO's puller and Kubernetes image volumes expect. The config is complete (platform,
//! `rootfs.type`), because umoci, crane and image volumes refuse the minimal config that KAITO's own pusher writes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::json;
use sha2::{Digest, Sha256};

use super::manifest::{CONFIG_TYPE, LAYER_TYPE, MANIFEST_TYPE};
use crate::fault::{Fault, Result};
use crate::plain;
use crate::words;

const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// LIMIT: size of `adapter_config.json`. PEFT writes about a kilobyte; long module lists make it tens.
const CONFIG_FILE_BYTES_MAX: u64 = 16 << 20;
/// LIMIT: size of a safetensors header, by the format.
const WEIGHTS_HEADER_BYTES_MAX: u64 = 100_000_000;
/// LIMIT: size of the weights. The size field of a ustar header has eleven octal digits.
const WEIGHTS_FILE_BYTES_MAX: u64 = (8 << 30) - 1;

/// The description of an image: its annotations.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImageFacts {
    /// `sh.kaito.model.name`: KAITO's preset, as the user wrote it.
    pub model_name: String,
    /// `hone.base-model`: the source of the frozen weights. `None`: `base_model_name_or_path` of the adapter.
    pub base_model: Option<String>,
    /// `org.opencontainers.image.title`. `None`: a title made of the model's name.
    pub title: Option<String>,
    /// `org.opencontainers.image.description`.
    pub description: Option<String>,
    /// `org.opencontainers.image.version`.
    pub version: Option<String>,
    /// More annotations. They override all of the above.
    pub annotations: BTreeMap<String, String>,
}

/// An image that is ready to be copied.
pub struct Image {
    /// The compressed layer.
    pub layer: Blob,
    /// The image configuration.
    pub config: Blob,
    /// The manifest.
    pub manifest: Blob,
    /// Digest of the uncompressed layer.
    pub diff_id: String,
}

impl Image {
    /// Packs `adapter_config.json` and `adapter_model.safetensors` of a folder; its other files are left out.
    ///
    /// Config: the folder holds no adapter, or SOURCE_DATE_EPOCH is wrong. Model: a file is damaged. Storage: there
    /// is no room for the layer.
    pub fn build(folder: &Path, facts: &ImageFacts) -> Result<Image> {
        let config_text = read_adapter_config(&folder.join(CONFIG_FILE))?;
        check_weights(&folder.join(WEIGHTS_FILE))?;
        let created = created_at(std::env::var("SOURCE_DATE_EPOCH").ok().as_deref())?;

        let (layer, diff_id) = write_layer(folder)?;
        let config = Blob::from_json(&json!({
            "created": created,
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": { "type": "layers", "diff_ids": [diff_id] },
            "history": [{ "created": created, "created_by": "hone: PEFT adapter in /data" }],
        }));
        let manifest = Blob::from_json(&json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": { "mediaType": CONFIG_TYPE, "digest": config.digest, "size": config.bytes },
            "layers": [{
                "mediaType": LAYER_TYPE, "digest": layer.digest, "size": layer.bytes,
                // `oras pull` saves a layer only under a title; this one is KAITO's.
                "annotations": { "org.opencontainers.image.title": "layer.tar.gz" },
            }],
            "annotations": annotations(facts, &config_text, &created),
        }));
        Ok(Image { layer, config, manifest, diff_id })
    }

    /// Returns the digest of the manifest, which identifies the image permanently.
    pub fn digest(&self) -> &str {
        &self.manifest.digest
    }

    /// Returns the size of everything that is copied.
    pub fn bytes(&self) -> u64 {
        self.layer.bytes + self.config.bytes + self.manifest.bytes
    }
}

/// Bytes with their digest. They can be read any number of times, also by several readers at once.
#[derive(Clone)]
pub struct Blob {
    /// `sha256:` and 64 hex digits.
    pub digest: String,
    /// Number of bytes.
    pub bytes: u64,
    content: Content,
}

#[derive(Clone)]
enum Content {
    Memory(Arc<[u8]>),
    /// A file without a name, so that nothing is left behind however the process ends.
    File(Arc<File>),
}

impl Blob {
    fn from_json(value: &serde_json::Value) -> Blob {
        let text = value.to_string().into_bytes();
        Blob { digest: digest_of(&text), bytes: text.len() as u64, content: Content::Memory(text.into()) }
    }

    /// Reads up to `length` bytes from `offset`; fewer only at the end.
    pub fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let length = length.min(self.bytes.saturating_sub(offset) as usize);
        match &self.content {
            Content::Memory(bytes) => Ok(bytes[offset as usize..][..length].to_vec()),
            Content::File(file) => {
                let mut buffer = vec![0; length];
                file.read_exact_at(&mut buffer, offset)?;
                Ok(buffer)
            }
        }
    }
}

pub(super) fn digest_of(bytes: &[u8]) -> String {
    digest_text(Sha256::digest(bytes).as_slice())
}

fn digest_text(hash: &[u8]) -> String {
    format!("sha256:{}", words::hex(hash))
}

/// A reader or writer that hashes and counts the bytes that pass through it.
pub(super) struct Hashing<T> {
    inner: T,
    hash: Sha256,
    bytes: u64,
}

impl<T> Hashing<T> {
    pub(super) fn new(inner: T) -> Hashing<T> {
        Hashing { inner, hash: Sha256::new(), bytes: 0 }
    }

    /// Returns the number of bytes so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the inner value, the digest, and the number of bytes.
    pub(super) fn finish(self) -> (T, String, u64) {
        (self.inner, digest_text(self.hash.finalize().as_slice()), self.bytes)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hash.update(&bytes[..count]);
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.bytes += count as u64;
        Ok(count)
    }
}

fn annotations(
    facts: &ImageFacts,
    adapter_config: &serde_json::Value,
    created: &str,
) -> BTreeMap<String, String> {
    let from_adapter = adapter_config["base_model_name_or_path"].as_str().map(str::to_string);
    let title = facts.title.clone().unwrap_or_else(|| format!("LoRA adapter for {}", facts.model_name));
    let known = [
        ("sh.kaito.model.name", Some(facts.model_name.clone())),
        ("hone.base-model", facts.base_model.clone().or(from_adapter)),
        ("org.opencontainers.image.title", Some(title)),
        ("org.opencontainers.image.description", facts.description.clone()),
        ("org.opencontainers.image.version", facts.version.clone()),
        ("org.opencontainers.image.created", Some(created.to_string())),
    ];
    let mut all: BTreeMap<String, String> =
        known.into_iter().filter_map(|(name, value)| Some((name.to_string(), value?))).collect();
    all.extend(facts.annotations.clone());
    all
}

fn read_adapter_config(path: &Path) -> Result<serde_json::Value> {
    let file = open(path)?;
    let mut text = Vec::new();
    let wrong = |what: String| Fault::model(format!("{}: {what}", path.display()));
    file.take(CONFIG_FILE_BYTES_MAX + 1)
        .read_to_end(&mut text)
        .map_err(|error| Fault::storage("read", path, &error))?;
    if text.len() as u64 > CONFIG_FILE_BYTES_MAX {
        return Err(wrong(format!("more than {CONFIG_FILE_BYTES_MAX} bytes; PEFT writes a few kilobytes")));
    }
    let value: serde_json::Value =
        serde_json::from_slice(&text).map_err(|error| wrong(format!("not JSON: {error}")))?;
    match value["peft_type"].as_str() {
        Some(_) => Ok(value),
        None => Err(wrong("it has no `peft_type`; expected PEFT's adapter configuration".into())),
    }
}

/// Checks that a safetensors file is complete: its header is JSON, and the last tensor ends at the file's end.
fn check_weights(path: &Path) -> Result<()> {
    let mut file = open(path)?;
    let wrong = |what: String| {
        Fault::model(format!("{}: {what}", path.display()))
            .help("write the adapter again; this file is damaged")
    };
    let storage = |error: io::Error| Fault::storage("read", path, &error);
    let bytes = file.metadata().map_err(storage)?.len();
    if bytes > WEIGHTS_FILE_BYTES_MAX {
        return Err(Fault::capacity(format!("{}: {bytes} bytes; a layer holds 8 GiB", path.display())));
    }
    let mut length = [0; 8];
    if bytes < length.len() as u64 {
        return Err(wrong(format!("{bytes} bytes are too few for safetensors")));
    }
    file.read_exact(&mut length).map_err(storage)?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > WEIGHTS_HEADER_BYTES_MAX || header_bytes + 8 > bytes {
        return Err(wrong(format!("its header would have {header_bytes} bytes; the file has {bytes}")));
    }
    let mut header = vec![0; header_bytes as usize];
    file.read_exact(&mut header).map_err(storage)?;
    let header: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(&header).map_err(|error| wrong(format!("its header is not JSON: {error}")))?;
    let data_bytes = header.values().filter_map(|tensor| tensor["data_offsets"][1].as_u64()).max();
    match data_bytes {
        None => Err(wrong("holds no tensor".into())),
        Some(end) if end.checked_add(8 + header_bytes) == Some(bytes) => Ok(()),
        Some(end) => Err(wrong(format!(
            "its tensors end at byte {} and the file at {bytes}",
            end.saturating_add(8 + header_bytes)
        ))),
    }
}

fn open(path: &Path) -> Result<File> {
    plain::open(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            Fault::config(format!("{} does not exist", path.display()))
                .help(format!("give a PEFT adapter folder: it holds {CONFIG_FILE} and {WEIGHTS_FILE}"))
        }
        _ => Fault::storage("open", path, &error),
    })
}

/// Returns the compressed layer, and the digest of its uncompressed bytes. The fastest level is used: normally
/// distributed weights shrink to 0.930 (f32) or 0.803 (bf16) of their size at level 1, and to 0.928 or 0.795 at level 9
/// for several times the work.
fn write_layer(folder: &Path) -> Result<(Blob, String)> {
    let failed = |error: io::Error| Fault::storage("write the image layer beside", folder, &error);
    let gzip = flate2::GzBuilder::new()
        .mtime(0)
        .operating_system(255)
        .write(Hashing::new(BufWriter::new(scratch_file(folder)?)), flate2::Compression::fast());
    let mut tar = tar::Builder::new(Hashing::new(gzip));
    tar.append(&header("data/", tar::EntryType::Directory, 0)?, io::empty()).map_err(failed)?;
    for name in [CONFIG_FILE, WEIGHTS_FILE] {
        append_file(&mut tar, folder, name)?;
    }
    let (gzip, diff_id, _) = tar.into_inner().map_err(failed)?.finish();
    let (writer, digest, bytes) = gzip.finish().map_err(failed)?.finish();
    let file = writer.into_inner().map_err(|error| failed(error.into_error()))?;
    Ok((Blob { digest, bytes, content: Content::File(file.into()) }, diff_id))
}

fn append_file<W: Write>(tar: &mut tar::Builder<W>, folder: &Path, name: &str) -> Result<()> {
    let path = folder.join(name);
    let storage = |error: io::Error| Fault::storage("pack", &path, &error);
    let file = open(&path)?;
    let bytes = file.metadata().map_err(storage)?.len();
    let mut counted = Hashing::new(file.take(bytes));
    tar.append(&header(&format!("data/{name}"), tar::EntryType::Regular, bytes)?, &mut counted)
        .map_err(storage)?;
    match counted.bytes == bytes {
        true => Ok(()),
        false => Err(Fault::model(format!("{} became shorter while it was packed", path.display()))),
    }
}

/// Returns the tar header of an entry. Owner, mode and time are constants, so that two folders with equal files give
/// equal layers.
fn header(path: &str, kind: tar::EntryType, bytes: u64) -> Result<tar::Header> {
    let mut header = tar::Header::new_ustar();
    header.set_path(path).map_err(|error| Fault::internal(format!("tar path {path}: {error}")))?;
    header.set_entry_type(kind);
    header.set_mode(if kind.is_dir() { 0o755 } else { 0o644 });
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(bytes);
    header.set_cksum();
    Ok(header)
}

/// Returns a temporary file, beside the adapter if possible: that volume had room for the adapter, whereas /tmp may be
/// memory.
pub(super) fn scratch_file(folder: &Path) -> Result<File> {
    tempfile::tempfile_in(folder)
        .or_else(|_| tempfile::tempfile())
        .map_err(|error| Fault::storage("create a temporary file in", &std::env::temp_dir(), &error))
}

/// Returns the time SOURCE_DATE_EPOCH (seconds since 1970; zero if it is not set) as RFC 3339. The current time would
/// change the digest.
fn created_at(source_date_epoch: Option<&str>) -> Result<String> {
    let text = source_date_epoch.unwrap_or("0");
    // LIMIT: the year 9999; RFC 3339 has four digits.
    let seconds = text.parse().ok().filter(|&seconds: &u64| seconds < 253_402_300_800).ok_or_else(|| {
        Fault::config(format!("SOURCE_DATE_EPOCH is `{text}`; expected whole seconds since 1970"))
    })?;
    Ok(words::date(UNIX_EPOCH + Duration::from_secs(seconds), "%Y-%m-%dT%H:%M:%SZ"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Kind;

    const CONFIG: &str = r#"{"peft_type": "LORA", "r": 8, "base_model_name_or_path": "org/base"}"#;

    fn adapter(config: &str, weights: &[u8]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(CONFIG_FILE), config).unwrap();
        std::fs::write(folder.path().join(WEIGHTS_FILE), weights).unwrap();
        folder
    }

    fn weights(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
    }

    fn good_weights() -> Vec<u8> {
        weights(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, &[7; 8])
    }

    fn text(blob: &Blob) -> serde_json::Value {
        serde_json::from_slice(&blob.read(0, usize::MAX).unwrap()).unwrap()
    }

    #[test]
    fn equal_folders_give_equal_images_and_other_files_stay_out() {
        let facts = ImageFacts { model_name: "phi-3".into(), ..Default::default() };
        let (one, two) = (adapter(CONFIG, &good_weights()), adapter(CONFIG, &good_weights()));
        std::fs::write(two.path().join("README.md"), "card").unwrap();
        let (one, two) =
            (Image::build(one.path(), &facts).unwrap(), Image::build(two.path(), &facts).unwrap());
        assert_eq!(one.digest(), two.digest());
        assert_eq!(one.layer.digest, two.layer.digest);

        let other = adapter(CONFIG, &weights(r#"{"a":{"data_offsets":[0,8]}}"#, &[8; 8]));
        assert_ne!(Image::build(other.path(), &facts).unwrap().digest(), one.digest());
    }

    #[test]
    fn config_and_manifest_say_what_readers_need() {
        let facts = ImageFacts {
            model_name: "phi-3-mini-4k-instruct".into(),
            version: Some("1.2".into()),
            annotations: [("org.opencontainers.image.title".to_string(), "mine".to_string())].into(),
            ..Default::default()
        };
        let folder = adapter(CONFIG, &good_weights());
        let image = Image::build(folder.path(), &facts).unwrap();
        let (config, manifest) = (text(&image.config), text(&image.manifest));
        assert_eq!(config["architecture"], "amd64");
        assert_eq!(config["os"], "linux");
        assert_eq!(config["rootfs"], json!({ "type": "layers", "diff_ids": [image.diff_id] }));
        assert_eq!(manifest["layers"][0]["size"], image.layer.bytes);
        assert_eq!(
            manifest["annotations"],
            json!({
                "hone.base-model": "org/base",
                "org.opencontainers.image.created": "1970-01-01T00:00:00Z",
                "org.opencontainers.image.title": "mine",
                "org.opencontainers.image.version": "1.2",
                "sh.kaito.model.name": "phi-3-mini-4k-instruct",
            })
        );
    }

    #[test]
    fn the_layer_is_a_tar_with_constant_owner_mode_and_time() {
        let folder = adapter(CONFIG, &good_weights());
        let image = Image::build(folder.path(), &ImageFacts::default()).unwrap();
        let layer = image.layer.read(0, usize::MAX).unwrap();
        assert_eq!(&layer[..10], [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 4, 255], "gzip header: no name, no time");
        let mut expanded = Hashing::new(flate2::read::GzDecoder::new(&layer[..]));
        let mut archive = tar::Archive::new(&mut expanded);
        let entries: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let header = entry.unwrap().header().clone();
                let path = header.path().unwrap().display().to_string();
                (path, header.mode().unwrap(), header.uid().unwrap(), header.mtime().unwrap())
            })
            .collect();
        assert_eq!(
            entries,
            [
                ("data/".to_string(), 0o755, 0, 0),
                ("data/adapter_config.json".to_string(), 0o644, 0, 0),
                ("data/adapter_model.safetensors".to_string(), 0o644, 0, 0),
            ]
        );
        io::copy(&mut expanded, &mut io::sink()).unwrap();
        assert_eq!(expanded.finish().1, image.diff_id);
    }

    #[test]
    fn folders_that_are_no_whole_adapter_are_refused() {
        let kind = |config: &str, weights: &[u8]| {
            Image::build(adapter(config, weights).path(), &ImageFacts::default())
                .err()
                .map(|fault| fault.kind)
        };
        assert_eq!(kind(CONFIG, &good_weights()), None);
        assert_eq!(kind("{", &good_weights()), Some(Kind::Model));
        assert_eq!(kind(r#"{"r": 8}"#, &good_weights()), Some(Kind::Model));
        assert_eq!(kind(CONFIG, b""), Some(Kind::Model));
        assert_eq!(kind(CONFIG, &good_weights()[..good_weights().len() - 1]), Some(Kind::Model));
        assert_eq!(kind(CONFIG, &[good_weights(), vec![0]].concat()), Some(Kind::Model));
        assert_eq!(kind(CONFIG, &u64::MAX.to_le_bytes()), Some(Kind::Model));
        assert_eq!(kind(CONFIG, &weights(r#"{"__metadata__":{}}"#, b"")), Some(Kind::Model));

        let empty = tempfile::tempdir().unwrap();
        let fault = Image::build(empty.path(), &ImageFacts::default()).err().unwrap();
        assert_eq!(fault.kind, Kind::Config);
        assert!(fault.to_string().contains("adapter_config.json"), "{fault}");
    }

    #[test]
    fn files_are_taken_up_to_their_limits() {
        let kind = |config: &str, bytes: Option<u64>| {
            let folder = adapter(config, &good_weights());
            let file = File::options().write(true).open(folder.path().join(WEIGHTS_FILE)).unwrap();
            if let Some(bytes) = bytes {
                file.set_len(bytes).unwrap();
            }
            Image::build(folder.path(), &ImageFacts::default()).err().map(|fault| fault.kind)
        };
        let padded = |more: usize| {
            let blanks = CONFIG_FILE_BYTES_MAX as usize + more - CONFIG.len();
            format!("{CONFIG}{}", " ".repeat(blanks))
        };
        assert_eq!(kind(&padded(0), None), None);
        assert_eq!(kind(&padded(1), None), Some(Kind::Model));
        // The file has a hole behind its tensors, which takes no space.
        assert_eq!(kind(CONFIG, Some(WEIGHTS_FILE_BYTES_MAX)), Some(Kind::Model));
        assert_eq!(kind(CONFIG, Some(WEIGHTS_FILE_BYTES_MAX + 1)), Some(Kind::Capacity));
    }

    #[test]
    fn the_epoch_becomes_a_date() {
        assert_eq!(created_at(None).unwrap(), "1970-01-01T00:00:00Z");
        assert_eq!(created_at(Some("951827696")).unwrap(), "2000-02-29T12:34:56Z");
        assert_eq!(created_at(Some("1704067199")).unwrap(), "2023-12-31T23:59:59Z");
        assert_eq!(created_at(Some("253402300799")).unwrap(), "9999-12-31T23:59:59Z");
        for text in ["", "-1", "now", "253402300800"] {
            assert_eq!(created_at(Some(text)).unwrap_err().kind, Kind::Config, "{text}");
        }
    }
}
