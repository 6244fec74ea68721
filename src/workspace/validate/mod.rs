//! A Workspace -> all its mistakes at once: by the rules of KAITO's webhook, and mistakes that would crash or hang
//! later.
//!
//! Source: KAITO v0.12, `api/v1beta1/workspace_validation.go`. If hone is stricter, a comment says why.

mod addresses;
mod resource;

use super::adapters;
use super::annotations::object_name;
use super::kind::{Destination, Inference, Preset, Source, Tuning, Workspace};
use super::pod;
use super::several;
use super::templates::Method;
use crate::facts::presets;
use crate::fault::Result;
use crate::server;
use crate::spec::{Mistakes, Origin};

/// Checks a new Workspace. `own_model`: its weights are named by hand, so the catalogue need not know the preset.
///
/// # Errors
/// Config: all mistakes, each with its field.
pub fn create(workspace: &Workspace, own_model: bool) -> Result<()> {
    let mut rules = Rules::default();
    rules.workspace(workspace, own_model);
    rules.0.into_result_of("the Workspace")
}

/// Checks a change of a Workspace. Unlike KAITO's webhook, it checks a new input or output as on creation.
///
/// # Errors
/// Config: fields that cannot change, and all faults of `create`.
pub fn update(old: &Workspace, new: &Workspace, own_model: bool) -> Result<()> {
    let mut rules = Rules::default();
    rules.unchanged(old, new);
    rules.workspace(new, own_model);
    rules.0.into_result_of("the Workspace")
}

#[derive(Default)]
struct Rules(Mistakes);

impl Rules {
    fn wrong(&mut self, field: &str, why: impl std::fmt::Display) {
        self.0.add(&Origin::Default, format!("{field}: {why}"));
    }

    fn workspace(&mut self, workspace: &Workspace, own_model: bool) {
        let name = workspace.name();
        if name.len() > 63 || name.contains('.') || object_name(name).is_none() {
            self.wrong(
                "metadata.name",
                format!(
                    "expected up to 63 of a-z, 0-9 and -, with a letter or digit at both ends, found {name:?}"
                ),
            );
        }
        match (&workspace.inference, &workspace.tuning) {
            (None, None) => self.wrong("tuning", "either inference or tuning must be specified, not neither"),
            (Some(_), Some(_)) => {
                self.wrong("tuning", "either inference or tuning must be specified, but not both")
            }
            (None, Some(tuning)) => {
                self.resource(&workspace.resource);
                if several::is_set(workspace) {
                    self.name_of_a_service(name, "trains on several nodes");
                }
                self.tuning(tuning, own_model);
            }
            (Some(inference), None) => {
                self.name_of_a_service(name, "serves");
                self.resource_that_serves(&workspace.resource);
                self.inference(inference, own_model);
            }
        }
    }

    /// Checks a Workspace that serves. KAITO checks strengths only if they change, and its servers ignore a wrong one
    /// or end.
    fn inference(&mut self, inference: &Inference, own_model: bool) {
        match &inference.preset {
            None if inference.template.is_some() => {
                self.wrong(
                    "inference.template",
                    "hone does not serve pod templates, KAITO does; name a preset",
                );
            }
            None => self.wrong("inference.preset", "missing; `hone model --preset NAME` knows the names"),
            Some(preset) => self.preset("inference.preset", preset, own_model),
        }
        if !inference.config.is_empty() {
            self.object("inference.config", "a ConfigMap", &inference.config);
        }
        let mut names = std::collections::BTreeSet::new();
        for (place, adapter) in inference.adapters.iter().enumerate() {
            let field = format!("inference.adapters[{place}]");
            let source = adapter.source.clone().unwrap_or_default();
            let given = [!source.image.is_empty(), source.volume_source.is_some()];
            if given.iter().filter(|given| **given).count() != 1 {
                self.wrong(&format!("{field}.source"), "exactly one of image and volumeSource must be given");
            }
            if !source.urls.is_empty() {
                self.wrong(&format!("{field}.source.urls"), "an adapter comes from an image or a volume");
            }
            // It is an id for clients too, and those are shorter than KAITO's names.
            let fits = object_name(&source.name).is_some() && server::is_name(&source.name);
            if !source.name.is_empty() && !fits {
                self.wrong(
                    &format!("{field}.source.name"),
                    format!("expected up to 128 of a-z, 0-9, - and ., found {:?}", source.name),
                );
            }
            // An adapter without a name has one by its place.
            let name = adapters::name_of(adapter, place);
            if !names.insert(name.clone()) {
                self.wrong(&format!("{field}.source.name"), format!("{name} stands there twice"));
            }
            match source.image.strip_prefix(adapters::TUNED) {
                Some(name) => self.object(&format!("{field}.source.image"), "a Workspace", name),
                None if !source.image.is_empty() => {
                    self.image(&format!("{field}.source.image"), &source.image, false)
                }
                None => {}
            }
            for secret in &source.image_pull_secrets {
                self.object(&format!("{field}.source.imagePullSecrets"), "a Secret", secret);
            }
            self.volume(&format!("{field}.source.volumeSource"), &source.volume_source);
            let strength = adapter.strength.as_deref().map(|text| (text, text.trim().parse::<f64>()));
            if let Some((text, _)) = strength
                .filter(|(_, number)| !number.as_ref().is_ok_and(|number| (0.0..=1.0).contains(number)))
            {
                self.wrong(
                    &format!("{field}.strength"),
                    format!("expected a number from 0 to 1, found {text:?}"),
                );
            }
        }
    }

    fn tuning(&mut self, tuning: &Tuning, own_model: bool) {
        if Method::named(&tuning.method).is_none() {
            self.wrong("tuning.method", format!("expected lora or qlora, found {:?}", tuning.method));
        }
        match &tuning.preset {
            None => self.wrong("tuning.preset", "missing; `hone model --preset NAME` knows the names"),
            Some(preset) => self.preset("tuning.preset", preset, own_model),
        }
        if !tuning.config.is_empty() {
            self.object("tuning.config", "a ConfigMap", &tuning.config);
        }
        match &tuning.input {
            None => self.wrong("tuning.input", "missing; give urls, image or volumeSource"),
            Some(input) => self.input(input),
        }
        match &tuning.output {
            None => self.wrong("tuning.output", "missing; give image and imagePushSecret, or volumeSource"),
            Some(output) => self.output(output),
        }
    }

    /// Checks the preset's name. KAITO accepts any `a/b` as a preset and fails when it looks it up.
    fn preset(&mut self, field: &str, preset: &Preset, own_model: bool) {
        let name_field = &format!("{field}.name");
        match presets::find(&preset.name) {
            _ if preset.name.is_empty() => self.wrong(name_field, "missing"),
            Ok(known) => {
                if let Some(why) = &known.refused {
                    self.wrong(name_field, format!("{} is not trained: {why}", known.name));
                }
            }
            Err(_) if own_model => {}
            Err(fault) => self.wrong(name_field, fault.in_a_line()),
        }
        if let Some(options) = &preset.preset_options {
            if !options.image.is_empty() {
                self.image(&format!("{field}.presetOptions.image"), &options.image, false);
            }
            for secret in &options.image_pull_secrets {
                self.object(&format!("{field}.presetOptions.imagePullSecrets"), "a Secret", secret);
            }
            if !options.model_access_secret.is_empty() {
                self.object(
                    &format!("{field}.presetOptions.modelAccessSecret"),
                    "a Secret",
                    &options.model_access_secret,
                );
            }
        }
    }

    fn input(&mut self, input: &Source) {
        let given = [!input.urls.is_empty(), !input.image.is_empty(), input.volume_source.is_some()];
        if given.iter().filter(|given| **given).count() != 1 {
            self.wrong("tuning.input", "exactly one of urls, image and volumeSource must be given");
        }
        for url in &input.urls {
            self.data_address("tuning.input.urls", url);
        }
        if !input.image.is_empty() {
            self.image("tuning.input.image", &input.image, false);
        }
        for secret in &input.image_pull_secrets {
            self.object("tuning.input.imagePullSecrets", "a Secret", secret);
        }
        self.volume("tuning.input.volumeSource", &input.volume_source);
    }

    fn output(&mut self, output: &Destination) {
        if output.image.is_empty() == output.volume_source.is_none() {
            self.wrong("tuning.output", "exactly one of image and volumeSource must be given");
        }
        if !output.image.is_empty() {
            self.image("tuning.output.image", &output.image, true);
            match output.image_push_secret.as_str() {
                "" => self.wrong(
                    "tuning.output.imagePushSecret",
                    "missing; an image needs the Secret to push it with",
                ),
                secret => self.object("tuning.output.imagePushSecret", "a Secret", secret),
            }
        }
        self.volume("tuning.output.volumeSource", &output.volume_source);
    }

    fn volume(&mut self, field: &str, source: &Option<serde_json::Value>) {
        if let Some(Err(fault)) = source.as_ref().map(|source| pod::from_source("volume", source, field)) {
            self.0.add(&Origin::Default, fault.in_a_line());
        }
    }

    fn unchanged(&mut self, old: &Workspace, new: &Workspace) {
        if old.tuning.is_some() != new.tuning.is_some() {
            return self.wrong("tuning", "it cannot be added or removed; make another Workspace");
        }
        let mut fixed = |field: &str, same: bool| {
            if !same {
                self.wrong(field, "cannot be changed; make another Workspace");
            }
        };
        let (before, after) = (&old.resource, &new.resource);
        // Servers may become more or fewer.
        fixed(
            "resource.count",
            new.inference.is_some() || before.count.unwrap_or(1) == after.count.unwrap_or(1),
        );
        fixed("resource.instanceType", before.instance_type == after.instance_type);
        fixed("resource.labelSelector", before.label_selector == after.label_selector);
        fixed("resource.partition", before.partition == after.partition);
        if let (Some(before), Some(after)) = (&old.inference, &new.inference) {
            fixed("inference.preset", before.preset == after.preset);
        }
        let (Some(before), Some(after)) = (&old.tuning, &new.tuning) else { return };
        fixed("tuning.preset", before.preset == after.preset);
        fixed("tuning.method", before.method == after.method);
        let name =
            |tuning: &Tuning| tuning.input.as_ref().map(|input| input.name.clone()).unwrap_or_default();
        fixed("tuning.input.name", name(before) == name(after));
    }
}

#[cfg(test)]
mod tests;
