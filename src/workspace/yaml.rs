//! YAML files -> Kubernetes objects, and back. Unknown fields are reported with their line, as `kubectl` does.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::fault::{Fault, Result};
use crate::spec::keys;
use crate::spec::yaml::{self, Content, Node, Style};

/// One object of a file.
#[derive(Clone, Debug)]
pub struct Document {
    /// `FILE:LINE`, for messages.
    pub place: String,
    /// The object.
    pub value: Value,
    node: Node,
    /// Lines of the file above it.
    lines_above: usize,
    file: String,
}

/// Returns the objects of a file, those of a `List` one by one.
///
/// # Errors
/// Config: not YAML, or not of objects.
pub fn read(file: &str, text: &str) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    for (lines_above, part) in parts(text) {
        let refused = |place: yaml::Place, message: &str| {
            Fault::config(format!("{file}:{}:{}: {message}", lines_above + place.line, place.column))
                .help("give YAML documents of a Workspace and its ConfigMaps; `hone tune` writes one")
        };
        let Some(node) = yaml::parse(part).map_err(|refusal| refused(refusal.place, &refusal.message))?
        else {
            continue;
        };
        if !matches!(node.content, Content::Map(_)) {
            return Err(refused(node.place, "expected an object with apiVersion and kind"));
        }
        let kind = node.get("kind").map(text_of).unwrap_or_default();
        let items = match (kind.as_str(), node.get("items").map(|items| &items.content)) {
            ("List", Some(Content::List(items))) => items.clone(),
            _ => vec![node],
        };
        documents.extend(items.into_iter().map(|node| Document {
            place: format!("{file}:{}", lines_above + node.place.line),
            value: value(&node),
            node,
            lines_above,
            file: file.into(),
        }));
    }
    Ok(documents)
}

impl Document {
    /// Returns the document's `kind`; empty if there is none.
    pub fn kind(&self) -> &str {
        self.value["kind"].as_str().unwrap_or_default()
    }

    /// Returns the document's `metadata.name`; empty if there is none.
    pub fn name(&self) -> &str {
        self.value["metadata"]["name"].as_str().unwrap_or_default()
    }

    /// Returns the object as a type of Kubernetes.
    ///
    /// # Errors
    /// Config: a field of another type, or one that the type does not have.
    pub fn typed<T: DeserializeOwned + Serialize>(&self) -> Result<T> {
        let typed: T = serde_json::from_value(self.value.clone()).map_err(|error| {
            let about = format!("{} {}: ", self.kind(), self.name());
            match self.wrong::<T>(&error.to_string()) {
                Some((place, path)) => Fault::config(format!("{place}: {about}{path}: {error}")),
                None => Fault::config(format!("{}: {about}{error}", self.place)),
            }
            .help("write it as the API has it; a number or true that stands for a text needs quotes")
        })?;
        let again = serde_json::to_value(&typed).expect("what was read can be written");
        let mut unknown = Vec::new();
        self.lost(&self.node, &again, &mut Vec::new(), &mut unknown);
        match unknown.is_empty() {
            true => Ok(typed),
            false => {
                Err(Fault::config(unknown.join("\n  ")).help("remove what is not known, or correct its name"))
            }
        }
    }

    /// Returns the place and the path of the value that causes an error: without this value there is no error, or
    /// another one.
    fn wrong<T: DeserializeOwned>(&self, error: &str) -> Option<(String, String)> {
        let causes = |path: &[String]| {
            let (name, above) = path.split_last()?;
            let mut without = self.value.clone();
            match without.pointer_mut(&pointer(above))? {
                Value::Object(fields) => drop(fields.remove(name)),
                Value::Array(items) => drop(items.remove(name.parse().ok()?)),
                _ => return None,
            }
            let other = serde_json::from_value::<T>(without).err();
            Some(other.is_none_or(|other| other.to_string() != error))
        };
        let (mut node, mut place, mut path) = (&self.node, None, Vec::new());
        while let Some((name, at, next)) = below(node).into_iter().find(|(name, _, _)| {
            path.push(name.clone());
            let found = causes(&path) == Some(true);
            path.pop();
            found
        }) {
            path.push(name);
            (node, place) = (next, Some(at));
        }
        let at = place?;
        Some((format!("{}:{}:{}", self.file, self.lines_above + at.line, at.column), path.join(".")))
    }

    /// Collects fields that were written and that the parsed object does not have. Empty fields are ignored.
    fn lost(&self, node: &Node, understood: &Value, path: &mut Vec<String>, unknown: &mut Vec<String>) {
        match (&node.content, understood) {
            (Content::Map(entries), Value::Object(fields)) => {
                for entry in entries {
                    path.push(entry.key.clone());
                    match fields.get(&entry.key) {
                        Some(field) => self.lost(&entry.node, field, path, unknown),
                        None if says_nothing(&value(&entry.node)) => {}
                        None => unknown.push(self.not_known(entry.key_place, path, fields)),
                    }
                    path.pop();
                }
            }
            (Content::List(items), Value::Array(values)) => {
                for (at, (item, value)) in items.iter().zip(values).enumerate() {
                    path.push(at.to_string());
                    self.lost(item, value, path, unknown);
                    path.pop();
                }
            }
            _ => {}
        }
    }

    fn not_known(&self, place: yaml::Place, path: &[String], siblings: &Map<String, Value>) -> String {
        let name = path.last().expect("a field has a name");
        let hint = match keys::nearest(siblings.keys().map(String::as_str), name) {
            Some(near) => format!("; did you mean {near}?"),
            None => String::new(),
        };
        let (line, column) = (self.lines_above + place.line, place.column);
        format!("{}:{line}:{column}: {} is not a field of {}{hint}", self.file, path.join("."), self.kind())
    }
}

/// Returns objects as one YAML stream.
pub fn write(objects: &[Value]) -> String {
    let mut options = serde_saphyr::SerializerOptions::default();
    options.compact_list_indent = true;
    let documents = objects.iter().map(|object| {
        serde_saphyr::to_string_with_options(object, options.clone()).expect("texts, numbers, lists and maps")
    });
    documents.collect::<Vec<_>>().join("---\n")
}

/// Returns the documents with the number of lines above each. A separator inside a block of text would be indented.
fn parts(text: &str) -> Vec<(usize, &str)> {
    let mut parts = Vec::new();
    let (mut start, mut lines_above, mut at) = (0, 0, 0);
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let bare = line.trim_end();
        if bare == "---" || bare.starts_with("--- #") || bare == "..." {
            parts.push((lines_above, &text[start..at]));
            (start, lines_above) = (at + line.len(), number + 1);
        }
        at += line.len();
    }
    parts.push((lines_above, &text[start..]));
    parts
}

/// Returns the names of a map's entries or the numbers of a list's items, with their places.
fn below(node: &Node) -> Vec<(String, yaml::Place, &Node)> {
    match &node.content {
        Content::Map(entries) => entries.iter().map(|e| (e.key.clone(), e.key_place, &e.node)).collect(),
        Content::List(items) => {
            items.iter().enumerate().map(|(at, item)| (at.to_string(), item.place, item)).collect()
        }
        Content::Scalar { .. } => Vec::new(),
    }
}

/// Returns a path as a JSON pointer.
fn pointer(path: &[String]) -> String {
    path.iter().map(|name| format!("/{}", name.replace('~', "~0").replace('/', "~1"))).collect()
}

fn text_of(node: &Node) -> String {
    match &node.content {
        Content::Scalar { text, .. } => text.clone(),
        _ => String::new(),
    }
}

/// Reads by YAML's core schema: a value without quotes may be a number, a boolean or null.
fn value(node: &Node) -> Value {
    match &node.content {
        Content::Map(entries) => {
            entries.iter().map(|entry| (entry.key.clone(), value(&entry.node))).collect()
        }
        Content::List(items) => items.iter().map(value).collect(),
        Content::Scalar { text, style: Style::Plain } => plain(text),
        Content::Scalar { text, .. } => Value::String(text.clone()),
    }
}

fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        _ => {}
    }
    let number = text.trim_start_matches(['-', '+']).starts_with(|c: char| c.is_ascii_digit() || c == '.');
    let integer = text.parse::<i64>().ok().map(Value::from);
    let float = || text.parse::<f64>().ok().filter(|float| float.is_finite()).map(Value::from);
    match number {
        true => integer.or_else(float).unwrap_or_else(|| Value::String(text.into())),
        false => Value::String(text.into()),
    }
}

fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(says_nothing),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::kind::Workspace;
    use super::*;
    use expect_test::expect;

    #[test]
    fn documents_lists_and_their_places() {
        let text = "# two\n---\nkind: A\n---\nkind: List\nitems:\n- kind: B\n  metadata: {name: b}\n- kind: C\n---\n# nothing\n";
        let found: Vec<(String, String)> =
            read("f.yaml", text).unwrap().iter().map(|d| (d.place.clone(), d.kind().to_owned())).collect();
        let expected = [("f.yaml:3", "A"), ("f.yaml:7", "B"), ("f.yaml:9", "C")];
        assert_eq!(found, expected.map(|(place, kind)| (place.to_owned(), kind.to_owned())));
        assert!(read("f.yaml", "- a").unwrap_err().message.starts_with("f.yaml:1:1: expected an object"));
        assert!(read("f.yaml", "a: 1\n---\na: [").unwrap_err().message.starts_with("f.yaml:3"));
    }

    #[test]
    fn unknown_fields_are_told_with_their_place() {
        let text = "apiVersion: kaito.sh/v1beta1\nkind: Workspace\nmetadata:\n  name: a\n  labels: {}\nresource:\n  instanceTyp: x\ntuning:\n  method: lora\n  input:\n    urls: [https://h/a]\n    sha: x\ninference: {template: {any: thing}}\nspec: {}\n";
        let documents = read("w.yaml", text).unwrap();
        let fault = documents[0].typed::<Workspace>().unwrap_err();
        expect![[r#"
            w.yaml:7:3: resource.instanceTyp is not a field of Workspace
              w.yaml:12:5: tuning.input.sha is not a field of Workspace
              help: remove what is not known, or correct its name"#]]
        .assert_eq(&fault.to_string());
        let wrong = read("w.yaml", "kind: Workspace\ntuning: {method: 3}").unwrap();
        expect!["w.yaml:2:10: Workspace : tuning.method: invalid type: integer `3`, expected a string"]
            .assert_eq(&wrong[0].typed::<Workspace>().unwrap_err().message);
        let text = "kind: Workspace\nmetadata: {name: w}\ninference:\n  adapters:\n  - source: {name: a}\n    strength: \"0.5\"\n  - strength: 0.5\n";
        let wrong = read("w.yaml", text).unwrap();
        expect!["w.yaml:7:5: Workspace w: inference.adapters.1.strength: invalid type: floating point `0.5`, expected a string"]
            .assert_eq(&wrong[0].typed::<Workspace>().unwrap_err().message);
    }

    #[test]
    fn what_is_written_reads_back() {
        let object = serde_json::json!({
            "kind": "ConfigMap", "data": {"a.yaml": "b: 1\n# c\n  d: \"e\"\n", "yes": "true", "n": "1", "e": "", "s": " x", "tilde": "~"},
            "list": [{"name": "a", "values": ["x"]}, 2, true, null], "empty": {}, "none": [],
        });
        let text = write(&[object.clone(), object.clone()]);
        let again = read("f", &text).unwrap();
        assert_eq!(again.len(), 2, "{text}");
        assert_eq!(again[0].value, object, "{text}");
        assert!(text.contains("a.yaml: |\n"), "{text}");
    }
}
