//! The two ceilings of the card, measured in the same minute: bytes per second of a copy, FLOP per second of a bf16
//! product.

use std::time::Instant;

use candle_core::Result;

use hone::ops::cuda::product::{Matrix, product};
use hone::ops::{flat, unwritten};

use crate::case::Gpu;

pub struct Roof {
    pub copy: f64,
    pub matrix: f64,
}

pub fn measure(gpu: &Gpu) -> Result<Roof> {
    let (values, width) = if gpu.small { (1 << 12, 64) } else { (1 << 28, 8192) };
    let (from, to) = (gpu.random_f32(values, 1.0)?, gpu.random_f32(values, 1.0)?);
    let copying = best(gpu, || flat::write(&to, &from))?;
    drop((from, to));
    let (a, b) = (gpu.random((width, width), 1.0)?, gpu.random((width, width), 1.0)?);
    let c = unwritten((width, width), gpu.dtype, &gpu.device)?;
    let of = |tensor| Matrix::rows(tensor, 0, width);
    let computing = best(gpu, || product([width; 3], 1.0, of(&a), of(&b).transposed(), 0.0, of(&c)))?;
    Ok(Roof { copy: 8.0 * values as f64 / copying, matrix: 2.0 * (width as f64).powi(3) / computing })
}

/// Returns the best of a few rounds, because it is a ceiling.
fn best(gpu: &Gpu, call: impl Fn() -> Result<()>) -> Result<f64> {
    const RUNS: usize = 10;
    call()?;
    let mut seconds = f64::MAX;
    for _ in 0..if gpu.small { 1 } else { 5 } {
        gpu.device.synchronize()?;
        let began = Instant::now();
        for _ in 0..RUNS {
            call()?;
        }
        gpu.device.synchronize()?;
        seconds = seconds.min(began.elapsed().as_secs_f64() / RUNS as f64);
    }
    Ok(seconds)
}
