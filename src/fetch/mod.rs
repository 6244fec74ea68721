//! Addresses of base models and data that are not local files -> folders of the cache that are filled once.
//!
//! `address` parses the user's text. `hub`, `datasets`, `objects` and `image` list the files and download them.
//! `folder` keeps them for the next start and for other processes. `adapter` fetches adapters. `names` lists the files
//! that make a model.
//!
//! A whole folder is used without asking the network, so a restarted job trains from the files it began with even
//! if a branch or a tag has moved. An image with data is looked up by its tag at each start.

mod adapter;
mod address;
mod datasets;
mod folder;
mod hub;
mod image;
mod names;
mod objects;

use std::path::{Path, PathBuf};

pub use adapter::{Adapter, Brought, bring as adapter};
pub use address::{Data, Model, Pin};

use crate::fault::{Fault, Kind, Result};
use crate::registry;
use crate::report::{Report, Stage};
use crate::source;
use folder::{Folder, Item, Record};
use names::Role;

/// Options of connections to sources and registries. `plan` fills them.
#[derive(Clone, Copy)]
pub struct Access<'a> {
    /// Settings of downloads by HTTP.
    pub source: &'a source::Options,
    /// Settings of registries.
    pub registry: &'a registry::Options,
}

/// Downloads the files that describe a model (a few megabytes): config.json, the tokenizer, the chat template.
/// Returns the model's folder. Of an image whose layers are archives it downloads everything, because an archive
/// cannot be read in part.
///
/// # Errors
/// Config: an unknown repository, revision or image. Auth: a gated model, or missing permission. Model: no
/// safetensors, no config.json, hostile names, damage. Capacity: the cache's volume has too little space. Network
/// and storage as in `source`.
pub fn texts(model: &Model, access: Access, report: &Report) -> Result<PathBuf> {
    source::collect(&access.source.cache);
    bring(model, Role::Text, access, report).map_err(of_model)
}

/// Downloads the rest of a model (gigabytes). The folder is whole afterwards.
///
/// # Errors
/// The faults of [`texts`].
pub fn weights(model: &Model, access: Access, report: &Report) -> Result<PathBuf> {
    bring(model, Role::Weights, access, report).map_err(of_model)
}

/// Returns the revision of a fetched folder: the hub's commit, the manifest's digest, or a digest of an object store's
/// listing. `None` for a folder of the user's own.
pub fn revision(folder: &Path) -> Result<Option<String>> {
    Ok(folder::read(folder)?.map(|record| record.revision))
}

/// Downloads data. Each file carries the index of its entry in `list`. An image's `/data` becomes files; other
/// entries are fetched as [`source::fetch`] does.
///
/// # Errors
/// The faults of [`source::fetch`] and [`registry::pull`].
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
    if folder::read(&path)?.is_some_and(|record| record.whole) {
        return Ok(path);
    }
    let folder = Folder::open(&path, access.source.total_timeout, report)?;
    // Another process may have filled the folder while this one waited.
    let mut record = match folder.record()? {
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
        report.note(Stage::Download, format!("{model}: complete, in {}", path.display()));
    }
    Ok(path)
}

/// Turns a data fault into a model fault: a missing or damaged file of a model has nothing to do with the dataset.
fn of_model(fault: Fault) -> Fault {
    let kind = if fault.kind == Kind::Data { Kind::Model } else { fault.kind };
    Fault { kind, ..fault }
}

/// Lists the model's files and writes the record. From here on, this revision of the model is used.
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
