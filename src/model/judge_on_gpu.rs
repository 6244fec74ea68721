//! Compares the decoder on a GPU with itself in f64 on the CPU, which `judge.rs` compares with autograd: every fact of
//! the families, with LoRA inside the products and beside them, whatever is kept.

use candle_core::{DType, Device, Result};
use serde_json::json;

use super::inside;
use super::judge::{Case, batch, cases, decoder_on};
use crate::facts::{Keep, Quantization};
use crate::ops::{cpu, flat, judge};

/// The cases of `judge.rs` in widths of whole groups of eight, and some that decide where LoRA lies.
fn wide_cases() -> Vec<Case> {
    let mut list = cases();
    for case in &mut list {
        let config = case.config.as_object_mut().unwrap();
        let falcon = config["model_type"] == "falcon";
        config.insert("hidden_size".into(), json!(if falcon { 32 } else { 24 }));
        let inner = if falcon { "ffn_hidden_size" } else { "intermediate_size" };
        config.insert(inner.into(), json!(40));
        if config.contains_key("head_dim") {
            config.insert("head_dim".into(), json!(8));
        }
    }
    let llama = list[0].config.clone();
    type Change = fn(&mut super::Options);
    let more: [(&str, Change); 4] = [
        ("rank 1", |options| options.lora.r = 1),
        ("ranks that fill the columns", |options| options.lora.r = 32),
        ("ranks of 256, beside the product where three are too many", |options| options.lora.r = 256),
        ("dense", |options| options.quantization = Quantization::None),
    ];
    let case = |(name, change)| Case { name, config: llama.clone(), change };
    list.extend(more.map(case));
    list
}

/// Relative distance of the gradients, and of the loss, from those in f64. In bf16 the products one after the other are
/// up to 3.2e-2 from f64 at these small widths.
#[test]
fn gradients_are_those_of_f64_whatever_is_kept() -> Result<()> {
    let Some(gpu) = judge::gpu() else { return Ok(()) };
    let mut wide = 0;
    for case in wide_cases() {
        let (host, on_host) = decoder_on(&case, DType::F64, &Device::Cpu);
        let layers = host.layers.len();
        let batch = batch(&host.facts);
        let loss = host.forward_backward(&on_host, &vec![Keep::Everything; layers], &batch, 0.5)?.value()?;
        let expected = cpu::to_f64(&on_host.grads)?;
        for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::BF16, 5e-2)] {
            let (decoder, adapter) = decoder_on(&case, dtype, &gpu);
            let mut bits: Option<Vec<f64>> = None;
            for keep in Keep::ALL {
                flat::zero(&adapter.grads)?;
                let found = decoder.forward_backward(&adapter, &vec![keep; layers], &batch, 0.5)?.value()?;
                let near = (found - loss).abs() / loss;
                assert!(near < tolerance, "{}, {dtype:?}: loss {found}, in f64 {loss}", case.name);
                let gradients = cpu::to_f64(&adapter.grads.to_device(&Device::Cpu)?)?;
                let distance = distance(&gradients, &expected);
                assert!(distance < tolerance, "{}, {dtype:?}, {}: {distance:.1e}", case.name, keep.name());
                let first = bits.get_or_insert_with(|| gradients.clone());
                assert_eq!(*first, gradients, "{}, {dtype:?}, {}: other bits", case.name, keep.name());
            }
            for linear in decoder.layers[layers - 1].linears() {
                let spare = inside::spare(linear.weight.dims().1, &[adapter.member(linear)], batch.rows());
                wide += usize::from(spare > 0);
            }
        }
    }
    assert!(wide > 100, "only {wide} layers have LoRA inside their product");
    Ok(())
}

fn distance(found: &[f64], expected: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(found, expected)| found - expected));
    difference / norm(&mut expected.iter().copied())
}
