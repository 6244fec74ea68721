//! A YAML file -> given keys: `training_config.yaml`, SPEC.yaml, or a Kubernetes ConfigMap that holds the first.

use super::keys::{self, Section};
use super::yaml::{self, Content, Entry, FILE_BYTES_MAX, Node, Place, Style};
use super::{Mistakes, Origin, Spec, accept, unknown_key, unknown_section};
use crate::fault::{Fault, Kind, Result};
use std::io::Read;
use std::path::Path;

/// Sets the file's keys and adds its mistakes. A file that cannot be read is a fault at once.
pub(super) fn read(path: &Path, spec: &mut Spec, mistakes: &mut Mistakes) -> Result<()> {
    read_text(&path.display().to_string(), &load(path)?, spec, mistakes);
    Ok(())
}

/// Like `read`, for a text that is called `name` in messages.
pub(super) fn read_text(name: &str, text: &str, spec: &mut Spec, mistakes: &mut Mistakes) {
    let mut document = Document { name: name.into(), locate: Box::new(|place| place), spec, mistakes };
    match yaml::parse(text) {
        Ok(Some(root)) if is_config_map(&root) => document.config_map(&root, text),
        Ok(Some(root)) => document.root(&root),
        Ok(None) => {}
        Err(refusal) => document.mistake(refusal.place, refusal.message),
    }
}

fn load(path: &Path) -> Result<String> {
    let name = path.display();
    let cannot = |error: std::io::Error| {
        Fault::unread(Kind::Config, format!("cannot read the configuration {name}: {error}"), &error)
            .help("give the path of a training_config.yaml or a SPEC.yaml")
    };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(cannot)?;
    file.take(FILE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() > FILE_BYTES_MAX {
        return Err(Fault::config(format!(
            "{name}: more than {FILE_BYTES_MAX} bytes; a configuration has a few kilobytes"
        ))
        .help("is this the right file?"));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count() + 1;
        Fault::config(format!("{name}:{line}: not UTF-8 text (byte {at})")).help("save the file as UTF-8")
    })
}

fn is_config_map(root: &Node) -> bool {
    let kind = root.get("kind").map(|node| &node.content);
    matches!(kind, Some(Content::Scalar { text, .. }) if text == "ConfigMap")
}

struct Document<'a> {
    name: String,
    /// Place in the text that is read -> place in the file.
    locate: Box<dyn Fn(Place) -> Place>,
    spec: &'a mut Spec,
    mistakes: &'a mut Mistakes,
}

impl Document<'_> {
    fn root(&mut self, root: &Node) {
        for entry in self.entries(root, "the file") {
            let place = entry.key_place;
            match entry.key.as_str() {
                "training_config" => self.sections(&entry.node),
                name if Section::named(name).is_some() => {
                    self.mistake(place, format!("{name} belongs under `training_config:`"));
                }
                name if keys::find(Section::Hone, name).is_none()
                    && keys::nearest(["training_config"].into_iter(), name).is_some() =>
                {
                    self.mistake(place, format!("{name} is not a key; did you mean training_config?"));
                }
                _ => self.key(Section::Hone, entry),
            }
        }
    }

    fn sections(&mut self, node: &Node) {
        for entry in self.entries(node, "training_config") {
            match Section::named(&entry.key) {
                None => self.mistake(entry.key_place, unknown_section(&entry.key)),
                Some(section) => {
                    for inner in self.entries(&entry.node, section.name()) {
                        self.key(section, inner);
                    }
                }
            }
        }
    }

    fn key(&mut self, section: Section, entry: &Entry) {
        let Some(key) = keys::find(section, &entry.key) else {
            return self.mistake(entry.key_place, unknown_key(section, &entry.key));
        };
        match accept(key, &entry.node) {
            Ok(value) => self.spec.set(key, value, self.origin(entry.key_place)),
            Err(refusal) => self.mistake(refusal.place, refusal.message),
        }
    }

    /// Returns the entries of a node, which must be a map. An empty node is an empty map.
    fn entries<'n>(&mut self, node: &'n Node, what: &str) -> &'n [Entry] {
        match &node.content {
            Content::Map(entries) => entries,
            _ if node.is_null() => &[],
            _ => {
                self.mistake(
                    node.place,
                    format!("{what}: expected a map of keys, found {}", node.describe()),
                );
                &[]
            }
        }
    }

    /// Reads `data."training_config.yaml"`, or the only entry of `data`, as a file of its own.
    fn config_map(&mut self, root: &Node, text: &str) {
        let data = root.get("data");
        let entries = match data.map(|data| &data.content) {
            Some(Content::Map(entries)) => entries.as_slice(),
            _ => &[],
        };
        let named = entries.iter().find(|entry| entry.key == "training_config.yaml");
        let held = named.or(if let [only] = entries { Some(only) } else { None });
        let Some(Entry {
            node: Node { content: Content::Scalar { text: inner, style }, place },
            key_place,
            ..
        }) = held
        else {
            let place = data.map_or(root.place, |data| data.place);
            return self.mistake(place, "a ConfigMap without data.\"training_config.yaml\"".into());
        };
        let place = *place;
        self.locate = match style {
            Style::Literal => below(key_place.line, text),
            _ => Box::new(move |_| place),
        };
        match yaml::parse(inner) {
            Ok(Some(root)) => self.root(&root),
            Ok(None) => {}
            Err(refusal) => self.mistake(refusal.place, refusal.message),
        }
    }

    fn origin(&self, place: Place) -> Origin {
        let Place { line, column } = (self.locate)(place);
        Origin::File { name: self.name.clone(), line, column }
    }

    fn mistake(&mut self, place: Place, message: String) {
        let origin = self.origin(place);
        self.mistakes.add(&origin, message);
    }
}

/// Maps places inside a literal block to places of the file. The block's key and marker are on line `marker`; the
/// block starts on the next line, and its indentation is that of its first line with text.
fn below(marker: usize, text: &str) -> Box<dyn Fn(Place) -> Place> {
    let first = text.lines().skip(marker).find(|line| !line.trim().is_empty()).unwrap_or("");
    let indent = first.len() - first.trim_start_matches(' ').len();
    Box::new(move |place| Place { line: marker + place.line, column: indent + place.column })
}
