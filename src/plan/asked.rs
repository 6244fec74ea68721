//! The arguments of a run -> the arguments that its folder records, so that later commands need not be given them
//! again. No secret is recorded: an address with a signature is left out.

use serde_json::{Map, Value as Json};

use super::show::without_secrets;
use crate::fetch;
use crate::spec::Spec;
use crate::spec::keys::{Effect, Section};
use std::path::Path;

/// Keys of one start: the places of its results and metrics, its access to registries, and its device.
const OF_ONE_START: [&str; 18] = [
    "output",
    "earlier_results",
    "answers",
    "push",
    "mlflow",
    "pushgateway",
    "otlp",
    "docker_config",
    "ca_file",
    "plain_http",
    "init_adapter",
    "device",
    "gpus",
    "ranks",
    "keep",
    "memory_max",
    "pass_tokens_max",
    "residency",
];

/// Returns whether a key belongs to one start, so that no record holds it. So a folder that somebody else wrote cannot
/// decide where this start sends results, or which servers it trusts.
pub fn is_of_one_start(key: &str) -> bool {
    OF_ONE_START.contains(&key)
}

/// `Section.key` or a key of hone -> its value. Places are absolute, and the chat template is its text.
pub(super) fn asked(spec: &Spec, base: &fetch::Model, chat_template: Option<&str>) -> Map<String, Json> {
    let mut asked = Map::new();
    for (key, given) in spec.iter().filter(|(key, _)| key.effect == Effect::Used) {
        let own = match key.section {
            Section::LoraConfig => false,
            Section::Hone => !OF_ONE_START.contains(&key.name),
            Section::ModelConfig => !["pretrained_model_name_or_path", "chat_template"].contains(&key.name),
            Section::TrainingArguments => !["output_dir", "chat_template_path"].contains(&key.name),
            Section::DatasetConfig => key.name != "dataset_path",
            _ => true,
        };
        if own && !["data", "evaluation_data", "model", "cache"].contains(&key.name) {
            asked.insert(key.to_string(), given.value.to_json());
        }
    }
    let model = match base {
        fetch::Model::Folder(folder) if folder.as_os_str().is_empty() => None,
        fetch::Model::Folder(folder) => absolute(&folder.to_string_lossy()),
        address => Some(address.to_string()).filter(|text| without_secrets(text) == *text),
    };
    asked.extend(model.map(|model| ("model".into(), model.into())));
    if let Some(cache) = spec.get(Section::Hone, "cache").and_then(|given| text(&given.value.to_json())) {
        asked.extend(place(&cache).map(|cache| ("cache".into(), cache.into())));
    }
    let data: Option<Vec<Json>> = data(spec).iter().map(|text| Some(place(text)?.into())).collect();
    if let Some(data) = data.filter(|data| !data.is_empty()) {
        asked.insert("data".into(), Json::Array(data));
    }
    let evaluation = spec.get(Section::Hone, "evaluation_data").map(|given| texts(&given.value.to_json()));
    let evaluation: Option<Vec<Json>> =
        evaluation.unwrap_or_default().iter().map(|text| Some(place(text)?.into())).collect();
    if let Some(list) = evaluation.filter(|list| !list.is_empty() && asked.contains_key("data")) {
        asked.insert("evaluation_data".into(), Json::Array(list));
    }
    asked.extend(chat_template.map(|text| ("ModelConfig.chat_template".into(), text.into())));
    asked
}

/// Returns the entries of `data` as they were written, or where KAITO puts them.
fn data(spec: &Spec) -> Vec<String> {
    let given = |section, name: &str| spec.get(section, name).map(|given| texts(&given.value.to_json()));
    let path =
        given(Section::DatasetConfig, "dataset_path").filter(|list| list.iter().any(|t| !t.is_empty()));
    match (given(Section::Hone, "data"), path) {
        (Some(list), _) if !list.is_empty() => list,
        (_, Some(list)) if spec.kaito => list.iter().map(|path| format!("/mnt/{path}")).collect(),
        (_, Some(list)) => list,
        _ if spec.kaito => vec!["/mnt/data".into()],
        _ => Vec::new(),
    }
}

/// Returns a text or a list of texts.
fn texts(given: &Json) -> Vec<String> {
    match given {
        Json::Array(items) => items.iter().filter_map(text).collect(),
        one => text(one).into_iter().collect(),
    }
}

fn text(value: &Json) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// Returns an entry of `data` that means the same from every folder; `None` if it holds a secret.
fn place(text: &str) -> Option<String> {
    match text.contains("://") {
        true => {
            let address = text.split('#').next().unwrap_or(text);
            Some(text.to_owned()).filter(|_| without_secrets(address) == *address)
        }
        false => absolute(text).filter(|_| without_secrets(text) == text),
    }
}

fn absolute(path: &str) -> Option<String> {
    Some(std::path::absolute(Path::new(path)).ok()?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Origin, Request, Setting, Written, gather};

    fn of(settings: &[(&str, &str)]) -> Map<String, Json> {
        let setting = |(key, value): &(&str, &str)| Setting {
            key: (*key).into(),
            written: Written::Yaml((*value).into()),
            origin: Origin::Default,
        };
        let request = Request { settings: settings.iter().map(setting).collect(), ..Request::default() };
        let spec = gather(&request, &|_| None).unwrap();
        asked(&spec, &fetch::Model::Folder("base".into()), None)
    }

    #[test]
    fn places_are_absolute_and_keys_of_one_start_are_left_out() {
        let found = of(&[
            ("data", "[rows.parquet#limit=3, 'https://host/rows.parquet#sha256=00']"),
            ("output", "o"),
            ("push", "host/a:1"),
            ("LoraConfig.r", "4"),
            ("TrainingArguments.max_length", "64"),
            ("DatasetConfig.train_test_split", "0.5"),
        ]);
        let here = |name: &str| std::path::absolute(name).unwrap().to_string_lossy().into_owned();
        assert_eq!(found["model"], here("base"));
        assert_eq!(found["data"][0], here("rows.parquet#limit=3"));
        assert_eq!(found["data"][1], "https://host/rows.parquet#sha256=00");
        assert_eq!(found["DatasetConfig.train_test_split"], 0.5);
        assert_eq!(found["TrainingArguments.max_length"], 64);
        for key in ["output", "push", "LoraConfig.r"] {
            assert!(!found.contains_key(key), "{key}");
        }
    }

    #[test]
    fn the_part_of_a_dataset_is_remembered() {
        let part = "hf://datasets/owner/name?config=en&split=validation#limit=5";
        assert_eq!(of(&[("data", &format!("['{part}']"))])["data"][0], part);
    }

    #[test]
    fn a_signed_address_is_not_remembered() {
        for address in ["https://host/rows.parquet?sig=SECRET", "https://user:SECRET@host/rows.parquet"] {
            let found = of(&[("data", &format!("['{address}']"))]);
            assert!(!serde_json::to_string(&found).unwrap().contains("SECRET"), "{found:?}");
            assert!(!found.contains_key("data"));
        }
    }
}
