//! A model in an object store -> the listing of its files; also the download of these files to a folder.

use url::Url;

use super::folder::{Folder, Item};
use super::{Access, hub, names};
use crate::fault::{Fault, Result};
use crate::report::Report;
use crate::source::{self, Source};

/// Returns one digest of the objects directly below the address as they are now, and the model's files among them.
pub fn list(url: &Url, options: &source::Options) -> Result<(String, Vec<Item>)> {
    let mut objects = source::objects(url, options)?;
    objects.retain(|object| !object.name.contains('/'));
    let all: Vec<String> = objects.iter().map(|object| object.name.clone()).collect();
    let mut kept = names::without_doubles(&all).into_iter();
    objects.retain(|_| kept.next().unwrap_or(false));
    let line = |object: &source::Object| {
        format!("{} {} {}", object.name, object.bytes, object.etag.as_deref().unwrap_or_default())
    };
    let revision = source::digest(objects.iter().map(line).collect::<Vec<_>>().join("\n").as_bytes());
    let item = |object: &source::Object| Item {
        name: object.name.clone(),
        bytes: object.bytes,
        sha256: None,
        archive: false,
    };
    let mut items: Vec<Item> = objects.iter().map(item).collect();
    names::complete(items.iter().map(|item| item.name.as_str()), url.as_str(), &all)?;
    items.sort_by_key(|item| item.bytes);
    Ok((revision, items))
}

/// Downloads files to the folder, in this order. A file that changed since the listing is a model fault.
pub fn bring(url: &Url, items: &[Item], folder: &Folder, access: Access, report: &Report) -> Result<()> {
    let source = |item: &Item| {
        let mut of_item = url.clone();
        of_item.set_path(&format!("{}/{}", url.path().trim_end_matches('/'), item.name));
        Source::Url { url: of_item, sha256: None }
    };
    for item in items {
        let options = source::Options { file_bytes_max: item.bytes.max(1), ..access.source.clone() };
        let source = source(item);
        let held = source::held(&source, &access.source.cache);
        source::require_space(&folder.path, &item.name, item.bytes.saturating_sub(held))?;
        let files = source::fetch(&[source], &options, report)?;
        let file = &files[0];
        if file.bytes != item.bytes {
            return Err(Fault::model(format!(
                "{}: {} bytes, but {} when the folder was listed; the file changed in between",
                file.name, file.bytes, item.bytes
            )));
        }
        hub::keep(&file.path, &item.name, folder)?;
    }
    Ok(())
}
