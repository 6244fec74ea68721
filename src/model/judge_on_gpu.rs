//! Compares the decoder on a GPU with itself in f64 on the CPU, which `judge.rs` compares with autograd: every fact of
//! the families, with LoRA inside the products and beside them, and every level of keeping.

use candle_core::{DType, Device, Result};
use serde_json::json;

use super::batch::Batch;
use super::decoder::Decoder;
use super::inside;
use super::judge::{Case, batch, cases, decoder_on};
use super::recorded::{Recorder, TrainingPass};
use crate::facts::{Facts, Keep, Precision, Quantization};
use crate::ops::change::Change;
use crate::ops::{cpu, cuda, flat, fp8, judge, starve};

/// Returns the cases of `judge.rs` in widths of whole groups of eight, and some that decide where LoRA lies.
fn wide_cases() -> Vec<Case> {
    cases_of(24, 40)
}

/// Returns `wide_cases` with other widths of the stream and of the feed-forward.
fn cases_of(width: usize, inner_width: usize) -> Vec<Case> {
    let mut list = cases();
    for case in &mut list {
        let config = case.config.as_object_mut().unwrap();
        let falcon = config["model_type"] == "falcon";
        config.insert("hidden_size".into(), json!(if falcon { 32 } else { width }));
        let inner = if falcon { "ffn_hidden_size" } else { "intermediate_size" };
        config.insert(inner.into(), json!(inner_width));
        // Phi-3's lists of factors are those of heads of eight columns.
        if config["num_attention_heads"] == 3 {
            config.insert("num_attention_heads".into(), json!(width / 8));
        }
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

/// Products in 8 bits have the same bits if kernels round their own results and if separate passes do, in every family
/// and for every level of keeping.
#[test]
fn operands_rounded_by_their_kernels_change_no_bit() -> Result<()> {
    let Some(gpu) = judge::gpu() else { return Ok(()) };
    let mut rounded = 0;
    for case in cases_of(48, 48) {
        let (mut decoder, adapter) = decoder_on(&case, DType::BF16, &gpu);
        let gradients = |decoder: &Decoder, keep: Keep| -> Result<(f64, Vec<f64>)> {
            flat::zero(&adapter.grads)?;
            let keep = vec![keep; decoder.layers.len()];
            let loss = decoder.forward_backward(&adapter, &keep, &batch(&decoder.facts), 0.5)?.value()?;
            Ok((loss, cpu::to_f64(&adapter.grads.to_device(&Device::Cpu)?)?))
        };
        let other = gradients(&decoder, Keep::Everything)?;
        decoder.frozen = Precision::Fp8;
        let mut expected = None;
        for (keep, on) in Keep::ALL.into_iter().flat_map(|keep| [(keep, false), (keep, true)]) {
            Change::Rounded.set(on);
            let found = gradients(&decoder, keep);
            Change::Rounded.set(true);
            let found = found?;
            assert!(found.0.is_finite() && found != other, "{}: not in 8 bits", case.name);
            let first = expected.get_or_insert_with(|| found.clone());
            assert!(*first == found, "{}, {}, rounded {on}: other bits", case.name, keep.name());
        }
        for linear in decoder.layers[0].linears() {
            let ((rows, cols), member) = (linear.weight.dims(), adapter.member(linear));
            rounded += usize::from(fp8::takes(rows, cols) && inside::spare(cols, &[member], 13) > 0);
        }
    }
    assert!(rounded > 50, "only {rounded} layers are in 8 bits with LoRA beside them");
    Ok(())
}

/// Returns batches of different examples that have one shape: as many rows, targets and places for examples, with sets
/// of frequencies, tiles and targets of their own.
fn batches_of_one_shape(facts: &Facts, smoothing: f64, noise: f64) -> Vec<Batch> {
    let of = |(seed, lengths): (usize, &[usize])| {
        let mut batch = Batch { label_smoothing: smoothing, noise, ..Batch::default() };
        for &length in lengths {
            let ids: Vec<u32> =
                (0..length).map(|i| ((i * 11 + length * 3 + seed * 5) % facts.vocab) as u32).collect();
            let supervised: Vec<bool> = (0..length).map(|i| (i + seed) % 3 != 1).collect();
            batch.push(&ids, &supervised, 3 + length, (length * 1000 + seed) as u64);
        }
        batch
    };
    [&[7, 1, 5][..], &[4, 6, 2], &[3, 9], &[7, 1, 5], &[2, 2, 8]].into_iter().enumerate().map(of).collect()
}

/// A pass by its graph has the bits of the same pass launch by launch, for every batch. A batch that was filled up has
/// the loss and the gradients of the examples alone.
#[test]
fn graphs_have_the_bits_of_their_passes() -> Result<()> {
    if judge::gpu().is_none() {
        return Ok(());
    }
    // Work that other tests queue on a shared stream would be recorded too.
    let gpu = cuda::device::open(0).expect("it opened before");
    let mut replayed = 0;
    for (number, case) in wide_cases().into_iter().enumerate() {
        for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::BF16, 5e-2)] {
            // Half of the cases in each type: this takes a minute otherwise.
            if (number + usize::from(dtype == DType::F32)) % 2 == 0 {
                continue;
            }
            let (decoder, adapter) = decoder_on(&case, dtype, &gpu);
            let (smoothing, noise) = if number / 4 % 2 == 1 { (0.1, 5.0) } else { (0.0, 0.0) };
            let batches = batches_of_one_shape(&decoder.facts, smoothing, noise);
            let levels = [Keep::Everything, Keep::LayerInputs][number / 2 % 2];
            let keep = vec![levels; decoder.layers.len()];
            // The gradients of all passes, each with a scale of its own, add up.
            let run = |recorder: &mut Recorder, filled: bool| -> Result<(Vec<f64>, Vec<f64>)> {
                flat::zero(&adapter.grads)?;
                let pass = |(at, batch): (usize, &Batch)| {
                    let scale = 0.5 / (at + 1) as f64;
                    let pass =
                        TrainingPass { decoder: &decoder, adapter: &adapter, keep: &keep, batch, scale };
                    match filled {
                        true => recorder.pass(pass, None),
                        false => decoder.forward_backward(&adapter, &keep, batch, scale),
                    }
                };
                let losses = batches.iter().enumerate().map(pass).collect::<Result<Vec<_>>>()?;
                let losses = losses.iter().map(|loss| loss.value()).collect::<Result<Vec<_>>>()?;
                Ok((losses, cpu::to_f64(&adapter.grads.to_device(&Device::Cpu)?)?))
            };
            let (losses, gradients) = run(&mut Recorder::default(), false)?;
            let (without, mut with) = (run(&mut Recorder::new(0), true)?, Recorder::new(u64::MAX));
            let found = run(&mut with, true)?;
            assert_eq!(with.refusal(), None, "{}, {dtype:?}", case.name);
            assert_eq!(found, without, "{}, {dtype:?}: other bits", case.name);
            for (found, loss) in found.0.iter().zip(&losses) {
                let near = (found - loss).abs() / loss;
                assert!(near < tolerance, "{}, {dtype:?}: loss {found}, alone {loss}", case.name);
            }
            let distance = distance(&found.1, &gradients);
            assert!(distance < tolerance, "{}, {dtype:?}: {distance:.1e}", case.name);
            let has_graph = !adapter.has_magnitudes() && adapter.tokens.is_empty();
            assert_eq!(with.size().0, usize::from(has_graph), "{}, {dtype:?}", case.name);
            replayed += with.size().0;
        }
    }
    assert!(replayed > 20, "only {replayed} cases have graphs");
    Ok(())
}

/// Memory that runs out while a pass is recorded, and graphs that are given up to have theirs, change no bit.
#[test]
fn a_pass_that_cannot_be_recorded_goes_launch_by_launch() -> Result<()> {
    if judge::gpu().is_none() {
        return Ok(());
    }
    let gpu = cuda::device::open(0).expect("it opened before");
    let (decoder, adapter) = decoder_on(&cases()[0], DType::BF16, &gpu);
    let keep = vec![Keep::Everything; decoder.layers.len()];
    let batch = &batches_of_one_shape(&decoder.facts, 0.0, 0.0)[0];
    let one = TrainingPass { decoder: &decoder, adapter: &adapter, keep: &keep, batch, scale: 0.5 };
    let pass = |recorder: &mut Recorder| -> Result<(f64, Vec<f64>)> {
        flat::zero(&adapter.grads)?;
        let loss = recorder.pass(one, None)?.value()?;
        Ok((loss, cpu::to_f64(&adapter.grads.to_device(&Device::Cpu)?)?))
    };
    let expected = pass(&mut Recorder::new(0))?;
    for at in [1, 30] {
        let mut recorder = Recorder::new(u64::MAX);
        assert_eq!(pass(&mut recorder)?, expected);
        starve::set(Some((at, 1)));
        assert_eq!(pass(&mut recorder)?, expected, "allocation {at} of the recorded pass fails");
        let refusal = recorder.refusal().expect("a refusal");
        assert!(refusal.contains("CUDA_ERROR_OUT_OF_MEMORY"), "{refusal}");
        assert_eq!((recorder.refusal(), recorder.size()), (None, (0, 0)), "it is told once");
        assert_eq!(pass(&mut recorder)?, expected);
    }
    let mut recorder = Recorder::new(u64::MAX);
    for _ in 0..3 {
        assert_eq!(pass(&mut recorder)?, expected);
    }
    assert_eq!(recorder.size().0, 1);
    assert!(recorder.give_up());
    assert_eq!((pass(&mut recorder)?, recorder.size(), recorder.give_up()), (expected, (0, 0), false));
    // After a short pass, the layers whose gradients are complete are reported.
    let (mut recorder, mut told) = (Recorder::new(u64::MAX), Vec::new());
    for _ in 0..2 {
        let mut done = |layer| {
            told.push(layer);
            Ok(())
        };
        recorder.pass(one, Some(&mut done))?;
    }
    assert_eq!((told, recorder.size().0), (vec![2, 1, 0, 2, 1, 0], 1));
    Ok(())
}

fn distance(found: &[f64], expected: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(found, expected)| found - expected));
    difference / norm(&mut expected.iter().copied())
}
