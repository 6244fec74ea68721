//! Dropout from counters. The mask is a function of (row key, site, column), so the backward pass computes it again
//! instead of keeping it, and packing examples in another way does not change it.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::cpu::{self, Real};
use crate::with_real;

/// Uploads the rows' keys, one number for each token of an example in a given epoch, to the rows' device: `[T]`, the
/// bits of u64 in i64.
pub fn keys(keys: &[u64], device: &Device) -> Result<Tensor> {
    let bits: Vec<i64> = keys.iter().map(|key| key.cast_signed()).collect();
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return super::cuda::upload(&bits, device);
    }
    Tensor::from_vec(bits, keys.len(), device)
}

/// x [T, C] -> x * mask / (1 - p), with one of `keys` per row. The map is linear and symmetric, so the same call
/// also maps gradients back.
pub fn apply(x: &Tensor, p: f64, keys: &Tensor, site: u64) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    assert!(
        keys.elem_count() == rows && (0.0..1.0).contains(&p),
        "dropout of {p} on {rows} rows, {} keys",
        keys.elem_count()
    );
    // An element is dropped if the top 32 bits of its hash are below p * 2^32.
    let threshold = (p * 4_294_967_296.0) as u64;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return gpu::apply(x, 1.0 / (1.0 - p), threshold, keys, mix(site));
    }
    let keys = &*cpu::read::<i64>(keys)?;
    with_real!(x, T => {
        let scale = T::of(1.0 / (1.0 - p));
        let mut y = vec![T::ZERO; rows * width];
        let x = &*cpu::read::<T>(x)?;
        y.par_chunks_mut(width).zip(x.par_chunks(width)).zip(keys).for_each(|((y, x), key)| {
            let row = mix(key.cast_unsigned() ^ mix(site));
            for (column, (y, &x)) in y.iter_mut().zip(x).enumerate() {
                let keep = mix(row.wrapping_add(column as u64)) >> 32 >= threshold;
                *y = if keep { x * scale } else { T::ZERO };
            }
        });
        cpu::tensor(y, (rows, width))
    })
}

/// Computes SplitMix64's output function (Steele, Lea, Flood 2014).
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The launch of `kernels/dropout.cu`: one block per row.
#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::{DType, Result, Tensor};

    use crate::ops::cuda::Launch;

    /// Returns `x` with dropped values set to zero and the others multiplied by `scale`. `keys`: one for each row.
    pub fn apply(x: &Tensor, scale: f64, threshold: u64, keys: &Tensor, mixed_site: u64) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let y = crate::ops::unwritten((rows, width), x.dtype(), x.device())?;
        let launch = Launch::new(x, "dropout", "apply")?.tensor(x).of(DType::I64, keys).tensor(&y);
        let launch = launch.long(mixed_site).long(threshold).float(scale).int(width);
        launch.launch((rows, 1, 1), 256, 0)?;
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;

    #[test]
    fn the_kernels_drop_what_the_host_drops() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (rows, width) in [(1, 1), (33, 7), (5, 96)] {
                let x = gpu.random((rows, width), 1)?;
                let numbers: Vec<u64> = (0..rows as u64).map(|row| mix(row) | 1 << 63).collect();
                let on = |device: &Device| keys(&numbers, device);
                let found = apply(&gpu.put(&x)?, 0.3, &on(&gpu.device)?, 5)?;
                let expected = apply(&x, 0.3, &on(&Device::Cpu)?, 5)?;
                gpu.same(&found, &expected)?;
                let dropped = |y: &Tensor| -> Result<Vec<bool>> {
                    Ok(cpu::to_f64(&y.to_device(&Device::Cpu)?)?.iter().map(|&y| y == 0.0).collect())
                };
                assert_eq!(dropped(&found)?, dropped(&expected)?);
            }
            Ok(())
        })
    }

    #[test]
    fn drops_the_asked_share_keeps_the_mean_and_depends_on_every_counter() -> Result<()> {
        let x = Tensor::ones((64, 1000), candle_core::DType::F64, &candle_core::Device::Cpu)?;
        let on_host = |numbers: Vec<u64>| keys(&numbers, &Device::Cpu);
        let keys = on_host((0..64).collect())?;
        let y = apply(&x, 0.1, &keys, 3)?;
        let dropped = cpu::to_f64(&y)?.iter().filter(|&&y| y == 0.0).count() as f64 / 64_000.0;
        assert!((dropped - 0.1).abs() < 0.005, "dropped {dropped}");
        assert!((y.mean_all()?.to_scalar::<f64>()? - 1.0).abs() < 0.01);
        assert_eq!(cpu::to_f64(&y)?, cpu::to_f64(&apply(&x, 0.1, &keys, 3)?)?);
        assert_ne!(cpu::to_f64(&y)?, cpu::to_f64(&apply(&x, 0.1, &keys, 4)?)?);
        // The mask follows the key, at any place of the row.
        let reversed = on_host((0..64).rev().collect())?;
        let moved = apply(&x, 0.1, &reversed, 3)?;
        assert_eq!(y.get(5)?.to_vec1::<f64>()?, moved.get(58)?.to_vec1::<f64>()?);
        Ok(())
    }
}
