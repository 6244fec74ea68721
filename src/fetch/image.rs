//! An OCI artifact of files, or an image with a model's folder -> a folder; an image's `/data` -> training data.
//!
//! oras makes one layer of each file and writes the file's path beside it. An image has archives, and the model
//! lies somewhere in them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use super::folder::{Folder, Item, Record};
use super::names::{self, CONFIG, Role};
use super::{Access, address};
use crate::fault::{Fault, Result};
use crate::registry::{self, Part};
use crate::report::{Report, Stage};
use crate::source::{self, Source};

/// Prefix of partial files, and of archives until all of them are unpacked.
const PART_PREFIX: &str = ".hone-part-";
const UNPACKED: &str = ".hone-unpacked";
/// LIMIT: folder levels that are searched for a model.
const DEPTH_MAX: usize = 16;

/// Returns the manifest's digest, and the model's files or the archives that hold them.
pub fn list(image: &str, options: &registry::Options, report: &Report) -> Result<(String, Vec<Item>)> {
    let parts = registry::list(image, options, report)?;
    let mut titled = Vec::new();
    for part in parts.list.iter().filter(|part| !part.unpack) {
        if let Some(title) = &part.title {
            titled.push((inside(title, image)?, part));
        }
    }
    let items = match folder_of(&titled) {
        Some(folder) => files(&titled, &folder, image)?,
        None => archives(&parts.list, image)?,
    };
    Ok((parts.digest, items))
}

/// Downloads files to the folder, or downloads archives and unpacks the model's files.
pub fn bring(
    image: &str,
    record: &Record,
    items: &[Item],
    folder: &Folder,
    access: Access,
    report: &Report,
) -> Result<()> {
    let paths: Vec<PathBuf> =
        items.iter().map(|item| folder.path.join(format!("{PART_PREFIX}{}", hex(item)))).collect();
    let held = |path: &PathBuf| fs::metadata(path).map_or(0, |data| data.len());
    let missing = |(item, path): (&Item, &PathBuf)| item.bytes.saturating_sub(held(path));
    let to_come = items.iter().zip(&paths).map(missing).fold(0, u64::saturating_add);
    let is_archive = |item: &&Item| item.archive;
    // Archives stay until they are unpacked, so that an interruption causes no second download.
    let to_unpack = items.iter().filter(is_archive).map(|item| item.bytes).fold(0, u64::saturating_add);
    source::require_space(&folder.path, image, to_come.saturating_add(to_unpack))?;
    let parts: Vec<Part> = items.iter().map(part).collect();
    let pairs = parts.iter().zip(paths.iter().map(PathBuf::as_path));
    let pinned = registry::pinned(image, &record.revision)?.to_string();
    registry::download(&pinned, pairs, access.registry, report, |part, path| match part.unpack {
        true => Ok(()),
        false => folder.take(path, part.title.as_deref().expect("given below")),
    })?;
    if to_unpack == 0 {
        return Ok(());
    }
    let archives: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    unpack(image, &archives, folder, report)
}

/// Returns an image's `/data`, by the digest that its tag points to now.
pub fn data(image: &str, access: Access, report: &Report) -> Result<Source> {
    let digest = registry::list(image, access.registry, report)?.digest;
    let path = address::images(&access.source.cache, image, &digest);
    let home = path.parent().expect("below the cache").to_owned();
    // All images share one lock, so unfinished pulls found here belong to no running process.
    let folder = Folder::open(&home, access.source.total_timeout, report)?;
    if !path.exists() {
        remove_stages(&folder.path);
        registry::pull(&registry::pinned(image, &digest)?, &path, access.registry, report)?;
    } else {
        report.note(Stage::Pull, format!("{image}: from the cache, {}", path.display()));
    }
    let pattern = path.to_str().ok_or_else(|| Fault::config("the cache's path is not valid UTF-8"))?;
    Ok(Source::Path { pattern: pattern.to_owned(), sha256: None })
}

/// Removes folders that killed pulls left. A failure to do so only costs space.
fn remove_stages(home: &Path) {
    let entries = fs::read_dir(home).into_iter().flatten().flatten();
    for entry in
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(registry::STAGE_PREFIX))
    {
        let _ = fs::remove_dir_all(entry.path());
    }
}

/// Returns a layer's title as a path that cannot leave the folder.
fn inside(title: &str, image: &str) -> Result<PathBuf> {
    let path: PathBuf =
        Path::new(title).components().filter(|component| *component != Component::CurDir).collect();
    let plain = path.components().all(|component| matches!(component, Component::Normal(_)));
    match plain && !path.as_os_str().is_empty() && !title.contains(['\\', '\0']) {
        true => Ok(path),
        false => Err(Fault::model(format!(
            "{image}: the file name `{}` leads out of the folder",
            title.escape_debug()
        ))
        .help("this artifact was not made by oras; nothing was extracted")),
    }
}

/// Returns the folder with a config.json that is nearest to the top.
fn folder_of(titled: &[(PathBuf, &Part)]) -> Option<PathBuf> {
    let configs = titled.iter().filter(|(path, _)| path.file_name().is_some_and(|name| name == CONFIG));
    let folders = configs.map(|(path, _)| path.parent().unwrap_or(Path::new("")).to_owned());
    folders.min_by_key(|folder| (folder.components().count(), folder.clone()))
}

/// Returns the model's files directly in a folder of the artifact, small ones first.
fn files(titled: &[(PathBuf, &Part)], folder: &Path, image: &str) -> Result<Vec<Item>> {
    let here = titled.iter().filter(|(path, _)| path.parent() == Some(folder));
    // Of layers with the same name the last one counts, as if they were written one after the other.
    let here: BTreeMap<String, &Part> =
        here.filter_map(|(path, part)| Some((path.file_name()?.to_str()?.to_owned(), *part))).collect();
    let all: Vec<String> = here.keys().cloned().collect();
    let kept = names::without_doubles(&all);
    let item = |(name, part): (String, &Part)| item(name, part, false);
    let mut items: Vec<Item> =
        here.into_iter().zip(kept).filter(|(_, kept)| *kept).map(|(pair, _)| item(pair)).collect();
    names::complete(items.iter().map(|item| item.name.as_str()), image, &all)?;
    items.sort_by_key(|item| item.bytes);
    Ok(items)
}

/// Returns the archives of an artifact (oras makes one of a folder), or all layers of an image.
fn archives(parts: &[Part], image: &str) -> Result<Vec<Item>> {
    let marked: Vec<&Part> = parts.iter().filter(|part| part.unpack).collect();
    let plain = || parts.iter().filter(|part| part.title.is_none()).collect();
    let chosen: Vec<&Part> = if marked.is_empty() { plain() } else { marked };
    match chosen.is_empty() {
        false => Ok(chosen.into_iter().map(|part| item(part.digest.clone(), part, true)).collect()),
        true => {
            let all: Vec<String> = parts.iter().filter_map(|part| part.title.clone()).collect();
            names::complete(std::iter::empty(), image, &all).map(|()| Vec::new())
        }
    }
}

fn item(name: String, part: &Part, archive: bool) -> Item {
    let sha256 = part.digest.trim_start_matches("sha256:").to_owned();
    Item { name, bytes: part.bytes, sha256: Some(sha256), archive }
}

fn part(item: &Item) -> Part {
    let title = Some(item.name.clone());
    Part { digest: format!("sha256:{}", hex(item)), bytes: item.bytes, title, unpack: item.archive }
}

fn hex(item: &Item) -> &str {
    item.sha256.as_deref().unwrap_or_default()
}

/// Unpacks the files that may be the model's, finds its folder, and moves its files up.
fn unpack(image: &str, archives: &[&Path], folder: &Folder, report: &Report) -> Result<()> {
    let stage = folder.path.join(UNPACKED);
    let storage = |error: std::io::Error| Fault::storage("clear", &stage, &error);
    if stage.exists() {
        fs::remove_dir_all(&stage).map_err(storage)?;
    }
    fs::create_dir(&stage).map_err(storage)?;
    report.note(Stage::Pull, format!("{image}: looking for a model in {} layers", archives.len()));
    // Archives may be compressed, so the limit is the free disk space.
    registry::unpack(archives, &stage, names::is_taken, source::free_bytes(&stage)?, image)?;
    let found = model_in(&stage)?.ok_or_else(|| {
        Fault::model(format!("{image}: no folder in it holds {CONFIG} and *.safetensors")).help(
            "push a model's folder as the hub has it, by `oras push` or in an image; links are not followed",
        )
    })?;
    let names = names_in(&found)?;
    for (name, _) in names.iter().zip(names::without_doubles(&names)).filter(|(_, kept)| *kept) {
        folder.take(&found.join(name), name)?;
    }
    fs::remove_dir_all(&stage).map_err(storage)?;
    archives
        .iter()
        .try_for_each(fs::remove_file)
        .map_err(|error| Fault::storage("remove an archive in", &folder.path, &error))
}

/// Returns the folder with a model that is nearest to the top; among equals the first by name.
fn model_in(folder: &Path) -> Result<Option<PathBuf>> {
    let mut level = vec![folder.to_owned()];
    for _ in 0..DEPTH_MAX {
        let mut next = Vec::new();
        for folder in &level {
            let names = names_in(folder)?;
            let has = |role| names.iter().any(|name| names::role(name) == Some(role));
            if names.iter().any(|name| name == CONFIG) && has(Role::Weights) {
                return Ok(Some(folder.clone()));
            }
            next.extend(names.iter().map(|name| folder.join(name)).filter(|path| path.is_dir()));
        }
        level = next;
    }
    Ok(None)
}

fn names_in(folder: &Path) -> Result<Vec<String>> {
    let storage = |error: std::io::Error| Fault::storage("list", folder, &error);
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(storage)? {
        names.extend(entry.map_err(storage)?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}
