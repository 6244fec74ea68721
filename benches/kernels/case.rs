//! A kernel at a shape: its inputs, its run, the expected results; checked and timed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;
use serde_json::{Value, json};

use hone::ops::dropout::mix;
use hone::ops::matmul::Weight;
use hone::ops::{cpu, cuda, rows};

use crate::roof::Roof;

/// The device of the cases, and their storage type.
pub struct Gpu {
    pub device: Device,
    pub dtype: DType,
    /// Whether sizes are small, for the fake driver.
    pub small: bool,
}

/// An input of a run.
pub struct Inputs {
    pub tensors: Vec<Tensor>,
    /// Frozen: no run changes it.
    pub weight: Option<Weight>,
}

type Make = Box<dyn Fn() -> Result<Inputs>>;
pub type Run = Box<dyn Fn(&Inputs) -> Result<Vec<Tensor>>>;
/// Inputs and outputs -> pairs (found, expected) on the CPU.
type Judge = Box<dyn Fn(&Inputs, &[Tensor]) -> Result<Vec<(Tensor, Tensor)>>>;

pub struct Case {
    pub name: String,
    /// The least that must move through the card's memory, and that must be computed.
    pub bytes: f64,
    pub flops: f64,
    pub exact: bool,
    /// Fresh random inputs.
    pub make: Make,
    /// The outputs. An operation that works in place returns its inputs.
    pub run: Run,
    pub judge: Judge,
}

/// Seed of the next random tensor; `main` sets it to the time.
pub static SEED: AtomicU64 = AtomicU64::new(0);
/// Random numbers per task.
const CHUNK: usize = 1 << 16;
/// Bytes that inputs rotate through: several times the largest cache.
const ROTATION_BYTES: usize = 256 << 20;
const SAMPLES: usize = 20;
/// Length of a sample, which is a row of launches, so that waiting for its end does not count.
const SAMPLE_SECONDS: f64 = 2e-3;
/// A kernel below this share of its roof is named.
const SHARE_MIN: f64 = 0.7;

impl From<Vec<Tensor>> for Inputs {
    fn from(tensors: Vec<Tensor>) -> Inputs {
        Inputs { tensors, weight: None }
    }
}

impl std::ops::Index<usize> for Inputs {
    type Output = Tensor;
    fn index(&self, at: usize) -> &Tensor {
        &self.tensors[at]
    }
}

impl Inputs {
    fn bytes(&self) -> usize {
        self.tensors.iter().map(size).sum::<usize>() + self.weight.as_ref().map_or(0, Weight::bytes)
    }

    /// Copies the inputs, for operations that work in place.
    fn copy(&self) -> Result<Inputs> {
        let tensors = self.tensors.iter().map(Tensor::copy).collect::<Result<_>>()?;
        Ok(Inputs { tensors, weight: self.weight.clone() })
    }
}

impl Gpu {
    /// Returns values that are about normal, in the storage type.
    pub fn random(&self, shape: impl Into<candle_core::Shape>, deviation: f64) -> Result<Tensor> {
        rows::convert(&self.random_f32(shape, deviation)?, self.dtype)
    }

    /// Returns sums of four uniform numbers, made by all cores.
    pub fn random_f32(&self, shape: impl Into<candle_core::Shape>, deviation: f64) -> Result<Tensor> {
        let shape = shape.into();
        let tensor = mix(SEED.fetch_add(1, Ordering::Relaxed));
        // Four numbers of 16 bits have variance 4/12.
        let scale = (deviation * 3f64.sqrt() / 65_536.0) as f32;
        let mut values = vec![0f32; shape.elem_count()];
        values.par_chunks_mut(CHUNK).enumerate().for_each(|(at, values)| {
            let chunk = mix(tensor ^ at as u64);
            for (i, value) in values.iter_mut().enumerate() {
                let bits = mix(chunk.wrapping_add(i as u64));
                let sum: u64 = (0..4).map(|part| bits >> (16 * part) & 0xffff).sum();
                *value = (sum as f32 - 131_070.0) * scale;
            }
        });
        Tensor::from_vec(values, shape, &self.device)
    }

    fn synchronize(&self) -> Result<()> {
        self.device.synchronize()
    }

    /// Returns the largest relative error that storage in this type explains.
    fn bound(&self) -> f64 {
        if self.dtype == DType::F32 { 1e-5 } else { 1e-2 }
    }
}

impl Case {
    pub fn check(&self, gpu: &Gpu) -> Value {
        let began = Instant::now();
        let bound = if self.exact { 0.0 } else { gpu.bound() };
        let name = format!("{} {}", self.name, gpu.dtype.as_str());
        match self.compare() {
            Ok((error, repeats)) => json!({
                "name": name, "error": error, "bound": bound, "repeats": repeats,
                "seconds": began.elapsed().as_secs_f64(),
                "flag": if error <= bound && repeats { "" } else { "WRONG" },
            }),
            Err(error) => json!({ "name": name, "flag": format!("FAILED: {}", first_line(&error)) }),
        }
    }

    /// Returns (largest relative error of an output, whether two runs give the same bits).
    fn compare(&self) -> Result<(f64, bool)> {
        let inputs = (self.make)()?;
        let run = || (self.run)(&inputs.copy()?);
        let sizes = run()?.iter().map(size).collect::<Vec<usize>>();
        let device = inputs.tensors[0].device();
        poison(&sizes, device)?;
        let outputs = run()?;
        let mut error = 0f64;
        for (found, expected) in (self.judge)(&inputs, &outputs)? {
            // NaN must not pass as a small error: `max` would drop it.
            let one = distance(&found, &expected)?;
            error = if one.is_nan() { f64::INFINITY } else { error.max(one) };
        }
        poison(&sizes, device)?;
        let again = run()?;
        let mut repeats = true;
        for (first, second) in outputs.iter().zip(&again) {
            repeats &= same_bits(first, second)?;
        }
        Ok((error, repeats))
    }

    pub fn time(&self, gpu: &Gpu, roof: &Roof) -> Value {
        match self.seconds(gpu) {
            Ok(samples) => {
                let median = samples[samples.len() / 2];
                let (copying, computing) = (self.bytes / roof.copy, self.flops / roof.matrix);
                let share = copying.max(computing) / median;
                let rate = match copying > computing {
                    true => format!("{:.2} TB/s", self.bytes / median / 1e12),
                    false => format!("{:.0} TFLOP/s", self.flops / median / 1e12),
                };
                json!({
                    "name": self.name, "microseconds": median * 1e6, "microseconds_min": samples[0] * 1e6,
                    "microseconds_max": samples[samples.len() - 1] * 1e6, "bytes": self.bytes, "flops": self.flops,
                    "rate": rate, "share": share, "flag": if share < SHARE_MIN { "below 70 %" } else { "" },
                })
            }
            Err(error) => json!({ "name": self.name, "error": first_line(&error), "flag": "FAILED" }),
        }
    }

    /// Returns the seconds of a run in each sample, ascending.
    fn seconds(&self, gpu: &Gpu) -> Result<Vec<f64>> {
        let first = (self.make)()?;
        let sets = (ROTATION_BYTES / first.bytes().max(1) + 1).clamp(2, 16);
        let mut inputs = vec![first];
        for _ in 1..if gpu.small { 2 } else { sets } {
            inputs.push((self.make)()?);
        }
        let mut turn = inputs.iter().cycle();
        let mut batch = |runs: usize| -> Result<f64> {
            gpu.synchronize()?;
            let began = Instant::now();
            for _ in 0..runs {
                (self.run)(turn.next().expect("a cycle"))?;
            }
            gpu.synchronize()?;
            Ok(began.elapsed().as_secs_f64() / runs as f64)
        };
        batch(3)?;
        let runs = ((SAMPLE_SECONDS / batch(2)?) as usize).clamp(1, 64);
        let mut samples =
            (0..if gpu.small { 2 } else { SAMPLES }).map(|_| batch(runs)).collect::<Result<Vec<f64>>>()?;
        samples.sort_by(f64::total_cmp);
        Ok(samples)
    }
}

/// Returns the message without the trace that may follow it.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

pub fn size(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}

/// Allocates as much memory as the outputs, fills it with NaN and frees it. The next run gets this memory, because
/// the pool hands out what was freed last, and an element that a kernel leaves out then shows.
fn poison(sizes: &[usize], device: &Device) -> Result<()> {
    let filled = |&size: &usize| Tensor::from_vec(vec![u8::MAX; size], size, device);
    sizes.iter().map(filled).collect::<Result<Vec<Tensor>>>().map(drop)
}

/// ‖found - expected‖ / ‖expected‖
fn distance(found: &Tensor, expected: &Tensor) -> Result<f64> {
    assert_eq!(found.dims(), expected.dims(), "what is compared has one shape");
    let (found, expected) = (cpu::to_f64(found)?, cpu::to_f64(expected)?);
    let squares =
        |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let difference = squares(&mut found.iter().zip(&expected).map(|(found, expected)| found - expected));
    Ok(difference / squares(&mut expected.iter().copied()).max(f64::MIN_POSITIVE))
}

fn same_bits(first: &Tensor, second: &Tensor) -> Result<bool> {
    Ok(match first.dtype() {
        DType::F32 => bits(first, f32::to_bits)? == bits(second, f32::to_bits)?,
        DType::BF16 => bits(first, half::bf16::to_bits)? == bits(second, half::bf16::to_bits)?,
        _ => bits(first, |byte: u8| byte)? == bits(second, |byte: u8| byte)?,
    })
}

fn bits<T: candle_core::WithDType, B>(tensor: &Tensor, bits: impl Fn(T) -> B) -> Result<Vec<B>> {
    Ok(cuda::download::<T>(tensor)?.into_iter().map(bits).collect())
}
