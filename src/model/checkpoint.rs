//! Safetensors of a model folder, single or sharded: every header read and checked, bytes mapped, one tensor at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use crate::fault::{Fault, Result};

const SAME_MODEL: &str =
    "config.json and the safetensors files must be of the same model: download both again";

/// The weights of a model folder.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<(PathBuf, Mmap)>,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    from: usize,
    to: usize,
}

/// One tensor's values as stored.
pub enum Values<'a> {
    F32(&'a [u8]),
    F16(&'a [u8]),
    Bf16(&'a [u8]),
}

impl Checkpoint {
    /// Opens `model.safetensors`, or `model.safetensors.index.json` with its shards.
    pub fn open(folder: &Path) -> Result<Checkpoint> {
        let mut checkpoint = Checkpoint { files: Vec::new(), tensors: BTreeMap::new() };
        // The single file first, as transformers does: an index beside it is a leftover.
        let (file, index) = (folder.join("model.safetensors"), folder.join("model.safetensors.index.json"));
        if file.exists() {
            checkpoint.add(file)?;
            return Ok(checkpoint);
        }
        if !index.exists() {
            return Err(Fault::model(format!("no model.safetensors in {}", folder.display())).help(
                "pytorch_model.bin is not read: save the model with save_pretrained(safe_serialization=True)",
            ));
        }
        let map = read_index(&index)?;
        for shard in map.values().collect::<BTreeSet<_>>() {
            // A shard's name comes from a file of the model: it must stay in the folder.
            if Path::new(shard).components().count() != 1 || shard.contains(['/', '\\']) || shard == ".." {
                return Err(Fault::model(format!("{}: shard {shard:?} leaves the folder", index.display())));
            }
            checkpoint.add(folder.join(shard))?;
        }
        match map.keys().find(|name| !checkpoint.tensors.contains_key(*name)) {
            Some(name) => Err(Fault::model(format!("{}: {name} is not in {}", index.display(), map[name]))),
            None => Ok(checkpoint),
        }
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let damaged = |what: String| Fault::model(format!("{}: {what}", path.display()));
        let file = File::open(&path).map_err(|error| damaged(format!("cannot open: {error}")))?;
        // SAFETY: the mapping is read-only, and a model folder is not written while it is used; a file cut short
        // meanwhile would end the process with SIGBUS, as any mapped read would.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| damaged(format!("cannot map: {error}")))?;
        let (header_bytes, metadata) = SafeTensors::read_metadata(&map).map_err(|error| {
            damaged(format!("not a whole safetensors file: {error}")).help("download it again")
        })?;
        let data = header_bytes + 8;
        for (name, info) in metadata.tensors() {
            let (from, to) = (data + info.data_offsets.0, data + info.data_offsets.1);
            let entry =
                Entry { file: self.files.len(), dtype: info.dtype, shape: info.shape.clone(), from, to };
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

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Values of a tensor whose shape must be `shape`.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Values<'_>> {
        let entry =
            self.tensors.get(name).ok_or_else(|| Fault::model(format!("the checkpoint has no {name}")))?;
        let (path, map) = &self.files[entry.file];
        let wrong = |what: String| Fault::model(format!("{}: {name}: {what}", path.display()));
        if entry.shape != shape {
            return Err(wrong(format!("found shape {:?}, expected {shape:?} by config.json", entry.shape))
                .help(SAME_MODEL));
        }
        let bytes = &map[entry.from..entry.to];
        match entry.dtype {
            Dtype::F32 => Ok(Values::F32(bytes)),
            Dtype::F16 => Ok(Values::F16(bytes)),
            Dtype::BF16 => Ok(Values::Bf16(bytes)),
            other => Err(wrong(format!("found type {other:?}, expected F32, F16 or BF16"))),
        }
    }

    /// Compares the names with what the decoder reads; names every missing and every surplus tensor at once.
    pub fn expect(&self, wanted: &BTreeSet<String>, ignored: impl Fn(&str) -> bool) -> Result<()> {
        let found: BTreeSet<&str> = self.names().collect();
        let missing: Vec<&str> =
            wanted.iter().map(String::as_str).filter(|name| !found.contains(name)).collect();
        let surplus: Vec<&str> =
            found.into_iter().filter(|name| !wanted.contains(*name) && !ignored(name)).collect();
        if missing.is_empty() && surplus.is_empty() {
            return Ok(());
        }
        let list = |names: &[&str]| match names.len() {
            0..=4 => names.join(", "),
            more => format!("{} and {} more", names[..4].join(", "), more - 4),
        };
        let mut parts = Vec::new();
        if !missing.is_empty() {
            parts.push(format!("{} missing: {}", missing.len(), list(&missing)));
        }
        if !surplus.is_empty() {
            parts.push(format!("{} surplus: {}", surplus.len(), list(&surplus)));
        }
        Err(Fault::model(format!("the checkpoint does not fit config.json; tensors {}", parts.join("; ")))
            .help(SAME_MODEL))
    }
}

fn read_index(file: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let wrong = |error: String| Fault::model(format!("{}: {error}", file.display()));
    let text = std::fs::read(file).map_err(|error| wrong(error.to_string()))?;
    let index: Index = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    Ok(index.weight_map)
}

impl<'a> Values<'a> {
    /// As stored.
    pub fn bytes(&self) -> &'a [u8] {
        match self {
            Values::F32(bytes) | Values::F16(bytes) | Values::Bf16(bytes) => bytes,
        }
    }

    /// Widened to f32, exact for every stored type.
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

    /// As bf16, if stored so.
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

    #[test]
    fn a_shard_outside_the_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let index = r#"{"weight_map": {"a": "../model.safetensors"}}"#;
        std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
        assert!(Checkpoint::open(folder.path()).unwrap_err().message.contains("leaves the folder"));
    }
}
