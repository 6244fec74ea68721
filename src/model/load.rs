//! Checkpoint and facts -> a frozen decoder. Each tensor is read once, quantised or kept, and freed.

use std::cell::Cell;
use std::collections::BTreeSet;

use candle_core::{DType, Device, Tensor};

use crate::facts::quantization::Code;
use crate::facts::{self, Facts, NormForm, Precision, Projection, Quantization};
use crate::fault::{Fault, Result};
use crate::interrupt;
use crate::ops::attention;
use crate::ops::cross_entropy::Head;
use crate::ops::four_bit::FourBit;
use crate::ops::matmul::Weight;
use crate::report::{Report, Stage, Unit};

use super::decoder::Decoder;
use super::feed_forward::{Dense, FeedForward, Form};
use super::fingerprint::{Fingerprint, Part};
use super::handover;
use super::layer::Layer;
use super::linear::Linear;
use super::norm::{HeadNorm, Norm};
use super::random;
use super::residency::{self, Builder, Home};
use super::self_attention::SelfAttention;
use super::weights::{Checkpoint, Values};
use super::{Options, stored};

/// Loads and quantises the base. `facts` were read from the same folder. A checkpoint that does not fit them, and
/// values that are not finite, are model faults.
///
/// On a CPU, activations are always f32; on a GPU they are stored in that precision.
pub fn load(facts: Facts, options: &Options, device: &Device, report: &Report) -> Result<Decoder> {
    load_at(&Home::Device, facts, options, device, report)
}

/// Does `load` with the 4-bit weights of the layers at `home`. Each layer is moved there when it is loaded. So the
/// device never holds more than one whole layer beside the tensors that stay on it, and two buffers of that size while
/// ranks that share the base hand out its pieces.
pub fn load_at(
    home: &Home,
    facts: Facts,
    options: &Options,
    device: &Device,
    report: &Report,
) -> Result<Decoder> {
    load_in(activation_type(device, options.precision), home, device, facts, options, report)
}

/// Does `load_at` on one of several ranks. Returns a fingerprint of the tensors that it read too, for comparing the
/// ranks' weights. It calls `progressed` before each layer.
pub fn load_compared(
    home: &Home,
    facts: Facts,
    options: &Options,
    device: &Device,
    report: &Report,
    progressed: &dyn Fn(),
) -> Result<(Decoder, Fingerprint)> {
    let checkpoint = Checkpoint::open(&options.folder)?;
    fits(&facts, &checkpoint).map_err(|fault| fault.at(options.folder.display()))?;
    let dtype = activation_type(device, options.precision);
    let loader =
        Loader { facts: &facts, checkpoint: &checkpoint, options, dtype, home, device, drawn: false };
    let mut fingerprint = Fingerprint::default();
    let decoder = loader.decoder_by(report, &mut |layer| {
        progressed();
        let prefix = facts.inside(layer, "");
        let part = Part { name: format!("layer {layer}"), prefix: &prefix, without: None };
        fingerprint.add(&checkpoint, &part, home.reads(layer));
    })?;
    let layers = format!("{}.", facts.names.layers);
    let rest = Part { name: "what is outside the layers".into(), prefix: "", without: Some(&layers) };
    fingerprint.add(&checkpoint, &rest, true);
    Ok((decoder, fingerprint))
}

/// Returns a decoder of these facts with a random base, made tensor by tensor in the form that it is kept in. For
/// benchmarks.
pub fn random(
    home: &Home,
    facts: Facts,
    options: &Options,
    device: &Device,
    report: &Report,
) -> Result<Decoder> {
    let dtype = activation_type(device, options.precision);
    let checkpoint = Checkpoint::empty();
    let loader = Loader { facts: &facts, checkpoint: &checkpoint, options, dtype, home, device, drawn: true };
    loader.decoder(report)
}

/// Returns the type that activations are stored in.
pub fn activation_type(device: &Device, precision: Precision) -> DType {
    match (device, precision) {
        (Device::Cpu, _) | (_, Precision::F32) => DType::F32,
        (_, Precision::Bf16 | Precision::Fp8) => DType::BF16,
    }
}

/// Does `load` with another type of activations: f64 in tests of gradients.
pub(super) fn load_in(
    dtype: DType,
    home: &Home,
    device: &Device,
    facts: Facts,
    options: &Options,
    report: &Report,
) -> Result<Decoder> {
    let checkpoint = Checkpoint::open(&options.folder)?;
    fits(&facts, &checkpoint).map_err(|fault| fault.at(options.folder.display()))?;
    let loader =
        Loader { facts: &facts, checkpoint: &checkpoint, options, dtype, home, device, drawn: false };
    loader.decoder(report)
}

/// Does `load` from tensors that are already open.
///
/// # Errors
/// Model: the tensors are not those of the facts.
pub fn load_from(
    checkpoint: &Checkpoint,
    facts: Facts,
    options: &Options,
    device: &Device,
    report: &Report,
) -> Result<Decoder> {
    fits(&facts, checkpoint)?;
    let dtype = activation_type(device, options.precision);
    let home = &Home::Device;
    let loader = Loader { facts: &facts, checkpoint, options, dtype, home, device, drawn: false };
    loader.decoder(report)
}

/// Checks that the checkpoint holds every tensor that the decoder reads, and no other.
pub fn fits(facts: &Facts, checkpoint: &Checkpoint) -> Result<()> {
    checkpoint.expect(&wanted(facts), |name| ignored(facts, name) || stored::is_part(name))
}

fn wanted(facts: &Facts) -> BTreeSet<String> {
    facts.tensors().into_iter().map(|tensor| tensor.name).collect()
}

/// Returns whether a tensor may be there although the decoder does not read it: old Llama checkpoints hold rope's
/// frequencies, and some with a tied head repeat it.
fn ignored(facts: &Facts, name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq") || (facts.tied_head && name == head_weight(facts))
}

fn head_weight(facts: &Facts) -> String {
    format!("{}.weight", facts.names.head)
}

struct Loader<'a> {
    facts: &'a Facts,
    checkpoint: &'a Checkpoint,
    options: &'a Options,
    dtype: DType,
    home: &'a Home,
    device: &'a Device,
    /// Whether values are random because the checkpoint holds none.
    drawn: bool,
}

impl Loader<'_> {
    fn decoder(&self, report: &Report) -> Result<Decoder> {
        self.decoder_by(report, &mut |_| ())
    }

    /// Loads the model, and calls `before` with each layer before it is loaded.
    fn decoder_by(&self, report: &Report, before: &mut dyn FnMut(usize)) -> Result<Decoder> {
        let facts = self.facts;
        if let Some(warning) = attention::prepare(self.device, facts.heads(), self.dtype) {
            report.warn(Stage::Load, warning);
        }
        let progress = report.task(Stage::Load, Unit::Tensors, "weights", Some(facts.layers.len() as u64));
        let mut layers = Vec::with_capacity(facts.layers.len());
        let mut away = Builder::new(self.home, self.device);
        let mut site = 0;
        for layer in 0..facts.layers.len() {
            before(layer);
            layers.push(self.layer(layer, site)?);
            site += facts.layers[layer].projections().count();
            // Ranks that share the base read a layer each, and then hand out the pieces.
            let (group, last) = (self.home.pieces(), layer + 1 == facts.layers.len());
            if let Some(away) = away.as_mut().filter(|_| last || (layer + 1) % group == 0) {
                away.take(&mut layers[layer / group * group..])?;
            }
            progress.advance(1);
            interrupt::check()?;
        }
        let ring = away.map(|away| away.finish(&mut layers)).transpose()?;
        let stays = ring.is_some() && residency::embedding_stays_on_host(facts);
        let place = if stays { Device::Cpu } else { self.device.clone() };
        let embedding = self.kept(facts.names.embedding, &[facts.vocab, facts.width], &place)?;
        let head = self.head(&embedding)?;
        let final_norm = self.norm(facts.names.final_norm)?;
        Ok(Decoder {
            embedding,
            layers,
            final_norm,
            head,
            precision: self.options.precision.beside(),
            frozen: self.options.precision,
            dtype: self.dtype,
            device: self.device.clone(),
            facts: facts.clone(),
            ring,
            inputs: Default::default(),
        })
    }

    /// Builds layer `layer`, whose linear layers are numbered from `site` on.
    fn layer(&self, layer: usize, site: usize) -> Result<Layer> {
        let (facts, names) = (self.facts, &self.facts.names);
        let norm = |name: Option<&str>| name.map(|name| self.norm(&facts.inside(layer, name))).transpose();
        let sites = Cell::new(site);
        let linear =
            |projection: &Projection| self.linear(layer, projection, 1.0, sites.replace(sites.get() + 1));
        let residual = |projection: &Projection| {
            self.linear(layer, projection, facts.residual_scale, sites.replace(sites.get() + 1))
        };
        let attention = &facts.layers[layer].attention;
        let attention = SelfAttention {
            heads: attention.heads,
            rope: attention.rope,
            norm: norm(names.attention_norm)?,
            query_key_value: attention.query_key_value.iter().map(linear).collect::<Result<_>>()?,
            head_norm: self.head_norm(layer)?,
            output: residual(&attention.output)?,
            post_norm: norm(names.attention_post_norm)?,
        };
        let facts::FeedForward::Dense(dense) = &facts.layers[layer].feed_forward;
        let dense = Dense {
            gate_up: dense.gate_up.iter().map(linear).collect::<Result<_>>()?,
            activation: dense.activation,
            down: residual(&dense.down)?,
        };
        let feed_forward = FeedForward {
            norm: norm(names.feed_forward_norm)?,
            form: Form::Dense(dense),
            post_norm: norm(names.feed_forward_post_norm)?,
        };
        Ok(Layer { attention, feed_forward, parallel: facts.parallel })
    }

    fn norm(&self, path: &str) -> Result<Norm> {
        let (width, eps) = (self.facts.width, self.facts.norm.eps);
        let weight = self.norm_weight(path, width)?;
        match self.facts.norm.form {
            NormForm::Layer => {
                Ok(Norm::Layer { weight, bias: self.vector(&format!("{path}.bias"), width)?, eps })
            }
            NormForm::Rms | NormForm::RmsPlusOne => Ok(Norm::Rms { weight, eps }),
        }
    }

    fn head_norm(&self, layer: usize) -> Result<Option<HeadNorm>> {
        let attention = &self.facts.layers[layer].attention;
        let Some(norm) = &attention.head_norm else { return Ok(None) };
        let (query, key) = attention.head_norm_widths(norm);
        Ok(Some(HeadNorm {
            query: self.norm_weight(&self.facts.inside(layer, norm.query), query)?,
            key: self.norm_weight(&self.facts.inside(layer, norm.key), key)?,
            eps: self.facts.norm.eps,
        }))
    }

    /// Returns the weight of a norm as a factor: Gemma's stored weight plus one.
    fn norm_weight(&self, path: &str, width: usize) -> Result<Tensor> {
        let plus = match self.facts.norm.form {
            NormForm::RmsPlusOne => 1.0,
            NormForm::Rms | NormForm::Layer => 0.0,
        };
        self.changed_vector(&format!("{path}.weight"), width, 1.0, plus)
    }

    fn head(&self, embedding: &Tensor) -> Result<Head> {
        let (facts, name) = (self.facts, head_weight(self.facts));
        let weight = match facts.tied_head {
            true => {
                self.refuse_other_head()?;
                embedding.clone()
            }
            false => self.kept(&name, &[facts.vocab, facts.width], self.device)?,
        };
        let bias = match facts.head_bias {
            true => Some(self.vector(&format!("{}.bias", facts.names.head), facts.vocab)?),
            false => None,
        };
        let (scale, softcap) = (facts.logits_scale, facts.logits_softcap);
        Ok(Head { weight: Weight::Dense(weight), bias, scale, softcap, changes: Vec::new() })
    }

    fn linear(&self, layer: usize, projection: &Projection, factor: f64, site: usize) -> Result<Linear> {
        let (path, rows, cols) = (self.facts.path(layer, projection), projection.rows, projection.cols);
        let name = format!("{path}.weight");
        let weight = match (stored::has(self.checkpoint, &name), self.options.quantization) {
            (false, Quantization::None | Quantization::Stored { .. }) => {
                Weight::Dense(self.kept(&name, &[rows, cols], self.device)?)
            }
            _ if !self.home.reads(layer) => Weight::FourBit(handover::unread(rows, cols)?),
            (false, Quantization::FourBit { code, double }) if self.drawn => {
                Weight::FourBit(random::four_bit(rows, cols, code, double)?.to_device(self.device)?)
            }
            (false, Quantization::FourBit { code, double }) => {
                Weight::FourBit(self.quantized(&name, rows, cols, code, double)?)
            }
            (true, _) => {
                Weight::FourBit(stored::weight(self.checkpoint, &name, rows, cols)?.to_device(self.device)?)
            }
        };
        let bias = match projection.bias {
            true => Some(self.changed_vector(&format!("{path}.bias"), rows, factor, 0.0)?),
            false => None,
        };
        Ok(Linear { weight, factor, bias, site })
    }

    /// Quantises a weight. On a GPU the stored bytes are copied there one tensor at a time, and only codes and
    /// scales stay.
    fn quantized(&self, name: &str, rows: usize, cols: usize, code: Code, double: bool) -> Result<FourBit> {
        let values = self.checkpoint.get(name, &[rows, cols])?;
        #[cfg(feature = "cuda")]
        if self.device.is_cuda() {
            return self.quantized_on_gpu(name, &values, (rows, cols), code, double);
        }
        Ok(FourBit::quantize(&finite(name, values)?, rows, cols, code, double)?)
    }

    #[cfg(feature = "cuda")]
    fn quantized_on_gpu(
        &self,
        name: &str,
        values: &Values,
        shape: (usize, usize),
        code: Code,
        double: bool,
    ) -> Result<FourBit> {
        let (bytes, stored) = (values.bytes(), values.dtype());
        let source = Tensor::from_slice(bytes, bytes.len(), self.device)?;
        FourBit::quantize_on_gpu(&source, stored, shape, code, double)?.map_err(|place| {
            Fault::model(format!("{name}: one of the values {}..{} is NaN or infinite", place.from, place.to))
                .help("the checkpoint is damaged: download it again")
        })
    }

    /// Refuses a stored head that differs from the embedding it is tied to, because config.json is wrong then.
    fn refuse_other_head(&self) -> Result<()> {
        let (facts, head) = (self.facts, head_weight(self.facts));
        if !self.checkpoint.names().any(|name| name == head) {
            return Ok(());
        }
        let shape = [facts.vocab, facts.width];
        let same = self.checkpoint.get(&head, &shape)?.bytes()
            == self.checkpoint.get(facts.names.embedding, &shape)?.bytes();
        match same {
            true => Ok(()),
            false => Err(Fault::model(format!(
                "config.json ties the head to the embedding, but {head} differs from {}",
                facts.names.embedding
            ))
            .help("set tie_word_embeddings to false in config.json")),
        }
    }

    /// Loads a matrix that is not quantised. On a CPU bf16 stays bf16, and other types become the activations'
    /// type. On a GPU all become the activations' type.
    fn kept(&self, name: &str, shape: &[usize; 2], device: &Device) -> Result<Tensor> {
        if self.drawn {
            let drawn = random::matrix(shape[0], shape[1])?;
            return Ok(match device {
                Device::Cpu => drawn,
                device => drawn.to_dtype(self.dtype)?.to_device(device)?,
            });
        }
        let values = self.checkpoint.get(name, shape)?;
        match values.bf16() {
            Some(values) => {
                refuse_nan(name, values.iter().map(|value| value.to_f32()))?;
                let stored = Tensor::from_vec(values, (shape[0], shape[1]), &Device::Cpu)?;
                match device {
                    Device::Cpu => Ok(stored),
                    device => Ok(stored.to_dtype(self.dtype)?.to_device(device)?),
                }
            }
            None => Ok(Tensor::from_vec(finite(name, values)?, (shape[0], shape[1]), &Device::Cpu)?
                .to_dtype(self.dtype)?
                .to_device(device)?),
        }
    }

    /// Loads a norm's weight or a bias in the arithmetic's type: f32 even for bf16 activations.
    fn vector(&self, name: &str, length: usize) -> Result<Tensor> {
        self.changed_vector(name, length, 1.0, 0.0)
    }

    /// Loads `factor * stored + plus`, computed on the host.
    fn changed_vector(&self, name: &str, length: usize, factor: f64, plus: f64) -> Result<Tensor> {
        let values = match self.drawn {
            true => vec![if name.ends_with(".bias") { 0.0 } else { 1.0 }; length],
            false => finite(name, self.checkpoint.get(name, &[length])?)?,
        };
        let wide = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let values = Tensor::from_vec(values, length, &Device::Cpu)?.to_dtype(wide)?;
        Ok(values.affine(factor, plus)?.to_device(self.device)?)
    }
}

/// Widens the values to f32 and refuses NaN and infinity.
fn finite(name: &str, values: Values) -> Result<Vec<f32>> {
    let values = values.to_f32();
    refuse_nan(name, values.iter().copied())?;
    Ok(values)
}

/// Refuses a NaN or an infinity, which would show only much later as a diverged loss.
fn refuse_nan(name: &str, values: impl Iterator<Item = f32>) -> Result<()> {
    match values.enumerate().find(|(_, value)| !value.is_finite()) {
        None => Ok(()),
        Some((at, value)) => {
            Err(Fault::model(format!("{name}: value {at} is {value}, expected finite weights"))
                .help("the checkpoint is damaged: download it again"))
        }
    }
}
