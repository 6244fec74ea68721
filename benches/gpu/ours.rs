//! hone's side of the GPU session: trains on the folder that `reference.py prepare` filled, with the product's loop
//! `train::run`.
//!
//! `ours parity --folder F --precision f32|bf16 --out JSON`: five steps from the folder's adapter. Writes the
//! losses, and the first step's gradients to `F/ours-f32.safetensors` or `F/ours-bf16.safetensors` under PEFT's
//! names.
//! `ours speed --folder F --workloads packed,long,short [--warm 3] --out JSON`: seconds of each step, tokens/s,
//! peak memory.
//! `ours random --folder F`: random weights for the folder's config.json, if no reference stack can write them.
//! `--device cpu` trains on the CPU; the default is the first GPU.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Device;
use hone::dataset::Example;
use hone::device::{self, Choice};
use hone::facts::config::Config;
use hone::facts::{FourBitCode, Keep, LoraOptions, Precision, Quantization, family};
use hone::model::decoder::Decoder;
use hone::model::lora::Trainable;
use hone::model::{self, load, random};
use hone::report::Report;
use hone::train::{self, Data, Every, Passes, Schedule};
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    hone::machine::keep_freed_memory();
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let flag = |name: &str, default: &str| {
        let at = arguments.iter().position(|argument| argument == name);
        at.and_then(|at| arguments.get(at + 1)).map_or(default.to_owned(), String::clone)
    };
    let folder = PathBuf::from(flag("--folder", "."));
    let result = match arguments.first().map(String::as_str) {
        Some("parity") => parity(&folder, &flag("--precision", "bf16"), &open(&flag("--device", "cuda:0"))?)?,
        Some("speed") => {
            let warm = flag("--warm", "3").parse()?;
            speed(
                &folder,
                &flag("--workloads", "packed,long,short"),
                warm,
                &open(&flag("--device", "cuda:0"))?,
            )?
        }
        Some("random") => {
            let facts = family::describe(&Config::read(&folder)?)?;
            random::write(&folder, &facts, 1)?;
            json!({ "parameters": facts.parameters() })
        }
        // `cargo test --all-targets` and `cargo bench` start it without arguments.
        _ => {
            println!("ours parity|speed|random --folder F ...: see the head of benches/gpu/ours.rs");
            return Ok(());
        }
    };
    match flag("--out", "").as_str() {
        "" => println!("{result}"),
        file => std::fs::write(file, result.to_string())?,
    }
    Ok(())
}

fn open(name: &str) -> Result<Device> {
    let choice = match name.strip_prefix("cuda:") {
        Some(number) => Choice::Cuda(number.parse()?),
        None => Choice::Cpu,
    };
    Ok(device::open(choice, &Report::silent())?)
}

/// Steps of a workload, each a list of examples.
fn steps(folder: &Path, workload: &str) -> Result<Vec<Vec<Example>>> {
    let text = std::fs::read(folder.join("examples.json"))?;
    let mut all: BTreeMap<String, Vec<Vec<Vec<u32>>>> = serde_json::from_slice(&text)?;
    let steps = all.remove(workload).ok_or_else(|| format!("examples.json has no workload {workload}"))?;
    let example = |ids: Vec<u32>| Example { supervised: vec![true; ids.len()], ids };
    Ok(steps.into_iter().map(|step| step.into_iter().map(example).collect()).collect())
}

fn decoder(folder: &Path, precision: Precision, device: &Device) -> Result<(Decoder, Trainable)> {
    let facts = family::describe(&Config::read(folder)?)?;
    let adapter = folder.join("adapter");
    let adapter = adapter.exists().then(|| hone::adapter::read(&adapter)).transpose()?;
    let asked = LoraOptions::default();
    let lora = adapter.as_ref().map_or(Ok(asked.clone()), |adapter| adapter.options(&asked))?;
    // A folder that bitsandbytes quantised is used as it is.
    let quantization = Quantization::FourBit { code: FourBitCode::Nf4, double: true };
    let options = model::Options { folder: folder.to_owned(), quantization, lora, precision };
    let decoder = load::load(facts, &options, device, &Report::silent())?;
    let trainable = decoder.trainable(&options.lora)?;
    if let Some(adapter) = adapter {
        adapter.apply(&trainable)?;
    }
    Ok((decoder, trainable))
}

/// Trains the steps as given: one update each, with its examples in one pass. The seconds are the times at which
/// each step's metrics arrived.
fn train(
    (decoder, adapter): &(Decoder, Trainable),
    steps: &[Vec<Example>],
    learning_rate: f64,
) -> Result<Vec<Done>> {
    let examples: Vec<Example> = steps.iter().flatten().cloned().collect();
    let tokens = steps.iter().flatten().map(|example| example.ids.len()).max().unwrap_or(0) * steps[0].len();
    let options = train::Options {
        learning_rate,
        schedule: Schedule::Constant,
        batch_examples: steps[0].len(),
        packing: Some(tokens),
        order_seed: None,
        epochs: 1.0,
        logging: Every::Steps(1),
        ..train::Options::default()
    };
    let began = Instant::now();
    let mut done = Vec::new();
    let mut log = |metric: &train::Metric| {
        if let train::Metric::Step { loss, grad_norm, .. } = *metric {
            done.push(Done {
                loss,
                grad_norm,
                seconds: began.elapsed().as_secs_f64(),
                launches: device::launches(),
            });
        }
        Ok(())
    };
    let data = Data { train: &examples, evaluation: &[] };
    let mut passes = Passes::Fixed(Keep::Everything);
    train::run(decoder, adapter, data, &options, &mut passes, None, &Report::silent(), &mut log)?;
    match done.len() == steps.len() {
        true => Ok(done),
        false => Err(format!("{} steps were logged, expected {}", done.len(), steps.len()).into()),
    }
}

struct Done {
    loss: f64,
    grad_norm: f64,
    /// Seconds since the first step began.
    seconds: f64,
    /// Peak memory of the process.
    launches: Option<u64>,
}

fn parity(folder: &Path, precision: &str, device: &Device) -> Result<Value> {
    let of = if precision == "f32" { Precision::F32 } else { Precision::Bf16 };
    let steps = steps(folder, "parity")?;
    // The gradients of a run that ends after its first step are still in their buffer.
    let first = decoder(folder, of, device)?;
    train(&first, &steps[..1], 1e-4)?;
    write_gradients(&first.1, &folder.join(format!("ours-{precision}.safetensors")))?;
    drop(first);
    let done = train(&decoder(folder, of, device)?, &steps, 1e-4)?;
    let losses: Vec<f64> = done.iter().map(|done| done.loss).collect();
    let norms: Vec<f64> = done.iter().map(|done| done.grad_norm).collect();
    Ok(json!({ "losses": losses, "gradient_norms": norms }))
}

fn write_gradients(trainable: &Trainable, file: &Path) -> Result<()> {
    let mut gradients = std::collections::HashMap::new();
    for site in &trainable.sites {
        let (a, b) = trainable.views(&trainable.grads.to_device(&Device::Cpu)?, site)?;
        gradients.insert(format!("base_model.model.{}.lora_A.weight", site.path), a.contiguous()?);
        gradients.insert(format!("base_model.model.{}.lora_B.weight", site.path), b.contiguous()?);
    }
    Ok(candle_core::safetensors::save(&gradients, file)?)
}

fn speed(folder: &Path, workloads: &str, warm: usize, device: &Device) -> Result<Value> {
    let began = Instant::now();
    let decoder = decoder(folder, Precision::Bf16, device)?;
    let load_seconds = began.elapsed().as_secs_f64();
    let mut found = serde_json::Map::new();
    for workload in workloads.split(',') {
        let steps = steps(folder, workload)?;
        found.insert(workload.into(), measure(&decoder, &steps, warm, device)?);
    }
    Ok(json!({ "contender": "hone", "load_seconds": load_seconds, "workloads": found }))
}

fn measure(
    decoder: &(Decoder, Trainable),
    steps: &[Vec<Example>],
    warm: usize,
    device: &Device,
) -> Result<Value> {
    memory::begin(device)?;
    let done = train(decoder, steps, 2e-5)?;
    // From one step's metrics to the next one's. Metrics arrive one step late and the last two together, so the
    // last is left out.
    let counted = &done[..done.len() - 1];
    let seconds: Vec<f64> = counted.windows(2).map(|pair| pair[1].seconds - pair[0].seconds).collect();
    let timed = seconds.get(warm.saturating_sub(1)..).filter(|timed| !timed.is_empty());
    let timed =
        timed.ok_or_else(|| format!("{} steps are too few after {warm} that are not timed", done.len()))?;
    let mut ordered = timed.to_vec();
    ordered.sort_by(f64::total_cmp);
    let median = (ordered[(ordered.len() - 1) / 2] + ordered[ordered.len() / 2]) / 2.0;
    let tokens: usize = steps[0].iter().map(|example| example.ids.len()).sum();
    let launches = match counted {
        [.., before, last] => last.launches.zip(before.launches).map(|(last, before)| last - before),
        _ => None,
    };
    let mut found = json!({
        "launches_a_step": launches, "tokens_a_step": tokens, "step_seconds_median": median, "step_seconds": timed,
        "tokens_per_second": tokens as f64 / median, "loss": done.last().map(|done| done.loss),
    });
    if let (Some(found), Value::Object(memory)) = (found.as_object_mut(), memory::used(device)?) {
        found.extend(memory);
    }
    Ok(found)
}

/// The use of the device's memory, under the names that `reference.py` uses.
#[cfg(feature = "cuda")]
mod memory {
    use candle_core::Device;
    use hone::ops::cuda::device;
    use serde_json::{Value, json};

    pub fn begin(device: &Device) -> super::Result<()> {
        if let Device::Cuda(cuda) = device {
            hone::ops::cuda::synchronize(cuda)?;
            device::reset_peak(cuda)?;
        }
        Ok(())
    }

    pub fn used(device: &Device) -> super::Result<Value> {
        let Device::Cuda(cuda) = device else { return Ok(json!({})) };
        let (free, total) = device::memory(cuda)?;
        let (_, peak) = device::pool(cuda)?;
        Ok(json!({ "peak_allocated_bytes": peak, "device_used_bytes": total - free }))
    }
}

#[cfg(not(feature = "cuda"))]
mod memory {
    use candle_core::Device;
    use serde_json::{Value, json};

    pub fn begin(_: &Device) -> super::Result<()> {
        Ok(())
    }

    pub fn used(_: &Device) -> super::Result<Value> {
        Ok(json!({}))
    }
}
