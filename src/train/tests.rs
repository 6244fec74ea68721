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

/// The evaluations of a run of six steps with two sources, and the best by `judging`.
fn evaluated(options: Options) -> (Vec<Metric>, Trained) {
    let (decoder, adapter) = decoder();
    let all = examples();
    let source = |entry, name: &str, from: usize, to: usize| Source {
        entry,
        name: name.into(),
        examples: (&all[from..to]).into(),
    };
    // The sources have 7 and 2 examples, and other numbers of tokens.
    let sets =
        Sets { train: (&all).into(), evaluation: vec![source(1, "talks", 0, 7), source(4, "faq", 7, 9)] };
    let options = Options { learning_rate: 1e-2, batch_examples: 4, steps_max: Some(6), ..options };
    let mut found = Vec::new();
    let mut log = |metric: &Metric| {
        if matches!(metric, Metric::Evaluation { .. }) {
            found.push(metric.clone());
        }
        Ok(())
    };
    let mut passes = Passes::Fixed(Keep::Everything);
    let trained = run(&decoder, &adapter, sets, &options, &mut passes, None, &Report::silent(), &mut log);
    (found, trained.unwrap())
}

#[test]
fn each_source_has_its_loss_and_all_tokens_count_alike() {
    let (found, _) = evaluated(Options { evaluation: Every::Steps(3), ..Options::default() });
    assert_eq!(found.iter().map(Metric::step).collect::<Vec<_>>(), [3, 6]);
    let all = examples();
    let learned = |from: usize, to: usize| -> f64 {
        let count = |example: &Example| example.supervised[1..].iter().filter(|&&learned| learned).count();
        all[from..to].iter().map(count).sum::<usize>() as f64
    };
    let (talks, faq) = (learned(0, 7), learned(7, 9));
    for metric in found {
        let line = serde_json::to_value(&metric).unwrap();
        let value = |name: &str| line[name].as_f64().unwrap_or_else(|| panic!("{name} in {line}"));
        for name in ["loss", "mean_token_accuracy"] {
            let (a, b) = (value(&format!("eval_talks_{name}")), value(&format!("eval_faq_{name}")));
            assert!((a - b).abs() > 1e-4, "{name}: the sources differ");
            let mean = (a * talks + b * faq) / (talks + faq);
            assert!((value(&format!("eval_{name}")) - mean).abs() < 1e-12, "{name} in {line}");
        }
        assert_eq!(value("eval_perplexity"), value("eval_loss").exp());
    }
}

#[test]
fn the_best_may_be_that_of_one_source() {
    let by = |source| {
        let judging = Judging {
            source,
            measure: best::Measure::Loss,
            greater: true, // The first evaluation is the worst.
            restore: true,
            stopping: None,
        };
        let options = Options { evaluation: Every::Steps(2), judging: Some(judging), ..Options::default() };
        let (found, trained) = evaluated(options);
        (serde_json::to_value(&found[0]).unwrap(), trained.best.unwrap())
    };
    let (first, best) = by(Some((4, "faq".into())));
    assert_eq!((best.step, best.metric.as_str()), (2, "eval_faq_loss"));
    assert_eq!(Some(best.value), first["eval_faq_loss"].as_f64());
    let (first, best) = by(None);
    assert_eq!((best.metric.as_str(), Some(best.value)), ("eval_loss", first["eval_loss"].as_f64()));
}

#[test]
fn evaluations_come_when_the_keys_say() {
    let steps = |options| evaluated(options).0.iter().map(Metric::step).collect::<Vec<_>>();
    let every = |evaluation| Options { evaluation, ..Options::default() };
    assert_eq!(steps(Options { eval_on_start: true, ..every(Every::Steps(4)) }), [0, 4, 6]);
    assert_eq!(steps(Options { eval_delay: 4.0, ..every(Every::Steps(2)) }), [4, 6]);
    assert_eq!(steps(every(Every::Share(0.34))), [3, 6], "a share of the steps is rounded up");
    // Three steps an epoch: a delay of epochs.
    assert_eq!(steps(Options { eval_delay: 1.5, ..every(Every::Epoch) }), [6]);
    assert_eq!(steps(every(Every::Minutes(1e-9))), [1, 2, 3, 4, 5, 6], "time has always passed");
    assert_eq!(steps(every(Every::Minutes(1e6))), [6], "the last step is always evaluated");
}
