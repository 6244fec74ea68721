//! A few flags -> the Workspace that a person would write.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use serde_json::json;

use super::kind::{
    Destination, GROUP, KIND, Preset, PresetOptions, Resource, Source, Tuning, VERSIONS, Workspace,
};
use super::templates::Method;
use crate::facts::presets;
use crate::fault::{Fault, Result};

/// The options of `hone tune`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// Name of the base in KAITO's catalogue.
    pub preset: String,
    /// The data: URLs, or one `oci://IMAGE` or `pvc://CLAIM`.
    pub data: Vec<String>,
    /// The output: an image, or `pvc://CLAIM`.
    pub push: String,
    /// Secret for the push.
    pub push_secret: Option<String>,
    /// Secrets for pulling data images.
    pub pull_secrets: Vec<String>,
    /// Secret with the hub's token.
    pub token_secret: Option<String>,
    /// Name of the Workspace; unset: `tune-PRESET`.
    pub name: Option<String>,
    /// Namespace of the Workspace.
    pub namespace: Option<String>,
    /// Whether the base stays unquantised.
    pub lora: bool,
    /// ConfigMap with the configuration; unset: the method's default.
    pub config: Option<String>,
    /// Instance type of the node.
    pub instance: Option<String>,
    /// Number of nodes that train together; unset: one.
    pub nodes: Option<i32>,
    /// `key=value`.
    pub labels: Vec<String>,
    /// `name=value`, of `hone.sh/`.
    pub annotations: Vec<String>,
}

/// Returns a Workspace that tunes as the options say.
///
/// # Errors
/// Usage: flags that do not go together, or an unknown preset.
pub fn workspace(options: &Options) -> Result<Workspace> {
    let preset = presets::find(&options.preset).map_err(|fault| fault.at("--preset"))?;
    if let Some(why) = &preset.refused {
        return Err(Fault::usage(format!("--preset {}: it is not trained: {why}", preset.name)));
    }
    let name = options.name.clone().unwrap_or_else(|| format!("tune-{}", preset.name.replace('.', "-")));
    let labels = match options.labels.is_empty() {
        true => BTreeMap::from([("apps".to_owned(), name.clone())]),
        false => pairs(&options.labels, "--label")?,
    };
    let annotations = pairs(&options.annotations, "--annotate")?;
    let annotations: BTreeMap<String, String> = annotations
        .into_iter()
        .map(|(name, value)| (format!("{}{name}", super::annotations::PREFIX), value))
        .collect();
    let method = if options.lora { Method::Lora } else { Method::Qlora };
    let token = options
        .token_secret
        .clone()
        .map(|secret| PresetOptions { model_access_secret: secret, ..PresetOptions::default() });
    Ok(Workspace {
        api_version: format!("{GROUP}/{}", VERSIONS[VERSIONS.len() - 1]),
        kind: KIND.into(),
        metadata: ObjectMeta {
            name: Some(name),
            namespace: options.namespace.clone(),
            annotations: Some(annotations).filter(|annotations| !annotations.is_empty()),
            ..ObjectMeta::default()
        },
        resource: Resource {
            count: options.nodes,
            instance_type: options.instance.clone().unwrap_or_default(),
            label_selector: Some(LabelSelector { match_labels: Some(labels), ..LabelSelector::default() }),
            ..Resource::default()
        },
        tuning: Some(Tuning {
            preset: Some(Preset { name: preset.name.clone(), preset_options: token, ..Preset::default() }),
            method: method.name().into(),
            config: options.config.clone().unwrap_or_default(),
            input: Some(input(options)?),
            output: Some(output(options)?),
        }),
        ..Workspace::default()
    })
}

fn input(options: &Options) -> Result<Source> {
    let image_pull_secrets = options.pull_secrets.clone();
    const ADDRESSES: [&str; 7] = ["http://", "https://", "hf://", "s3://", "gs://", "az://", "oci://"];
    let reached = |text: &String| ADDRESSES.iter().any(|address| text.starts_with(address));
    match options.data.as_slice() {
        [one] if let Some(image) = one.strip_prefix("oci://") => {
            Ok(Source { image: image.into(), image_pull_secrets, ..Source::default() })
        }
        [one] if let Some(claim) = one.strip_prefix("pvc://") => {
            Ok(Source { volume_source: Some(claim_source(claim)), ..Source::default() })
        }
        all if all.iter().all(reached) && !all.is_empty() => {
            Ok(Source { urls: all.to_vec(), image_pull_secrets, ..Source::default() })
        }
        _ => Err(Fault::usage(format!("--data {}: a cluster cannot reach it", options.data.join(" "))).help(
            "give addresses (https://, hf://datasets/, s3://, gs://, az://, oci://), or one claim (pvc://CLAIM)",
        )),
    }
}

fn output(options: &Options) -> Result<Destination> {
    if let Some(claim) = options.push.strip_prefix("pvc://") {
        return Ok(Destination { volume_source: Some(claim_source(claim)), ..Destination::default() });
    }
    let secret = options.push_secret.clone().ok_or_else(|| {
        Fault::usage("--secret is missing: a push needs a Secret of type kubernetes.io/dockerconfigjson")
            .help("kubectl create secret docker-registry NAME --docker-server=... --docker-username=... --docker-password=...")
    })?;
    let image = options.push.strip_prefix("oci://").unwrap_or(&options.push);
    Ok(Destination { image: image.into(), image_push_secret: secret, ..Destination::default() })
}

fn claim_source(claim: &str) -> serde_json::Value {
    json!({"persistentVolumeClaim": {"claimName": claim}})
}

fn pairs(texts: &[String], flag: &str) -> Result<BTreeMap<String, String>> {
    let pair = |text: &String| {
        let (key, value) = text.split_once('=')?;
        Some((key.trim().to_owned(), value.to_owned()))
    };
    let pairs = texts
        .iter()
        .map(|text| pair(text).ok_or_else(|| Fault::usage(format!("{flag} {text:?}: expected name=value"))));
    pairs.collect()
}
