//! Manifest or index bytes -> the layers to read. It knows OCI's and Docker's spelling, and uses neither network nor
//! disk.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;

use crate::fault::{Fault, Result};

pub(super) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
pub(super) const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
pub(super) const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// Docker's media types of the manifest and the index.
pub(super) const DOCKER_MANIFEST_TYPE: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(super) const DOCKER_INDEX_TYPE: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// LIMIT: registries refuse manifests above 4 MiB (OCI distribution specification).
pub(super) const MANIFEST_BYTES_MAX: u64 = 4 << 20;
/// LIMIT: overlay file systems mount 127 layers.
const LAYERS_MAX: usize = 127;

/// A blob as a manifest describes it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct Descriptor {
    /// Digest of the blob.
    pub digest: String,
    /// Size of the blob.
    #[serde(rename = "size")]
    pub bytes: u64,
    platform: Option<Platform>,
    /// Annotations of oras and other tools: a layer's file name, and whether it is an archive of a folder.
    pub annotations: Option<HashMap<String, String>>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

/// The kind of the bytes behind a tag.
#[derive(Debug, PartialEq)]
pub(super) enum Document {
    /// A manifest, with its layers.
    Layers(Vec<Descriptor>),
    /// An index, with its manifest for linux/amd64.
    Index(Descriptor),
}

#[derive(Deserialize)]
struct Raw {
    #[serde(rename = "schemaVersion")]
    schema_version: Option<u64>,
    manifests: Option<Vec<Descriptor>>,
    layers: Option<Vec<Descriptor>>,
}

pub(super) fn parse(bytes: &[u8], name: &str) -> Result<Document> {
    let wrong = |what: String| Fault::data(format!("{name}: {what}"));
    let raw: Raw =
        serde_json::from_slice(bytes).map_err(|error| wrong(format!("not an image manifest: {error}")))?;
    if raw.schema_version != Some(2) {
        return Err(wrong("its manifest does not have schemaVersion 2".into())
            .help("push the image again with a current tool; Docker's first format is not read"));
    }
    let document = match (raw.manifests, raw.layers) {
        (Some(manifests), None) => Document::Index(choose(manifests).ok_or_else(|| {
            wrong("the image has no manifest for linux/amd64".into())
                .help("an adapter needs no platform: push the image with a single manifest")
        })?),
        (None, Some(layers)) if layers.len() <= LAYERS_MAX => Document::Layers(layers),
        (None, Some(layers)) => return Err(wrong(format!("{} layers; at most {LAYERS_MAX}", layers.len()))),
        _ => return Err(wrong("its manifest has neither `layers` nor `manifests`".into())),
    };
    let named = match &document {
        Document::Layers(layers) => layers.as_slice(),
        Document::Index(manifest) => std::slice::from_ref(manifest),
    };
    match named.iter().find(|descriptor| !is_digest(&descriptor.digest)) {
        Some(bad) => Err(wrong(format!("`{}` is not a sha256 digest", bad.digest.escape_debug()))),
        None => Ok(document),
    }
}

/// Returns the annotations of a manifest. Values that are not text are left out.
pub(super) fn annotations(bytes: &[u8]) -> BTreeMap<String, String> {
    let manifest: serde_json::Value = serde_json::from_slice(bytes).unwrap_or_default();
    let texts = manifest["annotations"].as_object().into_iter().flatten();
    texts.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
}

/// Returns whether the text is `sha256:` and 64 lower-case hex digits. Nothing else passes, because digests become
/// paths and URLs.
pub(super) fn is_digest(text: &str) -> bool {
    let hex = text.strip_prefix("sha256:").unwrap_or_default();
    hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Returns the manifest for linux/amd64, or else the only one that names no platform.
fn choose(manifests: Vec<Descriptor>) -> Option<Descriptor> {
    let fits = |platform: &Platform| platform.os == "linux" && platform.architecture == "amd64";
    let exact = manifests.iter().find(|manifest| manifest.platform.as_ref().is_some_and(fits));
    let mut unnamed = manifests.iter().filter(|manifest| manifest.platform.is_none());
    exact.or_else(|| unnamed.next().filter(|_| unnamed.next().is_none())).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Kind;
    use serde_json::json;

    fn digest(byte: u8) -> String {
        format!("sha256:{}", format!("{byte:02x}").repeat(32))
    }

    fn read(value: serde_json::Value) -> Result<Document> {
        parse(value.to_string().as_bytes(), "image")
    }

    #[test]
    fn an_index_gives_linux_amd64_or_the_only_one_without_a_platform() {
        let entry = |byte, os: &str, arch: &str| json!({ "digest": digest(byte), "size": 1, "platform": { "os": os, "architecture": arch } });
        let chosen = |manifests: serde_json::Value| match read(
            json!({ "schemaVersion": 2, "manifests": manifests }),
        ) {
            Ok(Document::Index(manifest)) => Some(manifest.digest),
            _ => None,
        };
        assert_eq!(
            chosen(json!([
                entry(1, "linux", "arm64"),
                entry(2, "windows", "amd64"),
                entry(3, "linux", "amd64")
            ])),
            Some(digest(3))
        );
        assert_eq!(chosen(json!([{ "digest": digest(4), "size": 1 }])), Some(digest(4)));
        assert_eq!(chosen(json!([entry(1, "linux", "arm64")])), None);
        assert_eq!(chosen(json!([])), None);
    }

    #[test]
    fn manifests_that_cannot_be_trusted_are_data_faults() {
        let layer = |digest: &str| json!({ "schemaVersion": 2, "layers": [{ "digest": digest, "size": 1 }] });
        assert!(matches!(read(layer(&digest(9))), Ok(Document::Layers(layers)) if layers[0].bytes == 1));
        for bad in [
            layer("sha256:../../etc/passwd"),
            layer(&digest(9).to_uppercase()),
            layer("md5:00"),
            json!({ "schemaVersion": 1, "layers": [] }),
            json!({ "schemaVersion": 2 }),
            json!({ "schemaVersion": 2, "layers": [{ "digest": digest(1) }] }),
            json!({ "schemaVersion": 2, "layers": vec![json!({ "digest": digest(1), "size": 1 }); LAYERS_MAX + 1] }),
            json!([]),
        ] {
            assert_eq!(read(bad.clone()).unwrap_err().kind, Kind::Data, "{bad}");
        }
    }
}
