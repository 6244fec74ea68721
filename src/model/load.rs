//! Checkpoint + facts -> decoder: each tensor read once, quantised or kept, and let go.

use std::collections::BTreeSet;

use candle_core::{DType, Device, Tensor};

use crate::fault::{Fault, Result};
use crate::interrupt;
use crate::ops::four_bit::FourBit;
use crate::ops::matmul::Weight;
use crate::report::{Report, Stage, Unit};

use super::checkpoint::{Checkpoint, Values};
use super::decoder::Decoder;
use super::facts::{Facts, Projection};
use super::layer::Layer;
use super::linear::{Linear, Lora};
use super::lora::{self, Trainable};
use super::{Keep, Options, Precision, Quantization};

/// Loads, quantises and joins the adapter's pairs. `facts` were read from the same folder.
///
/// On a CPU activations are f32 whatever the precision of products; on a GPU they are stored in it.
pub fn load(facts: Facts, options: &Options, device: &Device, report: &Report) -> Result<Decoder> {
    let dtype = match (device, options.precision) {
        (Device::Cpu, _) | (_, Precision::F32) => DType::F32,
        (_, Precision::Bf16) => DType::BF16,
    };
    load_in(dtype, device, facts, options, report)
}

/// `load` with another type of activations: f64 for the judge of gradients.
pub(super) fn load_in(
    dtype: DType,
    device: &Device,
    facts: Facts,
    options: &Options,
    report: &Report,
) -> Result<Decoder> {
    let sites = lora::sites(&facts, &options.lora)?;
    for (written, module) in &sites.renamed {
        report.note(
            Stage::Load,
            format!("target {written} is part of {module} in this model: {module} is trained"),
        );
    }
    let checkpoint = Checkpoint::open(&options.folder)?;
    checkpoint
        .expect(&wanted(&facts), |name| ignored(&facts, name))
        .map_err(|fault| fault.at(options.folder.display()))?;
    let loader = Loader { facts: &facts, checkpoint: &checkpoint, options, dtype, device };
    let trainable = Trainable::init(sites.list, &options.lora, dtype, device)?;
    let progress = report.task(Stage::Load, Unit::Tensors, "weights", Some(facts.layers as u64));
    let mut layers = Vec::with_capacity(facts.layers);
    for layer in 0..facts.layers {
        layers.push(loader.layer(layer, &trainable)?);
        progress.advance(1);
        interrupt::check()?;
    }
    let embedding = loader.kept(facts.names.embedding, &[facts.vocab, facts.width])?;
    let head = match facts.tied_head {
        true => {
            loader.refuse_other_head()?;
            Weight::Dense(embedding.clone())
        }
        false => Weight::Dense(loader.kept(facts.names.head, &[facts.vocab, facts.width])?),
    };
    let final_norm = loader.vector(facts.names.final_norm, facts.width)?;
    Ok(Decoder {
        embedding,
        layers,
        final_norm,
        head,
        trainable,
        precision: options.precision,
        keep: vec![Keep::Everything; facts.layers],
        dtype,
        facts,
    })
}

/// Every tensor the decoder reads.
fn wanted(facts: &Facts) -> BTreeSet<String> {
    let names = &facts.names;
    let mut wanted = BTreeSet::from([names.embedding.to_owned(), names.final_norm.to_owned()]);
    if !facts.tied_head {
        wanted.insert(names.head.to_owned());
    }
    for layer in 0..facts.layers {
        for norm in [names.attention_norm, names.feed_forward_norm] {
            wanted.insert(format!("{}.{layer}.{norm}", names.layers));
        }
        for projection in facts.projections() {
            let path = facts.path(layer, projection);
            wanted.insert(format!("{path}.weight"));
            if projection.bias {
                wanted.insert(format!("{path}.bias"));
            }
        }
    }
    wanted
}

/// Old Llama checkpoints carry rope's frequencies, and tied ones sometimes the head they do not use.
fn ignored(facts: &Facts, name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq") || (facts.tied_head && name == facts.names.head)
}

struct Loader<'a> {
    facts: &'a Facts,
    checkpoint: &'a Checkpoint,
    options: &'a Options,
    dtype: DType,
    device: &'a Device,
}

impl Loader<'_> {
    fn layer(&self, layer: usize, trainable: &Trainable) -> Result<Layer> {
        let facts = self.facts;
        let norm = |name: &str| self.vector(&format!("{}.{layer}.{name}", facts.names.layers), facts.width);
        let linear = |projection: &Projection| self.linear(layer, projection, trainable);
        Ok(Layer {
            attention_norm: norm(facts.names.attention_norm)?,
            query_key_value: facts.query_key_value.iter().map(linear).collect::<Result<_>>()?,
            output: linear(&facts.output)?,
            feed_forward_norm: norm(facts.names.feed_forward_norm)?,
            gate_up: facts.gate_up.iter().map(linear).collect::<Result<_>>()?,
            down: linear(&facts.down)?,
        })
    }

    fn linear(&self, layer: usize, projection: &Projection, trainable: &Trainable) -> Result<Linear> {
        let (path, rows, cols) = (self.facts.path(layer, projection), projection.rows, projection.cols);
        let name = format!("{path}.weight");
        let weight = match self.options.quantization {
            Quantization::None => Weight::Dense(self.kept(&name, &[rows, cols])?),
            Quantization::FourBit { code, double } => {
                let values = finite(&name, self.checkpoint.get(&name, &[rows, cols])?)?;
                Weight::FourBit(FourBit::quantize(&values, rows, cols, code, double)?.to_device(self.device)?)
            }
        };
        let bias = match projection.bias {
            true => Some(self.vector(&format!("{path}.bias"), rows)?),
            false => None,
        };
        let lora = pair(&path, trainable, self.options.lora.dropout)?;
        Ok(Linear { weight, bias, lora })
    }

    /// A checkpoint may carry the tied head once more; one that differs says that config.json is wrong.
    fn refuse_other_head(&self) -> Result<()> {
        let (facts, names) = (self.facts, &self.facts.names);
        if !self.checkpoint.names().any(|name| name == names.head) {
            return Ok(());
        }
        let shape = [facts.vocab, facts.width];
        let same = self.checkpoint.get(names.head, &shape)?.bytes()
            == self.checkpoint.get(names.embedding, &shape)?.bytes();
        match same {
            true => Ok(()),
            false => Err(Fault::model(format!(
                "config.json ties the head to the embedding, but {} differs from {}",
                names.head, names.embedding
            ))
            .help("set tie_word_embeddings to false in config.json")),
        }
    }

    /// A matrix kept as stored: bf16 stays bf16, the rest takes the activations' type. On a GPU all take it.
    fn kept(&self, name: &str, shape: &[usize; 2]) -> Result<Tensor> {
        let values = self.checkpoint.get(name, shape)?;
        match values.bf16() {
            Some(values) => {
                refuse_nan(name, values.iter().map(|value| value.to_f32()))?;
                let stored = Tensor::from_vec(values, (shape[0], shape[1]), &Device::Cpu)?;
                match self.device {
                    Device::Cpu => Ok(stored),
                    device => Ok(stored.to_dtype(self.dtype)?.to_device(device)?),
                }
            }
            None => Ok(Tensor::from_vec(finite(name, values)?, (shape[0], shape[1]), &Device::Cpu)?
                .to_dtype(self.dtype)?
                .to_device(self.device)?),
        }
    }

    /// Norm weights and biases: as wide as the arithmetic, f32 even beside bf16 activations.
    fn vector(&self, name: &str, length: usize) -> Result<Tensor> {
        let values = finite(name, self.checkpoint.get(name, &[length])?)?;
        let wide = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        Ok(Tensor::from_vec(values, length, &Device::Cpu)?.to_dtype(wide)?.to_device(self.device)?)
    }
}

/// The LoRA pair of a path, if it is a site.
fn pair(path: &str, trainable: &Trainable, dropout: f64) -> Result<Option<Lora>> {
    let Some((index, site)) = trainable.sites.iter().enumerate().find(|(_, site)| site.path == path) else {
        return Ok(None);
    };
    let (a, b) = trainable.views(&trainable.compute, site)?;
    let (grad_a, grad_b) = trainable.views(&trainable.grads, site)?;
    let (a, b) = (Weight::Dense(a), Weight::Dense(b));
    Ok(Some(Lora { a, b, grad_a, grad_b, scale: site.scale, dropout, site: index as u64 }))
}

/// Widened values.
fn finite(name: &str, values: Values) -> Result<Vec<f32>> {
    let values = values.to_f32();
    refuse_nan(name, values.iter().copied())?;
    Ok(values)
}

/// A NaN or infinity would surface as a diverged loss much later.
fn refuse_nan(name: &str, values: impl Iterator<Item = f32>) -> Result<()> {
    match values.enumerate().find(|(_, value)| !value.is_finite()) {
        None => Ok(()),
        Some((at, value)) => {
            Err(Fault::model(format!("{name}: value {at} is {value}, expected finite weights"))
                .help("the checkpoint is damaged: download it again"))
        }
    }
}
