//! A device -> its measured rates of copies and matrix products, which a step's speed is compared with.

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use crate::facts::Precision;
use crate::ops::matmul::{self, Weight};

/// Measured rates of a device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Bytes that a copy reads and writes in a second.
    pub copy: f64,
    /// Floating-point operations of matrix products in a second.
    pub matrix: f64,
}

/// Rounds of each measurement. The best round counts, since the rates are upper limits.
const ROUNDS: usize = 5;

/// Measures with tensors of the type that a run's activations have.
pub fn measure(device: &Device, dtype: DType, precision: Precision) -> Result<Measured> {
    Ok(Measured { copy: copy(device)?, matrix: matrix(device, dtype, precision)? })
}

fn copy(device: &Device) -> Result<f64> {
    match device {
        Device::Cpu => Ok(copy_in_host()),
        _ => {
            let values = 64 << 20; // 256 MiB: five times the largest cache
            let (from, to) =
                (Tensor::zeros(values, DType::F32, device)?, Tensor::zeros(values, DType::F32, device)?);
            let seconds = best(device, 8, || crate::ops::flat::write(&to, &from))?;
            Ok(8.0 * values as f64 / seconds)
        }
    }
}

/// Copies with all threads at once, as operations do.
fn copy_in_host() -> f64 {
    let values = 16 << 20;
    let (from, mut to) = (vec![1f32; values], vec![0f32; values]);
    let mut seconds = f64::MAX;
    for _ in 0..ROUNDS {
        let began = Instant::now();
        to.par_chunks_mut(1 << 16)
            .zip(from.par_chunks(1 << 16))
            .for_each(|(to, from)| to.copy_from_slice(from));
        seconds = seconds.min(began.elapsed().as_secs_f64());
    }
    8.0 * values as f64 / seconds
}

/// Multiplies large square matrices. The weights are dense, because expanding 4-bit weights counts as memory traffic.
fn matrix(device: &Device, dtype: DType, precision: Precision) -> Result<f64> {
    let (size, repeats) = if device.is_cpu() { (1024, 2) } else { (8192, 8) };
    let random = |scale: f64| {
        let values: Vec<f32> = (0..size * size)
            .map(|i| ((i * 7919 % 1021) as f64 / 1021.0 - 0.5) as f32 * scale as f32)
            .collect();
        Tensor::from_vec(values, (size, size), &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
    };
    let (x, weight, y) =
        (random(1.0)?, Weight::Dense(random(0.1)?), Tensor::zeros((size, size), dtype, device)?);
    let seconds = best(device, repeats, || matmul::forward(&x, &weight, 1.0, &y, 0, 0.0, precision))?;
    Ok(2.0 * (size * size * size) as f64 / seconds)
}

/// Measures the seconds of one call if `repeats` calls are made in a row, in the best round.
fn best(device: &Device, repeats: usize, call: impl Fn() -> Result<()>) -> Result<f64> {
    call()?;
    let mut seconds = f64::MAX;
    for _ in 0..ROUNDS {
        device.synchronize()?;
        let began = Instant::now();
        for _ in 0..repeats {
            call()?;
        }
        device.synchronize()?;
        seconds = seconds.min(began.elapsed().as_secs_f64() / repeats as f64);
    }
    Ok(seconds)
}
