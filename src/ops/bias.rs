//! The bias of a linear layer, written or added into a range of columns. It is frozen and has no gradient.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use super::change::Change;
use super::cpu;
use crate::with_real;

/// `y[:, at..at+N] = bias`, or `+= bias` with `add`: bias `[N]`, y [T, at+N or wider].
pub fn apply(bias: &Tensor, y: &Tensor, at: usize, add: bool) -> Result<()> {
    let (n, (_, width)) = (bias.dims1()?, y.dims2()?);
    assert!(at + n <= width, "a bias of {n} at {at} of {width}");
    #[cfg(feature = "cuda")]
    if y.device().is_cuda() {
        return gpu::apply(bias, y, at, add);
    }
    with_real!(y, T => {
        let bias = &*cpu::read::<T>(bias)?;
        cpu::edit(y, |y: &mut [T]| {
            y.par_chunks_mut(width).with_min_len(64).for_each(|row| {
                let row = &mut row[at..at + n];
                match add {
                    true => row.iter_mut().zip(bias).for_each(|(y, &bias)| *y += bias),
                    false => row.copy_from_slice(bias),
                }
            })
        })
    })
}

/// `base + bias` in memory of its own: bias `[N]`, base [T, N].
pub fn onto(bias: &Tensor, base: &Tensor) -> Result<Tensor> {
    let (n, (_, width)) = (bias.dims1()?, base.dims2()?);
    assert_eq!(n, width, "a bias for every column");
    #[cfg(feature = "cuda")]
    if base.device().is_cuda() && Change::Onto.is_on() {
        let sum = super::unwritten(base.shape(), base.dtype(), base.device())?;
        gpu::launch(bias, Some(base), &sum, 0)?;
        return Ok(sum);
    }
    let sum = base.copy()?;
    apply(bias, &sum, 0, true)?;
    Ok(sum)
}

/// The launch of `kernels/bias.cu`: one block per row; the bias is f32.
#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::{DType, Result, Tensor};

    use crate::ops::cuda::Launch;

    /// Writes or adds the bias to each row of `y`, from column `at` on.
    pub fn apply(bias: &Tensor, y: &Tensor, at: usize, add: bool) -> Result<()> {
        launch(bias, add.then_some(y), y, at)
    }

    /// Writes the bias, added to the columns of `from` if there is one.
    pub fn launch(bias: &Tensor, from: Option<&Tensor>, y: &Tensor, at: usize) -> Result<()> {
        let (n, (rows, width)) = (bias.dims1()?, y.dims2()?);
        let launch = Launch::new(y, "bias", "apply")?.of(DType::F32, bias);
        let launch = launch.optional(y.dtype(), from).tensor(y);
        launch.int(n).int(width).int(at).launch((rows, 1, 1), 256, 0)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::ops::judge;

    #[test]
    fn the_kernels_equal_the_host() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (rows, n, at, width) in [(1, 1, 0, 1), (5, 7, 3, 11), (3, 64, 16, 96), (3, 64, 4, 96)] {
                let (y, bias) = (gpu.random((rows, width), 1)?, gpu.random(n, 2)?);
                for add in [false, true] {
                    let (found, expected) = (gpu.put(&y)?, y.copy()?);
                    apply(&gpu.put_as(DType::F32, &bias)?, &found, at, add)?;
                    apply(&bias, &expected, at, add)?;
                    gpu.same(&found, &expected)?;
                }
                let (base, bias) = (gpu.put(&y)?, gpu.random(width, 2)?);
                let sum = onto(&gpu.put_as(DType::F32, &bias)?, &base)?;
                gpu.same(&sum, &onto(&bias, &y)?)?;
                gpu.within(0.0, &base, &gpu.put(&y)?.to_device(&candle_core::Device::Cpu)?)?;
            }
            Ok(())
        })
    }
}
