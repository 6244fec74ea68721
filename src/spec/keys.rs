//! The keys of a specification: name, type, default and effect. They are in one table, which the reader, the plan and
//! docs/keys.md use.

mod table;

use std::fmt;

use crate::fault::{Fault, Result};

/// A section of `training_config.yaml`, or hone's own keys beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Section {
    /// hone's own keys, which have no section.
    Hone,
    /// Settings of loading the base model.
    ModelConfig,
    /// Settings of quantising the base model.
    QuantizationConfig,
    /// The group of keys about the adapted layers, and the form of the adapter.
    LoraConfig,
    /// Settings of training.
    TrainingArguments,
    /// Settings of turning examples into batches.
    DataCollator,
    /// Settings of reading the dataset.
    DatasetConfig,
}

impl Section {
    /// All sections, in the order of docs/keys.md.
    pub const ALL: [Section; 7] = [
        Section::Hone,
        Section::ModelConfig,
        Section::QuantizationConfig,
        Section::LoraConfig,
        Section::TrainingArguments,
        Section::DataCollator,
        Section::DatasetConfig,
    ];

    /// Returns the section's name in YAML; empty for hone's own keys.
    pub fn name(self) -> &'static str {
        match self {
            Section::Hone => "",
            Section::ModelConfig => "ModelConfig",
            Section::QuantizationConfig => "QuantizationConfig",
            Section::LoraConfig => "LoraConfig",
            Section::TrainingArguments => "TrainingArguments",
            Section::DataCollator => "DataCollator",
            Section::DatasetConfig => "DatasetConfig",
        }
    }

    /// Returns the section with this name in YAML.
    pub fn named(name: &str) -> Option<Section> {
        Section::ALL.into_iter().skip(1).find(|section| section.name() == name)
    }
}

/// The type of a value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Type {
    /// true or false.
    Boolean,
    /// A whole number.
    Integer {
        /// The least value.
        min: i64,
    },
    /// A finite number.
    Number {
        /// The least value.
        min: f64,
        /// The greatest value.
        max: f64,
    },
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Any text.
    Text,
    /// A path or an address.
    Path,
    /// A text or a list of texts.
    Texts,
    /// Addresses of data: texts, or maps of `url` or `path` and settings such as `sha256`.
    Sources,
    /// An integer from 0 or a list of such integers.
    Integers,
    /// A map from texts to numbers.
    Map,
    /// Any YAML; the plan reads what it needs.
    Any,
}

/// The use that hone makes of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// hone uses it.
    Used,
    /// The key is valid elsewhere. It is accepted and has no effect here, for this reason.
    None(&'static str),
    /// A value other than the default ends the run. The text has the reason and the remedy.
    Refused(&'static str),
}

/// A key of the table.
#[derive(Debug, PartialEq)]
pub struct Key {
    /// Section of the key.
    pub section: Section,
    /// Name of the key in its section.
    pub name: &'static str,
    /// Type of its value.
    pub kind: Type,
    /// The default as it would be written; empty if there is none.
    pub default: &'static str,
    /// The use that hone makes of the key.
    pub effect: Effect,
    /// The effect of the key. For a key without effect, this is the reason.
    pub about: &'static str,
}

impl Key {
    const fn used(
        section: Section,
        name: &'static str,
        kind: Type,
        default: &'static str,
        about: &'static str,
    ) -> Key {
        Key { section, name, kind, default, effect: Effect::Used, about }
    }

    const fn idle(
        section: Section,
        name: &'static str,
        kind: Type,
        default: &'static str,
        why: &'static str,
    ) -> Key {
        Key { section, name, kind, default, effect: Effect::None(why), about: why }
    }

    const fn refused(
        section: Section,
        name: &'static str,
        kind: Type,
        default: &'static str,
        why: &'static str,
    ) -> Key {
        Key { section, name, kind, default, effect: Effect::Refused(why), about: why }
    }
}

const fn integer(min: i64) -> Type {
    Type::Integer { min }
}

const fn number(min: f64, max: f64) -> Type {
    Type::Number { min, max }
}

const fn choice(words: &'static [&'static str]) -> Type {
    Type::Choice(words)
}

/// Shows `Section.key`, or `key` for hone's own keys.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.section {
            Section::Hone => f.write_str(self.name),
            section => write!(f, "{}.{}", section.name(), self.name),
        }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Type::Boolean => f.write_str("true or false"),
            Type::Integer { min: i64::MIN } => f.write_str("a whole number"),
            Type::Integer { min } => write!(f, "a whole number from {min}"),
            Type::Number { min, max: f64::MAX } => write!(f, "a number from {min}"),
            Type::Number { min, max } => write!(f, "a number from {min} to {max}"),
            Type::Choice(words) => match words {
                [only] => f.write_str(only),
                _ => write!(f, "one of {}", words.join(", ")),
            },
            Type::Text => f.write_str("text"),
            Type::Path => f.write_str("a path"),
            Type::Texts => f.write_str("text or a list of texts"),
            Type::Sources => f.write_str("a URL or path, or a list of them"),
            Type::Integers => f.write_str("a whole number from 0, or a list of them"),
            Type::Map => f.write_str("a map of names to numbers"),
            Type::Any => f.write_str("anything"),
        }
    }
}

/// Returns all keys, in the table's order.
pub fn all() -> &'static [Key] {
    table::TABLE
}

/// Returns the key with this name.
pub fn find(section: Section, name: &str) -> Option<&'static Key> {
    table::TABLE.iter().find(|key| key.section == section && key.name == name)
}

/// Returns the key that a user may have meant by `name` in `section`: the new name of an older one, the nearest
/// spelling, or the same name in another section.
pub fn suggest(section: Section, name: &str) -> Option<&'static Key> {
    let renamed = |place: Section, name: &str| {
        let (_, _, new) = table::RENAMED.iter().find(|(at, old, _)| *at == place && *old == name)?;
        find(place, new)
    };
    let respelt = || {
        let names = table::TABLE.iter().filter(|key| key.section == section).map(|key| key.name);
        let older = table::RENAMED.iter().filter(|(at, ..)| *at == section).map(|(_, old, _)| *old);
        let nearest = nearest(names.chain(older), name)?;
        find(section, nearest).or_else(|| renamed(section, nearest))
    };
    let elsewhere =
        || Section::ALL.into_iter().find_map(|other| find(other, name).or_else(|| renamed(other, name)));
    renamed(section, name).or_else(respelt).or_else(elsewhere)
}

/// Returns the name nearest to `name`, if it is near enough to be a typing error.
pub fn nearest<'a>(names: impl Iterator<Item = &'a str>, name: &str) -> Option<&'a str> {
    const SIMILARITY_MIN: f64 = 0.72;
    let name = name.to_lowercase();
    names
        .map(|candidate| {
            (candidate, strsim::normalized_damerau_levenshtein(&candidate.to_lowercase(), &name))
        })
        .filter(|(_, similarity)| *similarity >= SIMILARITY_MIN)
        .max_by(|(_, left), (_, right)| left.total_cmp(right))
        .map(|(candidate, _)| candidate)
}

/// Returns the whole table as Markdown, for docs/keys.md. For each section it lists the used keys, then the keys
/// without effect and the refused ones, both grouped by reason.
pub fn markdown() -> String {
    let mut text = String::new();
    for section in Section::ALL {
        let title = if section == Section::Hone { "Keys of hone" } else { section.name() };
        text += &format!("## {title}\n\n");
        let keys = || table::TABLE.iter().filter(move |key| key.section == section);
        let used: String = keys().filter(|key| key.effect == Effect::Used).map(Key::row).collect();
        if !used.is_empty() {
            text += &format!("| key | value | default | what it does |\n|---|---|---|---|\n{used}\n");
        }
        let idle = by_reason(keys().filter_map(|key| match key.effect {
            Effect::None(why) => Some((key, why)),
            _ => None,
        }));
        if !idle.is_empty() {
            text += &format!("Accepted without effect, and reported:\n\n| keys | why |\n|---|---|\n{idle}\n");
        }
        let refused = by_reason(keys().filter_map(|key| match key.effect {
            Effect::Refused(why) => Some((key, why)),
            _ => None,
        }));
        if !refused.is_empty() {
            text += &format!(
                "Refused with another value than the default:\n\n| keys | why |\n|---|---|\n{refused}\n"
            );
        }
    }
    text
}

/// Returns one row for each reason, in the order of the first key that has it.
fn by_reason(keys: impl Iterator<Item = (&'static Key, &'static str)>) -> String {
    let mut rows: Vec<(&str, Vec<String>)> = Vec::new();
    for (key, why) in keys {
        let name = match key.default {
            "" => format!("`{}`", key.name),
            default => format!("`{}` ({default})", key.name),
        };
        match rows.iter_mut().find(|(reason, _)| *reason == why) {
            Some((_, names)) => names.push(name),
            None => rows.push((why, vec![name])),
        }
    }
    rows.iter().map(|(why, names)| format!("| {} | {why} |\n", names.join(", ")).replace("||", "|")).collect()
}

impl Key {
    /// Returns the key as a row of a Markdown table.
    fn row(&self) -> String {
        let default = if self.default.is_empty() { String::new() } else { format!("`{}`", self.default) };
        format!("| `{}` | {} | {default} | {} |\n", self.name, self.kind, self.about.replace('|', "\\|"))
    }

    /// Returns the type, default and effect in a few lines, for a terminal.
    fn paragraph(&self) -> String {
        let default =
            if self.default.is_empty() { String::new() } else { format!(", default {}", self.default) };
        let about = match self.effect {
            Effect::Used => self.about.to_string(),
            Effect::None(why) => format!("No effect here: {why}."),
            Effect::Refused(why) => format!("Any other value is refused: {why}."),
        };
        format!("{self} ({}{default})\n    {about}\n", self.kind)
    }
}

/// Returns the reference of the keys whose name or description contains `word` (all if `word` is empty). Used keys come
/// first.
///
/// # Errors
/// Usage: no key contains it; the help names the nearest key.
pub fn reference(word: &str) -> Result<String> {
    let found = search(word);
    if !found.is_empty() {
        return Ok(found);
    }
    let nearest = nearest(all().iter().map(|key| key.name), word);
    let fault = Fault::usage(format!("no key's name or description contains {word:?}"));
    Err(fault.help(nearest.map_or("`hone keys` prints all".into(), |name| format!("did you mean {name}?"))))
}

fn search(word: &str) -> String {
    let word = word.to_lowercase();
    let found = |key: &&Key| {
        let text = format!("{key} {}", key.paragraph()).to_lowercase();
        text.contains(&word)
    };
    let (used, other): (Vec<&Key>, Vec<&Key>) =
        table::TABLE.iter().filter(found).partition(|key| key.effect == Effect::Used);
    used.into_iter().chain(other).map(Key::paragraph).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    #[test]
    fn every_key_is_documented_once_and_its_default_has_its_type() {
        let mut seen = std::collections::HashSet::new();
        for key in all() {
            assert!(seen.insert((key.section, key.name)), "{key} twice");
            assert!(!key.about.is_empty() && !key.about.contains('\n'), "{key}");
            if !key.default.is_empty() {
                let node = crate::spec::yaml::parse(key.default).unwrap().unwrap();
                crate::spec::value::read(key.kind, &node)
                    .unwrap_or_else(|refusal| panic!("{key}: {refusal:?}"));
            }
            assert!(markdown().contains(&format!("`{}`", key.name)));
            assert!(search(key.name).contains(&key.to_string()));
        }
    }

    #[test]
    fn renamed_keys_lead_to_keys_and_are_none_themselves() {
        for (section, old, new) in table::RENAMED {
            assert!(find(*section, new).is_some(), "{old} -> {new}");
            assert!(find(*section, old).is_none(), "{old}");
        }
    }

    fn check(section: Section, name: &str, expected: Expect) {
        expected.assert_eq(&suggest(section, name).map(Key::to_string).unwrap_or_default());
    }

    #[test]
    fn suggestions() {
        check(Section::TrainingArguments, "learning_rat", expect!["TrainingArguments.learning_rate"]);
        check(Section::TrainingArguments, "Learning_Rate", expect!["TrainingArguments.learning_rate"]);
        check(Section::TrainingArguments, "evaluation_strategy", expect!["TrainingArguments.eval_strategy"]);
        check(
            Section::TrainingArguments,
            "group_by_length",
            expect!["TrainingArguments.train_sampling_strategy"],
        );
        check(Section::TrainingArguments, "max_seq_length", expect!["TrainingArguments.max_length"]);
        check(Section::LoraConfig, "rnak", expect!["LoraConfig.r"]);
        check(Section::LoraConfig, "rank", expect!["LoraConfig.r"]);
        check(Section::LoraConfig, "learning_rate", expect!["TrainingArguments.learning_rate"]);
        check(Section::TrainingArguments, "lora_alpha", expect!["LoraConfig.lora_alpha"]);
        check(Section::TrainingArguments, "zebra", expect![""]);
    }
}
