//! A path that begins with `~/` -> the path below the user's home folder. A shell writes it so, but no shell sees the
//! paths in a YAML file, nor those behind `--output=`: a folder with the name `~` would be made.

use super::keys::{self, Key, Type};
use super::value::Value;
use super::{Environment, Mistakes, Spec};
use crate::fault::{Fault, Result};
use std::path::Path;

/// Keys of texts that name a file or a folder.
const TEXTS: [&str; 6] =
    ["output_dir", "logging_dir", "token_cache", "chat_template", "chat_template_path", "dataset_path"];
/// The words before a path in the list `push`.
const BEFORE: [&str; 2] = ["oci:", "file:"];

/// Puts the home folder in the place of the `~`. The home folders of other users (`~name/`) are not looked up.
pub(super) fn expand(spec: &mut Spec, environment: Environment, mistakes: &mut Mistakes) {
    for ((section, name), given) in &mut spec.given {
        let key = keys::find(*section, name).expect("only keys of the table are set");
        if !names_places(key) {
            continue;
        }
        for text in texts(&mut given.value) {
            match place(text, environment) {
                Ok(whole) => *text = whole,
                Err(fault) => mistakes.add(&given.origin, format!("{key}: {}", fault.in_a_line())),
            }
        }
    }
}

/// Returns a place that a user gave, with the home folder in the place of the `~`.
///
/// # Errors
/// Config: there is no home folder.
pub fn place(text: &str, environment: Environment) -> Result<String> {
    let Some((before, below)) = split(text) else { return Ok(text.to_owned()) };
    let home = environment("HOME").filter(|home| Path::new(home).is_absolute());
    let home = home.ok_or_else(|| {
        Fault::config(format!("{text} is below the home folder, but HOME is not set"))
            .help("write the whole path")
    })?;
    Ok(format!("{before}{}{below}", home.trim_end_matches('/')))
}

fn names_places(key: &Key) -> bool {
    matches!(key.kind, Type::Path | Type::Sources) || key.name == "push" || TEXTS.contains(&key.name)
}

fn texts(value: &mut Value) -> Vec<&mut String> {
    match value {
        Value::Text(text) => vec![text],
        Value::List(items) => items.iter_mut().flat_map(texts).collect(),
        _ => Vec::new(),
    }
}

/// Returns the text before the `~` of a home folder, and the text behind it.
fn split(text: &str) -> Option<(&str, &str)> {
    let before = BEFORE.into_iter().find(|before| text.starts_with(before)).unwrap_or("");
    let below = text[before.len()..].strip_prefix('~')?;
    (below.is_empty() || below.starts_with('/')).then_some((before, below))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_folder_stands_before_the_first_slash() {
        for (text, parts) in [
            ("~/a b", Some(("", "/a b"))),
            ("~", Some(("", ""))),
            ("file:~/a", Some(("file:", "/a"))),
            ("oci:~/a:tag", Some(("oci:", "/a:tag"))),
            ("~name/a", None),
            ("./~/a", None),
            ("a~/b", None),
            ("https://host/~/a", None),
            ("", None),
        ] {
            assert_eq!(split(text), parts, "{text}");
        }
    }
}
