//! If memory runs out in the middle of a step, the step is done in another way with the same result.

use serde_json::json;

use super::*;
use crate::facts::config::Config;
use crate::facts::{FourBitCode, Keep, LoraOptions, Precision, Quantization, family};
use crate::memory::{self, Machine, Place, cost::Rates};
use crate::model::{load, random};
use crate::ops::starve;

fn decoder() -> (Decoder, Trainable) {
    let config = json!({
        "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 100.0,
    });
    let facts = family::describe(&Config::from_json(config.as_object().unwrap().clone())).unwrap();
    let folder = tempfile::tempdir().unwrap();
    random::write(folder.path(), &facts, 3).unwrap();
    let options = crate::model::Options {
        folder: folder.path().into(),
        quantization: Quantization::FourBit { code: FourBitCode::Nf4, double: true },
        lora: LoraOptions { dropout: 0.1, ..LoraOptions::default() },
        precision: Precision::F32,
    };
    let decoder = load::load(facts, &options, &candle_core::Device::Cpu, &Report::silent()).unwrap();
    let adapter = decoder.trainable(&options.lora).unwrap();
    (decoder, adapter)
}

fn examples() -> Vec<Example> {
    let example = |i: usize| Example {
        ids: (0..9 + 5 * (i % 4)).map(|j| ((i * 17 + j * j * 5) % 61) as u32).collect(),
        supervised: (0..9 + 5 * (i % 4)).map(|j| j > 3).collect(),
    };
    (0..12).map(example).collect()
}

fn running(decoder: &Decoder, adapter: &Trainable) -> Running {
    let task = memory::Task {
        facts: decoder.facts.clone(),
        sites: adapter.sites.clone(),
        quantization: Quantization::FourBit { code: FourBitCode::Nf4, double: true },
        precision: Precision::F32,
        dropout: true,
        bf16_checkpoint: true,
        tokens_min: 24,
        tokens_max: 128,
        example_tokens: 16,
        keep: None,
    };
    let rates = Rates { matrix: 1e11, copy: 1e10, link: 1e10, measured: false };
    let machine =
        Machine { name: "a test".into(), place: Place::Cpu { threads: 1 }, memory: 1 << 30, taken: 0, rates };
    Running::start(task, machine).unwrap()
}

/// (losses of the steps, parameters at the end, levels at the end). `fails_at`: the first allocation of the run to
/// fail, and how many fail.
fn train(fails_at: Option<(usize, usize)>) -> (Vec<f64>, Vec<f64>, Vec<Keep>) {
    let (decoder, adapter) = decoder();
    let mut passes = Passes::planned(running(&decoder, &adapter));
    let data = Data { train: &examples(), evaluation: &[] };
    let options = Options {
        learning_rate: 1e-2,
        // AdamW divides by a gradient's own size. Without this floor, a rounding error in the smallest gradients
        // would show as large as any.
        epsilon: 1e-3,
        batch_examples: 4,
        packing: Some(128),
        steps_max: Some(3),
        logging: Every::Steps(1),
        ..Options::default()
    };
    let mut losses = Vec::new();
    let mut log = |metric: &Metric| {
        if let Metric::Step { loss, .. } = metric {
            losses.push(*loss);
        }
        Ok(())
    };
    starve::set(fails_at);
    let ended = run(&decoder, &adapter, data, &options, &mut passes, None, &Report::silent(), &mut log);
    starve::set(None);
    ended.unwrap();
    (losses, crate::ops::cpu::to_f64(&adapter.params).unwrap(), passes.keep(3))
}

#[test]
fn a_step_that_ran_out_of_memory_is_done_again_with_the_same_result() {
    let (losses, params, keep) = train(None);
    assert_eq!(keep, [Keep::Everything; 3]);
    // Failures in the forward pass, in the backward pass, in a later step, and several in a row.
    for (at, times) in [(1, 1), (40, 1), (150, 1), (40, 5)] {
        let (again, found, kept) = train(Some((at, times)));
        assert_ne!(kept, keep, "{times} failures at {at}: the plan did not change");
        for (found, expected) in again.iter().chain(&found).zip(losses.iter().chain(&params)) {
            // Passes of another size add in another order.
            assert!((found - expected).abs() < 2e-5, "{times} failures at {at}: {found}, not {expected}");
        }
    }
}

#[test]
fn the_smallest_plan_is_the_last() {
    let (decoder, adapter) = decoder();
    let mut passes = Passes::planned(running(&decoder, &adapter));
    let data = Data { train: &examples(), evaluation: &[] };
    let options = Options { steps_max: Some(1), ..Options::default() };
    starve::set(Some((1, usize::MAX)));
    let ended =
        run(&decoder, &adapter, data, &options, &mut passes, None, &Report::silent(), &mut |_| Ok(()));
    starve::set(None);
    let fault = ended.unwrap_err();
    assert_eq!(fault.kind, Kind::Capacity);
    assert!(fault.message.contains("out of memory at step 1 with the smallest plan"), "{fault}");
}
