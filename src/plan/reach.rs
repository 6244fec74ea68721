//! Environment variables -> how commands without keys reach models: the same variables as those of `hone run`.

use super::places;
use super::reader::Reader;
use crate::fault::Result;
use crate::spec::{self, Environment, Origin, Request, Setting, Written};
use crate::{registry, source};

/// The keys that decide how a model is reached. Each has the variable `HONE_` and its name.
const KEYS: [&str; 4] = ["cache", "ca_file", "docker_config", "plain_http"];

/// Returns the way to models, by the variables of these few keys.
///
/// # Errors
/// Config: a value that cannot be used.
pub fn reach(environment: Environment) -> Result<(source::Options, registry::Options)> {
    let variable = |name: &str| environment(name).filter(|value| !value.is_empty());
    let setting = |key: &str| {
        let name = format!("HONE_{}", key.to_uppercase());
        let written = variable(&name)?;
        let written = if key == "plain_http" { Written::Yaml(written) } else { Written::Text(written) };
        Some(Setting { key: key.into(), written, origin: Origin::Environment(name) })
    };
    let request = Request { settings: KEYS.into_iter().filter_map(setting).collect(), ..Request::default() };
    let surroundings = |name: &str| variable(name).filter(|_| matches!(name, "HOME" | "XDG_CACHE_HOME"));
    let spec = spec::gather(&request, &surroundings)?;
    let mut reader = Reader::new(&spec);
    let ca_file = places::existing_file(&mut reader, "ca_file");
    let options = (
        places::source_options(&mut reader, ca_file.clone()),
        places::registry_options(&mut reader, ca_file),
    );
    reader.check().map(|()| options)
}
