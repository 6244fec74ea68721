//! The worth of each change of the GPU engine: steps of a workload with it and without it, in turn, on one model; and
//! the host's own time for a launch.
//!
//! `ours changes --folder F [--workloads packed,long,short] [--only NAMES] [--rounds 2] [--steps 6]
//! [--precision bf16|fp8]`: for each change the median seconds of a step, launches and peak memory on both sides, and
//! whether the losses have the same bits. Results so far are in the `--out` file after each change.
//! `ours host [--rounds 7] [--passes 20]`: host microseconds for each launch and product of a tiny model's pass, with
//! all changes, without each that concerns the host, and without all of these; and those for a token that is
//! generated, with a graph and without. On a GPU the host runs ahead of it; on the fake driver with
//! HONE_FAKE_GPU_IDLE=1 nothing is computed, so that only the host's time is left.

use std::path::Path;
use std::time::Instant;

use candle_core::Device;
use hone::facts::{FourBitCode, Keep, LoraOptions, Precision, Quantization, shapes};
use hone::model::batch::Batch;
use hone::model::decoder::Decoder;
use hone::model::residency::Home;
use hone::model::{self, load};
use hone::ops::change::Change;
use hone::report::Report;
use serde_json::{Value, json};

use super::{Result, decoder, median, memory, steps, train};

/// Returns the changes of a list of names; all that a precision has if it is empty.
fn chosen(names: &str, precision: Precision) -> Vec<Change> {
    let wanted: Vec<&str> = names.split(',').filter(|name| !name.is_empty()).collect();
    let is_wanted = |change: &Change| match change {
        // These are of serving: `ours serve` measures both sides.
        Change::Graphs | Change::Ahead | Change::Added => false,
        Change::Rounded if precision != Precision::Fp8 => false,
        _ => wanted.is_empty() || wanted.contains(&change.name()),
    };
    Change::ALL.into_iter().filter(is_wanted).collect()
}

/// One side of a comparison.
#[derive(Default)]
struct Side {
    seconds: Vec<f64>,
    losses: Vec<u64>,
    launches: Option<u64>,
    peak_bytes: Value,
}

impl Side {
    fn json(&self) -> Value {
        json!({
            "step_seconds_median": median(&self.seconds), "step_seconds": self.seconds, "launches_a_step": self.launches,
            "peak_allocated_bytes": self.peak_bytes,
        })
    }
}

/// `ours changes`.
pub fn changes(
    folder: &Path,
    workloads: &str,
    names: &str,
    [rounds, count]: [usize; 2],
    precision: Precision,
    device: &Device,
    keep: impl Fn(&Value) -> Result<()>,
) -> Result<Value> {
    let model = decoder(folder, precision, device)?;
    let expanded = if precision == Precision::Fp8 { model.0.layers.len() } else { 0 };
    // Weights in 8 bits are kept, as the memory plan does on a large card.
    model.0.keep_expanded(expanded);
    let mut found = Vec::new();
    for workload in workloads.split(',') {
        let all = steps(folder, workload)?;
        let timed = &all[..count.min(all.len())];
        // The first steps load kernels and choose algorithms.
        train(&model, timed, 2e-5, Keep::Everything)?;
        for change in chosen(names, precision) {
            let mut sides = [Side::default(), Side::default()];
            for on in (0..rounds).flat_map(|round| if round % 2 == 0 { [false, true] } else { [true, false] })
            {
                change.set(on);
                if change == Change::Expanded {
                    model.0.keep_expanded(if on { model.0.layers.len() } else { 0 });
                }
                let level = if change == Change::Beside { Keep::HostInputs } else { Keep::Everything };
                let ran = one(&model, timed, level, device, &mut sides[usize::from(on)]);
                change.set(true);
                ran?;
            }
            model.0.keep_expanded(expanded);
            let [off, on] = &sides;
            println!(
                "{workload}, {}: {:.2} ms a step without, {:.2} with",
                change.name(),
                1e3 * median(&off.seconds),
                1e3 * median(&on.seconds)
            );
            found.push(json!({
                "change": change.name(), "precision": precision.name(), "workload": workload, "with": on.json(), "without": off.json(),
                "saved_milliseconds": 1e3 * (median(&off.seconds) - median(&on.seconds)),
                "same_losses": on.losses == off.losses,
            }));
            keep(&json!({ "contender": "hone", "changes": &found }))?;
        }
    }
    Ok(json!({ "contender": "hone", "precision": precision.name(), "changes": found }))
}

/// Trains the steps from the same parameters and adds what was measured to a side.
fn one(
    model: &(model::decoder::Decoder, model::lora::Trainable),
    timed: &[Vec<hone::dataset::Example>],
    keep: Keep,
    device: &Device,
    side: &mut Side,
) -> Result<()> {
    let before = model.1.params.to_device(&Device::Cpu)?.copy()?;
    memory::begin(device)?;
    let done = train(model, timed, 2e-5, keep)?;
    hone::ops::flat::write(&model.1.params, &before)?;
    model.1.refresh()?;
    // Metrics arrive one step late and the last two together, so the last is left out.
    let counted = &done[..done.len() - 1];
    side.seconds.extend(counted.windows(2).skip(1).map(|pair| pair[1].seconds - pair[0].seconds));
    side.losses = done.iter().map(|done| done.loss.to_bits()).collect();
    if let [.., before, last] = counted {
        side.launches = last.launches.zip(before.launches).map(|(last, before)| last - before);
    }
    side.peak_bytes = memory::used(device)?["peak_allocated_bytes"].clone();
    Ok(())
}

/// Changes that save the host time.
const OF_THE_HOST: [Change; 3] = [Change::Functions, Change::Algorithms, Change::Onto];

/// `ours host`.
pub fn host([rounds, passes]: [usize; 2], device: &Device) -> Result<Value> {
    let quantization = Quantization::FourBit { code: FourBitCode::Nf4, double: true };
    let lora = LoraOptions::default();
    let options = model::Options { folder: "".into(), quantization, lora, precision: Precision::Bf16 };
    let decoder = load::random(&Home::Device, shapes::facts("tiny")?, &options, device, &Report::silent())?;
    let adapter = decoder.trainable(&options.lora)?;
    let keep = vec![Keep::Everything; decoder.layers.len()];
    let mut batch = Batch::default();
    for example in 0..2 {
        let ids: Vec<u32> = (0..16).map(|i| (i * 37 + example * 11) % decoder.facts.vocab as u32).collect();
        batch.push(&ids, &[true; 16], 16, u64::from(example));
    }
    let mut sides = vec![("with all", Vec::new())];
    sides.extend(OF_THE_HOST.map(Change::name).map(|name| (name, Vec::new())));
    sides.push(("without all", Vec::new()));
    let mut launches = vec![0; sides.len()];
    // The first round loads kernels.
    for round in 0..=rounds {
        for (at, (name, seconds)) in sides.iter_mut().enumerate() {
            let is_off = |change: &Change| *name == "without all" || *name == change.name();
            OF_THE_HOST.into_iter().for_each(|change| change.set(!is_off(&change)));
            let before = hone::device::launches().unwrap_or(0);
            let mut spent = 0.0;
            for _ in 0..passes {
                device.synchronize()?;
                let began = Instant::now();
                let loss = decoder.forward_backward(&adapter, &keep, &batch, 1.0)?;
                spent += began.elapsed().as_secs_f64();
                drop(loss);
            }
            launches[at] = (hone::device::launches().unwrap_or(0) - before) / passes as u64;
            if round > 0 {
                seconds.push(spent / passes as f64);
            }
        }
    }
    OF_THE_HOST.into_iter().for_each(|change| change.set(true));
    let rows: Vec<Value> = sides
        .iter()
        .zip(launches)
        .map(|((name, seconds), launches)| {
            let a_launch = |seconds: f64| 1e6 * seconds / launches.max(1) as f64;
            json!({
                "without": name, "launches": launches, "microseconds_a_launch": a_launch(median(seconds)),
                "least": seconds.iter().copied().map(a_launch).fold(f64::MAX, f64::min),
                "most": seconds.iter().copied().map(a_launch).fold(0.0, f64::max),
                "microseconds_a_pass": 1e6 * median(seconds),
            })
        })
        .collect();
    Ok(json!({ "contender": "hone", "host": rows, "decode": decode([rounds, passes], &decoder)? }))
}

/// Returns the microseconds from one token to the next of a sequence of at most 64 tokens, launch by launch and by a
/// graph. A tiny model leaves little but the host's own time.
#[cfg(feature = "cuda")]
fn decode([rounds, passes]: [usize; 2], decoder: &Decoder) -> Result<Value> {
    use hone::model::cache::Cache;
    use hone::model::lora::{Lora, Mixture};
    use hone::model::pass::Step;
    use hone::ops::largest;
    let mut cache = Cache::new(&decoder.facts, 64, 64, candle_core::DType::BF16, &decoder.device)?;
    let pages = cache.reserve(64, &[]).ok_or("no page is free")?.pages;
    let mixture = Mixture::new(Vec::new());
    let mut token = |position: usize, graphs: bool| -> Result<()> {
        let mut step = Step::default();
        step.push(&[7], position, pages.clone(), 64);
        step.wanted.push(0);
        if !graphs {
            let logits = decoder.step(&step, &mut cache, Lora::Mixed(&mixture))?;
            return Ok(largest::tokens(&logits).map(|_| ())?);
        }
        let mixture = Mixture::new(Vec::new());
        let decoded = decoder.decode(&step, &mut cache, &mixture, None, 1)?;
        Ok(decoded.map(|_| ()).ok_or("no graph holds this step")?)
    };
    let mut sides = [(false, Vec::new(), 0), (true, Vec::new(), 0)];
    // The first round loads kernels and records the graph.
    for round in 0..=rounds {
        for (graphs, seconds, launches) in &mut sides {
            let (before, began) = (hone::device::launches().unwrap_or(0), Instant::now());
            (0..passes.max(3)).try_for_each(|pass| token(pass % 60, *graphs))?;
            let passes = passes.max(3) as f64;
            if round > 0 {
                seconds.push(began.elapsed().as_secs_f64() / passes);
                *launches = (hone::device::launches().unwrap_or(0) - before) / passes as u64;
            }
        }
    }
    let side = |(graphs, seconds, launches): &(bool, Vec<f64>, u64)| json!({ "graphs": graphs, "launches_a_token": launches, "microseconds_a_token": 1e6 * median(seconds) });
    Ok(sides.iter().map(side).collect())
}

/// Returns no figures, since there are no graphs without CUDA.
#[cfg(not(feature = "cuda"))]
fn decode(_: [usize; 2], _: &Decoder) -> Result<Value> {
    Ok(json!([]))
}
