//! KAITO's preset names -> the facts that are known of each: hub id and revision, family, artifact, targets, template,
//! context.
//!
//! `presets.json` is the catalogue with one entry a line; a new preset is a new line. Sources: KAITO at v0.12
//! (`LegacyBuiltinToCatalog`, the tuning parameters) and its `supported_models.yaml` at commit 0567d7f, which names the
//! revisions. Facts that neither source states are left out. `context`, `chat_template` and `gated` come from the
//! models' pages; they are only displayed.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use crate::fault::{Fault, Result};

/// One entry of the catalogue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preset {
    /// KAITO's name.
    pub name: String,
    /// Other names that KAITO accepts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    /// Repository on the Hugging Face hub.
    pub hub: String,
    /// Commit of that repository.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// `model_type` of the language model, if hone can train it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
    /// Name of its shape in `shapes`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shape: Option<String>,
    /// The reason why hone cannot train it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// Versions of KAITO that can tune it. KAITO only serves the other presets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tuned: Option<String>,
    /// OCI artifact of the weights that KAITO v0.12 pulls.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifact: Option<String>,
    /// The modules that KAITO adapts by default; all-linear if KAITO's own default fails.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_modules: Option<Targets>,
    /// Whether the tokenizer has a chat template. If not, conversations need ModelConfig.chat_template.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<bool>,
    /// Whether the hub requires consent and a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gated: Option<bool>,
    /// Longest context, in tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<usize>,
}

/// The `target_modules` of a preset.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Targets {
    /// The word `all-linear`.
    Word(String),
    /// Names of modules.
    Names(Vec<String>),
}

static CATALOGUE: LazyLock<Vec<Preset>> =
    LazyLock::new(|| serde_json::from_str(include_str!("presets.json")).expect("a test reads it"));

/// Returns all presets, in the catalogue's order.
pub fn all() -> &'static [Preset] {
    &CATALOGUE
}

/// Finds a preset by its name, an alias, its hub id or the hub id's last part (as KAITO does), ignoring case. An
/// unknown name is a usage fault that suggests the nearest one.
pub fn find(name: &str) -> Result<&'static Preset> {
    let wanted = name.to_lowercase();
    let found = all().iter().find(|preset| preset.names().any(|known| known == wanted));
    found.ok_or_else(|| {
        let fault = Fault::usage(format!("{name:?} is not a preset"));
        let longer = longer(&wanted);
        match nearest(&wanted) {
            _ if !longer.is_empty() => fault.help(format!("use one of {}", longer.join(", "))),
            Some(near) => fault.help(format!("did you mean {near}?")),
            None => fault.help(format!(
                "use one of {}",
                all().iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(", ")
            )),
        }
    })
}

/// Names of the presets that a shortened name may mean: `phi-3` is the beginning of several.
fn longer(wanted: &str) -> Vec<&'static str> {
    let begins = |preset: &&Preset| wanted.len() > 2 && preset.name.starts_with(wanted);
    all().iter().filter(begins).map(|preset| preset.name.as_str()).collect()
}

fn nearest(wanted: &str) -> Option<&'static str> {
    let likeness = |preset: &Preset| {
        preset.names().map(|name| strsim::normalized_damerau_levenshtein(&name, wanted)).fold(0.0, f64::max)
    };
    let near = all().iter().map(|preset| (likeness(preset), preset.name.as_str()));
    near.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(likeness, _)| *likeness > 0.6).map(|(_, name)| name)
}

impl Preset {
    /// Returns all names of the preset in lower case.
    fn names(&self) -> impl Iterator<Item = String> {
        let last = self.hub.rsplit('/').next().unwrap_or(&self.hub);
        let names = [self.name.as_str(), self.hub.as_str(), last];
        names.into_iter().chain(self.aliases.iter().map(String::as_str)).map(str::to_lowercase)
    }

    /// Returns (name, value) lines for people.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let mut rows = vec![("preset", self.name.clone())];
        if !self.aliases.is_empty() {
            rows.push(("also", self.aliases.join(", ")));
        }
        let revision = self.revision.as_ref().map(|revision| format!(" at {revision}"));
        rows.push(("hub", self.hub.clone() + &revision.unwrap_or_default()));
        rows.push(match (&self.family, &self.refused) {
            (Some(family), _) => ("family", family.clone()),
            (None, why) => ("family", format!("none: {}", why.as_deref().unwrap_or("not supported"))),
        });
        let tuned = self.tuned.as_ref().map_or("only served".into(), |versions| format!("tuned {versions}"));
        rows.push(("in KAITO", tuned));
        rows.extend(self.artifact.clone().map(|artifact| ("weights", artifact)));
        rows.extend(self.target_modules.as_ref().map(|targets| {
            let text = match targets {
                Targets::Word(word) => word.clone(),
                Targets::Names(names) => names.join(", "),
            };
            ("target_modules", text)
        }));
        rows.extend(self.chat_template.map(|own| {
            let text = if own {
                "the tokenizer's"
            } else {
                "none: give ModelConfig.chat_template for conversations"
            };
            ("chat template", text.into())
        }));
        rows.extend(
            self.gated
                .filter(|gated| *gated)
                .map(|_| ("access", "gated: the hub asks for consent and a token".into())),
        );
        rows.extend(self.context.map(|tokens| ("context", format!("{tokens} tokens"))));
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::family::FAMILIES;
    use crate::facts::shapes;
    use std::collections::BTreeSet;

    #[test]
    fn every_preset_is_trained_or_refused_with_a_reason_and_no_name_stands_twice() {
        let mut names = BTreeSet::new();
        for preset in all() {
            let own: BTreeSet<String> = preset.names().collect();
            for name in own {
                assert!(names.insert(name.clone()), "{name} is listed twice");
            }
            match (&preset.family, &preset.refused) {
                (Some(family), None) => {
                    assert!(FAMILIES.iter().any(|(name, _)| name == family), "{}: {family}", preset.name);
                    assert!(preset.target_modules.is_some(), "{}", preset.name);
                    let shape = preset.shape.as_deref().unwrap_or_else(|| panic!("{}: a shape", preset.name));
                    assert_eq!(shapes::facts(shape).unwrap().family, family, "{}", preset.name);
                }
                (None, Some(_)) => assert!(preset.tuned.is_none(), "{}", preset.name),
                _ => panic!("{}: a family or a reason", preset.name),
            }
            let revision = preset.revision.as_deref().unwrap_or("0000000000000000000000000000000000000000");
            assert!(
                revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit()),
                "{}",
                preset.name
            );
            assert!(
                preset
                    .name
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b))
            );
        }
        assert_eq!(
            all().iter().filter(|preset| preset.artifact.is_some()).count(),
            10,
            "KAITO v0.12 tunes ten"
        );
    }

    #[test]
    fn a_preset_is_found_by_any_of_its_names() {
        for name in ["phi-4", "Microsoft/phi-4", "PHI-4"] {
            assert_eq!(find(name).unwrap().name, "phi-4");
        }
        assert_eq!(find("mistral-7b-v0.3").unwrap().name, "mistral-7b");
        assert_eq!(find("microsoft/Phi-3-mini-4k-instruct").unwrap().context, Some(4096));
        let said = |name: &str| find(name).unwrap_err().to_string();
        assert_eq!(
            said("phi-3-mini-4k-instrct"),
            "\"phi-3-mini-4k-instrct\" is not a preset\n  help: did you mean phi-3-mini-4k-instruct?"
        );
        assert!(said("zephyr").contains("one of phi-4, "));
        assert!(
            said("phi-3-mini").ends_with("help: use one of phi-3-mini-4k-instruct, phi-3-mini-128k-instruct")
        );
    }
}
