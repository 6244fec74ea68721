//! The merged model, or an adapter alone -> one GGUF file, as llama.cpp and its relatives load it; and the file -> its
//! tensors again.
//!
//! Sources: ggml's `docs/gguf.md` (the format), llama.cpp's model loaders and converters (keys, names and orders by
//! architecture). A form that llama.cpp computes in another way than the model is refused or reported.

pub mod file;
pub mod architecture;
mod dividing;
pub mod vocabulary;
pub mod store;

use std::path::Path;

use self::architecture::{Architecture, Entry, Order};
use self::file::{Kind, Tensor, Value};
use super::Stored;
use super::folder::{Folder, Writer};
use super::merged::{Item, Merged};
use crate::facts::Facts;
use crate::fault::{Fault, Result};
use crate::interrupt;
use crate::model::lora::{Pair, Pairs};
use crate::ops::cpu;
use crate::ops::matmul::Weight;
use crate::report::{Report, Stage, Unit};

/// Returns the mark of a file of this type (`general.file_type`).
fn file_type(stored: Stored) -> u32 {
    match stored {
        Stored::F32 => 0,
        Stored::F16 => 1,
        Stored::Q8 => 7,
        Stored::Bf16 => 32,
    }
}

/// Everything of a whole model's file but its bytes.
pub struct Planned {
    /// Tensors of the model, each with its place in the file and its type.
    pub entries: Vec<(Entry, Item, Kind)>,
    extra: Vec<(Tensor, Vec<f32>)>,
    /// Keys and values.
    pub metadata: Vec<(String, Value)>,
}

impl Planned {
    /// Returns the number of bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.entries.iter().map(|(_, item, kind)| kind.bytes(item.values()) as u64).sum()
    }
}

/// Returns the content of the file to be written.
///
/// # Errors
/// Model: a family or a form of it that llama.cpp does not load.
pub fn plan(
    merged: &Merged,
    architecture: &Architecture,
    tokenizer: Vec<(String, Value)>,
    stored: Stored,
    name: &str,
) -> Result<Planned> {
    let items = merged.items();
    let mut entries = Vec::new();
    for item in items {
        let entry = architecture.entry(merged.facts, &item.name)?;
        let kind = Kind::of(&item.shape, stored);
        if architecture.copies_tied_head && merged.facts.tied_head && entry.name == architecture::EMBEDDING {
            let head = Entry { name: architecture::HEAD.into(), ..entry.clone() };
            entries.push((head, item.clone(), kind));
        }
        entries.push((entry, item, kind));
    }
    let mut metadata = vec![
        ("general.architecture".to_owned(), Value::Text(architecture.name.into())),
        ("general.type".into(), Value::Text("model".into())),
        ("general.name".into(), Value::Text(name.into())),
        ("general.file_type".into(), Value::U32(file_type(stored))),
        ("general.quantization_version".into(), Value::U32(2)),
    ];
    metadata.extend(architecture.keys(merged.facts));
    metadata.extend(tokenizer);
    let extra = architecture.factors(merged.facts).into_iter().map(|(name, values)| {
        (Tensor { name: name.into(), shape: vec![values.len()], kind: Kind::F32 }, values)
    });
    Ok(Planned { entries, extra: extra.collect(), metadata })
}

/// Writes the file.
pub fn write(
    merged: &Merged,
    planned: &Planned,
    file_name: &str,
    folder: &Folder,
    report: &Report,
) -> Result<()> {
    let tensor = |(entry, item, kind): &(Entry, Item, Kind)| Tensor {
        name: entry.name.clone(),
        shape: item.shape.clone(),
        kind: *kind,
    };
    let of_model = planned.entries.iter().map(tensor);
    let tensors: Vec<Tensor> =
        planned.extra.iter().map(|(tensor, _)| tensor.clone()).chain(of_model).collect();
    let progress = report.task(Stage::Load, Unit::Tensors, "merged weights", Some(tensors.len() as u64));
    let mut file = folder.create(file_name)?;
    file.write(&file::header(&planned.metadata, &tensors))?;
    for (tensor, values) in &planned.extra {
        file.write(&Stored::F32.encode(&tensor.name, values)?)?;
        align(&mut file)?;
        progress.advance(1);
    }
    for (entry, item, kind) in &planned.entries {
        write_tensor(merged, entry, item, *kind, &mut file)?;
        align(&mut file)?;
        progress.advance(1);
        interrupt::check()?;
    }
    file.finish()
}

fn align(file: &mut Writer) -> Result<()> {
    let missing = file.bytes().next_multiple_of(file::ALIGNMENT) - file.bytes();
    file.write(&vec![0; missing as usize])
}

fn write_tensor(merged: &Merged, entry: &Entry, item: &Item, kind: Kind, file: &mut Writer) -> Result<()> {
    let stored = kind.stored();
    let changed = |values: &[f32]| match entry.plus {
        0.0 => stored.encode(&entry.name, values),
        plus => stored.encode(&entry.name, &values.iter().map(|v| v + plus).collect::<Vec<_>>()),
    };
    match &entry.order {
        Order::Same => merged.each_block(item, |values| file.write(&changed(values)?)),
        order => {
            // Rows change places within the whole tensor; only attention's projections do.
            let mut values = Vec::with_capacity(item.values());
            merged.each_block(item, |block| {
                values.extend_from_slice(block);
                Ok(())
            })?;
            let cols = item.values() / item.shape[0];
            file.write(&changed(&order.apply(&values, cols))?)
        }
    }
}

/// Writes adapters alone: their sum as one pair for each linear layer, ranks side by side.
///
/// `alpha` is the value in the file. llama.cpp scales each pair by alpha / rank; B is scaled to compensate, so that
/// rsLoRA and patterns give the right result.
pub fn write_adapter(
    facts: &Facts,
    architecture: &Architecture,
    parts: &[(&Pairs, f64)],
    alpha: f64,
    stored: Stored,
    (file_name, name): (&str, &str),
    folder: &Folder,
) -> Result<()> {
    refuse_other_forms(parts)?;
    let mut tensors = Vec::new();
    for (linear, (layer, projection)) in facts.projections().enumerate() {
        let used = parts.iter().filter(|(_, strength)| *strength != 0.0);
        let found: Vec<(&Pair, f64)> =
            used.filter_map(|(pairs, strength)| Some((pairs.get(linear)?, *strength))).collect();
        if found.is_empty() {
            continue;
        }
        let entry = architecture.entry(facts, &format!("{}.weight", facts.path(layer, projection)))?;
        let rank: usize = found.iter().map(|(pair, _)| pair.a.dims().0).sum();
        let (rows, cols) = (projection.rows, projection.cols);
        let (mut a, mut b) = (Vec::with_capacity(rank * cols), vec![0f32; rows * rank]);
        let mut at = 0;
        for (pair, strength) in found {
            let own = pair.a.dims().0;
            let factor = strength * pair.scale * rank as f64 / alpha;
            a.extend(values(&pair.a)?.into_iter().map(|value| value as f32));
            for (row, of_row) in values(&pair.b)?.chunks(own).enumerate() {
                let place = &mut b[row * rank + at..][..own];
                place.iter_mut().zip(of_row).for_each(|(to, from)| *to = (from * factor) as f32);
            }
            at += own;
        }
        let b = entry.order.apply(&b, rank);
        for (letter, shape, values) in [("a", vec![rank, cols], a), ("b", vec![rows, rank], b)] {
            let name = format!("{}.lora_{letter}", entry.name);
            tensors.push((Tensor { name, shape, kind: Kind::plain(stored) }, values));
        }
    }
    let metadata = vec![
        ("general.architecture".to_owned(), Value::Text(architecture.name.into())),
        ("general.type".into(), Value::Text("adapter".into())),
        ("general.name".into(), Value::Text(name.into())),
        ("general.file_type".into(), Value::U32(file_type(stored))),
        ("general.quantization_version".into(), Value::U32(2)),
        ("adapter.type".into(), Value::Text("lora".into())),
        ("adapter.lora.alpha".into(), Value::F32(alpha as f32)),
    ];
    let heads: Vec<Tensor> = tensors.iter().map(|(tensor, _)| tensor.clone()).collect();
    folder.require(heads.iter().map(|tensor| tensor.bytes() as u64).sum())?;
    let mut file = folder.create(file_name)?;
    file.write(&file::header(&metadata, &heads))?;
    for (tensor, values) in &tensors {
        file.write(&tensor.kind.stored().encode(&tensor.name, values)?)?;
        align(&mut file)?;
    }
    file.finish()
}

/// Refuses adapters that are more than pairs.
fn refuse_other_forms(parts: &[(&Pairs, f64)]) -> Result<()> {
    if parts.iter().any(|(pairs, _)| pairs.has_magnitudes()) {
        return Err(Fault::config("a GGUF LoRA has no place for DoRA's magnitudes (use_dora)")
            .help("merge the adapter into its base: leave --adapter-only away"));
    }
    if parts.iter().any(|(pairs, _)| !pairs.tokens().is_empty()) {
        return Err(Fault::config(
            "a GGUF LoRA has no place for trained rows of tokens (trainable_token_indices)",
        )
        .help("merge the adapter into its base: leave --adapter-only away"));
    }
    Ok(())
}

fn values(weight: &Weight) -> Result<Vec<f64>> {
    match weight {
        Weight::Dense(tensor) => Ok(cpu::to_f64(tensor)?),
        Weight::FourBit(_) => Err(Fault::internal("an adapter's matrix in 4 bits")),
    }
}

/// Returns the tokenizer's keys and the template, as `vocabulary` reads them from a model's folder.
pub fn tokenizer(
    folder: &Path,
    rows: usize,
    of_model: &vocabulary::OfModel,
) -> Result<vocabulary::Vocabulary> {
    vocabulary::read(folder, rows, of_model)
}
