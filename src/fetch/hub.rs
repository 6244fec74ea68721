//! A repository of the Hugging Face hub -> its commit and its files; also the download of these files to a folder.

use std::path::Path;

use serde::Deserialize;
use url::Url;

use super::folder::{Folder, Item};
use super::{Access, names};
use crate::fault::{Fault, Kind, Result};
use crate::report::Report;
use crate::source::{self, Hub, Source};
use crate::whole;

/// LIMIT: a listing has about 300 bytes per file.
const LISTING_BYTES_MAX: u64 = 16 << 20;
const COMMIT_DIGITS: usize = 40;

#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Large>,
}

#[derive(Deserialize)]
struct Large {
    sha256: String,
    size: u64,
}

/// Returns the commit that a revision points to now, and the model's files at it.
pub fn list(
    repository: &str,
    revision: &str,
    address: &str,
    options: &source::Options,
    report: &Report,
) -> Result<(String, Vec<Item>)> {
    let text = ask("models", repository, revision, address, options, report)?;
    read(&text, address)
}

/// Downloads the hub's listing of a repository at a revision; `kind` is `models` or `datasets`. An unknown
/// repository is a config fault.
pub fn ask(
    kind: &str,
    repository: &str,
    revision: &str,
    address: &str,
    options: &source::Options,
    report: &Report,
) -> Result<Vec<u8>> {
    let mut url = at(&Hub::from_environment()?, &["api", kind], repository, &["revision", revision]);
    url.set_query(Some("blobs=true"));
    let options = source::Options { file_bytes_max: LISTING_BYTES_MAX, ..options.clone() };
    let listing = [Source::Url { url, sha256: None }];
    let file = source::fetch(&listing, &options, report).map_err(|fault| match fault.kind {
        Kind::Data => Fault::config(format!("{address}: the hub does not know it: {}", fault.message))
            .help("check owner, name and revision (a branch, a tag or a commit)"),
        _ => fault.at(address),
    })?;
    let path = &file[0].path;
    std::fs::read(path).map_err(|error| Fault::storage("read", path, &error))
}

/// Returns whether a text is a full commit hash.
pub fn is_commit(text: &str) -> bool {
    text.len() == COMMIT_DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Downloads files to the folder, in this order. A file of another length than listed is a model fault.
pub fn bring(
    repository: &str,
    commit: &str,
    items: &[Item],
    folder: &Folder,
    access: Access,
    report: &Report,
) -> Result<()> {
    if items.is_empty() {
        return Ok(());
    }
    let hub = Hub::from_environment()?;
    let source = |item: &Item| Source::Url {
        url: at(&hub, &[], repository, &["resolve", commit, &item.name]),
        sha256: item.sha256.clone(),
    };
    let sources: Vec<Source> = items.iter().map(source).collect();
    let bytes: u64 = items.iter().map(|item| item.bytes).fold(0, u64::saturating_add);
    let held: u64 = sources.iter().map(|source| source::held(source, &access.source.cache)).sum();
    source::require_space(&folder.path, &format!("hf://{repository}"), bytes.saturating_sub(held))?;
    for (item, source) in items.iter().zip(sources) {
        // The listing gives the length, so a longer body is cut off there.
        let options = source::Options { file_bytes_max: item.bytes.max(1), ..access.source.clone() };
        let files = source::fetch(&[source], &options, report)?;
        let file = &files[0];
        if file.bytes != item.bytes {
            return Err(Fault::model(format!(
                "{}: {} bytes, the hub's listing says {}",
                file.name, file.bytes, item.bytes
            )));
        }
        keep(&file.path, &item.name, folder)?;
    }
    Ok(())
}

/// Moves a downloaded file to the folder. Texts are copied, because the store of downloads may hold equal small
/// files once.
pub fn keep(file: &Path, name: &str, folder: &Folder) -> Result<()> {
    if names::role(name) == Some(names::Role::Weights) {
        return folder.take(file, name);
    }
    let text = std::fs::read(file).map_err(|error| Fault::storage("read", file, &error))?;
    whole::write(&folder.path.join(name), &text)
}

/// Returns `{endpoint}/{before}/{repository}/{after}`, with each part of the path escaped.
pub fn at(hub: &Hub, before: &[&str], repository: &str, after: &[&str]) -> Url {
    let mut url = hub.endpoint.clone();
    url.path_segments_mut()
        .expect("an http address has a path")
        .pop_if_empty()
        .extend(before)
        .extend(repository.split('/'))
        .extend(after);
    url
}

/// Returns the commit of a listing, and the files of these names in it.
pub fn adapter_files(text: &[u8], address: &str, names: &[&str]) -> Result<(String, Vec<Item>)> {
    let Listing { sha, siblings } = listing(text, address)?;
    let mut items = Vec::new();
    for name in names {
        let found = siblings.iter().find(|sibling| sibling.rfilename == *name).ok_or_else(|| {
            Fault::model(format!("{address}: the repository has no {name}"))
                .help("name a LoRA adapter as PEFT saves it")
        })?;
        items.push(item(found, address)?);
    }
    Ok((sha, items))
}

fn listing(text: &[u8], address: &str) -> Result<Listing> {
    let wrong = |what: String| Fault::model(format!("{address}: {what}"));
    let listing: Listing = serde_json::from_slice(text)
        .map_err(|error| wrong(format!("the hub's answer is not a listing of a repository: {error}")))?;
    match is_commit(&listing.sha) {
        true => Ok(listing),
        false => Err(wrong("the hub's answer names no commit".into())),
    }
}

fn item(sibling: &Sibling, address: &str) -> Result<Item> {
    let name = sibling.rfilename.clone();
    let (bytes, sha256) = match &sibling.lfs {
        Some(large) => (Some(large.size), Some(large.sha256.clone())),
        None => (sibling.size, None),
    };
    let bytes = bytes
        .ok_or_else(|| Fault::model(format!("{address}: the hub does not give the length of {name}")))?;
    Ok(Item { name, bytes, sha256, archive: false })
}

fn read(text: &[u8], address: &str) -> Result<(String, Vec<Item>)> {
    let Listing { sha, siblings } = listing(text, address)?;
    let all: Vec<String> = siblings.iter().map(|sibling| sibling.rfilename.clone()).collect();
    let mut items = Vec::new();
    for (sibling, kept) in siblings.iter().zip(names::without_doubles(&all)) {
        if kept {
            items.push(item(sibling, address)?);
        }
    }
    names::complete(items.iter().map(|item| item.name.as_str()), address, &all)?;
    items.sort_by_key(|item| item.bytes);
    Ok((sha, items))
}
