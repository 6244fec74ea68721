//! A model folder or a named shape -> training speed on this machine, compared with the machine's limits, as a table
//! and JSON. The benchmark runs the real trainer on random tokens.

mod lengths;
mod rates;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value as Json, json};

use crate::dataset::Example;
use crate::device::{self, Choice};
use crate::facts::Facts;
use crate::facts::config::Config;
use crate::facts::sites;
use crate::facts::{FourBitCode, Keep, LoraOptions, Precision, Quantization, Residency, family, shapes};
use crate::fault::{Fault, Result};
use crate::memory::{self, Limit, Machine, Running, Task};
use crate::model::decoder::Decoder;
use crate::model::lora::Trainable;
use crate::model::{self, load};
use crate::ranks::Alone;
use crate::report::Report;
use crate::train::{self, Data, Every, Passes};
use crate::whole;
use crate::words::{self, size};
use rates::Measured;

/// The model and the steps that are timed.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The base model.
    pub base: Base,
    /// The device to train on.
    pub device: Choice,
    /// Type to which the inputs of matrix products are rounded.
    pub precision: Precision,
    /// Whether the base is stored in 4 bits (NF4, with quantised scales); otherwise it stays as the checkpoint has
    /// it.
    pub quantized: bool,
    /// Rank of the adapter.
    pub rank: usize,
    /// Tokens in an optimizer step.
    pub tokens: usize,
    /// Lengths of the examples: `one`, `mixed`, a number, or a file.
    pub lengths: String,
    /// Number of steps to measure.
    pub steps: usize,
    /// Number of steps before them that are not measured.
    pub warmup: usize,
    /// The amount that layers keep; `None`: as much as memory allows.
    pub keep: Option<Keep>,
    /// The place of the layers' 4-bit weights; `None`: on the device if they fit.
    pub residency: Option<Residency>,
    /// Upper limit of the memory to use.
    pub memory_max: Option<Limit>,
    /// Upper limit of the tokens in one pass.
    pub pass_tokens_max: Option<usize>,
}

/// A base model to measure.
#[derive(Clone, Debug, PartialEq)]
pub enum Base {
    /// A model folder.
    Folder(PathBuf),
    /// A shape of `facts::shapes` by its name, with random weights.
    Shape(String),
}

/// The result of a measurement.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    base: String,
    parameters: usize,
    trainable: usize,
    device: String,
    options: Options,
    examples: usize,
    measured: Measured,
    plan: memory::Plan,
    load_seconds: f64,
    /// Seconds of each measured step, in ascending order.
    seconds: Vec<f64>,
    /// Operations of a step, without those that are computed again.
    flops: f64,
    loss: f64,
    launches: Option<f64>,
    peak_bytes: Option<u64>,
}

/// Measures the machine, then trains and measures the steps.
pub fn run(options: &Options, report: &Report) -> Result<Outcome> {
    let (facts, base) = facts(&options.base)?;
    let lengths = lengths::of_step(&options.lengths, options.tokens)?;
    let device = device::open(options.device, report)?;
    let model = model_options(options);
    let dtype = load::activation_type(&device, options.precision);
    let measured = rates::measure(&device, dtype, options.precision.beside())?;
    let mut machine = Machine::of(&device, options.memory_max);
    (machine.rates.copy, machine.rates.matrix) = (measured.copy, measured.matrix);
    machine.rates.measured = true;
    let task = task(options, &facts, &model, &lengths)?;
    let flops = memory::useful_flops(&task, &machine, options.tokens);
    let memory = Running::start(task, machine)?;
    let (device_name, plan) = (memory.machine.name.clone(), memory.plan.clone());
    let (home, began) = (memory.home(Arc::new(Alone)), Instant::now());
    let decoder = match &options.base {
        Base::Folder(_) => load::load_at(&home, facts, &model, &device, report)?,
        Base::Shape(_) => load::random(&home, facts, &model, &device, report)?,
    };
    let adapter = decoder.trainable(&model.lora)?;
    device.synchronize()?;
    let load_seconds = began.elapsed().as_secs_f64();
    let timed = train(options, &decoder, &adapter, &lengths, memory, report)?;
    Ok(Outcome {
        base,
        parameters: decoder.facts.parameters(),
        trainable: adapter.params.elem_count(),
        device: device_name,
        options: options.clone(),
        examples: lengths.len(),
        measured,
        plan,
        load_seconds,
        seconds: timed.seconds,
        flops,
        loss: timed.loss,
        launches: timed.launches,
        peak_bytes: device::memory_peak(&device),
    })
}

fn facts(base: &Base) -> Result<(Facts, String)> {
    match base {
        Base::Folder(folder) => Ok((family::describe(&Config::read(folder)?)?, folder.display().to_string())),
        Base::Shape(name) => Ok((shapes::facts(name)?, name.clone())),
    }
}

fn model_options(options: &Options) -> model::Options {
    let folder = match &options.base {
        Base::Folder(folder) => folder.clone(),
        Base::Shape(_) => PathBuf::new(),
    };
    let quantization = match options.quantized {
        true => Quantization::FourBit { code: FourBitCode::Nf4, double: true },
        false => Quantization::None,
    };
    let lora = LoraOptions { r: options.rank, alpha: options.rank as f64, ..LoraOptions::default() };
    model::Options { folder, quantization, lora, precision: options.precision }
}

fn task(options: &Options, facts: &Facts, model: &model::Options, lengths: &[usize]) -> Result<Task> {
    let longest = lengths.iter().copied().max().unwrap_or(1);
    Ok(Task {
        facts: facts.clone(),
        sites: sites::sites(facts, &model.lora)?.list,
        tokens: Vec::new(),
        quantization: model.quantization,
        precision: model.precision,
        dropout: false,
        bf16_checkpoint: true,
        tokens_min: longest,
        tokens_max: options.pass_tokens_max.unwrap_or(options.tokens).clamp(longest, options.tokens),
        example_tokens: options.tokens / lengths.len().max(1),
        eight_bit_moments: false,
        keep: options.keep,
        residency: options.residency,
    })
}

struct Timed {
    seconds: Vec<f64>,
    loss: f64,
    launches: Option<f64>,
}

/// Trains steps whose examples have the same lengths and different tokens. Each is timed from one log line to the
/// next.
fn train(
    options: &Options,
    decoder: &Decoder,
    adapter: &Trainable,
    lengths: &[usize],
    memory: Running,
    report: &Report,
) -> Result<Timed> {
    let steps = options.warmup.max(1) + options.steps;
    let vocab = decoder.facts.vocab as u32;
    let example = |step: usize, at: usize, length: usize| Example {
        ids: (0..length).map(|i| token(step, at, i) % vocab).collect(),
        supervised: vec![true; length],
    };
    let examples: Vec<Example> = (0..=steps)
        .flat_map(|step| lengths.iter().enumerate().map(move |(at, length)| example(step, at, *length)))
        .collect();
    let train_options = train::Options {
        learning_rate: 1e-4,
        batch_examples: lengths.len(),
        steps_max: Some(steps as u64 + 1),
        packing: Some(options.tokens),
        order_seed: None,
        logging: Every::Steps(1),
        ..train::Options::default()
    };
    let mut marks: Vec<(Instant, Option<u64>)> = Vec::new();
    let mut last = 0.0;
    let mut log = |metric: &train::Metric| {
        if let train::Metric::Step { loss, .. } = metric {
            last = *loss;
        }
        marks.push((Instant::now(), device::launches()));
        Ok(())
    };
    let data = Data { train: &examples, evaluation: &[] };
    let mut passes = Passes::planned(memory);
    train::run(decoder, adapter, data, &train_options, &mut passes, None, report, &mut log)?;
    // A GPU's step is logged while the next one runs, and the last two are logged together. So one step more is run
    // than is counted.
    marks.truncate(steps);
    let counted = &marks[options.warmup.max(1) - 1..];
    let mut seconds: Vec<f64> =
        counted.windows(2).map(|pair| (pair[1].0 - pair[0].0).as_secs_f64()).collect();
    if seconds.is_empty() {
        return Err(Fault::usage("--steps: expected 1 or more"));
    }
    seconds.sort_by(f64::total_cmp);
    let launched = |mark: Option<&(Instant, Option<u64>)>| mark.and_then(|mark| mark.1);
    let launches = match (launched(counted.first()), launched(counted.last())) {
        (Some(first), Some(last)) => Some((last - first) as f64 / seconds.len() as f64),
        _ => None,
    };
    Ok(Timed { seconds, loss: last, launches })
}

/// Returns a token. Any tokens are suitable; these have no period that a step would repeat.
fn token(step: usize, example: usize, i: usize) -> u32 {
    let place = (step as u64) << 42 | (example as u64) << 24 | i as u64;
    crate::ops::dropout::mix(place) as u32
}

impl Outcome {
    fn median(&self) -> f64 {
        self.seconds[self.seconds.len() / 2]
    }

    fn rate(&self, seconds: f64) -> f64 {
        self.options.tokens as f64 / seconds
    }

    /// Returns the step's share of the measured rate of matrix products.
    fn share(&self) -> f64 {
        self.flops / self.median() / self.measured.matrix
    }

    /// Returns the result as a table for people.
    pub fn table(&self) -> String {
        let (least, most) = (self.seconds[0], self.seconds[self.seconds.len() - 1]);
        let rows = [
            ("base", format!("{}, {} parameters", self.base, words::count(self.parameters as u64))),
            ("device", self.device.clone()),
            (
                "measured",
                format!(
                    "copies {}, products {}",
                    words::rate(self.measured.copy, "B"),
                    words::rate(self.measured.matrix, "FLOP")
                ),
            ),
            ("step", format!("{} tokens in {} examples", self.options.tokens, self.examples)),
            ("plan", format!("{}, {}", self.plan.choice(), size(self.plan.bytes()))),
            ("load", format!("{:.1} s", self.load_seconds)),
            (
                "speed",
                format!(
                    "{:.0} tokens/s ({:.0} to {:.0} in {} steps), {:.1} ms a step",
                    self.rate(self.median()),
                    self.rate(most),
                    self.rate(least),
                    self.seconds.len(),
                    1e3 * self.median()
                ),
            ),
            ("share", format!("{:.1} % of the measured rate of products", 100.0 * self.share())),
            ("launches", self.launches.map_or("none".into(), |launches| format!("{launches:.0} a step"))),
            ("peak memory", self.peak_bytes.map_or("not known".into(), size)),
            ("loss", format!("{:.4}", self.loss)),
        ];
        rows.iter().map(|(name, text)| format!("{name:<12} {text}\n")).collect()
    }

    /// Writes the result as JSON.
    ///
    /// # Errors
    /// Config: its folder is not there. Storage: the file cannot be written.
    pub fn save(&self, file: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.json()).expect("texts and numbers");
        whole::write_named(file, (text + "\n").as_bytes())
    }

    /// Returns the result as JSON.
    pub fn json(&self) -> Json {
        json!({
            "hone": env!("CARGO_PKG_VERSION"),
            "base": self.base, "parameters": self.parameters, "trainable_parameters": self.trainable,
            "device": self.device,
            "precision": self.options.precision.name(),
            "quantized": self.options.quantized, "rank": self.options.rank,
            "tokens": self.options.tokens, "examples": self.examples, "lengths": self.options.lengths,
            "copy_bytes_per_second": self.measured.copy, "matrix_flops_per_second": self.measured.matrix,
            "plan": {
                "tokens": self.plan.tokens, "bytes": self.plan.bytes(), "seconds": self.plan.seconds,
                "keep": self.plan.keep.iter().map(|keep| keep.name()).collect::<Vec<_>>(),
            },
            "load_seconds": self.load_seconds, "step_seconds": self.seconds,
            "tokens_per_second": self.rate(self.median()), "matrix_share": self.share(),
            "flops": self.flops, "launches": self.launches, "peak_bytes": self.peak_bytes, "loss": self.loss,
        })
    }
}
