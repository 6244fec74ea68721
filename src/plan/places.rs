//! Keys -> paths, addresses and devices of a job; local paths are checked for existence.

use super::reader::Reader;
use crate::dataset::{self, Layout, Share};
use crate::device::{Choice, Gpus};
use crate::fetch::Pin;
use crate::publish::Destination;
use crate::ranks::launch::Wish;
use crate::run_folder::Earlier;
use crate::spec::Origin;
use crate::spec::keys::Section;
use crate::{fetch, registry, source};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

/// Returns the base model: its address, and the folder that its files are or will be in.
pub(super) fn model(reader: &mut Reader, cache: &Path, kaito: bool) -> (fetch::Model, PathBuf) {
    const MOUNTED: [&str; 2] = ["/workspace/tfs/weights", "/workspace/weights"];
    let mut origin = reader.origin(Section::Hone, "model");
    let mut text = reader.text(Section::Hone, "model");
    if let Some(older) = reader.text(Section::ModelConfig, "pretrained_model_name_or_path")
        && text.is_none()
    {
        origin = reader.origin(Section::ModelConfig, "pretrained_model_name_or_path");
        text = Some(older);
    }
    if text.is_none() && kaito {
        text = MOUNTED.into_iter().find(|path| Path::new(path).is_dir()).map(String::from);
    }
    let nothing = || (fetch::Model::Folder(PathBuf::new()), PathBuf::new());
    let Some(text) = text else {
        reader.wrong(
            &Origin::Default,
            "no model: name its folder or address with `model` (--model DIR, hf://OWNER/NAME)",
        );
        return nothing();
    };
    let found = fetch::Model::parse(&text).and_then(|model| Ok((model.folder(cache)?, model)));
    let (folder, model) = match found {
        Ok(found) => found,
        Err(fault) => {
            reader.wrong(&origin, format!("model: {}", fault.in_a_line()));
            return nothing();
        }
    };
    match &model {
        fetch::Model::Folder(path) => check_folder(reader, path, &text, &origin),
        address => reader.derive("model address", address.to_string(), origin.clone()),
    }
    reader.derive("model folder", folder.display().to_string(), origin);
    (model, folder)
}

fn check_folder(reader: &mut Reader, path: &Path, text: &str, origin: &Origin) {
    let there = path.is_dir();
    if there && !path.join("config.json").is_file() {
        reader.wrong(
            origin,
            format!("model: {text} holds no config.json; expected a Hugging Face model folder"),
        );
    } else if !there && looks_like_hub_id(text) {
        reader.wrong(
            origin,
            format!("model: there is no folder {text}; if it is on the Hugging Face hub, write hf://{text}"),
        );
    } else if !there {
        reader.wrong(origin, format!("model: there is no folder {text}"));
    }
}

fn looks_like_hub_id(text: &str) -> bool {
    let plain = |part: &str| !part.is_empty() && !part.starts_with('.');
    text.split_once('/').is_some_and(|(owner, name)| plain(owner) && plain(name) && !name.contains('/'))
}

/// The entries of the data.
pub(super) struct Entries {
    /// Addresses: those to train on, then those to evaluate on.
    pub data: Vec<fetch::Data>,
    /// The settings that entries have of their own; empty if none has any.
    pub shares: Vec<Share>,
    /// The name of each entry in metrics.
    pub names: Vec<String>,
    /// Index of the first entry to evaluate on, if there is one.
    pub evaluation_from: Option<usize>,
}

impl Entries {
    /// Returns the entries that are evaluated, by index and name.
    pub fn evaluated(&self) -> impl Iterator<Item = (usize, &str)> {
        let from = self.evaluation_from.unwrap_or(0);
        self.names.iter().map(String::as_str).enumerate().skip(from)
    }
}

/// Returns the addresses of the data, to train on and to evaluate on.
pub(super) fn data(reader: &mut Reader, kaito: bool, needed: bool) -> Entries {
    let mut origin = reader.origin(Section::Hone, "data");
    let mut texts = reader.texts(Section::Hone, "data");
    let path = reader.text(Section::DatasetConfig, "dataset_path").filter(|path| !path.is_empty());
    // KAITO's environment names the folder; a path in the configuration overrides it.
    let from_environment = matches!(&origin, Origin::Environment(name) if name == "DATASET_FOLDER_PATH");
    if let Some(path) = path
        && (texts.is_empty() || from_environment)
    {
        origin = reader.origin(Section::DatasetConfig, "dataset_path");
        texts = vec![if kaito { Path::new("/mnt").join(path).display().to_string() } else { path }];
    }
    if texts.is_empty() && kaito {
        texts = vec!["/mnt/data".into()];
    }
    if texts.is_empty() && needed {
        reader.wrong(&Origin::Default, "no dataset: name its files with `data` (--data URL_OR_PATH)");
    }
    let mut entries = parsed(reader, "data", texts, &origin);
    warn_of_repetitions(reader, &entries.data);
    if let Some(text) = pins(&entries.data) {
        reader.derive("data pinned", text, origin);
    }
    let origin = reader.origin(Section::Hone, "evaluation_data");
    let texts = reader.texts(Section::Hone, "evaluation_data");
    if !texts.is_empty() {
        let evaluation = parsed(reader, "evaluation_data", texts, &origin);
        if evaluation.shares.iter().any(|share| share.weight.is_some()) {
            reader.wrong(
                &origin,
                "evaluation_data: a weight says how often a row trains; rows of evaluation_data do not",
            );
        }
        if let Some(text) = pins(&evaluation.data) {
            reader.derive("evaluation data pinned", text, origin);
        }
        entries.evaluation_from = Some(entries.data.len());
        entries.data.extend(evaluation.data);
        entries.shares.extend(evaluation.shares);
    }
    entries.names = names(reader, &entries.data, &entries.shares);
    if entries.shares.iter().all(|share| *share == Share::default()) {
        entries.shares.clear();
    }
    entries
}

/// Warns once of the entries that name the same place: their rows train several times.
fn warn_of_repetitions(reader: &mut Reader, data: &[fetch::Data]) {
    let repeated = |index: &usize| data[..*index].contains(&data[*index]);
    let repeated: Vec<String> =
        (0..data.len()).filter(repeated).map(|index| data[index].short_name()).collect();
    if let Some(first) = repeated.first() {
        reader.warn(format!(
            "data: {} of {} entries name a place that an earlier entry names ({first}), so their rows train once more; \
             for rows that count more, #weight= says it",
            repeated.len(),
            data.len()
        ));
    }
}

/// Returns the entries of one key; they have no names yet.
fn parsed(reader: &mut Reader, key: &str, texts: Vec<String>, origin: &Origin) -> Entries {
    let mut entries =
        Entries { data: Vec::new(), shares: Vec::new(), names: Vec::new(), evaluation_from: None };
    for text in texts {
        let (text, share) = match share(&text) {
            Ok(found) => found,
            Err(wrong) => {
                reader.wrong(origin, format!("{key}: {wrong}"));
                continue;
            }
        };
        match fetch::Data::parse(&text) {
            Ok(source) => {
                entries.data.push(source);
                entries.shares.push(share);
            }
            Err(fault) => reader.wrong(origin, fault.in_a_line()),
        }
    }
    entries
}

/// Returns a name for each entry: its own, or one made from its address. Names that were made get a number if they are
/// not distinct; names that were given must be distinct among those that are evaluated together.
fn names(reader: &mut Reader, data: &[fetch::Data], shares: &[Share]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for (data, share) in data.iter().zip(shares) {
        let name = share.name.clone().unwrap_or_else(|| data.short_name());
        let taken =
            names.iter().filter(|other| **other == name || other.starts_with(&format!("{name}_"))).count();
        let unique = match taken {
            0 => name,
            _ if share.name.is_some() && names.contains(&name) => {
                let origin = reader.origin(Section::Hone, "data");
                reader.wrong(&origin, format!("name: two entries are called {name:?}"));
                name
            }
            count if names.contains(&name) => format!("{name}_{}", count + 1),
            _ => name,
        };
        names.push(unique);
    }
    names
}

/// Returns the digests that pin the bytes of the data. Data that is all on this machine has no line.
fn pins(sources: &[fetch::Data]) -> Option<String> {
    let words = [
        (Pin::Sha256, "by sha256"),
        (Pin::Commit, "by a commit"),
        (Pin::Digest, "by an image's digest"),
        (Pin::Local, "on this machine"),
        (Pin::Nothing, "not pinned: the next start may read other bytes"),
    ];
    let count = |pin| sources.iter().filter(|source| source.pin() == pin).count();
    let found = words.into_iter().filter(|(pin, _)| count(*pin) > 0);
    let texts: Vec<String> = found.map(|(pin, words)| format!("{} {words}", count(pin))).collect();
    (count(Pin::Local) < sources.len()).then(|| texts.join(", "))
}

/// Takes `layout=`, `weight=`, `limit=` and `name=` out of the text behind `#`; the digest stays there. A `#` that is
/// followed by anything else is part of the path.
fn share(text: &str) -> Result<(String, Share), String> {
    let Some((place, words)) = text.rsplit_once('#') else { return Ok((text.to_owned(), Share::default())) };
    let pairs: Vec<(&str, &str)> = words.split('&').filter_map(|word| word.split_once('=')).collect();
    let known = ["sha256", "layout", "weight", "limit", "name"];
    if pairs.len() != words.split('&').count() || !pairs.iter().all(|(key, _)| known.contains(key)) {
        return Ok((text.to_owned(), Share::default()));
    }
    let (mut share, mut text) = (Share::default(), place.to_owned());
    for (index, (key, value)) in pairs.iter().copied().enumerate() {
        if pairs[..index].iter().any(|(other, _)| *other == key) {
            return Err(format!("{key} is given twice"));
        }
        match key {
            "layout" => {
                let keys = Layout::KEYS.map(|(key, _)| key).join(", ");
                let layout = Layout::of_key(value);
                share.layout =
                    Some(layout.ok_or_else(|| format!("layout: expected one of {keys}, found {value:?}"))?);
            }
            "weight" => {
                let weight = value.parse().ok().filter(|weight: &f64| *weight > 0.0 && *weight <= 1000.0);
                let wrong = || format!("weight: expected a number above 0, up to 1000, found {value:?}");
                share.weight = Some(weight.ok_or_else(wrong)?);
            }
            "limit" => {
                let limit = value.replace('_', "").parse().ok().filter(|limit: &usize| *limit > 0);
                share.limit = Some(
                    limit.ok_or_else(|| format!("limit: expected a whole number from 1, found {value:?}"))?,
                );
            }
            "name" => {
                let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
                let fits = (1..=64).contains(&value.len()) && value.chars().all(plain);
                let wrong = || {
                    format!("name: expected letters, digits, `-`, `_` and `.`, at most 64, found {value:?}")
                };
                share.name = Some(fits.then(|| value.to_owned()).ok_or_else(wrong)?);
            }
            _ => text = format!("{text}#sha256={value}"),
        }
    }
    Ok((text, share))
}

/// Returns the output folder: `output`, or else `TrainingArguments.output_dir` as it is. Under KAITO's mounts, it is
/// resolved as KAITO's controller does.
pub(super) fn output(reader: &mut Reader, kaito: bool) -> PathBuf {
    let asked =
        reader.text(Section::Hone, "output").map(|text| (text, reader.origin(Section::Hone, "output")));
    let older = reader.text(Section::TrainingArguments, "output_dir").unwrap_or_default();
    let older_origin = reader.origin(Section::TrainingArguments, "output_dir");
    let (folder, origin) = match asked {
        Some((text, origin)) => (PathBuf::from(text), origin),
        None if kaito => match below_mnt(&older) {
            Some(folder) => (folder, older_origin),
            None => {
                reader.wrong(
                    &older_origin,
                    format!("TrainingArguments.output_dir: {older:?} is not below /mnt"),
                );
                (PathBuf::new(), older_origin)
            }
        },
        None if older.is_empty() => (PathBuf::from("output"), Origin::Default),
        None => (PathBuf::from(older), older_origin),
    };
    reader.derive("output folder", folder.display().to_string(), origin);
    folder
}

/// Returns the rule of KAITO's `PrepareOutputDir`: an empty text means /mnt/output; any other path must lie below /mnt.
pub fn below_mnt(text: &str) -> Option<PathBuf> {
    let text = if text.trim().is_empty() { "output" } else { text };
    let joined = if text.starts_with("/mnt") { text.to_string() } else { format!("/mnt/{text}") };
    let mut clean = PathBuf::from("/");
    for part in Path::new(&joined).components() {
        match part {
            Component::ParentDir => {
                clean.pop();
            }
            Component::Normal(name) => clean.push(name),
            _ => {}
        }
    }
    (clean.starts_with("/mnt") && clean != Path::new("/mnt")).then_some(clean)
}

pub(super) fn earlier(reader: &mut Reader) -> Earlier {
    match reader.text(Section::Hone, "earlier_results").as_deref() {
        Some("move") => Earlier::Move,
        _ => Earlier::Refuse,
    }
}

pub(super) fn existing_file(reader: &mut Reader, name: &str) -> Option<PathBuf> {
    let path = PathBuf::from(reader.text(Section::Hone, name)?);
    if !path.is_file() {
        let origin = reader.origin(Section::Hone, name);
        reader.wrong(&origin, format!("{name}: there is no file {}", path.display()));
    }
    Some(path)
}

pub(super) fn init_adapter(reader: &mut Reader) -> Option<PathBuf> {
    let path = PathBuf::from(reader.text(Section::Hone, "init_adapter")?);
    if !path.join("adapter_config.json").is_file() {
        let origin = reader.origin(Section::Hone, "init_adapter");
        reader.wrong(&origin, format!("init_adapter: {} holds no adapter_config.json", path.display()));
    }
    Some(path)
}

/// Returns the places that the adapter is sent to: `push`, and the hub's repository if `push_to_hub` is true.
pub(super) fn push(reader: &mut Reader, output: &Path) -> Vec<Destination> {
    let origin = reader.origin(Section::Hone, "push");
    let mut places: Vec<Destination> = Vec::new();
    for text in reader.texts(Section::Hone, "push").iter().filter(|text| !text.is_empty()) {
        match Destination::parse(text) {
            Ok(place) if places.contains(&place) => {}
            Ok(place) => places.push(place),
            Err(fault) => reader.wrong(&origin, fault.in_a_line()),
        }
    }
    places.extend(push_to_hub(reader, output).filter(|place| !places.contains(place)));
    let private = reader.maybe_boolean(Section::TrainingArguments, "hub_private_repo");
    for place in &mut places {
        if let Destination::Hub(repository) = place {
            repository.private = private;
        }
    }
    places
}

/// Returns transformers' `push_to_hub` as a place.
fn push_to_hub(reader: &mut Reader, output: &Path) -> Option<Destination> {
    use Section::TrainingArguments as T;
    let wanted = reader.boolean(T, "push_to_hub");
    let name = reader.text(T, "hub_model_id").filter(|name| !name.is_empty());
    let revision = reader.text(T, "hub_revision").unwrap_or_default();
    let strategy = reader.text(T, "hub_strategy").unwrap_or_default();
    if !wanted {
        return None;
    }
    if strategy != "end" {
        let origin = reader.origin(T, "hub_strategy");
        reader.wrong(
            &origin,
            format!(
                "TrainingArguments.hub_strategy: {strategy} would send checkpoints; hone sends the adapter once, at the end: \
                 set it to end"
            ),
        );
    }
    let own = || output.file_name().map(|name| name.to_string_lossy().into_owned());
    let name = name.or_else(own).unwrap_or_default();
    match Destination::parse(&format!("hf://{name}@{revision}")) {
        Ok(place) => {
            reader.derive("hub repository", place.to_string(), reader.origin(T, "hub_model_id"));
            Some(place)
        }
        Err(fault) => {
            let origin = reader.origin(T, "hub_model_id");
            reader.wrong(&origin, format!("TrainingArguments.hub_model_id: {}", fault.in_a_line()));
            None
        }
    }
}

pub(super) fn device(reader: &mut Reader) -> Choice {
    let origin = reader.origin(Section::Hone, "device");
    let text = reader.text(Section::Hone, "device").unwrap_or_default();
    let use_cpu = reader.boolean(Section::TrainingArguments, "use_cpu");
    match Choice::parse(&text) {
        Some(Choice::Auto) if use_cpu => Choice::Cpu,
        Some(choice) => choice,
        None => {
            reader.wrong(&origin, format!("device: expected auto, cpu, cuda or cuda:N, found {text:?}"));
            Choice::Auto
        }
    }
}

/// Returns the processes that train together. `choice` is the value of `device`.
pub(super) fn ranks(reader: &mut Reader, choice: Choice) -> Wish {
    let origin = reader.origin(Section::Hone, "gpus");
    let text = reader.text(Section::Hone, "gpus");
    let gpus = text.as_deref().and_then(Gpus::parse);
    if let (Some(text), None) = (&text, &gpus) {
        let expected = "expected all, a number of GPUs, or the numbers of several such as 0,2";
        reader.wrong(&origin, format!("gpus: {expected}, found {text:?}"));
    }
    if gpus.is_some() && choice != Choice::Auto {
        reader.warn("gpus has no effect, since device or use_cpu names the one device".into());
    }
    let ranks = reader.maybe_integer(Section::Hone, "ranks").map(|ranks| ranks as usize);
    Wish { device: choice, gpus, ranks }
}

pub(super) fn source_options(reader: &mut Reader, ca_file: Option<PathBuf>) -> source::Options {
    let cache = reader.text(Section::Hone, "cache").unwrap_or_else(|| ".hone-cache".into());
    source::Options {
        cache: cache.into(),
        connect_timeout: Duration::from_secs(10),
        read_timeout: Duration::from_secs(60),
        speed: source::Speed::LEAST,
        total_timeout: Duration::from_secs(6 * 60 * 60),
        attempts_max: 6,
        backoff: Duration::from_millis(500),
        file_bytes_max: reader.integer(Section::Hone, "file_bytes_max") as u64,
        endings: dataset::ENDINGS,
        ca_file,
    }
}

pub(super) fn registry_options(reader: &mut Reader, ca_file: Option<PathBuf>) -> registry::Options {
    let docker_config = reader.text(Section::Hone, "docker_config").map(PathBuf::from);
    registry_access(docker_config, ca_file, reader.boolean(Section::Hone, "plain_http"))
}

/// Returns the options of a registry for `hone push` and `hone pull`, which have no keys.
pub fn registry_access(
    docker_config: Option<PathBuf>,
    ca_file: Option<PathBuf>,
    plain_http: bool,
) -> registry::Options {
    registry::Options {
        docker_config,
        ca_file,
        plain_http,
        attempts_max: 6,
        connect_timeout: Duration::from_secs(10),
        read_timeout: Duration::from_secs(60),
    }
}
