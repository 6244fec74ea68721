//! The merged model -> a model folder as the hub has it: sharded safetensors with an index, config.json, tokenizer,
//! chat template, generation_config.json. transformers and vLLM load it.

use std::path::Path;

use safetensors::Dtype;
use serde_json::{Map, Value as Json, json};

use super::Stored;
use super::folder::{Folder, Writer};
use super::merged::{Item, Merged};
use crate::fault::{Fault, Result};
use crate::interrupt;
use crate::plain;
use crate::report::{Report, Stage, Unit};

/// LIMIT: a file of a model's folder beside its weights.
const FILE_BYTES_MAX: u64 = 512 << 20;
/// Endings of weights in any form, which are not copied.
const WEIGHTS: [&str; 12] = [
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".onnx",
];
/// Files that hone writes itself, or that describe the base alone.
const NOT_COPIED: [&str; 4] = ["config.json", "generation_config.json", "README.md", "hone.json"];

/// The files that are written beside the weights.
pub struct Beside<'a> {
    /// The base's folder.
    pub from: &'a Path,
    /// The template of the training, if it is not the model's own.
    pub chat_template: Option<&'a str>,
    /// Tokens that end an answer.
    pub stop_tokens: &'a [u32],
    /// README.md.
    pub card: &'a str,
}

/// A tensor with its place.
struct Planned {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: usize,
    from: From,
}

enum From {
    Merged(Item),
    /// As it lies in the checkpoint, by its name there.
    Beside(String),
}

/// Returns the number of bytes of all tensors in this type.
pub fn bytes(merged: &Merged, stored: Stored) -> u64 {
    planned(merged, stored).iter().map(|tensor| tensor.bytes as u64).sum()
}

/// Writes the weights, `shard_bytes` a file at most unless one tensor is larger.
pub fn write_weights(
    merged: &Merged,
    stored: Stored,
    shard_bytes: u64,
    folder: &Folder,
    report: &Report,
) -> Result<()> {
    let shards = shards(planned(merged, stored), shard_bytes);
    let count = shards.len();
    let tensors = shards.iter().map(Vec::len).sum::<usize>();
    let progress = report.task(Stage::Load, Unit::Tensors, "merged weights", Some(tensors as u64));
    let (mut map, mut total) = (Map::new(), 0);
    for (number, shard) in shards.iter().enumerate() {
        let name = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let mut file = folder.create(&name)?;
        file.write(&header(shard))?;
        for tensor in shard {
            write_tensor(merged, tensor, stored, &mut file)?;
            map.insert(tensor.name.clone(), name.clone().into());
            total += tensor.bytes as u64;
            progress.advance(1);
            interrupt::check()?;
        }
        file.finish()?;
    }
    if count > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": map});
        folder.write("model.safetensors.index.json", &pretty(&index))?;
    }
    Ok(())
}

fn planned(merged: &Merged, stored: Stored) -> Vec<Planned> {
    let dtype = match stored {
        Stored::F32 => "F32",
        Stored::F16 => "F16",
        Stored::Bf16 | Stored::Q8 => "BF16",
    };
    let of_language = merged.items().into_iter().map(|item| Planned {
        name: merged.checkpoint.stored_name(&item.name),
        dtype,
        bytes: stored.bytes(item.values()),
        shape: item.shape.clone(),
        from: From::Merged(item),
    });
    let beside = merged.beside().into_iter().filter_map(|name| {
        let raw = merged.checkpoint.raw(&name)?;
        let is_float = matches!(raw.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        let values = raw.shape.iter().product();
        Some(Planned {
            name: merged.checkpoint.stored_name(&name),
            dtype: if is_float { dtype } else { integer(raw.dtype)? },
            bytes: if is_float { stored.bytes(values) } else { raw.bytes.len() },
            shape: raw.shape.to_vec(),
            from: From::Beside(name),
        })
    });
    of_language.chain(beside).collect()
}

fn integer(dtype: Dtype) -> Option<&'static str> {
    match dtype {
        Dtype::I64 => Some("I64"),
        Dtype::I32 => Some("I32"),
        Dtype::U8 => Some("U8"),
        Dtype::BOOL => Some("BOOL"),
        _ => None,
    }
}

/// Divides the tensors, in order, into files. A new file begins if the next tensor would not fit.
fn shards(tensors: Vec<Planned>, shard_bytes: u64) -> Vec<Vec<Planned>> {
    let mut shards: Vec<Vec<Planned>> = vec![Vec::new()];
    let mut held = 0;
    for tensor in tensors {
        if held > 0 && held + tensor.bytes as u64 > shard_bytes {
            shards.push(Vec::new());
            held = 0;
        }
        held += tensor.bytes as u64;
        shards.last_mut().expect("never empty").push(tensor);
    }
    shards
}

/// Returns the length and JSON, filled with blanks so that the tensors begin at a multiple of eight bytes.
fn header(shard: &[Planned]) -> Vec<u8> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut at = 0;
    for tensor in shard {
        let offsets = [at, at + tensor.bytes];
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets});
        header.insert(tensor.name.clone(), entry);
        at += tensor.bytes;
    }
    let mut text = serde_json::to_vec(&Json::Object(header)).expect("texts and numbers");
    text.resize(text.len().next_multiple_of(8), b' ');
    [&(text.len() as u64).to_le_bytes(), text.as_slice()].concat()
}

fn write_tensor(merged: &Merged, tensor: &Planned, stored: Stored, file: &mut Writer) -> Result<()> {
    let before = file.bytes();
    match &tensor.from {
        From::Merged(item) => {
            merged.each_block(item, |values| file.write(&stored.encode(&tensor.name, values)?))?
        }
        From::Beside(name) => {
            let raw = merged.checkpoint.raw(name).expect("it was planned");
            match raw.dtype {
                Dtype::F32 | Dtype::F16 | Dtype::BF16 => {
                    let values = merged.checkpoint.get(name, raw.shape)?.to_f32();
                    file.write(&stored.encode(name, &values)?)?;
                }
                _ => file.write(raw.bytes)?,
            }
        }
    }
    match file.bytes() - before == tensor.bytes as u64 {
        true => Ok(()),
        false => Err(Fault::internal(format!("{}: another number of bytes than planned", tensor.name))),
    }
}

/// Copies the model's small files, and writes those that the merge changes.
pub fn write_beside(beside: &Beside, stored: Stored, folder: &Folder) -> Result<()> {
    copy(beside.from, folder.work(), beside.chat_template.is_some())?;
    let mut config = object(beside.from, "config.json")?.unwrap_or_default();
    in_type(&mut config, stored);
    folder.write("config.json", &pretty(&Json::Object(config)))?;
    if let Some(generation) = generation(beside)? {
        folder.write("generation_config.json", &pretty(&Json::Object(generation)))?;
    }
    if let Some(template) = beside.chat_template {
        folder.write("chat_template.jinja", template.as_bytes())?;
    }
    folder.write("README.md", beside.card.as_bytes())
}

/// Writes the type into the configuration. The merged weights are not quantised, and have one type.
fn in_type(config: &mut Map<String, Json>, stored: Stored) {
    let name = match stored {
        Stored::F32 => "float32",
        Stored::F16 => "float16",
        Stored::Bf16 | Stored::Q8 => "bfloat16",
    };
    config.remove("quantization_config");
    let newer = config.contains_key("dtype");
    for key in ["dtype", "torch_dtype"] {
        if config.contains_key(key) || (key == "torch_dtype" && !newer) {
            config.insert(key.into(), name.into());
        }
    }
    for part in ["text_config", "vision_config"] {
        if let Some(Json::Object(part)) = config.get_mut(part) {
            part.remove("quantization_config");
            for key in ["dtype", "torch_dtype"] {
                if part.contains_key(key) {
                    part.insert(key.into(), name.into());
                }
            }
        }
    }
}

/// Returns the model's own, with every token that ends an answer: training teaches the end of the turn, which some
/// models do not name there.
fn generation(beside: &Beside) -> Result<Option<Map<String, Json>>> {
    let found = object(beside.from, "generation_config.json")?;
    let config = object(beside.from, "config.json")?.unwrap_or_default();
    let named = found.as_ref().and_then(|own| own.get("eos_token_id")).or(config.get("eos_token_id"));
    let mut ends: Vec<u64> = match named {
        Some(Json::Array(ids)) => ids.iter().filter_map(Json::as_u64).collect(),
        Some(id) => id.as_u64().into_iter().collect(),
        None => Vec::new(),
    };
    let missing: Vec<u64> =
        beside.stop_tokens.iter().map(|id| u64::from(*id)).filter(|id| !ends.contains(id)).collect();
    if missing.is_empty() {
        return Ok(found);
    }
    ends.extend(missing);
    let mut generation = found.unwrap_or_default();
    let ends = if let [only] = ends.as_slice() { json!(only) } else { json!(ends) };
    generation.insert("eos_token_id".into(), ends);
    Ok(Some(generation))
}

fn object(folder: &Path, name: &str) -> Result<Option<Map<String, Json>>> {
    let file = folder.join(name);
    match plain::small(&file) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| Fault::model(format!("{}: not a JSON object: {error}", file.display()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Fault::storage("read", &file, &error)),
    }
}

/// Copies plain files and the folder of further chat templates. Links are followed, since the hub's cache has them.
fn copy(from: &Path, to: &Path, with_template: bool) -> Result<()> {
    let entries = std::fs::read_dir(from).map_err(|error| Fault::storage("read", from, &error))?;
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let left_out = name.starts_with('.')
            || NOT_COPIED.contains(&name.as_str())
            || WEIGHTS.iter().any(|end| name.ends_with(end))
            || (with_template && name.starts_with("chat_template."));
        let data = std::fs::metadata(&path).map_err(|error| Fault::storage("read", &path, &error))?;
        let place = to.join(&name);
        if !left_out && data.is_file() && data.len() <= FILE_BYTES_MAX {
            std::fs::copy(&path, &place).map_err(|error| Fault::storage("copy", &path, &error))?;
        }
        if data.is_dir() && name == "additional_chat_templates" {
            std::fs::create_dir_all(&place).map_err(|error| Fault::storage("create", &place, &error))?;
            copy(&path, &place, false)?;
        }
    }
    Ok(())
}

fn pretty(value: &Json) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).expect("texts and numbers");
    text.push(b'\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_config_says_what_the_weights_are() {
        let mut config = json!({
            "torch_dtype": "float32", "quantization_config": {"quant_method": "bitsandbytes"},
            "text_config": {"dtype": "float32", "quantization_config": {}},
        });
        in_type(config.as_object_mut().unwrap(), Stored::F16);
        assert_eq!(config, json!({"torch_dtype": "float16", "text_config": {"dtype": "float16"}}));
        let mut config = json!({"dtype": "float32"});
        in_type(config.as_object_mut().unwrap(), Stored::Bf16);
        assert_eq!(config, json!({"dtype": "bfloat16"}));
    }

    #[test]
    fn every_token_that_ends_an_answer_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let beside = Beside { from: folder.path(), chat_template: None, stop_tokens: &[2, 7], card: "" };
        std::fs::write(folder.path().join("config.json"), r#"{"eos_token_id": 2}"#).unwrap();
        assert_eq!(json!(generation(&beside).unwrap()), json!({"eos_token_id": [2, 7]}));
        std::fs::write(
            folder.path().join("generation_config.json"),
            r#"{"top_p": 0.5, "eos_token_id": [7]}"#,
        )
        .unwrap();
        assert_eq!(json!(generation(&beside).unwrap()), json!({"top_p": 0.5, "eos_token_id": [7, 2]}));
        let beside = Beside { stop_tokens: &[7], ..beside };
        assert_eq!(json!(generation(&beside).unwrap()), json!({"top_p": 0.5, "eos_token_id": [7]}));
    }

    #[test]
    fn a_file_holds_no_more_than_its_share_unless_one_tensor_does() {
        let tensor = |bytes| Planned {
            name: String::new(),
            dtype: "F32",
            shape: Vec::new(),
            bytes,
            from: From::Beside(String::new()),
        };
        let sizes = |list: &[usize], most| {
            let shards = shards(list.iter().map(|bytes| tensor(*bytes)).collect(), most);
            shards.iter().map(|shard| shard.iter().map(|t| t.bytes).collect::<Vec<_>>()).collect::<Vec<_>>()
        };
        assert_eq!(sizes(&[3, 3, 3], 6), [vec![3, 3], vec![3]]);
        assert_eq!(sizes(&[9, 1, 1], 6), [vec![9], vec![1, 1]]);
        assert_eq!(sizes(&[1, 1], 6), [vec![1, 1]]);
    }
}
