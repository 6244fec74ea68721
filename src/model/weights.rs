//! The safetensors of a model folder, single or sharded. Every header is read and checked, the bytes are mapped,
//! and tensors are read one at a time.
//!
//! Names are those of the causal language model, whichever model the file was saved from: the bare base model
//! (`layers.0...`), or a multimodal wrapper with its old names (`language_model.model...`) or its new ones
//! (`model.language_model...`).

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::DType;
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use crate::bounds::Bounds;
use crate::fault::{Fault, Kind, Result};
use crate::plain;
use crate::words;

const SAME_MODEL: &str =
    "config.json and the safetensors files must be of the same model: download both again";

const WITH_ADAPTER: &str = "the checkpoint contains a LoRA adapter; merge the adapter first (peft's merge_and_unload), \
     or use the base model and give the adapter as `init_adapter`";

/// Parts of multimodal models beside the language model. They are not read.
const BESIDE_LANGUAGE: [&str; 5] =
    ["vision_tower.", "vision_model.", "multi_modal_projector.", "patch_merger.", "image_newline"];

/// LIMIT: bytes of a safetensors header. Some hundred thousand tensors fit.
const HEADER_BYTES_MAX: u64 = 32 << 20;
/// LIMIT: memory for reading one header.
const HEADER_MEMORY_MAX: usize = 1 << 30;

/// The weights of a model folder, or of another store of the same tensors.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<(PathBuf, Mmap)>,
    tensors: BTreeMap<String, Entry>,
    store: Option<Box<dyn Store>>,
}

/// Tensors of a causal language model that lie in no safetensors file, by the names they would have there.
pub trait Store: std::fmt::Debug + Send + Sync {
    /// Returns the names of all tensors.
    fn names(&self) -> Vec<String>;

    /// Returns the shape and values of a tensor, widened to f32; `None` if there is none of the name.
    ///
    /// # Errors
    /// Model: its bytes are damaged.
    fn tensor(&self, name: &str) -> Result<Option<(Vec<usize>, Vec<f32>)>>;
}

#[derive(Clone, Debug)]
struct Entry {
    /// The tensor's name in the file, without the parts that wrappers of training put into it.
    stored: String,
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    from: usize,
    to: usize,
}

/// A tensor as it is stored in the file.
pub struct Raw<'a> {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Shape.
    pub shape: &'a [usize],
    /// The elements, little-endian.
    pub bytes: &'a [u8],
}

/// The values of one tensor as stored, little-endian.
pub enum Values<'a> {
    /// f32.
    F32(Cow<'a, [u8]>),
    /// f16.
    F16(&'a [u8]),
    /// bf16.
    Bf16(&'a [u8]),
}

impl Checkpoint {
    /// Returns a checkpoint without files, for a random base.
    pub(super) fn empty() -> Checkpoint {
        Checkpoint { files: Vec::new(), tensors: BTreeMap::new(), store: None }
    }

    /// Returns tensors of another store.
    pub fn of_store(store: Box<dyn Store>) -> Checkpoint {
        Checkpoint { store: Some(store), ..Checkpoint::empty() }
    }

    /// Opens `model.safetensors`, or `model.safetensors.index.json` with its shards. A folder without either and a
    /// damaged file are model faults that say what to do.
    pub fn open(folder: &Path) -> Result<Checkpoint> {
        let mut checkpoint = Checkpoint::empty();
        // The single file comes first, as in transformers: an index next to it is a leftover.
        let (file, index) = (folder.join("model.safetensors"), folder.join("model.safetensors.index.json"));
        if file.exists() {
            checkpoint.add(file)?;
        } else if index.exists() {
            checkpoint.add_shards(folder, &index)?;
        } else {
            return Err(no_safetensors(folder));
        }
        checkpoint.rename()
    }

    fn add_shards(&mut self, folder: &Path, index: &Path) -> Result<()> {
        let map = read_index(index)?;
        for shard in map.values().collect::<BTreeSet<_>>() {
            // A shard's name comes from a file of the model, so it must not leave the folder.
            if Path::new(shard).components().count() != 1 || shard.contains(['/', '\\']) || shard == ".." {
                return Err(Fault::model(format!(
                    "{}: shard {shard:?} is outside the folder",
                    index.display()
                )));
            }
            self.add(folder.join(shard))?;
        }
        match map.keys().find(|name| !self.tensors.contains_key(*name)) {
            Some(name) => Err(Fault::model(format!("{}: {name} is not in {}", index.display(), map[name]))),
            None => Ok(()),
        }
    }

    /// Gives every tensor the name that it has in the causal language model.
    fn rename(mut self) -> Result<Checkpoint> {
        for (name, entry) in std::mem::take(&mut self.tensors) {
            let plain = unwrapped(&name).into_owned();
            let entry = Entry { stored: plain.clone(), ..entry };
            if self.tensors.insert(plain.clone(), entry).is_some() {
                return Err(Fault::model(format!("the checkpoint holds {plain} twice, once as {name}")));
            }
        }
        let bare = |embedding: &str| self.tensors.contains_key(embedding);
        let prefix = match (bare("embed_tokens.weight"), bare("word_embeddings.weight")) {
            (true, _) => "model.",
            (_, true) => "transformer.",
            (false, false) => "",
        };
        for (name, entry) in std::mem::take(&mut self.tensors) {
            let renamed = match prefix {
                "" => language_name(&name).into_owned(),
                _ if name.starts_with("lm_head.") => name.clone(),
                prefix => format!("{prefix}{name}"),
            };
            if self.tensors.insert(renamed.clone(), entry).is_some() {
                return Err(Fault::model(format!("the checkpoint holds {renamed} twice, once as {name}")));
            }
        }
        Ok(self)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let damaged = |what: String| Fault::model(format!("{}: {what}", path.display()));
        let unread = |doing: &'static str| {
            let path = &path;
            move |error: std::io::Error| {
                Fault::unread(Kind::Model, format!("{}: cannot {doing}: {error}", path.display()), &error)
            }
        };
        let file = plain::open(&path).map_err(unread("open"))?;
        // SAFETY: the mapping is read-only, and a model folder is not written to while it is used. If the file becomes
        // shorter meanwhile, a read ends the process with SIGBUS, as for any mapping.
        let map = unsafe { Mmap::map(&file) }.map_err(unread("map"))?;
        let header = map.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        if header > HEADER_BYTES_MAX {
            return Err(damaged(format!("its header has {header} bytes, the limit is {HEADER_BYTES_MAX}"))
                .help("download it again"));
        }
        let bounds = Bounds::new(Kind::Model, path.display().to_string(), HEADER_MEMORY_MAX);
        let (header_bytes, metadata) = bounds.hold(|| {
            SafeTensors::read_metadata(&map).map_err(|error| {
                damaged(format!("not a whole safetensors file: {error}")).help("download it again")
            })
        })?;
        let data = header_bytes + 8;
        for (name, info) in metadata.tensors() {
            let (from, to) = (data + info.data_offsets.0, data + info.data_offsets.1);
            let (file, dtype, shape) = (self.files.len(), info.dtype, info.shape.clone());
            let entry = Entry { stored: name.clone(), file, dtype, shape, from, to };
            if to > map.len() {
                let message = format!("{name} ends at byte {to}, the file at {}", map.len());
                return Err(damaged(message).help("the file was cut short: download it again"));
            }
            if let Some(other) = self.tensors.insert(name.clone(), entry) {
                let other = self.files.get(other.file).map_or(&path, |(path, _)| path);
                return Err(damaged(format!("{name} is also in {}", other.display())));
            }
        }
        self.files.push((path, map));
        Ok(())
    }

    /// Returns a tensor of any type as it is stored.
    pub fn raw(&self, name: &str) -> Option<Raw<'_>> {
        let entry = self.tensors.get(&*language_name(name))?;
        let bytes = &self.files[entry.file].1[entry.from..entry.to];
        Some(Raw { dtype: entry.dtype, shape: &entry.shape, bytes })
    }

    /// Returns all tensors whose names begin so, as they are stored, in the order of their names.
    pub fn under(&self, prefix: &str) -> impl Iterator<Item = (&str, Raw<'_>)> {
        let prefix = language_name(prefix).into_owned();
        let all = self.tensors.range(prefix.clone()..).take_while(move |(name, _)| name.starts_with(&prefix));
        all.map(|(name, entry)| {
            let bytes = &self.files[entry.file].1[entry.from..entry.to];
            (name.as_str(), Raw { dtype: entry.dtype, shape: &entry.shape, bytes })
        })
    }

    /// Returns the number of bytes of all tensors that are read for a language model.
    pub fn bytes(&self) -> usize {
        let read = self.tensors.iter().filter(|(name, _)| !beside_language(name));
        read.map(|(_, entry)| entry.to - entry.from).sum()
    }

    /// Returns names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Returns the name under which a file holds a tensor. For a base model that was saved alone, this is the causal
    /// language model's name, which every loader understands.
    pub fn stored_name(&self, name: &str) -> String {
        let in_wrapper =
            |entry: &&Entry| *language_name(&entry.stored) != *entry.stored || beside_language(&entry.stored);
        match self.tensors.get(&*language_name(name)).filter(in_wrapper) {
            Some(entry) => entry.stored.clone(),
            None => name.to_owned(),
        }
    }

    /// Returns the values of a tensor. A missing tensor, another shape than `shape`, and a type other than F32, F16 and
    /// BF16 are model faults.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Values<'_>> {
        if let Some(store) = &self.store {
            return from_store(&**store, name, shape);
        }
        let entry = self
            .tensors
            .get(&*language_name(name))
            .ok_or_else(|| Fault::model(format!("the checkpoint has no {name}")))?;
        let (path, map) = &self.files[entry.file];
        let wrong = |what: String| Fault::model(format!("{}: {name}: {what}", path.display()));
        if entry.shape != shape {
            return Err(wrong(format!("found shape {:?}, expected {shape:?} by config.json", entry.shape))
                .help(SAME_MODEL));
        }
        let bytes = &map[entry.from..entry.to];
        match entry.dtype {
            Dtype::F32 => Ok(Values::F32(bytes.into())),
            Dtype::F16 => Ok(Values::F16(bytes)),
            Dtype::BF16 => Ok(Values::Bf16(bytes)),
            other => Err(wrong(format!("found type {other:?}, expected F32, F16 or BF16"))),
        }
    }

    /// Compares the names, apart from those that `ignored` takes out, with those that the decoder reads. The fault
    /// names missing and surplus tensors together.
    pub fn expect(&self, wanted: &BTreeSet<String>, ignored: impl Fn(&str) -> bool) -> Result<()> {
        let wanted: BTreeSet<String> = wanted.iter().map(|name| language_name(name).into_owned()).collect();
        let ignored = |name: &str| ignored(name) || beside_language(name);
        let of_store = self.store.iter().flat_map(|store| store.names()).collect::<Vec<_>>();
        let found: BTreeSet<&str> = self.names().chain(of_store.iter().map(String::as_str)).collect();
        let missing: Vec<&str> =
            wanted.iter().map(String::as_str).filter(|name| !found.contains(name)).collect();
        let surplus: Vec<&str> =
            found.into_iter().filter(|name| !wanted.contains(*name) && !ignored(name)).collect();
        if missing.is_empty() && surplus.is_empty() {
            return Ok(());
        }
        let list = |names: &[&str]| words::list(names, 4);
        let mut parts = Vec::new();
        if !missing.is_empty() {
            parts.push(format!("{} missing: {}", missing.len(), list(&missing)));
        }
        if !surplus.is_empty() {
            parts.push(format!("{} surplus: {}", surplus.len(), list(&surplus)));
        }
        let has_adapter = surplus.iter().any(|name| name.contains(".lora_") || name.contains(".base_layer."));
        let help = if has_adapter { WITH_ADAPTER } else { SAME_MODEL };
        Err(Fault::model(format!("the checkpoint does not fit config.json; tensors {}", parts.join("; ")))
            .help(help))
    }
}

fn from_store<'a>(store: &dyn Store, name: &str, shape: &[usize]) -> Result<Values<'a>> {
    let missing = || Fault::model(format!("the checkpoint has no {name}"));
    let (found, values) = store.tensor(&language_name(name))?.ok_or_else(missing)?;
    match found == shape {
        true => {
            Ok(Values::F32(values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()))
        }
        false => {
            Err(Fault::model(format!("{name}: found shape {found:?}, expected {shape:?} by config.json")))
        }
    }
}

/// Parts of names that training wrappers add and that say nothing about the model.
const WRAPPERS: [&str; 3] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// Returns a tensor's name without the parts that `torch.compile` and data-parallel wrappers add if a state is saved
/// through them.
pub fn unwrapped(name: &str) -> Cow<'_, str> {
    let in_front = name.trim_start_matches("module.");
    if !in_front.split('.').any(|part| WRAPPERS.contains(&part)) {
        return in_front.into();
    }
    let parts: Vec<&str> = in_front.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
    parts.join(".").trim_start_matches("module.").to_owned().into()
}

/// Maps `language_model.model.x` and `model.language_model.x` to `model.x` of the language model inside.
pub(super) fn language_name(name: &str) -> Cow<'_, str> {
    match (name.strip_prefix("language_model."), name.strip_prefix("model.language_model.")) {
        (Some(rest), _) => rest.into(),
        (_, Some(rest)) => format!("model.{rest}").into(),
        (None, None) => name.into(),
    }
}

/// Returns whether a tensor belongs to the parts of a multimodal model beside its language model.
pub fn beside_language(name: &str) -> bool {
    let name = name.strip_prefix("model.").unwrap_or(name);
    BESIDE_LANGUAGE.iter().any(|part| name.starts_with(part))
}

/// Returns the fault for a folder without safetensors: it names the file found instead and says how to get safetensors.
fn no_safetensors(folder: &Path) -> Fault {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let ending_with = |ends: &[&str]| names.iter().find(|name| ends.iter().any(|end| name.ends_with(end)));
    let fault = Fault::model(format!("no model.safetensors in {}", folder.display()));
    if let Some(name) = ending_with(&[".gguf", ".ggml"]) {
        return fault
            .at(format!("{name} is a file for inference"))
            .help("use the model it was made from (base_model on its hub page), as safetensors");
    }
    if let Some(name) = ending_with(&["adapter_model.safetensors", "adapter_model.bin"]) {
        return fault
            .at(format!("{name} is an adapter, not a model"))
            .help("give the base model as `model`, and this folder as `init_adapter` to continue from it");
    }
    if let Some(name) = ending_with(&[".bin", ".pt", ".pth", ".ckpt"]) {
        return fault.at(format!("{name} is a pickle, which may run code and is not read")).help(
            "save it as safetensors: transformers' from_pretrained(DIR).save_pretrained(NEW), \
             or use a revision of the model that has them",
        );
    }
    match ending_with(&[".safetensors"]) {
        Some(name) if name.contains("-of-") => fault
            .at(format!("{name} is a shard without model.safetensors.index.json"))
            .help("download the whole model again"),
        Some(name) => fault
            .at(format!("hone does not look for the name {name}"))
            .help("rename a single file to model.safetensors"),
        None => fault.help("a model folder holds config.json, tokenizer.json and *.safetensors"),
    }
}

fn read_index(file: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let wrong = |error: String| Fault::model(format!("{}: {error}", file.display()));
    let text = plain::small(file).map_err(|error| wrong(error.to_string()).or_machines())?;
    let index: Index = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    Ok(index.weight_map)
}

impl Values<'_> {
    /// Returns the bytes as stored.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Values::F32(bytes) => bytes,
            Values::F16(bytes) | Values::Bf16(bytes) => bytes,
        }
    }

    /// Returns the values of a range.
    pub fn part(&self, range: std::ops::Range<usize>) -> Values<'_> {
        let bytes = |bytes: usize| range.start * bytes..range.end * bytes;
        match self {
            Values::F32(all) => Values::F32(Cow::Borrowed(&all[bytes(4)])),
            Values::F16(all) => Values::F16(&all[bytes(2)]),
            Values::Bf16(all) => Values::Bf16(&all[bytes(2)]),
        }
    }

    /// Returns the stored type.
    pub fn dtype(&self) -> DType {
        match self {
            Values::F32(_) => DType::F32,
            Values::F16(_) => DType::F16,
            Values::Bf16(_) => DType::BF16,
        }
    }

    /// Returns the values widened to f32, which is exact for every stored type.
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Values::F32(bytes) => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Values::F16(bytes) => {
                bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()
            }
            Values::Bf16(bytes) => {
                bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()
            }
        }
    }

    /// Returns the values as bf16, if they are stored so.
    pub fn bf16(&self) -> Option<Vec<bf16>> {
        match self {
            Values::Bf16(bytes) => {
                Some(bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b)).collect())
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama3/model")
    }

    #[test]
    fn names_missing_and_surplus_tensors_together() {
        let checkpoint = Checkpoint::open(&golden()).unwrap();
        let mut wanted: BTreeSet<String> = checkpoint.names().map(str::to_owned).collect();
        checkpoint.expect(&wanted, |_| false).unwrap();
        wanted.remove("model.norm.weight");
        wanted.insert("model.layers.7.x".into());
        let fault = checkpoint.expect(&wanted, |_| false).unwrap_err();
        assert!(fault.message.contains("1 missing: model.layers.7.x"), "{fault}");
        assert!(fault.message.contains("1 surplus: model.norm.weight"), "{fault}");
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let whole = std::fs::read(golden().join("model.safetensors")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        for bytes in [0, 1, 7, 8, 100, 2000, whole.len() / 2, whole.len() - 1] {
            std::fs::write(folder.path().join("model.safetensors"), &whole[..bytes]).unwrap();
            let fault = Checkpoint::open(folder.path()).unwrap_err();
            assert_eq!(fault.kind, crate::fault::Kind::Model, "{bytes}: {fault}");
        }
    }

    /// Writes tensors of one f32 each and opens them.
    fn opened(names: &[&str]) -> Result<Checkpoint> {
        let folder = tempfile::tempdir().unwrap();
        let tensors = names.iter().map(|name| {
            let zero = safetensors::tensor::TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
            (*name, zero)
        });
        std::fs::write(
            folder.path().join("model.safetensors"),
            safetensors::serialize(tensors, None).unwrap(),
        )
        .unwrap();
        Checkpoint::open(folder.path())
    }

    #[test]
    fn tensors_have_the_language_models_names() {
        let names = |saved: &[&str]| opened(saved).unwrap().names().map(str::to_owned).collect::<Vec<_>>();
        let causal = ["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.x"];
        assert_eq!(names(&causal), causal);
        assert_eq!(names(&["lm_head.weight", "embed_tokens.weight", "layers.0.x"]), causal);
        assert_eq!(
            names(&["word_embeddings.weight", "h.0.x"]),
            ["transformer.h.0.x", "transformer.word_embeddings.weight"]
        );
        let language = ["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.x"];
        let old: Vec<String> = language.iter().map(|name| format!("language_model.{name}")).collect();
        assert_eq!(names(&old.iter().map(String::as_str).collect::<Vec<_>>()), causal);
        let new =
            ["lm_head.weight", "model.language_model.embed_tokens.weight", "model.language_model.layers.0.x"];
        assert_eq!(names(&new), causal);
        let fault = opened(&["model.x", "language_model.model.x"]).unwrap_err();
        assert!(fault.message.contains("holds model.x twice"), "{fault}");
    }

    #[test]
    fn wrappers_of_training_are_no_part_of_a_name() {
        let names = |saved: &[&str]| opened(saved).unwrap().names().map(str::to_owned).collect::<Vec<_>>();
        let causal = ["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.x"];
        for prefix in ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."] {
            let saved: Vec<String> = causal.iter().map(|name| format!("{prefix}{name}")).collect();
            assert_eq!(names(&saved.iter().map(String::as_str).collect::<Vec<_>>()), causal, "{prefix}");
        }
        assert_eq!(names(&["_orig_mod.embed_tokens.weight", "layers.0._orig_mod.x"]), causal[1..]);
        let fault = opened(&["model.x", "_orig_mod.model.x"]).unwrap_err();
        assert!(fault.message.contains("holds model.x twice"), "{fault}");
    }

    #[test]
    fn a_checkpoint_with_an_adapter_in_it_is_told_as_such() {
        let checkpoint = opened(&["base_model.model.model.layers.0.q.lora_A.default.weight"]).unwrap();
        let fault = checkpoint
            .expect(&BTreeSet::from(["model.layers.0.q.weight".to_owned()]), |_| false)
            .unwrap_err();
        assert!(fault.help.unwrap().contains("merge the adapter first"));
    }

    #[test]
    fn what_stands_beside_the_language_model_is_ignored() {
        let beside = ["vision_tower.a", "model.vision_tower.a", "multi_modal_projector.b"];
        let checkpoint = opened(&[&["model.language_model.x"], &beside[..]].concat()).unwrap();
        let wanted = BTreeSet::from(["model.language_model.x".to_owned()]);
        checkpoint.expect(&wanted, |_| false).unwrap();
        assert_eq!(checkpoint.bytes(), 4);
        assert!(checkpoint.get("model.language_model.x", &[1]).is_ok());
    }

    #[test]
    fn other_forms_of_weights_are_told_from_a_missing_model() {
        let said = |name: &str| {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join(name), "").unwrap();
            Checkpoint::open(folder.path()).unwrap_err().to_string()
        };
        assert!(said("pytorch_model.bin").contains("pytorch_model.bin is a pickle"));
        assert!(said("consolidated.00.pth").contains("save it as safetensors"));
        assert!(said("model.Q4_K_M.gguf").contains("is a file for inference"));
        assert!(said("adapter_model.safetensors").contains("is an adapter"));
        assert!(said("model-00002-of-00003.safetensors").contains("without model.safetensors.index.json"));
        assert!(said("README.md").contains("a model folder holds"));
    }

    #[test]
    fn a_shard_outside_the_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let index = r#"{"weight_map": {"a": "../model.safetensors"}}"#;
        std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
        assert!(Checkpoint::open(folder.path()).unwrap_err().message.contains("is outside the folder"));
    }
}
