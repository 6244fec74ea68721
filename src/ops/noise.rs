//! NEFTune's noise on embeddings (Jain and others 2023), from counters like dropout's masks: it follows the token, so
//! that packing examples in another way does not change it.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::cpu::{self, Real};
use super::dropout::mix;
use crate::with_real;

/// Tells this noise from dropout's masks, whose sites are small numbers.
const SITE: u64 = u64::from_be_bytes(*b"neftune\0");

/// x [T, C] -> x + factor * u, each u uniform in ±alpha / sqrt(length * C). There is one of `keys` and one of `lengths`
/// per row; a length is that of the padded micro-batch, as transformers takes it. It is on the host only.
pub fn add(x: &Tensor, alpha: f64, factor: f64, keys: &[u64], lengths: &[u32]) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    assert!(keys.len() == rows && lengths.len() == rows, "one key and one length a row");
    if x.device().is_cuda() {
        candle_core::bail!("NEFTune's noise is made on the host");
    }
    with_real!(x, T => {
        let mut y = vec![T::ZERO; rows * width];
        let x = &*cpu::read::<T>(x)?;
        let lines = y.par_chunks_mut(width).zip(x.par_chunks(width));
        lines.zip(keys.par_iter().zip(lengths)).for_each(|((y, x), (key, length))| {
            let most = T::of(alpha / (f64::from(*length) * width as f64).sqrt());
            let row = mix(key ^ mix(SITE));
            for (column, (y, &x)) in y.iter_mut().zip(x).enumerate() {
                // 24 bits: exact in f32, in [0, 1).
                let share = (mix(row.wrapping_add(column as u64)) >> 40) as f64 / f64::from(1 << 24);
                *y = x + T::of(factor) * (T::of(share) * (most + most) - most);
            }
        });
        cpu::tensor(y, (rows, width))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn noise_is_uniform_within_its_bound_and_follows_the_token() -> Result<()> {
        let (rows, width) = (64, 256);
        let x = Tensor::zeros((rows, width), DType::F64, &Device::Cpu)?;
        let keys: Vec<u64> = (0..rows as u64).map(mix).collect();
        let noise = cpu::to_f64(&add(&x, 5.0, 1.0, &keys, &vec![100; rows])?)?;
        let most = 5.0 / (100.0 * width as f64).sqrt();
        assert!(noise.iter().all(|value| value.abs() <= most));
        let mean =
            |of: &dyn Fn(f64) -> f64| noise.iter().map(|&value| of(value)).sum::<f64>() / noise.len() as f64;
        // The mean of a uniform value is 0, its variance is a third of the bound's square.
        assert!(mean(&|value| value).abs() < 0.02 * most);
        assert!((mean(&|value| value * value) / (most * most / 3.0) - 1.0).abs() < 0.02);
        let reversed: Vec<u64> = keys.iter().rev().copied().collect();
        let moved = cpu::to_f64(&add(&x, 5.0, 1.0, &reversed, &vec![100; rows])?)?;
        assert_eq!(noise[3 * width..4 * width], moved[(rows - 4) * width..(rows - 3) * width]);
        // A longer example and a factor change the size alone.
        let longer = cpu::to_f64(&add(&x, 5.0, 3.0, &keys, &vec![400; rows])?)?;
        assert!(longer.iter().zip(&noise).all(|(longer, noise)| (longer - 1.5 * noise).abs() < 1e-15));
        Ok(())
    }
}
