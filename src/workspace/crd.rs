//! The CustomResourceDefinition of Workspace, from the types of `kind.rs`, for clusters without KAITO.
//!
//! Names, columns and schema are KAITO's for the fields that hone reads. Fields that it does not read
//! (`inference.template`, volume sources) are kept as they are. If KAITO is installed, its own definition stays.

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::kind::{GROUP, KIND, PLURAL, VERSIONS, Workspace};

/// Properties that v1alpha1 does not have, by path.
const LATER: [&[&str]; 6] = [
    &["resource", "partition"],
    &["tuning", "preset", "presetOptions", "modelAccessSecret"],
    &["inference", "preset", "presetOptions", "modelAccessSecret"],
    &["status", "state"],
    &["status", "targetNodeCount"],
    &["status", "performance"],
];
/// KAITO's default of v1alpha1.
pub const INSTANCE_DEFAULT: &str = "Standard_NC24ads_A100_v4";

/// Returns the CustomResourceDefinition to apply.
pub fn definition() -> Value {
    let stored = VERSIONS[VERSIONS.len() - 1];
    let version = |name: &str| {
        json!({
            "name": name, "served": true, "storage": name == stored, "subresources": {"status": {}},
            "additionalPrinterColumns": columns(name == stored),
            "schema": {"openAPIV3Schema": schema(name == stored)},
        })
    };
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{PLURAL}.{GROUP}")},
        "spec": {
            "group": GROUP, "scope": "Namespaced",
            "names": {
                "kind": KIND, "listKind": format!("{KIND}List"), "plural": PLURAL, "singular": "workspace",
                "shortNames": ["wk", "wks"], "categories": ["workspace"],
            },
            "versions": VERSIONS.map(version),
        },
    })
}

/// Returns KAITO's print columns.
fn columns(newest: bool) -> Value {
    let condition = |name: &str, type_: &str| {
        let path = format!(".status.conditions[?(@.type==\"{type_}\")].status");
        json!({"name": name, "type": "string", "jsonPath": path})
    };
    let mut columns = vec![
        json!({"name": "Instance", "type": "string", "jsonPath": ".resource.instanceType"}),
        condition("ResourceReady", "ResourceReady"),
        condition("InferenceReady", "InferenceReady"),
        condition("JobStarted", "JobStarted"),
        condition("WorkspaceSucceeded", "WorkspaceSucceeded"),
    ];
    if newest {
        columns.push(
            json!({"name": "TargetNodeCount", "type": "integer", "jsonPath": ".status.targetNodeCount"}),
        );
        columns.push(json!({"name": "State", "type": "string", "jsonPath": ".status.state"}));
    }
    columns.push(json!({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}));
    columns.into()
}

fn schema(newest: bool) -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.inline_subschemas = true;
    settings.meta_schema = None;
    let mut schema = Value::from(settings.into_generator().into_root_schema_for::<Workspace>());
    structural(&mut schema);
    // Kubernetes describes these itself, and refuses a description of metadata.
    for field in ["apiVersion", "kind", "metadata"] {
        schema["properties"][field].as_object_mut().expect("a field of every object").remove("description");
    }
    // The types have them as optional, so that `validate` reports missing fields together with all other mistakes.
    for (path, required) in [
        ("/resource", json!(["labelSelector"])),
        ("/tuning", json!(["input", "output"])),
        ("/tuning/properties/preset", json!(["name"])),
        ("/inference/properties/preset", json!(["name"])),
    ] {
        let object = schema.pointer_mut(&format!("/properties{path}")).expect("an object of the types");
        object["required"] = required;
    }
    if !newest {
        for path in LATER {
            let (last, parents) = path.split_last().expect("a path has an end");
            let parent = parents.iter().fold(&mut schema, |at, part| &mut at["properties"][*part]);
            parent["properties"]
                .as_object_mut()
                .expect("an object")
                .remove(*last)
                .expect("a field of the newest");
        }
        schema["properties"]["resource"]["properties"]["instanceType"]["default"] = INSTANCE_DEFAULT.into();
    }
    schema
}

/// Changes a JSON Schema of schemars into one that a CRD may hold: one type each, no null, no default of ours.
fn structural(schema: &mut Value) {
    let Value::Object(fields) = schema else { return };
    fields.remove("title");
    if let Some(Value::Array(types)) = fields.get("type") {
        let only = types.iter().find(|kind| *kind != "null").cloned().expect("a type besides null");
        fields.insert("type".into(), only);
    }
    if let Some(choices) = fields.remove("anyOf") {
        let choices = choices.as_array().cloned().unwrap_or_default();
        let only =
            choices.into_iter().find(|choice| choice["type"] != "null").expect("a choice besides null");
        let described: Map<String, Value> = std::mem::take(fields);
        fields.extend(only.as_object().cloned().expect("a schema"));
        fields.extend(described);
    }
    // Empty lists and texts are serde's way to leave fields out.
    if fields.get("default").is_some_and(|default| *default != json!(1) && *default != json!("public")) {
        fields.remove("default");
    }
    let properties = fields.get_mut("properties").and_then(Value::as_object_mut);
    properties.into_iter().flatten().for_each(|(_, child)| structural(child));
    for child in ["items", "additionalProperties"] {
        if let Some(child) = fields.get_mut(child) {
            structural(child);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Collects the errors that an API server would report about an object: types, required fields, and fields that it
    /// would drop.
    fn check(schema: &Value, value: &Value, path: &str, found: &mut Vec<String>) {
        if let Some(choices) = schema["enum"].as_array()
            && !choices.contains(value)
        {
            found.push(format!("{path}: not one of {choices:?}"));
        }
        match (schema["type"].as_str().unwrap(), value) {
            ("object", Value::Object(fields)) => {
                for name in schema["required"].as_array().into_iter().flatten() {
                    if !fields.contains_key(name.as_str().unwrap()) {
                        found.push(format!("{path}.{}: required", name.as_str().unwrap()));
                    }
                }
                for (name, field) in fields {
                    let path = format!("{path}.{name}");
                    match (schema["properties"].get(name), schema.get("additionalProperties")) {
                        (Some(schema), _) | (None, Some(schema)) => check(schema, field, &path, found),
                        (None, None) if schema["x-kubernetes-preserve-unknown-fields"] == true => {}
                        // The server knows metadata itself.
                        (None, None) if path.starts_with(".metadata.") => {}
                        (None, None) => found.push(format!("{path}: unknown")),
                    }
                }
            }
            ("array", Value::Array(items)) => {
                items.iter().for_each(|item| check(&schema["items"], item, path, found))
            }
            ("string", Value::String(_)) | ("integer", Value::Number(_)) | ("boolean", Value::Bool(_)) => {}
            (wanted, _) => found.push(format!("{path}: expected {wanted}")),
        }
    }

    fn told(version: usize, text: &str) -> Vec<String> {
        let schema = definition()["spec"]["versions"][version]["schema"]["openAPIV3Schema"].clone();
        let mut found = Vec::new();
        for document in super::super::yaml::read("f", text).unwrap() {
            if document.kind() == KIND {
                check(&schema, &document.value, "", &mut found);
            }
        }
        found
    }

    const VALID: &str = include_str!("../../tests/fixtures/workspaces/phi-3-mini.yaml");

    #[test]
    fn workspaces_of_users_and_examples_are_valid() {
        assert_eq!(told(0, VALID), [""; 0]);
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/workspaces");
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            assert_eq!(told(1, &text), [""; 0], "{}", path.display());
        }
    }

    #[test]
    fn broken_ones_are_told() {
        let broken = |from: &str, to: &str| {
            assert!(VALID.contains(from), "{from}");
            told(1, &VALID.replace(from, to)).join("; ")
        };
        assert_eq!(broken("  input:\n", "  inputs:\n"), ".tuning.input: required; .tuning.inputs: unknown");
        assert_eq!(
            broken("  labelSelector:", "  selector:"),
            ".resource.labelSelector: required; .resource.selector: unknown"
        );
        assert_eq!(broken("    name: PRESET\n", "    presetOptions: {}\n"), ".tuning.preset.name: required");
        assert_eq!(broken("method: qlora", "method: 4"), ".tuning.method: expected string");
        assert_eq!(broken("  output:\n", "  output: []\n  other:\n").split(';').count(), 2);
        let mode = broken("    name: PRESET\n", "    name: PRESET\n    accessMode: secret\n");
        assert!(mode.starts_with(".tuning.preset.accessMode: not one of"), "{mode}");
        let partition = VALID.replace("resource:\n", "resource:\n  partition: {mode: mig}\n");
        assert_eq!(
            (told(1, &partition).len(), told(0, &partition)),
            (0, vec![".resource.partition: unknown".to_owned()])
        );
    }

    /// Everything that the API server would store of a Workspace with every field is read and written back whole.
    #[test]
    fn the_types_know_every_field_of_the_schema() {
        fn filled(schema: &Value) -> Value {
            match schema["type"].as_str().unwrap() {
                "object" => {
                    let named = schema["properties"].as_object().into_iter().flatten();
                    let other = schema.get("additionalProperties").map(|any| ("a".to_owned(), filled(any)));
                    named.map(|(name, child)| (name.clone(), filled(child))).chain(other).collect()
                }
                "array" => json!([filled(&schema["items"])]),
                "integer" => json!(1),
                _ if schema["format"] == "date-time" => json!("2026-01-01T00:00:00Z"),
                _ => schema.get("enum").map_or(json!("a"), |choices| choices[0].clone()),
            }
        }
        for version in definition()["spec"]["versions"].as_array().unwrap() {
            let stored = filled(&version["schema"]["openAPIV3Schema"]);
            let read: Workspace = serde_json::from_value(stored.clone()).unwrap();
            assert_eq!(serde_json::to_value(&read).unwrap(), stored, "{}", version["name"]);
        }
    }

    /// A CRD with anything but these is refused by the API server.
    #[test]
    fn the_schema_is_structural() {
        fn walk(schema: &Value, path: &str) {
            assert!(schema["type"].is_string(), "{path}: {schema}");
            for name in schema.as_object().unwrap().keys() {
                let known = [
                    "type",
                    "format",
                    "description",
                    "properties",
                    "required",
                    "items",
                    "additionalProperties",
                    "default",
                    "enum",
                    "pattern",
                    "minLength",
                    "maxLength",
                    "minimum",
                ];
                assert!(
                    known.contains(&name.as_str()) || name.starts_with("x-kubernetes-"),
                    "{path}: {name}"
                );
            }
            for (name, child) in schema["properties"].as_object().into_iter().flatten() {
                walk(child, &format!("{path}.{name}"));
            }
            for child in ["items", "additionalProperties"] {
                if let Some(child) = schema.get(child) {
                    walk(child, path);
                }
            }
        }
        for version in definition()["spec"]["versions"].as_array().unwrap() {
            walk(&version["schema"]["openAPIV3Schema"], "");
        }
    }
}
