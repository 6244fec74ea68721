//! The user's text -> the address of a model or of data, and its folder in the cache.

use std::fmt;
use std::path::{Path, PathBuf};

use super::datasets::HubData;
use super::hub::is_commit;
use crate::facts::presets;
use crate::fault::{Fault, Result};
use crate::registry;
use crate::source::{self, Source};

/// Digits of a SHA-256 in a folder's name.
const KEY_DIGITS: usize = 12;
const HUB: &str = "hf://";
const HUB_DATA: &str = "hf://datasets/";
const IMAGE: &str = "oci://";
const PRESET: &str = "preset:";

/// The address of a base model.
#[derive(Clone, Debug, PartialEq)]
pub enum Model {
    /// A folder on this machine.
    Folder(PathBuf),
    /// A repository of the Hugging Face hub.
    Hub {
        /// `OWNER/NAME`
        repository: String,
        /// A branch, a tag or a commit.
        revision: String,
    },
    /// A folder in an object store: `s3://BUCKET/FOLDER`, without a slash at its end.
    Objects(url::Url),
    /// An OCI artifact of files, or an image that holds a model's folder.
    Image {
        /// The reference as docker normalises it.
        reference: String,
        /// The name of the model.
        name: String,
    },
}

/// The address of training data.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// A local path or a URL.
    Source(source::Source),
    /// A dataset of the Hugging Face hub.
    Hub(HubData),
    /// An image with data files in `/data`. The reference is as docker normalises it.
    Image(String),
}

impl Model {
    /// Parses `hf://OWNER/NAME[@REVISION]`, `oci://IMAGE`, `preset:NAME`, and `s3://BUCKET/FOLDER` or another
    /// object store. Any other text is a folder.
    ///
    /// # Errors
    /// Config: a malformed address. Usage: an unknown preset.
    pub fn parse(text: &str) -> Result<Model> {
        if let Some(rest) = text.strip_prefix(HUB) {
            let (repository, revision) = rest.split_once('@').unwrap_or((rest, "main"));
            return hub(repository, revision);
        }
        if let Some(reference) = text.strip_prefix(IMAGE) {
            let reference = image(reference)?;
            let name = readable(&reference).to_owned();
            return Ok(Model::Image { reference, name });
        }
        if let Some(url) = object_store(text)? {
            return Ok(Model::Objects(url));
        }
        match text.strip_prefix(PRESET) {
            Some(name) => preset(name),
            None => Ok(Model::Folder(text.into())),
        }
    }

    /// Returns the folder of the model, which may not exist yet: `CACHE/models/NAME-KEY`. KEY is a digest of the whole
    /// address.
    ///
    /// # Errors
    /// Config: `HF_ENDPOINT` is malformed.
    pub fn folder(&self, cache: &Path) -> Result<PathBuf> {
        let (name, address) = match self {
            Model::Folder(path) => return Ok(path.clone()),
            Model::Hub { repository, .. } => {
                let endpoint = source::Hub::from_environment()?.endpoint;
                (repository.replace('/', "--"), format!("{} {self}", endpoint.origin().ascii_serialization()))
            }
            Model::Objects(_) => (self.name(), self.to_string()),
            Model::Image { reference, .. } => (readable(reference).to_owned(), self.to_string()),
        };
        Ok(cache.join("models").join(format!("{name}-{}", key(&address))))
    }

    /// Returns the name of the base in an adapter's card.
    pub fn name(&self) -> String {
        match self {
            Model::Folder(folder) => {
                let folder = folder.canonicalize().unwrap_or_else(|_| folder.clone());
                folder.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned())
            }
            Model::Hub { repository, .. } => repository.clone(),
            Model::Objects(url) => readable(url.path().trim_matches('/')).to_owned(),
            Model::Image { name, .. } => name.clone(),
        }
    }
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Model::Folder(folder) => write!(f, "{}", folder.display()),
            Model::Hub { repository, revision } => write!(f, "{HUB}{repository}@{revision}"),
            Model::Objects(url) => write!(f, "{url}"),
            Model::Image { reference, .. } => write!(f, "{IMAGE}{reference}"),
        }
    }
}

/// The proof that data has the same bytes at every start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pin {
    /// Files of this machine.
    Local,
    /// A SHA-256 in the address.
    Sha256,
    /// A commit of the hub.
    Commit,
    /// The digest of an image's manifest.
    Digest,
    /// Nothing: a server, a branch or a tag may give other bytes the next time.
    Nothing,
}

impl Data {
    /// Returns the OWNER/NAME of a dataset of the hub.
    pub fn hub_dataset(&self) -> Option<String> {
        match self {
            Data::Hub(data) => Some(data.repository.clone()),
            _ => None,
        }
    }

    /// Returns a short name for metrics: the file's name without its endings, the dataset's, or the image's.
    pub fn short_name(&self) -> String {
        let text = match self {
            Data::Source(source) => source.name(),
            Data::Hub(hub) => hub.repository.clone(),
            Data::Image(reference) => readable(reference).to_owned(),
        };
        let text = text.split(['?', '#']).next().unwrap_or_default().trim_end_matches(['/', '*']);
        let last = text.rsplit('/').find(|part| !part.is_empty()).unwrap_or_default();
        let stem = last.split('.').find(|part| !part.is_empty()).unwrap_or_default();
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '_' };
        let name: String = stem.chars().map(plain).take(64).collect();
        if name.is_empty() { "data".into() } else { name }
    }

    /// Returns the digest that pins the bytes behind this address.
    pub fn pin(&self) -> Pin {
        match self {
            Data::Source(Source::Url { sha256: Some(_), .. } | Source::Path { sha256: Some(_), .. })
            | Data::Hub(HubData { sha256: Some(_), .. }) => Pin::Sha256,
            Data::Source(Source::Path { .. }) => Pin::Local,
            Data::Hub(hub) if hub.revision.as_deref().is_some_and(is_commit) => Pin::Commit,
            Data::Image(reference) if reference.contains("@sha256:") => Pin::Digest,
            Data::Source(_) | Data::Hub(_) | Data::Image(_) => Pin::Nothing,
        }
    }

    /// Parses `hf://datasets/OWNER/NAME`, `oci://IMAGE`, or what [`source::Source::parse`] accepts.
    ///
    /// # Errors
    /// Config: a malformed address.
    pub fn parse(text: &str) -> Result<Data> {
        let text = text.trim();
        if let Some(rest) = text.strip_prefix(HUB_DATA) {
            return HubData::parse(rest).map(Data::Hub);
        }
        if let Some(rest) = text.strip_prefix(HUB) {
            // A text that is no name of a dataset may hold a secret, and is not repeated.
            let name = HubData::parse(rest).map_or("OWNER/NAME".to_owned(), |data| data.repository);
            return Err(Fault::config("hf:// alone names a model of the hub, and data is expected")
                .help(format!("for a dataset of the hub, write {HUB_DATA}{name}")));
        }
        match text.strip_prefix(IMAGE) {
            Some(reference) => image(reference).map(Data::Image),
            None => source::Source::parse(text).map(Data::Source),
        }
    }
}

/// Returns the folder of an image's data, by the digest of its manifest.
pub(super) fn images(cache: &Path, reference: &str, digest: &str) -> PathBuf {
    cache.join("images").join(format!("{}-{}", readable(reference), key(digest)))
}

fn hub(repository: &str, revision: &str) -> Result<Model> {
    let plain = |part: &str| {
        let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && part.chars().all(known) && !part.starts_with('.') && !part.contains("..")
    };
    let parts: Vec<&str> = repository.split('/').collect();
    if parts.len() != 2 || !parts.iter().all(|part| plain(part)) || !revision.split('/').all(plain) {
        return Err(Fault::config("an address hf:// does not name a repository and its revision")
            .help("write hf://OWNER/NAME, or hf://OWNER/NAME@REVISION with a branch, a tag or a commit"));
    }
    Ok(Model::Hub { repository: repository.into(), revision: revision.into() })
}

/// Returns a folder of an object store, or `None` if the text is no address of one.
fn object_store(text: &str) -> Result<Option<url::Url>> {
    let known = url::Url::parse(text).is_ok_and(|url| source::is_object_store(&url));
    if !known {
        return Ok(None);
    }
    let source::Source::Url { mut url, sha256: None } = source::Source::parse(text)? else {
        return Err(Fault::config(format!("{text}: a model's folder cannot have a digest"))
            .help("write s3://BUCKET/FOLDER; hone records its revision"));
    };
    let path = url.path().trim_end_matches('/').to_owned();
    url.set_path(&path);
    if path.is_empty() {
        return Err(Fault::config(format!("{text}: the address names no folder of the bucket"))
            .help("write s3://BUCKET/FOLDER"));
    }
    Ok(Some(url))
}

/// Returns the preset's own artifact, else its repository on the hub.
fn preset(name: &str) -> Result<Model> {
    let preset = presets::find(name)?;
    match &preset.artifact {
        Some(artifact) => Ok(Model::Image { reference: image(artifact)?, name: preset.hub.clone() }),
        None => hub(&preset.hub, preset.revision.as_deref().unwrap_or("main")),
    }
}

fn image(text: &str) -> Result<String> {
    match registry::Target::parse(text)? {
        registry::Target::Registry(reference) => Ok(reference),
        registry::Target::Layout { .. } => Err(Fault::config(format!("oci://{text} names no image"))
            .help("write oci://registry.example.com/team/name:tag")),
    }
}

/// Returns the last part of a repository's path.
pub(super) fn readable(reference: &str) -> &str {
    let last = reference.rsplit('/').next().unwrap_or(reference);
    last.split([':', '@']).next().unwrap_or(last)
}

pub(super) fn key(text: &str) -> String {
    source::digest(text.as_bytes())[..KEY_DIGITS].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pins_data_is_in_its_address() {
        let sha = "ab".repeat(32);
        let commit = "c".repeat(40);
        for (text, pin) in [
            (format!("https://host/a.parquet#sha256={sha}"), Pin::Sha256),
            (format!("/data/a.parquet#sha256={sha}"), Pin::Sha256),
            ("https://host/a.parquet".into(), Pin::Nothing),
            ("/data".into(), Pin::Local),
            (format!("hf://datasets/org/rows@{commit}/a.parquet"), Pin::Commit),
            ("hf://datasets/org/rows@main/a.parquet".into(), Pin::Nothing),
            ("hf://datasets/org/rows".into(), Pin::Nothing),
            (format!("oci://host/rows@sha256:{sha}"), Pin::Digest),
            ("oci://host/rows:v1".into(), Pin::Nothing),
            ("s3://bucket/a.parquet".into(), Pin::Nothing),
        ] {
            assert_eq!(Data::parse(&text).unwrap().pin(), pin, "{text}");
        }
    }

    #[test]
    fn the_address_of_a_model_is_no_data_and_is_not_repeated_if_it_may_hold_a_secret() {
        let help = |text: &str| Data::parse(text).unwrap_err().help.unwrap();
        assert!(help("hf://owner/name").ends_with("write hf://datasets/owner/name"));
        assert!(help("hf://user:secret@host/name").ends_with("write hf://datasets/OWNER/NAME"));
    }

    #[test]
    fn every_form_is_read() {
        let shown = |text: &str| match Model::parse(text) {
            Ok(model) => format!("{model} is {}", model.name()),
            Err(fault) => fault.message,
        };
        let cases = [
            ("hf://org/Model-7B", "hf://org/Model-7B@main is org/Model-7B"),
            ("hf://org/m@refs/pr/3", "hf://org/m@refs/pr/3 is org/m"),
            ("oci://host:5000/team/m:v1", "oci://host:5000/team/m:v1 is m"),
            ("oci://m", "oci://docker.io/library/m:latest is m"),
            ("preset:phi-4", "oci://mcr.microsoft.com/aks/kaito/kaito-phi-4:0.2.0 is microsoft/phi-4"),
            (
                "preset:falcon-7b",
                "hf://tiiuae/falcon-7b@ec89142b67d748a1865ea4451372db8313ada0d8 is tiiuae/falcon-7b",
            ),
            ("preset:none", "\"none\" is not a preset"),
            ("no/such", "no/such is such"),
        ];
        for (text, expected) in cases {
            assert_eq!(shown(text), expected, "{text}");
        }
        let bad = [
            "hf://",
            "hf://name",
            "hf://a/b/c",
            "hf://../b",
            "hf://a/b@../../x",
            "hf://a/b@",
            "hf://a/b@x?y",
        ];
        for text in bad.into_iter().chain(["oci://oci:folder", "oci://user:pw@host/m", "oci://", "oci://a b"])
        {
            let fault = Model::parse(text).unwrap_err();
            assert_eq!(fault.kind, crate::fault::Kind::Config, "{text}");
            assert!(!fault.to_string().contains("pw"), "{fault}");
        }
    }

    #[test]
    fn a_folder_is_readable_and_of_one_address() {
        let at =
            |text: &str| Model::parse(text).unwrap().folder(Path::new("c")).unwrap().display().to_string();
        let one = at("hf://org/m");
        assert!(one.starts_with("c/models/org--m-") && one.len() == "c/models/org--m-".len() + KEY_DIGITS);
        assert_eq!(one, at("hf://org/m@main"));
        assert_ne!(one, at("hf://org/m@v2"));
        assert!(at("oci://host:5000/team/m:v1").starts_with("c/models/m-"));
        assert_ne!(at("oci://host:5000/team/m:v1"), at("oci://host:5000/other/m:v1"));
        assert_eq!(at("folder"), "folder");
    }
}
