//! Root-mean-square norm of each row of C: `y = w * x / sqrt(mean(x^2) + eps)`.

use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

use super::cpu::{self, Real};
#[cfg(feature = "cuda")]
use super::fp8::{self, Scaled};
use crate::with_real;

/// Rows per task: a few hundred kilobytes.
const ROWS: usize = 64;

/// Returns the definition, in differentiable primitives; the functions below are compared with it.
pub fn formula(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    x.broadcast_mul(&scale)?.broadcast_mul(w)
}

/// x [T, C], w `[C]` -> y [T, C].
pub fn forward(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    forward_beside(x, w, eps, 0)
}

/// Does `forward` into the first columns of [T, C + spare]; the spare columns are not written. They need a GPU.
pub fn forward_beside(x: &Tensor, w: &Tensor, eps: f64, spare: usize) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return gpu::forward(x, w, eps, spare, None, None);
    }
    assert_eq!(spare, 0, "spare columns on a CPU");
    with_real!(x, T => {
        let mut y = vec![T::ZERO; rows * width];
        let (x, w) = (&*cpu::read::<T>(x)?, &*cpu::read::<T>(w)?);
        y.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width)).for_each(|(y, x)| {
            cpu::vectorized(#[inline(always)] || {
                for (y, x) in y.chunks_mut(width).zip(x.chunks(width)) {
                    let scale = reciprocal_rms(x, eps);
                    for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                        *y = x * scale * w;
                    }
                }
            })
        });
        cpu::tensor(y, (rows, width))
    })
}

/// Does `forward_beside`, and also returns 1 / rms of each row, f32 `[T]`. It needs a GPU.
#[cfg(feature = "cuda")]
pub fn forward_and_scales(x: &Tensor, w: &Tensor, eps: f64, spare: usize) -> Result<(Tensor, Tensor)> {
    let scales = super::unwritten(x.dim(0)?, candle_core::DType::F32, x.device())?;
    Ok((gpu::forward(x, w, eps, spare, Some(&scales), None)?, scales))
}

/// `forward_and_scales`, and the result without its spare columns in 8 bits.
#[cfg(feature = "cuda")]
pub fn forward_rounded(x: &Tensor, w: &Tensor, eps: f64, spare: usize) -> Result<(Tensor, Tensor, Scaled)> {
    let (rows, width) = x.dims2()?;
    let scales = super::unwritten(rows, candle_core::DType::F32, x.device())?;
    let rounded = fp8::empty(rows, width, x)?;
    Ok((gpu::forward(x, w, eps, spare, Some(&scales), Some(&rounded))?, scales, rounded))
}

/// Adds the gradient of x to `dx`: with n = x / rms, `dx += (dy*w - n * mean(dy*w*n)) / rms`. The weight is frozen. On
/// a GPU, `dx` may have more columns than x behind those that are added to.
pub fn backward(dy: &Tensor, x: &Tensor, w: &Tensor, eps: f64, dx: &Tensor) -> Result<()> {
    let (_, width) = x.dims2()?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return gpu::backward(dy, x, w, eps, dx, None);
    }
    with_real!(x, T => {
        let (x, w, dy) = (&*cpu::read::<T>(x)?, &*cpu::read::<T>(w)?, &*cpu::read::<T>(dy)?);
        cpu::edit(dx, |dx: &mut [T]| {
            let rows = x.par_chunks(ROWS * width).zip(dy.par_chunks(ROWS * width));
            dx.par_chunks_mut(ROWS * width).zip(rows).for_each(|(dx, (x, dy))| {
                cpu::vectorized(#[inline(always)] || {
                    for ((dx, x), dy) in dx.chunks_mut(width).zip(x.chunks(width)).zip(dy.chunks(width)) {
                        backward_row(dx, x, dy, w, eps);
                    }
                })
            })
        })
    })
}

/// Does `backward` on a GPU. Returns the sum in `dx`, without columns behind x's, in 8 bits.
#[cfg(feature = "cuda")]
pub fn backward_rounded(dy: &Tensor, x: &Tensor, w: &Tensor, eps: f64, dx: &Tensor) -> Result<Scaled> {
    let rounded = fp8::empty(x.dim(0)?, x.dim(1)?, x)?;
    gpu::backward(dy, x, w, eps, dx, Some(&rounded))?;
    Ok(rounded)
}

#[inline(always)]
fn backward_row<T: Real>(dx: &mut [T], x: &[T], dy: &[T], w: &[T], eps: f64) {
    let scale = reciprocal_rms(x, eps);
    let dot = cpu::dot3(dy, w, x);
    // mean(dy*w*n) * n / rms, with n = x * scale: scale^3 * dot / C * x.
    let pull = scale * scale * scale * dot / T::of(x.len() as f64);
    for (((dx, &x), &dy), &w) in dx.iter_mut().zip(x).zip(dy).zip(w) {
        *dx += dy * w * scale - x * pull;
    }
}

#[inline(always)]
fn reciprocal_rms<T: Real>(x: &[T], eps: f64) -> T {
    T::ONE / Real::sqrt(cpu::dot(x, x) / T::of(x.len() as f64) + T::of(eps))
}

/// The launches of `kernels/rms_norm.cu`: one block per row; w is f32.
#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::{DType, Result, Tensor};

    use crate::ops::cuda::Launch;
    use crate::ops::fp8::Scaled;

    const THREADS: usize = 256;

    /// Returns the norm of each row of `x`, on the GPU, with spare columns behind it. `scales` gets 1 / rms of each
    /// row, and `rounded` the norm in 8 bits.
    pub fn forward(
        x: &Tensor,
        w: &Tensor,
        eps: f64,
        spare: usize,
        scales: Option<&Tensor>,
        rounded: Option<&Scaled>,
    ) -> Result<Tensor> {
        let ((rows, width), stride) = (x.dims2()?, x.dim(1)? + spare);
        let y = crate::ops::unwritten((rows, stride), x.dtype(), x.device())?;
        let name = rounded.map_or("forward", |_| "forward_rounded");
        let launch = Launch::new(x, "rms_norm", name)?.tensor(x).of(DType::F32, w).tensor(&y);
        let launch = launch.optional(DType::F32, scales).rounded(rounded);
        launch.int(width).int(stride).float(eps).launch((rows, 1, 1), THREADS, 0)?;
        Ok(y)
    }

    /// Adds the gradient of `x` to the first columns of `dx`, which `rounded` gets in 8 bits.
    pub fn backward(
        dy: &Tensor,
        x: &Tensor,
        w: &Tensor,
        eps: f64,
        dx: &Tensor,
        rounded: Option<&Scaled>,
    ) -> Result<()> {
        let ((rows, width), (_, stride)) = (x.dims2()?, dx.dims2()?);
        assert!(width <= stride, "a gradient of {width} columns in {stride}");
        let name = rounded.map_or("backward", |_| "backward_rounded");
        let launch = Launch::new(x, "rms_norm", name)?.tensor(dy).tensor(x).of(DType::F32, w).tensor(dx);
        let launch = launch.rounded(rounded);
        launch.int(width).int(stride).float(eps).launch((rows, 1, 1), THREADS, 0)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::ops::judge;

    #[test]
    fn the_kernels_equal_the_formula() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (rows, width) in [(1, 1), (3, 7), (129, 96), (2, 1000), (1, 4096)] {
                let (x, dy) = (gpu.random((rows, width), 1)?, gpu.random((rows, width), 3)?);
                let w = gpu.random(width, 2)?;
                let expected = formula(&x, &w, 1e-5)?;
                let w = gpu.put_as(DType::F32, &w)?;
                gpu.same(&forward(&gpu.put(&x)?, &w, 1e-5)?, &expected)?;
                gpu.same(&judge::first(&forward_beside(&gpu.put(&x)?, &w, 1e-5, 64)?, width)?, &expected)?;
                kept_scales(gpu, &x, &w, &expected)?;
                let dx = gpu.put(&dy)?; // the gradient is added to the tensor's content
                backward(&gpu.put(&dy)?, &gpu.put(&x)?, &w, 1e-5, &dx)?;
                gpu.same(&dx, &(judge::gradient(&x, &expected, &dy)? + dy.as_tensor())?)?;
                // Beside the gradient lie columns that stay as they are.
                let beside = gpu.random((rows, 64), 5)?;
                let wide = gpu.put(&Tensor::cat(&[dy.as_tensor(), beside.as_tensor()], 1)?)?;
                backward(&gpu.put(&dy)?, &gpu.put(&x)?, &w, 1e-5, &wide)?;
                let same = judge::first(&wide, width)?.to_dtype(DType::F64)?;
                gpu.within(0.0, &dx, &same)?;
                gpu.within(0.0, &wide.to_device(&Device::Cpu)?.narrow(1, width, 64)?.contiguous()?, &beside)?;
            }
            Ok(())
        })
    }

    #[test]
    fn value_and_gradient_equal_the_formula() -> Result<()> {
        for (rows, width) in [(1, 1), (3, 7), (129, 96), (130, 100)] {
            let x = judge::random((rows, width), 1)?;
            let w = (judge::random(width, 2)?.as_tensor() + 1.0)?;
            let dy = judge::random((rows, width), 3)?;
            judge::same(&forward(&x, &w, 1e-5)?, &formula(&x, &w, 1e-5)?, 1e-12)?;
            let expected = judge::gradient(&x, &formula(&x, &w, 1e-5)?, &dy)?;
            let dx = x.ones_like()?;
            backward(&dy, &x, &w, 1e-5, &dx)?;
            judge::same(&(dx - 1.0)?, &expected, 1e-11)?;
        }
        Ok(())
    }

    #[test]
    fn gradient_equals_finite_differences() -> Result<()> {
        let (x, w, dy) = (judge::random((2, 5), 1)?, judge::random(5, 2)?, judge::random((2, 5), 3)?);
        let dx = x.zeros_like()?;
        backward(&dy, &x, &w, 1e-5, &dx)?;
        judge::finite_differences(&x, &dy, &dx, 1e-7, |x| forward(x, &w, 1e-5))
    }

    /// Checks that the scales give the norm of x with the bits of `forward`.
    #[cfg(feature = "cuda")]
    fn kept_scales(gpu: &judge::Gpu, x: &Tensor, w: &Tensor, expected: &Tensor) -> Result<()> {
        let (y, scales) = forward_and_scales(&gpu.put(x)?, w, 1e-5, 64)?;
        let again = forward(&gpu.put(x)?, w, 1e-5)?.to_device(&Device::Cpu)?;
        gpu.within(0.0, &again, &judge::first(&y, x.dim(1)?)?.to_dtype(DType::F64)?)?;
        let on_host = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64);
        let scaled = x.broadcast_mul(&on_host(&scales)?.unsqueeze(1)?)?.broadcast_mul(&on_host(w)?)?;
        gpu.same(&scaled.to_device(&gpu.device)?, expected)
    }

    #[cfg(not(feature = "cuda"))]
    fn kept_scales(_: &judge::Gpu, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<()> {
        Ok(())
    }
}
