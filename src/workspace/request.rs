//! A Workspace -> the `hone run` of its container: arguments, planned as the pod will plan them.

use super::annotations::Options;
use super::kind::Workspace;
use super::templates::{CONFIG_FILE, config_name};
use crate::facts::presets::{self, Preset, Targets};
use crate::fault::{Fault, Result};
use crate::fetch;
use crate::plan::{self, Plan};
use crate::spec::{self, Origin, Setting, Written};

/// Folders of the pod's mounts.
pub(super) const CONFIG_FOLDER: &str = "/mnt/config";
pub(super) const DATA_FOLDER: &str = "/mnt/data";
pub(super) const CACHE_FOLDER: &str = "/mnt/cache";
pub(super) const DOCKER_FOLDER: &str = "/mnt/docker";
pub(super) const CA_FOLDER: &str = "/mnt/ca";
/// Folders that the output cannot be.
const TAKEN: [&str; 5] = [CONFIG_FOLDER, DATA_FOLDER, CACHE_FOLDER, DOCKER_FOLDER, CA_FOLDER];

/// The model's address in place of a folder that only the pod has.
const ELSEWHERE: &str = "oci://pod.invalid/model:folder";

/// The arguments of the container, and the plan that they result in.
pub(super) struct Run {
    /// Arguments of the container, from `run` on.
    pub arguments: Vec<String>,
    /// The plan that they lead to.
    pub plan: Plan,
    /// The preset that the Workspace names.
    pub preset: Option<&'static Preset>,
}

/// Returns the command of a Workspace's container, planned as the container will plan it.
///
/// # Errors
/// Config, Usage: all faults that the pod would report: an unknown model, keys of the configuration, paths,
/// references.
pub(super) fn run(workspace: &Workspace, options: &Options, config: &str, on_gpu: bool) -> Result<Run> {
    let tuning = workspace.tuning.as_ref().ok_or_else(|| Fault::config("tuning: missing"))?;
    let name = tuning.preset.as_ref().map(|preset| preset.name.as_str()).unwrap_or_default();
    let preset = match &options.model {
        // Its weights are elsewhere, so the catalogue need not know it.
        Some(_) => presets::find(name).ok(),
        None => Some(presets::find(name).map_err(|fault| fault.at("tuning.preset.name"))?),
    };
    let given = Given { workspace, options, name };
    let flags = given.flags()?;
    let name = format!("ConfigMap {}", config_name(workspace));
    let environment =
        |variable: &str| target_modules(preset).filter(|_| variable == "DEFAULT_TARGET_MODULES");
    let plan =
        plan::make(&spec::gather_mounted(&name, config, &given.settings(&flags, on_gpu), &environment)?)?;
    if let Some(taken) = TAKEN.iter().find(|taken| plan.output.starts_with(taken)) {
        return Err(Fault::config(format!(
            "TrainingArguments.output_dir: {} lies in {taken}, which holds something else",
            plan.output.display()
        ))
        .help("leave output_dir out, or name another folder below /mnt"));
    }
    Ok(Run { arguments: given.arguments(&flags), plan, preset })
}

struct Given<'a> {
    workspace: &'a Workspace,
    options: &'a Options,
    name: &'a str,
}

impl Given<'_> {
    /// Returns the flags and values, in the order of a command line. Files of a volume are found at the path where
    /// KAITO mounts it.
    fn flags(&self) -> Result<Vec<(&'static str, String)>> {
        let tuning = self.workspace.tuning.as_ref().expect("looked at above");
        let mut flags = vec![("model", self.model()?), ("name", self.name.to_owned())];
        if let Some(input) = &tuning.input {
            flags.extend(input.urls.iter().map(|url| ("data", url.clone())));
            flags.extend(
                Some(&input.image)
                    .filter(|image| !image.is_empty())
                    .map(|image| ("data", format!("oci://{image}"))),
            );
        }
        if let Some(output) = tuning.output.as_ref().filter(|output| !output.image.is_empty()) {
            flags.push(("push", output.image.clone()));
        }
        Ok(flags)
    }

    fn arguments(&self, flags: &[(&str, String)]) -> Vec<String> {
        let mut arguments = vec!["run".into(), format!("--config={CONFIG_FOLDER}/{CONFIG_FILE}")];
        arguments.extend(flags.iter().map(|(flag, value)| format!("--{flag}={value}")));
        arguments.extend(self.options.config_overrides.iter().map(|text| format!("--set={text}")));
        arguments
    }

    /// Returns the settings that the pod's command line and environment will give.
    fn settings(&self, flags: &[(&str, String)], on_gpu: bool) -> Vec<Setting> {
        let flag = |key: &str, written| Setting {
            key: key.into(),
            written,
            origin: Origin::Flag(field(key).into()),
        };
        let mut data = Vec::new();
        let mut settings = Vec::new();
        for (key, value) in flags.iter().map(|(key, value)| (*key, value.clone())) {
            match key {
                // A folder of the pod is not here; anything that could be fetched stands for it.
                "model" if value.starts_with('/') => {
                    settings.push(flag(key, Written::Text(ELSEWHERE.into())))
                }
                "data" => data.push(value),
                _ => settings.push(flag(key, Written::Text(value))),
            }
        }
        if !data.is_empty() {
            settings.push(flag("data", Written::Texts(data)));
        }
        let device = if on_gpu { "cuda" } else { "cpu" };
        settings.push(flag("device", Written::Text(device.into())));
        for text in &self.options.config_overrides {
            let (key, value) = text.split_once('=').expect("read so");
            let origin = Origin::Flag("hone.sh/config-overrides".into());
            settings.push(Setting { key: key.trim().into(), written: Written::Yaml(value.into()), origin });
        }
        settings
    }

    /// Returns the address of the weights: the annotation's, the user's image, KAITO's artifact, or the hub.
    fn model(&self) -> Result<String> {
        let tuning = self.workspace.tuning.as_ref().expect("looked at above");
        let options = tuning.preset.as_ref().and_then(|preset| preset.preset_options.as_ref());
        let image = options.map(|options| options.image.as_str()).filter(|image| !image.is_empty());
        Ok(match (&self.options.model, image) {
            (Some(address), _) => address.clone(),
            (None, Some(image)) => format!("oci://{image}"),
            // Written out, so that the Job says by itself what it fetches.
            _ => fetch::Model::parse(&format!("preset:{}", self.name))?.to_string(),
        })
    }
}

/// Returns the field of the Workspace that becomes a flag, for messages.
fn field(flag: &str) -> &str {
    match flag {
        "model" => "tuning.preset",
        "name" => "tuning.preset.name",
        "data" => "tuning.input",
        "push" => "tuning.output.image",
        flag => flag,
    }
}

/// Returns the adapted modules unless the configuration names others, in the words of KAITO's environment.
pub(super) fn target_modules(preset: Option<&Preset>) -> Option<String> {
    match preset?.target_modules.as_ref()? {
        Targets::Names(names) => Some(names.join(",")),
        Targets::Word(_) => None,
    }
}
