//! A server's options, the model's facts and its adapters -> the memory plan of serving.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::adapter::WEIGHTS_FILE;
use crate::device;
use crate::facts::config::Config;
use crate::facts::{Facts, Precision, Quantization, family, presets, quantization, shapes};
use crate::fault::{Fault, Kind, Result};
use crate::fetch;
use crate::generate::engine::CHUNK;
use crate::job;
use crate::memory::serving::{self, CacheType, Plan, Served};
use crate::memory::{Machine, Place, card};
use crate::plain;
use crate::plan::Serving;
use crate::report::Report;

/// LIMIT: of a safetensors header, by its format.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// The size that a server is to have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Size {
    /// Most sequences that run at once.
    pub sequences: usize,
    /// Most tokens of prompt and answer together; `None`: the model's, as far as it fits.
    pub context: Option<usize>,
    /// `None`: as memory allows.
    pub cache_tokens: Option<usize>,
    /// The type of keys and values in the cache.
    pub cache: CacheType,
}

/// A model that is described but not loaded.
pub struct Described {
    /// The model.
    pub facts: Facts,
    /// The storage of linear layers: the requested one, or that of the checkpoint.
    pub quantization: Quantization,
    bf16_checkpoint: bool,
}

/// Reads a model's folder.
///
/// # Errors
/// Model: config.json cannot be read, or describes no model that hone knows.
pub fn describe(plan: &Serving, folder: &Path) -> Result<Described> {
    let config = Config::read(folder)?;
    Ok(Described {
        facts: family::describe(&config)?,
        quantization: quantization::read(&config)?.unwrap_or(plan.model.quantization),
        bf16_checkpoint: job::room::bf16_checkpoint(&config)?,
    })
}

/// Divides the memory of a machine.
///
/// # Errors
/// Capacity: it does not fit. Config: a context beyond the model's.
pub fn divide(
    plan: &Serving,
    size: &Size,
    described: &Described,
    adapters: u64,
    machine: &Machine,
) -> Result<Plan> {
    let served = Served {
        facts: described.facts.clone(),
        quantization: described.quantization,
        precision: plan.model.precision,
        bf16_checkpoint: described.bf16_checkpoint,
        adapters,
        prompt_rows: 2 * CHUNK,
        sequences: size.sequences,
        context: size.context,
        cache_tokens: size.cache_tokens,
        cache: size.cache,
    };
    serving::solve(&served, machine).map_err(|mut fault| {
        if plan.memory_limit.is_some() && fault.kind == Kind::Capacity {
            let raise = "raise memory_max, which limits what may be used";
            fault.help = Some(fault.help.map_or(raise.into(), |help| format!("{raise}; {help}")));
        }
        fault
    })
}

/// Returns the number of bytes that an adapter takes when it is loaded, computed from the header of its file.
///
/// # Errors
/// Model: the file is no safetensors.
pub fn adapter_bytes(folder: &Path, place: Place, precision: Precision) -> Result<u64> {
    let file = folder.join(WEIGHTS_FILE);
    let wrong = |what: String| Fault::model(format!("{}: {what}", file.display()));
    let mut reader =
        plain::open(&file).map_err(|error| wrong(format!("cannot read: {error}")).or_machines())?;
    let mut length = [0; 8];
    reader.read_exact(&mut length).map_err(|error| wrong(format!("cannot read: {error}")).or_machines())?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX {
        return Err(wrong("not a safetensors file".into()));
    }
    let mut header = vec![0; length as usize];
    reader.read_exact(&mut header).map_err(|error| wrong(format!("cannot read: {error}")).or_machines())?;
    let header: Value =
        serde_json::from_slice(&header).map_err(|error| wrong(format!("not a safetensors file: {error}")))?;
    let values = |tensor: &Value| -> u64 {
        let shape = tensor["shape"].as_array().into_iter().flatten();
        shape.filter_map(Value::as_u64).fold(1, u64::saturating_mul)
    };
    let tensors = header.as_object().into_iter().flatten().filter(|(name, _)| *name != "__metadata__");
    // A CPU keeps everything but matrices of plain pairs in f32 (`Adapter::pairs`).
    let tensors: Vec<(&String, &Value)> = tensors.collect();
    let is_plain = tensors.iter().all(|(name, _)| name.contains(".lora_A.") || name.contains(".lora_B."));
    let bytes = if precision != Precision::F32 && (place == Place::Gpu || is_plain) { 2 } else { 4 };
    // It holds B twice (`Pairs::bytes`).
    let times = |name: &str| if place != Place::Gpu && name.contains(".lora_B.") { 2 } else { 1 };
    let values = tensors.iter().map(|(name, tensor)| values(tensor).saturating_mul(times(name)));
    Ok(values.fold(0, u64::saturating_add).saturating_mul(bytes))
}

/// Returns the plan of a server that is not started: for this machine, or for a card by its name. Nothing is fetched.
///
/// # Errors
/// Usage: no such card. Config: the model is not here, and its size is in no table. Others as [`divide`].
pub fn ahead(
    plan: &Serving,
    size: &Size,
    adapters: &[PathBuf],
    gpu: Option<&str>,
) -> Result<(Described, Machine, Plan)> {
    let folder = plan.base.folder(&plan.source.cache)?;
    let described = match folder.join("config.json").exists() {
        true => describe(plan, &folder)?,
        false => by_name(plan)?,
    };
    let machine = match gpu {
        Some(name) => card::find(name)?.0.machine(plan.memory_limit)?,
        None => Machine::of(&device::open(plan.device, &Report::silent())?, plan.memory_limit),
    };
    let bytes = adapters.iter().map(|folder| adapter_bytes(folder, machine.place, plan.model.precision));
    let bytes = bytes.sum::<Result<u64>>()?;
    let divided = divide(plan, size, &described, bytes, &machine)?;
    Ok((described, machine, divided))
}

/// Describes the model. A preset's sizes are known without its files.
fn by_name(plan: &Serving) -> Result<Described> {
    let shape = presets::find(&plan.base.name()).ok().and_then(|preset| preset.shape.as_deref());
    let missing = || {
        let what = match &plan.base {
            fetch::Model::Folder(folder) => format!("{}: there is no config.json", folder.display()),
            base => format!("{base} is not in the cache, and a plan fetches nothing"),
        };
        Fault::config(what)
            .help("name a model's folder or a preset; `hone model MODEL` fetches what describes a model")
    };
    let facts = shapes::facts(shape.ok_or_else(missing)?)?;
    Ok(Described { facts, quantization: plan.model.quantization, bf16_checkpoint: true })
}
