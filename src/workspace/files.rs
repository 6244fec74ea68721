//! Files of Workspaces and ConfigMaps -> the objects to apply. This is the work of `hone render`.

use std::io::Read;
use std::path::PathBuf;

use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::{Value, json};

use super::kind::{GROUP, KIND, VERSIONS, Workspace};
use super::render::{Asked, render};
use super::serve::{self, Tuned};
use super::yaml::{self, Document};
use super::{CONFIG_FILE, Settings, config_name, inference};
use crate::fault::{Fault, Kind, Result};
use crate::spec::keys;

/// LIMIT: Kubernetes takes objects up to 1.5 MB.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// The objects to apply, and warnings.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Applied {
    /// Objects in the order in which they are applied.
    pub objects: Vec<Value>,
    /// Warnings, each with the name of its Workspace.
    pub warnings: Vec<String>,
}

impl Applied {
    /// Returns the objects as YAML documents.
    pub fn yaml(&self) -> String {
        yaml::write(&self.objects)
    }

    /// Returns the objects as one List.
    pub fn json(&self) -> Value {
        json!({"apiVersion": "v1", "kind": "List", "items": self.objects})
    }
}

/// Renders every Workspace; `-` is the standard input. Other objects are skipped with a warning.
///
/// # Errors
/// As `render`, and Config: files that cannot be read, or hold no Workspace.
pub fn apply(files: &[PathBuf], settings: &Settings) -> Result<Applied> {
    let mut documents = Vec::new();
    for file in files {
        documents.extend(yaml::read(&file.display().to_string(), &text(file)?)?);
    }
    let (workspaces, others): (Vec<Document>, Vec<Document>) =
        documents.into_iter().partition(|document| document.kind() == KIND);
    let (configs, others): (Vec<Document>, Vec<Document>) =
        others.into_iter().partition(|document| document.kind() == "ConfigMap");
    let configs = configs.iter().map(config).collect::<Result<Vec<ConfigMap>>>()?;
    let mut applied = Applied::default();
    for document in &others {
        applied.warnings.push(format!(
            "{}: {} {} is ignored",
            document.place,
            kind(document),
            document.name()
        ));
    }
    let tuned = tuned(&workspaces)?;
    for document in &workspaces {
        add(document, &configs, settings, &tuned, &mut applied)?;
    }
    match applied.objects.is_empty() {
        true => Err(Fault::config("no Workspace in what was given")
            .help("give the file of one with -f; `hone tune --help` writes one")),
        false => Ok(applied),
    }
}

/// Returns the images that Workspaces of the same files push. Without a cluster there is no digest, so the tag stands
/// for it.
fn tuned(documents: &[Document]) -> Result<Tuned> {
    let mut tuned = Tuned::new();
    for document in documents {
        let workspace: Workspace = document.typed()?;
        let output = workspace.tuning.as_ref().and_then(|tuning| tuning.output.as_ref());
        if let Some(output) = output.filter(|output| !output.image.is_empty()) {
            tuned.insert(workspace.name().into(), Ok(output.image.clone()));
        }
    }
    Ok(tuned)
}

fn add(
    document: &Document,
    configs: &[ConfigMap],
    settings: &Settings,
    tuned: &Tuned,
    applied: &mut Applied,
) -> Result<()> {
    let workspace: Workspace = document.typed()?;
    let place = |fault: Fault| fault.at(format!("{}: Workspace {}", document.place, workspace.name()));
    known_version(&workspace).map_err(place)?;
    let named = |name: &str| {
        configs.iter().find(|map| {
            map.metadata.name.as_deref() == Some(name)
                && map.metadata.namespace.as_deref().unwrap_or(workspace.namespace()) == workspace.namespace()
        })
    };
    if let (None, Some(inference)) = (&workspace.tuning, &workspace.inference) {
        let name = inference.config.as_str();
        let config = named(name).filter(|_| !name.is_empty());
        let config =
            config.map(|map| entry_of(map, name, inference::CONFIG_FILE)).transpose().map_err(place)?;
        let asked = serve::Asked { workspace: &workspace, config, settings, tuned };
        let served = serve::serve(&asked).map_err(place)?;
        let warnings = served.warnings.iter();
        applied.warnings.extend(warnings.map(|warning| format!("{}: {warning}", workspace.name())));
        applied.objects.extend(served.objects());
        return Ok(());
    }
    let name = config_name(&workspace);
    let config = named(&name).map(|map| entry(map, &name)).transpose().map_err(place)?;
    let rendered = render(&Asked { workspace: &workspace, config, settings, revision: 1 }).map_err(place)?;
    applied
        .warnings
        .extend(rendered.warnings.iter().map(|warning| format!("{}: {warning}", workspace.name())));
    let map = rendered.config_map.map(|map| object(&map));
    // Two Workspaces may have the same default.
    applied.objects.extend(map.filter(|map| !applied.objects.contains(map)));
    applied.objects.extend(rendered.service.map(|service| object(&service)));
    applied.objects.push(object(&rendered.job));
    Ok(())
}

fn known_version(workspace: &Workspace) -> Result<()> {
    match workspace.api_version.split_once('/') {
        Some((GROUP, version)) if VERSIONS.contains(&version) => Ok(()),
        _ => Err(Fault::config(format!(
            "apiVersion: expected {GROUP}/{}, found {:?}",
            VERSIONS.join(&format!(" or {GROUP}/")),
            workspace.api_version
        ))),
    }
}

/// Returns the text at `data."training_config.yaml"`.
pub fn entry<'a>(map: &'a ConfigMap, name: &str) -> Result<&'a str> {
    entry_of(map, name, CONFIG_FILE)
}

/// Returns the entry `file` of a ConfigMap's data.
///
/// # Errors
/// Config: there is none.
pub fn entry_of<'a>(map: &'a ConfigMap, name: &str, file: &str) -> Result<&'a str> {
    let data = map.data.as_ref();
    data.and_then(|data| data.get(file)).map(String::as_str).ok_or_else(|| {
        let keys = || data.iter().flat_map(|data| data.keys()).map(String::as_str);
        let near = keys::nearest(keys(), file).map_or(String::new(), |near| format!("; it has {near}"));
        Fault::config(format!("ConfigMap {name} has no data.\"{file}\"{near}"))
    })
}

fn config(document: &Document) -> Result<ConfigMap> {
    document.typed()
}

fn kind(document: &Document) -> &str {
    match document.kind() {
        "" => "an object without kind",
        kind => kind,
    }
}

fn object<T: serde::Serialize>(object: &T) -> Value {
    serde_json::to_value(object).expect("texts and numbers")
}

fn text(file: &PathBuf) -> Result<String> {
    let name = file.display();
    let cannot = |error: std::io::Error| {
        Fault::unread(Kind::Config, format!("cannot read {name}: {error}"), &error)
            .help("give the path of a YAML file, or - for the standard input")
    };
    let mut text = String::new();
    let reader: Box<dyn Read> = match file.to_str() {
        Some("-") => Box::new(std::io::stdin()),
        _ => Box::new(std::fs::File::open(file).map_err(cannot)?),
    };
    reader.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(cannot)?;
    Ok(text)
}
