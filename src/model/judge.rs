//! Compares the decoder's hand-written backward pass with candle's autograd of the ops' formulas and with finite
//! differences, in f64: for every level of keeping, every fact of the families, a pack of three examples, odd
//! sizes, 4-bit and dense bases, dropout, and a partial adapter.

use candle_core::{DType, Device, Result, Tensor, Var};
use serde_json::{Value, json};

use super::batch::Batch;
use super::cache::Cache;
use super::decoder::Decoder;
use super::dora::Dora;
use super::feed_forward::Form;
use super::layer::Layer;
use super::linear::Linear;
use super::lora::{Lora, Mixture, Pair, Pairs, Part, Trainable};
use super::norm::Norm;
use super::pass::Step;
use super::residency::Home;
use super::self_attention::SelfAttention;
use super::{Options, load, random};
use crate::facts::config::Config;
use crate::facts::sites::Table;
use crate::facts::{
    Facts, FeedForward, FourBitCode, Keep, LoraOptions, Precision, Quantization, Targets, Tokens, family,
};
use crate::ops::matmul::Weight;
use crate::ops::{
    activation, attention, cpu, cross_entropy, dropout, head_norm, judge, layer_norm, rms_norm, rope,
};
use crate::report::Report;

pub(super) struct Case {
    pub name: &'static str,
    pub config: Value,
    pub change: fn(&mut Options),
}

fn llama(more: Value) -> Value {
    let mut config = json!({
        "model_type": "llama", "vocab_size": 29, "hidden_size": 20, "intermediate_size": 22, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "rms_norm_eps": 1e-5, "rope_theta": 100.0,
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

fn phi3() -> Value {
    json!({
        "model_type": "phi3", "vocab_size": 31, "hidden_size": 24, "intermediate_size": 18, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "sliding_window": 4, "tie_word_embeddings": true,
        "max_position_embeddings": 64, "original_max_position_embeddings": 6, "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 3.0, 4.0]},
    })
}

fn falcon(more: Value) -> Value {
    let mut config = json!({
        "model_type": "falcon", "vocab_size": 29, "hidden_size": 24, "ffn_hidden_size": 34, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_kv_heads": 2, "rope_theta": 100.0,
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

fn gemma2() -> Value {
    llama(json!({
        "model_type": "gemma2", "query_pre_attn_scalar": 7, "sliding_window": 3, "attn_logit_softcapping": 0.8,
        "final_logit_softcapping": 1.5, "attention_bias": true, "hidden_activation": "gelu",
    }))
}

pub(super) fn cases() -> Vec<Case> {
    let keep: fn(&mut Options) = |_| {};
    vec![
        Case { name: "llama", config: llama(json!({})), change: keep },
        Case {
            name: "llama with biases, dense, rslora, qv only",
            config: llama(json!({"attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true})),
            change: |options| {
                options.quantization = Quantization::None;
                options.lora.rslora = true;
                options.lora.targets = Targets::names(["q_proj", "v_proj"]);
            },
        },
        Case {
            name: "llama with dropout, upper layers only",
            config: llama(json!({"num_key_value_heads": 4})),
            change: |options| {
                options.lora.dropout = 0.3;
                options.lora.layers = vec![1, 2];
            },
        },
        Case { name: "phi3", config: phi3(), change: keep },
        Case {
            name: "qwen2: biases, a window on the upper layers",
            config: llama(json!({
                "model_type": "qwen2", "use_sliding_window": true, "sliding_window": 3, "max_window_layers": 1,
            })),
            change: keep,
        },
        Case {
            name: "qwen3: queries and keys normalised, dropout",
            config: llama(json!({"model_type": "qwen3"})),
            change: |options| options.lora.dropout = 0.3,
        },
        Case { name: "gemma2: caps, norms behind, exact GELU", config: gemma2(), change: keep },
        Case {
            name: "gemma2 with dropout, upper layers only",
            config: gemma2(),
            change: |options| {
                options.lora.dropout = 0.3;
                options.lora.layers = vec![1, 2];
            },
        },
        Case {
            name: "gemma3: two ropes, windows by pattern",
            config: llama(json!({
                "model_type": "gemma3_text", "query_pre_attn_scalar": 7, "sliding_window": 3,
                "sliding_window_pattern": 2, "rope_local_base_freq": 10.0,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            })),
            change: keep,
        },
        Case { name: "falcon 7b: parallel, one norm, one key head", config: falcon(json!({})), change: keep },
        Case {
            name: "falcon 40b: grouped heads, two norms, upper layer only",
            config: falcon(json!({"new_decoder_architecture": true})),
            change: |options| {
                options.lora.dropout = 0.3;
                options.lora.layers = vec![1];
            },
        },
        Case {
            name: "falcon, one after the other, a key for each head, biases",
            config: falcon(
                json!({"parallel_attn": false, "multi_query": false, "num_kv_heads": 4, "bias": true}),
            ),
            change: keep,
        },
        Case {
            name: "phi: biases everywhere, partial rotary",
            config: llama(json!({"model_type": "phi", "head_dim": 8, "layer_norm_eps": 1e-5})),
            change: keep,
        },
        Case {
            name: "granite: factors, biases",
            config: llama(json!({
                "model_type": "granite", "embedding_multiplier": 3.0, "attention_multiplier": 0.3,
                "residual_multiplier": 0.4, "logits_scaling": 2.0, "attention_bias": true, "mlp_bias": true,
            })),
            change: keep,
        },
        Case {
            name: "smollm3: a layer without rope, windows there",
            config: llama(json!({
                "model_type": "smollm3", "no_rope_layers": [1, 0, 1], "use_sliding_window": true, "sliding_window": 3,
            })),
            change: keep,
        },
        Case {
            name: "olmo2: norms behind only, queries and keys normalised whole",
            config: llama(json!({"model_type": "olmo2", "num_key_value_heads": 1})),
            change: keep,
        },
        Case {
            name: "llama with magnitudes (DoRA), biases",
            config: llama(json!({"attention_bias": true, "mlp_bias": true})),
            change: |options| options.lora.dora = true,
        },
        Case {
            name: "granite with magnitudes: factors, dropout, upper layers only, dense",
            config: llama(json!({
                "model_type": "granite", "residual_multiplier": 0.4, "attention_bias": true, "mlp_bias": true,
            })),
            change: |options| {
                options.quantization = Quantization::None;
                (options.lora.dora, options.lora.dropout, options.lora.layers) = (true, 0.3, vec![1, 2]);
            },
        },
        Case {
            name: "llama with trained tokens in both tables, upper layers only",
            config: llama(json!({})),
            change: |options| {
                options.lora.layers = vec![1, 2];
                options.lora.tokens = Tokens { embedding: vec![11, 3, 28], head: vec![22, 3] };
            },
        },
        Case {
            name: "gemma2 with trained tokens in tied tables: caps, scaled embeddings",
            config: {
                let mut config = gemma2();
                config["tie_word_embeddings"] = true.into();
                config
            },
            change: |options| options.lora.tokens.embedding = vec![14, 0, 22],
        },
        Case {
            name: "granite with trained tokens: factors, tied",
            config: llama(json!({
                "model_type": "granite", "embedding_multiplier": 3.0, "logits_scaling": 2.0,
                "tie_word_embeddings": true,
            })),
            change: |options| options.lora.tokens.embedding = vec![14, 0, 22],
        },
        Case {
            name: "ministral3: queries that grow",
            config: llama(json!({
                "model_type": "ministral3",
                "rope_parameters": {"llama_4_scaling_beta": 0.4, "original_max_position_embeddings": 2},
            })),
            change: keep,
        },
    ]
}

/// Returns the frozen base of a case, and an adapter whose B is not zero.
fn decoder(case: &Case) -> (Decoder, Trainable) {
    decoder_on(case, DType::F64, &Device::Cpu)
}

/// Returns `decoder` with activations of a type on a device.
pub(super) fn decoder_on(case: &Case, dtype: DType, device: &Device) -> (Decoder, Trainable) {
    let folder = tempfile::tempdir().unwrap();
    let facts = family::describe(&Config::from_json(case.config.as_object().unwrap().clone())).unwrap();
    random::write(folder.path(), &facts, 5).unwrap();
    let mut options = Options {
        folder: folder.path().into(),
        quantization: Quantization::FourBit { code: FourBitCode::Nf4, double: true },
        lora: LoraOptions { r: 3, alpha: 5.0, ..LoraOptions::default() },
        precision: Precision::F32,
    };
    (case.change)(&mut options);
    let decoder = load::load_in(dtype, &Home::Device, device, facts, &options, &Report::silent()).unwrap();
    let adapter = decoder.trainable(&options.lora).unwrap();
    // B is zero at first, which would make A's gradient zero.
    let noise = judge::random(adapter.params.elem_count(), 9).unwrap();
    let noise = (noise.as_tensor() * 0.1).unwrap().to_dtype(adapter.params.dtype()).unwrap();
    crate::ops::rows::add(&adapter.params, &noise.to_device(device).unwrap()).unwrap();
    adapter.refresh().unwrap();
    (decoder, adapter)
}

/// Returns three examples of odd lengths, of which the middle one has no target and the last is partly supervised; rope
/// lengths on both sides of longrope's limit.
pub(super) fn batch(facts: &Facts) -> Batch {
    let mut batch = Batch::default();
    for (length, rope_length) in [(7usize, 7), (1, 7), (5, 5)] {
        let ids: Vec<u32> = (0..length).map(|i| ((i * 11 + length * 3) % facts.vocab) as u32).collect();
        let supervised: Vec<bool> = (0..length).map(|i| length != 5 || i % 2 == 1).collect();
        batch.push(&ids, &supervised, rope_length, length as u64 * 1000);
    }
    batch
}

/// Gradients with products in 8 bits on a CPU point in the direction of those in f32, for plain pairs and DoRA and
/// every level of keeping. Weights that are not finite show in the loss.
#[test]
fn products_in_8_bits_leave_gradients_where_they_are() -> Result<()> {
    let narrow = json!({
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    });
    let dora: fn(&mut Options) = |options| options.lora.dora = true;
    let plain: fn(&mut Options) = |_| {};
    for (name, change) in [("plain", plain), ("DoRA", dora)] {
        let case = Case { name, config: llama(narrow.clone()), change };
        let (mut decoder, adapter) = decoder_on(&case, DType::F32, &Device::Cpu);
        let (batch, layers) = (batch(&decoder.facts), decoder.layers.len());
        let gradients = |decoder: &Decoder, keep: Keep| -> Result<(f64, Vec<f64>)> {
            crate::ops::flat::zero(&adapter.grads)?;
            let loss = decoder.forward_backward(&adapter, &vec![keep; layers], &batch, 1.0)?.value()?;
            Ok((loss, crate::ops::cpu::to_f64(&adapter.grads)?))
        };
        let (expected_loss, expected) = gradients(&decoder, Keep::Everything)?;
        decoder.frozen = Precision::Fp8;
        let (loss, found) = gradients(&decoder, Keep::Everything)?;
        assert!(
            loss != expected_loss && (loss / expected_loss - 1.0).abs() < 2e-2,
            "{name}: {loss} {expected_loss}"
        );
        assert_eq!(gradients(&decoder, Keep::LayerInputs)?, (loss, found.clone()), "{name}");
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        let cosine = dot(&found, &expected) / (dot(&found, &found) * dot(&expected, &expected)).sqrt();
        assert!(cosine > 0.98, "{name}: cosine {cosine}");
        decoder.embedding = Tensor::full(f32::NAN, decoder.embedding.dims(), &Device::Cpu)?;
        assert!(gradients(&decoder, Keep::Everything)?.0.is_nan(), "{name}");
    }
    Ok(())
}

/// The decoder computed again from the ops' formulas, differentiable in the flat parameters.
struct Formula<'a> {
    decoder: &'a Decoder,
    adapter: &'a Trainable,
    params: &'a Tensor,
    batch: &'a Batch,
    dropout: bool,
}

impl Formula<'_> {
    fn loss(&self) -> Result<Tensor> {
        let (decoder, batch) = (self.decoder, self.batch);
        let ids = Tensor::new(batch.ids.as_slice(), &Device::Cpu)?;
        let embedding = self.with_trained_rows(&decoder.embedding.to_dtype(DType::F64)?, Table::Embedding)?;
        let mut x = embedding.index_select(&ids, 0)?;
        x = (x * decoder.embedding_factor())?;
        for (index, layer) in decoder.layers.iter().enumerate() {
            x = self.layer(index, layer, &x)?;
        }
        let rows = Tensor::new(batch.target_rows.as_slice(), &Device::Cpu)?;
        let hidden = normed(&Some(decoder.final_norm.clone()), &x.index_select(&rows, 0)?)?;
        let head = &decoder.head;
        let weight = match decoder.facts.tied_head {
            true => embedding,
            false => self.with_trained_rows(&dense(&head.weight)?, Table::Head)?,
        };
        let mut logits = (hidden.matmul(&weight.t()?)? * head.scale)?;
        if let Some(bias) = &head.bias {
            logits = logits.broadcast_add(bias)?;
        }
        if let Some(cap) = head.softcap {
            logits = ((logits / cap)?.tanh()? * cap)?;
        }
        cross_entropy::formula(&logits, &Tensor::new(batch.targets.as_slice(), &Device::Cpu)?)
    }

    /// Returns a table with its trained rows in the place of the frozen ones.
    fn with_trained_rows(&self, frozen: &Tensor, table: Table) -> Result<Tensor> {
        let Some(of) = self.adapter.tokens.iter().find(|of| of.table == table) else {
            return Ok(frozen.clone());
        };
        let rows = self.adapter.token_view(self.params, of)?;
        let row = |id: usize| match of.ids.iter().position(|other| *other as usize == id) {
            Some(number) => rows.narrow(0, number, 1),
            None => frozen.narrow(0, id, 1),
        };
        Tensor::cat(&(0..frozen.dim(0)?).map(row).collect::<Result<Vec<_>>>()?, 0)
    }

    fn layer(&self, index: usize, layer: &Layer, x: &Tensor) -> Result<Tensor> {
        let facts = &self.decoder.facts;
        let names =
            |list: &[crate::facts::Projection]| list.iter().map(|p| facts.path(index, p)).collect::<Vec<_>>();
        let (attention, described) = (&layer.attention, &facts.layers[index].attention);
        let read = normed(&attention.norm, x)?;
        let qkv = self.beside(&names(&described.query_key_value), &attention.query_key_value, &read)?;
        let attended = self.attended(attention, &qkv)?;
        let added = self.linear(&facts.path(index, &described.output), &attention.output, &attended)?;
        let middle = (x + normed(&attention.post_norm, &added)?)?;
        let (fed, Form::Dense(dense)) = (&layer.feed_forward, &layer.feed_forward.form);
        let FeedForward::Dense(described) = &facts.layers[index].feed_forward;
        let read = normed(&fed.norm, if facts.parallel { x } else { &middle })?;
        let gate_up = self.beside(&names(&described.gate_up), &dense.gate_up, &read)?;
        let activated = activation::formula(&gate_up, described.activation)?;
        let added = self.linear(&facts.path(index, &described.down), &dense.down, &activated)?;
        &middle + normed(&fed.post_norm, &added)?
    }

    /// Computes the norms of queries and keys, rope and attention, head by head, from the columns that the layout
    /// gives.
    fn attended(&self, layer: &SelfAttention, qkv: &Tensor) -> Result<Tensor> {
        let (facts, batch, heads) = (&self.decoder.facts, self.batch, &layer.heads);
        let (runs, turning) = heads.turning();
        let run = heads.columns() / runs / heads.width;
        let (query, key) = (heads.query * heads.width, heads.key * heads.width);
        let part = |x: &Tensor, at: usize, columns: usize| x.narrow(1, at, columns)?.contiguous();
        let qkv = match &layer.head_norm {
            None => qkv.clone(),
            Some(norm) => {
                let q = head_norm::formula(&part(qkv, 0, query)?, &norm.query, norm.eps)?;
                let k = head_norm::formula(&part(qkv, query, key)?, &norm.key, norm.eps)?;
                Tensor::cat(&[q, k, part(qkv, query + key, key)?], 1)?
            }
        };
        let qkv = match layer.rope {
            None => qkv,
            Some(rope) => {
                let (positions, lengths) = batch.positions();
                let angles =
                    rope::Angles::of(&facts.ropes[rope], &positions, &lengths, DType::F64, &Device::Cpu)?;
                let parts = (0..runs * run).map(|head| {
                    let one = part(&qkv, head * heads.width, heads.width)?.unsqueeze(1)?;
                    let turned = if head % run < turning { rope::formula(&one, &angles)? } else { one };
                    match &facts.query_growth {
                        Some(growth) if head < heads.query => {
                            let lengths: Vec<f64> = positions.iter().map(|&at| growth.at(at)).collect();
                            let lengths = Tensor::from_vec(lengths, (batch.rows(), 1, 1), &Device::Cpu)?;
                            turned.broadcast_mul(&lengths)
                        }
                        _ => Ok(turned),
                    }
                });
                Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 1)?.flatten_from(1)?
            }
        };
        let example = |range: std::ops::Range<usize>| {
            attention::formula(&qkv.narrow(0, range.start, range.len())?, heads)
        };
        Tensor::cat(&batch.ranges().into_iter().map(example).collect::<Result<Vec<_>>>()?, 0)
    }

    fn beside(&self, paths: &[String], parts: &[Linear], x: &Tensor) -> Result<Tensor> {
        let parts = paths.iter().zip(parts).map(|(path, part)| self.linear(path, part, x));
        Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 1)
    }

    fn linear(&self, path: &str, linear: &Linear, x: &Tensor) -> Result<Tensor> {
        let weight = dense(&linear.weight)?;
        let mut y = (x.matmul(&weight.t()?)? * linear.factor)?;
        if let Some(bias) = &linear.bias {
            y = y.broadcast_add(bias)?;
        }
        let sites = &self.adapter.sites;
        let Some(mask) = sites.iter().position(|site| site.path == path) else { return Ok(y) };
        let (a, b) = self.adapter.views(self.params, &sites[mask])?;
        let masked = self.dropped(x, mask as u64)?;
        let low = (masked.matmul(&a.t()?)?.matmul(&b.t()?)? * (sites[mask].scale * linear.factor))?;
        let Some(magnitude) = self.adapter.magnitudes(self.params, &sites[mask])? else { return y + low };
        // DoRA: the lengths are constants.
        let whole = (&weight + (b.matmul(&a)? * sites[mask].scale)?)?.detach();
        let c = (magnitude / whole.sqr()?.sum(1)?.sqrt()?)?;
        let frozen = (masked.matmul(&weight.t()?)? * linear.factor)?;
        (y + frozen.broadcast_mul(&(&c - 1.0)?)?)? + low.broadcast_mul(&c)?
    }

    fn dropped(&self, x: &Tensor, mask: u64) -> Result<Tensor> {
        match self.dropout && self.adapter.dropout > 0.0 {
            true => {
                x * dropout::apply(
                    &x.ones_like()?.detach(),
                    self.adapter.dropout,
                    &dropout::keys(&self.batch.keys, x.device())?,
                    mask,
                )?
            }
            false => Ok(x.clone()),
        }
    }
}

fn normed(norm: &Option<Norm>, x: &Tensor) -> Result<Tensor> {
    match norm {
        None => Ok(x.clone()),
        Some(Norm::Rms { weight, eps }) => rms_norm::formula(x, weight, *eps),
        Some(Norm::Layer { weight, bias, eps }) => layer_norm::formula(x, weight, bias, *eps),
    }
}

/// Returns a weight as f64 [N, K], through the public dequantisation.
fn dense(weight: &Weight) -> Result<Tensor> {
    match weight {
        Weight::Dense(tensor) => tensor.to_dtype(DType::F64),
        Weight::FourBit(weight) => {
            Tensor::from_vec(weight.dequantize()?, (weight.rows, weight.cols), &Device::Cpu)?
                .to_dtype(DType::F64)
        }
    }
}

#[test]
fn loss_and_gradients_equal_autograd_whatever_is_kept() -> Result<()> {
    for case in cases() {
        for keep in Keep::ALL {
            let (decoder, adapter) = decoder(&case);
            let keep = vec![keep; decoder.layers.len()];
            let batch = batch(&decoder.facts);
            let params = Var::from_tensor(&adapter.params)?;
            let formula = Formula {
                decoder: &decoder,
                adapter: &adapter,
                params: &params,
                batch: &batch,
                dropout: true,
            };
            let expected = formula.loss()?;
            let store = (&expected * 0.5)?.backward()?;
            let loss = decoder.forward_backward(&adapter, &keep, &batch, 0.5)?.value()?;
            assert!((loss - expected.to_scalar::<f64>()?).abs() < 1e-10, "{}: loss", case.name);
            println!("{} {:?}", case.name, keep[0]);
            judge::same(&adapter.grads, store.get(&params).unwrap(), 1e-10)?;
            // A second pass adds its gradients.
            decoder.forward_backward(&adapter, &keep, &batch, 0.5)?;
            judge::same(&adapter.grads, &(store.get(&params).unwrap() * 2.0)?, 1e-10)?;
            let plain = Formula { dropout: false, ..formula }.loss()?.to_scalar::<f64>()?;
            assert!(
                (decoder.loss(&batch, adapter.evaluated())?.value()? - plain).abs() < 1e-10,
                "{}: evaluation",
                case.name
            );
        }
    }
    Ok(())
}

/// Layers with different levels give the same bits.
#[test]
fn levels_mix() -> Result<()> {
    for case in cases() {
        let (decoder, adapter) = decoder(&case);
        let keep = vec![Keep::Everything; decoder.layers.len()];
        let batch = batch(&decoder.facts);
        let loss = decoder.forward_backward(&adapter, &keep, &batch, 1.0)?.value()?;
        let gradients = adapter.grads.copy()?;
        for first in 0..Keep::ALL.len() {
            let levels = Keep::ALL.into_iter().cycle().skip(first);
            let keep: Vec<Keep> = levels.take(decoder.layers.len()).collect();
            crate::ops::flat::zero(&adapter.grads)?;
            // The operations and their order are the same, so the bits are the same.
            assert_eq!(
                decoder.forward_backward(&adapter, &keep, &batch, 1.0)?.value()?,
                loss,
                "{}",
                case.name
            );
            judge::same(&adapter.grads, &gradients, 0.0)?;
        }
    }
    Ok(())
}

#[test]
fn gradients_equal_finite_differences() -> Result<()> {
    const STEP: f64 = 1e-5;
    for case in cases() {
        let (decoder, adapter) = decoder(&case);
        let keep = vec![Keep::Everything; decoder.layers.len()];
        let batch = batch(&decoder.facts);
        decoder.forward_backward(&adapter, &keep, &batch, 1.0)?;
        let found = cpu::to_f64(&adapter.grads)?;
        let params = adapter.params.copy()?;
        let at = |i: usize, step: f64| -> Result<f64> {
            let moved = |x: &mut [f64]| x[i] += step;
            cpu::edit(&adapter.params, moved)?;
            let loss = decoder.forward_backward(&adapter, &keep, &batch, 0.0)?.value()?;
            cpu::edit(&adapter.params, |x: &mut [f64]| x[i] -= step)?;
            Ok(loss)
        };
        // Every 37th parameter: some of each pair.
        for i in (0..params.elem_count()).step_by(37) {
            let expected = (at(i, STEP)? - at(i, -STEP)?) / (2.0 * STEP);
            let error = (found[i] - expected).abs() / expected.abs().max(1.0);
            assert!(error < 1e-7, "{}: parameter {i}: {} against {expected}", case.name, found[i]);
        }
    }
    Ok(())
}

#[test]
fn packed_examples_do_not_see_each_other() -> Result<()> {
    for case in cases() {
        let (decoder, adapter) = decoder(&case);
        let keep = vec![Keep::Everything; decoder.layers.len()];
        let whole = batch(&decoder.facts);
        let together = decoder.forward_backward(&adapter, &keep, &whole, 1.0)?.value()?;
        let gradients = adapter.grads.copy()?;
        crate::ops::flat::zero(&adapter.grads)?;
        let mut apart = 0.0;
        for (length, rope_length) in [(7usize, 7), (1, 7), (5, 5)] {
            let range = whole.ranges().into_iter().find(|range| range.len() == length).unwrap();
            let mut one = Batch::default();
            let supervised: Vec<bool> = (0..length).map(|i| length != 5 || i % 2 == 1).collect();
            one.push(&whole.ids[range], &supervised, rope_length, length as u64 * 1000);
            apart += decoder.forward_backward(&adapter, &keep, &one, 1.0)?.value()?;
        }
        assert!((together - apart).abs() < 1e-10, "{}", case.name);
        judge::same(&adapter.grads, &gradients, 1e-10)?;
    }
    Ok(())
}

fn part(adapter: &Pairs, rows: std::ops::Range<usize>, strength: f64) -> Part<'_> {
    Part { adapter, rows, strength }
}

/// Each adapter's product is added, with its strength, to the rows it is for. Without adapters the result is the
/// bare base's.
#[test]
fn a_mixture_is_the_sum_of_its_adapters_row_by_row() -> Result<()> {
    for case in cases() {
        let (decoder, adapter) = decoder(&case);
        let noise = |seed| judge::random(adapter.params.elem_count(), seed)?.as_tensor() * 0.1;
        let flats = [noise(21)?, noise(22)?];
        let pairs = |flat: &Tensor| {
            let pair = |site: &crate::facts::sites::Site| {
                let (a, b) = adapter.views(flat, site)?;
                let dora = adapter.magnitudes(flat, site)?.map(Dora::new);
                Ok((site.linear, Pair { a: Weight::Dense(a), b: Weight::Dense(b), scale: site.scale, dora }))
            };
            Ok::<_, candle_core::Error>(Pairs::new(
                adapter.sites.iter().map(pair).collect::<Result<Vec<_>>>()?,
            ))
        };
        let (first, second) = (pairs(&flats[0])?, pairs(&flats[1])?);
        let batch = batch(&decoder.facts);
        // The first example has both adapters, the second (one row) none, the third only the second adapter.
        let parts = vec![part(&first, 0..7, 0.3), part(&second, 0..7, -1.5), part(&second, 8..13, 0.7)];
        let mixture = Mixture::new(parts);
        let found = decoder.logits(&batch, Lora::Mixed(&mixture))?;
        let alone = |parts: &[(&Pairs, f64)]| {
            let parts = parts.iter().map(|(pairs, strength)| part(pairs, 0..13, *strength)).collect();
            decoder.logits(&batch, Lora::Mixed(&Mixture::new(parts)))
        };
        let expected = Tensor::cat(
            &[
                alone(&[(&first, 0.3), (&second, -1.5)])?.narrow(0, 0, 7)?,
                decoder.logits(&batch, Lora::None)?.narrow(0, 7, 1)?,
                alone(&[(&second, 0.7)])?.narrow(0, 8, 5)?,
            ],
            0,
        )?;
        judge::same(&found, &expected, 1e-12)?;
        // The finished adapter has the results of the one in training.
        let finished = alone(&[(&adapter.finished()?, 1.0)])?;
        judge::same(&finished, &decoder.logits(&batch, adapter.evaluated())?, 1e-10)?;
        if adapter.has_magnitudes() || !adapter.tokens.is_empty() {
            continue; // a sum of these is no adapter
        }
        // Two adapters on every row equal one adapter with the weighted sum of their products: with the same A, the
        // sum of the Bs.
        for site in &adapter.sites {
            let (a, _) = adapter.views(&flats[0], site)?;
            crate::ops::flat::write(&adapter.views(&flats[1], site)?.0, &a)?;
            let (b, other) = (adapter.views(&flats[0], site)?.1, adapter.views(&flats[1], site)?.1);
            let sum = ((b * 0.3)? + (other * -1.5)?)?;
            crate::ops::flat::write(&adapter.views(&adapter.params, site)?.0, &a)?;
            crate::ops::flat::write(&adapter.views(&adapter.params, site)?.1, &sum)?;
        }
        let mixed = alone(&[(&first, 0.3), (&second, -1.5)])?;
        judge::same(&mixed, &decoder.logits(&batch, adapter.evaluated())?, 1e-10)?;
    }
    Ok(())
}

/// Rows that arrive piece by piece, over cached keys and values, get the same logits as in the whole text.
#[test]
fn steps_over_a_cache_equal_the_whole_text() -> Result<()> {
    for case in cases() {
        let (decoder, adapter) = decoder(&case);
        let batch = batch(&decoder.facts);
        let pairs = adapter.finished()?;
        let whole = Mixture::new(vec![part(&pairs, 0..7, 0.6)]);
        let expected = decoder.logits(&batch, Lora::Mixed(&whole))?;
        let mut cache = Cache::new(&decoder.facts, 128, 128, DType::F64, &Device::Cpu)?;
        let pages = [cache.reserve(7, &[]).unwrap().pages, cache.reserve(5, &[]).unwrap().pages];
        let (first_rows, mut done, mut found) = ([0usize, 8], [0usize; 2], vec![None; 13]);
        for pieces in [[3, 1], [1, 1], [1, 2], [2, 1]] {
            let mut step = Step::default();
            let mut rows = Vec::new();
            let mut parts = Vec::new();
            for (sequence, length) in pieces.into_iter().enumerate() {
                let first = first_rows[sequence] + done[sequence];
                let ids = &batch.ids[first..first + length];
                let from = step.push(ids, done[sequence], pages[sequence].clone(), [7, 5][sequence]);
                rows.extend(first..first + length);
                done[sequence] += length;
                if sequence == 0 {
                    parts.push(part(&pairs, from..from + length, 0.6));
                }
            }
            step.wanted = (0..rows.len() as u32).collect();
            let logits = decoder.step(&step, &mut cache, Lora::Mixed(&Mixture::new(parts)))?;
            for (i, row) in rows.into_iter().enumerate() {
                found[row] = Some(logits.narrow(0, i, 1)?);
            }
        }
        for (row, found) in found.into_iter().enumerate().filter(|(row, _)| *row != 7) {
            println!("{}, row {row}", case.name);
            judge::same(&found.expect("every row came"), &expected.narrow(0, row, 1)?, 1e-10)?;
        }
    }
    Ok(())
}

/// A checkpoint may repeat the tied head. If the two differ, config.json is wrong.
#[test]
fn a_tied_head_that_differs_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let describe = |tied: bool| {
        let config = llama(json!({"tie_word_embeddings": tied}));
        family::describe(&Config::from_json(config.as_object().unwrap().clone())).unwrap()
    };
    random::write(folder.path(), &describe(false), 5).unwrap();
    let options = Options {
        folder: folder.path().into(),
        quantization: Quantization::None,
        lora: LoraOptions::default(),
        precision: Precision::F32,
    };
    let fault = load::load(describe(true), &options, &Device::Cpu, &Report::silent()).err().expect("refused");
    assert!(fault.message.contains("lm_head.weight differs from model.embed_tokens.weight"), "{fault}");
}
