//! Addresses of base models and data that are no local files -> folders of the cache, filled once.
//!
//! `address` reads what the user wrote; `hub`, `datasets`, `objects` and `image` list what stands there and bring it; `folder` keeps what was
//! brought, for the next start and for other processes; `names` says which files make a model.
//!
//! A folder that is whole is used as it is, without a question to the network, so that a restarted job trains from what it
//! began with even if a branch or a tag has moved. An image of data is asked for by its tag each time.

mod address;
mod datasets;
mod folder;
mod hub;
mod image;
mod names;
mod objects;

use std::path::{Path, PathBuf};

pub use address::{Data, Model};

use crate::fault::{Fault, Kind, Result};
use crate::registry;
use crate::report::{Report, Stage};
use crate::source;
use folder::{Folder, Item, Record};
use names::Role;

/// How to reach what is fetched. Filled by `plan`.
#[derive(Clone, Copy)]
pub struct Access<'a> {
    pub source: &'a source::Options,
    pub registry: &'a registry::Options,
}

/// Brings what describes a model, a few megabytes: config.json, the tokenizer, the chat template; gives its folder. Of an
/// image whose layers are archives everything, since an archive cannot be read in part.
///
/// # Errors
/// Config: no such repository, revision or image. Auth: gated, or no right to it. Model: no safetensors, no config.json,
/// hostile names, damage. Capacity: more than the cache's volume has free. Network and storage as in `source`.
pub fn texts(model: &Model, access: Access, report: &Report) -> Result<PathBuf> {
    bring(model, Role::Text, access, report).map_err(of_model)
}

/// Brings the rest of it: gigabytes. The folder is whole then.
///
/// # Errors
/// As [`texts`].
pub fn weights(model: &Model, access: Access, report: &Report) -> Result<PathBuf> {
    bring(model, Role::Weights, access, report).map_err(of_model)
}

/// What a fetched folder was made of: the hub's commit, or the manifest's digest. `None`: a folder of the user's own.
pub fn revision(folder: &Path) -> Option<String> {
    folder::read(folder).map(|record| record.revision)
}

/// Brings data, each file with the entry of the list that it belongs to: an image's `/data` as files, everything else as [`source::fetch`] does.
///
/// # Errors
/// As [`source::fetch`] and [`registry::pull`].
pub fn data(list: &[Data], access: Access, report: &Report) -> Result<Vec<source::File>> {
    let (mut sources, mut entries) = (Vec::new(), Vec::new());
    for (entry, data) in list.iter().enumerate() {
        match data {
            Data::Source(source) => sources.push(source.clone()),
            Data::Image(image) => sources.push(image::data(image, access, report)?),
            Data::Hub(hub) => sources.extend(datasets::resolve(hub, access, report)?),
        }
        entries.resize(sources.len(), entry);
    }
    let mut files = source::fetch(&sources, access.source, report)?;
    files.iter_mut().for_each(|file| file.entry = entries[file.entry]);
    Ok(files)
}

fn bring(model: &Model, up_to: Role, access: Access, report: &Report) -> Result<PathBuf> {
    let path = model.folder(&access.source.cache)?;
    if let Model::Folder(_) = model {
        return Ok(path);
    }
    if folder::read(&path).is_some_and(|record| record.whole) {
        return Ok(path);
    }
    let folder = Folder::open(&path, access.source.total_timeout, report)?;
    // Another process may have filled it while this one waited.
    let mut record = match folder.record() {
        Some(record) if record.whole => return Ok(path),
        Some(record) => record,
        None => list(model, &folder, access, report)?,
    };
    let archives = record.items.iter().any(|item| item.archive);
    let wanted =
        |item: &&Item| archives || names::role(&item.name) == Some(Role::Text) || up_to != Role::Text;
    let missing: Vec<Item> =
        record.items.iter().filter(wanted).filter(|item| !folder.has(item)).cloned().collect();
    match model {
        Model::Folder(_) => {}
        Model::Hub { repository, .. } => {
            hub::bring(repository, &record.revision, &missing, &folder, access, report)?
        }
        Model::Objects(url) => objects::bring(url, &missing, &folder, access, report)?,
        Model::Image { reference, .. } => {
            image::bring(reference, &record, &missing, &folder, access, report)?
        }
    }
    if archives || up_to == Role::Weights {
        record.whole = true;
        folder.save(&record)?;
        report.note(Stage::Download, format!("{model}: whole, in {}", path.display()));
    }
    Ok(path)
}

/// What is missing or damaged of a model is no matter of the dataset.
fn of_model(fault: Fault) -> Fault {
    let kind = if fault.kind == Kind::Data { Kind::Model } else { fault.kind };
    Fault { kind, ..fault }
}

/// Asks for what there is and writes it down: from here on the model is what it is now.
fn list(model: &Model, folder: &Folder, access: Access, report: &Report) -> Result<Record> {
    let (revision, items) = match model {
        Model::Folder(_) => return Err(Fault::internal("a local folder is not fetched")),
        Model::Hub { repository, revision } => {
            hub::list(repository, revision, &model.to_string(), access.source, report)?
        }
        Model::Objects(url) => objects::list(url, access.source)?,
        Model::Image { reference, .. } => image::list(reference, access.registry, report)?,
    };
    let record = Record { address: model.to_string(), revision, items, whole: false };
    folder.save(&record)?;
    report.note(Stage::Download, format!("{model}: {} files at {}", record.items.len(), record.revision));
    Ok(record)
}
