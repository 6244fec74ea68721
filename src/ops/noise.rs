//! NEFTune's noise on embeddings (Jain and others 2023), from counters like dropout's masks: it follows the token, so
//! that packing examples in another way does not change it.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::cpu::{self, Real};
use super::dropout::mix;
use crate::with_real;

/// Tells this noise from dropout's masks, whose sites are small numbers.
const SITE: u64 = u64::from_be_bytes(*b"neftune\0");

/// The bound of each row's noise, on the rows' device.
pub enum Bounds {
    /// Bounds on the host.
    Here(Vec<f64>),
    /// On a GPU, in f32.
    #[cfg(feature = "cuda")]
    There(Tensor),
}

impl Bounds {
    /// Returns alpha / sqrt(length * C) for rows of `width` columns (C). `lengths` has one for each row: that of the
    /// padded micro-batch, as transformers takes it.
    pub fn send(alpha: f64, lengths: &[u32], width: usize, device: &Device) -> Result<Bounds> {
        let most = |length: &u32| alpha / (f64::from(*length) * width as f64).sqrt();
        let most = lengths.iter().map(most);
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            let most: Vec<f32> = most.map(|most| most as f32).collect();
            return super::cuda::upload(&most, device).map(Bounds::There);
        }
        assert!(device.is_cpu(), "a CPU or a GPU with kernels");
        Ok(Bounds::Here(most.collect()))
    }

    fn count(&self) -> usize {
        match self {
            Bounds::Here(most) => most.len(),
            #[cfg(feature = "cuda")]
            Bounds::There(most) => most.elem_count(),
        }
    }
}

/// Adds `factor * u` to x [T, C] in place, each u uniform within its row's bound. There is one of `keys` per row.
pub fn add(x: &Tensor, bounds: &Bounds, factor: f64, keys: &Tensor) -> Result<()> {
    let (rows, width) = x.dims2()?;
    assert!(keys.elem_count() == rows && bounds.count() == rows, "one key and one bound a row");
    #[cfg_attr(not(feature = "cuda"), allow(clippy::infallible_destructuring_match))]
    let most = match bounds {
        #[cfg(feature = "cuda")]
        Bounds::There(most) => return gpu::add(x, most, factor, keys),
        Bounds::Here(most) => most,
    };
    let keys = &*cpu::read::<i64>(keys)?;
    with_real!(x, T => cpu::edit(x, |x: &mut [T]| {
        x.par_chunks_mut(width).zip(keys.par_iter().zip(most)).for_each(|(x, (key, &most))| {
            let most = T::of(most);
            let row = mix(key.cast_unsigned() ^ mix(SITE));
            for (column, x) in x.iter_mut().enumerate() {
                // 24 bits: exact in f32, in [0, 1).
                let share = (mix(row.wrapping_add(column as u64)) >> 40) as f64 / f64::from(1 << 24);
                *x += T::of(factor) * (T::of(share) * (most + most) - most);
            }
        });
    }))
}

/// The launch of `kernels/noise.cu`: one block per row.
#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::DType;

    use super::*;
    use crate::ops::cuda::Launch;

    /// Adds the noise to `x` in place. `most`: the bound of each row.
    pub fn add(x: &Tensor, most: &Tensor, factor: f64, keys: &Tensor) -> Result<()> {
        let (rows, width) = x.dims2()?;
        let launch = Launch::new(x, "noise", "add")?.tensor(x).of(DType::I64, keys).of(DType::F32, most);
        launch.long(mix(SITE)).float(factor).int(width).launch((rows, 1, 1), 128, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{dropout, judge};
    use candle_core::DType;

    /// Returns the noise on zeros.
    fn noise(width: usize, factor: f64, keys: &[u64], length: u32) -> Result<Vec<f64>> {
        let x = Tensor::zeros((keys.len(), width), DType::F64, &Device::Cpu)?;
        let bounds = Bounds::send(5.0, &vec![length; keys.len()], width, &Device::Cpu)?;
        add(&x, &bounds, factor, &dropout::keys(keys, &Device::Cpu)?)?;
        cpu::to_f64(&x)
    }

    #[test]
    fn noise_is_uniform_within_its_bound_and_follows_the_token() -> Result<()> {
        let (rows, width) = (64, 256);
        let keys: Vec<u64> = (0..rows as u64).map(mix).collect();
        let found = noise(width, 1.0, &keys, 100)?;
        let most = 5.0 / (100.0 * width as f64).sqrt();
        assert!(found.iter().all(|value| value.abs() <= most));
        let mean =
            |of: &dyn Fn(f64) -> f64| found.iter().map(|&value| of(value)).sum::<f64>() / found.len() as f64;
        // The mean of a uniform value is 0, its variance is a third of the bound's square.
        assert!(mean(&|value| value).abs() < 0.02 * most);
        assert!((mean(&|value| value * value) / (most * most / 3.0) - 1.0).abs() < 0.02);
        let reversed: Vec<u64> = keys.iter().rev().copied().collect();
        let moved = noise(width, 1.0, &reversed, 100)?;
        assert_eq!(found[3 * width..4 * width], moved[(rows - 4) * width..(rows - 3) * width]);
        // A longer example and a factor change the size alone.
        let longer = noise(width, 3.0, &keys, 400)?;
        assert!(longer.iter().zip(&found).all(|(longer, noise)| (longer - 1.5 * noise).abs() < 1e-15));
        Ok(())
    }

    #[test]
    fn the_kernels_add_what_the_host_adds() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (rows, width) in [(1, 1), (33, 7), (5, 96), (2, 1100)] {
                let numbers: Vec<u64> = (0..rows as u64).map(|row| mix(row) | 1 << 63).collect();
                let lengths: Vec<u32> = (0..rows as u32).map(|row| 3 + row).collect();
                let start = gpu.random((rows, width), 1)?;
                let (expected, found) = (start.as_tensor().copy()?, gpu.put(&start)?);
                for (x, device) in [(&expected, &Device::Cpu), (&found, &gpu.device)] {
                    let bounds = Bounds::send(15.0, &lengths, width, device)?;
                    add(x, &bounds, 1.5, &dropout::keys(&numbers, device)?)?;
                }
                gpu.same(&found, &expected)?;
            }
            Ok(())
        })
    }
}
