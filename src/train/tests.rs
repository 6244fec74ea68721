//! Tests of disturbed steps: memory that runs out, spikes, updates without effect.

use serde_json::json;

use super::best::{self, Judging};
use super::spike::{Policy, Spikes};
use super::*;
use crate::dataset::Example;
use crate::facts::config::Config;
use crate::facts::{FourBitCode, Keep, LoraOptions, Precision, Quantization, Tokens, family};
use crate::fault::{Kind, Result};
use crate::memory::Running;
use crate::memory::{self, Machine, Place, cost::Rates};
use crate::model::decoder::Decoder;
use crate::model::lora::Trainable;
use crate::model::{load, random};
use crate::ops::starve;
use crate::report::Report;

/// Returns a decoder of random weights, and a new adapter with dropout.
pub(super) fn decoder() -> (Decoder, Trainable) {
    decoder_of_rank(LoraOptions::default().r)
}

pub(super) fn decoder_of_rank(r: usize) -> (Decoder, Trainable) {
    decoder_with(LoraOptions { r, ..LoraOptions::default() })
}

fn decoder_with(lora: LoraOptions) -> (Decoder, Trainable) {
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
        lora: LoraOptions { dropout: 0.1, ..lora },
        precision: Precision::F32,
    };
    let decoder = load::load(facts, &options, &candle_core::Device::Cpu, &Report::silent()).unwrap();
    let adapter = decoder.trainable(&options.lora).unwrap();
    (decoder, adapter)
}

/// Returns twelve examples of four lengths.
pub(super) fn examples() -> Vec<Example> {
    let example = |i: usize| Example {
        ids: (0..9 + 5 * (i % 4)).map(|j| ((i * 17 + j * j * 5) % 61) as u32).collect(),
        supervised: (0..9 + 5 * (i % 4)).map(|j| j > 3).collect(),
    };
    (0..12).map(example).collect()
}

/// Returns a memory plan that has smaller ones.
pub(super) fn running(decoder: &Decoder, adapter: &Trainable) -> Running {
    let task = memory::Task {
        facts: decoder.facts.clone(),
        sites: adapter.sites.clone(),
        tokens: adapter.tokens.clone(),
        quantization: Quantization::FourBit { code: FourBitCode::Nf4, double: true },
        precision: Precision::F32,
        dropout: true,
        bf16_checkpoint: true,
        tokens_min: 24,
        tokens_max: 128,
        example_tokens: 16,
        eight_bit_moments: false,
        keep: None,
        residency: None,
    };
    let rates = Rates { matrix: 1e11, copy: 1e10, link: 1e10, peer: 1e9, measured: false };
    let machine = Machine {
        name: "a test".into(),
        place: Place::Cpu { threads: 1 },
        memory: 1 << 30,
        taken: 0,
        capability: None,
        rates,
        ranks: 1,
        host: None,
    };
    Running::start(task, machine).unwrap()
}

/// Returns (losses of the steps, parameters at the end, levels at the end). `fails_at`: the first allocation of the run
/// to fail, and how many fail.
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

/// Returns the evaluations of a run of six steps with two sources, and the best by `judging`.
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

/// Returns the options of a run whose steps differ: one example each, in the dataset's order.
fn uneven(steps: u64, spikes: Option<Spikes>) -> Options {
    Options {
        learning_rate: 1e-2,
        schedule: Schedule::Constant,
        batch_examples: 1,
        packing: None,
        order_seed: None,
        steps_max: Some(steps),
        logging: Every::Steps(1),
        checkpoint: Every::Steps(1),
        spikes,
        ..Options::default()
    }
}

fn rule(policy: Policy, factor: f64) -> Option<Spikes> {
    Some(Spikes { policy, factor, window: 3 })
}

/// Returns the result, the parameters at the end, and the lines of metrics. `folder` keeps checkpoints.
fn outcome(options: &Options, folder: Option<&std::path::Path>) -> (Result<Trained>, Vec<f64>, Vec<Metric>) {
    // Matrices of rank 128 have 8-bit moments, unless they have few rows.
    outcome_of(if options.eight_bit_moments { decoder_of_rank(128) } else { decoder() }, options, folder)
}

fn outcome_of(
    (decoder, adapter): (Decoder, Trainable),
    options: &Options,
    folder: Option<&std::path::Path>,
) -> (Result<Trained>, Vec<f64>, Vec<Metric>) {
    let data = Data { train: &examples(), evaluation: &[] };
    let checkpoints = folder.map(|folder| Checkpoints { folder: folder.to_owned(), fingerprint: "a".into() });
    let mut lines = Vec::new();
    let mut log = |metric: &Metric| {
        lines.push(metric.clone());
        Ok(())
    };
    let mut passes = Passes::Fixed(Keep::Everything);
    let (report, checkpoints) = (Report::silent(), checkpoints.as_ref());
    let ended = run(&decoder, &adapter, data, options, &mut passes, checkpoints, &report, &mut log);
    (ended, crate::ops::cpu::to_f64(&adapter.params).unwrap(), lines)
}

#[test]
fn skipped_spikes_change_nothing_and_a_continued_run_skips_the_same() {
    let (plain, unjudged, _) = outcome(&uneven(12, None), None);
    let (calm, judged, _) = outcome(&uneven(12, rule(Policy::Skip, 1e9)), None);
    assert!(unjudged == judged, "a run without spikes is the same run");
    assert_eq!((plain.unwrap().skipped_steps, calm.unwrap().skipped_steps), (0, 0));
    let options = |steps| uneven(steps, rule(Policy::Skip, 1.1));
    let (trained, expected, lines) = outcome(&options(12), None);
    let trained = trained.unwrap();
    assert!((1..9).contains(&trained.skipped_steps), "{trained:?}");
    assert!(expected != unjudged);
    assert_eq!((trained.steps, lines.len()), (12, 12), "a skipped step counts, and its line is written");
    for steps in 1..12 {
        let folder = tempfile::tempdir().unwrap();
        outcome(&options(steps), Some(folder.path())).0.unwrap();
        let (again, params, rest) = outcome(&options(12), Some(folder.path()));
        let again = again.unwrap();
        assert_eq!((again.resumed_at, again.skipped_steps), (Some(steps), trained.skipped_steps));
        assert!(params == expected && rest[..] == lines[steps as usize..], "continued after step {steps}");
    }
}

#[test]
fn a_run_with_8_bit_moments_learns_and_is_continued_to_the_same_bits() {
    let options = |steps| Options { eight_bit_moments: true, ..uneven(steps, None) };
    let (trained, expected, lines) = outcome(&options(6), None);
    let trained = trained.unwrap();
    let (faster, other, _) = outcome(&Options { loraplus_ratio: Some(4.0), ..options(6) }, None);
    let (full, _, _) = outcome(&uneven(6, None), None);
    let (full_faster, _, _) = outcome(&Options { loraplus_ratio: Some(4.0), ..uneven(6, None) }, None);
    // With LoRA+, the rate of B is four times as large, and so is the effect of rounding its moments.
    let cases = [(&trained, full.unwrap(), 0.03), (&faster.unwrap(), full_faster.unwrap(), 0.05)];
    for (narrow, full, most) in cases {
        assert_eq!(narrow.first_loss, full.first_loss);
        let apart = (narrow.loss - full.loss).abs() / full.loss;
        assert!(apart > 0.0 && apart < most, "{} in 8 bits, {} in 32", narrow.loss, full.loss);
    }
    assert!(other != expected, "LoRA+ has a rate of its own for B");
    let folder = tempfile::tempdir().unwrap();
    outcome(&options(3), Some(folder.path())).0.unwrap();
    let (again, params, rest) = outcome(&options(6), Some(folder.path()));
    assert_eq!(again.unwrap().resumed_at, Some(3));
    assert!(params == expected && rest[..] == lines[3..]);
}

/// Magnitudes, and rows of tokens in both tables.
#[test]
fn a_run_with_magnitudes_and_trained_tokens_is_continued_to_the_same_bits() {
    let start = || {
        let tokens = Tokens { embedding: vec![17, 22, 5], head: vec![22] };
        decoder_with(LoraOptions { dora: true, tokens, ..LoraOptions::default() })
    };
    let (_, before) = start();
    let before = crate::ops::cpu::to_f64(&before.params).unwrap();
    let (trained, expected, lines) = outcome_of(start(), &uneven(6, None), None);
    trained.unwrap();
    let (_, adapter) = start();
    let moved = |values: std::ops::Range<usize>| before[values.clone()] != expected[values];
    assert!(
        adapter.sites.iter().all(|site| moved(site.magnitudes().unwrap())),
        "every layer's magnitudes learn"
    );
    assert!(adapter.tokens.iter().all(|rows| moved(rows.values())), "rows of both tables learn");
    let folder = tempfile::tempdir().unwrap();
    outcome_of(start(), &uneven(3, None), Some(folder.path())).0.unwrap();
    let (again, params, rest) = outcome_of(start(), &uneven(6, None), Some(folder.path()));
    assert_eq!(again.unwrap().resumed_at, Some(3));
    assert!(params == expected && rest[..] == lines[3..]);
}

#[test]
fn a_skipped_step_leaves_parameters_and_moments_as_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let options = uneven(12, rule(Policy::Skip, 1.1));
    outcome(&options, Some(folder.path())).0.unwrap();
    let tensors = |step: u64| {
        let file = folder.path().join(format!("step-{step}/tensors.safetensors"));
        candle_core::safetensors::load(file, &candle_core::Device::Cpu).unwrap()
    };
    let skipped = |step: u64| {
        let state = std::fs::read(folder.path().join(format!("step-{step}/state.json"))).unwrap();
        let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
        state["manifest"]["state"]["spikes"]["skipped"].as_u64().unwrap()
    };
    let mut same = 0;
    for step in 2..=12 {
        let (before, after) = (tensors(step - 1), tensors(step));
        let is_same = before.iter().all(|(name, tensor)| {
            crate::ops::cpu::to_f64(tensor).unwrap() == crate::ops::cpu::to_f64(&after[name]).unwrap()
        });
        assert_eq!(is_same, skipped(step) > skipped(step - 1), "step {step}");
        same += u64::from(is_same);
    }
    assert_eq!(same, skipped(12));
}

#[test]
fn a_spike_stops_the_run_if_that_is_asked() {
    let (ended, _, lines) = outcome(&uneven(12, rule(Policy::Stop, 1.1)), None);
    let fault = ended.unwrap_err();
    assert_eq!(fault.kind, Kind::Diverged);
    assert!(fault.message.contains("is more than 1.1 times"), "{fault}");
    assert!(fault.message.starts_with(&format!("training diverged at step {}", lines.len() + 1)), "{fault}");
    assert!(lines.len() >= 3, "no step is judged before the window is full");
}

#[test]
fn spikes_without_end_stop_the_run_too() {
    // Every step exceeds nothing.
    let options = uneven(40, rule(Policy::Skip, 0.0));
    let (ended, ..) = outcome(&options, None);
    let fault = ended.unwrap_err();
    assert!(fault.kind == Kind::Diverged && fault.message.contains("and the 10 steps before it"), "{fault}");
}

#[test]
fn updates_without_effect_are_no_training() {
    let same = Options { grad_norm_max: None, ..uneven(40, None) };
    let only: Vec<Example> = examples().into_iter().take(1).collect();
    let train = |options: &Options| {
        let (decoder, adapter) = decoder();
        let data = Data { train: &only, evaluation: &[] };
        let mut passes = Passes::Fixed(Keep::Everything);
        run(&decoder, &adapter, data, options, &mut passes, None, &Report::silent(), &mut |_| Ok(()))
    };
    for (learning_rate, steps) in [(1e-38, 40), (1e-38, 8), (1e-38, 100)] {
        let options = Options { learning_rate, steps_max: Some(steps), epsilon: 1e-8, ..same.clone() };
        let fault = train(&options).unwrap_err();
        assert_eq!(fault.kind, Kind::Diverged);
        let told = ["exactly the same in all of", "has no effect after"];
        assert!(told.iter().any(|told| fault.message.contains(told)), "{fault}");
    }
    assert!(train(&same).is_ok());
}
