//! hone's side of the GPU session: trains on the folder that `reference.py prepare` filled, with the product's loop
//! `train::run`.
//!
//! `ours parity --folder F --precision f32|bf16|fp8 --out JSON`: five steps from the folder's adapter. Writes the
//! losses, and the first step's gradients to `F/ours-f32.safetensors`, or of another precision, under PEFT's names.
//! `ours speed --folder F --workloads packed,long,short [--warm 3] [--keep everything] [--precision bf16] --out JSON`:
//! seconds of each
//! step, tokens/s, peak memory. With `everything`, weights are kept expanded too, as the memory plan does on a large
//! card.
//! `ours serve --folder F [--batches 1,32] [--prompt 128] [--tokens 128] --out JSON`: tokens/s that are decoded,
//! alone, with one adapter and with four, launches a step, seconds from the start to the first token.
//! `ours random --folder F`: random weights for the folder's config.json, if no reference stack can write them.
//! `ours study --folder F --precision f32|bf16|fp8 --seed N [--steps 320] [--rank 8] --out JSON`: trains a new adapter
//! on the folder's workload `study-N`, evaluates the examples of `held`, and writes the adapter to `F/trained`, from
//! which `parity` can take gradients.
//! `ours changes` and `ours host`: see `changes.rs`.
//! `--device cpu` trains on the CPU; the default is the first GPU.

mod changes;

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{Device, Tensor};
use hone::dataset::Example;
use hone::device::{self, Choice};
use hone::facts::config::Config;
use hone::facts::{FourBitCode, Keep, LoraOptions, Precision, Quantization, family};
use hone::generate::engine::{self, Engine};
use hone::generate::{Engine as _, Event, Request, Strength};
use hone::model::batch::Batch;
use hone::model::decoder::Decoder;
use hone::model::lora::Trainable;
use hone::model::{self, load, random};
use hone::ops::change::Change;
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
    let out = flag("--out", "");
    // A stage that runs out of its time has left what it found.
    let write = |found: &Value| match out.as_str() {
        "" => Ok(()),
        file => Ok(std::fs::write(file, found.to_string())?),
    };
    let result = match arguments.first().map(String::as_str) {
        Some("parity") => parity(&folder, &flag("--precision", "bf16"), &open(&flag("--device", "cuda:0"))?)?,
        Some("speed") => {
            let warm = flag("--warm", "3").parse()?;
            speed(
                &folder,
                &flag("--workloads", "packed,long,short"),
                warm,
                level(&flag("--keep", "everything"))?,
                named(&flag("--precision", "bf16"))?,
                &open(&flag("--device", "cuda:0"))?,
                write,
            )?
        }
        Some("serve") => {
            let numbers = |name, default| -> Result<Vec<usize>> {
                Ok(flag(name, default).split(',').map(str::parse).collect::<std::result::Result<_, _>>()?)
            };
            let (batches, prompt, tokens) =
                (numbers("--batches", "1,32")?, numbers("--prompt", "128")?, numbers("--tokens", "128")?);
            serve(&folder, &batches, prompt[0], tokens[0], &open(&flag("--device", "cuda:0"))?, write)?
        }
        Some("study") => {
            let options = LoraOptions {
                r: flag("--rank", "8").parse()?,
                seed: flag("--seed", "1").parse()?,
                ..LoraOptions::default()
            };
            let steps = flag("--steps", "320").parse()?;
            study(&folder, &flag("--precision", "bf16"), options, steps, &open(&flag("--device", "cpu"))?)?
        }
        Some("changes") => {
            let numbers = [flag("--rounds", "2").parse()?, flag("--steps", "6").parse()?];
            let (workloads, only) = (flag("--workloads", "packed,long,short"), flag("--only", ""));
            let (precision, device) =
                (named(&flag("--precision", "bf16"))?, open(&flag("--device", "cuda:0"))?);
            changes::changes(&folder, &workloads, &only, numbers, precision, &device, write)?
        }
        Some("host") => {
            let numbers = [flag("--rounds", "7").parse()?, flag("--passes", "20").parse()?];
            changes::host(numbers, &open(&flag("--device", "cuda:0"))?)?
        }
        Some("random") => {
            let facts = family::describe(&Config::read(&folder)?)?;
            random::write(&folder, &facts, 1)?;
            json!({ "parameters": facts.parameters() })
        }
        // `cargo test --all-targets` and `cargo bench` start it without arguments.
        _ => {
            println!(
                "ours parity|speed|study|changes|host|serve|random --folder F ...: see the head of benches/gpu/ours.rs"
            );
            return Ok(());
        }
    };
    if out.is_empty() {
        println!("{result}");
    }
    write(&result)
}

fn open(name: &str) -> Result<Device> {
    let choice = match name.strip_prefix("cuda:") {
        Some(number) => Choice::Cuda(number.parse()?),
        None => Choice::Cpu,
    };
    Ok(device::open(choice, &Report::silent())?)
}

/// Returns a level by its name.
fn level(name: &str) -> Result<Keep> {
    let found = Keep::ALL.into_iter().find(|keep| keep.name() == name);
    found.ok_or_else(|| format!("--keep {name}: expected one of {:?}", Keep::ALL.map(Keep::name)).into())
}

/// Returns steps of a workload, each a list of examples.
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
    keep: Keep,
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
    let mut passes = Passes::Fixed(keep);
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

/// Returns a precision by its name.
fn named(precision: &str) -> Result<Precision> {
    Precision::named(precision)
        .ok_or_else(|| format!("--precision {precision}: expected f32, bf16 or fp8").into())
}

/// Returns the losses of a run from a new adapter, and the loss of held-out examples behind it.
fn study(folder: &Path, precision: &str, lora: LoraOptions, count: usize, device: &Device) -> Result<Value> {
    let workload = steps(folder, &format!("study-{}", lora.seed))?;
    let facts = family::describe(&Config::read(folder)?)?;
    let quantization = Quantization::FourBit { code: FourBitCode::Nf4, double: true };
    let options =
        model::Options { folder: folder.to_owned(), quantization, lora, precision: named(precision)? };
    let decoder = load::load(facts, &options, device, &Report::silent())?;
    // Weights in 8 bits are made once, on a CPU too.
    decoder.keep_expanded(if options.precision == Precision::Fp8 { decoder.layers.len() } else { 0 });
    let made = (decoder.trainable(&options.lora)?, decoder);
    let made = (made.1, made.0);
    let before = held_out(&made, folder)?;
    let done = train(&made, &workload[..count.min(workload.len())], 1e-3, Keep::Everything)?;
    let after = held_out(&made, folder)?;
    let trained = folder.join("trained");
    std::fs::create_dir_all(&trained)?;
    std::fs::write(trained.join(hone::adapter::WEIGHTS_FILE), hone::adapter::weights(&made.1)?)?;
    let losses: Vec<f64> = done.iter().map(|done| done.loss).collect();
    Ok(json!({
        "precision": precision, "seed": options.lora.seed, "losses": losses, "held_before": before,
        "held_after": after, "seconds": done.last().map_or(0.0, |done| done.seconds),
    }))
}

/// Returns the mean loss of the folder's examples `held`.
fn held_out((decoder, adapter): &(Decoder, Trainable), folder: &Path) -> Result<f64> {
    let (mut sum, mut targets) = (0.0, 0);
    for step in steps(folder, "held")? {
        let mut batch = Batch::default();
        for example in &step {
            batch.push(&example.ids, &example.supervised, example.ids.len(), 0);
        }
        sum += decoder.loss(&batch, adapter.evaluated())?.value()?;
        targets += batch.targets.len();
    }
    Ok(sum / targets as f64)
}

fn parity(folder: &Path, precision: &str, device: &Device) -> Result<Value> {
    let of = named(precision)?;
    let steps = steps(folder, "parity")?;
    // The gradients of a run that ends after its first step are still in their buffer.
    let first = decoder(folder, of, device)?;
    train(&first, &steps[..1], 1e-4, Keep::Everything)?;
    write_gradients(&first.1, &folder.join(format!("ours-{precision}.safetensors")))?;
    drop(first);
    let done = train(&decoder(folder, of, device)?, &steps, 1e-4, Keep::Everything)?;
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

fn speed(
    folder: &Path,
    workloads: &str,
    warm: usize,
    keep: Keep,
    precision: Precision,
    device: &Device,
    write: impl Fn(&Value) -> Result<()>,
) -> Result<Value> {
    let began = Instant::now();
    let decoder = decoder(folder, precision, device)?;
    let load_seconds = began.elapsed().as_secs_f64();
    if keep == Keep::Everything && Change::Expanded.is_on() {
        decoder.0.keep_expanded(decoder.0.layers.len());
    }
    let mut found = serde_json::Map::new();
    for workload in workloads.split(',') {
        let steps = steps(folder, workload)?;
        found.insert(workload.into(), measure(&decoder, &steps, warm, keep, device)?);
        write(&json!({ "contender": "hone", "load_seconds": load_seconds, "workloads": &found }))?;
    }
    Ok(json!({ "contender": "hone", "load_seconds": load_seconds, "workloads": found }))
}

fn measure(
    decoder: &(Decoder, Trainable),
    steps: &[Vec<Example>],
    warm: usize,
    keep: Keep,
    device: &Device,
) -> Result<Value> {
    memory::begin(device)?;
    let done = train(decoder, steps, 2e-5, keep)?;
    // From one step's metrics to the next one's. Metrics arrive one step late and the last two together, so the
    // last is left out.
    let counted = &done[..done.len() - 1];
    let seconds: Vec<f64> = counted.windows(2).map(|pair| pair[1].seconds - pair[0].seconds).collect();
    let timed = seconds.get(warm.saturating_sub(1)..).filter(|timed| !timed.is_empty());
    let timed =
        timed.ok_or_else(|| format!("{} steps are too few after {warm} that are not timed", done.len()))?;
    let median = median(timed);
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

fn median(values: &[f64]) -> f64 {
    let mut ordered = values.to_vec();
    ordered.sort_by(f64::total_cmp);
    match ordered.len() {
        0 => f64::NAN,
        count => (ordered[(count - 1) / 2] + ordered[count / 2]) / 2.0,
    }
}

/// Rank of the adapters that are served.
const SERVED_RANK: usize = 16;
const SERVED: [&str; 4] = ["a", "b", "c", "d"];

fn serve(
    folder: &Path,
    batches: &[usize],
    prompt: usize,
    tokens: usize,
    device: &Device,
    write: impl Fn(&Value) -> Result<()>,
) -> Result<Value> {
    let began = Instant::now();
    let (decoder, _) = decoder(folder, Precision::Bf16, device)?;
    let load_seconds = began.elapsed().as_secs_f64();
    let adapters =
        (1..).zip(SERVED).map(|(seed, _)| drawn_adapter(&decoder, seed)).collect::<Result<Vec<_>>>()?;
    let most = batches.iter().copied().max().unwrap_or(1);
    let options = engine::Options {
        sequences: most,
        waiting: most,
        context: Some(prompt + tokens),
        cache_tokens: most * (prompt + tokens).next_multiple_of(32),
        cache: hone::memory::serving::CacheType::Bf16,
    };
    let vocab = decoder.facts.vocab as u32;
    memory::begin(device)?;
    let engine = Engine::start(decoder, &options, "a bench".into(), &Report::silent())?;
    let began = Instant::now();
    let first = generated(&engine, &[request(prompt, 1, 0, vocab)])?;
    let first_seconds = began.elapsed().as_secs_f64();
    for (name, adapter) in SERVED.into_iter().zip(&adapters) {
        engine.load_adapter(name, adapter.path())?;
    }
    let mut found = Vec::new();
    for &batch in batches {
        for (name, adapters) in [("base", 0), ("one adapter", 1), ("four adapters", 4)] {
            let requests: Vec<Request> = (0..batch)
                .map(|i| {
                    let adapter = SERVED.get(i % adapters.max(1)).filter(|_| adapters > 0);
                    let strength = |name: &&str| Strength { name: (*name).into(), strength: 1.0 };
                    let request = request(prompt, tokens, i as u32 + 1, vocab);
                    Request { adapters: adapter.iter().copied().map(strength).collect(), ..request }
                })
                .collect();
            // In turn: launch by launch; as graphs without kernels that begin early; as graphs; as graphs with launches
            // of their own for the adapters; as graphs whose kernels begin early but ask for nothing ahead.
            let mut sides: [Vec<_>; 5] = Default::default();
            let off = [
                Some(Change::Graphs),
                Some(Change::Early),
                None,
                Some(Change::Added).filter(|_| adapters > 0),
                Some(Change::Ahead),
            ];
            for (side, off) in (0..SERVE_RUNS).flat_map(|_| off.into_iter().enumerate()) {
                if side == 3 && off.is_none() {
                    continue;
                }
                off.iter().for_each(|change| change.set(false));
                let ran = generated(&engine, &requests);
                off.iter().for_each(|change| change.set(true));
                sides[side].push(ran?);
            }
            let [without, late, with, apart, behind] = sides.each_ref().map(|runs| rates(runs));
            let [plain, _, runs, _, _] = &sides;
            found.push(json!({
                "batch": batch, "adapters": name, "tokens_per_second": with[SERVE_RUNS / 2], "rates": with,
                "seconds_to_first": runs[SERVE_RUNS / 2].first_seconds,
                "launches_a_step": runs[SERVE_RUNS - 1].launches_a_step,
                "rates_without_early": late, "rates_without_ahead": behind,
                "rates_without_graphs": without, "rates_without_added": apart,
                "launches_a_step_without_graphs": plain[0].launches_a_step,
            }));
            write(&json!({ "contender": "hone", "load_seconds": load_seconds, "serving": &found }))?;
        }
    }
    let mut found = json!({
        "contender": "hone", "load_seconds": load_seconds, "first_token_seconds": first_seconds,
        "first_token_after_start_seconds": load_seconds + first_seconds, "prompt": prompt, "tokens": tokens,
        "first_tokens": first.tokens, "serving": found,
    });
    if let (Some(found), Value::Object(memory)) = (found.as_object_mut(), memory::used(device)?) {
        found.extend(memory);
    }
    Ok(found)
}

/// Returns the tokens a second of each run, ascending.
fn rates(runs: &[Generated]) -> Vec<f64> {
    let mut rates: Vec<f64> = runs.iter().map(|run| run.tokens as f64 / run.seconds).collect();
    rates.sort_by(f64::total_cmp);
    rates
}

/// Runs of each case and side; the median counts.
const SERVE_RUNS: usize = 3;

/// Returns a prompt of its own for each number, so that nothing is shared.
fn request(prompt: usize, tokens: usize, number: u32, vocab: u32) -> Request {
    let prompt = (0..prompt as u32).map(|i| 3 + (i * 7919 + number * 104_729) % (vocab - 3));
    Request::greedy(prompt.collect(), tokens)
}

/// Time of requests that started together, from the moment when all of them had their first token.
struct Generated {
    tokens: usize,
    seconds: f64,
    first_seconds: f64,
    launches_a_step: Option<f64>,
}

fn generated(engine: &Engine, requests: &[Request]) -> Result<Generated> {
    let began = Instant::now();
    let submitted = requests.iter().map(|request| engine.submit(request.clone()));
    let mut answers =
        submitted.collect::<std::result::Result<Vec<_>, _>>().map_err(|refusal| format!("{refusal:?}"))?;
    let mut left = 0;
    for (answer, request) in answers.iter_mut().zip(requests) {
        left += request.max_tokens - 1;
        while !matches!(answer.wait(), Some(Event::Token(_))) {}
    }
    // Those that came first have generated meanwhile what does not count.
    let (first, launches) = (Instant::now(), device::launches());
    let before = engine.counters().generated_tokens;
    for answer in &mut answers {
        loop {
            match answer.wait() {
                Some(Event::Finished(..)) => break,
                Some(Event::Failed(fault)) => return Err(fault.into()),
                Some(_) => {}
                None => return Err("an answer without an end".into()),
            }
        }
    }
    let seconds = first.elapsed().as_secs_f64();
    let tokens = (engine.counters().generated_tokens - before) as usize;
    let steps = tokens as f64 / requests.len() as f64;
    let launches = device::launches().zip(launches).map(|(after, before)| (after - before) as f64 / steps);
    Ok(Generated {
        tokens: tokens.min(left),
        seconds,
        first_seconds: (first - began).as_secs_f64(),
        launches_a_step: launches,
    })
}

/// Returns a PEFT folder with random matrices.
fn drawn_adapter(decoder: &Decoder, seed: u64) -> Result<tempfile::TempDir> {
    let options = LoraOptions { r: SERVED_RANK, alpha: SERVED_RANK as f64, seed, ..LoraOptions::default() };
    let trainable = decoder.trainable(&options)?;
    let count = trainable.params.elem_count();
    let value = |i: u64| (hone::ops::dropout::mix(seed ^ i) >> 40) as f32 / (1 << 24) as f32 - 0.5;
    let values: Vec<f32> = (0..count as u64).map(|i| 0.02 * value(i)).collect();
    let params = Tensor::from_vec(values, count, &Device::Cpu)?;
    hone::ops::flat::write(&trainable.params, &params)?;
    let folder = tempfile::tempdir()?;
    let config = hone::adapter::config(
        &trainable.sites,
        &trainable.tokens,
        decoder.facts.layers.len(),
        &options,
        "a bench",
    );
    std::fs::write(folder.path().join(hone::adapter::CONFIG_FILE), serde_json::to_vec(&config)?)?;
    std::fs::write(folder.path().join(hone::adapter::WEIGHTS_FILE), hone::adapter::weights(&trainable)?)?;
    Ok(folder)
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
        let peak = device::pool(cuda)?.1 + device::graphs_peak(cuda)?;
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
