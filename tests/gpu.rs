//! The CUDA engine as a whole, on a GPU or on `tests/gpu`'s driver without one: bf16 training beside f32, what a step
//! asks of the device, and running out of its memory.
#![cfg(feature = "cuda")]

use std::path::{Path, PathBuf};

use candle_core::Device;
use hone::dataset::Example;
use hone::device::{self, Choice};
use hone::model::decoder::Decoder;
use hone::model::{FourBitCode, Keep, LoraOptions, Options, Precision, Quantization};
use hone::model::{config::Config, family, load};
use hone::report::Report;
use hone::train::{self, Every, Metric};

/// `None` where tests may run without a GPU and there is none.
fn gpu() -> Option<Device> {
    let required = std::env::var("HONE_TEST_GPU").is_ok_and(|value| value == "require");
    match device::open(Choice::Cuda(0), &Report::silent()) {
        Ok(device) => Some(device),
        Err(fault) if required => panic!("HONE_TEST_GPU=require, but {fault}"),
        Err(_) => None,
    }
}

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name).join("model")
}

fn decoder(name: &str, device: &Device, precision: Precision, dropout: f64) -> Decoder {
    let options = Options {
        folder: model(name),
        quantization: Quantization::FourBit { code: FourBitCode::Nf4, double: true },
        lora: LoraOptions { r: 4, alpha: 8.0, dropout, ..LoraOptions::default() },
        precision,
    };
    let facts = family::describe(&Config::read(&options.folder).unwrap()).unwrap();
    load::load(facts, &options, device, &Report::silent()).unwrap()
}

/// Examples of odd lengths, all tokens but the first supervised.
fn examples(vocab: u32) -> Vec<Example> {
    let example = |length: u32| Example {
        ids: (0..length).map(|i| (i * 37 + length * 11) % vocab).collect(),
        supervised: vec![true; length as usize],
    };
    [17, 5, 33, 64, 9, 21, 40, 2].into_iter().map(example).collect()
}

fn losses(decoder: &mut Decoder) -> Vec<f64> {
    let options = train::Options {
        learning_rate: 2e-3,
        batch_examples: 2,
        accumulation: 2,
        steps_max: Some(6),
        packing: Some(64),
        logging: Every::Steps(1),
        ..train::Options::default()
    };
    let examples = examples(decoder.facts.vocab as u32);
    let mut losses = Vec::new();
    let mut log = |metric: &Metric| {
        if let Metric::Step { loss, .. } = metric {
            losses.push(*loss);
        }
        Ok(())
    };
    let data = train::Data { train: &examples, evaluation: &examples[..2] };
    train::run(decoder, data, &options, None, None, &Report::silent(), &mut log).unwrap();
    losses
}

/// Dropout's masks follow tokens, so that they are the same on both; f32 sums differ in their order alone.
#[test]
fn training_in_f32_gives_the_losses_of_the_cpu() {
    let Some(gpu) = gpu() else { return };
    for (name, dropout) in [("llama3", 0.0), ("phi3", 0.1), ("gemma2", 0.0)] {
        let expected = losses(&mut decoder(name, &Device::Cpu, Precision::F32, dropout));
        let found = losses(&mut decoder(name, &gpu, Precision::F32, dropout));
        assert_eq!(found.len(), 6);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 2e-5, "{name}: {found}, on the CPU {expected}");
        }
    }
}

/// bf16 keeps eight bits: losses of about 6 within 3e-2 of f32's, and the same bits each time.
#[test]
fn training_in_bf16_stays_near_f32_and_repeats_bit_for_bit() {
    let Some(gpu) = gpu() else { return };
    let mut whole = decoder("llama3", &gpu, Precision::Bf16, 0.0);
    let found = losses(&mut whole);
    let mut less = decoder("llama3", &gpu, Precision::Bf16, 0.0);
    less.keep.fill(Keep::LayerInputs);
    assert_eq!(losses(&mut less), found, "what is kept changes nothing");
    let expected = losses(&mut decoder("llama3", &Device::Cpu, Precision::F32, 0.0));
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() < 3e-2, "{found}, in f32 {expected}");
    }
    assert!(found.last() < found.first(), "{found:?}");
}
