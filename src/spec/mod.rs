//! YAML files, environment and flags -> one value for each key, with its origin. Unknown, misspelt and mistyped keys
//! are refused here, all at once and before anything is downloaded.

pub mod keys;
pub mod yaml;
pub mod value;
mod file;
pub mod home;

use crate::fault::{Fault, Result};
use keys::{Effect, Key, Section, Type};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use value::Value;
use yaml::{Content, Node, Place, Style};

/// The place where a value was written. Later places override earlier ones: default, KAITO's environment, `--config`,
/// SPEC.yaml, environment, flags.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The table of keys.
    Default,
    /// A YAML file.
    File {
        /// Path of the file.
        name: String,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
    },
    /// An environment variable, by its name.
    Environment(String),
    /// A flag of the command line, as it is written there.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { name, line, .. } => write!(f, "{name}:{line}"),
            Origin::Environment(name) => write!(f, "environment {name}"),
            Origin::Flag(name) => f.write_str(name),
        }
    }
}

/// A value that was given for a key.
#[derive(Clone, Debug, PartialEq)]
pub struct Given {
    /// The value.
    pub value: Value,
    /// The place where it was written.
    pub origin: Origin,
}

/// Every key that was given, with the value in force.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Spec {
    given: BTreeMap<(Section, &'static str), Given>,
    /// Whether the configuration lies at the path where KAITO mounts it, so that KAITO's other mounts are used too.
    pub kaito: bool,
}

impl Spec {
    /// Returns the value that was given for a key, if any was.
    pub fn get(&self, section: Section, name: &str) -> Option<&Given> {
        let key = keys::find(section, name)?;
        self.given.get(&(section, key.name))
    }

    /// Returns all given keys, in the order of the sections.
    pub fn iter(&self) -> impl Iterator<Item = (&'static Key, &Given)> {
        self.given.iter().map(|((section, name), given)| {
            (keys::find(*section, name).expect("only keys of the table are set"), given)
        })
    }

    fn set(&mut self, key: &'static Key, value: Value, origin: Origin) {
        self.given.insert((key.section, key.name), Given { value, origin });
    }
}

/// The command line's request: files, and settings in rising order of precedence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// Settings of an earlier run, as its folder records them. Everything else overrides them.
    pub remembered: Vec<Setting>,
    /// SPEC.yaml.
    pub spec: Option<PathBuf>,
    /// A `training_config.yaml`, given with `--config`.
    pub config: Option<PathBuf>,
    /// Values of single keys; later ones override earlier ones.
    pub settings: Vec<Setting>,
}

/// A value for a single key, from a flag or the environment.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// `Section.key` or a key of hone.
    pub key: String,
    /// The value as it was written.
    pub written: Written,
    /// The place where it was written.
    pub origin: Origin,
}

/// A value that has no type yet.
#[derive(Clone, Debug, PartialEq)]
pub enum Written {
    /// A text, used exactly as it is.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// A value in YAML, as behind `--set Section.key=`.
    Yaml(String),
}

/// Environment variables by name; tests pass their own.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Reads the files and settings of a request. All mistakes are reported in one fault.
pub fn gather(request: &Request, environment: Environment) -> Result<Spec> {
    let mut spec = Spec::default();
    let mut mistakes = Mistakes::default();
    spec.surroundings(environment);
    for setting in &request.remembered {
        spec.apply(setting, &mut mistakes);
    }

    let mounted = environment("YAML_FILE_PATH").map(PathBuf::from);
    let config = request.config.clone().or_else(|| mounted.filter(|_| request.spec.is_none()));
    if let Some(path) = &config {
        spec.kaito = path.starts_with("/mnt") || request.config.is_none();
        file::read(path, &mut spec, &mut mistakes)?;
    }
    if let Some(path) = &request.spec {
        file::read(path, &mut spec, &mut mistakes)?;
    }
    for setting in &request.settings {
        spec.apply(setting, &mut mistakes);
    }
    // KAITO takes its paths as they are.
    if !spec.kaito {
        home::expand(&mut spec, environment, &mut mistakes);
    }
    mistakes.into_result().map(|()| spec)
}

/// Reads the configuration of a pod: the text of its mounted `training_config.yaml`, called `name` in messages, and
/// settings.
pub fn gather_mounted(
    name: &str,
    text: &str,
    settings: &[Setting],
    environment: Environment,
) -> Result<Spec> {
    let mut spec = Spec { kaito: true, ..Spec::default() };
    let mut mistakes = Mistakes::default();
    spec.surroundings(environment);
    file::read_text(name, text, &mut spec, &mut mistakes);
    for setting in settings {
        spec.apply(setting, &mut mistakes);
    }
    mistakes.into_result().map(|()| spec)
}

impl Spec {
    /// Sets the values that the environment has without a flag of hone: KAITO's variables and the user's cache folder.
    fn surroundings(&mut self, environment: Environment) {
        let mut set = |section, name: &str, variable: &str, value: Value| {
            let key = keys::find(section, name).expect("a key of the table");
            self.set(key, value, Origin::Environment(variable.into()));
        };
        if let Some(names) = environment("DEFAULT_TARGET_MODULES").filter(|names| !names.trim().is_empty()) {
            let names = names.split(',').map(|name| Value::Text(name.trim().into())).collect();
            set(Section::LoraConfig, "target_modules", "DEFAULT_TARGET_MODULES", Value::List(names));
        }
        if let Some(folder) = environment("DATASET_FOLDER_PATH").filter(|folder| !folder.is_empty()) {
            set(Section::Hone, "data", "DATASET_FOLDER_PATH", Value::List(vec![Value::Text(folder)]));
        }
        let text = |variable: &str| environment(variable).filter(|text| !text.is_empty());
        let services = [("mlflow", "MLFLOW_TRACKING_URI"), ("otlp", "OTEL_EXPORTER_OTLP_ENDPOINT")];
        for (key, variable) in services {
            // These variables may say other things: a folder of MLflow's, an address without a scheme.
            if let Some(address) = text(variable).filter(|text| text.starts_with("http")) {
                set(Section::Hone, key, variable, Value::Text(address));
            }
        }
        for (key, variable) in
            [("mlflow_experiment", "MLFLOW_EXPERIMENT_NAME"), ("mlflow_run", "MLFLOW_RUN_ID")]
        {
            if let Some(name) = text(variable) {
                set(Section::Hone, key, variable, Value::Text(name));
            }
        }
        let cache = [("XDG_CACHE_HOME", "hone"), ("HOME", ".cache/hone")];
        for (variable, below) in cache {
            if let Some(folder) = environment(variable).filter(|folder| Path::new(folder).is_absolute()) {
                let folder = Path::new(&folder).join(below);
                set(Section::Hone, "cache", variable, Value::Text(folder.to_string_lossy().into_owned()));
                break;
            }
        }
    }

    fn apply(&mut self, setting: &Setting, mistakes: &mut Mistakes) {
        let (section, name) = match setting.key.split_once('.') {
            None => (Section::Hone, setting.key.as_str()),
            Some((section_name, name)) => match Section::named(section_name) {
                Some(section) => (section, name),
                None => return mistakes.add(&setting.origin, unknown_section(section_name)),
            },
        };
        let place = Place { line: 1, column: 1 };
        let node = |content| Node { place, content };
        let quoted = |text: &String| node(Content::Scalar { text: text.clone(), style: Style::Quoted });
        let is_text = keys::find(section, name).is_some_and(|key| matches!(key.kind, Type::Text));
        let is_scalar = |node: &Option<Node>| {
            node.as_ref().is_none_or(|node| matches!(node.content, Content::Scalar { .. }))
        };
        let node = match &setting.written {
            Written::Text(text) => quoted(text),
            // A text such as a chat template begins as a map of YAML would, and is none.
            Written::Yaml(text) if is_text && !yaml::parse(text).is_ok_and(|node| is_scalar(&node)) => {
                quoted(text)
            }
            Written::Texts(texts) => node(Content::List(texts.iter().map(quoted).collect())),
            Written::Yaml(text) => match yaml::parse(text) {
                Ok(parsed) => parsed
                    .unwrap_or_else(|| node(Content::Scalar { text: String::new(), style: Style::Plain })),
                Err(refusal) => {
                    return mistakes.add(&setting.origin, format!("{}: {}", setting.key, refusal.message));
                }
            },
        };
        match keys::find(section, name) {
            None => mistakes.add(&setting.origin, unknown_key(section, name)),
            Some(key) => match accept(key, &node) {
                Ok(value) => self.set(key, value, setting.origin.clone()),
                Err(refusal) => mistakes.add(&setting.origin, refusal.message),
            },
        }
    }
}

/// Reads the node as a value of the key, or says why that is not possible.
fn accept(key: &'static Key, node: &Node) -> std::result::Result<Value, yaml::Refusal> {
    let refuse = |place, message| Err(yaml::Refusal { place, message });
    let value = match value::read(key.kind, node) {
        Ok(value) => value,
        Err(refusal) => return refuse(refusal.place, format!("{key}: {}", refusal.message)),
    };
    if let Effect::Refused(why) = key.effect
        && !says_nothing(&value)
        && Some(&value) != default(key).as_ref()
    {
        // A map or list may hold a token, so its content is not shown.
        let found = match value {
            Value::Map(_) | Value::List(_) => node.describe(),
            value => value.to_json().to_string(),
        };
        return refuse(node.place, format!("{key}: {found} is refused: {why}"));
    }
    Ok(value)
}

/// Returns whether the value of a refused key is null or empty. Templates use such values to say that the key is not
/// used.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Text(text) => text.is_empty(),
        Value::List(items) => items.is_empty(),
        Value::Map(entries) => entries.is_empty(),
        _ => false,
    }
}

/// Returns the key's default as a value; `None` if it has no default.
pub fn default(key: &Key) -> Option<Value> {
    if key.default.is_empty() {
        return None;
    }
    let content = Content::Scalar { text: key.default.into(), style: Style::Plain };
    let node = Node { place: Place { line: 1, column: 1 }, content };
    Some(match key.kind {
        Type::Any => Value::Text(key.default.into()),
        kind => value::read(kind, &node).expect("a test reads every default of the table"),
    })
}

fn unknown_key(section: Section, name: &str) -> String {
    let shown = if section == Section::Hone { String::new() } else { format!("{}.", section.name()) };
    let name_shown = yaml::quote(name);
    let name_shown = name_shown.trim_matches('"');
    match keys::suggest(section, name) {
        Some(key) if key.section == section => {
            format!("{shown}{name_shown} is not a key; did you mean {}?", key.name)
        }
        Some(key) => format!("{shown}{name_shown} is not a key; did you mean {key}?"),
        None => format!("{shown}{name_shown} is not a key"),
    }
}

fn unknown_section(name: &str) -> String {
    let names = || Section::ALL.into_iter().skip(1).map(Section::name);
    let known = names().collect::<Vec<_>>().join(", ");
    match keys::nearest(names(), name) {
        Some(nearest) => format!("{} is not a section; did you mean {nearest}?", yaml::quote(name)),
        None => format!("{} is not a section; expected one of {known}", yaml::quote(name)),
    }
}

/// Collects mistakes, to report them together.
#[derive(Debug, Default)]
pub struct Mistakes(Vec<String>);

impl Mistakes {
    /// Adds a mistake in the value that was written at `origin`.
    pub fn add(&mut self, origin: &Origin, message: impl fmt::Display) {
        const MESSAGE_CHARACTERS_MAX: usize = 600;
        let message = match origin {
            Origin::Default => message.to_string(),
            Origin::File { name, line, column } => format!("{name}:{line}:{column}: {message}"),
            origin => format!("{origin}: {message}"),
        };
        self.0.push(crate::report::clean::clean(&message, MESSAGE_CHARACTERS_MAX));
    }

    /// Fails if there are mistakes in a configuration.
    ///
    /// # Errors
    /// Config: all mistakes.
    pub fn into_result(self) -> Result<()> {
        self.into_result_of("the configuration").map_err(|fault| {
            fault.help("`hone keys` lists every key; `hone plan` shows what a configuration resolves to")
        })
    }

    /// Fails if there are mistakes in anything else (`what`), which has no keys to look up.
    ///
    /// # Errors
    /// Config: all mistakes.
    pub fn into_result_of(self, what: &str) -> Result<()> {
        const SHOWN_MAX: usize = 20;
        let count = self.0.len();
        let mut shown = self.0;
        shown.truncate(SHOWN_MAX);
        let message = match count {
            0 => return Ok(()),
            1 => shown.remove(0),
            _ => {
                let more = if count > SHOWN_MAX {
                    format!("\n  and {} more", count - SHOWN_MAX)
                } else {
                    String::new()
                };
                format!("{count} mistakes in {what}\n  {}{more}", shown.join("\n  "))
            }
        };
        Err(Fault::config(message))
    }
}

#[cfg(test)]
mod tests;
