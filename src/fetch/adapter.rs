//! An adapter's source (a folder, an image, a repository of the hub) -> its PEFT folder on this machine.
//!
//! The cache keeps each fetched adapter under its content's name: an image's manifest digest or a commit. Each start
//! resolves the tag or branch again, verifies the files it holds against their digests, and fetches only what is
//! missing or damaged. If the registry or the hub cannot be reached, the copy of the last start is used, and a warning
//! says so.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::address::{self, key, readable};
use super::folder::{Folder, Item};
use super::{Access, hub};
use crate::adapter::{CONFIG_FILE, WEIGHTS_FILE};
use crate::fault::{Fault, Kind, Result};
use crate::registry::{self, Target};
use crate::report::{Report, Stage};
use crate::source;
use crate::{plain, whole, words};

/// LIMIT: attempts to resolve a revision if a copy of an earlier start is there.
const ATTEMPTS_WITH_COPY: u32 = 2;
const RECORD: &str = ".hone-adapter.json";
/// The place of an image's files in its folder of the cache.
const DATA: &str = "adapter";
/// Annotations that name the base of an image's adapter: hone's own, and KAITO's.
const BASES: [&str; 2] = ["hone.base-model", "sh.kaito.model.name"];

/// The place of an adapter.
#[derive(Clone, Debug, PartialEq)]
pub enum Adapter {
    /// A PEFT folder of this machine.
    Folder(PathBuf),
    /// An image as `hone push` and KAITO's pusher make it, in a registry or in a layout on disk.
    Image(Target),
    /// A repository of the Hugging Face hub.
    Hub {
        /// `OWNER/NAME`.
        repository: String,
        /// Branch, tag or commit.
        revision: String,
    },
}

/// An adapter that is here.
#[derive(Clone, Debug, PartialEq)]
pub struct Brought {
    /// The PEFT folder.
    pub folder: PathBuf,
    /// An image's manifest digest; of everything else `sha256:` of adapter_config.json and the weights, one after
    /// the other.
    pub digest: String,
    /// The base that an image's annotations name; empty for everything else.
    pub bases: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// The address as the user wrote it.
    address: String,
    /// The manifest's digest, or the commit.
    revision: String,
    annotations: BTreeMap<String, String>,
    /// SHA-256 in hex of each file.
    files: BTreeMap<String, String>,
}

impl Adapter {
    /// Reads `oci://IMAGE`, `oci:LAYOUT[:TAG]`, `hf://OWNER/NAME[@REVISION]`, a folder, or `OWNER/NAME` of the hub
    /// if there is no such folder.
    ///
    /// # Errors
    /// Config: no such form, and no such folder.
    pub fn parse(text: &str) -> Result<Adapter> {
        if let Some(image) = text.strip_prefix("oci://") {
            return Target::parse(image).map(Adapter::Image);
        }
        if text.starts_with("oci:") {
            return Target::parse(text).map(Adapter::Image);
        }
        if text.starts_with("hf://") {
            return of_hub(text);
        }
        if Path::new(text).is_dir() {
            return Ok(Adapter::Folder(text.into()));
        }
        let repository = !text.starts_with(['/', '.', '~']) && text.matches('/').count() == 1;
        if let Some((folder, strength)) = text.rsplit_once(':')
            && strength.parse::<f64>().is_ok()
            && Path::new(folder).is_dir()
        {
            return Err(Fault::config(format!("adapter {text:?}: found a strength behind the folder")).help(
                format!("name the folder alone, {folder}; --mix NAME=ADAPTER:{strength} gives it a strength"),
            ));
        }
        let hub = format!("hf://{text}");
        match of_hub(&hub) {
            Ok(adapter) if repository => Ok(adapter),
            _ => Err(Fault::config(format!("adapter {text:?}: there is no such folder"))
                .help("name a PEFT folder, oci://IMAGE, or hf://OWNER/NAME")),
        }
    }

    /// Returns whether it is fetched from another machine.
    pub fn is_remote(&self) -> bool {
        matches!(self, Adapter::Hub { .. } | Adapter::Image(Target::Registry(_)))
    }

    /// Returns the revision, if the address names one that cannot move.
    fn pinned(&self) -> Option<String> {
        match self {
            Adapter::Image(Target::Registry(reference)) => {
                reference.split_once('@').map(|(_, digest)| digest.to_owned())
            }
            Adapter::Hub { revision, .. } if hub::is_commit(revision) => Some(revision.clone()),
            _ => None,
        }
    }

    /// Returns the folder of the cache for a revision of it.
    fn home(&self, cache: &Path, revision: &str) -> PathBuf {
        let name = match self {
            Adapter::Folder(folder) => folder.display().to_string(),
            Adapter::Image(Target::Layout { folder, .. }) => folder.display().to_string(),
            Adapter::Image(Target::Registry(reference)) => reference.clone(),
            Adapter::Hub { repository, .. } => repository.clone(),
        };
        // The digest of a manifest is its content's; a commit is one of its repository alone.
        let whole = match self {
            Adapter::Hub { repository, .. } => format!("{repository} {revision}"),
            _ => revision.to_owned(),
        };
        cache.join("adapters").join(format!("{}-{}", readable(&name), key(&whole)))
    }
}

impl fmt::Display for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Adapter::Folder(folder) => write!(f, "{}", folder.display()),
            Adapter::Image(target @ Target::Layout { .. }) => write!(f, "{target}"),
            Adapter::Image(Target::Registry(reference)) => write!(f, "oci://{reference}"),
            Adapter::Hub { repository, revision } => write!(f, "hf://{repository}@{revision}"),
        }
    }
}

fn of_hub(text: &str) -> Result<Adapter> {
    match address::Model::parse(text)? {
        address::Model::Hub { repository, revision } => Ok(Adapter::Hub { repository, revision }),
        _ => Err(Fault::internal("hf:// names a repository")),
    }
}

/// Fetches an adapter.
///
/// # Errors
/// Config: no such folder, image or repository. Auth: no right to it. Model: it holds no adapter. Network: it cannot be
/// reached, and no copy of an earlier start is there.
pub fn bring(source: &Adapter, access: Access, report: &Report) -> Result<Brought> {
    if let Adapter::Folder(folder) = source {
        return Ok(Brought { folder: folder.clone(), digest: content(folder)?, bases: Vec::new() });
    }
    let cache = &access.source.cache;
    if let Some(revision) = source.pinned()
        && let Some(kept) = kept(source, &source.home(cache, &revision), report)?
    {
        return Ok(kept);
    }
    let last = last(source, cache, report)?;
    // A process that has a copy does not wait long for a registry that does not answer.
    let tries = if last.is_some() { ATTEMPTS_WITH_COPY } else { u32::MAX };
    let registry = registry::Options {
        attempts_max: access.registry.attempts_max.min(tries),
        ..access.registry.clone()
    };
    let hub =
        source::Options { attempts_max: access.source.attempts_max.min(tries), ..access.source.clone() };
    let asked = resolve(source, Access { source: &hub, registry: &registry }, report);
    let (revision, annotations) = match (asked, last) {
        (Ok(found), _) => found,
        (Err(fault), Some((home, kept))) if fault.kind == Kind::Network => {
            report.warn(
                Stage::Pull,
                format!("{source}: {}; the copy in {} is used", fault.message, home.display()),
            );
            return Ok(kept);
        }
        (Err(fault), _) => return Err(fault),
    };
    let home = source.home(cache, &revision);
    let folder = Folder::open(&home, access.source.total_timeout, report)?;
    if let Some(kept) = kept(source, &home, report)? {
        return Ok(kept);
    }
    let data = match source {
        Adapter::Hub { repository, .. } => {
            of_repository(repository, source, &revision, &folder, access, report)?
        }
        Adapter::Image(target) => of_image(target, &revision, &home.join(DATA), access, report)?,
        Adapter::Folder(_) => return Err(Fault::internal("a folder is not fetched")),
    };
    let files = digests(&data)?;
    let record = Record { address: source.to_string(), revision, annotations, files };
    let text = serde_json::to_vec_pretty(&record).expect("texts");
    whole::write(&home.join(RECORD), &text)?;
    brought(source, &home, &record)
}

/// Returns the commit or digest that a tag or a branch names now, and an image's annotations.
fn resolve(source: &Adapter, access: Access, report: &Report) -> Result<(String, BTreeMap<String, String>)> {
    match source {
        Adapter::Image(target) => registry::look(target, access.registry, report),
        Adapter::Hub { repository, revision } => {
            let address = source.to_string();
            let text = hub::ask("models", repository, revision, &address, access.source, report)?;
            hub::adapter_files(&text, &address, &[CONFIG_FILE, WEIGHTS_FILE])
                .map(|(commit, _)| (commit, BTreeMap::new()))
        }
        Adapter::Folder(_) => Err(Fault::internal("a folder is not resolved")),
    }
}

fn of_image(
    target: &Target,
    revision: &str,
    data: &Path,
    access: Access,
    report: &Report,
) -> Result<PathBuf> {
    if data.exists() {
        fs::remove_dir_all(data).map_err(|error| Fault::storage("clear", data, &error))?;
    }
    let pinned = match target {
        Target::Registry(reference) => registry::pinned(reference, revision)?,
        layout => layout.clone(),
    };
    let pulled = registry::pull(&pinned, data, access.registry, report)?;
    match pulled.digest == revision || matches!(target, Target::Registry(_)) {
        true => Ok(data.to_owned()),
        false => Err(Fault::data(format!("{target}: its tag moved while it was read")).help("start again")),
    }
}

fn of_repository(
    repository: &str,
    source: &Adapter,
    commit: &str,
    folder: &Folder,
    access: Access,
    report: &Report,
) -> Result<PathBuf> {
    let address = source.to_string();
    let text = hub::ask("models", repository, commit, &address, access.source, report)?;
    let (_, items): (_, Vec<Item>) = hub::adapter_files(&text, &address, &[CONFIG_FILE, WEIGHTS_FILE])?;
    hub::bring(repository, commit, &items, folder, access, report)?;
    Ok(folder.path.clone())
}

/// Returns the files of an earlier start, if each still has its digest; a damaged one is reported.
fn kept(source: &Adapter, home: &Path, report: &Report) -> Result<Option<Brought>> {
    let Some(record) = read(home) else { return Ok(None) };
    let data = data_folder(source, home);
    for (name, expected) in &record.files {
        let file = data.join(name);
        let found = if file.is_file() { Some(hash(&[&file])?) } else { None };
        if found.as_deref() != Some(expected.as_str()) {
            let text = format!("{}: it is not what was fetched; it is fetched again", file.display());
            report.warn(Stage::Pull, text);
            return Ok(None);
        }
    }
    brought(source, home, &record).map(Some)
}

/// Returns the newest copy of this address.
fn last(source: &Adapter, cache: &Path, report: &Report) -> Result<Option<(PathBuf, Brought)>> {
    let address = source.to_string();
    let mut homes = Vec::new();
    for entry in fs::read_dir(cache.join("adapters")).into_iter().flatten().flatten() {
        let home = entry.path();
        if read(&home).is_some_and(|record| record.address == address) {
            homes.push((entry.metadata().and_then(|data| data.modified()).ok(), home));
        }
    }
    homes.sort();
    for (_, home) in homes.into_iter().rev() {
        if let Some(kept) = kept(source, &home, report)? {
            return Ok(Some((home, kept)));
        }
    }
    Ok(None)
}

fn read(home: &Path) -> Option<Record> {
    serde_json::from_slice(&plain::small(&home.join(RECORD)).ok()?).ok()
}

fn data_folder(source: &Adapter, home: &Path) -> PathBuf {
    match source {
        Adapter::Hub { .. } => home.to_owned(),
        _ => home.join(DATA),
    }
}

fn brought(source: &Adapter, home: &Path, record: &Record) -> Result<Brought> {
    let folder = data_folder(source, home);
    let digest = match source {
        Adapter::Image(_) => record.revision.clone(),
        _ => content(&folder)?,
    };
    let named = BASES.iter().filter_map(|name| record.annotations.get(*name));
    let mut bases: Vec<String> = named.filter(|base| !base.is_empty()).cloned().collect();
    bases.dedup();
    Ok(Brought { folder, digest, bases })
}

/// Returns `sha256:` and the digest of the two files. A missing file is left out here, since the loader reports it
/// better.
fn content(folder: &Path) -> Result<String> {
    let files = [folder.join(CONFIG_FILE), folder.join(WEIGHTS_FILE)];
    let files: Vec<&Path> = files.iter().map(PathBuf::as_path).filter(|file| file.is_file()).collect();
    Ok(format!("sha256:{}", hash(&files)?))
}

fn digests(data: &Path) -> Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    for name in [CONFIG_FILE, WEIGHTS_FILE] {
        let file = data.join(name);
        if !file.is_file() {
            return Err(Fault::model(format!("{}: it has no {name}", data.display()))
                .help("name a LoRA adapter as PEFT saves it"));
        }
        all.insert(name.to_owned(), hash(&[&file])?);
    }
    Ok(all)
}

/// Returns the digest, in hex, of files one after the other.
fn hash(files: &[&Path]) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    for path in files {
        let storage = |error: io::Error| Fault::storage("read", path, &error);
        let mut file = fs::File::open(path).map_err(storage)?;
        loop {
            match file.read(&mut buffer).map_err(storage)? {
                0 => break,
                count => hasher.update(&buffer[..count]),
            }
        }
    }
    Ok(words::hex(hasher.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_a_source_is_read() {
        let shown = |text: &str| match Adapter::parse(text) {
            Ok(adapter) => adapter.to_string(),
            Err(fault) => fault.message,
        };
        assert_eq!(shown("oci://host:5000/team/a:v1"), "oci://host:5000/team/a:v1");
        assert_eq!(shown("oci:/tmp/layout:v2"), "oci:/tmp/layout:v2");
        assert_eq!(shown("hf://org/lora@v2"), "hf://org/lora@v2");
        assert_eq!(shown("org/lora"), "hf://org/lora@main");
        assert_eq!(shown("src/fetch"), "src/fetch");
        assert_eq!(shown("src/fetch:0.5"), "adapter \"src/fetch:0.5\": found a strength behind the folder");
        assert_eq!(shown("no/such:0.5"), "adapter \"no/such:0.5\": there is no such folder");
        assert_eq!(shown("/no/such"), "adapter \"/no/such\": there is no such folder");
        assert_eq!(shown("./no/such"), "adapter \"./no/such\": there is no such folder");
    }
}
